"""Couplings that whiten a part of a vector by conditional moments of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from ..checks import checks_arguments_of
from ..errors import OptionError
from ..flows.coupling.coupling import Coupling, coupling_sizes
from ..flows.coupling.transforms import Affine
from ..nets.mlp import SmoothMLP, start_at_zero

_NUM_KNOTS = 33
# Normal score of the outermost knots, and the number of rows beyond them at least.
_MAX_SCORE, _ROWS_BEYOND = 3.2, 4


class Moments(NamedTuple):
    """Conditional means (B, A) and logarithms of conditional standard deviations (B, A)."""

    mean: Tensor
    log_std: Tensor


def partial_step(moments: Moments, step_size: float) -> tuple[Tensor, Tensor]:
    r""":math:`\log S` and :math:`T` of a step towards zero mean and unit variance.

    .. math:: a' = S a + T, \qquad S = 1 + \eta \, (1/\sigma - 1), \qquad T = -\eta \, m / \sigma
    """
    inverse_std = (-moments.log_std).exp()
    # log1p keeps the digits of small steps.
    return torch.log1p(step_size * (inverse_std - 1)), -step_size * moments.mean * inverse_std


@checks_arguments_of
@final
class ConditionalMoments(nn.Module):
    r"""Means and standard deviations of a vector given another, by a linear map and a network.

    .. math:: m(b) = c + W t + \sigma_0 \odot n_1(b), \qquad
              \log\sigma(b) = \log\sigma_0 + \kappa \tanh(n_2(b) / \kappa)

    with t the standardised b and :math:`\sigma_0` the residual standard deviation. The network, if
    there are ``hidden`` layers, sees the normal scores of b and
    :math:`\log(1 + \lVert t \rVert^2)`, on which the scale of heavy-tailed laws depends. The
    model starts as the moments of a standard normal.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] | None = (64, 64),
        max_log_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.hidden = None if hidden is None else tuple(hidden)
        self.max_log_ratio = max_log_ratio
        self.centre = nn.Buffer(torch.zeros(in_features))
        self.spread = nn.Buffer(torch.ones(in_features))
        scores = torch.linspace(-_MAX_SCORE, _MAX_SCORE, _NUM_KNOTS)
        self.scores, self.knots = nn.Buffer(scores), nn.Buffer(scores.repeat(in_features, 1))
        self.intercept = nn.Parameter(torch.zeros(out_features))
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.log_std = nn.Parameter(torch.zeros(out_features))
        self.net: SmoothMLP | None = None
        if hidden is not None:
            self.net = SmoothMLP(in_features + 1, 2 * out_features, hidden)
            start_at_zero(self.net.layers[-1])

    @classmethod
    def blank(
        cls,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] | None,
        max_log_ratio: float,
        like: Tensor,
    ) -> ConditionalMoments:
        """The moments of a standard normal, in the dtype of ``like``, without any random draw."""
        # On the meta device no weights are drawn, so torch's own generator stays as it is.
        with torch.device("meta"):
            moments = cls(in_features, out_features, hidden, max_log_ratio)
        moments = moments.to_empty(device=like.device).to(like.dtype).requires_grad_(False)
        for tensor in (*moments.parameters(), moments.centre):
            tensor.zero_()
        moments.spread.fill_(1.0)
        # Knots of zero width would make features, and zero times them, NaN.
        moments.scores.copy_(torch.linspace(-_MAX_SCORE, _MAX_SCORE, _NUM_KNOTS))
        moments.knots.copy_(moments.scores.expand_as(moments.knots))
        return moments

    @torch.no_grad()
    def with_network(
        self, hidden: Sequence[int], max_log_ratio: float, generator: torch.Generator
    ) -> ConditionalMoments:
        """A model of the same moments that has a network, with a last layer of zeros."""
        if self.net is not None:
            return self
        out_features, in_features = self.weight.shape
        result = self.blank(in_features, out_features, hidden, max_log_ratio, self.weight)
        result.load_state_dict(self.state_dict(), strict=False)
        layers = [module for module in result.modules() if isinstance(module, nn.Linear)]
        for layer in layers[:-1]:  # by LeCun's law
            draws = torch.randn(layer.weight.shape, generator=generator, device=generator.device)
            layer.weight.copy_((draws / layer.in_features**0.5).to(layer.weight))
        return result

    @torch.no_grad()
    def standardise(self, b: Tensor) -> None:
        """Set location, spread and normal scores of b by samples (N, F), N at least two."""
        tiny = torch.finfo(b.dtype).eps
        centre, spread = b.mean(0), b.std(0, correction=0)
        # A constant coordinate tells nothing, and is not blown up.
        spread = torch.where(spread > tiny * (1 + centre.abs()), spread, 1.0)
        self.centre.copy_(centre)
        self.spread.copy_(spread)
        share = torch.tensor(max(0.6, 1 - _ROWS_BEYOND / len(b)), dtype=b.dtype, device=b.device)
        reach = torch.special.ndtri(share).clamp(max=_MAX_SCORE)
        self.scores.copy_(torch.linspace(-1, 1, _NUM_KNOTS).to(b) * reach)
        position = torch.special.ndtr(self.scores) * (len(b) - 1)
        below = position.floor().long().clamp(max=len(b) - 2)
        ordered = b.sort(0).values
        low, high = ordered[below], ordered[below + 1]
        knots = torch.lerp(low, high, (position - below).unsqueeze(1))
        # Ties would leave bins without a width.
        ramp = torch.arange(_NUM_KNOTS, dtype=b.dtype, device=b.device).unsqueeze(1)
        self.knots.copy_((knots + tiny**0.5 * spread * ramp).T)

    def forward(self, b: Tensor) -> Moments:
        """Moments (B, A) given coordinates (B, F)."""
        return self.from_features(b, self.features(b))

    def features(self, b: Tensor) -> Tensor:
        """Inputs of the network, (B, F + 1), from coordinates (B, F).

        The scores are a piecewise linear map of b through its quantiles, after which edges and
        heavy tails are those of a normal: next to an edge, where the standard deviation vanishes
        like a power of the distance, its logarithm is smooth in the score, but not in b.
        """
        # Beyond the outermost knots hardly any row was seen: the network answers there as at the
        # knot, and only the linear part goes on.
        b = torch.minimum(torch.maximum(b, self.knots[:, 0]), self.knots[:, -1])
        t = (b - self.centre) / self.spread
        radial = torch.log1p(t.square().sum(1, keepdim=True))
        # Comparisons, unlike a search, go through vmap and compilation.
        index = (b.detach().unsqueeze(-1) >= self.knots[:, 1:-1]).sum(-1)
        start = self.knots.T.gather(0, index)
        width = self.knots.diff().T.gather(0, index)
        step = self.scores[1] - self.scores[0]
        score = self.scores[0] + step * (index + (b - start) / width)
        return torch.cat([score, radial], dim=1)

    def from_features(self, b: Tensor, features: Tensor) -> Moments:
        """Moments (B, A) given coordinates (B, F) and their :meth:`features`."""
        mean = self.intercept + (b - self.centre) / self.spread @ self.weight.T
        log_std = self.log_std.expand_as(mean)
        if self.net is None:
            return Moments(mean, log_std)
        shift, log_ratio = self.net(features).chunk(2, dim=1)
        bounded = self.max_log_ratio * torch.tanh(log_ratio / self.max_log_ratio)
        return Moments(mean + self.log_std.exp() * shift, log_std + bounded)


