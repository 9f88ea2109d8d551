"""The checks of the kernels themselves: what the ahead-of-time compiler reports, what is refused, what is timed."""

from __future__ import annotations

import ast
import csv
import importlib.metadata
import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from potamos.kernels import bench, check, goals, timing
from potamos.kernels.aot import SHARED_LIMIT, SOURCES, CompilationError, Reading, compile_all
from potamos.kernels.bench_cases import Cell, Problem, long_kernel
from potamos.kernels.check import findings
from potamos.kernels.diag_ssm.parameters import discretise
from potamos.kernels.spills import SPILLS, Spill, known_spills

ROOT = Path(__file__).resolve().parent.parent.parent

SPECIMENS = """
import triton
import triton.language as tl
from potamos.kernels.aot import Configuration

@triton.jit
def product(x, y, out, SIDE: tl.constexpr):
    i, j = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    tl.store(out + i * SIDE + j, tl.dot(tl.load(x + i * SIDE + j), tl.load(y + i * SIDE + j)))

@triton.jit
def hoard(x, out, COUNT: tl.constexpr):
    i = tl.arange(0, 32)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    held = tl.load(x + i)
    tl.store(out + i, tl.cumsum(held, 1) * held)

@triton.jit
def copy(x, out, n):
    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)

@triton.jit
def wrong(x, out):
    tl.store(out, tl.no_such_function(tl.load(x)))

def configurations():
    types = {"x": "*bf16", "y": "*bf16", "out": "*fp32"}
    return [
        Configuration("product", product, types, {"SIDE": 64}),
        Configuration("hoard", hoard, {"x": "*fp32", "out": "*fp32"}, {"COUNT": 512}, num_warps=1, dtype="fp32"),
        Configuration("copy", copy, {"x": "*bf16", "out": "*bf16", "n": "i32"}, targets=("sm_90a",)),
        Configuration("wrong", wrong, {"x": "*fp32", "out": "*fp32"}, dtype="fp32"),
    ]
"""


@pytest.fixture(scope="module")
def specimens(tmp_path_factory) -> tuple[Path, Path, list[Reading]]:
    """(source file, cache, readings for Hopper) of kernels whose faults are known."""
    folder = tmp_path_factory.mktemp("specimens")
    source = folder / "specimens.py"
    source.write_text(SPECIMENS)
    return source, folder / "cache", compile_all([str(source)], ["sm_90a"], cache=folder / "cache")


def test_the_compiler_is_read(specimens):
    """Tensor cores, spills and mistakes of kernels that are known to have them, and the sentence for each."""
    _, _, readings = specimens
    by_name = {reading.name: reading for reading in readings}
    assert by_name["product"].wgmma > 0
    assert by_name["product"].spill_stores == 0
    assert 0 < by_name["product"].registers <= 255
    assert by_name["product"].shared >= 64 * 64 * 2
    # Every thread holds a row of 512 numbers, in 255 registers.
    assert by_name["hoard"].spill_stores > 500
    assert (by_name["copy"].wgmma, by_name["copy"].mma) == (0, 0)
    assert "no_such_function" in by_name["wrong"].error
    wrong = findings(readings)
    assert [sentence.split(" (")[0] for sentence in wrong if "spills" in sentence] == ["hoard"]
    assert "copy (sm_90a) uses no wgmma" in wrong
    assert any(sentence.startswith("wrong (sm_90a) does not compile") for sentence in wrong)
    assert not any(sentence.startswith("product (") for sentence in wrong)


def test_readings_are_kept_per_source(specimens, tmp_path, monkeypatch):
    source, cache, readings = specimens
    kept = sorted(cache.iterdir())
    assert len(kept) == 3  # what does not compile is tried again
    # A kept reading is believed, so a changed file shows that nothing was compiled.
    (mine,) = [path for path in kept if '"name": "copy"' in path.read_text()]
    mine.write_text(mine.read_text().replace('"registers": ', '"registers": 9'))
    before = next(reading.registers for reading in readings if reading.name == "copy")
    (again,) = compile_all([str(source)], ["sm_90a"], only="copy", cache=cache)
    assert again.registers == int(f"9{before}")
    changed = tmp_path / "specimens.py"
    changed.write_text(SPECIMENS.replace("tl.load(x + i, mask", "tl.load(x + 2 * i, mask"))
    # The mode of the interpreter, which tests of kernels set, must not reach the compiler.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (fresh,) = compile_all([str(changed)], ["sm_90a"], only="copy", cache=cache)
    assert 0 < fresh.registers <= 255
    assert len(list(cache.iterdir())) == 4


