"""State that rows hand from one training segment to the next: kept per micro-batch, stored per slot.

The trainer treats it as an opaque tree of tensors, batch first. On disk a leaf holds all slots of the global batch in
order, so that a resume may deal them differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from potamos.parallel.launch import Rank, all_sum
from potamos.pretrain.models.interfaces import State


def detach(state: State) -> State:
    """The same tree without its graph, and with zeros for what is not finite: a step that is skipped because its values
    overflowed must not hand them to every step after it."""
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().nan_to_num(0.0, 0.0, 0.0), state)


def gather(states: list[State], rank: Rank) -> dict[str, Tensor]:
    """Leaves of all slots of the global batch, {"leaf.<n>": tensor}, equal on every rank; {} before the first step."""
    if not states or states[0] is None:
        return {}
    leaves = zip(*(pytree.tree_leaves(state) for state in states), strict=True)
    return {f"leaf.{n}": _all_slots(torch.cat(parts), rank) for n, parts in enumerate(leaves)}


def _all_slots(own: Tensor, rank: Rank) -> Tensor:
    if rank.world == 1:
        return own
    # Each rank adds its rows to zeros: one collective that every backend has. As bytes, because -0.0 + 0.0 is 0.0.
    raw = own.contiguous().view(torch.uint8)
    whole = raw.new_zeros(len(raw) * rank.world, *raw.shape[1:])
    whole[rank.rank * len(raw) : (rank.rank + 1) * len(raw)] = raw
    return all_sum(whole).view(own.dtype)


def scatter(
    stored: Mapping[str, Tensor], example: Callable[[], State], micro_batches: int, rank: Rank, device: torch.device
) -> list[State]:
    """This rank's state per micro-batch, from what ``gather`` stored. ``example`` gives a state of the same structure,
    which the disk does not hold. Without stored state, as many Nones."""
    if not stored:
        return [None] * micro_batches
    _, structure = pytree.tree_flatten(example())
    leaves = [stored[f"leaf.{n}"] for n in range(len(stored))]
    own = [leaf.chunk(rank.world)[rank.rank].chunk(micro_batches) for leaf in leaves]
    return [
        pytree.tree_unflatten([leaf[i].to(device, copy=True) for leaf in own], structure) for i in range(micro_batches)
    ]
