"""Random numbers of the suite follow the option ``--seed-offset``."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers
from support.paths import TESTS
from support.seeds import OFFSET, manual_seed, properties, seeded_generator, shifted

# A number given to one of these is a seed that the option does not reach.
RAW = re.compile(
    r"torch\.manual_seed\(|(?:\)|generator)\.manual_seed\((?!shifted\()"
    r"|(?:set_rng_seed|random\.seed|default_rng|RandomState|random\.Random|new_generator)"
    r"\((?!shifted\()|(?:random_state|rng)=(?!shifted\()\w|\bderandomize\b"
)
# The fuzzer has an option for its seed.
SEEDING = {
    "support/seeds.py",
    "fuzz/search.py",
    "fuzz/calls.py",
    "fuzz/making.py",
    "package/test_seeds.py",
}


@pytest.mark.slow
def test_every_seed_goes_through_the_module_that_shifts_it():
    raw_seeds = [
        f"{path.name}: {line.strip()}"
        for path in sorted(TESTS.rglob("*.py"))
        if path.relative_to(TESTS).as_posix() not in SEEDING
        for line in path.read_text().splitlines()
        if RAW.search(line)
    ]
    assert not raw_seeds, (
        "give these shifted(seed), or use manual_seed, seeded_generator of seeds.py"
    )


@pytest.mark.parametrize(
    "line",
    [
        "torch.manual_seed(3)",
        "torch.Generator().manual_seed(seed)",
        "generator.manual_seed(0)",
        "pyro.set_rng_seed(0)",
        "np.random.default_rng(0)",
        "KFold(shuffle=True, random_state=0)",
        "@settings(derandomize=True)",
    ],
)
def test_raw_seeds_are_recognised(line):
    assert RAW.search(line)


def test_the_offset_shifts_all_kinds_of_seeds(monkeypatch):
    def draws():
        manual_seed(1)
        examples: list[int] = []

        @properties(max_examples=5)
        @given(integers())
        def collect(number):
            examples.append(number)

        collect()
        return torch.rand(3), torch.rand(3, generator=seeded_generator(1)), examples

    monkeypatch.setenv(OFFSET, "0")
    assert shifted(7) == 7
    plain = draws()
    assert all(map(torch.equal, plain[:2], draws()[:2]))
    monkeypatch.setenv(OFFSET, "5")
    assert shifted(7) == 12
    moved = draws()
    assert not torch.equal(plain[0], moved[0])
    assert not torch.equal(plain[1], moved[1])
    assert plain[2] != moved[2]


@pytest.mark.slow
def test_the_option_reaches_workers_and_their_processes(tmp_path):
    test = """
import os, random, subprocess, sys
import torch
from support.seeds import OFFSET, shifted

def test_state():
    assert torch.initial_seed() == shifted(0) == 41
    assert random.random() == random.Random(41).random()
    code = f"import os; raise SystemExit(os.environ[{OFFSET!r}] != '41')"
    subprocess.run([sys.executable, "-c", code], check=True)
"""
    (tmp_path / "test_offset.py").write_text(test)
    (tmp_path / "support").mkdir()
    for name in ("conftest.py", "support/__init__.py", "support/seeds.py"):
        (tmp_path / name).write_text((TESTS / name).read_text())
    command = [sys.executable, "-m", "pytest", "-q", "--seed-offset", "41", "-n", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