def test_a_configuration_is_compiled_for_its_targets(specimens):
    source, cache, _ = specimens
    assert compile_all([str(source)], ["sm_80"], only="copy", cache=cache) == []


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(CompilationError, match="no_such_module"):
        compile_all(["potamos.kernels.no_such_module"])


GOOD = Reading("op forward bf16", "sm_90a", "bf16", True, 4, 2, 111, 0, 0, 50_000, 16, 16)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"error": "ValueError: no"}, "does not compile"),
        ({"shared": SHARED_LIMIT["sm_90a"] + 1}, "shared memory"),
        ({"shared": SHARED_LIMIT["sm_80"] + 1, "target": "sm_80"}, "shared memory"),
        ({"spill_stores": 4}, "spills 4 bytes, above the 0 known"),
        ({"wgmma": 0}, "no wgmma"),
        ({"wgmma": 0, "dtype": "fp16"}, "no wgmma"),
        ({"mma": 0, "wgmma": 0, "target": "sm_80"}, "no tensor cores"),
        ({"name": "op one query bf16"}, "uses wgmma now"),
        ({"name": "op one query bf16", "mma": 0, "wgmma": 0}, "no tensor cores"),
    ],
)
def test_each_fault_is_found(fault, says):
    assert findings([GOOD], {}) == []
    (sentence,) = findings([GOOD, replace(GOOD, **fault)], {})
    assert says in sentence


def test_what_is_no_fault():
    at_limit = [replace(GOOD, shared=SHARED_LIMIT["sm_90a"]), replace(GOOD, target="sm_80", wgmma=0, shared=166_912)]
    assert findings(at_limit, {}) == []
    assert findings([replace(GOOD, dtype="fp32", wgmma=0, mma=0)], {}) == []  # fp32 products use no tensor cores
    assert findings([replace(GOOD, dtype="", wgmma=0, mma=0)], {}) == []  # an elementwise kernel
    assert findings([replace(GOOD, name="op one query bf16", wgmma=0)], {}) == []  # too few rows for wgmma
    low = replace(GOOD, name="diag_ssm states bf16 16x4", wgmma=0)
    assert findings([low], {}) == []  # 32 rows are too few for wgmma
    for other in (replace(low, mma=0), replace(low, name="diag_ssm states bf16 16x8 M64")):
        assert len(findings([other], {})) == 1


def test_known_spills_may_not_grow_nor_outlive_their_cause():
    spills = {(GOOD.name, GOOD.target): Spill(100, "a reason")}
    assert findings([replace(GOOD, spill_stores=100)], spills) == []
    assert len(findings([replace(GOOD, spill_stores=101)], spills)) == 1
    assert len(findings([GOOD], spills)) == 1
    assert all(spill.bytes > 0 and spill.reason for spill in SPILLS.values())
    where = ("h3_mix backward documents bf16 16x8", "sm_90a")
    assert known_spills("3.6.0")[where].bytes > 0
    assert where not in known_spills("3.7.1"), "what one compiler spills excuses no other"


def test_training_spills_nothing_on_hopper():
    """The backward of whole rows, as `auto` launches it in 16 bits for up to 32 modes: with Triton 3.7 nothing is
    excused, with documents or without."""
    excused = {name for name, target in known_spills("3.7.1") if target == "sm_90a"}
    for dtype, documents, operation in itertools.product(("bf16", "fp16"), ("", "documents "), ("h3_mix", "diag_ssm")):
        assert f"{operation} backward {documents}{dtype} 16x8" not in excused


def test_the_mixers_forward_is_register_clean_on_hopper():
    """Every forward configuration, as compiled here and now; without documents nothing may be spilled or excused."""
    readings = compile_all([SOURCES[0]], ["sm_90a"], only="h3_mix forward")
    assert {reading.dtype for reading in readings} == {"bf16", "fp16", "fp32"}
    assert findings(readings) == []
    for reading in readings:
        if "documents" not in reading.name or reading.dtype != "fp32":
            assert reading.spill_stores == 0, reading.name
        assert (reading.wgmma > 0) == (reading.dtype != "fp32"), reading.name
    both = known_spills("3.6.0") | known_spills("3.7.1")
    excused = {name for name, target in both if target == "sm_90a" and name.startswith("h3_mix forward")}
    assert all("documents" in name and "fp32" in name for name in excused)


@pytest.mark.parametrize("kernel", ["forward causal bf16 D64", "forward causal bf16 D128", "dq causal bf16 64 "])
def test_attention_is_register_clean_on_hopper(kernel):
    """As compiled here and now: no spill, and tensor cores."""
    (reading,) = compile_all([source for source in SOURCES if "attention" in source], ["sm_90a"], only=kernel)
    assert findings([reading], {}) == []
    assert reading.wgmma > 0


