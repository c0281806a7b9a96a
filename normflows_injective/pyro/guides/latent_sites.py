"""Refusals of latent variables that a joint guide would serve wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import MaskedDistribution

from ...errors import UnsupportedModelError


def refuse_unserved_sites(trace: Any) -> None:
    """Raise if latent variables are discrete, subsampled or masked, or if there are none."""
    sites = list(trace.iter_stochastic_nodes())
    if not sites:
        raise UnsupportedModelError(
            "The model has no latent variables for the guide to draw: all its sample sites are "
            "observed, hidden or subsample indices. Use an empty guide, or check what is exposed."
        )
    for name, site in sites:
        _refuse_discrete(name, site)
        _refuse_subsampled(name, site)
        _refuse_masked(name, site)


def _refuse_discrete(name: str, site: Any) -> None:
    if site["fn"].support.is_discrete:
        raise UnsupportedModelError(
            f"Latent variable {name!r} is discrete, and this guide is over continuous ones. Sum "
            "it out: build the guide on pyro.poutine.block(model, hide=[...]) and train with "
            "TraceEnum_ELBO on pyro.infer.config_enumerate(model)."
        )


def _refuse_subsampled(name: str, site: Any) -> None:
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.full_size > frame.size:
            raise UnsupportedModelError(
                f"Latent variable {name!r} lies in plate {frame.name!r}, which is "
                f"subsampled, {frame.size} of {frame.full_size}: one joint guide would "
                "give every minibatch the same latents. Use the whole plate, or an "
                "amortised guide for this variable."
            )


def _refuse_masked(name: str, site: Any) -> None:
    # A law with mask(False) is Pyro's way to write a flat prior, as ImproperUniform is.
    masks = [mask for mask in _masks_within(site["fn"]) if mask is not False]
    if site["mask"] is not None:
        masks.append(site["mask"])
    if not all(bool(torch.as_tensor(mask).all()) for mask in masks):
        raise UnsupportedModelError(
            f"Latent variable {name!r} is masked, so its prior counts in part or not at all, "
            "while a guide scores all of it: the bound on the evidence would grow without limit. "
            "Mask observed sites only. In place of obs_mask= index the observed rows, and draw "
            "the others by Predictive."
        )


def _masks_within(fn: Any) -> Iterator[Any]:
    """The masks within a distribution, however it is wrapped."""
    if isinstance(fn, MaskedDistribution):
        yield fn._mask
    for part in ("base_dist", "_component_distribution", "component0", "component1"):
        inner = getattr(fn, part, None)
        if inner is not None:
            yield from _masks_within(inner)
