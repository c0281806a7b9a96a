"""The model: every method against dense oracles, for the four kinds of stack."""

from __future__ import annotations

import copy

import normflows as nf
import pytest
import torch
from support.comparison import agree
from support.dense import dense_jacobian, dense_log_volume
from support.models import base, coupling, mlp_injection, model, spline, stacks
from support.seeds import manual_seed

import normflows_injective as nfi


@pytest.fixture(params=["injection", "latent", "ambient", "two_injections"])
def stacked(request, device, dtype):
    flows = stacks()[request.param]
    return nfi.InjectiveNormalizingFlow(base(2), flows).to(device=device, dtype=dtype)


@pytest.fixture
def x(device, dtype):
    return torch.randn(4, 5, device=device, dtype=dtype)


@pytest.fixture
def tolerance(dtype):
    return 1e-8 if dtype == torch.float64 else 1e-3


def test_is_the_hosts_model_with_the_hosts_state_keys():
    flows = stacks()["latent"]
    ours = nfi.InjectiveNormalizingFlow(base(2), flows)
    plain = nf.NormalizingFlow(base(2), flows)
    assert isinstance(ours, nf.NormalizingFlow)
    assert set(ours.state_dict()) - set(plain.state_dict()) == {"likelihood.step"}


def test_forward_and_log_det_against_the_dense_jacobian(stacked, tolerance, device, dtype):
    z = torch.randn(4, 2, device=device, dtype=dtype)
    x, log_det = stacked.forward_and_log_det(z)
    agree(x, stacked.forward(z), tolerance)
    agree(log_det.double(), dense_log_volume(stacked.forward, z), tolerance)


@pytest.mark.slow
def test_inverse_and_log_det_are_those_of_the_projection(stacked, x, tolerance):
    z, log_det = stacked.inverse_and_log_det(x)
    agree(z, stacked.inverse(x), tolerance)
    agree(stacked.forward(z), stacked.project(x), 100 * tolerance)
    agree(log_det.double(), -dense_log_volume(stacked.forward, z), 100 * tolerance)


@pytest.mark.slow
def test_log_prob_is_base_plus_log_det_and_equals_that_of_samples(stacked, x, tolerance):
    z, log_det = stacked.inverse_and_log_det(x)
    agree(stacked.log_prob(x), stacked.q0.log_prob(z) + log_det, tolerance)
    manual_seed(3)
    samples, log_q = stacked.sample(4)
    manual_seed(3)
    z, log_p = stacked.q0(4)
    agree(samples, stacked.forward(z), tolerance)
    agree(log_q.double(), log_p.double() - dense_log_volume(stacked.forward, z), tolerance)


def test_encode_and_decode_leave_the_latent_block_out(stacked, x, tolerance):
    z = stacked.encode(x)
    agree(stacked.decode(z), stacked.project(x), tolerance)
    error = (x - stacked.decode(z)).square().sum(1)
    agree(stacked.reconstruction_error(x), error, tolerance)


@pytest.mark.slow
def test_loss_terms_against_dense_jacobians(stacked, x, tolerance):
    stacked.likelihood = nfi.SurrogateLikelihood(beta=7.0, num_probes=2)
    terms = stacked.loss_terms(x)
    encoder = dense_jacobian(stacked.encode, x)
    decoder = dense_jacobian(stacked.decode, stacked.encode(x).detach())
    trace = torch.einsum("bij,bji->b", encoder, decoder)
    agree(terms.surrogate, -trace, tolerance)  # two probes in two dimensions: the exact trace
    latent = stacked.encode(x)
    expected = stacked.log_prob(x) + torch.as_tensor(
        dense_log_volume(stacked.decode, latent), dtype=x.dtype, device=x.device
    )
    agree(terms.log_prob_latent, expected, 100 * tolerance)
    agree(terms.reconstruction_error, stacked.reconstruction_error(x), tolerance)
    loss = 7 * terms.reconstruction_error - terms.log_prob_latent + terms.surrogate
    agree(terms.loss, loss, tolerance)
    agree(stacked.forward_kld(x), loss.mean(), tolerance)


