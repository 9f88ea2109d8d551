"""Sweeps: a run for each combination of values, and a table of what became of them.

The table needs nothing of the sweep but its run folders: what they were told differently, their recipes say. So it
serves any folder of runs.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from potamos.slurm.run_folder import RunFolder
from potamos.slurm.status import Status, find_runs, printable, statuses

MOST_RUNS = 1000  # of an array: Slurm's MaxArraySize is 1001 unless the cluster raised it
LONGEST_NAME = 100  # of a run folder; file systems end at 255 bytes
_UNSAFE = re.compile(r"[^A-Za-z0-9.+=-]+")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it


class SweepError(ValueError):
    """A sweep that cannot be drawn up. Names the argument, and what would do."""


# --- drawing up -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the name of its folder, and what it changes of the recipe (`key=value`)."""

    name: str
    overrides: tuple[str, ...]


def points(arguments: Sequence[str]) -> tuple[list[str], list[Point]]:
    """What the arguments change in every run, and the runs: every combination of the values of lists.

    ``optimizer.lr=[1e-3, 3e-4]`` makes two runs. A setting that is itself a list stands in another:
    ``data.skip=[[[0, 100]], []]`` makes two as well.

    Raises:
        SweepError: nothing varies, a list holds one value or one twice, or there are too many runs.
    """
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        values = _items(key, text) if equals else None
        if values is None:
            fixed.append(argument)
        elif key in axes:
            raise SweepError(f"{key}: varied twice; name all its values in one list")
        else:
            axes[key] = values
    if not axes:
        raise SweepError("nothing varies; give a list of values, as in optimizer.lr=[1e-3,3e-4]")
    count = math.prod(map(len, axes.values()))
    if count > MOST_RUNS:
        raise SweepError(
            f"{' x '.join(str(len(values)) for values in axes.values())} are {count} runs; at most {MOST_RUNS}"
        )
    labels = _labels(list(axes))
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = _name({labels[key]: value for key, value in chosen.items()})
        found.append(Point(name, tuple(f"{key}={value}" for key, value in chosen.items())))
    return fixed, _told_apart(found)


def _items(key: str, text: str) -> list[str] | None:
    """The items of a list, each as it is written; None for a value that is no list."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise SweepError(f"{key}={text}: not valid YAML: {' '.join(problem.split())}") from None
    if not isinstance(node, yaml.SequenceNode):
        return None
    items = [text[item.start_mark.index : item.end_mark.index].strip() for item in node.value]
    if not items:
        raise SweepError(f"{key}={text}: an empty list makes no run; to set an empty list write [[]]")
    if len(items) == 1:  # more likely a setting that is a list than a sweep of one run
        raise SweepError(f"{key}={text}: one value does not vary; write {key}={items[0]}, or [[...]] to set a list")
    if twice := next((item for item in items if items.count(item) > 1), None):
        raise SweepError(f"{key}={text}: {twice} stands there twice")
    return items


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key, or the whole key where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def _name(chosen: Mapping[str, str]) -> str:
    """A folder's name that no shell, path or list of mounts reads as anything else: `lr=1e-3_width=64`."""

    def plain(text: str) -> str:
        return _UNSAFE.sub("-", text).strip("-")

    return "_".join(f"{plain(key)}={plain(value)}" for key, value in chosen.items())


def _told_apart(found: Sequence[Point]) -> list[Point]:
    """Names that are too long, or that two points share, end in a hash of what they stand for."""
    names = [point.name.casefold() for point in found]  # some file systems take these for equal
    return [
        Point(f"{point.name[:LONGEST_NAME]}-{_hash(point)}", point.overrides)
        if names.count(point.name.casefold()) > 1 or len(point.name) > LONGEST_NAME
        else point
        for point in found
    ]


def _hash(point: Point) -> str:
    return hashlib.sha256("\0".join(point.overrides).encode()).hexdigest()[:8]