def test_what_auto_picks_of_attention_on_hopper_is_excused_nothing():
    """In 16 bits neither the forward nor dq may spill; dk and dv, and a table's gradient, are stated with a reason."""
    excused = {name for name, target in SPILLS if target == "sm_90a" and name.startswith("attention")}
    assert excused
    allowed = ("attention dkv", "attention dtable")
    assert {name for name in excused if "fp32" not in name and not name.startswith(allowed)} == set()
    assert all(SPILLS[name, "sm_90a"].bytes < 256 for name in excused if "fp32" not in name)


def test_compilations_are_few_enough_for_two_cores():
    """Each takes about a second and a half of one core."""
    script = "import importlib\nfrom potamos.kernels.aot import SOURCES\n"
    script += "found = [c for s in SOURCES for c in importlib.import_module(s).configurations()]\n"
    script += "print(sum(len(c.targets) for c in found))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert 400 < int(done.stdout) < 800


def test_check_ends_with_1_and_says_why(specimens, tmp_path, monkeypatch):
    readings = specimens[2]
    monkeypatch.setattr(check, "compile_all", lambda *a, only, **k: [r for r in readings if only in r.name])
    said: list[str] = []

    def run(**rest) -> int:
        said.clear()
        return check.check(say=said.append, **rest)

    assert run(tests=False, out=tmp_path / "table.csv") == 1
    assert sum(sentence.startswith("FAILED") for sentence in said) == 3
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert all(row["triton"] and row["date"] for row in rows)
    monkeypatch.setattr(check, "findings", lambda readings: [])
    assert run(tests=False) == 0
    monkeypatch.setattr(check, "run_tests", lambda native: False)
    assert run() == 1
    monkeypatch.setattr(check, "run_tests", lambda native: True)
    assert run() == 0
    assert run(only="no such name") == 1


def test_a_name_that_nothing_has_is_said(specimens, tmp_path):
    said: list[str] = []
    options: dict[str, Any] = {"sources": [str(specimens[0])], "cache": tmp_path, "say": said.append}
    assert check.check(only="no such name", tests=False, **options) == 1
    assert said == ["no configuration has 'no such name' in its name"]


def test_versions_of_packages_that_go_by_another_name(monkeypatch):
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert check.versions()["torch"] == torch.__version__
    assert check.versions()["triton"]


def test_run_tests_reports_failure_and_a_hang(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_mode():\n    assert os.environ['TRITON_INTERPRET'] == '1'\n"
    )
    assert check.run_tests(native=False, tests=tmp_path)
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert False\n")
    assert not check.run_tests(native=False, tests=tmp_path)
    (tmp_path / "test_it.py").write_text("import time\ndef test_it():\n    time.sleep(60)\n")
    assert not check.run_tests(native=False, tests=tmp_path, seconds=3)


def test_shares_run_every_test_once(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pathlib, pytest, torch\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_n(n):\n"
        "    assert torch.empty(1).device.type == 'meta'\n"
        "    pathlib.Path(__file__).with_name(f'ran_{n}').touch(exist_ok=False)\n"
    )
    for share in range(2):
        command = check.pytest_command(tmp_path, share, 2, "meta")
        assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
        ran = {0: ["ran_0", "ran_2"], 1: ["ran_0", "ran_1", "ran_2"]}[share]
        assert sorted(path.name for path in tmp_path.glob("ran_*")) == ran


@pytest.mark.parametrize(
    ("codes", "passed"), [([0, 0, 0], True), ([0, 5, 0], True), ([0, 1, 0], False), ([5, 5, 5], False)]
)
def test_every_share_must_pass(codes, passed, tmp_path, monkeypatch):
    """One that is left without a test has not failed, unless all are."""
    left = iter(codes)
    monkeypatch.setattr(check.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(check.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, next(left)))
    assert check.run_tests(native=True, tests=tmp_path) == passed
    assert list(left) == []


# --- timing -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so nothing is refused")
def test_without_a_gpu_bench_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "potamos.kernels.bench"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr == "error: no GPU that torch can use on this machine: nothing was tested or timed\n"


def test_a_machine_without_torch_is_told_so_in_one_line(tmp_path):
    """-S leaves the installed packages out; only the package's own link is on the path."""
    (tmp_path / "potamos").symlink_to(ROOT)
    command = [sys.executable, "-S", "-m", "potamos.kernels.bench"]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={"PYTHONPATH": str(tmp_path)}, cwd="/"
    )
    assert done.returncode != 0
    assert done.stderr == f"error: {sys.executable} has no torch: nothing was tested or timed\n"


