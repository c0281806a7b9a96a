"""Every public name refuses by name what it cannot take, whatever that is."""

from __future__ import annotations

import inspect
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from fuzz import KINDS, fuzz, run
from fuzz_calls import Call, all_calls
from registry import GAUGES, LAYERS
from seeds import shifted
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective import distributions, flows
from normflows_injective.checks import checks_arguments, checks_arguments_of
from normflows_injective.errors import (
    ContextError,
    DeviceError,
    DtypeError,
    InjectiveFlowError,
    OptionError,
    ShapeError,
)
from normflows_injective.flows import assignment, coupling, gauges, kernel, mixer
from normflows_injective.flows import volume_preserving as preserving

NAMESPACES = (
    nfi,
    nfi.flows,
    gauges,
    coupling,
    kernel,
    mixer,
    preserving,
    assignment,
    nfi.nets,
    nfi.nets.fields,
    distributions,
    nfi.diagnostics,
    nfi.volume,
)
# What has no arguments to spoil: abstract classes, results, the host's own, and a registration.
WITHOUT_CALL = {
    "Additive",
    "Chart",
    "Classifier",
    "DiagGaussian",
    "ElementTransform",
    "Estimator",
    "Gauge",
    "HomogeneousGauge",
    "Horizon",
    "Injection",
    "InjectivityReport",
    "Mixing",
    "SurfaceMap",
    "Velocity",
    "__version__",
    "register",
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.slow
def test_some_hundreds_of_spoilt_calls_end_in_named_errors():
    findings = fuzz(400, seed=int(torch.randint(2**31, ())))
    assert not findings, "\n".join(map(str, findings))


@pytest.mark.slow
def test_the_fuzzer_finds_what_it_looks_for():
    def make(answer, **arguments):
        return Call(lambda: (lambda x, n=1: answer(x), {"x": torch.randn(4, 3), **arguments}), "x")

    def raises(x):
        raise RuntimeError("mat1 and mat2")

    def refuses(x):
        raise OptionError("no")

    answers = {
        "raw error": make(raises),
        "wrong shape": make(lambda x: torch.zeros(2)),
        "unnamed NaN": make(lambda x: torch.full((4,), torch.nan)),
        "accepted nonsense": make(lambda x: torch.zeros(4), n=2),
        "refused number": make(refuses, n=2),
    }
    for kind, call in answers.items():
        valid = {"call": [1]}
        found = [run("call", call, random.Random(shifted(seed)), valid) for seed in range(60)]
        assert kind in {finding.kind for finding in found if finding is not None}, kind
    assert set(answers) == set(KINDS)


@pytest.mark.slow
def test_every_public_name_has_a_call():
    named = {name.partition(".")[0].partition(" ")[0] for name in all_calls()}
    for space in NAMESPACES:
        for name in set(space.__all__) - WITHOUT_CALL:
            kind = getattr(space, name)
            is_result = inspect.isclass(kind) and issubclass(kind, tuple)
            assert inspect.ismodule(kind) or is_result or name in named, name


@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_another_width(name):
    case = LAYERS[name]
    layer = case.build()
    context = torch.randn(4, case.context_dim) if case.context_dim else None
    sides = (("forward", case.latent_shape), ("inverse", case.data_shape))
    for method, shape in sides:
        wrongs = [(*shape[:-1], shape[-1] + 1), (*shape, 1)]
        # The host's Squeeze overlooks axes behind the width; models compare the whole shape.
        for wrong in wrongs[: 1 if name == "composite_images" else 2]:
            with pytest.raises(InjectiveFlowError) as raised:
                getattr(layer, method)(torch.rand(4, *wrong), context)
            # Surfaces of any dimension see a chart first, and widths that no gauge fixes.
            assert isinstance(raised.value, (ShapeError, nfi.errors.OffManifoldError))


LAWS = {
    "uniform_sphere": lambda: distributions.UniformSphere(3),
    "von_mises_fisher": lambda: distributions.VonMisesFisher([1.0, 0.0, 0.0], 2.0),
    "angular_central_gaussian": lambda: distributions.AngularCentralGaussian(torch.eye(3)),
    "uniform_on_surface": lambda: distributions.UniformOnSurface(gauges.LpGauge(2.0), dim=3),
    "uniform_on_surface_projecting": lambda: distributions.UniformOnSurface(
        gauges.LpGauge(2.0), dim=3, off_manifold="project"
    ),
    "pullback": lambda: distributions.Pullback(
        distributions.UniformSphere(4), flows.SphereChart(4)
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_laws_refuse_another_width(name):
    law = LAWS[name]()
    for width in (2, 4, 5):
        x = nn.functional.normalize(torch.randn(4, width), dim=1)
        for points in (x, x[:, :, None], x[0]):
            with pytest.raises(ShapeError):
                law.log_prob(points)


@pytest.mark.parametrize("name", GAUGES)
def test_gauges_refuse_what_is_no_batch_of_vectors(name):
    gauge = GAUGES[name].build(3)
    u = nn.functional.normalize(torch.rand(4, 3), dim=1)
    for points in (u[0], u[:, None], u[:, :0]):
        with pytest.raises(ShapeError):
            gauge.log_radius(points, torch.tensor(1.0))
    if gauge.dim is not None:
        with pytest.raises(ShapeError, match=r"must have shape \(B, 3\)"):
            gauge.log_radius(torch.ones(4, 2), torch.tensor(1.0))


@pytest.mark.parametrize("target", ["uniform_on_surface", "uniform_sphere"])
def test_reverse_divergences_compare_the_dimensions(target):
    model = flows.star_like_flow(5, num_layers=1, p=LAWS[target]())
    for divergence in (model.reverse_kld, partial(model.reverse_alpha_div, alpha=0.5)):
        with pytest.raises(ShapeError, match=r"\(B, 3\), got \(8, 5\)"):
            divergence(8)


def test_what_is_no_dense_real_tensor_is_refused_before_the_call():
    layer, x = coupling.LULinear(3), torch.randn(4, 3)
    refusals = {
        "must be a torch.Tensor, got ndarray": x.numpy(),
        r"sparse one of layout torch.sparse_coo.*x.to_dense\(\)": x.to_sparse(),
        "sparse one of layout torch.sparse_csr": x.to_sparse_csr(),
        "must be real, got torch.complex64": x.to(torch.complex64),
        r"floating point, got torch.int64.*x.float\(\)": x.long(),
    }
    for text, given in refusals.items():
        with pytest.raises(DtypeError, match=text):
            layer.inverse(given)
    with pytest.raises(ContextError, match="context must be a torch.Tensor, got list"):
        layer.inverse(x, [1.0])


def test_errors_of_torch_get_the_name_of_the_argument():
    net = nfi.nets.SmoothMLP(3, 2, (4,))
    with pytest.raises(DtypeError, match="x must have the dtype torch.float32 of the parameters"):
        net(torch.randn(4, 3).double())
    with pytest.raises(DeviceError, match="x must be on cpu, .* got meta"):
        net(torch.randn(4, 3, device="meta"))
    with pytest.raises(RuntimeError):  # DeviceError is what torch raises there
        net(torch.randn(4, 3, device="meta"))
    with pytest.raises(ShapeError, match=r"x of shape \(4, 5\).*input_shape=\(3,\)") as raised:
        net(torch.randn(4, 5))
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_errors_in_a_users_own_function_come_through():
    def broken(x):
        raise AttributeError("of the user")

    with pytest.raises(AttributeError, match="of the user"):
        nfi.volume.jacobian(broken, torch.randn(4, 2))
    with pytest.raises(InjectiveFlowError):
        nfi.volume.jacobian(lambda x: None, torch.randn(4, 2))


def test_arguments_that_python_refuses_stay_so():
    for call in (lambda: coupling.LULinear(), lambda: coupling.LULinear(3, width=2)):
        with pytest.raises(TypeError, match="argument"):
            call()


def test_numbers_reach_layers_in_plain_form():
    layer = coupling.NetworkCoupling(np.int64(3), hidden=np.array([4]), reverse=np.bool_(True))
    assert type(layer.dim) is int
    assert layer.reverse is True
    assert type(assignment.InfiniteHorizon(scale=np.float32(0.5)).scale) is float


def test_the_check_keeps_signatures_and_is_attached_once():
    @checks_arguments
    def function(x: Tensor, n: int = 1) -> Tensor:
        return x * n

    assert list(inspect.signature(function).parameters) == ["x", "n"]
    assert checks_arguments(function) is function
    assert checks_arguments_of(coupling.LULinear).forward is coupling.LULinear.forward
    with pytest.raises(OptionError, match="n must be a positive integer, got 2.5"):
        function(torch.ones(1), n=2.5)


def test_swapped_networks_are_asked_about():
    encoder, decoder = nfi.nets.mlp_autoencoder(5, 2, (4,))
    base = nfi.distributions.DiagGaussian(2, trainable=False)
    with pytest.raises(nfi.errors.NotInjectiveError, match="swapped"):
        flows.FreeFormInjection(decoder, encoder)
    injection = flows.FreeFormInjection(nn.Linear(2, 5), nn.Linear(5, 2))
    with pytest.raises(ShapeError, match="swapped"):
        nfi.InjectiveNormalizingFlow(base, [injection])


def test_a_pair_of_networks_is_unpacked():
    pair = nfi.nets.mlp_autoencoder(5, 2, (4,))
    injection = flows.FreeFormInjection(pair)
    assert injection.encoder is pair.encoder
    assert injection.decoder is pair.decoder
    for wrong in ([*pair, pair.encoder], [pair.encoder], pair.encoder, None):
        with pytest.raises(OptionError, match=r"FreeFormInjection\(encoder, decoder\)"):
            flows.FreeFormInjection(wrong)


def test_builders_of_networks_say_which_argument_is_wrong():
    conv = nfi.nets.conv_autoencoder
    for shape in ((28, 28), (28, 28, 1), 28, None):
        with pytest.raises(OptionError, match=r"\(channels, height, width\)"):
            conv(shape, 16)
    with pytest.raises(OptionError, match="latent_dim must be a positive integer, got 0"):
        nfi.nets.mlp_autoencoder(20, 0)
    with pytest.raises(OptionError, match=r"hidden=\(64,\)"):
        nfi.nets.mlp_autoencoder(20, 8, 64)
    with pytest.raises(OptionError, match="in_features"):
        nfi.nets.SmoothMLP(0, 2)
