r"""Surrogates: scalars per sample whose gradient estimates that of the log-volume.

Notation: encoder :math:`f`, decoder :math:`g`, :math:`z = f(x)`, :math:`\hat x = g(z)`, probes
:math:`v_k`, SG = stop-gradient. All signs are those of a term *added to the loss*, so every
surrogate estimates the gradient of :math:`+\tfrac12 \log\det g'^\top g'`. Their values mean
nothing: at a consistent pair the encoder surrogate is :math:`-d` whatever the volume is.

The encoder surrogate and the ablation are those of free-form injective flows, arXiv 2306.01843;
the decoder surrogate is also that of free-form flows, arXiv 2310.16624.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..autodiff.products import jvp, vjp
from ..autodiff.recording import Map, Recorded, inner, point_at, record, record_first_layers
from ..checks import check_count, check_flag, check_positive, lookup
from ..errors import NumericalWarning
from .normal_equations import conjugate_gradient
from .surrogate import (
    Estimator,
    Surrogate,
    checked,
    decode_and_jvp,
    mean_inner,
    mean_over_probes,
)


@dataclass(frozen=True)
class EncoderSurrogate(Estimator):
    r"""The surrogate with the encoder's Jacobian at the data, the default.

    .. math:: S_E = -\frac1K \sum_k v_k^\top f'(x)\, \mathrm{SG}[g'(z) v_k]
    """

    def _encode(self, encode: Map, x: Tensor) -> Recorded:
        return record(encode, x) if x.requires_grad else record_first_layers(encode, point_at(x))

    def _surrogate(self, encoded: Recorded, encode: Map, decode: Map, probes: Tensor) -> Surrogate:
        z, x = encoded.value, encoded.point
        reconstruction, jvps = decode_and_jvp(decode, z, probes, x)
        return Surrogate(z, reconstruction, -mean_over_probes(encoded.contract(probes, jvps)))


@dataclass(frozen=True)
class OnManifoldSurrogate(Estimator):
    r"""The surrogate with the encoder's Jacobian at the reconstruction, an ablation.

    .. math:: S = -\frac1K \sum_k v_k^\top f'(\hat x)\, \mathrm{SG}[g'(z) v_k]
    """

    # This is the gradient of joint maximum likelihood, which can win without bound by moving the
    # manifold. It is here to be compared with, not to be trained.
    def _surrogate(self, encoded: Recorded, encode: Map, decode: Map, probes: Tensor) -> Surrogate:
        z, x = encoded.value, encoded.point
        reconstruction, jvps = decode_and_jvp(decode, z, probes, x)
        again = record(encode, reconstruction)
        return Surrogate(z, reconstruction, -mean_over_probes(again.contract(probes, jvps)))


@dataclass(frozen=True)
class DecoderSurrogate(Estimator):
    r"""The surrogate with the decoder's Jacobian, and the stop-gradient on the encoder's.

    .. math:: S_D = +\frac1K \sum_k \mathrm{SG}[v_k^\top f'(x)]\, g'(z) v_k
    """

    # Computed as <g'^T a_k, v_k>, a_k = SG[f'^T v_k], by a reverse-mode product of the decoder:
    # backward through a tangent is silently wrong for many functions in torch, backward through a
    # reverse-mode product is right.
    def _surrogate(self, encoded: Recorded, encode: Map, decode: Map, probes: Tensor) -> Surrogate:
        z, x = encoded.value, encoded.point
        vjps = encoded.vjp(probes, create_graph=False).detach()
        reconstruction = checked(record(decode, z).value, x)
        vjps_of_both = vjp(reconstruction, z, vjps, create_graph=True)
        return Surrogate(z, reconstruction, mean_inner(vjps_of_both, probes))


@dataclass(frozen=True)
class Conditional(Estimator):
    r"""Choose for every probe the surrogate whose gradient agrees with that of reconstruction.

    With :math:`c = v^\top (f'g' - I) v`, descending :math:`S_E` raises :math:`v^\top f'g' v` and
    descending :math:`S_D` lowers it. Reconstruction of noisy data draws :math:`f'g'` to :math:`I`,
    so alignment means :math:`S_E` where :math:`c < 0` and :math:`S_D` where :math:`c > 0`.

    Args:
        opposite: Use the other assignment, for comparison.

    References:
        The switch is that of arXiv 2608.12084; the direction is derived above and checked against
        the gradient of :math:`\lVert I - g'f' \rVert_F^2` in the tests.

    Examples:
        >>> encode, decode = (lambda x: x[:, :1] / 2), (lambda z: torch.cat([2 * z, 0 * z], 1))
        >>> one_probe = lambda z: torch.ones(1, *z.shape)
        >>> Conditional()(torch.ones(1, 2), encode, decode, one_probe).volume.detach()
        tensor([1.])
    """

    opposite: bool = False

    def __post_init__(self) -> None:
        check_flag(self.opposite, "opposite")

    def _surrogate(self, encoded: Recorded, encode: Map, decode: Map, probes: Tensor) -> Surrogate:
        z, x = encoded.value, encoded.point
        reconstruction, jvps = decode_and_jvp(decode, z, probes, x)
        vjps = encoded.vjp(probes, create_graph=True)
        vjps_of_both = vjp(reconstruction, z, vjps.detach(), create_graph=True)
        encoder_surrogate = -inner(vjps, jvps)
        decoder_surrogate = inner(vjps_of_both, probes)
        is_below = decoder_surrogate.detach() < inner(probes, probes)
        use_encoder = ~is_below if self.opposite else is_below
        volume = torch.where(use_encoder, encoder_surrogate, decoder_surrogate).mean(0)
        return Surrogate(z, reconstruction, volume)


@dataclass(frozen=True)
class ConjugateGradient(Estimator):
    r"""Estimator of rectangular flows, which needs no encoder Jacobian and is unbiased.

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
            In exact arithmetic :math:`d` suffice; rounding takes a few more.
        tolerance: Relative residual at which a solve stops.

    Raises:
        OptionError: If the bound or the tolerance is not positive.

    Warns:
        NumericalWarning: If a solve fails in this precision while ``max_iterations`` is None.

    References:
        Rectangular flows, arXiv 2106.01413, the stochastic gradient of the log-volume (the factor
        1/2 is easily lost).

    Examples:
        >>> encode, decode = (lambda x: x[:, :1] / 2), (lambda z: torch.cat([2 * z, 0 * z], 1))
        >>> one_probe = lambda z: torch.ones(1, *z.shape)
        >>> solver = ConjugateGradient(max_iterations=1)
        >>> solver(torch.ones(1, 2), encode, decode, one_probe).volume.detach()
        tensor([0.5000])
    """

    max_iterations: int | None = None
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        # A frozen dataclass sets its fields so.
        if self.max_iterations is not None:
            bound = check_count(self.max_iterations, "max_iterations")
            object.__setattr__(self, "max_iterations", bound)
        object.__setattr__(self, "tolerance", check_positive(self.tolerance, "tolerance"))

    def _surrogate(self, encoded: Recorded, encode: Map, decode: Map, probes: Tensor) -> Surrogate:
        z, x = encoded.value, encoded.point
        reconstruction = checked(record(decode, z).value, x)

        def product(p: Tensor) -> Tensor:
            with torch.no_grad():
                return jvp(decode, z.detach(), p.to(z.dtype))[1]

        def gram(p: Tensor) -> Tensor:
            return vjp(reconstruction, z, product(p), create_graph=False).detach().to(p.dtype)

        # Networks may run in half precision, the recursion cannot.
        probes = probes.to(torch.promote_types(probes.dtype, torch.float32))
        bound = self.max_iterations or 2 * z[0].numel()
        solution, residual, _ = conjugate_gradient(gram, probes, bound, self.tolerance)
        if self.max_iterations is None:
            _warn_if_unsolved(residual)
        a, b = product(solution), product(probes)
        a_jv = vjp(reconstruction, z, a, create_graph=True)
        b_js = vjp(reconstruction, z, b, create_graph=True)
        product_rule = mean_inner(a_jv, probes) + mean_inner(b_js, solution)
        return Surrogate(z, reconstruction, (product_rule - mean_inner(a, b)) / 2)


@dataclass(frozen=True)
class NoVolume(Estimator):
    """No volume term, for the reconstruction phase of a warm-up."""

    def _encode(self, encode: Map, x: Tensor) -> Recorded:
        return Recorded(encode(x.clone()), x)

    def _surrogate(self, encoded: Recorded, encode: Map, decode: Map, probes: Tensor) -> Surrogate:
        z, x = encoded.value, encoded.point
        return Surrogate(z, checked(decode(z.clone()), x), x.new_zeros(len(z)))


def _warn_if_unsolved(residual: Tensor) -> None:
    unsolved = int((residual > 0.01).sum())
    if unsolved:
        warnings.warn(
            f"{unsolved} of {residual.numel()} conjugate-gradient solves kept a relative residual "
            f"above 1 % (worst {float(residual.max()):.2g}): the decoder Jacobian is too badly "
            "conditioned for this precision, and the gradient is wrong. Use float64 or another "
            "estimator, or accept a truncated solve by setting max_iterations.",
            NumericalWarning,
            stacklevel=2,
        )


ESTIMATORS: dict[str, Estimator] = {
    "encoder": EncoderSurrogate(),
    "on_manifold": OnManifoldSurrogate(),
    "decoder": DecoderSurrogate(),
    "conditional": Conditional(),
    "conditional_opposite": Conditional(opposite=True),
    "conjugate_gradient": ConjugateGradient(),
}


def estimator_from(estimator: str | Estimator) -> Estimator:
    """An estimator by its name in ``ESTIMATORS``, or as it is."""
    if isinstance(estimator, Estimator):
        return estimator
    return lookup(estimator, ESTIMATORS, "estimator", "an Estimator or one of {}")
