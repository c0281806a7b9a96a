"""Differentiable functions of torch, each as a map of rows (B, 12) to a batch (B, *).

Every entry acts on each row alone and is smooth near standard normal rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.seeds import seeded_generator

__all__ = ["FUNCTIONS", "WIDTH"]

WIDTH = 12

Rowwise = Callable[[Tensor], Tensor]


def _fixed(*shape: int) -> Tensor:
    """A constant that does not depend on the random state."""
    count = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(1, count + 1, dtype=torch.float64) ** 1.1).view(shape)


def _positive(h: Tensor) -> Tensor:
    return F.softplus(h) + 0.2


def _unit(h: Tensor) -> Tensor:
    return 0.1 + 0.8 * torch.sigmoid(h)


def _matrix(h: Tensor) -> Tensor:
    """Well conditioned matrices (B, 3, 3)."""
    return h[:, :9].tanh().view(-1, 3, 3) / 2 + torch.diag(torch.tensor([1.5, 2.5, 4.0])).to(h)


def _symmetric(h: Tensor) -> Tensor:
    m = _matrix(h)
    return (m + m.mT) / 2


def _definite(h: Tensor) -> Tensor:
    m = _matrix(h)
    return m @ m.mT + torch.eye(3, dtype=h.dtype)


def _tall(h: Tensor) -> Tensor:
    return h.tanh().view(-1, 4, 3) + 2 * torch.eye(4, 3, dtype=h.dtype)


def _triangular(h: Tensor) -> Tensor:
    return _matrix(h).tril()


def _side(h: Tensor) -> Tensor:
    """Right-hand sides (B, 3, 1)."""
    return h[:, 9:].unsqueeze(2)


def _image(h: Tensor) -> Tensor:
    return h.view(-1, 1, 3, 4)


def _signal(h: Tensor) -> Tensor:
    return h.view(-1, 2, 6)


def _volume(h: Tensor) -> Tensor:
    return h.view(-1, 1, 2, 2, 3)


def _tokens(h: Tensor) -> Tensor:
    return h.view(-1, 3, 4)


def _real(h: Tensor) -> Tensor:
    return torch.view_as_real(h).flatten(1) if h.is_complex() else h


def _parts(*parts: Tensor) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)


ELEMENTWISE: dict[str, Rowwise] = {
    "abs": lambda h: (h + 9).abs(),
    "acos": lambda h: torch.acos(_unit(h)),
    "acosh": lambda h: torch.acosh(1 + _positive(h)),
    "addcdiv": lambda h: torch.addcdiv(h, h.sin(), _positive(h)),
    "addcmul": lambda h: torch.addcmul(h, h.sin(), h.cos()),
    "asin": lambda h: torch.asin(_unit(h)),
    "asinh": torch.asinh,
    "atan": torch.atan,
    "atan2": lambda h: torch.atan2(h, _positive(h)),
    "atanh": lambda h: torch.atanh(_unit(h)),
    "clamp": lambda h: h.clamp(-9, 9),
    "complex": lambda h: _real(torch.complex(h, h.sin()) ** 2),
    "copysign": lambda h: torch.copysign(h + 9, -torch.ones_like(h)),
    "cos": torch.cos,
    "cosh": torch.cosh,
    "deg2rad": torch.deg2rad,
    "digamma": lambda h: torch.digamma(_positive(h)),
    "div": lambda h: h / _positive(h),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfinv": lambda h: torch.erfinv(_unit(h)),
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "float_power": lambda h: torch.float_power(_positive(h), 1.5).to(h),
    "fmod": lambda h: torch.fmod(h, 50.0),
    "frac": lambda h: torch.frac(_unit(h)),
    "hypot": lambda h: torch.hypot(h, _positive(h)),
    "i0": torch.i0,
    "ldexp": lambda h: torch.ldexp(h, torch.tensor(2)),
    "lerp": lambda h: torch.lerp(h, h.sin(), _unit(h)),
    "lgamma": lambda h: torch.lgamma(_positive(h)),
    "log": lambda h: torch.log(_positive(h)),
    "log10": lambda h: torch.log10(_positive(h)),
    "log1p": lambda h: torch.log1p(_positive(h)),
    "log2": lambda h: torch.log2(_positive(h)),
    "logaddexp": lambda h: torch.logaddexp(h, h.sin()),
    "logaddexp2": lambda h: torch.logaddexp2(h, h.sin()),
    "logit": lambda h: torch.logit(_unit(h)),
    "maximum": lambda h: torch.maximum(h, h - 1),
    "mvlgamma": lambda h: torch.mvlgamma(_positive(h) + 1, 2),
    "nan_to_num": torch.nan_to_num,
    "polygamma": lambda h: torch.polygamma(1, _positive(h)),
    "pow": lambda h: _positive(h) ** h,
    "reciprocal": lambda h: torch.reciprocal(_positive(h)),
    "remainder": lambda h: torch.remainder(h + 9, 50.0),
    "rsqrt": lambda h: torch.rsqrt(_positive(h)),
    "rsub": lambda h: 1 - h.square(),
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "sinc": torch.sinc,
    "sinh": torch.sinh,
    "special.bessel-free entr": lambda h: torch.special.entr(_positive(h)),
    "special.erfcx": lambda h: torch.special.erfcx(_unit(h)),
    "special.i0e": torch.special.i0e,
    "special.i1": torch.special.i1,
    "special.i1e": torch.special.i1e,
    "special.log_ndtr": torch.special.log_ndtr,
    "special.ndtr": torch.special.ndtr,
    "special.ndtri": lambda h: torch.special.ndtri(_unit(h)),
    "special.xlog1py": lambda h: torch.special.xlog1py(h, _positive(h)),
    "sqrt": lambda h: torch.sqrt(_positive(h)),
    "square": torch.square,
    "tan": lambda h: torch.tan(_unit(h)),
    "tanh": torch.tanh,
    "true_divide": lambda h: torch.true_divide(h, _positive(h)),
    "where": lambda h: torch.where(h > -9, h.sin(), h),
    "xlogy": lambda h: torch.xlogy(h, _positive(h)),
}

ACTIVATIONS: dict[str, Rowwise] = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu tanh": lambda h: F.gelu(h, approximate="tanh"),
    "glu": F.glu,
    "hardswish": lambda h: F.hardswish(_unit(h)),
    "huber_loss": lambda h: F.huber_loss(h, h.sin(), reduction="none"),
    "log_softmax": lambda h: F.log_softmax(h, 1),
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "mse_loss": lambda h: F.mse_loss(h, h.sin(), reduction="none"),
    "prelu": lambda h: F.prelu(h, torch.tensor(0.3, dtype=h.dtype)),
    "selu": F.selu,
    "silu": F.silu,
    "smooth_l1_loss": lambda h: F.smooth_l1_loss(h, 0 * h, reduction="none"),
    "softmax": lambda h: F.softmax(h, 1),
    "softmin": lambda h: F.softmin(h, 1),
    "softplus": F.softplus,
    "softplus beta": lambda h: F.softplus(h, beta=2.0),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
}

NORMALISATIONS: dict[str, Rowwise] = {
    "batch_norm eval": lambda h: F.batch_norm(
        _signal(h), _fixed(2).to(h), _fixed(2).to(h).square() + 0.5
    ),
    "group_norm": lambda h: F.group_norm(h.view(-1, 4, 3), 2, _fixed(4).to(h)),
    "instance_norm": lambda h: F.instance_norm(_signal(h)),
    "layer_norm": lambda h: F.layer_norm(h, (12,), _fixed(12).to(h)),
    "layer_norm of two axes": lambda h: F.layer_norm(_tokens(h), (3, 4)),
    "local_response_norm": lambda h: F.local_response_norm(h.view(-1, 4, 3), 2),
    "native_group_norm": lambda h: torch.native_group_norm(
        h.view(-1, 4, 3), None, None, len(h), 4, 3, 2, 1e-5
    )[0],
    "native_layer_norm": lambda h: torch.native_layer_norm(h, [12], None, None, 1e-5)[0],
    "normalize": F.normalize,
    "rms_norm": lambda h: F.rms_norm(h, (12,)),
    "var_mean": lambda h: _parts(*torch.var_mean(_tokens(h), 2)),
    "std_mean": lambda h: _parts(*torch.std_mean(_tokens(h), 2)),
}

REDUCTIONS: dict[str, Rowwise] = {
    "amax": lambda h: _tokens(h).amax(2),
    "aminmax": lambda h: _parts(*torch.aminmax(_tokens(h), dim=2)),
    "cosine_similarity": lambda h: F.cosine_similarity(_tokens(h), _tokens(h).sin(), 2),
    "cummax": lambda h: torch.cummax(h, 1).values,
    "cumprod": lambda h: torch.cumprod(h, 1),
    "cumsum": lambda h: torch.cumsum(h.square(), 1),
    "cumulative_trapezoid": lambda h: torch.cumulative_trapezoid(h.square(), h, dim=1),
    "diff": lambda h: torch.diff(h.square(), dim=1),
    "dist": lambda h: torch.linalg.vector_norm(_tokens(h) - h[:, :4].sin().unsqueeze(1), dim=2),
    "kthvalue": lambda h: torch.kthvalue(_tokens(h), 2, 2).values,
    "logcumsumexp": lambda h: torch.logcumsumexp(h, 1),
    "logsumexp": lambda h: torch.logsumexp(_tokens(h), 2),
    "max": lambda h: _tokens(h).max(2).values,
    "mean": lambda h: _tokens(h).square().mean(2),
    "median": lambda h: _tokens(h).median(2).values,
    "nanmean": lambda h: _tokens(h).square().nanmean(2),
    "nansum": lambda h: _tokens(h).square().nansum(2),
    "norm": lambda h: torch.norm(_tokens(h), dim=2),
    "norm p": lambda h: torch.norm(_tokens(h), p=3, dim=2),
    "prod": lambda h: _tokens(h).prod(2),
    "quantile": lambda h: torch.quantile(_tokens(h), 0.3, dim=2),
    "renorm": lambda h: torch.renorm(h, 2, 0, 1.0),
    "sort": lambda h: torch.sort(h, 1).values,
    "std": lambda h: _tokens(h).std(2),
    "sum": lambda h: _tokens(h).square().sum(2),
    "topk": lambda h: torch.topk(h, 5, 1).values,
    "trapezoid": lambda h: torch.trapezoid(_tokens(h).square(), dim=2),
    "unfold": lambda h: h.square().unfold(1, 3, 2),
    "var": lambda h: _tokens(h).var(2),
    "vector_norm inf": lambda h: torch.linalg.vector_norm(_tokens(h), float("inf"), dim=2),
    "vector_norm p": lambda h: torch.linalg.vector_norm(_tokens(h), 2.5, dim=2),
}

DISTANCES: dict[str, Rowwise] = {
    "cdist": lambda h: torch.cdist(_tokens(h), _fixed(5, 4).to(h)),
    "cdist of both": lambda h: torch.cdist(_tokens(h), _tokens(h).sin() + 5),
    "cdist of rows": lambda h: torch.cdist(h, _fixed(5, 12).to(h)),
    "cdist p": lambda h: torch.cdist(_tokens(h), _fixed(5, 4).to(h), p=3.0),
    "cdist by products": lambda h: torch.cdist(
        _tokens(h), _fixed(5, 4).to(h), compute_mode="use_mm_for_euclid_dist"
    ),
    "pairwise_distance": lambda h: F.pairwise_distance(_tokens(h), _tokens(h).sin() + 5),
    "pdist": lambda h: torch.stack([F.pdist(row) for row in _tokens(h)]),
}

PRODUCTS: dict[str, Rowwise] = {
    "addbmm": lambda h: torch.stack([torch.addbmm(m, m[None], m[None]) for m in _matrix(h)]),
    "addmm": lambda h: torch.addmm(h.sin(), h, _fixed(12, 12).to(h)),
    "baddbmm": lambda h: torch.baddbmm(_matrix(h), _matrix(h), _matrix(h).sin()),
    "bilinear": lambda h: F.bilinear(h, h.sin(), _fixed(3, 12, 12).to(h)),
    "bmm": lambda h: torch.bmm(_tokens(h), _tokens(h).mT),
    "chain_matmul": lambda h: _tokens(h) @ _fixed(4, 3).to(h) @ _tokens(h),
    "cross": lambda h: torch.linalg.cross(h.view(-1, 4, 3), h.view(-1, 4, 3).sin()),
    "einsum": lambda h: torch.einsum("bij,bkj,ki->bk", _tokens(h), _tokens(h), _fixed(3, 3).to(h)),
    "kron": lambda h: torch.stack([torch.kron(m[:2], m[1:]) for m in _matrix(h)]),
    "linear": lambda h: F.linear(h, _fixed(5, 12).to(h), _fixed(5).to(h)),
    "linear by itself": lambda h: F.linear(h, h[0].sin().view(1, -1) * 0 + 1) + h,
    "matmul": lambda h: torch.matmul(_tokens(h), _fixed(4, 5).to(h)),
    "matrix_power": lambda h: torch.linalg.matrix_power(_matrix(h), 3),
    "multi_dot": lambda h: torch.stack(
        [torch.linalg.multi_dot([m, m.sin(), m]) for m in _matrix(h)]
    ),
    "outer": lambda h: torch.stack([torch.outer(r[:3], r[3:6]) for r in h]),
    "tensordot": lambda h: torch.tensordot(_tokens(h), _fixed(4, 3).to(h), dims=1),
    "vecdot": lambda h: torch.linalg.vecdot(_tokens(h), _tokens(h).sin()),
}

LINALG: dict[str, Rowwise] = {
    "cholesky": lambda h: torch.linalg.cholesky(_definite(h)),
    "cholesky_inverse": lambda h: torch.cholesky_inverse(torch.linalg.cholesky(_definite(h))),
    "cholesky_solve": lambda h: torch.cholesky_solve(
        _side(h), torch.linalg.cholesky(_definite(h))
    ),
    "cond": lambda h: torch.linalg.cond(_matrix(h)).unsqueeze(1),
    "det": lambda h: torch.linalg.det(_matrix(h)).unsqueeze(1),
    "eigh values": lambda h: torch.linalg.eigvalsh(_symmetric(h)),
    "eigh vectors": lambda h: torch.linalg.eigh(_symmetric(h)).eigenvectors.square(),
    "eig values": lambda h: torch.linalg.eigvals(_symmetric(h)).real.sort(1).values,
    "householder_product": lambda h: torch.linalg.householder_product(
        _matrix(h), _matrix(h).diagonal(dim1=1, dim2=2)
    ),
    "inv": lambda h: torch.linalg.inv(_matrix(h)),
    "inv_ex": lambda h: torch.linalg.inv_ex(_matrix(h)).inverse,
    "ldl": lambda h: torch.linalg.ldl_factor(_definite(h)).LD.diagonal(dim1=1, dim2=2),
    "logdet": lambda h: torch.logdet(_matrix(h)).unsqueeze(1),
    "lstsq": lambda h: torch.linalg.lstsq(_tall(h), h.view(-1, 4, 3)[:, :, :1]).solution,
    "lu": lambda h: _parts(*torch.linalg.lu(_matrix(h))[1:]),
    "lu_factor": lambda h: torch.linalg.lu_factor(_matrix(h)).LU,
    "lu_solve": lambda h: torch.linalg.lu_solve(*torch.linalg.lu_factor(_matrix(h)), _side(h)),
    "matrix_exp": lambda h: torch.linalg.matrix_exp(_matrix(h) / 4),
    "matrix_norm": lambda h: torch.linalg.matrix_norm(_matrix(h)).unsqueeze(1),
    "nuclear norm": lambda h: torch.linalg.matrix_norm(_matrix(h), "nuc").unsqueeze(1),
    "spectral norm": lambda h: torch.linalg.matrix_norm(_matrix(h), 2).unsqueeze(1),
    "ormqr": lambda h: torch.ormqr(
        _matrix(h), _matrix(h).diagonal(dim1=1, dim2=2), h[:, :9].view(-1, 3, 3)
    ),
    "pinv": lambda h: torch.linalg.pinv(_tall(h)),
    "pinv hermitian": lambda h: torch.linalg.pinv(_definite(h), hermitian=True),
    "qr": lambda h: _parts(*torch.linalg.qr(_tall(h))),
    "slogdet": lambda h: torch.linalg.slogdet(_matrix(h)).logabsdet.unsqueeze(1),
    "solve": lambda h: torch.linalg.solve(_matrix(h), _side(h)),
    "solve from the right": lambda h: torch.linalg.solve(
        _matrix(h), h[:, 9:].unsqueeze(1), left=False
    ),
    "solve constant": lambda h: torch.linalg.solve(
        _fixed(3, 3).to(h) + 3 * torch.eye(3, dtype=h.dtype), _side(h)
    ),
    "solve_ex": lambda h: torch.linalg.solve_ex(_matrix(h), _side(h)).result,
    "solve_triangular": lambda h: torch.linalg.solve_triangular(
        _triangular(h), _side(h), upper=False
    ),
    "svd values": lambda h: torch.linalg.svdvals(_tall(h)),
    "svd vectors": lambda h: torch.linalg.svd(_tall(h), full_matrices=False).U.square(),
    "tensorinv": lambda h: torch.stack([torch.linalg.tensorinv(m, 1) for m in _matrix(h)]),
    "trace": lambda h: torch.stack([torch.trace(m @ m) for m in _matrix(h)]).unsqueeze(1),
    "vander": lambda h: torch.linalg.vander(h[:, :4], N=4),
}

SPECTRAL: dict[str, Rowwise] = {
    "fft": lambda h: _real(torch.fft.fft(h)),
    "fft2": lambda h: _real(torch.fft.fft2(_tokens(h))),
    "fftshift": lambda h: torch.fft.fftshift(h.square(), dim=1),
    "hfft": lambda h: torch.fft.hfft(torch.complex(h, h.sin())),
    "ifft": lambda h: _real(torch.fft.ifft(h).resolve_conj()),
    "irfft": lambda h: torch.fft.irfft(torch.fft.rfft(h) ** 2),
    "rfft": lambda h: _real(torch.fft.rfft(h)),
    "rfftn": lambda h: torch.fft.rfftn(_tokens(h), dim=(1, 2)).abs().flatten(1),
    "stft": lambda h: torch.view_as_real(
        torch.stft(h, 4, window=_fixed(4).to(h), return_complex=True, center=False)
    ).flatten(1),
    "polar": lambda h: _real(torch.polar(_positive(h), h)),
    "angle": lambda h: torch.angle(torch.complex(_positive(h), h)),
}

CONVOLUTIONS: dict[str, Rowwise] = {
    "conv1d": lambda h: F.conv1d(_signal(h), _fixed(3, 2, 3).to(h), padding=1),
    "conv2d": lambda h: F.conv2d(_image(h), _fixed(2, 1, 2, 2).to(h), _fixed(2).to(h)),
    "conv2d grouped": lambda h: F.conv2d(h.view(-1, 4, 1, 3), _fixed(4, 1, 1, 2).to(h), groups=4),
    "conv3d": lambda h: F.conv3d(_volume(h), _fixed(2, 1, 2, 1, 2).to(h)),
    "conv_tbc": lambda h: torch.conv_tbc(
        _tokens(h).movedim(1, 0).contiguous(), _fixed(2, 4, 3).to(h), _fixed(3).to(h)
    ).movedim(1, 0),
    "conv_transpose1d": lambda h: F.conv_transpose1d(_signal(h), _fixed(2, 3, 2).to(h), stride=2),
    "conv_transpose2d": lambda h: F.conv_transpose2d(_image(h), _fixed(1, 2, 2, 2).to(h)),
    "conv_transpose3d": lambda h: F.conv_transpose3d(_volume(h), _fixed(1, 2, 1, 2, 1).to(h)),
    "fold": lambda h: F.fold(h.view(-1, 4, 3), (2, 4), (2, 2)),
    "unfold images": lambda h: F.unfold(_image(h).square(), (2, 2)),
    "avg_pool1d": lambda h: F.avg_pool1d(_signal(h).square(), 2),
    "avg_pool2d": lambda h: F.avg_pool2d(_image(h).square(), 2, 1),
    "avg_pool3d": lambda h: F.avg_pool3d(_volume(h).square(), (1, 2, 2), 1),
    "adaptive_avg_pool1d": lambda h: F.adaptive_avg_pool1d(_signal(h).square(), 4),
    "adaptive_avg_pool2d": lambda h: F.adaptive_avg_pool2d(_image(h).square(), (2, 3)),
    "adaptive_avg_pool3d": lambda h: F.adaptive_avg_pool3d(_volume(h).square(), (1, 2, 2)),
    "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(_signal(h), 3),
    "adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(_image(h), (2, 2)),
    "fractional_max_pool2d": lambda h: F.fractional_max_pool2d(
        _image(h), 2, output_size=(2, 2), _random_samples=torch.full((len(h), 1, 2), 0.3).to(h)
    ),
    "lp_pool1d": lambda h: F.lp_pool1d(_positive(_signal(h)), 2.0, 2),
    "lp_pool2d": lambda h: F.lp_pool2d(_positive(_image(h)), 2.0, 2),
    "max_pool1d": lambda h: F.max_pool1d(_signal(h), 2),
    "max_pool2d": lambda h: F.max_pool2d(_image(h), 2, 1),
    "max_pool3d": lambda h: F.max_pool3d(_volume(h), (1, 2, 2)),
    "max_unpool1d": lambda h: F.max_unpool1d(*F.max_pool1d(_signal(h), 2, return_indices=True), 2),
    "interpolate nearest": lambda h: F.interpolate(_image(h), scale_factor=2),
    "interpolate linear": lambda h: F.interpolate(_signal(h), 9, mode="linear"),
    "interpolate bilinear": lambda h: F.interpolate(_image(h), (5, 5), mode="bilinear"),
    "interpolate bicubic": lambda h: F.interpolate(_image(h), (5, 5), mode="bicubic"),
    "interpolate area": lambda h: F.interpolate(_image(h), (2, 2), mode="area"),
    "interpolate trilinear": lambda h: F.interpolate(_volume(h), (3, 3, 3), mode="trilinear"),
    "interpolate antialias": lambda h: F.interpolate(
        _image(h), (2, 3), mode="bilinear", antialias=True
    ),
    "grid_sample values": lambda h: F.grid_sample(
        _image(h), (0.8 * _fixed(1, 2, 2, 2)).to(h).expand(len(h), 2, 2, 2), align_corners=False
    ),
    "grid_sample places": lambda h: F.grid_sample(
        _fixed(1, 1, 5, 5).to(h).expand(len(h), 1, 5, 5),
        0.7 * h.tanh().view(-1, 2, 3, 2),
        align_corners=False,
    ),
    "grid_sample of both": lambda h: F.grid_sample(
        _image(h), 0.7 * h.tanh().view(-1, 2, 3, 2), align_corners=True
    ),
    "affine_grid": lambda h: F.affine_grid(h[:, :6].view(-1, 2, 3), [len(h), 1, 2, 2], False),
    "pixel_shuffle": lambda h: F.pixel_shuffle(h.view(-1, 4, 1, 3).square(), 2),
    "pixel_unshuffle": lambda h: F.pixel_unshuffle(h.view(-1, 1, 2, 6).square(), 2),
    "channel_shuffle": lambda h: F.channel_shuffle(h.view(-1, 4, 1, 3).square(), 2),
    "pad reflect": lambda h: F.pad(_signal(h), (1, 2), mode="reflect"),
    "pad reflect 2d": lambda h: F.pad(_image(h), (1, 1, 1, 1), mode="reflect"),
    "pad replicate": lambda h: F.pad(_signal(h), (1, 2), mode="replicate"),
    "pad circular": lambda h: F.pad(_signal(h), (1, 2), mode="circular"),
    "pad constant": lambda h: F.pad(_signal(h), (1, 2)),
}

VIEWS: dict[str, Rowwise] = {
    "as_strided": lambda h: h.square().contiguous().as_strided((len(h), 5), (12, 2)),
    "broadcast": lambda h: h.unsqueeze(2).expand(-1, -1, 2).square(),
    "cat and chunk": lambda h: torch.cat(h.square().chunk(3, 1)[::-1], 1),
    "combinations": lambda h: torch.stack([torch.combinations(r[:4]) for r in h]),
    "diag_embed": lambda h: torch.diag_embed(h[:, :3].square()) + _matrix(h),
    "diagonal_scatter": lambda h: torch.diagonal_scatter(_matrix(h), h[:, :3].sin(), 0, 1, 2),
    "flip": lambda h: h.square().flip(1),
    "gather": lambda h: torch.gather(h.square(), 1, torch.arange(5).expand(len(h), 5)),
    "index": lambda h: h.square()[:, [0, 3, 3, 5]],
    "index_add": lambda h: h.index_add(1, torch.tensor([0, 2, 2]), h[:, :3].square()),
    "index_copy": lambda h: h.index_copy(1, torch.tensor([0, 2, 4]), h[:, :3].square()),
    "index_put": lambda h: h.index_put((torch.arange(len(h)), torch.tensor(3)), h[:, 0].sin()),
    "index_reduce": lambda h: torch.index_reduce(
        h, 1, torch.tensor([0, 2, 2]), h[:, :3].sin(), "prod"
    ),
    "index_select": lambda h: torch.index_select(h.square(), 1, torch.tensor([1, 1, 4])),
    "in place": lambda h: h.clone().mul_(h.sin()).add_(1),
    "in place of a slice": lambda h: _write_a_slice(h),
    "masked_fill": lambda h: h.square().masked_fill(torch.arange(12) % 3 == 0, 0.0),
    "masked_scatter": lambda h: h.masked_scatter(
        (torch.arange(12) < 3).expand(len(h), 12), h[:, 5:8].sin().contiguous()
    ),
    "masked_select": lambda h: (
        h.square().masked_select((torch.arange(12) % 2 == 0).expand(len(h), 12)).view(-1, 6)
    ),
    "movedim": lambda h: _tokens(h).square().movedim(1, 2),
    "put": lambda h: torch.stack([r.put(torch.tensor([1, 3]), r[:2].sin()) for r in h]),
    "repeat": lambda h: h.square().repeat(1, 2),
    "repeat_interleave": lambda h: h.square().repeat_interleave(2, 1),
    "roll": lambda h: h.square().roll(2, 1),
    "rot90": lambda h: torch.rot90(_tokens(h).square(), 1, (1, 2)),
    "scatter": lambda h: h.scatter(1, torch.arange(4).expand(len(h), 4), h[:, 4:8].sin()),
    "scatter_add": lambda h: h.scatter_add(1, torch.zeros(len(h), 4).long(), h[:, 4:8].sin()),
    "scatter_reduce": lambda h: h.scatter_reduce(
        1, torch.arange(4).expand(len(h), 4), h[:, 4:8].sin(), "prod"
    ),
    "select_scatter": lambda h: torch.select_scatter(h.sin(), h[:, 0] ** 2, 1, 4),
    "slice_scatter": lambda h: torch.slice_scatter(h.sin(), h[:, :3] ** 2, 1, 2, 8, 2),
    "stack": lambda h: torch.stack([h, h.sin()], 1),
    "take_along_dim": lambda h: torch.take_along_dim(
        h.square(), torch.tensor([[0, 2, 2]]).expand(len(h), 3), 1
    ),
    "tile": lambda h: h.square().tile(1, 2),
    "transpose": lambda h: _tokens(h).square().transpose(1, 2),
    "tril": lambda h: _matrix(h).tril(),
    "triu": lambda h: _matrix(h).square().triu(1),
    "tril_indices": lambda h: _matrix(h).square()[
        :, torch.tril_indices(3, 3)[0], torch.tril_indices(3, 3)[1]
    ],
    "unflatten": lambda h: h.square().unflatten(1, (3, 4)),
    "view_as_complex": lambda h: torch.view_as_complex(h.view(-1, 6, 2)).square().abs(),
}


METHODS: dict[str, Rowwise] = {
    "absolute": lambda h: torch.absolute(h + 9),
    "add_": lambda h: h.clone().add_(h.sin()),
    "addcdiv_": lambda h: h.clone().addcdiv_(h.sin(), _positive(h)),
    "addcmul_": lambda h: h.clone().addcmul_(h.sin(), h.cos()),
    "addmv": lambda h: torch.stack([torch.addmv(m[0], m, m[1]) for m in _matrix(h)]),
    "addr": lambda h: torch.stack([torch.addr(m, m[0], m[1]) for m in _matrix(h)]),
    "arccos": lambda h: torch.arccos(_unit(h)),
    "arcsin": lambda h: torch.arcsin(_unit(h)),
    "arctan": torch.arctan,
    "arctan2": lambda h: torch.arctan2(h, _positive(h)),
    "arctanh": lambda h: torch.arctanh(_unit(h)),
    "arcsinh": torch.arcsinh,
    "arccosh": lambda h: torch.arccosh(1 + _positive(h)),
    "atleast_2d": lambda h: torch.atleast_2d(h.square()),
    "block_diag": lambda h: torch.stack([torch.block_diag(m, m.sin()) for m in _matrix(h)]),
    "broadcast_tensors": lambda h: torch.broadcast_tensors(h.square(), h[:, :1])[1].sin() + h,
    "broadcast_to": lambda h: h.square().unsqueeze(1).broadcast_to(len(h), 2, 12),
    "cartesian_prod": lambda h: torch.stack([torch.cartesian_prod(r[:2], r[2:5]) for r in h]),
    "chain of views": lambda h: h.square().view(-1, 3, 4).permute(0, 2, 1).reshape(-1, 12),
    "clamp_": lambda h: h.square().clamp_(0.0, 99.0),
    "clamp_max": lambda h: h.clamp_max(9.0).sin(),
    "clamp_min": lambda h: h.clamp_min(-9.0).sin(),
    "clip": lambda h: h.clip(-9.0, 9.0).sin(),
    "column_stack": lambda h: torch.column_stack([h, h.sin()]),
    "concat": lambda h: torch.concat([h, h.sin()], 1),
    "concatenate": lambda h: torch.concatenate([h, h.sin()], 1),
    "copy_": lambda h: torch.empty_like(h).copy_(h.sin()),
    "corrcoef": lambda h: torch.stack([torch.corrcoef(t) for t in _tokens(h)]),
    "cov": lambda h: torch.stack([torch.cov(t) for t in _tokens(h)]),
    "cumprod_": lambda h: h.clone().cumprod_(1),
    "cumsum_": lambda h: h.square().cumsum_(1),
    "cummin": lambda h: torch.cummin(h, 1).values,
    "det": lambda h: torch.det(_matrix(h)).unsqueeze(1),
    "diagflat": lambda h: torch.stack([torch.diagflat(r[:3].square()) for r in h]) + _matrix(h),
    "div_": lambda h: h.clone().div_(_positive(h)),
    "divide": lambda h: torch.divide(h, _positive(h)),
    "dot": lambda h: torch.stack([torch.dot(r[:6], r[6:].sin()) for r in h]).unsqueeze(1),
    "dsplit": lambda h: torch.cat(torch.dsplit(_tokens(h).square(), 2)[::-1], 1),
    "dstack": lambda h: torch.dstack([h, h.sin()]),
    "embedding": lambda h: F.embedding(torch.tensor([0, 2, 2]), h.square().T).movedim(1, 0),
    "erf_": lambda h: h.clone().erf_(),
    "exp_": lambda h: h.clone().exp_(),
    "expand_as": lambda h: h[:, :1].square().expand_as(h) + h,
    "fmax": lambda h: torch.fmax(h, h - 1).sin(),
    "fmin": lambda h: torch.fmin(h, h + 1).sin(),
    "flatten": lambda h: _tokens(h).square().flatten(1),
    "fliplr": lambda h: torch.fliplr(h.square()),
    "ger": lambda h: torch.stack([torch.ger(r[:3], r[3:6]) for r in h]),
    "hardshrink": lambda h: F.hardshrink(_positive(h), 0.1).sin(),
    "hardsigmoid": lambda h: F.hardsigmoid(h / 9).sin(),
    "hardtanh": lambda h: F.hardtanh(h, -9.0, 9.0).sin(),
    "hsplit": lambda h: torch.cat(torch.hsplit(h.square(), 2)[::-1], 1),
    "hstack": lambda h: torch.hstack([h, h.sin()]),
    "index_fill": lambda h: h.square().index_fill(1, torch.tensor([1]), 0.0),
    "index_put_": lambda h: h.clone().index_put_(
        (torch.arange(len(h)), torch.tensor(3)), h[:, 0].sin()
    ),
    "inner": lambda h: torch.stack([torch.inner(t, t.sin()) for t in _tokens(h)]),
    "inverse": lambda h: torch.inverse(_matrix(h)),
    "leaky_relu": lambda h: F.leaky_relu(h).square(),
    "log_": lambda h: _positive(h).log_(),
    "masked_fill_": lambda h: h.square().masked_fill_(torch.arange(12) % 3 == 0, 0.0),
    "matrix_exp": lambda h: torch.matrix_exp(_matrix(h) / 4),
    "meshgrid": lambda h: torch.stack(
        [torch.stack(torch.meshgrid(r[:2].sin(), r[2:4].exp(), indexing="ij")) for r in h]
    ),
    "min": lambda h: _tokens(h).min(2).values.square(),
    "amin": lambda h: _tokens(h).amin(2).square(),
    "minimum": lambda h: torch.minimum(h, h + 1).sin(),
    "mm": lambda h: torch.mm(h.sin(), _fixed(12, 5).to(h)),
    "msort": lambda h: torch.msort(h.T).T.sin() if len(h) == 1 else h.sin(),
    "mul_": lambda h: h.clone().mul_(h.sin()),
    "multiply": lambda h: torch.multiply(h, h.sin()),
    "mv": lambda h: torch.stack([torch.mv(m, m[0]) for m in _matrix(h)]),
    "nanmedian": lambda h: _tokens(h).nanmedian(2).values.square(),
    "nanquantile": lambda h: torch.nanquantile(_tokens(h), 0.3, dim=2).square(),
    "narrow": lambda h: h.square().narrow(1, 2, 5),
    "neg_": lambda h: h.sin().neg_(),
    "negative": lambda h: torch.negative(h.sin()),
    "operators": lambda h: (2 - h) * (1 / _positive(h)) + (-h) ** 2 - 2**h + h / 3 + abs(h + 9),
    "operators in place": lambda h: _in_place_operators(h),
    "permute": lambda h: _tokens(h).square().permute(0, 2, 1),
    "pow_": lambda h: _positive(h).pow_(1.5),
    "positive": lambda h: torch.positive(h.sin()),
    "ravel": lambda h: h.square().ravel().view(-1, 12),
    "relu": lambda h: F.relu(h + 9).sin(),
    "relu method": lambda h: (h + 9).relu().sin(),
    "relu6": lambda h: F.relu6(_unit(h)).sin(),
    "reshape": lambda h: h.square().reshape(-1, 3, 4),
    "reshape_as": lambda h: h.square().reshape_as(h),
    "rsqrt_": lambda h: _positive(h).rsqrt_(),
    "scatter_": lambda h: h.clone().scatter_(
        1, torch.arange(4).expand(len(h), 4), h[:, 4:8].sin()
    ),
    "scatter_add_": lambda h: h.clone().scatter_add_(
        1, torch.zeros(len(h), 4).long(), h[:, 4:8].sin()
    ),
    "select": lambda h: h.square().select(1, 3).unsqueeze(1),
    "sigmoid_": lambda h: h.clone().sigmoid_(),
    "sin_": lambda h: h.clone().sin_(),
    "softmax in another dtype": lambda h: h.softmax(1, dtype=torch.float64),
    "softshrink": lambda h: F.softshrink(_positive(h), 0.1).sin(),
    "special.expit": torch.special.expit,
    "special.gammaln": lambda h: torch.special.gammaln(_positive(h)),
    "special.logit": lambda h: torch.special.logit(_unit(h)),
    "split": lambda h: torch.cat(h.square().split([5, 7], 1)[::-1], 1),
    "split_with_sizes": lambda h: torch.cat(h.square().split_with_sizes([5, 7], 1)[::-1], 1),
    "sqrt_": lambda h: _positive(h).sqrt_(),
    "square_": lambda h: h.clone().square_(),
    "squeeze": lambda h: h.square().unsqueeze(1).squeeze(1),
    "squeeze of all": lambda h: h.square().unsqueeze(1).squeeze(),
    "squeeze of several": lambda h: h.square().view(-1, 1, 12, 1).squeeze((1, 3)),
    "sub_": lambda h: h.clone().sub_(h.sin()),
    "subtract": lambda h: torch.subtract(h, h.sin()),
    "sum of all": lambda h: torch.stack([r.square().sum() for r in h]).unsqueeze(1),
    "mean of all": lambda h: torch.stack([r.square().mean() for r in h]).unsqueeze(1),
    "prod of all": lambda h: torch.stack([r.prod() for r in h]).unsqueeze(1),
    "swapaxes": lambda h: _tokens(h).square().swapaxes(1, 2),
    "swapdims": lambda h: _tokens(h).square().swapdims(1, 2),
    "t": lambda h: h.square().t().t(),
    "tanh_": lambda h: h.clone().tanh_(),
    "tensor_split": lambda h: torch.cat(h.square().tensor_split(5, 1)[::-1], 1),
    "threshold": lambda h: F.threshold(_positive(h), 0.1, 0.0).sin(),
    "transpose_": lambda h: _tokens(h.square()).transpose_(1, 2),
    "tril_": lambda h: _matrix(h).square().tril_(),
    "type_as": lambda h: h.square().type_as(h),
    "unsafe_chunk": lambda h: torch.cat(h.square().unsafe_chunk(3, 1)[::-1], 1),
    "unsqueeze_": lambda h: h.square().unsqueeze_(1),
    "vdot": lambda h: torch.stack([torch.vdot(r[:6], r[6:].sin()) for r in h]).unsqueeze(1),
    "view_as": lambda h: h.square().view_as(h),
    "view_copy": lambda h: torch.view_copy(h.square(), (-1, 3, 4)),
    "vsplit": lambda h: torch.cat(torch.vsplit(h.square(), [1])),
    "vstack": lambda h: torch.vstack([h[:1].square(), h[1:].square()]),
    "zero_": lambda h: h.sin() + h.clone().zero_(),
    "weight_norm": lambda h: F.linear(
        h, torch._weight_norm(_fixed(4, 12).to(h), _fixed(4, 1).to(h).exp(), 0)
    ).sin(),
    "weight_norm of the input": lambda h: torch._weight_norm(
        h.view(-1, 12), _positive(h[:, :1]), 0
    ),
    "multi_head_attention": lambda h: _own_attention(h),
}


def _in_place_operators(h: Tensor) -> Tensor:
    y = h.clone()
    y += h.sin()
    y *= h.cos()
    y -= 1
    y /= _positive(h)
    y **= 2
    return y


_ATTENTION = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
for _parameter in _ATTENTION.parameters():
    _parameter.data = _fixed(*_parameter.shape).to(_parameter) / 2
    _parameter.requires_grad_(False)


def _own_attention(h: Tensor) -> Tensor:
    tokens = _tokens(h)
    return _ATTENTION(tokens, tokens.sin(), tokens.cos(), need_weights=False)[0]


def _write_a_slice(h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[:, ::2] = h[:, ::2].square()
    y[:, 1::2] += h[:, ::2].sin()
    return y


def _attention(h: Tensor) -> Tensor:
    tokens = _tokens(h)
    return F.scaled_dot_product_attention(tokens, tokens.sin(), tokens.cos())


class _Square(torch.autograd.Function):
    """Twice differentiable, without a rule for forward mode or vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def _network() -> nn.Sequential:
    generator = seeded_generator(3)
    net = nn.Sequential(
        nn.Linear(12, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5)
    ).double()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) / 2
    return net.requires_grad_(False)


