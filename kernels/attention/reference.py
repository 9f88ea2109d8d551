"""The definition of attention: scores, bias, mask, softmax, dropout, weighted sum; any dtype, plain torch."""

import torch
from torch import Tensor

from ..dropout import DropoutKey, attention_keep_mask
from .biases import Bias, bias_values, resolve_bias
from .masks import Mask
from .rotary import Rotary


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Bias | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: DropoutKey | None = None,
    head_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Same arguments as `attention`; returns (out, lse), both fp32 (fp64 for fp64 inputs).

    A query that sees no key gives 0, its lse is -inf, and every gradient is finite.
    """
    if rotary is not None:
        q, k = rotary.rotate_query(q), rotary.rotate_key(k)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    query, key, value = q.to(dtype), k.to(dtype), v.to(dtype)
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    queries, keys = q.shape[2], k.shape[2]
    factor = q.shape[3] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(2, 3) * factor
    if bias is not None:
        columns = (torch.arange(n, device=q.device) for n in (queries, keys))
        rows, others = (x + offset for x, offset in zip(columns, (mask.query_offset, mask.key_offset), strict=True))
        scores = scores + bias_values(resolve_bias(bias, query, key, factor), rows, others, dtype)
    if not mask.hides_nothing(queries, keys):
        scores = scores.masked_fill(~mask.visible(queries, keys, q.device), float("-inf"))
    # Softmax by hand: torch's gives NaN, forward and backward, for a row without a finite score.
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    lse = torch.where(empty, float("-inf"), top + total.log())[..., 0]
    probabilities = weights / total
    if dropout > 0:
        assert dropout_key is not None
        keep = attention_keep_mask(
            probabilities.shape,
            dropout,
            key=dropout_key,
            query_offset=mask.query_offset,
            key_offset=mask.key_offset,
            head_offset=head_offset,
            device=q.device,
        )
        probabilities = torch.where(keep, probabilities * (1 / (1 - dropout)), 0)
    return probabilities @ value, lse
