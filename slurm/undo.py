"""Take back what a submission changed in a folder that Slurm then refused, also where the submission was killed.

Before anything is changed, what is about to be stands in `.undo/` beside it, under the same names. A refusal puts it
back. Whoever was killed leaves `.undo/`, and the next submission puts it back first; unless the job was accepted all
the same (its job.json says so, or it has begun), or someone trains there: then what is there now counts, and `.undo/`
goes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from potamos.files import flush, write_atomically

UNDO = ".undo"
MANIFEST = "manifest.json"  # none of the names that a submission changes
JOB = "job.json"
LOGS = "logs"  # made where there is none, and never emptied


class Pending:
    """A submission whose end is open. ``token``: tells it from others. ``outcome``: what an exception means for the
    folders: refused, so that all goes back; accepted, so that it stays; unknown, so that the next one decides."""

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex
        self.outcome: Literal["refused", "accepted", "unknown"] = "refused"


@contextlib.contextmanager
def unless_accepted(places: Mapping[Path, Sequence[str]]) -> Iterator[Pending]:
    """What has these names in these folders is afterwards as before if the body raises; see `Pending`.

    The body notes that it was accepted by ``submission`` in a folder's job.json, which holds the token then.
    """
    pending = Pending()
    try:
        for folder, names in places.items():
            keep(folder, names, pending.token, list(places))
        yield pending
    except BaseException:  # an interrupt must not leave half of it either; raised again
        with contextlib.suppress(OSError):  # a full disk: the next submission tries again
            if pending.outcome == "refused":
                _take_back(places, pending.token)
            elif pending.outcome == "accepted":
                for folder in places:
                    accept(folder)
        raise
    for folder in places:
        accept(folder)


def _take_back(places: Iterable[Path], token: str) -> None:
    # First what says that it was accepted, in every folder: one that is killed here must not be taken for that.
    for folder in places:
        if _submission(folder) == token:
            (folder / JOB).unlink(missing_ok=True)
    for folder in places:
        roll_back(folder)


def keep(folder: Path, names: Sequence[str], token: str = "", places: Sequence[Path] = ()) -> None:
    """Remember what ``folder`` holds under these names, nothing included. It must hold no `.undo/` yet.

    Args:
        token: the submission's, which changes all of ``places``.
    """
    for name in (UNDO, *names):  # what killed ones left
        for path in folder.glob(f".{glob.escape(name.lstrip('.'))}.*.tmp"):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    temporary = _temporary(folder / UNDO)
    temporary.mkdir(parents=True)
    absent = [name for name in names if not (folder / name).exists()]
    kept = [name for name in names if name not in (*absent, LOGS)]
    for name in kept:
        _copy(folder / name, temporary / name)
    facts = {"kept": kept, "absent": absent, "submission": token, "places": list(map(str, places))}
    write_atomically(temporary / MANIFEST, json.dumps(facts).encode())
    os.rename(temporary, folder / UNDO)
    flush(folder)


def settle(folder: Path) -> Path | None:
    """Decide on what a submission left that was cut short. The place whose job.json says that Slurm accepted it, which
    makes what is there count; None without, where all is put back."""
    facts = _facts(folder)
    token = facts.get("submission") if facts else None
    for place in map(Path, facts.get("places", ()) if facts and token else ()):
        if _submission(place) == token:
            accept(folder)
            return place
    roll_back(folder)
    return None


def roll_back(folder: Path) -> None:
    """Put back what `keep` remembered; nothing without it. After a kill in the midst, it can be called again."""
    facts = _facts(folder)
    if facts is None:
        return
    for name in facts["absent"]:
        _remove(folder / name)
    for name in facts["kept"]:
        _copy(folder / UNDO / name, folder / name)
    accept(folder)


def _facts(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / UNDO / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None


def _submission(folder: Path) -> object:
    """The submission that a folder's job.json tells of."""
    try:
        told = json.loads((folder / JOB).read_bytes())
    except (OSError, ValueError):
        return None
    return told.get("submission") if isinstance(told, dict) else None


def accept(folder: Path) -> None:
    """Forget what was there before."""
    with contextlib.suppress(FileNotFoundError):  # the job has begun just now, and has done so
        _remove(folder / UNDO)


def _copy(source: Path, target: Path) -> None:
    """Put a copy in the place of ``target``; a file at once, a folder by two renames."""
    if not source.is_dir():
        write_atomically(target, source.read_bytes())
        return
    temporary = _temporary(target)
    # Links will do: the program's files are replaced, never changed.
    shutil.copytree(source, temporary, copy_function=_link, symlinks=True)
    _remove(target)
    os.rename(temporary, target)
    flush(target.parent)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without them
        shutil.copy2(source, target, follow_symlinks=False)


def _remove(path: Path) -> None:
    """Remove what is there: a file, or a folder, which is never seen in part; of logs only an empty one."""
    if path.name == LOGS:
        with contextlib.suppress(OSError):
            path.rmdir()
    elif path.is_dir():
        doomed = _temporary(path, "old")
        os.rename(path, doomed)
        flush(path.parent)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _temporary(path: Path, kind: str = "new") -> Path:
    """A free name beside ``path`` that nobody takes for it."""
    temporary = path.with_name(f".{path.name.lstrip('.')}.{kind}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary
