"""The contract of every law of the package."""

from __future__ import annotations

import normflows as nf
import pytest
import torch

import normflows_injective as nfi
from normflows_injective.testing import LAW_CHECKS, LawCase, check_law

DIRECTION = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64) / 3
LAWS = {
    "diag_gaussian": lambda: nf.distributions.DiagGaussian(3),
    "uniform_sphere": lambda: nfi.distributions.UniformSphere(3),
    "angular": lambda: nfi.distributions.AngularCentralGaussian(torch.eye(3)),
    "von_mises_fisher": lambda: nfi.distributions.VonMisesFisher(DIRECTION, 2.0),
    "power_spherical": lambda: nfi.distributions.PowerSpherical(DIRECTION, 2.0),
    "uniform_torus": lambda: nfi.distributions.UniformTorus(3),
    "von_mises": lambda: nfi.distributions.VonMises(DIRECTION, 2.0),
    "wrapped_normal": lambda: nfi.distributions.WrappedNormal(DIRECTION, 2.0),
    "uniform_rotation": lambda: nfi.distributions.UniformRotation(),
    "uniform_rotation_matrix": lambda: nfi.distributions.UniformRotation("matrix"),
    "matrix_fisher": lambda: nfi.distributions.MatrixFisher(torch.diag(DIRECTION), form="matrix"),
    "bingham": lambda: nfi.distributions.MatrixFisher(torch.eye(4)),
    "isotropic_rotation": lambda: nfi.distributions.IsotropicGaussianRotation(0.5),
    "uniform_on_surface": lambda: nfi.distributions.UniformOnSurface(
        nfi.flows.gauges.LpGauge(1.0), dim=3
    ),
    "product": lambda: nfi.distributions.ProductLaw(
        [nfi.distributions.UniformTorus(1), nfi.distributions.UniformSphere(3)]
    ),
    "pullback": lambda: nfi.distributions.Pullback(
        nfi.distributions.UniformSphere(3), nfi.flows.SphereChart(3)
    ),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("check", LAW_CHECKS, ids=lambda check: check.__name__)
def test_contract(name, check):
    check(LawCase(LAWS[name]().double()))


MOVING = [name for name in LAWS if getattr(LAWS[name](), "has_rsample", False)]


@pytest.mark.parametrize("name", MOVING)
def test_draws_that_move_have_the_density_of_the_law_and_reach_every_parameter(name):
    law = LAWS[name]().double()
    for buffer, value in list(law.named_buffers()):
        if value.numel():  # as if it had been built to be trained
            delattr(law, buffer)
            law.register_parameter(buffer, torch.nn.Parameter(value))
    x, log_p = law.rsample(5)
    torch.testing.assert_close(log_p, law.log_prob(x))
    parameters = list(law.parameters())
    if parameters:
        grads = torch.autograd.grad(x.sin().sum(), parameters)
        assert all((g != 0).any() for g in grads)
    assert bool(parameters) == (not name.startswith("uniform"))


class Mistaken(nfi.distributions.UniformSphere):
    """A law whose density is that of another one."""

    def log_prob(self, x):
        return super().log_prob(x) + x[:, 0]


def test_a_broken_contract_is_found():
    with pytest.raises(AssertionError, match="log_prob of samples is the density of the draw"):
        check_law(Mistaken(3))
