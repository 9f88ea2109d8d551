"""Attention registered with torch.library: one node of a traced graph, forward and backward.

A compiler that traced into `function.attend` would meet loops over tiles, reads of tile tables and kernel launches. So
while it traces, `attention` calls the operation registered here, whose implementation is the very same form. Masks,
biases and dropout keys are given flat, as tensors and numbers. The backward is an operation too and is given out and
lse: nothing runs twice. Rotations, the products of disentangled biases and torch's own fused attention stay outside,
where the compiler can see and fuse them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import own_precision
from ..dropout import DropoutKey
from .biases import BiasTerms
from .dispatch import Decision, FormName, form_of
from .function import Drop
from .masks import BlockLayout, Blocks, Mask

DIFFERENTIABLE = ("q", "k", "v", "table", "content", "position")


class Tensors(NamedTuple):
    """The tensors of a call in the order of the schema; only the first three are always there."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    content: Tensor | None
    position: Tensor | None
    slopes: Tensor | None
    rows: Tensor | None
    query_documents: Tensor | None
    key_documents: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None
    prefix: Tensor | None
    layout_counts: Tensor | None
    layout_indices: Tensor | None
    samples: Tensor | None


class Options(NamedTuple):
    """What is no tensor, in the order of the schema. blocks: () or (size, behind, ahead, shift); sizes of what is
    absent are 0."""

    form: str
    scale: float
    wide: bool
    least: int
    causal: bool
    query_offset: int
    key_offset: int
    window: int | None
    prefix: int | None
    blocks: Sequence[int]
    first: int
    layout_size: int
    dropout: float
    seed: int
    purpose: str
    step: int
    layer: int
    head_offset: int


_OPTIONAL = ", ".join(f"Tensor? {name}" for name in Tensors._fields[3:])
_TENSORS = f"Tensor q, Tensor k, Tensor v, {_OPTIONAL}"
_TYPES = {"form": "str", "scale": "float", "wide": "bool", "causal": "bool", "dropout": "float", "purpose": "str"}
_TYPES |= {"window": "SymInt?", "prefix": "SymInt?", "blocks": "SymInt[]", "seed": "int", "layer": "int"}
_NAMES = {name: f"{name}_columns" if name == "prefix" else name for name in Options._fields}
_OPTIONS = ", ".join(f"{_TYPES.get(name, 'SymInt')} {_NAMES[name]}" for name in Options._fields)
_COUNT = len(Tensors._fields)


def flatten(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Mask,
    scale: float,
    drop: Drop | None,
    wide: bool,
) -> tuple[Tensors, Options]:
    """A call's descriptions as the operation takes them."""
    layout, blocks, key = mask.layout, mask.blocks, None if drop is None else drop.key
    number = None if isinstance(mask.prefix, Tensor) else mask.prefix
    tensors = Tensors(
        q, k, v, terms.table, terms.content, terms.position, terms.slopes, terms.rows,
        mask.query_documents, mask.key_documents, mask.query_positions, mask.key_positions,
        mask.prefix if isinstance(mask.prefix, Tensor) else None,
        None if layout is None else layout.counts, None if layout is None else layout.indices,
        None if key is None else key.samples,
    )  # fmt: skip
    options = Options(
        form, scale, wide, terms.least, mask.causal, mask.query_offset, mask.key_offset, mask.window, number,
        () if blocks is None else (blocks.size, blocks.behind, blocks.ahead, blocks.shift), mask.first,
        0 if layout is None else layout.size, 0.0 if drop is None else drop.p,
        *((0, "", 0, 0) if key is None else (key.seed, key.purpose, key.step, key.layer)),
        0 if drop is None else drop.head_offset,
    )  # fmt: skip
    return tensors, options


