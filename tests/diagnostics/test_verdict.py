"""Verdicts on models: the rules by hand-made numbers, and trained models whose truth is known."""

from __future__ import annotations

import pytest
import torch
from support.data_manifolds import data_on
from support.models import base
from torch import nn

import normflows_injective as nfi
from normflows_injective.diagnostics import injectivity_report
from normflows_injective.diagnostics.components import linear_reconstruction
from normflows_injective.diagnostics.verdict import Evidence, judge

GOOD = Evidence(
    num_rows=500,
    latent_dim=4,
    data_dim=8,
    error=0.04,
    variances=(4.0, 2.0, 1.0, 1.0, 0.01, 0.01, 0.01, 0.01),
    lost=0,
    overshoot=1.1,
    left_inverse_error=0.1,
    condition=3.0,
    smallest=0.8,
    cosine=0.99,
)


def names(**changes):
    return [finding.name for finding in judge(GOOD._replace(**changes))]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["fine"]),
        ({"overshoot": 2.0, "error": 1.0}, ["beta too small"]),
        ({"overshoot": 2.0, "error": 0.04}, ["too many dimensions"]),
        ({"error": 0.3}, ["undertrained"]),
        ({"latent_dim": 3, "error": 0.9}, ["too few dimensions"]),
        # Four components leave a thirtieth of what three do.
        ({"latent_dim": 3, "error": 0.5}, ["too few dimensions"]),
        ({"latent_dim": 5, "lost": 1}, ["too many dimensions"]),
        ({"latent_dim": 4, "lost": 1, "error": 1.0}, ["undertrained"]),
        ({"latent_dim": 6, "lost": 2, "error": 0.04}, ["too many dimensions"]),
        ({"latent_dim": 5, "variances": GOOD.variances[:4]}, ["too many dimensions"]),
        (
            {"latent_dim": 7, "variances": (4.0, 2.0, 1.0, 1.0, 0.0), "lost": 5, "error": 0.2},
            ["undertrained", "too many dimensions"],
        ),
        # With few rows components say nothing.
        ({"error": 0.3, "num_rows": 9}, ["fine"]),
        ({"latent_dim": 5, "variances": GOOD.variances[:4], "num_rows": 9}, ["fine"]),
        ({"variances": (0.0,), "error": 0.0}, ["fine"]),
    ],
)
def test_the_rules(changes, expected):
    assert names(**changes) == expected


def test_noise_is_nothing_to_reconstruct():
    """A model that keeps its signal is not undertrained because components keep noise, too."""
    noisy = (4.0, 2.0, 1.0, 1.0, *[0.1] * 6)
    changes = {"variances": noisy, "data_dim": 10, "latent_dim": 9, "lost": 5, "error": 0.6}
    assert names(**changes) == ["too many dimensions"]
    assert names(**changes | {"error": 1.0}) == ["undertrained"]


def test_components_against_a_singular_value_decomposition():
    x = torch.randn(30, 2, 3, dtype=torch.float64) * torch.arange(1.0, 7).view(2, 3)
    linear = linear_reconstruction(x, 2)
    rows = x.flatten(1) - x.flatten(1).mean(0)
    left, scales, right = torch.linalg.svd(rows, full_matrices=False)
    best = left[:, :2] * scales[:2] @ right[:2]
    torch.testing.assert_close(linear.errors, (rows - best).square().sum(1))
    torch.testing.assert_close(linear.errors.mean(), linear.variances[2:].sum())


def test_no_linear_pair_has_a_lower_error_than_components():
    x = torch.randn(40, 5, dtype=torch.float64)
    encoder, decoder = nn.Linear(5, 2), nn.Linear(2, 5)
    ours = nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.FreeFormInjection(encoder, decoder)])
    report = injectivity_report(ours.double(), x)
    assert report.pca_error.mean() < report.reconstruction_error.mean()
    torch.testing.assert_close(report.pca_error, linear_reconstruction(x, 2).errors)
    _, _, right = torch.linalg.svd(x - x.mean(0))
    with torch.no_grad():
        encoder.weight.copy_(right[:2])
        encoder.bias.copy_(-right[:2] @ x.mean(0))
        decoder.weight.copy_(right[:2].T)
        decoder.bias.copy_(x.mean(0))
    report = injectivity_report(ours, x)
    torch.testing.assert_close(report.pca_error, report.reconstruction_error)
    torch.testing.assert_close(report.round_trip, torch.ones(40, 2, dtype=torch.float64))
    assert report.num_columns == 5


def test_the_report_prints_its_verdict():
    ours = nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.LinearInjection(2, 5)])
    report = injectivity_report(ours, torch.randn(50, 5))
    text = str(report)
    assert "of 2 principal components" in text
    assert f"VERDICT: {report.verdict[0].name}." in text
    assert max(map(len, text.splitlines())) < 80


def trained(x, latent_dim, beta=10.0, steps=500):
    pair = nfi.nets.mlp_autoencoder(x.shape[1], latent_dim, (64, 64))
    ours = nfi.InjectiveNormalizingFlow(
        base(latent_dim),
        [nfi.flows.FreeFormInjection(*pair)],
        nfi.SurrogateLikelihood(beta=beta),
    )
    optimizer = torch.optim.Adam(ours.parameters(), 2e-3)
    for _ in range(steps):
        loss = ours.forward_kld(x[torch.randint(len(x), (128,))])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(ours.parameters(), 5.0)
        optimizer.step()
    return ours.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::normflows_injective.errors.CollapseWarning")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"latent_dim": 5}, "fine"),
        ({"latent_dim": 10}, "too many dimensions"),
        ({"latent_dim": 3}, "too few dimensions"),
        ({"latent_dim": 5, "steps": 10}, "undertrained"),
    ],
)
def test_models_of_a_flat_manifold(options, expected):
    x = data_on("flat 5 in 20", 2500, 0.02).float()
    x = (x - x.mean(0)) / x.std(0)
    report = injectivity_report(trained(x[:2000], **options), x[2000:], num_gradient_samples=2)
    assert [finding.name for finding in report.verdict] == [expected], report


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::normflows_injective.errors.CollapseWarning")
def test_a_model_whose_likelihood_outweighs_the_manifold():
    x = data_on("curved graph over 4", 2500, 0.02).float()
    x = (x - x.mean(0)) / x.std(0)
    report = injectivity_report(trained(x[:2000], 4, beta=0.1), x[2000:], num_gradient_samples=2)
    assert [finding.name for finding in report.verdict] == ["beta too small"], report
