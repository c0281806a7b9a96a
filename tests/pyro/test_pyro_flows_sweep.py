"""Every layer of normflows as a Pyro guide, and as a likelihood where it has an inverse."""

from __future__ import annotations

import normflows as nf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from support.dense import dense_jacobian
from support.models import base, coupling, perturbed, spline
from support.seeds import manual_seed, shifted

import normflows_injective as nfi
import normflows_injective.pyro as nfp

DIM, IMAGE = 3, (4, 2, 2)
ANGLES = {"ind_circ": [1], "tail_bound": torch.pi}


def _masked():
    b = torch.tensor([1.0, 0.0, 1.0])
    return nf.flows.MaskedAffineFlow(b, nf.nets.MLP([3, 8, 3]), nf.nets.MLP([3, 8, 3]))


def _residual(**options):
    net = nf.nets.LipschitzMLP([2, 8, 2], init_zeros=False, lipschitz_const=0.7)
    return nf.flows.Residual(net, **options)


def _composite():
    return nf.flows.Composite([coupling(DIM), nf.flows.Permute(DIM, "swap"), coupling(DIM)])


# Name of the class -> layers of that class, by a further word where there are several of them.
VECTORS = {
    "ActNorm": lambda: nf.flows.ActNorm((DIM,)),
    "AffineConstFlow": lambda: nf.flows.AffineConstFlow((DIM,)),
    "AffineCouplingBlock": lambda: coupling(DIM),
    "AutoregressiveRationalQuadraticSpline": lambda: (
        nf.flows.AutoregressiveRationalQuadraticSpline(DIM, 1, 8, init_identity=False)
    ),
    "CircularAutoregressiveRationalQuadraticSpline": lambda: (
        nf.flows.CircularAutoregressiveRationalQuadraticSpline(
            DIM, 1, 8, init_identity=False, **ANGLES
        )
    ),
    "CircularCoupledRationalQuadraticSpline": lambda: (
        nf.flows.CircularCoupledRationalQuadraticSpline(DIM, 1, 8, init_identity=False, **ANGLES)
    ),
    "Composite": _composite,
    "CoupledRationalQuadraticSpline": lambda: spline(DIM),
    "InvertibleAffine": lambda: nf.flows.InvertibleAffine(DIM),
    "InvertibleAffine matrix": lambda: nf.flows.InvertibleAffine(DIM, use_lu=False),
    "LULinearPermute": lambda: nf.flows.LULinearPermute(DIM),
    "MaskedAffineAutoregressive": lambda: nf.flows.MaskedAffineAutoregressive(DIM, 8),
    "MaskedAffineFlow": _masked,
    "PeriodicShift": lambda: nf.flows.PeriodicShift([0], torch.pi, 0.3),
    "PeriodicWrap": lambda: nf.flows.PeriodicWrap([0], torch.pi),
    "Permute": lambda: nf.flows.Permute(DIM),
    "Permute swap": lambda: nf.flows.Permute(DIM, "swap"),
    "Planar leaky": lambda: nf.flows.Planar((DIM,), act="leaky_relu"),
    "Reverse": lambda: nf.flows.Reverse(nf.flows.MaskedAffineAutoregressive(DIM, 8)),
}
IMAGES = {
    "GlowBlock": lambda: nf.flows.GlowBlock(4, 4, init_zeros=False),
    "Invertible1x1Conv": lambda: nf.flows.Invertible1x1Conv(4, True),
    "Invertible1x1Conv matrix": lambda: nf.flows.Invertible1x1Conv(4),
    "Squeeze": nf.flows.Squeeze,
}
ONE_WAY = {
    "Planar": lambda: nf.flows.Planar((DIM,)),
    "Radial": lambda: nf.flows.Radial((DIM,)),
}
NORMAL = nf.distributions.DiagGaussian(DIM)
REFUSED = {
    "BatchNorm": lambda: nf.flows.BatchNorm(),
    "HamiltonianMonteCarlo": lambda: nf.flows.HamiltonianMonteCarlo(
        NORMAL, 2, torch.zeros(DIM), torch.zeros(DIM)
    ),
    "MetropolisHastings": lambda: nf.flows.MetropolisHastings(
        NORMAL, nf.distributions.DiagGaussianProposal((DIM,), 0.1), 2
    ),
}
# They work on lists, or on class labels, inside other layers of normflows.
PARTS = {"AffineCoupling", "CCAffineConst", "Flow", "Merge", "Split"}
BY_ESTIMATE = {"Residual"}
TWO_WAYS = {**VECTORS, **IMAGES}


