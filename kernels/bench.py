"""Tests and timings of the kernels on this machine's GPU: `python3 -m potamos.kernels.bench`, or `make gpu`.

The tests of the Triton kernels run first, compiled; no time is measured unless they pass. Then h3_mix, forward and
forward + backward, against the same mixer by torch's rfft, by the chunked torch form, and against the time that the
memory traffic alone takes at the bandwidth of a copy measured in the same run; and attention (`bench_attention`).
Needs torch, triton and pytest.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and importlib.util.find_spec("torch") is None:
    sys.exit(f"error: {sys.executable} has no torch: nothing was tested or timed")

import torch
from torch import Tensor

from . import bench_attention, bench_attention_cases, goals_attention
from .bench_cases import Cell, Problem
from .check import RESULTS, run_tests, versions, write_rows
from .goals import BOTH, FORWARD, TOKENS, answer
from .timing import MILLISECOND, Clock, Timing, bandwidth, captured, matrix_rate, state_of_gpu

# Bytes per token and channel in a 16-bit type: q, k, v in and y out; the backward reads q, k, v and dy, writes three.
BYTES = {FORWARD: 8, BOTH: 8 + 14}
FLOPS = {FORWARD: 640, BOTH: 640 * 4}
"""Tensor-core operations per token and channel: two 64 x 64 shift products, T, R and W. The backward recomputes the
forward and multiplies by each operator's transpose and into its gradient."""


class NoGpuError(ValueError):
    """This machine has no GPU that torch can use."""


