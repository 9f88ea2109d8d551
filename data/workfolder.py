"""The folder ``<out>.prepare`` in which a dataset grows, shared by every process that helps.

    settings.json             what is being prepared; every process compares its own with it
    hashes/00012.npy, .json   the hashed documents of input 12, where exact duplicates are removed
    duplicates.npy            which documents are left out, one bit each
    parts/00012/              a finished part: its shards, part.json, rejects.jsonl
    dataset/                  the finished dataset while its shards are moved in
    final.json                what `finalize` is about to publish
    *.lock                    advisory locks, which the system drops when their process ends, however it ends

Everything appears by a rename, so a file that is there is whole; what a killed process leaves half done has another
name and is removed by whoever takes the work up again. All work that is done holds a shared lock on ``folder.lock``;
only who holds it alone replaces settings or finalizes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potamos.data.errors import DatasetError
from potamos.files import flush, write_atomically

_SHORT_WAIT = 5.0  # seconds: for processes that are only just ending


def poll(seconds: float) -> Iterator[None]:
    """Yields at once, then at growing intervals until the seconds are over."""
    end = time.monotonic() + seconds
    pause = 0.02
    yield
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(pause, left))
        pause = min(2 * pause, 1.0)
        yield


class Lock:
    """An advisory lock (flock) on a file. It belongs to this object: two of one process exclude each other too."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, *, shared: bool = False, wait: float = 0.0) -> bool:
        """Whether the lock was had within ``wait`` seconds.

        Raises:
            FileNotFoundError: the folder of the lock is gone.
            DatasetError: the file system has no locks.
        """
        assert self._descriptor is None, "held already"
        return any(self._try(shared) for _ in poll(wait))

    def _try(self, shared: bool) -> bool:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # Who removed the folder meanwhile has left us a file without a name, which nobody else will lock.
            held, named = os.fstat(descriptor), os.stat(self.path)
            if (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
                self._descriptor, descriptor = descriptor, -1
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            raise DatasetError(
                f"{self.path} cannot be locked ({error.strerror}); prepare on a file system with locks, then copy"
            ) from None
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return False

    def release(self) -> None:
        """Give the lock up; nothing happens where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @contextlib.contextmanager
    def holding(self, *, shared: bool = False, wait: float = 0.0) -> Iterator[bool]:
        """Yields whether it was had; released at the end."""
        had = self.acquire(shared=shared, wait=wait)
        try:
            yield had
        finally:
            self.release()


def place_of(out: str | os.PathLike[str]) -> Path:
    """The folder that a dataset is written to: where a link points, so that all is on the disk that the user chose."""
    path = Path(out)
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


class WorkFolder:
    """Names inside the folder, its settings and its locks."""

    def __init__(self, out: Path):
        self.out = out
        self.path = out.with_name(f"{out.name}.prepare")
        self.settings = self.path / "settings.json"
        self.hashes = self.path / "hashes"
        self.parts = self.path / "parts"
        self.duplicates = self.path / "duplicates.npy"
        self.dataset = self.path / "dataset"
        self.replaced = self.path / "replaced"
        self.final = self.path / "final.json"
        self._lock = Lock(self.path / "folder.lock")

    def part(self, number: int) -> Path:
        return self.parts / f"{number:05d}"

    def rejects(self, number: int) -> Path:
        """Bad lines of an input that is being read, or that failed."""
        return self.parts / f"{number:05d}.rejects.jsonl"

    def part_lock(self, number: int) -> Lock:
        return Lock(self.parts / f"{number:05d}.lock")

    def hash_lock(self, number: int) -> Lock:
        return Lock(self.hashes / f"{number:05d}.lock")

    def duplicates_lock(self) -> Lock:
        return Lock(self.path / "duplicates.lock")

    @property
    def has_work(self) -> bool:
        """Whether anything is finished that would have to be done again."""
        finished = [*self.parts.glob("*/part.json"), *self.hashes.glob("*.json"), self.dataset, self.final]
        return any(path.exists() for path in finished)

    def read_settings(self) -> dict[str, Any] | None:
        """None where nothing was begun."""
        return read_json(self.settings)

    @contextlib.contextmanager
    def joined(self, settings: dict[str, Any], *, replace: bool, wait: float) -> Iterator[None]:
        """Hold the folder together with others that have equal settings; the first one writes them.

        Other settings are replaced where nothing was finished with them, or with ``replace``.

        Raises:
            DatasetError: the folder holds work of other settings, or somebody keeps it locked.
        """
        while not self._join(settings, replace, wait):
            pass  # whoever finalized took the folder away in between
        try:
            yield
        finally:
            self._lock.release()
            if not self.has_work:
                self._remove_if_idle()

    def _join(self, settings: dict[str, Any], replace: bool, wait: float) -> bool:
        self.path.mkdir(parents=True, exist_ok=True)  # outside: a place that cannot be had will not come later
        try:
            with Lock(self.path / "settings.lock").holding(wait=wait) as turn:
                if not turn:
                    raise DatasetError(f"{self.path} is being set up by another process for {wait:.0f} s; end that one")
                if self.read_settings() != settings:
                    self._set_up(settings, replace, wait)
                if not self._lock.acquire(shared=True, wait=wait):
                    raise DatasetError(f"another process is finalizing {self.out} for {wait:.0f} s; end that one")
                if self.read_settings() == settings:
                    return True
        except FileNotFoundError:
            pass
        self._lock.release()
        return False

    def _set_up(self, settings: dict[str, Any], replace: bool, wait: float) -> None:
        theirs = self.read_settings()
        with self._lock.holding(wait=wait if theirs is None else min(wait, _SHORT_WAIT)) as alone:
            if not alone:
                raise DatasetError(
                    f"other processes are preparing {self.out} with other settings ({differences(theirs, settings)}); "
                    f"end them first, or choose another place"
                )
            theirs = self.read_settings()
            if theirs is not None and theirs != settings and self.has_work and not replace:
                raise DatasetError(
                    f"{self.path} holds unfinished work with other settings ({differences(theirs, settings)}); go on "
                    f"with those, or remove the folder, or --force"
                )
            if theirs != settings:
                self.final.unlink(missing_ok=True)
                self._clear()  # also what was left without settings: nobody knows what it belongs to
                self.parts.mkdir(exist_ok=True)
                self.hashes.mkdir(exist_ok=True)
                write_atomically(self.settings, to_json(settings))

    def alone(self, wait: float) -> contextlib.AbstractContextManager[bool]:
        """Hold the folder without anybody else; yields whether that was possible."""
        return self._lock.holding(wait=wait)

    def remove(self) -> None:
        """Take the folder away, held alone; that there is something to publish is forgotten last."""
        self._clear()
        for path in self.path.glob("*.lock"):
            path.unlink(missing_ok=True)
        self.final.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process may have begun anew in it
            self.path.rmdir()

    def _clear(self) -> None:
        """Remove all work, and then the settings that it was done with."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path not in (self.settings, self.final) and path.suffix != ".lock":
                path.unlink(missing_ok=True)
        self.settings.unlink(missing_ok=True)

    def _remove_if_idle(self) -> None:
        """Remove a folder in which nothing was finished, unless it tells of rejects or others are at work in it."""
        with contextlib.suppress(FileNotFoundError), self.alone(0.0) as alone:
            if alone and not self.has_work and not any(self.parts.glob("*.rejects.jsonl")):
                self.remove()


def differences(theirs: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    """The settings that differ, as ``key x there, y here``."""
    theirs = theirs or {}
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return "; ".join(f"{key} {_short(theirs.get(key))} there, {_short(ours.get(key))} here" for key in keys)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def to_json(content: Any) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def read_json(path: Path) -> Any:
    """The content of a file that was written whole, None where there is none.

    Raises:
        DatasetError: damaged since.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DatasetError(f"{path} is damaged ({error}); remove it and run the same command again") from None


def rename_durably(source: Path, target: Path) -> None:
    """Give a finished folder its name, and both names to the disk."""
    flush(source)
    os.replace(source, target)
    flush(target.parent)
