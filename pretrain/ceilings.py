"""What machines reach: the few measured and published numbers that a plan's times rest on, each with its source.

`share` is what a whole training step reaches of the peak on one device, by model width, without parallelism across
nodes. Nothing of this project has run on a GPU yet: their rows are other trainers' plain decoders, marked "published".
A kernel that is slower or faster than theirs moves the time in proportion; replace a row by a measured one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30


@dataclass(frozen=True)
class Reached:
    """A step reached `share` of the peak at `width` channels."""

    width: int
    share: float
    kind: Literal["measured", "published"]
    source: str
    date: str
    """Of the source as it was read."""


@dataclass(frozen=True)
class Ceiling:
    """A device. flops: dense peak of (bf16, fp32) in FLOP/s; memory in bytes, bandwidth of it in bytes/s; inside,
    between: bytes/s that a rank sends to ranks of its node, and to other nodes; per_node: ranks of a node."""

    name: str
    flops: dict[str, float]
    memory: int
    bandwidth: float
    inside: float
    between: float
    per_node: int
    reached: tuple[Reached, ...]
    source: str

    def share(self, width: int) -> float:
        """Of the peak, at `width`: between the rows by the logarithm of the width, beyond them the nearest row."""
        rows = sorted(self.reached, key=lambda row: row.width)
        if width <= rows[0].width:
            return rows[0].share
        for low, high in itertools.pairwise(rows):
            if width <= high.width:
                way = math.log(width / low.width) / math.log(high.width / low.width)
                return low.share + way * (high.share - low.share)
        return rows[-1].share

    def row(self, width: int) -> Reached:
        """The row nearest to `width`."""
        return min(self.reached, key=lambda row: abs(math.log(row.width / width)))


_FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md: MPT, 2048 tokens, FSDP, bf16, 8 GPUs"
_NANOGPT = "modded-nanogpt, record 1 (llm.c): GPT-2 124M, 1024 tokens, 8 GPUs, from its log"

# The widest rows are of a 7B model.
_H100 = (
    Reached(768, 0.41, "published", _NANOGPT, "2026-08-01"),
    Reached(1536, 0.349, "published", _FOUNDRY, "2025-07-21"),
    Reached(2048, 0.418, "published", _FOUNDRY, "2025-07-21"),
    Reached(4096, 0.464, "published", _FOUNDRY, "2025-07-21"),
)
_A100 = (
    Reached(768, 0.448, "published", _FOUNDRY, "2025-07-21"),
    Reached(1024, 0.516, "published", _FOUNDRY, "2025-07-21"),
    Reached(1536, 0.569, "published", _FOUNDRY, "2025-07-21"),
    Reached(2048, 0.599, "published", _FOUNDRY, "2025-07-21"),
)
_CPU = (
    Reached(
        768, 1.0, "measured", "benchmarks/results/gpt2_step.csv: a step of gpt_125m, 1 row of 512 tokens", "2026-11-22"
    ),
)

CEILINGS = {
    "h100": Ceiling(
        "H100 SXM", {"bf16": 989e12, "fp32": 67e12}, 80 * 10**9, 3.35e12, 450e9, 50e9, 8, _H100,
        "NVIDIA H100 data sheet; NVLink 4 one way; one 400 Gb/s port a GPU",
    ),
    "h200": Ceiling(
        "H200 SXM", {"bf16": 989e12, "fp32": 67e12}, 141 * 10**9, 4.8e12, 450e9, 50e9, 8, _H100,
        "NVIDIA H200 data sheet; steps as on the H100, whose FLOP/s it has",
    ),
    "a100": Ceiling(
        "A100 SXM 80 GB", {"bf16": 312e12, "fp32": 19.5e12}, 80 * 10**9, 2.04e12, 300e9, 25e9, 8, _A100,
        "NVIDIA A100 data sheet; NVLink 3 one way; one 200 Gb/s port a GPU",
    ),
    "cpu": Ceiling(
        "CPU core", {"bf16": 90.6e9, "fp32": 90.6e9}, 4 * GIB, 10e9, 2e9, 1e9, 64, _CPU,
        "what gpt2_step.csv reaches on 2 cores, halved: 512 tokens of 0.77 GFLOP in 2.175 s; memory and links assumed",
    ),
}  # fmt: skip

NOT_REACHABLE = 0.94
"""Share of a GPU's memory that tensors can have: the context, NCCL's buffers and fragments take the rest."""

LINK_SHARE = 0.75
"""Of a link's rate that large collectives reach: assumed."""
