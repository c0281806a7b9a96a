"""Laws on surfaces as Pyro distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from pyro.distributions import Dirichlet, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ...checks import check_choice, check_count, check_positive, checks_arguments, describe
from ...checks.sizes import as_size
from ...distributions import UniformOnSurface as _UniformOnSurface
from ...distributions.spherical import SphericalLaw
from ...distributions.torus import TorusLaw
from ...errors import OffManifoldError, OptionError, UnsupportedModelError
from ...flows.gauges.gauge import Gauge
from ..supports.support import refuse_off_support, score_where
from ..supports.surfaces import StarLikeConstraint, is_standard_simplex, unit_length
from .law import PyroLaw, Shape, optional_flag


class OnSurface(constraints.Constraint):
    """Points where a law on a surface has a density.

    Args:
        law: A distribution of ``nfi.distributions`` with ``on_manifold = True``.

    Examples:
        >>> from normflows_injective.distributions import UniformSphere
        >>> OnSurface(UniformSphere(2)).check(torch.tensor([[0.6, 0.8], [1.0, 1.0]]))
        tensor([ True, False])
    """

    is_discrete = False
    event_dim = 1

    def __init__(self, law: Any) -> None:
        _check_law(law)
        self._law = law
        super().__init__()

    def __repr__(self) -> str:
        return f"the surface of {type(self._law).__name__}"

    def check(self, value: Tensor) -> Tensor:
        """Whether points (*, D) lie on the surface, of shape (*)."""
        rows = value.reshape(-1, value.shape[-1])
        if self._holds(rows):
            return torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
        each = [self._holds(row) for row in rows.unsqueeze(1)]
        return torch.tensor(each, device=value.device).view(value.shape[:-1])

    def _holds(self, rows: Tensor) -> bool:
        try:
            self._law.log_prob(rows)
        except OffManifoldError:
            return False
        return True


@final
class SurfaceDistribution(PyroLaw):
    r"""A law on a surface as a Pyro distribution: a prior, a likelihood or a guide.

    Its density is the law's, against the law's measure. Score it with guides whose density
    is against the same measure: another one shifts the evidence, and on most surfaces the
    posterior.

    The support of the laws of ``nfi.distributions`` is a :class:`StarLikeConstraint`, by whose
    chart autoguides, NUTS and NeuTra reach a site with this distribution as it is; that of laws of
    angles is the box :math:`[-\pi, \pi]^d`.

    As a guide it has draws with gradients where the law has ``rsample``, which ``has_rsample``
    says; otherwise Pyro uses the score function. Register the parameters with ``pyro.module``.

    Args:
        law: A distribution of ``nfi.distributions`` with ``on_manifold = True``, built with
            ``off_manifold="reject"``, without a context.
        validate_args: As in torch.

    Raises:
        OptionError: If the law is no density on a surface.

    Examples:
        >>> import pyro
        >>> from normflows_injective.distributions import UniformOnSurface
        >>> from normflows_injective.flows.gauges import LpGauge
        >>> prior = SurfaceDistribution(UniformOnSurface(LpGauge(1.0), dim=3))
        >>> with pyro.plate("draws", 4):
        ...     beta = pyro.sample("beta", prior)
        >>> bool(torch.allclose(beta.abs().sum(1), torch.ones(4)))
        True
    """

    def __init__(self, law: Any, validate_args: bool | None = None) -> None:
        _check_law(law)
        self.law = law
        super().__init__(torch.Size(), torch.Size(law.shape), validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The surface."""
        return _surface_of(self.law)

    @property
    def measure(self) -> str:
        """The measure that the density is against."""
        return getattr(self.law, "measure", "hausdorff")

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws can carry gradients to every parameter of the law."""
        return bool(getattr(self.law, "has_rsample", False))

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw points of shape (*sample_shape, *batch_shape, D)."""
        with torch.no_grad():
            return self._drawn(self.law, sample_shape)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw points of shape (*sample_shape, *batch_shape, D), with gradients.

        Raises:
            UnsupportedModelError: If the draws of the law carry none.
        """
        if not self.has_rsample:
            raise UnsupportedModelError(
                f"The draws of {type(self.law).__name__} carry no gradients. Use sample, and an "
                "objective with the score function."
            )
        return self._drawn(self.law.rsample, sample_shape)

    def _drawn(self, draw: Callable[..., Any], sample_shape: Shape) -> Tensor:
        shape = self._drawn_shape(sample_shape)
        x: Tensor = draw(max(1, math.prod(shape)))[0]
        return x[: math.prod(shape)].view(shape + self.event_shape)

    @checks_arguments
    def log_prob(self, value: Tensor) -> Tensor:
        r"""Log-density of points (*, D), of shape (*), in nats.

        Points off the surface raise an error with validation, and have no density without it.

        Raises:
            OffManifoldError: With validation, if points are off the surface.
            ShapeError: If these are no points of :math:`\mathbb R^D`.
        """
        batch = self._batch_of(value, type(self.law).__name__)
        if self._validate_args:
            refuse_off_support(self, value)
            self._validate_sample(value)
        rows = value.reshape(math.prod(batch), *self.event_shape)
        inside = self.support.check(rows)
        scores = score_where(inside, lambda x, _: self.law.log_prob(x), rows).view(batch)
        return scores.expand(torch.broadcast_shapes(batch, self.batch_shape))

    def __repr__(self) -> str:
        return f"SurfaceDistribution({type(self.law).__name__}, measure={self.measure!r})"


def UniformOnSurface(  # noqa: N802 - a distribution, to those who call it
    gauge: Gauge,
    *,
    level: float = 1.0,
    measure: str | None = None,
    dim: int | None = None,
    batch_shape: torch.Size | tuple[int, ...] = (),
    validate_args: bool | None = None,
) -> TorchDistribution:
    r"""Build the uniform law of a star-like surface as a Pyro prior.

    .. math:: \log p(x) = -\log \mathcal H(\mathcal M_t)

    normalised, so that evidences can be compared. Where the area has no closed form it is an
    average over directions, always the same ones, which takes tens of milliseconds: build the law
    once, outside of the model. On the standard simplex the default is Lebesgue measure of the
    first :math:`K - 1` coordinates, as in Pyro's ``Dirichlet``, and the law is the flat Dirichlet
    law. On every other surface it is the surface's own measure.

    Args:
        gauge: The surface, from ``nfi.flows.gauges``, not trained.
        level: :math:`t > 0`.
        measure: ``"hausdorff"``, ``"cone"``, on the standard simplex also ``"lebesgue"``; None
            chooses.
        dim: :math:`D`, where the gauge does not fix it.
        batch_shape: Shape of the batch.
        validate_args: As in torch.

    Returns:
        The distribution.

    Raises:
        OptionError: If an option is unknown or does not fit the surface.

    References:
        See ``nfi.distributions.UniformOnSurface``.

    Examples:
        >>> from normflows_injective.flows.gauges import HyperplaneGauge, LpGauge
        >>> octahedron = UniformOnSurface(LpGauge(1.0), dim=3)  # of area 4 sqrt(3)
        >>> octahedron.log_prob(torch.tensor([1.0, 0.0, 0.0])).neg().exp()
        tensor(6.9282)
        >>> UniformOnSurface(HyperplaneGauge(torch.ones(3))).log_prob(torch.ones(3) / 3)
        tensor(0.6931)
    """
    validate_args = optional_flag(validate_args)
    if measure is not None:
        check_choice(measure, ("hausdorff", "cone", "lebesgue"), "measure")
    dim = None if dim is None else check_count(dim, "dim", least=2)
    simplex = is_standard_simplex(gauge, check_positive(level, "level"))
    if measure == "lebesgue" and not simplex:
        raise OptionError(
            "The lebesgue measure of the first coordinates is that of the standard simplex, "
            "HyperplaneGauge(torch.ones(K)) at level 1. Use measure='hausdorff'."
        )
    if simplex and measure in (None, "lebesgue"):
        weights: Any = gauge.weights
        flat = Dirichlet(torch.ones_like(weights), validate_args=validate_args)
        return flat.expand(as_size(batch_shape, "batch_shape"))
    law = _UniformOnSurface(gauge, level, measure or "hausdorff", dim=dim)
    return SurfaceDistribution(law, validate_args).expand(batch_shape)


def _check_law(law: Any) -> None:
    if not getattr(law, "on_manifold", False) or getattr(law, "needs_context", False):
        raise OptionError(
            f"law must be a density on a surface without a context, got {describe(law)}. "
            "Use one of nfi.distributions whose on_manifold is true."
        )


def _surface_of(law: Any) -> constraints.Constraint:
    if isinstance(law, _UniformOnSurface):
        level = law.surface.level.level
        return StarLikeConstraint(law.surface.gauge, level, dim=law.dim, measure=law.measure)
    if isinstance(law, SphericalLaw):
        return unit_length(law.shape[0])
    if isinstance(law, TorusLaw):
        return constraints.independent(constraints.interval(-math.pi, math.pi), 1)
    return OnSurface(law)
