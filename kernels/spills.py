"""The register spills that are known and accepted, in one place: how many bytes, and why.

Spilled registers live in local memory, which the L1 cache holds: a cost of issue slots and latency, not of the HBM
traffic that the design counts on. On Hopper in 16 bits the mixer spills nothing up to 32 modes, forward or backward,
but for 76 bytes where a backward has documents, a carried state and segments at once (with Triton 3.6: 52, and 28 where
it has documents). Bytes are what ptxas reports as spill stores, with the compilers of Triton 3.6.0 and 3.7.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from .spills_attention import ATTENTION


@dataclass(frozen=True)
class Spill:
    """Bytes of registers that a configuration is known to keep in local memory, and why that is accepted."""

    bytes: int
    reason: str


DOCUMENTS_FP32 = (
    "fp32 products run without tensor cores, on operands unrolled into registers; masks of documents add to them"
)
BACKWARD = "four operator gradients stay in fp32 accumulators from the first token to the last"
BACKWARD_FP32 = f"{BACKWARD}; fp32 products run without tensor cores, on operands unrolled into registers"
AMPERE = "mma takes its operands from registers, where wgmma reads shared memory"

_KNOWN: dict[str, dict[tuple[str, str], tuple[int, int]]] = {
    DOCUMENTS_FP32: {
        ("h3_mix forward documents fp32 16x8", "sm_90a"): (300, 284),
        ("h3_mix forward documents fp32 16x8", "sm_80"): (332, 292),
    },
    BACKWARD: {
        ("h3_mix backward bf16 16x8 M64", "sm_90a"): (72, 44),
        ("h3_mix backward documents bf16 16x8", "sm_90a"): (28, 0),
        ("h3_mix backward documents bf16 16x8 M16", "sm_90a"): (20, 0),
        ("h3_mix backward documents bf16 16x8 M64", "sm_90a"): (216, 196),
        ("h3_mix backward documents carried bf16 16x8", "sm_90a"): (52, 76),
        ("h3_mix backward documents carried fp16 16x8", "sm_90a"): (52, 76),
        ("h3_mix backward documents fp16 16x8", "sm_90a"): (28, 0),
    },
    BACKWARD_FP32: {
        ("diag_ssm backward documents fp32 16x8", "sm_90a"): (0, 4),
        ("diag_ssm backward fp32 16x8", "sm_90a"): (1008, 1120),
        ("h3_mix backward documents carried fp32 16x8", "sm_90a"): (1256, 1312),
        ("h3_mix backward documents fp32 16x8", "sm_90a"): (1248, 1308),
        ("h3_mix backward fp32 16x8", "sm_90a"): (1708, 1612),
        ("diag_ssm backward documents fp32 16x8", "sm_80"): (124, 144),
        ("diag_ssm backward fp32 16x8", "sm_80"): (1184, 868),
        ("h3_mix backward documents carried fp32 16x8", "sm_80"): (1596, 1688),
        ("h3_mix backward documents fp32 16x8", "sm_80"): (1340, 1484),
        ("h3_mix backward fp32 16x8", "sm_80"): (1876, 1800),
    },
    AMPERE: {
        ("diag_ssm backward bf16 16x8", "sm_80"): (32, 12),
        ("diag_ssm backward fp16 16x8", "sm_80"): (32, 12),
        ("h3_mix backward bf16 16x8", "sm_80"): (1820, 528),
        ("h3_mix backward bf16 16x8 M16", "sm_80"): (256, 192),
        ("h3_mix backward bf16 16x8 M64", "sm_80"): (3212, 3216),
        ("h3_mix backward documents bf16 16x8", "sm_80"): (372, 384),
        ("h3_mix backward documents bf16 16x8 M16", "sm_80"): (200, 136),
        ("h3_mix backward documents bf16 16x8 M64", "sm_80"): (1128, 1296),
        ("h3_mix backward documents carried bf16 16x8", "sm_80"): (512, 588),
        ("h3_mix backward documents carried fp16 16x8", "sm_80"): (512, 588),
        ("h3_mix backward documents fp16 16x8", "sm_80"): (372, 384),
        ("h3_mix backward fp16 16x8", "sm_80"): (1820, 528),
        ("long_conv forward gated blocks bf16 128x32", "sm_80"): (4, 0),
    },
}
"""(configuration, target) -> bytes with Triton 3.6 and with later ones; a zero is asserted like any other."""


def known_spills(version: str) -> dict[tuple[str, str], Spill]:
    """(configuration, target) -> the spill stores known with a version of Triton; all others must have none."""
    column = 0 if version.startswith("3.6.") else 1
    rows = ((where, sizes[column], reason) for reason, table in _KNOWN.items() for where, sizes in table.items())
    known = {where: Spill(size, reason) for where, size, reason in rows if size}
    # Attention was read with 3.7 alone.
    return known | {where: Spill(size, reason) for reason, sizes in ATTENTION.items() for where, size in sizes.items()}


def _installed() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


SPILLS = known_spills(_installed())
"""Those of the Triton that is installed."""
