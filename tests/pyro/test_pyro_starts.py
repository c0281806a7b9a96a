"""Where guides start, what keeps them from diverging, and the layers of their factories."""

from __future__ import annotations

import copy
import json
import math
import struct

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from support.comparison import close
from support.models import perturbed
from support.seeds import manual_seed, shifted

import normflows_injective.pyro as nfp
from normflows_injective import errors
from normflows_injective.flows.guides.places import DiagonalPlace, LowRankPlace, TriangularPlace

SCALES = torch.tensor([0.02, 0.3, 0.8])


def model():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 10.0).to_event(1))
    pyro.sample("y", dist.Normal(x, SCALES).to_event(1), obs=torch.zeros(3))


def steps(guide, count, rate=0.01, sample=model, **options):
    pyro.set_rng_seed(shifted(0))
    particles = {"num_particles": 16, "vectorize_particles": True, "max_plate_nesting": 0}
    svi = infer.SVI(
        sample, guide, pyro.optim.Adam({"lr": rate}), infer.Trace_ELBO(**(particles | options))
    )
    return [svi.step() for _ in range(count)]


# Scales.


def test_scales_are_those_of_the_curvature():
    guide = nfp.AutoFlow(model).build()
    scales = guide.transform.stack.flows[-1].log_scale.detach().exp()
    # No guide starts narrower than a tenth.
    expected = SCALES.clamp(min=0.1)
    torch.testing.assert_close(scales, expected, rtol=0.02, atol=0)
    # Sheet and noise have half of the variance each.
    guide = nfp.AutoInjective(model, 1).build()
    torch.testing.assert_close(guide.frame.scale.detach(), expected * 0.5**0.5, rtol=0.02, atol=0)


def test_many_latents_are_scaled_by_random_signs():
    scales = torch.logspace(-0.9, -0.2, 100)

    def many():
        x = pyro.sample("x", dist.Normal(torch.zeros(100), 10.0).to_event(1))
        pyro.sample("y", dist.Normal(x, scales).to_event(1), obs=torch.zeros(100))

    place = nfp.AutoFlow(many).build().transform.stack.flows[-1]
    # No coordinate hangs on another, so that signs cancel exactly.
    torch.testing.assert_close(place.log_scale.detach().exp(), scales, rtol=0.05, atol=0)


def test_a_density_without_a_slope_gets_a_plain_scale():
    def steep():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("zero", (x * 0).abs().sqrt().sum(-1))

    place = nfp.AutoFlow(steep).build().transform.stack.flows[-1]
    torch.testing.assert_close(place.log_scale.detach().exp(), torch.full((2,), 0.1))


def test_building_draws_nothing_for_the_scales():
    def noisy():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("noise", (x * torch.randn(2)).sum(-1))

    for scale in (None, 0.1):
        manual_seed(0)
        nfp.AutoFlow(noisy, nfp.flows.splines, init_scale=scale, permute=False).build()
        if scale is None:
            found = torch.rand(1)
    assert torch.equal(found, torch.rand(1))


# Divergence.


def cliff():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    # Rare draws have a gradient that is a million times the usual one.
    pyro.factor("cliff", -torch.relu(x[..., 0] - 2.5).pow(2) * 1e7)


def test_without_the_guard_a_rare_draw_decides():
    ends = {}
    for guard in (50.0, None):
        pyro.clear_param_store()
        manual_seed(0)
        guide = nfp.AutoFlow(cliff, guard=guard, init_scale=1.0)
        steps(guide, 60, 0.03, cliff)
        ends[guard] = float(guide.sample_posterior(2000)["x"][:, 1].std())
    assert ends[50.0] > 0.7


def test_where_nothing_explodes_the_guard_changes_nothing():
    def mild():
        pyro.sample("x", dist.Normal(torch.ones(3), torch.tensor([0.3, 0.8, 1.0])).to_event(1))

    ends = []
    for guard in (50.0, None):
        pyro.clear_param_store()
        manual_seed(0)
        guide = nfp.AutoFlow(mild, guard=guard)
        steps(guide, 20, sample=mild)
        ends.append([p.detach().clone() for p in guide.parameters()])
    for first, second in zip(*ends, strict=True):
        assert torch.equal(first, second)


def test_the_state_of_the_guard_is_saved_with_the_guide(tmp_path):
    guide = nfp.AutoFlow(model)
    steps(guide, 5)
    state = guide.state_dict()["_guard.state"]
    assert state[0] > 4
    nfp.save(guide, tmp_path / "guide")
    pyro.clear_param_store()
    other = nfp.AutoFlow(model, guard=20.0).build()
    with pytest.warns(errors.CheckpointWarning, match="'factor'"):
        nfp.load(other, tmp_path / "guide")
    assert torch.equal(other.state_dict()["_guard.state"], state)
    assert torch.equal(copy.deepcopy(other).state_dict()["_guard.state"], state)
    assert "_guard.state" not in nfp.AutoFlow(model, guard=None).build().state_dict()


