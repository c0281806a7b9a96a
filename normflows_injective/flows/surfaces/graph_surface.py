"""The chart of a graph: a surface given as a height above its other coordinates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import final

import torch
from torch import Tensor

from ...autodiff.products import out_of_inference, value_and_gradient
from ...checks import check_choice, check_finite, is_readable
from ...errors import OffManifoldError, ShapeError
from ...host.context import context_arguments, needs_context, takes_context
from ...host.first_meeting import give_first_data
from ...host.refusals import refuse_unsupported
from ...modules.contents import modules_of
from .off_manifold import TOLERANCE, check_policy
from .surface import Chart


@final
class GraphSurface(Chart):
    r"""The graph of a function over :math:`\mathbb R^{D-1}`.

    .. math:: x = (z, f(z)), \qquad
              \tfrac12 \log\det J^\top J = \tfrac12 \log\big(1 + \lVert \nabla f \rVert^2\big)

    It costs one gradient of :math:`f` and builds no matrix. The parameters of :math:`f` are
    trained with the model; use smooth activations.

    Args:
        f: Module or callable taking (B, D - 1) to heights (B,) or (B, 1), each sample alone. With
            a context it is called ``f(z, context=context)`` if it has that keyword. Its
            ``input_shape``, if it has one (networks of ``nfi.nets`` do), declares D.
        off_manifold: Treatment by :meth:`inverse` of points off the graph by more than
            :math:`10^{-4} (1 + |f|)`: ``"reject"`` raises, ``"project"`` moves them along the last
            axis.
        measure: ``"hausdorff"``, the area, or ``"lebesgue"``, the measure of the first
            :math:`D - 1` coordinates, whose log-volume is zero.

    Raises:
        OptionError: If an option is unknown.

    References:
        Derived here: :math:`J = (I; \nabla f^\top)` has the Gram matrix
        :math:`I + \nabla f \nabla f^\top`.

    Examples:
        >>> surface = GraphSurface(lambda z: z.square().sum(1))
        >>> surface(torch.ones(1, 1))  # the log-volume is log sqrt(1 + 4 z^2)
        (tensor([[1., 1.]]), tensor([0.8047]))
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        off_manifold: str = "reject",
        measure: str = "hausdorff",
    ) -> None:
        super().__init__()
        check_policy(off_manifold)
        self.measure = check_choice(measure, ("hausdorff", "lebesgue"), "measure")
        self.f, self.off_manifold = f, off_manifold
        self.takes_context, self.needs_context = takes_context(f), needs_context(f)
        shape = getattr(f, "input_shape", None)
        if shape is not None:
            self.latent_shape, self.data_shape = tuple(shape), (shape[0] + 1,)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Coordinates (B, D - 1) to points (B, D), without a gradient."""
        _check_rows(z, "z", 1, "(B, D - 1)")
        return torch.cat([z, self._height(z, context).unsqueeze(1)], dim=1)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, D - 1) to points (B, D), with the log-volume (B,) in nats.

        Raises:
            ShapeError: If the coordinates or the result of f have a wrong shape.
        """
        _check_rows(z, "z", 1, "(B, D - 1)")
        height, log_volume = self._height_and_log_volume(z, context)
        return torch.cat([z, height.unsqueeze(1)], dim=1), log_volume

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points (B, D) to coordinates (B, D - 1), with minus the log-volume (B,) in nats.

        Raises:
            ShapeError: If the points or the result of f have a wrong shape.
            OffManifoldError: If points are off the graph and are to be refused.
        """
        _check_rows(x, "x", 2, "(B, D), D >= 2")
        z = x[:, :-1]
        height, log_volume = self._height_and_log_volume(z, context)
        if self.off_manifold == "reject":
            _refuse_off_graph(x.detach()[:, -1], height.detach())
        return z, -log_volume

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"off_manifold={self.off_manifold!r}, measure={self.measure!r}"

    def _height_and_log_volume(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        context = None if context is None else out_of_inference(context)
        height = partial(self._height, context=context)
        if self.measure == "lebesgue":
            return height(z), z.new_zeros(z.shape[0])
        refuse_unsupported(modules_of(self.f))
        give_first_data(height, z)
        value, gradient = value_and_gradient(height, z)
        return value, 0.5 * gradient.square().sum(1).log1p()

    def _height(self, z: Tensor, context: Tensor | None) -> Tensor:
        height: Tensor = self.f(z, **context_arguments(self.f, context))
        if height.shape not in ((z.shape[0],), (z.shape[0], 1)):
            raise ShapeError(
                f"f must map z of shape {tuple(z.shape)} to heights of shape ({len(z)},) or "
                f"({len(z)}, 1), one per sample, got {tuple(height.shape)}."
            )
        return height.reshape(z.shape[0])


def _check_rows(rows: Tensor, name: str, least: int, expected: str) -> None:
    if rows.dim() != 2 or rows.shape[1] < least:
        raise ShapeError(f"{name} must have shape {expected}, got {tuple(rows.shape)}.")


def _refuse_off_graph(last: Tensor, height: Tensor) -> None:
    if not is_readable(last, height):
        return
    distances = (last - height).abs()
    near = distances <= TOLERANCE * (1 + height.abs())  # false for NaN too
    if bool(near.all()):
        return
    check_finite(last, "the last coordinate of x")
    check_finite(height, "f(z)", "Look at f, or at the first coordinates of x.")
    worst = int(distances.argmax())
    raise OffManifoldError(
        f"x has {int((~near).sum())} of {len(last)} rows off the graph, the worst at index "
        f"{worst} with last coordinate {float(last[worst]):.6g} where f is "
        f"{float(height[worst]):.6g}, and {TOLERANCE} * (1 + |f|) is allowed. Replace the last "
        "coordinate by f, or build with off_manifold='project', which does."
    )
