"""Classical densities on the simplex of three parts: Dirichlet and logistic-normal.

Each is fitted to compositions (N, 3) and covariates (N, C), C = 0 for none, and returns a function
of both that gives log-densities (N,) in nats against the Lebesgue measure of the first two parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import digamma, gammaln

import normflows_injective as nfi

__all__ = ["Array", "Fit", "LogDensity", "fit_dirichlet", "fit_logistic_normal"]

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


def _design(covariates: Array) -> Array:
    return np.concatenate([np.ones((len(covariates), 1)), covariates], axis=1)