def test_files_from_before_the_guard_are_read(tmp_path):
    manual_seed(0)
    guide = nfp.AutoInjective(model, 1).build()
    nfp.save(guide, tmp_path / "new")
    whole = guide.state_dict()
    del whole["_guard.state"]
    again = nfp.AutoInjective(model, 1).build()
    again.load_state_dict(whole)
    # The file as it was: without the guard's tensor, class and options.
    guide._guard = None
    nfp.save(guide, tmp_path / "old")
    header_size = struct.unpack("<Q", (tmp_path / "old").read_bytes()[:8])[0]
    header = json.loads((tmp_path / "old").read_bytes()[8 : 8 + header_size])
    assert "_guard.state" not in header
    manual_seed(1)
    again = nfp.AutoInjective(model, 1).build()
    nfp.load(again, tmp_path / "old")
    for name, tensor in guide.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_draws_that_are_not_finite_are_named_before_they_reach_a_parameter():
    guide = nfp.AutoFlow(model).build()
    with torch.no_grad():
        guide.transform.stack.flows[-1].log_scale.fill_(200.0)
    before = [p.detach().clone() for p in guide.parameters()]
    with pytest.raises(errors.NonFiniteError, match=r"a draw of AutoFlow.*learning rate"):
        steps(guide, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


@pytest.mark.parametrize("guard", [1.0, 0.5, 0, -1, "50", True])
def test_guards_that_make_no_sense(guard):
    with pytest.raises(errors.OptionError, match="guard"):
        nfp.AutoFlow(model, guard=guard)


# Places.


@pytest.mark.parametrize("kind", ["diagonal", "triangular", "low_rank"])
def test_places_are_affine_maps_with_the_log_det_of_their_matrix(kind):
    manual_seed(4)
    loc, scales = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    place = {
        "diagonal": lambda: DiagonalPlace(loc, scales),
        "triangular": lambda: TriangularPlace(loc, scales),
        "low_rank": lambda: LowRankPlace(loc, scales, 2),
    }[kind]()
    start = place(torch.zeros(1, 5, dtype=torch.float64))[0]
    close(start[0].detach(), loc, 1e-12)
    place = perturbed(place, 0.7)
    z = torch.randn(7, 5, dtype=torch.float64)
    x, log_det = place(z)
    matrix = torch.func.jacrev(lambda row: place(row[None])[0][0])(z[0]).detach()
    close(x.detach(), z @ matrix.mT + place.loc.detach(), 1e-10)
    close(log_det.detach(), torch.linalg.slogdet(matrix)[1].expand(7), 1e-10)
    back, log_det_back = place.inverse(x)
    close(back.detach(), z, 1e-9)
    close(log_det_back.detach(), -log_det.detach(), 1e-12)


def test_the_number_of_latents_chooses_the_place():
    def normals(dim):
        return lambda: pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    few, many = (nfp.AutoFlow(normals(dim)).build() for dim in (256, 2000))
    assert isinstance(few.transform.stack.flows[-1], TriangularPlace)
    place = many.transform.stack.flows[-1]
    assert isinstance(place, LowRankPlace)
    assert place.rank == 32
    # The cost is linear in the number of latents.
    assert sum(p.numel() for p in many.parameters()) < 1500 * 2000
    assert isinstance(
        nfp.AutoFlow(normals(3), place="diagonal").build().transform.stack.flows[-1],
        DiagonalPlace,
    )


# Factories.


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("factory", [getattr(nfp.flows, name) for name in nfp.flows.__all__])
def test_factories_start_as_the_identity_and_have_inverses(factory, dim):
    layers = nfp.FlowTransform(factory(dim)).double()
    z = torch.randn(6, dim, dtype=torch.float64)
    torch.testing.assert_close(layers(z).detach().norm(dim=1), z.norm(dim=1), rtol=1e-4, atol=1e-4)
    layers = perturbed(layers, 0.2)
    x = layers(z)
    torch.testing.assert_close(layers.inv(x.detach()), z, rtol=1e-3, atol=1e-3)


def test_couplings_are_bounded_at_any_parameters():
    (layer,) = nfp.flows.couplings(4, num_layers=1)
    x, log_det = perturbed(layer, 1e4)(torch.randn(100, 4))
    assert float(log_det.detach().abs().max()) <= 2 * 3 + 1e-4
    assert x.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("factory", [nfp.flows.splines, nfp.flows.autoregressive])
def test_other_factories_are_trained(factory):
    start = pyro.infer.autoguide.init_to_feasible
    losses = steps(nfp.AutoFlow(model, factory, init_loc_fn=start), 150)
    assert all(math.isfinite(loss) for loss in losses)
    expected = float(
        dist.MultivariateNormal(torch.zeros(3), (100 + SCALES.square()).diag()).log_prob(
            torch.zeros(3)
        )
    )
    # By seeds the gap ends between 0.00 and 0.03.
    assert -sum(losses[-30:]) / 30 > expected - 0.3