def test_the_sweep_is_complete():
    classes = {
        name
        for name, value in vars(nf.flows).items()
        if isinstance(value, type) and issubclass(value, nf.flows.Flow)
    }
    swept = {name.split()[0] for group in (TWO_WAYS, ONE_WAY, REFUSED) for name in group}
    assert classes == swept | PARTS | BY_ESTIMATE


def build(name, warm=True):
    """A model in float64 of one layer, and the shape of its base."""
    manual_seed(0)
    layer = {**TWO_WAYS, **ONE_WAY}[name]().double()
    shape = IMAGE if name in IMAGES else (DIM,)
    flow = nf.NormalizingFlow(base(*shape).double(), [layer])
    if warm and name in ("ActNorm", "GlowBlock"):
        layer(torch.randn(50, *shape).double())
    perturbed(layer, 0.05)
    return flow, shape


def laws(name, warm=True):
    """The distribution of the model, and its layers as a transform of the normal law."""
    flow, shape = build(name, warm)
    own = nfp.FlowDistribution(flow, event_dim=len(shape))
    transform = nfp.FlowTransform(list(flow.flows), event_dim=len(shape))
    normal = dist.Normal(torch.zeros(shape).double(), 1.0).to_event(len(shape))
    moved = dist.TransformedDistribution(normal, transform)
    return flow, {"distribution": own, "transform": moved}


@pytest.mark.parametrize("kind", ["distribution", "transform"])
@pytest.mark.parametrize("name", [*TWO_WAYS, *ONE_WAY])
def test_as_a_guide(name, kind):
    flow, both = laws(name)
    law = both[kind]
    event = law.event_shape
    assert event == both["distribution"].event_shape

    def guide():
        nfp.module("flow", flow.eval())
        with pyro.plate("rows", 5):
            pyro.sample("x", law)

    def model():
        with pyro.plate("rows", 5):
            pyro.sample("x", dist.Normal(torch.ones(event).double(), 1.0).to_event(len(event)))

    loss = infer.Trace_ELBO()
    loss.loss_and_grads(model, guide)
    trained = {n: p for n, p in flow.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None]
    effective = {n for n, p in trained.items() if (p.grad != 0).any()}
    before = {n: p.detach().clone() for n, p in trained.items()}
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    svi.step()
    changed = {n for n, p in trained.items() if not torch.equal(before[n], p)}
    assert effective <= changed
    # By the seed rectified units of normflows are never on, so that one parameter has no effect.
    assert len(changed) >= len(trained) - 1


@pytest.mark.parametrize("name", [*TWO_WAYS, *ONE_WAY])
def test_gradients_of_a_guide_are_those_of_finite_differences(name):
    flow, both = laws(name)
    law = both["distribution"]

    def objective():
        manual_seed(1)
        x = law.rsample((4,))
        return (law.log_prob(x) + (x - 1).square().flatten(1).sum(1)).mean()

    trained = [p for p in flow.parameters() if p.requires_grad]
    if not trained:
        assert not objective().requires_grad
        return
    # normflows' planar layer has a log-det in float32.
    step, tol = (1e-4, 1e-2) if name == "Planar leaky" else (1e-6, 1e-4)
    objective().backward()
    for parameter in trained:
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(float(objective()))
                parameter.sub_(sign * step * direction)
        found = float((parameter.grad * direction).sum())
        assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=tol, abs=tol)


