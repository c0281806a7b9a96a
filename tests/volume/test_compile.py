"""The compiled training term equals the eager one, or is refused with a reason."""

from __future__ import annotations

import copy
import shutil

import normflows as nf
import pytest
import torch
import torch.nn.functional as F
from support.models import base, pickled
from support.seeds import manual_seed, seeded_generator
from torch import nn

import normflows_injective as nfi
from normflows_injective.autodiff.activations import silu
from normflows_injective.volume import compiled as compilation

# Traces and differentiates as the default does, without the minutes of code generation.
TRACED = {"backend": "aot_eager"}
COUPLING = (nf.nets.MLP, [2, 8, 4])


def pair_of_models(flows, options=TRACED, context_dim=None, **likelihood):
    """The same layers under an eager and under a compiled training term."""
    dimension = next(f for f in flows if isinstance(f, nfi.flows.FreeFormInjection)).latent_shape
    q0 = base(dimension[0])
    return [
        nfi.InjectiveNormalizingFlow(
            q0, flows, nfi.SurrogateLikelihood(compile=compile, **likelihood)
        ).double()
        for compile in (False, options)
    ]


def injection(**kwargs):
    return nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(4, 2, (8, 8), **kwargs))


def loss_and_gradients(model, x, seed=0, **kwargs):
    manual_seed(seed)
    loss = model.forward_kld(x, **kwargs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return [loss.detach(), *(torch.zeros_like(p) if g is None else g for g, p in pairs)]


def assert_same_step(eager, compiled, x, **kwargs):
    # Seven digits at least: the same sums in another order.
    torch.testing.assert_close(
        loss_and_gradients(compiled, x, **kwargs),
        loss_and_gradients(eager, x, **kwargs),
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.fixture(autouse=True)
def fresh_cache():
    yield
    torch._dynamo.reset()


STACKS = {
    "alone": lambda: [injection()],
    "latent spline": lambda: [
        nf.flows.AutoregressiveRationalQuadraticSpline(2, 1, 8),
        injection(),
    ],
    "ambient coupling": lambda: [
        injection(),
        nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4])),
        nf.flows.InvertibleAffine(4),
    ],
    "affine constant": lambda: [injection(), nf.flows.AffineConstFlow((4,))],
    "residual networks": lambda: [
        nfi.flows.FreeFormInjection(*nfi.nets.residual_autoencoder(4, 2, 8, 2))
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_compiled_and_eager_steps_agree(name):
    eager, compiled = pair_of_models(STACKS[name]())
    assert_same_step(eager, compiled, torch.randn(6, 4, dtype=torch.float64))


@pytest.mark.slow
def test_several_probes_and_the_latent_cycle():
    eager, compiled = pair_of_models([injection()], num_probes=2, latent_cycle=0.5)
    assert_same_step(eager, compiled, torch.randn(6, 4, dtype=torch.float64))


@pytest.mark.slow
def test_images():
    flows = [nfi.flows.FreeFormInjection(*nfi.nets.conv_autoencoder((1, 8, 8), 3, (8, 16)))]
    eager, compiled = pair_of_models(flows, num_probes=1)
    assert_same_step(eager, compiled, torch.randn(3, 1, 8, 8, dtype=torch.float64))


@pytest.mark.slow
def test_a_context_reaches_the_compiled_networks():
    eager, compiled = pair_of_models([injection(context_dim=2)])
    x = torch.randn(6, 4, dtype=torch.float64)
    for seed in (1, 2):
        context = torch.randn(6, 2, generator=seeded_generator(seed)).double()
        assert_same_step(eager, compiled, x, context=context)


@pytest.mark.slow
def test_another_batch_size_is_compiled_anew_and_many_fall_back_to_the_eager_form(monkeypatch):
    monkeypatch.setattr(compilation, "_IN_A_ROW", 1)
    eager, compiled = pair_of_models([injection()])
    for size in range(2, 12):
        assert_same_step(eager, compiled, torch.randn(size, 4, dtype=torch.float64))


@pytest.mark.slow
def test_the_last_batches_of_epochs_are_not_compiled():
    eager, compiled = pair_of_models([injection()])
    traced = []

    def backend(graph, inputs):
        traced.append(len(inputs))
        return graph.forward

    compiled.likelihood._compiled.options["backend"] = backend
    for size in (6, 6, 4, 6, 6, 3, 6, 4, 6, 1):
        assert_same_step(eager, compiled, torch.randn(size, 4, dtype=torch.float64))
    num_graphs = len(traced)
    for _ in range(8):
        compiled.forward_kld(torch.randn(4, 4, dtype=torch.float64))
    assert num_graphs > 0
    assert len(traced) == 2 * num_graphs  # a steady shape is compiled in the end


@pytest.mark.slow
def test_weights_that_changed_are_seen():
    eager, compiled = pair_of_models([injection()])
    x = torch.randn(6, 4, dtype=torch.float64)
    assert_same_step(eager, compiled, x)
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter.add_(0.1)
    assert_same_step(eager, compiled, x)


@pytest.mark.slow
def test_more_compilations_than_torch_allows_fall_back_to_the_eager_form(monkeypatch):
    monkeypatch.setattr(compilation, "_IN_A_ROW", 1)
    eager, compiled = pair_of_models([injection()])
    for num_probes in (1, 2):
        for size in (2, 3, 4, 5, 6):
            for model in (eager, compiled):
                model.likelihood.num_probes = num_probes
            assert_same_step(eager, compiled, torch.randn(size, 4, dtype=torch.float64))


class Heads(nn.Module):
    """Two tokens attending to each other, between linear layers."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.first, self.last = nn.Linear(fan_in, 24), nn.Linear(8, fan_out)

    def forward(self, x):
        q, k, v = self.first(x).view(len(x), 3, 1, 2, 4).unbind(1)
        return self.last(F.scaled_dot_product_attention(q, k, v).flatten(1))


def normalising(fan_in, fan_out):
    norms = [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.LayerNorm(8, elementwise_affine=False)]
    return nn.Sequential(nn.Linear(fan_in, 8), *norms, nn.SiLU(), nn.Linear(8, fan_out))


@pytest.mark.slow
@pytest.mark.parametrize("build", [Heads, normalising])
@pytest.mark.parametrize("num_probes", [1, 2])
def test_attention_and_normalisations(build, num_probes):
    flows = [nfi.flows.FreeFormInjection(build(4, 2), build(2, 4), (2,), (4,))]
    eager, compiled = pair_of_models(flows, num_probes=num_probes)
    assert_same_step(eager, compiled, torch.randn(6, 4, dtype=torch.float64))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * 3 * x * x


class Cubing(nn.Module):
    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.first, self.last = nn.Linear(fan_in, 8), nn.Linear(8, fan_out)

    def forward(self, x):
        return self.last(Cube.apply(self.first(x)))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_functions_whose_second_derivative_would_be_dropped_are_refused(side):
    """The value would be right, and the gradient of every layer before them zero."""
    encoder = Cubing(4, 2) if side == "encoder" else nn.Linear(4, 2)
    decoder = Cubing(2, 4) if side == "decoder" else nn.Linear(2, 4)
    likelihood = nfi.SurrogateLikelihood(compile=TRACED)
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="Cube is an autograd.Function"):
        likelihood(torch.randn(6, 4), encoder, decoder)


def test_functions_of_this_package_are_not_refused():
    """They are on the graph where a tangent is taken by reverse mode."""
    value = silu(torch.randn(6, 4, requires_grad=True))
    compilation._refuse_functions(value)
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="Cube is an autograd.Function"):
        compilation._refuse_functions(Cube.apply(value))


@pytest.mark.slow
def test_the_graph_is_compiled_once_for_a_training_loop():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    _, compiled = pair_of_models([injection()], {"backend": counter})
    optimizer = torch.optim.Adam(compiled.parameters(), 1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        compiled.forward_kld(torch.randn(6, 4, dtype=torch.float64)).backward()
        optimizer.step()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_warm_up_and_evaluation_are_not_compiled():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    _, compiled = pair_of_models([injection()], {"backend": counter}, warmup_steps=(1, 1))
    x = torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        compiled.loss_terms(x)
    compiled.forward_kld(x)
    assert counter.frame_count == 0
    with torch.no_grad():
        next(compiled.parameters()).mul_(0.9)  # A step is over when parameters have changed.
    compiled.forward_kld(x)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_the_latents_come_in_the_precision_of_the_data_under_autocast():
    eager, compiled = pair_of_models([injection()])
    eager, compiled = eager.float(), compiled.float()
    x = torch.randn(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        steps = [loss_and_gradients(model, x) for model in (eager, compiled)]
        assert compiled.loss_terms(x).log_prob_latent.dtype == torch.float32
    for a, b in zip(*steps, strict=True):
        # Half precision rounds at other places when kernels are fused: 3e-3 relative.
        assert float((a - b).norm()) <= 0.03 * float(b.norm()) + 1e-6


@pytest.mark.slow
def test_the_zero_product_is_not_traced():
    """Per layer: encoder value, pull, and their backward; decoder value, tangent, backward."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
    _, compiled = pair_of_models([injection()], {"backend": backend})
    compiled.forward_kld(torch.randn(6, 4, dtype=torch.float64))
    products = [
        node
        for node in graphs[0].graph.nodes
        if str(node.target).startswith(("aten.mm", "aten.addmm"))
    ]
    # Three layers each: encoder values and pulls, decoder values and tangents.
    assert len(products) == 12


@pytest.mark.slow
@pytest.mark.parametrize("flow", [nf.flows.ActNorm((4,)), nf.flows.LULinearPermute(4)])
def test_layers_that_torch_cannot_trace_are_refused(flow):
    """One branches on its data, the other indexes with arrays of numpy."""
    _, compiled = pair_of_models([injection(), flow])
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="compile=False"):
        compiled.forward_kld(torch.randn(6, 4, dtype=torch.float64))


