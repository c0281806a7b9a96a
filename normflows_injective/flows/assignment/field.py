"""The learned field of an assignment flow: a network, its features, and the field they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from ...checks import check_choice, checks_arguments_of
from ...errors import OptionError, ShapeError
from ...host.context import context_arguments, needs_context, takes_context
from ...host.copies import on_trial
from ...modules.random_numbers import OwnRandomNumbers
from .parametrisation import Classifier, Parametrisation
from .paths import AssignmentPath
from .simplices import check_shapes

Features = Callable[[AssignmentPath, Tensor, Tensor], Tensor]


def _posterior(path: AssignmentPath, v: Tensor, t: Tensor) -> Tensor:
    simplices = path.simplices
    corner = simplices.mean_corner(simplices.weights(path.evidence(v, t)))
    return corner * simplices.counts.to(v).sqrt()


FEATURES: dict[str, Features] = {
    "posterior": _posterior,
    "scaled_logits": lambda path, v, t: path.horizon.scaled(v, t.view(-1, 1, 1)),
    "weights": lambda path, v, t: path.simplices.weights(v),
}


@checks_arguments_of
@final
class AssignmentField(nn.Module):
    r"""A time-dependent field on logits, from a network that sees features of them.

    ================= ============================================================================
    features          input of the network, (B, n, c)
    ================= ============================================================================
    ``posterior``     :math:`\sqrt{c} \sum_k P_k u_k`, with the class probabilities :math:`P` of a
                      variable given its own evidence: zero at time zero, where logits are noise,
                      and a corner where they decide
    ``scaled_logits`` :math:`V / (1 + t)` for the infinite horizon, :math:`V` for the finite one
    ``weights``       :math:`W = \mathrm{softmax}\, V`
    ================= ============================================================================

    Args:
        net: Network, called as ``net(features, t)`` or ``net(features, t, context=context)``,
            with times (B,), that returns (B, n, c). Outputs beyond the classes of a variable are
            ignored. If a true attribute ``leave_one_out`` declares that the output of a variable
            does not depend on its own features, the divergence is a closed form.
        path: The path that the field is trained on.
        parametrisation: The meaning of the output, ``Classifier()`` or ``Velocity()``.
        features: ``"posterior"``, ``"scaled_logits"`` or ``"weights"``, as above.
        missing: Whether the network gets one more feature, (B, n, c + 1), which is one where a
            variable is missing and zero elsewhere. The other features of such a variable are zero.

    Raises:
        OptionError: If an option is unknown, or the network cannot be called this way.
        ShapeError: If the network returns another shape.

    References:
        Boll et al., arXiv 2406.04527; the features are derived in ``paths.py``.

    Examples:
        >>> from normflows_injective.flows.assignment import InfiniteHorizon, Simplices, Velocity
        >>> class Net(nn.Module):
        ...     def forward(self, features, t):
        ...         return -features
        >>> path = AssignmentPath(Simplices(2, 3), InfiniteHorizon())
        >>> field = AssignmentField(Net(), path, Velocity(), "scaled_logits")
        >>> field(torch.zeros(4, 2, 3), torch.ones(4)).shape
        torch.Size([4, 2, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        path: AssignmentPath,
        parametrisation: Parametrisation,
        features: str = "posterior",
        missing: bool = False,
    ) -> None:
        super().__init__()
        check_choice(features, FEATURES, "features")
        self.net, self.path, self.parametrisation = net, path, parametrisation
        self.features, self.missing = features, missing
        if not needs_context(net):
            self._try()

    @property
    def takes_context(self) -> bool:
        """Whether the network can use a context."""
        return takes_context(self.net)

    @property
    def needs_context(self) -> bool:
        """Whether the network cannot be called without a context."""
        return needs_context(self.net)

    @property
    def checkpoint_options(self) -> dict[str, str | float]:
        """Options on which weights depend, as files of version 0.1.0 record them."""
        return {
            "parametrisation": type(self.parametrisation).__name__,
            "features": self.features,
            "missing": self.missing,
            "class_counts": str(self.path.simplices.class_counts),
            **self.path.horizon.checkpoint_options,
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network."""
        return self.like.dtype

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the network."""
        for tensor in (*self.net.parameters(), *self.net.buffers()):
            if tensor.is_floating_point():
                return tensor
        return torch.zeros((), device=self.path.simplices.counts.device)

    def forward(
        self,
        v: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the field (B, n, c) at logits (B, n, c) and times (B,), zero where missing."""
        output = self.output(v, t, context, mask)
        field = self.parametrisation.field(output, v, t, self.path)
        return field if mask is None else field * mask.unsqueeze(-1)

    def loss(
        self,
        labels: Tensor,
        start: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return losses (B,) of paths from noise (B, n, c) to labels (B, n) at times (B,).

        Variables that are missing by the mask (B, n) do not count.
        """
        v = self.path.logits(labels, start, t)
        output = self.output(v, t, context, mask)
        losses = self.parametrisation.loss(output, v, t, labels, start, self.path)
        return losses.sum(1) if mask is None else (losses * mask).sum(1)

    def output(
        self,
        v: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the output (B, n, c) of the network at logits (B, n, c) and times (B,)."""
        masks = {} if mask is None else {"mask": mask}
        check_shapes(self.path.simplices, v=v, t=t, **masks)
        features = FEATURES[self.features](self.path, v, t)
        if self.missing:
            if mask is None:
                mask = torch.ones(v.shape[:2], dtype=torch.bool, device=v.device)
            observed = mask.unsqueeze(-1)
            features = torch.cat([features * observed, (~observed).to(v)], -1)
        elif mask is not None:
            raise OptionError(
                "A mask of missing variables came, but the network cannot tell a missing variable "
                "from noise. Build with missing=True, and the network for one more feature."
            )
        output: Tensor = self.net(features, t, **context_arguments(self.net, context))
        if not isinstance(output, Tensor) or output.shape != v.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(
                f"net must return one number for every class, shape {tuple(v.shape)} for features "
                f"of shape {tuple(features.shape)}, got {got}."
            )
        return output

    @property
    def knows_divergence(self) -> bool:
        """Whether the divergence is a closed form, see :meth:`divergence`."""
        leaves_out = bool(getattr(self.net, "leave_one_out", False))
        return leaves_out and isinstance(self.parametrisation, Classifier)

    def field_and_divergence(
        self,
        v: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Return field (B, n, c) and divergence (B,) of a leave-one-out classifier.

        If the output of a variable depends on the others alone, only the evidence depends on
        :math:`V_i`: :math:`\partial \bar u_i / \partial V_i` is :math:`t \rho_i / s^2` times the
        covariance of the corners under the posterior, of trace :math:`1 - \lVert \bar u_i
        \rVert^2`, so

        .. math:: \operatorname{div} F = \frac{1}{s} \sum_i \Big(\frac{t \rho_i^2}{s^2}
                  \big(1 - \lVert \bar u_i \rVert^2\big) - \sigma (c_i - 1)\Big).

        The divergence costs no more than the field. For the infinite horizon it is
        :math:`t (n \kappa^2 - \lVert F \rVert^2)`, also for the exact field.
        """
        path, simplices = self.path, self.path.simplices
        output = self.output(v, t, context, mask)
        posterior = simplices.weights(path.evidence(v, t) + output)
        field = path.marginal_field(posterior, v, t)
        spread = simplices.mean_corner(posterior).square().sum(-1)
        rate = (path.evidence_scale(v, t) * path.speeds(v)).squeeze(-1)
        contraction = path.horizon.contraction
        traces = rate * (1 - spread) - contraction * (simplices.counts[:, 0] - 1)
        if mask is not None:
            field, traces = field * mask.unsqueeze(-1), traces * mask
        return field, traces.sum(1) / (1 - contraction * t)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        name = type(self.parametrisation).__name__
        return f"parametrisation={name}, features={self.features!r}, missing={self.missing}"

    def _try(self) -> None:
        """Call the network once, so that construction refuses a shape that does not fit."""
        like, simplices = self.like, self.path.simplices
        shape = (2, simplices.num_variables, simplices.max_classes)
        v = torch.zeros(shape, dtype=like.dtype, device=like.device)
        times = v.new_full((2,), min(1.0, self.path.horizon.end) / 2)
        try:
            trial = on_trial([self])[0]
            with torch.no_grad(), OwnRandomNumbers():
                trial.output(v, times)
                if self.knows_divergence:
                    trial._check_leaving_out(v, times)
        except RuntimeError as error:
            raise ShapeError(
                f"net failed for features (B, {shape[1]}, {shape[2] + self.missing}) and times "
                f"(B,). It raised: {error}"
            ) from error
        except TypeError as error:
            raise OptionError(
                "net must be callable as net(features, t), or net(features, t, context=context), "
                f"with features (B, {shape[1]}, {shape[2]}) and times (B,). It raised: {error}"
            ) from error

    def _check_leaving_out(self, v: Tensor, t: Tensor) -> None:
        """Raise if the output of a variable depends on its own features, though it should not."""
        num = self.path.simplices.num_variables
        ramp = torch.linspace(-1, 1, v[0].numel(), dtype=v.dtype, device=v.device)
        here = self.path.simplices.mean_free(ramp.sin().view_as(v[:1]).expand_as(v))
        for variable in {0, num // 2, num - 1}:
            changed = here.clone()
            changed[:, variable] = -2 * here[:, variable] + ramp[: v.shape[-1]]
            first, second = (self.output(x, t)[:, variable] for x in (here, changed))
            if not torch.allclose(first, second, rtol=1e-3, atol=1e-5):
                raise OptionError(
                    f"{type(self.net).__name__} declares leave_one_out, but its output for "
                    f"variable {variable} changes with the features of that variable, so the "
                    "closed-form divergence would be wrong. Remove the attribute, or the "
                    "dependence."
                )
