r"""Guides whose entropy is differentiated along the path of the draw alone.

Let :math:`\theta = T_\phi(z)` be a draw of :math:`q_\phi`. The gradient of the entropy term is

.. math:: \nabla_\phi \log q_\phi(\theta) =
          \frac{\partial \log q_\phi(\theta)}{\partial \theta} \nabla_\phi T_\phi(z)
          + \frac{\partial \log q_\phi(\theta)}{\partial \phi}

Its second part, the score, has mean zero and is left out: what remains is unbiased, and with
:math:`\log p(\theta)` its terms cancel draw by draw where q is the posterior, so that the variance
vanishes there (Roeder, Wu and Duvenaud, arXiv 1703.09194). It takes the density of the draw by the
inverse of T with constant parameters.

Pyro asks a law for its ``score_parts``, and the objectives that are linear in :math:`\log q` take
their gradient from the ``entropy_term`` among them. Bounds with importance weights, where the
score has no mean zero, take ``log_prob``, whose gradient is complete.
"""

from __future__ import annotations

from typing import Any, final

import torch
from pyro.distributions import TransformedDistribution
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor


@final
class PathwiseFlow(TransformedDistribution):
    """The law of a base sent through one :class:`FlowTransform` that has an inverse."""

    def score_parts(self, value: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Log-density (*), no score, and the log-density by constant parameters."""
        (transform,) = self.transforms
        if not (torch.is_grad_enabled() and value.requires_grad and transform.has_drawn(value)):
            whole: ScoreParts = super().score_parts(value, *args, **kwargs)
            return whole
        drawn = transform.drawn_from(value)
        log_prob = self.log_prob(value) if drawn is None else self._of_base(*drawn)
        # Pyro leaves a score out that is this very number.
        no_score: Any = 0
        return ScoreParts(log_prob, no_score, self._of_base(*transform.pull_by_constants(value)))

    def _of_base(self, z: Tensor, log_det: Tensor) -> Tensor:
        """Log-density (*) of the values that latents z are sent to."""
        log_prob: Tensor = self.base_dist.log_prob(z) - log_det
        return log_prob
