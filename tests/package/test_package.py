"""The package as a whole: registration, global state, public surface, networks."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.paths import run_code

import normflows_injective as nfi


@pytest.fixture
def host():
    """normflows' namespaces, put back as they were."""
    spaces = (nf, nf.flows, nf.nets, nf.distributions)
    before = [dict(vars(space)) for space in spaces]
    yield
    for space, names in zip(spaces, before, strict=True):
        for name in set(vars(space)) - set(names):
            delattr(space, name)


def unregister():
    for name in nfi.flows.__all__:
        vars(nf.flows).pop(name, None)
    for name in nfi.nets.__all__:
        vars(nf.nets).pop(name, None)
    for name in set(nfi.distributions.__all__) - {"DiagGaussian"}:
        vars(nf.distributions).pop(name, None)
    for name in (
        "AssignmentFlow",
        "InjectiveNormalizingFlow",
        "SurrogateLikelihood",
        "ExactLikelihood",
        "ForwardKLD",
    ):
        vars(nf).pop(name, None)


def test_register_hangs_the_components_on_the_host_and_is_idempotent(host):
    unregister()
    nfi.register()
    nfi.register()
    assert nf.InjectiveNormalizingFlow is nfi.InjectiveNormalizingFlow
    assert nf.flows.FreeFormInjection is nfi.flows.FreeFormInjection
    assert nf.nets.mlp_autoencoder is nfi.nets.mlp_autoencoder


def test_register_refuses_to_overwrite_and_then_registers_nothing(host):
    unregister()
    nf.flows.Pad = object()
    with pytest.raises(nfi.errors.RegistrationError, match="normflows.flows.Pad exists"):
        nfi.register()
    assert not hasattr(nf, "InjectiveNormalizingFlow")


@pytest.mark.slow
def test_import_and_use_change_nothing_global():
    script = """
import warnings, torch, normflows as nf
before = (torch.get_default_dtype(), torch.get_rng_state().clone(), list(warnings.filters),
          torch.distributions.Distribution._validate_args, set(vars(torch.nn)), set(vars(nf)),
          set(vars(nf.flows)), torch.is_grad_enabled())
import normflows_injective as nfi
encoder, decoder = nfi.nets.mlp_autoencoder(5, 2)
state = torch.get_rng_state().clone()
nfi.InjectiveNormalizingFlow(nf.distributions.DiagGaussian(2), [
    nfi.flows.FreeFormInjection(encoder, decoder)])
assert torch.equal(state, torch.get_rng_state()), "constructing a model draws random numbers"
torch.set_rng_state(before[1])
after = (torch.get_default_dtype(), torch.get_rng_state().clone(), list(warnings.filters),
         torch.distributions.Distribution._validate_args, set(vars(torch.nn)), set(vars(nf)),
         set(vars(nf.flows)), torch.is_grad_enabled())
for b, a in zip(before, after):
    assert torch.equal(b, a) if isinstance(b, torch.Tensor) else b == a, (b, a)
"""
    done = run_code(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_pyro_is_needed_by_its_part_only():
    script = """
import sys
sys.modules["pyro"] = None  # as if it were not installed
import normflows_injective as nfi
try:
    import normflows_injective.pyro
except ImportError as error:
    assert "pip install normflows-injective[pyro]" in str(error), error
else:
    raise SystemExit("imported without Pyro")
assert "pyro" not in dir(nfi)
try:
    nfi.pyro.AutoFlow
except ImportError as error:
    assert "pip install normflows-injective[pyro]" in str(error), error
else:
    raise SystemExit("found without Pyro")
"""
    done = run_code(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_part_for_pyro_is_loaded_when_it_is_asked_for():
    pytest.importorskip("pyro", reason="Pyro is not installed")
    script = """
import sys
import normflows_injective as nfi
assert "pyro" in dir(nfi) and "AssignmentFlow" in dir(nfi)
from normflows_injective import *
assert "pyro" not in sys.modules
try:
    nfi.pyros
except AttributeError as error:
    assert "module 'normflows_injective' has no attribute 'pyros'" in str(error)
import normflows_injective
assert nfi.pyro.AutoFlow is sys.modules["normflows_injective.pyro"].AutoFlow
from normflows_injective import pyro
assert pyro is nfi.pyro
"""
    done = run_code(script)
    assert done.returncode == 0, done.stderr


def test_errors_are_also_the_built_in_ones():
    assert issubclass(nfi.errors.ShapeError, ValueError)
    assert issubclass(nfi.errors.DtypeError, TypeError)
    assert issubclass(nfi.errors.NumericalWarning, RuntimeWarning)
    assert issubclass(nfi.errors.CheckpointError, nfi.errors.InjectiveFlowError)


@pytest.mark.parametrize("size", [7, 8, 28, 30, 33])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_convolutional_pairs_fit_any_image_size(size, context_dim):
    shape = (3, size, size - 1)
    encoder, decoder = nfi.nets.conv_autoencoder(shape, 4, (8, 16), context_dim)
    context = torch.randn(2, context_dim) if context_dim else None
    z = encoder(torch.randn(2, *shape), context)
    assert z.shape == (2, 4)
    assert decoder(z, context).shape == (2, *shape)


def test_convolutional_pairs_refuse_too_many_halvings():
    with pytest.raises(nfi.errors.OptionError, match="8x8 can be halved 3 times, got 4 entries"):
        nfi.nets.conv_autoencoder((1, 8, 8), 4, (8, 8, 8, 8))


@pytest.mark.parametrize("channels", [(8,), (8, 16), (16, 32, 64)])
def test_no_group_of_the_normalisation_is_constant(channels):
    """A group of one value would be normalised to zero, and the map would lose its injectivity."""
    encoder, _ = nfi.nets.conv_autoencoder((1, 8, 8), 2, channels)
    a, b = encoder(torch.randn(2, 1, 8, 8))
    assert not torch.allclose(a, b)


def test_residual_networks_start_linear():
    net = nfi.nets.ResidualMLP(3, 2, width=8, num_blocks=3).double()
    a, b = torch.randn(2, 4, 3, dtype=torch.float64)
    zero = net(torch.zeros_like(a))
    torch.testing.assert_close(net(a + b) - zero, (net(a) - zero) + (net(b) - zero))


def test_networks_are_smooth():
    """The surrogate learns curvature through second derivatives."""
    for net in (*nfi.nets.mlp_autoencoder(3, 2), *nfi.nets.residual_autoencoder(3, 2)):
        for parameter in net.parameters():
            parameter.data.uniform_(-0.5, 0.5)
        point = torch.randn(net.input_shape)
        hessian = torch.autograd.functional.hessian(
            lambda s, n=net: n(s.unsqueeze(0)).sum(), point
        )
        assert hessian.abs().max() > 1e-6
