"""Assignment flows on binarised MNIST of 14x14 pixels, beside MADE and independent pixels.

    python -m benchmarks.assignment.images --data DIR [--steps 6000] [--quick] [--only NAME]
        [--no-runs] [--page docs/results/assignment_images.md]

DIR holds ``mnist.npz``; the environment variable NFI_DATA may name it. Images are averaged over
2x2 pixels and set to one above the middle. Every run is a line of a file under out/ and is not
repeated: a stopped benchmark goes on. The weights go there too.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from normflows.nets.made import MADE
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits
from tqdm import trange

import normflows_injective as nfi
from benchmarks.shared.data import add_data_option, read_arrays
from benchmarks.shared.figures import beside, new_figure, save
from benchmarks.shared.records import Record, read, run_once
from benchmarks.shared.tables import report, table
from normflows_injective.flows.assignment import choose_horizon
from normflows_injective.nets.fields import ConvField, DenseField, LeaveOneOutField

SIDE, NUM, COLUMNS = 14, 196, 20
BATCH, CLIP, EVERY = 128, 50.0, 500
# Every model is trained at each of these, and shown at the better one by validation images.
RATES = (1e-3, 3e-3)
JUDGED, DRAWS, PROBES, SAMPLES = 300, 16, 2, 60
NATS_TO_BITS = 1 / (NUM * math.log(2))


def images(folder: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test images (N, 196) of zeros and ones."""
    arrays = read_arrays(folder, "mnist.npz", "x_train", "x_test")
    train, test = (_binarised(torch.from_numpy(pixels)) for pixels in arrays)
    return train[:-5000], train[-5000:], test[:JUDGED]


def _binarised(pixels: Tensor) -> Tensor:
    return (avg_pool2d(pixels.float().unsqueeze(1), 2) > 127).long().flatten(1)


def flow(net: nn.Module) -> nfi.AssignmentFlow:
    """An assignment flow with default options, that stops as early as 196 pixels allow."""
    return nfi.AssignmentFlow(net, NUM, 2, horizon=choose_horizon(NUM, 2).horizon)


class Autoregressive(nn.Module):
    """MADE of normflows with Bernoulli pixels, in the order of reading."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = MADE(NUM, width, num_blocks=1, output_multiplier=1, use_residual_blocks=True)

    def log_prob(self, labels: Tensor) -> Tensor:
        """Log-probabilities (B,) in nats."""
        pixels = labels.float()
        logits = self.net(2 * pixels - 1)
        return -binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(1)

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Images (num_samples, 196), pixel by pixel."""
        pixels = torch.zeros(num_samples, NUM)
        for i in range(NUM):
            pixels[:, i] = torch.bernoulli(self.net(2 * pixels - 1)[:, i].sigmoid())
        return pixels.long()


