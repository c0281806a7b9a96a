"""Assignment flows whose law is known: exact fields by Bayes' rule, over all labels one by one.

Nothing here uses the package but to build the models under test. Given labels, the logits of a
variable are normal around ``t rho u`` with deviation ``s = 1 - sigma t``; so densities of the
paths are mixtures of as many normal laws as there are labels.
"""

from __future__ import annotations

import itertools
import math

import scipy.stats
import torch
from torch import nn
from torch.nn.functional import one_hot

import normflows_injective as nfi
from normflows_injective.flows.assignment import FiniteHorizon, InfiniteHorizon

DOUBLE = torch.float64


class Law:
    """A law of labels, by the probabilities of all of them.

    Args:
        counts: Numbers of classes of the variables.
        probabilities: Of all labels in lexicographic order; rows of them for a context.
    """

    def __init__(self, counts, probabilities):
        self.counts = tuple(counts)
        self.probabilities = torch.as_tensor(probabilities, dtype=DOUBLE)
        self.states = torch.tensor(list(itertools.product(*map(range, self.counts))))

    @property
    def n(self):
        return len(self.counts)

    @property
    def c(self):
        return max(self.counts)

    def histogram(self, labels):
        """Shares of all labels among samples."""
        index = torch.zeros_like(labels[:, 0])
        for column, count in zip(labels.T, self.counts, strict=True):
            index = index * count + column
        return index.bincount(minlength=len(self.states)).double() / len(labels)

    def chi_square(self, labels):
        """Pearson's statistic of samples, of a mean of the number of states less one."""
        p = self.probabilities
        return float(len(labels) * ((self.histogram(labels) - p).square() / p).sum())

    def chi_square_limit(self):
        """What that statistic exceeds as rarely as a normal one exceeds four deviations."""
        return float(scipy.stats.chi2.isf(3.2e-5, len(self.states) - 1))


def coupled():
    """Two binary variables that are equal with probability .9."""
    return Law((2, 2), [0.45, 0.05, 0.05, 0.45])


def ragged():
    """Two and three classes, coupled."""
    return Law((2, 3), [0.3, 0.05, 0.1, 0.02, 0.33, 0.2])


def triples():
    """Two variables of three classes."""
    return Law((3, 3), [0.2, 0.02, 0.05, 0.03, 0.25, 0.1, 0.15, 0.05, 0.15])


def ising(coupling=0.5):
    """A 3 x 3 Ising model."""
    law = Law((2,) * 9, torch.zeros(512))
    spins = (2.0 * law.states - 1).view(-1, 3, 3).double()
    energy = (spins[:, 1:] * spins[:, :-1]).sum((1, 2))
    energy = energy + (spins[:, :, 1:] * spins[:, :, :-1]).sum((1, 2))
    law.probabilities = (coupling * energy).softmax(0)
    return law


def corners(counts):
    """Unit vectors u_ik, (n, c, c): the mean-free part of basis vectors, zero behind classes."""
    found = torch.zeros(len(counts), max(counts), max(counts), dtype=DOUBLE)
    for i, c in enumerate(counts):
        centred = torch.eye(c, dtype=DOUBLE) - 1 / c
        found[i, :c, :c] = centred / centred.norm(dim=1, keepdim=True)
    return found


def speeds(horizon, counts):
    """Speeds rho_i, (n,), by their definitions."""
    if isinstance(horizon, InfiniteHorizon):
        return torch.full((len(counts),), horizon.scale, dtype=DOUBLE)
    norms = []
    for c in counts:
        smooth = torch.full((c,), horizon.smoothing / c, dtype=DOUBLE)
        smooth[0] += 1 - horizon.smoothing
        norms.append((smooth.log() - smooth.log().mean()).norm())
    return torch.stack(norms)


def contraction(horizon):
    """The rate sigma at which noise shrinks."""
    return float(isinstance(horizon, FiniteHorizon))


def centres(horizon, counts, t):
    """Means t rho u of logits given classes, (B, n, c, c), classes first."""
    rho = speeds(horizon, counts)
    return t.view(-1, 1, 1, 1) * (rho.view(-1, 1, 1) * corners(counts))


def log_likelihoods(horizon, counts, v, t):
    """Of every class, of the logits (B, n, c) of its variable, (B, n, c), up to constants."""
    s = 1 - contraction(horizon) * t.view(-1, 1, 1)
    distances = (v.unsqueeze(2) - centres(horizon, counts, t)).square().sum(-1)
    return -distances / (2 * s**2)


def log_density(law, horizon, v, t):
    """Log-density (B,) of mean-free logits (B, n, c) at times (B,): a normal mixture."""
    each = log_likelihoods(horizon, law.counts, v, t)
    index = law.states.T.unsqueeze(0).expand(len(v), -1, -1)
    joint = each.gather(2, index).sum(1) + law.probabilities.log()
    dim = sum(law.counts) - law.n
    s = 1 - contraction(horizon) * t
    return joint.logsumexp(1) - dim * (s * math.sqrt(2 * math.pi)).log()


