"""The part of `node_check` that each node does by itself: GPUs, memory, disks, the run folder, the clock."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from potamos.parallel.node_record import Limits, Record

if TYPE_CHECKING:
    import torch

GB = 1e9
CLOCK_TICK = 0.02
"""Seconds by which a file's time may lag the clock: systems stamp files with the time of their last tick."""


class Machine:
    """What this node has. The one place that asks the hardware, so that faults can be planted."""

    def gpus(self) -> int:
        import torch

        return torch.cuda.device_count()

    def memory(self, gpu: int) -> tuple[int, int]:
        """(free, total) bytes."""
        import torch

        return torch.cuda.mem_get_info(gpu)

    def matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ right

    def free(self, folder: Path) -> int:
        """Bytes that this user may still write there."""
        return shutil.disk_usage(folder).free

    def now(self) -> float:
        """Seconds since 1970, as files are stamped with."""
        return time.time()


class Stages:
    """Runs one stage at a time; where one hangs, calls `expired` with its name from another thread."""

    def __init__(self, seconds: float, expired: Callable[[str], None]) -> None:
        self.seconds, self._expired = seconds, expired

    @contextlib.contextmanager
    def stage(self, name: str, patience: float = 1.0) -> Iterator[None]:
        """patience: multiple of the usual limit."""
        timer = threading.Timer(self.seconds * patience, self._expired, (name,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


# --- this node by itself ------------------------------------------------------------------------------------------


def examine_gpus(record: Record, limits: Limits, machine: Machine) -> int:
    """Count them, and let each multiply; without GPUs the processor does. Returns how many there are."""
    found = machine.gpus() if limits.gpus else 0
    if found < limits.gpus:
        record.problem("gpus", f"sees {found} of {limits.gpus} GPUs (CUDA_VISIBLE_DEVICES={_visible()})")
    memory = []
    for gpu in range(found):
        try:
            free, total = machine.memory(gpu)
        except RuntimeError as error:
            record.problem("gpus", f"GPU {gpu} does not answer: {_first_line(error)}")
            continue
        memory.append([round(free / GB, 2), round(total / GB, 2)])
        if free < limits.free_memory * total:
            record.problem(
                "memory", f"GPU {gpu} has {free / GB:.1f} of {total / GB:.1f} GB free: another process holds the rest"
            )
    record.figures |= {"gpus": found, "memory_gb": memory}
    for device in [f"cuda:{gpu}" for gpu in range(found)] or ["cpu"]:
        _multiply(record, machine, device)
    return found


def _multiply(record: Record, machine: Machine, device: str) -> None:
    """A product of small whole numbers has no rounding in any of these types, so every bit is known beforehand."""
    import torch

    where = "the processor" if device == "cpu" else f"GPU {device[5:]}"
    left, right = (torch.randint(-1, 2, (384, 384), generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    expected = left @ right
    for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
        try:
            product = machine.matmul(left.to(device, dtype), right.to(device, dtype)).cpu().long()
        except RuntimeError as error:
            return record.problem("matmul", f"{where} cannot multiply: {_first_line(error)}")
        if wrong := int((product != expected).sum()):
            name = str(dtype).removeprefix("torch.")
            record.problem("matmul", f"{where} multiplies wrongly: {wrong} of {expected.numel()} sums ({name})")
    return None


def examine_disks(record: Record, limits: Limits, machine: Machine, run: Path) -> None:
    """Free space of the run folder and of this node's folder for temporary files."""
    free = {}
    for check, folder, needed in (
        ("run disk", run, limits.run_disk),
        ("tmp disk", Path(tempfile.gettempdir()), limits.tmp_disk),
    ):
        try:
            found = machine.free(folder) / GB
        except OSError as error:
            record.problem(check, f"{folder}: {error.strerror}")
            continue
        free[check] = round(found, 3)
        if found < needed:
            record.problem(check, f"{folder} has {found:.3g} GB free; {needed:g} GB are asked for")
    record.figures["free_gb"] = free


def examine_folder(record: Record, limits: Limits, machine: Machine, run: Path) -> None:
    """Write into the run folder, read it back, and compare the time that its server put on the file with ours."""
    path = run / f".preflight-{record.attempt}.{record.node}.{secrets.token_hex(4)}"
    content = secrets.token_bytes(4096)
    try:
        with open(path, "xb") as file:
            file.write(content)
            os.fsync(file.fileno())
        try:
            if path.read_bytes() != content:
                record.problem("run folder", f"{run} gives other bytes back than were written")
            before = machine.now()
            os.utime(path)  # "now" by the clock of whoever serves the file
            after, stamped = machine.now(), path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return record.problem("run folder", f"{run} cannot be written and read: {error.strerror}")
    skew = after - stamped if stamped > after else max(0.0, before - CLOCK_TICK - stamped)
    record.figures["skew_to_files_s"] = round(skew, 3)
    if abs(skew) > limits.skew:
        way = "ahead of" if skew > 0 else "behind"
        record.problem("clock", f"this node's clock is {abs(skew):.1f} s {way} that of the server of {run}")
    return None


def _visible() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unset")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