def count(model: nn.Module) -> int:
    """Number of parameters, without the masked ones."""
    masked = sum(
        int((~mask.bool()).sum()) * (module.linear.weight.numel() // mask.numel())
        if hasattr(module, "linear")
        else int((mask == 0).sum())
        for module in model.modules()
        if isinstance(mask := getattr(module, "mask", None), Tensor)
    )
    return sum(p.numel() for p in model.parameters()) - masked


MODELS: dict[str, Callable[[], nn.Module]] = {
    "assignment flow, DenseField": lambda: flow(DenseField(NUM, 2, (512, 512, 512))),
    "MADE": lambda: Autoregressive(870),
    "assignment flow, ConvField": lambda: flow(ConvField(SIDE, SIDE, 2, channels=24)),
    "assignment flow, LeaveOneOutField": lambda: flow(LeaveOneOutField(NUM, 2, (3, 3), 3)),
}


def loss_of(model: nn.Module, labels: Tensor) -> Tensor:
    """The training loss of a model on images (B, 196)."""
    if isinstance(model, nfi.AssignmentFlow):
        return model.flow_matching_loss(labels)
    return -model.log_prob(labels).mean()


def fit(
    build: Callable[[], nn.Module], rate: float, data: tuple[Tensor, ...], steps: int, seed: int
) -> Record:
    """Train a model, keep the weights that are best on validation images, and score them."""
    train, validation, test = data
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    best, best_step, state, seconds = math.inf, 0, {}, 0.0
    for step in trange(steps):
        start = time.process_time()
        loss = loss_of(model, train[torch.randint(len(train), (BATCH,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - start
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            held_out = _validation_loss(model, validation)
            if held_out < best:
                best, best_step = held_out, step + 1
                state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    return {
        "parameters": count(model),
        "best_step": best_step,
        "validation_loss": best,
        "rate": rate,
        "seconds_per_step": seconds / steps,
        **score(model, test),
    }


def _validation_loss(model: nn.Module, validation: Tensor) -> float:
    """The training loss on validation images, always with the same noise and times."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return float(torch.stack([loss_of(model, x) for x in validation.split(1000)]).mean())


def score(model: nn.Module, test: Tensor) -> Record:
    """Bits per dimension of test images, and samples."""
    torch.manual_seed(0)
    if not isinstance(model, nfi.AssignmentFlow):
        with torch.no_grad():
            bits = -model.log_prob(test).double() * NATS_TO_BITS
        return {**_summary(bits), "samples": model.sample(SAMPLES).tolist()}
    steps = choose_horizon(NUM, 2).steps
    start = time.process_time()
    estimate = model.log_prob(
        test, DRAWS, "hutchinson", steps=steps, num_probes=PROBES, progress=True
    )
    seconds = (time.process_time() - start) / (len(test) * DRAWS)
    bits = -estimate.log_prob.double() * NATS_TO_BITS
    return {
        **_summary(bits),
        "effective_sample_size": float(estimate.effective_sample_size.mean()),
        "error_by_draws": float(estimate.standard_error.mean()) * NATS_TO_BITS,
        "seconds_per_draw": seconds,
        "samples": model.sample(SAMPLES, steps=2 * steps).tolist(),
    }


def _summary(bits: Tensor) -> Record:
    return {"bits": float(bits.mean()), "error": float(bits.std()) / math.sqrt(len(bits))}


def independent(train: Tensor, test: Tensor) -> Record:
    """Bits per dimension of pixels that are independent."""
    p = ((train.sum(0) + 1) / (len(train) + 2)).double()
    log_prob = torch.where(test == 1, p.log(), (1 - p).log()).sum(1)
    samples = torch.bernoulli(p.expand(SAMPLES, -1), generator=torch.Generator().manual_seed(0))
    return {
        "parameters": NUM,
        **_summary(-log_prob * NATS_TO_BITS),
        "samples": samples.long().tolist(),
    }


def scores(records: Sequence[Record]) -> str:
    """The table of all models."""
    rows = []
    for record in records:
        trained = "best_step" in record
        share = record.get("effective_sample_size")
        rows.append(
            (
                record["model"],
                f"{record['parameters']:,}",
                f"{record['bits']:.4f} ± {record['error']:.4f}",
                "exact" if share is None else f"{share:.2f}",
                f"{record['rate']:g}" if trained else "",
                f"{record['best_step']:,}" if trained else "",
                f"{record['seconds_per_step']:.3f}" if trained else "",
            )
        )
    head = ("model", "parameters", "bits per dimension", "effective sample size", "rate")
    return table((*head, "best step", "seconds per step"), rows)


def facts(records: Sequence[Record]) -> str:
    """The two sentences of the page that hold numbers of the flows."""
    flows = {r["model"].split(", ")[1]: r for r in records if "seconds_per_draw" in r}
    errors = ", ".join(f"{name} {r['error_by_draws']:.4f}" for name, r in flows.items())
    seconds = ", ".join(f"{name} {r['seconds_per_draw']:.3f}" for name, r in flows.items())
    return (
        f"Error of one image by the draws, in bits per dimension: {errors}.\n"
        f"Seconds for one draw of a likelihood: {seconds}."
    )


def draw(records: Sequence[Record], test: Tensor, path: Path) -> None:
    """Draw test images and samples of every model."""
    shown = {"test images": test[: 2 * COLUMNS]}
    shown |= {r["model"]: torch.tensor(r["samples"])[: 2 * COLUMNS] for r in records}
    figure = new_figure(10, 1.35 * len(shown))
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axis, (name, pixels) in zip(axes, shown.items(), strict=True):
        padded = torch.nn.functional.pad(pixels.view(-1, SIDE, SIDE).float(), (1, 1, 1, 1))
        grid = padded.view(2, COLUMNS, SIDE + 2, SIDE + 2).permute(0, 2, 1, 3)
        axis.imshow(grid.reshape(2 * (SIDE + 2), -1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_axis_off()
    save(figure, path)


def main() -> None:
    """Do the missing runs, print the table, and write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_data_option(parser)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three steps, to try it")
    parser.add_argument("--no-runs", action="store_true", help="only what has been run")
    parser.add_argument("--only", default="", help="a part of the name of models")
    parser.add_argument("--page", type=Path, help="page whose table to write, and its figure")
    arguments = parser.parse_args()
    data = images(arguments.data)
    if arguments.quick:
        arguments.steps, data = 3, (*data[:2], data[2][:40])
    torch.set_num_threads(1)
    file = Path("out") / f"assignment_images_{arguments.steps}.jsonl"
    known = read(file)

    def run(name: str, key: str, job: Callable[[], Record]) -> list[Record]:
        if arguments.only not in name or (arguments.no_runs and key not in known):
            return []
        return [{**run_once(file, key, job), "model": name}]

    name = "independent pixels"
    records = run(name, name, functools.partial(independent, data[0], data[2]))
    for name, build in MODELS.items():
        trained = []
        for rate in RATES:
            job = functools.partial(fit, build, rate, data, arguments.steps, arguments.seed)
            trained += run(name, f"{name}, {rate:g}", job)
        records += sorted(trained, key=lambda record: record["validation_loss"])[:1]
    report({"Bits per dimension": scores(records)}, arguments.page)
    print(facts(records))
    if arguments.page is not None:
        draw(records, data[2], beside(arguments.page))


if __name__ == "__main__":
    main()
