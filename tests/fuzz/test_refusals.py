"""Every public name refuses by name what it cannot take, whatever that is."""

from __future__ import annotations

import contextlib
import inspect
import random
from functools import partial

import numpy as np
import pytest
import torch
from support.registry import GAUGES, LAYERS
from support.seeds import shifted
from torch import Tensor, nn

import normflows_injective as nfi
from fuzz.making import Call
from fuzz.methods import all_calls
from fuzz.search import KINDS, fuzz, made, run
from fuzz.values import tensors_in
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

pytestmark = pytest.mark.usefixtures("quiet")
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
    nfi.points,
    nfi.training,
    nfi.volume,
)
# What has no arguments to spoil: abstract classes, results, normflows' own, and a registration.
WITHOUT_CALL = {
    "Additive",
    "Chart",
    "Classifier",
    "DiagGaussian",
    "ElementTransform",
    "Estimator",
    "FieldNetwork",
    "Gauge",
    "HomogeneousGauge",
    "Horizon",
    "Injection",
    "LatentDimReport",
    "TrainingTerm",
    "InjectivityReport",
    "Scores",
    "Mixing",
    "SurfaceMap",
    "Velocity",
    "__version__",
    "TrainingResult",
    "load_state",
    "register",
    "save_state",
}


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
        findings = [run("call", call, random.Random(shifted(seed)), valid) for seed in range(60)]
        assert kind in {finding.kind for finding in findings if finding is not None}, kind
    assert set(answers) == set(KINDS)


@pytest.mark.slow
def test_every_public_name_has_a_call():
    named = {name.partition(".")[0].partition(" ")[0] for name in all_calls()}
    for space in NAMESPACES:
        for name in set(space.__all__) - WITHOUT_CALL:
            kind = getattr(space, name)
            is_result = inspect.isclass(kind) and issubclass(kind, tuple)
            assert inspect.ismodule(kind) or is_result or name in named, name


# Sets that are compared, each of any size, and tensors of which dtype and device count.
OF_ANY_LENGTH = {
    ("KernelExpansion.kernel_matrix", "first"),
    ("KernelExpansion.kernel_matrix", "second"),
    ("Simplices.corners", "like"),
    ("Simplices.corners", "labels"),
    ("frechet_distance", "samples"),
    ("frechet_distance", "reference"),
    ("score", "x"),
    ("score", "reference"),
}


def batches_of(arguments):
    return [name for name, value in arguments.items() if isinstance(value, Tensor) and value.dim()]


