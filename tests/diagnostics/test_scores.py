"""Scores of rows against closed forms, float64 copies, and the ranks of exchangeable rows."""

from __future__ import annotations

import copy
import math

import normflows as nf
import pytest
import torch
from support.comparison import close
from support.dense import dense_jacobian
from support.models import base, coupling, mlp_injection, model, perturbed, stacks
from support.trainings import injective
from torch import nn
from torch.distributions import LowRankMultivariateNormal

import normflows_injective as nfi
from normflows_injective.diagnostics.calibrated import rank_p_value
from normflows_injective.errors import (
    ContextError,
    NumericalWarning,
    OffManifoldError,
    OptionError,
)


class PrincipalComponents:
    """Probabilistic principal components, N(m, U diag(l) U^T + s^2 (1 - U U^T)) in R^6."""

    variances = (4.0, 1.5)
    noise = 0.3

    def __init__(self):
        self.directions = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q
        self.mean = torch.randn(6, dtype=torch.float64)

    def law(self, noise_variance):
        remaining = torch.tensor(self.variances, dtype=torch.float64) - noise_variance
        return LowRankMultivariateNormal(
            self.mean,
            self.directions * remaining.sqrt(),
            torch.full((6,), noise_variance, dtype=torch.float64),
        )

    def model(self):
        encoder, decoder = nn.Linear(6, 2).double(), nn.Linear(2, 6).double()
        with torch.no_grad():
            decoder.weight.copy_(self.directions)
            decoder.bias.copy_(self.mean)
            encoder.weight.copy_(self.directions.T)
            encoder.bias.copy_(-self.directions.T @ self.mean)
        q0 = base(2).double()
        q0.log_scale.copy_(torch.tensor([self.variances], dtype=torch.float64).log() / 2)
        return nfi.InjectiveNormalizingFlow(q0, [nfi.flows.FreeFormInjection(encoder, decoder)])


def test_the_tube_of_principal_components_is_their_density():
    truth = PrincipalComponents()
    law = truth.law(truth.noise**2)
    x, reference = law.sample((50,)), law.sample((4000,))
    scores = nfi.score(truth.model(), x, reference)
    # Of 4 * 4000 squares of normals: relative standard error sqrt(2 / 16000) = .011.
    assert abs(scores.tube_variance / truth.noise**2 - 1) < 0.05
    close(scores.tube_score, truth.law(scores.tube_variance).log_prob(x), 1e-9)
    close(scores.condition_number, 1.0, 1e-9)


class Angle(nf.distributions.BaseDistribution):
    """The uniform law of an angle, in float64."""

    def __init__(self):
        super().__init__()
        self.total = nn.Buffer(torch.tensor([2 * math.pi], dtype=torch.float64))

    def forward(self, num_samples=1, context=None):
        z = self.total * (torch.rand(num_samples, 1, dtype=torch.float64) - 0.5)
        return z, self.log_prob(z)

    def log_prob(self, z, context=None):
        return -self.total.log().expand(len(z))


class Circle(nfi.flows.Injection):
    """The unit circle by its angle, with the nearest point as projection."""

    latent_shape, data_shape = (1,), (2,)

    def encode(self, x, context=None):
        return torch.atan2(x[:, 1:], x[:, :1])

    def decode(self, z, context=None):
        return torch.cat([z.cos(), z.sin()], 1)


def polar(radii, angles):
    grid = torch.cartesian_prod(radii, angles)
    return grid[:, :1] * torch.stack([grid[:, 1].cos(), grid[:, 1].sin()], 1)


def test_a_tube_around_a_circle_has_mass_one():
    """A circle bends by 1 + n along its normal n, which is one in the mean over the tube."""
    ours = nfi.InjectiveNormalizingFlow(Angle(), [Circle()])
    angles = torch.linspace(0, 2 * math.pi, 9, dtype=torch.float64)[:-1]
    radii = torch.linspace(0.4, 1.6, 401, dtype=torch.float64)
    reference = polar(1 + 0.06 * torch.randn(50, dtype=torch.float64), angles)
    scores = nfi.score(ours, polar(radii, angles), reference)
    # Deviation .06: the tube ends ten of them from the circle.
    density = scores.tube_score.exp().view(len(radii), len(angles)).mean(1)
    close(torch.trapezoid(2 * math.pi * radii * density, radii), 1.0, 1e-8)


