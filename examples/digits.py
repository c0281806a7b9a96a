"""An injective flow on scikit-learn's handwritten digits, 64 to 16 dimensions.

    python examples/digits.py [--epochs 120] [--out out]

1797 real images of 8x8 pixels come with scikit-learn, so nothing is downloaded. The model is a
convolutional autoencoder with a flow in its latent space, trained together in normflows' own loop.
It prints the exact test NLL, the reconstruction error beside PCA's, and how injective the decoder
is, and writes samples, reconstructions and latent traversals. One to three minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import normflows as nf
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from support.baselines import pca_error
from support.figures import write_image_figures
from torch import Tensor, nn
from tqdm import trange

import normflows_injective as nfi

SHAPE, LATENT_DIM, BATCH = (1, 8, 8), 16, 128


def load(seed: int) -> tuple[Tensor, Tensor]:
    """Training and test images (N, 1, 8, 8) with values in [0, 1], 80 : 20 by class."""
    digits = load_digits()
    images = (digits.data / 16).astype("float32").reshape(-1, *SHAPE)
    parts = train_test_split(images, test_size=0.2, random_state=seed, stratify=digits.target)
    return torch.from_numpy(parts[0]), torch.from_numpy(parts[1])


def build(steps: int) -> nfi.InjectiveNormalizingFlow:
    """Spline flows on the latent side of a convolutional autoencoder.

    The first fifth of the steps trains reconstruction alone; over the second fifth the likelihood
    ramps up. A flexible latent flow needs a large beta.
    """
    latent_flows: list[nf.flows.Flow] = []
    for layer in range(4):
        spline = nf.flows.CoupledRationalQuadraticSpline(
            LATENT_DIM, 1, 32, tail_bound=4.0, activation=nn.SiLU, reverse_mask=layer % 2 == 1
        )
        latent_flows += [spline, nf.flows.LULinearPermute(LATENT_DIM)]
    encoder, decoder = nfi.nets.conv_autoencoder(SHAPE, LATENT_DIM, channels=(32, 64))
    return nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(LATENT_DIM, trainable=False),
        [*latent_flows, nfi.flows.FreeFormInjection(encoder, decoder)],
        nfi.SurrogateLikelihood(
            beta=50.0, input_noise=0.05, warmup_steps=(steps // 5, 2 * steps // 5)
        ),
    )


def train(model: nfi.InjectiveNormalizingFlow, images: Tensor, epochs: int) -> None:
    """The loop of normflows' README, with a one-cycle rate, clipping and a progress bar."""
    batches = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
    progress = trange(epochs, desc="training", unit="epoch")
    for _ in progress:
        for index in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
            loss = model.forward_kld(images[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
        # The loss says little by itself, so the bar shows what a person can read.
        with torch.no_grad():
            error = model.reconstruction_error(images[:256]).mean()
        progress.set_postfix(loss=f"{loss:.2f}", reconstruction=f"{error:.3f}")


def main() -> None:
    """Train, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figures")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    # So small a network gains nothing from more threads, and on a busy machine they slow it down.
    torch.set_num_threads(1)
    train_images, test_images = load(options.seed)
    model = build(steps=options.epochs * (len(train_images) // BATCH))
    train(model, train_images, options.epochs)

    model.eval()
    with torch.no_grad():
        nll = -model.log_prob(test_images)
        error = model.reconstruction_error(test_images)
    print(f"\n| {len(test_images)} test images, 64 -> 16 dimensions | mean |")
    print("|---|---|")
    print(
        f"| exact NLL (nats, on the 16-dimensional manifold; may be negative) | {nll.mean():.2f} |"
    )
    print(f"| reconstruction error, summed over pixels | {error.mean():.3f} |")
    linear = pca_error(train_images, test_images, LATENT_DIM)
    print(f"| the same for PCA with 16 components | {linear:.3f} |\n")
    print(nfi.diagnostics.injectivity_report(model, test_images))
    for path in write_image_figures(model, test_images, SHAPE, options.out, "digits"):
        print(f"wrote {path}")
    checkpoint = options.out / "digits.safetensors"
    model.save(checkpoint)
    print(f"wrote {checkpoint}")


if __name__ == "__main__":
    main()
