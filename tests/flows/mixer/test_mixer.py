"""MixerFlow: its log-dets, its symmetries, its normalisation, and bits per dimension."""

from __future__ import annotations

import copy
import math

import normflows as nf
import numpy as np
import pytest
import torch
from support.dense import dense_jacobian
from support.seeds import seeded_generator, shifted
from torch import nn
from torch.distributions import MultivariateNormal

import normflows_injective as nfi
from normflows_injective.checkpoints.options import options_of
from normflows_injective.errors import (
    ContextError,
    DtypeError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
)
from normflows_injective.flows.coupling import (
    ActNorm,
    Affine,
    Autoregressive,
    Householder,
    LULinear,
    NetworkCoupling,
    Permutation,
    Spline,
)
from normflows_injective.flows.mixer import (
    ChannelMixing,
    Patchify,
    PatchMixing,
    PatchShift,
    bits_per_dim,
    dequantise,
    mixer_flow,
)

pytestmark = pytest.mark.usefixtures("float64_by_default")
SHIFTS = ["none", "roll", "interior"]
ELEMENTS = ["affine", "spline", "autoregressive"]
MIXINGS = [ChannelMixing, PatchMixing]


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype, device=actual.device)
    torch.testing.assert_close(
        actual.detach(), expected.detach().expand(actual.shape), atol=tolerance, rtol=tolerance
    )


def moved(flows, size=0.1):
    """Layers off their special initial values, and warm; far off they are ill-conditioned."""
    for module in nn.ModuleList(flows).modules():
        for parameter in module.parameters(recurse=False):
            parameter.data += size * torch.randn_like(parameter)
        if hasattr(module, "data_dep_init_done"):
            module.data_dep_init_done.fill_(1.0)
    return flows


def to_latents(flows, x, context=None):
    total = x.new_zeros(len(x))
    for flow in reversed(flows):
        x, log_det = flow.inverse(x, context)
        assert log_det.shape == total.shape
        total = total + log_det
    return x, total


def to_data(flows, z, context=None):
    total = z.new_zeros(len(z))
    for flow in flows:
        z, log_det = flow(z, context)
        total = total + log_det
    return z, total


def log_det_of_jacobian(flows, x, context=None):
    rows = [None] * len(x) if context is None else context.unsqueeze(1)
    jacobians = [
        dense_jacobian(lambda s, row=row: to_latents(flows, s, row)[0], image.unsqueeze(0))
        for image, row in zip(x, rows, strict=True)
    ]
    return torch.linalg.slogdet(torch.cat(jacobians))[1]


def assert_bijection(flows, x, context=None):
    """Round trip, and both log-dets against the dense Jacobian."""
    z, log_det = to_latents(flows, x, context)
    back, log_det_back = to_data(flows, z, context)
    close(back, x, 1e-9)
    close(log_det_back, -log_det, 1e-9)
    close(log_det, log_det_of_jacobian(flows, x, context))


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


# --- symmetries ----------------------------------------------------------------------------------


def layers_by(element, dim, context_dim=0):
    first = {
        "affine": lambda: NetworkCoupling(dim, Affine(), (8,), context_dim),
        "spline": lambda: NetworkCoupling(dim, Spline(), (8,), context_dim),
        "autoregressive": lambda: Autoregressive(dim, width=8, context_dim=context_dim),
    }[element]()
    return moved([first, LULinear(dim), ActNorm(dim)])


def permuted(x, patch_size, patches=None, places=None):
    """Images whose patches, and the values within them, stand in another order."""
    patchify = Patchify(x.shape[1:], patch_size)
    table = patchify.inverse(x)[0]
    table = table if patches is None else table[:, patches]
    return patchify(table if places is None else table[:, :, places])[0]


