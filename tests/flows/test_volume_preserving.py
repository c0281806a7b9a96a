"""Volume-preserving layers against rearrangements, rotations and one another."""

from __future__ import annotations

import copy
import math
import pickle

import normflows as nf
import pytest
import torch
from support.models import perturbed
from support.seeds import manual_seed, seeded_generator
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import normflows_injective as nfi
from normflows_injective.errors import OptionError, ReducedLayerWarning, ShapeError
from normflows_injective.flows.volume_preserving import (
    GINCoupling,
    GlobalScale,
    NICECoupling,
    RadialFlow1D,
    Rotation,
    random_rotation,
)
from normflows_injective.layerwise.block import ConditionalMoments, MomentBlock

LAYERS = {
    "nice": lambda: NICECoupling(5, (8,)),
    "nice_reverse": lambda: NICECoupling(4, (8,), reverse=True),
    "gin": lambda: GINCoupling(5, (8,)),
    "gin_reverse": lambda: GINCoupling(4, (8,), reverse=True),
    "scale": lambda: GlobalScale(3),
    "rotation": lambda: Rotation(3),
    "radial": lambda: RadialFlow1D(3, 6),
    "radial_line": lambda: RadialFlow1D(1, 4),
    "moments": lambda: MomentBlock(5, ConditionalMoments(2, 3, (8,))),
}


def in_general_position(layer, size=0.5):
    return perturbed(layer.double(), size)


@pytest.fixture(params=LAYERS)
def layer(request):
    return in_general_position(LAYERS[request.param]())


@pytest.mark.slow
def test_forward_mode_and_double_backward_both_ways(layer):
    z = torch.randn(2, layer.shape[0], dtype=torch.float64)
    for function in (layer.forward, layer.inverse):
        rows = torch.func.vmap(torch.func.jacfwd(lambda s, f=function: f(s[None])[0][0]))(z)
        log_det = function(z)[1]
        torch.testing.assert_close(torch.linalg.slogdet(rows)[1], log_det, atol=1e-10, rtol=1e-10)
        assert gradcheck(function, (z.clone().requires_grad_(),))
        assert gradgradcheck(function, (z.clone().requires_grad_(),))


def test_round_trip_over_many_scales(layer):
    z = torch.randn(400, layer.shape[0], dtype=torch.float64)
    z = z * torch.logspace(-6, 2, 400, dtype=torch.float64).unsqueeze(1)
    x, log_det = layer(z)
    back, inverse_log_det = layer.inverse(x)
    torch.testing.assert_close(back, z, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", [NICECoupling, GINCoupling])
def test_couplings_have_log_det_zero_and_no_more(kind):
    coupling = in_general_position(kind(5, (8,)))
    z = torch.randn(50, 5, dtype=torch.float64)
    x, log_det = coupling(z)
    assert torch.equal(log_det, torch.zeros(50, dtype=torch.float64))
    assert not torch.allclose(x, z)
    scales = torch.func.vmap(torch.func.jacfwd(lambda s: coupling(s[None])[0][0]))(z)
    diagonal = scales.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal.log().sum(1), torch.zeros(50, dtype=torch.float64))
    assert (kind is GINCoupling) == bool((diagonal - 1).abs().max() > 1e-3)


def test_gin_of_one_active_coordinate_is_nice():
    manual_seed(3)
    with pytest.warns(ReducedLayerWarning, match="Take that, or more dimensions"):
        gin = GINCoupling(2, (8,))
    nice = NICECoupling(2, (8,))
    nice.load_state_dict(gin.state_dict())  # no output of the network is for scales
    nice, gin = nice.double(), gin.double()
    for coupling in (nice, gin):
        manual_seed(4)
        in_general_position(coupling)
    z = torch.randn(9, 2, dtype=torch.float64)
    assert torch.equal(nice(z)[0], gin(z)[0])
    assert not torch.allclose(nice(z)[0], z)


def test_two_coordinates_given_a_context_alone():
    coupling = in_general_position(NICECoupling(1, (8,), context_dim=2))
    z, context = torch.randn(4, 1).double(), torch.randn(4, 2).double()
    assert not torch.allclose(coupling(z, context)[0], z)
    with pytest.raises(ShapeError, match="build it with a context"):
        NICECoupling(1)


def test_a_flow_moves_density_values_and_changes_none():
    """The law of log q(x), x from the flow, is that of the base but for a constant."""
    layers = [
        GlobalScale(4),
        *(kind(4, (8,), reverse=r) for r in (False, True) for kind in (NICECoupling, GINCoupling)),
        Rotation(4),
    ]
    flow = [in_general_position(layer) for layer in layers]
    x = z = torch.randn(500, 4, dtype=torch.float64)
    total = z.new_zeros(500)
    for layer in flow:
        x, log_det = layer(x)
        total = total + log_det
    torch.testing.assert_close(total, total[:1].expand(500), atol=1e-12, rtol=0)
    back = x
    for layer in reversed(flow):
        back = layer.inverse(back)[0]
    base = nf.distributions.DiagGaussian(4).double()
    values = (base.log_prob(back) - total).sort().values
    expected = base.log_prob(z).sort().values - 4 * flow[0].log_scale
    torch.testing.assert_close(values, expected, atol=1e-9, rtol=1e-9)


