"""Injective flows as distributions of Pyro, with options for volumes and values off them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import constraints

from ...checks import checks_arguments
from ...diagnostics.gradient_agreement import SurrogateBias, measure_bias, refuse_closed_form
from ...errors import OptionError, ShapeError
from ...flows.stack import joint_decode
from ...host.bases import base_log_prob, sample_base
from ...host.context import context_rows
from ...host.copies import on_trial
from ...models.injective import InjectiveNormalizingFlow
from ...models.noise_width import collapse_ratio, warn_of_collapse, warn_once_of_collapse
from ...models.parts import model_dtype
from ...models.volume_rules import ExactVolume, VolumeRule, volume_rule
from ...modules.random_numbers import OwnRandomNumbers
from .model_distribution import ModelDistribution
from .off_manifold import NoiseScale, Projected, Thicken, policy


@final
class InjectiveDistribution(ModelDistribution):
    r"""A flow on a learned manifold as a Pyro distribution, for scoring and small-noise training.

    .. math:: \log p(\hat x) = \log q_0(z) - \tfrac12 \log\det G'(z)^\top G'(z), \quad
              z = F(x),\ \hat x = G(z)

    in nats against the manifold's own measure, at the projection :math:`\hat x` of a value.
    ``off_manifold`` chooses the density of a value off the manifold:

    * ``"reject"``: it has no density. With validation ``OffManifoldError`` says how far off it is,
      without validation the density is zero.
    * ``"project"``: it has the density of its projection. Read it with the reconstruction error.
    * ``"thicken"``: Gaussian noise of scale :math:`\sigma` surrounds the manifold, and is added to
      draws. The density, now against the volume of :math:`\mathbb R^D`, is

      .. math:: \log p(\hat x) - \frac{\lVert x - \hat x \rVert^2}{2\sigma^2}
                - \frac{D - d}{2} \log 2\pi\sigma^2,

      the limit of the convolution for an encoder that projects and noise that is small beside the
      singular values of :math:`G'`: it is not normalised far from the manifold. Only such scores
      of *different* manifolds are comparable, and only they can train a manifold: other scores
      shrink it to a point.

    Exact gradients shrink a manifold in wide noise to a point. Start with a noise scale well below
    the spread of the data along the manifold: there is one ``CollapseWarning`` for a model, on the
    first batch of at least max(10, 4 d) values that is scored with exact gradients, if the scale
    is above a quarter of the standard deviation along principal direction d. The encoder surrogate
    has no such limit, nor has a variational autoencoder, z ~ Normal, x ~ Normal(G(z), sigma),
    whose networks can be scored here when they are trained.

    Draws of this object are scored without the encoder. Values of known surfaces are scored
    exactly, but :class:`FlowDistribution` has better supports for those.

    Args:
        model: ``nfi.InjectiveNormalizingFlow``. Bare networks become one by
            ``nfi.flows.FreeFormInjection(encoder, decoder)`` and a base.
        volume: Gradient of the log-volume, whose value is always exact: ``"exact"``, by d
            Jacobian-vector products; ``"surrogate"``, by the surrogate of the model's likelihood,
            for large d, never for draws of this object, see :meth:`surrogate_bias`; ``"auto"``,
            exact for :math:`d \le 16`, known surfaces and draws.
        off_manifold: ``"reject"``, ``"project"`` or ``"thicken"``.
        noise_scale: :math:`\sigma > 0` of ``"thicken"``, in units of the data: a number, a tensor
            of one element, or a callable, such as a module, that returns one. It may be trained.
        tol: Distance from the reconstruction, over 1 + |x|, up to which ``"reject"`` takes values.
        context: Of shape (*batch_shape, C).
        validate_args: As in torch.

    Raises:
        OptionError: If an option is unknown, out of range, or does not fit another.
        ShapeError: If the noise scale is not one number.
        ContextError: If a context is missing or superfluous.
        UnsupportedModelError: When ``volume="surrogate"`` is to score a draw of this object.
        NotInjectiveError: When a surrogate meets an encoder without a derivative.

    References:
        Free-form injective flows, arXiv 2306.01843.

    Examples:
        >>> import normflows as nf
        >>> import pyro
        >>> import normflows_injective as nfi
        >>> flow = nfi.InjectiveNormalizingFlow(
        ...     nf.distributions.DiagGaussian(2),
        ...     [nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(5, 2, (8,)))],
        ... )
        >>> def model(data):
        ...     pyro.module("flow", flow)
        ...     law = InjectiveDistribution(flow, off_manifold="thicken", noise_scale=0.05)
        ...     with pyro.plate("data", len(data)):
        ...         return pyro.sample("x", law, obs=data)
        >>> model(torch.randn(7, 5)).shape
        torch.Size([7, 5])
    """

    def __init__(
        self,
        model: InjectiveNormalizingFlow,
        volume: str = "auto",
        off_manifold: str = "reject",
        noise_scale: NoiseScale | None = None,
        tol: float = 1e-3,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(model, InjectiveNormalizingFlow):
            raise OptionError(
                "model must be an nfi.InjectiveNormalizingFlow, got "
                f"{type(model).__name__}. Put encoder and decoder into "
                "nfi.flows.FreeFormInjection, and that with a base into one; other models go into "
                "FlowDistribution."
            )
        super().__init__(model, None, context, validate_args)
        self._rule = volume_rule(volume, self.stack, self.latent_dim, model.likelihood)
        self._policy = policy(off_manifold, noise_scale, tol, self.latent_dim)
        if self._thickens and super().measure != "hausdorff":
            raise OptionError(
                f"off_manifold='thicken' needs a density against the surface's own measure, but "
                f"the layers declare {super().measure!r}. Use measure='hausdorff'."
            )

    @property
    def support(self) -> constraints.Constraint:
        """The manifold, or real space."""
        return self._policy.support(self.stack, self.context, self.event_dim)

    @property
    def measure(self) -> str:
        """``"lebesgue"`` if thickened, else of the surface, ``"hausdorff"`` if learned."""
        return "lebesgue" if self._thickens else super().measure

    def draw(self, num_samples: int, context: Tensor | None) -> tuple[Tensor, Any]:
        """Draw values (n, *) with base variables that lead to them, and log-densities of these."""
        z, log_q = self.base_draws(num_samples, context)
        # The volume costs d times as much, and most draws are never scored.
        flows = self.stack.after_samples(z, context).flows
        x = joint_decode(flows, z.clone(), context)
        return self._policy.blur(x), (z, log_q)

    def score(self, x: Tensor, context: Tensor | None, drawn: Any) -> Tensor:
        """Log-density (B,) in nats of values (B, *)."""
        rule = self._rule if drawn is None else self._rule.for_draws()
        if drawn is not None and not self._thickens:
            z, log_q = drawn
            return log_q - self.stack.push(z, context)[1]
        trains = torch.is_grad_enabled() and self._trains()
        if isinstance(self._policy, Thicken) and rule.collapses and trains:
            warn_once_of_collapse(self.model, self._policy.scale(x), x, self.latent_dim)
        return self._policy.log_density(partial(self._projected, rule), self.stack, x, context)

    @checks_arguments
    def log_volume(self, x: Tensor) -> Tensor:
        r"""Exact log-volume of the map from base to data, at the projections of values.

        Args:
            x: Values (*, *event_shape), on the manifold or not.

        Returns:
            :math:`\tfrac12 \log\det G'^\top G'` of shape (*), in nats.

        Raises:
            ShapeError: If these are no events of the model's shape.
        """
        rows, context, shape = self._rows(x)
        stack = self.stack.after_data(rows, context)
        return ExactVolume().project(stack, rows, context).log_volume.view(shape)

    @checks_arguments
    def surrogate_bias(self, n: int = 100, x: Tensor | None = None) -> SurrogateBias:
        r"""Compare the expected gradients of surrogates with exact ones.

        A surrogate is unbiased if the encoder's Jacobian is the Moore-Penrose inverse of the
        decoder's. An encoder that was trained on the manifold alone, or on its own draws, inverts
        the decoder, but has another Jacobian: train it on data with noise in all directions
        (``input_noise``).

        Args:
            n: Least number of draws to compare on; the random state is left as it is.
            x: Values (*, *event_shape) to compare on instead.

        Returns:
            :class:`SurrogateBias` ``(decoder, encoder)``, for the surrogates with the
            stop-gradient on either side, each with ``relative_error`` and ``cosine``; an error of
            0 means no bias, one of 1 means that the gradient says nothing.

        Raises:
            UnsupportedModelError: If the layers are charts of known surfaces.
        """
        refuse_closed_form(self.stack)
        if x is None:
            shape = (math.ceil(n / max(1, self.batch_shape.numel())), *self.batch_shape)
            context = context_rows(self.context, shape)
            q0, stack = on_trial([self.model.q0, self.stack])
            dtype = model_dtype(self.model.q0, self.model.flows)
            with OwnRandomNumbers(), torch.no_grad():
                z, _ = sample_base(q0, math.prod(shape), context, dtype)
                rows = joint_decode(stack.flows, z, context)
        else:
            rows, context, _ = self._rows(x)
        return measure_bias(self.stack, rows, context)

    @checks_arguments
    def check_collapse(self, x: Tensor) -> float:
        """Compare the noise scale with the spread of data along the manifold.

        Args:
            x: Data (*, *event_shape), at least max(10, 4 d) of them.

        Returns:
            The noise scale over the standard deviation along principal direction d. Trained by
            exact gradients, a direction is lost above 1/2, and easily above 1/4.

        Raises:
            OptionError: If there is no noise.
            ShapeError: If there are too few data.

        Warns:
            CollapseWarning: If the ratio is above 1/4 and gradients are exact.
        """
        if not isinstance(self._policy, Thicken):
            raise OptionError("There is no noise to compare: use off_manifold='thicken'.")
        rows = self._rows(x)[0]
        ratio = collapse_ratio(self._policy.scale(rows), rows, self.latent_dim)
        if self._rule.collapses:
            warn_of_collapse(ratio, self.latent_dim)
        return ratio

    @property
    def _thickens(self) -> bool:
        return isinstance(self._policy, Thicken)

    def _projected(self, rule: VolumeRule, x: Tensor, context: Tensor | None) -> Projected:
        stack = self.stack.after_data(x, context)
        z, reconstruction, log_volume = rule.project(stack, x, context)
        log_density = base_log_prob(self.model.q0, z, context) - log_volume
        return Projected(log_density, reconstruction)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor | None, torch.Size]:
        cut = x.dim() - self.event_dim
        if cut < 0 or x.shape[cut:] != self.event_shape:
            raise ShapeError(
                f"x must end in the event shape {tuple(self.event_shape)}, got {tuple(x.shape)}."
            )
        shape = x.shape[:cut]
        if self.context is not None:
            shape = torch.broadcast_shapes(shape, self.batch_shape)
        rows = x.expand(shape + self.event_shape).reshape(-1, *self.event_shape)
        return rows, context_rows(self.context, shape), shape
