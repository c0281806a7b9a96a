"""What a method gets, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import normflows_injective as nfi

from .data import Split
from .matching import MatchingLaw
from .phases import PhaseReport

__all__ = ["Fitted", "Job", "Method", "Networks", "median_seconds"]


class Networks(NamedTuple):
    """Shapes of the networks of all methods, whose data are vectors also for images.

    Attributes:
        data_dim: D.
        latent_dim: d.
        image_shape: Channels, height and width, or None for perceptrons.
    """

    data_dim: int
    latent_dim: int
    image_shape: tuple[int, int, int] | None = None

    def pair(self, seed: int) -> nfi.nets.Autoencoder:
        """Encoder and decoder, whose weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._build(self.latent_dim)

    def pair_with_scales(self, seed: int) -> nfi.nets.Autoencoder:
        """The same pair with an encoder that also gives d log-scales."""
        plain = self.pair(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wide = self._build(2 * self.latent_dim)
        with torch.no_grad():
            for weight, known in zip(
                wide.encoder.parameters(), plain.encoder.parameters(), strict=True
            ):
                weight[: len(known)] = known
        return nfi.nets.Autoencoder(wide.encoder, plain.decoder)

    def _build(self, num_outputs: int) -> nfi.nets.Autoencoder:
        if self.image_shape is None:
            return nfi.nets.Autoencoder(
                nfi.nets.SmoothMLP(self.data_dim, num_outputs),
                nfi.nets.SmoothMLP(self.latent_dim, self.data_dim),
            )
        return nfi.nets.Autoencoder(
            nn.Sequential(
                nn.Unflatten(1, self.image_shape),
                nfi.nets.ConvEncoder(self.image_shape, num_outputs),
            ),
            nn.Sequential(nfi.nets.ConvDecoder(self.image_shape, self.latent_dim), nn.Flatten()),
        )


class Job(NamedTuple):
    """One training of one method.

    Attributes:
        split: The rows; a method looks at the training and the validation rows.
        networks: Shapes of encoder and decoder.
        seconds: Processor time of all phases together.
        seed: Of the initial weights and of the order of the batches.
    """

    split: Split
    networks: Networks
    seconds: float
    seed: int

    @property
    def latent_dim(self) -> int:
        """Number of latent dimensions."""
        return self.networks.latent_dim


class Fitted(NamedTuple):
    """A trained model.

    Attributes:
        model: Density, projections and samples on the manifold.
        phases: Reports of its training; none if nothing is trained.
        sample_data: Number of samples to samples (n, D) with noise around the manifold, if the
            method has one; they are compared with the data.
        matching: The law of the scaled codes, if it is one that can be sampled without density.
    """

    model: nfi.InjectiveNormalizingFlow
    phases: list[PhaseReport]
    sample_data: Callable[[int], Tensor] | None = None
    matching: MatchingLaw | None = None

    def sample(self, num_samples: int, steps: int | None = None) -> Tensor:
        """Samples (n, D) on the manifold; ``steps`` are those of a matching law."""
        if self.matching is None:
            samples, _ = self.model.sample(num_samples, log_prob=False)
            return samples
        z = self.matching.draw(num_samples, steps)
        return self.model(z)


class Method(NamedTuple):
    """A row of the tables: its title, and the training."""

    title: str
    fit: Callable[[Job], Fitted]


def median_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Processor time of a call, the median of several after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return sorted(seconds)[repeats // 2]
