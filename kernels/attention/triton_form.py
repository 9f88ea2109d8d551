"""The Triton kernels as a form of attention (`Form`): fp32, fp16 and bf16, values as wide as keys, dim at most 256."""

from torch import Tensor

from .biases import BiasTerms
from .function import Drop
from .masks import Mask
from .triton import attention_forward
from .triton_backward import backward

__all__ = ["backward", "forward"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Mask,
    scale: float,
    drop: Drop | None,
    *,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """As `Form.forward`."""
    return attention_forward(q, k, v, terms, mask, scale, drop, wide=wide)
