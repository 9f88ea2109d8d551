"""Sweeps: which runs arguments make, what their folders are called, and the table of what became of them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.pretrain import board, sweeps
from potamos.pretrain.config import to_yaml
from potamos.pretrain.recipe_file import read_document
from potamos.pretrain.records import RecordWriter
from potamos.pretrain.submission import Asked
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.script import script
from potamos.slurm.site import Site
from potamos.slurm.sweep import LONGEST_NAME, SweepError, columns, leaves, points, results, to_csv

ODD = 'it\'s "odd"\n\x1b[31m'

# --- drawing up -----------------------------------------------------------------------------------------------------


def test_every_combination_in_the_order_of_the_arguments():
    fixed, found = points(["optimizer.lr=[1e-3, 3e-4]", "train.steps=100", "train.seed=[1,2,3]"])
    assert fixed == ["train.steps=100"]
    assert [point.overrides for point in found] == [
        (f"optimizer.lr={lr}", f"train.seed={seed}") for lr, seed in itertools.product(("1e-3", "3e-4"), (1, 2, 3))
    ]
    assert [point.name for point in found][:2] == ["lr=1e-3_seed=1", "lr=1e-3_seed=2"]


def test_values_are_passed_on_as_they_are_written():
    """So that the recipe's own reader decides what they are: `no` is text there, and 1e-3 a number."""
    text = "model.mixer=[{kind: h3, state: 4}, {kind: attention, heads: 2}]"
    assert [p.overrides for p in points([text])[1]] == [
        ("model.mixer={kind: h3, state: 4}",), ("model.mixer={kind: attention, heads: 2}",),
    ]  # fmt: skip
    assert [p.overrides for p in points(["a=[no, 012, 1_0, '[x]', \"y, z\", ~]"])[1]] == [
        ("a=no",), ("a=012",), ("a=1_0",), ("a='[x]'",), ('a="y, z"',), ("a=~",),
    ]  # fmt: skip
    assert [p.overrides for p in points(["data.skip=[[[0, 100]], []]"])[1]] == [
        ("data.skip=[[0, 100]]",),
        ("data.skip=[]",),
    ]


def test_names_of_folders():
    names = [p.name for p in points(["a.lr=[1, 2]", "b.lr=['x y/../$(z)', \"it's\"]", "c.d=[{k: v}, {}]"])[1]]
    assert names[:3] == ["a.lr=1_b.lr=x-y-..-z_d=k-v", "a.lr=1_b.lr=x-y-..-z_d=", "a.lr=1_b.lr=it-s_d=k-v"]
    same = [p.name for p in points(["a=['x y', x-y, 'X-Y']"])[1]]  # some file systems take x-y and X-Y for one
    assert len({name.casefold() for name in same}) == 3
    assert all(name.casefold().startswith("a=x-y-") for name in same)
    assert {p.name[:6].casefold() for p in points(["a=[x-y, X-Y]"])[1]} == {"a=x-y-"}
    long = [p.name for p in points([f"a=[{'x' * 300}, {'x' * 300}y]"])[1]]
    assert len(set(long)) == 2
    assert max(map(len, long)) < LONGEST_NAME + 10
    assert [p.name for p in points(["a=[../x, ~]"])[1]] == ["a=..-x", "a="]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=2, max_size=4, unique=True))
def test_any_text_makes_a_plain_name_and_comes_back(values: list[str]):
    argument = f"model.name={json.dumps(values)}"
    _, found = points([argument])
    assert len(found) == len(values)
    assert len({point.name.casefold() for point in found}) == len(values)
    for point, value in zip(found, values, strict=True):
        assert set(point.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+=-_")
        assert point.name not in (".", "..")
        assert point.name[0] not in ".-"
        key, _, text = point.overrides[0].partition("=")
        assert (key, json.loads(text)) == ("model.name", value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.steps=3"], "nothing varies"),
        ([], "nothing varies"),
        (["a=[]"], "write [[]]"),
        (["a=[1, 2, 1]"], "1 stands there twice"),
        (["a=[1, 2]", "a=[2, 3]"], "varied twice"),
        (["data.stages=[{from: 0}]"], "write data.stages={from: 0}, or [[...]] to set a list"),
        (["a=[1, 2"], "a=[1, 2: not valid YAML"),
        ([f"a={list(range(40))}", f"b={list(range(40))}"], "40 x 40 are 1600 runs; at most 1000"),
    ],
)
def test_what_is_no_sweep(arguments: list[str], words: str):
    with pytest.raises(SweepError) as error:
        points(arguments)
    assert words in str(error.value)


def asked(*overrides: str, **other: Any) -> Asked:
    return Asked("h3_hybrid_tiny", overrides, **other)