# --- results --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A run in the table: what is its own among its recipe's values, how it stands, and its newest scores.

    ``values`` are as the recipes have them, empty where a recipe lacks the key. ``scores``: bits per byte of each
    validation dataset.
    """

    status: Status
    values: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


def results(folders: Iterable[str | os.PathLike[str]], tell: Callable[[str], None] | None = None) -> list[Row]:
    """The runs in and below these folders, best first: by their bits per byte, else by their training loss.

    Args:
        tell: is told why Slurm could not be asked, if there was anything to ask it.

    Raises:
        StatusError: a folder does not exist.
    """
    runs = find_runs(folders)
    recipes = [leaves(RunFolder(run).recipe) for run in runs]
    keys = sorted({key for recipe in recipes for key in recipe if key != "description"})
    varied = [key for key in keys if len({recipe.get(key) for recipe in recipes}) > 1]
    rows = [
        Row(status, {key: recipe.get(key, "") for key in varied}, bits_per_byte(RunFolder(run)))
        for run, recipe, status in zip(runs, recipes, statuses(runs, tell=tell), strict=True)
    ]
    return sorted(rows, key=_rank)


def _rank(row: Row) -> tuple[float, float, str]:
    """Runs without a figure, or with one that is no number, come last."""
    score, loss = next(iter(row.scores.values()), None), row.status.loss
    score, loss = (math.inf if x is None or math.isnan(x) else x for x in (score, loss))
    return score, loss, str(row.status.folder)


def leaves(path: Path) -> dict[str, str]:
    """A recipe's values by their dotted keys, as they are written; none if it cannot be read."""
    found: dict[str, str] = {}

    def walk(node: yaml.Node, key: str) -> None:
        if isinstance(node, yaml.MappingNode) and node.value:
            for name, value in node.value:
                walk(value, f"{key}.{name.value}" if key else str(name.value))
        elif isinstance(node, yaml.SequenceNode) and node.value:
            for index, value in enumerate(node.value):
                walk(value, f"{key}.{index}")
        else:
            found[key] = str(node.value) if isinstance(node, yaml.ScalarNode) else "[]"

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    if node is not None:
        walk(node, "")
    return found


def bits_per_byte(run: RunFolder) -> dict[str, float]:
    """The newest validation scores of a run, by dataset; read without parsing the thousands of lines between them."""
    found: dict[str, float] = {}
    try:
        with open(run.metrics, "rb") as file:
            for line in file:
                if b'"validation"' in line:
                    found |= _scores(line)
    except OSError:
        return {}
    return dict(sorted(found.items()))


def _scores(line: bytes) -> dict[str, float]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(record, dict) or record.get("kind") != "validation":
        return {}
    found: dict[str, float] = {}
    for key, value in record.items():
        if key.endswith("/bits_per_byte"):
            with contextlib.suppress(ValueError, TypeError):
                found[key.removesuffix("/bits_per_byte")] = float(value)  # also of "NaN", which JSON has as text
    return found


def columns(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """The table by columns, as text; keys by their last word where that names one only."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    sets = list(dict.fromkeys(name for row in rows for name in row.scores))
    labels = _labels(keys)
    found = [("run", [printable(row.status.folder.name) for row in rows])]
    found += [(labels[key], [printable(row.values.get(key, "")) for row in rows]) for key in keys]
    found += [("state", [row.status.state for row in rows]), ("step", [_text(row.status.step) for row in rows])]
    found.append(("loss", [_text(row.status.loss, ".4f") for row in rows]))
    for name in sets:
        label = "bits/byte" if len(sets) == 1 else f"{printable(name)} bits/byte"
        found.append((label, [_text(row.scores.get(name), ".4f") for row in rows]))
    found.append(("tokens/s", [_text(row.status.tokens_per_second, ".0f") for row in rows]))
    return found


def to_csv(rows: Sequence[Row]) -> str:
    """The table as comma-separated values, with whole keys and unrounded numbers."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    sets = list(dict.fromkeys(name for row in rows for name in row.scores))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    scores = [f"{name}/bits_per_byte" for name in sets]
    writer.writerow(["run", *keys, "state", "step", "total_steps", "loss", *scores, "tokens_per_second", "folder"])
    for row in rows:
        status = row.status
        writer.writerow(
            [
                status.folder.name, *(row.values.get(key, "") for key in keys), status.state, status.step,
                status.total_steps, status.loss, *(row.scores.get(name) for name in sets), status.tokens_per_second,
                status.folder.absolute(),
            ]
        )  # fmt: skip
    return out.getvalue()


def _text(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)
