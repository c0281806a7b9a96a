"""One training that needs no tuning, of any model with a training loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..checks import check_count, check_not_negative, check_positive, checks_arguments
from ..errors import OptionError
from ..models.assignment import AssignmentFlow
from .clock import Clock
from .held_out import digest, split, warn_of_rounding
from .phases import Phase, phases_of
from .processes import Processes
from .result import Check, TrainingResult
from .rows import example_of, read_rows
from .run import Options, Run
from .state import read_tree, write_tree


@checks_arguments
def fit(
    model: nn.Module,
    data: Any,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    context: Any = None,
    weights: Any = None,
    validation: Any = None,
    batch_size: int = 256,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    autocast: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[Check], object] | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> TrainingResult:
    r"""Train a model within a budget.

    A free-form injective flow is trained as an autoencoder for half of the time, to the floor
    :math:`r` of the held-out reconstruction error. The layers before the injection learn the
    density of its codes for 35 %. The rest goes into ``forward_kld`` of the whole model, at
    :math:`\beta = 3 (D - d) / 2r`; the result of this phase is kept if it lowers the held-out
    score :math:`\tfrac{D - d}{2} \log r - \log q` and worsens the reconstruction by 3 % at most.
    Every other model is trained by its own loss, in one phase.

    In every phase the learning rate rises and falls once, weights are averaged, the average is
    judged 25 times (8 in the last phase) on rows that are held out, and the best one is taken.
    After 15 % of its budget without a better score, and after a loss that is not finite, a phase
    goes on from its best weights at half the rate; at the fourth time it ends early, and leaves
    the rest to the next.

    In several processes, which torch's default group joins, give all of them the same data: each
    trains on a part of the rows and is judged by a part of those held out; gradients and scores
    are their means, and the weights are those of rank 0 at the start.

    Args:
        model: A model of this package, or one of normflows with ``forward_kld``. It is trained in
            place, on its device. Modes of its modules are as before when training ends.
        data: Data (N, *): a tensor, an array, a data frame, or a loader, which is read once.
        steps: Number of steps in all. They are shared out by what they cost.
        seconds: Processor seconds of this process, in place of ``steps``. On a busy machine they
            take longer by the clock, with many threads they are over sooner.
        context: One row (N, *) for each of the data.
        weights: Weights (N,) of the data in the loss.
        validation: Part of the rows that is held out, or data (M, *) to judge by, or a pair of
            such data and their context. By default a tenth, but at least 50 rows if these are a
            quarter of all at most.
        batch_size: Number of rows in a step, of every process.
        learning_rate: Peak learning rate of all phases, in place of their own.
        weight_decay: Decoupled weight decay of AdamW.
        wrap: Function of the module that computes a phase's loss to one that computes the same,
            such as ``torch.compile`` or ``accelerator.prepare``. It is called once a phase.
        autocast: Half precision in which networks run, such as ``torch.bfloat16``.
        checkpoint: File in which the state of training is kept, replaced at every look. If it
            exists, training goes on from it, or is not done again if it was done; with a budget in
            steps the result is the one of a training that never stopped, to the last bit. Rank
            0 of several processes writes it, and the others go on with new batches.
        callback: Function that is called with every :class:`Check`.
        progress: Whether a progress bar is shown; by default only in a terminal.
        seed: Of the order of rows, and of the choice of those that are held out. Probes and
            noise come from torch's global random numbers.

    Returns:
        :class:`TrainingResult`.

    Warns:
        NumericalWarning: If the model's dtype keeps less than two digits of a column.

    Raises:
        OptionError: If there is no budget or two, or an option is out of range.
        ShapeError: If there are too few rows, or context and weights are not one for each.
        NonFiniteError: If data are not finite, or training diverges again and again.
        CheckpointError: If the checkpoint is of another model, of other data or options, or
            cannot be read or written.

    References:
        Derived in ``training/phases.py``.

    Examples:
        >>> import normflows as nf
        >>> import normflows_injective as nfi
        >>> pair = nfi.nets.mlp_autoencoder(data_dim=5, latent_dim=2, hidden=(16,))
        >>> q0 = nf.distributions.DiagGaussian(2, trainable=False)
        >>> model = nfi.InjectiveNormalizingFlow(q0, [nfi.flows.FreeFormInjection(*pair)])
        >>> result = fit(model, torch.randn(200, 5), steps=20)
        >>> [phase.name for phase in result.phases]
        ['reconstruction', 'joint']
    """
    if (steps is None) == (seconds is None):
        raise OptionError("Give one budget, either steps= or seconds=.")
    check_not_negative(weight_decay, "weight_decay")
    if learning_rate is not None:
        check_positive(learning_rate, "learning_rate")
    like = example_of(model)
    labels, processes = isinstance(model, AssignmentFlow), Processes(like.device)
    parts = split(read_rows(data, context, weights), validation, seed)
    warn_of_rounding(parts[0].x, like)
    phases = phases_of(model, *(processes.share(rows).to(like, labels) for rows in parts))
    clock = _clock(phases, steps, seconds)
    state = None if checkpoint is None or not os.path.exists(checkpoint) else read_tree(checkpoint)
    is_first = processes.rank == 0
    bar = tqdm(
        total=sum(phase.num_checks for phase in phases),
        disable=not is_first or (None if progress is None else not progress),
        bar_format="{l_bar}{bar}| {elapsed}{postfix}",
    )

    def look(check: Check) -> None:
        bar.set_description(check.phase)
        bar.set_postfix_str(f"score {check.score:.4g}")
        bar.update()
        if callback is not None:
            callback(check)

    def save(tree: dict[str, Any]) -> None:
        if checkpoint is not None and is_first:
            write_tree(checkpoint, tree)

    options = Options(
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
        identity={
            "the data": digest(parts),
            "steps": steps,
            "seconds": seconds,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "seed": seed,
        },
        wrap=wrap or (lambda module: module),
        autocast=lambda: (
            nullcontext() if autocast is None else torch.autocast(like.device.type, autocast)
        ),
        callback=look,
        save=save,
    )
    modes = [(module, module.training) for module in model.modules()]
    try:
        # A caller may evaluate without gradients around the call.
        with bar, torch.inference_mode(False), torch.enable_grad():
            return Run(model, phases, clock, processes, options).complete(state)
    finally:
        for module, mode in modes:
            module.training = mode


def _clock(phases: list[Phase], steps: int | None, seconds: float | None) -> Clock:
    if steps is None:
        return Clock(check_positive(seconds, "seconds"), is_time=True)
    check_count(steps, "steps")
    # Shares of work w lead to w / cost steps, of which there are as many as asked for.
    num_units = sum(phase.share / phase.cost for phase in phases)
    return Clock(steps * sum(phase.share for phase in phases) / num_units, is_time=False)
