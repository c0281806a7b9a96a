"""Standard posteriors without closed-form evidence, each with a reference for its moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch import Tensor

__all__ = ["POSTERIORS", "Posterior", "reference"]

Draws = dict[str, Tensor]
Model = Callable[[], None]

_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
_GROUPS, _ROWS, _FUNNEL = 20, 150, 10
_WARMUP, _DRAWS = 1000, 4000


class Posterior(NamedTuple):
    """A model without arguments, which broadcasts over particles.

    Attributes:
        title: Its name in tables.
        model: The model, whose data are inside.
        positive: Sites that are compared by their logarithms.
        easy: A model with the same posterior that NUTS samples well, None for the model itself.
        same: Draws of the easy model to draws of the model.
        draw: Draws of the posterior where these are simple, in place of NUTS.
    """

    title: str
    model: Model
    positive: tuple[str, ...] = ()
    easy: Model | None = None
    same: Callable[[Draws], Draws] = dict
    draw: Callable[[int], Draws] | None = None

    def numbers(self, draws: Draws) -> Tensor:
        """Draws (n, k) of all components side by side."""
        values = [
            draws[name].log() if name in self.positive else draws[name] for name in sorted(draws)
        ]
        return torch.cat([value.reshape(len(value), -1) for value in values], 1).double()


def funnel() -> Posterior:
    r"""Neal's funnel, :math:`v \sim N(0, 9), x_i \sim N(0, e^v)`, in ten dimensions."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        deviation = (v / 2).exp().unsqueeze(-1)
        pyro.sample("x", dist.Normal(torch.zeros(_FUNNEL - 1), deviation).to_event(1))

    def draw(count: int) -> Draws:
        v = 3 * torch.randn(count)
        return {"v": v, "x": (v / 2).exp().unsqueeze(1) * torch.randn(count, _FUNNEL - 1)}

    return Posterior("funnel, D = 10", model, draw=draw)


def eight_schools(is_centred: bool) -> Posterior:
    r"""Effects of coaching in eight schools, :math:`\mu \sim N(0, 25), \tau \sim C^+(0, 5)`."""
    effects, errors = torch.tensor(_EFFECTS), torch.tensor(_ERRORS)

    def level() -> tuple[Tensor, Tensor]:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0)).unsqueeze(-1)
        return mu, pyro.sample("tau", dist.HalfCauchy(5.0)).unsqueeze(-1)

    def centred() -> None:
        mu, tau = level()
        theta = pyro.sample("theta", dist.Normal(mu + torch.zeros(8), tau).to_event(1))
        pyro.sample("y", dist.Normal(theta, errors).to_event(1), obs=effects)

    def non_centred() -> None:
        mu, tau = level()
        eta = pyro.sample("eta", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu + tau * eta, errors).to_event(1), obs=effects)

    def same(draws: Draws) -> Draws:
        theta = draws["mu"].unsqueeze(1) + draws["tau"].unsqueeze(1) * draws["eta"]
        return {"mu": draws["mu"], "tau": draws["tau"], "theta": theta}

    if is_centred:
        return Posterior("eight schools, centred", centred, ("tau",), non_centred, same)
    return Posterior("eight schools, non-centred", non_centred, ("tau",))


def varying_intercepts() -> Posterior:
    """A regression with one predictor and an intercept for each of twenty groups."""
    generator = torch.Generator().manual_seed(11)
    group = torch.randint(_GROUPS, (_ROWS,), generator=generator)
    predictor = torch.randn(_ROWS, generator=generator)
    intercepts = 0.5 + 0.8 * torch.randn(_GROUPS, generator=generator)
    noise = torch.randn(_ROWS, generator=generator)
    outcome = intercepts[group] - 0.7 * predictor + noise

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0)).unsqueeze(-1)
        spread = pyro.sample("spread", dist.HalfNormal(1.0)).unsqueeze(-1)
        intercept = pyro.sample(
            "intercept", dist.Normal(mu + torch.zeros(_GROUPS), spread).to_event(1)
        )
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0)).unsqueeze(-1)
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0)).unsqueeze(-1)
        mean = intercept[..., group] + slope * predictor
        pyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=outcome)

    return Posterior("varying intercepts, D = 24", model, ("spread", "sigma"))


def logistic() -> Posterior:
    """Logistic regression on the 30 standardised measurements of scikit-learn's breast cancer."""
    data = load_breast_cancer()
    rows = torch.tensor(scale(data.data), dtype=torch.float32)
    rows = torch.cat([torch.ones(len(rows), 1), rows], 1)
    labels = torch.tensor(data.target, dtype=torch.float32)

    def model() -> None:
        weights = pyro.sample("w", dist.Normal(torch.zeros(rows.shape[1]), 1.0).to_event(1))
        law = dist.Bernoulli(logits=weights @ rows.T, validate_args=False).to_event(1)
        pyro.sample("y", law, obs=labels)

    return Posterior("logistic regression, D = 31", model)


POSTERIORS: dict[str, Callable[[], Posterior]] = {
    "funnel": funnel,
    "schools": lambda: eight_schools(False),
    "schools_centred": lambda: eight_schools(True),
    "intercepts": varying_intercepts,
    "logistic": logistic,
}


def reference(posterior: Posterior, is_quick: bool = False) -> Tensor:
    """Mean and standard deviation (2, k) of the components, of exact draws or of NUTS."""
    divisor = 40 if is_quick else 1
    pyro.set_rng_seed(1)
    if posterior.draw is not None:
        draws = posterior.draw(1_000_000 // divisor)
    else:
        kernel = NUTS(
            posterior.easy or posterior.model, jit_compile=True, ignore_jit_warnings=True
        )
        chain = MCMC(
            kernel,
            num_samples=_DRAWS // divisor,
            warmup_steps=_WARMUP // divisor,
            disable_progbar=True,
        )
        chain.run()
        draws = posterior.same(chain.get_samples())
    numbers = posterior.numbers(draws)
    return torch.stack([numbers.mean(0), numbers.std(0)])