def _lazily(build: Callable[[], Rowwise]) -> Rowwise:
    """A function that is built at its first call, with torch's warnings about that silenced."""
    built: list[Rowwise] = []

    def call(h: Tensor) -> Tensor:
        if not built:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                built.append(build())
        return built[0](h)

    return call


def _scripted_norm() -> Rowwise:
    return torch.jit.script(_network())


def _traced_norm() -> Rowwise:
    return torch.jit.trace(_network(), torch.zeros(3, 12, dtype=torch.float64))


def _exported_norm() -> Rowwise:
    program = torch.export.export(
        _network(),
        (torch.zeros(3, 12, dtype=torch.float64),),
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    return program.module()


class _Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", _fixed(5, 12))

    def forward(self, h: Tensor) -> Tensor:
        return torch.cdist(h, self.centres)


class _Solves(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        matrix = h[:, :9].tanh().view(-1, 3, 3) / 2 + 2 * torch.eye(3, dtype=h.dtype)
        return torch.linalg.solve(matrix, h[:, 9:].unsqueeze(2)).flatten(1)


def _potential(h: Tensor) -> Tensor:
    return F.layer_norm(h, (12,)).sin().sum(-1) + h.pow(3).sum(-1)


def _own_gradient(h: Tensor) -> Tensor:
    with torch.enable_grad():
        point = h if h.requires_grad else h.detach().requires_grad_()
        return torch.autograd.grad(_potential(point).sum(), point, create_graph=True)[0]


PROGRAMS: dict[str, Rowwise] = {
    "attention": _attention,
    "autograd.Function": _Square.apply,
    "autograd.grad inside": _own_gradient,
    "checkpoint": lambda h: checkpoint(
        lambda s: F.layer_norm(s, (12,)).sin(), h, use_reentrant=False
    ),
    "func.grad inside": lambda h: torch.func.grad(lambda s: _potential(s).sum())(h),
    "func.jacfwd inside": lambda h: torch.func.vmap(
        torch.func.jacfwd(lambda r: F.softmax(r[:3], 0))
    )(h),
    "func.jacrev inside": lambda h: torch.func.vmap(
        torch.func.jacrev(lambda r: F.layer_norm(r, (12,))[:2])
    )(h),
    "func.jvp inside": lambda h: torch.func.jvp(torch.sin, (h,), (h.square(),))[1],
    "func.vmap inside": lambda h: torch.func.vmap(lambda r: F.layer_norm(r, (12,)))(h),
    "vmap of grad inside": lambda h: torch.func.vmap(torch.func.grad(_potential))(h),
    "scripted layer norm": _lazily(_scripted_norm),
    "traced layer norm": _lazily(_traced_norm),
    "exported layer norm": _lazily(_exported_norm),
    "scripted cdist": _lazily(lambda: torch.jit.script(_Distances())),
    "scripted solve": _lazily(lambda: torch.jit.script(_Solves())),
}

FUNCTIONS: dict[str, Rowwise] = {
    **ELEMENTWISE,
    **ACTIVATIONS,
    **NORMALISATIONS,
    **REDUCTIONS,
    **DISTANCES,
    **PRODUCTS,
    **LINALG,
    **SPECTRAL,
    **CONVOLUTIONS,
    **VIEWS,
    **METHODS,
    **PROGRAMS,
}
