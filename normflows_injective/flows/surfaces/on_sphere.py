"""Points that should lie on the unit sphere: refused or projected where they do not."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_choice, check_finite, is_readable
from ...errors import OffManifoldError

__all__ = ["check_policy", "refuse_off_orthant", "unit_vectors"]

POLICIES = ("reject", "project")
TOLERANCE = 1e-4


def check_policy(off_manifold: str) -> None:
    """Raise unless a policy for points off the manifold is known.

    Args:
        off_manifold: Candidate; ``"reject"`` and ``"project"`` are known.

    Raises:
        OptionError: If it is another one.

    Examples:
        >>> check_policy("ignore")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.OptionError: off_manifold must be one of reject, project, got \
'ignore'.
    """
    check_choice(off_manifold, POLICIES, "off_manifold")


def unit_vectors(x: Tensor, off_manifold: str, name: str) -> Tensor:
    """Take a batch as points of the unit sphere, by the policy for those that are not.

    The result is :math:`x / |x|`, differentiable, so that rounding of the norm does not enter what
    follows. With ``"reject"`` every norm must be within 1e-4 of one, in any dtype; with
    ``"project"`` only a row of zeros is refused. Where a ``vmap`` maps over the points their
    values cannot be looked at, so nothing is refused.

    Args:
        x: Candidates of shape :math:`(*, D)`; never changed in place.
        off_manifold: ``"reject"`` or ``"project"``.
        name: How the message calls the batch.

    Returns:
        Points of the sphere, of the same shape.

    Raises:
        OffManifoldError: If rows are off the sphere and are to be refused, or are zero.
        NonFiniteError: If the batch holds NaN or infinity.

    Examples:
        >>> unit_vectors(torch.tensor([[0.6, 0.8]]), "reject", "x")
        tensor([[0.6000, 0.8000]])
        >>> unit_vectors(torch.tensor([[3.0, 4.0]]), "project", "x")
        tensor([[0.6000, 0.8000]])
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "reject", "x")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.OffManifoldError: x has 1 of 2 rows off the unit sphere, the \
worst at index [0] with norm 5, where 1 +- 0.0001 is allowed. Divide the rows by their norms, or \
build with off_manifold='project', which does.
    """
    if off_manifold == "reject":
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        _refuse_off_sphere(x, norms.detach().squeeze(-1), name)
        return x / norms
    # The direction does not depend on this scale, which keeps the squares within range.
    scale = x.detach().abs().amax(-1, keepdim=True)
    _refuse_zero(x, scale, name)
    scaled = x / scale
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def refuse_off_orthant(u: Tensor, name: str) -> None:
    """Raise unless all coordinates are positive.

    Args:
        u: Directions of shape (B, D).
        name: How the message calls them.

    Raises:
        OffManifoldError: If a coordinate is zero or negative.
    """
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


def _refuse_off_sphere(x: Tensor, norms: Tensor, name: str) -> None:
    if not is_readable(norms):
        return
    distances = (norms - 1).abs()
    near = distances <= TOLERANCE  # false for NaN too
    if bool(near.all()):
        return
    check_finite(x, name)
    worst = torch.unravel_index(distances.argmax(), distances.shape)
    raise OffManifoldError(
        f"{name} has {int((~near).sum())} of {near.numel()} rows off the unit sphere, the worst "
        f"at index {[int(index) for index in worst]} with norm {float(norms[worst]):.6g}, where "
        f"1 +- {TOLERANCE} is allowed. Divide the rows by their norms, or build with "
        "off_manifold='project', which does."
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
