r"""Surrogates: scalars per sample whose gradient estimates that of the log-volume.

Notation: encoder :math:`f`, decoder :math:`g`, :math:`z = f(x)`, :math:`\hat x = g(z)`, probes
:math:`v_k`, SG = stop-gradient. All signs are those of a term *added to the loss*, so every
surrogate estimates the gradient of :math:`+\tfrac12 \log\det g'^\top g'`. Their values mean
nothing: at a consistent pair the encoder surrogate is :math:`-d` whatever the volume is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NotInjectiveError, OptionError, ShapeError
from .conjugate_gradient import conjugate_gradient
from .modules import modules_of, refuse_unsupported, warm_up
from .products import Map, jvp, vjp

__all__ = [
    "ESTIMATORS",
    "Conditional",
    "ConjugateGradient",
    "Decoder",
    "Encoder",
    "Estimator",
    "NoVolume",
    "OnManifold",
    "Surrogate",
    "estimator_from",
]

DrawProbes = Callable[[Tensor], Tensor]


class Surrogate(NamedTuple):
    """Latents (B, *), reconstruction (B, *), and the surrogate per sample (B,)."""

    z: Tensor
    reconstruction: Tensor
    volume: Tensor


class Estimator(ABC):
    """How the gradient of the log-volume is estimated from an encoder and a decoder."""

    def __call__(self, x: Tensor, encode: Map, decode: Map, draw_probes: DrawProbes) -> Surrogate:
        r"""Encode, decode and form the surrogate.

        Works under ``torch.no_grad()`` and ``torch.inference_mode()``, where it gives the value.
        ``x`` is neither mutated nor marked as requiring gradients.

        Args:
            x: Data of shape :math:`(B, *)`.
            encode: :math:`f`, taking :math:`(B, *)` data to :math:`(B, *)` latents.
            decode: :math:`g`, the other way.
            draw_probes: Gives probes :math:`(K, B, *)` for a latent batch :math:`(B, *)`.

        Returns:
            :class:`Surrogate` ``(z, reconstruction, volume)``.

        Raises:
            ShapeError: If the decoder does not return the shape of the data.
            NotInjectiveError: If the latents are wider than the data.
            UnsupportedLayerError: If a layer makes the products silently wrong.
        """
        refuse_unsupported(modules_of(encode, decode))
        recorded = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if x.is_inference():
                x = x.clone()
            # A view of the caller's storage that may require gradients without marking theirs.
            point = x if x.requires_grad else x.detach().requires_grad_()
            # A copy goes in, because some of the host's layers shift their input in place.
            z = encode(point.clone())
            _check_latent(z, x)
            warm_up(decode, z)
            surrogate = self._surrogate(point, z, encode, decode, draw_probes(z))
        if recorded:
            return surrogate
        return Surrogate(*(term.detach() for term in surrogate))

    @abstractmethod
    def _surrogate(
        self, x: Tensor, z: Tensor, encode: Map, decode: Map, probes: Tensor
    ) -> Surrogate:
        """The estimator's formula; ``z`` is on a graph that reaches ``x``."""


@dataclass(frozen=True)
class Encoder(Estimator):
    r"""Encoder surrogate with its Jacobian at the data, the default.

    .. math:: S_E = -\frac1K \sum_k v_k^\top f'(x)\, \mathrm{SG}[g'(z) v_k]

    References:
        Free-form injective flows, arXiv 2306.01843, the final loss.

    Examples:
        >>> surrogate = Encoder()(
        ...     torch.ones(1, 2),
        ...     encode=lambda x: x[:, :1] / 2,
        ...     decode=lambda z: torch.cat([2 * z, 0 * z], 1),
        ...     draw_probes=lambda z: torch.ones(1, 1, 1),
        ... )
        >>> surrogate.volume.detach()
        tensor([-1.])
    """

    def _surrogate(
        self, x: Tensor, z: Tensor, encode: Map, decode: Map, probes: Tensor
    ) -> Surrogate:
        reconstruction, pushed = _decode_with_tangents(decode, z, probes, x)
        pulled = vjp(z, x, probes, create_graph=True)
        return Surrogate(z, reconstruction, -_mean_inner(pulled, pushed))


