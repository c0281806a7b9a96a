"""Models and guides on curved sheets, and their training."""

from __future__ import annotations

import normflows as nf
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

NOISES = ["mvn", "diagonal", "low_rank"]


def normals(dim=5):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    return model


def mixed_sites():
    """Sites of different shapes and supports, one of whose charts lowers the dimension."""
    location = pyro.sample("location", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 2):
        inner = pyro.sample("inner", dist.Normal(0.0, 1.0))
    mean = location.sum((-1, -2)) * weights[..., 0] + inner.sum(-1)
    pyro.sample("y", dist.Normal(mean, scale), obs=torch.tensor(0.5))


def train(guide, model, steps=1, elbo=None, lr=0.01, decay=1.0):
    """Steps of Adam, whose step size ends at a fraction of the first."""
    optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": decay ** (1 / steps)})
    svi = SVI(model, guide, optimizer, elbo or Trace_ELBO())
    return [svi.step() for _ in range(steps)]


class Bend(nn.Module):
    """u -> (u, b u^2, sin(2 u) / 2)."""

    def __init__(self, bend):
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(bend))

    def forward(self, u):
        return torch.cat([u, self.bend * u**2, torch.sin(2 * u) / 2], dim=1)


def couplings(dim, count=3, width=16):
    shape = [dim - dim // 2, width, 2 * (dim // 2)]
    nets = [nf.nets.MLP(shape, init_zeros=True) for _ in range(count)]
    return [nf.flows.AffineCouplingBlock(net) for net in nets]
