"""Run our module under torch's distributed engines, in two gloo processes of their own.

Prints one line of JSON: for each case, whether the values are those of the formula in one process.
`python -m tests.contexts.on_two_processes FOLDER` needs an empty folder for files.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from .torch_formula import LENGTHS, inputs, pair, same

WORLD = 2
BATCH = 4
PROJECTIONS = ("W_query", "W_key", "W_value")


def of_rank(tensor: Tensor, rank: int) -> Tensor:
    return tensor.chunk(WORLD)[rank]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): whole(parameter.grad).detach()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def expected(formula: nn.Module, given: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs of the whole batch, and the gradient of the mean loss of the two halves."""
    formula = copy.deepcopy(formula)
    outputs = formula(given)
    loss = sum(half.nan_to_num().square().sum() for half in outputs.chunk(WORLD)) / WORLD
    loss.backward()
    return outputs.detach(), gradients(formula)


def data_parallel(wrap: Any, rank: int, tokens: int, mask: str) -> bool:
    """Each process takes half of the batch, and the gradients are averaged."""
    module, formula = pair(mask, "auto")
    given = inputs(tokens, BATCH)
    outputs, grads = expected(formula, given)
    wrapped = wrap(module)
    found = wrapped(of_rank(given, rank))
    found.nan_to_num().square().sum().backward()
    return same(found, of_rank(outputs, rank), tokens) and same(gradients(wrapped), grads, tokens)


def edited_on_rank_0(rank: int, tokens: int) -> bool:
    """DDP broadcasts the buffers of rank 0 before each forward pass."""
    module, formula = pair("causal", "auto")
    wrapped = DistributedDataParallel(module)
    given = inputs(tokens, BATCH)
    wrapped(given).nan_to_num().sum().backward()
    if rank == 0:
        with torch.no_grad():
            module.mask[tokens // 2 :, 1] = 1.0
    formula.mask[tokens // 2 :, 1] = 1.0
    return same(wrapped(given), formula(given), tokens)


def tensor_parallel(mesh: DeviceMesh, tokens: int) -> bool:
    """Each process has one of the two heads; `num_heads` of the module is not touched."""
    module, formula = pair("causal", "auto")
    plan: dict[str, Any] = dict.fromkeys(PROJECTIONS, ColwiseParallel())
    parallelize_module(module, mesh, {**plan, "out_proj": RowwiseParallel()})
    given = inputs(tokens, BATCH)
    found, wanted = module(given), formula(given)
    found.square().sum().backward()
    wanted.square().sum().backward()
    return same(found, wanted, tokens) and same(gradients(module), gradients(formula), tokens)


def distributed_mask(mesh: DeviceMesh, tokens: int) -> bool:
    """Parameters and mask are DTensors on every process, and the batch is sharded."""
    module, formula = pair("edited", "auto")
    distribute_module(module, mesh)
    given = inputs(tokens, BATCH)
    found = module(distribute_tensor(given, mesh, [Shard(0)]))
    return isinstance(module.mask, DTensor) and same(whole(found), formula(given), tokens)


def saved_and_loaded(mesh: DeviceMesh, folder: Path, tokens: int) -> bool:
    """A sharded module with an edited mask goes through a distributed checkpoint."""
    module, formula = pair("edited", "auto")
    fully_shard(module, mesh=mesh)
    checkpoint.save({"model": module.state_dict()}, checkpoint_id=folder)
    other, _ = pair("causal", "auto")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    fully_shard(other, mesh=mesh)
    state = {"model": other.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    given = inputs(tokens, BATCH)
    return torch.equal(other.mask, formula.mask) and same(other(given), formula(given), tokens)


def cases(rank: int, folder: Path) -> dict[str, bool]:
    mesh = init_device_mesh("cpu", (WORLD,))

    def sharded(module: nn.Module) -> Any:
        return fully_shard(module, mesh=mesh)

    held = {}
    for tokens in LENGTHS:
        for mask in ("causal", "edited", "closed"):
            held[f"DDP, {tokens}, {mask}"] = data_parallel(
                DistributedDataParallel, rank, tokens, mask
            )
            held[f"FSDP2, {tokens}, {mask}"] = data_parallel(sharded, rank, tokens, mask)
        held[f"DDP, {tokens}, edited on rank 0"] = edited_on_rank_0(rank, tokens)
        held[f"tensor parallel, {tokens}"] = tensor_parallel(mesh, tokens)
        held[f"mask as a DTensor, {tokens}"] = distributed_mask(mesh, tokens)
        held[f"distributed checkpoint, {tokens}"] = saved_and_loaded(
            mesh, folder / f"saved {tokens}", tokens
        )
    return held


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    held = cases(rank, folder)
    everyone: list[Any] = [None] * WORLD
    dist.all_gather_object(everyone, held)
    if rank == 0:
        print(json.dumps({name: all(each[name] for each in everyone) for name in held}))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(Path(sys.argv[1]),), nprocs=WORLD)
