r"""Log-volumes without a Jacobian: stochastic Lanczos quadrature with a standard error.

**Trace.** With the right singular vectors :math:`x_i` of :math:`J = g'(z)` and a unit vector
:math:`v`, put :math:`q(v) = d \sum_i (x_i^\top v)^2 \log\sigma_i`. Over a uniform direction
:math:`\mathbb E\, q(v) = \sum_i \log\sigma_i`, the log-volume.

**Quadrature.** :math:`q(v)/d` is an integral of :math:`\tfrac12 \log\lambda` against a measure on
the spectrum of :math:`J^\top J`; :math:`m` steps of the Lanczos process started at :math:`v` give
its Gauss rule with :math:`m` nodes, here by bidiagonalising :math:`J` (see ``bidiagonal.py``).

**Statistical error.** The probes are columns of a random orthogonal matrix: :math:`K` draws of one
population without replacement, since :math:`d` of them give the trace exactly. All pairs have the
correlation :math:`-1/(d-1)` that makes the variance of the mean vanish at :math:`K = d`, hence

.. math:: \operatorname{Var}\, \bar q = \frac{\operatorname{Var} q}{K} \frac{d-K}{d-1}, \qquad
    \mathbb E\, s^2 = \operatorname{Var} q\, \frac{d}{d-1},

and :math:`\tfrac{s^2}{K} (1 - \tfrac Kd)` is an unbiased estimate of the former. The error over
the stated one follows Student's t with :math:`K - 1` degrees of freedom as far as :math:`q` is
normal. Where a few singular values lie far from all others it has their chi-squared tails instead,
and few probes that miss them state too small an error.

**Truncation.** The even derivatives of the logarithm are negative, so the rule :math:`G_m` lies
above the integral, decreases with :math:`m`, and is exact after :math:`d` steps. The error is
estimated in two ways from :math:`\Delta = G_{m/2} - G_m` and :math:`\Delta' = G_{m/4} - G_{m/2}`:

* if doubling the steps went on shrinking the differences by :math:`r = \Delta / \Delta'`, the rest
  of the geometric series is :math:`\Delta\, r / (1 - r)`. That is right for errors that fall like
  a power of :math:`m` (spectra that reach down to zero), more than enough for exponential ones (a
  gap at zero), and twice the truth where a spectrum is spread evenly over many decades and the
  errors fall like the square of a logarithm;
* if the differences only did not grow, :math:`\Delta` for each of the :math:`\log_2 (d/m)`
  doublings left, and for one at least.

The truth is taken to lie within the smaller of them, :math:`R`, below :math:`G_m`. The middle
:math:`G_m - R/2` is returned, and :math:`R/2` is added in quadrature to its standard error.
"""

from __future__ import annotations

from math import log2
from typing import NamedTuple

import torch
from torch import Tensor

from ..autodiff.products import event_rows, jvp, out_of_inference, vjp
from ..autodiff.recording import Map
from ..autodiff.settings import as_written, differentiable_attention
from ..checks import checks_arguments
from ..errors import OptionError
from ..host.first_meeting import give_first_data
from ..host.refusals import refuse_unsupported
from ..modules.contents import modules_of
from .bidiagonal import Bidiagonal, bidiagonalise, gauss_rule
from .factoring import refuse_lower_dimension, warn_if_deficient
from .probes import draw_probes

NUM_PROBES = 8
NUM_STEPS = 64
# Rules with a quarter and a half of the steps are needed to judge the truncation.
_FEWEST_STEPS = 4


class EstimatedVolume(NamedTuple):
    """Estimated log-volumes (B,) in nats and their standard errors (B,)."""

    log_volume: Tensor
    standard_error: Tensor


