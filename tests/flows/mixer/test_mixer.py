"""MixerFlow: its log-dets, first batches, layers of normflows, contexts and options."""

from __future__ import annotations

import copy

import normflows as nf
import pytest
import torch
from support.comparison import close
from support.mixer_oracles import (
    ELEMENTS,
    MIXINGS,
    SHIFTS,
    assert_bijection,
    log_det_of_jacobian,
    moved,
    to_data,
    to_latents,
)
from torch import nn
from torch.distributions import MultivariateNormal

import normflows_injective as nfi
from normflows_injective.errors import ContextError, OptionError, ShapeError, UnsupportedLayerError
from normflows_injective.flows.coupling import ActNorm, LULinear, NetworkCoupling, Spline
from normflows_injective.flows.mixer import (
    ChannelMixing,
    Patchify,
    PatchMixing,
    PatchShift,
    mixer_flow,
)

pytestmark = pytest.mark.usefixtures("float64_by_default")


def steps_of(flows):
    """The mixings of a list of flows without a shift, and the parts of their single step."""
    return [(flow, *flow.layers) for flow in flows]


# --- log-dets ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_log_det_is_that_of_the_dense_jacobian(element, shift):
    flows = moved(mixer_flow((1, 6, 6), 2, 2, (8,), element=element, shift=shift))
    assert_bijection(flows, torch.randn(2, 1, 6, 6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "patch_size", "options"),
    [
        ((3, 4, 6), 2, {"num_steps": 2, "shift": "roll"}),
        ((2, 6, 3), 3, {"embedding_dim": 2}),
        ((1, 6, 9), 3, {"shift": "interior", "linear": "householder", "embedding_dim": 2}),
        ((2, 2, 4), 2, {"linear": "permutation", "hidden": (8, 8, 8)}),
    ],
)
def test_log_det_of_other_shapes_and_options(shape, patch_size, options):
    options = {"hidden": (8,), "layers": 2, **options}
    assert_bijection(moved(mixer_flow(shape, patch_size, **options)), torch.randn(2, *shape))


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(("shape", "patch_size"), [((1, 3, 3), 3), ((1, 2, 3), 1)])
def test_a_single_patch_and_a_single_value(shape, patch_size, element, context_dim):
    flows = moved(mixer_flow(shape, patch_size, 2, (8,), element=element, context_dim=context_dim))
    context = torch.randn(1, context_dim) if context_dim else None
    assert_bijection(flows, torch.randn(1, *shape), context)
    # Of one value there is nothing to mix: without a context it is only scaled.
    alone = min(len(flow.layers) for flow in flows)
    assert alone == (2 if context_dim else 1)


def test_terms_without_data_count_once_for_every_row():
    flows = mixer_flow((2, 4, 6), 2, 3, (8,))
    expected = 0.0
    for mixing, _, linear, norm in steps_of(flows):
        moved([linear, norm])
        term = norm.log_scale.sum() + linear.packed.diagonal().sum()
        expected += {ChannelMixing: 6, PatchMixing: 8}[type(mixing)] * term
    x = torch.randn(3, 2, 4, 6)
    close(to_latents(flows, x)[1], expected)
    close(to_data(flows, x)[1], -expected)


def test_without_elements_the_density_is_a_gaussian_of_kronecker_covariance():
    shape, num_patches, patch_dim = (1, 4, 6), 6, 4
    flows = mixer_flow(shape, 2, 1, (8,))
    factors, shifts = {}, {}
    for mixing, _, linear, norm in steps_of(flows):
        moved([linear, norm])
        factors[type(mixing)] = (linear.matrix() * norm.log_scale.exp()).detach()
        shifts[type(mixing)] = norm.shift.detach()
    across, within = factors[PatchMixing], factors[ChannelMixing]
    # Patch after patch; the channels are mixed first.
    constant = across @ (
        (within @ shifts[ChannelMixing]).expand(num_patches, patch_dim)
        + shifts[PatchMixing][:, None]
    )
    inverse = torch.linalg.inv(torch.kron(across, within))
    law = MultivariateNormal(-inverse @ constant.flatten(), inverse @ inverse.T)
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(shape, trainable=False), flows)
    x = torch.randn(5, *shape)
    table = Patchify(shape, 2).inverse(x)[0].flatten(1)
    close(model.log_prob(x), law.log_prob(table))
    drawn, log_q = model.sample(4)
    close(log_q, law.log_prob(Patchify(shape, 2).inverse(drawn)[0].flatten(1)))