def test_a_decoder_cut_off_from_its_input_is_an_error_and_no_zero():
    class Cut(nn.Module):
        def forward(self, z):
            return torch.cat([z, z], 1).detach()

    flows = [nfi.flows.FreeFormInjection(nn.Linear(4, 2), Cut(), (2,), (4,))]
    _, compiled = pair_of_models(flows)
    with pytest.raises(nfi.errors.NotInjectiveError, match=r"Remove detach\(\)"):
        compiled.forward_kld(torch.randn(6, 4, dtype=torch.float64))


@pytest.mark.parametrize("compile", [True, TRACED])
def test_other_estimators_are_refused(compile):
    with pytest.raises(nfi.errors.OptionError, match="serves the estimator 'encoder' alone"):
        nfi.SurrogateLikelihood(estimator="decoder", compile=compile)
    likelihood = nfi.SurrogateLikelihood(compile=compile)
    likelihood.estimator = "decoder"
    with pytest.raises(nfi.errors.OptionError, match="serves the estimator 'encoder' alone"):
        likelihood(torch.randn(3, 4), nn.Linear(4, 2), nn.Linear(2, 4))


def test_options_are_checked():
    with pytest.raises(
        nfi.errors.OptionError, match="compile, no dictionary of options, must be True or"
    ):
        nfi.SurrogateLikelihood(compile="reduce-overhead")


