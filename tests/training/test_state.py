"""Trainings that stop and go on: the same to the last bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from support.seeds import manual_seed, shifted
from support.trainings import TRAININGS, injective, surface
from torch import nn

import normflows_injective as nfi
from normflows_injective.checkpoints.tree import flatten, unflatten
from normflows_injective.training import fit, load_state, save_state


class Stopped(Exception):
    pass


def trained(name, checkpoint=None, stops=()):
    """A model after training that is stopped at some looks, and begun again as often."""
    for stop in (*stops, None):
        manual_seed(7)
        model, x, context = TRAININGS[name]()
        looks = []

        def look(check, looks=looks, stop=stop):
            looks.append(check)
            if len(looks) == stop:
                raise Stopped

        with contextlib.suppress(Stopped):
            fit(model, x, context=context, steps=60, checkpoint=checkpoint, callback=look)
    return model.state_dict()


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_was_stopped_ends_as_one_that_was_not(name, tmp_path):
    draw = random.Random(shifted(0))
    stops = [draw.randrange(2, 14) for _ in range(4)]
    whole = trained(name)
    pieces = trained(name, tmp_path / "run.safetensors", stops)
    assert whole.keys() == pieces.keys()
    for key, value in whole.items():
        assert torch.equal(value, pieces[key]), key


def test_a_training_that_is_done_is_not_done_again(tmp_path):
    path = tmp_path / "run.safetensors"
    once, again = trained("injective", path), trained("injective", path)
    assert all(torch.equal(value, again[key]) for key, value in once.items())


KILLED = """
import sys, torch
from normflows_injective.training import fit
from support.seeds import manual_seed
from support.trainings import TRAININGS
manual_seed(7)
model, x, _ = TRAININGS["injective"]()
fit(model, x, steps=60, checkpoint=sys.argv[1], callback=lambda _: print("look", flush=True))
model.save(sys.argv[2])
"""


@pytest.mark.slow
def test_a_training_that_was_killed_ends_as_one_that_was_not(tmp_path):
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    checkpoint, end = tmp_path / "run.safetensors", tmp_path / "end.safetensors"
    for looks in (5, 30, None):
        command = [sys.executable, "-W", "ignore", "-c", KILLED, checkpoint, end]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            for _ in range(looks or 0):
                process.stdout.readline()
            if looks is not None:
                process.send_signal(signal.SIGKILL)
            process.communicate()
    model = injective(input_noise=0.1)
    # Its beta is another, as fit sets it.
    with pytest.warns(nfi.errors.CheckpointWarning, match="'beta' of 'likelihood'"):
        model.load(end)
    for key, value in trained("injective").items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trained("normflows", path)
    with pytest.raises(nfi.errors.CheckpointError, match="does not hold a training of this model"):
        fit(injective(), surface(20), steps=5, checkpoint=path)
    injective().save(path)
    with pytest.raises(nfi.errors.CheckpointError, match="holds no training"):
        fit(injective(), surface(20), steps=5, checkpoint=path)


def own_loop(path=None, stop=None):
    """A loop of somebody else, which keeps its state in a file."""
    manual_seed(3)
    model = injective(input_noise=0.1)
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    start = load_state(path, **parts)["step"] if path is not None and path.exists() else 0
    for step in range(start, 12):
        if step == stop:
            return None
        optimizer.zero_grad()
        model.forward_kld(surface(40)).backward()
        optimizer.step()
        scheduler.step()
        if path is not None:
            save_state(path, **parts, step=step + 1)
    return model.state_dict()


def test_a_loop_of_ones_own_goes_on_too(tmp_path):
    path = tmp_path / "own.safetensors"
    own_loop(path, stop=5)
    pieces, whole = own_loop(path), own_loop()
    assert all(torch.equal(value, pieces[key]) for key, value in whole.items())


def test_trees_of_every_plain_kind():
    tree = {
        "numbers": (1, 2.5, float("inf"), -float("inf"), True, None),
        3: [torch.arange(3), {"a": "text", 0: ()}],
        "empty": {},
    }
    structure, tensors = flatten(tree)
    back = unflatten(structure, tensors)
    assert torch.equal(back[3][0], tree[3][0])
    assert back["numbers"] == tree["numbers"]
    assert (back[3][1], back["empty"]) == (tree[3][1], {})


def test_what_a_file_cannot_hold_is_named(tmp_path):
    with pytest.raises(nfi.errors.CheckpointError, match=r"state.parts.rule is function"):
        save_state(tmp_path / "a", rule=lambda: None)
    save_state(tmp_path / "a", step=1)
    with pytest.raises(
        nfi.errors.CheckpointError, match=r"has no part 'model': it has \['step'\]"
    ):
        load_state(tmp_path / "a", model=nn.Linear(1, 1))
    save_state(tmp_path / "a", model=nn.Linear(1, 1))
    with pytest.raises(nfi.errors.CheckpointError, match="does not fit"):
        load_state(tmp_path / "a", model=nn.Linear(2, 1))
