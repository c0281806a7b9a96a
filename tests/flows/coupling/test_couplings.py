"""Couplings and autoregressive layers, in models and in Pyro."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from support.comparison import close
from support.coupling_oracles import assert_bijection
from support.models import perturbed
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import ContextError, OptionError, ShapeError
from normflows_injective.flows.coupling import (
    ActNorm,
    Additive,
    Affine,
    Autoregressive,
    CentredAffine,
    Coupling,
    ElementTransform,
    Householder,
    LULinear,
    NetworkCoupling,
    Permutation,
    Spline,
)

pytestmark = pytest.mark.usefixtures("float64_by_default")


# --- couplings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [2, 5])
def test_coupling_keeps_a_part_and_moves_the_other_by_it(transform, dim, reverse):
    layer = perturbed(NetworkCoupling(dim, transform, (8,), reverse=reverse))
    # Within the bound of the splines.
    x = 0.4 * torch.randn(3, dim)
    jacobians = assert_bijection(layer, x)
    num_kept = dim // 2
    kept = slice(dim - num_kept, dim) if reverse else slice(num_kept)
    free = slice(dim - num_kept) if reverse else slice(num_kept, dim)
    for direction in (layer.forward, layer.inverse):
        assert torch.equal(direction(x)[0][:, kept], x[:, kept])
    assert torch.equal(jacobians[:, kept, kept], torch.eye(num_kept).expand(3, -1, -1))
    assert not jacobians[:, kept, free].any()
    assert bool((jacobians[:, free, kept] != 0).all())
    block = jacobians[:, free, free]
    assert torch.equal(block, torch.diag_embed(block.diagonal(dim1=1, dim2=2)))


@pytest.mark.parametrize("build", [NetworkCoupling, Autoregressive])
def test_layers_start_as_the_identity(build, transform):
    if build is Autoregressive and not transform.is_elementwise:
        pytest.skip("refused")
    x = 2 * torch.randn(4, 5)
    layer = build(5, transform)
    for direction in (layer.forward, layer.inverse):
        z, log_det = direction(x)
        close(z, x, 1e-13)
        close(log_det, 0.0, 1e-12)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, lambda: nn.LeakyReLU(0.1)])
@pytest.mark.parametrize("hidden", [(), (6,), [6, 6, 6]])
def test_networks_of_any_depth_and_activation(activation, hidden):
    layer = perturbed(NetworkCoupling(3, hidden=hidden, activation=activation))
    assert_bijection(layer, torch.randn(2, 3))


@pytest.mark.parametrize("build", [NetworkCoupling, Autoregressive])
@pytest.mark.parametrize("dim", [1, 4])
def test_context_moves_what_is_transformed(build, dim):
    layer = perturbed(build(dim, Affine(), context_dim=2))
    x, context = torch.randn(3, dim), torch.randn(3, 2)
    assert_bijection(layer, x, context)
    assert not torch.allclose(layer.inverse(x, context)[0], layer.inverse(x, -context)[0])
    with pytest.raises(ContextError, match=r"context_dim=2 takes a context of shape \(3, 2\)"):
        layer.inverse(x)
    with pytest.raises(ContextError, match=r"got one of shape \(3, 5\)"):
        layer(x, torch.randn(3, 5))
    without = perturbed(build(4))
    x = torch.randn(3, 4)
    assert torch.equal(without.inverse(x, context)[0], without.inverse(x)[0])


class Conditioner(nn.Module):
    """A network as a user writes one, whose context is optional."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 4)

    def forward(self, u, context=None):
        said = self.layer(u)
        return said if context is None else said + context


def test_conditioner_of_ones_own():
    layer, x, context = Coupling(4, Conditioner(), Affine()), torch.randn(3, 4), torch.randn(3, 4)
    assert layer.takes_context
    assert not layer.needs_context
    assert_bijection(layer, x)
    assert_bijection(layer, x, context)
    assert not Coupling(4, nn.Linear(2, 4), Affine(), reverse=True).takes_context
    message = r"the conditioner's output must have shape \(B, 4\), got \(3, 5\)"
    with pytest.raises(ShapeError, match=message):
        Coupling(4, nn.Linear(2, 5), Affine()).inverse(x)


