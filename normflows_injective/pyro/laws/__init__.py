"""Distributions of Pyro."""
