"""The definition: scores, log-softmax, gather, sum."""

import torch
from torch import Tensor


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(hidden weight^T)[target] over targets that are not negative; any dtype, any order of
    differentiation, all scores in memory. Shapes as `linear_cross_entropy`."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logp = (hidden @ weight.mT).to(wide).log_softmax(1)
    picked = logp.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return -torch.where(targets >= 0, picked, 0).sum()