@pytest.mark.parametrize("name", stacks())
def test_scores_are_those_of_the_model_and_of_dense_jacobians(name):
    ours = nfi.InjectiveNormalizingFlow(base(2), perturbed(nn.ModuleList(stacks()[name])))
    ours = ours.double().eval()
    x = torch.randn(9, 5, dtype=torch.float64)
    scores = nfi.score(ours, x)
    close(scores.log_prob, ours.log_prob(x), 1e-12)
    close(scores.reconstruction_error, ours.reconstruction_error(x), 1e-12)
    spectrum = torch.linalg.svdvals(dense_jacobian(ours.decode, ours.encode(x).detach()))
    close(1 / scores.condition_number, spectrum[:, 1] / spectrum[:, 0], 1e-8, absolute=1e-12)
    assert scores.tube_score.isnan().all()
    assert scores.p_value.isnan().all()
    assert math.isnan(scores.tube_variance)
    assert scores.num_reference == 0


def test_distances_and_tubes_are_standardised_and_densities_are_not():
    x, reference = torch.randn(2, 60, 5, dtype=torch.float64)
    scales = torch.tensor([1e-3, 1.0, 50.0, 2.0, 1e4], dtype=torch.float64)
    injection = perturbed(mlp_injection())
    units = nfi.flows.Standardise.fit(reference * scales)
    plain = nfi.InjectiveNormalizingFlow(base(2), [injection]).double()
    ours = nfi.InjectiveNormalizingFlow(base(2), [injection, units]).double()
    scores = nfi.score(ours, x * scales, reference * scales)
    rows, others = (units.inverse(part * scales)[0] for part in (x, reference))
    expected = nfi.score(plain, rows, others)
    for name in ("reconstruction_error", "tube_score", "condition_number", "p_value"):
        close(getattr(scores, name), getattr(expected, name), 1e-7)
    close(scores.log_prob, ours.log_prob(x * scales), 1e-10)
    assert (scores.log_prob - expected.log_prob).abs().min() > 1


def test_the_rounding_error_is_the_distance_to_a_copy_in_double_precision():
    ours = injective()
    x = torch.randn(20, 5)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    scores = nfi.score(ours, x)
    error = scores.log_prob_error
    exact = copy.deepcopy(ours).double().eval().log_prob(x.double()).detach()
    close(error.double(), (scores.log_prob.double() - exact).abs(), 1e-3, absolute=1e-11)
    assert 0 < error.max() < 1e-3
    after = ours.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


def ill_conditioned(smallest, dtype=torch.float32):
    """A bent decoder whose Jacobian has singular values of about 1 and the smallest."""
    encoder, decoder = nn.Linear(4, 2), nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 4))
    with torch.no_grad():
        # The second latent moves x less than the first by the ratio of the two columns.
        decoder[0].weight[:, 1] = decoder[0].weight[:, 0] + smallest * torch.randn(8)
    flows = [nfi.flows.FreeFormInjection(encoder, decoder)]
    return nfi.InjectiveNormalizingFlow(base(2), flows).to(dtype)


@pytest.mark.filterwarnings("ignore:.*rank deficient")
def test_the_rounding_error_grows_with_the_condition_number():
    x = torch.randn(50, 4)
    well, ill = (nfi.score(ill_conditioned(size), x) for size in (1.0, 1e-4))
    assert ill.condition_number.median() > 1e3
    assert ill.log_prob_error.median() > 30 * well.log_prob_error.median()


def test_the_rounding_error_in_double_precision_is_scaled_from_single():
    ours = ill_conditioned(1e-3, torch.float64)
    x = torch.randn(50, 4, dtype=torch.float64)
    scores = nfi.score(ours, x)
    with torch.no_grad():
        single = copy.deepcopy(ours).float().log_prob(x.float()).double()
    expected = (single - scores.log_prob).abs() * 2.0**-29
    close(scores.log_prob_error, expected, 1e-4, absolute=1e-17)


def test_the_rounding_error_of_a_layer_of_one_precision_is_unknown():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 2)

        def forward(self, x):
            return nn.functional.linear(x.float(), self.linear.weight.float())

    flows = [nfi.flows.FreeFormInjection(Single(), nn.Linear(2, 5))]
    scores = nfi.score(nfi.InjectiveNormalizingFlow(base(2), flows), torch.randn(6, 5))
    assert scores.log_prob_error.isnan().all()
    assert scores.log_prob.isfinite().all()


def test_p_values_are_ranks_among_the_reference():
    ours = model()
    x, reference = torch.randn(8, 5), torch.randn(29, 5)
    scores = nfi.score(ours, x, reference)
    errors, others = (ours.reconstruction_error(part).tolist() for part in (x, reference))
    expected = [(1 + sum(other >= error for other in others)) / 30 for error in errors]
    assert scores.p_value.tolist() == expected
    # A row of the reference is as far away as itself.
    ties = nfi.score(ours, reference, reference)
    assert ties.p_value.min() == 2 / 30


