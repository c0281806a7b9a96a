"""A report on injectivity, consistency and surrogate gradients of a trained model."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import checks_arguments
from ..errors import OptionError
from ..flows.stack import joint_decode, joint_encode
from ..host.calls import summed_inverse
from ..models.injective import InjectiveNormalizingFlow
from ..models.parts import stack_of
from ..training.tables import Table, takes_tables
from ..volume.reconstruction import squared_error
from .components import linear_reconstruction
from .encoder_alignment import jacobians_of_pair
from .figures import new_figure, quantile_lines
from .gradient_agreement import encoder_agreement
from .verdict import LOST, Evidence, Finding, judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class InjectivityReport:
    r"""Result of :func:`injectivity_report`; ``print`` it, or ``plot()`` it.

    Attributes:
        singular_values: Singular values of the decoder Jacobian :math:`g'(z)`, descending, shape
            :math:`(B, d)`.
        condition_number: Ratio of the largest to the smallest singular value, shape :math:`(B,)`.
            Infinite where the decoder is not an immersion.
        left_inverse_error: :math:`\lVert f'(\hat x) g'(z) - I \rVert_F / \sqrt d`, shape
            :math:`(B,)`; 0 where encoder and decoder are locally inverse.
        pseudo_inverse_error: :math:`\lVert g'(z) - f'(\hat x)^\dagger \rVert_F /
            \lVert g'(z) \rVert_F`, shape :math:`(B,)`; 0 where the surrogate is unbiased.
        reconstruction_error: :math:`\lVert x - \hat x \rVert^2`, shape :math:`(B,)`.
        latent_mean: Mean of the base variables, shape :math:`(d,)`.
        latent_covariance: Covariance of the base variables, shape :math:`(d, d)`.
        latent_kurtosis: Excess kurtosis of the base variables, shape :math:`(d,)`; 0 for a normal.
        gradient_cosine: Cosine between the gradient of the encoder surrogate with all :math:`d`
            probes and the gradient of the exact :math:`-\tfrac12 \log\det f' f'^\top`, over the
            trainable parameters of the encoding map, on a few samples; NaN without trainable
            parameters.
        gradient_ratio: Ratio of the norms of these two gradients.
        pca_error: Squared error of :math:`d` principal components of the same data, shape
            :math:`(B,)`. They are fitted to these very rows, so with few rows the error is
            somewhat too low; it is zero for :math:`B \le d + 1`.
        data_variances: Variances along all principal components of the data, descending.
        round_trip: Singular values of :math:`f'(\hat x) g'(z)`, descending, shape
            :math:`(B, d)`; 1 where a latent direction survives the round trip, 0 where it is lost.
        num_columns: Data dimension :math:`D`.
        verdict: What the numbers say, each :class:`Finding` with its name, evidence and remedy.

    Examples:
        See :func:`injectivity_report`.
    """

    singular_values: Tensor
    condition_number: Tensor
    left_inverse_error: Tensor
    pseudo_inverse_error: Tensor
    reconstruction_error: Tensor
    latent_mean: Tensor
    latent_covariance: Tensor
    latent_kurtosis: Tensor
    gradient_cosine: float
    gradient_ratio: float
    pca_error: Tensor
    data_variances: Tensor
    round_trip: Tensor
    num_columns: int

    @property
    def evidence(self) -> Evidence:
        """The numbers that the verdict looks at."""
        samples, latent_dim = self.singular_values.shape
        lost = (self.round_trip < LOST).sum(1)
        return Evidence(
            num_rows=samples,
            latent_dim=latent_dim,
            data_dim=self.num_columns,
            error=float(self.reconstruction_error.double().mean()),
            variances=tuple(self.data_variances.tolist()),
            lost=int(lost.median()),
            overshoot=float(self.round_trip[:, 0].median()),
            left_inverse_error=float(self.left_inverse_error.median()),
            condition=float(self.condition_number.median()),
            smallest=float(self.singular_values[:, -1].median()),
            cosine=self.gradient_cosine,
        )

    @property
    def verdict(self) -> tuple[Finding, ...]:
        """All findings that hold by the numbers, or one named ``"fine"``."""
        return judge(self.evidence)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """The report as a table of quantiles over the samples."""
        samples, latent_dim = self.singular_values.shape
        scale = self.latent_covariance.diagonal().sqrt()
        rows = [
            ("largest singular value of g'", self.singular_values[:, 0]),
            ("smallest singular value of g'", self.singular_values[:, -1]),
            ("condition number of g'", self.condition_number),
            ("|f'g' - I| / sqrt(d)", self.left_inverse_error),
            ("|g' - pinv(f')| / |g'|", self.pseudo_inverse_error),
            ("reconstruction error", self.reconstruction_error),
            (f"  of {latent_dim} principal components", self.pca_error),
            ("latent mean, by coordinate", self.latent_mean),
            ("latent scale, by coordinate", scale),
            ("latent excess kurtosis", self.latent_kurtosis),
        ]
        lines = [
            f"Injectivity of {samples} samples, latent dimension {latent_dim}",
            *quantile_lines(rows, width=32, digits=3),
        ]
        lines.append(
            f"surrogate against exact gradient: cosine {self.gradient_cosine:.4f}, "
            f"norm ratio {self.gradient_ratio:.3f}"
        )
        for finding in self.verdict:
            text = f"VERDICT: {finding.name}. {finding.evidence} {finding.remedy}"
            lines += textwrap.wrap(text, 79, subsequent_indent="  ")
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Draw the report: spectra, consistency, reconstruction, latent moments.

        Returns:
            A matplotlib figure, not shown and not saved.

        Raises:
            OptionError: If matplotlib is not installed.
        """
        figure = new_figure(10, 6.5)
        axes = figure.subplots(2, 2)
        _plot_spectrum(axes[0, 0], self.singular_values.detach().cpu())
        errors = {
            r"$|f'g' - I|/\sqrt{d}$": self.left_inverse_error,
            r"$|g' - f'^\dagger|/|g'|$": self.pseudo_inverse_error,
        }
        for label, values in errors.items():
            axes[0, 1].hist(
                values.detach().cpu().clamp(min=1e-12).log10().numpy(), 30, alpha=0.6, label=label
            )
        axes[0, 1].set(xlabel="log10 of the error", ylabel="samples", title="Consistency")
        axes[0, 1].legend()
        axes[1, 0].hist(self.reconstruction_error.detach().cpu().numpy(), 30)
        axes[1, 0].set(xlabel=r"$|x - \hat x|^2$", ylabel="samples", title="Reconstruction error")
        image = axes[1, 1].imshow(
            self.latent_covariance.detach().cpu().numpy(), cmap="RdBu_r", vmin=-1.5, vmax=1.5
        )
        axes[1, 1].set(title="Covariance of the base variables")
        figure.colorbar(image, ax=axes[1, 1])
        return figure


