"""The fused form as an operator of torch: known to torch.compile, with shapes, strides and gradients declared."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..once import refuse_second_derivatives


@torch.library.custom_op("potamos::long_conv", mutates_args=())
def _forward(u: Tensor, taps: Tensor, pre_gate: Tensor | None, post_gate: Tensor | None) -> Tensor:
    from .triton_launch import forward

    return forward(u, taps, pre_gate, post_gate)


@_forward.register_fake
def _(u: Tensor, taps: Tensor, pre_gate: Tensor | None, post_gate: Tensor | None) -> Tensor:
    return torch.empty_like(u)


@torch.library.custom_op("potamos::long_conv_backward", mutates_args=())
def _backward(
    grad: Tensor,
    u: Tensor,
    taps: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    inputs: bool,
    kernel: bool,
    gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .triton_launch import backward

    wanted = {"inputs": inputs, "kernel": kernel, "gate": gate}
    found = backward(ordered(grad, channel_major(u)), u, taps, pre_gate, post_gate, **wanted)
    # An operator cannot return None.
    u_, taps_, pre_, post_ = (u.new_empty(0) if gradient is None else gradient for gradient in found)
    return u_, taps_, pre_, post_


@_backward.register_fake
def _(grad, u, taps, pre_gate, post_gate, inputs, kernel, gate):
    nothing = [u.new_empty(0) for _ in range(4)]
    return (
        torch.empty_like(u) if inputs else nothing[0],
        torch.empty_like(taps) if kernel else nothing[1],
        torch.empty_like(pre_gate) if inputs and pre_gate is not None else nothing[2],
        torch.empty_like(post_gate) if gate else nothing[3],
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor):
    refuse_second_derivatives()
    u, taps, pre_gate, post_gate = ctx.saved_tensors
    needs_u, kernel, needs_pre, gate = ctx.needs_input_grad
    found = _backward(grad, u, taps, pre_gate, post_gate, needs_u or needs_pre, kernel, gate)
    return tuple(gradient if needed else None for gradient, needed in zip(found, ctx.needs_input_grad, strict=True))


_forward.register_autograd(_differentiate, setup_context=_save)


def channel_major(x: Tensor) -> bool:
    """Whether memory holds (channel, batch, length) rather than (batch, channel, length)."""
    return not x.is_contiguous() and x.transpose(0, 1).is_contiguous()


def ordered(x: Tensor, major: bool) -> Tensor:
    """x itself if memory has that order already, at an address that is a multiple of 16 bytes, else a copy that has:
    Triton compiles another kernel for other addresses."""
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if major else x.contiguous()
    return x if _is_fake(x) or x.data_ptr() % 16 == 0 else x.clone()


def _is_fake(x: Tensor) -> bool:
    """Under torch.compile: memory of its own then, which is always aligned."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def fused_long_conv(u: Tensor, taps: Tensor, pre_gate: Tensor | None, post_gate: Tensor | None) -> Tensor:
    """post_gate * causal_conv(pre_gate * u, taps) by the Triton kernels; taps (channel, taps) fp32, at most length.

    u may lie in memory as (batch, channel, length) or (channel, batch, length), and the result lies alike; anything
    else is copied, as are gates of another type or order than u's. With one gate alone the other is made of ones: the
    kernels have two forms, not four.
    """
    major = channel_major(u)
    if (pre_gate is None) != (post_gate is None):
        pre_gate, post_gate = (torch.ones_like(u) if gate is None else gate for gate in (pre_gate, post_gate))
    gates = [gate if gate is None else ordered(gate.to(u.dtype), major) for gate in (pre_gate, post_gate)]
    return _forward(ordered(u, major), taps.contiguous(), *gates)
