"""Exported programs take any batch, and a user may compile what this package defines."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from support.models import base, coupling
from support.registry import LAYERS, perturb
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import UnsupportedLayerError

METHODS = ["project", "encode", "decode", "forward", "inverse", "reconstruction_error"]
# One of every kind in the quick suite; all others export beside the tests that train.
QUICK = ["free_form_context", "surface_lp", "simplex_lift_ragged", "coupling_spline", "kernel_rbf"]
# It searches a point on every ray by derivatives, in a loop that stops by the values.
NOT_EXPORTED = {"surface_implicit"}


class Calling(nn.Module):
    """One method of a module, or one after the other, as a module."""

    def __init__(self, module, *names):
        super().__init__()
        self.module, self.names = module, names

    def forward(self, value, context=None):
        results = []
        for name in self.names:
            method = getattr(self.module, name)
            value = method(value) if context is None else method(value, context)
            value = value[0] if isinstance(value, tuple) else value
            results.append(value)
        return tuple(results)


def exported(module, *examples):
    """The program of a module, with a batch that may have any size from 2 on."""
    batch = torch.export.Dim("batch", min=2, max=1024)
    shapes = tuple({0: batch} for _ in examples)
    program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
    return program.module()


def networks():
    mlp, residual = (
        nfi.nets.mlp_autoencoder(8, 3, (16,)),
        nfi.nets.residual_autoencoder(8, 3, 16, 1),
    )
    conv = nfi.nets.conv_autoencoder((1, 8, 8), 3, channels=(8,))
    told = nfi.nets.mlp_autoencoder(8, 3, (16,), context_dim=2)
    return {
        "mlp": (mlp, ((8,), (3,)), ()),
        "residual": (residual, ((8,), (3,)), ()),
        "conv": (conv, ((1, 8, 8), (3,)), ()),
        "context": (told, ((8,), (3,)), ((2,),)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", networks())
def test_networks(kind):
    pair, shapes, context = networks()[kind]
    for network, shape in zip(pair, shapes, strict=True):
        four, seven = ([torch.randn(n, *s) for s in (shape, *context)] for n in (4, 7))
        torch.testing.assert_close(exported(network, *four)(*seven), network(*seven))


def a_model(context_dim=0):
    pair = nfi.nets.mlp_autoencoder(5, 2, (16,), context_dim)
    flows = [coupling(2), nfi.flows.FreeFormInjection(*pair), coupling()]
    return nfi.InjectiveNormalizingFlow(base(2), flows).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_methods_of_a_model(name, context_dim):
    model = a_model(context_dim)
    width = 2 if name in ("decode", "forward") else 5
    four, seven = ([torch.randn(n, width)] for n in (4, 7))
    if context_dim:
        four.append(torch.randn(4, context_dim))
        seven.append(torch.randn(7, context_dim))
    program = exported(Calling(model, name), *four)
    torch.testing.assert_close(program(*seven), Calling(model, name)(*seven))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS],
)
def test_every_layer(name):
    if name in NOT_EXPORTED:
        pytest.skip("its loop stops by the values")
    case = LAYERS[name]
    layer = perturb(case.build()).eval()
    has_codes = isinstance(layer, nfi.flows.Injection)
    calling = Calling(layer, *(("decode", "encode") if has_codes else ("forward", "inverse")))
    four, seven = (
        [case.latents(torch.randn(n, *case.latent_shape))]
        + ([torch.randn(n, case.context_dim)] if case.context_dim else [])
        for n in (4, 7)
    )
    calling(*four)  # Kernels have to meet data first.
    program = exported(calling, *four)
    torch.testing.assert_close(program(*seven), calling(*seven), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_layer_that_waits_for_data_is_not_exported_as_if_it_had_met_some():
    layer = nfi.flows.coupling.ActNorm(3)
    with pytest.raises(UnsupportedLayerError, match="first batch"):
        exported(Calling(layer, "inverse"), torch.randn(4, 3))
    layer.inverse(torch.randn(8, 3))
    exported(Calling(layer, "inverse"), torch.randn(4, 3))
    other = nfi.flows.coupling.ActNorm(3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(7, 3)
    program = exported(Calling(other, "inverse"), torch.randn(4, 3))
    torch.testing.assert_close(program(x)[0], layer.inverse(x)[0])


@pytest.mark.parametrize("name", ["project", "encode", "decode"])
def test_onnx(name, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    calling = Calling(a_model(), name)
    width = 2 if name == "decode" else 5
    batch = torch.export.Dim("batch", min=2, max=1024)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        # The exporter's own, of several releases.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            calling,
            (torch.randn(4, width),),
            str(path),
            dynamo=True,
            dynamic_shapes=({0: batch},),
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(7, width)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, calling(x)[0].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CALLS = {
    "ForwardKLD": (lambda model: nfi.ForwardKLD(model), 5),
    "forward_kld": (lambda model: model.forward_kld, 5),
    "log_prob": (lambda model: model.log_prob, 5),
    "project": (lambda model: model.project, 5),
    "forward_and_log_det": (lambda model: model.forward_and_log_det, 2),
    "the model": (lambda model: model, 2),
    "a layer": (lambda model: model.flows[1], 2),
}


# torch's own, where the compiler goes on after a call that it does not trace.
RESUMED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.mark.slow
@RESUMED
@pytest.mark.parametrize("name", CALLS)
def test_what_a_user_compiles_gives_the_same(name, fresh_compiler):
    """Derivatives run as they were written; what stands around them is compiled."""
    model = a_model()
    of_model, width = CALLS[name]
    call, x = of_model(model), torch.randn(6, width)
    compiled = torch.compile(call, backend="eager")
    results = []
    for function in (call, compiled):
        manual_seed(1)
        results.append(function(x))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.slow
@RESUMED
def test_a_compiled_loss_trains_and_names_bad_data(fresh_compiler):
    model = a_model().train()
    compiled = torch.compile(nfi.ForwardKLD(model), backend="eager")
    x = torch.randn(6, 5)
    gradients = []
    for function in (nfi.ForwardKLD(model), compiled):
        model.zero_grad()
        manual_seed(1)
        function(x).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0])
    x[2, 1] = torch.nan
    with pytest.raises(nfi.errors.NonFiniteError, match=r"index \[2, 1\]"):
        compiled(x)


@pytest.mark.slow
def test_projections_are_one_graph(fresh_compiler):
    model = a_model()
    x = torch.randn(6, 5)
    whole = torch.compile(model.project, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), model.project(x))