@pytest.mark.parametrize("element", ELEMENTS)
def test_channel_mixing_commutes_with_permutations_of_the_patches(element):
    layer, x = ChannelMixing((2, 4, 6), 2, layers_by(element, 8)), torch.randn(3, 2, 4, 6)
    z, log_det = layer.inverse(x)
    for _ in range(3):
        order = torch.randperm(6)
        moved_z, moved_log_det = layer.inverse(permuted(x, 2, patches=order))
        close(moved_z, permuted(z, 2, patches=order), 1e-13)
        close(moved_log_det, log_det, 1e-12)
    other = layer.inverse(permuted(x, 2, places=torch.arange(8).roll(1)))[0]
    assert not torch.allclose(other, permuted(z, 2, places=torch.arange(8).roll(1)))


@pytest.mark.parametrize("element", ELEMENTS)
def test_patch_mixing_commutes_with_permutations_within_the_patches(element):
    layer, x = PatchMixing((2, 4, 6), 2, layers_by(element, 6)), torch.randn(3, 2, 4, 6)
    z, log_det = layer.inverse(x)
    for _ in range(3):
        order = torch.randperm(8)
        moved_z, moved_log_det = layer.inverse(permuted(x, 2, places=order))
        close(moved_z, permuted(z, 2, places=order), 1e-13)
        close(moved_log_det, log_det, 1e-12)
    other = layer.inverse(permuted(x, 2, patches=torch.arange(6).roll(1)))[0]
    assert not torch.allclose(other, permuted(z, 2, patches=torch.arange(6).roll(1)))


@pytest.mark.parametrize("mixing", MIXINGS)
def test_an_embedding_tells_the_rows_apart(mixing):
    by_patches = mixing is ChannelMixing
    layer = mixing((1, 4, 4), 2, layers_by("affine", 4, 2), embedding_dim=2)
    x, order = torch.randn(3, 1, 4, 4), torch.tensor([1, 2, 3, 0])
    move = {"patches" if by_patches else "places": order}
    assert not torch.allclose(layer.inverse(permuted(x, 2, **move))[0], layer.inverse(x)[0])
    expected = permuted(layer.inverse(x)[0], 2, **move)
    layer.embedding.data = layer.embedding.data[order]
    close(layer.inverse(permuted(x, 2, **move))[0], expected, 1e-13)


