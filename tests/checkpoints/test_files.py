"""Files of weights: read and replaced in one piece, whatever else goes on."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.constructed import classes
from support.models import model
from support.seeds import shifted
from torch import nn

import normflows_injective as nfi
from normflows_injective.checkpoints import files, load_checkpoint, save_checkpoint
from normflows_injective.errors import CheckpointError

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs links, locks and pipes of POSIX")


def names(folder):
    return sorted(os.listdir(folder))


def parts(path):
    """Table, its length and the bytes of the tensors of a file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def assemble(path, table, data):
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def checksum_of(state):
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(f"{key} {state[key].dtype} {tuple(state[key].shape)} ".encode())
        digest.update(state[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(path, state, module, **changes):
    """A file as version 0.1.0 wrote it, or as a careless tool would."""
    header = {
        "version": "0.1.0",
        "checksum": checksum_of(state),
        "classes": {key: type(part).__name__ for key, part in module.named_modules()},
        "shapes": {key: list(tensor.shape) for key, tensor in module.state_dict().items()},
        "dtypes": {key: str(tensor.dtype) for key, tensor in module.state_dict().items()},
        "options": {},
    } | changes
    save_file(state, path, metadata={"normflows_injective": json.dumps(header)})


def refused(module, path, text):
    """Loading is refused, and leaves the module as it was."""
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(module, path)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key]), key


# --- the format ---


class Mixed(nn.Module):
    """Tensors of many dtypes, shapes and strides."""

    def __init__(self):
        super().__init__()
        for index, dtype in enumerate(
            [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64]
        ):
            self.register_buffer(f"buffer_{index}", torch.randn(3, 5).mul(9).to(dtype).T)
        self.register_buffer("waves", torch.randn(3, dtype=torch.complex64).conj())
        self.register_buffer("empty", torch.zeros(0, 4))
        self.number = nn.Parameter(torch.randn(()))
        self.twin = self.number


def test_the_file_is_what_the_library_of_the_format_reads(path):
    module = Mixed()
    save_checkpoint(module, path)
    read = load_file(path)
    for key, tensor in module.state_dict().items():
        assert torch.equal(read[key], tensor), key
        assert read[key].dtype == tensor.dtype, key
    other = Mixed()
    load_checkpoint(other, path)
    for key, tensor in other.state_dict().items():
        assert torch.equal(read[key], tensor), key


def test_files_of_the_first_version_load(path):
    saved = model()
    state = {key: tensor.clone() for key, tensor in saved.state_dict().items()}
    write(path, state, saved)
    loaded = model()
    loaded.load(path)
    x = torch.randn(4, 5)
    assert torch.equal(loaded.log_prob(x), saved.log_prob(x))


@pytest.mark.parametrize("features", ["posterior", "weights"])
def test_options_in_files_of_the_first_version_are_compared(path, features):
    def build(features):
        return nfi.AssignmentFlow(nfi.nets.fields.DenseField(2, 2, (4,)), 2, 2, features=features)

    saved = build("posterior")
    options = {
        "field.parametrisation": "Classifier",
        "field.features": "posterior",
        "field.missing": False,
        "field.class_counts": "(2, 2)",
        "field.horizon": "infinite",
        "field.scale": 0.5,
    }
    write(path, saved.state_dict(), saved, options=options)
    if features == "posterior":
        build(features).load(path)
    else:
        refused(build(features), path, "of the options, 'field.features' is posterior in the file")