def test_one_step_of_the_hosts_loop_reaches_every_parameter(stacked, x):
    optimizer = torch.optim.SGD(stacked.parameters(), 1e-3)
    before = copy.deepcopy(stacked.state_dict())
    loss = stacked.forward_kld(x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert loss.shape == ()
    assert loss.dtype == x.dtype
    assert not [n for n, p in stacked.named_parameters() if p.grad is None or not p.grad.any()]
    assert any(not torch.equal(v, before[k]) for k, v in stacked.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_everything_keeps_dtype_and_device(stacked, x, kept):
    stacked, x = stacked.to(kept), x.to(kept)
    z = stacked.inverse(x)
    samples, log_q = stacked.sample(3)
    results = [
        z,
        samples,
        log_q,
        stacked.forward(z),
        *stacked.forward_and_log_det(z),
        *stacked.inverse_and_log_det(x),
        stacked.log_prob(x),
        stacked.forward_kld(x),
        *stacked.loss_terms(x),
        stacked.project(x),
        stacked.reconstruction_error(x),
        stacked.encode(x),
        stacked.decode(stacked.encode(x)),
    ]
    assert {r.dtype for r in results} == {kept}
    assert {r.device.type for r in results} == {x.device.type}


def test_double_models_compute_in_double(stacked, x):
    """normflows' accumulators are float32 even here; the sixteenth digit must survive."""
    stacked, x = stacked.double(), x.double()
    nudged = x + 1e-11
    assert not torch.equal(stacked.log_prob(x), stacked.log_prob(nudged))
    assert (stacked.log_prob(x) - stacked.log_prob(nudged)).abs().max() < 1e-8


def test_float64_scalars_of_the_hosts_residual_flow_do_not_decide_the_dtype():
    net = nf.nets.LipschitzMLP([2, 8, 2], init_zeros=False, lipschitz_const=0.8)
    ours = nfi.InjectiveNormalizingFlow(base(2), [nf.flows.Residual(net), mlp_injection()])
    x = torch.randn(4, 5)
    ours.forward_kld(x).backward()
    assert ours.log_prob(x).dtype == torch.float32
    assert ours.sample(2)[0].dtype == torch.float32


def test_layers_without_numbers_take_the_dtype_of_the_base():
    ours = nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.Pad(2, 5)]).double()
    assert ours.sample(3)[0].dtype == torch.float64
    assert ours.log_prob(torch.randn(3, 5, dtype=torch.float64)).dtype == torch.float64


def test_inputs_are_neither_mutated_nor_marked(x):
    flows = [nf.transforms.Shift(-0.5), mlp_injection(), nf.transforms.Shift(0.5)]
    shifted = nfi.InjectiveNormalizingFlow(base(2), flows).to(x)
    before, z = x.clone(), torch.randn(4, 2).to(x)
    z_before = z.clone()
    for method in ("inverse", "log_prob", "forward_kld", "loss_terms", "project", "encode"):
        getattr(shifted, method)(x)
        assert torch.equal(x, before), method
    for method in ("forward", "forward_and_log_det", "decode"):
        getattr(shifted, method)(z)
        assert torch.equal(z, z_before), method
    assert not x.requires_grad
    assert not z.requires_grad


@pytest.mark.slow
def test_gradient_with_respect_to_the_data_is_not_cut(x):
    """Layers in front of the model must learn through the loss."""
    ours = model(likelihood=nfi.SurrogateLikelihood(num_probes=2)).double()
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ours.loss_terms(s).loss, (x,))


@pytest.mark.slow
def test_log_prob_is_differentiable(x):
    ours = model().double()
    assert torch.autograd.gradcheck(ours.log_prob, (x.double().requires_grad_(),))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_everything_works_without_gradients(stacked, x, guard, tolerance):
    expected = stacked.log_prob(x).detach()
    stacked.likelihood = nfi.SurrogateLikelihood(num_probes=2)
    loss = stacked.forward_kld(x).detach()
    with guard():
        agree(stacked.log_prob(x).clone(), expected, tolerance)
        agree(stacked.forward_kld(x.clone()).clone(), loss, tolerance)
        stacked.sample(2)
    assert int(stacked.likelihood.step) == 1  # only the first call could train


