"""MixerFlow beside a Glow of as many parameters, on images whose pixels may be permuted.

    python benchmarks/flows/mixer.py fashion_mnist --data DIR [--seeds 3] [--steps 500] [--quick]
        [--only NAME] [--page docs/results/mixer.md]

DIR holds ``mnist.npz`` or ``fashion_mnist.npz``; the environment variable NFI_DATA may name it.
Every run is a line of a file under out/ and is not repeated: a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from image_models import count, glow, glow_width, log_prob, mixer
from mixer_page import write_page
from records import Record, run_once
from torch import Tensor, nn
from tqdm import trange

from normflows_injective.flows.mixer import Patchify, bits_per_dim, dequantise

SHAPE, PATCH, BITS, BATCH, JUDGED = (1, 28, 28), 4, 5, 64, 2000
LAYERS, WIDTH = 8, 96
RATE, WARMUP, CLIP = 2e-3, 50, 50.0

BuildModel = Callable[[], nn.Module]


def models() -> dict[str, BuildModel]:
    """All models by name; Glow has the width that comes nearest in parameters."""
    plain = functools.partial(mixer, SHAPE, PATCH, LAYERS, WIDTH)
    # The layers of the interior come on top, so the others are made narrower.
    narrower = functools.partial(mixer, SHAPE, PATCH, LAYERS)
    width = glow_width(SHAPE, count(plain()))
    return {
        "MixerFlow": plain,
        "Glow": functools.partial(glow, SHAPE, width),
        "MixerFlow, roll": functools.partial(plain, shift="roll"),
        "MixerFlow, three times the steps": plain,
        "MixerFlow, interior": functools.partial(
            narrower, _narrowed(narrower, count(plain())), shift="interior"
        ),
    }


def _narrowed(build: Callable[..., nn.Module], parameters: int) -> int:
    sizes = {width: count(build(width, shift="interior")) for width in range(16, WIDTH, 4)}
    return min(sizes, key=lambda width: abs(sizes[width] - parameters))


def permutations(seed: int) -> dict[str, Tensor]:
    """Orders of the pixels: as they are, of patches and alike within them, and of all."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shuffle = functools.partial(torch.randperm, generator=generator)
    patchify = Patchify(SHAPE, PATCH)
    table = patchify.inverse(torch.arange(math.prod(SHAPE)).view(1, *SHAPE))[0]
    patches, places = patchify.latent_shape
    structured = table[:, shuffle(patches)][:, :, shuffle(places)]
    return {
        "original": torch.arange(math.prod(SHAPE)),
        "structured": patchify(structured)[0].flatten(),
        "full": shuffle(math.prod(SHAPE)),
    }


def images(name: str, folder: str | None) -> tuple[Tensor, Tensor]:
    """Training and test images (N, 784) of integers, read without unpickling."""
    path = Path(folder or "") / f"{name}.npz"
    if folder is None or not path.is_file():
        raise SystemExit(
            f"{path} was not found. Give the folder that holds {name}.npz by --data or the "
            "environment variable NFI_DATA."
        )
    with np.load(path, allow_pickle=False) as arrays:
        train, test = (torch.from_numpy(arrays[key]) for key in ("x_train", "x_test"))
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


def main() -> None:
    """Run what has not been run, print the table, write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["mnist", "fashion_mnist"])
    parser.add_argument("--data", default=os.environ.get("NFI_DATA"), help="folder of the file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="three steps of one seed, to try it")
    parser.add_argument("--only", help="a part of the name of models")
    parser.add_argument("--page", type=Path, help="Markdown page to write; the figure goes beside")
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
    write_page(records, arguments.name, arguments.steps, arguments.page)


if __name__ == "__main__":
    main()
