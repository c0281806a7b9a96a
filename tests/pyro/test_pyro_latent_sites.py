"""Which latent variables joint guides serve, and which they refuse by name."""

from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer

import normflows_injective.pyro as nfp
from normflows_injective.errors import UnsupportedModelError

poutine = pyro.poutine

GUIDES = {
    "AutoFlow": nfp.AutoFlow,
    "AutoInjective": lambda model: nfp.AutoInjective(model, 1),
}
SOME = torch.tensor([True, False, True])
NORMAL = dist.Normal(torch.zeros(3), 1.0)


@pytest.fixture(params=GUIDES)
def make(request):
    return GUIDES[request.param]


def two_numbers():
    return pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def missing_data():
    two_numbers()
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.ones(3), obs_mask=SOME)


def handler():
    two_numbers()
    with pyro.plate("rows", 3), poutine.mask(mask=SOME):
        pyro.sample("y", dist.Normal(0.0, 1.0))


def handler_of_nothing():
    two_numbers()
    with poutine.mask(mask=False):
        pyro.sample("y", dist.Normal(0.0, 1.0))


def nested_handlers():
    two_numbers()
    with pyro.plate("rows", 3), poutine.mask(mask=SOME), poutine.mask(mask=~SOME):
        pyro.sample("y", dist.Normal(0.0, 1.0))


def masked_law():
    two_numbers()
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(0.0, 1.0).mask(SOME))


def masked_law_in_an_event():
    two_numbers()
    pyro.sample("y", NORMAL.mask(SOME).to_event(1))


def masked_base_of_a_transformed_law():
    two_numbers()
    base = NORMAL.mask(SOME)
    pyro.sample("y", dist.TransformedDistribution(base, [dist.transforms.ExpTransform()]))


def masked_twice():
    two_numbers()
    pyro.sample("y", NORMAL.mask(SOME).mask(torch.ones(3, dtype=torch.bool)).to_event(1))


def flat_law_under_a_handler():
    with poutine.mask(mask=False):
        pyro.sample("y", NORMAL.to_event(1).mask(False))
    pyro.factor("data", torch.tensor(0.0))


MASKED = [
    flat_law_under_a_handler,
    missing_data,
    handler,
    handler_of_nothing,
    nested_handlers,
    masked_law,
    masked_law_in_an_event,
    masked_base_of_a_transformed_law,
    masked_twice,
]


@pytest.mark.parametrize("model", MASKED, ids=lambda model: model.__name__)
def test_masked_latents_are_refused_by_name(make, model):
    guide = make(model)
    for _ in range(2):  # A refused prototype is not taken for a good one by the next call.
        with pytest.raises(UnsupportedModelError, match=r"'y(_unobserved)?' is masked.*Mask obs"):
            guide()


@pytest.mark.parametrize("wrap", ["mask", "block", "replay"])
def test_handlers_around_the_model_hide_no_mask(make, wrap):
    if wrap == "mask":
        model, name = poutine.mask(two_numbers, mask=False), "w"
    elif wrap == "block":
        model, name = poutine.block(missing_data, hide=["w"]), "y_unobserved"
    else:
        trace = poutine.trace(missing_data).get_trace()
        model, name = poutine.replay(missing_data, trace=trace), "y_unobserved"
    with pytest.raises(UnsupportedModelError, match=f"'{name}' is masked"):
        make(model)()


def observed_under_a_mask():
    w = two_numbers()
    with pyro.plate("rows", 3), poutine.mask(mask=SOME):
        pyro.sample("y", dist.Normal(w[..., :1], 1.0), obs=torch.tensor([1.0, 99.0, 2.0]))


def mask_that_is_all_true():
    with poutine.mask(mask=torch.ones(1, dtype=torch.bool)), poutine.mask(mask=True):
        return two_numbers()


def law_whose_mask_is_all_true():
    pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor(True)).to_event(1))


