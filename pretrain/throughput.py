"""The device's peak, measured or known, so that model FLOPs utilization (MFU) means the same everywhere."""

from __future__ import annotations

import statistics
import time

import torch

# Dense bf16 tensor-core peaks in FLOP/s from the vendor's data sheets, without sparsity; fp32 means TF32 is off.
BF16_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
FP32_PEAKS = {"H100 PCIe": 51e12, "H100": 67e12, "H200": 67e12, "A100": 19.5e12, "L40S": 91.6e12, "B200": 75e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a fraction of: the data sheet's for a known GPU, else what a large matrix product reaches."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        table = BF16_PEAKS if dtype == torch.bfloat16 else FP32_PEAKS
        for known, peak in table.items():
            if all(word in name for word in known.split()):
                return peak
    return _measured_peak(device, dtype)


def _measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        torch.matmul(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2.0 * size**3 / statistics.median(seconds[2:])


def memory_bytes(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # POSIX only, and only needed here

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