def test_a_job_of_a_sweep(tmp_path: Path):
    found = sweeps.resolve(asked("optimizer.lr=[1e-3,3e-4]", "train.seed=[1,2]", run=tmp_path / "s"), Site(), most=3)
    assert (found.job.array, found.job.tasks) == ("0-3%3", (0, 1, 2, 3))
    assert [run.name for run in found.job.runs] == [
        "lr=1e-3_seed=1", "lr=1e-3_seed=2", "lr=3e-4_seed=1", "lr=3e-4_seed=2",
    ]  # fmt: skip
    assert [(r.optimizer.lr, r.train.seed) for r in found.recipes] == [(1e-3, 1), (1e-3, 2), (3e-4, 1), (3e-4, 2)]
    assert all(os.path.isabs(recipe.tokenizer.path) for recipe in found.recipes)
    assert f"RUNS=({' '.join(map(str, found.job.runs))})" in script(found.job)
    plain = sweeps.resolve(asked("train.seed=[1,2]"), Site())
    assert (plain.job.array, plain.job.folder) == ("0-1", Path.cwd() / "runs" / "h3_hybrid_tiny-sweep")


def test_what_runs_of_a_sweep_have_in_common():
    with pytest.raises(SweepError, match=r"slurm\.nodes: all runs of a sweep have it in common"):
        sweeps.resolve(asked("slurm.nodes=[1,2]"), Site())
    with pytest.raises(ValueError, match="did you mean `lr`"):
        sweeps.resolve(asked("optimizer.lrr=[1,2]"), Site())


# --- the table ------------------------------------------------------------------------------------------------------


def make(
    folder: Path, recipe: str, loss: float | None = None, scores: dict[str, Any] | None = None, step: int = 60
) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    if loss is not None:
        state = {"attempt": 0, "step": step, "total_steps": 60, "loss": loss, "tokens_per_second": 1234.5, "eta": 0.0}
        (folder / "state.json").write_text(
            json.dumps(state | {"reason": "finished", "updated": "2026-11-22T10:00:00+00:00"})
        )
        (folder / "done.json").write_text('{"step": 60}')
    if scores is not None:
        writer = RecordWriter(folder, 0)
        writer.write("train", 10, 40, 1000, {"loss": 3.0})
        writer.write("validation", 30, 120, 3000, {f"{name}/bits_per_byte": 9.0 for name in scores})
        for name, value in scores.items():
            writer.write("validation", 60, 240, 6000, {f"{name}/bits_per_byte": value, f"{name}/loss": 1.0})
        writer.close()
    return folder


def recipe(lr: float, seed: int, extra: str = "") -> str:
    return f"name: x\noptimizer: {{kind: adamw, lr: {lr}}}\ntrain: {{steps: 60, seed: {seed}}}\nlist: [1, 2]\n{extra}"


def test_best_first_and_what_differs(tmp_path: Path):
    make(tmp_path / "s" / "worse", recipe(0.1, 1), 2.0, {"wiki": 1.5})
    make(tmp_path / "s" / "better", recipe(0.2, 1), 3.0, {"wiki": 1.25})
    make(tmp_path / "s" / "lost", recipe(0.3, 1), float("nan"), {"wiki": float("nan")})
    make(tmp_path / "s" / "waiting", recipe(0.4, 1, "other: {}\n"))
    rows = results([tmp_path / "s"])
    assert [row.status.folder.name for row in rows] == ["better", "worse", "lost", "waiting"]
    assert dict(columns(rows)) == {
        "run": ["better", "worse", "lost", "waiting"],
        "lr": ["0.2", "0.1", "0.3", "0.4"],
        "other": ["", "", "", "[]"],
        "state": ["finished", "finished", "finished", "prepared"],
        "step": ["60", "60", "60", ""],
        "loss": ["3.0000", "2.0000", "nan", ""],
        "bits/byte": ["1.2500", "1.5000", "nan", ""],
        "tokens/s": ["1234", "1234", "1234", ""],
    }


def test_csv_holds_odd_names_and_whole_numbers(tmp_path: Path):
    make(tmp_path / ODD, recipe(0.1, 1, "note: 'a,b\"c'\n"), 1 / 3, {"wiki": 1 / 7, "books, old": 2.0})
    make(tmp_path / "plain", recipe(0.1, 2), 0.5, {"wiki": 0.1})
    found = list(csv.DictReader(io.StringIO(to_csv(results([tmp_path])))))
    assert [row["run"] for row in found] == ["plain", ODD]
    assert float(found[1]["wiki/bits_per_byte"]) == 1 / 7
    assert float(found[1]["loss"]) == 1 / 3
    assert (found[1]["note"], found[0]["note"], found[1]["books, old/bits_per_byte"]) == ('a,b"c', "", "2.0")
    assert found[1]["folder"] == str(tmp_path / ODD)


