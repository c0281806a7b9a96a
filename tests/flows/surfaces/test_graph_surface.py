"""Graphs of functions as surfaces."""

from __future__ import annotations

import math

import normflows as nf
import numpy as np
import pytest
import torch
from support.comparison import close
from support.dense import dense_log_volume, numerical_jacobian
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Normal

from normflows_injective.errors import (
    NonFiniteError,
    OffManifoldError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
)
from normflows_injective.flows.surfaces.graph_surface import GraphSurface
from normflows_injective.nets import SmoothMLP

# --- graphs -------------------------------------------------------------------------------------


DOUBLE = torch.float64


class Heights(nn.Module):
    """A function of coordinates and, if built for it, of a context."""

    def __init__(self, dim, column=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, 1))
        self.column = column

    def forward(self, z):
        height = self.layers(z)
        return height if self.column else height[:, 0]


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("column", [False, True])
def test_graph_volume_is_that_of_the_dense_jacobian(dim, column):
    surface = GraphSurface(Heights(dim, column)).double()
    z = torch.randn(3, dim, dtype=DOUBLE)
    x, log_volume = surface(z)
    close(log_volume, dense_log_volume(lambda s: surface(s)[0], z), 1e-9)
    close(x, surface.decode(z), 0)
    back, log_det = surface.inverse(x)
    close(back, z, 0)
    close(log_det, -log_volume, 0)
    assert float(log_volume.detach().min()) > 1e-6
    lebesgue = GraphSurface(surface.f, measure="lebesgue")
    assert torch.equal(lebesgue(z)[1], torch.zeros(3, dtype=DOUBLE))
    assert torch.equal(lebesgue.inverse(x)[1], torch.zeros(3, dtype=DOUBLE))


def test_area_of_a_paraboloid_over_a_disc():
    surface = GraphSurface(lambda z: z.square().sum(1))
    nodes, weights = np.polynomial.legendre.leggauss(30)
    radii = torch.as_tensor(0.75 * (nodes + 1))
    weights = torch.as_tensor(0.75 * weights)
    # The integrand is a function of the radius; one angle serves.
    z = radii[:, None] * torch.tensor([[0.6, 0.8]], dtype=DOUBLE)
    area = 2 * math.pi * (weights * radii * surface(z)[1].exp()).sum()
    close(area, math.pi / 6 * ((1 + 4 * 1.5**2) ** 1.5 - 1), 1e-10)


