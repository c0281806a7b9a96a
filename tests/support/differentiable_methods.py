"""Methods of tensors and less common functions of torch, differentiable on rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.rowwise import Rowwise, fixed, matrix, positive, tokens, unit


def _in_place_operators(h: Tensor) -> Tensor:
    y = h.clone()
    y += h.sin()
    y *= h.cos()
    y -= 1
    y /= positive(h)
    y **= 2
    return y


_ATTENTION = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
for _parameter in _ATTENTION.parameters():
    _parameter.data = fixed(*_parameter.shape).to(_parameter) / 2
    _parameter.requires_grad_(False)


def _own_attention(h: Tensor) -> Tensor:
    query = tokens(h)
    return _ATTENTION(query, query.sin(), query.cos(), need_weights=False)[0]


METHODS: dict[str, Rowwise] = {
    "absolute": lambda h: torch.absolute(h + 9),
    "add_": lambda h: h.clone().add_(h.sin()),
    "addcdiv_": lambda h: h.clone().addcdiv_(h.sin(), positive(h)),
    "addcmul_": lambda h: h.clone().addcmul_(h.sin(), h.cos()),
    "addmv": lambda h: torch.stack([torch.addmv(m[0], m, m[1]) for m in matrix(h)]),
    "addr": lambda h: torch.stack([torch.addr(m, m[0], m[1]) for m in matrix(h)]),
    "arccos": lambda h: torch.arccos(unit(h)),
    "arcsin": lambda h: torch.arcsin(unit(h)),
    "arctan": torch.arctan,
    "arctan2": lambda h: torch.arctan2(h, positive(h)),
    "arctanh": lambda h: torch.arctanh(unit(h)),
    "arcsinh": torch.arcsinh,
    "arccosh": lambda h: torch.arccosh(1 + positive(h)),
    "atleast_2d": lambda h: torch.atleast_2d(h.square()),
    "block_diag": lambda h: torch.stack([torch.block_diag(m, m.sin()) for m in matrix(h)]),
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
    "corrcoef": lambda h: torch.stack([torch.corrcoef(t) for t in tokens(h)]),
    "cov": lambda h: torch.stack([torch.cov(t) for t in tokens(h)]),
    "cumprod_": lambda h: h.clone().cumprod_(1),
    "cumsum_": lambda h: h.square().cumsum_(1),
    "cummin": lambda h: torch.cummin(h, 1).values,
    "det": lambda h: torch.det(matrix(h)).unsqueeze(1),
    "diagflat": lambda h: torch.stack([torch.diagflat(r[:3].square()) for r in h]) + matrix(h),
    "div_": lambda h: h.clone().div_(positive(h)),
    "divide": lambda h: torch.divide(h, positive(h)),
    "dot": lambda h: torch.stack([torch.dot(r[:6], r[6:].sin()) for r in h]).unsqueeze(1),
    "dsplit": lambda h: torch.cat(torch.dsplit(tokens(h).square(), 2)[::-1], 1),
    "dstack": lambda h: torch.dstack([h, h.sin()]),
    "embedding": lambda h: F.embedding(torch.tensor([0, 2, 2]), h.square().T).movedim(1, 0),
    "erf_": lambda h: h.clone().erf_(),
    "exp_": lambda h: h.clone().exp_(),
    "expand_as": lambda h: h[:, :1].square().expand_as(h) + h,
    "fmax": lambda h: torch.fmax(h, h - 1).sin(),
    "fmin": lambda h: torch.fmin(h, h + 1).sin(),
    "flatten": lambda h: tokens(h).square().flatten(1),
    "fliplr": lambda h: torch.fliplr(h.square()),
    "ger": lambda h: torch.stack([torch.ger(r[:3], r[3:6]) for r in h]),
    "hardshrink": lambda h: F.hardshrink(positive(h), 0.1).sin(),
    "hardsigmoid": lambda h: F.hardsigmoid(h / 9).sin(),
    "hardtanh": lambda h: F.hardtanh(h, -9.0, 9.0).sin(),
    "hsplit": lambda h: torch.cat(torch.hsplit(h.square(), 2)[::-1], 1),
    "hstack": lambda h: torch.hstack([h, h.sin()]),
    "index_fill": lambda h: h.square().index_fill(1, torch.tensor([1]), 0.0),
    "index_put_": lambda h: h.clone().index_put_(
        (torch.arange(len(h)), torch.tensor(3)), h[:, 0].sin()
    ),
    "inner": lambda h: torch.stack([torch.inner(t, t.sin()) for t in tokens(h)]),
    "inverse": lambda h: torch.inverse(matrix(h)),
    "leaky_relu": lambda h: F.leaky_relu(h).square(),
    "log_": lambda h: positive(h).log_(),
    "masked_fill_": lambda h: h.square().masked_fill_(torch.arange(12) % 3 == 0, 0.0),
    "matrix_exp": lambda h: torch.matrix_exp(matrix(h) / 4),
    "meshgrid": lambda h: torch.stack(
        [torch.stack(torch.meshgrid(r[:2].sin(), r[2:4].exp(), indexing="ij")) for r in h]
    ),
    "min": lambda h: tokens(h).min(2).values.square(),
    "amin": lambda h: tokens(h).amin(2).square(),
    "minimum": lambda h: torch.minimum(h, h + 1).sin(),
    "mm": lambda h: torch.mm(h.sin(), fixed(12, 5).to(h)),
    "msort": lambda h: torch.msort(h.T).T.sin() if len(h) == 1 else h.sin(),
    "mul_": lambda h: h.clone().mul_(h.sin()),
    "multiply": lambda h: torch.multiply(h, h.sin()),
    "mv": lambda h: torch.stack([torch.mv(m, m[0]) for m in matrix(h)]),
    "nanmedian": lambda h: tokens(h).nanmedian(2).values.square(),
    "nanquantile": lambda h: torch.nanquantile(tokens(h), 0.3, dim=2).square(),
    "narrow": lambda h: h.square().narrow(1, 2, 5),
    "neg_": lambda h: h.sin().neg_(),
    "negative": lambda h: torch.negative(h.sin()),
    "operators": lambda h: (2 - h) * (1 / positive(h)) + (-h) ** 2 - 2**h + h / 3 + abs(h + 9),
    "operators in place": _in_place_operators,
    "permute": lambda h: tokens(h).square().permute(0, 2, 1),
    "pow_": lambda h: positive(h).pow_(1.5),
    "positive": lambda h: torch.positive(h.sin()),
    "ravel": lambda h: h.square().ravel().view(-1, 12),
    "relu": lambda h: F.relu(h + 9).sin(),
    "relu method": lambda h: (h + 9).relu().sin(),
    "relu6": lambda h: F.relu6(unit(h)).sin(),
    "reshape": lambda h: h.square().reshape(-1, 3, 4),
    "reshape_as": lambda h: h.square().reshape_as(h),
    "rsqrt_": lambda h: positive(h).rsqrt_(),
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
    "softshrink": lambda h: F.softshrink(positive(h), 0.1).sin(),
    "special.expit": torch.special.expit,
    "special.gammaln": lambda h: torch.special.gammaln(positive(h)),
    "special.logit": lambda h: torch.special.logit(unit(h)),
    "split": lambda h: torch.cat(h.square().split([5, 7], 1)[::-1], 1),
    "split_with_sizes": lambda h: torch.cat(h.square().split_with_sizes([5, 7], 1)[::-1], 1),
    "sqrt_": lambda h: positive(h).sqrt_(),
    "square_": lambda h: h.clone().square_(),
    "squeeze": lambda h: h.square().unsqueeze(1).squeeze(1),
    "squeeze of all": lambda h: h.square().unsqueeze(1).squeeze(),
    "squeeze of several": lambda h: h.square().view(-1, 1, 12, 1).squeeze((1, 3)),
    "sub_": lambda h: h.clone().sub_(h.sin()),
    "subtract": lambda h: torch.subtract(h, h.sin()),
    "sum of all": lambda h: torch.stack([r.square().sum() for r in h]).unsqueeze(1),
    "mean of all": lambda h: torch.stack([r.square().mean() for r in h]).unsqueeze(1),
    "prod of all": lambda h: torch.stack([r.prod() for r in h]).unsqueeze(1),
    "swapaxes": lambda h: tokens(h).square().swapaxes(1, 2),
    "swapdims": lambda h: tokens(h).square().swapdims(1, 2),
    "t": lambda h: h.square().t().t(),
    "tanh_": lambda h: h.clone().tanh_(),
    "tensor_split": lambda h: torch.cat(h.square().tensor_split(5, 1)[::-1], 1),
    "threshold": lambda h: F.threshold(positive(h), 0.1, 0.0).sin(),
    "transpose_": lambda h: tokens(h.square()).transpose_(1, 2),
    "tril_": lambda h: matrix(h).square().tril_(),
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
        h, torch._weight_norm(fixed(4, 12).to(h), fixed(4, 1).to(h).exp(), 0)
    ).sin(),
    "weight_norm of the input": lambda h: torch._weight_norm(
        h.view(-1, 12), positive(h[:, :1]), 0
    ),
    "multi_head_attention": _own_attention,
}
