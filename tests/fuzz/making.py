"""Calls with valid arguments, made afresh for every example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

ROWS = 4
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A function with valid arguments by name, made afresh for every example.

    ``rows`` names the argument whose first dimension all tensors of the result must have, and
    ``kinds`` says what an argument is where its valid value does not show it. ``finite`` says
    that NaN in the arguments must be refused rather than passed on.
    """

    make: Callable[[], tuple[Callable[..., Any], Arguments]]
    rows: str | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    finite: bool = False


class Fresh:
    """An argument that is made for every example."""

    def __init__(self, make: Callable[[], Any], kind: str | None = None) -> None:
        self.make, self.kind = make, kind

    def __call__(self) -> Any:
        return self.make()


def _filled(arguments: Arguments) -> Arguments:
    return {n: v() if isinstance(v, Fresh) else v for n, v in arguments.items()}


def building(kind: Callable[..., Any], /, **arguments: Any) -> Call:
    """The call of a constructor; arguments that are functions without a name are made afresh."""

    def make() -> tuple[Callable[..., Any], Arguments]:
        return kind, _filled(arguments)

    fixed = {n: v.kind for n, v in arguments.items() if isinstance(v, Fresh) and v.kind}
    return Call(make, kinds=fixed)


def method(
    make: Callable[[], Any],
    name: str,
    rows: str | None = None,
    /,
    finite: bool = False,
    kinds: dict[str, str] | None = None,
    **arguments: Any,
) -> Call:
    """The call of a method of an object that is made for every example."""

    def build() -> tuple[Callable[..., Any], Arguments]:
        return getattr(make(), name), _filled(arguments)

    return Call(build, rows, kinds or {}, finite)


def function(
    called: Callable[..., Any],
    rows: str | None = None,
    /,
    finite: bool = False,
    tables: tuple[str, ...] = (),
    **arguments: Any,
) -> Call:
    """The call of a function on tensors, some of which may be arrays or data frames."""

    def build() -> tuple[Callable[..., Any], Arguments]:
        return called, _filled(arguments)

    return Call(build, rows, dict.fromkeys(tables, "table"), finite)


def normal(*shape: int) -> Fresh:
    return Fresh(lambda: torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(1)))


def directions(dim: int) -> Fresh:
    return Fresh(lambda: nn.functional.normalize(torch.rand(ROWS, dim) + 0.1, dim=1))


CONTEXT = {"context": "context"}
NO_CONTEXT = Fresh(lambda: None)
