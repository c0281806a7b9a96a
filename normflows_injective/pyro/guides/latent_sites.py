"""Refusals of latent variables that a joint guide would serve wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution

from ...errors import UnsupportedModelError


def refuse_unserved_sites(trace: Any) -> None:
    """Raise if latent variables are discrete, subsampled, points or masked, or there are none."""
    sites = list(trace.iter_stochastic_nodes())
    if not sites:
        raise UnsupportedModelError(
            "The model has no latent variables for the guide to draw: all its sample sites are "
            "observed, hidden or subsample indices. Use an empty guide, or check what is exposed."
        )
    _refuse_discrete({name: site for name, site in sites if site["fn"].support.is_discrete})
    _refuse_subsampled({name: site for name, site in sites if _subsampled_plates(site)})
    for name, site in sites:
        _refuse_points(name, site)
        _refuse_masked(name, site)


def _refuse_discrete(sites: dict[str, Any]) -> None:
    if not sites:
        return
    name = next(iter(sites))
    hidden = f"pyro.poutine.block(model, hide={list(sites)})"
    endless = [each for each, site in sites.items() if not _can_be_summed(site["fn"])]
    if endless:
        remedy = (
            f"{endless[0]!r} has no finite number of values that could be summed. Replace it by a "
            f"continuous law, or build this guide on {hidden} and write one for the rest."
        )
    else:
        remedy = (
            f"Sum it out: build the guide on {hidden} and train with TraceEnum_ELBO on "
            "pyro.infer.config_enumerate(model)."
        )
    raise UnsupportedModelError(
        f"Latent variable {name!r} is discrete, and this guide is over continuous ones. {remedy}"
    )


def _can_be_summed(fn: Any) -> bool:
    if not fn.has_enumerate_support:
        return False
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError:
        return False
    return True


def _refuse_subsampled(sites: dict[str, Any]) -> None:
    if not sites:
        return
    name, site = next(iter(sites.items()))
    frame = _subsampled_plates(site)[0]
    plate = f"pyro.plate({frame.name!r}, {frame.full_size}, subsample_size={frame.size})"
    raise UnsupportedModelError(
        f"Latent variable {name!r} lies in plate {frame.name!r}, which is subsampled, "
        f"{frame.size} of {frame.full_size}: one joint guide would give every minibatch the same "
        "latents. Use the whole plate, or two guides in pyro.infer.autoguide.AutoGuideList(model, "
        f"create_plates=lambda: {plate}): append this one on pyro.poutine.block(model, "
        f"hide={list(sites)}), and AutoNormal(pyro.poutine.block(model, expose={list(sites)}))."
    )


def _subsampled_plates(site: Any) -> list[Any]:
    frames = site["cond_indep_stack"]
    return [f for f in frames if f.full_size is not None and f.full_size > f.size]


def _refuse_points(name: str, site: Any) -> None:
    if isinstance(site["fn"], Delta):
        raise UnsupportedModelError(
            f"Latent variable {name!r} is a Delta law, which has no density for a guide to match: "
            "the bound on the evidence would be infinite. Write "
            f"pyro.deterministic({name!r}, value), or build the guide on "
            f"pyro.poutine.block(model, hide=[{name!r}])."
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
