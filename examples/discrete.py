"""Generative assignment flows of discrete data: binary images, and a table of classes.

    python examples/discrete.py [digits]
    python examples/discrete.py mnist --data DIR [--size 14]
    python examples/discrete.py table --data DIR [--name bike]

``digits`` are scikit-learn's, 8x8 pixels of ink or none, so nothing is downloaded. ``mnist`` reads
``mnist.npz``; ``table`` reads ``uci_regression.npz`` (``--name bike``) or ``rna_torus.npz``
(``--name rna``). DIR may also be given as the variable NFI_DATA. Images are sampled with and
without their class given; the table is fitted twice, the second time with a fifth of its entries
missing. It prints held-out likelihoods, which are bounds in the mean, beside independent variables
and a tree, and writes figures and weights, which ``--load`` reads instead of training. One minute
for the digits, ten to fifteen for the others, on one core.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from support.discrete_baselines import Tree, mutual_informations, nearest
from support.discrete_data import TABLES, Images, Table, read_digits, read_mnist, read_table
from support.discrete_figures import draw_images, draw_informations
from support.discrete_training import Budget, Fitted, fit, judge, shown
from torch import Tensor, nn
from torch.nn.functional import one_hot

import normflows_injective as nfi
from normflows_injective.flows.assignment import HorizonChoice, choose_horizon
from normflows_injective.nets.fields import ConvField, DenseField, LeaveOneOutField

NUM_DIGITS = 10
# Shares of images shown without their class, and of entries of the table that are missing.
UNKNOWN, MISSING = 0.2, 0.2
SAMPLES = 1000
NETS = ("conv", "dense", "leave-one-out")
BUDGETS = {
    "digits": Budget("dense", 2000, 128, 2e-3, 360, 8),
    "mnist": Budget("conv", 6000, 64, 2e-3, 200, 4),
    "table": Budget("dense", 8000, 512, 4e-3, 500, 8),
}


# ---- images


def image_flow(net: str, size: int) -> tuple[nfi.AssignmentFlow, HorizonChoice]:
    """A flow of binary images of which the class may be given, and its horizon."""
    pixels = size * size
    networks: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: ConvField(size, size, 2, channels=32, context_dim=NUM_DIGITS),
        "dense": lambda: DenseField(pixels, 2, hidden=(512, 512), context_dim=NUM_DIGITS),
        "leave-one-out": lambda: LeaveOneOutField(pixels, 2, context_dim=NUM_DIGITS),
    }
    choice = choose_horizon(pixels, 2)
    return nfi.AssignmentFlow(networks[net](), pixels, 2, horizon=choice.horizon), choice


def fit_images(images: Images, budget: Budget, path: Path) -> Fitted:
    """Train on images, some of them without their class."""
    flow, choice = image_flow(budget.net, images.size)
    classes = one_hot(images.train_classes, NUM_DIGITS).float()

    def loss_of(index: Tensor) -> Tensor:
        # A context of zeros says that the class is not known.
        known = torch.rand(len(index), 1) >= UNKNOWN
        return flow.flow_matching_loss(images.train[index], classes[index] * known)

    return fit(flow, choice, loss_of, len(images.train), budget, path)


def print_bits(fitted: Fitted, images: Images, budget: Budget) -> None:
    """Bits per dimension of held-out images whose class is not given."""
    judged = images.test[torch.randperm(len(images.test))[: budget.judged]]
    counts = [2] * judged.shape[1]
    nll = {
        "independent pixels": -Tree(images.train, counts, independent=True).log_prob(judged),
        "tree of pixels": -Tree(images.train, counts).log_prob(judged),
    }
    context = torch.zeros(len(judged), NUM_DIGITS)
    nll["assignment flow"], draws = judge(fitted, judged, budget.draws, context)
    print(f"\n| {len(judged)} held-out images | bits per dimension |")
    print("|---|---:|")
    for row, values in nll.items():
        print(f"| {row} | {shown(values / (len(counts) * math.log(2)), 4)} |")
    print(f"\nEffective number of draws: {draws:.1f} of {budget.draws}, in the mean.")


def print_distances(images: Images, kinds: dict[str, Tensor], asked: Tensor) -> None:
    """How far samples and test images are from training images, and from their own kind."""
    print(
        f"\n| {len(asked)} images | to the nearest training image | copies of one "
        "| to the nearest of their own | ink |"
    )
    print("|---|---:|---:|---:|---:|")
    for row, x in kinds.items():
        distances = nearest(x, images.train)[0]
        own = nearest(x, x, leave_out_self=True)[0]
        copies = (distances == 0).float().mean()
        print(
            f"| {row} | {shown(distances, 2)} | {copies:.1%} | {shown(own, 2)} "
            f"| {x.float().mean():.3f} |"
        )
    shares = []
    for x, classes in ((images.test, images.test_classes), (kinds["samples by class"], asked)):
        neighbours = images.train_classes[nearest(x, images.train)[1]]
        shares.append(f"{(neighbours == classes).float().mean():.1%}")
    print(
        f"\nThe nearest training image is of the class of {shares[0]} of the test images, and of "
        f"the class asked for of {shares[1]} of the samples by class."
    )


def run_images(name: str, images: Images, budget: Budget, out: Path) -> None:
    """Train on images, print the tables and write the figure."""
    size, pixels = images.size, images.size**2
    fitted = fit_images(images, budget, out / f"discrete_{name}_{size}_{budget.net}.safetensors")
    print(f"\n{name}, {size}x{size}, {budget.net}: {fitted.note}")
    print_bits(fitted, images, budget)

    real = images.test[torch.randperm(len(images.test))[:SAMPLES]]
    asked = torch.arange(len(real)) % NUM_DIGITS
    context = one_hot(asked, NUM_DIGITS).float()
    flow, steps = fitted.flow, fitted.steps
    kinds = {
        "test images": real,
        "samples": flow.sample(len(real), steps, context=torch.zeros_like(context)),
        "samples by class": flow.sample(len(real), steps, context=context),
        "independent pixels": Tree(images.train, [2] * pixels, True).sample(len(real)),
    }
    print_distances(images, kinds, asked)
    by_class = torch.cat([kinds["samples by class"][asked == k][:10] for k in range(NUM_DIGITS)])
    path = out / f"discrete_{name}.png"
    title = "Samples | samples by class, one class in a row | test images"
    draw_images(kinds["samples"][:100], by_class, real[:100], size, path, title)
    print(f"\nwrote {path}")


# ---- tables


def table_flow(table: Table, net: str, missing: bool) -> tuple[nfi.AssignmentFlow, HorizonChoice]:
    """A flow of the columns of a table, and its horizon."""
    num, largest = len(table.num_classes), max(table.num_classes)
    networks: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: DenseField(num, largest, hidden=(512, 512), missing=missing),
        "leave-one-out": lambda: LeaveOneOutField(
            num, largest, widths=(32, 32), head=32, missing=missing
        ),
    }
    choice = choose_horizon(num, table.num_classes)
    flow = nfi.AssignmentFlow(
        networks[net](), num, table.num_classes, horizon=choice.horizon, missing=missing
    )
    return flow, choice


def fit_table(table: Table, missing: bool, budget: Budget, path: Path) -> Fitted:
    """Train on a table, of which a fifth of the entries may be missing."""
    flow, choice = table_flow(table, budget.net, missing)
    observed = torch.rand(table.train.shape) >= MISSING

    def loss_of(index: Tensor) -> Tensor:
        mask = observed[index] if missing else None
        return flow.flow_matching_loss(table.train[index], mask=mask)

    return fit(flow, choice, loss_of, len(table.train), budget, path)


def run_table(name: str, table: Table, budget: Budget, out: Path) -> None:
    """Train on a table with and without gaps, print the tables and write the figure."""
    print(f"\n{name}: {len(table.train)} training and {len(table.test)} held-out rows of")
    print(", ".join(f"{n} ({c})" for n, c in zip(table.names, table.num_classes, strict=True)))
    judged = table.test[: budget.judged]
    trees = {
        "independent columns": Tree(table.train, table.num_classes, independent=True),
        "tree": Tree(table.train, table.num_classes),
    }
    nll = {row: -tree.log_prob(judged) for row, tree in trees.items()}
    rows = {"held-out rows": table.test}
    rows |= {row: tree.sample(len(table.train)) for row, tree in trees.items()}
    draws = {}
    for kind, missing in (("flow", False), (f"flow, {MISSING:.0%} missing", True)):
        ending = "_missing" if missing else ""
        path = out / f"discrete_{name}_{budget.net}{ending}.safetensors"
        fitted = fit_table(table, missing, budget, path)
        print(f"{kind}: {fitted.note}")
        nll[kind], draws[kind] = judge(fitted, judged, budget.draws)
        rows[kind] = fitted.flow.sample(len(table.train), fitted.steps)

    print(f"\n| {len(judged)} held-out rows | NLL, nats a row | above the tree | draws |")
    print("|---|---:|---:|---:|")
    for row, values in nll.items():
        count = f"{draws[row]:.1f} of {budget.draws}" if row in draws else ""
        print(f"| {row} | {shown(values, 3)} | {shown(values - nll['tree'], 3, '+')} | {count} |")

    data = mutual_informations(table.train, table.num_classes)
    informations = {row: mutual_informations(x, table.num_classes) for row, x in rows.items()}
    above = tuple(torch.triu_indices(len(data), len(data), 1))
    print(
        f"\nMutual informations of {len(data[above])} pairs of columns in training rows: mean "
        f"{data[above].mean():.4f}, largest {data[above].max():.4f} nats."
    )
    print("\n| beside the training rows | mean difference | largest | of the pair |")
    print("|---|---:|---:|---|")
    for row, matrix in informations.items():
        difference = (matrix - data)[above].abs()
        pair = " and ".join(table.names[int(side[difference.argmax()])] for side in above)
        print(f"| {row} | {difference.mean():.4f} | {difference.max():.4f} | {pair} |")
    path = out / f"discrete_{name}.png"
    draw_informations(data, informations["held-out rows"], informations["flow"], table.names, path)
    print(f"\nwrote {path}")


def positive(text: str) -> int:
    """A whole number above zero, for the parser."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above zero, got {text}")
    return int(text)


