"""Gradients of means by draws that move, beside quadrature, and draws that move wrongly."""

from __future__ import annotations

import math

import torch

from support.points import double, legendre


def circle_points(count=400):
    """Angles of the circle with their weight, exact for smooth periodic functions."""
    return torch.arange(count, dtype=torch.float64)[:, None] * (2 * math.pi / count)


def sphere_quadrature(dim, nodes=100, turns=200):
    """Points of the circle or the sphere with weights."""
    phi = circle_points(turns)[:, 0]
    circle = torch.stack([phi.cos(), phi.sin()], dim=1)
    if dim == 2:
        return circle, double(2 * math.pi / turns).expand(turns)
    height, weight = legendre(nodes)
    ring = (1 - height.square()).sqrt()[:, None, None] * circle
    points = torch.cat([ring, height[:, None, None].expand(-1, turns, 1)], dim=2)
    return points.reshape(-1, 3), (weight * 2 * math.pi / turns).repeat_interleave(turns)


def largest_deviation(estimates, expected):
    """Of means of rows (N, k) from their expectations (k,), in standard errors."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    return float(((estimates.mean(0) - expected).abs() / (error + 1e-13)).max())


def sampled_gradients(law, function, batches=60, size=250, draw=None):
    """Gradients (batches, k) of means of a function over batches of moving draws."""
    rows = []
    for _ in range(batches):
        x, log_p = (draw or law.rsample)(size)
        grads = torch.autograd.grad(function(x, log_p).mean(), list(law.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def exact_gradient(law, function, points, weights):
    """Gradient (k,) of the mean of a function, by differentiating a quadrature."""
    log_p = law.log_prob(points)
    mean = (log_p.exp() * weights * function(points, log_p)).sum()
    grads = torch.autograd.grad(mean, list(law.parameters()))
    return torch.cat([g.flatten() for g in grads])


def circulating_rsample(law):
    """Draws that differentiate the accepted proposals of Wood's sampler, which is biased."""
    n = law.shape[0] - 1

    def draw(size):
        kappa = law.concentration
        b = n / (2 * kappa + torch.hypot(2 * kappa, kappa.new_tensor(n)))
        x0 = (1 - b) / (1 + b)
        z = torch.distributions.Beta(double(n / 2), double(n / 2)).sample((10 * size,))
        w = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        log_accept = kappa * (w - x0) + n * ((1 - x0 * w) / (1 - x0 * x0)).log()
        w = w[torch.rand_like(z).log() <= log_accept.detach()][:size]
        assert len(w) == size
        tangent = torch.nn.functional.normalize(torch.randn(size, n, dtype=w.dtype))
        # The mean direction of these laws is the first axis.
        return torch.cat([w[:, None], (1 - w * w).sqrt()[:, None] * tangent], dim=1), w

    return draw
