"""Layers for guides: factories of a number of latents, for ``AutoFlow(model, factory)``.

All of them start as the identity, up to permutations, and can be trained with a learning rate of
0.01 to 0.03, as the guides of Pyro are. Options are given by ``functools.partial`` or a lambda.
"""

from ...flows.guides.layers import autoregressive, couplings, splines

__all__ = ["autoregressive", "couplings", "splines"]


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
