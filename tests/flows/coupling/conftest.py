"""The transforms of an element."""

from __future__ import annotations

import pytest
from support.coupling_oracles import TRANSFORMS


@pytest.fixture(params=TRANSFORMS)
def transform(request):
    return TRANSFORMS[request.param]()