@dataclass(frozen=True)
class OnManifold(Estimator):
    r"""Encoder surrogate with its Jacobian at the reconstruction: the ablation that diverges.

    .. math:: S = -\frac1K \sum_k v_k^\top f'(\hat x)\, \mathrm{SG}[g'(z) v_k]

    This is the gradient of joint maximum likelihood, which can win without bound by moving the
    manifold. It is here to be compared with, not to be trained.

    References:
        Free-form injective flows, arXiv 2306.01843, section on the on-manifold pathology.
    """

    def _surrogate(
        self, x: Tensor, z: Tensor, encode: Map, decode: Map, probes: Tensor
    ) -> Surrogate:
        reconstruction, pushed = _decode_with_tangents(decode, z, probes, x)
        again = encode(reconstruction.clone())
        pulled = vjp(again, reconstruction, probes, create_graph=True)
        return Surrogate(z, reconstruction, -_mean_inner(pulled, pushed))


@dataclass(frozen=True)
class Decoder(Estimator):
    r"""Decoder surrogate: the same trace with the stop-gradient on the encoder's side.

    .. math:: S_D = +\frac1K \sum_k \mathrm{SG}[v_k^\top f'(x)]\, g'(z) v_k

    Computed as :math:`\langle g'^\top a_k, v_k \rangle`, :math:`a_k = \mathrm{SG}[f'^\top v_k]`,
    by a reverse-mode product of the decoder: backward through a *tangent* is silently wrong for
    layer normalisation in torch, backward through a reverse-mode product is right.

    References:
        Free-form injective flows, arXiv 2306.01843; free-form flows, arXiv 2310.16624.
    """

    def _surrogate(
        self, x: Tensor, z: Tensor, encode: Map, decode: Map, probes: Tensor
    ) -> Surrogate:
        pulled = vjp(z, x, probes, create_graph=False).detach()
        reconstruction = _decode(decode, z, x)
        back = vjp(reconstruction, z, pulled, create_graph=True)
        return Surrogate(z, reconstruction, _mean_inner(back, probes))


@dataclass(frozen=True)
class Conditional(Estimator):
    r"""Per probe, the one of the two surrogates whose gradient agrees with the reconstruction's.

    With :math:`c = v^\top (f'g' - I) v`, descending :math:`S_E` raises :math:`v^\top f'g' v` and
    descending :math:`S_D` lowers it, and reconstruction of noisy data pulls :math:`f'g'` to
    :math:`I`. Alignment therefore means :math:`S_E` where :math:`c < 0` and :math:`S_D` where
    :math:`c > 0`.

    Args:
        opposite: Use the other assignment, for comparison.

    References:
        The switch is that of arXiv 2608.12084; the direction is derived above and checked against
        the gradient of :math:`\lVert I - g'f' \rVert_F^2` in the tests.
    """

    opposite: bool = False

    def _surrogate(
        self, x: Tensor, z: Tensor, encode: Map, decode: Map, probes: Tensor
    ) -> Surrogate:
        reconstruction, pushed = _decode_with_tangents(decode, z, probes, x)
        pulled = vjp(z, x, probes, create_graph=True)
        back = vjp(reconstruction, z, pulled.detach(), create_graph=True)
        encoder_form = -_inner(pulled, pushed)
        decoder_form = _inner(back, probes)
        below = decoder_form.detach() < _inner(probes, probes)
        use_encoder = ~below if self.opposite else below
        return Surrogate(
            z, reconstruction, torch.where(use_encoder, encoder_form, decoder_form).mean(0)
        )


