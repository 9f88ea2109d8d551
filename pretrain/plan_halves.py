"""A backward in two halves, as torch's schedules split it, on the fake tensors of a trace.

Between the gradients of a stage's inputs and those of its weights, all that the forward kept is still there, and with
it the gradient at every operation that uses a weight (Qi et al. 2023, section 2, count both). The weights' half frees
what it walks on its way; the rest goes when the last operation has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from potamos.parallel.split_backward import joined_groups

INPUTS, WEIGHTS = 2, 3
"""Ways through a unit, beside forward (0) and backward (1)."""


def run_in_halves(
    forward: Callable[[], Tensor],
    first: nn.Module,
    units: Mapping[str, Sequence[nn.Parameter]],
    close: Callable[[str, int], None],
) -> None:
    """A micro-batch through a stage that begins at the module `first`, and back in halves.

    forward: returns the loss, and keeps nothing of it. units: the parameters of each unit, from the first to the last.
    close (unit, way) is called where the weights' half of a unit ends; where its inputs' half does, a hook sees.
    """
    received: list[Tensor] = []

    def cut(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        received.append(inputs[0].detach().requires_grad_())
        return received[0], *inputs[1:]

    handle = first.register_forward_pre_hook(cut, prepend=True)
    try:
        loss = forward()
    finally:
        handle.remove()
    every = [parameter for own in units.values() for parameter in own]
    with joined_groups():
        _, groups = stage_backward_input([loss], None, received, iter(every))
    for unit, own in units.items():
        nodes = {parameter.view_as(parameter).grad_fn.next_functions[0][0] for parameter in own}  # pyright: ignore
        mine = [group for group in groups if not nodes.isdisjoint(group["params"])]
        stage_backward_weight(iter(own), mine)
        close(unit, WEIGHTS)
