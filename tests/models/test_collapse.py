"""Warnings of trainings that lose the manifold, and their silence in healthy ones."""

from __future__ import annotations

import copy
import warnings

import normflows as nf
import pytest
import torch
from support.models import base, coupling, mlp_injection, model, pickled
from support.seeds import manual_seed
from torch import nn
from torch.nn import functional as F

import normflows_injective as nfi
from normflows_injective.errors import (
    CollapseWarning,
    ScaleWarning,
    SmoothnessWarning,
    StackingWarning,
)
from normflows_injective.models.collapse import CollapseWatch, warn_of_scales

WINDOW = 50


def shown(errors, deviations, watch=None):
    """Show a watch windows of given reconstruction errors and round trips, for two latents."""
    watch = watch or CollapseWatch()
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # of variance 2
    for error, deviation in zip(errors, deviations, strict=True):
        for _ in range(WINDOW):
            watch.look(x, torch.full((2,), error), torch.full((2,), 2 * (deviation - 1)), 2)
    return watch


COLLAPSES = {
    "a direction is never found": ([2.7, 1.4, 0.84, 0.67, 0.62], [0.96, 0.72, 0.71, 0.71, 0.707]),
    "after a warm-up": ([0.02, 0.02, 0.2, 0.3, 0.5], [0.1, 0.2, 0.5, 0.6, 0.7]),
    "no inverse pair": ([1.0, 0.35, 0.25, 0.3, 0.36], [0.2, 1.5, 1.6, 1.7, 1.9]),
}
HEALTHY = {
    "early": ([2.7, 1.4, 0.6], [1.0, 0.7, 0.7]),
    "good reconstruction": ([2.7, 0.08, 0.02, 0.02, 0.02], [0.9, 0.7, 0.7, 0.7, 0.7]),
    "an inverse pair": ([2.7, 1.4, 0.4, 0.4, 0.4], [0.9, 0.3, 0.1, 0.1, 0.1]),
    "nothing learned yet": ([2.0, 1.99, 1.98, 1.98, 1.98], [1.0, 1.0, 0.99, 0.99, 0.99]),
    "a plateau that is left": ([2.7, 0.7, 0.48, 0.38, 0.31], [0.94, 0.65, 0.61, 0.58, 0.55]),
    "slow": ([0.65, 0.58, 0.53, 0.52, 0.51], [0.48, 0.44, 0.41, 0.38, 0.35]),
    "one bad window": ([0.2, 0.2, 0.2, 0.2, 0.6, 0.2], [0.5, 0.5, 0.3, 0.3, 0.6, 0.3]),
}


@pytest.mark.parametrize("course", COLLAPSES.values(), ids=COLLAPSES)
def test_courses_of_which_the_watch_warns_once(course):
    with pytest.warns(CollapseWarning, match=r"stays at 0\.\d+\. .* Raise beta"):
        watch = shown(*course)
    shown(*course, watch)  # A second warning would be an error here.


@pytest.mark.parametrize("course", HEALTHY.values(), ids=HEALTHY)
def test_courses_of_which_it_does_not(course):
    shown(*course)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_the_watch_starts_again_but_does_not_repeat_itself(copied):
    errors, deviations = COLLAPSES["a direction is never found"]
    fresh = copied(shown(errors[:3], deviations[:3]))
    assert not fresh._windows
    with pytest.warns(CollapseWarning):
        told = copied(shown(errors, deviations))
    shown(errors, deviations, told)


def moons(num=1000):
    """Two moons on a curved surface in five dimensions."""
    t = nf.distributions.TwoMoons().sample(num)
    first, second = t[:, :1], t[:, 1:]
    return torch.cat([t, 0.5 * first**2, second.sin(), 0.3 * first * second], 1)


