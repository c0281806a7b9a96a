"""Labels, masks, options and networks that assignment flows refuse by name."""

from __future__ import annotations

import math

import pytest
import torch
from support.assignment_flows import dense_flow
from support.assignment_oracles import FieldOf
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import DtypeError, NonFiniteError, OptionError, ShapeError
from normflows_injective.flows import SimplexLift
from normflows_injective.flows.assignment import (
    FiniteHorizon,
    InfiniteHorizon,
    Simplices,
    choose_horizon,
)
from normflows_injective.nets.fields import DenseField

# --- errors --------------------------------------------------------------------------------------


def test_labels_that_are_none():
    flow = nfi.AssignmentFlow(DenseField(2, 3, (4,)), 2, [2, 3])
    for call in (flow.flow_matching_loss, flow.loss_terms, flow.log_prob):
        with pytest.raises(
            OptionError,
            match=r"labels has 2 of 4 entries out of range, the first at index \[0, 0\]: 2, where "
            r"variable 0 has classes 0 to 1\. Count classes from 0, and give missing entries by "
            "mask=",
        ):
            call(torch.tensor([[2, 0], [1, -1]]))
        with pytest.raises(DtypeError, match=r"labels must be integers .*float32\. Convert"):
            call(torch.zeros(2, 2))
        with pytest.raises(ShapeError, match=r"labels must have shape \(B, 2\), got \(2, 3\)"):
            call(torch.zeros(2, 3, dtype=torch.long))
        with pytest.raises(ShapeError, match=r"got \(2, 2, 3\)\. If these are one-hot rows, conv"):
            call(torch.zeros(2, 2, 3))
        with pytest.raises(ShapeError, match="labels is an empty batch"):
            call(torch.zeros(0, 2, dtype=torch.long))
        with pytest.raises(DtypeError, match=r"labels must be a torch\.Tensor, got list"):
            call([[0, 1]])


