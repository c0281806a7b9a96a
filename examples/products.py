"""A table whose columns lie on manifolds: an angle, a place, a composition and plain numbers.

    python examples/products.py [--seconds 40] [--out out]

Change COLUMNS and weather() to your own columns. The script trains one flow of all of them, prints
its held-out score beside that of one flow for each column, and draws the wind of warm and of cold
days. A minute of one core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import normflows_injective as nfi

# One word for every column; `help(nfi.flows.product_flow)` lists them.
COLUMNS = {
    "wind": "circle:360",
    "place": "sphere",
    "soil": "simplex:3",
    "temperature": "real",
    "rain": "positive",
}


def weather(num: int) -> dict[str, Tensor]:
    """Invented days: places, their soils, and weather that turns with the season."""
    season = 2 * math.pi * torch.rand(num)
    latitude, longitude = 48 + 4 * torch.randn(num), 11 + 8 * torch.randn(num)
    temperature = 30 - 0.4 * latitude + 10 * season.sin() + 2 * torch.randn(num)
    # Warm days have wind from the south or the west, cold ones from the north.
    warm = torch.sigmoid(temperature - 10)
    is_west = torch.rand(num) < 0.4
    south = torch.where(is_west, 270.0, 180.0)
    wind = torch.where(torch.rand(num) < warm, south, torch.zeros(num)) + 20 * torch.randn(num)
    soil = torch.stack([0.1 * latitude, 0.3 * temperature, torch.full((num,), 4.0)], 1)
    rain = (0.5 * torch.randn(num) + is_west.float() - 0.02 * temperature).exp()
    return {
        "wind": torch.remainder(wind, 360),
        "place": nfi.points.directions_from_lat_lon(latitude, longitude),
        "soil": (0.3 * soil + 0.3 * torch.randn(num, 3)).softmax(1),
        "temperature": temperature,
        "rain": rain,
    }


def score(columns: dict[str, str], seconds: float, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Train a flow of some columns, and give it with log-densities of fresh days in nats."""
    torch.manual_seed(seed)
    train, test = weather(5000), weather(2000)
    flow = nfi.flows.product_flow(columns, train)
    nfi.training.fit(flow.model, flow.rows(train), seconds=seconds)
    with torch.no_grad():
        return flow, flow.log_prob(test)


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="processor time in all")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flow, joint = score(COLUMNS, options.seconds / 2)
    print(flow.surface)
    share = options.seconds / 2 / len(COLUMNS)
    alone = torch.stack([score({name: word}, share)[1] for name, word in COLUMNS.items()]).sum(0)
    gain = joint - alone
    print("\nheld-out log-density of a day, in nats")
    print(f"one flow of all columns {joint.mean():.2f}, one for each {alone.mean():.2f}")
    print(f"gain {gain.mean():.2f} +- {gain.std() / math.sqrt(len(gain)):.2f}")
    with torch.no_grad():
        sample, _ = flow.sample(4000)
    figure, axes = plt.subplots(1, 2, subplot_kw={"projection": "polar"}, figsize=(8, 4.2))
    for axis, days, title in zip(axes, (weather(4000), sample), ("days", "samples"), strict=True):
        warm = days["temperature"] > days["temperature"].median()
        for rows, name, colour in ((warm, "warmer half", "C3"), (~warm, "colder half", "C0")):
            axis.hist(
                torch.deg2rad(days["wind"][rows]).numpy(),
                bins=36,
                alpha=0.6,
                label=name,
                color=colour,
            )
        axis.set_theta_zero_location("N")
        axis.set_theta_direction(-1)
        axis.set_yticks([])
        axis.set_title(f"direction of the wind, {title}")
    axes[0].legend(loc="lower left", bbox_to_anchor=(-0.25, -0.1))
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "products.png", dpi=110, bbox_inches="tight")
    print(f"\nwrote {options.out / 'products.png'}")


if __name__ == "__main__":
    main()
