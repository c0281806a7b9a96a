"""Time of one step of inference with `AutoInjective`, beside Pyro's low-rank normal guide.

    python -m benchmarks.guides.step [--dims 20 100 1000 3000] [--rank 10] [--steps 200]

The model is cheap, so that the time is the guide's: D independent standard normal latents, each
observed once with normal noise. A step is one call of `SVI.step` with Adam, one particle, float32,
one thread: draw, score, differentiate, update. The guides take turns in short bursts, so that
other work on the machine hits all alike, and the median over all steps of a guide is printed with
its ratio to that of `AutoLowRankMultivariateNormal` of the same rank.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoLowRankMultivariateNormal

from benchmarks.shared.tables import table
from normflows_injective.pyro import AutoInjective

BURST, WARM_UP = 10, 20

Make = Callable[[Callable[..., Any], int], AutoGuide]

GUIDES: dict[str, Make] = {
    "AutoLowRankMultivariateNormal": lambda m, r: AutoLowRankMultivariateNormal(m, rank=r),
    "AutoInjective, diagonal, linear": lambda m, r: AutoInjective(
        m, r, noise="diagonal", decoder="linear"
    ),
    "AutoInjective, diagonal": lambda m, r: AutoInjective(m, r, noise="diagonal"),
    "AutoInjective, low_rank of the same rank": lambda m, r: AutoInjective(
        m, r, noise="low_rank", noise_rank=r
    ),
    "AutoInjective, low_rank": lambda m, r: AutoInjective(m, r, noise="low_rank"),
    "AutoInjective, low_rank, num_aux=5": lambda m, r: AutoInjective(
        m, r, noise="low_rank", num_aux=5
    ),
}


class Problem:
    """A guide that learns a normal posterior, and the times of its steps."""

    def __init__(self, make: Make, dim: int, rank: int) -> None:
        torch.manual_seed(0)
        observed = torch.randn(dim)

        def model() -> None:
            x = pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=observed)

        self.guide = make(model, rank)
        self.svi = SVI(model, self.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        self.store = pyro.get_param_store().get_state()
        self.seconds: list[float] = []

    def burst(self, count: int, record: bool) -> None:
        """Take steps, with this guide's parameters in the store."""
        pyro.get_param_store().set_state(self.store)
        for _ in range(count):
            start = time.perf_counter()
            self.svi.step()
            if record:
                self.seconds.append(time.perf_counter() - start)
        self.store = pyro.get_param_store().get_state()


def medians(dim: int, rank: int, steps: int) -> dict[str, float]:
    """Median seconds of a step of every guide."""
    problems: dict[str, Problem] = {}
    for name, make in GUIDES.items():
        pyro.clear_param_store()
        problems[name] = Problem(make, dim, rank)
        problems[name].burst(WARM_UP, record=False)
    for _ in range(max(1, steps // BURST)):
        for problem in problems.values():
            problem.burst(BURST, record=True)
    return {name: statistics.median(problem.seconds) for name, problem in problems.items()}


def milliseconds(measured: dict[int, dict[str, float]]) -> str:
    """A table of milliseconds by guide and dimension, with ratios to the first guide."""
    rows = [[name] for name in GUIDES]
    for times in measured.values():
        unit = next(iter(times.values()))
        for row in rows:
            seconds = times[row[0]]
            row.append(f"{1000 * seconds:.2f} ({seconds / unit:.2f} x)")
    return table(["guide", *(f"D = {dim:,}, ms" for dim in measured)], rows)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[20, 100, 1000, 3000])
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"Rank {options.rank}, torch {torch.__version__}, pyro {pyro.__version__}, one thread.\n"
    )
    print(milliseconds({dim: medians(dim, options.rank, options.steps) for dim in options.dims}))


if __name__ == "__main__":
    main()
