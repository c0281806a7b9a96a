r"""Forward products of sums, differences, products and quotients with a constant.

For :math:`y = c\,x` torch's forward mode computes :math:`c\,\dot x + \dot c\,x` with a tangent
:math:`\dot c = 0`, whose shape it works out in Python: that costs a hundred times the product of a
small tensor. The rules below leave the constant's part out,

.. math:: \dot{(c \pm x)} = \pm\dot x, \qquad \dot{(c\,x)} = c\,\dot x, \qquad
          \dot{(x / c)} = \dot x / c, \qquad \dot{(c / x)} = -\frac{c / x}{x}\,\dot x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .transforms import Function

# Signs of the two arguments.
_SUMS: dict[Function, tuple[int, int]] = {
    torch.add: (1, 1),
    Tensor.add: (1, 1),
    torch.sub: (1, -1),
    torch.subtract: (1, -1),
    Tensor.sub: (1, -1),
    Tensor.subtract: (1, -1),
    torch.rsub: (-1, 1),
    Tensor.__rsub__: (-1, 1),
}
_PRODUCTS: frozenset[Function] = frozenset(
    {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply}
)
# Position of the divisor.
_QUOTIENTS: dict[Function, int] = {
    torch.div: 1,
    torch.divide: 1,
    torch.true_divide: 1,
    Tensor.div: 1,
    Tensor.divide: 1,
    Tensor.true_divide: 1,
    Tensor.__rdiv__: 0,
}

# Functions of two arguments that ``jvp_with_constant`` covers, called without options.
ARITHMETIC: frozenset[Function] = frozenset({*_SUMS, *_PRODUCTS, *_QUOTIENTS})


def jvp_with_constant(
    func: Function, points: list[Any], value: Tensor, position: int, tangent: Tensor
) -> Tensor:
    """Tangent of ``value = func(*points)`` where the argument at a position alone has one."""
    if func in _SUMS:
        moved = tangent.to(value.dtype).expand(value.shape)
        return moved if _SUMS[func][position] > 0 else -moved
    if _QUOTIENTS.get(func) == position:
        return -(value / points[position]) * tangent
    product: Tensor = func(*(tangent if i == position else x for i, x in enumerate(points)))
    return product
