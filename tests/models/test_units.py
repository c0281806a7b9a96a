"""Models with units: densities in the units of the data, training in standardised coordinates."""

from __future__ import annotations

import copy
import warnings

import normflows as nf
import pytest
import torch
from support.comparison import agree, close
from support.dense import dense_log_volume
from support.models import base, coupling, mlp_injection, perturbed, spline
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import CollapseWarning, NonFiniteError, OptionError, ScaleWarning
from normflows_injective.flows import InjectiveComposite, SphereChart, Standardise

UNITS = torch.tensor([1e-3, 1e5, 2.0, 30.0, 1.0], dtype=torch.float64)
TRANSFORMS = {
    "none": "none",
    "log": "log",
    "power": "power",
    "mixed": ["none", "log", "power", "none", "power"],
}


def table(rows=400):
    """Positive, skewed columns of very different units, in float64."""
    hidden = torch.randn(rows, 2, dtype=torch.float64)
    mixed = hidden @ torch.randn(2, 5, dtype=torch.float64) + 0.1 * torch.randn(rows, 5).double()
    return UNITS * (1 + (0.4 * mixed).exp())


def with_units(x, transform="none", inner=None, **options):
    """A model of the data in their units, and the same networks without the units."""
    inner = inner or [spline(), mlp_injection(), coupling()]
    units = Standardise.fit(x, transform=transform)
    outside = nfi.InjectiveNormalizingFlow(base(2), [*inner, units], **copy.deepcopy(options))
    inside = nfi.InjectiveNormalizingFlow(base(2), inner, **options)
    perturbed(nn.ModuleList(inner), 0.1)
    return outside.double(), inside.double(), units


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_log_prob_is_the_dense_computation_in_the_units_of_the_data(transform):
    x = table()
    model, inside, units = with_units(x, transform)
    x = x[:4]
    z = model.encode(x)
    dense = dense_log_volume(model.decode, z)
    base_z, log_det = inside.inverse_and_log_det(units.inverse(x)[0])
    latent = inside.log_prob(units.inverse(x)[0]) + dense_log_volume(inside.decode, z)
    close(model.log_prob(x), latent - dense, 1e-8)
    # All else is in these units too.
    agree(model.decode(z), units(inside.decode(z))[0], 1e-10)
    agree(model.inverse(x), base_z, 1e-10)
    agree(model.project(x), model.decode(z), 1e-10)
    agree(model.reconstruction_error(x), (x - model.decode(z)).square().sum(1), 1e-10)
    manual_seed(1)
    samples, log_q = model.sample(3)
    manual_seed(1)
    inner_samples, _ = inside.sample(3)
    torch.testing.assert_close(samples, units(inner_samples)[0], rtol=1e-10, atol=0)
    expected = dense_log_volume(model.forward, units_to_base(model, samples))
    close(log_q, model.q0.log_prob(units_to_base(model, samples)) - expected, 1e-6)


def units_to_base(model, samples):
    """The base variables of samples of the seed that drew them."""
    manual_seed(1)
    z, _ = model.q0(len(samples))
    return z.double()


class Parabola(nfi.flows.Injection):
    """x = (z, (z - 1)^2)."""

    def encode(self, x, context=None):
        return x[:, :1]

    def decode(self, z, context=None):
        return torch.cat([z, (z - 1).square()], dim=1)


def test_the_sum_of_log_scales_is_no_correction_and_changes_ranks():
    inside = nfi.InjectiveNormalizingFlow(base(1), [Parabola()]).double()
    units = Standardise(2).double()
    model = nfi.InjectiveNormalizingFlow(base(1), [Parabola(), units]).double()
    units.scale[1] = 10.0  # metres to decimetres in the second column
    z = torch.linspace(-1, 2, 301, dtype=torch.float64)[:, None]
    inner = inside.log_prob(inside.decode(z))
    outer = model.log_prob(model.decode(z))
    curvature = (z[:, 0] - 1).square()
    exact = 0.5 * ((1 + 400 * curvature) / (1 + 4 * curvature)).log()
    close(inner - outer, exact, 1e-10)
    naive = units.scale.log().sum()  # 2.3 everywhere, where the right term is 0 to 2.27
    assert bool((exact < naive - 0.02).all())
    assert exact.min() == 0
    # z = 0 is denser than z = 1.3 in metres, and less dense in decimetres.
    assert inner[100] > inner[230] + 0.1
    assert outer[100] < outer[230] - 0.1
    # One scale for all columns adds d log c, where the sum says D log c.
    units.scale.fill_(7.0)
    outer = model.log_prob(model.decode(z))
    close(inner - outer, units.scale[0].log(), 1e-8)


