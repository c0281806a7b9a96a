"""A training step waits for the device at most twice, however many layers there are."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.models import base, mlp_injection
from torch.utils._python_dispatch import TorchDispatchMode

import normflows_injective as nfi
from normflows_injective.flows.coupling import ActNorm
from normflows_injective.flows.kernel import KernelCoupling

# Operators after which Python, or the host's memory, needs a value.
WAITING = {
    "aten._local_scalar_dense.default",
    "aten.item.default",
    "aten.is_nonzero.default",
    "aten.nonzero.default",
    "aten.equal.default",
    "aten.masked_select.default",
    "aten.unique_dim.default",
    "aten._unique2.default",
}


class CountWaiting(TorchDispatchMode):
    """Counts the operators that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        by_mask = name.startswith("aten.index.Tensor") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def waits(model, x, context=None):
    """Number of waits of one training step, after the first two."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step():
        loss = model.forward_kld(x) if context is None else model.forward_kld(x, context)
        optimizer.zero_grad()
        loss.backward()
        return loss

    for _ in range(2):
        step()
        optimizer.step()
    with CountWaiting() as counted:
        step()
    return counted.names


LAYERS = {
    "ActNorm": lambda: ActNorm(5),
    "nf.flows.ActNorm": lambda: nf.flows.ActNorm((5,)),
    "KernelCoupling": lambda: KernelCoupling(5, 8),
    "LULinear": lambda: nfi.flows.coupling.LULinear(5),
}


def test_a_plain_step_waits_twice():
    x = torch.randn(8, 5)
    for likelihood in (None, nfi.SurrogateLikelihood(num_probes=2)):
        model = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection()], likelihood)
        assert len(waits(model, x)) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_number_of_layers_does_not_matter(layer):
    x = torch.randn(8, 5)
    counts = [
        len(waits(nfi.InjectiveNormalizingFlow(base(2), flows), x))
        for flows in (
            [mlp_injection(), *(layer() for _ in range(2))],
            [mlp_injection(), *(layer() for _ in range(16))],
        )
    ]
    assert counts[0] == counts[1] <= 2
