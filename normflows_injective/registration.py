"""Opt-in registration of the components on the namespaces of normflows."""

from __future__ import annotations

import normflows as nf

from . import distributions, flows, nets
from .errors import RegistrationError
from .models.assignment import AssignmentFlow
from .models.exact_likelihood import ExactLikelihood
from .models.injective import InjectiveNormalizingFlow
from .models.loss_module import ForwardKLD
from .models.surrogate_likelihood import SurrogateLikelihood

__all__ = ["register"]


def register() -> None:
    """Hang the components on normflows: ``nf.InjectiveNormalizingFlow``, ``nf.flows.Pad``, ...

    Nothing is registered on import. Calling it again changes nothing.

    Raises:
        RegistrationError: If normflows already has another object under one of the names; then
            nothing is registered.

    Examples:
        >>> register()
        >>> nf.flows.FreeFormInjection is flows.FreeFormInjection
        True
    """
    planned = [
        (nf, "InjectiveNormalizingFlow", InjectiveNormalizingFlow),
        (nf, "AssignmentFlow", AssignmentFlow),
        (nf, "SurrogateLikelihood", SurrogateLikelihood),
        (nf, "ExactLikelihood", ExactLikelihood),
        (nf, "ForwardKLD", ForwardKLD),
        *((nf.flows, name, getattr(flows, name)) for name in flows.__all__),
        *(
            (nf.distributions, name, getattr(distributions, name))
            for name in distributions.__all__
        ),
        *((nf.nets, name, getattr(nets, name)) for name in nets.__all__),
    ]
    for namespace, name, component in planned:
        if getattr(namespace, name, component) is not component:
            raise RegistrationError(
                f"{namespace.__name__}.{name} exists and is not ours. Nothing was registered; use "
                f"{component.__module__}.{name} directly instead."
            )
    for namespace, name, component in planned:
        setattr(namespace, name, component)
