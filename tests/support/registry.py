"""Name -> constructor of every layer and gauge. Adding one is adding one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import normflows as nf
import torch
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective.flows import (
    AngularSpline,
    AsRotation,
    HalfLineChart,
    HopfChart,
    HopfCoupling,
    InChart,
    IntervalChart,
    LineChart,
    OnCoordinates,
    ProductSurface,
    RadialSurface,
    SimplexStickBreaking,
    SphereChart,
    SphereLinear,
    TorusChart,
)
from normflows_injective.flows.coupling import (
    ActNorm,
    Additive,
    Affine,
    Autoregressive,
    CentredAffine,
    ElementTransform,
    Householder,
    LULinear,
    MobiusMixture,
    NetworkCoupling,
    Permutation,
    Spline,
)
from normflows_injective.flows.gauges import (
    ElasticNetGauge,
    EllipsoidGauge,
    Gauge,
    GroupLassoGauge,
    HomogeneousGauge,
    HyperplaneGauge,
    ImplicitGauge,
    LpGauge,
    NetworkRadius,
    SlopeGauge,
)
from normflows_injective.flows.kernel import KernelCoupling
from normflows_injective.flows.mixer import (
    ChannelMixing,
    Patchify,
    PatchMixing,
    PatchShift,
    mixer_flow,
)
from normflows_injective.flows.volume_preserving import (
    GINCoupling,
    GlobalScale,
    NICECoupling,
    RadialFlow1D,
    Rotation,
)
from normflows_injective.layerwise.block import ConditionalMoments, MomentBlock


@dataclass(frozen=True)
class Case:
    """A layer, the event shape of its latents, and what holds for it.

    ``latents`` sends normal draws to latents of the layer's domain. ``log_measure`` is the
    logarithm of the measure of the log-volume relative to the surface's own, at points (B, D).
    """

    build: Callable[[], nf.flows.Flow]
    latent_shape: tuple[int, ...]
    data_shape: tuple[int, ...]
    exact_inverse: bool = True
    context_dim: int = 0
    latents: Callable[[Tensor], Tensor] = lambda z: z
    log_measure: Callable[[Tensor], Tensor] = lambda x: x.new_zeros(len(x))


@dataclass(frozen=True)
class GaugeCase:
    """A gauge of any dimension D, and the part of the sphere whose directions it takes."""

    build: Callable[[int], Gauge]
    domain: str = "sphere"

    @property
    def chart(self) -> str:
        """Coordinates of that part."""
        return "orthant" if self.domain == "orthant" else "cot"


def _free_form() -> nf.flows.Flow:
    return nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(5, 2, (8, 8)))


def _free_form_context() -> nf.flows.Flow:
    return nfi.flows.FreeFormInjection(*nfi.nets.residual_autoencoder(5, 2, 8, 1, context_dim=3))


def _free_form_images() -> nf.flows.Flow:
    return nfi.flows.FreeFormInjection(*nfi.nets.conv_autoencoder((1, 6, 6), 3, (8, 8)))


def _composite() -> nf.flows.Flow:
    coupling = nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 8, 4], leaky=0.3))
    return nfi.flows.InjectiveComposite(
        [nfi.flows.LinearInjection(2, 5), coupling, nf.flows.LULinearPermute(5)]
    )


def _composite_images() -> nf.flows.Flow:
    return nfi.flows.InjectiveComposite(
        [
            nfi.flows.LinearInjection(3, 16),
            nfi.flows.Reshape((16,), (4, 2, 2)),
            nf.flows.Invertible1x1Conv(4),
            nf.flows.Squeeze(),
        ]
    )


def _composite_two() -> nf.flows.Flow:
    return nfi.flows.InjectiveComposite(
        [nfi.flows.LinearInjection(2, 3), nf.flows.LULinearPermute(3), nfi.flows.Pad(3, 5)]
    )


class MixedNorm(HomogeneousGauge):
    """A gauge as a user writes one: the level sets of the sum of two norms."""

    def value(self, x, context=None):
        return x.square().sum(1).sqrt() + x.pow(4).sum(1).pow(0.25)


class Bowl(nn.Module):
    """A function that increases along rays, with parameters, and is not homogeneous."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.curvatures = nn.Parameter(0.3 * torch.randn(dim))

    def forward(self, x):
        return (x.square() * self.curvatures.exp()).sum(1) + 0.5 * x.pow(4).sum(1)