@pytest.mark.slow
def test_graph_gradients_by_points_and_by_parameters():
    surface = GraphSurface(Heights(2)).double()
    z = torch.randn(2, 2, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(surface, (z,), check_forward_ad=True)
    assert gradgradcheck(surface, (z,))
    name, weight = next(iter(surface.named_parameters()))

    def by_parameter(value):
        return torch.func.functional_call(surface, {name: value}, (z.detach(),))

    assert gradcheck(by_parameter, (weight.detach().clone().requires_grad_(),))
    x = surface(z)[0].detach()
    surface.inverse(x)[1].sum().backward()
    assert all(p.grad is not None for p in list(surface.parameters())[:-1])


def test_graph_tangents_in_bulk():
    surface = GraphSurface(Heights(2)).double()
    z = torch.randn(3, 2, dtype=DOUBLE)
    directions = torch.eye(2, dtype=DOUBLE)[:, None].expand(2, 3, 2)
    points, log_volumes = torch.func.vmap(lambda v: torch.func.jvp(surface, (z,), (v,))[1])(
        directions
    )
    close(points.permute(1, 2, 0), numerical_jacobian(lambda s: surface(s)[0], z), 1e-7)
    expected = numerical_jacobian(lambda s: surface(s)[1][:, None], z)
    close(log_volumes.T, expected[:, 0], 1e-7)


def test_graph_without_gradients():
    surface = GraphSurface(Heights(2)).double()
    z = torch.randn(3, 2, dtype=DOUBLE)
    x, log_volume = surface(z)
    with torch.no_grad():
        without = surface(z)
        assert not without[1].requires_grad
        close(without[1], log_volume.detach(), 0)
    with torch.inference_mode():
        assert torch.equal(surface(z.clone())[1], log_volume)
        assert torch.equal(surface.inverse(x.clone())[1], -log_volume)


def test_graph_takes_a_context_where_its_function_does():
    surface = GraphSurface(SmoothMLP(2, 1, (4,), context_dim=3)).double()
    assert surface.takes_context
    assert surface.needs_context
    assert (surface.latent_shape, surface.data_shape) == ((2,), (3,))
    z, context = torch.randn(4, 2, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    x, log_volume = surface(z, context)
    for row in range(4):
        alone = surface(z[row : row + 1], context[row : row + 1])
        close(alone[0][0], x[row], 1e-12)
        close(alone[1][0], log_volume[row], 1e-12)
    close(surface.inverse(x.detach(), context)[1], -log_volume, 1e-12)
    assert not torch.allclose(surface(z, context + 1)[1], log_volume)
    assert not GraphSurface(Heights(2)).takes_context


def test_points_off_the_graph_are_refused_or_moved():
    x = torch.tensor([[1.0, 1.0], [2.0, 4.0003], [3.0, 8.0], [0.0, 0.5]], dtype=DOUBLE)
    message = (
        r"x has 2 of 4 rows off the graph, the worst at index 2 with last coordinate 8 where f is "
        r"9, and 0\.0001 \* \(1 \+ \|f\|\) is allowed\. Replace the last coordinate by f, or "
        r"build with off_manifold='project', which does\."
    )
    with pytest.raises(OffManifoldError, match=message):
        GraphSurface(lambda z: z[:, 0].square()).inverse(x)
    z, log_det = GraphSurface(lambda z: z[:, 0].square(), "project").inverse(x)
    close(z, x[:, :1], 0)
    close(log_det, -0.5 * (4 * x[:, 0].square()).log1p(), 1e-12)
    with pytest.raises(NonFiniteError, match="the last coordinate of x has 1 of 1"):
        GraphSurface(lambda z: z[:, 0]).inverse(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(NonFiniteError, match=r"f\(z\) has 1 of 1 .* Look at f"):
        GraphSurface(lambda z: z[:, 0].log()).inverse(torch.tensor([[-1.0, 0.0]]))


def test_graph_refuses_wrong_shapes_and_options():
    message = r"f must map z of shape \(3, 2\) to heights of shape \(3,\) or \(3, 1\), .* \(3, 2\)"
    with pytest.raises(ShapeError, match=message):
        GraphSurface(lambda z: z)(torch.zeros(3, 2))
    with pytest.raises(ShapeError, match=r"z must have shape \(B, D - 1\), got \(3,\)"):
        GraphSurface(Heights(2))(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"x must have shape \(B, D\), D >= 2, got \(3, 1\)"):
        GraphSurface(Heights(2)).inverse(torch.zeros(3, 1))
    with pytest.raises(ShapeError, match=r"z must have shape \(B, 2\), got \(3, 4\)"):
        GraphSurface(SmoothMLP(2, 1, (4,)))(torch.zeros(3, 4))
    with pytest.raises(OptionError, match="measure must be one of hausdorff, lebesgue"):
        GraphSurface(Heights(2), measure="cone")
    with pytest.raises(OptionError, match="off_manifold must be one of"):
        GraphSurface(Heights(2), "ignore")
    coupled = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    with pytest.raises(UnsupportedLayerError, match="couples the samples of a batch"):
        GraphSurface(coupled)(torch.randn(3, 2))


def test_graph_in_a_host_model():
    surface = GraphSurface(lambda z: z.square().sum(1))
    base = nf.distributions.DiagGaussian(2, trainable=False)
    model = nf.NormalizingFlow(base, [surface]).double()
    z = torch.randn(4, 2, dtype=DOUBLE)
    x = torch.cat([z, z.square().sum(1, keepdim=True)], dim=1)
    expected = Normal(0.0, 1.0).log_prob(z).sum(1) - 0.5 * (1 + 4 * z.square().sum(1)).log()
    close(model.log_prob(x), expected, 1e-12)
    assert "measure='hausdorff'" in repr(model)
