"""Points that should lie on the unit sphere or the simplex: refused or moved where they do not.

``"reject"`` raises where a norm or a sum is off by more than a relative 1e-4, in any dtype;
``"project"`` takes any. Rows are divided by it in both cases, differentiably, so that rounding of
norms does not enter later layers. Nothing is refused inside a ``vmap``, where values cannot be
looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...checks import check_choice, check_finite, is_readable
from ...errors import OffManifoldError

TOLERANCE = 1e-4


def check_policy(off_manifold: str) -> None:
    """Raise unless a policy for points off the manifold is known."""
    check_choice(off_manifold, ("reject", "project"), "off_manifold")


def unit_vectors(x: Tensor, off_manifold: str, name: str) -> Tensor:
    """Directions of a batch (*, D), whose norms must be one unless they are to be projected."""
    if off_manifold == "reject":
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        refuse_far(
            norms.detach().squeeze(-1),
            (x, name),
            lambda rows, index, norm: (
                f"{name} has {rows} off the unit sphere, the worst at index {index} with norm "
                f"{norm:.6g}, where 1 +- {TOLERANCE} is allowed. Divide the rows by their norms, "
                "or build with off_manifold='project', which does."
            ),
        )
        return x / norms
    # The direction does not depend on this scale, which keeps the squares within range.
    scale = x.detach().abs().amax(-1, keepdim=True)
    _refuse_zero(x, scale, name)
    scaled = x / scale
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def closed_parts(x: Tensor, total: float, off_manifold: str, name: str) -> Tensor:
    """Positive parts (B, K) divided by their sums, which must be the total or are projected."""
    sums = x.sum(1, keepdim=True)
    _refuse_boundary(x.detach(), name)
    if off_manifold == "reject":
        refuse_far(
            sums.detach()[:, 0] / total,
            (sums, f"the sums of {name}"),
            lambda rows, index, share: (
                f"{name} has {rows} off the simplex, the worst at index {index[0]} with sum "
                f"{share * total:.6g}, where {total:g} within a relative {TOLERANCE} is allowed. "
                f"Multiply each row by {total:g} / row.sum(), or build with "
                "off_manifold='project', which does."
            ),
        )
    return x / sums


def refuse_far(
    factors: Tensor, source: tuple[Tensor, str], text: Callable[[str, list[int], float], str]
) -> None:
    """Raise if factors (*) differ from one, unless their source, a named tensor, is not finite."""
    if not is_readable(factors):
        return
    distances = (factors - 1).abs()
    near = distances <= TOLERANCE  # false for NaN too
    if bool(near.all()):
        return
    check_finite(*source)
    worst = torch.unravel_index(distances.argmax(), distances.shape)
    rows = f"{int((~near).sum())} of {near.numel()} rows"
    raise OffManifoldError(text(rows, [int(place) for place in worst], float(factors[worst])))


def refuse_off_orthant(u: Tensor, name: str) -> None:
    """Raise unless all coordinates of directions (B, D) are positive."""
    if not is_readable(u):
        return
    positive = (u.detach() > 0).all(1)
    if not bool(positive.all()):
        check_finite(u, name)
        raise OffManifoldError(
            f"{name}: {int((~positive).sum())} of {len(u)} points lie outside the positive "
            f"orthant, the first at index {int((~positive).nonzero()[0])}. A density gives its "
            "boundary no mass: replace zeros by small positive numbers. Points of any sign need "
            "a surface around the centre."
        )


def _refuse_zero(x: Tensor, scale: Tensor, name: str) -> None:
    if not is_readable(x):
        return
    usable = (scale > 0) & (scale < torch.inf)
    if bool(usable.all()):
        return
    check_finite(x, name)
    zero = (~usable[..., 0]).nonzero()
    raise OffManifoldError(
        f"{name} has {len(zero)} of {usable.numel()} rows of zeros, the first at index "
        f"{zero[0].tolist()}: they have no direction to project to. Drop them."
    )


def _refuse_boundary(x: Tensor, name: str) -> None:
    if not is_readable(x) or bool((x > 0).all()):
        return
    check_finite(x, name)
    rows = (x <= 0).any(1)
    smallest = x.amin(1)
    worst = int(smallest.argmin())
    raise OffManifoldError(
        f"{name} has {int(rows.sum())} of {len(x)} rows with parts that are not positive "
        f"({int((x == 0).sum())} zeros, {int((x < 0).sum())} negative), the worst at index "
        f"{worst} with part {float(smallest[worst]):.6g}. A density on the simplex gives its "
        "boundary no mass: replace zeros by small positive numbers, as "
        "nfi.points.compositions_without_zeros and compositions_from_counts do. Drop rows with "
        "negative parts."
    )
