"""Tables, page and figure of `guides.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from guide_fits import GUIDES
from guide_samplers import CALIBRATED, MODES, SPHERE
from guide_targets import Target

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

__all__ = ["figure", "page", "tables"]

Records = dict[str, dict[str, Any]]


class Row(NamedTuple):
    """What the runs of one guide on one target say."""

    guide: str
    gaps: list[float]
    rate: float
    milliseconds: float

    @property
    def mean(self) -> float:
        """Mean gap."""
        return sum(self.gaps) / len(self.gaps)

    @property
    def error(self) -> float:
        """Standard error of the mean; zero for one run."""
        number = len(self.gaps)
        if number < 2 or not math.isfinite(self.mean):
            return 0.0
        squares = sum((gap - self.mean) ** 2 for gap in self.gaps)
        return math.sqrt(squares / (number - 1) / number)


def _rows(records: Records, key: str) -> list[Row]:
    rows = []
    for guide in GUIDES[key]:
        start = f"fit|{key}|{guide}|"
        runs = [record for name, record in records.items() if name.startswith(start)]
        if not runs:
            continue
        times = sorted(1000 * run.get("per_step", math.nan) for run in runs)
        gaps = [run["gap"] for run in runs]
        rows.append(Row(guide, gaps, runs[0]["rate"], times[0]))
    return rows


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"


def _fits(records: Records, key: str, target: Target) -> str:
    lines = [
        f"### {target.title}: log Z = {target.log_evidence:.4f}, {target.steps} steps",
        "",
        "| guide | seeds | gap | standard error | least | greatest | rate | ms per step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = _rows(records, key)
    for row in rows:
        numbers = (row.mean, row.error, min(row.gaps), max(row.gaps))
        shown = " | ".join(_number(number) for number in numbers)
        if len(row.gaps) < 2:
            shown = shown.replace(" 0.000 ", " - ")
        name = f"`{row.guide}`" if "." in row.guide or "Auto" in row.guide else row.guide
        lines.append(
            f"| {name} | {len(row.gaps)} | {shown} | {row.rate:g} | {row.milliseconds:.1f} |"
        )
    return "\n".join(lines)


def _sphere(records: Records) -> str:
    lines = [
        "### NUTS on the sphere",
        "",
        "| site | mode at | mean | sd | effective draws | errors off, first moment | second "
        "| divergences | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in SPHERE:
        for mode in MODES:
            run = records.get(f"sphere|{name}|{mode}")
            if run is None:
                continue
            lines.append(
                f"| {name} | {mode} | {run['mean']:.4f} ± {run['error']:.4f} | {run['sd']:.4f} "
                f"| {run['effective']:.0f} | {run['z_mean']:+.1f} | {run['z_square']:+.1f} "
                f"| {run['divergences']:.0f} | {run['seconds']:.0f} |"
            )
    return "\n".join(lines)


def _calibration(records: Records) -> str:
    lines = [
        "### Simulation-based calibration, K = 3",
        "",
        "| site | p of the ranks, by coordinate | correlation of successive draws "
        "| acceptance | seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in CALIBRATED:
        run = records.get(f"calibration|{name}")
        if run is None:
            continue
        shown = ", ".join(f"{p:.2f}" for p in run["p"])
        lines.append(
            f"| {name} | {shown} | {run['correlation']:.3f} | {run['acceptance']:.2f} "
            f"| {run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def tables(records: Records, targets: dict[str, Target]) -> str:
    """All tables in Markdown.

    Args:
        records: Finished runs.
        targets: Targets to tell of.
    """
    fits = [_fits(records, key, target) for key, target in targets.items()]
    return "\n\n".join([*fits, _sphere(records), _calibration(records)])


def figure(records: Records, targets: dict[str, Target], path: Path) -> None:
    """Draw the gaps of all guides, one panel for each target.

    Args:
        records: Finished runs.
        targets: Targets to show.
        path: Where to.
    """
    panels = {key: _rows(records, key) for key in targets}
    panels = {key: rows for key, rows in panels.items() if rows}
    height = 0.9 * len(panels) + 0.24 * sum(len(rows) for rows in panels.values())
    ratios = [len(rows) + 1 for rows in panels.values()]
    drawn = plt.figure(figsize=(8, height), layout="constrained")
    axes = drawn.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axis, (key, rows) in zip(axes, panels.items(), strict=True):
        _panel(axis, rows)
        axis.set_title(targets[key].title, fontsize=10, loc="left")
    axes[-1].set_xlabel("log Z - ELBO, nats")
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def _panel(axis: Any, rows: list[Row]) -> None:
    for height, row in enumerate(reversed(rows)):
        ours = row.guide.startswith(("nfp", "same", "star"))
        colour = "C0" if ours else "C3"
        # Sampling may take a gap of nearly zero below it.
        shown = [max(gap, 1e-3) for gap in row.gaps]
        axis.plot(shown, [height] * len(shown), ".", color=colour, alpha=0.4, markersize=5)
        axis.plot(max(row.mean, 1e-3), height, "|", color=colour, markersize=13, mew=2)
    axis.set_yticks(range(len(rows)), [row.guide for row in reversed(rows)], fontsize=8)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xscale("log")
    least, greatest = axis.get_xlim()
    subs = (1, 2, 5) if greatest < 1000 * least else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3, axis="x")


def page(records: Records, targets: dict[str, Target]) -> str:
    """The page of results.

    Args:
        records: Finished runs.
        targets: Targets to tell of.
    """
    return PAGE.replace("TABLES", tables(records, targets)).replace("READING", READING)


PAGE = r"""# Guides and samplers on posteriors of known evidence

