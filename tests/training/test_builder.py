"""An injective flow for a table in one call."""

from __future__ import annotations

import pytest
import torch
from support.trainings import surface

import normflows_injective as nfi
from normflows_injective.flows.coupling import NetworkCoupling
from normflows_injective.training import fit, injective_flow

UNITS = torch.tensor([1e-3, 1.0, 50.0, 1e4, 1.0])
SHIFTS = torch.tensor([0.0, 5.0, -100.0, 1e5, 0.0])


@pytest.mark.slow
def test_a_table_in_any_units_is_trained_as_one_without():
    plain, x = surface(600), surface(600) * UNITS + SHIFTS
    model = injective_flow(x, 2, hidden=(32,), num_couplings=2)
    result = fit(model, x, steps=600)
    assert result.phases[0].after < result.phases[0].before
    samples, log_q = model.sample(50)
    assert samples.shape == (50, 5)
    torch.testing.assert_close(model.log_prob(samples).shape, log_q.shape)
    # The units of the columns are those of the data again.
    spread = samples.detach().std(0) / UNITS / plain.std(0)
    assert float(spread.min()) > 0.1
    assert float(spread.max()) < 10


@pytest.mark.parametrize("num_rows", [8, 500])
def test_a_model_starts_from_the_principal_components_of_its_units(num_rows):
    x = (surface(num_rows) * UNITS + SHIFTS).double()
    model = injective_flow(x, 2).double()
    standardised = nfi.flows.Standardise.fit(x).inverse(x)[0]
    scales = torch.linalg.svdvals(standardised - standardised.mean(0))
    expected = scales[2:].square().sum() / num_rows
    error = model.reconstruction_error(x, standardised=True).detach().mean()
    torch.testing.assert_close(error, expected, rtol=1e-4, atol=0)
    codes = model.encode(x).detach()
    torch.testing.assert_close(codes.std(0, correction=0), codes.new_ones(2), rtol=1e-4, atol=0)


def test_more_latents_than_rows_and_columns_without_variance():
    x = torch.zeros(3, 8)
    x[:, 0] = torch.arange(3)
    encoder, decoder = nfi.nets.principal_autoencoder(x, 5, hidden=(4,))
    torch.testing.assert_close(decoder(encoder(x)), x, atol=1e-5, rtol=0)
    directions = decoder.linear.weight / decoder.linear.weight.norm(dim=0)
    torch.testing.assert_close(directions.T @ directions, torch.eye(5), atol=1e-5, rtol=0)


def test_few_rows_are_never_worse_than_principal_components():
    x = surface(60)
    model = injective_flow(x, 2, num_couplings=2)
    held_out = surface(200)[60:]
    before = model.reconstruction_error(held_out, standardised=True).detach().mean()
    fit(model, x, steps=60, validation=held_out)
    after = model.reconstruction_error(held_out, standardised=True).detach().mean()
    # The joint phase may give three percent for the density.
    assert float(after) <= 1.03 * float(before)


def test_the_scale_of_the_codes_goes_into_the_layer_next_to_the_injection():
    x = surface(300)
    model = injective_flow(x, 2, num_couplings=2)
    fit(model, x, steps=100)
    units = model.latent_block[-1]
    codes = units.inverse(model.encode(x))[0].detach()
    assert float(codes.mean(0).abs().max()) < 0.5
    assert 0.5 < float(codes.std(0).min()) < float(codes.std(0).max()) < 2


@pytest.mark.parametrize("latent_density", ["mixed", "matching"])
@pytest.mark.parametrize("latent_dim", [1, 3])
def test_every_number_of_dimensions_has_a_density(latent_dim, latent_density):
    x = surface(100)
    model = injective_flow(x, latent_dim, latent_density=latent_density, num_couplings=2)
    phases = [phase.name for phase in fit(model, x, steps=10).phases]
    joint = ["joint"] if latent_density == "mixed" else []
    assert phases == ["reconstruction", "latent density", *joint]
    assert model.log_prob(x).isfinite().all()


def test_few_rows_get_the_density_that_does_not_overfit():
    kinds = [type(injective_flow(surface(n), 2).flows[0]) for n in (1999, 2000)]
    assert kinds == [nfi.flows.FlowMatching, NetworkCoupling]
    with pytest.raises(nfi.errors.OptionError, match="kind must be one of"):
        injective_flow(surface(50), 2, latent_density="bent")


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


def test_a_table_of_one_row_repeated_is_refused():
    with pytest.raises(nfi.errors.NotInjectiveError, match="All rows of data are the same"):
        injective_flow(torch.ones(50, 4), 2)
