"""Options and fixtures of the whole suite."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device to run on, e.g. cuda")
    parser.addoption(
        "--dtype", default="float64", choices=["float32", "float64"], help="dtype to run in"
    )


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
    torch.manual_seed(0)
    if device.type == "cpu":
        yield
    else:
        with device:
            yield
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before
