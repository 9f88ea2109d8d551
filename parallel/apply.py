"""``apply(system, layout, rank)``: the one place where a model is spread over processes.

It reads facts and the layout, never a name. In this version a layout may replicate the model over data-parallel ranks;
every other axis is refused, by name, before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from potamos.parallel.facts import Layout
from potamos.parallel.launch import Rank


class LayoutError(ValueError):
    """A layout that this run cannot have; names the axis and what to change."""


def data_ranks(layout: Layout, world: int) -> int:
    """How many ways a global batch is cut; the world size as long as only replication exists."""
    for axis in ("dp_shard", "tp", "pp", "cp", "ep"):
        size = getattr(layout, axis)
        if size not in (1, "all") or (size == "all" and layout.dp_replicate == "all"):
            raise LayoutError(f"parallel.{axis}: {size} is not available in this version; set it to 1")
    if layout.dp_shard == "all" and world > 1:
        raise LayoutError("parallel.dp_shard: all is not available in this version; use dp_replicate: all")
    if layout.dp_replicate not in ("all", world):
        wrong = f"parallel.dp_replicate: {layout.dp_replicate} does not match {world} processes"
        raise LayoutError(f"{wrong}; set it to {world} or to all")
    if layout.engine != "native":
        raise LayoutError(f"parallel.engine: {layout.engine!r} is not available in this version; use native")
    return world


def apply(system: nn.Module, layout: Layout, rank: Rank, device: torch.device) -> nn.Module:
    """``system`` as this rank runs it. Gradients come out *summed* over data ranks: losses are divided by global counts
    before the backward, so an average would divide twice."""
    if data_ranks(layout, rank.world) == 1:
        return system
    wrapped = DistributedDataParallel(
        system,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    wrapped.register_comm_hook(None, _sum_bucket)
    return wrapped


def _sum_bucket(_, bucket):  # torch insists on its own annotations, as objects, or on none
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


@contextmanager
def gradient_sync(system: nn.Module, *, last: bool) -> Iterator[None]:
    """Communicate gradients only in the last micro-batch of a step."""
    if last or not isinstance(system, DistributedDataParallel):
        yield
    else:
        with system.no_sync():
            yield
