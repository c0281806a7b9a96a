"""What our guides over all latent variables at once have in common."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import biject_to

from ..checks import check_count
from ..errors import ParamStoreWarning, UnsupportedModelError

__all__ = ["JointGuide"]

Guide = TypeVar("Guide", bound="JointGuide")


class JointGuide(AutoContinuous):
    """A guide over the unconstrained latents (D,) of a model, in one auxiliary site.

    It is abstract, although the metaclass of Pyro's modules leaves no room for Python's own.
    A subclass gives :meth:`make_parameters` and :meth:`get_posterior`, which may be any
    distribution over (D,). Parameters are made by the first call, or by :meth:`build` before it.
    Medians and quantiles are those of ``num_quantile_samples`` samples.

    Args:
        model: A Pyro model whose latent variables are continuous.
        init_loc_fn: Pyro's initialisation of latent variables.
    """

    num_quantile_samples = 1000
    # Attributes that only unbuilt guides need, and that may hold what cannot be pickled.
    recipe: tuple[str, ...] = ()

    def __init__(
        self, model: Callable[..., Any], init_loc_fn: Callable[..., Any] = init_to_median
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._names_checked = False

    @abstractmethod
    def make_parameters(self) -> None:
        """Create the parameters, when ``latent_dim`` and the prototype are known."""

    @abstractmethod
    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """The guide's distribution over the unconstrained latents (D,)."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent variables, as a guide does."""
        self.build(*args, **kwargs)
        if torch.is_grad_enabled() and not self._names_checked:
            # A copy comes with its prototype, and under the names of the original.
            self._warn_of_taken_names()
        drawn: dict[str, Tensor] = super().forward(*args, **kwargs)
        return drawn

    def build(self: Guide, *args: Any, **kwargs: Any) -> Guide:
        """Run the model once to make the parameters, as ``load_state_dict`` needs them.

        Args:
            *args: What the model takes.
            **kwargs: What the model takes.

        Returns:
            The guide.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            # NeuTra asks for plates, of a guide that was loaded and never called.
            with poutine.block():
                self._create_plates(*args, **kwargs)
        return self

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the guide.

        Args:
            num_samples: Number of samples n.
            *args: What the model takes.
            **kwargs: What the model takes.

        Returns:
            Samples (n, *) of every latent variable by its name.
        """
        check_count(num_samples, "num_samples")
        latents = self._draw(num_samples, *args, **kwargs)
        draws = [self._constrained(latent) for latent in latents]
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Medians of every latent variable, coordinate by coordinate in unconstrained space."""
        return self._constrained(self._quantiles([0.5], *args, **kwargs)[0])

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every latent variable, coordinate by coordinate in unconstrained space.

        Args:
            quantiles: q numbers between 0 and 1.
            *args: What the model takes.
            **kwargs: What the model takes.

        Returns:
            Tensors (q, *) by the names of the variables.
        """
        rows = [self._constrained(row) for row in self._quantiles(quantiles, *args, **kwargs)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own leaves the live guide without its model.
        model, master = self._model, self.master
        try:
            return dict(super().__getstate__(), _names_checked=False, **dict.fromkeys(self.recipe))
        finally:
            self._model, self.master = model, master

    def __deepcopy__(self: Guide, memo: dict[int, Any]) -> Guide:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        # A copy guides the same model, and is built by the same recipe.
        copied._model = self._model
        for name in self.recipe:
            object.__setattr__(copied, name, getattr(self, name))
        return copied

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
            self._refuse_subsampled_latents()
            self._warn_of_taken_names()
            self.make_parameters()
        except BaseException:
            # Half a prototype would be taken for a whole one by the next call.
            self.prototype_trace = None
            raise

    def _refuse_subsampled_latents(self) -> None:
        trace: Any = self.prototype_trace
        for name, site in trace.iter_stochastic_nodes():
            for frame in site["cond_indep_stack"]:
                if frame.full_size is not None and frame.full_size > frame.size:
                    raise UnsupportedModelError(
                        f"Latent variable {name!r} lies in plate {frame.name!r}, which is "
                        f"subsampled, {frame.size} of {frame.full_size}: one joint guide would "
                        "give every minibatch the same latents. Use the whole plate, or an "
                        "amortised guide for this variable."
                    )

    def _warn_of_taken_names(self) -> None:
        self._names_checked = True
        prefix, store = f"{self._pyro_name}.", pyro.get_param_store()
        own = {id(parameter) for parameter in self.parameters()}
        kept = [value for name, value in store._params.items() if name.startswith(prefix)]
        if any(id(value) not in own for value in kept):
            warnings.warn(
                f"Pyro's parameter store already holds parameters named {prefix}..., of another "
                "guide or from a file. Those of this guide would not be trained, or not be "
                "restored. Call pyro.clear_param_store() first; save and load guides by nfp.save "
                "and nfp.load.",
                ParamStoreWarning,
                stacklevel=2,
            )

    def _draw(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        self.build(*args, **kwargs)
        # Not through pyro.sample, so that no handler sees it.
        return self.get_posterior(*args, **kwargs).sample(torch.Size([num_samples]))

    def _quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> Tensor:
        latents = self._draw(self.num_quantile_samples, *args, **kwargs)
        return torch.quantile(latents, torch.as_tensor(quantiles).to(latents), dim=0)

    def _constrained(self, latent: Tensor) -> dict[str, Tensor]:
        return {
            site["name"]: biject_to(site["fn"].support)(value)
            for site, value in self._unpack_latent(latent)
        }
