"""The contract of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import normflows as nf
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from ..errors import ContextError, ShapeError
from ..flows.injection import Injection
from .oracles import dense_log_volume, require, require_close


class LayerCase(NamedTuple):
    r"""A layer, and arguments with which its contract is checked.

    Attributes:
        layer: Layer of normflows, of this package or your own, with parameters that are neither
            all zero nor special otherwise.
        z: At least three different latents of its domain, shape :math:`(B, *)`.
        context: One row per sample, if the layer takes a context.
        has_inverse: Whether ``inverse`` inverts ``forward``, which the encoder of an untrained
            pair of networks does not.
        log_measure: The log-density of the layer's measure against the surface's own, at points
            :math:`(B, *)`; None for the surface's own.
    """

    layer: nn.Module
    z: Tensor
    context: Tensor | None = None
    has_inverse: bool = True
    log_measure: Callable[[Tensor], Tensor] | None = None

    def forward(self, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, *) and log-dets (B,) of latents (B, *)."""
        x, log_det = self.layer(self.z if z is None else z, self.context)
        return x, log_det

    def decode(self, z: Tensor) -> Tensor:
        """Data (B, *) of latents (B, *)."""
        return self.forward(z)[0]

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, *) and log-dets (B,) of data (B, *)."""
        layer: Any = self.layer
        z, log_det = layer.inverse(x, self.context)
        return z, log_det

    def agree(self, actual: Tensor, expected: Tensor, contract: str) -> None:
        """Raise AssertionError unless tensors agree as well as their dtype allows."""
        require_close(actual, expected, contract, self.z)

    def row(self, index: int) -> LayerCase:
        """The case of one sample."""
        context = None if self.context is None else self.context[index : index + 1]
        return self._replace(z=self.z[index : index + 1], context=context)

    def to(self, dtype: torch.dtype) -> LayerCase:
        """The case in another dtype; the layer is a copy."""
        context = None if self.context is None else self.context.to(dtype)
        layer = copy.deepcopy(self.layer).to(dtype)
        return self._replace(layer=layer, z=self.z.to(dtype), context=context)


def check_layer(
    layer: nn.Module,
    z: Tensor,
    context: Tensor | None = None,
    *,
    has_inverse: bool = True,
    log_measure: Callable[[Tensor], Tensor] | None = None,
) -> None:
    r"""Check the whole contract of a layer.

    Args:
        layer: Layer whose parameters are not special, such as all zero.
        z: At least three different latents of its domain, shape :math:`(B, *)`, in float64.
        context: One row per sample, if the layer takes a context.
        has_inverse: Whether ``inverse`` inverts ``forward``.
        log_measure: See :class:`LayerCase`.

    Raises:
        AssertionError: If the contract is broken, saying where.

    References:
        ``docs/contributing.md`` of this package; the contract of normflows' ``Flow``.

    Examples:
        >>> class Graph(Injection):
        ...     def encode(self, x, context=None):
        ...         return x[:, :-1]
        ...     def decode(self, z, context=None):
        ...         return torch.cat([z, z.square().sum(1, keepdim=True)], dim=1)
        >>> check_layer(Graph(), torch.randn(3, 2, dtype=torch.float64))
    """
    case = LayerCase(layer, z, context, has_inverse, log_measure)
    for check in LAYER_CHECKS:
        check(case)


def check_returned_shapes(case: LayerCase) -> None:
    """A layer is a flow of normflows, and gives one log-det per sample in both directions."""
    require(isinstance(case.layer, nf.flows.Flow), "a layer derives from nf.flows.Flow")
    x, log_det = case.forward()
    rows = case.z.shape[:1]
    require(log_det.shape == rows, f"forward gives log_det of shape {tuple(rows)}")
    z, log_det = case.inverse(x.detach())
    require(z.shape == case.z.shape, "inverse gives latents of the shape that forward took")
    require(log_det.shape == rows, f"inverse gives log_det of shape {tuple(rows)}")


def check_round_trip(case: LayerCase) -> None:
    """The inverse returns the latents, with the opposite log-det."""
    if not case.has_inverse:
        return
    x, log_det = case.forward()
    z, inverse_log_det = case.inverse(x.detach())
    case.agree(z, case.z, "inverse returns the latents of forward")
    case.agree(inverse_log_det, -log_det, "log-dets of the two directions are opposite")


def check_log_volume(case: LayerCase) -> None:
    """The log-det is the log-volume of the dense Jacobian of each sample."""
    for index in range(case.z.shape[0]):
        one = case.row(index)
        x, log_volume = one.forward()
        expected = dense_log_volume(one.decode, one.z)
        if case.log_measure is not None:
            expected = expected + case.log_measure(x.detach().double())
        case.agree(log_volume.double(), expected, "log_det is 1/2 log det J^T J")


def check_log_volume_of_the_inverse(case: LayerCase) -> None:
    """The inverse gives minus the log-volume at the point that it encodes to."""
    x = case.forward()[0].detach()
    z, log_det = case.inverse(x)
    expected = -case.forward(z)[1]
    case.agree(log_det, expected, "inverse gives minus the log-volume at its latents")


def check_gradients(case: LayerCase) -> None:
    """Value and log-det can be differentiated twice by the latents."""
    case = case.to(torch.float64)
    z = case.z.detach().clone().requires_grad_()

    def forward(z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = case.forward(z)
        # The checks of torch pass over a result without a graph.
        return x, log_det + 0 * z.flatten(1).sum(1)

    require(gradcheck(forward, (z,)), "first derivatives are right")
    require(gradgradcheck(forward, (z,)), "second derivatives are right")


def check_forward_mode(case: LayerCase) -> None:
    """Forward mode agrees with reverse mode, because layers after an injection are pushed so."""
    layer: Any = case.layer
    # An injection differentiates itself for its log-volume.
    is_injection = isinstance(layer, Injection)

    def decode(z: Tensor) -> Tensor:
        return layer.decode(z, case.context) if is_injection else case.forward(z)[0]

    jvp: Any = torch.func.jvp
    tangent = torch.randn_like(case.z)
    x, product = jvp(decode, (case.z,), (tangent,))
    cotangent = torch.randn_like(x)
    z = case.z.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(decode(z), z, cotangent)
    actual, expected = (product * cotangent).sum(), (gradient * tangent).sum()
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def check_parameters(case: LayerCase) -> None:
    """Every parameter gets a gradient, and the gradient of the smallest one is right."""
    parameters = dict(case.layer.named_parameters())
    if not parameters:
        return
    x, log_det = case.forward()
    z, inverse_log_det = case.inverse(x.detach())
    total = x.square().sum() + log_det.sum() + z.square().sum() + inverse_log_det.sum()
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    without = [name for name, g in zip(trained, gradients, strict=True) if g is None]
    require(not without, f"every parameter gets a gradient, also {', '.join(without)}")
    double = case.to(torch.float64)
    parameters = dict(double.layer.named_parameters())
    name = min(parameters, key=lambda name: parameters[name].numel())

    def by_parameter(parameter: Tensor) -> Any:
        arguments = double.z, double.context
        return torch.func.functional_call(double.layer, {name: parameter}, arguments)

    smallest = parameters[name].detach().clone().requires_grad_()
    require(gradcheck(by_parameter, (smallest,)), f"the gradient by {name} is right")


def check_samples_are_independent(case: LayerCase) -> None:
    """The image of a sample does not depend on its batch."""
    x, log_det = case.forward()
    order = torch.arange(case.z.shape[0], device=case.z.device).roll(1)
    context = None if case.context is None else case.context[order]
    permuted = case._replace(z=case.z[order], context=context).forward()
    case.agree(permuted[0], x[order], "samples do not depend on their batch")
    case.agree(permuted[1], log_det[order], "log-dets do not depend on the batch")
    alone = case.row(0).forward()[1]
    case.agree(alone, log_det[:1], "a batch of one sample gives the same log-det")


def check_dtype_and_device(case: LayerCase) -> None:
    """Results have the dtype and the device of the latents."""
    for dtype in (torch.float32, torch.float64):
        other = case.to(dtype)
        x, log_det = other.forward()
        results = (x, log_det, *other.inverse(x.detach()))
        require({r.dtype for r in results} == {dtype}, f"results are {dtype} as the latents")
        devices = {r.device for r in results}
        require(devices == {other.z.device}, "results are on the device of the latents")


def check_arguments_are_left_alone(case: LayerCase) -> None:
    """Neither direction changes its argument."""
    z = case.z.clone()
    x = case.forward()[0].detach()
    data = x.clone()
    case.inverse(x)
    require(torch.equal(z, case.z), "forward does not change its argument")
    require(torch.equal(data, x), "inverse does not change its argument")
    require(not (x.requires_grad or case.z.requires_grad), "arguments keep requires_grad")


def check_without_gradients(case: LayerCase) -> None:
    """Log-dets are the same without gradients and in inference mode."""
    expected = case.forward()[1].detach()
    with torch.no_grad():
        case.agree(case.forward()[1], expected, "log_det is the same without gradients")
    with torch.inference_mode():
        inferred = case.forward()[1]
    case.agree(inferred.clone(), expected, "log_det is the same in inference mode")


def check_context(case: LayerCase) -> None:
    """A layer that takes a context depends on it, and refuses to run without one."""
    if case.context is None:
        return
    x = case.forward()[0]
    other = case._replace(context=case.context + 1).forward()[0]
    require(not torch.allclose(other, x), "another context gives other data")
    try:
        case._replace(context=None).forward()
    except ContextError:
        return
    require(False, "a layer with a context refuses to go without")


def check_state(case: LayerCase) -> None:
    """A deep copy, and a layer that loads the state, have the same map."""
    x = case.forward()[0]
    twin = copy.deepcopy(case.layer)
    require(torch.equal(case._replace(layer=twin).forward()[0], x), "a deep copy is the same map")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    twin.load_state_dict(case.layer.state_dict())
    require(torch.equal(case._replace(layer=twin).forward()[0], x), "the state is the whole map")
    require(type(case.layer).__name__ in repr(case.layer), "repr names the layer")


def check_wrong_shape(case: LayerCase) -> None:
    """Latents of another width are refused by a named error, if the layer declares its shape."""
    declared = getattr(case.layer, "latent_shape", None) or getattr(case.layer, "shape", None)
    if declared is None or case.context is not None:  # The context is looked at first.
        return
    try:
        case.forward(torch.cat([case.z, case.z], dim=1))
    except ShapeError:
        return
    require(False, "latents of another width are refused with ShapeError")


LAYER_CHECKS: tuple[Callable[[LayerCase], None], ...] = (
    check_returned_shapes,
    check_round_trip,
    check_log_volume,
    check_log_volume_of_the_inverse,
    check_gradients,
    check_forward_mode,
    check_parameters,
    check_samples_are_independent,
    check_dtype_and_device,
    check_arguments_are_left_alone,
    check_without_gradients,
    check_context,
    check_state,
    check_wrong_shape,
)
"""The checks of :func:`check_layer`, each of a :class:`LayerCase`, to be called one by one."""