def test_sample_without_log_prob_skips_it():
    ours = model()
    manual_seed(5)
    x, log_q = ours.sample(3, log_prob=False)
    manual_seed(5)
    expected, _ = ours.sample(3)
    assert log_q is None
    torch.testing.assert_close(x, expected)


def test_ambient_scaling_costs_latent_dimensions_only():
    """After an injection a scaling by c adds d log c; normflows' sum says D log c."""
    scale = nf.flows.AffineConstFlow((5,)).double()
    torch.nn.init.constant_(scale.s, 0.3)
    injection = mlp_injection().double()
    z = torch.randn(4, 2, dtype=torch.float64)
    plain = nfi.InjectiveNormalizingFlow(base(2).double(), [injection])
    scaled = nfi.InjectiveNormalizingFlow(base(2).double(), [injection, scale])
    difference = scaled.forward_and_log_det(z)[1] - plain.forward_and_log_det(z)[1]
    torch.testing.assert_close(difference, torch.full_like(difference, 2 * 0.3))
    host = nf.NormalizingFlow(base(2).double(), [injection, scale])
    wrong = host.forward_and_log_det(z)[1].double() - plain.forward_and_log_det(z)[1]
    torch.testing.assert_close(wrong, torch.full_like(wrong, 5 * 0.3), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_images_with_reshape_and_host_image_layers():
    flows = [
        nfi.flows.FreeFormInjection(*nfi.nets.conv_autoencoder((4, 4, 4), 3, (8,))),
        nf.flows.ActNorm((4, 1, 1)),
        nf.flows.Invertible1x1Conv(4),
        nf.flows.Squeeze(),
    ]
    ours = nfi.InjectiveNormalizingFlow(base(3), flows).double()
    images = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    ours.forward_kld(images).backward()
    samples, log_q = ours.sample(2)
    assert samples.shape == (2, 1, 8, 8)
    z = torch.randn(2, 3, dtype=torch.float64)
    volume = ours.forward_and_log_det(z)[1]
    torch.testing.assert_close(volume, dense_log_volume(ours.forward, z))


BASES = {
    "DiagGaussian": lambda: nf.distributions.DiagGaussian(2),
    "GaussianMixture": lambda: nf.distributions.GaussianMixture(3, 2),
    "UniformGaussian": lambda: nf.distributions.UniformGaussian(2, [0]),
    "Uniform": lambda: nf.distributions.base.Uniform((2,), -4.0, 4.0),
}


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of normflows' Uniform
@pytest.mark.parametrize("name", BASES)
def test_any_host_base_of_the_latent_shape(name, x):
    """Among them one that computes in float64 whatever the model does."""
    ours = nfi.InjectiveNormalizingFlow(BASES[name](), [mlp_injection()])
    data = 0.1 * x.cpu().float()
    samples, log_q = ours.sample(3)
    assert samples.dtype == log_q.dtype == ours.log_prob(data).dtype == torch.float32
    ours.forward_kld(data).backward()


def test_image_shaped_base_and_latents():
    flows = [nf.flows.Invertible1x1Conv(2), nfi.flows.Reshape((2, 1, 1), (2,)), mlp_injection()]
    ours = nfi.InjectiveNormalizingFlow(base(2, 1, 1), flows)
    x = torch.randn(4, 5)
    assert ours.inverse(x).shape == (4, 2, 1, 1)
    ours.forward_kld(x).backward()
    assert ours.log_prob(x).shape == (4,)


class OnManifoldTarget:
    """The model's own density, so that every reverse divergence has its minimum here."""

    on_manifold = True

    def __init__(self, reference):
        self.reference = reference

    def log_prob(self, x):
        return self.reference.log_prob(x)


def exact_model(p=None):
    return nfi.InjectiveNormalizingFlow(base(2), [spline(), nfi.flows.LinearInjection(2, 5)], p=p)


def test_reverse_divergences_refuse_a_density_on_the_data_space():
    ours = exact_model(p=nf.distributions.DiagGaussian(5))
    for method in (ours.reverse_kld, ours.reverse_alpha_div):
        with pytest.raises(nfi.errors.OffManifoldError, match="the true divergence is infinite"):
            method(4)
    ours.p = None
    with pytest.raises(nfi.errors.OffManifoldError, match="p is None"):
        ours.reverse_kld(4)


@pytest.mark.slow
@pytest.mark.parametrize("score_fn", [True, False])
def test_reverse_kld_of_the_model_with_itself_is_zero(score_fn):
    ours = exact_model().double()
    ours.p = OnManifoldTarget(copy.deepcopy(ours))
    frozen = ours.flows[1].bias.requires_grad_(False)
    divergence = ours.reverse_kld(64, score_fn=score_fn)
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), atol=1e-9, rtol=0)
    divergence.backward()
    assert not frozen.requires_grad  # normflows would thaw it


