"""Layers for guides, which start as the identity and bear large learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import normflows as nf
from torch import Tensor, nn

from ...checks import check_count, checks_arguments
from ...nets.mlp import SmoothMLP, start_at_zero
from ..coupling import Affine, Autoregressive, Coupling
from ..coupling.coupling import coupling_sizes
from ..coupling.steady_linear import SteadyLinear
from ..surfaces.angular_spline import AngularSpline

# Adam moves every weight by the learning rate, whatever its width: outputs move less.
_GAIN = 0.1
_MAX_LOG_SCALE = 3.0


@checks_arguments
def couplings(
    dim: int, num_layers: int = 6, hidden: Sequence[int] = (64, 64), num_splines: int = 0
) -> list[nf.flows.Flow]:
    r"""Affine couplings, the default of :class:`~normflows_injective.pyro.AutoFlow`.

    .. math:: x_2 = (z_2 - t)\, e^{-3 \tanh(a / 3)}, \qquad (a, t) = \operatorname{net}(z_1) / 10

    Log-scales are bounded, so that no draw overflows. ``AutoFlow`` puts permutations between. One
    latent has nothing to be coupled with, and gets a spline.

    Args:
        dim: Number of latents :math:`D`.
        num_layers: Number of couplings.
        hidden: Hidden widths of their networks.
        num_splines: Number of spline couplings after them, see :func:`splines`.

    Returns:
        Layers from latents to data.

    References:
        Dinh et al., Density estimation using Real NVP, arXiv 1605.08803.

    Examples:
        >>> from functools import partial
        >>> len(couplings(3)), len(partial(couplings, num_layers=2)(3))
        (6, 2)
    """
    check_count(num_splines, "num_splines", least=0)
    if dim == 1:
        return splines(1)
    affine: list[nf.flows.Flow] = [
        Coupling(dim, _Conditioner(dim, hidden), Affine(_MAX_LOG_SCALE)) for _ in range(num_layers)
    ]
    return affine + (splines(dim, num_splines) if num_splines else [])


@checks_arguments
def splines(dim: int, num_layers: int = 4) -> list[nf.flows.Flow]:
    """Rational-quadratic spline couplings with LU linear maps between them.

    They bend more than affine couplings do, and take twice as long. Beyond 4 they are the
    identity.

    Args:
        dim: Number of latents :math:`D`.
        num_layers: Number of couplings; one latent gets one spline.

    Returns:
        Layers from latents to data.

    References:
        Durkan et al., Neural spline flows, arXiv 1906.04032.

    Examples:
        >>> len(splines(3)), len(splines(1))
        (8, 1)
    """
    if dim == 1:
        return [AngularSpline(1, max_log_scale=0.0)]
    layers: list[nf.flows.Flow] = []
    for layer in range(num_layers):
        # The spline of normflows picks values by boolean indices, which torch.jit freezes.
        spline = AngularSpline(
            dim, num_blocks=1, reverse_mask=layer % 2 == 1, max_log_scale=0.0, gain=_GAIN
        )
        layers += [spline, SteadyLinear(dim)]
    return layers


@checks_arguments
def autoregressive(dim: int, num_layers: int = 3, width: int = 64) -> list[nf.flows.Flow]:
    r"""Inverse autoregressive affine layers, which draw in one pass.

    .. math:: x_i = z_i\, e^{a_i(z_{<i})} + t_i(z_{<i})

    A value is scored in :math:`D` passes: leave the path gradient out for many latents.

    Args:
        dim: Number of latents :math:`D`.
        num_layers: Number of layers, every second one in reverse order.
        width: Hidden width of their networks.

    Returns:
        Layers from latents to data.

    References:
        Kingma et al., Improving variational inference with inverse autoregressive flow, arXiv
        1606.04934.

    Examples:
        >>> len(autoregressive(3))
        3
    """
    if dim == 1:
        return splines(1)
    return [
        nf.flows.Reverse(
            Autoregressive(
                dim, Affine(_MAX_LOG_SCALE), width=max(width, dim), reverse=index % 2 == 1
            )
        )
        for index in range(num_layers)
    ]


@final
class _Conditioner(nn.Module):
    """A perceptron whose output starts at zero and moves slowly."""

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        num_kept, num_moved = coupling_sizes(dim, takes_context=False, name="couplings")
        self.net = SmoothMLP(num_kept, 2 * num_moved, hidden)
        start_at_zero(self.net.layers[-1])
        self.gain = _GAIN

    def forward(self, z: Tensor) -> Tensor:
        """Parameters (B, 2 A) of the coordinates that are moved, for those that are kept."""
        out: Tensor = self.net(z)
        return self.gain * out
