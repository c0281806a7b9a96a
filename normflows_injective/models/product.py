"""A whole model of named columns, each on a surface of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import normflows as nf
from torch import Tensor, nn

from ..checks import check_count, checks_arguments
from ..distributions import ProductLaw
from ..errors import OptionError
from ..flows.coupling.circular import MobiusMixture
from ..flows.injection import Injection
from ..flows.surfaces.angular_spline import AngularSpline
from ..flows.surfaces.product import ProductSurface
from .factors import base_of, factor_of, mixings
from .injective import InjectiveNormalizingFlow
from .torus import random_halves


@final
class ProductFlow(nn.Module):
    r"""A flow of named columns, in the units of the user.

    ``model`` is an :class:`~normflows_injective.InjectiveNormalizingFlow` of rows: ``nfi.score``,
    ``save``, ``load`` and the laws of Pyro take it. :meth:`rows` and :meth:`columns` go from named
    columns to its rows and back. Its ``reconstruction_error`` compares numbers, which differ by
    whole periods and by the sign of a quaternion without meaning anything.

    Args:
        model: A model whose last layer is a :class:`~normflows_injective.flows.ProductSurface`.

    Examples:
        >>> import torch
        >>> flow = product_flow({"wind": "circle:360", "speed": "positive"}, num_layers=2)
        >>> data = {"wind": torch.tensor([10.0, 350.0]), "speed": torch.tensor([3.0, 4.0])}
        >>> flow.log_prob(data).shape
        torch.Size([2])
        >>> sample, log_q = flow.sample(5)
        >>> sorted(sample)
        ['speed', 'wind']
    """

    def __init__(self, model: InjectiveNormalizingFlow) -> None:
        super().__init__()
        self.model = model

    @property
    def surface(self) -> ProductSurface:
        """The last layer, which knows names, widths and measures of the columns."""
        last: Any = self.model.flows[-1]
        surface: ProductSurface = last
        return surface

    def rows(self, columns: Mapping[str, Any]) -> Tensor:
        """Rows (N, D) of named columns, in dtype and on the device of the model."""
        like = next(self.model.parameters())
        return self.surface.rows(columns).to(like)

    def columns(self, x: Tensor) -> dict[str, Tensor]:
        """Named columns of rows (N, D)."""
        return self.surface.columns(x)

    def forward_kld(
        self, columns: Mapping[str, Any] | Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Training loss of named columns or of rows (B, D)."""
        loss: Tensor = self.model.forward_kld(self._as_rows(columns), context)
        return loss

    def reverse_kld(self, num_samples: int = 1, context: Tensor | None = None) -> Tensor:
        """Divergence from the target p, 0-dimensional, by draws of the model."""
        loss: Tensor = self.model.reverse_kld(num_samples, context=context)
        return loss

    def log_prob(
        self, columns: Mapping[str, Any] | Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Log-density (N,) in nats against the product of the measures in ``surface``."""
        return self.model.log_prob(self._as_rows(columns), context)

    def sample(
        self, num_samples: int = 1, context: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draw named columns with their log-density (n,) in nats."""
        x, log_q = self.model.sample(num_samples, context)
        return self.columns(x), log_q  # type: ignore[return-value]

    def _as_rows(self, columns: Mapping[str, Any] | Tensor) -> Tensor:
        return columns if isinstance(columns, Tensor) else self.rows(columns)


@checks_arguments
def product_flow(
    spec: Mapping[str, str | Injection],
    data: Any = None,
    *,
    num_layers: int = 8,
    width: int = 64,
    num_blocks: int = 2,
    num_bins: int = 8,
    num_components: int = 8,
    num_frequencies: int = 2,
    context_dim: int = 0,
    off_manifold: str = "reject",
    p: Any = None,
) -> ProductFlow:
    r"""Build a flow of named columns from a short specification, one word for each.

    ===================== =================================== ===============================
    word                  column                              measure of its density
    ===================== =================================== ===============================
    ``real``              any number                          length, in its unit
    ``positive``          a number above zero                 length, in its unit
    ``above:l``           a number above a bound              length, in its unit
    ``between:a:b``       a number between bounds             length, in its unit
    ``circle``            an angle in radians                 length
    ``circle:P``          an angle of period P                length, in its unit
    ``torus:d``           d angles in radians                 length of each
    ``sphere``            a unit vector of three numbers      area
    ``sphere:D``          a unit vector of D numbers          area
    ``rotation``          a unit quaternion, w first          Haar's, of total mass one
    ``simplex:K``         K positive parts of sum one         Lebesgue, of the first K - 1
    ===================== =================================== ===============================

    A chart of your own may stand in place of a word. One latent flow couples all coordinates:
    angles by :class:`~normflows_injective.flows.coupling.MobiusMixture`, which has no seam, the
    others by splines; between them linear maps mix plain coordinates and turn spheres and
    rotations. The base is uniform on compact factors and normal on the others.

    Args:
        spec: The word, or the chart, of every column.
        data: Columns by name, whose location and scale real and positive columns take; None for
            zero and one.
        num_layers: Number of couplings.
        width: Width of their networks.
        num_blocks: Number of residual blocks of each network.
        num_bins: Number of bins of a spline.
        num_components: Number of Möbius maps of an angle.
        num_frequencies: Number of multiples of every angle that the networks see.
        context_dim: Number of context features; 0 for none.
        off_manifold: ``"reject"`` or ``"project"``, for points off spheres and simplices.
        p: Target density for ``reverse_kld``.

    Returns:
        A :class:`ProductFlow`, whose ``model`` trains in the loop of normflows and by
        ``nfi.training.fit``.

    Raises:
        OptionError: If a word is unknown or incomplete, or a column is missing.
        ShapeError: If a column has another width.
        NonFiniteError: If data are not finite.

    References:
        Derived in ``flows/surfaces/product.py``.

    Examples:
        >>> flow = product_flow({"place": "sphere", "soil": "simplex:3", "temp": "real"})
        >>> sample, log_q = flow.sample(4)
        >>> {name: tuple(column.shape) for name, column in sample.items()}
        {'place': (4, 3), 'soil': (4, 3), 'temp': (4,)}
    """
    check_count(num_layers, "num_layers")
    missing = [name for name in spec if data is not None and name not in data]
    if missing:
        raise OptionError(
            f"The data have no column {missing[0]!r}. The columns are {', '.join(map(str, spec))}."
        )
    factors = {
        str(name): factor_of(str(name), word, data, off_manifold) for name, word in spec.items()
    }
    surface = ProductSurface(factors)
    if data is not None:
        surface.inverse(surface.rows(data))  # refuses points off their surfaces
    dim = sum(surface.latent_shape or ())
    flows: list[nf.flows.Flow] = []
    for half in random_halves(dim, num_layers):
        coupling = AngularSpline(
            dim,
            surface.ind_circ,
            width=width,
            num_blocks=num_blocks,
            num_bins=num_bins,
            num_frequencies=num_frequencies,
            context_dim=context_dim,
            circle=MobiusMixture(num_components),
            transformed=half,
        )
        flows += [coupling, *mixings(surface)]
    base = ProductLaw([base_of(factor) for factor in factors.values()])
    return ProductFlow(InjectiveNormalizingFlow(base, [*flows, surface], p=p))
