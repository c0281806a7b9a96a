"""An injective flow for a table in one call."""

from __future__ import annotations

import pytest
import torch
from support.trainings import surface

import normflows_injective as nfi
from normflows_injective.training import fit, injective_flow

UNITS = torch.tensor([1e-3, 1.0, 50.0, 1e4, 1.0])
SHIFTS = torch.tensor([0.0, 5.0, -100.0, 1e5, 0.0])


@pytest.mark.slow
def test_a_table_in_any_units_is_trained_as_one_without():
    plain, x = surface(300), surface(300) * UNITS + SHIFTS
    model = injective_flow(x, 2, hidden=(32,), num_couplings=2)
    result = fit(model, x, steps=200)
    assert result.phases[0].after < result.phases[0].before
    samples, log_q = model.sample(50)
    assert samples.shape == (50, 5)
    torch.testing.assert_close(model.log_prob(samples).shape, log_q.shape)
    # The units of the columns are those of the data again.
    spread = samples.detach().std(0) / UNITS / plain.std(0)
    assert float(spread.min()) > 0.1
    assert float(spread.max()) < 10


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_every_number_of_dimensions_has_a_density(latent_dim):
    x = surface(100)
    model = injective_flow(x, latent_dim, num_couplings=2)
    assert len(fit(model, x, steps=10).phases) == 3
    assert model.log_prob(x).isfinite().all()


def test_images_are_served_by_convolutions():
    images = torch.rand(20, 1, 8, 8)
    model = injective_flow(images, 3, num_couplings=2)
    fit(model, images, steps=6)
    assert model.sample(2)[0].shape == (2, 1, 8, 8)


def test_a_context_reaches_networks_and_density():
    x, context = surface(60), torch.rand(60, 2)
    model = injective_flow(x, 2, context_dim=2, num_couplings=2)
    fit(model, x, context=context, steps=6)
    with pytest.raises(nfi.errors.ContextError):
        model.sample(2)


class Frame:
    """As much of a data frame as is read."""

    columns = ("height", "width", "depth", "mass", "price")

    def __init__(self, values):
        self.values = values

    def to_numpy(self):
        return self.values


def test_columns_of_a_frame_keep_their_names():
    model = injective_flow(Frame(surface(50).numpy()), 2)
    units = model.flows[-1]
    assert [column.name for column in units.columns] == list(Frame.columns)


def test_what_cannot_be_built_is_refused_by_name():
    x = surface(20)
    with pytest.raises(nfi.errors.NotInjectiveError, match="less than the 5 dimensions"):
        injective_flow(x, 5)
    with pytest.raises(nfi.errors.ShapeError, match="rows .* or images"):
        injective_flow(torch.rand(20, 3, 4), 2)
    with pytest.raises(nfi.errors.NonFiniteError):
        injective_flow(x * torch.nan, 2)