def test_too_few_minutes_are_refused(monkeypatch):
    monkeypatch.setattr(bench, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(bench, "run_tests", lambda **options: pytest.fail("tested"))
    with pytest.raises(ValueError, match="3 minutes are too few"):
        bench.bench(minutes=3)


@pytest.mark.parametrize(("status", "says"), [(0, "No devices were found\n"), (0, ""), (9, "1, 2, 3, 4, 5")])
def test_a_driver_that_answers_strangely_leaves_its_columns_empty(status, says, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, status, says, ""))
    assert set(timing.state_of_gpu().values()) == {""}


def test_nothing_is_timed_when_a_test_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(bench, "run_tests", lambda native, seconds: False)
    monkeypatch.setattr(bench, "time_cells", lambda *a, **k: pytest.fail("timed in spite of a failed test"))
    said: list[str] = []
    assert bench.bench(out=tmp_path, say=said.append) == 1
    assert "FAILED" in said[0]
    assert not list(tmp_path.iterdir())


def test_cells_are_timed_in_both_directions():
    cells = [Cell(4, 100, 2), Cell(2, 130, 1, "long_conv")]
    device = torch.device("cpu")
    forms = {"rfft": 1, "chunked": 1}
    options: dict[str, Any] = {"dtype": torch.float32, "forms": forms, "seconds": 0.05, "say": lambda _: None}
    rows = bench.time_cells(cells, device, **options)
    assert [(r["width"], r["length"], r["direction"]) for r in rows] == [
        (cell.width, cell.length, way) for cell in cells for way in ("forward", "forward+backward")
    ]
    assert all(row["rfft_ms"] > 0 and row["floor_ms"] >= 0 for row in rows)
    assert [row["chunked_ms"] != "" for row in rows] == [True, True, False, False]
    assert all(float(row["error"]) < 1e-5 for row in rows[::2])
    packed, _ = bench.time_cells([Cell(2, 64, 1, documents="packed")], device, **options)
    assert (packed["operation"], packed["rfft_ms"]) == ("h3_mix, packed", "")
    assert packed["chunked_ms"] > 0
    late = bench.time_cells(cells[:1], device, deadline=-math.inf, forms={"rfft": 1}, say=lambda _: None)
    assert [row["rfft_ms"] for row in late] == ["", ""]


def test_documents_are_drawn_as_they_are_called():
    """The same cell without ids, with one document a row and with packed ones, whose mean length is 1,000 tokens."""
    drawn = {}
    for kind in ("", "one", "packed"):
        problem = Problem.draw(Cell(1, 50_000, 8, documents=kind), torch.device("cpu"), torch.float32)
        drawn[kind] = problem.document_ids
    assert drawn[""] is None
    assert drawn["one"].shape == (8, 50_000)
    assert not drawn["one"].any()
    begins = drawn["packed"].diff(dim=1)
    assert ((begins == 0) | (begins == 1)).all()
    assert 800 < begins.numel() / begins.sum() < 1250
    measured = {cell.documents for cell in bench.CELLS if (cell.width, cell.length) == (768, 8192)}
    assert measured >= {"", "one", "packed"}
    documents = Cell(2, 3000, 2, documents="packed")
    problem = Problem.draw(documents, torch.device("cpu"), torch.float32)
    with_ids = problem.mixer("torch")[0]()
    problem.document_ids = None
    assert not torch.equal(with_ids, problem.mixer("torch")[0]()), "the ids reach the mixer"


def test_the_fft_form_computes_the_mixer(assert_close):
    """Output and gradients of what the timings compare with; and that the comparison notices a shift by a token."""
    problem = Problem.draw(Cell(3, 200, 2), torch.device("cpu"), torch.float32)
    run, leaves = problem.rfft()
    mixer, all_leaves = problem.mixer("torch")
    y, want = run(), mixer()
    assert_close(y, want, 1e-5)
    with pytest.raises(AssertionError, match="relative rms"):
        assert_close(y.roll(1, 2), want, 1e-5)
    got = torch.autograd.grad(y, leaves, problem.grad)
    reference = torch.autograd.grad(want, all_leaves, problem.grad)
    for gradient, other in zip(got[:3], reference, strict=False):
        assert_close(gradient, other, 1e-5)


def test_the_long_kernel_is_the_sum_over_modes(assert_close):
    diag = Problem.draw(Cell(2, 4, 1), torch.device("cpu"), torch.float32).diagonal()
    a_bar, b_bar, c = (x.to(torch.complex128) for x in discretise(diag))
    powers = a_bar[:, None] ** torch.arange(150)[None, :, None]
    want = 2 * ((c * b_bar)[:, None] * powers).sum(-1).real
    assert_close(long_kernel(diag, 150), want, 1e-5)


