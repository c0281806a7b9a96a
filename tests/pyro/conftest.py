"""The state of Pyro around every test of this folder."""

import pyro
import pytest


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
