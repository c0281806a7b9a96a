"""Programs around torch's functions: scripts, transforms and functions of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.rowwise import Rowwise, fixed, tokens
from support.seeds import seeded_generator


def _attention(h: Tensor) -> Tensor:
    query = tokens(h)
    return F.scaled_dot_product_attention(query, query.sin(), query.cos())


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
        self.register_buffer("centres", fixed(5, 12))

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
