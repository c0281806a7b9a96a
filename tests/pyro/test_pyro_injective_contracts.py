"""What Pyro asks of learned manifolds, and the example of the autoencoder."""

from __future__ import annotations

import copy
import math

import normflows as nf
import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO
from support.models import pickled
from support.paths import EXAMPLES, run_code, run_example
from support.pyro_manifolds import POLICIES, RANK, D, data, flow, law, linear
from support.seeds import shifted
from torch import nn

from normflows_injective.pyro.laws.injective_distribution import InjectiveDistribution

# Contracts of Pyro


@pytest.mark.slow
@pytest.mark.parametrize("off_manifold", POLICIES)
def test_shapes(off_manifold):
    distribution = law(flow(), off_manifold)
    assert distribution().shape == (D,)
    for expanded in (distribution.expand([4]), distribution.expand([1]).expand([4])):
        assert expanded.rsample((3,)).shape == (3, 4, D)
        assert expanded.log_prob(data(3, 1)).shape == (3, 4)
    assert distribution.expand([2, 4]).to_event(1).log_prob(data(2, 4)).shape == (2,)
    assert distribution.expand([2]).to_event(1).event_shape == (2, D)
    masked = distribution.expand([3]).mask(torch.tensor([True, False, True]))
    assert masked.log_prob(data(3))[1] == 0
    assert repr(distribution.expand([4])).startswith(
        "InjectiveDistribution(InjectiveNormalizingFlow, batch_shape=(4,), event_shape=(5,)"
    )
    assert distribution.has_rsample
    dtype = law(flow().float(), off_manifold).rsample((2,)).dtype
    assert dtype == torch.float32


def test_a_context_gives_the_batch_shape():
    model, x = flow(context_dim=3), data(6)
    context = torch.randn(6, 3, dtype=torch.float64)
    distribution = law(model, context=context)
    assert distribution.batch_shape == (6,)
    torch.testing.assert_close(distribution.log_prob(x), model.log_prob(x, context))
    assert distribution.log_prob(data(2, 1)).shape == (2, 6)
    assert distribution.log_volume(data(2, 1)).shape == (2, 6)
    assert law(model, "thicken", context=context).rsample((4,)).shape == (4, 6, D)
    surrogate = law(model, "thicken", volume="surrogate", context=context)
    torch.testing.assert_close(
        surrogate.log_prob(x), law(model, "thicken", context=context).log_prob(x)
    )


@pytest.mark.parametrize("volume", ["exact", "surrogate"])
def test_data_scored_twice_around_a_change_get_the_present_density(volume):
    model, x = flow(), data(5)
    distribution = law(model, "thicken", volume=volume)
    loss = -distribution.log_prob(x).mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    after = distribution.log_prob(x)
    torch.testing.assert_close(after, law(model, "thicken").log_prob(x))
    assert not torch.allclose(after.mean(), -loss)
    after.sum().backward()


@pytest.mark.parametrize("off_manifold", POLICIES)
def test_copies_and_pickles_after_a_step(off_manifold):
    distribution = law(flow(), off_manifold)
    x, score = distribution.rsample_and_log_prob((3,))
    score.sum().backward()
    given = data(4)
    for again in (copy.deepcopy(distribution), pickled(distribution)):
        torch.testing.assert_close(again.log_prob(given), distribution.log_prob(given))
        assert again.model is not distribution.model


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-2.5))

    def forward(self):
        return self.log_scale.exp()


@pytest.mark.parametrize("volume", ["exact", "surrogate"])
@pytest.mark.parametrize(
    "elbo",
    [
        lambda: Trace_ELBO(),
        lambda: Trace_ELBO(num_particles=2, vectorize_particles=True),
        lambda: RenyiELBO(alpha=0.5, num_particles=2, vectorize_particles=True),
    ],
    ids=["trace", "particles", "renyi"],
)
def test_as_a_likelihood_in_a_subsampled_plate(elbo, volume):
    model, noise, x = flow(), Noise(), data(20)

    def likelihood():
        pyro.module("flow", model)
        pyro.module("noise", noise)
        shift = pyro.sample("shift", pyro.distributions.Normal(0.0, 1.0).expand([D]).to_event(1))
        distribution = law(model, "thicken", volume=volume, noise_scale=noise)
        with pyro.plate("data", len(x), subsample_size=8) as index:
            pyro.sample("x", distribution, obs=x[index] - shift.unsqueeze(-2).double())

    guide = pyro.infer.autoguide.AutoNormal(likelihood)
    svi = SVI(likelihood, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    before = {name: p.clone() for name, p in [*model.named_parameters(), ("s", noise.log_scale)]}
    losses = [svi.step() for _ in range(4)]
    assert all(map(math.isfinite, losses))
    after = dict([*model.named_parameters(), ("s", noise.log_scale)])
    assert all(not torch.equal(before[n], p) for n, p in after.items() if p.requires_grad)


def test_renyi_sees_exact_values_with_either_volume():
    model, x = flow(), data(6)
    losses = []
    for volume in ("exact", "surrogate"):
        pyro.set_rng_seed(shifted(0))

        def likelihood(volume=volume):
            with pyro.plate("data", len(x)):
                pyro.sample("x", law(model, "thicken", volume=volume), obs=x)

        losses.append(RenyiELBO(alpha=0.0, num_particles=2).loss(likelihood, lambda: None))
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_predictive_draws_from_plates():
    model = flow()

    def simulate():
        with pyro.plate("data", 6):
            pyro.sample("x", law(model, "thicken", volume="surrogate"))

    for parallel in (False, True):
        drawn = Predictive(simulate, num_samples=3, parallel=parallel)()
        assert drawn["x"].shape == (3, 6, D)


def test_as_a_prior_and_a_guide():
    """The divergence of two laws on one manifold, that of their bases by the closed form."""
    model = linear(bias=False)
    moved = copy.deepcopy(model)
    moved.q0 = nf.distributions.DiagGaussian(RANK, trainable=True).double()
    moved.flows = model.flows
    with torch.no_grad():
        moved.q0.loc.fill_(0.5)
        model.flows[0].encoder.weight.copy_(torch.linalg.pinv(model.flows[0].decoder.weight))

    def prior():
        pyro.sample("x", InjectiveDistribution(model))

    def guide():
        pyro.module("base", moved.q0)
        pyro.sample("x", InjectiveDistribution(moved))

    # Standard errors are 0.02, of log-weights of variance one half, and 0.03.
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True)
    loss = elbo.loss_and_grads(prior, guide)
    assert loss == pytest.approx(RANK * 0.5**2 / 2, abs=0.1)
    torch.testing.assert_close(
        moved.q0.loc.grad, torch.full_like(moved.q0.loc, 0.5), rtol=0, atol=0.15
    )


# The example

EXAMPLE = EXAMPLES / "pyro" / "vae.py"


@pytest.mark.slow
def test_the_example_of_the_autoencoder_runs(tmp_path):
    pytest.importorskip("sklearn")
    done = run_example("pyro/vae.py", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 8
    assert "nan" not in done.stdout
    assert (tmp_path / "pyro_vae.png").stat().st_size > 0


@pytest.mark.slow
def test_the_example_says_what_to_install_without_pyro():
    pytest.importorskip("sklearn")
    hide = f"import runpy, sys; sys.modules['pyro'] = None; runpy.run_path({str(EXAMPLE)!r})"
    done = run_code(hide)
    assert done.returncode != 0
    assert "pip install normflows-injective[pyro]" in done.stderr
