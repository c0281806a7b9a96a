"""Training in two processes against training in one.

With as many orthonormal probes as latent dimensions the surrogate is exact for every sample
whatever the random numbers, so that gradients and parameters must agree to rounding.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import normflows as nf
import pytest
import torch
import torch.distributed as dist
from support.models import base, coupling, mlp_injection, model, spline
from support.paths import ROOT
from support.seeds import manual_seed, seeded_generator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normflows_injective as nfi

RANKS, SECONDS = 2, 600  # Seconds after which processes hang, on however slow a machine.
gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def spawn(worker, folder: Path) -> None:
    """Run ``worker(rank, folder)`` in two processes; their failures, and a hang, are ours.

    Gloo's threads outlive the group, which the mesh of ``fully_shard`` keeps alive in caches of
    torch. A thread that frees the tensors of the last collective while the interpreter is taken
    down aborts its process. Processes of a fork server end without that.
    """
    torch.multiprocessing.set_forkserver_preload(["torch"])
    context = torch.multiprocessing.start_processes(
        _join, (worker, folder), RANKS, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                pytest.fail(f"{worker.__name__} hangs")
    finally:
        for process in context.processes:
            process.kill()
    assert not list(folder.glob("interpreter*")), "the interpreter was taken down"


def _join(rank, worker, folder):
    atexit.register((folder / f"interpreter{rank}").touch)
    torch.set_num_threads(1)
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=SECONDS),
    )
    worker(rank, folder)
    dist.barrier()  # A process must not leave while another still talks to it.
    dist.destroy_process_group()


class Standardise(nn.Module):
    """Buffers at the input of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.randn(5))

    def forward(self, x):
        return x - self.centre


def build(seed: int, warmup_steps: tuple[int, int] | None = None, act_norm: bool = False):
    """Latent flows, a free-form injection behind buffers, and flows of the data."""
    manual_seed(seed)
    injection = mlp_injection()
    injection.encoder = nn.Sequential(Standardise(), injection.encoder)
    flows = [spline(), nf.flows.LULinearPermute(2), injection, coupling()]
    flows += [nf.flows.ActNorm((5,))] if act_norm else []
    likelihood = nfi.SurrogateLikelihood(num_probes=2, warmup_steps=warmup_steps)
    return nfi.InjectiveNormalizingFlow(base(2), flows, likelihood).double()


def batches(num: int = 6) -> torch.Tensor:
    generator = seeded_generator(7)
    return torch.randn(num, 16, 5, generator=generator, dtype=torch.float64)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(loss) -> list:
    return [None if p.grad is None else whole(p.grad).clone() for p in loss.parameters()]


def train(loss, data, rank: int | None = None) -> list:
    """Adam on the whole batches, or on a rank's share of them; the gradients of every step."""
    # Other probes on every rank and in every run.
    manual_seed(100 if rank is None else rank)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    history = []
    for x in data:
        optimizer.zero_grad()
        loss(x if rank is None else x.chunk(RANKS)[rank]).backward()
        history.append(gradients(loss))
        optimizer.step()
    return history


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def assert_trains_as_one(loss, single, rank) -> None:
    """Gradients of every step (or their absence), and parameters after all, are the same."""
    expected, actual = train(single, batches()), train(loss, batches(), rank)
    for ours, theirs in zip(actual, expected, strict=True):
        assert [g is None for g in ours] == [g is None for g in theirs]
        assert_same([g for g in ours if g is not None], [g for g in theirs if g is not None])
    assert_same([whole(p) for p in loss.parameters()], list(single.parameters()))
    inner = getattr(loss, "module", loss).model
    assert int(inner.likelihood.step) == int(single.model.likelihood.step) == len(batches())


def warm(model, x):
    with torch.no_grad():
        model.forward_kld(x)
    return model


def fit_worker(rank, folder):
    """All rows in every step, so that the order in which they come does not matter."""
    x, held_out = batches(3).flatten(0, 1), batches(4)[3]

    def trained(build_one, **options):
        manual_seed(rank)
        model = build_one()
        return model, nfi.training.fit(model, x, validation=held_out, **options)

    def host():
        return nf.NormalizingFlow(base(5), [coupling(), coupling()]).double()

    path = str(folder / "training.safetensors")
    for wrap in (None, DistributedDataParallel):
        model, result = trained(host, steps=30, batch_size=24, wrap=wrap)
        if rank == 0:
            torch.save([p.detach() for p in model.parameters()], folder / f"{wrap is None}.pt")
        assert_same_on_all_ranks(model)
        assert result.phases[0].is_kept
    for wrap in (None, DistributedDataParallel):
        model, result = trained(partial(build, rank), steps=60, batch_size=24, wrap=wrap)
        assert_same_on_all_ranks(model)
    assert [phase.name for phase in result.phases] == ["reconstruction", "latent density", "joint"]
    assert result.phases[0].after < result.phases[0].before

    def stop(check):
        if check.phase == "latent density":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trained(partial(build, rank), seconds=1.0, checkpoint=path, callback=stop)
    dist.barrier()
    model, result = trained(partial(build, rank), seconds=1.0, checkpoint=path)
    assert_same_on_all_ranks(model)
    with pytest.raises(nfi.errors.ShapeError, match="3 rows are too few for 2 processes"):
        nfi.training.fit(model, x[:3], steps=1, validation=held_out)