def test_global_scale_counts_all_elements_of_an_event():
    scale = GlobalScale((2, 3)).double()
    nn.init.constant_(scale.log_scale, 0.5)
    x, log_det = scale(torch.ones(4, 2, 3, dtype=torch.float64))
    assert float(x.detach().max()) == pytest.approx(math.exp(0.5))
    torch.testing.assert_close(log_det, torch.full((4,), 3.0, dtype=torch.float64))
    with pytest.raises(OptionError, match=r"shape\[1\] must be a positive integer"):
        GlobalScale((2, 0))


def test_radial_flow_starts_as_the_identity():
    flow = RadialFlow1D(3).double()
    z = torch.randn(100, 3, dtype=torch.float64) * 3
    x, log_det = flow(z)
    torch.testing.assert_close(x, z, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(log_det, torch.zeros_like(log_det), atol=1e-13, rtol=0)


def test_radial_flow_commutes_with_rotations():
    flow = in_general_position(RadialFlow1D(4, 5), 1.0)
    z, q = torch.randn(50, 4, dtype=torch.float64), random_rotation(4)
    (turned, log_det), (x, expected) = flow(z @ q), flow(z)
    torch.testing.assert_close(turned, x @ q)
    torch.testing.assert_close(log_det, expected)


def test_radial_flow_is_a_scaling_at_the_origin_and_a_power_far_out():
    flow = in_general_position(RadialFlow1D(3, 6), 1.0)
    tiny = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    x, log_det = flow(tiny)
    assert torch.equal(x, torch.zeros_like(x))
    torch.testing.assert_close(log_det, 3 * flow.offset.expand(1))
    (gradient,) = torch.autograd.grad(x.sum() + log_det.sum(), tiny)
    torch.testing.assert_close(gradient, flow.offset.exp().expand(1, 3))
    far = torch.tensor([[1e3, 0.0, 0.0], [1e4, 0.0, 0.0]], dtype=torch.float64)
    slope = 6 * math.tanh(float(flow.log_derivatives[-1].detach()) / 6)
    ratio = flow(far)[0][:, 0].log().diff() / math.log(10)
    assert float(ratio.detach()) == pytest.approx(math.exp(slope))


def test_radial_flow_log_det_by_its_formula():
    """log h'(u) + D (h(u) - u), with h' by automatic differentiation of the radius."""
    flow = in_general_position(RadialFlow1D(5, 8), 1.0)
    z = torch.randn(40, 5, dtype=torch.float64)
    direction = torch.eye(5, dtype=torch.float64)[:1]
    u = z.norm(dim=1).log()

    def h(s):
        return flow(s.exp() * direction)[0].norm(dim=1).log()

    image, slope = torch.func.vmap(lambda s: torch.func.jvp(h, (s,), (torch.ones_like(s),)))(u)
    expected = slope[:, 0].log() + 5 * (image[:, 0] - u)
    torch.testing.assert_close(flow(z)[1], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 8, 64])
def test_default_knots_enclose_the_radii_of_a_normal(dim):
    knots = RadialFlow1D(dim).knots
    radii = torch.randn(40_000, dim).norm(dim=1).log()
    # 1e-3 is the bound; 40 rows are its mean, 6.3 its standard deviation, and five are allowed.
    assert int((radii < knots[0]).sum()) <= 72
    assert int((radii > knots[-1]).sum()) <= 72


@pytest.mark.slow
def test_radial_flow_lets_a_disc_be_uniform():
    """A radial layer makes the base any radial law: here that of a uniform disc, exactly."""
    manual_seed(1)
    flow = RadialFlow1D(2, 24)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    base = nf.distributions.DiagGaussian(2, trainable=False)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        radius, angle = torch.rand(512, 1).sqrt(), 2 * math.pi * torch.rand(512, 1)
        x = radius * torch.cat([angle.cos(), angle.sin()], dim=1)
        z, log_det = flow.inverse(x)
        loss = -(base.log_prob(z) + log_det).mean() - math.log(math.pi)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # The floor without the layer is 0.3069; the standard error of one batch about 0.01.
    assert -0.05 < float(loss.detach()) < 0.05


def test_radial_flow_from_data():
    z = 1e3 * torch.randn(2000, 3, dtype=torch.float64)
    flow = RadialFlow1D.from_data(z, 8)
    radii = z.norm(dim=1).log()
    assert flow.knots.dtype == torch.float64
    assert 1 <= int((radii < flow.knots[0]).sum()) <= 6
    assert 1 <= int((radii > flow.knots[-1]).sum()) <= 6
    twin = RadialFlow1D(3, 8).double()
    twin.load_state_dict(flow.state_dict())
    assert torch.equal(twin(z)[0], flow(z)[0])
    with pytest.raises(OptionError, match="two finite, increasing logarithms of radii"):
        RadialFlow1D.from_data(torch.ones(50, 2))
    with pytest.raises(ShapeError, match=r"z must have shape \(N, D\)"):
        RadialFlow1D.from_data(torch.ones(5, 2, 2))


