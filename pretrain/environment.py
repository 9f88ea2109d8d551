"""What a run ran on: versions, commit, processor, devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from potamos.files import write_atomically
from potamos.slurm.run_folder import RunFolder

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "tensorboard")
ROOT = Path(__file__).resolve().parent.parent


def write_environment(run: str | os.PathLike[str]) -> Path:
    """Write `environment.txt` into the run folder and return its path. What cannot be found out reads `unknown`."""
    facts = {
        "potamos": f"{_version('potamos')}, commit {_commit()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": platform.node(),
        "processor": processor(),
        "devices": _devices(),
    }
    path = RunFolder.of(run).environment
    write_atomically(path, "".join(f"{name}: {value}\n" for name, value in facts.items()).encode())
    return path


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The checkout's commit; unknown if the package is installed elsewhere, even below someone else's checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        return git("rev-parse", "HEAD") + (", modified" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def processor() -> str:
    """Its name, and the cores of it that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or "unknown"
    return f"{name}, {_cores()} cores"


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result may depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in ("potamos", *PACKAGES)}}


def _cores() -> int:
    """Cores this process may use, which a scheduler limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"
