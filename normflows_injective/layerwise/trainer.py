"""Construction of a coupling flow one block at a time, each frozen before the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, final

import normflows as nf
import torch
from torch import Tensor, nn

from ..checks import check_count, check_finite, checks_arguments_of
from ..errors import OptionError, ShapeError
from ..flows.split import joint_encode
from ..flows.volume_preserving.rotation import Rotation, random_rotation
from ..host.first_meeting import meet_first_data
from .block import ConditionalMoments, MomentBlock, check_step_size
from .latents import check_latents
from .regression import MomentRegression, check_regression, fit_moments, new_generator, step_gains

__all__ = ["LatentSplit", "LayerwiseFit", "LayerwiseHistory", "LayerwiseTrainer"]

_LEAST_ROWS = 200


class LatentSplit(NamedTuple):
    """Latents in three roles, each of shape (rows, D).

    Attributes:
        train: Rows that blocks are fitted on.
        validation: Rows by which the state of a fit, and the rotation, are chosen.
        held_out: Rows that say whether a block stays.
    """

    train: Tensor
    validation: Tensor
    held_out: Tensor


class LayerwiseHistory(NamedTuple):
    """What every block gained, in nats on the held-out rows, in the order of construction.

    Every gain is unbiased before the block is judged, but those that stayed did so because they
    passed a threshold on the same rows, so that their sum is slightly too large. Judge the whole
    flow on fresh rows.

    Attributes:
        gains: Mean gains, (L,).
        standard_errors: Of the gains, (L,).
        refused: Gain of the last block that was refused, 0-dimensional; NaN if none was, because
            the number of layers ran out.
        refused_standard_error: Of that gain. Where the block was the identity, that of the best
            model that was rejected for it: what could not be told from zero.
    """

    gains: Tensor
    standard_errors: Tensor
    refused: Tensor
    refused_standard_error: Tensor


class LayerwiseFit(NamedTuple):
    """What :meth:`LayerwiseTrainer.fit` built.

    Attributes:
        flows: Layers from latent to data, as ``nf.NormalizingFlow`` wants them: two for each
            block, the last block first.
        history: :class:`LayerwiseHistory`.
    """

    flows: list[nf.flows.Flow]
    history: LayerwiseHistory


class _Step(NamedTuple):
    """A block behind its rotation, and its gain on the held-out rows."""

    flows: list[nf.flows.Flow]
    gain: Tensor
    standard_error: Tensor


@final
@checks_arguments_of
class LayerwiseTrainer:
    r"""Add a rotation and an affine block, fit it, freeze it, and so on until nothing is gained.

    A block takes a step of size :math:`\eta` towards conditional mean zero and variance one. The
    loss falls by the gain that is measured on rows that took no part in the fit, and the
    construction ends where that gain is no more than some standard errors: with few samples every
    block beyond fits noise, and the loss on new data rises without bound.

    Half of the rows fit, a quarter chooses among rotations, a quarter decides about staying.

    Args:
        dim: Number of coordinates :math:`D`, at least two.
        step_size: :math:`\eta` in (0, 1]. Half steps end lower than full ones, which destroy
            structure that later blocks could use.
        candidates: Number of random rotations that are tried for a block.
        max_layers: Number of blocks at most.
        stop_errors: A block whose held-out gain is at most so many standard errors is refused;
            None to keep all of them.
        patience: Number of refusals in a row after which the construction ends. A refused block is
            not added; the next try has other rotations.
        regression: Size and pace of the fits.
        generator: Source of rotations, rows, weights and batches; by default one of seed 0.
            Torch's own is left alone.

    Raises:
        ShapeError: If ``dim`` is less than two.
        OptionError: If another option is out of range.

    References:
        Draxler et al., arXiv 2402.06578, proof of universality and layer-wise experiment; the
        held-out rule is derived here.

    Examples:
        >>> x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 1
        >>> regression = MomentRegression((8,), steps=20)
        >>> trainer = LayerwiseTrainer(2, max_layers=3, regression=regression)
        >>> flows, history = trainer.fit(x)
        >>> model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), flows)
        >>> bool((history.gains > 0).all()), len(flows) == 2 * len(history.gains)
        (True, True)
    """

    def __init__(
        self,
        dim: int,
        step_size: float = 0.5,
        candidates: int = 4,
        max_layers: int = 100,
        stop_errors: float | None = 2.0,
        patience: int = 3,
        regression: MomentRegression | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if dim < 2:
            raise ShapeError("LayerwiseTrainer needs at least two dimensions, got dim=1.")
        check_step_size(step_size)
        if stop_errors is not None and not stop_errors >= 0:
            raise OptionError(f"stop_errors must be None or not negative, got {stop_errors!r}.")
        self.dim, self.step_size, self.candidates = dim, step_size, candidates
        self.max_layers, self.stop_errors, self.patience = max_layers, stop_errors, patience
        # Small networks and ratios: what a block leaves, the next ones can take.
        small = MomentRegression((32,), 160, learning_rate=1e-2, max_log_ratio=2.0)
        self.regression = check_regression(small if regression is None else regression)
        self.generator = new_generator(0) if generator is None else generator

    def fit(self, x: Tensor, given: Sequence[nf.flows.Flow] = ()) -> LayerwiseFit:
        """Build a flow from data, or on top of one that is there.

        Args:
            x: Data of shape (N, D), N at least 200, best standardised.
            given: Layers from latent to data that are already there, as a list or ``model.flows``.
                They stand at the end of the result and are not changed, but for layers that have
                yet to meet data, which initialise themselves on x.

        Returns:
            :class:`LayerwiseFit`; the parameters of its new layers do not require gradients.

        Raises:
            ShapeError: If x, or what ``given`` makes of it, has another width.
            DtypeError: If x is neither float32 nor float64.
            OptionError: If there are too few rows, or ``given`` is no sequence of layers.
            NonFiniteError: If x, or what ``given`` makes of it, holds NaN or infinity.
        """
        check_latents(x, _LEAST_ROWS, "LayerwiseTrainer")
        if x.shape[1] != self.dim:
            raise ShapeError(
                f"x must have shape (N, {self.dim}), got {tuple(x.shape)}. Give dim={x.shape[1]} "
                "to the trainer, or other data."
            )
        _check_given(given)
        with torch.inference_mode(False), torch.no_grad():
            layers = meet_first_data(
                nn.ModuleList(given), lambda layers: joint_encode(layers, x.detach().clone())
            )
            z = joint_encode(layers, x.detach().clone())
            check_finite(z, "the latents of x under the given layers")
            if z.shape != x.shape:
                raise ShapeError(
                    f"The given layers must keep the shape {tuple(x.shape)} of x, but made "
                    f"{tuple(z.shape)} of it. Leave out those that change it."
                )
            return self._build(self._split(z), list(given))

    def skeleton(self, num_blocks: int) -> list[nf.flows.Flow]:
        """Untrained layers into which the state of what :meth:`fit` built loads.

        All blocks of a trainer have one architecture, which its options determine: a trainer of
        the same ``dim``, ``step_size`` and ``regression`` gives the skeleton of another's flows.

        Args:
            num_blocks: Number L of blocks, ``len(history.gains)``.

        Returns:
            2 L layers from latent to data, all of them the identity, in torch's default dtype and
            without gradients. A flow of other precision is restored by converting its model before
            the state is loaded. Layers that were given to :meth:`fit` come after them.

        Raises:
            OptionError: If the number of blocks is no positive integer.

        Examples:
            >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 1
            >>> trainer = LayerwiseTrainer(2, max_layers=2)
            >>> flows, history = trainer.fit(x)
            >>> model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), flows)
            >>> layers = LayerwiseTrainer(2).skeleton(len(history.gains))
            >>> again = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), layers)
            >>> again.load_state_dict(model.state_dict())
            <All keys matched successfully>
            >>> torch.equal(again.log_prob(x), model.log_prob(x))
            True
        """
        check_count(num_blocks, "num_blocks")
        kept, like = self.dim // 2, torch.zeros(())
        hidden, bound = self.regression.hidden, self.regression.max_log_ratio
        flows: list[nf.flows.Flow] = []
        for _ in range(num_blocks):
            moments = ConditionalMoments.blank(kept, self.dim - kept, hidden, bound, like)
            block = MomentBlock(self.dim, moments, self.step_size)
            flows += [block, Rotation(torch.eye(self.dim))]
        return flows

    def _split(self, z: Tensor) -> LatentSplit:
        source = self.generator
        order = torch.randperm(len(z), generator=source, device=source.device).to(z.device)
        half, quarter = len(z) // 2, len(z) // 4
        return LatentSplit(
            z[order[:half]], z[order[half : half + quarter]], z[order[half + quarter :]]
        )

    def _build(self, split: LatentSplit, flows: list[nf.flows.Flow]) -> LayerwiseFit:
        gains: list[Tensor] = []
        errors: list[Tensor] = []
        nothing = torch.full((), math.nan, dtype=split.train.dtype, device=split.train.device)
        refused, refused_error, failures = nothing, nothing, 0
        while len(gains) < self.max_layers and failures < self.patience:
            step = self._step(split)
            if self.stop_errors is not None and not step.gain > (
                self.stop_errors * step.standard_error
            ):
                refused, refused_error = step.gain, step.standard_error
                failures += 1
                continue
            failures = 0
            gains.append(step.gain)
            errors.append(step.standard_error)
            flows = [*step.flows, *flows]
            split = LatentSplit(*(joint_encode(step.flows, rows) for rows in split))
        # A refusal that a later success outlived says nothing about the end.
        refused, refused_error = (refused, refused_error) if failures else (nothing, nothing)
        empty = split.train.new_zeros(0)
        history = LayerwiseHistory(
            torch.stack(gains) if gains else empty,
            torch.stack(errors) if errors else empty,
            refused,
            refused_error,
        )
        return LayerwiseFit(flows, history)

    def _step(self, split: LatentSplit) -> _Step:
        """The best of some blocks behind random rotations, by the validation rows."""
        found = []
        for _ in range(self.candidates):
            rotation = random_rotation(self.dim, self.generator).to(split.train)
            train, validation = (self._parts(rows, rotation) for rows in split[:2])
            fit = fit_moments(train, validation, self.regression, self.generator, self.step_size)
            found.append((fit, rotation))
        fit, rotation = max(found, key=lambda one: one[0].validation_gain)
        held_out = self._parts(split.held_out, rotation)
        gains = step_gains(fit.moments, *held_out, self.step_size)
        # The identity gains zero without scatter, which would look like certainty.
        judged = fit.moments if fit.rejected is None else fit.rejected
        scatter = step_gains(judged, *held_out, self.step_size).std()
        # One architecture for all, so that a state can be loaded without knowing what was chosen.
        hidden, bound = self.regression.hidden, self.regression.max_log_ratio
        moments = fit.moments.with_network(hidden, bound, self.generator)
        block = MomentBlock(self.dim, moments, self.step_size).to(split.train)
        layers: list[nf.flows.Flow] = [block, Rotation(rotation)]
        return _Step(layers, gains.mean(), scatter / len(gains) ** 0.5)

    def _parts(self, z: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        given, moved = (z @ rotation.T).split((self.dim // 2, self.dim - self.dim // 2), dim=1)
        return given, moved


def _check_given(given: object) -> None:
    """Raise unless it is a sequence of layers. A model has an inverse too, but of one result."""
    if not isinstance(given, Sequence | nn.ModuleList):
        raise OptionError(
            f"given must be a list of layers, got {type(given).__name__}. Give model.flows for a "
            "model, and [flow] for a single flow."
        )
    for index, flow in enumerate(given):
        if not isinstance(flow, nf.flows.Flow):
            raise OptionError(
                f"given must hold layers that are nf.flows.Flow, got {type(flow).__name__} at "
                f"index {index}. Give the layers of a model, model.flows."
            )
