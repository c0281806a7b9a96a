"""The example on the sphere: its baseline against closed forms, and a quick run as a whole."""

import math

import numpy as np
import pytest
import torch
from support.paths import EXAMPLES, run_example
from support.seeds import manual_seed, shifted


@pytest.fixture
def mixtures(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "support"))
    import sphere_mixture

    return sphere_mixture


def test_concentrations_solve_their_equation(mixtures):
    kappas = torch.tensor([1e-3, 0.3, 2.0, 50.0, 1e4, 1e6], dtype=torch.float64)
    lengths = torch.where(kappas < 1e-2, kappas / 3, 1 / kappas.tanh() - 1 / kappas)
    torch.testing.assert_close(mixtures.concentrations(lengths), kappas, rtol=1e-6, atol=0)


def test_a_mixture_is_a_density(mixtures):
    # Gauss-Legendre in the height, which is uniform under area, and the trapezoid in azimuth.
    heights, weights = np.polynomial.legendre.leggauss(200)
    azimuths = np.arange(200) * 2 * math.pi / 200
    height, azimuth = np.meshgrid(heights, azimuths, indexing="ij")
    radius = np.sqrt(1 - height**2)
    points = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), height], axis=2)
    areas = np.broadcast_to(weights[:, None] * 2 * math.pi / 200, height.shape)
    mixture = mixtures.Mixture(
        torch.tensor([0.3, 0.7], dtype=torch.float64).log(),
        torch.tensor([[0.6, 0.0, 0.8], [0.0, -1.0, 0.0]], dtype=torch.float64),
        torch.tensor([0.5, 40.0], dtype=torch.float64),
    ).with_uniform(0.1)
    densities = mixture.log_prob(torch.from_numpy(points.reshape(-1, 3))).exp()
    assert float(densities @ torch.from_numpy(areas.reshape(-1))) == pytest.approx(1, abs=1e-9)


def test_repeated_points_do_not_break_the_fit(mixtures):
    manual_seed(0)
    points = torch.eye(3, dtype=torch.float64)[torch.arange(60) % 3]
    fit = mixtures.fit_mixture(points, points, (1, 3, 5), (1e2, 1e4), restarts=3)
    assert fit.bound == 1e4
    # Three spikes of equal weight, each of density kappa / 2 pi at its top.
    top = math.log(1e4 / (2 * math.pi)) - math.log(3)
    assert fit.validation_nll == pytest.approx(-top, abs=1e-3)


@pytest.mark.slow
def test_missing_data_are_named(tmp_path):
    done = run_example("earth.py", "--quick", "--data", tmp_path)
    assert done.returncode != 0
    assert f"earth.npz was not found in {tmp_path}. Give the folder" in done.stderr


@pytest.mark.slow
def test_the_quick_run(tmp_path):
    generator = np.random.default_rng(shifted(0))
    places = generator.normal((10, 20), (10, 30), (300, 2)).astype(np.float32)
    np.savez(tmp_path / "earth.npz", volcano=places)
    done = run_example("earth.py", "--quick", "--data", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    uniform, mixture, _, flow = (float(cell) for cell in done.stdout.split("|")[-6:-2])
    assert uniform == pytest.approx(math.log(4 * math.pi), abs=1e-3)
    assert max(mixture, flow) < uniform
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "earth.md",
        "earth.csv",
        "earth.png",
        "earth_volcano.safetensors",
    }
