"""The assignment flow: a generative model of discrete variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, final

import torch
from torch import Tensor, nn

from ..checkpoints import load_checkpoint, save_checkpoint
from ..checks import check_choice, check_finite, check_loss, checks_arguments_of, lookup
from ..errors import UnsupportedModelError
from ..flows.assignment.field import AssignmentField
from ..flows.assignment.horizon import horizon_of
from ..flows.assignment.layer import AssignmentLayer
from ..flows.assignment.parametrisation import PARAMETRISATIONS
from ..flows.assignment.paths import AssignmentPath, Horizon
from ..flows.assignment.readings import reading_of
from ..flows.assignment.simplices import Simplices
from ..flows.integration import SOLVERS, Rate, Times, integrate
from ..host.context import check_context
from ..host.copies import in_evaluation
from .assignment_likelihood import DIVERGED, DiscreteLogProb, importance_log_prob


@checks_arguments_of
@final
class AssignmentFlow(nn.Module):
    r"""Joint distribution of discrete variables, as a flow of logits that is trained by matching.

    Noise :math:`V_0` on the logits of :math:`n` simplices is carried along a learned field until
    every simplex is near a corner,

    .. math:: \dot V = \Pi F_\theta(V, t), \qquad W = \mathrm{softmax}\, V, \qquad
              p(\beta) = P(\arg\max W(T) = \beta)
              \quad \text{or} \quad \mathbb E \prod_i W_{i \beta_i}(T),

    the two *readings* ``"rounding"`` and ``"mixture"``. The variables are coupled by the field.

    Args:
        net: Network, called as ``net(features, t)`` or ``net(features, t, context=context)`` with
            features (B, n, c) and times (B,), that returns (B, n, c); see ``nfi.nets.fields``.
        num_variables: :math:`n`.
        num_classes: :math:`c_i \ge 2`, one number for all variables or one for each; then
            :math:`c = \max_i c_i`, and outputs after the classes of a variable are ignored.
        horizon: ``"infinite"`` (constant velocity, stopped at a time), ``"finite"`` (arrival at
            time one), or an ``InfiniteHorizon`` or ``FiniteHorizon`` with options.
        parametrisation: ``"classifier"``, the classes given the noise, trained by cross-entropy,
            or ``"velocity"``, the field itself, trained in the metric of Fisher and Rao.
        features: Input of the network, ``"posterior"``, ``"scaled_logits"`` or ``"weights"``: see
            :class:`~normflows_injective.flows.assignment.AssignmentField`.
        missing: Whether variables may be missing; the network then gets features (B, n, c + 1), of
            which the last is one where a variable is missing.

    Raises:
        OptionError: If an option is unknown or out of range.
        ShapeError: If the network returns another shape.

    References:
        Boll, Gonzalez-Alvarado, Petra, Schnörr, arXiv 2406.04527; finite horizon: 2402.07846.
        The classifier, its features and its evidence are derived in ``flows/assignment/paths.py``.

    Examples:
        >>> from normflows_injective.nets.fields import DenseField
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.randint(2, (256, 1)).expand(-1, 2)  # two variables, always equal
        >>> flow = AssignmentFlow(DenseField(2, 2, hidden=(32,)), num_variables=2, num_classes=2)
        >>> optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
        >>> for _ in range(200):
        ...     loss = flow.flow_matching_loss(labels)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> samples = flow.sample(100, steps=20)
        >>> bool((samples[:, 0] == samples[:, 1]).float().mean() > 0.9)
        True
    """

    def __init__(
        self,
        net: nn.Module,
        num_variables: int,
        num_classes: int | Sequence[int],
        horizon: str | Horizon = "infinite",
        parametrisation: str = "classifier",
        features: str = "posterior",
        missing: bool = False,
    ) -> None:
        super().__init__()
        target = lookup(parametrisation, PARAMETRISATIONS, "parametrisation")()
        path = AssignmentPath(Simplices(num_variables, num_classes), horizon_of(horizon))
        self.field = AssignmentField(net, path, target, features, missing)
        self.num_variables, self.num_classes = num_variables, self.simplices.class_counts
        self.parametrisation, self.features, self.missing = parametrisation, features, missing

    @property
    def net(self) -> nn.Module:
        """The network."""
        return self.field.net

    @property
    def horizon(self) -> Horizon:
        """The horizon of the path."""
        return self.field.path.horizon

    @property
    def path(self) -> AssignmentPath:
        """The path that the field is trained on."""
        return self.field.path

    @property
    def simplices(self) -> Simplices:
        """The simplices of the variables."""
        return self.field.path.simplices

    @property
    def dim(self) -> int:
        r"""Number of coordinates, :math:`\sum_i (c_i - 1)`."""
        return self.simplices.dim

    def flow_matching_loss(
        self, labels: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        r"""Training loss: the mean of :meth:`loss_terms` at random noise and times.

        With ``"classifier"`` it is a cross-entropy in nats, summed over variables. It is no
        likelihood: it falls to the mean uncertainty of a class given its noise, not to an entropy.

        Args:
            labels: Classes (B, n), integers that count from 0.
            context: One row per sample.
            mask: Booleans (B, n), true where observed; labels elsewhere are never read. Needs
                ``missing=True``.

        Returns:
            Loss, 0-dimensional.

        Raises:
            OptionError: If a label is out of range.
            DtypeError: If labels or mask are of the wrong kind.
            ShapeError: If they have the wrong shape.
            ContextError: If a context is missing, superfluous or of another length.
            NonFiniteError: If the loss is not finite.
        """
        losses = self.loss_terms(labels, context, mask)
        loss = losses.mean()
        check_loss(loss, {"flow matching": losses})
        return loss

    def forward_kld(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse the training loss of normflows' models, and name the loss of this one.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            "AssignmentFlow has no forward_kld, because its likelihood has no closed form. Train "
            "it with flow_matching_loss(labels), and judge it by log_prob(labels)."
        )

    def forward(
        self, labels: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the training loss, so that ``DistributedDataParallel`` may wrap the model."""
        return self.flow_matching_loss(labels, context, mask)

    def loss_terms(
        self, labels: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Losses (B,) of single labels (B, n), each at a random time and of random noise."""
        labels = self._check_labels(labels, context, mask)
        like = self.field.like
        t = self.path.horizon.draw_times(len(labels), like)
        return self.field.loss(labels, self.path.draw_start(len(labels), like), t, context, mask)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        steps: Times | None = None,
        solver: str = "rk4",
        reading: str = "rounding",
        context: Tensor | None = None,
        max_rows: int = 8192,
        progress: bool = False,
    ) -> Tensor:
        r"""Draw labels, by a copy of the network in evaluation mode that shares its parameters.

        Args:
            num_samples: Number of samples.
            steps: Number of equal steps, or their times from zero to the end of the horizon. The
                default follows the horizon; ``choose_horizon`` finds a number for an error.
            solver: ``"rk4"``, ``"midpoint"`` or ``"euler"``, with four, two and one evaluations of
                the network for each step.
            reading: ``"rounding"`` takes the largest weight, ``"mixture"`` draws from the weights.
            context: One row for each sample.
            max_rows: Largest number of samples that are drawn at a time.
            progress: Whether to show a progress bar over the steps of each part.

        Returns:
            Labels (num_samples, n), long integers.

        Raises:
            OptionError: If an option is unknown or out of range.
            ContextError: If a context is missing, superfluous or of another length.
            NonFiniteError: If the field has diverged.
        """
        check_context([self.field], context, num_samples)
        check_choice(solver, SOLVERS, "solver")
        times, law = self.path.times(steps), reading_of(reading)
        field = in_evaluation(self.field)
        starts = self.path.draw_start(num_samples, self.field.like).split(max_rows)
        contexts = [None] * len(starts) if context is None else list(context.split(max_rows))
        samples = []
        for start, rows in zip(starts, contexts, strict=True):
            v = integrate(_rate(field, rows), start, times, solver, progress)
            check_finite(v, "the logits at the end", DIVERGED)
            samples.append(law.draw(self.simplices, v))
        return torch.cat(samples)

    @torch.no_grad()
    def log_prob(
        self,
        labels: Tensor,
        num_importance_samples: int = 64,
        divergence: str = "exact",
        steps: Times | None = None,
        solver: str = "rk4",
        reading: str = "rounding",
        context: Tensor | None = None,
        mask: Tensor | None = None,
        num_probes: int = 2,
        max_rows: int = 2048,
        progress: bool = False,
    ) -> DiscreteLogProb:
        r"""Estimate log-probabilities of labels, with their errors, by importance sampling.

        The network is evaluated as in evaluation mode, by a copy that shares its parameters.

        The proposal is the law of the path given the labels, which is optimal for an exact field:
        see ``models/assignment_likelihood.py``. Every draw follows the flow back to the noise
        once, with its divergence: :math:`d` forward-mode products for each evaluation if
        ``"exact"``, none if the network leaves each variable out. If the effective sample size is
        a few draws, the estimate is a lower bound rather than a probability.

        Args:
            labels: Classes (B, n), integers that count from 0.
            num_importance_samples: Draws for each row of labels.
            divergence: ``"exact"``, or ``"hutchinson"`` by random probes, for many variables: its
                noise widens the weights, and with two probes or more its bias is subtracted.
            steps: Number of equal steps, or their times from zero to the end of the horizon; the
                default follows the horizon.
            solver: ``"rk4"``, ``"midpoint"`` or ``"euler"``.
            reading: ``"rounding"`` or ``"mixture"``, as in :meth:`sample`.
            context: One row per sample.
            mask: Booleans (B, n), true where observed: the probability is that of the observed
                variables. Needs ``missing=True``.
            num_probes: Number of probes for ``"hutchinson"``.
            max_rows: Largest number of paths that are followed at a time.
            progress: Whether to show a progress bar over the draws.

        Returns:
            :class:`~normflows_injective.DiscreteLogProb` ``(log_prob, standard_error,
            effective_sample_size)``, each of shape (B,), the first two in nats.

        Raises:
            OptionError: If an option is unknown or out of range.
            DtypeError: If labels or mask are of the wrong kind.
            ShapeError: If they have the wrong shape.
            ContextError: If a context is missing, superfluous or of another length.
            NonFiniteError: If the field has diverged.

        Warns:
            NumericalWarning: If the steps are so long that they err by more than .05 nats.
        """
        labels = self._check_labels(labels, context, mask)
        field, law, num = in_evaluation(self.field), reading_of(reading), num_importance_samples
        layer = AssignmentLayer(field, steps, solver, divergence, num_probes)
        return importance_log_prob(layer, law, labels, num, context, mask, max_rows, progress)

    def layer(
        self,
        steps: Times | None = None,
        solver: str = "rk4",
        divergence: str = "exact",
        num_probes: int = 2,
    ) -> AssignmentLayer:
        r"""Return the flow as a layer of normflows, on :math:`d = \sum_i (c_i - 1)` coordinates.

        The layer shares the network, so training one trains both. Base it on
        ``nf.distributions.DiagGaussian(flow.dim, trainable=False)``; ``SimplexLift`` after it
        leads to weights. The arguments are those of
        :class:`~normflows_injective.flows.assignment.AssignmentLayer`.
        """
        return AssignmentLayer(self.field, steps, solver, divergence, num_probes)

    save, load = save_checkpoint, load_checkpoint

    def _check_labels(self, labels: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        labels = self.simplices.check_labels(labels, mask)
        check_context([self.field], context, len(labels))
        return labels


def _rate(field: AssignmentField, context: Tensor | None) -> Rate:
    """Return the field as a function of logits (B, n, c) and one time."""
    return lambda v, t: field(v, v.new_full((len(v),), t), context)
