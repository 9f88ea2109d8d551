"""What attention is timed on: the forms of a case agree, operations are counted right, goals are answered from rows."""

from __future__ import annotations

import csv
import importlib.util
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from potamos.kernels import bench, bench_attention, goals, goals_attention
from potamos.kernels.attention.masks import Mask, documents_from_lengths
from potamos.kernels.bench_attention_cases import CELLS, WINDOW, AttentionCell, document_lengths, forms

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"
CASES = ["plain", "documents", "deberta", "alibi", "table", "rotary", "decode"]
SMALL = {"head_dim": 16, "length": 80, "rows": 2, "heads": 2}


def small(case: str) -> AttentionCell:
    return AttentionCell.of(case, **SMALL, causal="deberta" not in case, kv_heads=1 if case == "decode" else 2)


def quiet(_: str) -> None: ...


@pytest.mark.parametrize("case", CASES)
def test_the_forms_of_a_case_compute_one_thing(case, assert_close):
    """Outputs and gradients; a form shifted by one token is noticed."""
    cell = small(case)
    found = {name: form for name, form in forms(cell, CPU, torch.float32, "auto").items() if "cudnn" not in name}
    (first, *others) = found.values()
    want = first.compare(first.run())
    assert others
    for other in others:
        got = other.compare(other.run())
        assert_close(got, want, 1e-5)
        if case != "decode":  # of one query, nothing can be shifted
            with pytest.raises(AssertionError, match="relative rms"):
                assert_close(got.roll(1, -2), want, 1e-5)
        if case == "documents":  # padded leaves have other shapes
            continue
        grad = torch.randn_like(want)
        ours, theirs = (torch.autograd.grad(form.run(), form.leaves, grad) for form in (first, other))
        for x, y in zip(ours, theirs, strict=case != "table"):  # in memory, the table takes no gradient
            assert_close(y, x, 1e-5)


def test_hugging_faces_deberta_is_given_what_ours_is(assert_close):
    """The layer that benchmarks/deberta_attention.py times: output and every gradient, of hidden states, positions and
    projections."""
    pytest.importorskip("transformers", reason="the peer is Hugging Face's module")
    script = RESULTS.parent / "deberta_attention.py"
    spec = importlib.util.spec_from_file_location("deberta_attention", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours, theirs = module.layer_forms(small("deberta"), CPU, torch.float32, "auto").values()
    want, got = ours.run(), theirs.run()
    assert_close(got, want, 1e-5)
    with pytest.raises(AssertionError, match="relative rms"):
        assert_close(got.roll(1, 1), want, 1e-5)
    grad = torch.randn_like(want)
    pairs = (torch.autograd.grad(out, ours.leaves, grad) for out in (got, want))
    for x, y in zip(*pairs, strict=True):
        assert_close(x, y, 1e-5)


@pytest.mark.parametrize("case", ["plain", "documents", "window", "deberta", "decode"])
def test_operations_are_those_of_the_visible_pairs(case):
    cell = replace(small(case), length=WINDOW + 300)
    queries, offset = (1, cell.length - 1) if case == "decode" else (cell.length, 0)
    mask, rows = Mask(causal=cell.causal, query_offset=offset), cell.rows
    if case == "documents":
        tokens = cell.rows * cell.length
        lengths = torch.tensor(document_lengths(tokens))
        ids = documents_from_lengths(torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]), tokens)
        mask, rows, queries = Mask(query_documents=ids, key_documents=ids), 1, tokens
    if case == "window":
        mask = Mask(window=WINDOW)
    keys = queries if case == "documents" else cell.length
    pairs = rows * mask.visible(queries, keys, CPU).sum().item()
    # Half of a causal square leaves out half of its diagonal, 1 / length of it.
    assert cell.pairs == pytest.approx(pairs, rel=1e-3 if case in ("decode", "deberta") else 3e-3)
    assert cell.operations == 4 * cell.pairs * cell.heads * cell.head_dim


def test_documents_fill_their_tokens():
    lengths = document_lengths(16_384)
    assert lengths == document_lengths(16_384)
    assert sum(lengths) == 16_384
    assert len(lengths) > 8
    assert max(lengths) <= 4096
    assert min(lengths[:-1]) >= 128


