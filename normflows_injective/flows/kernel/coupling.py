"""Couplings whose parameters are kernel expansions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from ...checks import RenamedAttribute, check_modules, renamed
from ...errors import OptionError
from ...host.context import context_arguments
from ...host.first_data import must_initialise
from ..coupling.coupling import Coupling, coupling_sizes
from ..coupling.transforms import Affine, ElementTransform, check_transform
from .expansion import KernelExpansion


@final
class KernelCoupling(Coupling):
    r"""A coupling whose parameters are kernel expansions; it starts as the identity.

    With :math:`x = (u, v)`, where :math:`u` holds the :math:`d = \lfloor D/2 \rfloor` coordinates
    that are kept, the map from data to latents is

    .. math:: u' = u, \qquad v' = v \odot e^{s} + t, \qquad s = K(u, Z) A^s, \quad
              t = K(u, Z) A^t, \qquad \log\det = \sum_j s_j

    with :math:`K(u, Z)_i = k(u, z_i)` and :math:`N (2(D - d) + d) + d` parameters. Log-scales are
    bounded by the weights, :math:`|s_j| \le \sum_i |A^s_{ij}|`, so they need no clamp. Far from
    the auxiliary points the layer is the identity, so a flow of such layers has the tails of its
    base density.

    The first call of :meth:`inverse` with two rows or more takes the points and length-scales from
    the data, if the weights are still zero. This leaves the map unchanged, so each layer of a
    stack sees the data that the layers after it pass on. Pass all training data once before
    training, ``with torch.no_grad(): model.log_prob(x)``, or the points come from the first batch
    alone. Before that call they suit standard normal inputs. Data should be standardised.

    Args:
        dim: Number of coordinates :math:`D`.
        num_auxiliary: Number of auxiliary points :math:`N`.
        kernel: ``"rbf"``, ``"matern12"``, ``"matern32"`` or ``"matern52"``.
        share_kernel: Whether s and t share their length-scales.
        ard: Whether every input has its own length-scale.
        learn_auxiliary: Whether the auxiliary points are trained.
        context_dim: Number of context features, inputs of the kernel like :math:`u`; 0 for none.
        reverse: Whether the last rather than the first coordinates are kept.
        transform: Map of one element; by default ``Affine(None)``, as above.
        precondition: Whether weights of an orthonormal basis are trained instead of :math:`A`:
            see :class:`KernelExpansion`.

    Raises:
        ShapeError: If ``dim`` is one and there is no context.
        OptionError: If the kernel is unknown or a number is not a positive integer.

    References:
        English, Kirchler and Lippert, Kernelised normalising flows, arXiv 2307.14839, section 3;
        initialisation and preconditioning are derived here.

    Examples:
        >>> coupling = KernelCoupling(3, num_auxiliary=10)
        >>> x = torch.randn(20, 3)
        >>> z, log_det = coupling.inverse(x)
        >>> bool(torch.equal(z, x)), log_det.shape
        (True, torch.Size([20]))
    """

    conditioner: KernelExpansion
    n_auxiliary = RenamedAttribute("num_auxiliary")

    @renamed(n_auxiliary="num_auxiliary")
    def __init__(
        self,
        dim: int,
        num_auxiliary: int = 150,
        kernel: str = "rbf",
        share_kernel: bool = True,
        ard: bool = True,
        learn_auxiliary: bool = True,
        context_dim: int = 0,
        reverse: bool = False,
        transform: ElementTransform | None = None,
        precondition: bool = True,
    ) -> None:
        transform = check_transform(Affine(None) if transform is None else transform)
        num_kept, num_moved = coupling_sizes(dim, context_dim > 0, type(self).__name__)
        expansion = KernelExpansion(
            num_kept,
            num_moved * transform.num_parameters,
            num_auxiliary,
            kernel,
            1 if share_kernel else transform.num_parameters,
            ard,
            learn_auxiliary,
            context_dim,
            precondition,
        )
        super().__init__(dim, expansion, transform, reverse)
        self.num_auxiliary, self.kernel, self.share_kernel = num_auxiliary, kernel, share_kernel
        self.ard, self.context_dim, self.precondition = ard, context_dim, precondition

    @property
    def learn_auxiliary(self) -> bool:
        """Whether the auxiliary points are trained."""
        return self.conditioner.learn_auxiliary

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D), with the log-det (B,) in nats."""
        is_trained = self.conditioner.weights.requires_grad
        if is_trained and x.shape[0] > 1 and must_initialise(self.conditioner):
            self.initialise(x, context)
        return super().inverse(x, context)

    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Take points and length-scales from data (B, D), unless the weights have been trained.

        Args:
            x: Data of this layer, two rows or more.
            context: Context (B, C), or None.

        Raises:
            ShapeError: If there is one row, or the width is wrong.
            NonFiniteError: If a row holds NaN or infinity.

        Examples:
            >>> coupling = KernelCoupling(2, num_auxiliary=3)
            >>> coupling.initialise(torch.tensor([[0.0, 9.0], [1.0, 9.0], [3.0, 9.0]]))
            >>> coupling.conditioner.points.flatten().sort().values.tolist()
            [0.0, 1.0, 3.0]
        """
        u, _ = self.split(x, "x")
        self.conditioner.initialise(u.detach(), **context_arguments(self.conditioner, context))

    def penalty(self) -> Tensor:
        """Squared norms of s and t in their Hilbert space: see :meth:`KernelExpansion.penalty`."""
        return self.conditioner.penalty()


def rkhs_penalty(parts: nn.Module | Iterable[nn.Module]) -> Tensor:
    r"""Sum of the squared Hilbert space norms of all kernel expansions of a model.

    .. math:: \sum_\ell \mathrm{tr}(A_\ell^\top K_\ell(Z_\ell, Z_\ell) A_\ell)

    Args:
        parts: A model, or its flows.

    Returns:
        A number without unit, 0-dimensional, to be added to a loss times a weight.

    Raises:
        OptionError: If none of them holds a kernel expansion.

    References:
        Derived here; for one layer it is the sum of the squared norms of s and t.

    Examples:
        >>> rkhs_penalty([KernelCoupling(3), KernelCoupling(3)]).item()
        0.0
    """
    advice = "Hand in a model with KernelCoupling layers, or a list of its flows."
    layers = [parts] if isinstance(parts, nn.Module) else check_modules(parts, "parts", advice)
    modules = dict.fromkeys(module for layer in layers for module in layer.modules())
    expansions = [module for module in modules if isinstance(module, KernelExpansion)]
    if not expansions:
        names = ", ".join(type(layer).__name__ for layer in layers) or "an empty list"
        raise OptionError(
            f"There is no kernel expansion in {names}, so there is no norm to penalise. Hand in "
            "a model with KernelCoupling layers, or its flows."
        )
    return torch.stack([expansion.penalty() for expansion in expansions]).sum()
