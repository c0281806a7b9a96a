"""Spoil the arguments of every public name, and count the answers that help nobody.

    PYTHONPATH=tests python -m fuzz --examples 20000 --seed 0

An example is a valid call of which one or two arguments are replaced. It must end in a named
error, or in a result of the right shape without NaN. Counted are

* raw errors: of torch or Python, which name no argument;
* wrong shapes: results that have not one entry for every row;
* unnamed NaN: results with NaN from finite arguments;
* accepted nonsense: calls that took what must be refused, as True for a count;
* refused numbers: calls that refused a number of numpy, or a tensor of one.

``--example N`` runs one example with its whole traceback. The exit status is 1 if any are counted.
"""

from __future__ import annotations

import argparse
import inspect
import random
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fuzz.making import Call
from fuzz.methods import all_calls
from fuzz.values import Value, in_place_of, pick, tensors_in
from normflows_injective.errors import InjectiveFlowError

KINDS = ("raw error", "wrong shape", "unnamed NaN", "accepted nonsense", "refused number")
UNBOUNDED = (
    "zero",
    "nan",
    "inf",
    "large",
    "scaled",
    "zeros",
    "negative",
    "small",
    "float16",
    "bfloat16",
)


class Finding(NamedTuple):
    """An answer that helps nobody, to which call."""

    kind: str
    call: str
    changed: str
    text: str


def made(call: Call) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of a call and its arguments, which fit those of the same seed."""
    torch.manual_seed(0)
    return call.make()


def spoil(call: Call, rng: random.Random) -> tuple[Any, dict[str, Any], dict[str, Value]]:
    """The function of a call, its arguments with one or two replaced, and those by name."""
    function, arguments = made(call)
    parameters = inspect.signature(function).parameters
    names = rng.sample(sorted(arguments), min(len(arguments), 2 if rng.random() < 0.2 else 1))
    changed = {}
    for name in names:
        parameter = parameters.get(name)
        optional = parameter is not None and "None" in str(parameter.annotation)
        values = in_place_of(arguments[name], optional, call.kinds.get(name))
        changed[name] = pick(rng, values)
        arguments[name] = changed[name].value
    return function, arguments, changed


def run(name: str, call: Call, rng: random.Random, valid: dict[str, list[int]]) -> Finding | None:
    """Run one example, and say what is wrong with the answer."""
    if not call.make()[1]:
        return None
    function, arguments, changed = spoil(call, rng)
    shown = ", ".join(f"{argument}={value.label}" for argument, value in changed.items())
    verdicts = {value.verdict for value in changed.values()}
    try:
        result = function(**arguments)
    except InjectiveFlowError as error:
        if verdicts == {"good"}:
            return Finding("refused number", name, shown, f"{type(error).__name__}: {error}")
        return None
    except Exception as error:
        return Finding("raw error", name, shown, f"{type(error).__name__}: {error}")
    if "bad" in verdicts:
        return Finding("accepted nonsense", name, shown, type(result).__name__)
    return _judge(name, call, shown, arguments, changed, result, valid)


def _judge(
    name: str,
    call: Call,
    shown: str,
    arguments: dict[str, Any],
    changed: dict[str, Value],
    result: Any,
    valid: dict[str, list[int]],
) -> Finding | None:
    """Look at the tensors of a result."""
    tensors = [tensor for tensor in tensors_in(result) if not tensor.is_meta]
    if call.rows is not None:
        batch = arguments[call.rows]
        rows = (
            len(batch) if batch.dim() else -1
        )  # A single number has no rows: any answer is wrong.
        if name not in valid:
            function, fresh = made(call)
            valid[name] = [tensor.dim() for tensor in tensors_in(function(**fresh))]
        shapes = [tuple(tensor.shape) for tensor in tensors_in(result)]
        if [len(shape) for shape in shapes] != valid[name] or any(s[0] != rows for s in shapes):
            return Finding("wrong shape", name, shown, str(shapes))
    unbounded = any(value.label in UNBOUNDED for value in changed.values())
    if call.finite or not unbounded:
        for tensor in tensors:
            if bool(tensor.isnan().any()):
                return Finding("unnamed NaN", name, shown, str(tuple(tensor.shape)))
    return None


def fuzz(num_examples: int, seed: int) -> list[Finding]:
    """What a number of examples finds."""
    calls = all_calls()
    names = sorted(calls)
    valid: dict[str, list[int]] = {}
    findings = []
    for index in range(num_examples):
        rng = random.Random(f"{seed}:{index}")
        name = rng.choice(names)
        finding = run(name, calls[name], rng, valid)
        if finding is not None:
            findings.append(finding._replace(text=f"[{index}] {finding.text}"))
    return findings


def _show(seed: int, index: int) -> None:
    """Run one example and print its traceback."""
    calls = all_calls()
    rng = random.Random(f"{seed}:{index}")
    name = rng.choice(sorted(calls))
    function, arguments, changed = spoil(calls[name], rng)
    print(name, {key: value.label for key, value in changed.items()}, sep="\n")
    try:
        print(function(**arguments))
    except Exception:
        traceback.print_exc()


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--example", type=int, help="show this one alone")
    parser.add_argument("--most", type=int, default=40, help="findings to print")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.example is not None:
        _show(options.seed, options.example)
        return 0
    start = time.perf_counter()
    findings = fuzz(options.examples, options.seed)
    seen = Counter((f.kind, f.call, f.changed) for f in findings)
    texts = {(f.kind, f.call, f.changed): f.text for f in findings}
    for key, count in sorted(seen.items())[: options.most]:
        print(f"{count:4d}  {': '.join(key)}: {texts[key][:160]}".replace("\n", " "))
    counts = Counter(f.kind for f in findings)
    print(f"{options.examples} examples, seed {options.seed}, {time.perf_counter() - start:.0f} s")
    print(", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    return 1 if findings else 0
