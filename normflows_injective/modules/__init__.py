"""Modules of torch: found in callables, copied, and the numbers that they draw and give."""
