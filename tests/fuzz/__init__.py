"""Calls of every public name with spoilt arguments."""
