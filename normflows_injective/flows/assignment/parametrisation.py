"""The meaning of a network's output: the velocity itself, or the classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

from torch import Tensor

from ...checks import checks_arguments_of
from .paths import AssignmentPath
from .simplices import check_shapes


class Parametrisation(ABC):
    """The field that belongs to the output (B, n, c) of a network, and its training loss."""

    def __init_subclass__(cls) -> None:
        """Attach the check of arguments to the methods of a subclass."""
        super().__init_subclass__()
        checks_arguments_of(cls)

    @abstractmethod
    def field(self, output: Tensor, v: Tensor, t: Tensor, path: AssignmentPath) -> Tensor:
        """Return the field (B, n, c) at logits (B, n, c) and times (B,), of row sums zero."""

    @abstractmethod
    def loss(
        self,
        output: Tensor,
        v: Tensor,
        t: Tensor,
        labels: Tensor,
        start: Tensor,
        path: AssignmentPath,
    ) -> Tensor:
        """Return losses (B, n) of the variables at logits on the way from a start to labels."""


@final
class Velocity(Parametrisation):
    r"""The network gives the field, up to constants, fitted in the metric of Fisher and Rao.

    .. math:: \mathcal L = \sum_i \langle \delta_i, R_{W_i} \delta_i \rangle
              = \sum_i \mathrm{Var}_{W_i}(\delta_i), \qquad \delta = F_\theta - \dot V_t

    The weights :math:`W_t` of the variance vanish near corners.

    References:
        Boll et al., arXiv 2406.04527, section 4.

    Examples:
        >>> import torch
        >>> from normflows_injective.flows.assignment import InfiniteHorizon, Simplices
        >>> path = AssignmentPath(Simplices(2, 3), InfiniteHorizon())
        >>> v = torch.zeros(1, 2, 3)
        >>> Velocity().field(v + 1.0, v, torch.ones(1), path).abs().max()
        tensor(0.)
    """

    def field(self, output: Tensor, v: Tensor, t: Tensor, path: AssignmentPath) -> Tensor:
        """Return the output without its row means."""
        check_shapes(path.simplices, v=v, output=output, t=t)
        return path.simplices.mean_free(output)

    def loss(
        self,
        output: Tensor,
        v: Tensor,
        t: Tensor,
        labels: Tensor,
        start: Tensor,
        path: AssignmentPath,
    ) -> Tensor:
        """Return variances (B, n) of the error of the velocity, under the weights."""
        check_shapes(path.simplices, v=v, output=output, labels=labels, start=start, t=t)
        weights = path.simplices.weights(v)
        # Without its mean first: a variance loses digits under a large constant.
        error = path.simplices.mean_free(output) - path.velocity(labels, start)
        mean = (weights * error).sum(-1, keepdim=True)
        return (weights * (error - mean).square()).sum(-1)


@final
class Classifier(Parametrisation):
    r"""The network gives the classes: its output is added to each variable's own evidence.

    .. math:: P(\beta_i = k \mid V_t) = \mathrm{softmax}_k\Big(\frac{t \rho_i}{s^2}
              \langle V_{t,i}, u_k \rangle + G_{ik}\Big), \qquad
              \mathcal L = -\sum_i \log P(\beta_i \mid V_t)

    By Bayes' rule the right :math:`G_{ik} = \log P(\beta_i = k \mid V_{t,j}, j \ne i)` depends on
    the other variables alone. The field is exactly the marginal one if the posteriors are exact,
    so a loss without geometry loses nothing.

    References:
        Derived in ``paths.py``.

    Examples:
        >>> import torch
        >>> from normflows_injective.flows.assignment import InfiniteHorizon, Simplices
        >>> path = AssignmentPath(Simplices(2, 3), InfiniteHorizon())
        >>> v, labels = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long)
        >>> loss = Classifier().loss(v, v, torch.ones(1), labels, v, path)
        >>> loss.exp().round()  # three classes alike
        tensor([[3., 3.]])
    """

    def field(self, output: Tensor, v: Tensor, t: Tensor, path: AssignmentPath) -> Tensor:
        """Return the marginal field of the posteriors."""
        check_shapes(path.simplices, v=v, output=output, t=t)
        posterior = path.simplices.weights(path.evidence(v, t) + output)
        return path.marginal_field(posterior, v, t)

    def loss(
        self,
        output: Tensor,
        v: Tensor,
        t: Tensor,
        labels: Tensor,
        start: Tensor,
        path: AssignmentPath,
    ) -> Tensor:
        """Return negative log-posteriors (B, n) of the classes, in nats."""
        check_shapes(path.simplices, v=v, output=output, labels=labels, start=start, t=t)
        log_posterior = path.simplices.log_weights(path.evidence(v, t) + output)
        return -log_posterior.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


PARAMETRISATIONS: dict[str, type[Velocity] | type[Classifier]] = {
    "velocity": Velocity,
    "classifier": Classifier,
}
