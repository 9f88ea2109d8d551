"""Take back what a submission changed in a folder that Slurm then refused, also where the submission was killed.

Before anything is changed, what is about to be stands in `.undo/` beside it, under the same names. A refusal puts it
back. Whoever was killed leaves `.undo/`, and the next submission puts it back first; unless the job was accepted all
the same and has begun, or someone trains there: then what is there now counts, and `.undo/` goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from potamos.files import flush, write_atomically

UNDO = ".undo"
MANIFEST = "manifest.json"  # none of the names that a submission changes
LOGS = "logs"  # made where there is none, and never emptied


@contextlib.contextmanager
def unless_accepted(places: Mapping[Path, Sequence[str]]) -> Iterator[None]:
    """What has these names in these folders is afterwards as before if the body raises."""
    try:
        for folder, names in places.items():
            keep(folder, names)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk: the next submission tries again
            for folder in places:
                roll_back(folder)
        raise
    for folder in places:
        accept(folder)


def keep(folder: Path, names: Sequence[str]) -> None:
    """Remember what ``folder`` holds under these names, nothing included. It must hold no `.undo/` yet."""
    temporary = _temporary(folder / UNDO)
    temporary.mkdir(parents=True)
    absent = [name for name in names if not (folder / name).exists()]
    kept = [name for name in names if name not in (*absent, LOGS)]
    for name in kept:
        _copy(folder / name, temporary / name)
    facts = {"kept": kept, "absent": absent}
    write_atomically(temporary / MANIFEST, json.dumps(facts).encode())
    os.rename(temporary, folder / UNDO)
    flush(folder)


def roll_back(folder: Path) -> None:
    """Put back what `keep` remembered; nothing without it. After a kill in the midst, it can be called again."""
    try:
        facts = json.loads((folder / UNDO / MANIFEST).read_bytes())
    except FileNotFoundError:
        return
    for name in facts["absent"]:
        _remove(folder / name)
    for name in facts["kept"]:
        _copy(folder / UNDO / name, folder / name)
    accept(folder)


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
