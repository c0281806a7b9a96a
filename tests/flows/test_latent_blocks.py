"""Densities of codes in one call."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.models import base
from support.seeds import manual_seed

import normflows_injective as nfi
from normflows_injective.flows import coupling, latent_block

KINDS = ("mixed", "spline", "affine", "autoregressive", "matching")
DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("context_dim", [0, 1])
def test_every_kind_starts_as_a_permutation_and_is_inverted(kind, dim, context_dim):
    block = latent_block(dim, kind, num_layers=2, hidden=(8,), context_dim=context_dim)
    for layer in block:
        layer.double()
    z = torch.randn(4, dim, **DOUBLE)
    context = torch.randn(4, context_dim, **DOUBLE) if context_dim else None
    x = z
    for layer in block:
        takes = getattr(layer, "takes_context", False)
        x, log_det = layer(x, context=context) if takes else layer(x)
        torch.testing.assert_close(log_det, torch.zeros_like(log_det), atol=1e-12, rtol=0)
    torch.testing.assert_close(x.sort(1).values, z.sort(1).values)


def test_kinds_are_what_they_say():
    def transforms(kind):
        layers = latent_block(3, kind, num_layers=4)
        return [type(layer.transform) for layer in layers if hasattr(layer, "transform")]

    assert transforms("mixed") == 2 * [coupling.Spline] + 2 * [coupling.Affine]
    assert transforms("spline") == transforms("autoregressive") == 4 * [coupling.Spline]
    assert transforms("affine") == 4 * [coupling.Affine]
    assert [type(layer) for layer in latent_block(3, "matching")] == [nfi.flows.FlowMatching]
    with pytest.raises(nfi.errors.OptionError, match="kind must be one of"):
        latent_block(3, "bent")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind):
    """The codes are those of a law that is far from normal."""
    manual_seed(0)
    x = torch.randn(512, 2).exp() - 1
    model = nfi.InjectiveNormalizingFlow(
        base(2), [*latent_block(2, kind, num_layers=4), nfi.flows.LinearInjection(2, 3)]
    )
    data = model(x).detach()
    result = nfi.training.fit(model, data, steps=200)
    latent = result.phases[1]
    assert latent.name == "latent density"
    assert latent.after < latent.before


def test_a_block_serves_a_model_of_normflows():
    model = nf.NormalizingFlow(base(3), latent_block(3, num_layers=2))
    model.forward_kld(torch.randn(8, 3)).backward()
    assert any(p.grad is not None for p in model.parameters())
