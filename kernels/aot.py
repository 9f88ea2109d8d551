"""Ahead-of-time compilation of the Triton kernels, for GPUs that this machine need not have.

A kernel's module lists what can be launched, `configurations() -> list[Configuration]`. Each is compiled for each
target by Triton's own compiler and the ptxas and nvdisasm in its wheel: no driver, no CUDA toolkit, no GPU. What comes
back are static readings (registers, spilled bytes, shared memory, tensor-core instructions); no speed is measured.

This module imports no triton: it starts `triton_aot` in processes of their own, because a process in which
TRITON_INTERPRET is set has interpreted functions in place of compilable ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ("sm_90a", "sm_80")
"""Hopper (H100, H200) and Ampere (A100)."""
SHARED_LIMIT = {"sm_90a": 232_448, "sm_80": 166_912}
"""Bytes of shared memory one block can have. The compiler does not check it: a launch would fail."""
SOURCES = (
    "potamos.kernels.diag_ssm.configurations",
    "potamos.kernels.long_conv.configurations",
    "potamos.kernels.attention.triton",
    "potamos.kernels.attention.triton_backward_configurations",
    "potamos.kernels.attention.triton_rotary",
)
"""Modules with a `configurations()`."""


class CompilationError(ValueError):
    """A kernel does not compile, or the compiler is not there."""


@dataclass(frozen=True)
class Configuration:
    """One launchable form of one kernel.

    name: unique and stable, `op direction [documents] dtype tile`, e.g. "h3_mix forward bf16 16x4".
    kernel: the `triton.jit` function (not the autotuned one).
    signature: type of each argument that is no constant, "*bf16", "*fp32", "i32", "fp32".
    constants: value of each `tl.constexpr` argument.
    aligned: names of the integer arguments that are multiples of 16; pointers always are (torch aligns to 512 bytes).
    dtype: "bf16", "fp16" or "fp32", what the matrix products multiply; "" for a kernel without any.
    chosen: whether `auto` can pick it on that target; others are listed for comparison.
    targets: what it is compiled for; a form that differs from another in nothing that a target could object to is
    compiled for one.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    dtype: str = "bf16"
    chosen: tuple[str, ...] = TARGETS
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True)
class Reading:
    """What the compiler made of one configuration for one target; sizes in bytes."""

    name: str
    target: str
    dtype: str
    chosen: bool
    num_warps: int
    num_stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    wgmma: int
    mma: int
    error: str = ""


def compile_all(
    sources: Iterable[str] = SOURCES,
    targets: Sequence[str] = TARGETS,
    *,
    only: str = "",
    workers: int | None = None,
    cache: Path | None = None,
    progress: Callable[[Reading], None] = lambda reading: None,
) -> list[Reading]:
    """Compile every configuration of `sources` whose name contains `only`, for every target that it is meant for.

    sources: module names, or paths of Python files. workers: processes, by default one per core. cache: folder of
    earlier readings, by default under the user's cache; a reading is kept per source text of the kernel and all that
    it calls, arguments, options, target and Triton version.

    Raises CompilationError where Triton is missing or a module cannot be listed. A kernel that does not compile is a
    reading with `error` set.
    """
    require_triton()
    command = [sys.executable, "-m", "potamos.kernels.triton_aot", "--targets", *targets, "--only", only]
    command += ["--workers", str(workers or os.cpu_count() or 1), "--cache", str(cache or default_cache())]
    command += ["--sources", *sources]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    readings = []
    with process:
        for line in process.stdout:
            reading = Reading(**json.loads(line))
            readings.append(reading)
            progress(reading)
        assert process.stderr is not None
        complaint = process.stderr.read()
    if process.returncode != 0:
        raise CompilationError(f"ahead-of-time compilation ended with status {process.returncode}: {complaint[-2000:]}")
    return sorted(readings, key=lambda r: (targets.index(r.target), r.name))


def require_triton() -> None:
    """Raises CompilationError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise CompilationError("triton is not installed: pip install 'triton>=3.6' (Linux only)")


def default_cache() -> Path:
    """Where readings are kept between calls."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "potamos" / "aot"
