"""Element transforms, couplings, autoregressive layers and what stands between them."""

from __future__ import annotations

import copy
import math

import normflows as nf
import pytest
import torch
from normflows.utils import splines as host_splines
from support.dense import dense_jacobian
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import ContextError, NonFiniteError, OptionError, ShapeError
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
from normflows_injective.flows.splines import bounded_spline

pytestmark = pytest.mark.usefixtures("float64_by_default")
DOUBLE = torch.float64


class SinhArcsinh(ElementTransform):
    """A transform as a user writes one, z = sinh(e^a arcsinh x + t)."""

    num_parameters = 2

    def inverse(self, x, parameters):
        log_scale, shift = parameters.unbind(-1)
        u = log_scale.exp() * x.asinh() + shift
        slopes = log_scale + u.cosh().log() - 0.5 * (1 + x.square()).log()
        return u.sinh(), slopes.sum(-1)

    def forward(self, z, parameters):
        log_scale, shift = parameters.unbind(-1)
        x = ((z.asinh() - shift) * (-log_scale).exp()).sinh()
        return x, -self.inverse(x, parameters)[1]


TRANSFORMS = {
    "additive": Additive,
    "affine": Affine,
    "affine_unbounded": lambda: Affine(None),
    "centred": CentredAffine,
    "spline": Spline,
    "spline_short": lambda: Spline(3, 1.5),
    "user_written": SinhArcsinh,
}


@pytest.fixture(params=TRANSFORMS)
def transform(request):
    return TRANSFORMS[request.param]()


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype, device=actual.device)
    torch.testing.assert_close(
        actual.detach(), expected.detach().expand(actual.shape), atol=tolerance, rtol=tolerance
    )


def moved(layer, size=0.3):
    """A layer with parameters away from their special initial values."""
    for parameter in layer.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return layer


def assert_bijection(layer, x, context=None):
    """Round trip, and both log-dets against the dense Jacobian."""
    z, log_det = layer.inverse(x, context)
    back, log_det_back = layer(z, context)
    close(back, x, 1e-9)
    close(log_det_back, -log_det, 1e-9)
    assert log_det.shape == (len(x),)
    rows = [None] * len(x) if context is None else context.unsqueeze(1)
    jacobians = torch.cat(
        [
            dense_jacobian(lambda s, row=row: layer.inverse(s, row)[0], point.unsqueeze(0))
            for point, row in zip(x, rows, strict=True)
        ]
    )
    close(log_det, torch.linalg.slogdet(jacobians)[1], 1e-9)
    return jacobians.detach()


# --- transforms of an element --------------------------------------------------------------------


def test_transform_is_increasing_and_has_the_derivative_it_says(transform):
    parameters = torch.randn(4, 3, transform.num_parameters)
    x = 3 * torch.randn(4, 3)
    z, log_det = transform.inverse(x, parameters)
    back, log_det_back = transform.forward(z, parameters)
    close(back, x, 1e-9)
    close(log_det_back, -log_det, 1e-9)
    for row in range(4):
        given = parameters[row : row + 1]
        jacobian = dense_jacobian(
            lambda s, given=given: transform.inverse(s, given)[0], x[row : row + 1]
        )[0].detach()
        slopes = jacobian.diagonal()
        close(jacobian, slopes.diag(), 0)
        assert bool((slopes > 0).all())
        close(log_det[row], slopes.log().sum(), 1e-9)


def test_transform_is_the_identity_at_zero_parameters(transform):
    x = 3 * torch.randn(5, 3)
    at_rest = torch.zeros(5, 3, transform.num_parameters)
    for direction in (transform.forward, transform.inverse):
        z, log_det = direction(x, at_rest)
        close(z, x, 1e-14)
        close(log_det, 0.0, 1e-13)


@pytest.mark.slow
def test_transform_has_gradients_and_tangents(transform):
    x = torch.randn(1, 2).requires_grad_()
    parameters = torch.randn(1, 2, transform.num_parameters).requires_grad_()
    for direction in (transform.forward, transform.inverse):
        assert torch.autograd.gradcheck(direction, (x, parameters), check_forward_ad=True)


def test_volumes_are_kept_exactly():
    parameters, x = 3 * torch.randn(5, 4, 2), torch.randn(5, 4)
    for direction in (CentredAffine().forward, CentredAffine().inverse):
        assert torch.equal(direction(x, parameters)[1], torch.zeros(5))
        jacobian = dense_jacobian(lambda s, f=direction: f(s, parameters[:1])[0], x[:1])
        close(torch.linalg.slogdet(jacobian)[1], 0.0, 1e-12)
        assert float(jacobian[0].diagonal().detach().std()) > 1e-2
    assert torch.equal(Additive().inverse(x, parameters[..., :1])[1], torch.zeros(5))


def test_of_a_single_element_volumes_are_kept_by_shifts_alone():
    parameters, x = torch.randn(5, 1, 2), torch.randn(5, 1)
    for name in ("forward", "inverse"):
        expected = getattr(Additive(), name)(x, parameters[..., 1:])[0]
        assert torch.equal(getattr(CentredAffine(), name)(x, parameters)[0], expected)


@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_log_scales_are_softly_bounded(bound):
    said = torch.tensor([[[1e6, 0.0]], [[-1e6, 0.0]], [[1e-6, 0.0]]])
    log_det = Affine(bound).inverse(torch.ones(3, 1), said)[1]
    close(log_det[:2], [bound, -bound], 1e-12)
    close(log_det[2] / 1e-6, 1.0, 1e-9)
    close(Affine(None).inverse(torch.ones(3, 1), said / 1e6)[1], said[:, 0, 0] / 1e6, 0)


