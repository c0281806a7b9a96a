"""Oracles 1 and 17: layers and modes of differentiation, and samples against their batch."""

import pytest
import torch
from support.dense import dense_jacobian
from support.dense_surrogate import EXACT, dense_surrogate
from support.geometry import gram_log_volume, seeded, tanh_pair
from support.gradients import assert_gradients_close, gradients
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective.autodiff.products import jvp, vjp
from normflows_injective.errors import UnsupportedLayerError
from normflows_injective.volume import ConjugateGradient, jacobian, log_volume
from normflows_injective.volume.estimators import ESTIMATORS

NETWORKS = {
    "perceptron": lambda: nn.Sequential(nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 5)),
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh()),
    "group norm": lambda: nn.Sequential(nn.Linear(3, 10), nn.GroupNorm(2, 10), nn.GELU()),
    "gated": lambda: nn.Sequential(nn.Linear(3, 10), nn.GLU(1)),
    "softmax": lambda: nn.Sequential(nn.Linear(3, 6), nn.Softmax(1), nn.Linear(6, 5)),
    "convolution": lambda: nn.Sequential(
        nn.Linear(3, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 3), nn.Softplus(), nn.Flatten()
    ),
}


def finite_differences(function, z: Tensor, step: float = 1e-5) -> Tensor:
    """Jacobians (B, D, d) by central differences, with an error of about 1e-9."""
    with torch.no_grad():
        columns = [
            (function(z + step * e) - function(z - step * e)) / (2 * step)
            for e in torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        ]
    return torch.stack([c.flatten(1) for c in columns], dim=2)


@pytest.mark.parametrize("name", NETWORKS)
@seeded(172)
def test_oracle_17_jacobians_of_all_modes_agree(name, device):
    """Forward mode, reverse mode, per-sample dense and central differences give one matrix."""
    network = NETWORKS[name]().double().to(device)
    z = torch.randn(4, 3, dtype=torch.float64).to(device)
    dense = dense_jacobian(network, z).detach()
    with torch.no_grad():
        forward = jacobian(network, z)
    assert not forward.jacobian.requires_grad
    on_graph = jacobian(network, z)
    assert on_graph.jacobian.requires_grad
    for found in (forward, on_graph):
        torch.testing.assert_close(found.value, network(z))
        torch.testing.assert_close(found.jacobian, dense, rtol=1e-10, atol=1e-11)
    differences = finite_differences(network, z)
    torch.testing.assert_close(differences, dense, rtol=1e-7, atol=1e-8)

    tangents = torch.randn(2, 4, 3, dtype=torch.float64).to(device)
    _, pushed = jvp(network, z, tangents)
    torch.testing.assert_close(pushed.flatten(2), torch.einsum("bij,kbj->kbi", dense, tangents))
    leaf = z.clone().requires_grad_()
    out = network(leaf)
    cotangents = torch.randn(2, *out.shape, dtype=torch.float64).to(device)
    pulled = vjp(out, leaf, cotangents, create_graph=False)
    torch.testing.assert_close(pulled, torch.einsum("kbi,bij->kbj", cotangents.flatten(2), dense))


@pytest.mark.parametrize("name", NETWORKS)
@seeded(173)
def test_oracle_17_gradient_of_the_log_volume(name):
    """Every parameter's gradient of the exact log-volume, against a dense one."""
    network = NETWORKS[name]().double()
    z = torch.randn(3, 3, dtype=torch.float64)
    parameters = list(network.parameters())
    actual = gradients(log_volume(network, z).sum(), parameters)
    expected = gradients(gram_log_volume(dense_jacobian(network, z)).sum(), parameters)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("network", NETWORKS)
