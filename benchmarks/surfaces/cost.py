"""The cost of the log-volume of a known surface: the closed form beside routes through a matrix.

    python -m benchmarks.surfaces.cost [--page docs/results/surface_cost.md]

Times are those of the value and its gradients, by the coordinates and by parameters, of the
log-volume of a chart of the sphere followed by a star-like surface, for one point in float32 on
one thread:

* ours, a sum of closed forms and one gradient of the radius;
* two triangular solves with the matrix of the chart's derivatives, O(D^2);
* the Cholesky factor of the Gram matrix of the dense Jacobian, O(D^3). The Jacobian is written
  down from its formula, which costs less than differentiation.

Before anything is timed, the routes must agree at D = 100, in values and in gradients.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.shared.figures import beside, new_figure, save
from benchmarks.shared.tables import publish, table, wrapped
from benchmarks.shared.timing import exponent, least_seconds
from normflows_injective.autodiff.products import value_and_gradient
from normflows_injective.flows import InjectiveComposite, RadialSurface, SphereChart
from normflows_injective.flows.gauges import Gauge, LpGauge, NetworkRadius

OURS, SOLVES, CHOLESKY = "ours", "triangular solves", "Cholesky"
ROUTES = (OURS, SOLVES, CHOLESKY)
FEW = (100, 300, 1000, 2000, 4000)
MANY = (8000, 10_000, 30_000, 100_000, 1_000_000)
FITTED = {OURS: (10_000, 100_000), SOLVES: (1000, 4000), CHOLESKY: (1000, 4000)}
CHECKED, TOLERANCE = 100, 1e-8
LEVEL, WIDTH = 1.3, 16
LEAST, MOST, SECONDS = 5, 200, 2.0


class Surface(NamedTuple):
    """A kind of surface: its title on the page, and its gauge in D dimensions."""

    title: str
    gauge: Callable[[int], Gauge]


def _network(dim: int) -> Gauge:
    return NetworkRadius(nn.Sequential(nn.Linear(dim, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1)))


SURFACES = {
    "lp": Surface("`LpGauge(1.5)`, gradient by the level", lambda dim: LpGauge(1.5)),
    "network": Surface(
        f"`NetworkRadius` of {WIDTH} hidden units, gradient by its parameters", _network
    ),
}

LogVolume = Callable[[Tensor, Tensor], Tensor]
Times = dict[str, dict[int, float]]


class Problem:
    """One point of one surface, and the log-volume there by every route."""

    def __init__(self, surface: Surface, dim: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(dim)
        self.gauge = surface.gauge(dim).to(dtype)
        self.chart = SphereChart(dim)
        radial = RadialSurface(self.gauge, level_from_context=0)
        self.layer = InjectiveComposite([self.chart, radial])
        self.z = torch.randn(1, dim - 1).to(dtype)
        self.z[:, -1] = 0.7
        self.z.requires_grad_()
        self.level = torch.full((1, 1), LEVEL, dtype=dtype, requires_grad=True)
        # The level of the network's surface is a constant factor; its parameters are the network.
        self.leaves = [self.z, *(list(self.gauge.parameters()) or [self.level])]

    def log_volume(self, route: str) -> Tensor:
        """The log-volume (1,) by a route."""
        return {OURS: self._ours, SOLVES: self._by_solves, CHOLESKY: self._by_cholesky}[route]()

    def step(self, route: str) -> tuple[Tensor, ...]:
        """The gradients by the coordinates and by the parameters."""
        return torch.autograd.grad(self.log_volume(route).sum(), self.leaves)

    def _ours(self) -> Tensor:
        return self.layer(self.z, self.level)[1]

    def _by_cholesky(self) -> Tensor:
        u, log_radius, slope, tangents = self._parts()
        jacobian = tangents + torch.outer(u, slope)
        factor = torch.linalg.cholesky(jacobian.T @ jacobian)
        return len(slope) * log_radius + factor.diagonal().log().sum()

    def _by_solves(self) -> Tensor:
        r"""By :math:`|\det A|\,\lVert A^{-\top} n\rVert`, :math:`n = (-\nabla \log r, 1)`.

        :math:`A = [\partial u, u]` is the Jacobian of polar coordinates at radius one. Without its
        last row and column it is triangular; these are eliminated.
        """
        u, log_radius, slope, tangents = self._parts()
        triangle, row = tangents.split([len(slope), 1])
        reduced = _solve(triangle, u[:-1])
        corner = u[-1] - row[0] @ reduced
        last = (1 + reduced @ slope) / corner
        rest = _solve(triangle, -slope - last * row[0], transposed=True)
        log_det = triangle.diagonal().abs().log().sum() + corner.abs().log()
        log_norm = 0.5 * (rest.square().sum() + last.square()).log()
        return len(slope) * log_radius + log_det + log_norm

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Direction, log-radius, its slope by the coordinates, and the derivatives of u.

        These are u_k cot(theta_i) below the diagonal, minus the product of the sines up to i on
        it, and zero above, times d theta / dz.
        """
        u = self.chart.decode(self.z)
        log_radius, by_direction = value_and_gradient(
            lambda v: self.gauge.log_radius(v, self.level[:, 0]), u
        )
        z, dim = self.z[0], u.shape[1]
        degrees = torch.arange(dim - 1, 1, -1, dtype=z.dtype)
        log_sines = -0.5 * (z[:-1].square() / degrees).log1p()
        azimuth = z[-1:]
        cotangents = torch.cat([z[:-1] / degrees.sqrt(), azimuth.cos() / azimuth.sin()])
        by_angle = torch.cat([-(2 * log_sines).exp() / degrees.sqrt(), torch.ones_like(azimuth)])
        sines = torch.cat([log_sines.cumsum(0).exp(), u[0, -1:]])
        below = torch.outer(u[0], cotangents * by_angle).tril(-1)
        tangents = below.diagonal_scatter(-sines * by_angle)
        return u[0], log_radius, by_direction[0] @ tangents, tangents


