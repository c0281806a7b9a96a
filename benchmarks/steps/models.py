"""The models and the losses whose training steps are compared.

The toy, the tabular network and the convolutional one of MNIST are those of the published
experiments with free-form injective flows, without normalisation. Beside them stand a plain
perceptron of images and this package's own convolutional pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import normflows as nf
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective.volume import draw_probes

BETA = 10.0

Loss = Callable[[Tensor], Tensor]


class Pair(NamedTuple):
    """An encoder and a decoder with the shapes between which they map."""

    encoder: nn.Module
    decoder: nn.Module
    data_shape: tuple[int, ...]
    latent_dim: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of both networks."""
        yield from self.encoder.parameters()
        yield from self.decoder.parameters()

    def to(self, *args: torch.device | torch.dtype | str) -> Pair:
        """This pair, moved in place as modules are."""
        self.encoder.to(*args)
        self.decoder.to(*args)
        return self


class Model(NamedTuple):
    """A row of the tables.

    Attributes:
        build: Makes new networks.
        batch: Samples in a step.
        title: Name in the tables.
    """

    build: Callable[[], Pair]
    batch: int
    title: str


class Residual(nn.Module):
    """x + MLP(x)."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.inner = perceptron(*widths)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, n) to (B, n)."""
        out: Tensor = x + self.inner(x)
        return out


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with SiLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def residuals(number: int, *widths: int) -> list[nn.Module]:
    """Several residual blocks."""
    return [Residual(*widths) for _ in range(number)]


def toy() -> Pair:
    """A curve in the plane: four residual blocks and a linear layer, and the mirror."""
    blocks = (4, 2, 256, 256, 2)
    encoder = nn.Sequential(*residuals(*blocks), nn.Linear(2, 1))
    decoder = nn.Sequential(nn.Linear(1, 2), *residuals(*blocks))
    return Pair(encoder, decoder, (2,), 1)


def tabular() -> Pair:
    """A table of 43 columns: a perceptron and two residual blocks of the latents, mirrored."""
    blocks = (2, 21, 256, 256, 21)
    encoder = nn.Sequential(perceptron(43, 256, 256, 21), *residuals(*blocks))
    decoder = nn.Sequential(*residuals(*blocks), perceptron(21, 256, 256, 43))
    return Pair(encoder, decoder, (43,), 21)


def mlp() -> Pair:
    """Flattened images: perceptrons of three hidden layers."""
    hidden = (1024, 1024, 1024)
    return Pair(perceptron(784, *hidden, 16), perceptron(16, *hidden, 784), (784,), 16)


def convolutional() -> Pair:
    """Images of 28x28: strided convolutions and four residual blocks of the latents, mirrored."""
    blocks = (4, 16, 512, 512, 16)
    channels, kernels = (1, 32, 64, 128, 256), (4, 4, 4, 3)
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    # Sizes 28, 14, 7, 3, 2: only from 3 back to 7 the transposed convolution lacks a row.
    for (fan_in, fan_out), kernel, lacking in zip(
        pairwise(channels), kernels, (0, 0, 1, 0), strict=True
    ):
        down += [nn.Conv2d(fan_in, fan_out, kernel, 2, 1), nn.SiLU()]
        up = [nn.SiLU(), nn.ConvTranspose2d(fan_out, fan_in, kernel, 2, 1, lacking), *up]
    encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(1024, 16), *residuals(*blocks))
    decoder = nn.Sequential(
        *residuals(*blocks), nn.Linear(16, 1024), nn.Unflatten(1, (256, 2, 2)), *up
    )
    return Pair(encoder, decoder, (1, 28, 28), 16)


def package() -> Pair:
    """This package's convolutional pair, with group normalisation."""
    return Pair(*nfi.nets.conv_autoencoder((1, 28, 28), 16), (1, 28, 28), 16)


