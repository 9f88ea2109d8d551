"""Several checkpoints side by side: each row equals a single evaluation, and rows of several processes all stay."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potamos.pretrain.evaluations import Evaluation, add_rows, evaluate_steps, parse_steps, read_rows, table_path
from potamos.pretrain.runs import RunError, open_run, score_run


@pytest.fixture(scope="module")
def run(trial: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the steps 4, 8 and 12, and two validation sets."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    data = trial.folder
    sets = f"data.validation=[{{path: {data / 'held_out'}, name: far}}, {{path: {data / 'train'}, name: near}}]"
    trial.fit(folder, "train.steps=12", "checkpoint={every: 4, keep: 3}", sets)
    return folder


@pytest.fixture(autouse=True)
def _without_table(run: Path) -> None:
    table_path(run).unlink(missing_ok=True)


def expected(run: Path, step: int, **options: Any) -> dict[str, tuple[float, ...]]:
    overrides = options.pop("overrides", ())
    scores = score_run(open_run(run, step=step, overrides=overrides), **options)
    return {n: (s.bits_per_byte, s.perplexity, s.loss, s.targets, s.bytes) for n, s in scores.items()}


def figures(row: Evaluation) -> tuple[float, ...]:
    return row.bits_per_byte, row.perplexity, row.loss, row.targets, row.bytes


def test_a_table_holds_what_single_evaluations_say(run: Path, potamos: Callable[..., Any]) -> None:
    done = potamos("evaluate", run, "--steps", "all")
    assert done.status == 0, done
    rows = read_rows(run / "evaluations.csv")
    assert [(row.data, row.step) for row in rows] == [(n, step) for n in ("far", "near") for step in (4, 8, 12)]
    for row in rows:
        assert figures(row) == expected(run, row.step)[row.data]
        assert (row.length, row.changes) == (32, "")
    header, *lines = done.out.splitlines()
    assert header.split() == ["data", "step", "bits/byte", "perplexity", "loss", "targets"]
    far = rows[1]
    assert lines[1].split() == [
        "far", "8", f"{far.bits_per_byte:.4f}", f"{far.perplexity:.2f}", f"{far.loss:.4f}", f"{far.targets:,}"
    ]  # fmt: skip
    assert [row.step for row in rows] != sorted(row.loss for row in rows)
    assert done.err.splitlines() == [f"{run} at step {step}" for step in (4, 8, 12)] + [f"kept in {table_path(run)}"]
    assert (run / "evaluations.csv").read_text().splitlines()[0] == (
        "data,length,changes,step,bits_per_byte,perplexity,loss,targets,bytes"
    )


def test_an_evaluation_of_another_kind_has_rows_of_its_own(run: Path, trial: Any) -> None:
    evaluate_steps(run, [8])
    evaluate_steps(run, [8], length="2x")
    evaluate_steps(run, [8], length="64", overrides=["data.boundaries=cross"])
    evaluate_steps(run, [8], data=trial.folder / "held_out", length="64")
    again = evaluate_steps(run, [8], length="64")
    rows = read_rows(table_path(run))
    name = str(trial.folder / "held_out")
    assert [(row.data, row.length, row.changes) for row in rows] == sorted(
        [(n, 32, "") for n in ("far", "near")]
        + [(n, 64, c) for n in ("far", "near") for c in ("", "data.boundaries=cross")]
        + [(name, 64, "")]
    )
    assert {row.data: figures(row) for row in again} == expected(run, 8, length=64)
    crossing = {row.data: figures(row) for row in rows if row.changes}
    assert crossing == expected(run, 8, length=64, overrides=["data.boundaries=cross"])
    assert crossing["far"] != {row.data: figures(row) for row in again}["far"]


ROW = Evaluation("far", 32, "", 4, 1.25, 3.5, 0.1 + 0.2, 7, 40)


def test_rows_are_replaced_by_key_and_keep_every_bit(tmp_path: Path) -> None:
    table = tmp_path / "evaluations.csv"
    odd = replace(ROW, data='a "quoted", name\nof two lines é', changes="model.pattern={kind: blockwise, size: 4}")
    endless = replace(ROW, step=5, bits_per_byte=math.inf, perplexity=1e300)
    add_rows(table, [ROW, odd])
    add_rows(table, [replace(ROW, loss=1.0), endless])
    assert read_rows(table) == sorted([replace(ROW, loss=1.0), odd, endless])
    add_rows(table, [ROW])
    assert read_rows(table) == sorted([ROW, odd, endless])
    assert read_rows(tmp_path / "none.csv") == []


def test_processes_that_add_at_a_time_lose_no_row(tmp_path: Path, run_ranks: Any) -> None:
    table = tmp_path / "evaluations.csv"

    def add(rank: int, world: int) -> None:
        for step in range(rank, 60, world):
            add_rows(table, [replace(ROW, step=step)])

    run_ranks(4, add, init=False)
    assert [row.step for row in read_rows(table)] == list(range(60))
    assert sorted(os.listdir(tmp_path)) == [".evaluations.csv.lock", "evaluations.csv"]


@pytest.mark.parametrize(
    "text", ["step,loss\n4,1.0\n", "data,length,changes,step,bits_per_byte,perplexity,loss,targets,bytes\nfar,x,,4\n"]
)
def test_a_foreign_table_is_not_written_over(text: str, tmp_path: Path) -> None:
    table = tmp_path / "evaluations.csv"
    table.write_text(text)
    with pytest.raises(RunError, match=r"evaluations.csv is no table of evaluations .*; move it away"):
        add_rows(table, [ROW])
    assert table.read_text() == text


def test_what_steps_stand_for(run: Path) -> None:
    assert parse_steps(run, "all") == [4, 8, 12]
    assert parse_steps(run, "12, 4,12") == [4, 12]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "4,5,6"], ["no checkpoint of step 5, 6", "steps 4, 8, 12"]),
        (["--steps", "last"], ["--steps last", "4,12"]),
        (["--steps", "-4"], ["--steps -4"]),
        (["--steps", "4,"], ["--steps 4,"]),
        (["--steps", "all", "--step", "4"], ["--step 4 and --steps all", "one of them"]),
        (["--slurm", "2"], ["--slurm 2", "--steps all"]),
        (["--steps", "all", "--gpus", "1"], ["--gpus", "--slurm N"]),
        (["--steps", "all", "--length", "none"], ["'none'", "4x"]),
        (["--steps", "all", "model.width=64"], ["does not fit", "model.width=64"]),
    ],
)
def test_mistakes(arguments: list[str], words: list[str], run: Path, potamos: Callable[..., Any]) -> None:
    done = potamos("evaluate", run, *arguments)
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert [word for word in words if word not in done.err] == [], done.err
    assert not table_path(run).exists()


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no checkpoint; train it first: potamos train RECIPE --run"):
        parse_steps(tmp_path, "all")


def test_rows_before_a_damaged_checkpoint_stay(run: Path, trial: Any, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for file in (copy / "checkpoints" / "step-00000008" / "model").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="step-00000008"):
        evaluate_steps(copy, [4, 8, 12])
    assert {row.step for row in read_rows(table_path(copy))} == {4}
