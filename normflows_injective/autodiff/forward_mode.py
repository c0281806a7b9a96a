"""Whether a caller takes forward-mode derivatives of what is computed, and their refusal.

Volumes and surrogates are built of derivatives. A tangent that a caller sends through them would
meet forward-mode rules of torch for derivatives, which are not known to be right, and
stop-gradients, which mean another thing in forward mode.
"""

from __future__ import annotations

from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from ..errors import ForwardModeError
from .transforms import open_transforms

__all__ = ["carries_tangent", "in_forward_mode", "refuse_nested", "refuse_tangents"]


def in_forward_mode() -> bool:
    """Whether a level of dual numbers, or a ``torch.func.jvp``, is open around a call.

    Examples:
        >>> in_forward_mode()
        False
    """
    return forward_ad._current_level >= 0


def carries_tangent(*tensors: Tensor | None) -> bool:
    """Whether a tensor has a tangent at the innermost open level.

    Examples:
        >>> import torch
        >>> carries_tangent(torch.ones(1))
        False
    """
    if not in_forward_mode():
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def refuse_tangents(what: str, *tensors: Tensor | None) -> None:
    """Raise if a caller takes a forward-mode derivative through tensors.

    Args:
        what: What has no such derivative, for the message.
        *tensors: Tensors, or None.

    Raises:
        ForwardModeError: If one has a tangent, or may have one that cannot be seen.

    Examples:
        >>> import torch
        >>> refuse_tangents("The loss", torch.ones(1))
    """
    refuse_nested(what)
    if carries_tangent(*tensors):
        raise ForwardModeError(
            f"{what} has no forward-mode derivative here, but a tangent came in, by dual numbers, "
            "torch.func.jvp, jacfwd or hessian. Use reverse mode: backward() or "
            "torch.autograd.grad, and for densities torch.func.vjp, jacrev, or jacrev(grad(...))."
        )


def refuse_nested(what: str) -> None:
    """Raise if other transforms stand inside a caller's forward mode, and hide its tangents.

    Raises:
        ForwardModeError: If a ``torch.func.jvp`` is open, and is not the innermost transform.

    Examples:
        >>> refuse_nested("The loss")
    """
    if not in_forward_mode():
        return
    transforms = open_transforms()
    inner = transforms[-1:] not in ([], [TransformType.Jvp])
    if transforms.count(TransformType.Jvp) > 1 or (inner and TransformType.Jvp in transforms):
        raise ForwardModeError(
            f"{what} was asked for inside torch.func.jvp and another transform, as "
            "torch.func.hessian does, where tangents cannot be followed. Use reverse mode twice: "
            "torch.func.jacrev(torch.func.grad(...))."
        )