class Slope(ElementTransform, nn.Module):
    """A transform with a parameter of its own."""

    num_parameters = 1

    def __init__(self):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.tensor(0.4))

    def inverse(self, x, parameters):
        shift, log_scale = parameters[..., 0], self.weight.expand(x.shape)
        return x * log_scale.exp() + shift, log_scale.sum(-1)

    def forward(self, z, parameters):
        shift, log_scale = parameters[..., 0], self.weight.expand(z.shape)
        return (z - shift) * (-log_scale).exp(), -log_scale.sum(-1)


@pytest.mark.parametrize("build", [NetworkCoupling, Autoregressive])
def test_transform_with_parameters_of_its_own_is_trained(build):
    layer = perturbed(build(4, Slope()))
    assert "transform.weight" in layer.state_dict()
    assert_bijection(layer, torch.randn(2, 4))
    layer.inverse(torch.randn(2, 4))[1].sum().backward()
    assert layer.transform.weight.grad is not None


# --- autoregressive ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("reverse", [False, True])
def test_autoregressive_jacobian_is_triangular(transform, reverse, width):
    if isinstance(transform, CentredAffine):
        with pytest.raises(OptionError, match="single elements, got CentredAffine"):
            Autoregressive(4, transform)
        return
    layer = perturbed(Autoregressive(5, transform, width, reverse=reverse))
    jacobian = assert_bijection(layer, 0.4 * torch.randn(2, 5))
    ahead = jacobian.tril(-1) if reverse else jacobian.triu(1)
    behind = jacobian.triu(1) if reverse else jacobian.tril(-1)
    assert not ahead.any()
    # Already the neighbour is seen, and with enough width every element.
    assert bool((behind != 0).sum() >= (2 * 10 if width == 16 else 8))
    assert bool((jacobian.diagonal(dim1=1, dim2=2) > 0).all())


def test_autoregressive_takes_one_pass_to_score_and_one_for_every_element_to_sample():
    layer = perturbed(Autoregressive(6, width=16))
    calls = []
    layer.net.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 6)
    z = layer.inverse(x)[0]
    assert len(calls) == 1
    drawn = layer(z)[0]
    assert len(calls) == 7
    close(drawn, x, 1e-12)
    # One element after the other, as the definition says.
    expected = torch.zeros_like(z)
    for index in range(6):
        parameters = layer.net(expected).view(3, 6, 2)[:, index]
        log_scale = 2 * torch.tanh(parameters[:, 0] / 2)
        expected[:, index] = (z[:, index] - parameters[:, 1]) * (-log_scale).exp()
    close(drawn, expected, 1e-13)


# --- in models -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda reverse: NetworkCoupling(2, Affine(), (8,), reverse=reverse),
        lambda reverse: NetworkCoupling(2, Spline(), (8,), reverse=reverse),
        lambda reverse: Autoregressive(2, Affine(), 8, reverse=reverse),
        lambda reverse: Autoregressive(2, Spline(), 8, reverse=reverse),
    ],
)
def test_densities_of_a_host_model_integrate_to_one(build):
    flows = [
        perturbed(layer, 0.1) for layer in (build(False), LULinear(2), build(True), ActNorm(2))
    ]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2, trainable=False), flows)
    axis = torch.linspace(-12, 12, 481)
    with torch.no_grad():
        log_prob = model.log_prob(torch.cartesian_prod(axis, axis))
    close(log_prob.exp().sum() * 0.05**2, 1.0, 1e-4)
    x, log_q = model.sample(20)
    close(log_q, model.log_prob(x), 1e-9)


