"""The base of all layers of the package: a flow of normflows that checks its arguments."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import normflows as nf
from torch import Tensor

from ..checks import check_event_shape, checks_arguments_of, looks_first, names_of

# The methods whose first argument is checked, and the attribute with the event shape of that.
_SHAPES = {
    "forward": "latent_shape",
    "decode": "latent_shape",
    "decode_and_log_volume": "latent_shape",
    "log_stretch": "latent_shape",
    "inverse": "data_shape",
    "encode": "data_shape",
}


class Layer(nf.flows.Flow):
    """A flow that checks arguments, by ``latent_shape`` and ``data_shape`` or one ``shape``."""

    def __init_subclass__(cls) -> None:
        """Attach the checks."""
        super().__init_subclass__()
        for name in _SHAPES.keys() & vars(cls):
            looks_first(cls, [name], _look_at_shape(vars(cls)[name], _SHAPES[name]))
        checks_arguments_of(cls)


def _look_at_shape(method: Callable[..., Any], side: str) -> Callable[..., None]:
    """The check that refuses a first argument whose event shape is not the layer's."""
    own, other = ("z", "x") if side == "latent_shape" else ("x", "z")
    # Some layers call the argument of inverse z, as those of normflows do.
    names = names_of(method)
    name = other if other in names and own not in names else own

    def look(layer: Layer, *args: Any, **kwargs: Any) -> None:
        batch = args[0] if args else kwargs.get(name)
        if isinstance(batch, Tensor):
            check_event_shape(batch, _declared(layer, side), name)

    return look


def _declared(layer: Layer, side: str) -> Sequence[int] | None:
    # Not by getattr of the layer: torch writes a message for every attribute that is missing.
    held, kind = vars(layer), type(layer)
    for key in (side, "shape"):
        shape: Any = held.get(key) or getattr(kind, key, None)
        if isinstance(shape, (tuple, list)):
            return shape
    return None


class LayerWithLoss(Layer):
    """A layer that is trained by a loss of its own, and whose image costs less than its log-det.

    A model's ``forward_kld`` calls ``training_inverse`` in place of ``inverse``, and models call
    ``decode`` and ``encode`` where they need no log-det.
    """

    @abstractmethod
    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Latents (B, *) to data (B, *)."""

    @abstractmethod
    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Data (B, *) to latents (B, *)."""

    @abstractmethod
    def training_inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The tensor (B, *) for the base in training, and minus the layer's own loss (B,)."""
