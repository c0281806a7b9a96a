"""Layers of the coupling family and of normflows, on both sides of an injection, on images.

    python examples/mixed_images.py fashion_mnist --data DIR [--epochs 2] [--device cpu]

Two models of 784 to 16 dimensions with the same convolutional injection, trained by the loop of
normflows' README. One has splines of normflows before the injection. The other mixes kernelised,
volume-preserving and radial layers with those of normflows there, and puts a MixerFlow layer and
the squeezing of normflows after it. DIR holds the file that ``examples/images.py`` describes.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import normflows as nf
import torch
from images import BATCH, LATENT_DIM, NLL_IMAGES, SHAPE, evaluate, load, train
from support.figures import write_image_figures
from torch import nn

import normflows_injective as nfi
from normflows_injective.flows.kernel import KernelCoupling
from normflows_injective.flows.mixer import mixer_flow
from normflows_injective.flows.volume_preserving import GINCoupling, GlobalScale, RadialFlow1D


def _spline(reverse: bool) -> nf.flows.Flow:
    return nf.flows.CoupledRationalQuadraticSpline(
        LATENT_DIM, 1, 64, tail_bound=4.0, activation=nn.SiLU, reverse_mask=reverse
    )


def normflows_layers() -> tuple[list[nf.flows.Flow], list[nf.flows.Flow]]:
    """Splines and linear permutations before the injection, and nothing after it."""
    before: list[nf.flows.Flow] = []
    for index in range(4):
        before += [_spline(index % 2 == 1), nf.flows.LULinearPermute(LATENT_DIM)]
    return before, []


def mixed_layers() -> tuple[list[nf.flows.Flow], list[nf.flows.Flow]]:
    """Layers of both libraries before the injection, and layers of images after it."""
    before: list[nf.flows.Flow] = [RadialFlow1D(LATENT_DIM), GlobalScale(LATENT_DIM)]
    for index in range(2):
        before += [
            KernelCoupling(LATENT_DIM, num_auxiliary=100, reverse=index % 2 == 1),
            nf.flows.LULinearPermute(LATENT_DIM),
            GINCoupling(LATENT_DIM, reverse=index % 2 == 1),
            nf.flows.ActNorm((LATENT_DIM,)),
            _spline(index % 2 == 1),
            nf.flows.LULinearPermute(LATENT_DIM),
        ]
    # The injection makes four channels of 14 x 14, which become one image.
    after = [nf.flows.Squeeze(), *mixer_flow(SHAPE, 7, layers=1, hidden=(64,))]
    return before, after


def build(mixed: bool, steps: int) -> nfi.InjectiveNormalizingFlow:
    """A model of either kind, with the same injection and the same training term."""
    before, after = mixed_layers() if mixed else normflows_layers()
    shape = (4, 14, 14) if mixed else SHAPE
    encoder, decoder = nfi.nets.conv_autoencoder(shape, LATENT_DIM, channels=(32, 64, 128))
    return nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(LATENT_DIM, trainable=False),
        [*before, nfi.flows.FreeFormInjection(encoder, decoder), *after],
        nfi.SurrogateLikelihood(
            beta=30.0, input_noise=0.05, warmup_steps=(steps // 10, 3 * steps // 10)
        ),
    )


def main() -> None:
    """Train both, print the table and write the figures of the mixed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["mnist", "fashion_mnist"])
    parser.add_argument("--data", default=os.environ.get("NFI_DATA"), help="folder of the files")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figures")
    options = parser.parse_args()
    train_images, test_images = load(options.name, options.data)
    rows = []
    for kind in ("host's layers", "mixed layers"):
        torch.manual_seed(options.seed)
        steps = options.epochs * (len(train_images) // BATCH)
        model = build(kind == "mixed layers", steps).to(options.device)
        with torch.no_grad():
            model.forward_kld(train_images[:2000].to(options.device))
        start = time.process_time()
        train(model, train_images, options.epochs, options.device)
        minutes = (time.process_time() - start) / 60
        nll, standard_error, error = evaluate(model, test_images, options.device)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append(
            f"| {kind} | {size:,} | {nll:.2f} +- {standard_error:.2f} | {error:.2f} "
            f"| {minutes:.1f} |"
        )
    print(f"\n| {options.name} | parameters | NLL, {NLL_IMAGES} images | error | minutes |")
    print("|---|---:|---:|---:|---:|")
    print("\n".join(rows))
    for path in write_image_figures(
        model, test_images, SHAPE, options.out, f"{options.name}_mixed", options.device
    ):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
