"""Flows of patches in both directions, with dense Jacobians."""

from __future__ import annotations

import torch
from torch import nn

from normflows_injective.flows.mixer import ChannelMixing, PatchMixing
from support.comparison import close
from support.dense import dense_jacobian

SHIFTS = ["none", "roll", "interior"]
ELEMENTS = ["affine", "spline", "autoregressive"]
MIXINGS = [ChannelMixing, PatchMixing]


def moved(flows, size=0.1):
    """Layers off their special initial values, and warm; far off they are ill-conditioned."""
    for module in nn.ModuleList(flows).modules():
        for parameter in module.parameters(recurse=False):
            parameter.data += size * torch.randn_like(parameter)
        if hasattr(module, "data_dep_init_done"):
            module.data_dep_init_done.fill_(1.0)
    return flows


def to_latents(flows, x, context=None):
    total = x.new_zeros(len(x))
    for flow in reversed(flows):
        x, log_det = flow.inverse(x, context)
        assert log_det.shape == total.shape
        total = total + log_det
    return x, total


def to_data(flows, z, context=None):
    total = z.new_zeros(len(z))
    for flow in flows:
        z, log_det = flow(z, context)
        total = total + log_det
    return z, total


def log_det_of_jacobian(flows, x, context=None):
    rows = [None] * len(x) if context is None else context.unsqueeze(1)
    jacobians = [
        dense_jacobian(lambda s, row=row: to_latents(flows, s, row)[0], image.unsqueeze(0))
        for image, row in zip(x, rows, strict=True)
    ]
    return torch.linalg.slogdet(torch.cat(jacobians))[1]


def assert_bijection(flows, x, context=None):
    """Round trip, and both log-dets against the dense Jacobian."""
    z, log_det = to_latents(flows, x, context)
    back, log_det_back = to_data(flows, z, context)
    close(back, x, 1e-9)
    close(log_det_back, -log_det, 1e-9)
    close(log_det, log_det_of_jacobian(flows, x, context))