TERMS = {
    "plain": {},
    "noise": {"input_noise": 0.1},
    "cycle": {"latent_cycle": 0.5, "num_probes": 2},
    "warm_up": {"warmup_steps": (0, 3), "beta": lambda step: 5.0 + step},
    "conditional": {"estimator": "conditional"},
}


@pytest.mark.parametrize("options", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("transform", ["none", "mixed"])
def test_the_loss_is_that_of_the_same_networks_on_standardised_data(options, transform):
    x = table(32)
    likelihood = nfi.SurrogateLikelihood(**options)
    model, inside, units = with_units(x, TRANSFORMS[transform], likelihood=likelihood)
    results = []
    for flow, data in ((model, x), (inside, units.inverse(x)[0])):
        manual_seed(2)
        terms = flow.loss_terms(data)
        loss = flow.forward_kld(data)
        gradients = torch.autograd.grad(loss, list(flow.parameters()))
        results.append([*terms, loss, *gradients])
    assert all(map(torch.equal, *results))


def test_the_exact_likelihood_is_that_of_standardised_data():
    chart = [SphereChart(3)]
    x = 5 + 3 * nn.functional.normalize(torch.randn(50, 3, dtype=torch.float64), dim=1)
    model = nfi.InjectiveNormalizingFlow(base(2), [*chart, Standardise(3)]).double()
    assert isinstance(model.likelihood, nfi.ExactLikelihood)
    assert model.likelihood.beta == 0
    units = model.composite[-1]
    units.shift.fill_(5.0)
    units.scale.fill_(3.0)
    inside = nfi.InjectiveNormalizingFlow(base(2), chart).double()
    inner = (x - 5) / 3
    assert torch.equal(model.forward_kld(x), inside.forward_kld(inner))
    close(model.log_prob(x), inside.log_prob(inner) - 2 * torch.tensor(3.0).log(), 1e-6)


def test_two_layers_of_units_are_both_taken_off():
    x = table(32)
    first = Standardise.fit(x, transform="log")
    second = Standardise(5).double()
    second.scale.fill_(2.0)
    pair = [mlp_injection()]
    model = nfi.InjectiveNormalizingFlow(base(2), [*pair, first, second]).double()
    inside = nfi.InjectiveNormalizingFlow(base(2), pair).double()
    inner = first.inverse(second.inverse(x)[0])[0]
    values = []
    for flow, data in ((model, x), (inside, inner)):
        manual_seed(0)
        values.append(flow.forward_kld(data))
    assert torch.equal(*values)


def test_units_inside_the_stack_are_layers_like_others():
    x = torch.randn(6, 5, dtype=torch.float64)
    codes = 3 + 2 * torch.randn(100, 2)
    milder = Standardise.fit(1 + 2 * torch.randn(100, 5))
    flows = [spline(), Standardise.fit(codes), mlp_injection(), milder]
    model = nfi.InjectiveNormalizingFlow(base(2), [*flows, coupling()]).double()
    z = model.inverse(x)
    expected = model.q0.log_prob(z) - dense_log_volume(model.forward, z)
    close(model.log_prob(x), expected, 1e-6)
    agree(model.loss_terms(x).reconstruction_error, model.reconstruction_error(x), 1e-12)


def test_reconstruction_errors_in_both_units():
    x = table()
    model, inside, units = with_units(x, TRANSFORMS["mixed"])
    inner = units.inverse(x)[0]
    assert torch.equal(
        model.reconstruction_error(x, standardised=True), inside.reconstruction_error(inner)
    )
    assert torch.equal(
        inside.reconstruction_error(inner, standardised=True), inside.reconstruction_error(inner)
    )
    terms = model.loss_terms(x)
    agree(terms.reconstruction_error, model.reconstruction_error(x, standardised=True), 1e-12)


def test_the_injectivity_report_is_in_the_coordinates_of_training():
    x = table(20)
    model, inside, units = with_units(x)
    report = nfi.diagnostics.injectivity_report(model.eval(), x)
    expected = nfi.diagnostics.injectivity_report(inside.eval(), units.inverse(x)[0])
    assert str(report) == str(expected)


def test_scales_are_looked_at_in_the_coordinates_of_training():
    x = table()
    model, inside, units = with_units(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.forward_kld(x)
    with pytest.warns(ScaleWarning, match=r"nfi.flows.Standardise.fit\(x\)"):
        inside.forward_kld(x / UNITS.mean())


def test_files_bring_the_units_into_a_layer_that_was_not_fitted(tmp_path):
    x = table()
    model, _, _ = with_units(x, TRANSFORMS["mixed"])
    model.save(tmp_path / "model.safetensors")
    inner = [spline(), mlp_injection(), coupling()]
    twin = nfi.InjectiveNormalizingFlow(base(2), [*inner, Standardise(5)]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.load(tmp_path / "model.safetensors")
    assert torch.equal(twin.log_prob(x), model.log_prob(x))
    assert twin.composite[-1].columns[1].kind == "log"


def test_conditional_models():
    x, context = table(20), torch.randn(20, 3, dtype=torch.float64)
    inner = [mlp_injection(context_dim=3)]
    model, inside, units = with_units(x, "log", inner)
    results = []
    for flow, data in ((model, x), (inside, units.inverse(x)[0])):
        manual_seed(4)
        loss = flow.forward_kld(data, context)
        results.append((loss, flow.validation_score(data, context)))
    assert all(map(torch.equal, *results))
    z = model.encode(x[:3], context[:3])
    for index in range(3):
        one = context[index : index + 1]
        dense = dense_log_volume(lambda z, one=one: model.decode(z, one), z[index : index + 1])
        point = x[index : index + 1]
        latent = model.q0.log_prob(model.inverse(point, one))
        close(model.log_prob(point, one), latent - dense, 1e-8)


def test_images():
    x = 100 + 50 * torch.randn(12, 2, 4, 4)
    pair = nfi.nets.conv_autoencoder((2, 4, 4), 3, (8,))
    injection = nfi.flows.FreeFormInjection(*pair)
    units = Standardise.fit(x)
    model = nfi.InjectiveNormalizingFlow(base(3), [injection, units])
    inside = nfi.InjectiveNormalizingFlow(base(3), [injection])
    manual_seed(0)
    loss = model.forward_kld(x)
    manual_seed(0)
    assert torch.equal(loss, inside.forward_kld(units.inverse(x)[0]))
    assert model.sample(2)[0].shape == (2, 2, 4, 4)


def test_composites_in_containers_of_normflows():
    x = table(32)
    model, inside, units = with_units(x, "power", [mlp_injection(), coupling()])
    likelihood = nfi.SurrogateLikelihood(beta=3.0)
    composite = InjectiveComposite(model.composite, likelihood).double()
    container = nf.NormalizingFlow(base(2), [composite]).double()
    manual_seed(5)
    loss = container.forward_kld(x)
    inside.likelihood = nfi.SurrogateLikelihood(beta=3.0)
    manual_seed(5)
    # normflows adds log-dets in float32.
    close(loss, inside.forward_kld(units.inverse(x)[0]), 1e-5)
    container.eval()
    close(container.log_prob(x), model.log_prob(x), 1e-4)


def by_hand(model, x, beta, context=None):
    error = model.reconstruction_error(x, context)
    return (-model.log_prob(x, context) + beta * error).mean()


def test_the_validation_score_is_its_formula_in_the_coordinates_of_training():
    x = table(2500)  # more than two chunks
    model, inside, units = with_units(x, TRANSFORMS["mixed"])
    inner = units.inverse(x)[0]
    score = model.validation_score(x)
    assert score.shape == ()
    assert not score.requires_grad
    close(score, by_hand(inside, inner, 10.0), 1e-10)
    close(inside.validation_score(inner), score, 1e-12)


def test_the_validation_score_does_not_depend_on_mode_or_warm_up():
    x = table(50)
    likelihood = nfi.SurrogateLikelihood(
        beta=lambda step: 2.0 + step, warmup_steps=(5, 20), input_noise=0.5, latent_cycle=0.1
    )
    model, inside, units = with_units(x, likelihood=likelihood)
    inner = units.inverse(x)[0]
    before = model.validation_score(x)
    close(before, by_hand(inside, inner, 22.0), 1e-10)
    assert model.training
    assert torch.equal(model.eval().validation_score(x), before)
    model.train().likelihood.step.fill_(12)
    assert torch.equal(model.validation_score(x), before)
    assert int(model.likelihood.step) == 12


def test_the_validation_score_of_other_terms():
    model = nfi.flows.star_like_flow(3, num_layers=1, width=8).double()
    x = model.sample(20)[0].detach()
    close(model.validation_score(x), model.forward_kld(x).detach(), 1e-6)

    class Own(nfi.SurrogateLikelihood):
        def final_beta(self):
            return 4.0

    flow = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection()], Own()).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    close(flow.validation_score(x), by_hand(flow, x, 4.0), 1e-10)

    class Silent(nfi.TrainingTerm):
        def terms(self, x, passes, prior=None):
            raise NotImplementedError

        def loss(self, terms, log_prob):
            raise NotImplementedError

    flow = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection()], Silent()).double()
    with pytest.raises(OptionError, match="Silent does not say how it weighs"):
        flow.validation_score(x)