def test_p_values_of_exchangeable_rows_are_uniform():
    groups, rows = 2000, 20
    errors = model().reconstruction_error(torch.randn(groups * rows, 5)).view(groups, rows)
    p_values = torch.stack([rank_p_value(group[:1], group[1:]) for group in errors.detach()])
    counts = torch.bincount((p_values * rows).round().long().flatten(), minlength=rows + 1)[1:]
    # Each of 20 values has probability 1/20: 100 expected, standard error sqrt(95) = 9.7.
    assert counts.sum() == groups
    assert (counts - 100).abs().max() < 5 * 9.75


def test_the_share_of_small_p_values_is_their_size():
    scores = nfi.score(model(), torch.randn(1000, 5), torch.randn(1000, 5))
    for level in (0.05, 0.5, 0.9):
        # Ranks in one finite reference add their own binomial error to that of the rows.
        standard_error = (level * (1 - level) * 2 / 1000) ** 0.5
        assert abs(float((scores.p_value <= level).float().mean()) - level) < 4.5 * standard_error


def test_rows_off_the_manifold_have_small_p_values_and_low_tubes():
    truth = PrincipalComponents()
    law = truth.law(truth.noise**2)
    scores = nfi.score(truth.model(), law.sample((50,)) + 2.0, law.sample((199,)))
    assert scores.p_value.max() <= 0.01
    assert scores.tube_score.max() < scores.log_prob.min()


def test_the_local_dimension_counts_directions_above_the_threshold():
    encoder, decoder = nn.Linear(5, 3), nn.Linear(3, 5)
    with torch.no_grad():
        decoder.weight.zero_()
        decoder.weight[:3] = torch.diag(torch.tensor([2.0, 0.2, 0.002]))
    flows = [nfi.flows.FreeFormInjection(encoder, decoder)]
    ours = nfi.InjectiveNormalizingFlow(base(3), flows)
    x = torch.randn(4, 5)
    assert nfi.score(ours, x).local_dim.tolist() == [2, 2, 2, 2]
    assert nfi.score(ours, x, threshold=0.5).local_dim.tolist() == [1, 1, 1, 1]
    assert nfi.score(ours, x, threshold=1e-4).local_dim.tolist() == [3, 3, 3, 3]
    close(nfi.score(ours, x).condition_number, 1000.0, 1e-4)
    with torch.no_grad():
        decoder.weight[:, 2] = 0
    with pytest.warns(NumericalWarning, match="rank deficient") as warned:
        scores = nfi.score(ours, x)
    assert len(warned) == 1
    assert scores.condition_number.isinf().all()
    assert scores.local_dim.tolist() == [2, 2, 2, 2]


def test_many_rows_are_those_of_their_parts():
    ours = injective(context_dim=1).double()
    x, context = torch.randn(1100, 5).double(), torch.rand(1100, 1).double()
    whole = nfi.score(ours, x, x[:30], context, context[:30])
    some = slice(1020, 1030)
    part = nfi.score(ours, x[some], x[:30], context[some], context[:30])
    for name, values in part.to_dict().items():
        close(getattr(whole, name)[some].double(), values, 1e-6, absolute=1e-9)


def test_a_context_is_that_of_each_row():
    ours = injective(context_dim=1).double().eval()
    perturbed(ours)
    x, reference = torch.randn(2, 12, 5).double()
    context, given = torch.rand(2, 12, 1).double()
    scores = nfi.score(ours, x, reference, context, given)
    close(scores.log_prob, ours.log_prob(x, context), 1e-10)
    errors = ours.reconstruction_error(reference, given)
    close(torch.tensor(scores.tube_variance), errors.mean() / 3, 1e-6)
    with pytest.raises(ContextError, match="only x has one. Pass both context= and"):
        nfi.score(ours, x, reference, context)
    with pytest.raises(ContextError, match="without a reference"):
        nfi.score(ours, x, context=context, reference_context=given)
    with pytest.raises(ContextError, match="was built with a context"):
        nfi.score(ours, x)


def test_images():
    pair = nfi.nets.conv_autoencoder((1, 6, 6), 3, (8,))
    ours = nfi.InjectiveNormalizingFlow(base(3), [nfi.flows.FreeFormInjection(*pair)])
    x, reference = torch.rand(2, 6, 1, 6, 6)
    scores = nfi.score(ours, x, reference)
    assert all(values.shape == (6,) for values in scores.to_dict().values())
    close(
        torch.tensor(scores.tube_variance), ours.reconstruction_error(reference).mean() / 33, 1e-4
    )


