"""Data parallelism: parameters replicated (DDP), sharded (FSDP2), or sharded in replicas (HSDP). Gradients are summed,
never averaged: each loss is divided by global counts before its backward.

Sequence slices count as data here: what they share are parameters, so shards lie over data shards and slices together.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from potamos.parallel.mesh import Mesh

REPLICAS, SHARDS = ("dp_replicate",), ("dp_shard", "cp")

# Newer versions of torch have another name for what sends buffers at each forward, and warn of this one.
_NEW = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW else "broadcast_buffers": False}


def replicate(system: nn.Module, group: dist.ProcessGroup, device: torch.device) -> DistributedDataParallel:
    """One copy per rank of `group`; gradients are summed while the backward runs. Buffers are constants of the model,
    the same on every rank from the start, so none is sent with a step."""
    wrapped = DistributedDataParallel(
        system,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        process_group=group,
        **_NO_BUFFERS,
    )
    wrapped.register_comm_hook(group, _sum_bucket)
    return wrapped


def _sum_bucket(group, bucket):  # torch insists on its own annotations, as objects, or on none
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def shard(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: Mesh,
    compute: torch.dtype | None,
    *,
    gather_once: bool = False,
    whole: Iterable[nn.Parameter] = (),
) -> nn.Module:
    """Shard `root` in place: each block is gathered for its own forward and backward, the rest with root.

    compute: the dtype in which a block's parameters are gathered, None for their own. What declares fp32 keeps it, in a
    group of its own, and so does what is outside the blocks. Gradients are summed in fp32 or better.
    gather_once: blocks stay gathered until a step's gradients are summed. A backward that takes the gradients of
    weights later finds them in the graph by the gathered parameters, and leaves those out that are sharded by then.
    whole: parameters that stay whole on every rank, whose gradients are left to the caller to sum.
    """
    apart, after = set(whole), not gather_once
    where = mesh.grid(REPLICAS, SHARDS) if mesh.size(*REPLICAS) > 1 else mesh.devices(*SHARDS)
    keep = MixedPrecisionPolicy(cast_forward_inputs=False)
    # A block hands on a view where a state is one; nothing here changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    for block in blocks:
        policy = keep
        if compute is not None:
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
            wide = _fp32_modules(block)
            if wide:
                fully_shard(wide, mesh=where, mp_policy=keep, reshard_after_forward=after)
        fully_shard(block, mesh=where, mp_policy=policy, reshard_after_forward=after)
    fully_shard(
        root, mesh=where, mp_policy=keep, reshard_after_forward=False if gather_once else None, ignored_params=apart
    )
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def _fp32_modules(unit: nn.Module) -> list[nn.Module]:
    """The outermost modules in `unit` that declare fp32."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if getattr(child, "precision", None) == "float32":
                if next(child.parameters(), None) is not None:
                    found.append(child)
            else:
                visit(child)

    visit(unit)
    return found