def test_damaged_files_make_empty_cells(tmp_path: Path):
    make(tmp_path / "a", "{", 1.0).joinpath("logs").mkdir()
    (tmp_path / "a" / "logs" / "metrics.jsonl").write_bytes(
        b'{"kind": "validation"\n["validation"]\n\xff"validation"\n'
    )
    make(tmp_path / "b", recipe(0.1, 1), 2.0)
    rows = results([tmp_path])
    assert [row.scores for row in rows] == [{}, {}]
    assert rows[0].values["optimizer.lr"] == ""


def test_hundreds_of_runs_are_read_in_a_moment(tmp_path: Path):
    for k in range(300):
        make(tmp_path / f"r{k}", recipe(k / 1000, k), 1.0 + k, {"wiki": 1.0 + k})
    began = time.perf_counter()
    assert len(results([tmp_path])) == 300
    assert time.perf_counter() - began < 10


def test_leaves_are_the_values_as_written(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(recipe(0.001, 1, "deep: {x: [{y: no}, {y: 0o7}], e: [], f: {}}\n"))
    found = leaves(tmp_path / "r.yaml")
    assert found["optimizer.lr"] == "0.001"
    assert (found["deep.x.0.y"], found["deep.x.1.y"], found["deep.e"], found["deep.f"]) == ("no", "0o7", "[]", "[]")
    tree = read_document((tmp_path / "r.yaml").read_text(), "r").tree
    assert set(found) >= {"name", "list.0", "list.1"} <= {*found, *tree}


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_status_of_runs_with_odd_names(tmp_path: Path, potamos: Callable[..., Any], no_slurm: None):
    make(tmp_path / "runs" / ODD, recipe(0.1, 1), 1.5)
    make(tmp_path / "runs" / "[bold]x", recipe(0.1, 1))
    shown = potamos("status", tmp_path / "runs")
    assert shown.status == 0
    assert "\x1b" not in shown.out
    assert 'it\'s "odd"\\n\\x1b[31m' in shown.out.replace("\n", "")
    assert "[bold]x" in shown.out
    told = json.loads(potamos("status", tmp_path / "runs", "--json").out)
    assert [(each["name"], each["state"], each["step"]) for each in told] == [
        ("[bold]x", "prepared", None), (ODD, "finished", 60),
    ]  # fmt: skip
    missing = potamos("status", tmp_path / "none")
    assert (missing.status, missing.out) == (2, "")
    assert "there is no folder" in missing.err


def test_the_table_as_a_command(tmp_path: Path, potamos: Callable[..., Any], no_slurm: None):
    make(tmp_path / "a", recipe(0.1, 1), 1.5, {"wiki": 1.25})
    make(tmp_path / "b", recipe(0.2, 1), 1.5, {"wiki": 1.0})
    shown = potamos("status", tmp_path, "--table", "--csv", tmp_path / "t.csv")
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines == [
        ["run", "lr", "state", "step", "loss", "bits/byte", "tokens/s"],
        ["b", "0.2", "finished", "60", "1.5000", "1.0000", "1234"],
        ["a", "0.1", "finished", "60", "1.5000", "1.2500", "1234"],
    ]
    assert (tmp_path / "t.csv").read_text() == to_csv(results([tmp_path]))


def test_logs_as_a_command(tmp_path: Path, potamos: Callable[..., Any], no_slurm: None):
    run = make(tmp_path / ODD.replace("\n", ""), recipe(0.1, 1), 1.5)
    (run / "logs").mkdir()
    (run / "logs" / "attempt-0.rank-0.txt").write_bytes(b"1\n2\n\xff3\n")
    assert potamos("logs", run, "-n", "2").out.encode(errors="surrogateescape").endswith(b"3\n")
    followed = potamos("logs", run, "-f")  # of a run that is finished: to its end
    assert followed.status == 0
    assert followed.out.startswith("1\n2\n")
    assert followed.err.rstrip().endswith("finished at step 60")
    wrong = potamos("logs", run, "--rank", "3")
    assert (wrong.status, wrong.out) == (2, "")
    assert "there are ranks 0" in wrong.err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (None, 0)])