def test_cells_are_timed_in_both_directions():
    cells = [small("plain"), small("rotary")]
    rows = bench_attention.time_cells(cells, CPU, dtype=torch.float32, backend="auto", seconds=0.01, say=quiet)
    measured = [(row["case"], row["form"], row["direction"]) for row in rows if row["ms"] != ""]
    ways = ("forward", "backward")
    assert measured == [
        *(("plain", form, way) for form in ("triton", "flash") for way in ways),
        *(("rotary", form, "forward") for form in ("triton", "torch")),
    ]
    assert all(row["over_floor"] > 0 and row["repeats"] >= 10 for row in rows if row["ms"] != "")
    assert [row["ms"] for row in rows if row["form"] == "cudnn"] == ["", ""], (
        "no such kernel on a CPU: said, not raised"
    )
    assert {float(row["error"]) < 1e-5 for row in rows if row["error"] != ""} == {True}
    said: list[str] = []
    assert bench_attention.time_cells(cells, CPU, deadline=-math.inf, say=said.append) == []
    assert sum("the time is up" in line for line in said) == 2


def test_what_is_wrong_is_seen_in_the_table():
    """The column of differences is no decoration: another function in the second form shows there."""
    cell = small("alibi")
    found = forms(cell, CPU, torch.float32, "auto")
    wrong = found["in memory"]._replace(compare=lambda out: out.roll(1, 2))
    both = {"triton": found["triton"], "in memory": wrong}
    rows = bench_attention.time_cells([cell], CPU, dtype=torch.float32, make=lambda *_: both, seconds=0.01, say=quiet)
    assert [float(row["error"]) > 0.1 for row in rows if row["error"] != ""] == [True]


