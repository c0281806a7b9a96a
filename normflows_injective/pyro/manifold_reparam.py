"""Latent variables on a manifold, seen in a chart."""

from __future__ import annotations

from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam.reparam import Reparam
from torch.distributions import Transform, constraints

from ..errors import OptionError, UnsupportedModelError


@final
class ManifoldReparam(Reparam):
    r"""Reparameterise a site on a manifold by the coordinates of a chart.

    .. math:: z \in \mathbb R^d, \quad x = \varphi(z), \quad
              \log p(z) = \log p(x) + \tfrac12 \log\det \varphi'(z)^\top \varphi'(z)

    A site ``"x"`` becomes a latent ``"x_coordinates"`` without constraint, which NUTS, NeuTra and
    every autoguide can reach, and a deterministic ``"x"``. Use it where a distribution's support
    has no chart of its own (Pyro's laws on the sphere), or to choose another chart than the
    registered one, such as one whose missing point is far from the posterior. The model draws from
    the site's own law, which therefore needs a sampler. Pyro's ``VonMises3D`` has none: take a
    uniform prior and ``pyro.factor`` instead.

    Args:
        transform: Chart from :math:`\mathbb R^d` to the manifold, such as
            ``FlowTransform(SphereChart(3, "stereographic"))``. It must not wrap around, as a chart
            with an azimuth does, which counts every point many times.

    Raises:
        OptionError: If this is no transform, if its chart wraps around, or if its volumes are
            against another measure than the site's density.
        UnsupportedModelError: If the site is observed.

    References:
        Change of variables, as if the chart were registered as the ``biject_to`` of the support.

    Examples:
        >>> from pyro import poutine
        >>> from normflows_injective.flows import SphereChart
        >>> from normflows_injective.pyro import FlowTransform
        >>> chart = FlowTransform(SphereChart(3, "stereographic"))
        >>> @poutine.reparam(config={"x": ManifoldReparam(chart)})
        ... def model():
        ...     return pyro.sample("x", dist.ProjectedNormal(torch.tensor([0.0, 0.0, 5.0])))
        >>> trace = poutine.trace(model).get_trace()
        >>> trace.nodes["x_coordinates"]["value"].shape, trace.nodes["x"]["value"].shape
        (torch.Size([2]), torch.Size([3]))
    """

    def __init__(self, transform: Transform) -> None:
        if not isinstance(transform, Transform):
            raise OptionError(
                f"transform must be a torch transform, got {type(transform).__name__}. Wrap "
                "layers of a chart by nfp.FlowTransform."
            )
        circular = _circular(transform)
        if circular:
            raise OptionError(
                f"Coordinates {circular} of the chart are angles, so that a line of latents would "
                "wind around the manifold. Use kind='stereographic' of SphereChart or TorusChart."
            )
        # Samplers ask for the same values again after changing other sites.
        self.transform = transform.with_cache(0)

    def apply(self, msg: Any) -> Any:
        """Replace one site."""
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        if msg["is_observed"]:
            raise UnsupportedModelError(
                f"Site {name!r} is observed, and ManifoldReparam serves latent variables only. "
                "Leave it out of the config: an observed point needs no coordinates."
            )
        self._check_measure(name, fn)
        z = pyro.sample(
            f"{name}_coordinates",
            # The law itself, seen in the chart: without a condition this draws from the prior.
            dist.TransformedDistribution(fn, [self.transform.inv]),
            obs=None if value is None else self.transform.inv(value),
            infer={"is_observed": False},
        )
        if value is None:
            value = self.transform(z)
        return {
            "fn": dist.Delta(value, event_dim=fn.event_dim).mask(False),
            "value": value,
            "is_observed": True,
        }

    def _check_measure(self, name: str, fn: Any) -> None:
        while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
            fn = fn.base_dist
        on_simplex = fn.support is constraints.simplex
        if isinstance(fn, torch.distributions.TransformedDistribution):
            fn = fn.transforms[-1]
        expected = getattr(fn, "measure", "lebesgue" if on_simplex else "hausdorff")
        measure = getattr(self.transform, "measure", expected)
        if measure != expected:
            raise OptionError(
                f"The density of site {name!r} is against the {expected} measure, but the chart's "
                f"volume against the {measure} measure. Build its last layer with "
                f"measure={expected!r}."
            )


def _circular(transform: Transform) -> list[int]:
    stack = getattr(transform, "stack", None)
    if stack is None or not stack.raises_dimension:
        return []
    first = stack.composite[0]
    return list(getattr(first, "ind_circ", []))
