"""Laws on surfaces as Pyro priors and likelihoods."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from support.seeds import shifted

import normflows_injective as nfi
import normflows_injective.pyro as nfp
from normflows_injective.flows import gauges


def octahedron():
    return nfi.distributions.UniformOnSurface(gauges.LpGauge(1.0), dim=3)


@pytest.mark.parametrize(
    "law",
    [
        octahedron(),
        nfi.distributions.UniformSphere(4),
        nfi.distributions.VonMisesFisher([1, 0], 2),
    ],
)
def test_shapes_in_plates_and_expanded(law):
    prior = nfp.SurfaceDistribution(law)
    width = prior.event_shape[0]
    assert prior().shape == (width,)
    assert prior.sample((2, 5)).shape == (2, 5, width)
    assert prior.log_prob(prior.sample((2, 5))).shape == (2, 5)
    assert prior.expand((4,)).sample().shape == (4, width)

    def model():
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 2, dim=-1):
            return pyro.sample("x", prior)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (3, 2, width)
    assert trace.nodes["x"]["log_prob"].shape == (3, 2)


def test_values_off_the_surface_are_refused():
    prior = nfp.SurfaceDistribution(octahedron(), validate_args=True)
    assert prior.support.check(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])).tolist() == [
        True,
        False,
    ]
    with pytest.raises(ValueError, match="1 of 1 values lie off the manifold"):
        prior.log_prob(torch.ones(3))


def test_laws_that_are_no_densities_on_a_surface_are_refused():
    with pytest.raises(nfi.errors.OptionError, match="got a Tensor"):
        nfp.SurfaceDistribution(torch.ones(3))
    with pytest.raises(nfi.errors.OptionError, match="without a context"):
        nfp.SurfaceDistribution(
            nfi.distributions.UniformOnSurface(gauges.LpGauge(1.0), dim=3, level_from_context=0)
        )


@pytest.mark.slow
def test_as_a_prior_it_gives_the_evidence():
    """Pyro's importance sampling beside quadrature on the circle, within four standard errors."""
    prior = nfp.SurfaceDistribution(nfi.distributions.UniformSphere(2))
    observed = torch.tensor(0.8)

    def model():
        x = pyro.sample("x", prior)
        pyro.sample("y", pyro.distributions.Normal(x[0], 0.3), obs=observed)

    pyro.set_rng_seed(shifted(0))
    count = 3000
    weights = torch.stack(
        [pyro.poutine.trace(model).get_trace().log_prob_sum() for _ in range(count)]
    ) + math.log(2 * math.pi)
    angles = torch.arange(2000) * (2 * math.pi / 2000)
    likelihood = torch.distributions.Normal(angles.cos(), 0.3).log_prob(observed).exp()
    values = weights.exp()
    error = float(values.std()) / math.sqrt(count)
    assert abs(float(values.mean() - likelihood.mean())) < 4 * error
