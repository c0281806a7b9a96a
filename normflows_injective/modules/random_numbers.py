"""Random numbers that leave torch's global generators alone."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten


@final
class OwnRandomNumbers(TorchDispatchMode):
    """Let everything inside draw from generators of its own, one a device, with the same seed."""

    # Setting torch's global generator back instead would repeat the numbers that other threads
    # draw meanwhile. Dropout inside fused kernels of attention and recurrent layers has no
    # generator to hand over, and is left as it is.

    def __init__(self, seed: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._generators: dict[torch.device, Generator] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Skipping the compiler imports it, which takes seconds and adds a warning filter.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operator, with a generator if it draws."""
        kwargs = kwargs or {}
        # Some operators take the generator of an inner mode by place.
        if torch.Tag.nondeterministic_seeded not in func.tags or any(
            isinstance(argument, Generator) for argument in (*args, *kwargs.values())
        ):
            return func(*args, **kwargs)
        own = self._generator(args, kwargs)
        if func in _FILLED:
            return _FILLED[func](_like(*args, **kwargs), own)
        if func is _ATEN.native_dropout.default:
            return _dropout(own, *args, **kwargs)
        drawing = _with_generator(func)
        if drawing is None:
            return func(*args, **kwargs)
        return drawing(*args, **(kwargs | {"generator": own}))

    def _generator(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator:
        tensors = (a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        device = torch.device(kwargs.get("device") or next(tensors, "cpu"))
        if device not in self._generators:
            self._generators[device] = Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _like(like: Tensor, *bounds: int, **options: Any) -> tuple[Tensor, tuple[int, ...]]:
    return torch.empty_like(like, **options), bounds


# Older versions of torch have no generator for these.
_FILLED: dict[Any, Any] = {
    _ATEN.rand_like.default: lambda empty, own: empty[0].uniform_(generator=own),
    _ATEN.randn_like.default: lambda empty, own: empty[0].normal_(generator=own),
    _ATEN.randint_like.default: lambda empty, own: empty[0].random_(0, *empty[1], generator=own),
    _ATEN.randint_like.low_dtype: lambda empty, own: empty[0].random_(*empty[1], generator=own),
}


def _dropout(own: Generator, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = torch.rand(x.shape, generator=own, device=x.device) >= p
    return x * mask / (1 - p) if p < 1 else torch.zeros_like(x), mask


def _with_generator(func: Any) -> Any:
    """The overload of a function that takes a generator, or None."""
    names = [argument.name for argument in func._schema.arguments]
    if "generator" in names:
        return func
    for overload in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, overload)
        others = [argument.name for argument in other._schema.arguments]
        if "generator" in others and [n for n in others if n != "generator"] == names:
            return other
    return None