def test_following_ends_cleanly(tmp_path: Path, no_slurm: None, number: int | None, status: int):
    """By Ctrl-C, or because whoever reads has seen enough."""
    run = make(tmp_path / "x", recipe(0.1, 1))
    (run / "state.json").write_text('{"reason": "running"}')
    (run / "attempts.jsonl").write_text('{"event": "submitted", "jobs": ["12"], "at": ""}\n')
    (run / "logs").mkdir()
    (run / "logs" / "attempt-0.rank-0.txt").write_text("a\n" * 10)
    command = [sys.executable, "-m", "potamos.pretrain.cli", "logs", str(run), "-f"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline() == b"a\n"
    if number is not None:
        child.send_signal(number)
    else:
        child.stdout.close()
        with open(run / "logs" / "attempt-0.rank-0.txt", "a") as file:
            file.write("b\n" * 100_000)
    said = child.stderr.read().decode()
    assert child.wait(60) == status, said
    assert "Traceback" not in said
    assert "Exception" not in said


def test_commands_without_slurm_end_with_one_message(tmp_path: Path, potamos: Callable[..., Any], no_slurm: None):
    run = make(tmp_path / "x", recipe(0.1, 1))
    (run / "attempts.jsonl").write_text('{"event": "submitted", "jobs": ["12"], "at": ""}\n')
    for command in ("cancel", "requeue"):
        done = potamos(command, run)
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith("error: no Slurm here")
        assert len(done.err.splitlines()) == 1
    assert not (run / "cancelled").exists()
    assert "is not known: no Slurm here" in potamos("status", run).err


def test_a_dry_run_lists_the_runs(tmp_path: Path, potamos: Callable[..., Any], no_slurm: None):
    done = potamos(
        "sweep", "h3_hybrid_tiny", "optimizer.lr=[1e-3,3e-4]", "train.seed=[1,2]", "model.layers=2", "--dry-run",
        "--run", tmp_path / "s", "--max-parallel", "2", "--time", "5",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "#SBATCH --array=0-3%2" in done.out
    assert "lr=3e-4_seed=2: optimizer.lr=3e-4 train.seed=2" in done.err
    assert not (tmp_path / "s").exists()


def test_a_board_shows_runs_by_their_names(tmp_path: Path):
    for name in ("a", "sweep/lr=1_w=2", ODD.replace("\n", "")):
        make(tmp_path / "runs" / name, recipe(0.1, 1)).joinpath("tensorboard").mkdir()
    make(tmp_path / "runs" / "without", recipe(0.1, 1))
    links = tmp_path / "links"
    links.mkdir()
    assert board.link(tmp_path / "runs", links) == 3
    make(tmp_path / "runs" / "later", recipe(0.1, 1)).joinpath("tensorboard").mkdir()
    assert board.link(tmp_path / "runs", links) == 4
    found = {str(path.relative_to(links)): path.resolve() for path in links.rglob("*") if path.is_symlink()}
    assert found == {
        name: tmp_path / "runs" / name / "tensorboard"
        for name in ("a", "sweep/lr=1_w=2", "later", ODD.replace("\n", ""))
    }
    assert board.link(tmp_path / "runs" / "a", tmp_path / "links2") == 1
    with pytest.raises(board.BoardError, match="no run in"), board.opened(tmp_path / "runs" / "without"):
        pass
    assert "-L 6007:localhost:6007 " in board.tunnel("http://localhost:6007/")


# --- a real Slurm ---------------------------------------------------------------------------------------------------

# Stands for the interpreter on the nodes: "trains" at once what its recipe says.
TRAINER = """#!/bin/bash
case " $* " in *" potamos.pretrain.cli "*) ;; *) exec {python} "$@" ;; esac
seed=$(sed -n 's/.*seed: \\([0-9]*\\).*/\\1/p' recipe.yaml | head -n1)
echo '{{"attempt": 0, "step": 9, "total_steps": 9, "loss": '$seed.5', "reason": "finished"}}' > state.json
echo '{{"step": 9}}' > done.json
"""


def test_a_sweep_is_submitted_and_tabled(
    cluster, slurm_folder: Path, trial: Any, potamos: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    trainer = slurm_folder / "at once"
    trainer.write_text(TRAINER.format(python=sys.executable))
    trainer.chmod(trainer.stat().st_mode | stat.S_IXUSR)
    site = slurm_folder / "site.yaml"
    site.write_text(f"python: {json.dumps(str(trainer))}\n")
    monkeypatch.setenv("POTAMOS_SITE", str(site))
    folder = slurm_folder / "it's swept"
    recipe_file = slurm_folder / "swept.yaml"
    recipe_file.write_text(to_yaml(trial.recipe()))
    done = potamos("sweep", recipe_file, "train.seed=[3,1,2]", "train.steps=9", "--run", folder, "--max-parallel", "2")
    assert done.status == 0, done.err
    deadline = time.monotonic() + 120
    while cluster.run("squeue", "-h"):
        assert time.monotonic() < deadline, potamos("status", folder).out
        time.sleep(0.1)
    table = [line.split() for line in potamos("status", folder, "--table").out.splitlines()]
    assert [line[:5] for line in table[1:]] == [[f"seed={k}", f"{k}", "finished", "9", f"{k}.5000"] for k in (1, 2, 3)]
    assert RunFolder(folder / "seed=1").job.exists()
