"""An injective flow on MNIST or Fashion-MNIST, 784 to 16 dimensions, with convolutions.

    python examples/images.py mnist --data DIR [--epochs 10] [--device cpu] [--out out]

DIR holds ``mnist.npz`` or ``fashion_mnist.npz`` with arrays ``x_train`` and ``x_test`` of uint8
images, (60000, 28, 28) and (10000, 28, 28); it may also be given as the variable NFI_DATA. On a
busy machine set OMP_NUM_THREADS=1: threads that wait for each other are many times slower. The
exact NLL needs the whole Jacobian, so it is taken over the first 2000 test images.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import normflows as nf
import numpy as np
import torch
from support.baselines import pca_error
from support.figures import write_image_figures
from support.files import find
from torch import Tensor, nn
from tqdm import tqdm

import normflows_injective as nfi

SHAPE, LATENT_DIM, BATCH, NLL_IMAGES = (1, 28, 28), 16, 128, 2000


def load(name: str, folder: str | None) -> tuple[Tensor, Tensor]:
    """Training and test images (N, 1, 28, 28) in [0, 1], read without unpickling."""
    path = find(folder, f"{name}.npz")
    with np.load(path, allow_pickle=False) as arrays:
        parts = [torch.from_numpy(arrays[key]) for key in ("x_train", "x_test")]
    train, test = (part.reshape(-1, *SHAPE).float() / 255 for part in parts)
    return train, test


def build(steps: int) -> nfi.InjectiveNormalizingFlow:
    """Spline flows on the latent side of a convolutional autoencoder."""
    latent_flows: list[nf.flows.Flow] = []
    for layer in range(4):
        spline = nf.flows.CoupledRationalQuadraticSpline(
            LATENT_DIM, 1, 64, tail_bound=4.0, activation=nn.SiLU, reverse_mask=layer % 2 == 1
        )
        latent_flows += [spline, nf.flows.LULinearPermute(LATENT_DIM)]
    encoder, decoder = nfi.nets.conv_autoencoder(SHAPE, LATENT_DIM, channels=(32, 64, 128, 256))
    return nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(LATENT_DIM, trainable=False),
        [*latent_flows, nfi.flows.FreeFormInjection(encoder, decoder)],
        nfi.SurrogateLikelihood(
            beta=30.0, input_noise=0.05, warmup_steps=(steps // 10, 3 * steps // 10)
        ),
    )


def train(
    model: nfi.InjectiveNormalizingFlow, images: Tensor, epochs: int, device: torch.device
) -> None:
    """The loop of normflows' README, with a one-cycle rate, clipping and a progress bar."""
    batches = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * batches)
    for epoch in range(epochs):
        order = torch.randperm(len(images))[: batches * BATCH]
        progress = tqdm(order.split(BATCH), desc=f"epoch {epoch + 1} of {epochs}", unit="step")
        for index in progress:
            x = images[index].to(device)
            loss = model.forward_kld(x)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            error = model.reconstruction_error(images[:256].to(device)).mean()
        tqdm.write(f"epoch {epoch + 1}: reconstruction error {error:.2f}")


def evaluate(
    model: nfi.InjectiveNormalizingFlow, test: Tensor, device: torch.device
) -> tuple[float, float, float]:
    """Mean exact NLL with its standard error on part of the test set, and mean reconstruction."""
    model.eval()
    with torch.no_grad():
        nll = -torch.cat([model.log_prob(x.to(device)) for x in test[:NLL_IMAGES].split(200)])
        error = torch.cat([model.reconstruction_error(x.to(device)) for x in test.split(500)])
    return nll.mean().item(), nll.std().item() / len(nll) ** 0.5, error.mean().item()


def main() -> None:
    """Train, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["mnist", "fashion_mnist"])
    parser.add_argument("--data", default=os.environ.get("NFI_DATA"), help="folder of the files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figures")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train_images, test_images = load(options.name, options.data)
    model = build(options.epochs * (len(train_images) // BATCH)).to(options.device)
    start = time.monotonic()
    train(model, train_images, options.epochs, options.device)
    minutes = (time.monotonic() - start) / 60
    nll, standard_error, error = evaluate(model, test_images, options.device)
    pca = pca_error(train_images, test_images, LATENT_DIM)
    print(f"\n| {options.name}, 784 -> 16, {options.epochs} epochs in {minutes:.0f} min | test |")
    print("|---|---|")
    print(f"| exact NLL, first {NLL_IMAGES} images | {nll:.2f} +- {standard_error:.2f} |")
    print(f"| reconstruction error, summed over pixels | {error:.2f} |")
    print(f"| the same for PCA with 16 components | {pca:.2f} |\n")
    print(nfi.diagnostics.injectivity_report(model, test_images[:300].to(options.device)))
    for path in write_image_figures(
        model, test_images, SHAPE, options.out, options.name, options.device
    ):
        print(f"wrote {path}")
    model.save(options.out / f"{options.name}.safetensors")


if __name__ == "__main__":
    main()
