"""Linear maps between couplings, and normalisation by the first batch."""

from __future__ import annotations

import copy
import math

import normflows as nf
import pytest
import torch
from support.comparison import close
from support.coupling_oracles import assert_bijection
from support.models import perturbed

import normflows_injective as nfi
from normflows_injective.errors import NonFiniteError, ShapeError
from normflows_injective.flows.coupling import ActNorm, Householder, LULinear, Permutation, linear

pytestmark = pytest.mark.usefixtures("float64_by_default")


# --- linear maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_dense_map_is_its_matrix(dim):
    layer = perturbed(LULinear(dim))
    x = torch.randn(3, dim)
    jacobians = assert_bijection(layer, x)
    matrix = layer.matrix().detach()
    close(jacobians, matrix.expand(3, dim, dim), 1e-14)
    close(layer.inverse(x)[1], torch.linalg.slogdet(matrix)[1], 1e-12)
    close(layer(layer.inverse(x)[0])[0], x, 1e-13)
    assert [p.numel() for p in layer.parameters()] == [dim**2]
    # It is the product that its name says, with its rows in another order.
    packed = layer.packed.detach()
    upper = packed.triu(1) + packed.diagonal().exp().diag()
    lower = packed.tril(-1) + torch.eye(dim)
    close(matrix, (lower @ upper)[layer.order], 1e-14)


def test_dense_map_starts_orthogonal_and_keeps_float64():
    layer = LULinear(300).float().double()
    matrix = layer.matrix().detach()
    close(matrix @ matrix.T, torch.eye(300), 1e-14)
    x = torch.randn(2, 300)
    close(layer(layer.inverse(x)[0])[0], x, 1e-13)
    close(layer.inverse(x)[1], 0.0, 1e-14)


@pytest.mark.parametrize("num_reflections", [1, 2, 5, 9])
def test_householder_is_the_product_of_its_reflections(num_reflections):
    layer = Householder(5, num_reflections)
    x = torch.randn(3, 5)
    jacobian = assert_bijection(layer, x)[0]
    matrix = torch.eye(5)
    for v in layer.vectors.detach():
        matrix = (torch.eye(5) - 2 * torch.outer(v, v) / (v @ v)) @ matrix
    close(jacobian, matrix, 1e-13)
    close(matrix @ matrix.T, torch.eye(5), 1e-13)
    close(torch.linalg.det(jacobian), (-1.0) ** num_reflections, 1e-12)
    assert torch.equal(layer.inverse(x)[1], torch.zeros(3))
    assert [p.numel() for p in layer.parameters()] == [5 * num_reflections]
    before = layer.inverse(x)[0].detach()
    layer.vectors.data *= -3.0
    close(layer.inverse(x)[0], before, 1e-13)


def test_permutation_is_a_fixed_random_order():
    layer, x = Permutation(50), torch.randn(3, 50)
    z, log_det = layer.inverse(x)
    assert torch.equal(z, x[:, layer.order])
    assert torch.equal(layer(z)[0], x)
    assert torch.equal(log_det, torch.zeros(3))
    assert sorted(layer.order.tolist()) == list(range(50))
    assert not torch.equal(layer.order, Permutation(50).order)
    twin = Permutation(50)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.inverse(x)[0], z)


# --- normalisation -------------------------------------------------------------------------------


def test_first_batch_is_normalised_and_no_later_one():
    layer, x = ActNorm(4), 3 + 2 * torch.randn(100, 4) * torch.tensor([0.01, 1, 10, 100])
    z, log_det = layer.inverse(x)
    close(z.mean(0), 0.0, 1e-12)
    close(z.std(0), 1.0, 1e-12)
    close(log_det, -x.std(0).log().sum(), 1e-12)
    state = copy.deepcopy(layer.state_dict())
    again = layer.inverse(7 * x - 3)[0]
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    twin = ActNorm(4)
    twin.load_state_dict(state)
    assert torch.equal(twin.inverse(7 * x - 3)[0], again)
    assert torch.equal(copy.deepcopy(layer).inverse(7 * x - 3)[0], again)
    assert_bijection(layer, x[:3])


def test_normalisation_is_that_of_the_host():
    ours, theirs, x = ActNorm(3), nf.flows.ActNorm((3,)), 3 + 2 * torch.randn(50, 3)
    # normflows adds 1e-6 to the standard deviation.
    close(ours.inverse(x)[0], theirs.inverse(x)[0], 2e-6)
    close(ours.inverse(x)[1], theirs.inverse(x)[1], 2e-6)


