"""A mend of torch's split backward: groups of weights that share a part of the graph become one.

Between the gradients of a stage's inputs and those of its weights, torch keeps the gradient at every operation where a
weight meets what comes from the inputs, and groups weights that meet it at the same operations. A weight that meets it
at several (the key projection, which makes keys of tokens and, for disentangled attention, of position vectors too) can
be left in two groups (`get_param_groups` of torch 2.13: a group that was found before another is not joined with it).
Each group is walked by itself, and what both hold is freed by the first or counted twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.distributed.pipelining import _backward

Group = dict[str, set[Any]]


@contextlib.contextmanager
def joined_groups() -> Iterator[None]:
    """Within it, torch's split backward walks every part of a graph once."""
    find = _backward.get_param_groups

    def find_joined(*arguments: Any, **options: Any) -> list[Group]:
        return join(find(*arguments, **options))

    with mock.patch.object(_backward, "get_param_groups", find_joined):
        yield


def join(groups: list[Group]) -> list[Group]:
    """Groups of which no two have a weight or an operation in common, each where its first part was.

    That place follows from the order of the weights, where torch's own order may follow from addresses: ranks whose
    graphs hold collectives must walk them in one order.
    """
    joined: list[Group] = []
    for group in groups:
        whole: Group = {name: set(members) for name, members in group.items()}
        shared = [place for place, other in enumerate(joined) if _meet(whole, other)]
        for place in shared:
            whole = {name: members | joined[place][name] for name, members in whole.items()}
        joined = [other for place, other in enumerate(joined) if place not in shared[1:]]
        if shared:
            joined[shared[0]] = whole
        else:
            joined.append(whole)
    return joined


def _meet(group: Group, other: Group) -> bool:
    return any(not members.isdisjoint(other[name]) for name, members in group.items())
