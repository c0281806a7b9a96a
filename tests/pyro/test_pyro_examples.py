"""The examples for Pyro run from end to end, much too briefly to be good."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
from support.paths import EXAMPLES

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Not enough tail samples:UserWarning")
@pytest.mark.parametrize("name", ["guide", "sphere", "simplex", "bridge", "vae"])
def test_example(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "pyro" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "|---|" in printed
    assert not re.search(r"\bnan\b", printed)
    assert (tmp_path / f"pyro_{name}.png").stat().st_size > 10_000
