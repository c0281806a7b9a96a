"""An injective flow for a table or for images, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import normflows as nf
from torch import Tensor

from ..checks import checks_arguments
from ..errors import NotInjectiveError, ShapeError
from ..flows.free_form import FreeFormInjection
from ..flows.latent_blocks import latent_block
from ..flows.standardise import Standardise
from ..models.injective import InjectiveNormalizingFlow
from ..models.surrogate_likelihood import SurrogateLikelihood
from ..nets.pairs import Autoencoder, conv_autoencoder
from ..nets.principal import principal_autoencoder
from .rows import read_rows

# With fewer rows couplings over-fit, and their held-out densities fall behind. On codes of images
# matching wins with all rows.
_FEW_ROWS = 2000


@checks_arguments
def injective_flow(
    data: Any,
    latent_dim: int,
    *,
    context_dim: int = 0,
    hidden: Sequence[int] = (256, 256),
    latent_density: str | None = None,
    num_couplings: int = 8,
    transform: str | Sequence[str] = "none",
) -> InjectiveNormalizingFlow:
    r"""Build an injective flow for data: networks, their units, and a latent density.

    .. math:: x = T\big(g(h(z))\big), \qquad z \sim \mathcal N(0, I_d)

    The units :math:`T` are a :class:`~normflows_injective.flows.Standardise` fitted to the data;
    :math:`g` is the decoder of a pair that starts as the principal components of the rows, or for
    images of convolutional networks. The latent density :math:`h` ends with a ``Standardise``, to
    which ``fit`` gives the scale of the codes; before it stands a
    :func:`~normflows_injective.flows.latent_block`. The function composes these and does nothing
    else: train the model by ``nfi.training.fit``, or in a loop of your own.

    Args:
        data: Rows (N, D), or images (N, C, H, W): a tensor, an array or a data frame, to which the
            units are fitted.
        latent_dim: Number of latent dimensions :math:`d`, see ``nfi.diagnostics``.
        context_dim: Number of context features; 0 for none.
        hidden: Hidden widths of the encoder of rows, reversed in the decoder.
        latent_density: Kind of :func:`~normflows_injective.flows.latent_block`; None takes
            ``"mixed"`` couplings, and ``"matching"`` for images and for fewer than 2,000 rows.
        num_couplings: Number of couplings in the latent density.
        transform: Of the columns, see :meth:`~normflows_injective.flows.Standardise.fit`.

    Returns:
        The model, untrained, in the default dtype.

    Raises:
        NotInjectiveError: If there are as many latent dimensions as columns, or if all rows are
            the same.
        ShapeError: If data are neither rows nor images.
        NonFiniteError: If data are not finite.

    References:
        Sorrenson et al., Lifting architectural constraints of injective flows, arXiv 2306.01843.

    Examples:
        >>> import torch
        >>> import normflows_injective as nfi
        >>> x = torch.randn(200, 5) * torch.tensor([1.0, 10.0, 1e3, 1.0, 1.0])
        >>> model = injective_flow(x, latent_dim=2, hidden=(32,))
        >>> result = nfi.training.fit(model, x, steps=20)
        >>> model.sample(3)[0].shape
        torch.Size([3, 5])
    """
    names = getattr(data, "columns", None)
    x = read_rows(data).x
    if x[0].numel() <= latent_dim:
        raise NotInjectiveError(
            f"latent_dim must be less than the {x[0].numel()} dimensions of the data, got "
            f"{latent_dim}. Take fewer, or nf.NormalizingFlow."
        )
    if bool((x == x[:1]).all()):
        raise NotInjectiveError(
            "All rows of data are the same, so there is nothing to model. Look how they were read."
        )
    kind = latent_density or ("matching" if len(x) < _FEW_ROWS or x.dim() > 2 else "mixed")
    units = Standardise.fit(
        x.double(), transform=transform, names=None if names is None else [*map(str, names)]
    )
    inner = units.inverse(x.double())[0]
    injection = FreeFormInjection(*_networks(inner, latent_dim, context_dim, hidden))
    density = latent_block(latent_dim, kind, num_layers=num_couplings, context_dim=context_dim)
    flows = [*density, Standardise(latent_dim), injection]
    q0 = nf.distributions.DiagGaussian(latent_dim, trainable=False)
    dtype = next(injection.parameters()).dtype
    return InjectiveNormalizingFlow(q0, [*flows, units.to(dtype)], SurrogateLikelihood())


def _networks(x: Tensor, latent_dim: int, context_dim: int, hidden: Sequence[int]) -> Autoencoder:
    shape = tuple(x.shape[1:])
    if len(shape) == 1:
        return principal_autoencoder(x, latent_dim, hidden, context_dim)
    if len(shape) != 3:
        raise ShapeError(
            f"data must be rows (N, D) or images (N, C, H, W), got events of shape {shape}. "
            "Flatten other arrays into rows, or build the networks yourself."
        )
    # Each stage halves the image, down to about four pixels.
    num_stages = max(1, (min(shape[1:]) // 4).bit_length())
    channels = [32 * 2**stage for stage in range(num_stages)]
    return conv_autoencoder(shape, latent_dim, channels, context_dim)
