"""Densities on the simplex of three parts: Dirichlet, logistic-normal, and flows.

Each is fitted to compositions (N, 3) and covariates (N, C), C = 0 for none, and returns a function
of both that gives log-densities (N,) in nats against the Lebesgue measure of the first two parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import normflows as nf
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import digamma, gammaln
from torch import Tensor, nn

import normflows_injective as nfi

__all__ = ["Fit", "LogDensity", "models"]

Array = NDArray[np.float64]
LogDensity = Callable[[Array, Array], Array]
Fit = Callable[[Array, Array], LogDensity]


def fit_dirichlet(parts: Array, covariates: Array) -> LogDensity:
    """Maximum likelihood of Dirichlet(exp(a + covariates b))."""
    design, logs = _design(covariates), np.log(parts)
    shape = (design.shape[1], parts.shape[1])

    def loss(flat: Array) -> tuple[float, Array]:
        alpha = np.exp(design @ flat.reshape(shape))
        totals = alpha.sum(1, keepdims=True)
        value = gammaln(totals).sum() - gammaln(alpha).sum() + ((alpha - 1) * logs).sum()
        gradient = design.T @ (alpha * (digamma(totals) - digamma(alpha) + logs))
        return -float(value), -gradient.ravel()

    coefficients = minimize(loss, np.zeros(shape).ravel(), jac=True).x.reshape(shape)

    def log_density(parts: Array, covariates: Array) -> Array:
        alpha = np.exp(_design(covariates) @ coefficients)
        normaliser = gammaln(alpha.sum(1)) - gammaln(alpha).sum(1)
        return normaliser + ((alpha - 1) * np.log(parts)).sum(1)

    return log_density


def fit_logistic_normal(parts: Array, covariates: Array) -> LogDensity:
    """Aitchison's model: a normal law of isometric log-ratios, its mean linear in covariates."""
    chart = nfi.flows.SimplexStickBreaking(parts.shape[1], kind="ilr")
    z = chart.inverse(torch.from_numpy(parts))[0].numpy()
    design = _design(covariates)
    coefficients = np.linalg.lstsq(design, z, rcond=None)[0]
    residual = z - design @ coefficients
    covariance = residual.T @ residual / len(z)
    log_root = 0.5 * float(np.linalg.slogdet(2 * math.pi * covariance)[1])

    def log_density(parts: Array, covariates: Array) -> Array:
        z, log_det = (part.numpy() for part in chart.inverse(torch.from_numpy(parts)))
        residual = z - _design(covariates) @ coefficients
        squares = (residual @ np.linalg.inv(covariance) * residual).sum(1)
        return log_det - log_root - 0.5 * squares

    return log_density


def fit_flow(kind: str, steps: int, parts: Array, covariates: Array) -> LogDensity:
    """A tiny flow in coordinates of the simplex: one small spline, one linear map.

    With covariates a shift and a scale that depend on them come last, before the chart.
    """
    x, context = _tensor(parts), _context(covariates)
    model = build_flow(kind, covariates.shape[1])
    model.forward_kld(x, context)  # ActNorm takes its first values from data
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps)
    for _ in range(steps):
        loss = model.forward_kld(x, context)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
    model.eval()

    def log_density(parts: Array, covariates: Array) -> Array:
        with torch.no_grad():
            return model.log_prob(_tensor(parts), _context(covariates)).double().numpy()

    return log_density


def build_flow(kind: str, num_covariates: int) -> nfi.InjectiveNormalizingFlow:
    """Standard normal, spline coupling, linear map, shift and scale, chart of the simplex."""
    context = num_covariates or None
    layers: list[nf.flows.Flow] = [
        nf.flows.CoupledRationalQuadraticSpline(
            2, 1, 8, num_bins=4, activation=nn.SiLU, num_context_channels=context
        ),
        nf.flows.LULinearPermute(2),
    ]
    if context:
        layers.append(nf.flows.MaskedAffineAutoregressive(2, 8, context_features=context))
    layers.append(nf.flows.ActNorm(2))
    base = nf.distributions.DiagGaussian(2, trainable=False)
    return nfi.InjectiveNormalizingFlow(
        base, [*layers, nfi.flows.SimplexStickBreaking(3, kind=kind)]
    )


def _design(covariates: Array) -> Array:
    return np.concatenate([np.ones((len(covariates), 1)), covariates], axis=1)


def _tensor(parts: Array) -> Tensor:
    return torch.from_numpy(parts).float()


def _context(covariates: Array) -> Tensor | None:
    return torch.from_numpy(covariates).float() if covariates.shape[1] else None


def models(steps: int) -> dict[str, Fit]:
    """All models by name, the flows trained for a number of steps."""
    return {
        "Dirichlet": fit_dirichlet,
        "logistic-normal": fit_logistic_normal,
        "flow, normal sticks": partial(fit_flow, "normal", steps),
        "flow, log-ratios": partial(fit_flow, "ilr", steps),
    }
