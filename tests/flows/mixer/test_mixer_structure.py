"""MixerFlow: its symmetries, its patches and shifts, and its size."""

from __future__ import annotations

import copy
import math

import normflows as nf
import pytest
import torch
from support.comparison import close
from support.mixer_oracles import ELEMENTS, MIXINGS, SHIFTS, assert_bijection, moved
from torch import nn

from normflows_injective.checkpoints.options import options_of
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
