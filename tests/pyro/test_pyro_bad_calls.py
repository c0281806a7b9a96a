"""Wrong values and types for every argument of every public name: named errors, or results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import normflows as nf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.models import base, coupling, mlp_injection
from support.seeds import manual_seed

import normflows_injective as nfi
import normflows_injective.pyro as nfp
from normflows_injective.errors import ContextError, InjectiveFlowError, ShapeError
from normflows_injective.flows.gauges import LpGauge

JUNK: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "7": 7,
    "2.5": 2.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "1j": 1j,
    "str": "x",
    "empty str": "",
    "bytes": b"x",
    "[]": [],
    "{}": {},
    "(0,)": (0,),
    "[None]": [None],
    "object": object(),
    "vector": torch.tensor([1.0, 2.0]),
    "integers": torch.tensor([1, 2]),
    "matrix": torch.ones(2, 2),
    "cube": torch.ones(1, 1, 2),
    "empty": torch.zeros(0, 2),
    "flag": torch.tensor(True),
    "number": torch.tensor(3.0),
    "float64": torch.ones(2, dtype=torch.float64),
    "complex": torch.ones(2, dtype=torch.complex64),
    "array": np.array([1.0, 2.0]),
    "np.int64": np.int64(2),
    "np.float32": np.float32(0.5),
    "lambda": lambda: 0,
    "function of two": lambda a, b: None,
    "class": int,
    "module": torch.nn.Linear(2, 2),
    "transform": torch.distributions.ExpTransform(),
    "law": torch.distributions.Normal(0.0, 1.0),
    "constraint": torch.distributions.constraints.real,
}


class Call(NamedTuple):
    """A public name, arguments that are right, and what is done with what it gives."""

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    use: Callable[[Any], Any] = lambda result: result


def model():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(1.0))


def flow():
    return nf.NormalizingFlow(base(2), [coupling(2)])


def conditional():
    layer = nf.flows.MaskedAffineAutoregressive(2, 8, context_features=4)
    return nf.ConditionalNormalizingFlow(base(2), [layer])


def injective():
    return nfi.InjectiveNormalizingFlow(base(2), [mlp_injection()])


def chart():
    return nfp.FlowTransform(nfi.flows.SphereChart(3, "stereographic"))


def draws(law):
    return law.log_prob(law.sample()), repr(law), law.support.check(law.sample())


def reparametrised(reparam):
    site = dist.ProjectedNormal(torch.tensor([0.0, 0.0, 5.0]))
    handler = pyro.poutine.reparam(config={"x": reparam})
    return handler(lambda: pyro.sample("x", site))()


CALLS = {
    "AutoFlow": Call(
        nfp.AutoFlow,
        lambda: {
            "model": model,
            "flow_factory": None,
            "init_loc_fn": pyro.infer.autoguide.init_to_feasible,
            "init_scale": 0.1,
            "permute": True,
            "place": "triangular",
            "path_gradient": True,
            "guard": 50.0,
        },
        lambda guide: guide(),
    ),
    "AutoFlow's factory": Call(
        lambda made: nfp.AutoFlow(model, lambda dim: made),
        lambda: {"made": [coupling(3)]},
        lambda guide: guide(),
    ),
    "AutoInjective": Call(
        nfp.AutoInjective,
        lambda: {
            "model": model,
            "rank": 1,
            "noise": "mvn",
            "decoder": None,
            "reverse": "laplace",
            "num_aux": 0,
            "latent_flows": None,
            "noise_rank": None,
            "init_loc_fn": pyro.infer.autoguide.init_to_median,
            "init_scale": 0.1,
            "path_gradient": True,
            "guard": 50.0,
        },
        lambda guide: pyro.infer.Trace_ELBO().loss(model, guide),
    ),
    "AutoInjective's callables": Call(
        lambda decoder, reverse, flows: nfp.AutoInjective(
            model,
            1,
            decoder=lambda rank, dim: decoder,
            reverse=lambda rank, dim: reverse,
            latent_flows=lambda rank: flows,
        ),
        lambda: {
            "decoder": torch.nn.Linear(1, 3),
            "reverse": torch.nn.Linear(3, 2),
            "flows": [nf.flows.AffineConstFlow((1,))],
        },
        lambda guide: pyro.infer.Trace_ELBO().loss(model, guide),
    ),
    "diagnose": Call(
        nfp.diagnose,
        lambda: {
            "guide": nfp.AutoFlow(model).build(),
            "model": model,
            "num_samples": 3,
            "parallel": False,
        },
        str,
    ),
    "diagnose's resample": Call(
        lambda num_samples: nfp.diagnose(nfp.AutoFlow(model), num_samples=3).resample(num_samples),
        lambda: {"num_samples": 2},
    ),
    "warm_start": Call(
        lambda warm_start: nfp.AutoFlow(model).build(warm_start=warm_start),
        lambda: {"warm_start": (torch.zeros(3), torch.eye(3))},
    ),
    "flows.couplings": Call(
        nfp.flows.couplings,
        lambda: {"dim": 3, "num_layers": 2, "hidden": (8,), "num_splines": 1},
        lambda layers: nfp.AutoFlow(model, lambda dim: layers)(),
    ),
    "flows.splines": Call(
        nfp.flows.splines,
        lambda: {"dim": 3, "num_layers": 2},
        lambda layers: nfp.AutoFlow(model, lambda dim: layers)(),
    ),
    "flows.autoregressive": Call(
        nfp.flows.autoregressive,
        lambda: {"dim": 3, "num_layers": 2, "width": 8},
        lambda layers: nfp.AutoFlow(model, lambda dim: layers)(),
    ),
    "sample_posterior": Call(
        lambda num_samples: nfp.AutoInjective(model, 1).sample_posterior(num_samples),
        lambda: {"num_samples": 2},
    ),
    "quantiles": Call(
        lambda quantiles: nfp.AutoInjective(model, 1).quantiles(quantiles),
        lambda: {"quantiles": [0.5]},
    ),
    "FlowDistribution": Call(
        nfp.FlowDistribution,
        lambda: {
            "model": flow(),
            "event_dim": 1,
            "context": None,
            "validate_args": None,
            "support": None,
        },
        draws,
    ),
    "FlowDistribution with a context": Call(
        nfp.FlowDistribution, lambda: {"model": conditional(), "context": torch.ones(3, 4)}, draws
    ),
    "FlowTransform": Call(
        nfp.FlowTransform,
        lambda: {"flow": [coupling(2)], "event_dim": 1, "cache_size": 1, "codomain": None},
        lambda transform: transform.inv(transform(torch.ones(2))),
    ),
    "InjectiveDistribution": Call(
        nfp.InjectiveDistribution,
        lambda: {
            "model": injective(),
            "volume": "exact",
            "off_manifold": "project",
            "noise_scale": None,
            "tol": 1e-3,
            "context": None,
            "validate_args": None,
        },
        draws,
    ),
    "InjectiveDistribution that rejects": Call(
        nfp.InjectiveDistribution,
        lambda: {"model": injective(), "off_manifold": "reject", "tol": 1e-3},
        lambda law: law.support.check(law.sample()),
    ),
    "InjectiveDistribution that thickens": Call(
        nfp.InjectiveDistribution,
        lambda: {"model": injective(), "off_manifold": "thicken", "noise_scale": 0.1},
        draws,
    ),
    "log_volume": Call(
        lambda x: nfp.InjectiveDistribution(injective()).log_volume(x),
        lambda: {"x": torch.ones(2, 5)},
    ),
    "surrogate_bias": Call(
        lambda n, x: nfp.InjectiveDistribution(injective()).surrogate_bias(n, x),
        lambda: {"n": 5, "x": None},
    ),
    "check_collapse": Call(
        lambda x: nfp.InjectiveDistribution(
            injective(), off_manifold="thicken", noise_scale=0.01
        ).check_collapse(x),
        lambda: {"x": torch.randn(20, 5)},
    ),
    "ManifoldReparam": Call(nfp.ManifoldReparam, lambda: {"transform": chart()}, reparametrised),
    "OnSurface": Call(
        nfp.OnSurface,
        lambda: {"law": nfi.distributions.UniformSphere(2)},
        lambda constraint: (repr(constraint), constraint.check(torch.ones(3, 2))),
    ),
    "StarLikeConstraint": Call(
        nfp.StarLikeConstraint,
        lambda: {
            "gauge": LpGauge(1.0),
            "level": 1.0,
            "dim": 3,
            "measure": "hausdorff",
            "tol": 1e-4,
        },
        lambda c: torch.distributions.biject_to(c)(torch.zeros(c.dim - 1)),
    ),
    "SurfaceDistribution": Call(
        nfp.SurfaceDistribution,
        lambda: {"law": nfi.distributions.UniformSphere(3), "validate_args": None},
        draws,
    ),
    "UniformOnSurface": Call(
        nfp.UniformOnSurface,
        lambda: {
            "gauge": LpGauge(1.0),
            "level": 1.0,
            "measure": None,
            "dim": 3,
            "batch_shape": (),
            "validate_args": None,
        },
        draws,
    ),
    "save": Call(nfp.save, lambda: {"trained": flow(), "path": "/nowhere/a.safetensors"}),
    "load": Call(
        nfp.load,
        lambda: {"trained": flow(), "path": "/nowhere/a.safetensors", "map_location": None},
    ),
    "module": Call(
        nfp.module,
        lambda: {"name": "flow", "nn_module": flow(), "update_module_params": False},
    ),
}
LAWS = {
    "flow": lambda: nfp.FlowDistribution(flow()),
    "injective": lambda: nfp.InjectiveDistribution(injective(), off_manifold="project"),
    "surface": lambda: nfp.SurfaceDistribution(nfi.distributions.UniformSphere(3)),
}
for _name, _make in LAWS.items():
    for _method, _argument, _right in (
        ("log_prob", "value", torch.ones(2, 2)),
        ("expand", "batch_shape", (3,)),
        ("sample", "sample_shape", (3,)),
        ("rsample", "sample_shape", (3,)),
    ):
        if _name == "surface" and _method == "rsample":
            continue
        CALLS[f"{_name}.{_method}"] = Call(
            lambda wrong, make=_make, method=_method: getattr(make(), method)(wrong),
            lambda right=_right: {"wrong": right},
        )
for _method, _right in (
    ("__call__", torch.ones(3, 2)),
    ("_inv_call", torch.ones(3, 2)),
    ("forward_shape", (3, 2)),
    ("inverse_shape", (3, 2)),
    ("with_cache", 0),
):
    CALLS[f"FlowTransform.{_method}"] = Call(
        lambda wrong, method=_method: getattr(nfp.FlowTransform(coupling(2)), method)(wrong),
        lambda right=_right: {"wrong": right},
    )
# Arguments that are called, with what the caller cannot know.
CALLED = (
    "guide",
    "warm_start",
    "model",
    "flow_factory",
    "init_loc_fn",
    "decoder",
    "reverse",
    "latent_flows",
    "noise_scale",
)
CASES = [(name, argument) for name, call in CALLS.items() for argument in call.arguments()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_wrong_arguments_are_refused_by_name(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, raw = CALLS[name], []
    for label, wrong in JUNK.items():
        manual_seed(0)
        pyro.clear_param_store()
        arguments = call.arguments()
        arguments[argument] = wrong
        try:
            call.use(call.function(**arguments))
        except InjectiveFlowError:
            pass
        except Exception as error:
            if callable(wrong) and argument in CALLED:
                continue  # A callable that takes something else fails in its own way.
            raw.append(f"{label}: {type(error).__name__}: {str(error)[:120]}")
    assert not raw, "\n".join(raw)


@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("save", "load")])
def test_right_arguments_are_taken(name):
    call = CALLS[name]
    if name == "surface.log_prob":
        return
    arguments = call.arguments()
    if name == "injective.log_prob":
        arguments = {"wrong": torch.ones(2, 5)}
    call.use(call.function(**arguments))


def test_every_public_name_is_called():
    public = {name for name in nfp.__all__ if name != "flows"}
    public |= {f"flows.{name}" for name in nfp.flows.__all__}
    assert public <= {name.split()[0].removesuffix("'s") for name in CALLS}


# What was wrong in words of torch.


def test_contexts_of_another_width_or_kind_are_named():
    """Also where a model was known by a context that fits."""
    right = torch.ones(3, 4)
    model = conditional()
    for wrong in (torch.ones(3, 5), torch.ones(3, 4).double(), torch.ones(3, 1)):
        for before in (None, right):
            if before is not None:
                nfp.FlowDistribution(model, context=before)
            with pytest.raises(ContextError, match=r"does not fit the model.*last dimension"):
                nfp.FlowDistribution(model, context=wrong)
    assert nfp.FlowDistribution(model, context=right).sample().shape == (3, 2)


def test_layers_of_another_width_than_the_values_are_named():
    transform = nfp.FlowTransform([coupling(2), nf.flows.LULinearPermute(2)])
    with pytest.raises(ShapeError):
        transform(torch.ones(4, 5))
    with pytest.raises(ShapeError):
        transform.inv(torch.ones(4, 5))


@pytest.mark.parametrize("make", LAWS.values(), ids=LAWS)
def test_batches_expand_as_those_of_torch_do(make):
    law = make()
    assert law.expand((3, 1)).expand((2, 3, 4)).batch_shape == (2, 3, 4)
    for wrong in ((), (2,), (3,), (3, 5, 4)):
        with pytest.raises(ShapeError, match="cannot be expanded to"):
            law.expand((2, 3, 4)).expand(wrong)


def test_values_that_do_not_broadcast_with_a_context_are_named():
    law = nfp.FlowDistribution(conditional(), context=torch.ones(3, 4))
    with pytest.raises(ShapeError, match="do not broadcast with the batch shape"):
        law.log_prob(torch.ones(2, 2))


def test_numbers_of_numpy_and_tensors_are_taken():
    one, half = np.int64(1), np.float32(0.5)
    guide = nfp.AutoInjective(model, one, num_aux=np.int32(1), init_scale=torch.tensor(0.1))
    assert guide.sample_posterior(np.int64(3))["x"].shape == (3, 3)
    nfp.AutoFlow(model, lambda dim: [coupling(dim)], init_scale=half, permute=np.bool_(True))()
    nfp.FlowDistribution(flow(), event_dim=one).sample((np.int64(2),))
    law = nfp.InjectiveDistribution(injective(), off_manifold="thicken", noise_scale=half)
    law.surrogate_bias(np.int64(3))
    nfp.UniformOnSurface(LpGauge(1.0), level=half, dim=torch.tensor(3), batch_shape=[one])
    nfp.StarLikeConstraint(LpGauge(1.0), half, dim=np.int64(3), tol=np.float64(1e-4))


def test_no_values_have_no_densities():
    law = nfp.FlowDistribution(flow())
    assert law.log_prob(torch.zeros(0, 2)).shape == (0,)
    assert law.sample((0,)).shape == (0, 2)