@pytest.mark.parametrize("compile", [False, TRACED])
@pytest.mark.parametrize("how", ["module", "in place", "function"])
def test_networks_that_the_user_compiled_are_refused_with_advice(how, compile):
    likelihood = nfi.SurrogateLikelihood(compile=compile)
    encoder, decoder = nn.Linear(4, 2), nn.Linear(2, 4)
    if how == "module":
        encoder = torch.compile(encoder, backend="eager")
    elif how == "in place":
        encoder.compile(backend="eager")
    else:
        network = encoder
        encoder = torch.compile(lambda x: network(x), backend="eager")
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="compile=True"):
        likelihood(torch.randn(3, 4), encoder, decoder)


@pytest.mark.slow
def test_copies_and_files_carry_the_option_and_not_the_code(tmp_path):
    eager, compiled = pair_of_models([injection()])
    x = torch.randn(6, 4, dtype=torch.float64)
    compiled.forward_kld(x)
    for other in (copy.deepcopy(compiled), pickled(compiled)):
        assert_same_step(eager, other, x)
    assert "aot_eager" in repr(compiled)
    assert compiled.state_dict().keys() == eager.state_dict().keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_default_backend():
    eager, compiled = pair_of_models(STACKS["alone"](), True)
    eager, compiled = eager.float(), compiled.float()
    x = torch.randn(64, 4)
    for a, b in zip(*(loss_and_gradients(m, x) for m in (eager, compiled)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
