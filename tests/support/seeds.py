"""Seeds of the suite. The option ``--seed-offset`` shifts all of them.

The offset stands in the environment, so that processes which a test starts have it too.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import hypothesis
import torch

OFFSET = "NFI_SEED_OFFSET"


def shifted(seed: int) -> int:
    """A seed plus the offset."""
    return seed + int(os.environ.get(OFFSET, "0"))


def manual_seed(seed: int) -> None:
    """Seed torch's global generator."""
    torch.manual_seed(shifted(seed))


def seeded_generator(seed: int) -> torch.Generator:
    """A generator of its own on the CPU."""
    return torch.Generator().manual_seed(shifted(seed))


def default_generator() -> torch.Generator:
    """The generator that the package takes by default: of seed 0, whatever the offset."""
    return torch.Generator().manual_seed(0)


def properties(max_examples: int = 60) -> Callable[[Callable], Callable]:
    """Settings of hypothesis: the same examples in every run, others for other offsets."""

    def decorate(test: Callable) -> Callable:
        fixed = hypothesis.settings(max_examples=max_examples, deadline=None, derandomize=True)
        offset = shifted(0)
        return fixed(hypothesis.seed(offset)(test) if offset else test)

    return decorate