def assert_same_on_all_ranks(model):
    for parameter in model.parameters():
        ours = parameter.detach().clone()
        dist.broadcast(ours, src=0)
        assert torch.equal(ours, parameter.detach())


@gloo
def test_fit_in_two_processes_is_fit_in_one(tmp_path):
    spawn(fit_worker, tmp_path)
    manual_seed(0)
    model = nf.NormalizingFlow(base(5), [coupling(), coupling()]).double()
    x, held_out = batches(3).flatten(0, 1), batches(4)[3]
    nfi.training.fit(model, x, validation=held_out, steps=30, batch_size=48)
    for file in ("True.pt", "False.pt"):
        assert_same(torch.load(tmp_path / file), [p.detach() for p in model.parameters()])


def ddp_worker(rank, folder):
    def wrap(model, **options):
        return DistributedDataParallel(nfi.ForwardKLD(model), **options)

    single = nfi.ForwardKLD(build(0))
    assert_trains_as_one(wrap(build(rank)), single, rank)

    # Before the warm-up's start the latent flows have no gradient, and are not moved.
    single = nfi.ForwardKLD(build(0, (2, 4)))
    loss = wrap(build(rank, (2, 4)), find_unused_parameters=True)
    assert_trains_as_one(loss, single, rank)
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        train(wrap(build(rank, (2, 4))), batches(), rank)

    # Four micro-batches and one reduction are one batch.
    single, loss = nfi.ForwardKLD(build(0)), wrap(build(rank))
    data = batches(4)
    single(data.flatten(0, 1)).backward()
    for i, x in enumerate(data):
        with nullcontext() if i == 3 else loss.no_sync():
            (loss(x.chunk(RANKS)[rank]) / 4).backward()
    assert_same(gradients(loss), gradients(single))

    # A layer that initialises itself has to do so before; the constructor sends rank 0's.
    x = batches(1)[0]
    with pytest.raises(nfi.errors.UnsupportedLayerError, match=r"flows.4 \(ActNorm\) initialises"):
        wrap(build(0, act_norm=True))(x)
    single = nfi.ForwardKLD(warm(build(0, act_norm=True), x))
    assert_trains_as_one(wrap(warm(build(rank, act_norm=True), x[rank:])), single, rank)

    # The model itself is left as it was, so every rank can evaluate, and one can save.
    inner = wrap(build(rank)).module.model
    if rank == 0:
        inner.save(folder / "model.safetensors")
        other = build(1)
        other.load(folder / "model.safetensors")
        assert_same(other.log_prob(x), inner.log_prob(x))


@pytest.mark.slow
@gloo
def test_ddp_trains_as_one_process(tmp_path):
    spawn(ddp_worker, tmp_path)