def _matrix(dim: int) -> Tensor:
    return torch.eye(dim) + 0.4 * torch.randn(dim, dim) / math.sqrt(dim)


def _groups(dim: int) -> list[list[int]]:
    """Groups of the even and the odd indices, and the first index alone."""
    return [group for group in ([0], [*range(2, dim, 2)], [*range(1, dim, 2)]) if group]


def _network(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, 1))


GAUGES: dict[str, GaugeCase] = {
    "lp_0.5": GaugeCase(lambda dim: LpGauge(0.5)),
    "lp_0.75_smoothed": GaugeCase(lambda dim: LpGauge(0.75, eps=0.1)),
    "lp_1": GaugeCase(lambda dim: LpGauge(1.0)),
    "lp_1.3": GaugeCase(lambda dim: LpGauge(1.3)),
    "lp_2": GaugeCase(lambda dim: LpGauge(2.0)),
    "lp_3": GaugeCase(lambda dim: LpGauge(3.0)),
    "lp_inf": GaugeCase(lambda dim: LpGauge(math.inf)),
    "lp_inf_smoothed": GaugeCase(lambda dim: LpGauge(math.inf, eps=0.1)),
    "ellipsoid": GaugeCase(lambda dim: EllipsoidGauge(0.5 + torch.rand(dim))),
    "ellipsoid_matrix": GaugeCase(lambda dim: EllipsoidGauge(_matrix(dim))),
    "ellipsoid_trained": GaugeCase(lambda dim: EllipsoidGauge(0.5 + torch.rand(dim), True)),
    "ellipsoid_matrix_trained": GaugeCase(lambda dim: EllipsoidGauge(_matrix(dim), True)),
    "hyperplane": GaugeCase(lambda dim: HyperplaneGauge(0.5 + torch.rand(dim)), "orthant"),
    "elastic_net": GaugeCase(lambda dim: ElasticNetGauge(1.0, 2.0)),
    "group_lasso": GaugeCase(lambda dim: GroupLassoGauge(_groups(dim))),
    "slope": GaugeCase(lambda dim: SlopeGauge(torch.linspace(2.0, 0.5, dim))),
    "implicit": GaugeCase(
        lambda dim: ImplicitGauge(lambda x: x.square().sum(1) + x[:, :1].exp().sum(1) - 1)
    ),
    "implicit_module": GaugeCase(lambda dim: ImplicitGauge(Bowl(dim))),
    "network": GaugeCase(lambda dim: NetworkRadius(_network(dim), 0.5, 2.0)),
    "network_even": GaugeCase(lambda dim: NetworkRadius(_network(dim), 0.5, 2.0, even=True)),
    "user_written": GaugeCase(lambda dim: MixedNorm()),
}


def _chart(kind: str, dim: int = 4) -> Case:
    latents = {"stereographic": lambda z: z, "orthant": lambda z: z, "angles": _angles}
    return Case(
        lambda: SphereChart(dim, kind), (dim - 1,), (dim,), latents=latents.get(kind, _azimuth)
    )


def _azimuth(z: Tensor) -> Tensor:
    """Cotangents, which are any numbers, and an angle in (-pi, pi)."""
    return torch.cat([z[:, :-1], math.pi * (z[:, -1:] / 2).tanh()], dim=1)


def _angles(z: Tensor) -> Tensor:
    """Polar angles in (0, pi) and an angle in (-pi, pi)."""
    return torch.cat([math.pi * z[:, :-1].sigmoid(), _azimuth(z)[:, -1:]], dim=1)


def _turns(z: Tensor) -> Tensor:
    """Angles in (-pi, pi)."""
    return math.pi * (z / 2).tanh()


