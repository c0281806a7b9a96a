"""The comparison at equal processor time: its clocks, its laws, its scores and its files."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.paths import ROOT
from support.seeds import seeded_generator
from torch import nn

import normflows_injective as nfi

NAMES = ("data", "distances", "job", "matching", "methods", "phases", "plain", "runs", "scores")
TRAINED = ("vae", "free_form", "published", "recipe", "ae_splines", "ae_matching", "plan_f")


@pytest.fixture
def bench(monkeypatch):
    """The modules of the benchmark by their names."""
    for library in ("sklearn", "scipy", "tabulate", "matplotlib"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.syspath_prepend(str(ROOT))
    modules = {
        name: importlib.import_module(f"benchmarks.equal_time.{name}")
        for name in (*NAMES, "report", "two_steps")
    }
    return SimpleNamespace(**modules)


@pytest.fixture
def ticking(bench, monkeypatch):
    """A clock that every look moves on by a hundredth of a second."""
    looks = itertools.count()
    clock = SimpleNamespace(process_time=lambda: 0.01 * next(looks))
    monkeypatch.setattr(bench.phases, "time", clock)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=seeded_generator(seed), dtype=torch.float64)


def test_a_translation_moves_every_projection_by_its_part(bench):
    x, shift = rows(50, 4), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    squared = bench.distances.sliced_wasserstein(x + shift, x, num_directions=20_000) ** 2
    # The mean of (direction . shift)^2 has a relative standard error of 1/sqrt(20,000).
    assert squared == pytest.approx(float(shift.square().sum()) / 4, rel=5e-2)


def test_the_quantile_functions_of_sets_of_different_sizes_are_exact(bench):
    x, y = rows(6, 1), rows(4, 1, seed=1) + 1
    repeated = [v.repeat_interleave(n, 0).sort(0).values for v, n in ((x, 2), (y, 3))]
    expected = (repeated[0] - repeated[1]).square().mean().sqrt()
    assert bench.distances.sliced_wasserstein(x, y) == pytest.approx(float(expected), rel=1e-12)


def test_the_energy_distance_of_numbers_is_that_of_their_distribution_functions(bench):
    from scipy.stats import energy_distance

    x, y = rows(30, 1), 2 * rows(20, 1, seed=1) + 0.5
    biased = energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    own = [float((v - v.T).abs().mean()) for v in (x, y)]
    # Pairs of a row with itself count in the biased one.
    expected = biased - own[0] / 29 - own[1] / 19
    assert bench.distances.energy_distance(x, y) == pytest.approx(expected, rel=1e-12)


def gaussian_law(bench, deviation, **steps):
    """The law whose velocity takes standard normal noise to a normal law of a deviation."""
    law = bench.matching.MatchingLaw(3, hidden=(4,), **steps).double()

    def velocity(z, t):
        variance = (t * deviation) ** 2 + (1 - t) ** 2
        return (t * deviation**2 - (1 - t)) / variance * z

    law.velocity = velocity
    return law


@pytest.mark.slow
def test_the_density_of_matching_is_that_of_its_flow(bench):
    law = gaussian_law(bench, 0.4, density_steps=32)
    z = 0.4 * rows(5, 3)
    normal = torch.distributions.Normal(0.0, 0.4)
    expected = normal.log_prob(z).sum(1)
    assert torch.allclose(law.log_prob(z), expected, atol=1e-5)


def test_samples_of_matching_follow_the_flow(bench):
    noise = rows(5, 3)
    errors = [
        (gaussian_law(bench, 0.4).push(noise, steps) - 0.4 * noise).abs().max()
        for steps in (16, 32)
    ]
    assert errors[0] < 2e-2
    assert errors[1] < errors[0] / 3


def test_the_trace_is_that_of_the_dense_jacobian(bench):
    law, z, t = bench.matching.MatchingLaw(3).double(), rows(4, 3), rows(4, 1, seed=1)
    velocity, trace = law.velocity_and_trace(z, t)
    assert torch.allclose(velocity, law.velocity(z, t))
    for row in range(4):
        jacobian = torch.autograd.functional.jacobian(
            lambda point, time=t[row : row + 1]: law.velocity(point[None], time)[0], z[row]
        )
        assert torch.allclose(trace[row], jacobian.trace())


def test_the_optimal_matching_loss_has_no_gradient(bench):
    """In one dimension with unit deviations the best velocity is (2t - 1) z / (t^2 + (1-t)^2)."""
    law, num = gaussian_law(bench, 1.0), 200_000
    z, noise = rows(num, 3), rows(num, 3, seed=1)
    t = torch.full((num, 1), 0.7, dtype=torch.float64)
    point = 0.7 * z + 0.3 * noise
    residual = law.velocity(point, t) - (z - noise)
    # Uncorrelated with the point; products have unit size, so the error is about 1/sqrt(num).
    assert (residual * point).mean(0).abs().max() < 5 / math.sqrt(num)
    assert law.loss_at(z, noise, t) == pytest.approx(float(residual.square().sum(1).mean()))


def test_one_cycle_is_that_of_torch(bench):
    parameter, total = nn.Parameter(torch.zeros(1)), 1000
    optimizer = torch.optim.Adam([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total)
    for step in range(0, total, 1):
        (group,) = optimizer.param_groups
        setting = bench.phases.one_cycle(step / total)
        # torch ends its cycle a step before the last.
        assert setting.rate == pytest.approx(group["lr"], abs=6e-3)
        assert setting.momentum == pytest.approx(group["betas"][0], abs=1e-3)
        optimizer.step()
        schedule.step() if step < total - 1 else None


def test_the_careful_schedule_rises_and_falls(bench):
    rates = [bench.phases.rise_and_cosine(share).rate for share in (0.0, 0.025, 0.05, 0.525, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0], abs=1e-12)


def phase(bench, parameter, target=0.0, **options):
    return bench.phases.Phase(
        name="phase",
        loss=lambda x: (parameter - target).square().sum() + 0 * x.sum(),
        parameters=[parameter],
        rows=torch.zeros(10, 1),
        seconds=4.0,
        seed=0,
        rate=0.1,
        schedule=bench.phases.rise_and_cosine,
        **options,
    )


def test_a_phase_ends_with_its_time(bench, ticking):
    report = bench.phases.train(phase(bench, nn.Parameter(torch.ones(1))))
    # One look at the clock for every step.
    assert report.steps in (398, 399)
    assert report.seconds == pytest.approx(4.0, abs=0.03)
    assert math.isnan(report.score)


def test_the_best_averaged_weights_are_kept_and_waiting_ends(bench, ticking):
    parameter, target = nn.Parameter(torch.ones(1)), -1.0
    # The training goes from 1 to -1, the held-out score is best on the way.
    choice = bench.phases.Choice(lambda: (parameter - 0.3).square().sum())
    report = bench.phases.train(phase(bench, parameter, target, choice=choice))
    value = float(parameter.detach())
    assert report.score == pytest.approx((value - 0.3) ** 2, rel=1e-6)
    assert report.seconds / 4 - report.chosen_at == pytest.approx(0.25, abs=0.05)
    assert abs(value - 0.3) < 0.5


def test_averages_weigh_late_weights_by_the_eighth_power(bench):
    parameter = nn.Parameter(torch.zeros(2))
    chooser = bench.phases._Chooser([parameter], bench.phases.Choice(lambda: parameter.sum()))
    seen = []
    for step in range(1, 41):
        with torch.no_grad():
            parameter.copy_(torch.tensor([float(step), math.sin(step)]))
        chooser.after_step(step, 0.0)
        if step % 4 == 0:
            seen.append(parameter.detach().clone())
    shares = torch.tensor([(k / 10) ** 8 - ((k - 1) / 10) ** 8 for k in range(1, 11)])
    assert torch.allclose(chooser._average[0], shares @ torch.stack(seen), atol=1e-5)


@pytest.mark.parametrize(("shape", "dim"), [(None, 6), ((1, 28, 28), 784)])
def test_methods_of_one_seed_start_from_the_same_weights(bench, shape, dim):
    networks = bench.job.Networks(dim, 2, shape)
    first, second, other = (networks.pair(seed) for seed in (0, 0, 1))
    wide, x = networks.pair_with_scales(0), rows(3, dim).float()
    z = first.encoder(x)
    assert torch.equal(z, second.encoder(x))
    assert not torch.equal(z, other.encoder(x))
    assert torch.allclose(wide.encoder(x)[:, :2], z, atol=1e-6)
    assert torch.equal(wide.decoder(z), first.decoder(z))
    assert first.decoder(z).shape == x.shape


def test_the_ramp_goes_from_reconstruction_to_the_whole_loss(bench):
    encoder, decoder = nfi.nets.mlp_autoencoder(4, 2, (8,))
    ramp = bench.plain.Ramp(beta=20.0)
    x = rows(5, 4).float()
    log_prob = torch.ones(5)
    terms = ramp(x, encoder, decoder)
    assert torch.equal(ramp.loss(terms, log_prob), 20 * terms.reconstruction_error)
    assert not terms.volume.any()
    ramp.weight = 1.0
    terms = ramp(x, encoder, decoder)
    whole = nfi.SurrogateLikelihood(beta=20.0).loss(terms, log_prob)
    assert torch.equal(ramp.loss(terms, log_prob), whole)
    assert terms.volume.all()


def test_scaled_codes_have_the_log_det_of_their_jacobian(bench):
    codes = rows(50, 3) * torch.tensor([1.0, 2.0, 0.1]) + 4
    scaling = bench.two_steps.Scaling(codes)
    z, log_det = scaling.inverse(codes)
    assert torch.allclose(z.mean(0), z.new_zeros(3), atol=1e-12)
    assert torch.allclose(z.std(0), z.new_ones(3))
    jacobian = torch.autograd.functional.jacobian(
        lambda c: scaling.inverse(c[None])[0][0], codes[0]
    )
    assert torch.allclose(log_det[0], jacobian.logdet())
    back, log_det_back = scaling(z)
    assert torch.allclose(back, codes)
    assert torch.allclose(log_det_back, -log_det)


def test_the_tube_is_a_gaussian_around_the_manifold(bench):
    reconstruction, nll, codim = 0.7, 3.0, 5
    variance = reconstruction / codim
    gaussian = 0.5 * codim * math.log(2 * math.pi * variance) + reconstruction / (2 * variance)
    constant = 0.5 * codim * math.log(2 * math.pi * math.e)
    tube = bench.scores.tube_score(reconstruction, nll, codim)
    assert tube + constant == pytest.approx(gaussian + nll)


def test_anomalies_are_what_they_are_called(bench):
    split = bench.data.synthetic()
    kinds = bench.scores.anomalies(split, 200, seed=0)
    test = split.test[:200]
    assert list(kinds) == ["permuted", "shifted", "others"]
    assert torch.equal(kinds["permuted"].sort(0).values, test.sort(0).values)
    assert (kinds["permuted"] != test).float().mean() > 0.9
    moved = (kinds["shifted"] - test).abs() / split.train.std(0)
    assert torch.equal((moved > 0.1).sum(1), torch.ones(200, dtype=torch.long))
    assert torch.allclose(moved.sum(1), torch.full((200,), 3.0), atol=1e-4)


def test_few_rows_are_training_rows_of_the_seed(bench):
    split = bench.data.synthetic()
    few, again, other = (bench.data.few_rows(split, 100, seed) for seed in (0, 0, 1))
    assert (len(few.train), len(few.validation)) == (80, 20)
    assert torch.equal(few.train, again.train)
    assert not torch.equal(few.train, other.train)
    known = {tuple(row) for row in split.train.tolist()}
    chosen = [tuple(row) for row in torch.cat([few.train, few.validation]).tolist()]
    assert len(set(chosen)) == 100
    assert set(chosen) <= known
    with pytest.raises(SystemExit, match="Asked for 601 rows of the 600 training rows"):
        bench.data.few_rows(split, 601, 0)


def test_whole_hours_of_power_are_held_out(bench, tmp_path):
    x = rows(1200, 8).numpy()
    x[:, 7] = np.arange(1200)
    np.savez(tmp_path / "power_26days.npz", x=x)
    split = bench.data.read_table("power_26days", str(tmp_path))
    times = torch.cat([split.train, split.validation, split.test])[:, -1].double()
    minutes = times.argsort().argsort()
    sizes = [len(part) for part in (split.train, split.validation, split.test)]
    assert sizes == [960, 120, 120]
    for part in minutes.split(sizes):
        assert set((part // 60).unique(return_counts=True)[1].tolist()) == {60}


def test_a_missing_folder_is_named(bench, tmp_path):
    with pytest.raises(SystemExit, match="Give --data DIR, or set NFI_DATA"):
        bench.data.read_table("higgs_small", None)
    with pytest.raises(SystemExit, match=r"There is no file .*higgs_small\.npz"):
        bench.data.read_table("higgs_small", str(tmp_path))


def setup_of(bench):
    split = bench.data.synthetic(200)
    limits = bench.scores.Limits(40, 20, 20, 10, 100)
    return bench.runs.Setup(lambda seed: split, bench.job.Networks(5, 2), limits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["pca", *TRAINED, "plan_n"])
def test_every_method_is_trained_and_scored(bench, method):
    run = bench.runs.Run("synthetic", "all", 0.1, method, 0)
    before = torch.get_rng_state()
    record = bench.runs.perform(run, setup_of(bench))
    assert torch.equal(torch.get_rng_state(), before)
    assert {*bench.report.SCORES, "auroc_permuted_tube", "auroc_others_error"} <= set(record)
    assert all(math.isfinite(record[score]) for score in bench.report.SCORES)
    assert record["train_seconds"] < 0.1 + 0.5
    assert all(phase["steps"] > 0 for phase in record["phases"])
    json.dumps(record)


def test_a_budget_below_the_encoding_is_refused(bench):
    job = bench.job.Job(bench.data.synthetic(200), bench.job.Networks(5, 2), 4.0, 0)
    report = bench.phases.PhaseReport("autoencoder", 10, 2.0, 0.2)
    codes = bench.two_steps.Codes(torch.zeros(3, 2), torch.zeros(3, 2), [], 1.5, report)
    density = bench.two_steps._usual(job, "density", torch.sum, nn.Linear(1, 1), codes)
    assert density.seconds == 0.5
    late = codes._replace(seconds=2.5)
    with pytest.raises(SystemExit, match="took 4.5 s, nothing is left of 4 s"):
        bench.two_steps._usual(job, "density", torch.sum, nn.Linear(1, 1), late)


@pytest.mark.slow
def test_a_density_of_two_steps_is_that_of_its_dense_jacobian(bench):
    job = bench.job.Job(bench.data.synthetic(200), bench.job.Networks(5, 2), 0.05, 0)
    for fit in (bench.two_steps.fit_plan_f, bench.two_steps.fit_plan_n):
        fitted = fit(job)
        model = fitted.model.double().eval()
        x = job.split.test[:3].double()
        with torch.no_grad():
            log_prob = model.log_prob(x)
        z = model.inverse(x).detach()
        for row in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda base, model=model: model(base[None])[0], z[row]
            )
            volume = 0.5 * (jacobian.T @ jacobian).logdet()
            expected = model.q0.log_prob(z[row : row + 1])[0] - volume
            assert torch.allclose(log_prob[row], expected, atol=1e-8)


@pytest.mark.slow
def test_runs_are_kept_and_make_the_tables_of_a_page(bench, tmp_path, monkeypatch, capsys):
    runs = [bench.runs.Run("synthetic", "all", 0.1, name, 0) for name in ("pca", "plan_f")]
    threads = torch.get_num_threads()
    for _ in range(2):
        bench.runs.run_all(runs, {"synthetic": setup_of(bench)}, tmp_path)
    torch.set_num_threads(threads)
    lines = (tmp_path / "synthetic.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["pca", "plan_f"]
    page = tmp_path / "docs" / "results" / "equal_time.md"
    page.parent.mkdir(parents=True)
    arguments = ["report", str(tmp_path), "--page", str(page)]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", arguments)
        bench.report.main()
    text = page.read_text()
    # Three comparisons, the scores, detection of three kinds, and costs.
    assert text.count("| PCA + Gaussian") == 8
    assert "0.1 s, all rows: costs, synthetic" in text
    assert (tmp_path / "docs" / "figures" / "equal_time.png").is_file()


def test_a_folder_without_runs_is_named(bench, tmp_path):
    with pytest.raises(SystemExit, match="There are no runs in"):
        bench.report.read_folder(tmp_path)


def test_a_method_that_the_package_lacks_is_named(bench, monkeypatch):
    monkeypatch.setattr(bench.methods, "available", lambda: ["pca"])
    monkeypatch.setattr(bench.runs, "available", lambda: ["pca"])
    assert bench.runs.chosen_methods(None) == ["pca"]
    with pytest.raises(SystemExit, match="has no plan_f"):
        bench.runs.chosen_methods(["plan_f"])
