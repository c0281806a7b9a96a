"""Weights: one safetensors file, checked before anything is changed."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle

import normflows as nf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import base, mlp_injection, model, stacks
from support.seeds import manual_seed

import normflows_injective as nfi
from normflows_injective.errors import CheckpointError


def unchanged(ours, path, text):
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(CheckpointError, match=text):
        ours.load(path)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", stacks())
def test_round_trip(name, path):
    x = torch.randn(4, 5)
    saved = nfi.InjectiveNormalizingFlow(base(2), stacks()[name])
    manual_seed(7)
    loaded = nfi.InjectiveNormalizingFlow(base(2), stacks()[name])
    # A random permutation is a buffer of normflows' LU layer, so it must travel too.
    saved.save(path)
    loaded.load(path)
    torch.testing.assert_close(loaded.log_prob(x), saved.log_prob(x))
    assert os.listdir(path.parent) == [path.name]


def test_initialised_layers_stay_initialised(path):
    def build():
        return nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), nf.flows.ActNorm((5,))])

    saved, loaded = build(), build()
    saved.forward_kld(3 * torch.randn(16, 5) + 1)
    saved.save(path)
    loaded.load(path)
    x = torch.randn(1, 5)
    torch.testing.assert_close(loaded.log_prob(x), saved.log_prob(x))


def test_another_dtype_and_a_device_to_read_to(path):
    saved = model()
    saved.save(path)
    loaded = model().double()
    loaded.load(path, map_location="cpu")
    assert next(loaded.parameters()).dtype == torch.float64
    x = torch.randn(4, 5)
    torch.testing.assert_close(loaded.log_prob(x.double()).float(), saved.log_prob(x))


def test_tied_weights_are_saved(path):
    ours = model()
    ours.flows[0].decoder.layers[0].bias = ours.flows[0].encoder.layers[0].bias
    ours.save(path)
    ours.load(path)


def test_the_header_is_json_with_classes_sizes_and_version(path):
    model().save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["normflows_injective"])
    assert header["version"] == nfi.__version__
    assert header["classes"]["flows.0"] == "FreeFormInjection"
    assert header["shapes"]["flows.0.encoder.layers.0.weight"] == [16, 5]


@pytest.mark.slow
def test_no_pickle_is_read(path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(path) + ".exploded",))

    path.write_bytes(pickle.dumps(Bomb()))
    unchanged(model(), path, "not a readable safetensors file .* pickled files are never read")
    torch.save(model().state_dict(), path)
    unchanged(model(), path, "pickled files are never read")
    assert not os.path.exists(str(path) + ".exploded")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated(path, kept):
    model().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    unchanged(model(), path, "not a readable safetensors file")


def test_altered(path):
    model().save(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    unchanged(model(), path, "has been altered")


@pytest.mark.slow
def test_of_another_model(path):
    model().save(path)
    other = nfi.InjectiveNormalizingFlow(base(2), stacks()["latent"])
    unchanged(other, path, "belongs to another model: of the classes, 'flows.0' is FreeFormInj")
    wide = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(6)])
    unchanged(wide, path, r"of the shapes, 'flows.0.encoder.layers.0.weight' is \[16, 5\] in the")


def test_a_foreign_safetensors_file(path):
    save_file({"a": torch.zeros(2)}, path)
    unchanged(model(), path, "was not written by normflows_injective")
    save_file({"a": torch.zeros(2)}, path, metadata={"normflows_injective": "{"})
    unchanged(model(), path, "damaged header")


def test_a_folder_that_is_missing_or_in_the_way(tmp_path):
    with pytest.raises(CheckpointError, match="folder .*nowhere does not exist"):
        model().save(tmp_path / "nowhere" / "model.safetensors")
    unchanged(model(), tmp_path, "is no file")


def test_a_device_that_is_not_there(path):
    model().save(path)
    if not torch.cuda.is_available():
        with pytest.raises(CheckpointError, match="cannot be read to cuda"):
            model().load(path, map_location="cuda")


def test_the_file_has_ordinary_permissions(path):
    model().save(path)
    path.with_suffix(".other").touch()
    assert path.stat().st_mode == path.with_suffix(".other").stat().st_mode


def test_a_missing_file(path):
    unchanged(model(), path, "does not exist")


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    ours = model()
    ours.save(path)
    before = load_file(path)

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be written: No space"):
        ours.save(path)
    assert os.listdir(path.parent) == [path.name]
    assert load_file(path).keys() == before.keys()
