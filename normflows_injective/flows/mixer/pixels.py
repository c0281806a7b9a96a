"""Pixels as real numbers, and densities as bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checks import checks_arguments
from ...errors import DtypeError, OptionError


@checks_arguments
def dequantise(
    pixels: Tensor,
    bits: int = 8,
    stored_bits: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Integer pixels as real numbers in :math:`[-1, 1]`, uniform within their bin.

    .. math:: x = 2 \, \frac{q + u}{2^b} - 1, \qquad
              q = \lfloor \text{pixel} / 2^{b_0 - b} \rfloor, \quad u \sim U[0, 1)

    Args:
        pixels: Integers from 0 to :math:`2^{b_0} - 1` of any shape.
        bits: Number :math:`b` of leading bits that are kept.
        stored_bits: Number of bits :math:`b_0` of the pixels.
        generator: Source of :math:`u`; torch's own if None.

    Returns:
        A tensor of the same shape in torch's default dtype. The noise has few enough digits that
        the sum is exact, so the pixel can be recovered.

    Raises:
        DtypeError: If the pixels are no tensor of integers.
        OptionError: If a pixel is out of range, or ``bits`` exceeds ``stored_bits``.

    References:
        Theis, van den Oord, Bethge, arXiv 1511.01844, section 3.1.

    Examples:
        >>> dequantise(torch.tensor([0, 128, 255]), bits=1).floor()
        tensor([-1.,  0.,  0.])
    """
    if pixels.is_floating_point() or pixels.dtype == torch.bool:
        raise DtypeError(
            f"pixels must be integers, got {pixels.dtype}. If they are scaled to [0, 1], multiply "
            f"by {2**stored_bits - 1}, round and convert."
        )
    if bits > stored_bits:
        raise OptionError(f"bits must be at most stored_bits={stored_bits}, got {bits}.")
    # Torch's arithmetic of short integers wraps round, and that of uint16 has gaps.
    pixels = pixels.long()
    if pixels.numel() and (int(pixels.min()) < 0 or int(pixels.max()) >= 2**stored_bits):
        raise OptionError(
            f"pixels must lie within 0 and {2**stored_bits - 1}, got {int(pixels.min())} to "
            f"{int(pixels.max())}. Set stored_bits to the number of bits they have."
        )
    levels = pixels // 2 ** (stored_bits - bits)
    dtype = torch.get_default_dtype()
    noise = torch.rand(pixels.shape, generator=generator, device=pixels.device, dtype=dtype)
    # Otherwise a sum could be rounded up to the next bin, and 1 be reached.
    steps = max(1.0, 2 / torch.finfo(dtype).eps / 2**bits)
    noise = (noise * steps).floor() / steps
    return (levels + noise) * (2.0 / 2**bits) - 1


@checks_arguments
def bits_per_dim(log_prob: Tensor, num_dims: int, bits: int = 8) -> Tensor:
    r"""Bits per dimension of quantised pixels, from a log-density of dequantised ones.

    A bin of a pixel is :math:`2/2^b` wide in the units of :func:`dequantise`, so that

    .. math:: -\frac{\log p(x) + D \log (2 / 2^b)}{D \log 2}

    is, in the mean over the noise, an upper bound of the bits that the pixels take.

    Args:
        log_prob: Log-densities in nats, of any shape.
        num_dims: Number of pixel values :math:`D` of an image, channels included.
        bits: Number of bits :math:`b` of a value.

    Returns:
        Bits per dimension, of the shape of ``log_prob``.

    Raises:
        OptionError: If a number is not a positive integer.

    References:
        Theis, van den Oord, Bethge, arXiv 1511.01844, section 3.1.

    Examples:
        A uniform density on [-1, 1] takes all bits:

        >>> bits_per_dim(torch.tensor([-784 * math.log(2.0)]), 784, bits=5)
        tensor([5.])
    """
    return -log_prob / (num_dims * math.log(2)) - 1 + bits