def test_masks_that_are_none():
    flow = nfi.AssignmentFlow(DenseField(2, 2, (4,), missing=True), 2, 2, missing=True)
    labels = torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(DtypeError, match=r"mask must be a tensor of booleans, .* torch.int64"):
        flow.flow_matching_loss(labels, mask=labels)
    with pytest.raises(DtypeError, match="true where observed, got list"):
        flow.flow_matching_loss(labels, mask=[[True]])
    with pytest.raises(ShapeError, match=r"shape \(3, 2\) of the labels, got \(3,\)"):
        flow.flow_matching_loss(labels, mask=labels[:, 0].bool())
    with pytest.raises(OptionError, match="Build with missing=True, and the network for one more"):
        dense_flow().flow_matching_loss(labels, mask=labels == 0)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: dense_flow(horizon="open"), "horizon must be one of infinite, finite, an Inf"),
        (lambda: dense_flow(parametrisation="score"), "parametrisation must be one of velocity, "),
        (lambda: dense_flow(features="logits"), "features must be one of posterior, scaled_log"),
        (lambda: nfi.AssignmentFlow(abs, 2, 2), r"net must be a torch\.nn\.Module, got builtin"),
        (lambda: Simplices(2, 1), "at least two classes, got num_classes=1. Leave out"),
        (lambda: Simplices(2, [2, 2, 2]), "num_classes must be one number or 2, one for every"),
        (lambda: Simplices(0, 2), "num_variables must be a positive integer, got 0"),
        (lambda: dense_flow(features=["weights"]), r"features must be one of .*\['weights'\]"),
        (
            lambda: dense_flow(horizon=choose_horizon(2, 2)),
            r"choose_horizon returns, pass \.horiz",
        ),
        (lambda: InfiniteHorizon(scale=0), "scale must be a positive number, got 0"),
        (lambda: InfiniteHorizon(end=math.inf), "end must be a positive number, got inf"),
        (lambda: InfiniteHorizon(time_shape="1"), "time_shape must be a positive number, got '1'"),
        (lambda: FiniteHorizon(end=1.0), r"end must be a number between 0 and 1, got 1\.0"),
        (lambda: FiniteHorizon(smoothing=0), "smoothing must be a number between 0 and 1, got 0"),
        (lambda: choose_horizon(2, 2, 0.0), r"error must be a number between 0 and 1, got 0\.0"),
        (lambda: choose_horizon(2, 2, solver="rk"), "solver must be one of euler, midpoint, rk4"),
        (lambda: dense_flow().sample(0), "num_samples must be a positive integer, got 0"),
        (lambda: dense_flow().sample(2, 0), "steps must be a positive integer, got 0"),
        (lambda: dense_flow().sample(2, [0.0, 9.0]), "times that increase from 0 to 15, got 2"),
        (lambda: dense_flow().sample(2, [1.0, 15.0]), "times that increase from 0 to 15"),
        (lambda: dense_flow().sample(2, [0.0, 9, 8, 15]), "times that increase from 0 to 15"),
        (lambda: dense_flow().sample(2, []), "times that increase from 0 to 15, got 0 times"),
        (lambda: dense_flow().sample(2, solver="dopri5"), "solver must be one of .*'dopri5'"),
        (lambda: dense_flow().sample(2, reading="argmax"), "reading must be one of rounding, mix"),
        (
            lambda: dense_flow().sample(2, reading=["mixture"]),
            "reading must be one of rounding, m",
        ),
        (lambda: dense_flow().layer(divergence="trace"), "divergence must be one of exact, hutch"),
        (lambda: dense_flow().layer(divergence="hutchinson", num_probes=0), "got 0"),
        (lambda: SimplexLift(1, 3, "area"), "measure must be one of"),
        (lambda: SimplexLift(1, 3, off_manifold="ignore"), "off_manifold must be one of"),
    ],
)
def test_options_out_of_range(build, text):
    with pytest.raises(OptionError, match=text):
        build()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_importance_samples": 0}, "num_importance_samples must be a positive integer"),
        ({"max_rows": 0}, "max_rows must be a positive integer"),
        ({"divergence": "trace"}, "divergence must be one of exact, hutchinson, got 'trace'"),
        ({"reading": "argmax"}, "reading must be one of rounding, mixture, got 'argmax'"),
        ({"solver": "dopri5"}, "solver must be one of euler, midpoint, rk4, got 'dopri5'"),
    ],
)
def test_options_of_likelihoods_out_of_range(options, text):
    with pytest.raises(OptionError, match=text):
        dense_flow().log_prob(torch.zeros(1, 2, dtype=torch.long), **options)


def test_networks_that_do_not_fit_are_found_at_construction():
    text = r"one number for every class, shape \(2, 2, 2\) for features of shape \(2, 2, 2\), got "
    with pytest.raises(ShapeError, match=text + r"\(2, 4\)"):
        nfi.AssignmentFlow(FieldOf(lambda x, t: x.flatten(1)), 2, 2)
    with pytest.raises(ShapeError, match=text + "tuple"):
        nfi.AssignmentFlow(FieldOf(lambda x, t: (x, t)), 2, 2)
    with pytest.raises(ShapeError, match=r"built for features of shape \(B, 3, 2\), got \(2, 2,"):
        nfi.AssignmentFlow(DenseField(3, 2, (4,)), 2, 2)
    with pytest.raises(ShapeError, match="missing=True if the model has it"):
        nfi.AssignmentFlow(DenseField(2, 2, (4,)), 2, 2, missing=True)


def test_trying_a_network_changes_nothing_in_it():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout()
            self.drop.eval()

        def forward(self, x, t):
            return self.drop(self.norm(x))

    net = Counting()
    nfi.AssignmentFlow(net, 2, 2)
    assert int(net.norm.num_batches_tracked) == 0
    assert net.norm.training
    assert not net.drop.training


def test_divergence_of_training_is_named():
    flow = nfi.AssignmentFlow(FieldOf(lambda x, t: x / 0), 2, 2)
    with pytest.raises(NonFiniteError, match="flow matching"):
        flow.flow_matching_loss(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(NonFiniteError, match="the logits at the end .* The network has diverged"):
        flow.sample(2, 2)
    with pytest.raises(ShapeError, match=r"z must have shape \(B, 2\), got \(3, 4\)"):
        flow.layer(2)(torch.zeros(3, 4))
