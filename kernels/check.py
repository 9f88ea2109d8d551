"""Are the kernels right, and does the compiler make of them what was meant? Answered without a GPU.

`check` runs the Triton tests in the interpreter, then compiles every configuration ahead of time for Hopper and
Ampere and asserts what `findings` lists. Needs Linux, where Triton is installed.
"""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .aot import SHARED_LIMIT, SOURCES, TARGETS, Reading, compile_all, require_triton
from .spills import SPILLS, Spill

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TESTS = ROOT / "tests" / "kernels" / "triton"


class MissingToolError(ValueError):
    """Something outside this package is needed and not installed."""


WITHOUT_WGMMA = {"one query": "wgmma takes 64 rows or more; a tile of 64 for one query would be all but empty"}
"""What a configuration's name contains, and why it may use mma on Hopper instead."""


def findings(readings: Iterable[Reading], spills: Mapping[tuple[str, str], Spill] = SPILLS) -> list[str]:
    """What is wrong with a table of readings, one sentence each:

    - a configuration that does not compile;
    - more shared memory than a block can have: the launch would fail;
    - more spilled bytes than `spills` states, none by default; and a statement there that is too generous, so that the
      table stays true;
    - no wgmma on Hopper, or no mma on Ampere, where the operands are 16 bits wide: the tensor cores would idle. Where
      `WITHOUT_WGMMA` names a configuration, or its only product has too few rows for wgmma, mma on Hopper will do.
    """
    wrong = []
    for reading in readings:
        where = f"{reading.name} ({reading.target})"
        if reading.error:
            wrong.append(f"{where} does not compile: {reading.error}")
            continue
        if reading.shared > SHARED_LIMIT[reading.target]:
            wrong.append(f"{where} needs {reading.shared} bytes of shared memory, above {SHARED_LIMIT[reading.target]}")
        known = spills.get((reading.name, reading.target), Spill(0, ""))
        if reading.spill_stores > known.bytes:
            wrong.append(f"{where} spills {reading.spill_stores} bytes, above the {known.bytes} known")
        if reading.spill_stores == 0 < known.bytes:
            wrong.append(f"{where} spills nothing any more: take it out of the table of known spills")
        if reading.dtype in ("bf16", "fp16"):
            small = any(part in reading.name for part in WITHOUT_WGMMA)
            low = small or _too_low(reading.name)
            if reading.target == "sm_90a" and not low and reading.wgmma == 0:
                wrong.append(f"{where} uses no wgmma")
            if reading.target == "sm_90a" and small and reading.wgmma > 0:
                wrong.append(f"{where} uses wgmma now: take it out of WITHOUT_WGMMA")
            if (low or reading.target != "sm_90a") and reading.mma + reading.wgmma == 0:
                wrong.append(f"{where} uses no tensor cores")
    return wrong


def _too_low(name: str) -> bool:
    """A tile of 32 rows, one for each mode, is all that a plain SSM's states are multiplied by; wgmma takes 64 or more
    and leaves the product to the older mma."""
    return name.startswith("diag_ssm states") and not name.endswith("M64")


COLUMNS = ("registers", "spill_stores", "spill_loads", "shared", "wgmma", "mma")


def table(readings: Sequence[Reading]) -> str:
    """The readings as aligned text."""
    lines: list[tuple[str, ...]] = [("target", "configuration", "auto", "warps", *COLUMNS, "")]
    for reading in readings:
        values = tuple(str(getattr(reading, name)) for name in COLUMNS)
        spill = SPILLS.get((reading.name, reading.target))
        note = "does not compile" if reading.error else f"spill: {spill.reason}" if spill else ""
        chosen = "yes" if reading.chosen else "no"
        lines.append((reading.target, reading.name, chosen, str(reading.num_warps), *values, note))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def versions() -> dict[str, str]:
    """The columns of a result that say what made it."""
    names = {name: _version(name) for name in ("triton", "torch")}
    python = ".".join(map(str, sys.version_info[:3]))
    return {**names, "python": python, "date": datetime.now(UTC).date().isoformat()}


def _version(name: str) -> str:
    """Of a package that may be distributed under another name than its own."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(name), "__version__", "unknown"))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with half.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(half, path)


def run_tests(*, native: bool, tests: Path = TESTS, seconds: float | None = None) -> bool:
    """The tests of the Triton kernels: `native` compiles them for this machine's GPU, else they are interpreted.

    In a checkout they are `tests/kernels/triton`, run by this Python's pytest; an installed package has `selftest`.
    Natively several processes share them: most of their time is the compiler's. Tests that take longer than `seconds`
    have failed. Raises MissingToolError where pytest is needed and missing.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0" if native else "1"}
    environment["PYTHONSAFEPATH"] = "1"  # with -c the checkout would be on the path, and its folders shadow packages
    if not tests.is_dir():
        commands = [[sys.executable, "-m", "potamos.kernels.selftest"]]
    elif importlib.util.find_spec("pytest") is None:
        raise MissingToolError(
            f"{sys.executable} has no pytest: install it, or carry the wheels of pytest, pluggy, iniconfig, packaging, "
            "pygments (pure Python)"
        )
    else:
        shares = min(8, max(1, (os.cpu_count() or 1) // 2)) if native else 1
        commands = [pytest_command(tests, share, shares, device="cuda" if native else "") for share in range(shares)]
    end = None if seconds is None else time.monotonic() + seconds

    def run(command: list[str]) -> int | None:
        left = None if end is None else end - time.monotonic()
        try:
            done = subprocess.run(command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"the tests are not done after {seconds:.0f} s", file=sys.stderr)
            return None
        return done.returncode

    with ThreadPoolExecutor(len(commands)) as pool:
        codes = set(pool.map(run, commands))
    return 0 in codes and codes <= {0, 5}  # pytest's 5: a share without a test


def pytest_command(tests: Path, share: int, shares: int, device: str = "") -> list[str]:
    """Runs every `shares`-th test of a folder, from number `share` on, where they make their tensors on `device`."""
    default = f"import torch; torch.set_default_device({device!r})" if device else ""
    script = f"""
{default}
import sys, pytest

class Share:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = items[{share}::{shares}]

sys.exit(pytest.main(plugins=[Share()]))
"""
    return [sys.executable, "-c", script, str(tests), "-q"]


def check(
    *,
    only: str = "",
    tests: bool = True,
    sources: Iterable[str] = SOURCES,
    workers: int | None = None,
    cache: Path | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Test in the interpreter, compile for every target, print the table and what is wrong with it.

    only: compile the configurations whose names contain it. out: the CSV file to write; none where `only` is given.
    Returns the exit status: 0, or 1 if anything failed. Raises CompilationError where Triton is missing.
    """
    require_triton()
    failed = False
    if tests and not run_tests(native=False):
        say("the kernels' tests FAILED in the interpreter")
        failed = True
    done = 0

    def count(reading: Reading) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\rcompiled {done}: {reading.name[:60]:60}", end="\r", file=sys.stderr, flush=True)

    readings = compile_all(sources, TARGETS, only=only, workers=workers, cache=cache, progress=count)
    if not readings:
        say(f"no configuration has {only!r} in its name")
        return 1
    say(table(readings))
    wrong = findings(readings)
    for sentence in wrong:
        say(f"FAILED: {sentence}")
    say(f"{len(readings)} compilations, {len(wrong)} findings" + (", tests failed" if failed else ""))
    if out is not None and not only:
        stamp = versions()
        write_rows(out, [{**asdict(reading), **stamp} for reading in readings])
        say(f"written to {out}")
    return 1 if failed or wrong else 0
