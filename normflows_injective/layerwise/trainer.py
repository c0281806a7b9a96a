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
from ..flows.stack import joint_encode
from ..flows.volume_preserving.rotation import Rotation, random_rotation
from ..host.first_meeting import meet_first_data
from .block import ConditionalMoments, MomentBlock, check_step_size
from .regression import (
    MomentFit,
    MomentRegression,
    Rows,
    check_latents,
    check_regression,
    fit_moments,
    new_generator,
    step_gains,
)

_LEAST_ROWS = 200


class _Split(NamedTuple):
    """Latents (N, D) that blocks are fitted on, that choose among fits, and that judge blocks."""

    train: Tensor
    validation: Tensor
    held_out: Tensor


class LayerwiseHistory(NamedTuple):
    """Gains of the blocks of :meth:`LayerwiseTrainer.fit`, in nats on the held-out rows.

    They stand in the order of construction. The gain of a block is unbiased before the block is
    judged, but the blocks that were kept have passed a threshold on the same rows, so the sum is
    slightly too large. Judge the whole flow on fresh rows.

    Attributes:
        gains: Mean gains of the L blocks, (L,).
        standard_errors: Standard errors of the gains, (L,).
        refused: Gain of the last block that was refused, 0-dimensional; NaN if none was, because
            the number of layers ran out.
        refused_standard_error: Standard error of that gain. Where the block was the identity, it
            is that of the best model that was rejected for it: gains of this size look like zero.

    References:
        Draxler et al., arXiv 2402.06578, layer-wise experiment; the held-out rule is derived here.

    Examples:
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 1
        >>> history = LayerwiseTrainer(2, max_layers=1).fit(x).history
        >>> history.gains.shape, bool(history.gains > 2 * history.standard_errors)
        (torch.Size([1]), True)
    """

    gains: Tensor
    standard_errors: Tensor
    refused: Tensor
    refused_standard_error: Tensor


class LayerwiseFit(NamedTuple):
    """The flow that :meth:`LayerwiseTrainer.fit` built, and the gains of its blocks.

    Attributes:
        flows: Layers from latent to data, in the order of ``nf.NormalizingFlow``: a
            :class:`MomentBlock` and a rotation for each block, the last block first, and after
            them the layers that were handed in.
        history: :class:`LayerwiseHistory`.

    Examples:
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 1
        >>> flows, history = LayerwiseTrainer(2, max_layers=1).fit(x)
        >>> [type(flow).__name__ for flow in flows]
        ['MomentBlock', 'Rotation']
    """

    flows: list[nf.flows.Flow]
    history: LayerwiseHistory


