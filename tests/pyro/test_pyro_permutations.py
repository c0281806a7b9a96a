"""What the permutations of AutoFlow reach."""

from __future__ import annotations

import normflows as nf
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from support.models import perturbed
from support.pyro_guides import couplings
from support.seeds import manual_seed

import normflows_injective.pyro as nfp

DIM = 4


def untouched(guide, dim, spread=1.0):
    """Coordinates that are still the base's, with the place behind the layers taken away."""
    layers = guide.transform.stack.flows[:-1]
    with torch.no_grad():
        for layer in layers:
            perturbed(layer, spread)
        z = torch.randn(5, dim)
        x = z
        for layer in layers:
            x = layer(x)[0]
    return sum(bool((x[:, i, None] == z).all(0).any()) for i in range(dim))


def normals(dim):
    return lambda: pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))


def masked(dim):
    """Couplings that change places by themselves."""
    mask = torch.arange(dim) % 2
    return [
        nf.flows.MaskedAffineFlow(b, nf.nets.MLP([dim, 4, dim]), nf.nets.MLP([dim, 4, dim]))
        for b in (mask.float(), 1.0 - mask, mask.float())
    ]


def with_scales(dim):
    layers = couplings(dim)
    return [layer for pair in zip(layers, map(scaling, [dim] * 3), strict=True) for layer in pair]


def scaling(dim):
    return nf.flows.AffineConstFlow((dim,), shift=False)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("factory", [couplings, masked])
def test_no_coordinate_is_left_alone(factory, dim):
    for seed in range(5):
        manual_seed(seed)
        assert untouched(nfp.AutoFlow(normals(dim), factory).build(), dim) == 0
        pyro.clear_param_store()


@pytest.mark.parametrize("dim", [2, 4, 5])
def test_elementwise_layers_between_couplings_do_not_undo_a_permutation(dim):
    guide = nfp.AutoFlow(normals(dim), with_scales).build()
    kinds = [type(layer).__name__ for layer in guide.transform.stack.flows]
    expected = ["AffineCouplingBlock", "AffineConstFlow", "Permute"] * 3
    assert kinds == [*expected[:-1], "TriangularPlace"]
    blocks = [
        f for f in guide.transform.stack.flows if not isinstance(f, nf.flows.AffineConstFlow)
    ]
    guide.transform.stack.flows = torch.nn.ModuleList([*blocks, scaling(dim)])
    assert untouched(guide, dim) == 0


@pytest.mark.parametrize("dim", [2, 4, 5, 6])
def test_without_permutations_the_first_half_is_left_alone(dim):
    guide = nfp.AutoFlow(normals(dim), couplings, permute=False).build()
    assert untouched(guide, dim) == dim - dim // 2
    linear = nfp.AutoFlow(
        normals(dim),
        lambda d: [couplings(d)[0], nf.flows.LULinearPermute(d), couplings(d)[0]],
    ).build()
    kinds = [type(layer).__name__ for layer in linear.transform.stack.flows]
    assert "Permute" not in kinds


@pytest.mark.slow
@pytest.mark.parametrize("permute", [True, False])
def test_training_moves_what_permutations_reach(permute):
    """A law of four skewed variables; what no coupling reaches keeps a normal marginal."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(DIM), 1.0).to_event(1).mask(False))
        pyro.factor("skewed", (x - x.exp()).sum(-1) - 0.5 * (x.sum(-1) - 1).square())

    guide = nfp.AutoFlow(model, couplings, permute=permute)
    loss = infer.Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss)
    for _ in range(20):
        svi.step()
    assert untouched(guide, DIM, spread=0.0) == (0 if permute else DIM // 2)