@pytest.mark.slow
def test_no_batch_is_broadcast_to_the_length_of_another():
    for name, call in all_calls().items():
        batches = batches_of(call.make()[1])
        for batch in batches if len(batches) > 1 else ():
            function, arguments = made(call)
            arguments[batch] = arguments[batch][:1]
            if (name, batch) in OF_ANY_LENGTH:
                function(**arguments)
                continue
            with contextlib.suppress(InjectiveFlowError):
                pytest.fail(f"{name} takes one row of {batch}: {function(**arguments)}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "meta"])
def test_other_dtypes_and_devices_are_served_or_refused_by_name(dtype):
    for name, call in all_calls().items():
        for batch in batches_of(call.make()[1]):
            function, arguments = made(call)
            if dtype == "meta" or arguments[batch].is_floating_point():
                arguments[batch] = arguments[batch].to(dtype)
            try:
                found = tensors_in(function(**arguments))
            except InjectiveFlowError:
                continue
            except Exception as error:
                pytest.fail(f"{name} with {batch} of {dtype}: {error!r}")
            # Operations of torch that overlook the meta device read memory at random.
            assert dtype != "meta" or all(tensor.is_meta for tensor in found), (name, batch)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_another_width(name):
    case = LAYERS[name]
    layer = case.build()
    context = torch.randn(4, case.context_dim) if case.context_dim else None
    sides = (("forward", case.latent_shape), ("inverse", case.data_shape))
    for method, shape in sides:
        wrongs = [(*shape[:-1], shape[-1] + 1), (*shape, 1)]
        # normflows' Squeeze overlooks axes behind the width; models compare the whole shape.
        for wrong in wrongs[: 1 if name == "composite_images" else 2]:
            with pytest.raises(InjectiveFlowError) as raised:
                getattr(layer, method)(torch.rand(4, *wrong), context)
            # Surfaces of any dimension see a chart first, and widths that no gauge fixes.
            assert isinstance(raised.value, (ShapeError, nfi.errors.OffManifoldError))


LAWS = {
    "uniform_sphere": lambda: distributions.UniformSphere(3),
    "von_mises_fisher": lambda: distributions.VonMisesFisher([1.0, 0.0, 0.0], 2.0),
    "power_spherical": lambda: distributions.PowerSpherical([1.0, 0.0, 0.0], 2.0),
    "uniform_torus": lambda: distributions.UniformTorus(3),
    "von_mises": lambda: distributions.VonMises([1.0, 0.0, 3.0], 2.0),
    "wrapped_normal": lambda: distributions.WrappedNormal([1.0, 0.0, 3.0], 0.5),
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


def test_masks_are_booleans():
    simplices = assignment.Simplices(2, 3)
    for mask in (torch.ones(4, 2), torch.ones(4, 2).long()):
        with pytest.raises(DtypeError, match="mask must be a tensor of booleans.*mask.bool"):
            simplices.coordinate_mask(mask)
    for mask in (torch.ones(4, 3).bool(), torch.ones(4).bool()):
        with pytest.raises(ShapeError, match=r"mask must have shape \(B, 2\)"):
            simplices.coordinate_mask(mask)


def test_times_of_a_field_are_one_for_every_row():
    path = assignment.AssignmentPath(assignment.Simplices(2, 3), assignment.FiniteHorizon())
    v = torch.zeros(4, 2, 3)
    for t in (torch.ones(1), torch.ones(())):
        with pytest.raises(ShapeError, match="t must have one row for every sample, 4 as v has"):
            path.evidence(v, t)
    with pytest.raises(ShapeError, match=r"t must have shape \(B,\), got \(4, 1\)"):
        path.evidence(v, torch.ones(4, 1))
    for horizon in (path.horizon, assignment.InfiniteHorizon()):
        with pytest.raises(ShapeError, match=r"t.view\(-1, 1, 1\), got \(1, 1, 1\)"):
            horizon.scaled(v, torch.ones(1, 1, 1))
        assert horizon.scaled(v, torch.ones(4, 1, 1)).shape == v.shape
    for field in (nfi.nets.fields.ConvField(2, 1, 3, 8), nfi.nets.fields.DenseField(2, 3, (4,))):
        with pytest.raises(ShapeError, match="t must have one row for every sample"):
            field(v, torch.ones(1))


@pytest.mark.parametrize("times", [[0.0, np.nan], [0.0, 2j], {0: 1.0}, b"ab", 3, "01"])
def test_times_of_a_layer_are_numbers(times):
    flow = nfi.AssignmentFlow(nfi.nets.fields.DenseField(2, 3, (4,)), 2, 3)
    with pytest.raises(OptionError, match="times must be a list of times"):
        flow.layer(steps=2).transport(torch.zeros(4, 4), times)


def test_no_times_are_no_way():
    flow = nfi.AssignmentFlow(nfi.nets.fields.DenseField(2, 3, (4,)), 2, 3)
    with pytest.raises(OptionError, match="times must hold the first time"):
        flow.layer(steps=2).transport(torch.zeros(4, 4), [])


def test_speeds_of_integer_counts_are_not_rounded():
    counts = torch.tensor([[2], [3]])
    for horizon in (assignment.InfiniteHorizon(), assignment.FiniteHorizon()):
        assert torch.equal(horizon.speeds(counts), horizon.speeds(counts.float()))


def test_tensors_of_classes_have_one_number_for_every_class():
    simplices = assignment.Simplices(2, 3)
    for method in (simplices.weights, simplices.log_weights, simplices.round, simplices.mean_free):
        for v in (torch.zeros(4, 2, 4), torch.zeros(4, 3), torch.zeros(())):
            with pytest.raises(ShapeError, match=r"shape \(\*, 2, 3\)"):
                method(v)
    for ragged in (simplices, assignment.Simplices(2, [2, 3])):
        with pytest.raises(ShapeError, match=f"m must have shape .B, {ragged.dim}."):
            ragged.from_coordinates(torch.zeros(4, 5))


@pytest.mark.parametrize("build", [nfi.nets.SmoothMLP, nfi.nets.ResidualMLP])
def test_perceptrons_take_rows(build):
    net = build(3, 2, *([(4,)] if build is nfi.nets.SmoothMLP else [4, 0]))
    for x in (torch.zeros(3), torch.zeros(4, 1, 3)):
        with pytest.raises(ShapeError, match=r"takes a batch of shape \(B, 3\)"):
            net(x)


def test_exact_likelihood_compares_what_is_decoded():
    likelihood, x = nfi.ExactLikelihood(), torch.zeros(4, 3)
    answers = (lambda z: (z, z[:1, 0]), lambda z: (z[:1], z[:, 0]), lambda z: (z[:, :1], z[:, 0]))
    for decode in answers:
        with pytest.raises(ShapeError, match="decode must return a reconstruction"):
            likelihood(x, lambda x: x, decode)
    with pytest.raises(DtypeError, match="what encode returns must be a torch.Tensor, got list"):
        likelihood(x, lambda x: [x], lambda z: (z.sum(), z))
    with pytest.raises(OptionError, match="The cause: too many values to unpack"):
        likelihood(x, lambda x: x, lambda z: z)
    terms = likelihood(x, lambda x: x, lambda z: (z, z[:, 0]))
    with pytest.raises(ShapeError, match="log_prob must have one value per sample"):
        likelihood.loss(terms, torch.zeros(1))


def test_prior_samples_are_as_many_as_the_data():
    encoder, decoder = nfi.nets.mlp_autoencoder(5, 2, (4,))
    likelihood = nfi.SurrogateLikelihood(latent_cycle=0.1)
    with pytest.raises(ShapeError, match="prior must have one row for every sample, 4 as x has"):
        likelihood(torch.randn(4, 5), encoder, decoder, torch.randn(1, 2))


def test_dtypes_that_torch_does_not_serve_are_named():
    layer = flows.SimplexStickBreaking(3)
    with pytest.raises(DtypeError, match="cannot take z of torch.float16.*float32 or float64"):
        layer(torch.zeros(4, 2).half())


def test_constructors_of_classes_are_checked_as_well():
    with pytest.raises(DtypeError, match="z must be a torch.Tensor, got list"):
        preserving.RadialFlow1D.from_data([[1.0, 2.0]])
    with pytest.raises(DeviceError, match="z must have values"):
        preserving.RadialFlow1D.from_data(torch.zeros(4, 2, device="meta"))


def test_no_name_is_no_chart():
    with pytest.raises(OptionError, match="chart must be one of .*, got ''"):
        flows.star_like_flow(3, num_layers=1, chart="")


def test_the_map_of_a_jacobian_keeps_the_batch():
    z = torch.randn(4, 2)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), pytest.raises(ShapeError, match="keep the batch"):
            nfi.volume.jacobian(lambda z: z[:0], z)


def test_options_of_compilation_are_those_of_torch():
    with pytest.raises(
        OptionError, match="keyword arguments of torch.compile.*backend.*got 'back'"
    ):
        nfi.SurrogateLikelihood(compile={"back": "eager"})
    for none in (np.False_, torch.tensor(False)):
        assert "compile=False" in str(nfi.SurrogateLikelihood(compile=none))


def test_a_class_is_no_schedule():
    with pytest.raises(OptionError, match="beta must be a number or a function"):
        nfi.SurrogateLikelihood(beta=float)


def test_probes_that_are_no_tensors_are_named():
    x, estimator = torch.randn(4, 4), nfi.volume.Conditional()
    with pytest.raises(OptionError, match="draw_probes=.*The cause: .*non-Tensor"):
        estimator(x, lambda x: x[:, :2], lambda z: torch.cat([z, z], 1), lambda z: "ab")


def test_latents_whose_variance_overflows_are_named():
    z = 1e30 * torch.randn(200, 2)
    for measure in (nfi.diagnostics.coupling_gap, nfi.diagnostics.LayerwiseTrainer(2).fit):
        with pytest.raises(nfi.errors.NonFiniteError, match="sum of squares of z"):
            measure(z)


def test_options_of_a_regression_become_plain():
    options = {"hidden": np.array([4]), "steps": torch.tensor(2), "batch_size": np.int64(64)}
    trainer = nfi.diagnostics.LayerwiseTrainer(
        2, regression=nfi.diagnostics.MomentRegression(**options)
    )
    assert trainer.regression[:3] == ((4,), 2, 64)
    assert type(trainer.regression.steps) is int
