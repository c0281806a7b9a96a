"""The numbers of a report, judged in words."""

from __future__ import annotations

from typing import NamedTuple

# The thresholds come from trainings whose truth is known: docs/results/verdicts.md.

# A latent direction is lost if the round trip returns less than this part of it. Pairs that keep
# all of their directions return 0.7 and more.
LOST = 0.5
# More than this part coming back means no inverse pair; good ones return at most 1.3.
OVERSHOOT = 1.4
# Shares of the variance that stay unexplained. Where directions are lost below the first one,
# those that are kept do the work.
NEARLY_ALL = 0.04
# Noise may leave as much as this.
NOISY = 0.15
# Above this the pair overshoots because the likelihood outweighs the reconstruction.
POOR = 0.03
# Above this a consistent pair has too few dimensions.
MUCH = 0.08
# How much worse than components a model may be: as a ratio, and as a share of the variance.
WORSE_RATIO, WORSE_SHARE = 1.25, 0.01
# A few more components that leave so much less than the model, by missing dimension.
STEEP, STEEP_SHARE = 3.0, 0.02
# Relative standard deviation of directions that the data do not have.
NOTHING = 1e-5
# Fewer rows a dimension than this say nothing about components.
ROWS_PER_DIM = 3


class Finding(NamedTuple):
    """One statement about a model.

    Attributes:
        name: ``"too many dimensions"``, ``"too few dimensions"``, ``"beta too small"``,
            ``"undertrained"`` or ``"fine"``.
        evidence: The numbers that led to it.
        remedy: What to do.

    Examples:
        >>> Finding("fine", "Nothing stands out.", "Compare likelihoods.").name
        'fine'
    """

    name: str
    evidence: str
    remedy: str


class Evidence(NamedTuple):
    """The numbers of a report that a verdict looks at.

    Attributes:
        num_rows: Number of samples.
        latent_dim: Latent dimensions d.
        data_dim: Data dimensions D.
        error: Mean squared reconstruction error.
        variances: Variances along the principal components of the data, descending.
        lost: Median number of latent directions of which the round trip returns less than half.
        overshoot: Median of the largest singular value of the round trip.
        left_inverse_error: Median of it.
        condition: Median condition number.
        smallest: Median of the smallest singular value of the decoder Jacobian.
        cosine: Cosine of surrogate and exact gradient.
    """

    num_rows: int
    latent_dim: int
    data_dim: int
    error: float
    variances: tuple[float, ...]
    lost: int
    overshoot: float
    left_inverse_error: float
    condition: float
    smallest: float
    cosine: float

    @property
    def variance(self) -> float:
        """Total variance of the data."""
        return sum(self.variances)

    @property
    def share(self) -> float:
        """Share of the variance that the model leaves."""
        return self.error / self.variance if self.variance > 0 else 0.0

    @property
    def rank(self) -> int:
        """Number of directions that the data have."""
        least = NOTHING**2 * max(self.variances)
        return sum(variance > least for variance in self.variances)

    @property
    def knows_components(self) -> bool:
        """Whether there are enough rows to speak of components."""
        return self.variance > 0 and self.num_rows >= ROWS_PER_DIM * (self.latent_dim + 1)

    def linear_share(self, dim: int) -> float:
        """Share of the variance that ``dim`` principal components leave."""
        return sum(self.variances[dim:]) / self.variance


def judge(evidence: Evidence) -> tuple[Finding, ...]:
    """All findings that hold, or the one that the model is fine."""
    no_pair = evidence.overshoot > OVERSHOOT and evidence.share > POOR
    is_worse = _is_undertrained(evidence)
    findings = []
    if no_pair:
        findings.append(_beta_too_small(evidence))
    elif is_worse:
        findings.append(_undertrained(evidence))
    if _has_too_many(evidence):
        findings.append(_too_many(evidence))
    elif not (no_pair or is_worse or evidence.lost) and _has_too_few(evidence):
        findings.append(_too_few(evidence))
    return tuple(findings) or (_fine(evidence),)


def _is_undertrained(evidence: Evidence) -> bool:
    if _only_noise_is_missing(evidence):
        return False
    if evidence.lost and evidence.share >= NEARLY_ALL:
        return True
    if not evidence.knows_components:
        return False
    linear = evidence.linear_share(evidence.latent_dim)
    # Components fitted to n rows miss less of these than of others, by this ratio for noise.
    used, rows = evidence.latent_dim + 1, evidence.num_rows
    linear *= (rows + used) / (rows - used)
    return evidence.share > max(WORSE_RATIO * linear, linear + WORSE_SHARE)