@pytest.mark.slow
def test_random_rotations_are_uniform():
    """Entries of a Haar matrix have mean zero and variance 1/D; without the signs they do not."""
    generator = seeded_generator(0)
    draws = torch.stack([random_rotation(3, generator) for _ in range(4000)])
    # Standard errors: of a mean (1/3 / 4000)^0.5 = .009, of a mean square .005.
    assert draws.mean(0).abs().max() < 0.036
    assert (draws.square().mean(0) - 1 / 3).abs().max() < 0.025


def test_rotation_stays_orthogonal_in_another_dtype():
    turn = Rotation(random_rotation(4).float()).double()
    z = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(turn(z)[0].norm(dim=1), z.norm(dim=1), atol=1e-14, rtol=1e-14)


def test_rotation_remembers_its_factor_until_the_matrix_changes():
    manual_seed(0)
    turn, z = Rotation(4).double(), torch.randn(5, 4, dtype=torch.float64)
    first, second = random_rotation(4), random_rotation(4)
    for write in (
        lambda: turn.load_state_dict({"matrix": first}),
        lambda: turn.matrix.copy_(second),
        lambda: setattr(turn, "matrix", first),
        lambda: setattr(turn.matrix, "data", second),
    ):
        write()
        torch.testing.assert_close(turn(z)[0], z @ turn.matrix)
        assert turn._factor.of(turn.matrix) is turn._factor.of(turn.matrix)
    assert list(turn.state_dict()) == ["matrix"]
    assert turn.float()(z.float())[0].dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda turn: pickle.loads(pickle.dumps(turn))])
def test_copies_of_a_rotation_do_not_trust_the_factor_of_the_original(copied):
    turn, z = Rotation(4).double(), torch.randn(5, 4, dtype=torch.float64)
    turn.matrix.copy_(random_rotation(4))
    turn(z)
    twin = copied(turn)
    torch.testing.assert_close(twin(z)[0], turn(z)[0])
    # As many writes as the original has seen.
    for _ in range(3):
        twin.matrix.copy_(random_rotation(4))
        torch.testing.assert_close(twin(z)[0], z @ twin.matrix)


def test_rotation_that_was_first_called_in_inference_mode_trains():
    turn, z = Rotation(4), torch.randn(5, 4)
    with torch.inference_mode():
        expected = turn(z)[0].clone()
    moved = z.clone().requires_grad_()
    x, _ = turn(moved)
    x.square().sum().backward()
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(moved.grad, 2 * z)
    with torch.inference_mode():
        made = Rotation(4)
        torch.testing.assert_close(made.inverse(made(z)[0])[0], z)


def test_rotation_by_matrices_that_a_transform_hands_in():
    turn, z = Rotation(random_rotation(3)), torch.randn(5, 3, dtype=torch.float64)
    # The first call of all is inside two transforms.
    columns = torch.func.vmap(torch.func.jacfwd(lambda s: turn(s[None])[0][0]))(z)
    torch.testing.assert_close(columns, turn.matrix.T.expand(5, 3, 3))
    matrices = torch.stack([random_rotation(3) for _ in range(4)])

    def call(matrix):
        return torch.func.functional_call(turn, {"matrix": matrix}, (z,))[0]

    torch.testing.assert_close(torch.func.vmap(call)(matrices), z @ matrices)
    torch.testing.assert_close(turn(z)[0], z @ turn.matrix)


def test_rotation_refuses_what_is_none():
    with pytest.raises(OptionError, match="orthogonal matrix"):
        Rotation(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(ShapeError, match="square matrix"):
        Rotation(torch.ones(2, 3))
    with pytest.raises(nfi.errors.NonFiniteError, match="matrix of a Rotation"):
        Rotation(torch.full((2, 2), math.nan))


def test_moment_block_whitens_what_it_knows():
    """b normal, a = 3 b + 2 + exp(1) noise: a full step leaves standard normals."""
    moments = ConditionalMoments(1, 1, None).double()
    for parameter, value in zip(moments.parameters(), (2.0, 3.0, 1.0), strict=True):
        nn.init.constant_(parameter, value)
    b, noise = torch.randn(2, 30, 1, dtype=torch.float64)
    x = torch.cat([b, 3 * b + 2 + math.e * noise], dim=1)
    z, log_det = MomentBlock(2, moments, 1.0).inverse(x)
    torch.testing.assert_close(z, torch.cat([b, noise], dim=1))
    torch.testing.assert_close(log_det, torch.full((30,), -1.0, dtype=torch.float64))
    for step_size in (0.0, 1.5, math.nan):
        with pytest.raises(OptionError, match="step_size must (lie in|be a number, got nan)"):
            MomentBlock(2, moments, step_size)