class Dense(nf.flows.Flow):
    """Any matrix. Of an LU decomposition the pivots and the signs of the diagonal are fixed."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def inverse(self, x):
        return x @ self.matrix.T, torch.linalg.slogdet(self.matrix)[1].expand(len(x))

    def forward(self, z):
        return z @ torch.linalg.inv(self.matrix).T, -self.inverse(z)[1]


def without_permutation(flow, order):
    """The mixing that does to images what a given one does to permuted images."""
    twin = copy.deepcopy(flow)
    _, linear, norm = twin.layers
    where = order.argsort()
    norm.shift.data, norm.log_scale.data = norm.shift.data[where], norm.log_scale.data[where]
    if isinstance(linear, Permutation):
        linear.order.copy_(order[linear.order])
    else:
        linear.matrix.data = linear.matrix.data[:, where]
    return twin


@pytest.mark.parametrize("linear", ["dense", "permutation"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_the_class_of_densities_is_closed_under_permutations(element, linear):
    shape = (1, 4, 6)
    flows = moved(mixer_flow(shape, 2, 2, (8,), element=element, linear="permutation"))
    if linear == "dense":
        for flow in flows:
            dim = flow.layers[1].shape[0]
            flow.layers[1] = Dense(torch.eye(dim) + 0.3 * torch.randn(dim, dim))
    patches, places = torch.randperm(6), torch.randperm(4)
    base = nf.distributions.DiagGaussian(shape, trainable=False)
    model, x = nf.NormalizingFlow(base, flows), torch.randn(4, *shape)
    expected = model.log_prob(permuted(x, 2, patches, places))
    # The layer next to the data takes the permutation up.
    across, within = (
        without_permutation(flow, order)
        for flow, order in zip(flows[-2:], (patches, places), strict=True)
    )
    twin = nf.NormalizingFlow(base, [*flows[:-2], across, within])
    close(twin.log_prob(x), expected)
    assert not torch.allclose(model.log_prob(x), expected)


# --- patches and shifts --------------------------------------------------------------------------


def test_patches_are_read_row_by_row():
    x = torch.randn(2, 3, 4, 6)
    table = Patchify((3, 4, 6), 2).inverse(x)[0]
    for row in range(2):
        for column in range(3):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(table[:, 3 * row + column], patch.flatten(1))
    assert torch.equal(Patchify((3, 4, 6), 2)(table)[0], x)


@pytest.mark.parametrize("patch_size", [2, 3, 4])
def test_roll_moves_by_half_a_patch_and_back(patch_size):
    shape = (2, 2 * patch_size, 3 * patch_size)
    x, half = torch.randn(2, *shape), patch_size // 2
    shift = PatchShift("roll", shape, patch_size)
    z = shift.inverse(x)[0]
    assert torch.equal(z[:, :, 1, 2], x[:, :, 1 + half, 2 + half])
    assert torch.equal(z[:, :, -1, -1], x[:, :, half - 1, half - 1])
    assert torch.equal(shift(z)[0], x)
    assert torch.equal(PatchShift("roll", shape, patch_size, back=True).inverse(z)[0], x)


@pytest.mark.parametrize("patch_size", [2, 3])
def test_interior_is_what_its_layers_do_to_a_crop(patch_size):
    shape, left = (1, 2 * patch_size, 3 * patch_size), patch_size // 2
    seen = []

    def layers(interior):
        seen.append(interior)
        dim = patch_size**2
        return moved([ChannelMixing(interior, patch_size, layers_by("affine", dim))])

    shift = PatchShift("interior", shape, patch_size, layers)
    assert seen == [(1, patch_size, 2 * patch_size)]
    x = torch.randn(2, *shape)
    rows, columns = slice(left, left + patch_size), slice(left, left + 2 * patch_size)
    inside, log_det = shift.layers[0].inverse(x[:, :, rows, columns])
    expected = x.clone()
    expected[:, :, rows, columns] = inside.detach()
    z, moved_log_det = shift.inverse(x)
    assert torch.equal(z.detach(), expected)
    close(moved_log_det, log_det, 0)
    assert_bijection([shift], x)


@pytest.mark.parametrize("kind", SHIFTS)
def test_files_know_a_shift_by_these_names(kind):
    """Files of version 0.1 hold them, and must load."""
    layers = (lambda shape: [Permutation(4)]) if kind == "interior" else None
    shift = PatchShift(kind, (1, 4, 6), 2, layers, back=kind == "roll")
    names = {name: type(module).__name__ for name, module in shift.named_modules()}
    inside = {"layers.0": "Permutation"} if kind == "interior" else {}
    assert names == {"": "PatchShift", "layers": "ModuleList"} | inside
    assert list(shift.state_dict()) == ["layers.0.order"] * len(inside)
    values = options_of(shift)[""].values
    assert values == {
        "kind": kind,
        "shape": [1, 4, 6],
        "image_shape": [1, 4, 6],
        "patch_size": 2,
        "back": kind == "roll",
        "takes_context": False,
        "needs_context": False,
    }


def test_shifts_alternate_in_a_whole_flow():
    flows = mixer_flow((1, 4, 4), 2, 4, (4,), shift="roll")
    assert [flow.back for flow in flows[::3]] == [False, True, False, True]
    kinds = [type(flow) for flow in flows]
    assert kinds == [PatchShift, PatchMixing, ChannelMixing] * 4


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


# --- sizes ---------------------------------------------------------------------------------------


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def parameters_of_a_step(n, width):
    """ActNorm, a matrix kept in its own place, and a perceptron with two hidden layers."""
    kept = n // 2
    network = (kept * width + width) + (width**2 + width) + 2 * (n - kept) * (width + 1)
    return 2 * n + n**2 + network


@pytest.mark.parametrize(("n", "dense"), [(48, 13_632), (64, 18_816)])
def test_number_of_parameters_of_a_step(n, dense):
    # Two triangles stored as matrices and a diagonal of their own take n^2 + n more.
    expected = dense - (n**2 + n)
    assert parameters_of_a_step(n, 64) == expected
    step = mixer_flow((1, n, 1), 1, 1, (64, 64))[0]
    assert count(step) == expected


def test_number_of_parameters_of_a_whole_flow():
    flows = mixer_flow((3, 32, 32), 4, 8, (256, 256))
    expected = 8 * (parameters_of_a_step(48, 256) + parameters_of_a_step(64, 256))
    assert count(nn.ModuleList(flows)) == expected
    assert expected == 1_506_816 - 8 * (48**2 + 48 + 64**2 + 64)


@pytest.mark.parametrize(
    ("shape", "patch_size", "options"),
    [
        ((1, 8, 8), 2, {"shift": "interior"}),
        ((1, 28, 28), 4, {"element": "spline"}),
        ((3, 32, 32), 4, {"shift": "roll"}),
        ((3, 64, 64), 8, {}),
        ((3, 64, 64), 2, {"linear": "auto"}),
    ],
)
def test_images_of_ordinary_sizes(shape, patch_size, options):
    flows = mixer_flow(shape, patch_size, 2, (16,), **options)
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(shape), flows).float()
    pixels = torch.randint(256, (4, *shape))
    bits = bits_per_dim(model.log_prob(dequantise(pixels).float()), math.prod(shape))
    assert torch.isfinite(bits).all()
    bits.mean().backward()
    x, log_q = model.sample(2)
    assert x.shape == (2, *shape)
    assert torch.isfinite(log_q).all()


@pytest.mark.parametrize(
    ("linear", "of_many", "of_few"),
    [
        ("auto", Householder, LULinear),
        ("lu", LULinear, LULinear),
        ("householder", Householder, Householder),
        ("permutation", Permutation, Permutation),
    ],
)
def test_linear_maps_of_many_patches(linear, of_many, of_few):
    across, within = mixer_flow((1, 36, 36), 2, 1, (4,), linear=linear)
    assert type(across.layers[1]) is of_many
    assert type(within.layers[1]) is of_few


def test_dense_maps_reach_up_to_256_values():
    assert type(mixer_flow((1, 16, 16), 1, 1, (4,))[0].layers[1]) is LULinear
    assert type(mixer_flow((1, 16, 17), 1, 1, (4,))[0].layers[1]) is Householder


# --- layers of the host --------------------------------------------------------------------------

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


# --- pixels --------------------------------------------------------------------------------------


def bins_of(x, bits):
    return ((x.double() + 1) * 2 ** (bits - 1)).floor().long()


@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", ["drawn", "least", "most"])
def test_pixels_can_be_told_from_dequantised_ones(noise, dtype, bits, monkeypatch):
    torch.set_default_dtype(dtype)
    # The largest number below one that a generator of this dtype returns.
    extreme = {"least": 0.0, "most": 1 - torch.finfo(dtype).eps / 2}.get(noise)
    if extreme is not None:
        monkeypatch.setattr(
            torch, "rand", lambda size, dtype, **_: torch.full(size, extreme, dtype=dtype)
        )
    pixels = torch.arange(256).repeat(20)
    x = dequantise(pixels, bits)
    assert x.dtype == dtype
    assert float(x.min()) >= -1
    assert float(x.max()) < 1
    assert torch.equal(bins_of(x, bits), pixels // 2 ** (8 - bits))


def test_noise_is_uniform_within_its_bin():
    x = dequantise(torch.full((40_000,), 3), bits=2, stored_bits=2)
    noise = (x - 0.5) / 0.5
    # Standard errors 0.0014 and 0.0004.
    close(noise.mean(), 0.5, 0.006)
    close(noise.var(), 1 / 12, 0.002)
    assert len(noise.unique()) > 39_000
    generator = seeded_generator(3)
    first = dequantise(torch.zeros(5, dtype=torch.int64), generator=generator)
    again = dequantise(
        torch.zeros(5, dtype=torch.int64), generator=generator.manual_seed(shifted(3))
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("dtype", "stored_bits"),
    [(torch.uint8, 8), (torch.int8, 7), (torch.int16, 15), (torch.uint16, 16), (torch.int32, 16)],
)
@pytest.mark.parametrize("bits", [1, 3])
def test_short_integers_do_not_wrap_round(dtype, stored_bits, bits):
    values = torch.tensor([0, 2 ** (stored_bits - 1), 2**stored_bits - 1])
    x = dequantise(values.to(dtype), bits, stored_bits)
    assert bins_of(x, bits).tolist() == [0, 2 ** (bits - 1), 2**bits - 1]


def test_histograms_take_their_entropy():
    bits = 3
    mass = torch.rand(2**bits)
    mass = mass / mass.sum()
    entropy = float(-(mass * mass.log2()).sum())
    pixels = torch.cartesian_prod(*[torch.arange(2**bits)] * 3)
    x = dequantise(pixels, bits, bits)
    # The density of three independent pixels, constant in every bin.
    log_prob = (mass[bins_of(x, bits)] * 2**bits / 2).log().sum(1)
    weights = mass[pixels].prod(1)
    close((weights * bits_per_dim(log_prob, 3, bits)).sum(), entropy, 1e-12)


def test_bits_bound_those_of_the_mass_of_a_bin_and_reach_them_in_the_limit():
    nodes, weights = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(20))
    nodes, weights = (nodes + 1) / 2, weights / 2

    def log_density(x):
        # Of tanh(s + 0.3) for a standard normal s.
        s = x.atanh() - 0.3
        return -0.5 * s.square() - 0.5 * math.log(2 * math.pi) - (1 - x.square()).log()

    gaps = []
    for bits in (3, 5, 7):
        edges = torch.linspace(-0.5, 0.5, 2 ** (bits - 1) + 1)
        width = 2 / 2**bits
        x = edges[:-1, None] + width * nodes
        mass = (log_density(x).exp() * weights).sum(1) * width
        exact = torch.special.ndtr(edges.atanh() - 0.3).diff()
        close(mass, exact, 1e-6)
        bound = (bits_per_dim(log_density(x), 1, bits) * weights).sum(1)
        gap = bound + exact.log2()
        assert float(gap.min()) > 0
        gaps.append(float((gap * exact).sum()))
    # Jensen's gap is of the second order in the width of a bin.
    assert gaps[1] < gaps[0] / 8
    assert gaps[2] < gaps[1] / 8


def test_bits_add_the_constant_of_the_formula():
    log_prob = torch.tensor([-100.0, 3.0])
    for bits in (1, 5, 8):
        expected = -(log_prob + 12 * math.log(2 / 2**bits)) / (12 * math.log(2))
        close(bits_per_dim(log_prob, 12, bits), expected, 1e-13)


def test_bad_pixels_are_named_errors():
    with pytest.raises(
        DtypeError, match=r"integers, got torch.float32\. .* multiply by 31, round"
    ):
        dequantise(torch.rand(3, dtype=torch.float32), 5, 5)
    with pytest.raises(DtypeError, match="integers, got torch.bool"):
        dequantise(torch.ones(3, dtype=torch.bool))
    with pytest.raises(DtypeError, match=r"must be a torch.Tensor, got list\. Convert"):
        dequantise([1, 2])
    with pytest.raises(OptionError, match="bits must be at most stored_bits=5, got 8"):
        dequantise(torch.zeros(3, dtype=torch.int64), 8, 5)
    with pytest.raises(OptionError, match="within 0 and 31, got 0 to 40. Set stored_bits"):
        dequantise(torch.tensor([0, 40]), 5, 5)
    with pytest.raises(OptionError, match="within 0 and 255, got -1 to 40"):
        dequantise(torch.tensor([-1, 40]))
    with pytest.raises(OptionError, match="bits must be a positive integer, got 0"):
        dequantise(torch.tensor([0]), 0)
    with pytest.raises(OptionError, match="stored_bits must be a positive integer, got 0"):
        dequantise(torch.tensor([0]), 1, 0)
    with pytest.raises(OptionError, match="num_dims must be a positive integer, got 0"):
        bits_per_dim(torch.zeros(2), 0)
    with pytest.raises(OptionError, match="bits must be a positive integer, got 1.5"):
        bits_per_dim(torch.zeros(2), 3, 1.5)
    assert dequantise(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