FORGERIES = {
    "shape": lambda state: state | {"weight": torch.zeros(5, 2)},
    "dtype": lambda state: state | {"weight": torch.zeros(2, 3, dtype=torch.long)},
    "missing": lambda state: {"weight": state["weight"]},
    "more": lambda state: state | {"other": torch.zeros(1)},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_tensors_that_disagree_with_their_own_header(path, name):
    module = nn.Linear(3, 2)
    write(path, FORGERIES[name](dict(module.state_dict())), module)
    refused(nn.Linear(3, 2), path, "is damaged: its header fits the model, but")


def test_two_values_for_a_tensor_that_is_one_here(path):
    saved = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    save_checkpoint(saved, path)
    tied = copy.deepcopy(saved)
    tied[1].weight = tied[0].weight
    refused(tied, path, "0.weight and 1.weight are one tensor here, and two in the file")


TABLES = {
    "gap": lambda table: table["weight"]["data_offsets"].__setitem__(0, 0),
    "overlap": lambda table: table.update(bias=table["weight"] | {"shape": [6]}),
    "negative": lambda table: table["weight"].update(shape=[-2, -3]),
    "fractions": lambda table: table["weight"].update(shape=[2.0, 3.0]),
    "no dtype": lambda table: table["weight"].update(dtype="X1"),
    "no place": lambda table: table["weight"].pop("data_offsets"),
    "far away": lambda table: table["weight"].update(data_offsets=[0, 10**15]),
    "no object": lambda table: table.update(weight=[1]),
}


@pytest.mark.parametrize("name", TABLES)
def test_damaged_tables(path, name):
    save_checkpoint(nn.Linear(3, 2), path)
    table, data = parts(path)
    TABLES[name](table)
    assemble(path, table, data)
    refused(nn.Linear(3, 2), path, "is not a readable safetensors file")


@pytest.mark.slow
def test_any_byte_may_be_wrong(path):
    module = nn.Sequential(nn.Linear(2, 3), nn.Softplus(2.0), nn.Linear(3, 1))
    save_checkpoint(module, path)
    raw, draw = path.read_bytes(), random.Random(shifted(0))
    before = copy.deepcopy(module.state_dict())
    for _ in range(150):
        damaged = bytearray(raw)
        damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            load_checkpoint(module, path)
        except CheckpointError:
            pass
        except Warning:  # an option, by which the file differs now
            pass
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[key]), key


def test_nested_tables_do_not_exhaust_the_stack(path):
    text = b"[" * 10**6
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    refused(nn.Linear(1, 1), path, "is not a readable safetensors file")


# --- loading ---


class Stubborn(nn.Linear):
    """A module with loading code of its own, which fails half way."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        raise ValueError("not today.")


def test_a_state_that_cannot_be_copied_leaves_everything_as_it_was(path):
    def build(last):
        return nn.Sequential(nn.Linear(2, 2), last(2, 2), nn.Linear(2, 2))

    module = build(Stubborn)
    save_checkpoint(build(Stubborn), path)
    refused(module, path, "cannot be copied into it: not today. The model is as it was")


def test_a_tensor_that_cannot_be_written_to(path):
    def build():
        module = nn.Linear(2, 2)
        module.register_buffer("wide", torch.zeros(1).expand(3))
        return module

    save_checkpoint(build(), path)
    refused(build(), path, "wide is an expanded tensor")
    with torch.inference_mode():
        frozen = nn.Linear(2, 2)
    save_checkpoint(nn.Linear(2, 2), path)
    refused(frozen, path, "weight was made under torch.inference_mode")


def test_tensors_without_values_are_refused(path):
    with pytest.raises(CheckpointError, match="weight is on the meta device"):
        save_checkpoint(nn.Linear(2, 2, device="meta"), path)
    save_checkpoint(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match="weight is on the meta device"):
        load_checkpoint(nn.Linear(2, 2, device="meta"), path)
    with pytest.raises(CheckpointError, match="has no shape yet"):
        save_checkpoint(nn.LazyLinear(2), path)


def test_a_state_that_is_no_tensor_is_refused(path):
    class Extra(nn.Module):
        def get_extra_state(self):
            return 1

    with pytest.raises(CheckpointError, match="_extra_state is no tensor but int"):
        save_checkpoint(Extra(), path)
    assert not path.exists()


@pytest.mark.parametrize("method", ["save", "load"])
def test_a_call_on_the_class_says_to_build_the_model(method):
    kinds = [kind for kind in classes() if hasattr(kind, method)]
    assert {nfi.InjectiveNormalizingFlow, nfi.AssignmentFlow} <= set(kinds)
    for kind in kinds:
        for arguments, options in ((("model.safetensors",), {}), ((), {"path": "a"}), ((), {})):
            with pytest.raises(CheckpointError, match="Build the model as it was when saved"):
                getattr(kind, method)(*arguments, **options)


MEMORY = """
import resource, sys, torch
from torch import nn
from normflows_injective.checkpoints import load_checkpoint, save_checkpoint

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def build():
    return nn.ModuleList(nn.Linear(1000, 1000, bias=False) for _ in range(20))

