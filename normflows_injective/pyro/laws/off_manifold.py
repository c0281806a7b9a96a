"""What becomes of values that do not lie on the manifold."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.distributions import constraints

from ...checks import check_choice, check_positive, describe, is_number
from ...errors import OptionError, ShapeError
from ...flows.stack import LayerStack
from ..supports.constraints import ImageConstraint
from ..supports.support import score_where

__all__ = [
    "POLICIES",
    "NoiseScale",
    "OffManifold",
    "Project",
    "Projected",
    "Reject",
    "Thicken",
    "policy",
]

POLICIES = ("reject", "project", "thicken")
NoiseScale = float | Tensor | Callable[[], Tensor]


class Projected(NamedTuple):
    """Log-density (B,) in nats against the manifold's measure at projections (B, *)."""

    log_density: Tensor
    reconstruction: Tensor


Score = Callable[[Tensor, Tensor | None], Projected]


class OffManifold(ABC):
    """What becomes of values that do not lie on the manifold."""

    @abstractmethod
    def support(
        self, stack: LayerStack, context: Tensor | None, event_dim: int
    ) -> constraints.Constraint:
        """Which values have a density."""

    @abstractmethod
    def log_density(
        self, score: Score, stack: LayerStack, x: Tensor, context: Tensor | None
    ) -> Tensor:
        """Log-density (B,) in nats of values (B, *), from that of their projections."""


@final
class Reject(OffManifold):
    """Values off the manifold have no density.

    Args:
        tol: Largest distance from the reconstruction, over 1 + |x|.

    Raises:
        OptionError: If the tolerance is not positive.

    Examples:
        >>> from normflows_injective.flows import Pad
        >>> plane = LayerStack([Pad(2, 3)])
        >>> Reject(1e-3).support(plane, None, 1).check(torch.eye(3))
        tensor([ True,  True, False])
    """

    def __init__(self, tol: float) -> None:
        self._tol = float(check_positive(tol, "tol"))

    def support(
        self, stack: LayerStack, context: Tensor | None, event_dim: int
    ) -> constraints.Constraint:
        """The image of the decoder."""
        return ImageConstraint(stack, self._tol, context, event_dim)

    def log_density(
        self, score: Score, stack: LayerStack, x: Tensor, context: Tensor | None
    ) -> Tensor:
        """That of the projection, or minus infinity."""
        near = self.support(stack, context, x.dim() - 1).check(x)
        return score_where(near, lambda *rows: score(*rows).log_density, x, context)


@final
class Project(OffManifold):
    """Every value has the density of its projection."""

    def support(
        self, stack: LayerStack, context: Tensor | None, event_dim: int
    ) -> constraints.Constraint:
        """All of space."""
        return constraints.independent(constraints.real, event_dim)

    def log_density(
        self, score: Score, stack: LayerStack, x: Tensor, context: Tensor | None
    ) -> Tensor:
        """That of the projection."""
        return score(x, context).log_density


@final
class Thicken(OffManifold):
    r"""Gaussian noise of scale :math:`\sigma` around the manifold.

    .. math:: \log p(\hat x) - \frac{\lVert x - \hat x \rVert^2}{2\sigma^2}
              - \frac{D - d}{2} \log 2\pi\sigma^2

    Args:
        noise_scale: :math:`\sigma > 0`: a number, a tensor of one element, or a callable, such as
            a module, that gives one.
        latent_dim: :math:`d`.

    Raises:
        OptionError: If the scale is missing or not positive.
        ShapeError: If it is not one number.

    References:
        The limit of small noise of a density convolved with a Gaussian.

    Examples:
        >>> Thicken(torch.tensor(0.5), latent_dim=2).scale(torch.zeros(3))
        tensor(0.5000)
    """

    def __init__(self, noise_scale: NoiseScale | None, latent_dim: int) -> None:
        if noise_scale is None:
            raise OptionError(
                "off_manifold='thicken' needs noise_scale=, the standard deviation of the noise "
                "around the manifold: a positive number, tensor or callable."
            )
        self._noise_scale = noise_scale
        self._latent_dim = latent_dim
        # What a callable gives is checked where it is used.
        if not callable(noise_scale):
            self.scale(torch.empty(0))

    def scale(self, like: Tensor) -> Tensor:
        """The scale now, of shape (), in the dtype and on the device of a tensor."""
        source: Any = self._noise_scale
        given = source() if callable(source) else source
        real = isinstance(given, Tensor) and not given.is_complex() and given.dtype != torch.bool
        if not (real or is_number(given)):
            raise OptionError(
                "noise_scale must be a positive number, a tensor or a callable that gives one, "
                f"got {describe(given)}."
            )
        sigma = given.to(like) if isinstance(given, Tensor) else like.new_tensor(given)
        if sigma.numel() != 1:
            raise ShapeError(
                f"noise_scale must be one number, got shape {tuple(sigma.shape)}. The noise is "
                "the same in all directions and for all samples."
            )
        sigma = sigma.reshape(())
        if not 0 < float(sigma.detach()) < math.inf:
            raise OptionError(
                f"noise_scale must be positive and finite, got {float(sigma.detach()):g}. "
                "Parametrise it as an exponential or by pyro.param with constraints.positive."
            )
        return sigma

    def blur(self, x: Tensor) -> Tensor:
        """Points (B, *) of the manifold with noise, which carries gradients to the scale."""
        return x + self.scale(x) * torch.randn_like(x)

    def support(
        self, stack: LayerStack, context: Tensor | None, event_dim: int
    ) -> constraints.Constraint:
        """All of space."""
        return constraints.independent(constraints.real, event_dim)

    def log_density(
        self, score: Score, stack: LayerStack, x: Tensor, context: Tensor | None
    ) -> Tensor:
        """That of the projection, and of the noise that leads away from it."""
        log_density, reconstruction = score(x, context)
        sigma = self.scale(x)
        squared = (x - reconstruction).flatten(1).square().sum(1)
        codimension = x[0].numel() - self._latent_dim
        # Of the tensor, by its own logarithm, so that a trained scale gets its gradient.
        normaliser = codimension * (sigma.log() + 0.5 * math.log(2 * math.pi))
        return log_density - squared / (2 * sigma.square()) - normaliser


def policy(
    off_manifold: str, noise_scale: NoiseScale | None, tol: float, latent_dim: int
) -> OffManifold:
    """The policy of a name.

    Args:
        off_manifold: One of ``POLICIES``.
        noise_scale: Of ``"thicken"``, see :class:`Thicken`; None for the others.
        tol: Of ``"reject"``, see :class:`Reject`.
        latent_dim: Dimension d of the manifold.

    Returns:
        The policy.

    Raises:
        OptionError: If the name is unknown, or an option is missing, superfluous or out of range.

    Examples:
        >>> type(policy("project", None, 1e-3, 2)).__name__
        'Project'
    """
    check_choice(off_manifold, POLICIES, "off_manifold")
    if off_manifold == "thicken":
        return Thicken(noise_scale, latent_dim)
    if noise_scale is not None:
        raise OptionError(
            f"noise_scale is an option of off_manifold='thicken', but that is {off_manifold!r}, "
            "where nothing is noisy. Leave it out, or thicken."
        )
    return Reject(tol) if off_manifold == "reject" else Project()