def fsdp_worker(rank, folder):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))

    def wrap(model, **options):
        return fully_shard(nfi.ForwardKLD(model), mesh=mesh, **options)

    for options in ({}, {"reshard_after_forward": True}):
        single, loss = nfi.ForwardKLD(build(0, (2, 4))), wrap(build(0, (2, 4)), **options)
        assert_trains_as_one(loss, single, rank)

    data = batches(4)
    x = data[0]
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="initialises itself"):
        wrap(build(0, act_norm=True))(x)
    single = nfi.ForwardKLD(warm(build(0, act_norm=True), x))
    assert_trains_as_one(wrap(warm(build(0, act_norm=True), x)), single, rank)

    # Evaluation of a sharded model.
    loss.eval()
    loss.unshard()
    with torch.no_grad():
        log_prob = loss.model.log_prob(x)
    loss.reshard()

    # Its weights are gathered, and saved from a model that is not sharded.
    with pytest.raises(nfi.errors.CheckpointError, match="is sharded over processes"):
        loss.model.save(folder / "part.safetensors")
    assert not (folder / "part.safetensors").exists()
    state = get_model_state_dict(
        loss.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    plain, path = build(2, (2, 4)), folder / "model.safetensors"
    if rank == 0:
        plain.load_state_dict(state)
        plain.save(path)
    dist.barrier()
    with pytest.raises(nfi.errors.CheckpointError, match="before fully_shard"):
        loss.model.load(path)
    plain.load(path)
    assert int(plain.likelihood.step) == len(batches())
    assert_same(plain.eval().log_prob(x), log_prob)

    # Gradient accumulation.
    single, loss = nfi.ForwardKLD(build(0)), wrap(build(0))
    single(data.flatten(0, 1)).backward()
    for i, x in enumerate(data):
        loss.set_requires_gradient_sync(i == 3)
        (loss(x.chunk(RANKS)[rank]) / 4).backward()
    assert_same(gradients(loss), gradients(single))


@pytest.mark.slow
@gloo
@pytest.mark.skipif(
    torch.__version__ < (2, 6), reason="fully_shard is public in torch 2.6 and later"
)
def test_fsdp_trains_as_one_process(tmp_path):
    spawn(fsdp_worker, tmp_path)


def failing_worker(rank, folder):
    loss = DistributedDataParallel(nfi.ForwardKLD(build(0)))
    x = batches(1)[0] if rank == 0 else torch.full((8, 5), torch.nan).double()
    try:
        loss(x).backward()
    except nfi.errors.NonFiniteError as error:
        (folder / "message").write_text(str(error))
        raise


@gloo
@pytest.mark.slow
def test_data_that_are_not_finite_on_one_rank_end_all(tmp_path):
    # Rank 0 fails because rank 1 has left, and either may be the first to be seen.
    with pytest.raises(torch.multiprocessing.ProcessRaisedException):
        spawn(failing_worker, tmp_path)
    assert (tmp_path / "message").read_text().startswith("x has")


def test_the_loss_as_a_module_in_one_process(device):
    ours = model().to(device)
    x = torch.randn(4, 5, device=device)
    loss = nfi.ForwardKLD(ours)
    assert list(loss.parameters()) == list(ours.parameters())
    manual_seed(1)
    expected = ours.forward_kld(x)
    manual_seed(1)
    torch.testing.assert_close(loss(x), expected)
    loss.eval()
    assert not ours.training
    # In one process a layer may initialise itself.
    cold = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), nf.flows.ActNorm((5,))])
    nfi.ForwardKLD(cold.to(device))(x).backward()


def test_the_loss_as_a_module_of_models_with_a_context():
    x, context = torch.randn(4, 5), torch.randn(4, 3)
    ours = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(context_dim=3)])
    manual_seed(1)
    expected = ours.forward_kld(x, context)
    manual_seed(1)
    torch.testing.assert_close(nfi.ForwardKLD(ours)(x, context=context), expected)
    with pytest.raises(nfi.errors.ContextError):
        nfi.ForwardKLD(ours)(x)
    labels = torch.tensor([0, 1, 1, 0])
    host = nf.ClassCondFlow(nf.distributions.ClassCondDiagGaussian(5, 2), [coupling()])
    torch.testing.assert_close(nfi.ForwardKLD(host)(x, labels), host.forward_kld(x, labels))
    plain = nf.NormalizingFlow(base(5), [coupling()])
    torch.testing.assert_close(nfi.ForwardKLD(plain)(x), plain.forward_kld(x))


@pytest.mark.slow
def test_the_same_probes_on_all_ranks_keep_their_noise():
    """The variance of the volume's gradient, averaged over four ranks.

    It is 4 times that of other probes on every rank if the shares of the ranks count alike. From
    100 draws of each the standard error of the ratio's logarithm is at most 0.2.
    """
    ours = model().double()
    weights = list(ours.flows[0].encoder.parameters())

    def gradient(seeds) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x, seed in zip(batches(4), seeds, strict=True):
            manual_seed(seed)
            total = total + ours.loss_terms(x).surrogate.mean() / 4
        flat = torch.autograd.grad(total, weights, materialize_grads=True, allow_unused=True)
        return torch.cat([part.flatten() for part in flat])

    alike = torch.stack([gradient([draw] * 4) for draw in range(100)])
    apart = torch.stack([gradient(range(4 * draw, 4 * draw + 4)) for draw in range(100)])
    ratio = float(alike.var(0).sum() / apart.var(0).sum())
    assert 4 / 2.2 < ratio < 4 * 2.2


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), lambda x: x])
def test_the_loss_as_a_module_refuses_what_is_no_model(thing):
    with pytest.raises(nfi.errors.OptionError, match="with a method forward_kld"):
        nfi.ForwardKLD(thing)


@gloo
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"]])
def test_the_example_under_torchrun(options, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "examples" / "distributed.py"), "--steps", "20", "--out", str(tmp_path)]
    done = subprocess.run(
        [*run, *script, *options], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 20 |") == 1  # rank 0 alone prints
    assert (tmp_path / "distributed.safetensors").exists()
