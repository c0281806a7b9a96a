"""Small networks, some with a part that needs care."""

from __future__ import annotations

import normflows as nf
import torch
import torch.nn.functional as F
from torch import nn


def mlp(fan_in, fan_out, act=nn.SiLU):
    return nn.Sequential(
        nn.Linear(fan_in, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, fan_out)
    )


class Attentive(nn.Module):
    def __init__(self, fan_in, fan_out, kind):
        super().__init__()
        self.kind = kind
        self.input, self.output = nn.Linear(fan_in, 12), nn.Linear(12, fan_out)
        if kind == "multihead":
            self.layer = nn.MultiheadAttention(4, 2, batch_first=True)
        elif kind == "transformer":
            self.layer = nn.TransformerEncoderLayer(
                4, 2, 8, dropout=0.0, activation="gelu", batch_first=True
            )

    def forward(self, x):
        h = self.input(x).view(-1, 3, 4)
        if self.kind == "multihead":
            h = h + self.layer(h, h, h, need_weights=False)[0]
        elif self.kind == "transformer":
            h = self.layer(h)
        else:
            h = F.scaled_dot_product_attention(h, h.tanh(), h.sin())
        return self.output(h.flatten(1))


class ReverseOnce(torch.autograd.Function):
    """No forward rule, and a derivative that cannot be differentiated."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return grad * (1 - z.tanh() ** 2)


class Cold(nn.Module):
    """A decoder with a layer that initialises itself on its first batch."""

    def __init__(self, latent_dim):
        super().__init__()
        self.linear = nn.Linear(latent_dim, 5)
        self.norm = nf.flows.ActNorm((5,))

    def forward(self, z):
        return self.norm(self.linear(z))[0]
