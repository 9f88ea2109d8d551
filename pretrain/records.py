"""A run's records: `logs/metrics.jsonl`, one JSON object a line, appended to by every attempt. Imports no torch.

Each attempt begins with a record of kind `start` that names the step it goes on from; what earlier attempts recorded
beyond that step is trained again and superseded. Records of kind `train` and `validation` hold `attempt`, `step`,
`next_sample`, `tokens`, `time` (Unix seconds) and metrics. Numbers are written so that they read back bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from potamos.slurm.run_folder import RunFolder

Kind = Literal["start", "train", "validation"]
FACTS = ("kind", "attempt", "step", "next_sample", "tokens", "time")
NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # strings in the file, because JSON has no such numbers

logger = logging.getLogger(__name__)


class RecordWriter:
    """Appends records. Each is one write to the file, so a kill leaves whole lines."""

    def __init__(self, run: str | os.PathLike[str], attempt: int) -> None:
        path = RunFolder.of(run).metrics
        path.parent.mkdir(parents=True, exist_ok=True)
        self._attempt = attempt
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by close)
        self._torn = False  # the last line has no end: a full disk or a machine that went down tears one
        if self._file.tell() > 0:
            self._file.seek(-1, os.SEEK_END)
            self._torn = self._file.read(1) != b"\n"

    def write(self, kind: Kind, step: int, next_sample: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Append one record. `tokens` counts those trained on since the run began.

        Raises:
            OSError: the disk is full. Later records can still be written when there is room again.
        """
        if taken := metrics.keys() & set(FACTS):
            raise ValueError(f"metrics may not be named {sorted(taken)}: every record has those")
        facts = (kind, self._attempt, step, next_sample, tokens, round(time.time(), 3))
        record = dict(zip(FACTS, facts, strict=True)) | {name: _plain(value) for name, value in metrics.items()}
        line = b"\n" * self._torn + json.dumps(record, allow_nan=False).encode() + b"\n"
        if self._file.write(line) != len(line):
            self._torn = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._torn = False

    def close(self) -> None:
        self._file.close()


def read_metrics(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of kind `train` and `validation`, each step as the last attempt that trained it recorded it.

    In the order of the steps, the validations of a step in one record; values that are not finite come back as floats.
    A run without records gives an empty list. A line that is no record is skipped with a warning.
    """
    records: dict[tuple[int, str], dict[str, Any]] = {}
    for record in _read_all(run):
        if record["kind"] == "start":
            records = {key: kept for key, kept in records.items() if kept["step"] <= record["step"]}
            continue
        key = record["step"], record["kind"]
        if record["kind"] == "validation" and records.get(key, {}).get("attempt") == record["attempt"]:
            record = records[key] | record  # another dataset at the same step
        records[key] = record
    return [record for _, record in sorted(records.items(), key=lambda item: item[0])]


def attempt_number(run: str | os.PathLike[str], environment: Mapping[str, str] = os.environ) -> int:
    """This attempt's number: POTAMOS_ATTEMPT where a scheduler sets it, else one more than the last; the first is 0.

    Raises:
        ValueError: POTAMOS_ATTEMPT is not a whole number from 0.
    """
    given = environment.get("POTAMOS_ATTEMPT")
    if given is not None:
        if not given.isdecimal():
            raise ValueError(f"POTAMOS_ATTEMPT is {given!r}: give a whole number from 0, or unset it")
        return int(given)
    folder = RunFolder.of(run)
    seen = {record["attempt"] for record in _read_all(run)}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent or not ours: the rest remains
        seen.add(int(json.loads(folder.state.read_bytes())["attempt"]))
    seen |= {int(path.suffix[1:]) for path in folder.path.glob("stop.*") if path.suffix[1:].isdecimal()}
    return max(seen, default=-1) + 1


def _read_all(run: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    path = RunFolder.of(run).metrics
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not {"kind", "attempt", "step"} <= record.keys():
                    raise ValueError("lacks a field")
            except (ValueError, AttributeError) as error:
                logger.warning("%s:%d is no record and is skipped (%s)", path, number, error)
                continue
            yield {name: float(value) if value in NOT_FINITE else value for name, value in record.items()}


def _plain(value: float) -> float | str:
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