def test_the_score_is_the_likelihood_of_a_tube_around_a_plane():
    # x = W z + noise of precision 2 beta in the directions normal to a plane: the tube is exact.
    flow = nfi.InjectiveNormalizingFlow(
        base(2), [nfi.flows.LinearInjection(2, 5)], nfi.SurrogateLikelihood(beta=7.0)
    ).double()
    injection = flow.composite[0]
    x = torch.randn(200, 5, dtype=torch.float64)
    weight = injection.decode(torch.eye(2, dtype=torch.float64)) - injection.decode(
        torch.zeros(2, 2, dtype=torch.float64)
    )
    normal = torch.eye(5) - weight.T @ torch.linalg.pinv(weight.T)
    law = torch.distributions.MultivariateNormal(
        injection.decode(torch.zeros(1, 2, dtype=torch.float64))[0].detach(),
        (weight.T @ weight + normal / 14).detach(),
    )
    constant = 1.5 * torch.log(torch.tensor(torch.pi / 7.0, dtype=torch.float64))
    close(flow.validation_score(x) + constant, -law.log_prob(x).mean(), 1e-6)


def test_layers_that_initialise_themselves_meet_standardised_data():
    x = table(64).float() * 1e17
    inner = [mlp_injection(), nf.flows.ActNorm((5,))]
    model = nfi.InjectiveNormalizingFlow(base(2), [*inner, Standardise.fit(x)])
    # In the units of the data squares overflow, and nothing would be taken.
    model.encode(x)
    assert bool(inner[1].data_dep_init_done)
    model.forward_kld(x).backward()
    assert model.validation_score(x).isfinite()


