"""The public names: those of the first release, no more than a limit, and each documented."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

# The names that programs written for version 0.1.0 import, by namespace.
FIRST_RELEASE = {
    "": [
        "AssignmentFlow",
        "ExactLikelihood",
        "ForwardKLD",
        "InjectiveNormalizingFlow",
        "LossTerms",
        "SurrogateLikelihood",
        "SurrogateTerms",
        "register",
    ],
    "diagnostics": [
        "CouplingGap",
        "Finding",
        "InjectivityReport",
        "LatentDimReport",
        "LayerwiseTrainer",
        "MomentRegression",
        "coupling_gap",
        "frechet_distance",
        "injectivity_report",
        "suggest_latent_dim",
        "volume_preserving_floor",
        "volume_preserving_floor_on_box",
    ],
    "distributions": [
        "AngularCentralGaussian",
        "DiagGaussian",
        "Pullback",
        "UniformOnSurface",
        "UniformSphere",
        "VonMisesFisher",
    ],
    "errors": [
        "CheckpointError",
        "CheckpointWarning",
        "CollapseWarning",
        "ContextError",
        "DeviceError",
        "DtypeError",
        "ForwardModeError",
        "InjectiveFlowError",
        "NonFiniteError",
        "NotInjectiveError",
        "NumericalWarning",
        "OffManifoldError",
        "OptionError",
        "ParamStoreWarning",
        "ReducedLayerWarning",
        "RegistrationError",
        "ScaleWarning",
        "ShapeError",
        "SmoothnessWarning",
        "StackingWarning",
        "UnsupportedLayerError",
        "UnsupportedModelError",
    ],
    "flows": [
        "Chart",
        "FreeFormInjection",
        "GraphSurface",
        "InChart",
        "Injection",
        "InjectiveComposite",
        "LinearInjection",
        "Pad",
        "RadialSurface",
        "Reshape",
        "SimplexFromOrthant",
        "SimplexLift",
        "SimplexStickBreaking",
        "SphereChart",
        "SphereLinear",
        "SurfaceMap",
        "star_like_flow",
    ],
    "flows.assignment": [
        "AssignmentField",
        "AssignmentLayer",
        "AssignmentPath",
        "Classifier",
        "FiniteHorizon",
        "Horizon",
        "HorizonChoice",
        "InfiniteHorizon",
        "SimplexLift",
        "Simplices",
        "Velocity",
        "choose_horizon",
        "rounding_error",
    ],
    "flows.coupling": [
        "ActNorm",
        "Additive",
        "Affine",
        "Autoregressive",
        "CentredAffine",
        "Coupling",
        "ElementTransform",
        "Householder",
        "LULinear",
        "NetworkCoupling",
        "Permutation",
        "Spline",
    ],
    "flows.gauges": [
        "ElasticNetGauge",
        "EllipsoidGauge",
        "Gauge",
        "GroupLassoGauge",
        "HomogeneousGauge",
        "HyperplaneGauge",
        "ImplicitGauge",
        "LpGauge",
        "NetworkRadius",
        "RadiusAndSecant",
        "SlopeGauge",
    ],
    "flows.kernel": [
        "KernelCoupling",
        "KernelExpansion",
        "ferumal_glow",
        "ferumal_realnvp",
        "rkhs_penalty",
    ],
    "flows.mixer": [
        "ChannelMixing",
        "Mixing",
        "PatchMixing",
        "PatchShift",
        "Patchify",
        "bits_per_dim",
        "dequantise",
        "mixer_flow",
    ],
    "flows.volume_preserving": [
        "GINCoupling",
        "GlobalScale",
        "NICECoupling",
        "RadialFlow1D",
        "Rotation",
        "random_rotation",
    ],
    "nets": [
        "Autoencoder",
        "ConvDecoder",
        "ConvEncoder",
        "ResidualMLP",
        "SmoothMLP",
        "conv_autoencoder",
        "mlp_autoencoder",
        "residual_autoencoder",
    ],
    "nets.fields": ["ConvField", "DenseField", "LeaveOneOutField"],
    "pyro": [
        "AutoFlow",
        "AutoInjective",
        "FlowDistribution",
        "FlowTransform",
        "InjectiveDistribution",
        "ManifoldReparam",
        "OnSurface",
        "StarLikeConstraint",
        "SurfaceDistribution",
        "UniformOnSurface",
        "load",
        "module",
        "save",
    ],
    "volume": [
        "Conditional",
        "ConjugateGradient",
        "DecodedVolume",
        "EstimatedVolume",
        "Estimator",
        "Surrogate",
        "conjugate_gradient",
        "decode_and_log_volume",
        "draw_probes",
        "jacobian",
        "log_volume",
    ],
}

# How many names a namespace may have, modules not counted.
LIMITS = {
    "": 14,
    "diagnostics": 27,
    "distributions": 14,
    "errors": 22,
    "flows": 33,
    "flows.assignment": 13,
    "flows.coupling": 13,
    "flows.gauges": 11,
    "flows.kernel": 5,
    "flows.mixer": 8,
    "flows.volume_preserving": 6,
    "nets": 10,
    "nets.fields": 4,
    "points": 13,
    "pyro": 14,
    "pyro.flows": 3,
    "testing": 11,
    "training": 8,
    "volume": 14,
}


def space_of(name: str) -> ModuleType:
    """A public namespace."""
    if name.startswith("pyro"):
        pytest.importorskip("pyro", reason="Pyro is not installed")
    return importlib.import_module(f"normflows_injective.{name}".rstrip("."))


@pytest.mark.parametrize("name", FIRST_RELEASE)
def test_names_of_the_first_release_are_public(name):
    space = space_of(name)
    assert not set(FIRST_RELEASE[name]) - set(space.__all__)
    assert all(getattr(space, public) is not None for public in FIRST_RELEASE[name])


@pytest.mark.parametrize("name", LIMITS)
def test_every_public_name_is_documented_and_they_are_few(name):
    space = space_of(name)
    things = {n: getattr(space, n) for n in space.__all__ if n != "__version__"}
    assert all(thing.__doc__ for thing in things.values()), name
    assert sum(not isinstance(thing, ModuleType) for thing in things.values()) <= LIMITS[name]


@pytest.mark.parametrize("name", LIMITS)
def test_completion_offers_public_names_alone(name):
    space = space_of(name)
    lazily_loaded = {"pyro", "testing"} if name == "" else {"testing"} if name == "pyro" else set()
    assert set(dir(space)) - lazily_loaded == set(space.__all__)


@pytest.mark.parametrize("name", LIMITS)
def test_no_module_is_hidden_by_a_function_of_its_name(name):
    space = space_of(name)
    modules = {info.name for info in pkgutil.iter_modules(getattr(space, "__path__", []))}
    hidden = [
        n for n in modules & set(space.__all__) if not isinstance(getattr(space, n), ModuleType)
    ]
    assert not hidden
