"""The register spills of the attention kernels that are known and accepted, as in `spills`.

On Hopper in 16 bits neither the forward nor the gradient of queries spills, whatever mask, bias and dropout ask for;
the gradients of keys and values spill up to 232 bytes where dropout, disentangled terms or every mask at once meet.
"""

from __future__ import annotations

AMPERE = "mma takes its operands from registers, where wgmma reads shared memory"
FP32 = "fp32 products run without tensor cores, on operands unrolled into registers"
TABLE = "four operands of 256 channels beside the sum of score gradients; run once a tile offset, not once a tile"
TWO_GRADIENTS = "dk and dv stay in fp32 accumulators over all query heads that share a tile of keys"

ATTENTION: dict[str, dict[tuple[str, str], int]] = {
    AMPERE: {
        ("attention dkv causal bf16 128 32x128x8x2", "sm_80"): 4,
        ("attention dkv causal bf16 256 16x64x8x2", "sm_80"): 4,
        ("attention dkv causal bf16 64 64x128x8x2", "sm_80"): 8,
        ("attention dkv causal bf16 80 32x128x8x2", "sm_80"): 4,
        ("attention dkv causal fp16 128 32x128x8x2", "sm_80"): 4,
        ("attention dkv causal fp16 64 64x128x8x2", "sm_80"): 8,
        ("attention dkv every mask bf16 128 16x128x8x2", "sm_80"): 176,
        ("attention dkv every mask bf16 64 32x128x8x2", "sm_80"): 188,
        ("attention dkv window disentangled bf16 128 16x64x8x2", "sm_80"): 64,
        ("attention dkv window disentangled bf16 256 16x64x8x2", "sm_80"): 280,
        ("attention dkv window disentangled bf16 64 16x128x8x2", "sm_80"): 120,
        ("attention dq causal bf16 128 128x64x8x2", "sm_80"): 68,
        ("attention dq causal bf16 256 128x16x8x1", "sm_80"): 48,
        ("attention dq causal bf16 80 128x64x8x2", "sm_80"): 84,
        ("attention dq causal fp16 128 128x64x8x2", "sm_80"): 68,
        ("attention dq every mask bf16 128 128x32x8x2", "sm_80"): 300,
        ("attention dq every mask bf16 256 128x16x8x1", "sm_80"): 376,
        ("attention dq every mask bf16 64 128x64x8x2", "sm_80"): 28,
        ("attention dq window disentangled bf16 256 64x16x8x2", "sm_80"): 8,
        ("attention dq window disentangled bf16 64 128x32x8x2", "sm_80"): 96,
        ("attention dtable documents bf16 128 64x64x8x1", "sm_80"): 180,
        ("attention dtable documents bf16 256 64x64x8x1", "sm_80"): 9908,
        ("attention dtable documents bf16 64 64x64x8x1", "sm_80"): 68,
        ("attention forward causal bf16 D256 128x32x8x2", "sm_80"): 140,
        ("attention forward causal bf16 D64 128x64x4x3", "sm_80"): 180,
        ("attention forward causal fp16 D256 128x32x8x2", "sm_80"): 140,
        ("attention forward causal fp16 D64 128x64x4x3", "sm_80"): 180,
        ("attention forward disentangled bf16 D64 128x64x8x2", "sm_80"): 8,
        ("attention forward disentangled fp16 D64 128x64x8x2", "sm_80"): 12,
        ("attention forward documents bf16 D256 128x32x8x2", "sm_80"): 216,
        ("attention forward documents bf16 D64 128x64x4x3", "sm_80"): 32,
        ("attention forward dropout bf16 D256 128x32x8x2", "sm_80"): 352,
        ("attention forward everything masked bf16 D128 64x32x8x2", "sm_80"): 28,
        ("attention forward everything masked bf16 D256 64x16x8x2", "sm_80"): 20,
        ("attention forward everything masked bf16 D64 128x32x8x2", "sm_80"): 4,
        ("attention forward full bf16 D256 128x32x8x2", "sm_80"): 28,
        ("attention forward full bf16 D64 128x64x4x3", "sm_80"): 12,
        ("attention forward prefix bf16 D64 128x64x4x3", "sm_80"): 36,
        ("attention forward slopes bf16 D64 128x64x4x3", "sm_80"): 8,
        ("attention forward slopes documents bf16 D128 128x64x8x3", "sm_80"): 20,
        ("attention forward window bf16 D128 128x64x8x3", "sm_80"): 24,
        ("attention forward window bf16 D64 128x64x4x3", "sm_80"): 40,
    },
    FP32: {
        ("attention dq causal fp32 128 32x32x8x1", "sm_90a"): 16,
        ("attention forward disentangled fp32 D64 64x32x8x2", "sm_90a"): 36,
        ("attention forward causal fp32 D256 32x16x8x2", "sm_80"): 32,
        ("attention forward causal fp32 D64 64x32x8x2", "sm_80"): 8,
    },
    TABLE: {
        ("attention dtable documents bf16 256 64x64x8x1", "sm_90a"): 80,
    },
    TWO_GRADIENTS: {
        ("attention dkv every mask bf16 128 16x128x8x2", "sm_90a"): 16,
        ("attention dkv every mask disentangled dropout fp16 64 16x128x8x2", "sm_90a"): 44,
        ("attention dkv every mask disentangled dropout unaligned bf16 128 16x64x8x2", "sm_90a"): 44,
        ("attention dkv every mask disentangled dropout unaligned bf16 256 16x64x8x2", "sm_90a"): 232,
        ("attention dkv every mask disentangled dropout unaligned bf16 64 16x128x8x2", "sm_90a"): 40,
        ("attention dkv every mask table dropout bf16 256 16x64x8x2", "sm_90a"): 72,
        ("attention dkv window disentangled bf16 256 16x64x8x2", "sm_90a"): 124,
        ("attention dkv window disentangled dropout bf16 128 16x64x8x2", "sm_90a"): 40,
        ("attention dkv window disentangled dropout bf16 256 16x64x8x2", "sm_90a"): 232,
        ("attention dkv window disentangled dropout bf16 64 16x128x8x2", "sm_90a"): 8,
        ("attention dkv window dropout bf16 256 16x64x8x2", "sm_90a"): 48,
    },
}