def test_path_gradient_of_reverse_kld_vanishes_at_the_target():
    """Without the score term the gradient is zero, sample by sample, where the two agree."""
    ours = exact_model().double()
    ours.p = OnManifoldTarget(copy.deepcopy(ours))
    ours.reverse_kld(16, score_fn=False).backward()
    worst = max(p.grad.abs().max() for p in ours.flows[0].parameters() if p.grad is not None)
    assert worst < 1e-8


def test_path_estimate_has_the_value_of_the_samples_density_for_free_form_pairs():
    ours = model().double()
    ours.p = OnManifoldTarget(copy.deepcopy(ours))
    ours.p.log_prob = lambda x: torch.zeros(len(x), dtype=x.dtype)
    values = []
    for score_fn in (True, False):
        manual_seed(1)
        values.append(ours.reverse_kld(16, score_fn=score_fn))
    torch.testing.assert_close(values[0], values[1])


def test_reverse_alpha_divergence():
    ours = exact_model().double()
    ours.p = OnManifoldTarget(copy.deepcopy(ours))
    value = ours.reverse_alpha_div(32, alpha=2)
    torch.testing.assert_close(value, torch.tensor(32.0, dtype=value.dtype).log())
    with pytest.raises(nfi.errors.OptionError, match="Freeze the layers from the injection on"):
        ours.reverse_alpha_div(32, alpha=0.5, dreg=True)
    ours.flows[1].requires_grad_(False)
    ours.reverse_alpha_div(32, alpha=0.5, dreg=True).backward()
    with pytest.raises(nfi.errors.OptionError, match="identically zero"):
        ours.reverse_alpha_div(4)


def test_composite_in_host_containers(dtype):
    """Inside normflows' models the joint log-volume is right where per-layer sums are not."""
    flows = [mlp_injection(), coupling(), nf.flows.LULinearPermute(5)]
    composite = nfi.flows.InjectiveComposite(flows)
    ours = nfi.InjectiveNormalizingFlow(base(2), flows).to(dtype)
    host = nf.NormalizingFlow(base(2), [composite]).to(dtype)
    conditional = nf.ConditionalNormalizingFlow(base(2), [composite]).to(dtype)
    x = torch.randn(4, 5, dtype=dtype)
    torch.testing.assert_close(host.log_prob(x), ours.log_prob(x))
    torch.testing.assert_close(conditional.log_prob(x), ours.log_prob(x))


def test_composite_with_likelihood_trains_in_a_class_conditional_host_model():
    likelihood = nfi.SurrogateLikelihood(num_probes=2)
    composite = nfi.flows.InjectiveComposite([mlp_injection(), coupling()], likelihood)
    q0 = nf.distributions.ClassCondDiagGaussian(2, 3)
    host = nf.ClassCondFlow(q0, [composite]).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    ours = nfi.InjectiveNormalizingFlow(q0, composite.flows, likelihood)
    loss = host.forward_kld(x, y)
    torch.testing.assert_close(loss, ours.forward_kld(x, y), atol=1e-6, rtol=1e-6)
    assert int(likelihood.step) == 2
    host.eval()
    exact = -host.log_prob(x, y)
    torch.testing.assert_close(exact, -ours.log_prob(x, y), atol=1e-6, rtol=1e-6)
    with pytest.raises(nfi.errors.OptionError, match="cannot ramp the likelihood"):
        nfi.flows.InjectiveComposite(
            [mlp_injection()], nfi.SurrogateLikelihood(warmup_steps=(0, 10))
        )