def _solve(triangle: Tensor, right: Tensor, transposed: bool = False) -> Tensor:
    system = triangle.T if transposed else triangle
    return torch.linalg.solve_triangular(system, right[:, None], upper=transposed)[:, 0]


def check(surface: Surface) -> float:
    """The greatest relative difference between the routes in float64; raise if it is large."""
    problem = Problem(surface, CHECKED, torch.float64)
    worst = 0.0
    ours = (problem.log_volume(OURS), *problem.step(OURS))
    for route in ROUTES[1:]:
        others = (problem.log_volume(route), *problem.step(route))
        for our, other in zip(ours, others, strict=True):
            difference = (our - other.reshape(our.shape)).norm() / our.norm()
            worst = max(worst, difference.item())
    if not worst < TOLERANCE:
        raise RuntimeError(f"The routes differ by {worst:.1e} at D = {CHECKED}.")
    return worst


def measure(surface: Surface, largest_dense: int, rounds: int) -> Times:
    """Seconds by route and dimension, the least of several rounds through all of them."""
    times: Times = {route: {} for route in ROUTES}
    for _ in range(rounds):
        for dim in FEW + MANY:
            problem = Problem(surface, dim)
            for route in ROUTES if dim in FEW and dim <= largest_dense else (OURS,):
                seconds = least_seconds(partial(problem.step, route), LEAST, SECONDS, MOST)
                times[route][dim] = min(seconds, times[route].get(dim, math.inf))
                print(f"{surface.title}: D = {dim}, {route}: {seconds:.2e} s", flush=True)
    return times


def fitted(times: dict[int, float], low: int, high: int) -> float:
    """Exponent of D fitted to the times between two dimensions."""
    dims = [dim for dim in times if low <= dim <= high]
    return exponent(dims, [times[dim] for dim in dims])


def three_digits(number: float) -> str:
    """A number to three significant digits, without an exponent."""
    return f"{float(f'{number:.3g}'):,.10g}"


def milliseconds(times: Times) -> str:
    """A table of milliseconds, with ratios to ours."""
    rows = []
    for dim, ours in times[OURS].items():
        cells = [f"{dim:,}", three_digits(1000 * ours)]
        for route in ROUTES[1:]:
            other = times[route].get(dim)
            ratio = None if other is None else f"{float(f'{other / ours:.2g}'):,g}"
            cells.append(f"{three_digits(1000 * other)} ({ratio} x)" if other else "")
        rows.append(cells)
    return table(["D", *(f"{route}, ms" for route in ROUTES)], rows, 0)


