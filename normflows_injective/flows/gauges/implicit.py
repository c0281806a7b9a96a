"""A gauge from any function that increases along rays, its radius found by bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from ...autodiff.products import out_of_inference, value_and_gradient
from ...checks import check_interval, is_readable
from ...errors import OffManifoldError
from ...host.context import needs_context, takes_context
from .gauge import Gauge, RadiusAndSecant, one_each

# 60 halvings of an interval of length 40 leave 3e-17.
STEPS = 60
NEAR = 1e-3


@final
class ImplicitGauge(Gauge):
    r"""Level sets :math:`\{F = t\}` of any function that increases along every ray.

    The radius solves :math:`F(e^\rho u) = t` by bisection without a graph, followed by two steps
    of Newton's method with a graph. At a root such a step does not change the value. The first
    step makes first derivatives right, and the second those up to the third. The secant follows
    from the gradient of :math:`F` at :math:`x = r u`:

    .. math:: \sec\psi = \lVert x \rVert \, \lVert\nabla F(x)\rVert \,/\, (x \cdot \nabla F(x))

    Args:
        function: :math:`F`, a module or callable of points :math:`(B, D)` to :math:`(B,)` or
            :math:`(B, 1)`, acting on each sample alone. With a context it is called
            ``function(x, context=context)`` if it has that keyword. A module's parameters are
            trained with the model.
        log_bounds: Interval that holds :math:`\log r`.

    Raises:
        OptionError: If the interval is empty.

    References:
        arXiv 2406.09116; the derivatives by Newton steps are those of the implicit function.

    Examples:
        >>> gauge = ImplicitGauge(lambda x: x.pow(4).sum(1))
        >>> gauge.log_radius(torch.tensor([[1.0, 0.0]]), torch.tensor(16.0)).exp()
        tensor([2.])
    """

    def __init__(
        self, function: Callable[..., Tensor], log_bounds: tuple[float, float] = (-20.0, 20.0)
    ) -> None:
        super().__init__()
        self.function: Any = function
        self.log_bounds = check_interval(log_bounds, "log_bounds")
        self.takes_context = takes_context(function)
        self.needs_context = needs_context(function)

    def log_radius(self, u: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """The root along each ray, differentiable three times."""
        level = torch.as_tensor(level, dtype=u.dtype, device=u.device)
        context = None if context is None else out_of_inference(context)
        log_radius = self._bisect(u, level, context)
        for _ in range(2):
            x = log_radius.exp().unsqueeze(1) * u
            value, gradient = value_and_gradient(lambda y: self._value(y, context), x)
            log_radius = log_radius - (value - level) / (gradient * x).sum(1)
        self._check(log_radius, u, level, context)
        return log_radius

    def radius_and_secant(
        self, u: Tensor, level: Tensor, context: Tensor | None = None
    ) -> RadiusAndSecant:
        r"""Log-radius and log-secant by the gradient of the function."""
        log_radius = self.log_radius(u, level, context)
        context = None if context is None else out_of_inference(context)
        x = log_radius.exp().unsqueeze(1) * u
        gradient = value_and_gradient(lambda y: self._value(y, context), x)[1]
        log_norm = torch.linalg.vector_norm(gradient, dim=1).log()
        return RadiusAndSecant(log_radius, log_norm - (gradient * u).sum(1).log())

    def _bisect(self, u: Tensor, level: Tensor, context: Tensor | None) -> Tensor:
        with torch.no_grad():
            low = torch.full_like(u[:, 0], self.log_bounds[0])
            high = torch.full_like(u[:, 0], self.log_bounds[1])
            for _ in range(STEPS):
                middle = 0.5 * (low + high)
                beyond = self._value(middle.exp().unsqueeze(1) * u, context) >= level
                low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        return 0.5 * (low + high)

    def _value(self, x: Tensor, context: Tensor | None) -> Tensor:
        rule = "The function of ImplicitGauge must return one value per point"
        return one_each(self.function, x, context, rule)

    def _check(self, log_radius: Tensor, u: Tensor, level: Tensor, context: Tensor | None) -> None:
        if not is_readable(log_radius, level):
            return
        with torch.no_grad():
            x = log_radius.exp().unsqueeze(1) * u
            error = (self._value(x, context) / level - 1).abs()
            bad = ~(error <= NEAR)
            if bool(bad.any()):
                raise OffManifoldError(
                    f"On {int(bad.sum())} of {len(u)} rays no point of the level set was found "
                    f"with a log-radius within {self.log_bounds}. The function must increase "
                    "along every ray from below the level to above it; widen log_bounds if the "
                    "surface lies outside."
                )
