"""Gradients that have none of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class SecondDerivativeError(NotImplementedError):
    """A gradient was asked for as a function (`create_graph=True`) of an operation that has first derivatives only."""


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd function, under `@staticmethod`: with `create_graph=True` it raises.

    torch's `once_differentiable` raises only where a second derivative walks back through the gradient itself. What
    goes by another way (a product with a saved input around the function) would be a sum with terms missing, silently.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        refuse_second_derivatives()
        return backward(ctx, *gradients)

    return checked


def refuse_second_derivatives() -> None:
    """Called in a backward pass: raises SecondDerivativeError where its result should be differentiated again."""
    if torch.is_grad_enabled():
        raise SecondDerivativeError(
            "the kernels' operations have first derivatives only: create_graph=True is not possible through them; "
            "differentiate the definition instead (`h3_mix_reference`, `diag_ssm_reference`, `long_conv_reference`)"
        )
