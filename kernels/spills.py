"""The register spills that are known and accepted, in one place: how many bytes, and why.

Spilled registers live in local memory, which the L1 cache holds: a cost of issue slots and latency, not of the HBM
traffic that the design counts on. The forward of the mixer spills nothing on Hopper except with documents in fp32.
Bytes are what ptxas of Triton 3.7.1 reports as spill stores.
"""

from __future__ import annotations

from dataclasses import dataclass


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
        ("h3_mix forward documents fp32 16x8 M64", "sm_90a"): 284,
        ("h3_mix forward documents fp32 16x8", "sm_80"): 288,
        ("h3_mix forward documents fp32 16x8 M64", "sm_80"): 312,
    },
    AMPERE: {
        ("long_conv backward gated bf16 64x32", "sm_80"): 4,
        ("long_conv forward gated bf16 64x32", "sm_80"): 8,
    },
}

SPILLS = {where: Spill(size, reason) for reason, sizes in _KNOWN.items() for where, size in sizes.items()}
"""(configuration, target) -> the spill stores known; every other configuration must have none."""