@pytest.mark.parametrize("kind", ["distribution", "transform"])
@pytest.mark.parametrize("name", TWO_WAYS)
def test_given_values_are_scored_by_change_of_variables(name, kind):
    flow, both = laws(name)
    law, layer = both[kind], flow.flows[0]
    with torch.no_grad():
        z = flow.q0(4)[0]
        x = layer(z)[0]
    volume = torch.linalg.slogdet(dense_jacobian(lambda t: layer(t)[0], z).detach())[1]
    expected = dist.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1) - volume
    tol = 1e-6 if name == "Planar leaky" else 1e-9
    torch.testing.assert_close(law.log_prob(x), expected, rtol=0, atol=tol)
    drawn = law.rsample((3,))
    again = law.log_prob(drawn.detach().clone())
    torch.testing.assert_close(law.log_prob(drawn), again, rtol=0, atol=tol)


@pytest.mark.parametrize("kind", ["distribution", "transform"])
@pytest.mark.parametrize("name", ONE_WAY)
def test_given_values_without_an_inverse_are_refused_by_name(name, kind):
    law = laws(name)[1][kind]
    assert law.log_prob(law.rsample((3,))).isfinite().all()
    with pytest.raises(nfi.errors.UnsupportedModelError, match=f"{name} has no inverse"):
        law.log_prob(torch.zeros(3, DIM).double())
    with pytest.raises(NotImplementedError):
        law.log_prob(torch.zeros(DIM).double())


@pytest.mark.parametrize("name", REFUSED)
def test_layers_without_a_density_are_refused(name):
    layer = REFUSED[name]()
    with pytest.raises(nfi.errors.UnsupportedLayerError, match=name):
        nfp.FlowTransform(layer)
    with pytest.raises(nfi.errors.UnsupportedLayerError, match=name):
        nfp.FlowDistribution(nf.NormalizingFlow(base(DIM), [coupling(DIM), layer]))


@pytest.mark.parametrize("name", ["ActNorm", "GlowBlock"])
def test_layers_that_start_by_data_start_right_in_a_guide(name):
    """The first draw of a guide is a single one, which has no standard deviation."""
    flow, both = laws(name, warm=False)
    law = both["distribution"]
    x = law.rsample()
    assert x.isfinite().all()
    assert law.log_prob(x).isfinite()
    assert all(p.isfinite().all() for p in flow.parameters())
    other = laws(name, warm=False)[1]
    with pytest.raises(nfi.errors.ShapeError, match="larger batch"):
        other["transform"].rsample()
    with pytest.raises(nfi.errors.ShapeError, match="larger batch"):
        other["distribution"].log_prob(x.detach())
    assert other["transform"].rsample((20,)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("reduce_memory", [True, False])
def test_residual_flows_estimate_the_score_and_its_gradient(reverse, reduce_memory):
    """Beside the brute force, which normflows has in two dimensions; four standard errors."""
    manual_seed(0)
    np.random.seed(shifted(0))
    exact = _residual(reverse=reverse, brute_force=True)
    noisy = _residual(reverse=reverse, reduce_memory=reduce_memory)
    noisy.load_state_dict(exact.state_dict())
    results = {}
    for layer in (exact, noisy):
        nf.utils.update_lipschitz(layer, 20)
        law = nfp.FlowDistribution(nf.NormalizingFlow(base(2), [layer]))
        values, gradients = [], []
        for seed in range(25):
            manual_seed(seed)
            layer.zero_grad()
            x = law.rsample((100,))
            loss = (law.log_prob(x) + (x - 1).square().sum(1)).mean()
            loss.backward()
            values.append(loss.detach())
            gradients.append(
                torch.cat([p.grad.flatten() for n, p in layer.named_parameters() if "net." in n])
            )
        results[layer] = torch.stack(values), torch.stack(gradients)
    for one, other in zip(results[exact], results[noisy], strict=True):
        difference = one - other
        error = difference.std(0) / len(difference) ** 0.5
        assert (difference.mean(0).abs() < 4 * error + 1e-4).all()
    # The parameters of the estimator itself are constants.
    idle = [n for n, p in noisy.named_parameters() if p.grad is None]
    assert idle == ["iresblock.geom_p", "iresblock.lamb"]
