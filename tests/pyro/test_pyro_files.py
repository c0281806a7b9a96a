"""Files of guides, transforms and distributions."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from support import pyro_registry as registry
from support.seeds import manual_seed

import normflows_injective.pyro as nfp
from normflows_injective import errors
from normflows_injective.flows import AngularSpline


def model(**sizes):
    def sample():
        for name, size in sizes.items():
            pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1))

    return sample


def splines(bound):
    return lambda dim: [AngularSpline(dim, width=8, num_blocks=1, bound=bound)]


GUIDES = {
    "flow": lambda sample: nfp.AutoFlow(sample, splines(4.0)),
    "injective": lambda sample: nfp.AutoInjective(sample, 2),
    "normal": autoguide.AutoMultivariateNormal,
    "autoregressive": autoguide.AutoIAFNormal,
}


def built(name, seed=0, **sizes):
    manual_seed(seed)
    guide = GUIDES[name](model(**sizes))
    guide.build() if hasattr(guide, "build") else guide()
    return guide


@pytest.mark.parametrize("name", GUIDES)
def test_guides_of_the_same_sites_alone_take_a_file(name, tmp_path):
    nfp.save(built(name, x=3, y=2), tmp_path / "guide")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nfp.load(built(name, x=3, y=2), tmp_path / "guide")
    for sizes in ({"y": 2, "x": 3}, {"x": 2, "y": 3}, {"x": 3, "z": 2}):
        with pytest.raises(errors.CheckpointError, match="'sites'"):
            nfp.load(built(name, **sizes), tmp_path / "guide")


def test_random_masks_of_a_guide_of_pyro_are_compared(tmp_path):
    """They are drawn when it is built, and its state does not hold them."""
    nfp.save(built("autoregressive", 0, x=30), tmp_path / "guide")
    with pytest.raises(errors.CheckpointError, match="'masks'"):
        nfp.load(built("autoregressive", 1, x=30), tmp_path / "guide")


def test_options_of_the_layers_of_a_guide_are_compared(tmp_path):
    nfp.save(nfp.AutoFlow(model(x=3), splines(4.0)).build(), tmp_path / "guide")
    with pytest.raises(errors.CheckpointError, match="'bound' .* is 4.0 in the file and 6.0 here"):
        nfp.load(nfp.AutoFlow(model(x=3), splines(6.0)).build(), tmp_path / "guide")


def test_how_a_guide_starts_is_no_option(tmp_path):
    nfp.save(nfp.AutoFlow(model(x=3), splines(4.0), init_scale=0.1).build(), tmp_path / "guide")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = nfp.AutoFlow(
            model(x=3), splines(4.0), init_loc_fn=autoguide.init_to_sample, init_scale=0.3
        )
        nfp.load(other.build(), tmp_path / "guide")


@pytest.mark.parametrize("name", registry.LAWS)
def test_a_file_makes_two_modules_one(name, tmp_path):
    case = registry.LAWS[name]
    first, second = registry.build(name, 1), registry.build(name, 2)
    nfp.save(first, tmp_path / "module")
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.CheckpointWarning)
        nfp.load(second, tmp_path / "module")
    draws = []
    for module in (first, second):
        manual_seed(0)
        law = case.law(module)
        x = law.rsample((4,)) if case.has_rsample else law.sample((4,))
        draws.append((x, law.log_prob(x)))
    torch.testing.assert_close(*draws)


def test_a_path_alone_says_to_build_the_module():
    for function in (nfp.save, nfp.load):
        with pytest.raises(errors.CheckpointError, match="Build the model"):
            function("guide.safetensors")
        with pytest.raises(errors.CheckpointError, match="Build the model"):
            function(nfp.AutoFlow, "guide.safetensors")
