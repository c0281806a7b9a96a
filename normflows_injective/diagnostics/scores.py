"""How far to trust a model at each row: density, distance, digits, and a calibrated p-value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_probability, checks_arguments
from ..errors import ContextError
from ..host.copies import in_evaluation
from ..models.injective import InjectiveNormalizingFlow
from ..modules.precision import as_factored
from ..training.tables import Table, takes_tables
from .calibrated import rank_p_value, tube_score, tube_variance
from .figures import new_figure, quantile_lines
from .row_measures import has_own_measure, log_prob_error, measure, reconstruction_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PER_ROW = (
    "log_prob",
    "log_prob_error",
    "reconstruction_error",
    "tube_score",
    "local_dim",
    "condition_number",
    "p_value",
)


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    r"""Result of :func:`score`, one number of each kind for every row.

    ``print`` it, ``plot()`` it, or make a data frame, ``pandas.DataFrame(scores.to_dict())``.

    Attributes:
        log_prob: Exact log-density of the projection against the manifold's measure, in nats and
            in the units of the data, ``model.log_prob(x)`` in evaluation mode, shape :math:`(B,)`.
        log_prob_error: Rounding error of it, :math:`\lvert \ell - \ell' \rvert \min(1, \epsilon /
            \epsilon')` for the same weights in the other one of float32 and float64, shape
            :math:`(B,)`. It says nothing of an error of the *model*. NaN where a layer computes
            in one precision alone.
        reconstruction_error: :math:`\lVert x - \hat x \rVert^2` in standardised coordinates,
            shape :math:`(B,)`.
        tube_score: Log-density of a Gaussian tube around the manifold in standardised
            coordinates, in nats, shape :math:`(B,)`. NaN without a reference, where the reference
            lies on the manifold to rounding, and where a chart gives densities against another
            measure than the manifold's own.
        local_dim: Number of singular values of the decoder Jacobian above ``threshold`` times
            the largest one, shape :math:`(B,)`, whole numbers.
        condition_number: Largest singular value over the smallest, shape :math:`(B,)`.
        p_value: Share of the reference that is as far from the manifold, shape :math:`(B,)`, in
            float64 where the device has it, so that multiples of :math:`1 / (1 + n)` compare
            with levels as they should; NaN without a reference.
        tube_variance: Variance :math:`\sigma^2` of the tube, NaN where its score is.
        num_reference: Number of reference rows.

    Examples:
        See :func:`score`.
    """

    log_prob: Tensor
    log_prob_error: Tensor
    reconstruction_error: Tensor
    tube_score: Tensor
    local_dim: Tensor
    condition_number: Tensor
    p_value: Tensor
    tube_variance: float
    num_reference: int

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """The scores as a table of quantiles over the rows."""
        lines = [
            f"Scores of {len(self.log_prob)} rows, {self.num_reference} reference rows",
            *quantile_lines([(n, getattr(self, n)) for n in _PER_ROW], width=24, digits=4),
        ]
        if 0 < self.num_reference < 19:
            lines.append(
                f"{self.num_reference} reference rows give no p-value below "
                f"{1 / (1 + self.num_reference):.2g}: too few to find rows at 0.05."
            )
        elif self.num_reference:
            few = int((self.p_value <= 0.05).sum())
            lines.append(
                f"{few} rows have a p-value of at most 0.05; of rows like the reference "
                f"{0.05 * len(self.p_value):.0f} would."
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The numbers of all rows as arrays of numpy by their names, for a data frame."""
        return {name: getattr(self, name).detach().cpu().numpy() for name in _PER_ROW}

    def plot(self) -> Figure:
        """Draw the scores: density against distance, and three histograms.

        Returns:
            A matplotlib figure, not shown and not saved.

        Raises:
            OptionError: If matplotlib is not installed.
        """
        figure = new_figure(10, 6.5)
        axes = figure.subplots(2, 2)
        arrays = self.to_dict()
        has_p_values = self.num_reference > 0
        points = axes[0, 0].scatter(
            arrays["reconstruction_error"].clip(min=1e-30),
            arrays["log_prob"],
            c=arrays["p_value"] if has_p_values else None,
            s=6,
        )
        axes[0, 0].set(xscale="log", xlabel="reconstruction error", ylabel="log-density, nats")
        if has_p_values:
            figure.colorbar(points, ax=axes[0, 0], label="p-value")
            axes[0, 1].hist(arrays["p_value"], 20, range=(0.0, 1.0))
        axes[0, 1].set(xlabel="p-value", ylabel="rows")
        positive = {
            "condition_number": "log10 of the condition number",
            "log_prob_error": "log10 of the rounding error of the log-density",
        }
        for axis, (name, label) in zip(axes[1], positive.items(), strict=True):
            # A condition may be infinite, a rounding error zero or unknown.
            logarithms = [math.log10(v) for v in arrays[name] if 0 < v < math.inf]
            axis.hist(logarithms, 30)
            axis.set(xlabel=label, ylabel="rows")
        return figure


