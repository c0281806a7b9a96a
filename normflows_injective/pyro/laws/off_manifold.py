"""Policies for values that do not lie on the manifold: reject, project or thicken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.distributions import constraints

from ...checks import check_choice, check_positive, describe, is_number
from ...errors import OptionError, ShapeError
from ...flows.layer_stack import LayerStack
from ...volume.reconstruction import squared_error
from ..supports.support import score_where, whole_space
from ..supports.surfaces import ImageConstraint

NoiseScale = float | Tensor | Callable[[], Tensor]


class Projected(NamedTuple):
    """Log-density (B,) in nats against the manifold's measure at projections (B, *)."""

    log_density: Tensor
    reconstruction: Tensor


Score = Callable[[Tensor, Tensor | None], Projected]


class OffManifold:
    """The support and the density of values: every value has the density of its projection.

    Other policies replace a part of this one.
    """

    def support(
        self, stack: LayerStack, context: Tensor | None, event_dim: int
    ) -> constraints.Constraint:
        """The values that have a density."""
        return whole_space(event_dim)

    def log_density(
        self, score: Score, stack: LayerStack, x: Tensor, context: Tensor | None
    ) -> Tensor:
        """Log-density (B,) in nats of values (B, *), from the density of their projections."""
        return score(x, context).log_density

    def blur(self, x: Tensor) -> Tensor:
        """Points (B, *) of the manifold with the noise of draws, if there is any."""
        return x


@final
class Reject(OffManifold):
    """Values farther than `tol`, over 1 + |x|, from their reconstruction have no density."""

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
        """Log-densities of projections, or minus infinity."""
        near = self.support(stack, context, x.dim() - 1).check(x)
        return score_where(near, lambda *rows: score(*rows).log_density, x, context)


@final
class Thicken(OffManifold):
    r"""Gaussian noise of scale :math:`\sigma` around the manifold.

    .. math:: \log p(\hat x) - \frac{\lVert x - \hat x \rVert^2}{2\sigma^2}
              - \frac{D - d}{2} \log 2\pi\sigma^2
    """

    def __init__(self, noise_scale: NoiseScale | None, latent_dim: int) -> None:
        if noise_scale is None:
            raise OptionError(
                "off_manifold='thicken' needs noise_scale=, the standard deviation of the noise "
                "around the manifold: a positive number, tensor or callable."
            )
        self._noise_scale = noise_scale
        self._latent_dim = latent_dim
        # The result of a callable is checked where it is used.
        if not callable(noise_scale):
            self.scale(torch.empty(0))

    def scale(self, like: Tensor) -> Tensor:
        """The scale now, of shape (), in the dtype and on the device of a tensor."""
        source: Any = self._noise_scale
        value = source() if callable(source) else source
        real = isinstance(value, Tensor) and not value.is_complex() and value.dtype != torch.bool
        if not (real or is_number(value)):
            raise OptionError(
                "noise_scale must be a positive number, a tensor or a callable that gives one, "
                f"got {describe(value)}."
            )
        sigma = value.to(like) if isinstance(value, Tensor) else like.new_tensor(value)
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

    def log_density(
        self, score: Score, stack: LayerStack, x: Tensor, context: Tensor | None
    ) -> Tensor:
        """Log-densities of projections, and of the noise that leads away from them."""
        log_density, reconstruction = score(x, context)
        sigma = self.scale(x)
        codimension = x[0].numel() - self._latent_dim
        # The logarithm of the tensor itself, so that a trained scale gets its gradient.
        normaliser = codimension * (sigma.log() + 0.5 * math.log(2 * math.pi))
        exponent = squared_error(x, reconstruction) / (2 * sigma.square())
        return log_density - exponent - normaliser


def policy(
    off_manifold: str, noise_scale: NoiseScale | None, tol: float, latent_dim: int
) -> OffManifold:
    """The policy with a name, and its options."""
    check_choice(off_manifold, ("reject", "project", "thicken"), "off_manifold")
    if off_manifold == "thicken":
        return Thicken(noise_scale, latent_dim)
    if noise_scale is not None:
        raise OptionError(
            f"noise_scale is an option of off_manifold='thicken', but that is {off_manifold!r}, "
            "where nothing is noisy. Leave it out, or thicken."
        )
    return Reject(tol) if off_manifold == "reject" else OffManifold()