@seeded(178)
def test_oracle_01_gradients_through_layers(network, name):
    """Layers whose batched or forward derivatives torch has wrong, with two probes at once."""
    encoder, decoder = (
        nn.Sequential(nn.Linear(inputs, 3), NETWORKS[network](), nn.LazyLinear(outputs)).double()
        for inputs, outputs in ((5, 2), (2, 5))
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    decoder(encoder(x))  # The lazy layers find their widths.
    parameters = [*encoder.parameters(), *decoder.parameters()]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.7)
    probes = torch.randn(2, 4, 2, dtype=torch.float64)
    volume = EXACT[name](x, encoder, decoder, lambda z: probes).volume
    expected = dense_surrogate(name, x, encoder, decoder, probes)
    torch.testing.assert_close(volume, expected, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    assert_gradients_close(
        gradients((volume * weights).sum(), parameters),
        gradients((expected * weights).sum(), parameters),
        1e-8,
    )


@pytest.mark.parametrize("estimator", ["encoder", "on_manifold", "conjugate_gradient"])
@seeded(174)
def test_oracle_17_surrogate_gradient_by_finite_differences(estimator):
    """The gradient of the surrogate is a difference quotient, where stop-gradients are frozen."""
    encoder, decoder = tanh_pair(4, 2, torch.device("cpu"), torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    probes = torch.randn(1, 3, 2, dtype=torch.float64)
    rule = ConjugateGradient(tolerance=1e-13) if estimator == "conjugate_gradient" else None
    volume = (rule or ESTIMATORS[estimator])(x, encoder, decoder, lambda z: probes).volume
    weight = (decoder if rule else encoder)[0].weight
    (gradient,) = gradients(volume.sum(), [weight])
    frozen = dense_jacobian(decoder, encoder(x)).detach()
    gram = frozen.mT @ frozen
    solved = torch.linalg.solve(gram, probes[0].unsqueeze(2)).squeeze(2)

    def value() -> float:
        z = encoder(x)
        if rule:
            g = finite_differences(decoder, z)
            return float(torch.einsum("bi,bji,bjl,bl->", solved, g, g, probes[0]) / 2)
        f = finite_differences(encoder, decoder(z) if estimator == "on_manifold" else x)
        return -float(torch.einsum("bi,bij,bjl,bl->", probes[0], f, frozen, probes[0]))

    for index in [(0, 0), (3, 1), (5, 1)]:
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                weight[index] += step
                values.append(value())
                weight[index] -= step
        quotient = (values[0] - values[1]) / 2e-4
        assert quotient == pytest.approx(float(gradient[index]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
@seeded(175)
def test_oracle_17_batch_independence(name, device):
    """A sample's terms are the same in any order, in a smaller batch, and alone."""
    encoder, decoder = tanh_pair(5, 3, device, torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64).to(device)
    probes = torch.randn(2, 6, 3, dtype=torch.float64).to(device)

    def volume(index: Tensor) -> Tensor:
        return ESTIMATORS[name](x[index], encoder, decoder, lambda z: probes[:, index]).volume

    everything = torch.arange(6, device=device)
    together = volume(everything)
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=device)
    torch.testing.assert_close(volume(order), together[order])
    split = torch.cat([volume(part) for part in everything.split(2)])
    torch.testing.assert_close(split, together)
    alone = torch.cat([volume(part) for part in everything.split(1)])
    torch.testing.assert_close(alone, together)
    z = encoder(x)
    exact = log_volume(decoder, z)
    torch.testing.assert_close(log_volume(decoder, z[order]), exact[order])
    torch.testing.assert_close(log_volume(decoder, z[:1]), exact[:1])


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ESTIMATORS)
@seeded(176)
def test_oracle_17_batch_normalisation_is_refused(name, side):
    """It couples the samples, so there is no per-sample Jacobian; in eval mode there is one."""
    networks = dict(
        zip(("encoder", "decoder"), tanh_pair(5, 3, "cpu", torch.float64), strict=True)
    )
    networks[side].append(nn.BatchNorm1d(3 if side == "encoder" else 5).double())
    x = torch.randn(6, 5, dtype=torch.float64)
    likelihood = nfi.SurrogateLikelihood(estimator=name, num_probes=3)
    with pytest.raises(UnsupportedLayerError, match="BatchNorm1d in training mode couples"):
        likelihood(x, **_as_maps(networks))
    if side == "decoder":
        with pytest.raises(UnsupportedLayerError, match="BatchNorm1d in training mode couples"):
            log_volume(networks["decoder"], torch.zeros(6, 3, dtype=torch.float64))
    networks[side].eval()
    probes = torch.randn(1, 6, 3, dtype=torch.float64)
    volume, alone = (
        ESTIMATORS[name](
            x[:size], networks["encoder"], networks["decoder"], lambda z: probes[:, : len(z)]
        ).volume
        for size in (6, 1)
    )
    torch.testing.assert_close(volume[:1], alone)


@seeded(177)
def test_oracle_17_why_batch_normalisation_is_refused():
    """The product that an estimator would form is not the trace of the per-sample Jacobians."""
    encoder = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    u = torch.randn(6, 2, dtype=torch.float64)
    coupled = vjp(encoder(x), x, u.unsqueeze(0), create_graph=False)[0]
    normaliser = encoder(x).detach() / (encoder[0](x) - encoder[0](x).mean(0)).detach()
    per_sample = (u * normaliser) @ encoder[0].weight
    assert (coupled - per_sample).abs().max() > 0.05


def _as_maps(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {"encode": networks["encoder"], "decode": networks["decoder"]}