def exponents(times: Times) -> str:
    """A sentence on the fitted exponents."""
    parts = [
        f"{route} {fitted(times[route], low, high):.2f} (D = {low:,} to {high:,})"
        for route, (low, high) in FITTED.items()
        if sum(low <= dim <= high for dim in times[route]) > 1
    ]
    return "Fitted exponents of D: " + ", ".join(parts) + "."


def page(measured: dict[str, Times], rounds: int, worst: float) -> str:
    """The page of results."""
    introduction = (
        "Value and gradients, by the coordinates and by a parameter, of the log-volume of "
        "`InjectiveComposite([SphereChart(D), RadialSurface(gauge)])`, for one point in float32, "
        f"torch {torch.__version__}, one thread. Times are processor time, the least of {LEAST} "
        f"to {MOST} calls after a first one{f', in {rounds} rounds' if rounds > 1 else ''}. They "
        "scatter, now and then by more than half, where the machine has other work."
    )
    routes = (
        f"*{OURS.capitalize()}* is the layer as it is called, with its checks. "
        f"*{SOLVES.capitalize()}* is the formula |det A| |A^-T n| with the Jacobian A of polar "
        f"coordinates, triangular but for one row and column. *{CHOLESKY}* factors the Gram "
        "matrix of the dense Jacobian, which is written down from its formula: differentiation "
        "would cost more. Autograd differentiates all three. Matrices that outgrow the cache are "
        "allocated afresh, which costs the second route as much as its O(D^2) operations. At D = "
        f"{CHECKED} in float64 they agree to {worst:.0e} in the value and every gradient. In "
        f"brackets: in times of {OURS}."
    )
    sections = [
        "# What the log-volume of a known surface costs",
        "    python -m benchmarks.surfaces.cost --page docs/results/surface_cost.md",
        wrapped(introduction),
        wrapped(routes),
        "![Time against the dimension](../figures/surface_cost.png)",
    ]
    for name, times in measured.items():
        sections += [f"## {SURFACES[name].title}", milliseconds(times), wrapped(exponents(times))]
    return "\n\n".join(sections) + "\n"


def draw_figure(measured: dict[str, Times], path: Path) -> None:
    """Draw the times against the dimension on logarithmic axes, one panel for each surface."""
    styles = {OURS: ("C0", "o"), SOLVES: ("C2", "^"), CHOLESKY: ("C3", "s")}
    figure = new_figure(4.2 * len(measured), 3.9)
    axes = figure.subplots(1, len(measured), squeeze=False, sharey=True)[0]
    for axis, (name, times) in zip(axes, measured.items(), strict=True):
        for route, (colour, marker) in styles.items():
            dims = list(times[route])
            axis.loglog(
                dims,
                [1000 * t for t in times[route].values()],
                color=colour,
                marker=marker,
                markersize=5,
                label=route,
            )
            low, high = FITTED[route]
            if {low, high} <= set(dims):
                power = fitted(times[route], low, high)
                axis.annotate(
                    f"$D^{{{power:.1f}}}$",
                    (dims[-1], 1000 * times[route][dims[-1]]),
                    textcoords="offset points",
                    xytext=(8, -3),
                    color=colour,
                )
        axis.set_title(SURFACES[name].title.split(",")[0].replace("`", ""), fontsize=10)
        axis.set_xlim(60, 5e6)
        axis.set_xlabel("D")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("forward and backward, ms")
    axes[0].legend(fontsize=9)
    save(figure, path)


def main() -> None:
    """Check, measure, print the page and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="page to write, and its figure")
    parser.add_argument("--surfaces", nargs="+", default=list(SURFACES), choices=list(SURFACES))
    parser.add_argument(
        "--largest-dense", type=int, default=max(FEW), help="greatest D of routes with a matrix"
    )
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst = max(check(SURFACES[name]) for name in options.surfaces)
    measured = {
        name: measure(SURFACES[name], options.largest_dense, options.rounds)
        for name in options.surfaces
    }
    publish(page(measured, options.rounds, worst), options.page)
    if options.page is not None:
        draw_figure(measured, beside(options.page))


if __name__ == "__main__":
    main()