@as_written
@checks_arguments
def lanczos_log_volume(
    decode: Map,
    z: Tensor,
    chunk_size: int | None = None,
    num_probes: int | None = None,
    num_steps: int | None = None,
) -> EstimatedVolume:
    r"""Estimate log-volumes from products with :math:`J` and :math:`J^\top` alone.

    .. math:: \tfrac12 \log\det J^\top J \approx
        \frac dK \sum_k \sum_i w_{ki} \log\sigma_{ki}
    """
    # Over the singular values of the bidiagonal matrix of probe k, and the squared first
    # components w of their right singular vectors. Takes 2 K m products, where the exact value
    # takes d and a factorisation, and the memory of K m (d + D) numbers per sample, where the
    # Jacobian has d D.
    dimension = z[0].numel()
    _check_options(dimension, chunk_size, num_probes, num_steps)
    num_probes = min(num_probes or NUM_PROBES, dimension)
    num_steps = min(num_steps or NUM_STEPS, dimension)
    refuse_unsupported(modules_of(decode))
    with torch.inference_mode(False), torch.enable_grad(), differentiable_attention():
        point = out_of_inference(z).detach().requires_grad_()
        give_first_data(decode, point)
        # A copy goes in, because some layers of normflows shift their input in place.
        value = decode(point.clone())
    data_dim = value[0].numel()
    refuse_lower_dimension(dimension, data_dim)
    dtype = torch.promote_types(z.dtype, torch.float32)

    def jacobian_times(v: Tensor) -> Tensor:
        tangents = v.view(len(v), *z.shape).to(z.dtype)
        return event_rows(jvp(decode, point.detach(), tangents)[1]).to(dtype)

    def transpose_times(u: Tensor) -> Tensor:
        cotangents = u.view(len(u), *value.shape).to(value.dtype)
        return event_rows(vjp(value, point, cotangents, create_graph=False)).to(dtype)

    # A sum of n rounded terms errs by about sqrt(n) units; smaller ones count as zero.
    tolerance = torch.finfo(z.dtype).eps * data_dim**0.5
    with torch.inference_mode(False), torch.no_grad(), differentiable_attention():
        drawn = draw_probes("orthonormal", num_probes, point.to(dtype))
        probes = event_rows(drawn) / dimension**0.5
        parts = [
            bidiagonalise(jacobian_times, transpose_times, chunk, data_dim, num_steps, tolerance)
            for chunk in probes.split(chunk_size or num_probes)
        ]
        bidiagonal = Bidiagonal(*(torch.cat(part) for part in zip(*parts, strict=True)))
        estimate, singular_values = _estimate(bidiagonal, dimension)
    extremes = singular_values.amin(2), singular_values.amax(2)
    warn_if_deficient((extremes[0] <= tolerance * extremes[1]).any(0))
    return EstimatedVolume(*(term.to(dtype) for term in estimate))


def _check_options(
    dimension: int, chunk_size: int | None, num_probes: int | None, num_steps: int | None
) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise OptionError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
    if num_probes is not None and num_probes < 2:
        raise OptionError(
            f"num_probes must be at least 2, got {num_probes}: the standard error comes from the "
            f"spread between probes. Leave it out for {NUM_PROBES}."
        )
    fewest = min(_FEWEST_STEPS, dimension)
    if num_steps is not None and num_steps < fewest:
        raise OptionError(
            f"num_steps must be at least {fewest}, got {num_steps}: the truncation error is "
            f"judged from rules with a quarter and a half of the steps. Leave it out for "
            f"{NUM_STEPS}."
        )


def _estimate(bidiagonal: Bidiagonal, dimension: int) -> tuple[EstimatedVolume, Tensor]:
    """Mean over the probes with its standard error, and the singular values (K, B, m)."""
    num_probes, _, num_steps = bidiagonal.diagonal.shape
    integral, singular_values = gauss_rule(bidiagonal, num_steps)
    values = dimension * integral
    mean = values.mean(0)
    variance = mean - mean  # zero, but NaN where the mean is
    if num_probes < dimension:
        variance = values.var(0) * (1 - num_probes / dimension) / num_probes
    if not bool(bidiagonal.complete.all()):
        half, quarter = (
            dimension * gauss_rule(bidiagonal, num_steps // part)[0] for part in (2, 4)
        )
        last = torch.where(bidiagonal.complete, 0.0, half - values).mean(0).clamp(min=0)
        before = torch.where(bidiagonal.complete, 0.0, quarter - half).mean(0).clamp(min=0)
        rest = _remainder(last, before, max(1.0, log2(dimension / num_steps)))
        mean = mean - rest / 2
        variance = variance + (rest / 2).square()
    # Nothing is known about the error of an infinite log-volume.
    error = torch.where(mean.isneginf(), torch.inf, variance.sqrt())
    return EstimatedVolume(mean, error), singular_values


def _remainder(last: Tensor, before: Tensor, doublings: float) -> Tensor:
    """The error (B,) that remains after two doublings of the steps with these differences."""
    shrinking = last < before
    series = last.square() / torch.where(shrinking, before - last, 1.0)
    bounded = last * doublings
    return torch.where(shrinking, torch.minimum(series, bounded), bounded)
