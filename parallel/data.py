"""Data parallelism: parameters replicated (DDP), sharded (FSDP2), or sharded in replicas (HSDP). Gradients are summed,
never averaged: each loss is divided by global counts before its backward.

Sequence slices count as data here: what they share are parameters, so shards lie over data shards and slices together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from potamos.parallel.mesh import Mesh

REPLICAS, SHARDS = ("dp_replicate",), ("dp_shard", "cp")


def replicate(system: nn.Module, group: dist.ProcessGroup, device: torch.device) -> DistributedDataParallel:
    """One copy per rank of `group`; gradients are summed while the backward runs."""
    wrapped = DistributedDataParallel(
        system,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        process_group=group,
    )
    wrapped.register_comm_hook(group, _sum_bucket)
    return wrapped


def _sum_bucket(group, bucket):  # torch insists on its own annotations, as objects, or on none
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def shard(root: nn.Module, units: Sequence[nn.Module], mesh: Mesh, compute: torch.dtype | None) -> nn.Module:
    """Shard `root` in place: each of `units` (blocks) is gathered for its own forward and backward, the rest with root.

    compute: the dtype in which parameters are gathered, None for their own. Modules that declare fp32 keep it: they are
    a group of their own within their unit.
    """
    where = mesh.devices(*SHARDS)
    if mesh.size(*REPLICAS) > 1:
        where = mesh.grid(REPLICAS, SHARDS)
    keep = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = keep if compute is None else policy
    for unit in [*units, root]:
        if compute is not None:
            for module in _fp32_modules(unit):
                fully_shard(module, mesh=where, mp_policy=keep)
        fully_shard(unit, mesh=where, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def _fp32_modules(unit: nn.Module) -> list[nn.Module]:
    """The outermost modules in `unit` that declare fp32, not yet sharded."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, FSDPModule):
                continue
            if getattr(child, "precision", None) == "float32":
                if next(child.parameters(), None) is not None:
                    found.append(child)
            else:
                visit(child)

    visit(unit)
    return found
