"""What leaves this repository: the source distribution, and the page that shows the README."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from support.paths import ROOT, run_code

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


@pytest.mark.slow
def test_the_source_distribution_holds_what_its_tests_need(tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "out", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", command], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    folders = ("tests", "docs", "examples", "benchmarks", "normflows_injective")
    paths = [path for folder in folders for path in (source / folder).rglob("*")]
    wanted = {str(path.relative_to(source)) for path in paths if path.is_file()}
    names = (
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
    )
    wanted |= {*names, "constraints-lowest.txt"}
    assert not wanted - held


def test_links_of_the_readme_lead_somewhere_wherever_it_is_shown():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    targets = [first or second for first, second in LINK.findall(text)]
    assert not [t for t in targets if not re.match(r"https?://|#|mailto:", t)]
    own = [t.partition("/blob/main/")[2].partition("#")[0] for t in targets if "/blob/main/" in t]
    assert own
    assert not [path for path in own if not (ROOT / path).exists()]


FIRST_USES = """
import sys, warnings
import normflows as nf, torch
import normflows_injective as nfi
base = nf.distributions.DiagGaussian(2, trainable=False)
pair = nfi.nets.mlp_autoencoder(5, 2, (8,))
model = nfi.InjectiveNormalizingFlow(base, [nfi.flows.FreeFormInjection(*pair)])
warnings.simplefilter("error")
{call}
assert not any("torch.jit.script" in str(entry) for entry in warnings.filters)
assert "torch._decomp.decompositions_for_jvp" in sys.modules
"""


@pytest.mark.slow
def test_the_first_forward_mode_of_a_process_brings_no_warning():
    """Users who make errors of warnings would crash, and filters belong to the whole process."""
    done = run_code(FIRST_USES.format(call="model.forward_kld(torch.randn(6, 5)).backward()"))
    assert done.returncode == 0, done.stderr