def test_known_surfaces_have_densities_but_no_tube():
    sphere = nfi.flows.star_like_flow(3)
    x, reference = (nn.functional.normalize(torch.randn(n, 3)) for n in (7, 19))
    scores = nfi.score(sphere, x, reference)
    close(scores.log_prob, sphere.log_prob(x), 1e-5)
    assert (scores.log_prob_error < 1e-4).all()
    assert (scores.reconstruction_error < 1e-10).all()
    assert scores.tube_score.isnan().all()
    assert scores.local_dim.tolist() == [2] * 7
    assert scores.p_value.isfinite().all()
    with pytest.raises(OffManifoldError):
        nfi.score(sphere, 2 * x)


def test_rows_off_a_surface_that_projects_them_have_a_tube_in_its_own_measure():
    directions = nn.functional.normalize(torch.randn(2, 40, 3), dim=2)
    x, reference = directions * (1 + 0.1 * torch.randn(2, 40, 1))
    sphere = nfi.flows.star_like_flow(3, off_manifold="project")
    scores = nfi.score(sphere, x, reference)
    variance = (reference.norm(dim=1) - 1).square().mean()
    close(torch.tensor(scores.tube_variance), variance, 1e-4)
    normal = torch.distributions.Normal(0.0, variance.sqrt())
    expected = sphere.log_prob(x) + normal.log_prob(x.norm(dim=1) - 1)
    close(scores.tube_score, expected, 1e-3)

    simplex = nn.functional.softmax(torch.randn(20, 3), dim=1) * (1 + torch.rand(20, 1))
    for measure, has_tube in (("hausdorff", True), ("lebesgue", False)):
        chart = nfi.flows.SimplexStickBreaking(3, measure=measure, off_manifold="project")
        scores = nfi.score(nfi.InjectiveNormalizingFlow(base(2), [chart]), simplex, simplex)
        assert bool(scores.tube_score.isfinite().all()) == has_tube
        assert scores.p_value.isfinite().all()


def test_injections_without_networks():
    ours = nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.LinearInjection(2, 5), coupling()])
    x = torch.randn(6, 5)
    assert nfi.score(ours, x, torch.randn(20, 5)).tube_score.isfinite().all()
    on_the_plane = ours.sample(20)[0].detach()
    scores = nfi.score(ours, x, on_the_plane)
    assert scores.tube_score.isnan().all()
    close(scores.p_value, 1 / 21, 1e-6)


def test_the_model_is_left_as_it_is():
    waiting = nf.flows.ActNorm((5,))
    ours = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), waiting])
    ours.flows[0].encoder.eval()
    modes = [module.training for module in ours.modules()]
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with torch.inference_mode():
        scores = nfi.score(ours, 3 + torch.randn(10, 5), torch.randn(10, 5))
    assert scores.log_prob.isfinite().all()
    assert [module.training for module in ours.modules()] == modes
    after = ours.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert not waiting.data_dep_init_done


def test_dropout_is_switched_off():
    pair = mlp_injection()
    encoder = nn.Sequential(nn.Dropout(0.5), pair.encoder)
    ours = nfi.InjectiveNormalizingFlow(
        base(2), [nfi.flows.FreeFormInjection(encoder, pair.decoder)]
    )
    x = torch.randn(5, 5)
    first, second = nfi.score(ours, x), nfi.score(ours, x)
    assert torch.equal(first.log_prob, second.log_prob)


def test_only_injective_models_have_scores():
    with pytest.raises(OptionError, match="model must be an InjectiveNormalizingFlow"):
        nfi.score(nf.NormalizingFlow(base(2), [coupling(2)]), torch.randn(3, 2))
    with pytest.raises(OptionError, match="threshold must be a number between 0 and 1, got 2"):
        nfi.score(model(), torch.randn(3, 5), threshold=2)


def test_scores_are_readable():
    scores = nfi.score(model(), torch.randn(40, 5), torch.randn(40, 5))
    text = str(scores)
    assert repr(scores) == text
    for part in ("40 rows, 40 reference rows", "tube_score", "median", "would"):
        assert part in text
    assert max(map(len, text.splitlines())) < 80
    assert list(scores.to_dict()) == [
        "log_prob",
        "log_prob_error",
        "reconstruction_error",
        "tube_score",
        "local_dim",
        "condition_number",
        "p_value",
    ]
    assert all(len(values) == 40 for values in scores.to_dict().values())
    assert "would" not in str(nfi.score(model(), torch.randn(4, 5)))


@pytest.mark.slow
@pytest.mark.parametrize("has_reference", [True, False])
def test_plot_without_touching_pyplot(has_reference, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra [plot]")
    reference = torch.randn(40, 5) if has_reference else None
    nfi.score(model(), torch.randn(40, 5), reference).plot().savefig(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 10_000