# --- splines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("num_bins", [1, 2, 7])
def test_spline_is_that_of_the_host(inverse, num_bins):
    x = torch.empty(500).uniform_(-3, 3)
    rows, derivatives = torch.randn(500, 2 * num_bins), torch.randn(500, num_bins + 1)
    ends = {"left": -3.0, "right": 3.0, "bottom": -3.0, "top": 3.0}
    expected = host_splines.rational_quadratic_spline(
        x, rows[:, :num_bins], rows[:, num_bins:], derivatives, inverse=inverse, **ends
    )
    for actual, wanted in zip(
        bounded_spline(x, rows, derivatives, 3.0, inverse), expected, strict=True
    ):
        close(actual, wanted, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 5.0, 20.0])
def test_spline_is_inverted_to_the_last_digits_in_single_precision(size):
    spline = Spline(8)
    x = torch.empty(20_000, 1, dtype=torch.float32).uniform_(-4, 4)
    parameters = (size * torch.randn(20_000, 1, spline.num_parameters)).float()
    z = spline.inverse(x, parameters)[0]
    # Where the spline is flat digits of x are lost, but what is found goes to z again.
    back, log_det = spline.forward(z, parameters)
    again, log_det_again = spline.inverse(back, parameters)
    assert float((again - z).abs().max()) < 1e-4
    assert torch.isfinite(log_det).all()
    assert float((log_det + log_det_again).abs().quantile(0.99)) < 0.02


def test_spline_keeps_its_interval_and_what_is_beyond():
    spline = Spline(5, 2.0)
    parameters = torch.randn(1, 1, spline.num_parameters).expand(7, 1, -1).requires_grad_()
    x = torch.tensor([[-1e9], [-2.5], [-2.0], [2.0], [2.0 + 1e-9], [math.inf], [math.nan]])
    z, log_det = spline.inverse(x, parameters)
    torch.testing.assert_close(z.detach(), x, equal_nan=True, atol=1e-12, rtol=0)
    # Its derivative is one at the ends, so that it is smooth there.
    close(log_det, 0.0, 1e-12)
    (gradient,) = torch.autograd.grad(z[:6].nan_to_num().sum() + log_det.sum(), parameters)
    assert torch.isfinite(gradient).all()


def test_spline_has_finite_gradients_at_its_knots():
    spline = Spline(4, 2.0)
    knots = torch.linspace(-2, 2, 5)[:, None].requires_grad_()
    parameters = torch.zeros(5, 1, spline.num_parameters).requires_grad_()
    for direction in (spline.forward, spline.inverse):
        z, log_det = direction(knots, parameters)
        found = torch.autograd.grad(z.sum() + log_det.sum(), (knots, parameters))
        assert all(torch.isfinite(g).all() for g in found)
        close(found[0], 1.0, 1e-12)


# --- couplings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [2, 5])
def test_coupling_keeps_a_part_and_moves_the_other_by_it(transform, dim, reverse):
    layer = moved(NetworkCoupling(dim, transform, (8,), reverse=reverse))
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
    layer = moved(NetworkCoupling(3, hidden=hidden, activation=activation))
    assert_bijection(layer, torch.randn(2, 3))


@pytest.mark.parametrize("build", [NetworkCoupling, Autoregressive])
@pytest.mark.parametrize("dim", [1, 4])
def test_context_moves_what_is_transformed(build, dim):
    layer = moved(build(dim, Affine(), context_dim=2))
    x, context = torch.randn(3, dim), torch.randn(3, 2)
    assert_bijection(layer, x, context)
    assert not torch.allclose(layer.inverse(x, context)[0], layer.inverse(x, -context)[0])
    with pytest.raises(ContextError, match=r"context_dim=2 takes a context of shape \(3, 2\)"):
        layer.inverse(x)
    with pytest.raises(ContextError, match=r"got one of shape \(3, 5\)"):
        layer(x, torch.randn(3, 5))
    without = moved(build(4))
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
    layer = moved(build(4, Slope()))
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
    layer = moved(Autoregressive(5, transform, width, reverse=reverse))
    jacobian = assert_bijection(layer, 0.4 * torch.randn(2, 5))
    ahead = jacobian.tril(-1) if reverse else jacobian.triu(1)
    behind = jacobian.triu(1) if reverse else jacobian.tril(-1)
    assert not ahead.any()
    # Already the neighbour is seen, and with enough width every element.
    assert bool((behind != 0).sum() >= (2 * 10 if width == 16 else 8))
    assert bool((jacobian.diagonal(dim1=1, dim2=2) > 0).all())


def test_autoregressive_takes_one_pass_to_score_and_one_for_every_element_to_sample():
    layer = moved(Autoregressive(6, width=16))
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


# --- linear maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_dense_map_is_its_matrix(dim):
    layer = moved(LULinear(dim))
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
    # The host adds 1e-6 to the standard deviation.
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
    flows = [moved(layer, 0.1) for layer in (build(False), LULinear(2), build(True), ActNorm(2))]
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
    members = [moved(vector_layers()[name]()) for _ in range(3)]
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
            *(moved(vector_layers()[n]()) for n in ("affine", "lu_linear")),
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
    guide = nfp.AutoFlow(model, layers)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    pyro.clear_param_store()


def test_flow_of_couplings_is_a_pyro_distribution():
    pytest.importorskip("pyro")
    from normflows_injective import pyro as nfp

    flows = [moved(build()) for build in vector_layers().values()]
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
    wide = moved(Autoregressive(70))
    jacobian = torch.func.jacrev(lambda s: wide.inverse(s.unsqueeze(0))[0][0])(torch.randn(70))
    assert bool((jacobian[-1] != 0).all())