def _angular(context_dim: int = 0) -> nf.flows.Flow:
    return AngularSpline(
        3,
        range(3),
        width=8,
        num_blocks=1,
        context_dim=context_dim,
        circle=MobiusMixture(3),
        transformed=[2, 0],
    )


def _product() -> nf.flows.Flow:
    """A simplex, a number above zero, and a sphere, whose last coordinate is an angle."""
    return ProductSurface(
        {
            "parts": SimplexStickBreaking(2, measure="hausdorff"),
            "rate": HalfLineChart(),
            "place": SphereChart(3),
        }
    )


def _two_angles(z: Tensor) -> Tensor:
    """A cotangent and two angles in (-pi, pi)."""
    return torch.cat([z[:, :1], math.pi * (z[:, 1:] / 2).tanh()], dim=1)


def _rotations(form: str = "quaternion", context_dim: int = 0, **options: object) -> Case:
    """Couplings and a linear map of quaternions, and Haar measure against area."""

    def build() -> nf.flows.Flow:
        coupling = HopfCoupling(width=8, context_dim=context_dim, **options)
        return nfi.flows.InjectiveComposite(
            [HopfChart(), coupling, SphereLinear(4, True), AsRotation(form)]
        )

    # The entries of a matrix move by sqrt(8) for a quaternion that moves by one.
    log_factor = -2 * math.log(math.pi) - (1.5 * math.log(8) if form == "matrix" else 0)
    shape = (3, 3) if form == "matrix" else (4,)
    return Case(
        build,
        (3,),
        shape,
        True,
        context_dim,
        _two_angles,
        lambda x: x.new_full((len(x),), log_factor),
    )


def _in_chart(kind: str = "cot", dim: int = 4, rotate: bool = True) -> nf.flows.Flow:
    return InChart(SphereLinear(dim, rotate), SphereChart(dim, kind))


def _surface(gauge: str, dim: int = 4) -> Case:
    """A composite of a chart and the surface of a gauge of the registry."""
    case = GAUGES[gauge]

    def build() -> nf.flows.Flow:
        surface = RadialSurface(case.build(dim), level=1.3)
        return nfi.flows.InjectiveComposite([SphereChart(dim, case.chart), surface])

    latents = _azimuth if case.chart == "cot" else Case.latents
    return Case(build, (dim - 1,), (dim,), latents=latents)


def _moved_surface() -> nf.flows.Flow:
    """Maps between surfaces, one behind the other."""
    return nfi.flows.InjectiveComposite(
        [SphereChart(4), SphereLinear(4, True), SphereLinear(4), RadialSurface(LpGauge(1.5))]
    )


def _surface_by_context() -> nf.flows.Flow:
    surface = RadialSurface(ElasticNetGauge(1.0, 2.0), level_from_context=lambda c: c[:, 0].exp())
    return nfi.flows.InjectiveComposite([SphereChart(4), surface])


def _surface_in_cone_measure() -> nf.flows.Flow:
    surface = RadialSurface(LpGauge(1.5), level=1.3, measure="cone")
    return nfi.flows.InjectiveComposite([SphereChart(4), surface])


def _log_height_over_tangents(x: Tensor) -> Tensor:
    """Log of x . n on the surface of :func:`_surface_in_cone_measure`, from the gradient."""
    normal = x.sign() * x.abs().sqrt()
    return ((x * normal).sum(1) / normal.square().sum(1).sqrt()).log()


def _warm(layer: nf.flows.Flow, *event_shape: int) -> nf.flows.Flow:
    """A layer that has met its first batch of data."""
    layer.inverse(1.0 + 2.0 * torch.randn(64, *event_shape))
    return layer


def _images(
    build: Callable[[], nf.flows.Flow], shape: tuple[int, ...] = (1, 4, 4), context_dim: int = 0
) -> Case:
    """A bijection of images."""
    return Case(lambda: _warm_images(build(), shape, context_dim), shape, shape, True, context_dim)


