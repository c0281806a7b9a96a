"""Where the repository lies, and processes that run its code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
EXAMPLES = ROOT / "examples"


def run_python(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def run_code(code):
    return run_python("-c", code)


def run_example(name, *options):
    return run_python(EXAMPLES / name, *options)
