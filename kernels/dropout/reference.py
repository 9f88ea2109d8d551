"""Philox4x32-10 in torch integers: the definition of every random bit used in training.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants of Random123.
The same bits as Triton's `tl.philox` and, for counters (offset, 0, 0, 0), `tl.randint4x`.
"""

import torch
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


def philox(counters: tuple[Tensor, Tensor, Tensor, Tensor], key: int, rounds: int = 10) -> tuple[Tensor, ...]:
    """Four int64 tensors holding 32-bit words, from four broadcastable int64 counters below 2^32 and a 64-bit key.

    Inputs stay unexpanded as long as they can: the first round works on each counter's own shape.
    """
    c0, c1, c2, c3 = counters
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(rounds):
        # The int64 product wraps, but its 64 bits are those of the unsigned one: both halves come out right.
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0 = ((p1 >> 32) & WORD) ^ c1 ^ k0
        c2 = ((p0 >> 32) & WORD) ^ c3 ^ k1
        c1, c3 = p1 & WORD, p0 & WORD
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))
