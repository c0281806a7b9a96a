"""The contracts of guides and of Pyro's distributions, as checks that any suite can call.

The tests of this package call the same checks. A check raises ``AssertionError`` with a sentence
that says which part of the contract is broken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from pyro.infer import Trace_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor, nn
from torch.distributions import biject_to

from ..checks import check_module
from ..modules.random_numbers import OwnRandomNumbers
from ..testing.oracles import require, require_close
from .guides.site_quantiles import acts_by_component
from .memory.persistence import load, save

__all__ = ["GUIDE_CHECKS", "GuideCase", "check_guide", "check_law"]

_LEVELS = [0.1, 0.5, 0.9]


class GuideCase(NamedTuple):
    """A guide and its model, with which its contract is checked.

    Attributes:
        guide: Guide of Pyro, of this package or your own, a module.
        model: Its model.
        args: Arguments of both.
    """

    guide: nn.Module
    model: Callable[..., Any]
    args: tuple[Any, ...] = ()

    def traces(self, seed: int = 0) -> tuple[Any, Any]:
        """Traces of the guide, and of the model with the values of the guide."""
        with _apart(seed):
            drawn = poutine.trace(self.guide).get_trace(*self.args)
            model = poutine.replay(self.model, trace=drawn)
            return drawn, poutine.trace(model).get_trace(*self.args)

    def draw(self, seed: int = 0) -> dict[str, Tensor]:
        """Values of all latent variables of the model by their names."""
        return {name: site["value"] for name, site in _latent_sites(self.traces(seed)[1])}

    def built(self) -> GuideCase:
        """The case, after a first call of the guide, which makes the parameters of autoguides."""
        self.traces()
        return self


def check_guide(guide: nn.Module, model: Callable[..., Any], *args: Any) -> None:
    r"""Check the whole contract of a guide.

    The evidence bound and its gradients are finite; draws have the shapes of the model's sites and
    lie in their supports; the trace has the guide's own density; medians and quantiles, where the
    guide has them, lie in the supports of single numbers; the random numbers alone decide a draw;
    and a file of :func:`save` restores it. The random state, the parameter store and the gradients
    of the caller stay as they are.

    Args:
        guide: Guide of Pyro, of this package or your own, a module.
        model: Its model.
        *args: Arguments of both.

    Raises:
        AssertionError: If the contract is broken, saying where.

    References:
        The guides of Pyro, https://docs.pyro.ai/en/stable/infer.autoguide.html.

    Examples:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        >>> check_guide(AutoNormal(model), model)
    """
    check_module(guide, "guide", "Pass a guide that is a module, such as an autoguide.")
    for check in GUIDE_CHECKS:
        check(GuideCase(guide, model, args))


def check_law(law: TorchDistribution, *, holds_draws: bool = True) -> None:
    r"""Check shapes, densities, expansion and the support of a distribution of Pyro.

    Args:
        law: Distribution of Pyro, of this package or your own.
        holds_draws: Whether its support holds its draws, which the manifold of an untrained
            encoder does not.

    Raises:
        AssertionError: If the contract is broken, saying where.

    References:
        Shapes in Pyro, https://pyro.ai/examples/tensor_shapes.html.

    Examples:
        >>> import pyro.distributions as dist
        >>> check_law(dist.Dirichlet(torch.ones(3)))
    """
    wide = law.expand(Size((3, *law.batch_shape)))
    require(wide.batch_shape == (3, *law.batch_shape), "expand gives the batch shape it is asked")
    require(wide.event_shape == law.event_shape, "expand leaves the event shape as it is")
    for present in (law, wide):
        for shape in (Size(), Size((2,))):
            _check_draws_of_law(present, shape, holds_draws)


def check_objective(case: GuideCase) -> None:
    """The evidence bound is finite, with finite gradients for all parameters of the guide."""
    guide, model, args = case.built()
    parameters = {name: p for name, p in guide.named_parameters() if p.requires_grad}
    with _apart():
        loss: Any = torch.as_tensor(Trace_ELBO().differentiable_loss(model, guide, *args))
        require(bool(loss.isfinite()), "the evidence bound is finite")
        if not parameters:
            return
        require(loss.requires_grad, "the evidence bound depends on the parameters of the guide")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        finite = gradient is not None and bool(gradient.isfinite().all())
        require(finite, f"the evidence bound has a finite gradient for parameter {name}")


def check_sites(case: GuideCase) -> None:
    """A guide draws all latent variables, with the shapes and in the supports of the model."""
    drawn, replayed = case.traces()
    for name, site in _latent_sites(replayed):
        require(name in drawn.nodes, f"the guide draws {name!r}, a latent variable of the model")
        value, fn = site["value"], site["fn"]
        require(value.shape == fn.shape(), f"{name!r} has the shape {tuple(fn.shape())}")
        inside = fn.support.check(value)
        require(bool(inside.all()), f"{name!r} lies in its support {fn.support}")


def check_density(case: GuideCase) -> None:
    """The trace has the density of the posterior, less the log-volumes of the transforms."""
    guide: Any = case.guide
    drawn, replayed = case.traces()
    with _apart():
        total = drawn.log_prob_sum()
        require(bool(total.isfinite()), "draws of the guide have finite densities")
        sites = [site for _, site in _latent_sites(drawn)]
        joint = [site for site in sites if site["infer"].get("is_auxiliary")]
        if len(joint) != 1 or not hasattr(guide, "get_posterior"):
            return
        latent, log_prob = joint[0]["value"], joint[0]["log_prob_sum"]
        volumes = [_log_volume(site) for _, site in _latent_sites(replayed)]
        contract = "the trace has the density of the latents, less the log-volumes of transforms"
        require_close(total, log_prob - sum(volumes), contract, latent)
        posterior = guide.get_posterior(*case.args)
        first, second = posterior.log_prob(latent).sum(), posterior.log_prob(latent).sum()
        # Estimates of a density differ from call to call, and say nothing about a single value.
        if torch.allclose(first, second, rtol=1e-5):
            require_close(log_prob, first, "the latents have the density of get_posterior", latent)


def check_quantiles(case: GuideCase) -> None:
    """Medians and quantiles have the shapes of the sites, and lie in supports of numbers."""
    sites = dict(_latent_sites(case.traces()[1]))
    for name, levels, rows in (("median", (), ()), ("quantiles", (_LEVELS,), (len(_LEVELS),))):
        try:
            with _apart():
                values = getattr(case.guide, name)(*levels, *case.args)
        except (AttributeError, NotImplementedError):
            continue
        for site_name, value in values.items():
            fn = sites[site_name]["fn"]
            where = f"{name} of {site_name!r}"
            require(value.shape == (*rows, *fn.shape()), f"{where} has the shape of the site")
            # Elsewhere, as on a simplex, quantiles of components are no point of the support.
            if acts_by_component(biject_to(fn.support)):
                require(bool(fn.support.check(value).all()), f"{where} lies in the support")


def check_random_numbers(case: GuideCase) -> None:
    """Equal random numbers give equal draws, others do not, and no global state is seeded."""
    before = torch.get_rng_state()
    first, again, other = (case.built().draw(seed) for seed in (0, 0, 1))
    require(torch.equal(torch.get_rng_state(), before), "a guide sets no global random state")
    require(_agree(first, again), "the same random numbers give the same draw")
    require(not _agree(first, other), "other random numbers give another draw")


def check_file(case: GuideCase) -> None:
    """A guide that is loaded from its file draws the same values as the one that was saved."""
    before = case.built().draw()
    # Detached, so that they can be written to.
    parameters = [p.detach() for p in case.guide.parameters()]
    values = [p.clone() for p in parameters]
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "guide.safetensors")
        save(case.guide, path)
        try:
            for parameter in parameters:
                parameter.zero_()
            load(case.guide, path)
            require(_agree(before, case.draw()), "a guide from a file draws the same values")
        finally:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)


GUIDE_CHECKS: tuple[Callable[[GuideCase], None], ...] = (
    # First, because later calls of a guide that seeds would leave the state as it is.
    check_random_numbers,
    check_sites,
    check_objective,
    check_density,
    check_quantiles,
    check_file,
)
"""The checks of :func:`check_guide`, each of a :class:`GuideCase`, to be called one by one."""


@contextmanager
def _apart(seed: int = 0) -> Iterator[None]:
    """Calls inside have an empty parameter store and random numbers of their own."""
    with pyro.get_param_store().scope(), OwnRandomNumbers(seed):
        yield


def _latent_sites(trace: Any) -> Iterator[tuple[str, Any]]:
    return ((n, s) for n, s in trace.iter_stochastic_nodes() if not site_is_subsample(s))


def _agree(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def _log_volume(site: Any) -> Tensor:
    """Log-volume of the transform from unconstrained coordinates to the value of a site."""
    transform: Any = biject_to(site["fn"].support)
    coordinates = transform.inv(site["value"])
    volumes = transform.log_abs_det_jacobian(coordinates, site["value"])
    return sum_rightmost(volumes, volumes.dim())


def _check_draws_of_law(law: TorchDistribution, shape: Size, holds_draws: bool) -> None:
    draws = [law.sample, law.rsample] if law.has_rsample else [law.sample]
    for draw in draws:
        with OwnRandomNumbers():
            x = draw(shape)
        batch = shape + law.batch_shape
        where = f"{draw.__name__}({tuple(shape)}) of batch shape {tuple(law.batch_shape)}"
        require(x.shape == batch + law.event_shape, f"{where} has the shape of batch and event")
        # Without gradients also draws of sample are known to those that remember draws.
        with torch.no_grad():
            score: Any = law.log_prob(x)
        require(score.shape == batch, f"log_prob of {where} has the shape of the batch")
        require(bool(score.isfinite().all()), f"log_prob of {where} is finite")
        if holds_draws:
            support: Any = law.support
            require(bool(support.check(x).all()), f"{where} lies in the support {support}")
