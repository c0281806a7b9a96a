"""Fixtures of this folder."""

from __future__ import annotations

import pytest
from support.kernel_layers import NAMES


@pytest.fixture(params=NAMES)
def kernel(request):
    return request.param
