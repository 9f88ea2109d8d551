"""The register spills that are known and accepted, in one place: how many bytes, and why.

Spilled registers live in local memory, which the L1 cache holds: a cost of issue slots and latency, not of the HBM
traffic that the design counts on. On Hopper in 16 bits the mixer spills nothing up to 32 modes, forward or backward,
but for 48 bytes where a backward has documents, a carried state and segments at once.
Bytes are what ptxas of Triton 3.7.1 reports as spill stores.
"""

from __future__ import annotations

from dataclasses import dataclass

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

_KNOWN: dict[str, dict[tuple[str, str], int]] = {
    DOCUMENTS_FP32: {
        ("h3_mix forward documents fp32 16x8", "sm_90a"): 284,
        ("h3_mix forward documents fp32 16x8", "sm_80"): 292,
    },
    BACKWARD: {
        ("h3_mix backward bf16 16x8 M64", "sm_90a"): 56,
        ("h3_mix backward documents bf16 16x8 M64", "sm_90a"): 172,
        ("h3_mix backward documents carried bf16 16x8", "sm_90a"): 48,
        ("h3_mix backward documents carried fp16 16x8", "sm_90a"): 48,
    },
    BACKWARD_FP32: {
        ("diag_ssm backward documents fp32 16x8", "sm_90a"): 4,
        ("diag_ssm backward fp32 16x8", "sm_90a"): 1156,
        ("h3_mix backward documents carried fp32 16x8", "sm_90a"): 1316,
        ("h3_mix backward documents fp32 16x8", "sm_90a"): 1308,
        ("h3_mix backward fp32 16x8", "sm_90a"): 1540,
        ("diag_ssm backward documents fp32 16x8", "sm_80"): 144,
        ("diag_ssm backward fp32 16x8", "sm_80"): 868,
        ("h3_mix backward documents carried fp32 16x8", "sm_80"): 1656,
        ("h3_mix backward documents fp32 16x8", "sm_80"): 1480,
        ("h3_mix backward fp32 16x8", "sm_80"): 1800,
    },
    AMPERE: {
        ("diag_ssm backward bf16 16x8", "sm_80"): 12,
        ("diag_ssm backward fp16 16x8", "sm_80"): 12,
        ("h3_mix backward bf16 16x8", "sm_80"): 528,
        ("h3_mix backward bf16 16x8 M16", "sm_80"): 192,
        ("h3_mix backward bf16 16x8 M64", "sm_80"): 3236,
        ("h3_mix backward documents bf16 16x8", "sm_80"): 508,
        ("h3_mix backward documents bf16 16x8 M16", "sm_80"): 236,
        ("h3_mix backward documents bf16 16x8 M64", "sm_80"): 1424,
        ("h3_mix backward documents carried bf16 16x8", "sm_80"): 568,
        ("h3_mix backward documents carried fp16 16x8", "sm_80"): 568,
        ("h3_mix backward documents fp16 16x8", "sm_80"): 508,
        ("h3_mix backward fp16 16x8", "sm_80"): 528,
    },
}

SPILLS = {
    where: Spill(size, reason)
    for reason, sizes in (*_KNOWN.items(), *ATTENTION.items())
    for where, size in sizes.items()
}
"""(configuration, target) -> the spill stores known; every other configuration must have none."""
