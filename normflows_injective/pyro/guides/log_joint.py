r"""The log-joint density of a model over the unconstrained latents of a guide.

.. math:: \ell(\theta) = \log p(x, t(\theta)) + \log \lvert \det t'(\theta) \rvert

with :math:`t` the transforms to the supports of the sites, which guide and objective take as well.
"""

from __future__ import annotations

from typing import Any, final

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from ...flows.guides.curvature import hessian_products
from ...modules.random_numbers import OwnRandomNumbers

# Step of the finite differences, in units of the latents, and numbers of directions.
_STEP = 1e-2
_ALONG_AXES, _RANDOM = 32, 16
# Bounds of a scale that is read off a curvature. Away from the bulk of the posterior the curvature
# may be large along directions in which it is wide, and a narrow guide is slow to find that out.
_SMALLEST, _LARGEST = 0.1, 1.0


@final
class LogJoint:
    """The density of a guide's model with given arguments.

    Subsamples and noise are the same in every call, so that it is a function of the latents.

    Args:
        guide: A guide whose prototype is known.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model.
    """

    def __init__(
        self, guide: AutoContinuous, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._guide, self._args, self._kwargs = guide, args, kwargs

    def __call__(self, latent: Tensor) -> Tensor:
        """Log-density, 0-dimensional, of latents (D,), in nats."""
        values, total = {}, latent.new_zeros(())
        for site, coordinates in self._guide._unpack_latent(latent):
            transform = biject_to(site["fn"].support)
            value = transform(coordinates)
            total = total + transform.log_abs_det_jacobian(coordinates, value).sum()
            values[site["name"]] = value
        # Handlers around the call must not see the sites.
        with poutine.block(), OwnRandomNumbers():
            model = poutine.trace(poutine.condition(self._guide.model, data=values))
            trace = model.get_trace(*self._args, **self._kwargs)
            # Not by the sum of the trace, which warns of values that are not finite.
            for site in trace.nodes.values():
                law: Any = site.get("fn")
                if site["type"] == "sample" and type(law).__name__ != "_Subsample":
                    log_prob = law.log_prob(site["value"], *site["args"], **site["kwargs"])
                    weighed = scale_and_mask(log_prob, site["scale"], site["mask"])
                    total = total + weighed.sum()
        return total

    def gradient(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density, 0-dimensional, and its gradient (D,)."""
        with torch.enable_grad():
            at = latent.detach().requires_grad_()
            value = self(at)
            (gradient,) = torch.autograd.grad(value, at)
        return value.detach(), gradient

    def scales(self, latent: Tensor) -> Tensor | None:
        r"""Scales :math:`1 / \sqrt{\lvert \ell''_{ii} \rvert}` (D,) at latents, or None.

        Second derivatives are finite differences of gradients, along every axis or, for many
        latents, along random signs :math:`v`: :math:`\operatorname{E} v \odot \ell'' v` is the
        diagonal. There are none where the density cannot be differentiated.
        """
        dim = len(latent)
        if dim <= _ALONG_AXES:
            directions = torch.eye(dim, dtype=latent.dtype, device=latent.device)
        else:
            generator = torch.Generator().manual_seed(0)
            signs = 2.0 * torch.randint(2, (_RANDOM, dim), generator=generator) - 1
            directions = signs.to(latent)
        try:
            products = hessian_products(lambda at: self.gradient(at)[1], latent, directions, _STEP)
        except (RuntimeError, ValueError, NotImplementedError):
            return None
        entries = directions * products
        curvature = entries.sum(0) if dim <= _ALONG_AXES else entries.mean(0)
        if not bool(curvature.isfinite().all()):
            return None
        return curvature.abs().rsqrt().clamp(_SMALLEST, _LARGEST)
