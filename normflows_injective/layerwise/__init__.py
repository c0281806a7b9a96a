"""Coupling flows built one block at a time: the trainer, its regression and its block."""
