"""What the examination of a node asks for and what it leaves behind. Standard library only, so `--judge` is quick."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potamos.files import write_atomically


@dataclass(frozen=True)
class Limits:
    """What a node must have. Sizes in GB (1e9 bytes), times in seconds."""

    gpus: int = 0
    run_disk: float = 1.0
    tmp_disk: float = 1.0
    free_memory: float = 0.9  # share of each GPU's
    skew: float = 5.0
    timeout: float = 180.0  # of each stage: importing torch from a cold file system takes some nodes minutes
    pairs: bool = False


@dataclass
class Record:
    """What is known of one node. ``problems`` are its own, as (check, words). What went wrong between the nodes stands
    apart, because a node may meet it through no fault of its own."""

    node: str
    attempt: int
    rank: int = -1  # not known yet
    world: int = 1
    problems: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    met: bool | None = None  # whether it reached the meeting point; None before, and where there is one node only
    missing: list[int] = field(default_factory=list)  # ranks that it waited for in vain
    network: str | None = None

    def problem(self, check: str, words: str) -> None:
        self.problems.append((check, words))

    def line(self) -> bytes:
        return json.dumps(vars(self)).encode() + b"\n"

    def save(self, folder: Path) -> None:
        """Write the line under its final name, at once or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        write_atomically(record_path(folder, self.attempt, self.node), self.line())

    @classmethod
    def parse(cls, line: bytes | str) -> Record:
        """The record of a line.

        Raises:
            ValueError: it is none.
        """
        try:
            found = cls(**json.loads(line))
            found.problems = [(str(check), str(words)) for check, words in found.problems]
        except TypeError as error:
            raise ValueError(f"no record of a node: {error}") from None
        return found


def record_path(folder: Path, attempt: int, node: str) -> Path:
    return folder / f"preflight-{attempt}.{node}.json"
