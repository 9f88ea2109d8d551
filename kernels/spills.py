"""The register spills that are known and accepted, in one place: how many bytes, and why.

Spilled registers live in local memory, which the L1 cache holds: a cost of issue slots and latency, not of the HBM
traffic that the design counts on. On Hopper in 16 bits the mixer's forward pass spills nothing in any form. Its
backward pass, up to 32 modes, spills nothing where rows begin and end with the call (with Triton 3.6: 28 bytes with
documents), and 52 to 76 bytes where they have borders: a carried state, a gradient of the final state, segments. With
64 modes it spills up to 372. The plain SSM spills in 16 bits with 64 modes and documents alone, at most 16.
Bytes are what ptxas reports as spill stores, a thread, with the compilers of Triton 3.6.0 and 3.7.1.
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
        ("h3_mix forward documents carried fp32 16x8", "sm_90a"): (300, 284),
        ("h3_mix forward documents fp32 16x8", "sm_90a"): (300, 284),
        ("h3_mix forward documents carried fp32 16x8", "sm_80"): (332, 292),
        ("h3_mix forward documents fp32 16x8", "sm_80"): (332, 292),
    },
    BACKWARD: {
        ("diag_ssm backward documents bf16 16x8 M64", "sm_90a"): (12, 0),
        ("diag_ssm backward documents borders bf16 16x8 M64", "sm_90a"): (16, 4),
        ("diag_ssm backward documents borders fp16 16x8 M64", "sm_90a"): (16, 4),
        ("diag_ssm backward documents fp16 16x8 M64", "sm_90a"): (12, 0),
        ("h3_mix backward bf16 16x8 M64", "sm_90a"): (72, 44),
        ("h3_mix backward borders bf16 16x8", "sm_90a"): (52, 52),
        ("h3_mix backward borders bf16 16x8 M64", "sm_90a"): (144, 144),
        ("h3_mix backward borders fp16 16x8", "sm_90a"): (52, 52),
        ("h3_mix backward borders fp16 16x8 M64", "sm_90a"): (136, 152),
        ("h3_mix backward documents bf16 16x8", "sm_90a"): (28, 0),
        ("h3_mix backward documents bf16 16x8 M64", "sm_90a"): (216, 196),
        ("h3_mix backward documents borders bf16 16x8", "sm_90a"): (64, 76),
        ("h3_mix backward documents borders bf16 16x8 M64", "sm_90a"): (312, 372),
        ("h3_mix backward documents borders fp16 16x8", "sm_90a"): (64, 76),
        ("h3_mix backward documents borders fp16 16x8 M64", "sm_90a"): (312, 372),
        ("h3_mix backward documents fp16 16x8", "sm_90a"): (28, 0),
        ("h3_mix backward documents fp16 16x8 M64", "sm_90a"): (216, 196),
        ("h3_mix backward fp16 16x8 M64", "sm_90a"): (72, 44),
    },
    BACKWARD_FP32: {
        ("diag_ssm backward borders fp32 16x8", "sm_90a"): (1004, 1172),
        ("diag_ssm backward documents borders fp32 16x8", "sm_90a"): (0, 248),
        ("diag_ssm backward documents fp32 16x8", "sm_90a"): (0, 4),
        ("diag_ssm backward fp32 16x8", "sm_90a"): (1008, 1120),
        ("h3_mix backward borders fp32 16x8", "sm_90a"): (1776, 1580),
        ("h3_mix backward documents borders fp32 16x8", "sm_90a"): (1252, 1304),
        ("h3_mix backward documents fp32 16x8", "sm_90a"): (1248, 1308),
        ("h3_mix backward fp32 16x8", "sm_90a"): (1708, 1612),
        ("diag_ssm backward borders fp32 16x8", "sm_80"): (1208, 900),
        ("diag_ssm backward documents borders fp32 16x8", "sm_80"): (124, 144),
        ("diag_ssm backward documents fp32 16x8", "sm_80"): (124, 144),
        ("diag_ssm backward fp32 16x8", "sm_80"): (1184, 868),
        ("h3_mix backward borders fp32 16x8", "sm_80"): (1968, 1860),
        ("h3_mix backward documents borders fp32 16x8", "sm_80"): (1596, 1688),
        ("h3_mix backward documents fp32 16x8", "sm_80"): (1340, 1484),
        ("h3_mix backward fp32 16x8", "sm_80"): (1876, 1800),
    },
    AMPERE: {
        ("diag_ssm backward bf16 16x8", "sm_80"): (32, 12),
        ("diag_ssm backward bf16 16x8 M64", "sm_80"): (416, 480),
        ("diag_ssm backward borders bf16 16x8", "sm_80"): (60, 28),
        ("diag_ssm backward borders bf16 16x8 M64", "sm_80"): (412, 496),
        ("diag_ssm backward borders fp16 16x8", "sm_80"): (60, 28),
        ("diag_ssm backward borders fp16 16x8 M64", "sm_80"): (412, 496),
        ("diag_ssm backward documents bf16 16x8 M64", "sm_80"): (704, 828),
        ("diag_ssm backward documents borders bf16 16x8", "sm_80"): (32, 0),
        ("diag_ssm backward documents borders bf16 16x8 M64", "sm_80"): (756, 836),
        ("diag_ssm backward documents borders fp16 16x8", "sm_80"): (32, 0),
        ("diag_ssm backward documents borders fp16 16x8 M64", "sm_80"): (756, 836),
        ("diag_ssm backward documents fp16 16x8 M64", "sm_80"): (704, 828),
        ("diag_ssm backward fp16 16x8", "sm_80"): (32, 12),
        ("diag_ssm backward fp16 16x8 M64", "sm_80"): (416, 480),
        ("h3_mix backward bf16 16x8", "sm_80"): (1820, 528),
        ("h3_mix backward bf16 16x8 M64", "sm_80"): (3212, 3216),
        ("h3_mix backward borders bf16 16x8", "sm_80"): (468, 508),
        ("h3_mix backward borders bf16 16x8 M64", "sm_80"): (3240, 3312),
        ("h3_mix backward borders fp16 16x8", "sm_80"): (460, 508),
        ("h3_mix backward borders fp16 16x8 M64", "sm_80"): (3244, 3312),
        ("h3_mix backward documents bf16 16x8", "sm_80"): (372, 384),
        ("h3_mix backward documents bf16 16x8 M64", "sm_80"): (1128, 1296),
        ("h3_mix backward documents borders bf16 16x8", "sm_80"): (512, 588),
        ("h3_mix backward documents borders bf16 16x8 M64", "sm_80"): (3244, 1536),
        ("h3_mix backward documents borders fp16 16x8", "sm_80"): (512, 588),
        ("h3_mix backward documents borders fp16 16x8 M64", "sm_80"): (3244, 1536),
        ("h3_mix backward documents fp16 16x8", "sm_80"): (372, 384),
        ("h3_mix backward documents fp16 16x8 M64", "sm_80"): (1128, 1296),
        ("h3_mix backward fp16 16x8", "sm_80"): (1820, 528),
        ("h3_mix backward fp16 16x8 M64", "sm_80"): (3212, 3216),
        ("long_conv backward blocks bf16 128x32 unaligned", "sm_80"): (8, 0),
        ("long_conv backward blocks fp16 128x32 unaligned", "sm_80"): (8, 0),
        ("long_conv backward gated bf16 128x32 unaligned", "sm_80"): (24, 8),
        ("long_conv backward gated fp16 128x32 unaligned", "sm_80"): (24, 8),
        ("long_conv forward blocks bf16 128x32 unaligned", "sm_80"): (8, 0),
        ("long_conv forward blocks fp16 128x32 unaligned", "sm_80"): (8, 0),
        ("long_conv kernel gradient bf16 128x32 unaligned", "sm_80"): (16, 16),
        ("long_conv kernel gradient fp16 128x32 unaligned", "sm_80"): (16, 16),
        ("long_conv kernel gradient gated bf16 128x32 unaligned", "sm_80"): (16, 16),
        ("long_conv kernel gradient gated fp16 128x32 unaligned", "sm_80"): (16, 16),
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
