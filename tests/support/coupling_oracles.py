"""Transforms of an element, and bijections against dense Jacobians."""

from __future__ import annotations

import torch

from normflows_injective.flows.coupling import (
    Additive,
    Affine,
    CentredAffine,
    ElementTransform,
    Spline,
)
from support.comparison import close
from support.dense import dense_jacobian


class SinhArcsinh(ElementTransform):
    """A transform as a user writes one, z = sinh(e^a arcsinh x + t)."""

    num_parameters = 2

    def inverse(self, x, parameters):
        log_scale, shift = parameters.unbind(-1)
        u = log_scale.exp() * x.asinh() + shift
        slopes = log_scale + u.cosh().log() - 0.5 * (1 + x.square()).log()
        return u.sinh(), slopes.sum(-1)

    def forward(self, z, parameters):
        log_scale, shift = parameters.unbind(-1)
        x = ((z.asinh() - shift) * (-log_scale).exp()).sinh()
        return x, -self.inverse(x, parameters)[1]


TRANSFORMS = {
    "additive": Additive,
    "affine": Affine,
    "affine_unbounded": lambda: Affine(None),
    "centred": CentredAffine,
    "spline": Spline,
    "spline_short": lambda: Spline(3, 1.5),
    "user_written": SinhArcsinh,
}


def assert_bijection(layer, x, context=None):
    """Round trip, and both log-dets against the dense Jacobian."""
    z, log_det = layer.inverse(x, context)
    back, log_det_back = layer(z, context)
    close(back, x, 1e-9)
    close(log_det_back, -log_det, 1e-9)
    assert log_det.shape == (len(x),)
    rows = [None] * len(x) if context is None else context.unsqueeze(1)
    jacobians = torch.cat(
        [
            dense_jacobian(lambda s, row=row: layer.inverse(s, row)[0], point.unsqueeze(0))
            for point, row in zip(x, rows, strict=True)
        ]
    )
    close(log_det, torch.linalg.slogdet(jacobians)[1], 1e-9)
    return jacobians.detach()


def with_weights(coupling, scale=0.1):
    """A coupling in float64 with random weights, so that it is not the identity."""
    coupling = coupling.double()
    coupling.conditioner.weights.data.normal_().mul_(scale)
    return coupling
