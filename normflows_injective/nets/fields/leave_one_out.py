"""A network whose output for a variable does not see that variable, by masks in two directions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from .conditions import FieldNetwork


@final
class LeaveOneOutField(FieldNetwork):
    r"""Two masked perceptrons, over the variables before and over those after each variable.

    .. math:: G_i = g_i\big(h^{\rightarrow}(x_{<i}, t),\ h^{\leftarrow}(x_{>i}, t)\big)

    The output of a variable sees all others and not the variable itself, as the exact output of a
    classifier does. So the divergence of a classifier's field is a closed form, and exact
    likelihoods cost as much as samples. The masked matrices grow with :math:`n^2`, so the network
    is for up to a few hundred variables.

    Args:
        num_variables: Number of variables n.
        num_classes: Largest number of classes c of a variable.
        widths: Hidden units of each variable in the layers of either direction.
        head: Hidden units of each variable where the directions meet.
        context_dim: Number of context features C; 0 for none.
        missing: Whether there is one more feature, which is one where a variable is missing.

    Raises:
        OptionError: If a width is not positive.
        ShapeError: If the features have another shape.
        ContextError: If a context is missing, superfluous or too wide.

    References:
        Networks whose Jacobian has no diagonal: Chen and Duvenaud, arXiv 1912.03579; masks:
        Germain et al., arXiv 1502.03509.

    Examples:
        >>> net = LeaveOneOutField(3, 2)
        >>> other = torch.randn(1, 3, 2)
        >>> other[:, 1] = 0
        >>> t = torch.ones(1)
        >>> difference = net(other, t) - net(other + torch.eye(3)[1].view(1, 3, 1), t)
        >>> difference[0, 1]
        tensor([0., 0.], grad_fn=<SelectBackward0>)
    """

    leave_one_out = True

    def __init__(
        self,
        num_variables: int,
        num_classes: int,
        widths: Sequence[int] = (16, 16),
        head: int = 16,
        context_dim: int = 0,
        missing: bool = False,
    ) -> None:
        super().__init__(num_variables, num_classes, context_dim, missing)
        self.widths, self.head = tuple(widths), head
        sizes = [self.num_features, *widths]
        self.forwards = self._direction(sizes, head)
        self.backwards = self._direction(sizes, head)
        bound = head**-0.5
        weight = torch.empty(num_variables, head, num_classes).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(num_variables, num_classes))

    def forward(self, features: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Features (B, n, c) at times (B,), with an optional context (B, C), to (B, n, c)."""
        conditions = self.conditions(features, t, context)
        before = _run(self.forwards, features, conditions)
        after = _run(self.backwards, features.flip(1), conditions).flip(1)
        hidden = silu(before + after)
        return torch.einsum("bnh,nhc->bnc", hidden, self.weight) + self.bias

    def _direction(self, sizes: list[int], head: int) -> nn.ModuleList:
        num, conditions = self.num_variables, self.num_conditions
        # Hidden units may see their own variable; only the last layer must not.
        layers = [
            _MaskedLinear(num, fan_in, fan_out, conditions, strict=False)
            for fan_in, fan_out in pairwise(sizes)
        ]
        last = _MaskedLinear(num, sizes[-1], head, conditions, strict=True)
        return nn.ModuleList([*layers, last])


class _MaskedLinear(nn.Module):
    """A linear layer to the units of each variable from those before it and from conditions."""

    mask: Tensor

    def __init__(
        self, num: int, fan_in: int, fan_out: int, num_conditions: int, strict: bool
    ) -> None:
        super().__init__()
        seen = torch.ones(num, num).tril(-1 if strict else 0)
        self.linear = nn.Linear(num * fan_in, num * fan_out)
        self.conditions = nn.Linear(num_conditions, num * fan_out, bias=False)
        self.register_buffer("mask", seen.bool(), persistent=False)
        self.sizes = (num, fan_out, num, fan_in)
        # Rows see only a share of their inputs, so their weights are larger by its square root.
        with torch.no_grad():
            share = seen.mean(1).clamp_min(1 / num).repeat_interleave(fan_out).unsqueeze(1)
            self.linear.weight.div_(share.sqrt())

    def forward(self, h: Tensor, conditions: Tensor) -> Tensor:
        mask = self.mask[:, None, :, None].to(h.dtype)
        weight = (self.linear.weight.view(self.sizes) * mask).view(self.linear.weight.shape)
        out = linear(h.flatten(1), weight, self.linear.bias) + self.conditions(conditions)
        return out.unflatten(1, self.sizes[:2])


def _run(layers: nn.ModuleList, features: Tensor, conditions: Tensor) -> Tensor:
    h = layers[0](features, conditions)
    for layer in list(layers)[1:]:
        h = layer(silu(h), conditions)
    return h
