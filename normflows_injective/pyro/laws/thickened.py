r"""A low-dimensional law, thickened by Gaussian noise, as a distribution of Pyro."""

from __future__ import annotations

import math
import weakref
from typing import Any, final

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from ...checks.sizes import as_size, expanded_size
from ...distributions.thickened.decoders import Decoder
from ...distributions.thickened.noise import Noise
from ...distributions.thickened.reverse import Reverse

__all__ = ["Frame", "Thickened"]


@final
class Frame(nn.Module):
    r"""Location and scales of a guide: :math:`\theta = \mathrm{loc} + \mathrm{scale} \cdot e`.

    Args:
        loc: Location (D,) at the start.
        scale: Scale of every coordinate at the start.

    Examples:
        >>> Frame(torch.ones(2), 0.5).place(torch.ones(2))
        tensor([1.5000, 1.5000], grad_fn=<AddBackward0>)
    """

    def __init__(self, loc: Tensor, scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone())
        # softplus is exponential for small scales and does not explode for large ones.
        self.raw_scale = nn.Parameter(torch.full_like(loc, scale + math.log(-math.expm1(-scale))))

    @property
    def scale(self) -> Tensor:
        """Scales (D,)."""
        return softplus(self.raw_scale)

    def place(self, e: Tensor) -> Tensor:
        """Values of standardised ones (*, D)."""
        return self.loc + self.scale * e

    def standardise(self, value: Tensor) -> Tensor:
        """Standardised values of values (*, D)."""
        return (value - self.loc) / self.scale


@final
class Thickened(TorchDistribution):
    r"""The law of :math:`\theta = \mathrm{loc} + S (h(u) + \varepsilon)`, scored by a bound.

    With :math:`u \sim N(0, I_r)`, :math:`\varepsilon \sim N(0, \Psi)`, and a reverse model
    :math:`r(u \mid \theta)`, the density of a value that this object drew itself, last, is
    reported as

    .. math::

        \log \hat q = \log \frac{1}{K+1} \sum_{k=0}^{K}
            \frac{q(u_k)\, q(\theta \mid u_k)}{r(u_k \mid \theta)}, \qquad
        E \log \hat q \ge E \log q(\theta),

    with :math:`u_0` the one that led to the value, and :math:`u_1, \dots, u_K` drawn from r. Used
    as the entropy term it gives a lower bound of the evidence. It rests on the exchangeability of
    :math:`u_0, \dots, u_K` under the reweighted law: conditionally on :math:`\theta` they have
    the density :math:`q(u_0 \mid \theta) \prod_{k \ge 1} r(u_k \mid \theta)`, averaged over which
    index is special this is :math:`\prod_k r(u_k \mid \theta)\, \hat q / q(\theta)`, a density,
    so that :math:`E \log (\hat q / q)` is a divergence, hence not negative.

    Of any other value the generating u is unknown. All K + 1 are drawn from r then, and the same
    average is an unbiased estimate of q: its logarithm is a lower bound of :math:`\log q` in
    expectation. That is good for scoring, and never for an evidence bound.

    A value is recognised by identity, as long as it lives, and only its u is kept, which depends
    on no parameter: densities follow the parameters as they are when asked for.

    Args:
        frame: Location and scales S.
        decoder: h, maps (B, r) to (B, D).
        noise: Of covariance :math:`\Psi`.
        reverse: r.
        rank: Width r of u.
        num_aux: Number K of extra draws.
        batch_shape: Shape of independent copies.
        validate_args: As in torch.

    References:
        Sobolev and Vetrov, *Importance weighted hierarchical variational inference*,
        https://arxiv.org/abs/1905.03290 (2019).
    """

    has_rsample = True
    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(
        self,
        frame: Frame,
        decoder: Decoder,
        noise: Noise,
        reverse: Reverse,
        rank: int,
        num_aux: int = 0,
        batch_shape: torch.Size | list[int] | tuple[int, ...] = (),
        validate_args: bool | None = None,
    ) -> None:
        self.frame = frame
        self.decoder = decoder
        self.noise = noise
        self.reverse = reverse
        self.rank = rank
        self.num_aux = num_aux
        self._drawn: tuple[weakref.ref[Tensor], Tensor] | None = None
        super().__init__(torch.Size(batch_shape), frame.loc.shape, validate_args=validate_args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": None}

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> Thickened:
        """The same law with another batch shape, which remembers nothing."""
        return Thickened(
            self.frame,
            self.decoder,
            self.noise,
            self.reverse,
            self.rank,
            self.num_aux,
            expanded_size(self, batch_shape),
            validate_args=self._validate_args,
        )

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draw values (*sample_shape, *batch_shape, D), and remember what led to them."""
        shape = as_size(sample_shape, "sample_shape") + self.batch_shape
        loc = self.frame.loc
        u = torch.randn(*shape, self.rank, dtype=loc.dtype, device=loc.device)
        decoded = self.decoder(u.reshape(-1, self.rank)).reshape(*shape, -1)
        value = self.frame.place(decoded + self.noise.rsample(shape))
        self._drawn = (weakref.ref(value), u)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-densities (*) of values (*, D), in nats: see above for what they are."""
        if self._validate_args:
            self._validate_sample(value)
        u = self._generating(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        e = self.frame.standardise(value).expand(*shape, -1).reshape(math.prod(shape), -1)
        law = self.reverse(e, self.decoder, self.noise)
        if u is None:
            candidates = law.rsample(self.num_aux + 1)
        else:
            candidates = u.reshape(1, -1, self.rank)
            if self.num_aux > 0:
                candidates = torch.cat([candidates, law.rsample(self.num_aux)])
        decoded = self.decoder(candidates.flatten(0, 1)).view(*candidates.shape[:-1], -1)
        log_ratio = (
            _standard_normal(candidates)
            + self.noise.log_prob(e - decoded)
            - law.log_prob(candidates)
        )
        averaged = log_ratio[0]
        if len(log_ratio) > 1:
            averaged = log_ratio.logsumexp(0) - math.log(len(log_ratio))
        return (averaged - self.frame.scale.log().sum()).view(shape)

    def _generating(self, value: Tensor) -> Tensor | None:
        if self._drawn is None or self._drawn[0]() is not value:
            return None
        return self._drawn[1]


def _standard_normal(u: Tensor) -> Tensor:
    return -0.5 * (u.square().sum(-1) + u.shape[-1] * math.log(2 * math.pi))