def test_goals_are_answered_from_rows():
    """A table at exactly 0.35 ms forward, 1 ms both ways, and torch's rfft at 3.6 ms and 4.9 ms."""
    rows = []
    for length in (1024 * 2**n for n in range(8)):
        for direction, ours, theirs in (("forward", 0.35, 3.6), ("forward+backward", 1.0, 4.9)):
            row = {
                "operation": "h3_mix",
                "width": 768,
                "length": length,
                "direction": direction,
                "triton_ms": ours,
                "over_rfft": theirs / ours,
            }
            rows.append({**row, "saved_over_inputs": 1.2})
    for operation, length, ratio in (("h3_mix", 2**20, ""), *(("long_conv", n, 3.5) for n in (1024, 2048, 8192))):
        shape = {"operation": operation, "width": 768, "length": length}
        rows.append({**shape, "direction": "forward", "triton_ms": 3.0, "over_rfft": ratio})
    answers = {row["criterion"]: row["reached"] for row in goals.answer(rows)}
    assert answers["forward ms, L = 2K"] == "goal"
    assert answers["forward, slowest / fastest of L = 1K..32K"] == "goal"
    assert answers["forward, times faster than torch rfft, least of L = 1K..32K"] == "goal"
    assert answers["forward+backward, times faster than torch rfft, least"] == "none"
    assert answers["forward, times FlashFFTConv as published, L = 16K"] == "goal"  # 15.2 / 3.477 = 4.37
    assert answers["forward+backward / forward, most of L = 1K..32K"] == "goal"
    assert answers["saved for the backward / inputs"] == "must"
    assert answers["tokens of the longest row"] == "goal"
    assert answers["long_conv forward, times faster than torch rfft, least of L = 1K..8K"] == "must"
    assert all(row["measured"] == row["reached"] == "" for row in goals.answer([]))
    with (ROOT / "benchmarks" / "results" / "flash_conv_goals.csv").open() as file:
        bounds = [
            [row[name] for name in ("criterion", "is", "must", "goal", "moonshot")] for row in csv.DictReader(file)
        ]
    assert bounds == [list(row.values())[:5] for row in goals.answer([])]
    without_4k = [row for row in rows if row["length"] != 4096]
    assert {row["criterion"]: row["measured"] for row in goals.answer(without_4k)}[
        "forward, slowest / fastest of L = 1K..32K"
    ] == ""


@pytest.mark.parametrize(
    ("took", "memory", "tensor", "says"),
    [(1.0, 0.7, 0.2, "by bytes"), (1.0, 0.2, 0.7, "by tensor cores"), (1.0, 0.3, 0.2, "latency")],
)
def test_what_limits(took, memory, tensor, says):
    assert says in bench.limit(took, memory, tensor)


# --- a bare GPU machine -----------------------------------------------------------------------------------------------


def test_bench_imports_torch_and_the_standard_library_alone():
    script = "import sys; before = set(sys.modules); import torch, triton; outside = set(sys.modules)\n"
    script += "import potamos.kernels.bench; print(*sorted(set(sys.modules) - outside))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("potamos.")}
    assert {name.split(".")[1] for name in ours} == {"kernels"}
    rest = {name.split(".")[0] for name in done.stdout.split()} - {
        "potamos",
        "torch",
        "triton",
        *sys.stdlib_module_names,
    }
    assert rest == set()


def test_the_tests_of_the_gpu_import_only_what_its_image_has():
    """tests/conftest.py and tests/kernels/triton are run on a machine with torch, triton, numpy and pytest."""
    files = [ROOT / "tests" / "conftest.py", ROOT / "tests" / "harness.py", Path(__file__).with_name("conftest.py")]
    files += [ROOT / "parallel" / "__init__.py", ROOT / "parallel" / "local.py"]  # what the harness is
    files += sorted((ROOT / "tests" / "kernels" / "triton").glob("*.py"))
    assert len(files) > 3
    allowed = {"torch", "triton", "numpy", "pytest", *sys.stdlib_module_names}
    for path in files:
        text = path.read_text()
        skipped = {"hypothesis"} if 'pytest.importorskip("hypothesis")' in text else set()
        tree = ast.parse(text)
        if path == ROOT / "tests" / "conftest.py":  # its fixtures import what those tests need that take them
            tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                ours = name.startswith("potamos.kernels") or name == "potamos.parallel.local"
                assert ours or name.split(".")[0] in allowed | skipped, f"{path}: imports {name}"