def test_constant_columns_are_not_blown_up():
    layer, x = ActNorm(3), torch.randn(50, 3) * torch.tensor([2.0, 0.0, 4.0]) + 7
    z, log_det = layer.inverse(x)
    close(z[:, 1], 0.0, 1e-12)
    deviations = x.std(0)[[0, 2]]
    close(log_det, -deviations.log().sum() - deviations.mean().log(), 1e-12)


def test_whether_data_were_met_follows_a_state_that_is_loaded():
    layer, cold = ActNorm(2), copy.deepcopy(ActNorm(2).state_dict())
    x = torch.randn(20, 2)
    first = layer.inverse(x)[0]
    layer.load_state_dict(cold)
    close(layer.inverse(3 * x)[0], first, 1e-12)


def test_samples_do_not_normalise():
    layer, z = ActNorm(3), torch.randn(5, 3)
    assert torch.equal(layer(z)[0], z)
    assert layer.data_dep_init_done == 0
    close(layer.inverse(2 * z)[0].mean(0), 0.0, 1e-12)


@pytest.mark.parametrize("num_samples", [1, 20])
@pytest.mark.parametrize("name", ["shift", "log_scale"])
def test_what_was_trained_by_samples_is_not_normalised_again(name, num_samples):
    layer = ActNorm(3)
    optimiser = torch.optim.SGD([getattr(layer, name)], 0.1)
    x, log_det = layer(torch.randn(5, 3))
    (x.square().mean() + log_det.mean()).backward()
    optimiser.step()
    state = copy.deepcopy(layer.state_dict())
    layer.inverse(3 + torch.randn(num_samples, 3))
    assert torch.equal(layer.shift, state["shift"])
    assert torch.equal(layer.log_scale, state["log_scale"])
    assert layer.data_dep_init_done == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_normalisation_without_gradients_leaves_parameters_to_train(mode):
    layer, x = ActNorm(3), torch.randn(20, 3)
    with mode():
        layer.inverse(x.clone())
    (layer.inverse(x)[0].square().sum() - layer.inverse(x)[1].sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert layer.data_dep_init_done == 1


def test_batches_that_cannot_be_normalised():
    layer = ActNorm(3)
    with pytest.raises(
        ShapeError, match="ActNorm has one sample, which has no standard deviation"
    ):
        layer.inverse(torch.randn(1, 3))
    with pytest.raises(NonFiniteError, match="the first batch of ActNorm has 1 of 6 values NaN"):
        layer.inverse(torch.tensor([[0.0, 1.0, 2.0], [3.0, math.nan, 5.0]]))
    with pytest.raises(ShapeError, match=r"x must have shape \(B, 3\), got \(2, 4\)"):
        layer.initialise(torch.randn(2, 4))
    assert layer.inverse(torch.zeros(0, 3))[0].shape == (0, 3)
    assert layer.data_dep_init_done == 0
    assert not layer.shift.any()
    assert not layer.log_scale.any()
    layer.initialise(torch.randn(5, 3))
    assert layer.inverse(torch.randn(1, 3))[0].shape == (1, 3)


def test_a_trial_pass_leaves_the_normalisation_to_the_data():
    norm = ActNorm(4)
    model = nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(2, trainable=False), [nfi.flows.LinearInjection(2, 4), norm]
    )
    assert norm.data_dep_init_done == 0
    assert not norm.shift.any()
    x = 3 + 2 * torch.randn(50, 4)
    model.log_prob(x)
    close(norm.shift, -x.mean(0), 1e-12)


def test_factors_and_their_product_are_one_map(monkeypatch):
    layer = LULinear(7)
    torch.nn.init.normal_(layer.packed, std=0.3)
    x = torch.randn(20, 7)

    def step():
        z, log_det = layer.inverse(x)
        (gradient,) = torch.autograd.grad(z.square().sum() + log_det.sum(), layer.packed)
        return z, log_det, gradient

    product = step()
    close(product[0], x @ layer.matrix().mT, 1e-13)
    monkeypatch.setattr(linear, "_MOST_IN_A_PRODUCT", 6)
    for one, other in zip(step(), product, strict=True):
        close(one, other, 1e-12)
