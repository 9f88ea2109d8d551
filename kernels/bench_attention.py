"""Timings of attention beside torch's own kernels, in one run: the second half of `potamos.kernels.bench`.

Each case is measured in all of its forms before the next one begins, so that they share the chip's temperature.
TFLOP/s count 4 x pairs x channels of the forward and 2.5 times that of the backward, half of the square where causal.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .bench_attention_cases import AttentionCell, Form, forms
from .timing import MILLISECOND, Clock, Timing, bandwidth, matrix_rate

FORWARD, BACKWARD = "forward", "backward"
COLUMNS = ("ms", "low_ms", "high_ms", "repeats", "tflops", "over_floor", "error", "extra_over_lse_and_dq")
LIBRARIES = ("flash", "cudnn")
CELL_COLUMNS = ("case", "head_dim", "length", "rows", "heads", "kv_heads", "causal")


def forward_of(form: Form) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return form.run()

    return run


def backward_of(form: Form) -> Callable[[], object]:
    """The backward alone, of a forward that has been run."""
    out = form.run()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, form.leaves, grad, retain_graph=True)


def floor(cell: AttentionCell, direction: str, itemsize: int, copy: float, rate: float) -> float:
    """Milliseconds below which no kernel gets: operations at the rate of a matrix product, or bytes at a copy's."""
    operations = cell.operations
    if cell.case == "rotary":
        moved, operations = 2 * cell.elements, 0.0
    elif cell.case == "decode":
        moved = cell.cache_elements
    else:
        moved = 2 * cell.elements + cell.cache_elements
    if direction == BACKWARD:
        moved, operations = 2 * moved, 2.5 * operations
    return max(moved * itemsize / copy, operations / rate) / MILLISECOND


def extra_memory(form: Form, cell: AttentionCell, device: torch.device) -> float:
    """Bytes allocated at the worst moment of a forward and backward beside its output and gradients, over those of
    the log-sum-exp and of one gradient of q in fp32: what grows as length x length would show."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = form.run()
    found = torch.autograd.grad(out, form.leaves, torch.ones_like(out))
    torch.cuda.synchronize(device)
    own = sum(x.untyped_storage().nbytes() for x in (out, *found)) + out.untyped_storage().nbytes()  # and its gradient
    extra = torch.cuda.max_memory_allocated(device) - before - own
    return max(0, extra) / (4 * cell.elements * (1 + 1 / cell.head_dim))


def measure(
    cell: AttentionCell, found: dict[str, Form], clock: Clock, seconds: float, say: Callable[[str], None]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(form, direction, columns) of every form of a cell. What does not run has empty columns, and is said why."""
    reference = None
    for name, form in found.items():
        directions = (FORWARD, BACKWARD) if form.leaves and cell.case not in ("decode", "rotary") else (FORWARD,)
        for direction in directions:
            columns: dict[str, Any] = dict.fromkeys(COLUMNS, "")
            try:
                call = forward_of(form) if direction == FORWARD else backward_of(form)
                if direction == FORWARD:
                    result = form.compare(forward_of(form)())
                    columns["error"] = "" if reference is None else _difference(result, reference)
                    reference = result if reference is None else reference
                least = 50 if name in ("triton", *LIBRARIES) else 10
                timing: Timing = clock.measure(call, least=least, seconds=seconds)
                columns |= {"ms": round(timing.median, 4), "repeats": timing.repeats}
                columns |= {"low_ms": round(timing.low, 4), "high_ms": round(timing.high, 4)}
                if cell.case not in ("decode", "rotary"):
                    operations = cell.operations * (2.5 if direction == BACKWARD else 1)
                    columns["tflops"] = round(operations / (timing.median * MILLISECOND) / 1e12, 1)
                if direction == BACKWARD and clock.device.type == "cuda":
                    del call
                    columns["extra_over_lse_and_dq"] = round(extra_memory(form, cell, clock.device), 3)
            except torch.OutOfMemoryError:
                say(f"{name} {direction}, {cell}: out of memory")
            except Exception as error:  # one form of some version that refuses a shape must not lose the table
                say(f"{name} {direction}, {cell}: {str(error)[:200]}")
            yield name, direction, columns


def _difference(result: Tensor, reference: Tensor) -> str:
    """Relative rms difference from the first form's output, to show that all compute one thing."""
    if result.shape != reference.shape:
        return ""
    return f"{((result.float() - reference.float()).norm() / reference.float().norm()).item():.2e}"


def time_cells(
    cells: Sequence[AttentionCell],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    backend: Any = "triton",
    make: Callable[..., dict[str, Form]] = forms,
    deadline: float = float("inf"),
    seconds: float = 0.2,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One row per cell, form and direction; cells past `deadline` (of `time.monotonic`) are left out and named.

    make: the forms of a cell, ours first; backend: what ours is asked for.
    """
    clock = Clock(device)
    copy, rate = bandwidth(clock), matrix_rate(clock)
    say(f"copy {copy / 1e12:.2f} TB/s, bf16 matrix product {rate / 1e12:.0f} TFLOP/s")
    rows = []
    for cell in cells:
        if time.monotonic() > deadline:
            say(f"{cell}: left out, the time is up")
            continue
        for name, direction, columns in measure(cell, make(cell, device, dtype, backend), clock, seconds, say):
            shape = {column: getattr(cell, column) for column in CELL_COLUMNS}
            row = {**shape, "dtype": str(dtype).removeprefix("torch."), "direction": direction, "form": name, **columns}
            if row["ms"] != "":
                row["over_floor"] = round(row["ms"] / floor(cell, direction, dtype.itemsize, copy, rate), 2)
            rows.append(row)
            where = f"{cell.case} d={cell.head_dim} L={cell.length}{' causal' if cell.causal else ''}"
            say(f"{name:12} {direction:8} {where}: {row['ms']} ms {row['tflops']} TFLOP/s")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


PROFILED = (
    AttentionCell.of("plain", 128, 4096),
    AttentionCell.of("plain", 64, 4096),
    AttentionCell.of("deberta", 64, 1024, causal=False, heads=12),
    AttentionCell.of("decode", 128, 16_384, rows=8),
)


def profile(device: torch.device, *, say: Callable[[str], None] = print) -> None:
    """Which kernels the time of our form goes to, and how far each case is from its floor."""
    clock = Clock(device)
    copy, rate = bandwidth(clock), matrix_rate(clock)
    for cell in PROFILED:
        form = forms(cell, device, torch.bfloat16)["triton"]
        for direction in (FORWARD, BACKWARD) if cell.case != "decode" else (FORWARD,):
            call = forward_of(form) if direction == FORWARD else backward_of(form)
            took, least = clock.measure(call).median, floor(cell, direction, 2, copy, rate)
            say(f"\n{cell} {direction}: {took:.3f} ms, {took / least:.2f} times its floor of {least:.3f} ms")
            activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) as trace:
                call()
                torch.cuda.synchronize()
            say(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=10, max_name_column_width=60))
