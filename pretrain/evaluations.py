"""Scores of several checkpoints of a run, side by side: ``RUN/evaluations.csv``, a row a checkpoint and data set.

Any number of processes may add rows at a time. A row is replaced by one of the same checkpoint, data, row length and
changes to the recipe, so an evaluation that is repeated leaves one row, and different ones stand beside each other.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from potamos.data.workfolder import Lock
from potamos.files import write_atomically
from potamos.pretrain.checkpoint import step_folders
from potamos.pretrain.evaluate import Score
from potamos.pretrain.runs import RunError, open_run, score_run
from potamos.slurm.run_folder import RunFolder

LOCK_SECONDS = 60.0


@dataclass(frozen=True, order=True)
class Evaluation:
    """One row. length: tokens of a row. changes: key=value changes to the recipe, with spaces between."""

    data: str
    length: int
    changes: str
    step: int
    bits_per_byte: float
    perplexity: float
    loss: float
    targets: int
    bytes: int

    @property
    def key(self) -> tuple[str, int, str, int]:
        return self.data, self.length, self.changes, self.step

    @classmethod
    def of(cls, step: int, data: str, length: int, changes: str, score: Score) -> Evaluation:
        figures = score.bits_per_byte, score.perplexity, score.loss, score.targets, score.bytes
        return cls(data, length, changes, step, *figures)


def table_path(run: str | os.PathLike[str]) -> Path:
    return RunFolder.of(run).path / "evaluations.csv"


def parse_steps(run: str | os.PathLike[str], text: str) -> list[int]:
    """The steps that ``all`` or ``100,200`` stand for, in order, each once.

    Raises:
        RunError: no number, or no checkpoint of that step; names those that there are.
    """
    folder = RunFolder.of(run)
    known = sorted(step_folders(folder.checkpoints))
    if not known:
        raise RunError(f"{folder.path} holds no checkpoint; train it first: potamos train RECIPE --run {folder.path}")
    if text.strip() == "all":
        return known
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise RunError(f"--steps {text}: write `all`, or steps with commas between, as in {known[0]},{known[-1]}")
    steps = sorted({int(word) for word in words})
    if missing := [step for step in steps if step not in known]:
        raise RunError(
            f"{folder.path} holds no checkpoint of step {', '.join(map(str, missing))}; there are those of steps "
            f"{', '.join(map(str, known))}"
        )
    return steps


def evaluate_steps(
    run: str | os.PathLike[str],
    steps: Iterable[int],
    *,
    data: str | os.PathLike[str] | None = None,
    length: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    done: Callable[[int], None] = lambda step: None,
) -> list[Evaluation]:
    """Score each checkpoint as `score_run` does, and add its rows to the run's table as soon as they are there.

    Raises what `open_run`, `score_run` and `add_rows` raise; the rows before are in the table then.
    """
    found = []
    for step in steps:
        opened = open_run(run, step=step, device=device, overrides=overrides)
        scores = score_run(opened, data, length=length)
        tokens = _row_tokens(length, opened.recipe.data.sequence_length)
        rows = [Evaluation.of(step, name, tokens, " ".join(overrides), score) for name, score in scores.items()]
        add_rows(table_path(run), rows)
        found += rows
        done(step)
    return sorted(found)


def _row_tokens(length: str | None, trained: int) -> int:
    """Tokens of a row, of a length that `score_run` has accepted."""
    if length is None:
        return trained
    return int(length[:-1]) * trained if length.endswith("x") else int(length)


def read_rows(path: Path) -> list[Evaluation]:
    """The rows of a table, none where there is no file.

    Raises:
        RunError: it is no table of evaluations.
    """
    columns = fields(Evaluation)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        kinds = {"str": str, "int": int, "float": float}
        return [Evaluation(**{c.name: kinds[str(c.type)](line[c.name]) for c in columns}) for line in lines]
    except FileNotFoundError:
        return []
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RunError(f"{path} is no table of evaluations ({error!r}); move it away") from None


def add_rows(path: Path, rows: Iterable[Evaluation]) -> None:
    """Put rows into the table in place of those with the same key, whoever else does the same.

    Raises:
        RunError: the table is locked for a minute, or is none.
        DatasetError: the file system has no locks.
    """
    with Lock(path.with_name(f".{path.name}.lock")).holding(wait=LOCK_SECONDS) as turn:
        if not turn:
            raise RunError(f"{path} was locked by another process for {LOCK_SECONDS:.0f} s; end that one")
        table = {row.key: row for row in [*read_rows(path), *rows]}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.name for column in fields(Evaluation)])
        writer.writerows([getattr(row, column.name) for column in fields(row)] for row in sorted(table.values()))
        write_atomically(path, text.getvalue().encode())