def vector_layers(context_dim=0):
    return {
        "additive": lambda: NetworkCoupling(4, Additive(), (8,), context_dim),
        "affine": lambda: NetworkCoupling(4, Affine(), (8,), context_dim),
        "centred": lambda: NetworkCoupling(4, CentredAffine(), (8,), context_dim, True),
        "spline": lambda: NetworkCoupling(4, Spline(4), (8,), context_dim),
        "autoregressive": lambda: Autoregressive(4, Affine(), 8, context_dim=context_dim),
        "lu_linear": lambda: LULinear(4),
        "householder": lambda: Householder(4, 2),
        "permutation": lambda: Permutation(4),
    }


@pytest.mark.parametrize("name", vector_layers())
def test_ensembles_go_through_vmap(name):
    members = [perturbed(vector_layers()[name]()) for _ in range(3)]
    x = torch.randn(5, 4)
    state = [dict([*m.named_parameters(), *m.named_buffers()]) for m in members]
    stacked = {key: torch.stack([s[key].detach() for s in state]) for key in state[0]}

    class Inverse(nn.Module):
        def __init__(self, flow):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            return self.flow.inverse(x)

    def call(module, prefix, values):
        named = {prefix + key: value for key, value in values.items()}
        return torch.func.functional_call(module, named, (x,))

    for module, prefix in ((members[0], ""), (Inverse(members[0]), "flow.")):
        together = torch.vmap(lambda s, m=module, p=prefix: call(m, p, s))(stacked)
        for index, member in enumerate(members):
            expected = member(x) if prefix == "" else member.inverse(x)
            for actual, wanted in zip(together, expected, strict=True):
                close(actual[index], wanted, 1e-12)


@pytest.mark.slow
def test_behind_an_injection_the_compiled_training_term_is_the_eager_one():
    def build(compile):
        manual_seed(1)
        flows = [
            nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(4, 2, (8,))),
            *(perturbed(vector_layers()[n]()) for n in ("affine", "lu_linear")),
        ]
        likelihood = nfi.SurrogateLikelihood(compile=compile)
        q0 = nf.distributions.DiagGaussian(2, trainable=False)
        return nfi.InjectiveNormalizingFlow(q0, flows, likelihood)

    eager, compiled = build(False), build({"backend": "aot_eager"})
    x = torch.randn(6, 4)
    losses = []
    for model in (eager, compiled):
        manual_seed(2)
        losses.append(model.forward_kld(x))
        losses[-1].backward()
    close(losses[1], losses[0].detach(), 1e-9)
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        close(ours.grad, theirs.grad, 1e-8)
    torch._dynamo.reset()


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (OptionError, "max_log_scale must be positive and finite, or None", lambda: Affine(0)),
        (OptionError, "for no bound, got -1", lambda: CentredAffine(-1.0)),
        (OptionError, "max_log_scale must be .* got inf", lambda: Affine(math.inf)),
        (OptionError, "max_log_scale must be .* got nan", lambda: Affine(math.nan)),
        (OptionError, "num_bins must be a positive integer, got 0", lambda: Spline(0)),
        (OptionError, "num_bins must be at most 1000, got 1001", lambda: Spline(1001)),
        (OptionError, "bound must be a positive number, got 0", lambda: Spline(4, 0)),
        (OptionError, "bound must be a positive number, got inf", lambda: Spline(4, math.inf)),
        (OptionError, r"for instance Affine\(\), got str", lambda: NetworkCoupling(4, "affine")),
        (OptionError, "got the class Affine", lambda: Autoregressive(4, Affine)),
        (OptionError, "must be an ElementTransform", lambda: Coupling(4, nn.Linear(2, 2), None)),
        (
            ShapeError,
            "NetworkCoupling needs at least two coordinates, .* got dim=1. Leave the layer out",
            lambda: NetworkCoupling(1),
        ),
        (
            OptionError,
            "dim must be a positive integer, got 0",
            lambda: NetworkCoupling(0, context_dim=2),
        ),
        (ShapeError, "Coupling needs at", lambda: Coupling(1, nn.Linear(1, 2), Affine())),
        (OptionError, "hidden must be a sequence", lambda: NetworkCoupling(4, hidden=8)),
        (OptionError, r"hidden\[1\] must be a", lambda: NetworkCoupling(4, hidden=(8, 0))),
        (OptionError, "context_dim must be", lambda: NetworkCoupling(4, context_dim=-1)),
        (OptionError, "dim must be a positive integer, got 0", lambda: Autoregressive(0)),
        (OptionError, "width must be a positive", lambda: Autoregressive(4, width=0)),
        (OptionError, "num_blocks must be a", lambda: Autoregressive(4, num_blocks=0)),
        (OptionError, "context_dim must be", lambda: Autoregressive(4, context_dim=-1)),
        (OptionError, "dim must be a positive integer, got 2.5", lambda: LULinear(2.5)),
        (OptionError, "dim must be a positive integer, got 0", lambda: Householder(0)),
        (OptionError, "num_reflections must be a positive", lambda: Householder(4, 0)),
        (OptionError, "dim must be a positive integer, got -1", lambda: Permutation(-1)),
        (OptionError, "dim must be a positive integer, got 0", lambda: ActNorm(0)),
    ],
)
def test_bad_options_are_named_errors(error, message, build):
    with pytest.raises(error, match=message):
        build()