@takes_tables
@checks_arguments
def score(
    model: InjectiveNormalizingFlow,
    x: Table,
    reference: Table | None = None,
    context: Table | None = None,
    reference_context: Table | None = None,
    *,
    threshold: float = 0.01,
) -> Scores:
    r"""Say how far to trust a model at each row.

    A log-density on a manifold is that of the projection: it is blind to the distance, which is
    why it comes with the reconstruction error, with the density of a tube that sees both, and
    with a p-value of the distance among reference rows,

    .. math:: p(x) = \frac{1 + \#\{i : e_i \ge e(x)\}}{1 + n}, \qquad
              e(x) = \lVert x - \hat x \rVert^2.

    If x and the :math:`n` reference rows are exchangeable, given the model, then :math:`P(p \le
    \alpha) \le \alpha`, with equality at the multiples of :math:`1 / (1 + n)` if no two errors
    are equal. So **the reference must be rows that were not trained on**, of the kind that x is
    compared with: on training rows errors are smaller, and every new row would look odd. This
    holds for one row at a time: among many rows expect the share :math:`\alpha` below
    :math:`\alpha`, and their p-values hang together by the common reference.

    Which number finds which outliers is measured in ``docs/results/outliers.md``.

    The condition number and the local dimension belong to the decoder Jacobian in standardised
    coordinates, as in ``injectivity_report``, and to the scales of its latents, which ``fit``
    brings to one. The local dimension counts the directions in which the decoder moves x by more
    than ``threshold`` times the steepest; it is no estimate of the dimension of the data.

    On a known surface all of this holds. Its rows lie on it but for rounding, so that the tube has
    no score, and a p-value compares rounding errors. A model without an encoder network, of a
    linear injection for instance, is no exception.

    The model is looked at in evaluation mode, and is left as it is. It costs two Jacobians for
    each row, one of them in the other precision, and a third one where ``Standardise`` stands
    last, in chunks of bounded memory. On a CPU the one in float64 is the dearest, four times the
    other one for convolutions.

    Args:
        model: Model of latent dimension :math:`d` and data dimension :math:`D`.
        x: Data of shape :math:`(B, *)`: a tensor, an array or a data frame, as all that follow.
        reference: Rows :math:`(n, *)` that were neither trained on nor chosen by.
        context: Optional context of x, one row per sample.
        reference_context: Optional context of the reference, likewise.
        threshold: Part of the largest singular value, between 0 and 1, above which one counts.

    Returns:
        :class:`Scores`, in the dtype of the model but for whole numbers and p-values.

    Warns:
        NumericalWarning: If a Jacobian is rank deficient to machine precision.

    Raises:
        ContextError: If a reference has no context and x has one, or the other way round.
        OptionError: If the model is none of this package, or ``threshold`` is out of range.
        OffManifoldError: If a known surface rejects rows that are off it.

    References:
        The tube is derived in ``diagnostics/calibrated.py``. The p-value is that of conformal
        prediction: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005.

    Examples:
        >>> import normflows as nf
        >>> import normflows_injective as nfi
        >>> pair = nfi.nets.mlp_autoencoder(data_dim=5, latent_dim=2, hidden=(16,))
        >>> q0 = nf.distributions.DiagGaussian(2, trainable=False)
        >>> model = nfi.InjectiveNormalizingFlow(q0, [nfi.flows.FreeFormInjection(*pair)])
        >>> data = torch.randn(99, 5, generator=torch.Generator().manual_seed(0))
        >>> scores = score(model, 10 * data[:3], reference=data)
        >>> scores.p_value
        tensor([0.0100, 0.0100, 0.0100], dtype=torch.float64)
    """
    check_probability(threshold, "threshold")
    _check_contexts(reference, context, reference_context)
    model = in_evaluation(model)
    model._check(x, "x", "data", context)
    if reference is not None:
        model._check(reference, "reference", "data", reference_context)
    with torch.no_grad():
        found = measure(model, x, context)
        errors, codimension = found.reconstruction_error, found.codimension
        variance, count = math.nan, 0
        p_value = as_factored(torch.full_like(errors, torch.nan))
        if reference is not None:
            rows, expected = reconstruction_errors(model, reference, reference_context)
            if has_own_measure(model):
                variance = tube_variance(expected, rows, codimension)
            p_value, count = rank_p_value(errors, expected), len(expected)
        spectrum = found.singular_values
        return Scores(
            log_prob=found.log_prob,
            log_prob_error=log_prob_error(model, x, context, found.log_prob),
            reconstruction_error=errors,
            tube_score=tube_score(found.inner_log_prob, errors, variance, codimension),
            local_dim=(spectrum > threshold * spectrum[:, :1]).sum(1),
            condition_number=(spectrum[:, 0] / spectrum[:, -1]).to(x.dtype),
            p_value=p_value,
            tube_variance=variance,
            num_reference=count,
        )


def _check_contexts(
    reference: Tensor | None, context: Tensor | None, reference_context: Tensor | None
) -> None:
    if reference is None and reference_context is not None:
        raise ContextError("reference_context came without a reference. Pass reference=, too.")
    if reference is not None and (context is None) != (reference_context is None):
        raise ContextError(
            "x and the reference must both have a context, or neither, but only "
            f"{'the reference' if context is None else 'x'} has one. Pass both context= and "
            "reference_context=, one row per sample."
        )
