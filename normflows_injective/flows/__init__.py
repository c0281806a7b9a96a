"""Layers: every one is an ``nf.flows.Flow``."""

from .composite import InjectiveComposite
from .exact import LinearInjection, Pad
from .free_form import FreeFormInjection
from .injection import Injection
from .shapes import Reshape

__all__ = [
    "FreeFormInjection",
    "Injection",
    "InjectiveComposite",
    "LinearInjection",
    "Pad",
    "Reshape",
]
