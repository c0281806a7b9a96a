"""Differentiable functions of torch, each as a map of rows (B, 12) to a batch (B, *).

Every entry acts on each row alone and is smooth near standard normal rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from support.differentiable_methods import METHODS
from support.differentiable_programs import PROGRAMS
from support.rowwise import (
    Rowwise,
    definite,
    fixed,
    image,
    matrix,
    parts,
    positive,
    real,
    side,
    signal,
    symmetric,
    tall,
    tokens,
    triangular,
    unit,
    volume,
)


def _write_a_slice(h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[:, ::2] = h[:, ::2].square()
    y[:, 1::2] += h[:, ::2].sin()
    return y


ELEMENTWISE: dict[str, Rowwise] = {
    "abs": lambda h: (h + 9).abs(),
    "acos": lambda h: torch.acos(unit(h)),
    "acosh": lambda h: torch.acosh(1 + positive(h)),
    "addcdiv": lambda h: torch.addcdiv(h, h.sin(), positive(h)),
    "addcmul": lambda h: torch.addcmul(h, h.sin(), h.cos()),
    "asin": lambda h: torch.asin(unit(h)),
    "asinh": torch.asinh,
    "atan": torch.atan,
    "atan2": lambda h: torch.atan2(h, positive(h)),
    "atanh": lambda h: torch.atanh(unit(h)),
    "clamp": lambda h: h.clamp(-9, 9),
    "complex": lambda h: real(torch.complex(h, h.sin()) ** 2),
    "copysign": lambda h: torch.copysign(h + 9, -torch.ones_like(h)),
    "cos": torch.cos,
    "cosh": torch.cosh,
    "deg2rad": torch.deg2rad,
    "digamma": lambda h: torch.digamma(positive(h)),
    "div": lambda h: h / positive(h),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfinv": lambda h: torch.erfinv(unit(h)),
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "float_power": lambda h: torch.float_power(positive(h), 1.5).to(h),
    "fmod": lambda h: torch.fmod(h, 50.0),
    "frac": lambda h: torch.frac(unit(h)),
    "hypot": lambda h: torch.hypot(h, positive(h)),
    "i0": torch.i0,
    "ldexp": lambda h: torch.ldexp(h, torch.tensor(2)),
    "lerp": lambda h: torch.lerp(h, h.sin(), unit(h)),
    "lgamma": lambda h: torch.lgamma(positive(h)),
    "log": lambda h: torch.log(positive(h)),
    "log10": lambda h: torch.log10(positive(h)),
    "log1p": lambda h: torch.log1p(positive(h)),
    "log2": lambda h: torch.log2(positive(h)),
    "logaddexp": lambda h: torch.logaddexp(h, h.sin()),
    "logaddexp2": lambda h: torch.logaddexp2(h, h.sin()),
    "logit": lambda h: torch.logit(unit(h)),
    "maximum": lambda h: torch.maximum(h, h - 1),
    "mvlgamma": lambda h: torch.mvlgamma(positive(h) + 1, 2),
    "nan_to_num": torch.nan_to_num,
    "polygamma": lambda h: torch.polygamma(1, positive(h)),
    "pow": lambda h: positive(h) ** h,
    "reciprocal": lambda h: torch.reciprocal(positive(h)),
    "remainder": lambda h: torch.remainder(h + 9, 50.0),
    "rsqrt": lambda h: torch.rsqrt(positive(h)),
    "rsub": lambda h: 1 - h.square(),
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "sinc": torch.sinc,
    "sinh": torch.sinh,
    "special.bessel-free entr": lambda h: torch.special.entr(positive(h)),
    "special.erfcx": lambda h: torch.special.erfcx(unit(h)),
    "special.i0e": torch.special.i0e,
    "special.i1": torch.special.i1,
    "special.i1e": torch.special.i1e,
    "special.log_ndtr": torch.special.log_ndtr,
    "special.ndtr": torch.special.ndtr,
    "special.ndtri": lambda h: torch.special.ndtri(unit(h)),
    "special.xlog1py": lambda h: torch.special.xlog1py(h, positive(h)),
    "sqrt": lambda h: torch.sqrt(positive(h)),
    "square": torch.square,
    "tan": lambda h: torch.tan(unit(h)),
    "tanh": torch.tanh,
    "true_divide": lambda h: torch.true_divide(h, positive(h)),
    "where": lambda h: torch.where(h > -9, h.sin(), h),
    "xlogy": lambda h: torch.xlogy(h, positive(h)),
}

ACTIVATIONS: dict[str, Rowwise] = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu tanh": lambda h: F.gelu(h, approximate="tanh"),
    "glu": F.glu,
    "hardswish": lambda h: F.hardswish(unit(h)),
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
        signal(h), fixed(2).to(h), fixed(2).to(h).square() + 0.5
    ),
    "group_norm": lambda h: F.group_norm(h.view(-1, 4, 3), 2, fixed(4).to(h)),
    "instance_norm": lambda h: F.instance_norm(signal(h)),
    "layer_norm": lambda h: F.layer_norm(h, (12,), fixed(12).to(h)),
    "layer_norm of two axes": lambda h: F.layer_norm(tokens(h), (3, 4)),
    "local_response_norm": lambda h: F.local_response_norm(h.view(-1, 4, 3), 2),
    "native_group_norm": lambda h: torch.native_group_norm(
        h.view(-1, 4, 3), None, None, len(h), 4, 3, 2, 1e-5
    )[0],
    "native_layer_norm": lambda h: torch.native_layer_norm(h, [12], None, None, 1e-5)[0],
    "normalize": F.normalize,
    "rms_norm": lambda h: F.rms_norm(h, (12,)),
    "var_mean": lambda h: parts(*torch.var_mean(tokens(h), 2)),
    "std_mean": lambda h: parts(*torch.std_mean(tokens(h), 2)),
}

REDUCTIONS: dict[str, Rowwise] = {
    "amax": lambda h: tokens(h).amax(2),
    "aminmax": lambda h: parts(*torch.aminmax(tokens(h), dim=2)),
    "cosine_similarity": lambda h: F.cosine_similarity(tokens(h), tokens(h).sin(), 2),
    "cummax": lambda h: torch.cummax(h, 1).values,
    "cumprod": lambda h: torch.cumprod(h, 1),
    "cumsum": lambda h: torch.cumsum(h.square(), 1),
    "cumulative_trapezoid": lambda h: torch.cumulative_trapezoid(h.square(), h, dim=1),
    "diff": lambda h: torch.diff(h.square(), dim=1),
    "dist": lambda h: torch.linalg.vector_norm(tokens(h) - h[:, :4].sin().unsqueeze(1), dim=2),
    "kthvalue": lambda h: torch.kthvalue(tokens(h), 2, 2).values,
    "logcumsumexp": lambda h: torch.logcumsumexp(h, 1),
    "logsumexp": lambda h: torch.logsumexp(tokens(h), 2),
    "max": lambda h: tokens(h).max(2).values,
    "mean": lambda h: tokens(h).square().mean(2),
    "median": lambda h: tokens(h).median(2).values,
    "nanmean": lambda h: tokens(h).square().nanmean(2),
    "nansum": lambda h: tokens(h).square().nansum(2),
    "norm": lambda h: torch.norm(tokens(h), dim=2),
    "norm p": lambda h: torch.norm(tokens(h), p=3, dim=2),
    "prod": lambda h: tokens(h).prod(2),
    "quantile": lambda h: torch.quantile(tokens(h), 0.3, dim=2),
    "renorm": lambda h: torch.renorm(h, 2, 0, 1.0),
    "sort": lambda h: torch.sort(h, 1).values,
    "std": lambda h: tokens(h).std(2),
    "sum": lambda h: tokens(h).square().sum(2),
    "topk": lambda h: torch.topk(h, 5, 1).values,
    "trapezoid": lambda h: torch.trapezoid(tokens(h).square(), dim=2),
    "unfold": lambda h: h.square().unfold(1, 3, 2),
    "var": lambda h: tokens(h).var(2),
    "vector_norm inf": lambda h: torch.linalg.vector_norm(tokens(h), float("inf"), dim=2),
    "vector_norm p": lambda h: torch.linalg.vector_norm(tokens(h), 2.5, dim=2),
}

DISTANCES: dict[str, Rowwise] = {
    "cdist": lambda h: torch.cdist(tokens(h), fixed(5, 4).to(h)),
    "cdist of both": lambda h: torch.cdist(tokens(h), tokens(h).sin() + 5),
    "cdist of rows": lambda h: torch.cdist(h, fixed(5, 12).to(h)),
    "cdist p": lambda h: torch.cdist(tokens(h), fixed(5, 4).to(h), p=3.0),
    "cdist by products": lambda h: torch.cdist(
        tokens(h), fixed(5, 4).to(h), compute_mode="use_mm_for_euclid_dist"
    ),
    "pairwise_distance": lambda h: F.pairwise_distance(tokens(h), tokens(h).sin() + 5),
    "pdist": lambda h: torch.stack([F.pdist(row) for row in tokens(h)]),
}

PRODUCTS: dict[str, Rowwise] = {
    "addbmm": lambda h: torch.stack([torch.addbmm(m, m[None], m[None]) for m in matrix(h)]),
    "addmm": lambda h: torch.addmm(h.sin(), h, fixed(12, 12).to(h)),
    "baddbmm": lambda h: torch.baddbmm(matrix(h), matrix(h), matrix(h).sin()),
    "bilinear": lambda h: F.bilinear(h, h.sin(), fixed(3, 12, 12).to(h)),
    "bmm": lambda h: torch.bmm(tokens(h), tokens(h).mT),
    "chain_matmul": lambda h: tokens(h) @ fixed(4, 3).to(h) @ tokens(h),
    "cross": lambda h: torch.linalg.cross(h.view(-1, 4, 3), h.view(-1, 4, 3).sin()),
    "einsum": lambda h: torch.einsum("bij,bkj,ki->bk", tokens(h), tokens(h), fixed(3, 3).to(h)),
    "kron": lambda h: torch.stack([torch.kron(m[:2], m[1:]) for m in matrix(h)]),
    "linear": lambda h: F.linear(h, fixed(5, 12).to(h), fixed(5).to(h)),
    "linear by itself": lambda h: F.linear(h, h[0].sin().view(1, -1) * 0 + 1) + h,
    "matmul": lambda h: torch.matmul(tokens(h), fixed(4, 5).to(h)),
    "matrix_power": lambda h: torch.linalg.matrix_power(matrix(h), 3),
    "multi_dot": lambda h: torch.stack(
        [torch.linalg.multi_dot([m, m.sin(), m]) for m in matrix(h)]
    ),
    "outer": lambda h: torch.stack([torch.outer(r[:3], r[3:6]) for r in h]),
    "tensordot": lambda h: torch.tensordot(tokens(h), fixed(4, 3).to(h), dims=1),
    "vecdot": lambda h: torch.linalg.vecdot(tokens(h), tokens(h).sin()),
}

LINALG: dict[str, Rowwise] = {
    "cholesky": lambda h: torch.linalg.cholesky(definite(h)),
    "cholesky_inverse": lambda h: torch.cholesky_inverse(torch.linalg.cholesky(definite(h))),
    "cholesky_solve": lambda h: torch.cholesky_solve(side(h), torch.linalg.cholesky(definite(h))),
    "cond": lambda h: torch.linalg.cond(matrix(h)).unsqueeze(1),
    "det": lambda h: torch.linalg.det(matrix(h)).unsqueeze(1),
    "eigh values": lambda h: torch.linalg.eigvalsh(symmetric(h)),
    "eigh vectors": lambda h: torch.linalg.eigh(symmetric(h)).eigenvectors.square(),
    "eig values": lambda h: torch.linalg.eigvals(symmetric(h)).real.sort(1).values,
    "householder_product": lambda h: torch.linalg.householder_product(
        matrix(h), matrix(h).diagonal(dim1=1, dim2=2)
    ),
    "inv": lambda h: torch.linalg.inv(matrix(h)),
    "inv_ex": lambda h: torch.linalg.inv_ex(matrix(h)).inverse,
    "ldl": lambda h: torch.linalg.ldl_factor(definite(h)).LD.diagonal(dim1=1, dim2=2),
    "logdet": lambda h: torch.logdet(matrix(h)).unsqueeze(1),
    "lstsq": lambda h: torch.linalg.lstsq(tall(h), h.view(-1, 4, 3)[:, :, :1]).solution,
    "lu": lambda h: parts(*torch.linalg.lu(matrix(h))[1:]),
    "lu_factor": lambda h: torch.linalg.lu_factor(matrix(h)).LU,
    "lu_solve": lambda h: torch.linalg.lu_solve(*torch.linalg.lu_factor(matrix(h)), side(h)),
    "matrix_exp": lambda h: torch.linalg.matrix_exp(matrix(h) / 4),
    "matrix_norm": lambda h: torch.linalg.matrix_norm(matrix(h)).unsqueeze(1),
    "nuclear norm": lambda h: torch.linalg.matrix_norm(matrix(h), "nuc").unsqueeze(1),
    "spectral norm": lambda h: torch.linalg.matrix_norm(matrix(h), 2).unsqueeze(1),
    "ormqr": lambda h: torch.ormqr(
        matrix(h), matrix(h).diagonal(dim1=1, dim2=2), h[:, :9].view(-1, 3, 3)
    ),
    "pinv": lambda h: torch.linalg.pinv(tall(h)),
    "pinv hermitian": lambda h: torch.linalg.pinv(definite(h), hermitian=True),
    "qr": lambda h: parts(*torch.linalg.qr(tall(h))),
    "slogdet": lambda h: torch.linalg.slogdet(matrix(h)).logabsdet.unsqueeze(1),
    "solve": lambda h: torch.linalg.solve(matrix(h), side(h)),
    "solve from the right": lambda h: torch.linalg.solve(
        matrix(h), h[:, 9:].unsqueeze(1), left=False
    ),
    "solve constant": lambda h: torch.linalg.solve(
        fixed(3, 3).to(h) + 3 * torch.eye(3, dtype=h.dtype), side(h)
    ),
    "solve_ex": lambda h: torch.linalg.solve_ex(matrix(h), side(h)).result,
    "solve_triangular": lambda h: torch.linalg.solve_triangular(
        triangular(h), side(h), upper=False
    ),
    "svd values": lambda h: torch.linalg.svdvals(tall(h)),
    "svd vectors": lambda h: torch.linalg.svd(tall(h), full_matrices=False).U.square(),
    "tensorinv": lambda h: torch.stack([torch.linalg.tensorinv(m, 1) for m in matrix(h)]),
    "trace": lambda h: torch.stack([torch.trace(m @ m) for m in matrix(h)]).unsqueeze(1),
    "vander": lambda h: torch.linalg.vander(h[:, :4], N=4),
}

SPECTRAL: dict[str, Rowwise] = {
    "fft": lambda h: real(torch.fft.fft(h)),
    "fft2": lambda h: real(torch.fft.fft2(tokens(h))),
    "fftshift": lambda h: torch.fft.fftshift(h.square(), dim=1),
    "hfft": lambda h: torch.fft.hfft(torch.complex(h, h.sin())),
    "ifft": lambda h: real(torch.fft.ifft(h).resolve_conj()),
    "irfft": lambda h: torch.fft.irfft(torch.fft.rfft(h) ** 2),
    "rfft": lambda h: real(torch.fft.rfft(h)),
    "rfftn": lambda h: torch.fft.rfftn(tokens(h), dim=(1, 2)).abs().flatten(1),
    "stft": lambda h: torch.view_as_real(
        torch.stft(h, 4, window=fixed(4).to(h), return_complex=True, center=False)
    ).flatten(1),
    "polar": lambda h: real(torch.polar(positive(h), h)),
    "angle": lambda h: torch.angle(torch.complex(positive(h), h)),
}

CONVOLUTIONS: dict[str, Rowwise] = {
    "conv1d": lambda h: F.conv1d(signal(h), fixed(3, 2, 3).to(h), padding=1),
    "conv2d": lambda h: F.conv2d(image(h), fixed(2, 1, 2, 2).to(h), fixed(2).to(h)),
    "conv2d grouped": lambda h: F.conv2d(h.view(-1, 4, 1, 3), fixed(4, 1, 1, 2).to(h), groups=4),
    "conv3d": lambda h: F.conv3d(volume(h), fixed(2, 1, 2, 1, 2).to(h)),
    "conv_tbc": lambda h: torch.conv_tbc(
        tokens(h).movedim(1, 0).contiguous(), fixed(2, 4, 3).to(h), fixed(3).to(h)
    ).movedim(1, 0),
    "conv_transpose1d": lambda h: F.conv_transpose1d(signal(h), fixed(2, 3, 2).to(h), stride=2),
    "conv_transpose2d": lambda h: F.conv_transpose2d(image(h), fixed(1, 2, 2, 2).to(h)),
    "conv_transpose3d": lambda h: F.conv_transpose3d(volume(h), fixed(1, 2, 1, 2, 1).to(h)),
    "fold": lambda h: F.fold(h.view(-1, 4, 3), (2, 4), (2, 2)),
    "unfold images": lambda h: F.unfold(image(h).square(), (2, 2)),
    "avg_pool1d": lambda h: F.avg_pool1d(signal(h).square(), 2),
    "avg_pool2d": lambda h: F.avg_pool2d(image(h).square(), 2, 1),
    "avg_pool3d": lambda h: F.avg_pool3d(volume(h).square(), (1, 2, 2), 1),
    "adaptive_avg_pool1d": lambda h: F.adaptive_avg_pool1d(signal(h).square(), 4),
    "adaptive_avg_pool2d": lambda h: F.adaptive_avg_pool2d(image(h).square(), (2, 3)),
    "adaptive_avg_pool3d": lambda h: F.adaptive_avg_pool3d(volume(h).square(), (1, 2, 2)),
    "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(signal(h), 3),
    "adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(image(h), (2, 2)),
    "fractional_max_pool2d": lambda h: F.fractional_max_pool2d(
        image(h), 2, output_size=(2, 2), _random_samples=torch.full((len(h), 1, 2), 0.3).to(h)
    ),
    "lp_pool1d": lambda h: F.lp_pool1d(positive(signal(h)), 2.0, 2),
    "lp_pool2d": lambda h: F.lp_pool2d(positive(image(h)), 2.0, 2),
    "max_pool1d": lambda h: F.max_pool1d(signal(h), 2),
    "max_pool2d": lambda h: F.max_pool2d(image(h), 2, 1),
    "max_pool3d": lambda h: F.max_pool3d(volume(h), (1, 2, 2)),
    "max_unpool1d": lambda h: F.max_unpool1d(*F.max_pool1d(signal(h), 2, return_indices=True), 2),
    "interpolate nearest": lambda h: F.interpolate(image(h), scale_factor=2),
    "interpolate linear": lambda h: F.interpolate(signal(h), 9, mode="linear"),
    "interpolate bilinear": lambda h: F.interpolate(image(h), (5, 5), mode="bilinear"),
    "interpolate bicubic": lambda h: F.interpolate(image(h), (5, 5), mode="bicubic"),
    "interpolate area": lambda h: F.interpolate(image(h), (2, 2), mode="area"),
    "interpolate trilinear": lambda h: F.interpolate(volume(h), (3, 3, 3), mode="trilinear"),
    "interpolate antialias": lambda h: F.interpolate(
        image(h), (2, 3), mode="bilinear", antialias=True
    ),
    "grid_sample values": lambda h: F.grid_sample(
        image(h), (0.8 * fixed(1, 2, 2, 2)).to(h).expand(len(h), 2, 2, 2), align_corners=False
    ),
    "grid_sample places": lambda h: F.grid_sample(
        fixed(1, 1, 5, 5).to(h).expand(len(h), 1, 5, 5),
        0.7 * h.tanh().view(-1, 2, 3, 2),
        align_corners=False,
    ),
    "grid_sample of both": lambda h: F.grid_sample(
        image(h), 0.7 * h.tanh().view(-1, 2, 3, 2), align_corners=True
    ),
    "affine_grid": lambda h: F.affine_grid(h[:, :6].view(-1, 2, 3), [len(h), 1, 2, 2], False),
    "pixel_shuffle": lambda h: F.pixel_shuffle(h.view(-1, 4, 1, 3).square(), 2),
    "pixel_unshuffle": lambda h: F.pixel_unshuffle(h.view(-1, 1, 2, 6).square(), 2),
    "channel_shuffle": lambda h: F.channel_shuffle(h.view(-1, 4, 1, 3).square(), 2),
    "pad reflect": lambda h: F.pad(signal(h), (1, 2), mode="reflect"),
    "pad reflect 2d": lambda h: F.pad(image(h), (1, 1, 1, 1), mode="reflect"),
    "pad replicate": lambda h: F.pad(signal(h), (1, 2), mode="replicate"),
    "pad circular": lambda h: F.pad(signal(h), (1, 2), mode="circular"),
    "pad constant": lambda h: F.pad(signal(h), (1, 2)),
}

VIEWS: dict[str, Rowwise] = {
    "as_strided": lambda h: h.square().contiguous().as_strided((len(h), 5), (12, 2)),
    "broadcast": lambda h: h.unsqueeze(2).expand(-1, -1, 2).square(),
    "cat and chunk": lambda h: torch.cat(h.square().chunk(3, 1)[::-1], 1),
    "combinations": lambda h: torch.stack([torch.combinations(r[:4]) for r in h]),
    "diag_embed": lambda h: torch.diag_embed(h[:, :3].square()) + matrix(h),
    "diagonal_scatter": lambda h: torch.diagonal_scatter(matrix(h), h[:, :3].sin(), 0, 1, 2),
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
    "in place of a slice": _write_a_slice,
    "masked_fill": lambda h: h.square().masked_fill(torch.arange(12) % 3 == 0, 0.0),
    "masked_scatter": lambda h: h.masked_scatter(
        (torch.arange(12) < 3).expand(len(h), 12), h[:, 5:8].sin().contiguous()
    ),
    "masked_select": lambda h: (
        h.square().masked_select((torch.arange(12) % 2 == 0).expand(len(h), 12)).view(-1, 6)
    ),
    "movedim": lambda h: tokens(h).square().movedim(1, 2),
    "put": lambda h: torch.stack([r.put(torch.tensor([1, 3]), r[:2].sin()) for r in h]),
    "repeat": lambda h: h.square().repeat(1, 2),
    "repeat_interleave": lambda h: h.square().repeat_interleave(2, 1),
    "roll": lambda h: h.square().roll(2, 1),
    "rot90": lambda h: torch.rot90(tokens(h).square(), 1, (1, 2)),
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
    "transpose": lambda h: tokens(h).square().transpose(1, 2),
    "tril": lambda h: matrix(h).tril(),
    "triu": lambda h: matrix(h).square().triu(1),
    "tril_indices": lambda h: matrix(h).square()[
        :, torch.tril_indices(3, 3)[0], torch.tril_indices(3, 3)[1]
    ],
    "unflatten": lambda h: h.square().unflatten(1, (3, 4)),
    "view_as_complex": lambda h: torch.view_as_complex(h.view(-1, 6, 2)).square().abs(),
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