def test_first_data_are_those_of_the_user_also_beside_a_latent_cycle():
    x = table(64)
    inner = [spline(), nf.flows.ActNorm((2,)), mlp_injection(), nf.flows.ActNorm((5,))]
    likelihood = nfi.SurrogateLikelihood(latent_cycle=0.1)
    units = Standardise.fit(x)
    states = []
    for extra, data in (([units], x), ([], units.inverse(x)[0])):
        flows = [*copy.deepcopy(inner), *extra]
        flow = nfi.InjectiveNormalizingFlow(base(2), flows, copy.deepcopy(likelihood)).double()
        flow.forward_kld(data)
        states.append([*flows[1].parameters(), *flows[3].parameters()])
    for outside, inside in zip(*states, strict=True):
        close(outside, inside, 1e-10)
        assert bool(outside.any())


def test_data_that_are_not_finite_are_refused_in_the_units_of_the_user():
    x = table(16)
    model, _, _ = with_units(x)
    x[3, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"x has 1 of 80 values .* at index \[3, 2\]"):
        model.forward_kld(x)


@pytest.mark.slow
def test_a_model_trains_on_a_table_of_wild_units():
    x = table(2000).float()
    units = Standardise.fit(x, transform="log")
    model = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), units])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    before = model.validation_score(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        for _ in range(150):
            loss = model.forward_kld(x[torch.randint(len(x), (256,))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert model.validation_score(x) < before - 5
    assert bool((model.sample(1000)[0] > 0).all())
