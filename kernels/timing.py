"""Measuring on a GPU: medians with a cold cache, ceilings of memory and tensor cores, and what the machine is."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

GIB = 2**30
MILLISECOND = 1e-3


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, the fifth and the ninety-fifth percentile of `repeats` runs."""

    median: float
    low: float
    high: float
    repeats: int


class Clock:
    """Times functions on one device, each run with the inputs out of the L2 cache.

    On a GPU by events around the call, so what the host does between launches counts too, as it does in training; a
    buffer of four times the L2 cache is overwritten before each run. On a CPU by the clock on the wall.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush: torch.Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(max(4 * cache, 256 * 2**20), dtype=torch.int8, device=device)

    def measure(self, run: Callable[[], object], *, least: int = 50, most: int = 200, seconds: float = 1.0) -> Timing:
        """Warm up, then run as often as fits into `seconds`, within `least` and `most`."""
        for _ in range(2):
            run()
        rough = max(statistics.median(self._times(run, 3)), 1e-3)
        repeats = max(least, min(most, int(seconds / (rough * MILLISECOND))))
        times = sorted(self._times(run, repeats))
        return Timing(statistics.median(times), times[repeats // 20], times[-1 - repeats // 20], repeats)

    def _times(self, run: Callable[[], object], repeats: int) -> list[float]:
        if self.flush is None:
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                run()
                times.append((time.perf_counter() - began) / MILLISECOND)
            return times
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            self.flush.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in events]


def captured(run: Callable[[], object]) -> Callable[[], None] | None:
    """`run` as one CUDA graph, which leaves out the host's time between launches; None where it cannot be captured
    (it waits for the device, or memory for a second set of buffers is not there)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def bandwidth(clock: Clock) -> float:
    """Bytes per second of a large device-to-device copy, read and written bytes both counted."""
    count = GIB if clock.device.type == "cuda" else 2**24
    source = torch.randint(0, 127, (count,), dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * count / (clock.measure(lambda: target.copy_(source)).median * MILLISECOND)


def matrix_rate(clock: Clock) -> float:
    """Floating-point operations per second of a large bf16 matrix product on random data."""
    side = 8192 if clock.device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / (clock.measure(lambda: a @ b).median * MILLISECOND)


QUERY = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def state_of_gpu() -> dict[str, str]:
    """Driver, clocks, temperature and power as nvidia-smi reads them now; nothing is set. Empty where it is missing
    or says anything else."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return dict.fromkeys(QUERY, "")
    values = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 and done.stdout else []
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else dict.fromkeys(QUERY, "")
