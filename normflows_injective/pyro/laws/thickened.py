"""A low-dimensional law, thickened by Gaussian noise, as a distribution of Pyro."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple, final

import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from ...distributions.thickened.decoders import Decoder
from ...distributions.thickened.noise import Noise
from ...distributions.thickened.reverse import Reverse, ReverseLaw
from ...modules.constants import ConstantCopies
from .law import PyroLaw, Shape


class _Pairs(NamedTuple):
    """Values (B, D) of a batch shape, laws of u given them, candidates (K + 1, B, r) for u.

    ``is_own`` says whether the first candidate is the one that led to a value.
    """

    rows: Tensor
    shape: torch.Size
    law: ReverseLaw
    candidates: Tensor
    is_own: bool


@final
class Frame(nn.Module):
    r"""Location and scales of a guide: :math:`\theta = \mathrm{loc} + \mathrm{scale} \cdot e`."""

    def __init__(self, loc: Tensor, scales: Tensor) -> None:
        super().__init__()
        # softplus is exponential for small scales and does not explode for large ones.
        self.loc, self.raw_scale = (nn.Parameter(torch.empty_like(loc)) for _ in range(2))
        self.move_to(loc, scales)

    @torch.no_grad()
    def move_to(self, loc: Tensor, scales: Tensor) -> None:
        """Take a location (D,) and scales (D,)."""
        self.loc.copy_(loc)
        self.raw_scale.copy_(scales + (-torch.expm1(-scales)).log())

    @property
    def scale(self) -> Tensor:
        """Scales (D,)."""
        return softplus(self.raw_scale)

    def place(self, e: Tensor) -> Tensor:
        """Values (*, D) for standardised values (*, D)."""
        return self.loc + self.scale * e

    def standardise(self, value: Tensor) -> Tensor:
        """Standardised values (*, D) for values (*, D)."""
        return (value - self.loc) / self.scale


@final
class Thickened(PyroLaw):
    r"""The law of :math:`\theta = \mathrm{loc} + S (h(u) + \varepsilon)`, scored by a bound.

    .. math::

        \log \hat q = \log \frac{1}{K+1} \sum_{k=0}^{K}
            \frac{q(u_k)\, q(\theta \mid u_k)}{r(u_k \mid \theta)}, \qquad
        E \log \hat q \ge E \log q(\theta)
    """

    # Here u is N(0, I_r), the noise N(0, Psi), and r(u | theta) the reverse model. For the latest
    # draw u_0 is the one that led to it, and u_1, ..., u_K come from r. Given theta their density
    # is q(u_0 | theta) prod_{k >= 1} r(u_k | theta); its average over the position of u_0 is
    # prod_k r(u_k | theta) q_hat / q(theta), a density, so that E log(q_hat / q) is a divergence,
    # hence not negative, and the bound of the evidence stays one (arXiv 1905.03290).
    #
    # The u of any other value is unknown. All K + 1 come from r then, and the average is an
    # unbiased estimate of q, whose logarithm is too small in expectation: it serves as a score,
    # never in a bound of the evidence.
    #
    # The gradient of log q_hat by the parameters in q alone, at fixed draws, has mean zero: by the
    # density above, symmetric in the u, it is the integral of grad q_hat prod_k r(u_k | theta),
    # the gradient of one. It is left out of the entropy term, as the score of a law is (see
    # pathwise.py). The gradient by those in r has no mean zero, also where they are the guide's
    # own: it trains the reverse model, and stays.
    #
    # A draw is recognised by identity while it lives, and only its u is stored, which depends on
    # no parameter: densities follow the present parameters.

    has_rsample = True
    support = constraints.real_vector

    def __init__(
        self,
        frame: Frame,
        decoder: Decoder,
        noise: Noise,
        reverse: Reverse,
        rank: int,
        num_aux: int = 0,
        constants: ConstantCopies | None = None,
    ) -> None:
        self.frame = frame
        self.decoder = decoder
        self.noise = noise
        self.reverse = reverse
        self.rank = rank
        self.num_aux = num_aux
        self._constants = constants
        self._drawn: tuple[weakref.ref[Tensor], Tensor] | None = None
        super().__init__(torch.Size(), frame.loc.shape, None)

    def __getstate__(self) -> dict[str, Any]:
        # Copies remember no draws, and neither does an expanded law, which is a copy.
        return {**self.__dict__, "_drawn": None}

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw values (*sample_shape, *batch_shape, D), and remember their auxiliary variables."""
        shape = self._drawn_shape(sample_shape)
        loc = self.frame.loc
        u = torch.randn(*shape, self.rank, dtype=loc.dtype, device=loc.device)
        decoded = self.decoder(u.reshape(-1, self.rank)).reshape(*shape, -1)
        value = self.frame.place(decoded + self.noise.rsample(shape))
        self._drawn = (weakref.ref(value), u)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Estimates of log-densities (*) of values (*, D), in nats."""
        return self._averaged(self._pairs(value), self.frame, self.decoder, self.noise)

    def score_parts(  # type: ignore[override]
        self, value: Tensor, *args: Any, **kwargs: Any
    ) -> ScoreParts:
        """Estimates (*), no score, and the estimates whose gradient follows the draw's path."""
        pairs = self._pairs(value)
        log_q = self._averaged(pairs, self.frame, self.decoder, self.noise)
        entropy_term = log_q
        follows = torch.is_grad_enabled() and value.requires_grad and pairs.is_own
        if follows and self._constants is not None:
            constants = self._constants.of([self.frame, self.decoder, self.noise])
            entropy_term = self._averaged(pairs, *constants)
        return ScoreParts(log_q, 0, entropy_term)  # type: ignore[arg-type]

    def _pairs(self, value: Tensor) -> _Pairs:
        """Values in rows with laws of their auxiliary variables, and candidates for these."""
        if self._validate_args:
            self._validate_sample(value)
        u = self._generating(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        rows = value.expand(*shape, -1).reshape(math.prod(shape), -1)
        law = self.reverse(self.frame.standardise(rows), self.decoder, self.noise)
        if u is None:
            candidates = law.rsample(self.num_aux + 1)
        else:
            candidates = u.reshape(1, -1, self.rank)
            if self.num_aux > 0:
                candidates = torch.cat([candidates, law.rsample(self.num_aux)])
        return _Pairs(rows, shape, law, candidates, u is not None)

    def _averaged(self, pairs: _Pairs, frame: Frame, decoder: Decoder, noise: Noise) -> Tensor:
        """The estimates (*) by the parts of the guide that are given."""
        candidates = pairs.candidates
        decoded = decoder(candidates.flatten(0, 1)).view(*candidates.shape[:-1], -1)
        log_ratio = (
            _standard_normal(candidates)
            + noise.log_prob(frame.standardise(pairs.rows) - decoded)
            - pairs.law.log_prob(candidates)
        )
        averaged = log_ratio[0]
        if len(log_ratio) > 1:
            averaged = log_ratio.logsumexp(0) - math.log(len(log_ratio))
        return (averaged - frame.scale.log().sum()).view(pairs.shape)

    def _generating(self, value: Tensor) -> Tensor | None:
        if self._drawn is None or self._drawn[0]() is not value:
            return None
        return self._drawn[1]


def _standard_normal(u: Tensor) -> Tensor:
    return -0.5 * (u.square().sum(-1) + u.shape[-1] * math.log(2 * math.pi))
