"""A density on a surface, seen in a chart."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from ..checks import describe
from ..errors import OptionError
from ..flows.injection import Injection
from ..host.context import context_arguments, needs_context, takes_context
from .law import Law


@final
class Pullback(Law):
    r"""The law of the coordinates of a point drawn from a law on a surface.

    .. math:: \log q(z) = \log p(\varphi(z)) + \tfrac12 \log\det \varphi'(z)^\top \varphi'(z)

    As the base of a model that ends in the same chart, it makes a fresh model equal to this law:
    with ``Pullback(UniformSphere(D), SphereChart(D))`` training starts at the uniform law.

    Args:
        distribution: Law :math:`p` on the surface, with ``forward(num_samples)`` and ``log_prob``.
        chart: :math:`\varphi`, an exact chart of that surface, of the same measure.

    Raises:
        OptionError: If law and chart are of different measures.

    References:
        Change of variables.

    Examples:
        >>> import torch
        >>> from normflows_injective.distributions import UniformSphere
        >>> from normflows_injective.flows import SphereChart
        >>> base = Pullback(UniformSphere(3), SphereChart(3))
        >>> base.log_prob(torch.zeros(1, 2)).exp()  # Student's t_2 at 0, over 2 pi
        tensor([0.0563])
    """

    def __init__(self, distribution: Any, chart: Injection) -> None:
        super().__init__()
        if not (callable(distribution) and hasattr(distribution, "log_prob")):
            raise OptionError(
                "distribution must have log_prob and draw samples when it is called, got "
                f"{describe(distribution)}. Give a law of nfi.distributions or of normflows."
            )
        measures = getattr(distribution, "measure", None), getattr(chart, "measure", None)
        if None not in measures and measures[0] != measures[1]:
            raise OptionError(
                f"The law is against the measure {measures[0]!r} and the chart against "
                f"{measures[1]!r}. Build both with the same measure=."
            )
        self.distribution, self.chart = distribution, chart
        if chart.latent_shape is not None:
            self.shape = chart.latent_shape
        self.takes_context = takes_context(distribution) or chart.takes_context
        self.needs_context = needs_context(distribution) or chart.needs_context

    def forward(
        self, num_samples: int = 1, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw coordinates (n, d) with their log-density (n,) in nats."""
        x, log_p = self.distribution(num_samples, **context_arguments(self.distribution, context))
        z, log_det = self.chart.inverse(x, context)
        return z, log_p - log_det

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density (B,) in nats of coordinates (B, d)."""
        x, log_volume = self.chart(z, context)
        scored = self.distribution.log_prob(
            x, **context_arguments(self.distribution, context, "log_prob")
        )
        return scored + log_volume
