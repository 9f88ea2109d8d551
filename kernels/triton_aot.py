"""The compiling side of `aot`: `python -m potamos.kernels.triton_aot` writes one JSON reading per line.

Registers and spills are what ptxas says of the very binary that a launch would load: Triton runs it with -v and prints
its report if asked to. nvdisasm counts the tensor-core instructions of that binary: HGMMA is Hopper's asynchronous
wgmma, HMMA the older mma.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .aot import Configuration, Reading

BINARIES = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
JOBS: list[tuple[Configuration, str]] = []  # filled before the workers are forked: a jitted function cannot be pickled
CACHE: list[Path] = []


def compile_one(configuration: Configuration, target: str) -> Reading:
    """Compile and read. Raises whatever Triton raises, RuntimeError where ptxas refuses."""
    capability = int(re.findall(r"\d+", target)[0])
    names = configuration.kernel.arg_names
    missing = [n for n in names if n not in configuration.constants and n not in configuration.signature]
    unknown = {*configuration.constants, *configuration.signature} - set(names)
    if missing or unknown:
        raise TypeError(f"{configuration.name}: arguments without a type {missing}, not arguments {sorted(unknown)}")
    constants = configuration.constants
    signature = {n: "constexpr" if n in constants else configuration.signature[n] for n in names}
    # Without these Triton proves no alignment and loads element by element; a launch finds them in its arguments.
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in configuration.aligned]
    source = ASTSource(
        fn=configuration.kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    report = printed.getvalue()
    if f"for '{target}'" not in report:
        raise RuntimeError(f"ptxas did not compile for {target}: {report[-300:]!r}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        assembly = _run("nvdisasm", "-c", cubin)
    return Reading(
        name=configuration.name,
        target=target,
        dtype=configuration.dtype,
        chosen=target in configuration.chosen,
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        registers=_number(r"Used (\d+) registers", report),
        spill_stores=_number(r"(\d+) bytes spill stores", report),
        spill_loads=_number(r"(\d+) bytes spill loads", report),
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA\.", assembly)),
        mma=len(re.findall(r"\bHMMA\.", assembly)),
    )


def _run(program: str, *arguments: object) -> str:
    done = subprocess.run([BINARIES / program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{program}: {done.stderr.strip()[-500:]}")
    return done.stderr + done.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas -v printed nothing like {pattern!r}: {text[-300:]!r}")
    return int(found[1])


def load(source: str) -> ModuleType:
    """A module by its name, or a Python file by its path."""
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def key_of(configuration: Configuration, target: str) -> str:
    """What a reading depends on; `cache_key` of a jitted function covers the functions that it calls."""
    this = Path(__file__).read_bytes()
    parts = [configuration.kernel.cache_key, triton.__version__, target, hashlib.sha256(this).hexdigest()]
    described = {f.name: getattr(configuration, f.name) for f in fields(configuration)}
    described = {name: value for name, value in described.items() if name not in ("kernel", "targets")}
    described["constants"] = {name: str(value) for name, value in configuration.constants.items()}
    return hashlib.sha256(json.dumps([*parts, described], sort_keys=True).encode()).hexdigest()


def read(index: int) -> Reading:
    """One job, from the cache if it was done before."""
    configuration, target = JOBS[index]
    kept = CACHE[0] / f"{key_of(configuration, target)}.json"
    try:
        return Reading(**json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    try:
        reading = compile_one(configuration, target)
    except Exception as error:  # one kernel that does not compile should not hide the table of the others
        chosen, warps, stages = target in configuration.chosen, configuration.num_warps, configuration.num_stages
        message = f"{type(error).__name__}: {error}"[-1000:]
        name, dtype = configuration.name, configuration.dtype
        return Reading(name, target, dtype, chosen, warps, stages, 0, 0, 0, 0, 0, 0, message)
    kept.parent.mkdir(parents=True, exist_ok=True)
    half = kept.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps(asdict(reading)))
    os.replace(half, kept)
    return reading


def readings(workers: int) -> Iterator[Reading]:
    """Every job's reading, in the order in which they are done."""
    if workers == 1 or len(JOBS) <= 1:
        yield from map(read, range(len(JOBS)))
        return
    with multiprocessing.get_context("fork").Pool(min(workers, len(JOBS))) as pool:
        yield from pool.imap_unordered(read, range(len(JOBS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", nargs="+", required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cache", type=Path, required=True)
    chosen = parser.parse_args()
    found = [c for source in chosen.sources for c in load(source).configurations() if chosen.only in c.name]
    names = [c.name for c in found]
    assert len(names) == len(set(names)), f"names given twice: {sorted({n for n in names if names.count(n) > 1})}"
    JOBS.extend((c, target) for c in found for target in chosen.targets if target in c.targets)
    CACHE.append(chosen.cache)
    for reading in readings(chosen.workers):
        print(json.dumps(asdict(reading)), flush=True)


if __name__ == "__main__":
    main()
