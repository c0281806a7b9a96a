"""The kernels."""

import pytest

from normflows_injective.flows.kernel.kernels import KERNELS


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param