Produced by

    python benchmarks/guides.py --seeds 5 --page docs/results/guides.md

on one thread of a busy machine, torch 2.13, Pyro 1.9.2. Finished runs are kept in
`out/guides.jsonl`, and a stopped benchmark goes on there. The *gap* is log Z - ELBO in nats, the
ELBO that of 20,000 fresh draws; zero is perfect. Entries are means over seeds of weights and
samples, as many as the table says, with the standard error over seeds, the least and the greatest.

All guides of one target get the same steps of Adam with 32 particles, the rate brought to zero
along a cosine, and otherwise their own defaults. The first rate is the best of 0.003, 0.01 and
0.03 in one run of a quarter of the steps, with a seed that is not used again. Where the
tables have fewer than five seeds, the same command goes on. Budgets are short:
what converges slowly is at a disadvantage, and is so in the table.

![Gaps of all guides](../figures/guides.png)

Red is Pyro's, blue is ours; dots are seeds, bars means. Milliseconds are those of the fastest run.

## Tables

TABLES

## The targets

* *banana*: x_1 is standard normal, the other nineteen coordinates are a_j x_1 + b_j x_1^2 with
  noise of 0.05, |a| = 2.86, |b| = 7.6. *Regression*: 40 observations, 20 predictors of
  correlation 0.8, an exactly normal posterior, whose gaps are optimisation alone.
* *Dirichlet-multinomial*: 40 counts, prior Dirichlet(0.8). Pyro's autoguides and `AutoFlow` act
  behind Pyro's stick-breaking; *same splines* are those of `AutoFlow` before our charts, as a
  `FlowDistribution`, without `AutoFlow`'s trained location and scale behind them.
* *sphere*: a uniform prior on S^2 and a factor exp(10 m.u), or that and its mirror image.
  NUTS: one chain of 600 draws after 200 of warm-up; m.u has mean 0.9000 and standard deviation
  0.0995.
  *errors off* is in standard errors from effective draws, for m.u and its square. The
  stereographic chart misses one point, and the second mode of each lies exactly there.
* *calibration*: 200 problems of six counts in three categories, their truth drawn from the prior,
  ranks among 31 draws, in eight bins. All problems lie in one plate, sampled together by HMC with
  trajectories of length 1.5 after 200 steps of warm-up, every fourth draw kept. The target is the
  product of the posteriors, so that this is a valid chain of each; draws of one problem are as
  little correlated as the table says.

## Reading

READING
"""

READING = """\
* **Banana.** `AutoInjective` is below every autoguide of Pyro, at 1.3 to 1.4 on average, with
  single runs up to 1.7: it follows the parabola for a part of its length, as a reverse divergence
  makes every guide do. Rank 5 is better on average and scatters more than rank 1.
* **Regression.** With `noise="mvn"` it contains the normal posterior, and gets there sooner than
  `AutoMultivariateNormal`; both are all but exact. Diagonal and low-rank normals cannot be.
* **Simplex.** The same splines do best before `SimplexStickBreaking`, whose coordinates send the
  standard normal to the flat Dirichlet law; the orthant chart comes second. `AutoFlow`, behind
  Pyro's stick-breaking, is slower to get there, and one of its runs at rate 0.03 diverged: the
  short run that chose the rate did not warn. Take 0.01 or less for it.
* **Sphere.** `star_like_flow` finds both modes, though it shares them out unevenly in some runs,
  where every guide that starts from one place finds one of them and pays log 2; it wants a rate
  of 0.003. On one mode `ProjectedNormal`, which has its shape, is better, and ten times as cheap.
* **NUTS** has the right moments by all three ways, also with the mode at the missing point of the
  chart, where `ManifoldReparam` had the fewest effective draws. `ProjectedNormalReparam` is the
  fastest by the clock.
* **Calibration.** Ranks are uniform, as far as 200 problems tell, in both charts of ours and in
  Pyro's."""
