"""The code a reader copies from the README and the pages runs."""

from __future__ import annotations

import re

import normflows as nf
import pytest
import torch
import torch.distributed as dist
from support.paths import ROOT
from support.seeds import manual_seed

import normflows_injective as nfi


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_example_of_the_readme():
    table, code, on_the_sphere, _ = blocks("README.md")
    data = torch.randn(120, 6).split([100, 10, 10])
    exec(
        table.replace("seconds=60", "steps=20").replace("print", "str"),
        dict(zip(("x", "held_out", "new_rows"), data, strict=True)),
    )
    names: dict = {}
    exec(code.replace("torch.randn(100, 256, 64)", "torch.randn(3, 32, 64)"), names)
    assert names["samples"].shape == (10, 64)
    assert names["log_q"].shape == (10,)
    exec(on_the_sphere, names)
    assert names["loss"].isfinite()


@pytest.fixture
def pyro_in(tmp_path, monkeypatch):
    """Pyro with an empty store, in a folder to write to."""
    pyro = pytest.importorskip("pyro", reason="Pyro is not installed")
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    yield pyro
    pyro.clear_param_store()


@pytest.mark.slow
def test_the_pyro_section_of_the_readme(pyro_in):
    code = blocks("README.md")[3]
    assert len([line for line in code.splitlines() if line]) == 13
    names: dict = {}
    exec(code.replace("range(500)", "range(20)"), names)
    weights = names["posterior"]["w"]
    torch.testing.assert_close(weights.abs().sum(-1), torch.ones(100))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
def test_the_examples_of_the_page_on_pyro(pyro_in, capsys):
    names: dict = {}
    for code in blocks("docs/pyro.md"):
        exec(code, names)
        pyro_in.clear_param_store()
    guides = names["guide"], names["again"]
    first, second = (guide.state_dict() for guide in guides)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_the_examples_of_the_page_on_surfaces():
    names: dict = {"nfi": nfi}
    for code in blocks("docs/surfaces.md"):
        exec(code, names)
    assert names["surface"](torch.eye(4))[0].shape == (4, 4)
    assert names["model"].sample(3)[0].shape == (3, 10)


@pytest.mark.slow
def test_the_examples_of_the_page_on_couplings(capsys):
    names: dict = {}
    for code in blocks("docs/couplings.md"):
        exec(code, names)
    assert names["bits"].shape == (64,)
    assert abs(float(names["floor"].floor) - 0.3069) < 1e-4
    assert len(names["fitted"].flows) > 0
    assert names["model"].log_prob(names["square"]).isfinite().all()
    assert "nats" in capsys.readouterr().out


@pytest.mark.slow
def test_the_examples_of_the_page_on_assignment_flows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manual_seed(0)
    names: dict = {}
    for code in blocks("docs/assignment.md"):
        exec(code, names)
    assert names["samples"].shape == (100, 4)
    assert names["effective_sample_size"].mean() > 0.5
    assert names["marginal"].log_prob.isfinite().all()
    assert names["weights"].shape == (5, 6)


def test_the_class_conditional_example_of_the_page_on_stacking():
    (code,) = blocks("docs/stacking.md")
    names = {
        "nf": nf,
        "nfi": nfi,
        "injection": nfi.flows.LinearInjection(2, 4),
        "coupling": nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4])),
    }
    exec(code, names)
    names["model"].forward_kld(torch.randn(6, 4), torch.arange(6)).backward()


@pytest.mark.slow
def test_the_examples_of_the_page_on_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, loop, density, dimension, units, own, files = blocks("docs/training.md")
    exec(whole.replace("print(result)", "str(result)"), of_fit := {})
    assert of_fit["samples"].shape == (10, 20)
    exec(loop, of_loop := {})
    assert of_loop["score"].isfinite()
    parts = {name: of_loop[name] for name in ("model", "optimizer")}
    assert nfi.training.load_state("run.safetensors", **parts) == {"step": 99}
    exec(density, of_density := {})
    layer, codes = of_density["density"], of_density["model"].encode(of_density["x"]).detach()
    assert float(layer.density_error(codes).max()) <= 0.01
    assert of_density["log_q"].isfinite().all()
    exec(dimension.replace("dim(x)", "dim(x, num_steps=20)"), of_dimension := {})
    assert of_dimension["dimension"].recommended == (2, 4)
    exec(units, of_units := {})
    assert {column.kind for column in of_units["units"].columns} == {"log"}
    assert of_units["score"].isfinite()
    exec(own, own_names := {})
    assert issubclass(own_names["Huber"], nfi.SurrogateLikelihood)
    assert own_names["Reconstruction"]().latent_cycle == 0
    exec(files, {"nf": nf, "nfi": nfi})


@pytest.mark.slow
def test_the_examples_of_the_page_on_speed():
    compiled, half, large, exported = [
        code for code in blocks("docs/speed.md") if "ForwardKLD" not in code
    ]
    names: dict = {}
    # Traced as by default, without minutes of code generation.
    code = compiled.replace("compile=True", 'compile={"backend": "aot_eager"}')
    exec(code.replace("(100, 256", "(3, 32"), names)
    exec(half, names)
    exec(large, names)
    assert names["volume"].shape == names["standard_error"].shape == (32,)
    names["model"] = nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(2),
        [nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(data_dim=8, latent_dim=2))],
    )
    exec(exported, names)
    assert names["z"].shape == (100, 2)


@pytest.mark.slow
def test_the_autoencoder_of_the_page_on_scores(capsys):
    (code,) = blocks("docs/scores.md")
    exec(code, names := {})
    assert names["scores"].p_value.shape == (200,)
    assert "200 rows, 500 reference rows" in capsys.readouterr().out
    assert float(names["angles"].principal_angles.max()) <= torch.pi / 2


def test_the_injection_of_the_contributing_page():
    (code,) = blocks("docs/contributing.md")
    names: dict = {}
    exec(code, names)
    model = nfi.InjectiveNormalizingFlow(nf.distributions.DiagGaussian(2), [names["Graph"]()])
    z = torch.randn(4, 2)
    expected = 0.5 * torch.log1p(4 * z.square().sum(1))
    torch.testing.assert_close(model.forward_and_log_det(z)[1], expected)
    assert nfi.diagnostics.injectivity_report(model, torch.randn(4, 3)).condition_number.shape == (
        4,
    )


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    """A process group of one, in a folder to write to."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/it", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_example_of_several_processes(one_process):
    """In one, whose group is already there; tests/package/test_distributed.py has two."""
    wrapped, sharded = (code for code in blocks("docs/speed.md") if "ForwardKLD" in code)
    code = wrapped.replace("dist.init_process_group()", "").replace("(100, 256", "(3, 32")
    code = code.replace("dist.destroy_process_group()", "")
    names: dict = {}
    exec(code, names)
    state = names["model"].state_dict()
    names["model"].load("model.safetensors")
    exec(code.partition("loss =")[0] + "x = data[0]\n" + sharded, names)
    assert names["log_prob"].shape == (32,)
    assert set(names["state"]) == set(state)


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_relative_links_lead_somewhere(page):
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
