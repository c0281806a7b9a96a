r"""The encoder surrogate as one function for torch.compile.

torch.compile traces neither ``autograd.grad`` nor dual numbers, but it traces the functional
transforms, so everything is written with ``torch.func.vjp`` and ``torch.func.jvp`` here. It
saves element-wise work; the matrix products are those of the eager form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autodiff.proven import is_ours, nodes_of
from ..autodiff.recording import Map, inner
from ..autodiff.settings import differentiable_attention
from ..autodiff.tangents import SkipZeroProducts
from ..autodiff.transforms import Function, in_forward_mode
from ..autodiff.written_out import group_norm, layer_norm
from ..checks import describe
from ..errors import OptionError, UnsupportedLayerError
from ..host.first_meeting import give_first_data
from ..host.refusals import refuse_unsupported
from ..modules.contents import modules_of
from .estimators import EncoderSurrogate
from .surrogate import DrawProbes, Estimator, Surrogate, SurrogateAndErrors, lifted, with_errors

# Every batch size is compiled for itself, because forward mode does not know symbolic sizes. After
# the first one a shape has to come so many times in a row: the last batch of an epoch never does,
# and in eager form it costs less than its compilation would.
_MOST_SHAPES = 8
_IN_A_ROW = 8
_SURROGATE = EncoderSurrogate()


class CompiledSurrogate:
    """The encoder surrogate with its errors, through one ``torch.compile``."""

    # The first call at a shape that is to be compiled runs the eager form once, which initialises
    # layers on data and raises its errors, and then compiles for some ten seconds to minutes.
    # After 8 shapes, or as many compilations, others run eagerly. Random numbers are drawn
    # outside, so that the result is that of the eager form up to rounding.

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})
        known = set(signature(torch.compile).parameters) - {"model"}
        if unknown := set(self.options) - known:
            raise OptionError(
                "compile must hold keyword arguments of torch.compile, which are "
                f"{', '.join(sorted(known))}, got {', '.join(map(describe, unknown))}."
            )
        self._forget()

    def __call__(
        self, x: Tensor, encode: Map, decode: Map, draw_probes: DrawProbes, prior: Tensor | None
    ) -> SurrogateAndErrors:
        """Encode, decode and form the surrogate and the errors."""
        if not torch.is_grad_enabled() or in_forward_mode():
            return _eager(x, encode, decode, draw_probes, prior)
        refuse_unsupported(modules_of(encode, decode))
        latent = self._latent_like(x, encode, decode)
        if latent is None:
            return _eager(x, encode, decode, draw_probes, prior)
        probes = draw_probes(latent)
        try:
            with differentiable_attention():
                return self._compiled()(x, probes, prior, encode, decode)
        except Exception as error:
            if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
                return _eager(x, encode, decode, lambda z: probes, prior)
            if not _is_the_compilers(error):
                raise
            raise UnsupportedLayerError(
                "torch.compile cannot trace this encoder and decoder as one graph. Build "
                "SurrogateLikelihood with compile=False, or replace the layer that it names: "
                f"{_summary(error)}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options = state["options"]
        self._forget()

    def _forget(self) -> None:
        self._function: Callable[..., SurrogateAndErrors] | None = None
        self._latents: dict[Any, Tensor] = {}
        self._last: Any = None
        self._times_in_a_row = 0

    def _compiled(self) -> Callable[..., SurrogateAndErrors]:
        if self._function is None:
            options: dict[str, Any] = {"fullgraph": True, "dynamic": False, **self.options}
            if "isolate_recompiles" in signature(torch.compile).parameters:
                # Models of the same class would otherwise share one limit of compilations.
                options.setdefault("isolate_recompiles", True)
            self._function = torch.compile(_surrogate_and_errors, **options)
        return self._function

    def _latent_like(self, x: Tensor, encode: Map, decode: Map) -> Tensor | None:
        """A tensor like the latents of x; None where their shape is not to be compiled."""
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (x.shape, x.dtype, x.device, autocast)
        self._times_in_a_row = self._times_in_a_row + 1 if key == self._last else 1
        self._last = key
        if key not in self._latents:
            passes_by = bool(self._latents) and self._times_in_a_row < _IN_A_ROW
            if passes_by or len(self._latents) >= _MOST_SHAPES:
                return None
            eager = _SURROGATE(x, encode, decode, lambda z: torch.ones_like(z).unsqueeze(0))
            _refuse_functions(eager.reconstruction)
            self._latents[key] = torch.empty_like(eager.z)
        else:
            give_first_data(encode, x)
        return self._latents[key]


def _eager(
    x: Tensor, encode: Map, decode: Map, draw_probes: DrawProbes, prior: Tensor | None
) -> SurrogateAndErrors:
    return with_errors(_SURROGATE(x, encode, decode, draw_probes), x, encode, decode, prior)


def _refuse_functions(value: Tensor) -> None:
    """Raise if a value has been computed by an autograd.Function of the networks' own."""
    # torch.compile traces into its forward and backward, and loses the gradient of its gradient.
    for node in nodes_of(value):
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and not is_ours(node):
            raise UnsupportedLayerError(
                f"{function.__name__} is an autograd.Function, whose second derivatives "
                "torch.compile drops silently. Build SurrogateLikelihood with compile=False, or "
                "write the function with torch's own."
            )


def _surrogate_and_errors(
    x: Tensor, probes: Tensor, prior: Tensor | None, encode: Map, decode: Map
) -> SurrogateAndErrors:
    vjp: Any = torch.func.vjp
    # Copies go in, because some layers shift their input in place.
    z, vjp_of_encoder = vjp(lambda point: encode(point.clone()), x)

    def decoded(point: Tensor) -> Tensor:
        with _Traceable():
            return decode(point.clone())

    def decode_along(tangent: Tensor) -> tuple[Tensor, Tensor]:
        result: Any = torch.func.jvp(decoded, (z,), (tangent,), strict=True)
        return result[0], result[1]

    if len(probes) == 1:
        reconstruction, jvps = decode_along(probes[0])
        (vjps,) = vjp_of_encoder(probes[0])
        volume = -inner(vjps.unsqueeze(0), jvps.detach().unsqueeze(0))[0]
    else:
        in_common: Any = (None, 0)  # The reconstruction does not depend on the probe.
        reconstruction, jvps = torch.func.vmap(decode_along, out_dims=in_common)(probes)
        (vjps,) = torch.func.vmap(vjp_of_encoder)(probes)
        volume = -inner(vjps, jvps.detach()).mean(0)
    surrogate = Surrogate(lifted(z, x), reconstruction, volume)
    return with_errors(surrogate, x, encode, decode, prior)


class _Traceable(SkipZeroProducts):
    """Write out normalisations, whose forward mode torch.compile cannot trace."""

    def _intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.group_norm:
            return group_norm(*args, **kwargs)
        if func is F.layer_norm:
            return layer_norm(*args, **kwargs)
        return super()._intercept(func, args, kwargs)


def _is_the_compilers(error: Exception) -> bool:
    # Some faults of its own it reports as failed assertions.
    own = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return own or isinstance(error, AssertionError)


def _summary(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400]


def check_compilable(estimator: Estimator) -> None:
    """Raise unless an estimator is the one that can be compiled."""
    if not isinstance(estimator, EncoderSurrogate):
        raise OptionError(
            "compile= serves the estimator 'encoder' alone. Use it, or compile=False; got "
            f"{estimator}."
        )
