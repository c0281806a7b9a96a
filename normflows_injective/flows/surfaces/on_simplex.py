"""Points that should lie on the simplex: refused or closed where they do not."""

from __future__ import annotations

from torch import Tensor

from ...checks import check_finite, is_readable
from ...errors import OffManifoldError

__all__ = ["closed_parts"]

TOLERANCE = 1e-4


def closed_parts(x: Tensor, total: float, off_manifold: str, name: str) -> Tensor:
    """Divide compositions by their sums, if these are what they should be.

    With ``"reject"`` every sum must be within 1e-4 of the total, relative to it, in any dtype;
    with ``"project"`` it may be anything. Parts must be positive in both cases. Inside a ``vmap``
    values cannot be looked at, so nothing is refused.

    Args:
        x: Candidates of shape :math:`(B, K)`; never changed in place.
        total: :math:`s`, what the parts should sum to.
        off_manifold: ``"reject"`` or ``"project"``.
        name: How the message calls the batch.

    Returns:
        Parts of shape :math:`(B, K)` that sum to one, differentiable.

    Raises:
        OffManifoldError: If a part is not positive, or a sum is off and is to be refused.
        NonFiniteError: If the batch holds NaN or infinity.

    Examples:
        >>> import torch
        >>> closed_parts(torch.tensor([[1.0, 3.0]]), 1.0, "project", "x")
        tensor([[0.2500, 0.7500]])
        >>> closed_parts(torch.tensor([[1.0, 3.0], [0.5, 0.5]]), 1.0, "reject", "x")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.OffManifoldError: x has 1 of 2 rows off the simplex, the worst \
at index 0 with sum 4, where 1 within a relative 0.0001 is allowed. Multiply each row by 1 / \
row.sum(), or build with off_manifold='project', which does.
    """
    sums = x.sum(1, keepdim=True)
    if is_readable(x):
        _refuse_boundary(x.detach(), name)
        if off_manifold == "reject":
            _refuse_sums(sums.detach()[:, 0], total, name)
    return x / sums


def _refuse_boundary(x: Tensor, name: str) -> None:
    if bool((x > 0).all()):
        return
    check_finite(x, name)
    rows = (x <= 0).any(1)
    smallest = x.amin(1)
    worst = int(smallest.argmin())
    raise OffManifoldError(
        f"{name} has {int(rows.sum())} of {len(x)} rows with parts that are not positive "
        f"({int((x == 0).sum())} zeros, {int((x < 0).sum())} negative), the worst at index "
        f"{worst} with part {float(smallest[worst]):.6g}. A density on the simplex gives its "
        "boundary no mass: replace zeros by small positive numbers, such as half the least part "
        "that could have been measured, and divide by the sum again. Drop rows with negative "
        "parts."
    )


def _refuse_sums(sums: Tensor, total: float, name: str) -> None:
    distances = (sums / total - 1).abs()
    near = distances <= TOLERANCE  # false for NaN too
    if bool(near.all()):
        return
    check_finite(sums, f"the sums of {name}")
    worst = int(distances.argmax())
    raise OffManifoldError(
        f"{name} has {int((~near).sum())} of {len(sums)} rows off the simplex, the worst at index "
        f"{worst} with sum {float(sums[worst]):.6g}, where {total:g} within a relative "
        f"{TOLERANCE} is allowed. Multiply each row by {total:g} / row.sum(), or build with "
        "off_manifold='project', which does."
    )