def _warm_images(layer: nf.flows.Flow, shape: tuple[int, ...], context_dim: int) -> nf.flows.Flow:
    context = torch.randn(64, context_dim) if context_dim else None
    layer.inverse(1.0 + 2.0 * torch.randn(64, *shape), context)
    return layer


def _step(dim: int, transform: ElementTransform, context_dim: int = 0) -> list[nf.flows.Flow]:
    coupling = NetworkCoupling(dim, transform, (6,), context_dim)
    return [coupling, LULinear(dim), ActNorm(dim)]


def _interior(context_dim: int = 0) -> nf.flows.Flow:
    def layers(shape: tuple[int, int, int]) -> list[nf.flows.Flow]:
        return [ChannelMixing(shape, 2, _step(4, Affine(), context_dim), context_dim)]

    return PatchShift("interior", (1, 4, 6), 2, layers)


def _mixer_behind_injection() -> nf.flows.Flow:
    """A whole MixerFlow as one layer."""
    flows = mixer_flow((1, 2, 4), 2, layers=1, hidden=(6,), embedding_dim=2)
    x = torch.randn(64, 1, 2, 4)
    for flow in reversed(flows):
        x, _ = flow.inverse(x)
    return nfi.flows.InjectiveComposite(
        [nfi.flows.LinearInjection(2, 8), nfi.flows.Reshape((8,), (1, 2, 4)), *flows]
    )


def _vector(build: Callable[[], nf.flows.Flow], dim: int = 5, context_dim: int = 0) -> Case:
    """A bijection of vectors."""
    return Case(build, (dim,), (dim,), context_dim=context_dim)


def _kernel(kernel: str, dim: int = 5, **options: object) -> Case:
    """A kernelised coupling whose points are data."""
    context_dim = int(options.get("context_dim", 0))

    def build() -> nf.flows.Flow:
        layer = KernelCoupling(dim, 7, kernel, **options)
        context = torch.randn(64, context_dim) if context_dim else None
        layer.initialise(torch.randn(64, dim), context)
        return layer

    return _vector(build, dim, context_dim)


def _units(*shape: int, transform: str | list[str] = "none") -> Case:
    """Units that were fitted to positive, skewed data."""

    def build() -> nf.flows.Flow:
        data = 3.0 + (0.2 * torch.randn(64, *shape)).exp()
        return nfi.flows.Standardise.fit(data, transform=transform)

    return Case(build, shape, shape)


def _units_behind_injection() -> nf.flows.Flow:
    units = _units(5, transform=["none", "log", "power", "power", "auto"]).build()
    return nfi.flows.InjectiveComposite([_free_form(), units])