@final
class MomentBlock(Coupling):
    r"""Affine coupling that takes a step towards conditional mean zero and variance one.

    With :math:`x = (b, a)`, where :math:`b` holds the first :math:`\lfloor D/2 \rfloor`
    coordinates, and conditional means :math:`m(b)` and standard deviations :math:`\sigma(b)`, the
    map from data to latents is

    .. math:: b' = b, \qquad a' = S a + T, \qquad S = 1 + \eta \, (1/\sigma(b) - 1), \qquad
              T = -\eta \, m(b) / \sigma(b)

    With the exact moments a full step is the best affine block: it lowers the loss by the coupling
    gap at this split.

    Args:
        dim: Number of coordinates :math:`D`, at least two.
        moments: Model of the moments of the last :math:`\lceil D/2 \rceil` coordinates given the
            others, as :class:`LayerwiseTrainer` fits it; by default one that starts as the
            identity.
        step_size: :math:`\eta` in (0, 1]; 1 whitens.

    Raises:
        ShapeError: If ``dim`` is one.
        OptionError: If the step size is out of range.

    References:
        Draxler et al., arXiv 2402.06578, layer-wise construction.

    Examples:
        >>> block = MomentBlock(3)
        >>> bool((block.inverse(torch.ones(1, 3))[0] == 1).all())
        True
    """

    def __init__(
        self, dim: int, moments: ConditionalMoments | None = None, step_size: float = 0.5
    ) -> None:
        sizes = coupling_sizes(dim, False, type(self).__name__)
        check_step_size(step_size)
        moments = ConditionalMoments(*sizes) if moments is None else moments
        super().__init__(dim, _Step(moments, step_size), Affine(None))
        self.step_size = step_size

    @property
    def moments(self) -> ConditionalMoments:
        """The model of the conditional moments."""
        return self.conditioner.moments  # type: ignore[return-value]


class _Step(nn.Module):
    """Log-scales and shifts of a partial step, as the parameters of an affine coupling."""

    takes_context = needs_context = False

    def __init__(self, moments: ConditionalMoments, step_size: float) -> None:
        super().__init__()
        self.moments, self.step_size = moments, step_size

    def forward(self, b: Tensor) -> Tensor:
        return torch.stack(partial_step(self.moments(b), self.step_size), dim=-1)

    def extra_repr(self) -> str:
        return f"step_size={self.step_size}"


def check_step_size(step_size: float) -> None:
    """Raise unless a step size lies in (0, 1]."""
    if not 0 < step_size <= 1:
        raise OptionError(
            f"step_size must lie in (0, 1], 1 for a step that whitens, got {step_size!r}."
        )
