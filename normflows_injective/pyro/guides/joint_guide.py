"""The common part of our guides over all latent variables at once."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import Transform, biject_to

from ...checks import check_choice, check_count, check_finite, check_positive, describe
from ...distributions.particle_guard import ParticleGuard
from ...errors import InjectiveFlowError, OptionError, ParamStoreWarning
from ...flows.guides.normal_fit import NormalFit, as_normal_fit
from ...flows.guides.pathfinder import pathfinder
from ..memory.taken_names import names_are_free, refuse_taken_names, trains_now
from .guide_fit import fit_of_guide
from .latent_sites import refuse_unserved_sites
from .log_joint import LogJoint
from .site_quantiles import check_levels, site_quantiles

_WIDTH = (
    "A guide without width is singular, and its objective no bound on the evidence. Give e.g. "
    "0.1, or None for the width of the curvature at the start."
)
# Where the curvature is not known.
_UNKNOWN_SCALE = 0.1
_GUARD_ADVICE = (
    "It limits gradients of single draws to a multiple of the usual one; None for none."
)
_DIVERGED = (
    "The guide has diverged: start again with a smaller learning rate, more particles or "
    "gradients that are clipped."
)
Guide = TypeVar("Guide", bound="JointGuide")


class JointGuide(AutoContinuous):
    """A guide over the unconstrained latents (D,) of a model, in one auxiliary site."""

    # It is abstract, although the metaclass of Pyro's modules leaves no room for Python's own.

    # Medians and quantiles are estimated from this number of draws.
    num_quantile_samples = 1000
    # The normal law of a warm start, None without one.
    start: NormalFit | None = None
    # Attributes that only unbuilt guides need, and that may hold objects which cannot be pickled.
    recipe: tuple[str, ...] = ()

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float | None = None,
        guard: float | None = 50.0,
    ) -> None:
        if not callable(model) or isinstance(model, type):
            raise OptionError(
                f"model must be a Pyro model, a callable with sample statements, got "
                f"{describe(model)}. Pass the function itself, not what it returns."
            )
        if not callable(init_loc_fn):
            raise OptionError(
                "init_loc_fn must be an initialisation of Pyro, such as "
                f"pyro.infer.autoguide.init_to_median, got {describe(init_loc_fn)}."
            )
        if init_scale is not None:
            init_scale = float(check_positive(init_scale, "init_scale", _WIDTH))
        if guard is not None and check_positive(guard, "guard", _GUARD_ADVICE) <= 1:
            raise OptionError(f"guard must exceed 1, got {guard!r}. {_GUARD_ADVICE}")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._init_scale = init_scale
        self._names_checked = False
        self._guard = None if guard is None else ParticleGuard(float(guard))

    @abstractmethod
    def make_parameters(self, log_joint: LogJoint) -> None:
        """Create the parameters, once ``latent_dim`` and the prototype are known."""

    @abstractmethod
    def start_at(self, fit: NormalFit) -> None:
        """Give the guide, as far as it can, the mean and covariance of a normal law."""

    @abstractmethod
    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """The guide's distribution over the unconstrained latents (D,)."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent variables by sample statements."""
        self.build(*args, **kwargs)
        if torch.is_grad_enabled():
            self._claim_names()
        return super().forward(*args, **kwargs)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw the unconstrained latents (D,), whose gradients are guarded.

        Raises:
            NonFiniteError: If a draw is not finite, before it reaches a parameter.
        """
        draw: Tensor = super().sample_latent(*args, **kwargs)
        if torch.is_grad_enabled() and torch._C._get_tracing_state() is None:
            check_finite(draw, f"a draw of {type(self).__name__}", _DIVERGED)
        return draw if self._guard is None else self._guard(draw)

    def build(self: Guide, *args: Any, warm_start: Any = None, **kwargs: Any) -> Guide:
        r"""Run the model once to make the parameters, as ``load_state_dict`` needs them.

        Args:
            *args: Arguments of the model.
            warm_start: Normal law of the unconstrained latents at which the guide starts, in
                place of the prototype: ``"pathfinder"``, the best of normal fits along paths of
                an optimiser, some hundred gradients of the model; another guide of the same
                sites, whose mean and covariance are estimated by draws, for more than 256 latents
                variances alone; or a mean (D,) and a covariance (D, D), or variances (D,).
                ``guide.start`` says what was found.
            **kwargs: Keyword arguments of the model.

        Returns:
            The guide.

        Raises:
            OptionError: If warm_start is none of these, or no positive definite covariance.
            ShapeError: If mean or covariance have another shape.
            NonFiniteError: If no normal fit has a finite bound.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            # NeuTra asks for plates, also of a guide that was loaded and never called.
            with poutine.block():
                self._create_plates(*args, **kwargs)
        if warm_start is not None:
            fit = self._normal_fit(warm_start, args, kwargs)
            with torch.no_grad():
                self.start_at(fit)
            self.start = fit
        return self

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the guide.

        Args:
            num_samples: Number of samples n.
            *args: Arguments of the model.
            **kwargs: Keyword arguments of the model.

        Returns:
            Samples (n, *) of every latent variable by its name.
        """
        num_samples = check_count(num_samples, "num_samples")
        latents = self._draw(num_samples, *args, **kwargs)
        return {name: transform(values) for name, transform, values in self._coordinates(latents)}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Medians of every latent variable, component by component, see :meth:`quantiles`."""
        levels = torch.tensor([0.5])
        return {name: rows[0] for name, rows in self._quantiles(levels, args, kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every component of every latent variable, from draws of the guide.

        Each is a quantile of its own component. Where components depend on each other, as on a
        simplex or a sphere, the quantiles of one level are in general no point of the support: use
        :meth:`sample_posterior` for points.

        Args:
            quantiles: q numbers between 0 and 1.
            *args: Arguments of the model.
            **kwargs: Keyword arguments of the model.

        Returns:
            Tensors (q, *) by the names of the variables.

        Raises:
            OptionError: If the levels are no such numbers.
        """
        return self._quantiles(check_levels(quantiles), args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own leaves the live guide without its model.
        model, master = self._model, self.master
        try:
            return dict(super().__getstate__(), _names_checked=False, **dict.fromkeys(self.recipe))
        finally:
            self._model, self.master = model, master

    def __deepcopy__(self: Guide, memo: dict[int, Any]) -> Guide:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        # A copy guides the same model and keeps the recipe.
        copied._model = self._model
        for name in self.recipe:
            object.__setattr__(copied, name, getattr(self, name))
        return copied

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
            refuse_unserved_sites(self.prototype_trace)
            self.make_parameters(LogJoint(self, args, kwargs))
        except BaseException as error:
            # The next call would take half a prototype for a whole one.
            trace, self.prototype_trace = self.prototype_trace, None
            if trace is not None and not isinstance(error, InjectiveFlowError):
                # Pyro's own refusals come before ours.
                refuse_unserved_sites(trace)
            raise

    def _normal_fit(
        self, warm_start: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NormalFit:
        if isinstance(warm_start, str):
            check_choice(warm_start, ("pathfinder",), "warm_start")
            return pathfinder(LogJoint(self, args, kwargs), self._init_loc())
        if callable(warm_start):
            return fit_of_guide(warm_start, self, args, kwargs)
        return as_normal_fit(warm_start, self._init_loc())

    def _init_scales(self, loc: Tensor, log_joint: LogJoint) -> Tensor:
        """Starting scales (D,): those given, or those of the curvature at the location."""
        scale = self._init_scale
        if scale is None:
            scales = log_joint.scales(loc)
            if scales is not None:
                return scales
            scale = _UNKNOWN_SCALE
        return torch.full_like(loc, scale)

    def _claim_names(self) -> None:
        parameter = next(self.parameters(), None)
        if parameter is None or pyro.settings.get("module_local_params"):
            return
        if pyro.get_param_store().param_name(parameter) is not None:
            return
        prefix = f"{self._pyro_name}."
        if names_are_free(self, prefix):
            self._names_checked = True
        elif trains_now():
            refuse_taken_names(self, self._pyro_name)
        elif not self._names_checked:
            self._names_checked = True
            warnings.warn(
                f"Pyro's parameter store already holds parameters named {prefix}..., of another "
                "guide or from a file. Those of this guide will not be trained by SVI, nor be "
                "restored. Call pyro.clear_param_store() first; save and load guides by nfp.save "
                "and nfp.load.",
                ParamStoreWarning,
                stacklevel=2,
            )

    def _draw(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        self.build(*args, **kwargs)
        # Without pyro.sample, so that no handler sees it.
        return self.get_posterior(*args, **kwargs).sample(torch.Size([num_samples]))

    def _quantiles(
        self, levels: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        latents = self._draw(self.num_quantile_samples, *args, **kwargs)
        return {
            name: site_quantiles(transform, values, levels)
            for name, transform, values in self._coordinates(latents)
        }

    def _coordinates(self, latents: Tensor) -> Iterator[tuple[str, Transform, Tensor]]:
        """Names, transforms to the support, and coordinates (n, *) for latents (n, D)."""
        trace: Any = self.prototype_trace
        shapes = self._unconstrained_shapes
        sizes = [math.prod(shape) for shape in shapes.values()]
        for (name, shape), part in zip(shapes.items(), latents.split(sizes, dim=1), strict=True):
            transform = biject_to(trace.nodes[name]["fn"].support)
            yield name, transform, part.reshape(len(part), *shape)
