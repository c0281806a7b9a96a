"""Compare injective flows with their baselines on a real table.

Usage::

    python examples/tabular.py higgs_small --data path/to/data
    python examples/tabular.py uci:protein --data path/to/data --seeds 3 --out results

The folder holds ``higgs_small.npz`` and the like; the environment variable NFI_DATA can name it
instead. Progress goes to stderr, a Markdown table to stdout; ``--out`` also keeps the
table and the scores of every seed, after each seed.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from support.tables import TableError, Tables, read_tables
from support.tabular_models import (
    GaussianVAE,
    TrainingPlan,
    autoencoder_model,
    free_form_model,
    pca_model,
    spline_block,
    train,
    two_step_model,
)
from support.tabular_scores import Candidate, Scores, markdown_table, score
from torch import Tensor

import normflows_injective as nfi

Results = dict[str, list[Scores]]
# Training data, latent dimension and plan to the named candidates of one or more rows.
Row = Callable[[Tensor, int, TrainingPlan], dict[str, Candidate]]


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = _parser()
    options = parser.parse_args()
    if options.data is None:
        parser.error("where are the data? Give --data path/to/data, or set NFI_DATA.")
    try:
        tables = read_tables(options.name, options.data)
    except TableError as error:
        parser.error(str(error))
    plan = TrainingPlan(options.steps)
    latent_dim = options.latent_dim or tables.train.shape[1] // 2
    results: Results = {}
    for seed in range(options.seeds):
        for name, scores in run_seed(tables, latent_dim, plan, seed).items():
            results.setdefault(name, []).append(scores)
        if options.out is not None:
            write_results(results, options.out, options.name)
    print(markdown_table(results))


def run_seed(tables: Tables, latent_dim: int, plan: TrainingPlan, seed: int) -> dict[str, Scores]:
    """Scores of every model by its name, each trained from the same seed."""
    scores: dict[str, Scores] = {}
    for row in rows():
        torch.manual_seed(seed)
        for name, candidate in row(tables.train, latent_dim, plan).items():
            scores[name] = score(candidate, tables.test)
    return scores


def rows() -> list[Row]:
    """The models of the comparison, in the order of the table."""
    return [
        pca_row,
        autoencoder_row,
        vae_row,
        two_step_row,
        partial(free_form_row, beta=10.0, splines=False),
        partial(free_form_row, beta=30.0, splines=True),
        recipe_row,
    ]


def pca_row(data: Tensor, latent_dim: int, plan: TrainingPlan) -> dict[str, Candidate]:
    """Principal components with a Gaussian."""
    return {"PCA + Gaussian": candidate_from(pca_model(data, latent_dim))}


def autoencoder_row(data: Tensor, latent_dim: int, plan: TrainingPlan) -> dict[str, Candidate]:
    """Autoencoder with a Gaussian fitted to its latents."""
    name = "autoencoder + Gaussian"
    return {name: candidate_from(autoencoder_model(data, latent_dim, plan, name))}


def vae_row(data: Tensor, latent_dim: int, plan: TrainingPlan) -> dict[str, Candidate]:
    """One variational autoencoder, sampled without and with the noise of its decoder."""
    vae = GaussianVAE(data.shape[1], latent_dim)
    train(vae, data, plan, "VAE")
    return {
        "VAE, decoder means": Candidate(vae.sample_means, vae.project),
        "VAE, with decoder noise": Candidate(vae.sample, vae.project, on_manifold=False),
    }


def two_step_row(data: Tensor, latent_dim: int, plan: TrainingPlan) -> dict[str, Candidate]:
    """Autoencoder, then a spline flow on its latents, half of the steps each."""
    name = "two steps: autoencoder, then latent splines"
    return {name: candidate_from(two_step_model(data, latent_dim, plan, name))}


def free_form_row(
    data: Tensor, latent_dim: int, plan: TrainingPlan, beta: float, splines: bool
) -> dict[str, Candidate]:
    """Free-form injective flow under the full loss from the first step."""
    name = f"FIF{' + latent splines' if splines else ''}, beta {beta:g}"
    block = spline_block(latent_dim) if splines else None
    likelihood = nfi.SurrogateLikelihood(beta=beta)
    model = free_form_model(data.shape[1], latent_dim, likelihood, block)
    train(model, data, plan, name)
    return {name: candidate_from(model)}


def recipe_row(
    data: Tensor, latent_dim: int, plan: TrainingPlan, beta: float = 20.0
) -> dict[str, Candidate]:
    """Recommended recipe: reconstruction alone for a tenth of the steps, then a ramp."""
    name = f"FIF + latent splines, warm-up and ramp, beta {beta:g}"
    likelihood = nfi.SurrogateLikelihood(
        beta=beta, warmup_steps=(plan.steps // 10, 2 * plan.steps // 5)
    )
    model = free_form_model(data.shape[1], latent_dim, likelihood, spline_block(latent_dim))
    train(model, data, plan, name)
    return {name: candidate_from(model)}


def candidate_from(model: nfi.InjectiveNormalizingFlow) -> Candidate:
    """The functions of an injective flow that the scores need."""

    def sample(num_samples: int) -> Tensor:
        samples, _ = model.sample(num_samples, log_prob=False)
        return samples

    return Candidate(sample, model.project, model.log_prob)


def write_results(results: Results, folder: Path, name: str) -> None:
    """Write the table as Markdown and the scores of every seed as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"tabular_{name.replace(':', '_')}"
    (folder / f"{stem}.md").write_text(markdown_table(results) + "\n", encoding="utf-8")
    with (folder / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "seed", *Scores._fields])
        for model, scores in results.items():
            writer.writerows([model, seed, *values] for seed, values in enumerate(scores))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="higgs_small, miniboone_prefix, power_26days or uci:NAME")
    environment = os.environ.get("NFI_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(environment) if environment else None,
        help="folder of the .npz files (default: environment variable NFI_DATA)",
    )
    parser.add_argument("--seeds", type=_positive, default=3, help="number of seeds (default 3)")
    parser.add_argument("--steps", type=_positive, default=2500, help="default 2500")
    parser.add_argument("--latent-dim", type=_positive, help="default: half of the columns")
    parser.add_argument("--out", type=Path, help="folder for the table and the scores per seed")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


if __name__ == "__main__":
    main()
