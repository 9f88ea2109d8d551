"""Activation checkpointing and compilation, block by block; names and values of parameters do not change.

Recomputing needs no random state: every random decision is a function of counters (sample, position, layer, step).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Mode = Literal["none", "full", "selective"]

_OPS = torch.ops.aten
KEPT = {
    _OPS.mm.default,
    _OPS.addmm.default,
    _OPS._scaled_dot_product_flash_attention.default,
    _OPS._scaled_dot_product_flash_attention_for_cpu.default,
    _OPS._scaled_dot_product_efficient_attention.default,
    _OPS._scaled_dot_product_cudnn_attention.default,
}
"""What "selective" keeps: results of linear layers and of fused attention. Batched products are left out: mixers add
into theirs in place."""


def checkpoint_blocks(blocks: Iterable[nn.Module], mode: Mode) -> None:
    """Keep only the input of each block for the backward ("full"), or that and the results of `KEPT` ("selective").

    A block one of whose regions forbids recomputing (its trait ``checkpointing``) is left as it is.
    """
    if mode == "none":
        return
    context: dict[str, Any] = {}
    if mode == "selective":
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        traits = [module.traits for module in block.modules() if getattr(module, "room", None) in ("mixer", "channel")]
        if all(t.checkpointing for t in traits):  # pyright: ignore[reportAttributeAccessIssue]
            block.forward = _recomputed(block.forward, context)


def _recomputed(forward: Callable[..., Any], context: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **context, **named)

    return run


def _policy(_: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(blocks: Iterable[nn.Module], backend: str | None) -> None:
    """Let torch compile each block by itself, which takes as long as one block however many there are; None: none."""
    if backend is not None:
        for block in blocks:
            block.compile(backend=backend)
