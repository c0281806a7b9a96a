"""How far exact densities are from the truth on a curved surface whose entropy is known.

    python -m benchmarks.flows.known_entropy [--seconds 25] [--seeds 5] \
        [--page docs/results/known_entropy.md] [--quick]

Every run is a line of ``out/known_entropy.jsonl`` and is not repeated.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from benchmarks.equal_time.data import Split
from benchmarks.equal_time.job import Job, Networks
from benchmarks.equal_time.methods import METHODS
from benchmarks.shared.records import Record, run_once
from benchmarks.shared.tables import publish, table, with_error, wrapped

FILE = Path("out") / "known_entropy.jsonl"
CHOSEN = ("fit", "fit_paired", "fit_spline", "fit_affine", "fit_matching", "plan_n8", "plan_f8")
SIZES, QUICK_SIZES = (20_000, 2000, 5000), (400, 100, 100)
WEIGHTS = (0.45, 0.35, 0.2)
CENTRES = ((-1.2, 0.3), (1.0, 0.8), (0.2, -1.3))
SPREADS = ((0.6, 0.4), (0.5, 0.7), (0.45, 0.35))
TILTS = (0.5, -0.4, 0.0)


def latent_law() -> MixtureSameFamily:
    """A mixture of three normals of the plane, each tilted."""
    factors = torch.diag_embed(torch.tensor(SPREADS, dtype=torch.float64))
    factors[:, 1, 0] = torch.tensor(TILTS, dtype=torch.float64) * factors[:, 1, 1]
    centres = torch.tensor(CENTRES, dtype=torch.float64)
    parts = MultivariateNormal(centres, scale_tril=factors)
    return MixtureSameFamily(Categorical(torch.tensor(WEIGHTS, dtype=torch.float64)), parts)


def surface(z: Tensor) -> Tensor:
    """Points (N, 5) of the surface over the plane (N, 2)."""
    first, second = z.unbind(1)
    return torch.stack([first, second, first.sin(), first * second / 2, second.cos()], dim=1)


def log_density(z: Tensor) -> Tensor:
    r"""Log-densities (N,) of points of the surface against its area.

    .. math:: \log p(z) - \tfrac12 \log \det J^\top J
    """
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda row: surface(row[None])[0]))(z)
    return latent_law().log_prob(z) - torch.linalg.slogdet(jacobian.mT @ jacobian)[1] / 2


def points(sizes: tuple[int, int, int]) -> tuple[Split, Tensor]:
    """Training, validation and test rows, and the log-densities of the last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z = latent_law().sample((sum(sizes),))
    rows = surface(z).float()
    return Split(*rows.split(list(sizes))), log_density(z[-sizes[2] :])


def run(name: str, split: Split, truth: Tensor, seconds: float, seed: int) -> Record:
    """Train one method; the excess of its NLL over the truth, of the same rows."""
    job = Job(split, Networks(5, 2), seconds, seed)
    torch.manual_seed(seed)
    model = METHODS[name].fit(job).model.eval()
    with torch.no_grad():
        log_q = torch.cat([model.log_prob(part) for part in split.test.split(500)])
        error = model.reconstruction_error(split.test)
    excess = truth - log_q.double()
    return {
        "excess": float(excess.mean()),
        "noise": float(excess.std() / len(excess) ** 0.5),
        "distance": float(error.mean().sqrt()),
    }


def page(records: dict[str, list[Record]], truth: Tensor, seconds: float) -> str:
    """The page of the runs by method."""
    rows = [
        [
            METHODS[name].title,
            with_error([each["excess"] for each in runs], 4),
            f"{max(each['noise'] for each in runs):.4f}",
            with_error([each["distance"] for each in runs], 4),
        ]
        for name, runs in records.items()
    ]
    conditions = wrapped(
        f"The surface (z1, z2, sin z1, z1 z2 / 2, cos z2) over a mixture of three normals, "
        f"{SIZES[0]:,} training rows, d = 2, {seconds:g} s of a processor for each training. The "
        f"entropy is {-float(truth.mean()):.4f} nats on the test rows. *Excess* is the mean "
        "negative log-density of the model's projections of test rows less the true one of the "
        "same rows, in nats, mean over seeds ± standard error; *noise* the standard error over "
        "rows. *Distance* is the root mean squared distance of test rows from the manifold of the "
        "model; deviations of columns are about one."
    )
    head = ["method", "excess", "noise", "distance"]
    return f"""# Densities on a surface of known entropy

    python -m benchmarks.flows.known_entropy --page docs/results/known_entropy.md

{conditions}

{table(head, rows)}
"""


def main() -> None:
    """Do the missing runs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=25.0, help="of a training")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=CHOSEN)
    parser.add_argument("--page", type=Path, help="write the page of results")
    parser.add_argument("--quick", action="store_true", help="see that everything runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, file = SIZES, FILE
    if options.quick:
        options.seconds, options.seeds, sizes = 0.5, 1, QUICK_SIZES
        file = FILE.with_name("known_entropy_quick.jsonl")
    split, truth = points(sizes)
    records: dict[str, list[Record]] = {}
    for seed in range(options.seeds):
        for name in options.methods:
            key = f"{name} {options.seconds:g} {seed}"
            call = partial(run, name, split, truth, options.seconds, seed)
            records.setdefault(name, []).append(run_once(file, key, call))
            sys.stderr.write(f"{key}: excess {records[name][-1]['excess']:.4f}\n")
    publish(page(records, truth, options.seconds), options.page)


if __name__ == "__main__":
    main()
