"""Maps of one element by given parameters, for couplings and autoregressive layers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, final

import torch
from normflows.utils import splines
from torch import Tensor

from ...checks import check_positive, checks_arguments_of, looks_first
from ...errors import OptionError, ShapeError
from ..splines import bounded_spline


def _check_parameters(transform: ElementTransform, *args: Any, **kwargs: Any) -> None:
    """Raise unless there are ``num_parameters`` parameters for every element."""
    tensors = [*args, *kwargs.values()]
    if len(tensors) != 2 or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return
    elements, parameters = tensors
    expected = (*elements.shape, transform.num_parameters)
    if tuple(parameters.shape) != expected:
        raise ShapeError(
            f"{type(transform).__name__} takes parameters (B, A, {transform.num_parameters}) for "
            f"elements (B, A), {expected} here, got {tuple(parameters.shape)}. Let the "
            "conditioner give as many as num_parameters for each element."
        )


class ElementTransform(ABC):
    r"""A family of increasing maps, one for every element of a vector.

    The parameters come from a network or a kernel expansion. At zero parameters every map is the
    identity, so that a layer whose last weights are zero starts as the identity.

    Attributes:
        num_parameters: Number of parameters :math:`P` of an element.
        is_elementwise: Whether an element is transformed by its own parameters alone, as an
            autoregressive layer needs.

    Examples:
        A transform of your own gives both directions, each with its log-det:

        >>> class Scale(ElementTransform):
        ...     num_parameters = 1
        ...     def inverse(self, x, parameters):
        ...         return x * parameters[..., 0].exp(), parameters[..., 0].sum(-1)
        ...     def forward(self, z, parameters):
        ...         return z * (-parameters[..., 0]).exp(), -parameters[..., 0].sum(-1)
        >>> Scale().inverse(torch.ones(1, 2), torch.zeros(1, 2, 1))
        (tensor([[1., 1.]]), tensor([0.]))
    """

    num_parameters: int
    is_elementwise: bool = True

    def __init_subclass__(cls) -> None:
        """Attach the check of arguments to the methods of a subclass."""
        super().__init_subclass__()
        checks_arguments_of(cls)
        looks_first(cls, ["forward", "inverse"], _check_parameters)

    @abstractmethod
    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, A) to data (B, A) by parameters (B, A, P), with the log-det (B,) in nats."""

    @abstractmethod
    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Data (B, A) to latents (B, A) by parameters (B, A, P), with the log-det (B,) in nats."""

    def __repr__(self) -> str:
        """Name and options."""
        options = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


@final
class Additive(ElementTransform):
    r"""Shift :math:`z = x + t`, of log-det zero.

    References:
        Dinh et al., NICE, arXiv 1410.8516.

    Examples:
        >>> Additive().inverse(torch.ones(1, 2), torch.ones(1, 2, 1))
        (tensor([[2., 2.]]), tensor([0.]))
    """

    num_parameters = 1

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Subtract the shift."""
        return z - parameters[..., 0], z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Add the shift."""
        return x + parameters[..., 0], x.new_zeros(x.shape[0])


@final
class Affine(ElementTransform):
    r"""Scale and shift with softly bounded log-scales.

    .. math:: z = x \, e^{\sigma(s)} + t, \qquad \sigma(s) = m \tanh(s / m)

    Args:
        max_log_scale: Bound :math:`m` of the log-scales; None for :math:`\sigma(s) = s`.

    Raises:
        OptionError: If the bound is not positive.

    References:
        Dinh et al., Density estimation using Real NVP, arXiv 1605.08803.

    Examples:
        >>> z, log_det = Affine(None).inverse(torch.ones(1, 1), torch.tensor([[[0.0, 3.0]]]))
        >>> z, log_det
        (tensor([[4.]]), tensor([0.]))
    """

    num_parameters = 2

    def __init__(self, max_log_scale: float | None = 2.0) -> None:
        self.max_log_scale = _checked_bound(max_log_scale)

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Undo shift and scale."""
        log_scale, shift = _soft_clamp(parameters[..., 0], self.max_log_scale), parameters[..., 1]
        return (z - shift) * (-log_scale).exp(), -log_scale.sum(-1)

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift."""
        log_scale, shift = _soft_clamp(parameters[..., 0], self.max_log_scale), parameters[..., 1]
        return x * log_scale.exp() + shift, log_scale.sum(-1)


@final
class CentredAffine(ElementTransform):
    r"""Scale and shift that keep volumes, because log-scales have their mean subtracted.

    .. math:: z_i = x_i \, e^{\sigma(s_i) - \frac1A \sum_j \sigma(s_j)} + t_i, \qquad
              \log\det = 0

    For a single element it is :class:`Additive`.

    Args:
        max_log_scale: Soft bound of the log-scales before their mean is subtracted, or None.

    Raises:
        OptionError: If the bound is not positive.

    References:
        Sorrenson et al., GIN, arXiv 2001.04872.

    Examples:
        >>> z, log_det = CentredAffine().inverse(torch.ones(1, 2), torch.randn(1, 2, 2))
        >>> log_det
        tensor([0.])
    """

    num_parameters = 2
    is_elementwise = False

    def __init__(self, max_log_scale: float | None = 2.0) -> None:
        self.max_log_scale = _checked_bound(max_log_scale)

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Undo shift and scale."""
        log_scale = self._centred(parameters[..., 0])
        return (z - parameters[..., 1]) * (-log_scale).exp(), z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift."""
        log_scale = self._centred(parameters[..., 0])
        return x * log_scale.exp() + parameters[..., 1], x.new_zeros(x.shape[0])

    def _centred(self, parameters: Tensor) -> Tensor:
        log_scale = _soft_clamp(parameters, self.max_log_scale)
        return log_scale - log_scale.mean(-1, keepdim=True)


@final
class Spline(ElementTransform):
    r"""Monotone rational-quadratic spline on :math:`[-b, b]`, and the identity beyond.

    Args:
        num_bins: Number of bins :math:`K`; an element has :math:`3K - 1` parameters.
        bound: :math:`b`.

    Raises:
        OptionError: If an option is not positive, or too large.

    References:
        Durkan et al., Neural spline flows, arXiv 1906.04032.

    Examples:
        >>> spline = Spline(4)
        >>> at_rest = torch.zeros(1, 2, spline.num_parameters)
        >>> z, log_det = spline.inverse(torch.ones(1, 2), at_rest)
        >>> bool(torch.allclose(z, torch.ones(1, 2)))
        True
    """

    def __init__(self, num_bins: int = 8, bound: float = 4.0) -> None:
        most = round(1 / splines.DEFAULT_MIN_BIN_WIDTH)
        if num_bins > most:
            raise OptionError(f"num_bins must be at most {most}, got {num_bins}.")
        self.num_bins, self.bound = num_bins, check_positive(bound, "bound")

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        """Widths, heights, and derivatives at the inner knots."""
        return 3 * self.num_bins - 1

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Invert the spline."""
        return self._spline(z, parameters, inverse=True)

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the spline."""
        return self._spline(x, parameters, inverse=False)

    def _spline(self, value: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        at_ends = torch.zeros_like(value)
        image, log_derivative = bounded_spline(value, parameters, at_ends, self.bound, inverse)
        return image, log_derivative.sum(-1)


def check_transform(transform: object) -> ElementTransform:
    """An element transform as it is, or an OptionError for anything else, such as its class."""
    if isinstance(transform, ElementTransform):
        return transform
    kind = transform if isinstance(transform, type) else type(transform)
    name = f"{'the class ' * (kind is transform)}{kind.__name__}"
    raise OptionError(f"transform must be an ElementTransform, for instance Affine(), got {name}.")


def _checked_bound(max_log_scale: float | None) -> float | None:
    if max_log_scale is not None and not 0 < max_log_scale < math.inf:
        raise OptionError(
            f"max_log_scale must be positive and finite, or None for no bound, got "
            f"{max_log_scale!r}."
        )
    return max_log_scale


def _soft_clamp(value: Tensor, bound: float | None) -> Tensor:
    return value if bound is None else bound * torch.tanh(value / bound)
