"""Operations as `torch.library` knows them: opaque to `torch.compile`, with shapes for tracing and with gradients.

Run eagerly, an operation is ordinary torch code around autograd functions and Triton launches. A compiler that traced
into it would meet loops over chunks, reads of document boundaries and kernel launches. So while it traces
(`torch.compiler.is_compiling()`), the public functions call the registered form instead: one node, whose
implementation is the very same eager code. Eager calls never pay for the registration.

The registered form keeps its inputs only; its backward, another registered operation, runs the forward again and
differentiates it, as activation checkpointing would. A second derivative is refused, as it is of the eager form.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .once import refuse_second_derivatives

Run = Callable[..., tuple[Tensor, ...]]

NAMESPACE = "potamos"


def _dispatch_state() -> tuple[Any, Any]:
    return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


with ThreadPoolExecutor(1) as _thread:  # A new thread's state is the eager one, whatever this one is in.
    _EAGER = _thread.submit(_dispatch_state).result()


@contextmanager
def _eager_dispatch() -> Iterator[None]:
    """Run as if called eagerly. An operation's implementation may run with parts of torch's dispatcher switched off:
    autograd, and in the first call of a compiled graph lazy conjugation, without which complex products are silently
    wrong."""
    with torch._C._ForceDispatchKeyGuard(*_EAGER):
        yield


def register(name: str, tensors: str, options: str, results: int, run: Run, fake: Run) -> Run:
    """Register `potamos::name` and `potamos::name_backward`; returns the first one.

    tensors: schema of the tensor arguments, "Tensor q, Tensor? d"; options: that of the arguments after them,
    "str rule"; results: how many tensors come out.
    run(*tensors, *options): the eager form, a tuple of tensors that share no memory with the arguments or each other;
    fake(*tensors, *options): empty tensors with the shapes, strides and dtypes of its result.
    """
    count = tensors.count(",") + 1
    rest = f", {options}" if options else ""

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        with _eager_dispatch(), torch.no_grad():
            return run(*arguments)

    def backward(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needed: Sequence[bool], *options):
        return _differentiate(run, gradients, inputs, needed, options)

    def backward_fake(gradients, inputs, needed, *options) -> list[Tensor]:
        return [torch.empty_like(x) for x, need in zip(inputs, needed, strict=True) if need]

    def save(ctx, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:count])
        ctx.options = inputs[count:]

    def gradients_of(ctx, *gradients: Tensor | None):
        refuse_second_derivatives()
        needed = list(ctx.needs_input_grad[:count])
        if not any(needed) or all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        found = iter(backward_operation(list(gradients), list(ctx.saved_tensors), needed, *ctx.options))
        return *(next(found) if need else None for need in needed), *(None for _ in ctx.options)

    operation = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        forward,
        mutates_args=(),
        schema=f"({tensors}{rest}) -> ({', '.join(['Tensor'] * results)})",
    )
    operation.register_fake(fake)
    backward_operation = torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor?[] gradients, Tensor?[] inputs, bool[] needed{rest}) -> Tensor[]",
    )
    backward_operation.register_fake(backward_fake)
    operation.register_autograd(gradients_of, setup_context=save)
    return operation


def _differentiate(
    run: Run,
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    options: Sequence[Any],
) -> list[Tensor]:
    """Gradients of the inputs that need one, in their strides, from those of the results that have one."""
    leaves = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    wanted = [x for x, need in zip(leaves, needed, strict=True) if need and x is not None]
    with _eager_dispatch(), torch.enable_grad():
        results = run(*leaves, *options)
        pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None and r.requires_grad]
        found = torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    return [_own(gradient, x) for gradient, x in zip(found, wanted, strict=True)]


def _own(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The gradient in memory of its own with the strides that tracing was told."""
    if gradient is None:
        return torch.zeros_like(like)
    own = torch.empty_like(like)
    if gradient._is_view() or gradient.stride() != own.stride():
        return own.copy_(gradient)
    return gradient
