"""A variational autoencoder trained in Pyro and scored as an injective flow, on digits.

    pip install "normflows-injective[pyro,plot]" scikit-learn
    python examples/pyro/vae.py [--quick] [--out out]

1797 real images of 8x8 pixels come with scikit-learn, so nothing is downloaded. The latents are
z ~ Normal(0, I), the images x ~ Normal(g(z), sigma), the guide is Normal(f(x), L(x) L(x)^T), and
sigma is learned with the networks by SVI over minibatches. The trained pair (f, g) then becomes an
injective flow, whose density, thickened by noise of scale sigma, is compared with the ELBO and
with importance sampling on held-out images. It is their limit for small sigma and an encoder that
projects, so the script also scores with f refined by Gauss-Newton steps. Half a minute on a core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import normflows as nf
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import trange

import normflows_injective as nfi

# isort: off
# Ours comes first, because it says what to install where Pyro is missing.
import normflows_injective.pyro as nfp
import pyro
import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam

# isort: on

DATA_DIM, BATCH, DRAWS = 64, 128, 200


class Split(NamedTuple):
    """Training and test images, (N, 64) each."""

    train: Tensor
    test: Tensor


class Refined(nn.Module):
    """An encoder followed by Gauss-Newton steps to the most probable latents."""

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, sigma: Tensor, num_steps: int = 10
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.num_steps = encoder, decoder, num_steps
        self.register_buffer("sigma", sigma)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (B, d) of images (B, 64)."""
        z = self.encoder(x)
        for _ in range(self.num_steps):
            decoded, jacobian = nfi.volume.jacobian(self.decoder, z)
            weighted = jacobian.mT / self.sigma**2
            gradient = weighted @ (x - decoded).unsqueeze(2) - z.unsqueeze(2)
            step = torch.linalg.solve(weighted @ jacobian + torch.eye(z.shape[1]), gradient)
            z = z + step.squeeze(2)
        return z


def load(seed: int) -> Split:
    """Images with values in [0, 1], 80 : 20 by class, their 17 grey levels spread by noise."""
    digits = load_digits()
    parts = train_test_split(digits.data, test_size=0.2, random_state=seed, stratify=digits.target)
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.from_numpy(part.astype("float32")) for part in parts]
    return Split(*((x + torch.rand(x.shape, generator=generator)) / 17 for x in levels))


class VariationalAutoencoder(nn.Module):
    """Model and guide: a decoder g, an encoder f, and the scale L(x) of the posterior."""

    def __init__(self, data: Tensor, latent_dim: int) -> None:
        super().__init__()
        self.data, self.latent_dim = data, latent_dim
        # Dropout-free and smooth, as the log-volume differentiates the decoder.
        self.encoder, self.decoder = nfi.nets.mlp_autoencoder(DATA_DIM, latent_dim, (256, 256))
        self.scales = nfi.nets.SmoothMLP(DATA_DIM, latent_dim**2, (256,))

    def model(self) -> None:
        """Latents and images, in a subsampled plate."""
        pyro.module("decoder", self.decoder)
        sigma = pyro.param("sigma", torch.tensor(0.3), constraint=dist.constraints.positive)
        with pyro.plate("images", len(self.data), subsample_size=BATCH) as index:
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z, sigma), obs=self.data[index])

    def guide(self) -> None:
        """The posterior of the latents, by networks of the images."""
        pyro.module("encoder", self.encoder)
        pyro.module("scales", self.scales)
        with pyro.plate("images", len(self.data), subsample_size=BATCH) as index:
            pyro.sample("z", self.posterior(self.data[index]))

    def prior(self) -> dist.TorchDistribution:
        """Law of z."""
        return dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1)

    def likelihood(self, z: Tensor, sigma: Tensor) -> dist.TorchDistribution:
        """Law of images (*, 64) given latents (*, d)."""
        return dist.Normal(self.decoder(z), sigma).to_event(1)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """Law of latents (*, d) given images (*, 64)."""
        raw = self.scales(x).unflatten(-1, (self.latent_dim, self.latent_dim))
        diagonal = nn.functional.softplus(raw.diagonal(dim1=-2, dim2=-1)) + 1e-4
        return dist.MultivariateNormal(
            self.encoder(x), scale_tril=raw.tril(-1) + torch.diag_embed(diagonal)
        )


def train(vae: VariationalAutoencoder, steps: int) -> None:
    """SVI as in Pyro's own examples, with a rate that decays to a twentieth."""
    optimizer = ClippedAdam({"lr": 2e-3, "lrd": 0.05 ** (1 / steps), "clip_norm": 100.0})
    svi = SVI(vae.model, vae.guide, optimizer, Trace_ELBO())
    progress = trange(steps, desc="training", unit="step")
    for step in progress:
        loss = svi.step() / len(vae.data)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss:.2f}", sigma=f"{pyro.param('sigma'):.3f}")


