"""Whatever comes in: a finite answer or one of the documented errors, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import base, mlp_injection, spline
from support.seeds import manual_seed, properties, seeded_generator

import normflows_injective as nfi

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
SPECIAL = [0.0, -0.0, 1e-45, 1e-30, 1e30, 3e38, float("nan"), float("inf"), -float("inf")]
METHODS = ["forward_kld", "log_prob", "inverse", "project", "reconstruction_error", "loss_terms"]


def tensors():
    shapes = st.lists(st.sampled_from([0, 1, 2, 4, 5, 6]), max_size=3)
    return st.builds(
        _tensor,
        st.one_of(shapes, st.sampled_from([[3, 5], [1, 5], [8, 5]])),
        st.sampled_from(DTYPES),
        st.floats(-6, 6),
        st.lists(st.sampled_from(SPECIAL), max_size=2),
        st.integers(0, 2**16),
    )


def _tensor(shape, dtype, exponent, special, seed):
    generator = seeded_generator(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 10**exponent
    for position, value in enumerate(special):
        if position < x.numel():
            x.view(-1)[position] = value
    return x.nan_to_num().to(dtype) if dtype in (torch.int64, torch.bool) else x.to(dtype)


@pytest.fixture(scope="module")
def model():
    manual_seed(0)
    return nfi.InjectiveNormalizingFlow(base(2), [spline(), mlp_injection()])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@properties()
@given(x=tensors())
def test_a_finite_answer_or_a_documented_error(model, method, x):
    before = x.clone()
    try:
        result = getattr(model, method)(x)
    except (nfi.errors.InjectiveFlowError, nfi.errors.NumericalWarning):
        pass
    else:
        assert x.shape[1:] == (5,)
        assert x.dtype == torch.float32
        if method == "forward_kld":
            assert torch.isfinite(result)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.slow
@properties()
@given(
    context=tensors(),
    num_samples=st.integers(1, 4),
)
def test_any_context_gives_samples_or_a_documented_error(context, num_samples):
    model = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(context_dim=5)])
    try:
        samples, _ = model.sample(num_samples, context=context, log_prob=False)
    except nfi.errors.InjectiveFlowError:
        pass
    else:
        assert samples.shape == (num_samples, 5)
        assert context.shape == (num_samples, 5)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_log_prob_follows_the_scale_of_the_data(scale):
    """Scaling the decoder by c moves the log-density by -d log c at every size of the data."""
    injection = nfi.flows.LinearInjection(2, 5)
    unit = nfi.InjectiveNormalizingFlow(base(2), [injection])
    z = torch.randn(4, 2)
    expected = unit.log_prob(unit.forward(z))
    injection.weight.data *= scale
    shift = 2 * torch.tensor(scale, dtype=torch.float64).log()
    actual = unit.log_prob(unit.forward(z))
    torch.testing.assert_close(actual.double(), expected.double() - shift, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@properties()
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    exponent=st.floats(0, 5),
    seed=st.integers(0),
)
def test_log_volume_of_any_matrix(rows, columns, exponent, seed):
    generator = seeded_generator(seed % 2**32)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    matrix = matrix * torch.logspace(0, -exponent, columns, dtype=torch.float64)
    z = torch.zeros(1, columns, dtype=torch.float64)
    if rows < columns:
        with pytest.raises(nfi.errors.NotInjectiveError):
            nfi.volume.log_volume(lambda s: s @ matrix.T, z)
        return
    actual = nfi.volume.log_volume(lambda s: s @ matrix.T, z)
    expected = torch.linalg.svdvals(matrix).log().sum().unsqueeze(0)
    torch.testing.assert_close(actual, expected, atol=1e-8, rtol=1e-8)
