r"""The contracts of layers on known hypersurfaces, where log-dets add.

A chart :math:`\varphi: \mathbb R^{D-1} \to \mathcal M_0` and maps :math:`a_i` between surfaces
compose to a chart of the last surface. Each :math:`a_i` turns the surface measure of the one into
that of the next by a scalar factor :math:`|a_i|`, so that

.. math:: \tfrac12 \log\det J^\top J
          = \tfrac12 \log\det \varphi'^\top \varphi' + \sum_i \log |a_i|,

an exact sum, unlike for layers that know nothing of the surface that they act on.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any, NamedTuple

import normflows as nf
from torch import Tensor, nn

from ...volume.log_volumes import DecodedVolume
from ..gauges.gauge import Gauge
from ..injection import Injection
from ..layer import Layer


class Surface(NamedTuple):
    """A surface that layers lead to, with None for what is unknown or does not apply."""

    # "sphere" (unit vectors), "orthant" (those with positive coordinates), "level_set" (of the
    # gauge), "simplex" (positive parts whose sum is the level), "rotations" (unit quaternions or
    # matrices, against Haar measure), or "image": all other surfaces.
    kind: str
    gauge: Gauge | None = None
    level: float | None = None
    # The dimension of the space around it, which some layers do not declare.
    dim: int | None = None
    # Densities on it are against this measure.
    measure: str = "hausdorff"


class SurfaceLayer(Layer, ABC):
    """A layer with a known log-factor of measure: ``forward`` and ``inverse``, or their parts."""

    codomain: str = "surface"
    measure: str = "hausdorff"
    # Whether it maps its domain to itself whatever its parameters are.
    keeps_surface: bool = False
    latent_shape: Sequence[int] | None = None
    data_shape: Sequence[int] | None = None
    takes_context: bool = False
    needs_context: bool = False

    def __init__(self) -> None:
        super().__init__()
        for whole, parts in (("forward", ("decode", "log_stretch")), ("inverse", ("encode",))):
            if self._inherits(whole) and any(map(self._inherits, parts)):
                raise TypeError(
                    f"Can't instantiate abstract class {type(self).__name__}: give {whole}, or "
                    f"{' and '.join(parts)}."
                )

    def _inherits(self, method: str) -> bool:
        return getattr(type(self), method) is getattr(SurfaceLayer, method)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, *) to points (B, D), with the log-factor (B,) of measure in nats."""
        return self.decode(z, context=context), self.log_stretch(z, context=context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points (B, D) to latents (B, *), with minus the log-factor (B,) of measure in nats."""
        z = self.encode(x, context=context)
        return z, -self.log_stretch(z, context=context)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Latents (B, *) to points (B, D)."""
        return self.forward(z, context)[0]

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Points (B, D) to latents (B, *)."""
        return self.inverse(x, context)[0]

    def log_stretch(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-factor (B,) in nats by which measure is stretched at latents (B, *)."""
        return self.forward(z, context)[1]

    def surface(self, before: Surface | None = None) -> Surface:
        """The surface that the layer leads to, given the one that it starts from, if any."""
        dim = before.dim if before else None
        if self.data_shape:
            dim = self.data_shape[0]
        if self.codomain in ("sphere", "orthant"):
            return Surface(self.codomain, dim=dim, measure=self.measure)
        if self.keeps_surface and before is not None:
            return before
        return Surface("image", dim=dim, measure=self.measure)


class Chart(SurfaceLayer, Injection):
    r"""An injection onto a known surface, with an exact inverse and a closed-form log-volume.

    A subclass gives :meth:`forward` and :meth:`inverse`, whose log-dets are opposite at matching
    points, or :meth:`decode`, :meth:`encode` and :meth:`log_stretch`, the log-volume. ``codomain``
    says where it leads: ``"sphere"``, ``"orthant"`` (the part of the sphere whose coordinates are
    positive) or ``"surface"``. ``measure`` names the measure of the log-volume.

    Examples:
        >>> import torch
        >>> class Circle(Chart):
        ...     codomain = "sphere"
        ...     def forward(self, z, context=None):
        ...         return torch.cat([z.cos(), z.sin()], dim=1), z.new_zeros(len(z))
        ...     def inverse(self, x, context=None):
        ...         return torch.atan2(x[:, 1:], x[:, :1]), x.new_zeros(len(x))
        >>> Circle().decode(torch.zeros(1, 1))
        tensor([[1., 0.]])
    """

    is_closed_form = True

    def decode_and_log_volume(self, z: Tensor, context: Tensor | None = None) -> DecodedVolume:
        """Coordinates (B, d) to points (B, D), with the log-volume (B,) in nats."""
        return DecodedVolume(*self.forward(z, context))


class SurfaceMap(SurfaceLayer):
    r"""A bijection between two surfaces of one ambient space.

    ``forward`` returns the logarithm of the factor by which it stretches surface measure, as
    ``log_det``; ``inverse`` returns minus that. A subclass gives both, or :meth:`decode`,
    :meth:`encode` and :meth:`log_stretch`. ``domain`` and ``codomain`` are as in :class:`Chart`.
    It stands after a chart or another map that leads to its domain.

    Examples:
        >>> import torch
        >>> class Double(SurfaceMap):
        ...     def decode(self, z, context=None):
        ...         return 2 * z
        ...     def encode(self, x, context=None):
        ...         return x / 2
        ...     def log_stretch(self, z, context=None):
        ...         return z.new_full((len(z),), (z.shape[1] - 1) * torch.tensor(2.0).log())
        >>> Double()(torch.tensor([[1.0, 0.0, 0.0]]))
        (tensor([[2., 0., 0.]]), tensor([1.3863]))
    """

    domain: str = "sphere"


def surface_of(flows: Sequence[nf.flows.Flow] | nn.ModuleList) -> Surface:
    """The surface that layers from the first injection on lead to, as the last of them tells."""
    if not is_closed_form(flows):
        return Surface("image")
    first: Any = flows[0]
    surface: Surface = first.surface()
    for flow in list(flows)[1:]:
        surface = flow.surface(surface)
    return surface


def is_closed_form(flows: Sequence[nf.flows.Flow] | nn.ModuleList) -> bool:
    """Whether layers are a chart followed by maps between surfaces, so that log-dets add."""
    return getattr(flows[0], "is_closed_form", False) and all(
        isinstance(flow, SurfaceMap) for flow in list(flows)[1:]
    )