LAYERS: dict[str, Case] = {
    "linear": Case(lambda: nfi.flows.LinearInjection(2, 5), (2,), (5,)),
    "pad": Case(lambda: nfi.flows.Pad(2, 5), (2,), (5,)),
    "reshape": Case(lambda: nfi.flows.Reshape((4,), (1, 2, 2)), (4,), (1, 2, 2)),
    "free_form": Case(_free_form, (2,), (5,), exact_inverse=False),
    "free_form_context": Case(_free_form_context, (2,), (5,), exact_inverse=False, context_dim=3),
    "free_form_images": Case(_free_form_images, (3,), (1, 6, 6), exact_inverse=False),
    "composite": Case(_composite, (2,), (5,)),
    "composite_images": Case(_composite_images, (3,), (1, 4, 4)),
    "composite_two_injections": Case(_composite_two, (2,), (5,)),
    "standardise": _units(5),
    "standardise_log": _units(5, transform="log"),
    "standardise_power": _units(5, transform="power"),
    "standardise_images": _units(2, 3, 3, transform=["none", "power"]),
    "standardise_unfitted": _vector(lambda: nfi.flows.Standardise(5)),
    "composite_units": Case(_units_behind_injection, (2,), (5,), exact_inverse=False),
    "sphere_cot": _chart("cot"),
    "sphere_cot_of_two": _chart("cot", 2),
    "sphere_stereographic": _chart("stereographic"),
    "sphere_angles": _chart("angles"),
    "sphere_orthant": _chart("orthant"),
    "in_chart": Case(_in_chart, (3,), (3,), latents=_azimuth),
    "in_chart_stereographic": Case(lambda: _in_chart("stereographic"), (3,), (3,)),
    "in_chart_unrotated": Case(lambda: _in_chart(rotate=False), (3,), (3,), latents=_azimuth),
    "torus_angles": Case(
        lambda: TorusChart(3, period=24.0, start=0.0), (3,), (3,), latents=_turns
    ),
    "torus_stereographic": Case(
        lambda: TorusChart(2, "vectors", kind="stereographic"), (2,), (4,)
    ),
    "torus_vectors": Case(lambda: TorusChart(3, "vectors"), (3,), (6,), latents=_turns),
    "angular_mobius": Case(_angular, (3,), (3,), latents=_turns),
    "angular_mobius_context": Case(
        lambda: _angular(context_dim=3), (3,), (3,), context_dim=3, latents=_turns
    ),
    "line": Case(lambda: LineChart(1.0, 3.0), (1,), (1,)),
    "half_line": Case(lambda: HalfLineChart(-1.0, 0.5, 2.0), (1,), (1,)),
    "interval": Case(lambda: IntervalChart(-1.0, 3.0), (1,), (1,)),
    "on_coordinates": Case(lambda: OnCoordinates(LULinear(2), [2, 0], 3), (3,), (3,)),
    "product": Case(_product, (4,), (6,), latents=_azimuth),
    "surface_moved": Case(_moved_surface, (3,), (4,), latents=_azimuth),
    "surface_lp": _surface("lp_1.3"),
    "surface_lp_smoothed": _surface("lp_0.75_smoothed"),
    "surface_ellipsoid": _surface("ellipsoid_matrix_trained"),
    "surface_simplex": _surface("hyperplane"),
    "surface_elastic_net": _surface("elastic_net"),
    "surface_group_lasso": _surface("group_lasso"),
    "surface_slope": _surface("slope"),
    "surface_implicit": _surface("implicit_module"),
    "surface_learned": _surface("network"),
    "surface_user_written": _surface("user_written"),
    "surface_by_context": Case(_surface_by_context, (3,), (4,), context_dim=2, latents=_azimuth),
    "surface_cone": Case(
        _surface_in_cone_measure,
        (3,),
        (4,),
        latents=_azimuth,
        log_measure=_log_height_over_tangents,
    ),
    "hopf_chart": Case(HopfChart, (3,), (4,), latents=_two_angles),
    "rotations": _rotations(num_orders=4),
    "rotations_by_context": _rotations(context_dim=2),
    "rotations_as_matrices": _rotations("matrix", num_orders=1, axis=1, rows=True),
    "act_norm": _vector(lambda: _warm(ActNorm(5), 5)),
    "lu_linear": _vector(lambda: LULinear(5)),
    "householder": _vector(lambda: Householder(5, 3)),
    "permutation": _vector(lambda: Permutation(5)),
    "coupling_additive": _vector(lambda: NetworkCoupling(5, Additive(), (8,))),
    "coupling_affine": _vector(lambda: NetworkCoupling(5, Affine(), (8,), 2), context_dim=2),
    "coupling_affine_reverse": _vector(lambda: NetworkCoupling(5, Affine(), (8,), reverse=True)),
    "coupling_centred": _vector(lambda: NetworkCoupling(5, CentredAffine(), (8,))),
    "coupling_spline": _vector(lambda: NetworkCoupling(5, Spline(4), (8,))),
    "coupling_of_one": _vector(lambda: NetworkCoupling(1, Spline(4), (8,), 2), 1, 2),
    "autoregressive": _vector(lambda: Autoregressive(3, width=8, context_dim=2), 3, 2),
    "autoregressive_spline": _vector(lambda: Autoregressive(3, Spline(4), 8, reverse=True), 3),
    "patchify": Case(lambda: Patchify((2, 2, 4), 2), (2, 8), (2, 2, 4)),
    "channel_mixing": _images(lambda: ChannelMixing((2, 2, 4), 2, _step(8, Affine())), (2, 2, 4)),
    "channel_mixing_spline": _images(lambda: ChannelMixing((1, 4, 4), 2, _step(4, Spline(3)))),
    "channel_mixing_autoregressive": _images(
        lambda: ChannelMixing((1, 2, 4), 2, [Autoregressive(4, width=6)]), (1, 2, 4)
    ),
    "channel_mixing_context": _images(
        lambda: ChannelMixing((1, 4, 4), 2, _step(4, Affine(), 5), 2, 3), context_dim=2
    ),
    "patch_mixing": _images(lambda: PatchMixing((2, 2, 4), 1, _step(8, Affine())), (2, 2, 4)),
    "patch_mixing_spline": _images(lambda: PatchMixing((1, 4, 4), 2, _step(4, Spline(3)))),
    "patch_mixing_autoregressive": _images(
        lambda: PatchMixing((1, 2, 4), 1, [Autoregressive(8, width=8)]), (1, 2, 4)
    ),
    "patch_mixing_embedding": _images(
        lambda: PatchMixing((1, 4, 4), 2, _step(4, Affine(), 3), embedding_dim=3)
    ),
    "patch_shift_none": _images(lambda: PatchShift("none", (1, 4, 6), 2), (1, 4, 6)),
    "patch_shift_roll": _images(lambda: PatchShift("roll", (2, 4, 6), 2, back=True), (2, 4, 6)),
    "patch_shift_interior": _images(_interior, (1, 4, 6)),
    "patch_shift_interior_context": _images(lambda: _interior(2), (1, 4, 6), 2),
    "mixer_flow": Case(_mixer_behind_injection, (2,), (1, 2, 4)),
    "global_scale": Case(lambda: GlobalScale((1, 4, 4)), (1, 4, 4), (1, 4, 4)),
    "rotation": _vector(lambda: Rotation(3), 3),
    "nice": _vector(lambda: NICECoupling(5, (8,))),
    "nice_context": _vector(lambda: NICECoupling(4, (8,), 3, True), 4, 3),
    "gin": _vector(lambda: GINCoupling(5, (8,))),
    "gin_context": _vector(lambda: GINCoupling(4, (8,), 3, True), 4, 3),
    "radial_flow": _vector(lambda: RadialFlow1D(3, 6), 3),
    "moment_block": _vector(lambda: MomentBlock(5, ConditionalMoments(2, 3, (8,)))),
    "simplex_lift": Case(lambda: nfi.flows.SimplexLift(1, 3, "hausdorff"), (2,), (3,)),
    "simplex_lift_of_two": Case(lambda: nfi.flows.SimplexLift(2, 3, "hausdorff"), (4,), (6,)),
    "simplex_lift_ragged": Case(
        lambda: nfi.flows.SimplexLift(3, [2, 4, 3], "hausdorff"), (6,), (9,)
    ),
    "simplex_lift_lebesgue": Case(
        lambda: nfi.flows.SimplexLift(2, [2, 3]),
        (3,),
        (5,),
        log_measure=lambda x: x.new_full((len(x),), -0.5 * math.log(6)),
    ),
    "kernel_rbf": _kernel("rbf"),
    "kernel_matern12": _kernel("matern12", ard=False),
    "kernel_matern32": _kernel("matern32", share_kernel=False, reverse=True),
    "kernel_matern52": _kernel("matern52", context_dim=2),
    "kernel_cold": _vector(lambda: KernelCoupling(5, 6, precondition=False)),
    "kernel_of_one": _vector(lambda: KernelCoupling(1, 6, context_dim=2), 1, 2),
    "kernel_fixed_points": _kernel("rbf", learn_auxiliary=False),
}


def perturb(layer: nn.Module) -> nn.Module:
    """Move every parameter a little, so that no layer is tested at a special initial value."""
    for parameter in layer.parameters():
        parameter.data += 0.05 * parameter.data.new_ones(()).expand_as(parameter).bernoulli(0.5)
    return layer
