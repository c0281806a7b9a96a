"""What every layer of the package is: a flow of normflows that checks what it is given."""

from __future__ import annotations

import normflows as nf

from ..checks import checks_arguments_of

__all__ = ["Layer"]


class Layer(nf.flows.Flow):
    """A flow whose public methods refuse by name what is no dense tensor of real numbers.

    The check is attached to the methods of every subclass where that is defined, so the methods
    hold mathematics alone.

    Examples:
        >>> import torch
        >>> class Twice(Layer):
        ...     def forward(self, z, context=None):
        ...         return 2 * z, z.new_full((len(z),), z[0].numel() * torch.tensor(2.0).log())
        >>> Twice()(None)
        Traceback (most recent call last):
            ...
        normflows_injective.errors.DtypeError: z must be a torch.Tensor, got NoneType. Convert it \
with torch.as_tensor.
    """

    def __init_subclass__(cls) -> None:
        """Attach the check."""
        super().__init_subclass__()
        checks_arguments_of(cls)