# --- normalisation -------------------------------------------------------------------------------


def rows_of(x, mixing):
    """Values (rows, coordinates) that a layer within a mixing normalises."""
    table = Patchify(x.shape[1:], 2).inverse(x)[0]
    return table.flatten(0, 1) if mixing is ChannelMixing else table.mT.flatten(0, 1)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("num_images", [1, 20])
def test_first_batch_is_normalised_over_samples_and_rows(mixing, num_images):
    dim = 8 if mixing is ChannelMixing else 6
    layer = mixing((2, 4, 6), 2, [ActNorm(dim)])
    x = 3 + 2 * torch.randn(num_images, 2, 4, 6) * torch.rand(2, 4, 6)
    z = rows_of(layer.inverse(x)[0].detach(), mixing)
    close(z.mean(0), torch.zeros(dim))
    close(z.std(0), torch.ones(dim), 1e-4)
    state = copy.deepcopy(layer.state_dict())
    layer.inverse(5 * x)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    twin = mixing((2, 4, 6), 2, [ActNorm(dim)])
    twin.load_state_dict(state)
    close(twin.inverse(5 * x)[0], layer.inverse(5 * x)[0], 0)


def norms_of(flows):
    return [module for module in nn.ModuleList(flows).modules() if isinstance(module, ActNorm)]


def test_first_batch_normalises_every_layer_of_a_host_model_and_samples_do_not():
    shape = (1, 4, 4)
    flows = mixer_flow(shape, 2, 3, (8,))
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(shape, trainable=False), flows)
    model.sample(4)
    assert all(norm.data_dep_init_done == 0 for norm in norms_of(flows))
    x = 3 + 2 * torch.randn(50, *shape)
    model.log_prob(x)
    assert all(norm.data_dep_init_done == 1 for norm in norms_of(flows))
    for flow in reversed(flows):
        after_norm = flow.layers[-1].inverse(rows_of(x, type(flow)))[0]
        close(after_norm.mean(0), torch.zeros(4))
        close(after_norm.std(0), torch.ones(4), 1e-5)
        x = flow.inverse(x)[0].detach()


@pytest.mark.parametrize("estimator", ["surrogate", "exact"])
def test_behind_an_injection_the_first_batch_normalises_and_the_trial_does_not(estimator):
    shape = (1, 4, 4)
    flows = mixer_flow(shape, 2, 2, (8,))
    injection = (
        nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(16, 3, (8,)))
        if estimator == "surrogate"
        else nfi.flows.LinearInjection(3, 16)
    )
    model = nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(3, trainable=False),
        [injection, nfi.flows.Reshape((16,), shape), *flows],
    )
    assert not any(norm.shift.any() or norm.data_dep_init_done for norm in norms_of(flows))
    x = 3 + 2 * torch.randn(20, *shape)
    if estimator == "surrogate":
        model.forward_kld(x).backward()
    else:
        model.log_prob(x)
    assert all(norm.data_dep_init_done == 1 for norm in norms_of(flows))
    close(flows[-1].layers[-1].shift, -rows_of(x, ChannelMixing).mean(0))
    # Once they are set, the parameters are trained and do not move by themselves.
    state = copy.deepcopy(model.flows.state_dict())
    model.forward_kld(2 * x).backward()
    after = model.flows.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_single_row_cannot_be_normalised():
    layer = ChannelMixing((1, 2, 2), 2, [ActNorm(4)])
    with pytest.raises(ShapeError, match=r"one sample, which has no standard deviation\. Start"):
        layer.inverse(torch.randn(1, 1, 2, 2))
    assert layer.layers[0].data_dep_init_done == 0


# --- layers of normflows -------------------------------------------------------------------------

HOST_LAYERS = {
    "ActNorm": lambda: nf.flows.ActNorm((4,)),
    "InvertibleAffine": lambda: nf.flows.InvertibleAffine(4),
    "InvertibleAffine_dense": lambda: nf.flows.InvertibleAffine(4, use_lu=False),
    "LULinearPermute": lambda: nf.flows.LULinearPermute(4),
    "AffineCouplingBlock": lambda: nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4])),
    "CoupledRationalQuadraticSpline": lambda: nf.flows.CoupledRationalQuadraticSpline(4, 1, 8),
    "MaskedAffineAutoregressive": lambda: nf.flows.MaskedAffineAutoregressive(4, 8),
}


