"""Draw densities on the globe, in orthographic projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import normflows_injective as nfi

from .earth_data import on_sphere

__all__ = ["View", "draw_globes"]

# Log-densities in nats between which colours change; the uniform law has -2.53.
RANGE = (-7.0, 4.0)
PIXELS = 260


class View(NamedTuple):
    """An orthographic view, by the unit vectors (3,) to the eye, to the east and to the north."""

    eye: Tensor
    east: Tensor
    north: Tensor

    @classmethod
    def towards(cls, direction: Tensor) -> View:
        """View of the hemisphere around a direction (3,), north up."""
        eye = torch.nn.functional.normalize(direction, dim=0)
        axis = torch.tensor([0.0, 0.0, 1.0], dtype=eye.dtype)
        east = torch.nn.functional.normalize(torch.linalg.cross(axis, eye), dim=0)
        return cls(eye, east, torch.linalg.cross(eye, east))

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Plane coordinates (N, 2) of points (N, 3), and whether they are on this side, (N,)."""
        return points @ torch.stack([self.east, self.north], dim=1), points @ self.eye > 0

    def raise_to_sphere(self, plane: Tensor) -> Tensor:
        """Points (N, 3) of this side of the sphere over plane coordinates (N, 2) in the disc."""
        height = (1 - plane.square().sum(1, keepdim=True)).clamp_min(0).sqrt()
        points = plane[:, :1] * self.east + plane[:, 1:] * self.north + height * self.eye
        return torch.nn.functional.normalize(points, dim=1)

    def __str__(self) -> str:
        """Latitude and longitude of the point below the eye."""
        latitude = round(math.degrees(math.asin(float(self.eye[2]))))
        longitude = round(math.degrees(math.atan2(float(self.eye[1]), float(self.eye[0]))))
        return (
            f"{abs(latitude)}°{'S' if latitude < 0 else 'N'} "
            f"{abs(longitude)}°{'W' if longitude < 0 else 'E'}"
        )


def draw_globes(
    fitted: Mapping[str, tuple[nfi.InjectiveNormalizingFlow, Tensor]], path: Path
) -> None:
    """Draw log-densities as colours and test points (N, 3) as dots, both hemispheres of every set.

    Above is the hemisphere with the most points near its centre, below the other one.
    """
    figure = plt.figure(figsize=(3.0 * len(fitted), 6.5), layout="constrained")
    axes = figure.subplots(2, len(fitted), squeeze=False)
    image: Any = None
    for column, (title, (model, points)) in zip(axes.T, fitted.items(), strict=True):
        centre = _busiest_direction(points)
        for axis, direction in zip(column, (centre, -centre), strict=True):
            view = View.towards(direction)
            image = _draw_globe(axis, model, points, view)
            axis.set_title(f"{title}, around {view}", fontsize=9)
    bar = figure.colorbar(
        image, ax=axes, orientation="horizontal", shrink=0.5, aspect=50, extend="both"
    )
    bar.set_label("log-density in nats (uniform: -2.53); dots: test points", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    # A palette keeps the file small, at the price of slight bands in the colours.
    flat = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    flat.save(path, optimize=True)


def _busiest_direction(points: Tensor) -> Tensor:
    """The direction (3,) at 15 degrees north with the most points (N, 3) within 60 degrees."""
    longitudes = np.arange(-180, 180, 5)
    places = np.stack([np.full(longitudes.shape, 15), longitudes], axis=1)
    directions = on_sphere(np.deg2rad(places)).to(points)
    return directions[(points @ directions.T > 0.5).sum(0).argmax()]


def _draw_globe(axis: Any, model: nfi.InjectiveNormalizingFlow, points: Tensor, view: View) -> Any:
    ticks = torch.linspace(-1, 1, PIXELS)
    plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=2).reshape(-1, 2)
    inside = plane.square().sum(1) < 1
    colours = torch.full((len(plane),), math.nan)
    with torch.no_grad():
        chunks = view.raise_to_sphere(plane[inside]).split(4096)
        colours[inside] = torch.cat([model.log_prob(chunk) for chunk in chunks])
    image = axis.imshow(
        colours.reshape(PIXELS, PIXELS).numpy(),
        extent=(-1, 1, -1, 1),
        origin="lower",
        cmap="magma",
        vmin=RANGE[0],
        vmax=RANGE[1],
    )
    for line in _graticule():
        flat, near = view.project(line)
        flat[~near] = math.nan
        axis.plot(*flat.T.numpy(), color="white", linewidth=0.5, alpha=0.4)
    flat, near = view.project(points)
    size = min(6.0, max(1.2, 1000 / len(points)))
    axis.scatter(*flat[near].T.numpy(), s=size, color="#5ef2ff", linewidths=0, alpha=0.8)
    axis.add_patch(plt.Circle((0, 0), 1, fill=False, color="black", linewidth=0.8))
    axis.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), aspect="equal")
    axis.set_axis_off()
    return image


def _graticule() -> list[Tensor]:
    """Parallels and meridians every 30 degrees, each as points (N, 3)."""
    degrees = np.arange(-180, 181, 3)
    lines = [(np.full(degrees.shape, parallel), degrees) for parallel in range(-60, 61, 30)]
    lines += [(degrees / 2, np.full(degrees.shape, meridian)) for meridian in range(-180, 180, 30)]
    return [on_sphere(np.deg2rad(np.stack(line, axis=1))).float() for line in lines]
