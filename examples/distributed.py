"""The digits of examples/digits.py, trained in several processes.

    torchrun --nproc-per-node 2 examples/distributed.py [--fsdp] [--steps 1000] [--out out]
    python examples/distributed.py                      # the same in one process

Every process takes its share of each batch, on a GPU of its own where there are enough, or else on
the CPU. ``DistributedDataParallel`` averages the gradients; with ``--fsdp`` FSDP2's
``fully_shard`` also spreads parameters and optimiser states over the processes. Rank 0 prints the
loss, gathers the weights, evaluates them on the test images, writes a safetensors file, and checks
that a model which reads it gives the same density. Two to five minutes of two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits import BATCH, build, load
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

import normflows_injective as nfi


def start() -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did: rank, their number, and the device."""
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if enough:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if enough else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def wrap(loss: nfi.ForwardKLD, fsdp: bool, device: torch.device) -> nn.Module:
    """The loss, whose gradients are then averaged over the processes."""
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        return fully_shard(loss, mesh=mesh)
    if dist.is_initialized():
        # The latent flows get no gradient while the warm-up trains reconstruction alone.
        return DistributedDataParallel(loss, find_unused_parameters=True)
    return loss


def train(loss: nn.Module, images: Tensor, steps: int, rank: int, world: int) -> None:
    """The loop of examples/digits.py on this process's share of every batch."""
    optimizer = torch.optim.AdamW(loss.parameters(), weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    order = torch.Generator().manual_seed(0)  # the same on all ranks, unlike the probes
    if rank == 0:
        print("| step | loss, mean over the ranks |\n|---|---|", flush=True)
    for step in range(1, steps + 1):
        index = torch.randint(len(images), (BATCH,), generator=order)[rank::world]
        value = loss(images[index])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        if step % max(1, steps // 10) == 0 or step == steps:
            mean = value.detach() / world
            if dist.is_initialized():
                dist.all_reduce(mean)
            if rank == 0:
                print(f"| {step} | {mean:.2f} |", flush=True)


def report(options: argparse.Namespace, state: dict[str, Any], images: Tensor, world: int) -> None:
    """Evaluate the trained weights, write them, and check that they can be read back."""
    device = images.device
    trained, again = (build(options.steps).to(device).eval() for _ in range(2))
    trained.load_state_dict(state)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "distributed.safetensors"
    trained.save(path)
    again.load(path)
    with torch.no_grad():
        log_prob = trained.log_prob(images)
        error = trained.reconstruction_error(images)
        same = torch.equal(again.log_prob(images), log_prob)
    print(f"\n| {len(images)} test images, processes that trained: {world} | mean |")
    print("|---|---|")
    print(f"| exact NLL (nats, on the 16-dimensional manifold) | {-log_prob.mean():.2f} |")
    print(f"| reconstruction error, summed over pixels | {error.mean():.3f} |\n")
    if not same:
        raise SystemExit(f"the model read from {path} gives another log_prob")
    print(f"wrote {path}; the model read from it gives the same log_prob")


def leave() -> None:
    """End this process when all have come here.

    Gloo's threads outlive the group where anything still holds it, and caches of torch hold the
    mesh of ``fully_shard``. A thread that frees the tensors of the last collective while the
    interpreter is taken down aborts the process, so the process ends without that.
    """
    dist.barrier()  # a process must not leave while another still talks to it
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Train, and on rank 0 evaluate, save, and read back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters (torch 2.6)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the weights")
    options = parser.parse_args()
    # So small a network gains nothing from more threads, and on a busy machine they slow it down.
    torch.set_num_threads(1)
    rank, world, device = start()
    if options.fsdp and not dist.is_initialized():
        parser.error("--fsdp needs torchrun, with --nproc-per-node 1 for a single process")
    if BATCH % world:
        parser.error(f"{world} processes have no equal shares of a batch of {BATCH}")

    torch.manual_seed(options.seed)  # fully_shard expects the same model on all ranks ...
    model = build(options.steps).to(device)
    torch.manual_seed(options.seed + 1 + rank)  # ... and the noise must differ
    train_images, test_images = (images.to(device) for images in load(options.seed))
    loss = wrap(nfi.ForwardKLD(model), options.fsdp, device)
    train(loss, train_images, options.steps, rank, world)

    # On all ranks, because it gathers what fully_shard has spread; only rank 0 receives it.
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if rank == 0:
        report(options, state, test_images, world)
    if dist.is_initialized():
        leave()


if __name__ == "__main__":
    main()
