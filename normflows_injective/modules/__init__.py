"""Modules of torch, whoever made them: found behind callables, copied, and their numbers."""