@takes_tables
@checks_arguments
def injectivity_report(
    model: InjectiveNormalizingFlow,
    x: Table,
    context: Table | None = None,
    num_gradient_samples: int = 8,
) -> InjectivityReport:
    r"""Measure how injective and how consistent a model is at given data.

    The model is evaluated in its current mode, so call ``model.eval()`` before. Parameters and
    their ``grad`` are left alone. Where ``Standardise`` stands last, all is measured in
    standardised coordinates, in which the model is trained.

    Args:
        model: Model of latent dimension :math:`d` and data dimension :math:`D`.
        x: Data of shape :math:`(B, *)`, a tensor, an array or a data frame; a few hundred samples
            are enough.
        context: Optional context, one row per sample.
        num_gradient_samples: Number of samples in the comparison of gradients, which needs
            :math:`d` differentiable reverse-mode products.

    Returns:
        :class:`InjectivityReport`.

    Raises:
        OptionError: If there are fewer than two samples, which have no covariance.

    References:
        Conditions for an unbiased surrogate: arXiv 2306.01843. That a left inverse is not enough
        and :math:`g' = f'^\dagger` is enough follows from :math:`\nabla \tfrac12 \log\det f'
        f'^\top = \operatorname{tr}((\nabla f') f'^\dagger)`.

    Examples:
        >>> import normflows as nf
        >>> from normflows_injective.flows import LinearInjection
        >>> _ = torch.manual_seed(0)
        >>> q0 = nf.distributions.DiagGaussian(2, trainable=False)
        >>> model = InjectiveNormalizingFlow(q0, [LinearInjection(2, 5)])
        >>> report = injectivity_report(model, torch.randn(20, 5))
        >>> bool((report.pseudo_inverse_error < 1e-4).all()), round(report.gradient_cosine, 3)
        (True, 1.0)
    """
    if len(x) < 2:
        raise OptionError("injectivity_report needs at least two samples for the latent moments.")
    with torch.inference_mode(False):
        # Autograd refuses tensors of inference mode; a clone outside of it is an ordinary one.
        context = None if context is None else context.clone()
        return _measure(model, x.clone(), context, num_gradient_samples)


def _measure(
    model: InjectiveNormalizingFlow, x: Tensor, context: Tensor | None, num_gradient_samples: int
) -> InjectivityReport:
    # In the coordinates of training, where there are units: others would rule the singular values.
    stack = stack_of(model)
    composite = stack.inner.composite
    encode = partial(joint_encode, composite, context=context)
    decode = partial(joint_decode, composite, context=context)
    with torch.no_grad():
        z = model.encode(x, context)
        x = stack.standardise(x)
        base = summed_inverse(model.latent_block, z, context)[0].flatten(1)
    pair = jacobians_of_pair(encode, decode, z, x.shape)
    singular_values = torch.linalg.svdvals(pair.decoder)
    centred = base - base.mean(0)
    variance = centred.square().mean(0)
    few = slice(num_gradient_samples)
    some = None if context is None else context[few]
    bias, norm_ratio = encoder_agreement(composite, x[few], some)
    linear = linear_reconstruction(x, singular_values.shape[1])
    return InjectivityReport(
        singular_values=singular_values,
        condition_number=singular_values[:, 0] / singular_values[:, -1],
        left_inverse_error=pair.left_inverse_error(),
        pseudo_inverse_error=pair.pseudo_inverse_error(),
        reconstruction_error=squared_error(x, pair.projection),
        latent_mean=base.mean(0),
        latent_covariance=centred.mT @ centred / len(base),
        latent_kurtosis=centred.pow(4).mean(0) / variance.square() - 3,
        gradient_cosine=bias.cosine,
        gradient_ratio=norm_ratio,
        pca_error=linear.errors,
        data_variances=linear.variances,
        round_trip=torch.linalg.svdvals(pair.encoder @ pair.decoder),
        num_columns=x[0].numel(),
    )


def _plot_spectrum(axis: Any, singular_values: Tensor) -> None:
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=singular_values.dtype)
    low, median, high = torch.quantile(singular_values, levels, dim=0).numpy()
    index = range(1, len(median) + 1)
    axis.fill_between(index, low, high, alpha=0.3, label="5 % to 95 %")
    axis.plot(index, median, "o-", label="median")
    axis.set(yscale="log", xlabel="index", ylabel="singular value", title="Decoder Jacobian")
    axis.legend()
