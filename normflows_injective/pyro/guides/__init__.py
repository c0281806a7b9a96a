"""Guides of Pyro."""