def test_options_are_shown():
    assert repr(Affine()) == "Affine(max_log_scale=2.0)"
    assert repr(Spline(4)) == "Spline(num_bins=4, bound=4.0)"
    shown = repr(NetworkCoupling(3, Spline(4), (8,), reverse=True))
    assert "dim=3, transform=Spline(num_bins=4, bound=4.0), reverse=True" in shown
    assert "dim=3, transform=Additive(), reverse=False" in repr(Autoregressive(3, Additive()))


# --- in Pyro -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_guide_of_couplings_in_pyro():
    pyro = pytest.importorskip("pyro")
    from normflows_injective import pyro as nfp

    def model():
        with pyro.plate("six", 6):
            pyro.sample("z", pyro.distributions.Normal(3.0, 0.5))

    def layers(dim):
        return [NetworkCoupling(dim, Affine(), (8,)), LULinear(dim)]

    pyro.clear_param_store()
    guide = nfp.AutoFlow(model, layers, init_scale=0.02)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    pyro.clear_param_store()


def test_flow_of_couplings_is_a_pyro_distribution():
    pytest.importorskip("pyro")
    from normflows_injective import pyro as nfp

    flows = [perturbed(build()) for build in vector_layers().values()]
    base = nf.distributions.DiagGaussian(4, trainable=False)
    law = nfp.FlowDistribution(nf.NormalizingFlow(base, flows))
    x = law.rsample((5,))
    assert x.requires_grad
    model = nf.NormalizingFlow(base, flows)
    close(law.log_prob(x), model.log_prob(x), 1e-9)
    close(law.log_prob(x.detach().clone()), model.log_prob(x), 1e-9)


def test_a_first_pass_of_own_samples_under_frozen_parameters_changes_nothing():
    """Path-gradient objectives freeze the parameters, and score what the model has drawn."""

    class Target(nf.distributions.Target):
        def log_prob(self, z):
            return nf.distributions.DiagGaussian(2, trainable=False).log_prob(z)

    q0 = nf.distributions.DiagGaussian(2, trainable=False)
    kernels = nfi.flows.kernel.ferumal_realnvp(2, 2, 10)
    model = nf.NormalizingFlow(q0, [ActNorm(2), *kernels], Target())
    loss = model.reverse_kld(5, score_fn=False)
    loss.backward()
    close(loss, 0.0, 1e-12)
    assert not model.flows[0].log_scale.any()


def test_narrow_autoregressive_networks_are_refused():
    with pytest.raises(OptionError, match="width must be at least dim - 1 = 9"):
        Autoregressive(10, width=8)
    wide = perturbed(Autoregressive(70))
    jacobian = torch.func.jacrev(lambda s: wide.inverse(s.unsqueeze(0))[0][0])(torch.randn(70))
    assert bool((jacobian[-1] != 0).all())
