"""Parts of the models that are compared: bases, latent splines, components, a VAE."""

from __future__ import annotations

import math

import normflows as nf
import torch
from torch import Tensor, nn

import normflows_injective as nfi

__all__ = ["FittedAffine", "GaussianVAE", "normal", "pca_model", "spline_block"]

# Latents are near standard normal under the loss: four deviations hold all but one in 10^4.
TAIL_BOUND = 4.0


class FittedAffine(nf.flows.Flow):
    """Affine map from standard normal to a Gaussian fitted to samples (N, d)."""

    def __init__(self, samples: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", samples.mean(0))
        self.register_buffer("factor", torch.linalg.cholesky(torch.cov(samples.T)))
        self.register_buffer("log_volume", self.factor.diagonal().log().sum())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map standard normal (B, d) to the Gaussian, with the log-determinant (B,)."""
        return z @ self.factor.T + self.mean, self.log_volume.expand(len(z))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map the Gaussian (B, d) to standard normal, with the log-determinant (B,)."""
        whitened = torch.linalg.solve_triangular(self.factor, (z - self.mean).T, upper=False).T
        return whitened, -self.log_volume.expand(len(z))


class GaussianVAE(nn.Module):
    """Variational autoencoder with one learnable noise level in its Gaussian decoder."""

    def __init__(self, data_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nfi.nets.SmoothMLP(data_dim, 2 * latent_dim)
        self.decoder = nfi.nets.SmoothMLP(latent_dim, data_dim)
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward_kld(self, x: Tensor) -> Tensor:
        """Minus the mean evidence lower bound of data (B, D), up to a constant, in nats."""
        mean, log_scale = self.encoder(x).chunk(2, dim=1)
        z = mean + log_scale.exp() * torch.randn_like(mean)
        squared_error = (x - self.decoder(z)).square().sum(1)
        misfit = 0.5 * squared_error * (-2 * self.log_noise).exp() + x.shape[1] * self.log_noise
        divergence = (0.5 * (mean.square() + (2 * log_scale).exp() - 1) - log_scale).sum(1)
        return (misfit + divergence).mean()

    def project(self, x: Tensor) -> Tensor:
        """Reconstruction (B, D) of data (B, D): the decoder at the posterior mean."""
        mean, _ = self.encoder(x).chunk(2, dim=1)
        reconstruction: Tensor = self.decoder(mean)
        return reconstruction

    def sample_means(self, num_samples: int) -> Tensor:
        """Decoder means (n, D) at samples of the prior, on the model's manifold."""
        means: Tensor = self.decoder(torch.randn(num_samples, self.latent_dim))
        return means

    def sample(self, num_samples: int) -> Tensor:
        """Samples (n, D) of the model, decoder noise included."""
        means = self.sample_means(num_samples)
        return means + self.log_noise.exp() * torch.randn_like(means)


def normal(latent_dim: int) -> nf.distributions.DiagGaussian:
    """Standard normal base distribution."""
    return nf.distributions.DiagGaussian(latent_dim, trainable=False)


def spline_block(latent_dim: int, num_layers: int = 4) -> list[nf.flows.Flow]:
    """Coupling spline layers that start at the identity, each followed by a linear layer.

    The linear layer stands on the data side of its spline, where it can bring the encoder's
    latents into the tail bound.
    """
    block: list[nf.flows.Flow] = []
    for index in range(num_layers):
        spline = nf.flows.CoupledRationalQuadraticSpline(
            latent_dim,
            num_blocks=1,
            num_hidden_channels=64,
            tail_bound=TAIL_BOUND,
            reverse_mask=bool(index % 2),
        )
        # The wrapper adds an unconditional spline for the other half, at nearly twice the cost;
        # alternating masks already transform every coordinate.
        spline.prqct.unconditional_transform = None
        _start_at_identity(spline)
        block += [spline, nf.flows.LULinearPermute(latent_dim)]
    return block


def _start_at_identity(spline: nf.flows.CoupledRationalQuadraticSpline) -> None:
    """Make the conditioner ask for equal bins and slopes of one, which normflows does not."""
    final = spline.prqct.transform_net.final_layer
    slope_one = math.log(math.expm1(1 - spline.prqct.min_derivative))
    nn.init.zeros_(final.weight)
    nn.init.constant_(final.bias, slope_one)


def pca_model(data: Tensor, latent_dim: int) -> nfi.InjectiveNormalizingFlow:
    """Principal components of data (N, D) with a Gaussian on their plane; nothing to train."""
    injection = nfi.flows.LinearInjection(latent_dim, data.shape[1])
    _, _, directions = torch.linalg.svd(data - data.mean(0), full_matrices=False)
    with torch.no_grad():
        injection.weight.copy_(directions[:latent_dim].T)
        injection.bias.copy_(data.mean(0))
        gaussian = FittedAffine(injection.encode(data))
    return nfi.InjectiveNormalizingFlow(normal(latent_dim), [gaussian, injection])
