"""The page and the figure of the cost of training steps."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.shared.figures import new_figure, save
from benchmarks.shared.tables import table, wrapped

from .cells import (
    AUTOENCODER,
    BFLOAT16,
    FLOOR,
    PACKAGE,
    PACKAGE_COMPILED,
    PUBLISHED,
    VARIANTS,
    Cell,
    Measured,
)
from .models import BETA, MODELS

__all__ = ["draw_figure", "page"]

_LINES = {PUBLISHED: ("C3", "s"), PACKAGE: ("C0", "o"), PACKAGE_COMPILED: ("C2", "^")}


def page(measured: Measured) -> str:
    """The page of results."""
    cells = measured.cells
    on_gpu = any(cell.peak_bytes for cell in cells)
    cast = any(key.endswith(BFLOAT16) for cell in cells for key in cell.seconds)
    command = "python -m benchmarks.steps.cost --page docs/results/step_cost.md"
    command += " --device cuda" * on_gpu + " --autocast" * cast
    sections = _introduction(measured, command, on_gpu)
    sections.append("![Ratios against the number of probes](../figures/step_cost.png)")
    one = [cell for cell in cells if cell.num_probes == 1]
    several = [cell for cell in cells if cell.num_probes > 1]
    for heading, chosen in (("Time, one probe", one), ("Time, several probes", several)):
        if chosen:
            sections += [f"## {heading}", _times(chosen, "", on_gpu)]
    if cast:
        sections += ["## Time under bfloat16 autocast", _AUTOCAST, _times(cells, BFLOAT16, on_gpu)]
    sections += ["## Memory kept for backward", wrapped(_MEMORY), _bytes(cells, "saved_bytes")]
    if on_gpu:
        sections += ["## Peak memory", wrapped(_PEAK), _bytes(cells, "peak_bytes")]
    sections += ["## Multiply-adds", wrapped(_MULTIPLY_ADDS), _products(cells)]
    if any(cell.compile_seconds for cell in cells):
        sections += ["## Compile time", wrapped(_COMPILE), _compile_times(cells)]
    return "\n\n".join(sections) + "\n"


_AUTOCAST = "As above; the unit is the eager autoencoder under autocast."

_MEMORY = (
    "Bytes that the graph holds between forward and backward, every storage once, without the "
    "parameters. MiB for the autoencoder, else ratios to it."
)

_PEAK = (
    "The most that the allocator gave out during a step, beyond what was there before. MiB for "
    "the autoencoder, else ratios to it."
)

_MULTIPLY_ADDS = (
    "Of matrix products and convolutions, counted as they are dispatched, the padding included: "
    "millions for the autoencoder, else ratios to it. The floor is what the formula of the "
    "surrogate asks for: for every probe the decoder once forward, and the encoder's share of an "
    "autoencoder step once more. It leaves out that the encoder's last layer needs one product "
    "less, because probes are constant, so that a count may lie just below it. It is no bound on "
    "the time: products of many probes at once can run at a better rate. Compiled steps cannot be "
    "counted so."
)

_COMPILE = (
    "Seconds of wall clock until the first step is done, with empty caches. The first use of a "
    "compiler on a machine takes longer."
)


def _introduction(measured: Measured, command: str, on_gpu: bool) -> list[str]:
    facts, cells = measured
    rounds = sorted({len(next(iter(cell.seconds.values()))) for cell in cells})
    clock = "processor time" if facts["threads"] == 1 else "wall clock"
    timed = "CUDA events around every step, synchronised" if on_gpu else clock
    batches = ", ".join(
        f"{MODELS[name].batch} ({name})" for name in dict.fromkeys(cell.model for cell in cells)
    )
    worst = max(cell.difference for cell in cells)
    stated = "; ".join(f"{key}: {value}" for key, value in facts.items())
    return [
        "# What a training step costs",
        f"    {command}",
        wrapped(
            "A step is the loss and its backward pass, without an optimiser. The unit is the "
            "eager step of a plain autoencoder with the loss beta |x - x_hat|^2 + |z|^2 / 2, beta "
            f"{BETA:g}. *Published algorithm* is the same loss with the volume term as it was "
            "published (arXiv 2306.01843), written from the description: every probe decodes "
            "again, under dual numbers with gradients enabled, and takes a reverse-mode product "
            "of its own through the encoder. *nfi* is `model.forward_kld(x)` of this package with "
            "all its checks. *Compiled* means `SurrogateLikelihood(compile=True)`, and "
            "`torch.compile` for the autoencoder."
        ),
        wrapped(
            "Before anything was measured, the gradients of both algorithms were compared in "
            f"float64 with equal probes: they differ by at most {worst:.0e} of the volume's "
            "gradient."
        ),
        wrapped(
            f"Conditions: {stated}; float32; SiLU everywhere; batches of {batches}. Times are "
            f"{timed}, all variants in one process and in random order within each of "
            f"{' or '.join(map(str, rounds))} rounds: the ratio of the medians, and in brackets "
            "the quartiles of the ratios within a round."
        ),
    ]


def _times(cells: list[Cell], suffix: str, absolute: bool) -> str:
    rows = []
    for cell in cells:
        if AUTOENCODER + suffix not in cell.seconds:
            continue
        row = [f"{1000 * median(cell.seconds[AUTOENCODER + suffix]):.3g}"]
        for variant in VARIANTS:
            ratio = cell.ratio(variant + suffix)
            if ratio is None:
                row.append("-")
                continue
            first, third = cell.quartiles(variant + suffix)
            text = f"{ratio:.2f} ({first:.2f} to {third:.2f})"
            milliseconds = 1000 * median(cell.seconds[variant + suffix])
            row.append(f"{text}, {milliseconds:.3g} ms" if absolute else text)
        rows.append([*_labels(cell), *row, f"{cell.floor():.2f}"])
    return table(["model", "K", "autoencoder, ms", *VARIANTS, FLOOR], rows)


def _bytes(cells: list[Cell], field: str) -> str:
    suffixes = [
        suffix for suffix in ("", BFLOAT16) if AUTOENCODER + suffix in getattr(cells[0], field)
    ]
    rows = []
    for cell in cells:
        by_variant = getattr(cell, field)
        for suffix in suffixes:
            unit = by_variant[AUTOENCODER + suffix]
            title, num_probes = _labels(cell)
            rows.append(
                [
                    title + suffix,
                    num_probes,
                    f"{unit / 2**20:.3g}",
                    *(_over(by_variant.get(variant + suffix), unit) for variant in VARIANTS),
                ]
            )
    return table(["model", "K", "autoencoder, MiB", *VARIANTS], rows)


def _products(cells: list[Cell]) -> str:
    rows = []
    for cell in cells:
        unit = cell.multiply_adds[AUTOENCODER]
        ratios = [_over(cell.multiply_adds[key], unit) for key in (PUBLISHED, PACKAGE, FLOOR)]
        rows.append([*_labels(cell), f"{unit / 1e6:.0f}", *ratios])
    return table(["model", "K", "autoencoder, millions", PUBLISHED, PACKAGE, FLOOR], rows)


def _compile_times(cells: list[Cell]) -> str:
    keys = list(dict.fromkeys(key for cell in cells for key in cell.compile_seconds))
    rows = []
    for cell in cells:
        seconds = [cell.compile_seconds.get(key) for key in keys]
        rows.append([*_labels(cell), *("-" if s is None else f"{s:.0f}" for s in seconds)])
    return table(["model", "K", *keys], rows)


def _labels(cell: Cell) -> list[str]:
    return [MODELS[cell.model].title, str(cell.num_probes)]


def _over(number: int | None, unit: int) -> str:
    return "-" if number is None else f"{number / unit:.2f}"


def draw_figure(measured: Measured, path: Path) -> None:
    """Draw the ratios against the number of probes, one panel for each model."""
    names = list(dict.fromkeys(cell.model for cell in measured.cells))
    probes = sorted({cell.num_probes for cell in measured.cells})
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(3.2 * columns, 2.9 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axis, name in zip(axes, names, strict=False):
        _panel(axis, [cell for cell in measured.cells if cell.model == name])
        axis.set_title(MODELS[name].title.replace("`", ""), fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlim(probes[0] / 1.3, probes[-1] * 1.3)
        axis.set_xticks(probes, [str(n) for n in probes])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("probes K")
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.supylabel("step, in steps of the autoencoder", fontsize=10)
    shown: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(
        shown.values(), shown.keys(), loc="outside upper center", ncols=len(shown), fontsize=9
    )
    save(figure, path)


def _panel(axis: Any, cells: list[Cell]) -> None:
    for variant, (colour, marker) in _LINES.items():
        points = [(cell, r) for cell in cells if (r := cell.ratio(variant)) is not None]
        if not points:
            continue
        quartiles = [cell.quartiles(variant) for cell, _ in points]
        ratios = [ratio for _, ratio in points]
        # The ratio of the medians need not lie between the quartiles of the ratios.
        below = [max(0.0, r - first) for r, (first, _) in zip(ratios, quartiles, strict=True)]
        above = [max(0.0, third - r) for r, (_, third) in zip(ratios, quartiles, strict=True)]
        axis.errorbar(
            [cell.num_probes for cell, _ in points],
            ratios,
            (below, above),
            color=colour,
            marker=marker,
            markersize=5,
            capsize=2,
            label=variant,
        )
    axis.plot(
        [cell.num_probes for cell in cells],
        [cell.floor() for cell in cells],
        "k--",
        marker="_",
        label="floor of the multiply-adds",
    )
    axis.axhline(1, color="grey", linewidth=0.8)
