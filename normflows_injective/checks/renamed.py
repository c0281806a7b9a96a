"""Old names of arguments and attributes, which go on working with a warning for a while."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from ..errors import OptionError
from .attached import checks_arguments
from .wording import level_of_caller

Function = TypeVar("Function", bound=Callable[..., Any])

_GOES_IN = "0.3"


def renamed(**names: str) -> Callable[[Function], Function]:
    """Let a function or constructor take arguments by old names too: ``@renamed(old="new")``."""

    def decorate(function: Function) -> Function:
        # The check knows the new names only, so it comes after the renaming.
        checked = checks_arguments(function)
        owner = function.__qualname__.removesuffix(".__init__")

        @wraps(checked)
        def call(*args: Any, **kwargs: Any) -> Any:
            old = names.keys() & kwargs
            if not old:
                return checked(*args, **kwargs)
            kwargs = {_new_name(name, names, kwargs, owner): kwargs[name] for name in kwargs}
            try:
                return checked(*args, **kwargs)
            except OptionError as error:
                # The message names arguments as they are called now.
                renamings = ", ".join(f"{name} is now {names[name]}" for name in sorted(old))
                raise OptionError(f"{error} ({renamings}.)") from error

        return call  # type: ignore[return-value]

    return decorate


def _new_name(name: str, names: dict[str, str], kwargs: dict[str, Any], owner: str) -> str:
    new = names.get(name)
    if new is None:
        return name
    if new in kwargs:
        raise OptionError(f"{owner} got {new} under its old name {name} too. Leave {name} out.")
    _warn(owner, name, new)
    return new


class RenamedAttribute:
    """The old name of an attribute: ``n_probes = RenamedAttribute("num_probes")`` in a class."""

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self._old = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        _warn(type(instance).__name__, self._old, self.new)
        return getattr(instance, self.new)

    def __set__(self, instance: Any, value: Any) -> None:
        _warn(type(instance).__name__, self._old, self.new)
        setattr(instance, self.new, value)


def _warn(owner: str, old: str, new: str) -> None:
    text = f"{old!r} of {owner} is now {new!r}. Use {new}; {old} goes in version {_GOES_IN}."
    warnings.warn(text, FutureWarning, stacklevel=level_of_caller())
