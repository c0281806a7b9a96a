"""Base distributions."""

from normflows.distributions import DiagGaussian

__all__ = ["DiagGaussian"]