@pytest.mark.parametrize("name", HOST_LAYERS)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_layers_of_the_host(mixing, name):
    layer = mixing((1, 4, 4), 2, [HOST_LAYERS[name](), HOST_LAYERS[name]()])
    layer.inverse(1 + torch.randn(10, 1, 4, 4))
    assert_bijection(moved([layer], 0.05), torch.randn(2, 1, 4, 4))


@pytest.mark.parametrize("mixing", MIXINGS)
def test_actnorm_of_the_host_pools_over_the_rows_too(mixing):
    ours, theirs = (mixing((1, 4, 4), 2, [n]) for n in (ActNorm(4), nf.flows.ActNorm((4,))))
    x = 3 + 2 * torch.randn(10, 1, 4, 4)
    for actual, expected in zip(theirs.inverse(x), ours.inverse(x), strict=True):
        close(actual, expected, 1e-5)


# --- context -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("element", ELEMENTS)
def test_context_in_the_hosts_conditional_model(element):
    shape = (1, 4, 4)
    flows = moved(
        mixer_flow(shape, 2, 2, (8,), element, "auto", "interior", context_dim=3, embedding_dim=2)
    )
    model = nf.ConditionalNormalizingFlow(
        nf.distributions.DiagGaussian(shape, trainable=False), flows
    )
    x, context = torch.randn(2, *shape), torch.randn(2, 3)
    together = model.log_prob(x, context)
    z = to_latents(flows, x, context)[0]
    close(together, model.q0.log_prob(z) + log_det_of_jacobian(flows, x, context))
    assert not torch.allclose(model.log_prob(x, context.flip(0)), together)
    drawn, log_q = model.sample(2, context)
    close(log_q, model.log_prob(drawn, context))
    model.forward_kld(x, context).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_missing_and_wrong_context():
    layer = ChannelMixing((1, 4, 4), 2, [NetworkCoupling(4, context_dim=3)], 3)
    assert nfi.host.context.takes_context(layer)
    x = torch.randn(2, 1, 4, 4)
    message = r"ChannelMixing with context_dim=3 takes a context of shape \(2, 3\), got {}\. One-"
    with pytest.raises(ContextError, match=message.format("none")):
        layer.inverse(x)
    for shape in ((2, 4), (1, 3), (2,)):
        came = r"one of shape " + str(shape).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ContextError, match=message.format(came)):
            layer(x, torch.randn(shape))


def test_layers_without_a_context_stand_beside_those_with_one():
    shape = (1, 4, 4)
    without = moved(
        mixer_flow(shape, 2, 1, (8,), shift="roll") + mixer_flow(shape, 2, 1, (8,), ELEMENTS[2])
    )
    assert not any(nfi.host.context.takes_context(flow) for flow in without)
    x, context = torch.randn(5, *shape), torch.randn(5, 3)
    for flow in without:
        close(flow.inverse(x, context)[0], flow.inverse(x)[0], 0)
        close(flow(x, context)[0], flow(x)[0], 0)
    reading = moved(mixer_flow(shape, 2, 1, (8,), context_dim=3))
    base = nf.distributions.DiagGaussian(shape, trainable=False)
    model = nf.ConditionalNormalizingFlow(base, without + reading)
    z, log_det = to_latents(without + reading, x, context)
    close(model.log_prob(x, context), base.log_prob(z) + log_det)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_context_that_no_layer_reads_is_refused(mixing):
    with pytest.raises(OptionError, match=r"None of the layers of .*Mixing takes a context, .* 5"):
        mixing((1, 4, 4), 2, [LULinear(4)], 3, 2)
    with pytest.raises(OptionError, match="was built with a context, but none would come. Set"):
        mixing((1, 4, 4), 2, [NetworkCoupling(4, context_dim=2)])
    unconditional = nf.flows.CoupledRationalQuadraticSpline
    with pytest.raises(OptionError, match="would be ignored"):
        mixing((1, 4, 4), 2, [unconditional(4, 1, 8)], embedding_dim=2)
    mixing((1, 4, 4), 2, [unconditional(4, 1, 8, num_context_channels=2)], embedding_dim=2)