def restore(tensors: Tensors, options: Options) -> tuple[BiasTerms, Mask, Drop | None]:
    """The descriptions that `flatten` was given."""
    at, of = tensors, options
    terms = BiasTerms(at.slopes, at.table, at.content, at.position, at.rows, of.least)
    layout = None
    if at.layout_counts is not None and at.layout_indices is not None:
        layout = BlockLayout(of.layout_size, at.layout_counts, at.layout_indices)
    mask = Mask(
        of.causal, of.query_offset, of.key_offset, at.query_documents, at.key_documents, of.window,
        of.prefix if at.prefix is None else at.prefix, Blocks(*of.blocks) if of.blocks else None, of.first, layout,
        at.query_positions, at.key_positions,
    )  # fmt: skip
    if at.samples is None:
        return terms, mask, None
    key = DropoutKey(of.seed, of.purpose, of.step, of.layer, at.samples)
    return terms, mask, Drop(of.dropout, key, of.head_offset)


def _form(options: Options) -> Any:
    name: FormName = "triton" if options.form == "triton" else "chunked"
    return form_of(Decision(name, ""))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_results(q: Tensor, v: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """Where (out, lse) go: out in the memory order of q where it has q's shape."""
    dtype = _wide(q) if wide else q.dtype
    shape = (*q.shape[:3], v.shape[3])
    out = torch.empty_like(q, dtype=dtype) if v.shape[3] == q.shape[3] else q.new_empty(shape, dtype=dtype)
    return out, q.new_empty(q.shape[:3], dtype=_wide(q))


def _placed(x: Tensor, empty: Tensor) -> Tensor:
    """x with the strides of `empty`, which tracing was told; copied only if it has others."""
    return x if x.stride() == empty.stride() else empty.copy_(x)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, options = Tensors(*arguments[:_COUNT]), Options(*arguments[_COUNT:])
    q, k, v = tensors[:3]
    terms, mask, drop = restore(tensors, options)
    with own_precision(q), torch.no_grad():
        out, lse = _form(options).forward(q, k, v, terms, mask, options.scale, drop, wide=options.wide)
    places = _empty_results(q, v, options.wide)
    return _placed(out, places[0]), _placed(lse, places[1])


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, options = Tensors(*arguments[:_COUNT]), Options(*arguments[_COUNT:])
    return _empty_results(tensors.q, tensors.v, options.wide)


def _backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    """The gradients that are needed, in order."""
    tensors, options = Tensors(*arguments[:_COUNT]), Options(*arguments[_COUNT:])
    q, k, v = tensors[:3]
    terms, mask, drop = restore(tensors, options)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    with own_precision(q), torch.no_grad():
        found = _form(options).backward(
            grad_out, grad_lse, q, k, v, out, lse, terms, mask, options.scale, drop, tuple(needs)
        )
    result = []
    for x, gradient, need in zip(tensors, found, needs, strict=False):
        if need:
            assert x is not None
            assert gradient is not None
            result.append(_placed(gradient, torch.empty_like(x)))
    return result


def _backward_fake(grad_out, grad_lse, out, lse, needs: Sequence[bool], *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip(arguments, needs, strict=False) if need]


operation = torch.library.custom_op(
    "potamos::attention", _forward, mutates_args=(), schema=f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)"
)
"""(out, lse) of `function.attend`."""
operation.register_fake(_forward_fake)
backward_operation = torch.library.custom_op(
    "potamos::attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool[] needs, {_TENSORS}, {_OPTIONS}) "
    "-> Tensor[]",
)
backward_operation.register_fake(_backward_fake)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:_COUNT])
    ctx.options = inputs[_COUNT:]


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
    nothing = len(ctx.needs_input_grad) - len(needs)
    if not any(needs) or (grad_out is None and grad_lse is None):
        return (None,) * len(ctx.needs_input_grad)
    out, lse, *tensors = ctx.saved_tensors
    found = iter(backward_operation(grad_out, grad_lse, out, lse, needs, *tensors, *ctx.options))
    return *(next(found) if need else None for need in needs), *(None,) * nothing


operation.register_autograd(_gradients, setup_context=_save)


def traced_attend(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Mask,
    scale: float,
    drop: Drop | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """`function.attend` by the registered operation; form: "chunked" or "triton"."""
    tensors, options = flatten(form, q, k, v, terms, mask, scale, drop, wide)
    return operation(*tensors, *options)