def test_the_time_is_shared_and_a_case_that_does_not_run_fails(tmp_path, monkeypatch):
    deadlines: dict[str, float] = {}

    def mixer(*_: Any, deadline: float, say: Any) -> list:
        deadlines["flash_conv"] = deadline
        return []

    def attended(*_: Any, deadline: float, say: Any) -> list:
        deadlines["attention"] = deadline
        return bench_attention.time_cells([small("plain")], CPU, backend=backend, seconds=0.01, say=say)

    monkeypatch.setattr(bench, "gpu", lambda: CPU)
    monkeypatch.setattr(bench, "run_tests", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    monkeypatch.setattr(bench, "time_cells", mixer)
    monkeypatch.setattr(bench, "bench_attention", type("Stub", (), {"time_cells": staticmethod(attended)}))
    backend, now = "auto", time.monotonic()
    assert bench.bench(minutes=8, out=tmp_path, say=quiet) == 0
    assert deadlines["flash_conv"] - now == pytest.approx(230, abs=10)
    assert deadlines["attention"] - now == pytest.approx(460, abs=10)
    assert {path.name for path in tmp_path.iterdir()} == {
        "flash_conv_goals.csv",
        "attention.csv",
        "attention_goals.csv",
    }
    with (tmp_path / "attention.csv").open() as file:
        assert {row["device"] for row in csv.DictReader(file)} == {"none"}
    monkeypatch.setattr(bench_attention, "forward_of", lambda form: _refuse)
    said: list[str] = []
    assert bench.bench(minutes=8, out=tmp_path, operations=["attention"], say=said.append) == 1
    assert said[-1].startswith("FAILED")
    assert deadlines["attention"] - time.monotonic() == pytest.approx(460, abs=10)


def _refuse() -> torch.Tensor:
    raise RuntimeError("this kernel does not run")


# --- goals ------------------------------------------------------------------------------------------------------------


def table(**changes: float) -> list[dict[str, Any]]:
    """Rows of every cell at 300 TFLOP/s for ours, 290 for torch flash, 450 for cuDNN; others at twice our time."""
    rows = []
    rates = {"triton": 300.0, "flash": 290.0, "cudnn": 450.0, "padded flash": 150.0} | changes
    names = {
        "plain": ("flash", "cudnn"),
        "documents": ("padded flash",),
        "deberta": ("eager",),
        "deberta layer": ("hugging face",),
        "window": (),
    }
    names |= {"alibi": ("in memory",), "table": ("in memory",), "decode": ("flash",), "rotary": ("torch",)}
    for cell in CELLS:
        for form in ("triton", *names[cell.case]):
            for direction in ("forward", "backward"):
                rate = rates.get(form, 150.0)
                shape = {name: getattr(cell, name) for name in bench_attention.CELL_COLUMNS}
                extra = 0.9 if (form, direction) == ("triton", "backward") else ""
                values = {"ms": cell.operations / rate, "tflops": rate, "extra_over_lse_and_dq": extra}
                rows.append({**shape, "direction": direction, "form": form, **values})
    return rows


def answers(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["criterion"]: row["reached"] for row in goals.answer(rows, goals_attention.GOALS)}


def test_goals_are_answered_from_rows():
    found = answers(table())
    assert "" not in found.values(), "every goal has its rows among the cells"
    fast = "forward, causal, head 128, L >= 4K"
    assert found[f"{fast}: times torch flash"] == "must"
    assert found[f"{fast}: TFLOP/s"] == "none"
    assert found[f"{fast}: times torch cuDNN"] == "none"  # 300 / 450
    assert found["backward, head 64, L >= 4K: times torch flash"] == "goal"
    assert found["backward, head 64, L >= 4K, not causal: TFLOP/s"] == "goal"
    assert found["backward, head 128, L >= 4K, not causal: TFLOP/s"] == "none"
    assert found["memory beside outputs and gradients / (lse and dq in fp32), most"] == "must"
    assert found["window of 1K in 16K, forward: TFLOP/s as a share of plain causal"] == "must"
    faster = answers(table(triton=530.0))
    assert faster[f"{fast}: TFLOP/s"] == faster[f"{fast}: times torch cuDNN"] == "moonshot"
    assert answers(table(flash=301.0))[f"{fast}: times torch flash"] == "none"


def test_the_worst_length_counts_and_a_missing_one_leaves_the_answer_empty():
    rows = table(triton=410.0)
    fast = "forward, causal, head 128, L >= 4K"
    assert answers(rows)[f"{fast}: TFLOP/s"] == "goal"
    where = {"case": "plain", "head_dim": 128, "length": 8192, "causal": True, "direction": "forward", "form": "triton"}
    (slow,) = (row for row in rows if all(row[name] == value for name, value in where.items()))
    slow["tflops"] = 390.0
    assert answers(rows)[f"{fast}: TFLOP/s"] == "none"
    slow["tflops"] = slow["ms"] = ""
    assert answers(rows)[f"{fast}: TFLOP/s"] == answers(rows)[f"{fast}: times torch flash"] == ""
    assert answers(rows)["forward, causal, head 64, L >= 2K: TFLOP/s"] == "goal"


def test_the_committed_goals_are_these():
    empty = goals.answer([], goals_attention.GOALS)
    assert all(row["measured"] == row["reached"] == "" for row in empty)
    with (RESULTS / "attention_goals.csv").open() as file:
        names = ("criterion", "is", "must", "goal", "moonshot")
        bounds = [[row[name] for name in names] for row in csv.DictReader(file)]
    assert bounds == [list(row.values())[:5] for row in empty]


def test_cells_are_those_of_the_goals_and_come_first():
    assert len(CELLS) == len(set(CELLS))
    plain = {(cell.head_dim, cell.length, cell.causal) for cell in CELLS if cell.case == "plain"}
    lengths = (512, 1024, 2048, 4096, 8192, 16_384)
    assert plain == {(dim, length, causal) for dim in (64, 128, 256) for length in lengths for causal in (False, True)}
    last = max(i for i, cell in enumerate(CELLS) if cell.case != "plain")
    early = [row for row in table() if CELLS.index(_cell(row)) <= last]
    assert "" not in answers(early).values()


def _cell(row: dict[str, Any]) -> AttentionCell:
    return AttentionCell(**{name: row[name] for name in bench_attention.CELL_COLUMNS})


def test_cells_have_16k_tokens_and_2048_channels():
    for cell in CELLS:
        if cell.case == "plain":
            assert (cell.rows * cell.length, cell.heads * cell.head_dim) == (16_384, 2048)