def _only_noise_is_missing(evidence: Evidence) -> bool:
    """Whether the directions that a model lost have no more variance than those beyond them.

    A model need not reconstruct noise, and misses as much as that many fewer components.
    """
    dim, kept = evidence.latent_dim, evidence.latent_dim - evidence.lost
    if not (evidence.lost and evidence.knows_components and dim < evidence.data_dim):
        return False
    missing = evidence.linear_share(kept)
    level = missing / (evidence.data_dim - kept)
    beyond = evidence.linear_share(dim) / (evidence.data_dim - dim)
    is_like = missing / WORSE_RATIO < evidence.share < missing * WORSE_RATIO
    return level <= 2 * beyond and is_like and evidence.share < NOISY


def _has_too_many(evidence: Evidence) -> bool:
    if evidence.knows_components and evidence.latent_dim > evidence.rank:
        return True
    if evidence.lost:
        return evidence.share < NEARLY_ALL or _only_noise_is_missing(evidence)
    # A pair that fails where next to nothing is missing fails along directions of noise.
    return evidence.overshoot > OVERSHOOT and evidence.share <= POOR


def _has_too_few(evidence: Evidence) -> bool:
    if evidence.share > MUCH:
        return True
    dim = evidence.latent_dim
    more = dim + max(1, dim // 4)
    if not evidence.knows_components or more >= evidence.data_dim:
        return False
    level = evidence.share / (evidence.data_dim - dim)
    further = evidence.linear_share(more) / (evidence.data_dim - more)
    return evidence.share > STEEP_SHARE and STEEP * further < level


def _beta_too_small(evidence: Evidence) -> Finding:
    return Finding(
        "beta too small",
        f"The round trip multiplies a direction by {evidence.overshoot:.2g}: encoder and decoder "
        f"are no inverse pair (|f'g' - I| / sqrt(d) {evidence.left_inverse_error:.2g}). "
        f"{_missing(evidence)}.",
        "Raise beta of SurrogateLikelihood three times or more, or train the reconstruction first "
        "(warmup_steps).",
    )


def _undertrained(evidence: Evidence) -> Finding:
    lost = f" {_lost(evidence)}." if evidence.lost else ""
    return Finding(
        "undertrained",
        f"{_missing(evidence)}.{lost}",
        "Train longer, or with a higher learning rate; standardise the data; widen the networks; "
        "if that does not help, raise beta.",
    )


def _too_many(evidence: Evidence) -> Finding:
    dim, rank = evidence.latent_dim, evidence.rank
    reasons, used = [], dim - evidence.lost
    if evidence.knows_components and dim > rank:
        reasons.append(f"The data span {rank} dimensions only")
        used = min(used, rank)
    if evidence.lost:
        reasons.append(_lost(evidence))
    if not reasons:
        reasons.append(f"The round trip multiplies a direction by {evidence.overshoot:.2g}")
    fewer = f"latent dimension {max(1, used)}" if used < dim else "fewer latent dimensions"
    return Finding(
        "too many dimensions",
        f"{'. '.join(reasons)}. {_missing(evidence)}. Condition {evidence.condition:.3g}, "
        f"smallest singular value {evidence.smallest:.2g}, gradient cosine {evidence.cosine:.2f}.",
        f"Try {fewer}; suggest_latent_dim gives a range. If components do much better, a "
        "direction that matters is lost: train longer.",
    )


def _too_few(evidence: Evidence) -> Finding:
    return Finding(
        "too few dimensions",
        "Encoder and decoder are an inverse pair (|f'g' - I| / sqrt(d) "
        f"{evidence.left_inverse_error:.2g}). {_missing(evidence)}.",
        "Try more latent dimensions; suggest_latent_dim gives a range. If the error stays, the "
        "rest is noise, or networks are too small or not trained to the end.",
    )


def _fine(evidence: Evidence) -> Finding:
    lost = _lost(evidence) if evidence.lost else "No direction is lost"
    return Finding("fine", f"{lost}. {_missing(evidence)}.", "Nothing to do.")


def _lost(evidence: Evidence) -> str:
    count, dim = evidence.lost, evidence.latent_dim
    return f"The round trip returns less than half of {count} of {dim} directions"


def _missing(evidence: Evidence) -> str:
    text = f"{_percent(evidence.share)} of the variance is missing"
    if not evidence.knows_components:
        return text
    dim = evidence.latent_dim
    linear = _percent(evidence.linear_share(dim))
    return f"{text}, {dim} components fitted to these rows miss {linear}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
