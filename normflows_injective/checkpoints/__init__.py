"""Weights as one safetensors file with a JSON header; nothing is ever unpickled."""

from .checkpoint import load_checkpoint, on_a_model, save_checkpoint

__all__ = ["load_checkpoint", "on_a_model", "save_checkpoint"]