def exact_velocity(law, horizon, v, t):
    """The marginal field, (B, n, c), by the score: see the derivation in the test of it."""
    v = v.detach().requires_grad_()
    with torch.enable_grad():
        (score,) = torch.autograd.grad(log_density(law, horizon, v, t).sum(), v)
    s, t = 1 - contraction(horizon) * t.view(-1, 1, 1), t.view(-1, 1, 1)
    return (v + s * score).detach() / t


class ExactField(nn.Module):
    """The network of the exact field of a law.

    Features are turned back into logits, or into what they say about each class, and the
    posteriors of the classes follow by summing over all labels.

    Args:
        law: Probabilities, in rows if there is a context, which then is the number of the row.
        horizon: Of the model.
        parametrisation: ``"velocity"`` or ``"classifier"``.
        features: ``"scaled_logits"``, ``"weights"`` or, for all but the velocity of a finite
            horizon, which is not a function of them at time zero, ``"posterior"``.
        leave_one_out: Whether to say that a classifier is what it is.
        behind: What it says behind the classes of a variable.
    """

    def __init__(
        self,
        law,
        horizon,
        parametrisation="classifier",
        features="scaled_logits",
        leave_one_out=False,
        behind=0.0,
        missing=False,
        by_context=False,
    ):
        super().__init__()
        self.law, self.horizon, self.behind = law, horizon, behind
        self.parametrisation, self.features = parametrisation, features
        self.leave_one_out, self.missing = leave_one_out, missing
        self.takes_context = self.needs_context = by_context
        self.register_buffer("log_p", law.probabilities.log())
        self.register_buffer("one_hot", one_hot(law.states, law.c).double())
        # In a list, which the copies that are evaluated share.
        self.counted = [0]

    @property
    def calls(self):
        return self.counted[0]

    def forward(self, features, t, context=None):
        self.counted[0] += 1
        assert (context is not None) == self.takes_context
        c = self.law.c
        observed = features.new_ones(features.shape[:2])
        if self.missing:
            features, observed = features[..., :c], 1 - features[..., c]
            # Missing variables show nothing but that.
            assert bool((features[observed == 0] == 0).all())
        log_p = self.log_p
        if context is not None:
            log_p = log_p[context[:, 0].long()]
        each = self._log_likelihoods(features, t) * observed.unsqueeze(-1)
        joint = each.flatten(1) @ self.one_hot.flatten(1).T + log_p
        if self.parametrisation == "velocity":
            posterior = (joint.softmax(1) @ self.one_hot.flatten(1)).view_as(each)
            rho = speeds(self.horizon, self.law.counts).view(1, -1, 1)
            towards = rho * torch.einsum("bnk,nkc->bnc", posterior, corners(self.law.counts))
            sigma = contraction(self.horizon)
            if sigma:
                towards = (towards - sigma * self._logits(features, t)) / (1 - t.view(-1, 1, 1))
            return self._behind(towards)
        given = each.gather(2, self.law.states.T.unsqueeze(0).expand(len(t), -1, -1))
        others = (joint.unsqueeze(1) - given).unsqueeze(-1)
        others = others.masked_fill(self.one_hot.transpose(0, 1) == 0, -torch.inf)
        return self._behind(others.logsumexp(2))

    def _behind(self, output):
        valid = torch.arange(self.law.c) < torch.tensor(self.law.counts).unsqueeze(1)
        return output.masked_fill(~valid, self.behind)

    def _logits(self, features, t):
        if self.features == "scaled_logits":
            return features if contraction(self.horizon) else features * (1 + t.view(-1, 1, 1))
        return self._centred_logs(features)

    def _log_likelihoods(self, features, t):
        if self.features == "posterior":
            # Of one variable on its own: all classes are equally likely beforehand.
            counts = torch.tensor(self.law.counts).view(-1, 1)
            scale = (1 - 1 / counts).sqrt() / counts.double().sqrt()
            return self._centred_logs((features * scale + 1 / counts).clamp_min(1e-17))
        return log_likelihoods(self.horizon, self.law.counts, self._logits(features, t), t)

    def _centred_logs(self, weights):
        valid = torch.arange(self.law.c) < torch.tensor(self.law.counts).unsqueeze(1)
        # Zero where a variable is missing, and behind the classes.
        logs = weights.masked_fill(~valid | (weights == 0), 1.0).log()
        means = logs.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True)
        return (logs - means).masked_fill(~valid, 0.0)


def exact_flow(law, horizon="infinite", parametrisation="classifier", **options):
    """An assignment flow with the exact field of a law."""
    horizon = {"infinite": InfiniteHorizon(), "finite": FiniteHorizon()}.get(horizon, horizon)
    features = options.pop("features", "scaled_logits")
    net = ExactField(law, horizon, parametrisation, features, **options)
    missing = bool(options.get("missing", False))
    num_classes = law.c if len(set(law.counts)) == 1 else list(law.counts)
    return nfi.AssignmentFlow(net, law.n, num_classes, horizon, parametrisation, features, missing)


class FieldOf(nn.Module):
    """A network from any function of features and times."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("dtype_of", torch.zeros((), dtype=DOUBLE))

    def forward(self, features, t):
        return self.function(features, t)


class Scaled(nn.Module):
    """A network whose output is multiplied: a deliberately wrong one."""

    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, features, t):
        return self.factor * self.net(features, t)
