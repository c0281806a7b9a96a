"""Options and fixtures of the whole suite."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from support.seeds import OFFSET, manual_seed, shifted

# Folders that are no packages all have a module of this name, which only one search can import.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]
# Python takes the folder tests/pyro for a package where Pyro is missing, so that it has no origin.
HAS_PYRO = getattr(importlib.util.find_spec("pyro"), "origin", None) is not None
if not HAS_PYRO:
    sys.modules["pyro"] = None
    collect_ignore_glob += ["pyro", "support/pyro_*.py"]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device to run on, e.g. cuda")
    parser.addoption(
        "--dtype", default="float64", choices=["float32", "float64"], help="dtype to run in"
    )
    parser.addoption(
        "--seed-offset", type=int, default=0, help="a number to add to every seed of the tests"
    )


def pytest_configure(config):
    os.environ[OFFSET] = str(config.getoption("--seed-offset"))
    if not HAS_PYRO:
        # A conftest.py speaks for its own folder alone, an option for the package, too.
        package = importlib.util.find_spec("normflows_injective").submodule_search_locations[0]
        config.option.ignore = [*(config.option.ignore or []), f"{package}/pyro"]


def pytest_report_header(config):
    return f"seeds shifted by {config.getoption('--seed-offset')}"


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def dtype(request):
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture(autouse=True)
def reproducible(device):
    """Every test starts from the same random state and leaves the global state as it was.

    On another device than the CPU everything that a test builds without naming one goes there.
    """
    before = (torch.get_default_dtype(), torch.is_grad_enabled())
    manual_seed(0)
    random.seed(shifted(0))
    np.random.seed(shifted(0))
    if device.type == "cpu":
        yield
    else:
        with device:
            yield
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before


@pytest.fixture
def float64_by_default(reproducible):
    """Everything that is built without naming a dtype is in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def quiet():
    """Warnings are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