@torch.no_grad()
def log_weights(
    vae: VariationalAutoencoder, x: Tensor, posterior: dist.TorchDistribution, sigma: Tensor
) -> Tensor:
    """Logarithmic importance weights (draws, N) of latents from a posterior of images (N, 64)."""
    z = posterior.sample((DRAWS,))
    likelihood = vae.likelihood(z.flatten(0, 1), sigma).log_prob(x.repeat(DRAWS, 1))
    ratio = vae.prior().log_prob(z) - posterior.log_prob(z)
    return ratio + likelihood.view_as(ratio)


@torch.no_grad()
def laplace(refined: Refined, x: Tensor) -> dist.TorchDistribution:
    """Normal law of latents (N, d) around the most probable ones, by the decoder's slope there."""
    z = refined(x)
    slope = nfi.volume.jacobian(refined.decoder, z).jacobian / refined.sigma
    precision = slope.mT @ slope + torch.eye(z.shape[1])
    return dist.MultivariateNormal(z, precision_matrix=precision)


def importance(log_weights: Tensor) -> Tensor:
    """Logarithm of the average weight, (N,): in expectation a lower bound of the evidence."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def as_flow(
    encoder: nn.Module, decoder: nn.Module, latent_dim: int
) -> nfi.InjectiveNormalizingFlow:
    """A trained pair as an injective flow."""
    base = nf.distributions.DiagGaussian(latent_dim, trainable=False)
    return nfi.InjectiveNormalizingFlow(base, [nfi.flows.FreeFormInjection(encoder, decoder)])


@torch.no_grad()
def thickened(flow: nfi.InjectiveNormalizingFlow, x: Tensor, sigma: Tensor) -> Tensor:
    """Density (N,) in nats of images (N, 64) under a flow in noise."""
    law = nfp.InjectiveDistribution(flow, off_manifold="thicken", noise_scale=sigma)
    return law.log_prob(x)


def write_figure(flow: nfi.InjectiveNormalizingFlow, test: Tensor, path: Path) -> None:
    """Draw test images, their reconstructions, and samples on the manifold."""
    with torch.no_grad():
        samples, _ = flow.sample(40, log_prob=False)
        rows = [test[:20], flow.project(test[:20]), samples[:20], samples[20:]]
    names = ["test images", "reconstructions", "samples", "samples"]
    figure, axes = plt.subplots(4, 1, figsize=(10, 2.6), layout="constrained")
    for axis, name, row in zip(axes, names, rows, strict=True):
        images = nn.functional.pad(row.view(-1, 8, 8).clamp(0, 1), (1, 1, 1, 1), value=0.5)
        axis.imshow(torch.cat(list(images), dim=1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mean(scores: Tensor) -> str:
    """Mean of scores (N,) and its standard error."""
    return f"{scores.mean():.2f} ± {scores.std() / len(scores) ** 0.5:.2f}"


def main() -> None:
    """Train, score, print the table and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent-dim", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args()
    pyro.set_rng_seed(options.seed)
    pyro.clear_param_store()
    torch.set_num_threads(1)

    data = load(options.seed)
    vae = VariationalAutoencoder(data.train, options.latent_dim)
    train(vae, 100 if options.quick else options.steps)
    sigma = pyro.param("sigma").detach()

    flow = as_flow(vae.encoder, vae.decoder, options.latent_dim)
    refined = Refined(vae.encoder, vae.decoder, sigma)
    projecting = as_flow(refined, vae.decoder, options.latent_dim)
    by_guide = log_weights(vae, data.test, vae.posterior(data.test), sigma)
    evidence = importance(log_weights(vae, data.test, laplace(refined, data.test), sigma))
    with torch.no_grad():
        slopes = nfi.volume.jacobian(vae.decoder, vae.encoder(data.test)).jacobian
    smallest = torch.linalg.svdvals(slopes)[:, -1].median()
    linear = PCA(options.latent_dim).fit(data.train.numpy()).score_samples(data.test.numpy())
    rows = {
        "ELBO": by_guide.mean(0),
        f"importance sampling, {DRAWS} draws of the guide": importance(by_guide),
        f"importance sampling, {DRAWS} draws around the mode": evidence,
        "injective flow of f and g, thickened": thickened(flow, data.test, sigma),
        "the same with f refined by Gauss-Newton": thickened(projecting, data.test, sigma),
        "probabilistic PCA of the same dimension": torch.from_numpy(linear),
    }
    print(f"\n| {len(data.test)} images, 64 -> {options.latent_dim} | nats | less the third row |")
    print("|---|---|---|")
    for name, scores in rows.items():
        print(f"| {name} | {mean(scores)} | {mean(scores - evidence)} |")
    print(f"\nsigma {sigma:.4f}; median of the smallest singular value of g' {smallest:.3f}")
    path = options.out / "pyro_vae.png"
    write_figure(flow, data.test, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
