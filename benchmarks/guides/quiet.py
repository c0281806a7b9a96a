"""Pyro without its checks and warnings, for whole processes that only measure."""

from __future__ import annotations

import logging
import warnings

import pyro
import torch

__all__ = ["quieten"]


def quieten() -> None:
    """Turn off warnings of missing sites and traced constants, and all checks of arguments."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pyro").setLevel(logging.ERROR)
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)
