"""MixerFlow beside a Glow of as many parameters, on images whose pixels may be permuted.

    python -m benchmarks.flows.mixer fashion_mnist --data DIR [--seeds 3] [--steps 500] [--quick]
        [--only NAME] [--page docs/results/mixer.md]

DIR holds ``mnist.npz`` or ``fashion_mnist.npz``; the environment variable NFI_DATA may name it.
Every run is a line of a file under out/ and is not repeated: a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import normflows as nf
import torch
from torch import Tensor, nn
from tqdm import trange

from benchmarks.shared.data import add_data_option, read_arrays
from benchmarks.shared.figures import beside, new_figure, save
from benchmarks.shared.records import Record, run_once
from benchmarks.shared.tables import report, table, with_error
from normflows_injective.flows.mixer import Patchify, bits_per_dim, dequantise, mixer_flow

SHAPE, PATCH, BITS, BATCH, JUDGED = (1, 28, 28), 4, 5, 64, 2000
LAYERS, WIDTH = 8, 96
RATE, WARMUP, CLIP = 2e-3, 50, 50.0
KINDS = ("original", "structured", "full")

BuildModel = Callable[[], nn.Module]


def count(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def mixer(width: int, **options: object) -> nn.Module:
    """A MixerFlow on the diagonal normal of normflows."""
    flows = mixer_flow(SHAPE, PATCH, LAYERS, (width, width), **options)
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(SHAPE), flows)


def glow(width: int, blocks: int = 6, levels: int = 2) -> nn.Module:
    """Glow of normflows: every level squeezes by two and leaves half of the channels."""
    channels, height, size = SHAPE
    bases, merges, flows = [], [], []
    for level in range(levels):
        num_channels = channels * 2 ** (levels + 1 - level)
        steps = [_glow_block(num_channels, width) for _ in range(blocks)]
        flows.append([*steps, nf.flows.Squeeze()])
        side = 2 ** (levels - level)
        left = num_channels if level == 0 else channels * side
        bases.append(nf.distributions.DiagGaussian((left, height // side, size // side)))
        if level > 0:
            merges.append(nf.flows.Merge())
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=False)


def log_prob(model: nn.Module, x: Tensor) -> Tensor:
    """Log-densities (B,) in nats of either model, whose calls differ in normflows."""
    return model.log_prob(x, None) if isinstance(model, nf.MultiscaleFlow) else model.log_prob(x)


def glow_width(parameters: int) -> int:
    """Width of Glow's networks that comes nearest to a number of parameters."""
    widths = range(8, 512)
    low, high = widths[0], widths[-1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(glow(middle)) < parameters else (low, middle)
    return min((low, high), key=lambda width: abs(count(glow(width)) - parameters))


def _glow_block(channels: int, width: int) -> nf.flows.Flow:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.lu is deprecated")
        return nf.flows.GlowBlock(channels, width, split_mode="channel", scale=True)


def models() -> dict[str, BuildModel]:
    """All models by name; Glow has the width that comes nearest in parameters."""
    plain = functools.partial(mixer, WIDTH)
    parameters = count(plain())
    return {
        "MixerFlow": plain,
        "Glow": functools.partial(glow, glow_width(parameters)),
        "MixerFlow, roll": functools.partial(plain, shift="roll"),
        "MixerFlow, three times the steps": plain,
        "MixerFlow, interior": functools.partial(
            mixer, _interior_width(parameters), shift="interior"
        ),
    }


def _interior_width(parameters: int) -> int:
    """A smaller width, because the layers of the interior add parameters."""
    sizes = {width: count(mixer(width, shift="interior")) for width in range(16, WIDTH, 4)}
    return min(sizes, key=lambda width: abs(sizes[width] - parameters))


def permutations(seed: int) -> dict[str, Tensor]:
    """Orders of the pixels: theirs, one that keeps patches together, and any."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shuffle = functools.partial(torch.randperm, generator=generator)
    patchify = Patchify(SHAPE, PATCH)
    pixels = patchify.inverse(torch.arange(math.prod(SHAPE)).float().view(1, *SHAPE))[0]
    patches, places = patchify.latent_shape
    structured = pixels[:, shuffle(patches)][:, :, shuffle(places)]
    return {
        "original": torch.arange(math.prod(SHAPE)),
        "structured": patchify(structured)[0].flatten().long(),
        "full": shuffle(math.prod(SHAPE)),
    }


def images(name: str, folder: str | None) -> tuple[Tensor, Tensor]:
    """Training and test images (N, 784) of integers, read without unpickling."""
    arrays = read_arrays(folder, f"{name}.npz", "x_train", "x_test")
    train, test = map(torch.from_numpy, arrays)
    return train.flatten(1), test[:JUDGED].flatten(1)


def fit(
    build: BuildModel, train: Tensor, test: Tensor, order: Tensor, steps: int, seed: int
) -> Record:
    """Train a model on permuted images, and take its bits per dimension on others."""
    torch.manual_seed(seed)
    model = build()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min(1.0, (k + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * k / steps)),
    )
    seconds = 0.0
    for _ in trange(steps):
        chosen = train[torch.randint(len(train), (BATCH,), generator=generator)]
        x = dequantise(chosen[:, order].view(-1, *SHAPE), BITS, generator=generator)
        start = time.process_time()
        loss = -log_prob(model, x).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - start
    model.eval()
    held_out = dequantise(
        test[:, order].view(-1, *SHAPE), BITS, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        scores = torch.cat([log_prob(model, x) for x in held_out.split(250)])
    bits = bits_per_dim(scores.double(), math.prod(SHAPE), BITS)
    return {
        "bits": float(bits.mean()),
        "error_by_images": float(bits.std()) / math.sqrt(len(bits)),
        "parameters": count(model),
        "seconds_per_step": seconds / steps,
    }


def tables(records: Sequence[Record]) -> dict[str, str]:
    """Both tables by their titles, of runs with keys "model|kind|seed"."""
    return {"Bits per dimension": _bits(records), "Costs of permutations": _losses(records)}


def _of(records: Sequence[Record], model: str, kind: str, field: str = "bits") -> list[float]:
    runs = [record for record in records if record["key"].startswith(f"{model}|{kind}|")]
    return [record[field] for record in sorted(runs, key=lambda record: record["key"])]


def _models(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["key"].split("|")[0] for record in records))


def _bits(records: Sequence[Record]) -> str:
    rows = []
    unit = _of(records, "Glow", "original", "seconds_per_step")
    for model in _models(records):
        cells = [_of(records, model, kind) for kind in KINDS]
        entries = [with_error(bits, 3) if bits else "-" for bits in cells]
        seconds = _of(records, model, "original", "seconds_per_step")
        ratio = f"{sum(seconds) / sum(unit[: len(seconds)]):.2f}" if unit else "-"
        parameters = _of(records, model, "original", "parameters")
        size = f"{int(parameters[0]):,}" if parameters else "-"
        rows.append((model, size, ratio, *entries))
    return table(("model", "parameters", "step, times Glow's", *KINDS), rows)


def _losses(records: Sequence[Record]) -> str:
    """The loss by each permutation in pairs of runs of one seed, whose common part cancels."""
    rows = []
    for model in ("MixerFlow", "Glow"):
        original = _of(records, model, "original")
        cells = []
        for kind in KINDS[1:]:
            pairs = zip(_of(records, model, kind), original, strict=False)
            losses = [permuted - plain for permuted, plain in pairs]
            cells.append(with_error(losses, 3) if losses else "-")
        rows.append((model, *cells))
    return table(("model", *(f"{kind} - original" for kind in KINDS[1:])), rows)


def draw_figure(records: Sequence[Record], path: Path) -> None:
    """Draw the bits of every run, one row for each model."""
    figure = new_figure(7.6, 3.2)
    axes = figure.subplots()
    models = _models(records)
    for row, model in enumerate(models):
        for kind, marker in zip(KINDS, ("o", "s", "^"), strict=True):
            bits = _of(records, model, kind)
            label = kind if row == 0 else None
            color = f"C{KINDS.index(kind)}"
            axes.plot(bits, [row] * len(bits), marker, color=color, alpha=0.7, label=label)
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel("bits per dimension, every seed a mark")
    axes.legend(title="pixels")
    axes.grid(axis="x", alpha=0.3)
    save(figure, path, dpi=150)


def main() -> None:
    """Do the missing runs, print the tables, and write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["mnist", "fashion_mnist"])
    add_data_option(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="three steps of one seed, to try it")
    parser.add_argument("--only", help="a part of the name of models")
    parser.add_argument("--page", type=Path, help="page whose tables to write, and its figure")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps = 1, 3
    train, test = images(arguments.name, arguments.data)
    file = Path("out") / f"mixer_{arguments.name}_{arguments.steps}.jsonl"
    # The longest runs come last, so that an early stop leaves the table whole.
    long = "three times"
    jobs = [
        (name, kind, seed)
        for late in (False, True)
        for seed in range(arguments.seeds)
        for name in models()
        for kind in permutations(seed)
        if (long in name) == late and (kind == "original" or "," not in name)
    ]
    records = []
    for name, kind, seed in jobs:
        if (arguments.only or "") not in name:
            continue
        order, steps = permutations(seed)[kind], arguments.steps * (3 if long in name else 1)
        run = functools.partial(fit, models()[name], train, test, order, steps, seed)
        records.append(run_once(file, f"{name}|{kind}|{seed}", run))
    report(tables(records), arguments.page)
    if arguments.page is not None:
        draw_figure(records, beside(arguments.page))


if __name__ == "__main__":
    main()
