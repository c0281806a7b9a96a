r"""The toy of arXiv 2306.01843: a noisy sine in the plane, learned as a curve.

    python examples/sine.py [--sigma 0.1] [--seeds 3] [--steps 2000] [--out out]

x1 is standard normal and x2 = sin(pi/2 x1), both standardised, with Gaussian input noise of scale
sigma in training. One latent dimension. With a small beta encoder and decoder are no inverse pair
and the NLL is spuriously low, and a CollapseWarning says so; then comes a sharp transition to the
sine, in the paper between 1 and 10. The script prints exact NLL and reconstruction error for every
beta, with standard errors over the seeds, beside the entropy of the noiseless curve, and draws
data, learned curve and density. Five minutes of one core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import normflows as nf
import numpy as np
import torch
from torch import Tensor
from tqdm import trange

import normflows_injective as nfi

BETAS = (0.01, 0.1, 1.0, 10.0, 100.0)
# Standard deviation of sin(pi/2 x) for a standard normal x.
SCALE = math.sqrt((1 - math.exp(-(math.pi**2) / 2)) / 2)


def sine(num_samples: int) -> Tensor:
    """Standardised points of the curve, shape (N, 2)."""
    x = torch.randn(num_samples)
    return torch.stack([x, (math.pi / 2 * x).sin() / SCALE], dim=1)


def entropy() -> float:
    """Entropy of the noiseless curve against its length, in nats, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    slope = np.pi / 2 * np.cos(np.pi / 2 * nodes) / SCALE
    log_length = 0.5 * np.log1p(slope**2)
    return 0.5 * math.log(2 * math.pi * math.e) + float(weights @ log_length / weights.sum())


def train(beta: float, sigma: float, steps: int, seed: int) -> nfi.InjectiveNormalizingFlow:
    """Train one model in normflows' loop."""
    torch.manual_seed(seed)
    data = sine(100_000)
    encoder, decoder = nfi.nets.residual_autoencoder(2, 1, width=64, num_blocks=2)
    model = nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(1, trainable=False),
        [nfi.flows.FreeFormInjection(encoder, decoder)],
        nfi.SurrogateLikelihood(beta=beta, input_noise=sigma),
    )
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in trange(steps, desc=f"beta {beta:g}, seed {seed}", leave=False):
        loss = model.forward_kld(data[torch.randint(len(data), (256,))])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


def scores(model: nfi.InjectiveNormalizingFlow, sigma: float) -> list[float]:
    """Exact NLL and reconstruction error, on clean and on noisy test data."""
    torch.manual_seed(12345)
    clean = sine(5000)
    values = []
    with torch.no_grad():
        for x in (clean, clean + sigma * torch.randn_like(clean)):
            values += [
                -model.log_prob(x).mean().item(),
                model.reconstruction_error(x).mean().item(),
            ]
    return values


def draw(models: dict[float, nfi.InjectiveNormalizingFlow], sigma: float, path: Path) -> None:
    """Data, learned curve and density along it, one panel for every beta."""
    figure, axes = plt.subplots(1, len(models), figsize=(15, 3.4), layout="constrained")
    torch.manual_seed(12345)
    data = sine(1500)
    data = data + sigma * torch.randn_like(data)
    for axis, (beta, model) in zip(axes, models.items(), strict=True):
        z = torch.linspace(-3, 3, 600).unsqueeze(1)
        with torch.no_grad():
            curve, log_volume = model.forward_and_log_det(z)
            density = (model.q0.log_prob(z) - log_volume).exp()
        axis.scatter(*data.T, s=2, color="0.75", linewidths=0)
        drawn = axis.scatter(*curve.T, c=density, s=6, vmin=0, vmax=0.3)
        axis.set(title=rf"$\beta$ = {beta:g}", xlim=(-3.2, 3.2), ylim=(-2.2, 2.2))
    figure.colorbar(drawn, ax=axes[-1], label="density on the curve", extend="max")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Sweep beta, print the table and write the figure."""
    parser = argparse.ArgumentParser(description="A noisy sine as a learned curve.")
    parser.add_argument("--sigma", type=float, default=0.1, help="scale of the input noise")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # So small a network gains nothing from more threads, and on a busy machine they slow it down.
    torch.set_num_threads(1)

    first: dict[float, nfi.InjectiveNormalizingFlow] = {}
    rows = []
    for beta in BETAS:
        models = [train(beta, options.sigma, options.steps, s) for s in range(options.seeds)]
        first[beta] = models[0]
        table = torch.tensor([scores(model, options.sigma) for model in models])
        spread = table.std(0) / math.sqrt(len(table)) if len(table) > 1 else table[0] * 0
        cells = [f"{m:.4f} +- {e:.4f}" for m, e in zip(table.mean(0), spread, strict=True)]
        rows.append(f"| {beta:g} | " + " | ".join(cells) + " |")
    print("| beta | NLL, clean | reconstruction, clean | NLL, noisy | reconstruction, noisy |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\nentropy of the noiseless curve: {entropy():.3f} nats")
    path = options.out / "sine.png"
    draw(first, options.sigma, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