MODELS = {
    "toy": Model(toy, 128, "toy, 2 to 1"),
    "tabular": Model(tabular, 512, "tabular, 43 to 21"),
    "mlp": Model(mlp, 256, "perceptron, 784 to 16"),
    "conv": Model(convolutional, 128, "convolutional, 784 to 16"),
    "package": Model(package, 128, "`conv_autoencoder`, 784 to 16"),
}


def autoencoder_loss(pair: Pair) -> Loss:
    """The loss of a plain autoencoder with a normal prior, which has no volume term."""

    def loss(x: Tensor) -> Tensor:
        z = pair.encoder(x)
        return _reconstruction_and_prior(x, z, pair.decoder(z)).mean()

    return loss


def published_loss(pair: Pair, num_probes: int) -> Loss:
    r"""The loss of a free-form injective flow by the algorithm as it was published.

    Every probe decodes again, under dual numbers with gradients enabled, so that the tangent is
    recorded before it is detached, and takes a reverse-mode product of its own through the
    encoder.

    References:
        Sorrenson et al., Lifting architectural constraints of injective flows, arXiv 2306.01843;
        written from the description.
    """

    def loss(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        z = pair.encoder(x)
        volume = x.new_zeros(len(x))
        for probe in draw_probes("orthonormal", num_probes, z):
            with forward_ad.dual_level():
                dual = pair.decoder(forward_ad.make_dual(z, probe))
                reconstruction, pushed = forward_ad.unpack_dual(dual)
            (pulled,) = torch.autograd.grad(z, x, probe, create_graph=True)
            volume = volume - (pulled * pushed.detach()).flatten(1).sum(1) / num_probes
        return (_reconstruction_and_prior(x, z, reconstruction) + volume).mean()

    return loss


def package_loss(pair: Pair, num_probes: int, compiled: bool = False) -> Loss:
    """The loss of a free-form injective flow by this package, with all its checks."""
    # Only where asked for, so that the eager step is the one without the option.
    options = {"compile": True} if compiled else {}
    base = nf.distributions.DiagGaussian(pair.latent_dim, trainable=False)
    # With the shapes, so that they are checked as for networks that declare theirs.
    injection = nfi.flows.FreeFormInjection(
        pair.encoder, pair.decoder, (pair.latent_dim,), pair.data_shape
    )
    likelihood = nfi.SurrogateLikelihood(BETA, num_probes, **options)
    like = next(pair.parameters())
    model = nfi.InjectiveNormalizingFlow(base.to(like), [injection], likelihood.to(like))
    return model.forward_kld


def gradients(loss: Loss, pair: Pair, x: Tensor) -> Tensor:
    """Gradients of all parameters in one vector."""
    parts = torch.autograd.grad(loss(x), list(pair.parameters()))
    return torch.cat([part.flatten() for part in parts])


def gradient_difference(model: Model, num_probes: int, seed: int, samples: int = 8) -> float:
    """How far the package's gradient is from the published algorithm's, for equal probes.

    In float64, and relative to the part of the gradient that is the volume's: the reconstruction
    error's is larger by orders of magnitude, and trivially equal.
    """
    torch.manual_seed(seed)
    pair = model.build().to(torch.float64)
    x = torch.randn(samples, *pair.data_shape, dtype=torch.float64)
    without = gradients(autoencoder_loss(pair), pair, x)
    both = []
    for loss in (published_loss(pair, num_probes), package_loss(pair, num_probes)):
        # Both draw nothing but their probes, and in the same way.
        torch.manual_seed(seed)
        both.append(gradients(loss, pair, x))
    published, ours = both
    return ((ours - published).norm() / (published - without).norm()).item()


def _reconstruction_and_prior(x: Tensor, z: Tensor, reconstruction: Tensor) -> Tensor:
    """Terms of the loss per sample (B,), the prior's without its constant."""
    error = (x - reconstruction).flatten(1).square().sum(1)
    return BETA * error + z.flatten(1).square().sum(1) / 2
