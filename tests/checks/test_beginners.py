"""What somebody who begins does wrong has an answer."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.models import mlp_injection
from torch import nn

import normflows_injective as nfi
from normflows_injective.checkpoints import load_checkpoint, save_checkpoint
from normflows_injective.errors import (
    CheckpointError,
    DtypeError,
    NonFiniteError,
    OptionError,
    UnsupportedModelError,
)


def flow():
    return nfi.InjectiveNormalizingFlow(nf.distributions.DiagGaussian(2), [mlp_injection(3, 2)])


def test_a_name_of_a_file_is_asked_for(tmp_path):
    model = nn.Linear(2, 1)
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match="The path is empty. Name a file"):
            call(model, "")
        with pytest.raises(OptionError, match="path must be a string or a path, got None"):
            call(model, None)
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="it holds 0 bytes"):
        load_checkpoint(model, tmp_path / "empty")


def test_nested_tensors_are_named():
    rows = torch.nested.nested_tensor([torch.ones(3), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(DtypeError, match="got a nested one. Stack rows"):
        flow().log_prob(rows)


def test_a_training_loss_inside_a_functional_transform_is_refused():
    loss, x = nfi.ForwardKLD(flow()), torch.randn(4, 3)

    def of(parameters):
        return torch.func.functional_call(loss, parameters, (x,))

    with pytest.raises(UnsupportedModelError, match=r"cannot be taken inside torch\.func\.grad"):
        torch.func.grad(of)(dict(loss.named_parameters()))


def test_a_model_of_inference_mode_cannot_be_trained():
    with torch.inference_mode():
        model = flow()
    with pytest.raises(UnsupportedModelError, match="under torch.inference_mode"):
        model.forward_kld(torch.randn(4, 3))


def test_the_training_loss_of_discrete_data_is_refused_before_any_data():
    net = nfi.nets.fields.DenseField(2, 3, hidden=(4,))
    with pytest.raises(UnsupportedModelError, match="flow_matching_loss"):
        nfi.ForwardKLD(nfi.AssignmentFlow(net, 2, 3))


def test_samples_name_a_parameter_of_the_base_that_has_diverged():
    model = flow()
    with torch.no_grad():
        model.q0.loc.fill_(float("nan"))
    for log_prob in (True, False):
        with pytest.raises(NonFiniteError, match="The parameter q0.loc has 2 of 2"):
            model.sample(2, log_prob=log_prob)


def test_weights_may_have_gradients():
    weights = torch.ones(4, requires_grad=True)
    flow().forward_kld(torch.randn(4, 3), weights=weights).backward()
    assert weights.grad is not None


@pytest.mark.parametrize("build", [nfi.nets.mlp_autoencoder, nfi.nets.residual_autoencoder])
def test_networks_may_be_mapped_over_single_rows(build):
    net, x = build(4, 2)[0], torch.randn(5, 4)
    dense = torch.func.vmap(torch.func.jacrev(net))(x)
    tangents = torch.eye(4).unsqueeze(1).expand(4, 5, 4)
    columns = [torch.func.jvp(net, (x,), (t.contiguous(),))[1] for t in tangents]
    torch.testing.assert_close(dense, torch.stack(columns, 2))
    torch.testing.assert_close(torch.func.vmap(net)(x), net(x))