def flat_law_of_pyro():
    """As the documentation of ``ImproperUniform`` has it."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
    pyro.factor("data", -0.5 * w.square().sum(-1))


def masked_latents_that_the_guide_never_sees():
    return poutine.block(missing_data, expose=["w"])()


def conditioned_latents():
    return poutine.condition(handler, data={"y": torch.zeros(3)})()


@pytest.mark.parametrize(
    "model",
    [
        observed_under_a_mask,
        mask_that_is_all_true,
        law_whose_mask_is_all_true,
        flat_law_of_pyro,
        masked_latents_that_the_guide_never_sees,
        conditioned_latents,
    ],
    ids=lambda model: model.__name__,
)
def test_masks_that_leave_the_latents_alone_are_taken(make, model):
    assert set(make(model)()) == {"w"}


@pytest.mark.slow
def test_a_mask_on_observed_sites_leaves_the_objective_a_bound(make):
    """Of a normal model, whose evidence without the masked row is known."""

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("rows", 3), poutine.mask(mask=SOME):
            mean = w[..., 0].unsqueeze(-1)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor([1.0, 99.0, 2.0]))

    covariance = torch.eye(2) + torch.ones(2, 2)
    evidence = dist.MultivariateNormal(torch.zeros(2), covariance)
    log_z = float(evidence.log_prob(torch.tensor([1.0, 2.0])))
    elbo = infer.Trace_ELBO(64, vectorize_particles=True, max_plate_nesting=1)
    guide = make(model).build()
    losses = torch.tensor([elbo.loss(model, guide) for _ in range(20)])
    assert float(losses.mean()) > -log_z - 4 * float(losses.std()) / math.sqrt(20)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_scaled_latents_are_scored_as_the_model_scales_them(scale):
    """By a power of the prior, whose integral a normal guide meets."""

    @poutine.scale(scale=scale)
    def model():
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    start = infer.autoguide.init_to_value(values={"w": torch.zeros(2)})
    guide = nfp.AutoFlow(model, init_loc_fn=start).build()
    place = guide.transform.stack.flows[-1]
    with torch.no_grad():
        place.log_scale.fill_(-0.5 * math.log(scale))
    log_z = (1 - scale) * math.log(2 * math.pi) - math.log(scale)
    assert infer.Trace_ELBO().loss(model, guide) == pytest.approx(-log_z, abs=1e-4)


# Other latents that no joint guide can serve.


def test_discrete_latents_are_refused_by_name(make):
    def model():
        two_numbers()
        pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})

    # Some initialisations of Pyro come first, by a ValueError of Pyro's.
    with pytest.raises((UnsupportedModelError, ValueError), match="'k'.*numerat"):
        make(model)()
    assert set(make(poutine.block(model, hide=["k"]))()) == {"w"}


def test_models_without_latents_are_refused(make):
    with pytest.raises(UnsupportedModelError, match="no latent variables"):
        make(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)))()


def test_errors_of_the_model_itself_pass(make):
    def model():
        two_numbers()
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        make(model)()


# The refusals say what to write, and it works.


def mixture():
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    is_far = pyro.sample("is_far", dist.Bernoulli(0.3))
    with pyro.plate("rows", 6):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(loc[kind] + is_far, 0.5), obs=torch.arange(6.0))


def test_all_discrete_latents_are_named_and_summed_out(make):
    hidden = ["is_far", "kind"]
    with pytest.raises(UnsupportedModelError, match=re.escape(f"block(model, hide={hidden})")):
        make(mixture)()
    model = infer.config_enumerate(mixture)
    guide = make(poutine.block(mixture, hide=hidden))
    elbo = infer.TraceEnum_ELBO(max_plate_nesting=1)
    assert math.isfinite(infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step())


def test_latents_of_endless_values_are_not_to_be_summed(make):
    def model():
        two_numbers()
        pyro.sample("count", dist.Poisson(3.0))

    with pytest.raises(UnsupportedModelError, match="'count' has no finite number of values"):
        make(model)()


def test_points_are_refused(make):
    def model():
        two_numbers()
        pyro.sample("point", dist.Delta(torch.tensor(1.0)))

    with pytest.raises(UnsupportedModelError, match=r"pyro.deterministic\('point', value\)"):
        make(model)()
    assert set(make(poutine.block(model, hide=["point"]))()) == {"w"}


def subsampled():
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 10, subsample_size=4):
        local = pyro.sample("local", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(local, 1.0), obs=torch.ones(4))


def test_local_latents_of_a_minibatch_take_a_guide_of_their_own(make):
    with pytest.raises(UnsupportedModelError, match="plate 'rows'") as raised:
        make(subsampled)()
    plate = "pyro.plate('rows', 10, subsample_size=4)"
    for part in (f"create_plates=lambda: {plate}", "hide=['local']", "expose=['local']"):
        assert part in str(raised.value)
    autoguide = infer.autoguide
    guides = autoguide.AutoGuideList(
        subsampled, create_plates=lambda: pyro.plate("rows", 10, subsample_size=4)
    )
    guides.append(make(poutine.block(subsampled, hide=["local"])))
    guides.append(autoguide.AutoNormal(poutine.block(subsampled, expose=["local"])))
    svi = infer.SVI(subsampled, guides, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))
