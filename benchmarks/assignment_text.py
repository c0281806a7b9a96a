"""The text of the page of the benchmark of assignment flows."""

from __future__ import annotations

__all__ = ["PAGE"]

PAGE = """# Assignment flows beside linear flow matching

Produced by

    python benchmarks/assignment.py --steps STEPS --page docs/results/assignment.md

torch TORCH, one thread of a shared CPU (MACHINE). All methods have the same budget: STEPS steps of
Adam with 256 samples, 0.002 let down by a cosine; perceptrons of three hidden layers of 128, or as
many weights behind the masks; 75 midpoint steps of sampling. Entries are means over seeds (of
weights, noise and batches) with the standard error over them. TV is the total variation between
the histogram of samples and the true law, KL their Kullback-Leibler divergence in nats; the row of
*true samples*, as many of them, is the floor that a perfect sampler has. An entry without ± is a
single run.

![total variation of every method](FIGURE)

## 3 x 3 Ising model

512 states, inverse temperature .5, 40 000 samples. With *independent marginals*, which are right
and uniform, nothing is learned of the coupling. *Linear* is flow matching by straight lines of
weights from a flat Dirichlet law to the corner, which sees the weights on the scale of our
features, fitted as a velocity by squared errors or as a classifier by cross-entropy.

ISING_TABLE

All combinations of options, with the default law of times, by three runs each:

COMBINATION_TABLE

### Probabilities of all states

Estimated for every one of the 512 states by 16 draws of importance sampling, and 512 for the eight
likeliest, with 20 steps of rk4, one training each. KL(p, model) is in nats, with the error by the
draws; half of the mean squared error of an estimate, the part by which noise enlarges it, is
beside it. ESS is the mean effective sample size, over the states and over the law. The sum over
all states should be one. *Time* is processor time, as a multiple of the first row's.

LIKELIHOOD_TABLE

## Two coupled labels

Labels i and j, near each other on a circle after a random renaming of the second:
p proportional to (1 + .8 cos(2 pi i / c)) (exp(-d(i, pi(j))^2 / (2 w^2)) + .01), w = c/16 + .5.
Effective states are the exponential of the entropy. There are 50 samples for each of them, and
at least 20 000.

LAW_TABLE

GRID_TABLE

## Cost

Processor time of our part, with an elementwise network of next to no cost, batches of 32:
a step of training (loss and gradients), an evaluation of sampling and one of likelihoods with the
divergence in closed form, as multiples of the row above all. *More n*: 16 classes, n = n c / 16;
*more c*: 16 variables. The slope is that of logarithms, over all rows: 1 is linear.

COST_TABLE

The whole of a step with the dense network of three hidden layers of 128:

WHOLE_TABLE

An evaluation of field and divergence, as a multiple of one of the field alone with the same
network, for variables of four classes:

DIVERGENCE_TABLE

## Steps of the solver

The share of rows with another label than by 96 steps of rk4 from the same noise, along the exact
field, to time 8 of the infinite horizon and .6 of the finite one; in brackets what
`choose_horizon` goes by, C h^p with h the deviations that a step moves the corner by and (C, p) =
(.05, 4) for rk4, (.2, 2) for midpoint, (.6, 1) for euler.

MISPLACED_TABLE

## What the numbers say

* **The default has the least distance of all on either law**: .050 on the Ising model, .02 above
  the floor, beside .071 for the predecessor, .11 for the published settings and .19 for linear
  flow matching.
* **Most of it is the classifier, and the features of the posterior add to it**: with those of the
  weights it is at .057. For a velocity weights are the best features, and those of the posterior
  twice as far off in the finite horizon. With a classifier the horizon matters little: the finite
  one is behind by .002 to .012.
* **Part of what the published settings lose is the law of times**: with Gamma(2, .5) in place of
  Gamma(1, .25), the combination of an infinite horizon, velocity and weights comes from .11 to
  .087, two standard errors, and the predecessor stays ahead of it.
* **That assignment flows bear more classes than linear flow matching is true of the default and
  of the predecessor**, not of the published settings at this budget, which are behind linear flow
  matching with a classifier at 16 and 64 classes. Which variant of linear flow matching is the
  better depends on the law, so both are shown.
* **Probabilities of the default sum to one, with hardly any noise**, and leaving variables out
  gives the same for about a twentieth of the time, at a distance a tenth larger. For the published
  settings the estimate fails, as its effective sample size says: the proposal supposes that paths
  end about the corners as those of the exact field do, and the sum is too small. Its KL is that of
  the estimate, not of the samples.
* Sampling the predecessor to .99 in place of .9 changes nothing.
* **Our part is linear in n c**, but for caches: the slopes are 1.06 to 1.19, where the allocator
  keeps its memory, as it was told to. A dense network of 128 units about doubles a step. The
  divergence in closed form adds about half an evaluation or less; by forward-mode products it
  takes ten and more, of which much is overhead at these sizes. The network that leaves variables
  out grows with n^2, and is itself ten times the dense one at 64 variables.
* **The rule for the steps holds within a factor of 1.5 for the Ising model and the infinite
  horizon**, and is cautious elsewhere: by twice and more for pairs, and for the finite horizon on
  the Ising model from about twice for euler to 17 times for rk4.
* What this does not say: two small laws, one size of network, one learning rate for all, untuned,
  and short trainings; the probabilities are of one training each.
"""