# --- options -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_element_of_ones_own():
    asked = []

    def element(dim, features, reverse):
        asked.append((dim, features, reverse))
        return NetworkCoupling(dim, Spline(3), (4,), features, reverse)

    flows = mixer_flow((1, 4, 6), 2, 2, element=element, num_steps=2, context_dim=1)
    assert asked == [
        (n, 1, r) for n, r in zip([6, 6, 4, 4] * 2, [0, 1] * 2 + [1, 0] * 2, strict=True)
    ]
    assert_bijection(moved(flows), torch.randn(2, 1, 4, 6), torch.randn(2, 1))


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ShapeError, r"must be \(channels, height, width\), .* got 28", (28, 4), {}),
        (ShapeError, r"must be \(channels, height, width\)", ((28, 28), 4), {}),
        (ShapeError, r"must be \(channels, height, width\)", ((0, 28, 28), 4), {}),
        (ShapeError, "patch_size=5 must divide .* 28x30. Pad or crop", ((1, 28, 30), 5), {}),
        (OptionError, "patch_size must be a positive integer, got 0", ((1, 4, 4), 0), {}),
        (OptionError, "layers must be a positive integer, got 0", ((1, 4, 4), 2, 0), {}),
        (OptionError, "num_steps must be a positive", ((1, 4, 4), 2), {"num_steps": 0}),
        (
            OptionError,
            "hidden must be a sequence of positive integers",
            ((1, 4, 4), 2),
            {"hidden": 8},
        ),
        (OptionError, "hidden must hold at least one", ((1, 4, 4), 2), {"hidden": ()}),
        (OptionError, r"hidden\[0\] must be a positive", ((1, 4, 4), 2), {"hidden": (0,)}),
        (OptionError, "context_dim must be a non-negative", ((1, 4, 4), 2), {"context_dim": -1}),
        (OptionError, "embedding_dim must be", ((1, 4, 4), 2), {"embedding_dim": -1}),
        (
            OptionError,
            "element must be one of affine, spline, autoregressive or a function, got 'kan'",
            ((1, 4, 4), 2),
            {"element": "kan"},
        ),
        (
            OptionError,
            "linear must be one of auto, lu, householder, permutation, got 'qr'",
            ((1, 4, 4), 2),
            {"linear": "qr"},
        ),
        (OptionError, "shift must be one of none, roll, interior", ((1, 4, 4), 2), {"shift": "x"}),
        (OptionError, "at least 2x2 values and at least two", ((1, 4, 4), 4), {"shift": "roll"}),
        (OptionError, "got patch_size=1 for 4x4", ((1, 4, 4), 1), {"shift": "interior"}),
    ],
)
def test_bad_options_of_a_flow_are_named_errors(error, message, arguments, options):
    with pytest.raises(error, match=message):
        mixer_flow(*arguments, **options)


def test_bad_options_of_layers_are_named_errors():
    with pytest.raises(OptionError, match="kind must be one of none, roll, interior, got 'x'"):
        PatchShift("x", (1, 4, 4), 2)
    with pytest.raises(OptionError, match="layers go with kind='interior' and with it alone"):
        PatchShift("interior", (1, 4, 4), 2)
    with pytest.raises(OptionError, match=r"got kind='roll'\. Pass a function"):
        PatchShift("roll", (1, 4, 4), 2, lambda shape: [])
    with pytest.raises(UnsupportedLayerError, match="Linear is no flow"):
        ChannelMixing((1, 4, 4), 2, [nn.Linear(4, 4)])
    with pytest.raises(UnsupportedLayerError, match="Radial has no inverse"):
        PatchMixing((1, 4, 4), 2, [nf.flows.Radial((4,))])
    with pytest.raises(OptionError, match="embedding_dim must be a non-negative integer, got -2"):
        ChannelMixing((1, 4, 4), 2, [LULinear(4)], embedding_dim=-2)
    with pytest.raises(ShapeError, match=r"x must have shape \(B, 1, 4, 4\), got \(2, 4, 4\)"):
        ChannelMixing((1, 4, 4), 2, [LULinear(4)]).inverse(torch.zeros(2, 4, 4))
    with pytest.raises(ShapeError, match=r"vectors of 4 values, got a LULinear of shape \(5,\)"):
        ChannelMixing((1, 4, 4), 2, [LULinear(5)])
    with pytest.raises(OptionError, match="takes a list of layers, got one LULinear"):
        ChannelMixing((1, 4, 4), 2, LULinear(4))


def test_an_empty_batch_passes():
    layers = mixer_flow((1, 4, 4), 2, layers=1, hidden=(4,))
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian((1, 4, 4)), layers)
    model.log_prob(torch.rand(5, 1, 4, 4))
    assert model.log_prob(torch.rand(0, 1, 4, 4)).shape == (0,)