@dataclass(frozen=True)
class ConjugateGradient(Estimator):
    r"""Rectangular flows' estimator, which needs no encoder Jacobian and is unbiased.

    .. math:: S = \frac{1}{2K} \sum_k \mathrm{SG}[(J^\top J)^{-1} v_k]^\top J^\top J v_k,
              \quad J = g'(z)

    The solve is matrix-free, by conjugate gradients with one forward- and one reverse-mode product
    per iteration. With :math:`s = \mathrm{SG}[(J^\top J)^{-1} v]`, :math:`a = \mathrm{SG}[J s]`
    and :math:`b = \mathrm{SG}[J v]` the product rule gives
    :math:`\partial(s^\top J^\top J v) = \partial(a^\top J v + b^\top J s)`, so that only
    reverse-mode products have to be differentiated; :math:`\mathrm{SG}[a^\top b]` is subtracted to
    keep the value of the formula.

    Args:
        max_iterations: Bound on the iterations; None takes twice the latent dimension :math:`d`.
            In exact arithmetic :math:`d` suffice, rounding asks for a few more.
        tolerance: Relative residual at which a solve stops.

    Raises:
        OptionError: If the bound or the tolerance is not positive.

    References:
        Rectangular flows, arXiv 2106.01413, the stochastic gradient of the log-volume (the factor
        1/2 is easily lost).
    """

    max_iterations: int | None = None
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.max_iterations is not None and self.max_iterations < 1:
            raise OptionError(f"max_iterations must be at least 1, got {self.max_iterations}.")
        if not self.tolerance > 0:
            raise OptionError(f"tolerance must be positive, got {self.tolerance}.")

    def _surrogate(
        self, x: Tensor, z: Tensor, encode: Map, decode: Map, probes: Tensor
    ) -> Surrogate:
        reconstruction = _decode(decode, z, x)
        push = partial(_push, decode, z.detach())

        def gram(p: Tensor) -> Tensor:
            return vjp(reconstruction, z, push(p), create_graph=False).detach()

        bound = self.max_iterations or 2 * z[0].numel()
        solved = conjugate_gradient(gram, probes, bound, self.tolerance).solution
        pushed_solution, pushed_probes = push(solved), push(probes)
        a_jv = vjp(reconstruction, z, pushed_solution, create_graph=True)
        b_js = vjp(reconstruction, z, pushed_probes, create_graph=True)
        sum_of_rules = _mean_inner(a_jv, probes) + _mean_inner(b_js, solved)
        value = _mean_inner(pushed_solution, pushed_probes)
        return Surrogate(z, reconstruction, (sum_of_rules - value) / 2)


@dataclass(frozen=True)
class NoVolume(Estimator):
    """No volume term: encode and decode alone, for the reconstruction phase of a warm-up."""

    def _surrogate(
        self, x: Tensor, z: Tensor, encode: Map, decode: Map, probes: Tensor
    ) -> Surrogate:
        return Surrogate(z, _decode(decode, z, x), z.new_zeros(len(z)))


ESTIMATORS: dict[str, Estimator] = {
    "encoder": Encoder(),
    "on_manifold": OnManifold(),
    "decoder": Decoder(),
    "conditional": Conditional(),
    "conditional_opposite": Conditional(opposite=True),
    "conjugate_gradient": ConjugateGradient(),
}


def estimator_from(estimator: str | Estimator) -> Estimator:
    """Look an estimator up by name, or pass one through.

    Args:
        estimator: A key of ``ESTIMATORS`` or an :class:`Estimator`.

    Returns:
        The estimator.

    Raises:
        OptionError: If the name is unknown.

    Examples:
        >>> estimator_from("conditional")
        Conditional(opposite=False)
    """
    if isinstance(estimator, Estimator):
        return estimator
    if estimator not in ESTIMATORS:
        raise OptionError(
            f"estimator must be an Estimator or one of {', '.join(ESTIMATORS)}, got {estimator!r}."
        )
    return ESTIMATORS[estimator]


def _decode_with_tangents(
    decode: Map, z: Tensor, probes: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    reconstruction, pushed = jvp(decode, z, probes)
    _check_reconstruction(reconstruction, x)
    return reconstruction, pushed.detach()


def _decode(decode: Map, z: Tensor, x: Tensor) -> Tensor:
    reconstruction = decode(z)
    _check_reconstruction(reconstruction, x)
    return reconstruction


def _push(decode: Map, z: Tensor, tangents: Tensor) -> Tensor:
    with torch.no_grad():
        return jvp(decode, z, tangents)[1].detach()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(2).sum(2)


def _mean_inner(a: Tensor, b: Tensor) -> Tensor:
    return _inner(a, b).mean(0)


def _check_latent(z: Tensor, x: Tensor) -> None:
    if len(z) != len(x):
        raise ShapeError(
            f"The encoder took a batch of {len(x)} samples to {len(z)}: it must keep the batch."
        )
    if z[0].numel() > x[0].numel():
        raise NotInjectiveError(
            f"The latent space has {z[0].numel()} dimensions and the data {x[0].numel()}: a map "
            "from latents to data cannot be injective. Use fewer latent dimensions."
        )


def _check_reconstruction(reconstruction: Tensor, x: Tensor) -> None:
    if reconstruction.shape != x.shape:
        raise ShapeError(
            f"The decoder must return the shape of the data {tuple(x.shape)}, got "
            f"{tuple(reconstruction.shape)}."
        )