def main() -> None:
    """Train, print the tables and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=list(BUDGETS), default="digits")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("NFI_DATA"), help="folder of the .npz files"
    )
    parser.add_argument("--name", choices=TABLES, default="bike", help="which table")
    parser.add_argument("--size", type=int, choices=(14, 28), default=14, help="of MNIST")
    parser.add_argument("--net", choices=NETS, help="network; conv is for images")
    parser.add_argument("--steps", type=positive, help="training steps")
    parser.add_argument("--batch", type=positive, help="rows in a batch")
    parser.add_argument("--judged", type=positive, help="held-out rows whose likelihood is taken")
    parser.add_argument("--draws", type=positive, help="importance samples for each of them")
    parser.add_argument("--load", action="store_true", help="read the weights of an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figures")
    options = parser.parse_args()
    asked = {f: getattr(options, f, None) for f in Budget._fields}
    budget = BUDGETS[options.kind]._replace(**{f: x for f, x in asked.items() if x is not None})

    if options.kind == "table" and budget.net == "conv":
        parser.error("columns of a table have no neighbours: --net must be dense or leave-one-out")
    torch.manual_seed(options.seed)
    # So small a network gains nothing from more threads, and on a busy machine they slow it down.
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.kind == "table":
        table = read_table(options.name, options.data, options.seed)
        run_table(options.name, table, budget, options.out)
        return
    if options.kind == "digits":
        images = read_digits(options.seed)
    else:
        images = read_mnist(options.data, options.size)
    run_images(options.kind, images, budget, options.out)


if __name__ == "__main__":
    main()