CELLS = tuple(Cell(d, 1024 * 2**n, TOKENS // (1024 * 2**n)) for d in (768, 2048) for n in range(8))
CELLS += (Cell(768, 2**20, 1), Cell(768, 8192, 16, documents="one"), Cell(768, 8192, 16, documents="packed"))
CELLS += tuple(Cell(768, length, TOKENS // length, "long_conv") for length in (1024, 2048, 8192))


def both_ways(run: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run(), leaves, grad)


def forward_only(run: Callable[[], Tensor]) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return run()

    return call


def saved_over_inputs(run: Callable[[], Tensor], problem: Problem) -> float:
    """Bytes of what autograd keeps for the backward, each storage once, over those of q, k and v."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = run()
    kept.pop(output.untyped_storage().data_ptr(), None)
    inputs = sum(problem.leaves[name].untyped_storage().nbytes() for name in "qkv")
    return sum(kept.values()) / inputs


def measure_cell(
    cell: Cell, form: str, clock: Clock, dtype: torch.dtype, least: int, seconds: float
) -> Iterator[tuple[str, dict]]:
    """(direction, columns) of one form of the mixer: "triton", "rfft" or "chunked". Empty columns: out of memory."""
    problem = Problem.draw(cell, clock.device, dtype)
    run, leaves = problem.form(form)
    for direction in (FORWARD, BOTH):
        call = forward_only(run) if direction == FORWARD else both_ways(run, leaves, problem.grad)
        columns: dict[str, Any] = {}
        try:
            timing: Timing = clock.measure(call, least=least, seconds=seconds)
            columns |= {f"{form}_ms": round(timing.median, 4), f"{form}_repeats": timing.repeats}
            if form == "triton":
                columns |= {"triton_low_ms": round(timing.low, 4), "triton_high_ms": round(timing.high, 4)}
                if direction == BOTH:
                    columns["saved_over_inputs"] = round(saved_over_inputs(run, problem), 3)
                replay = captured(call) if clock.device.type == "cuda" else None
                if replay is not None:
                    columns["triton_graph_ms"] = round(clock.measure(replay, least=least, seconds=seconds).median, 4)
            elif form == "rfft" and direction == FORWARD:
                columns["error"] = f"{_difference(problem, forward_only(run)()):.2e}"
        except torch.OutOfMemoryError:
            pass
        yield direction, columns


def _difference(problem: Problem, other: Any) -> float:
    """Relative rms difference of the kernel's output from the rfft form's, to show that both compute one thing."""
    ours = forward_only(problem.form("auto")[0])()
    assert isinstance(ours, Tensor)
    return ((ours.float() - other.float()).norm() / other.float().norm()).item()


FORMS = {"triton": 50, "rfft": 10, "chunked": 5}
"""Forms of the mixer in order, and how often each is run at least; the slow ones of another system less often."""
COLUMNS = ("triton_ms", "triton_low_ms", "triton_high_ms", "triton_graph_ms", "triton_repeats", "floor_ms")
COLUMNS += ("floor_share", "rfft_ms", "rfft_repeats", "over_rfft", "chunked_ms", "chunked_repeats", "over_chunked")
COLUMNS += ("error", "saved_over_inputs")


def time_cells(
    cells: Sequence[Cell],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    deadline: float = float("inf"),
    forms: dict[str, int] = FORMS,
    seconds: float = 1.0,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One row per cell and direction. Past `deadline` (of `time.monotonic`) what is left stays empty; the fused form
    is measured for every cell before the others begin. Each median takes about `seconds`."""
    clock = Clock(device)
    copy = bandwidth(clock)
    say(f"copy {copy / 1e12:.2f} TB/s")
    rows = {(cell, way): _blank(cell, way, dtype, copy) for cell in cells for way in (FORWARD, BOTH)}
    for form, least in forms.items():
        for cell in cells:
            if form not in cell.forms:
                continue
            if time.monotonic() > deadline:
                say(f"{form}, {cell}: left out, the time is up")
                continue
            try:
                for direction, columns in measure_cell(cell, form, clock, dtype, least, seconds):
                    row = rows[cell, direction]
                    row.update(columns)
                    _ratios(row)
                    where = f"{cell.title} d={cell.width} L={cell.length}"
                    say(f"{form:8} {direction:16} {where}: {row[f'{form}_ms']} ms")
            except torch.OutOfMemoryError:
                say(f"{form}, {cell}: out of memory")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return list(rows.values())


def _blank(cell: Cell, direction: str, dtype: torch.dtype, copy: float) -> dict[str, Any]:
    shape = {
        "operation": cell.title,
        "width": cell.width,
        "length": cell.length,
        "rows": cell.rows,
        "direction": direction,
    }
    floor = BYTES[direction] * cell.elements * dtype.itemsize / 2 / copy / MILLISECOND
    return {
        **shape,
        "dtype": str(dtype).removeprefix("torch."),
        **dict.fromkeys(COLUMNS, ""),
        "floor_ms": round(floor, 4),
    }


def _ratios(row: dict[str, Any]) -> None:
    ours = row["triton_ms"]
    if ours == "":
        return
    row["floor_share"] = round(row["floor_ms"] / ours, 3)
    for other in ("rfft", "chunked"):
        if row[f"{other}_ms"] != "":
            row[f"over_{other}"] = round(row[f"{other}_ms"] / ours, 2)


def text_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Rows as aligned text."""
    lines = [list(names), *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def gpu() -> torch.device:
    """The GPU to measure. Raises NoGpuError."""
    if not torch.cuda.is_available():
        raise NoGpuError("no GPU that torch can use on this machine: nothing was tested or timed")
    return torch.device("cuda")


LEAST_MINUTES = 6
"""Three for the timings, and as many for the tests, most of which is compiling."""


OPERATIONS = ("flash_conv", "attention")


def bench(
    *,
    minutes: float = 7.5,
    out: Path = RESULTS,
    operations: Sequence[str] = OPERATIONS,
    say: Callable[[str], None] = print,
) -> int:
    """Test, then time; returns the exit status. Writes, for each of `operations`, OPERATION.csv and
    OPERATION_goals.csv into out. The mixer has half of the time that the tests leave, attention all the rest.

    Raises NoGpuError without a GPU, ValueError for less than LEAST_MINUTES.
    """
    if minutes < LEAST_MINUTES:
        raise ValueError(f"{minutes:g} minutes are too few: the tests alone take about two, ask for {LEAST_MINUTES}")
    device, began = gpu(), time.monotonic()
    if not run_tests(native=True, seconds=60 * (minutes - 3)):
        say("the kernels' tests FAILED on this GPU, or took too long: nothing is timed")
        return 1
    stamp = {"device": torch.cuda.get_device_name(device), **state_of_gpu(), **versions()}
    say("  ".join(f"{name} {value}" for name, value in stamp.items()))
    end, now = began + 60 * minutes - 20, time.monotonic()
    half = end if "attention" not in operations else now + (end - now) / 2
    incomplete = False
    for operation in operations:
        if operation == "flash_conv":
            rows = time_cells(CELLS, device, deadline=half, say=say)
            answers = answer(rows)
            names = ["operation", "width", "length", "direction", "triton_ms"]
            names += ["floor_share", "over_rfft", "over_chunked"]
        else:
            rows = bench_attention.time_cells(bench_attention_cases.CELLS, device, deadline=end, say=say)
            answers = answer(rows, goals_attention.GOALS)
            names = ["case", "head_dim", "length", "causal", "direction", "form", "ms", "tflops", "over_floor", "error"]
            incomplete = any(row["form"] == "triton" and row["ms"] == "" for row in rows)
        after = state_of_gpu()
        ran = stamp | {f"{name} after": after[name] for name in ("clocks.sm", "temperature.gpu", "power.draw")}
        if rows:
            write_rows(out / f"{operation}.csv", [{**row, **ran} for row in rows])
            say(text_table(rows, names))
        write_rows(out / f"{operation}_goals.csv", [{**row, **ran} for row in answers])
        say(text_table(answers, list(answers[0])))
    say(f"written to {out}, {time.monotonic() - began:.0f} s")
    if incomplete:
        say("FAILED: a case of attention did not run")
    return 1 if incomplete else 0


def profile(*, operations: Sequence[str] = OPERATIONS, say: Callable[[str], None] = print) -> int:
    """What limits each operation: its bytes, its matrix products, or neither, and which kernels the time goes to."""
    device = gpu()
    if "attention" in operations:
        bench_attention.profile(device, say=say)
    if "flash_conv" in operations:
        _profile_mixer(device, say)
    return 0


def _profile_mixer(device: torch.device, say: Callable[[str], None]) -> None:
    clock = Clock(device)
    copy, rate = bandwidth(clock), matrix_rate(clock)
    say(f"copy {copy / 1e12:.2f} TB/s, bf16 matrix product {rate / 1e12:.0f} TFLOP/s")
    for cell in (Cell(768, 2048, 64), Cell(768, 32_768, 4), Cell(2048, 8192, 16)):
        problem = Problem.draw(cell, device, torch.bfloat16)
        run, leaves = problem.mixer("triton")
        for direction in (FORWARD, BOTH):
            call = forward_only(run) if direction == FORWARD else both_ways(run, leaves, problem.grad)
            took = clock.measure(call).median
            memory = BYTES[direction] * cell.elements / copy / MILLISECOND
            tensor = FLOPS[direction] * cell.elements / rate / MILLISECOND
            say(f"\n{cell} {direction}: {took:.3f} ms; {limit(took, memory, tensor)}")
            activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) as trace:
                call()
                torch.cuda.synchronize()
            say(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=10, max_name_column_width=60))


def limit(took: float, memory: float, tensor: float) -> str:
    """Which floor (milliseconds) a measured time is near: above 60 % of the larger one, that is what limits it."""
    name, floor = max(("bytes", memory), ("tensor cores", tensor), key=lambda pair: pair[1])
    shares = f"bytes {memory:.3f} ms, tensor cores {tensor:.3f} ms"
    if floor > 0.6 * took:
        return f"limited by {name} ({shares})"
    return f"at {floor / took:.0%} of its floor, so latency, occupancy or other work limits it ({shares})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5, help="end by then, tests included")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--profile", action="store_true", help="say what limits the operations instead")
    parser.add_argument("--only", choices=OPERATIONS, help="time this one alone, after the tests of all")
    chosen = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        operations = (chosen.only,) if chosen.only else OPERATIONS
        if chosen.profile:
            status = profile(operations=operations)
        else:
            status = bench(minutes=chosen.minutes, out=chosen.out, operations=operations)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
