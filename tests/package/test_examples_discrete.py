"""The example of assignment flows: its baselines against closed forms, and brief runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.paths import EXAMPLES, run_example
from support.seeds import manual_seed, shifted

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "support"))
    import discrete_baselines

    return discrete_baselines


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "support"))
    import discrete_data

    return discrete_data


def write_bike(folder, num=400):
    """A table in the place of the real one: its columns centred, as they are there."""
    generator = np.random.default_rng(shifted(0))
    classes = [2, 12, 31, 4, 2, 12, 24, 2, 7, 2, 4]
    rows = np.empty((num, 18))
    for place, count in enumerate(classes):
        rows[:, place] = np.arange(num) // (place + 1) % count
    rows[:, len(classes) :] = generator.normal(size=(num, 18 - len(classes)))
    np.savez(folder / "uci_regression.npz", bike=rows - rows.mean(0))


def test_mutual_informations_of_a_copy_and_of_a_coin(baselines):
    manual_seed(0)
    first, coin = torch.randint(5, (20000,)), torch.randint(2, (20000,))
    found = baselines.mutual_informations(torch.stack([first, first, coin], 1), [5, 5, 2])
    assert float(found[0, 1]) == pytest.approx(math.log(5), abs=1e-3)
    assert float(found[0, 0]) == pytest.approx(math.log(5), abs=1e-3)
    assert float(found[0, 2]) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("independent", [False, True])
def test_a_tree_is_a_law_and_samples_it(baselines, independent):
    manual_seed(0)
    counts = [2, 3, 4]
    first = torch.randint(2, (500,))
    rows = torch.stack([first, first + torch.randint(2, (500,)), torch.randint(4, (500,))], 1)
    tree = baselines.Tree(rows, counts, independent)
    cells = torch.cartesian_prod(*(torch.arange(c) for c in counts))
    law = tree.log_prob(cells).exp()
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    samples = tree.sample(20000)
    shares = (samples.unsqueeze(1) == cells).all(2).double().mean(0)
    assert float((shares - law).abs().sum()) < 0.05


def test_a_chain_is_found(baselines):
    manual_seed(0)
    chain = [torch.randint(2, (4000,))]
    for _ in range(3):
        flips = (torch.rand(4000) < 0.2).long()
        chain.append(chain[-1] ^ flips)
    order = [2, 0, 3, 1]
    rows = torch.stack([chain[place] for place in order], 1)
    edges = baselines.Tree(rows, [2] * 4).edges
    undirected = {frozenset((order[child], order[parent])) for child, parent in edges[1:]}
    assert undirected == {frozenset((place, place + 1)) for place in range(3)}


def test_tables_are_binned(data, tmp_path):
    write_bike(tmp_path)
    table = data.read_table("bike", tmp_path, 0)
    assert table.num_classes == [2, 4, 12, 12, 2, 7, 2, 3, 6, 6, 5, 4, 8]
    assert len(table.train) == 320
    assert len(table.test) == 80
    # Quantiles of the training rows hold as many of them each.
    assert table.train[:, -1].bincount().tolist() == [40] * 8


def test_mnist_is_halved(data, tmp_path):
    images = np.zeros((3, 28, 28), np.uint8)
    images[:, :2, :1] = 255
    images[1, 0, 2] = 255
    images[2, :2, 2:4] = 128
    digits = np.arange(3)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=digits, x_test=images, y_test=digits)
    found = data.read_mnist(tmp_path, 14).train[:, :2]
    # Half of the ink is 127.5, a quarter of it less.
    assert found.tolist() == [[1, 0], [1, 0], [1, 1]]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file"), [("mnist", "mnist"), ("table", "uci_regression")])
def test_missing_data_are_named(tmp_path, kind, file):
    done = run_example("discrete.py", kind, "--data", tmp_path)
    assert done.returncode != 0
    assert f"{file}.npz was not found. Give the folder that holds {file}.npz" in done.stderr


@pytest.mark.slow
def test_a_brief_run_on_digits_and_one_that_loads_it(tmp_path):
    options = ("--net", "dense", "--steps", 100, "--judged", 10, "--draws", 2, "--out", tmp_path)
    for load in ((), ("--load",)):
        done = run_example("discrete.py", "digits", *options, *load)
        assert done.returncode == 0, done.stderr
        assert "nan" not in done.stdout
        assert "| assignment flow |" in done.stdout
    assert (tmp_path / "discrete_digits.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_brief_run_on_a_table(tmp_path):
    write_bike(tmp_path)
    options = ("--steps", 20, "--batch", 64, "--judged", 20, "--draws", 2)
    done = run_example("discrete.py", "table", "--data", tmp_path, *options, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout
    assert "| flow, 20% missing |" in done.stdout
    assert (tmp_path / "discrete_bike.png").stat().st_size > 10_000