@final
@checks_arguments_of
class LayerwiseTrainer:
    r"""Add rotations and affine blocks one at a time, each fitted and frozen, until none gains.

    A block takes a step of size :math:`\eta` towards conditional mean zero and variance one, see
    :class:`MomentBlock`. Its gain, by which the loss falls, is measured on rows that took no part
    in the fit, and the construction ends when the gain is no more than some standard errors. With
    few samples every further block would fit noise, and raise the loss on new data without bound.

    Half of the rows fit the blocks, a quarter chooses among rotations, and a quarter judges.

    Args:
        dim: Number of coordinates :math:`D`, at least two.
        step_size: :math:`\eta` in (0, 1]. Half steps end lower than full ones, which destroy
            structure that later blocks could use.
        candidates: Number of random rotations that are tried for a block.
        max_layers: Largest number of blocks.
        stop_errors: A block whose held-out gain is at most this number of standard errors is
            refused; None to keep all blocks.
        patience: Number of refusals in a row after which the construction ends. A refused block is
            not added; the next try has other rotations.
        regression: Size and pace of the fits.
        generator: Source of rotations, rows, weights and batches; by default one of seed 0.
            Torch's global generator is left alone.

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
        self._sizes = (dim // 2, dim - dim // 2)
        self.max_layers, self.stop_errors, self.patience = max_layers, stop_errors, patience
        # Small networks and ratios: later blocks can take the structure that a block leaves.
        small = MomentRegression((32,), 160, learning_rate=1e-2, max_log_ratio=2.0)
        self.regression = check_regression(small if regression is None else regression)
        self.generator = new_generator() if generator is None else generator

    def fit(self, x: Tensor, given: Sequence[nf.flows.Flow] = ()) -> LayerwiseFit:
        """Build a flow from data, or on top of another flow.

        Args:
            x: Data of shape (N, D), N at least 200, best standardised.
            given: Layers of the other flow from latent to data, as a list or ``model.flows``. They
                stand at the end of the result and are not changed, except that layers that have
                not seen data initialise themselves on x.

        Returns:
            :class:`LayerwiseFit`; the parameters of its new layers do not require gradients.

        Raises:
            ShapeError: If x, or its image under ``given``, has another width.
            DtypeError: If x is neither float32 nor float64.
            OptionError: If there are too few rows, or ``given`` is no sequence of layers.
            NonFiniteError: If x, or its image under ``given``, holds NaN or infinity.
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
        """Untrained layers that can load the state of the layers that :meth:`fit` built.

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
        hidden, bound = self.regression.hidden, self.regression.max_log_ratio
        flows: list[nf.flows.Flow] = []
        for _ in range(num_blocks):
            moments = ConditionalMoments.blank(*self._sizes, hidden, bound, torch.zeros(()))
            block = MomentBlock(self.dim, moments, self.step_size)
            flows += [block, Rotation(torch.eye(self.dim))]
        return flows

    def _split(self, z: Tensor) -> _Split:
        source = self.generator
        order = torch.randperm(len(z), generator=source, device=source.device).to(z.device)
        half, quarter = len(z) // 2, len(z) // 4
        return _Split(z[order[:half]], z[order[half : half + quarter]], z[order[half + quarter :]])

    def _build(self, split: _Split, flows: list[nf.flows.Flow]) -> LayerwiseFit:
        gains: list[Tensor] = []
        errors: list[Tensor] = []
        nothing = torch.full((), math.nan, dtype=split.train.dtype, device=split.train.device)
        refused, refused_error, failures = nothing, nothing, 0
        while len(gains) < self.max_layers and failures < self.patience:
            block, gain, error = self._step(split)
            if self.stop_errors is not None and not gain > self.stop_errors * error:
                refused, refused_error = gain, error
                failures += 1
                continue
            failures = 0
            gains.append(gain)
            errors.append(error)
            flows = [*block, *flows]
            split = _Split(*(joint_encode(block, rows) for rows in split))
        # A refusal before a later success tells nothing about the end.
        refused, refused_error = (refused, refused_error) if failures else (nothing, nothing)
        empty = split.train.new_zeros(0)
        history = LayerwiseHistory(
            torch.stack(gains) if gains else empty,
            torch.stack(errors) if errors else empty,
            refused,
            refused_error,
        )
        return LayerwiseFit(flows, history)

    def _step(self, split: _Split) -> tuple[list[nf.flows.Flow], Tensor, Tensor]:
        """The block after the best of some random rotations, by the validation rows.

        It comes with its rotation, its gain on the held-out rows, and the standard error of that.
        """
        candidates: list[tuple[MomentFit, Tensor]] = []
        for _ in range(self.candidates):
            rotation = random_rotation(self.dim, self.generator).to(split.train)
            train = self._parts(split.train, rotation)
            validation = self._parts(split.validation, rotation)
            fit = fit_moments(train, validation, self.regression, self.generator, self.step_size)
            candidates.append((fit, rotation))
        fit, rotation = max(candidates, key=lambda candidate: candidate[0].validation_gain)
        held_out = self._parts(split.held_out, rotation)
        gains = step_gains(fit.moments, *held_out, self.step_size)
        # The identity gains zero without scatter, which would look like certainty.
        judged = fit.moments if fit.rejected is None else fit.rejected
        scatter = step_gains(judged, *held_out, self.step_size).std()
        # One architecture for all, so that a state can be loaded without knowing the choice.
        hidden, bound = self.regression.hidden, self.regression.max_log_ratio
        moments = fit.moments.with_network(hidden, bound, self.generator)
        block = MomentBlock(self.dim, moments, self.step_size).to(split.train)
        layers: list[nf.flows.Flow] = [block, Rotation(rotation)]
        return layers, gains.mean(), scatter / len(gains) ** 0.5

    def _parts(self, z: Tensor, rotation: Tensor) -> Rows:
        return Rows(*(z @ rotation.T).split(self._sizes, dim=1))


def _check_given(given: object) -> None:
    """Raise unless it is a sequence of layers: the inverse of a model has but one result."""
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
