"""What looking at one thing found, as `doctor.py` reports it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warning", "wrong"]
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``remedy`` says how to mend it, where it is not ok."""

    level: Level
    subject: str
    text: str
    remedy: str = ""


def text_of(path: Path) -> str:
    """A small file's text, bare of space around it; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
