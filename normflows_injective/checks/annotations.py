"""The check that an argument gets by its annotation, so that no layer has to write it down."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import Parameter, isclass
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from .numbers import LARGEST, check_count, check_number
from .options import check_callable, check_counts, check_flag, check_module
from .wording import named

Check = Callable[[Any, str], Any]
# Parts that their owners check, with messages that say more than a type.
_CHECKED_INSIDE = (
    "ElementTransform",
    "Estimator",
    "Gauge",
    "Likelihood",
    "MomentRegression",
    "model",
    "q0",
)

# Counts that may be zero: features of a context, inputs beside one, layers of an identity.
_MAY_BE_ZERO = ("context_dim", "in_features", "num_blocks", "num_layers")


_whole = partial(check_count, least=0)
# The callee refuses integers out of its range, and says when to give None.
_optional_integer = partial(
    check_count, least=-LARGEST, advice="Leave it out, or give an integer."
)
_widths = partial(check_counts, empty=True)
_function = partial(check_callable, advice="Give a function.")
_network = partial(check_module, advice="Give a network.")


def _shape(value: Any, name: str) -> Any:
    """Return a shape as plain numbers, or any other value for the callee to refuse by its axes."""
    try:
        return _widths(value, name)
    except OptionError:
        return value


def _constructor(value: Any, name: str) -> Any:
    if not callable(value) or isinstance(value, nn.Module):
        raise OptionError(
            named(f"{name} must build a layer when it is called", value, "Give e.g. nn.SiLU.")
        )
    return value


def _wrapper(value: Any, name: str) -> Any:
    if not callable(value) or isinstance(value, nn.Module):
        advice = "Give e.g. torch.compile."
        raise OptionError(named(f"{name} must wrap a module when it is called", value, advice))
    return value


def _generator(value: Any, name: str) -> Any:
    if not isinstance(value, torch.Generator):
        advice = "Give torch.Generator().manual_seed(0), or None for the global one."
        raise OptionError(named(f"{name} must be a torch.Generator", value, advice))
    return value


_CHECKS: dict[str, Check] = {
    "int": check_count,
    "bool": check_flag,
    "float": check_number,
    "Sequence[int]": _widths,
    "tuple[int, int, int]": _shape,
    "Generator": _generator,
    "Map": _function,
    "Activation": _constructor,
    "Callable[[], nn.Module]": _constructor,
    "Callable[[nn.Module], nn.Module]": _wrapper,
    "DrawProbes": _function,
}


def check_of(parameter: Parameter) -> tuple[Check | None, bool]:
    """Return the check of a parameter, None if there is none, and whether None is a value."""
    text = text_of(parameter.annotation)
    optional = text.endswith(" | None")
    text = text.removesuffix(" | None")
    if text == "int" and optional:
        return _optional_integer, True
    if parameter.name == "image_shape":
        return _shape, optional
    if text == "int" and (parameter.default == 0 or parameter.name in _MAY_BE_ZERO):
        return _whole, False
    if text == "nn.Module" and parameter.name not in _CHECKED_INSIDE:
        return _network, optional
    if text.startswith("Callable[") and "|" not in text and text not in _CHECKS:
        return _function, optional
    return _CHECKS.get(text), optional


def check_class(parameter: Parameter, names: dict[str, Any]) -> Check | None:
    """Return the check that a value is of the class of this package that the annotation names."""
    text = text_of(parameter.annotation).removesuffix(" | None")
    kind = names.get(text)
    if not isclass(kind) or text in _CHECKED_INSIDE or not is_ours(kind):
        return None
    owner: type = kind

    def check(value: Any, name: str) -> Any:
        if not isinstance(value, owner):
            article = "an" if text[0] in "AEIO" else "a"
            advice = f"Build one first, {text}(...)."
            raise OptionError(named(f"{name} must be {article} {text}", value, advice))
        return value

    return check


def text_of(annotation: Any) -> str:
    """Return an annotation as it is written, without the name of torch; empty if there is none."""
    if annotation is Parameter.empty:
        return ""
    text = annotation.__name__ if isclass(annotation) else str(annotation)
    return text.replace("torch.", "")


def is_ours(kind: type) -> bool:
    """Whether a class is of this package."""
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]