small = nn.ModuleList(nn.Linear(1000, 1000, bias=False) for _ in range(3))  # to warm up
save_checkpoint(small, sys.argv[1])
load_checkpoint(small, sys.argv[1])
model = build()
size = sum(4 * parameter.numel() for parameter in model.parameters())
before = peak()
save_checkpoint(model, sys.argv[1])
saved = peak()
load_checkpoint(model, sys.argv[1])
print((saved - before) / size, (peak() - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux states it")
def test_peak_memory_is_one_copy_of_the_model(path):
    """Saving copies one tensor at a time, and loading holds the bytes of the file once."""
    # Large blocks go back to the system when they are freed, not to a heap with holes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    saving, loading = map(float, done.stdout.split())
    assert saving < 0.2
    assert loading < 1.25


# --- reading ---


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_changes_its_length_while_it_is_read(path, monkeypatch, change):
    model().save(path)

    class Status:
        st_mode, st_size = path.stat().st_mode, path.stat().st_size - change

    monkeypatch.setattr(files.os, "fstat", lambda _: Status)
    refused(model(), path, "changed its length while it was read")


def test_a_file_that_is_cut_while_it_is_used(path):
    """The bytes are in memory, so nothing that happens to the file matters any more."""
    module = model()
    module.save(path)
    content = files.read_file(path)
    os.truncate(path, 10)
    assert len(content) > 10
    assert content.count(0) >= 0
    refused(module, path, "is not a readable safetensors file")


@pytest.mark.slow
def test_reading_beside_a_writer_finds_one_of_its_models(path):
    first, second, reader = (nn.Linear(3, 2) for _ in range(3))
    save_checkpoint(first, path)
    done, alarms = threading.Event(), []

    def read():
        while not done.is_set():
            try:
                load_checkpoint(reader, path)
            except CheckpointError as error:
                alarms.append(error)
            assert any(torch.equal(reader.weight, one.weight) for one in (first, second))

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(25):
        save_checkpoint(second, path)
        save_checkpoint(first, path)
    done.set()
    thread.join()
    assert not alarms
    assert names(path.parent) == [path.name]


@POSIX
def test_what_cannot_be_read_is_named(path):
    os.mkfifo(path)
    refused(model(), path, "model.safetensors is no file")
    loop = path.with_name("loop")
    loop.symlink_to(loop)
    refused(model(), loop, "loop cannot be read")


def test_a_system_that_refuses_to_read(path, monkeypatch):
    model().save(path)

    def fail(*_args, **_options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.os, "open", fail)
    refused(model(), path, "model.safetensors cannot be read: Permission denied")


# --- writing ---


@POSIX
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed_and_kept(tmp_path, exists):
    folder, link = tmp_path / "run", tmp_path / "latest"
    folder.mkdir()
    link.symlink_to(os.path.join("run", "model"))
    if exists:
        (folder / "model").write_bytes(b"old")
    saved, loaded = model(), model()
    saved.save(link)
    assert link.is_symlink()
    assert (names(folder), names(tmp_path)) == (["model"], ["latest", "run"])
    loaded.load(folder / "model")
    loaded.load(link)


@POSIX
def test_what_is_no_regular_file_is_refused_and_left_alone(tmp_path, monkeypatch):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's name must be short
        server.bind("socket")
    for name in ("pipe", "folder", "socket"):
        before = os.lstat(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
            model().save(tmp_path / name)
        assert os.path.samestat(before, os.lstat(tmp_path / name))
    with pytest.raises(CheckpointError, match="/dev/null is no regular file"):
        model().save("/dev/null")
    assert names(tmp_path) == ["folder", "pipe", "socket"]


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_permissions_are_kept(path, mode):
    path.write_bytes(b"old")
    path.chmod(mode)
    model().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_write_protected_file_is_refused(path, monkeypatch):
    path.write_bytes(b"old")
    # The superuser may write to everything, so the answer of the system is made up.
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match="model.safetensors is write-protected"):
        model().save(path)
    assert path.read_bytes() == b"old"


REFUSALS = {"open": errno.EROFS, "replace": errno.EACCES, "fsync": errno.ENOSPC}


@pytest.mark.parametrize("call", REFUSALS)
def test_a_system_that_refuses_to_write(path, monkeypatch, call):
    path.write_bytes(b"old")
    text = os.strerror(REFUSALS[call])

    def fail(*_args, **_options):
        raise OSError(REFUSALS[call], text)

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(CheckpointError, match=f"model.safetensors cannot be written: {text}"):
        model().save(path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(path.parent) == [path.name]


def test_a_name_that_is_too_long_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        model().save(tmp_path / ("a" * 300))


def test_the_folder_is_synced_after_the_renaming(path, monkeypatch):
    calls, replace, sync = [], os.replace, os.fsync

    def synced(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def replaced(*names):
        calls.append("rename")
        replace(*names)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", replaced)
    model().save(path)
    assert calls[:2] == ["file", "rename"]
    assert os.name != "posix" or calls[2:] == ["folder"]


KILLED = """
import os, signal, sys
from torch import nn
from normflows_injective.checkpoints import save_checkpoint
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(nn.Linear(2, 1), sys.argv[1])
"""


@pytest.mark.slow
@POSIX
def test_what_killed_writers_left_is_removed_by_the_next_save(path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(path.parent)) == 1
    other = path.with_name("other.safetensors.01234567.part")
    other.write_bytes(b"another's")
    model().save(path)
    assert names(path.parent) == sorted([path.name, other.name])


@POSIX
def test_what_living_writers_are_writing_is_left_alone(path):
    """One saves while another has written everything and not renamed yet."""
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)

    def write_both(file):
        file.write(b"first")
        save_checkpoint(second, path)

    files.replace_file(path, write_both)
    assert path.read_bytes() == b"first"
    assert names(path.parent) == [path.name]
    save_checkpoint(first, path)


def test_a_part_that_was_taken_for_an_orphan_is_begun_again(path, monkeypatch):
    real, taken = files.fcntl, []

    class Locks:
        LOCK_EX, LOCK_NB = (1, 2) if real is None else (real.LOCK_EX, real.LOCK_NB)

        @staticmethod
        def flock(_descriptor, _how):
            if not taken:
                (part,) = path.parent.iterdir()
                taken.append(part)
                part.unlink()

    monkeypatch.setattr(files, "fcntl", Locks)
    model().save(path)
    assert taken
    assert names(path.parent) == [path.name]


def test_a_system_without_locks(path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    path.with_name(path.name + ".01234567.part").write_bytes(b"an orphan")
    saved, loaded = model(), model()
    saved.save(path)
    loaded.load(path)
    assert names(path.parent) == [path.name]


@pytest.mark.slow
def test_many_writers_of_one_name(path):
    modules = [nn.Linear(20, 20) for _ in range(4)]

    def repeat(module):
        for _ in range(20):
            save_checkpoint(module, path)

    threads = [threading.Thread(target=repeat, args=(module,)) for module in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded = nn.Linear(20, 20)
    load_checkpoint(loaded, path)
    assert any(torch.equal(loaded.weight, module.weight) for module in modules)
    assert names(path.parent) == [path.name]
