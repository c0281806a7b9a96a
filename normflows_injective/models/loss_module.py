"""The training loss as a module, for training in several processes."""

from __future__ import annotations

from inspect import signature
from typing import Any, final

import torch.distributed as dist
from torch import Tensor, nn

from ..checks import checks_arguments_of
from ..errors import OptionError, UnsupportedLayerError
from ..host.first_data import awaits_first_data
from .assignment import AssignmentFlow


@checks_arguments_of
@final
class ForwardKLD(nn.Module):
    r"""The training loss of a model as a module, whose ``forward`` is ``model.forward_kld``.

    ``DistributedDataParallel`` and FSDP2's ``fully_shard`` act when ``forward`` of the module that
    they wrap is called. So wrap this module, never the encoder, the decoder or the model: the loss
    differentiates encoder and decoder on the way, unseen by a wrapper around them
    (pytorch#182661, pytorch#102197), and ``forward_kld`` of a wrapped model is no ``forward``.

    With :math:`R` processes that each take an equal share of the batch, the averaged gradient is

    .. math:: \frac1R \sum_r \nabla \mathcal L(x^{(r)}; v^{(r)})

    and its noise falls with :math:`R` only if the probes :math:`v^{(r)}` are independent: seed
    alike to build the model, then ``torch.manual_seed(seed + rank)``. ``likelihood.step`` counts
    training steps in every process alike, and ``DistributedDataParallel`` copies it, with all
    buffers, from rank 0 before each forward pass whose gradients it averages. While
    ``warmup_steps`` leaves the likelihood out, the latent block gets no gradient;
    ``DistributedDataParallel`` then needs ``find_unused_parameters=True``.

    A ``NonFiniteError`` in one process ends the job under ``torchrun``. Do not catch it there to
    skip a batch: the other processes would wait for this one's gradients.

    Args:
        model: Any model with a method ``forward_kld``, of this package or of normflows.

    Raises:
        OptionError: If the model has no such method.

    References:
        The loss: ``forward_kld`` of the model. The wrappers: torch's documentation.

    Examples:
        >>> import torch
        >>> import normflows as nf
        >>> loss = ForwardKLD(nf.NormalizingFlow(nf.distributions.DiagGaussian(2), []))
        >>> loss(torch.zeros(4, 2))  # log 2 pi
        tensor(1.8379, grad_fn=<NegBackward0>)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or not callable(getattr(model, "forward_kld", None)):
            raise OptionError(
                f"model must be a module with a method forward_kld, got {type(model).__name__}. "
                "Use nfi.InjectiveNormalizingFlow or a model of normflows."
            )
        if isinstance(model, AssignmentFlow):
            model.forward_kld()
        self.model: Any = model

    def forward(
        self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        r"""Training loss of this process's share of a batch.

        Args:
            x: Data of shape :math:`(B, *)`.
            context: One row per sample, or the labels of class-conditional models of normflows.
            weights: Weights of the samples, shape :math:`(B,)`. They are normalised in every
                process by itself.

        Returns:
            Loss, 0-dimensional, the mean over the :math:`B` samples of this process.

        Raises:
            OptionError: If there are weights and the model's ``forward_kld`` takes none.
            UnsupportedLayerError: If there are several processes and a layer has yet to initialise
                itself on data.
            NonFiniteError: As raised by the model.
        """
        _refuse_cold_layers(self.model)
        # By position, because some models of normflows call it y, and others have no second one.
        arguments = (x,) if context is None else (x, context)
        if weights is None:
            return self.model.forward_kld(*arguments)
        if "weights" not in signature(self.model.forward_kld).parameters:
            raise OptionError(
                f"{type(self.model).__name__}.forward_kld takes no weights. Leave weights out, or "
                "use nfi.InjectiveNormalizingFlow."
            )
        return self.model.forward_kld(*arguments, weights=weights)


def _refuse_cold_layers(model: nn.Module) -> None:
    """Raise if a layer would initialise itself differently in every process.

    The ActNorm of normflows replaces the storage of its parameters. Under
    DistributedDataParallel, every process would keep those of its own share for good; under FSDP
    they are lost with the gathered parameters, while the layer believes to be initialised.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for name, module in model.named_modules():
        if awaits_first_data(module):
            raise UnsupportedLayerError(
                f"{name} ({type(module).__name__}) initialises itself on its first batch, which "
                "differs between the processes. Before wrapping, and before moving the model to "
                "its device, call model.forward_kld(x) once under torch.no_grad(), with the same "
                "x on every rank."
            )
