"""Injective flows and what people would use instead, on images, at equal processor time.

    python -m benchmarks.equal_time.images mnist --data DIR --seconds 600 --seeds 2 \
        --out out/equal_time [--methods plan_f ae_matching]

DIR holds ``mnist.npz`` and ``fashion_mnist.npz``, each of which is the anomaly of the other.
Encoder and decoder are ``nfi.nets.conv_autoencoder`` between 28 x 28 pixels in [0, 1] and 16
latent dimensions. Runs are kept as those of ``benchmarks.equal_time.tables`` are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.shared.data import add_data_option

from .data import IMAGES, read_images
from .job import Networks
from .methods import METHODS
from .runs import FOLDER, Run, Setup, chosen_methods, run_all
from .scores import Limits

LATENT_DIM, SHAPE = 16, (1, 28, 28)
LIMITS = Limits(samples=2000, densities=500, anomalies=500)


def main() -> None:
    """Do the missing runs that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(IMAGES))
    add_data_option(parser)
    parser.add_argument("--seconds", type=float, default=600.0, help="of a processor, for a run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--latent-dim", type=int)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the runs")
    options = parser.parse_args()
    split = read_images(options.name, options.data)
    networks = Networks(split.dim, options.latent_dim or LATENT_DIM, SHAPE)
    setup = Setup(lambda seed: split, networks, LIMITS)
    runs = [
        Run(options.name, "all", options.seconds, method, seed)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for method in chosen_methods(options.methods)
    ]
    run_all(runs, {options.name: setup}, options.out)


if __name__ == "__main__":
    main()