class OfFirstLatent(nn.Module):
    """A decoder that knows one of the latents alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 5)

    def forward(self, z):
        return self.linear(z[:, :1])


def train(pair, x, steps, rate):
    ours = nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.FreeFormInjection(*pair)])
    optimizer = torch.optim.Adam(ours.parameters(), rate)
    for _ in range(steps):
        loss = ours.forward_kld(x[torch.randint(1000, (128,))])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 5.0)
        optimizer.step()


@pytest.mark.slow
def test_a_training_that_cannot_find_a_direction_is_told():
    """The second of two directions, with a third of the variance, is out of reach.

    f' g' is [[1, 0], [b, 0]] then, for any b, and by probes sqrt(2) (cos t, sin t) the mean of
    (sin^2 t - b sin t cos t)^2 is (3 + b^2) / 8 or more, 0.61^2.
    """
    plane = torch.randn(1000, 2) * torch.tensor([1.0, 0.7])
    x = torch.cat([plane, torch.zeros(1000, 3)], 1)
    # The warning is an error in this suite, and ends the training.
    with pytest.raises(CollapseWarning):
        train((nn.Linear(5, 2), OfFirstLatent()), x, 12 * WINDOW, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_healthy_trainings_are_not_told(seed):
    """They could be told at the ends of the fourth and later windows."""
    manual_seed(seed)
    train(nfi.nets.mlp_autoencoder(5, 2, (32, 32)), moons(), 5 * WINDOW, 1e-3)


@pytest.mark.parametrize("scales", [(-2, 2), (-4, 1.7)])
@pytest.mark.parametrize("by", ["forward_kld", "loss_terms"])
def test_columns_of_different_scales_are_told_at_the_first_step(scales, by):
    x = torch.randn(64, 5) * torch.logspace(*scales, 5)
    ours = model()
    with pytest.warns(ScaleWarning, match="Standardise the columns"):
        getattr(ours, by)(x)
    getattr(ours, by)(x)  # Once is enough.
    with torch.no_grad():
        model().forward_kld(x)
    model().eval().forward_kld(x)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(64, 5),
        torch.cat([torch.randn(64, 2), torch.ones(64, 3)], 1),
        (torch.rand(64, 5) * torch.tensor([1e-4, 1, 1, 1, 1])).where(
            torch.arange(64)[:, None] % 16 == 0, torch.zeros(())
        ),
        torch.randn(64, 5) * torch.tensor([0.01, 1, 1, 1, 1]),
        torch.randn(5, 5) * torch.logspace(-3, 3, 5),
        torch.randn(64, 1, 4, 4),
    ],
    ids=["constant", "constant columns", "rare pixels", "noise", "few rows", "images"],
)
def test_data_that_need_no_other_scale(x):
    warn_of_scales(x)


PIECEWISE = [nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.ReLU6, nn.Softshrink]


@pytest.mark.parametrize("kind", PIECEWISE)
@pytest.mark.parametrize("place", ["encoder", "decoder"])
def test_piecewise_linear_networks_are_told_at_the_first_step(kind, place):
    ours = model()
    network = getattr(ours.flows[0], place)
    setattr(ours.flows[0], place, nn.Sequential(network, nn.Sequential(kind())))
    with pytest.warns(SmoothnessWarning, match=rf"The {place} should .* {kind.__name__} \(1.0\)"):
        ours.forward_kld(torch.randn(8, 5))
    ours.forward_kld(torch.randn(8, 5))


class Calling(nn.Module):
    """A network with a function of its own behind it."""

    def __init__(self, network, function):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, x):
        return self.function(self.network(x))


FUNCTIONS = [F.relu, torch.relu, F.leaky_relu, F.hardtanh, F.relu6, F.softshrink, F.hardshrink]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("place", ["encoder", "decoder"])
@pytest.mark.parametrize("estimator", ["encoder", "decoder"])
def test_piecewise_linear_functions_are_told_at_the_first_step(function, place, estimator):
    likelihood = nfi.SurrogateLikelihood(estimator=estimator)
    ours = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), coupling()], likelihood)
    setattr(ours.flows[0], place, Calling(getattr(ours.flows[0], place), function))
    with pytest.warns(SmoothnessWarning, match=rf"The {place} should .* function \("):
        ours.forward_kld(torch.randn(8, 5))
    ours.forward_kld(torch.randn(8, 5))


def test_smooth_networks_and_couplings_with_kinks_are_not_told():
    ours = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), coupling()])
    ours.forward_kld(torch.randn(8, 5))
    for smooth in (nn.SiLU, nn.GELU, nn.Softplus, nn.Tanh, nn.ELU):
        ours = model()
        ours.flows[0].encoder = nn.Sequential(ours.flows[0].encoder, smooth())
        ours.forward_kld(torch.randn(8, 5))


def containers(injection):
    return {
        "plain": nf.NormalizingFlow(base(2), [injection]),
        "conditional": nf.ConditionalNormalizingFlow(base(2), [injection]),
        "by class": nf.ClassCondFlow(nf.distributions.ClassCondDiagGaussian(2, 2), [injection]),
    }


@pytest.mark.parametrize("name", ["plain", "conditional", "by class"])
@pytest.mark.parametrize("wrap", [False, True])
def test_a_container_without_a_reconstruction_term_is_told_once(name, wrap):
    injection = mlp_injection()
    injection = nfi.flows.InjectiveComposite([injection]) if wrap else injection
    host = containers(injection)[name]
    x = torch.randn(4, 5)
    arguments = (x, torch.tensor([0, 1, 0, 1])) if name == "by class" else (x,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            host.forward_kld(*arguments)
        host.eval()
        host.forward_kld(*arguments)
        host.sample(*((2, torch.tensor([0, 1])) if name == "by class" else (2,)))
        host.train()
    with pytest.warns(StackingWarning, match="no reconstruction term"):
        host.forward_kld(*arguments).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.forward_kld(*arguments).backward()


def test_models_and_containers_with_a_likelihood_and_known_surfaces_are_not_told():
    x = torch.randn(4, 5)
    chart = nfi.flows.SphereChart(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model().log_prob(x)
        nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), coupling()]).log_prob(x)
        composite = nfi.flows.InjectiveComposite([mlp_injection()], nfi.SurrogateLikelihood())
        nf.NormalizingFlow(base(2), [composite]).forward_kld(x)
        frozen = nfi.flows.LinearInjection(2, 5).requires_grad_(False)
        nf.NormalizingFlow(base(2), [frozen]).forward_kld(x)
        nf.NormalizingFlow(base(2), [chart]).forward_kld(nn.functional.normalize(x[:, :3]))
