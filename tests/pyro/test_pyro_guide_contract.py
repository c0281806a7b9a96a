"""The contract of guides and laws, of ours and of broken ones."""

from __future__ import annotations

import pytest
import torch
from support.seeds import manual_seed

from normflows_injective.errors import OptionError

pyro = pytest.importorskip("pyro", reason="Pyro is not installed")
dist = pytest.importorskip("pyro.distributions")
autoguide = pytest.importorskip("pyro.infer.autoguide")
registry = pytest.importorskip("support.pyro_registry")
testing = pytest.importorskip("normflows_injective.pyro.testing")
PyroModule = pytest.importorskip("pyro.nn").PyroModule
check_guide, check_law = testing.check_guide, testing.check_law


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    manual_seed(0)
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize("model", registry.MODELS)
@pytest.mark.parametrize("guide", registry.GUIDES)
def test_guides_keep_the_contract(guide, model):
    program, args = registry.MODELS[model]
    check_guide(registry.GUIDES[guide](program), program, *args)


@pytest.mark.parametrize("check", testing.GUIDE_CHECKS, ids=lambda check: check.__name__)
def test_every_check_stands_alone(check):
    program, args = registry.MODELS["regression"]
    check(testing.GuideCase(registry.GUIDES["flow_of_couplings"](program), program, args))


@pytest.mark.slow
@pytest.mark.parametrize("model", registry.MODELS)
@pytest.mark.parametrize(
    "make", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, autoguide.AutoIAFNormal]
)
def test_guides_of_pyro_keep_it_too(make, model):
    program, args = registry.MODELS[model]
    check_guide(make(program), program, *args)


def test_nothing_of_the_caller_is_touched():
    program, args = registry.MODELS["regression"]
    guide = registry.GUIDES["flow"](program)
    svi = pyro.infer.SVI(program, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    svi.step(*args)
    store = {name: (id(p), p.clone()) for name, p in pyro.get_param_store().items()}
    gradients = [p.grad for p in guide.parameters()]
    state = torch.get_rng_state()
    check_guide(guide, program, *args)
    assert torch.equal(torch.get_rng_state(), state)
    after = pyro.get_param_store()
    assert set(after.keys()) == set(store)
    assert all(id(after[n]) == i and torch.equal(after[n], p) for n, (i, p) in store.items())
    assert all(p.grad is g for p, g in zip(guide.parameters(), gradients, strict=True))
    svi.step(*args)


class Guide(PyroModule):
    """A guide of a positive number, of which a subclass breaks one part."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self):
        self.draw(self.loc)

    def draw(self, loc):
        pyro.sample("x", dist.LogNormal(loc, 1.0))

    def median(self):
        return {"x": self.loc.detach().exp()}

    def quantiles(self, levels):
        normal = dist.Normal(self.loc.detach(), 1.0)
        return {"x": normal.icdf(torch.tensor(levels)).exp()}


class Forgets(Guide):
    def draw(self, loc):
        pyro.sample("z", dist.LogNormal(loc, 1.0), infer={"is_auxiliary": True})


class LeavesTheSupport(Guide):
    def draw(self, loc):
        pyro.sample("x", dist.Normal(loc - 100, 1.0))


class HasAnotherShape(Guide):
    def draw(self, loc):
        pyro.sample("x", dist.LogNormal(loc, 1.0).expand([2]).to_event(1))


class Detaches(Guide):
    def draw(self, loc):
        super().draw(loc.detach())


class HasIdleParameters(Guide):
    def __init__(self):
        super().__init__()
        self.idle = torch.nn.Parameter(torch.zeros(2))


class Diverged(Guide):
    def draw(self, loc):
        pyro.sample("x", dist.LogNormal(loc, 1.0).mask(torch.tensor(True)))
        pyro.factor("infinite", loc * torch.inf, has_rsample=True)


class HasAWrongMedian(Guide):
    def median(self):
        return {"x": -self.loc}


class HasQuantilesOfAnotherShape(Guide):
    def quantiles(self, levels):
        return self.median()


class Seeds(Guide):
    def draw(self, loc):
        manual_seed(3)
        super().draw(loc)


class DrawsAPoint(Guide):
    def draw(self, loc):
        pyro.sample("x", dist.Delta(loc.exp()))


class Remembers(Guide):
    """A number decides its draws that no file holds."""

    calls = 0

    def draw(self, loc):
        self.calls += 1
        super().draw(loc + self.calls)


class HasAnotherPosterior(autoguide.AutoDiagonalNormal):
    def sample_latent(self, *args, **kwargs):
        own = super().get_posterior(*args, **kwargs)
        return pyro.sample("latent", own, infer={"is_auxiliary": True})

    def get_posterior(self, *args, **kwargs):
        return dist.Normal(torch.zeros(1), 5.0).to_event(1)


class ForgetsVolumes(autoguide.AutoDiagonalNormal):
    def forward(self, *args, **kwargs):
        with pyro.poutine.block():
            values = super().forward(*args, **kwargs)
        latent = values["x"].log().reshape(1)
        own = self.get_posterior()
        pyro.sample("latent", own, obs=latent, infer={"is_observed": False, "is_auxiliary": True})
        return {"x": pyro.sample("x", dist.Delta(values["x"]))}


def positive():
    pyro.sample("x", dist.LogNormal(0.0, 1.0))


def test_a_guide_written_by_hand_keeps_it():
    check_guide(Guide(), positive)


@pytest.mark.parametrize(
    ("guide", "contract"),
    [
        (Forgets, "the guide draws 'x', a latent variable of the model"),
        (LeavesTheSupport, "'x' lies in its support"),
        (HasAnotherShape, "'x' has the shape"),
        (Detaches, "depends on the parameters of the guide"),
        (HasIdleParameters, "a finite gradient for parameter idle"),
        (Diverged, "the evidence bound is finite"),
        (HasAWrongMedian, "median of 'x' lies in the support"),
        (HasQuantilesOfAnotherShape, "quantiles of 'x' has the shape of the site"),
        (Seeds, "sets no global random state"),
        (DrawsAPoint, "other random numbers give another draw"),
        (Remembers, "the same random numbers give the same draw"),
    ],
)
@pytest.mark.filterwarnings("ignore:Encountered")
def test_broken_guides_are_found(guide, contract):
    with pytest.raises(AssertionError, match=f"The contract is broken: .*({contract})"):
        check_guide(guide(), positive)


class Stretched(dist.Normal):
    """A law whose densities forget what is scored."""

    def log_prob(self, value):
        return super().log_prob(value).sum()


class Outside(dist.Normal):
    support = dist.constraints.greater_than(100.0)


@pytest.mark.parametrize(
    ("law", "contract"),
    [(Stretched, "has the shape of the batch"), (Outside, "lies in the support")],
)
def test_broken_laws_are_found(law, contract):
    with pytest.raises(AssertionError, match=contract):
        check_law(law(torch.zeros(2), 1.0, validate_args=False))


@pytest.mark.parametrize(
    ("guide", "contract"),
    [
        (HasAnotherPosterior, "the latents have the density of get_posterior"),
        (ForgetsVolumes, "less the log-volumes of transforms"),
    ],
)
def test_broken_joint_guides_are_found(guide, contract):
    with pytest.raises(AssertionError, match=contract):
        check_guide(guide(positive), positive)


@pytest.mark.parametrize("name", registry.LAWS)
def test_laws_keep_their_contract(name):
    case = registry.LAWS[name]
    check_law(case.law(registry.build(name)), holds_draws=case.scores_others)


def test_functions_are_no_modules():
    with pytest.raises(OptionError, match="guide must be"):
        check_guide(lambda: None, positive)
