"""Checkpoints that are complete or absent: written in the background, verified, renamed, and verified again on loading.
Tensors are read when they are asked for, so whoever needs a part of a checkpoint reads and holds that part.

A checkpoint is a folder `checkpoints/step-00001234/`:

    model/, optimizer/, carried/    safetensors files (`carried/`: state handed from one segment to the next, if any)
    trainer.json                    step, next sample, and the trainer's own scalars
    recipe.yaml                     the resolved recipe
    manifest.json                   size and SHA-256 of each file above

It is written under a name that begins with `.tmp-`, flushed to the disk, its headers read back and compared, and only
then renamed. Whoever kills the process at whatever moment leaves the checkpoints that were there, and at most a `.tmp-`
folder that the next start removes. No pickle is written or read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potamos.files import flush
from potamos.parallel.storage import DTYPES, StorageError, StoredTensors, describe, write_tensors

FORMAT = 1
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
RECIPE = "recipe.yaml"
TENSORS = ("model", "optimizer", "carried")
# What reading JSON raises, and looking for values that are not there: deep nesting, an Infinity where a number belongs.
MALFORMED = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
STEP_FOLDER = re.compile(r"step-(\d{8,})")

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint is missing, partial or corrupt. The message names the file and the reason."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written; those before it are untouched."""


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to go on as if it had never stopped.

    `step` counts finished optimizer steps; `next_sample` is the global index of the first sample not trained on yet.
    Tensors are keyed by global parameter names. `trainer` holds JSON values only; what is not a tensor belongs there.
    """

    step: int
    next_sample: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""


@dataclass(frozen=True, kw_only=True)
class Loaded(Snapshot):
    """A snapshot at `path`, which verified. Its tensors are read as `parallel.storage.StoredTensors` says."""

    path: Path


@dataclass(frozen=True)
class Readers:
    """Processes that load a checkpoint together: each digests its share of the files, all go on with the same one.

    first (value): the first reader's value, on all. failure (error or None): the words of the first reader that has an
    error, on all; None where none has. The default is a reader alone.
    """

    index: int = 0
    count: int = 1
    first: Callable[[Any], Any] = lambda value: value
    failure: Callable[[Exception | None], str | None] = lambda error: None if error is None else str(error)


ALONE = Readers()


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them, and every one whose step is a multiple of `keep_every`.

    Every rank makes one and calls the same methods. Only the rank with `main=True` writes; `together` runs an action on
    all of them and raises on all what one of them raised, so that none waits for one that has failed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        main: bool = True,
        together: Callable[[Callable[[], None]], None] = lambda action: action(),
    ) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}: at least 1 checkpoint must stay")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"checkpoint.keep_every is {keep_every}: give a number of steps, or leave it out")
        self.folder = folder
        self.failed: tuple[int, str] | None = None
        """The step of the last save and why it failed, on the main rank; None where it did not."""
        self._keep, self._keep_every = keep, keep_every
        self._main, self._together = main, together
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._corrupt: set[int] = set()  # steps whose folder `latest` could not load
        together(self._prepare)

    def _prepare(self) -> None:
        if not self._main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _clean(self.folder)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be made ready for checkpoints: {error}") from error

    def save(self, snapshot: Snapshot, *, wait: bool = False) -> Path:
        """Copy `snapshot` to host memory, write it in the background, and return the path it will have.

        The tensors may be changed as soon as this returns. A save that is still under way is waited for first. If
        writing fails, the checkpoints before it stay, nothing partial is left, and a warning is logged at once; the
        error itself is raised by `wait`. With `wait=True` (the last save of a run) this returns when the checkpoint is
        on the disk, on all ranks, and raises the error itself. An error is raised on all ranks.

        Raises:
            CheckpointError: a value in a tensor dict cannot be stored, or `trainer` is not JSON.
            CheckpointWriteError: only with `wait=True`: the disk is full, or another reason named in the message.
        """
        self._together(lambda: self._begin(snapshot, wait) if self._main else None)
        return self.folder / _name(snapshot.step)

    def _begin(self, snapshot: Snapshot, wait: bool) -> None:
        self._settle()
        scalars = _scalars(snapshot)
        tensors = {part: _to_host(getattr(snapshot, part), part) for part in TENSORS}
        self._pending = self._writer.submit(self._write, snapshot.step, tensors, scalars, not wait)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if any.

        Raises:
            CheckpointWriteError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self, readers: Readers = ALONE) -> Loaded | None:
        """The newest checkpoint that verifies, or None if there is none at all. A worse one is skipped with a warning.

        All readers call. The first one's folder decides which there are, and what one of them finds wrong is skipped
        by all: ranks must agree on one step, and two that look by themselves may see different disks.

        Raises:
            CheckpointError: there are checkpoints, but none can be loaded; a run never starts over by itself. Or the
                folder cannot be listed.
        """
        self._settle()
        reasons = []
        for step in self._steps(readers):
            path, loaded, error = self.folder / _name(step), None, None
            try:
                loaded = load(path, readers)
            except CheckpointError as caught:
                error = caught
            reason = readers.failure(error)
            if reason is None:
                return loaded
            self._corrupt.add(step)
            reasons.append(reason)
            if readers.index == 0:
                logger.warning("skipping checkpoint %s: %s", path.name, reason)
        if not reasons:
            return None
        raise CheckpointError(
            f"none of the {len(reasons)} checkpoints in {self.folder} can be loaded:\n  "
            + "\n  ".join(reasons)
            + "\nRestore one from a copy, or move the folder away to train from the first step."
        )

    def _steps(self, readers: Readers) -> list[int]:
        """The steps in the first reader's folder, newest first, on all readers; also its failure to list them."""
        steps, failure = [], None
        if readers.index == 0:
            try:
                steps = sorted(step_folders(self.folder), reverse=True)
            except OSError as error:
                failure = CheckpointError(f"{self.folder} cannot be listed: {error}")
        reason = readers.failure(failure)
        if reason is not None:
            raise failure or CheckpointError(reason)
        return readers.first(steps)

    def _settle(self) -> None:
        """Wait for the save under way; if the disk failed it, that was logged when it happened."""
        with contextlib.suppress(CheckpointWriteError):
            self.wait()

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], scalars: dict[str, bytes], warn: bool) -> None:
        """Runs in the background thread: write, verify, rename, then delete what is no longer kept.

        A fault of the program stays what it is, and ends the run at the next save: no later one would succeed.
        """
        final = self.folder / _name(step)
        temporary = self.folder / f".tmp-{final.name}-{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            _write_files(temporary, tensors, scalars)
            _publish(temporary, final)
        except (OSError, MemoryError, StorageError) as error:
            self.failed = (step, (error.strerror if isinstance(error, OSError) else None) or str(error))
            last = max(step_folders(self.folder), default=None)
            message = (
                f"checkpoint {final} was not written: {error}. "
                + (f"The last one is {_name(last)}. " if last is not None else "There is no earlier one. ")
                + "Make room on that disk (or lower checkpoint.keep), or mend what the reason names."
            )
            if warn:
                logger.warning("%s Training goes on.", message)
            raise CheckpointWriteError(message) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.failed = None
        self._corrupt.discard(step)
        self._delete_old(step)

    def _delete_old(self, newest: int) -> None:
        """Apply the retention rule to the steps up to `newest`, which has just been written.

        Folders of later steps are left alone and not counted: they are what a run that went back could not load, and
        counting them would push out the good ones.
        """
        past = {step: path for step, path in step_folders(self.folder).items() if step <= newest}
        kept = sorted(step for step in past if step not in self._corrupt)
        kept = set(kept[-self._keep :]) | {s for s in kept if self._keep_every and s % self._keep_every == 0}
        for step, path in past.items():
            if step in kept:
                continue
            # Renamed first: a kill in the middle of the deletion leaves no partial folder under a final name.
            doomed = path.with_name(f".tmp-delete-{path.name}-{os.getpid()}")
            try:
                os.rename(path, doomed)
                shutil.rmtree(doomed)
                self._corrupt.discard(step)
            except OSError as error:
                logger.warning("the old checkpoint %s could not be deleted: %s", path, error)


def load(path: Path, readers: Readers = ALONE) -> Loaded:
    """Open one checkpoint folder, every file checked against the manifest first: its size by each of `readers`, its
    digest by one of them. It is sound where none of them raises.

    Raises:
        CheckpointError: a file is missing, truncated, changed or unreadable; names it.
    """
    try:
        _verify(path, readers)
        scalars = _read_scalars(path / TRAINER)
        return Loaded(
            path=path,
            step=scalars["step"],
            next_sample=scalars["next_sample"],
            trainer=scalars["trainer"],
            recipe=(path / RECIPE).read_text(encoding="utf-8"),
            **{part: StoredTensors(path / part) for part in TENSORS},
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path / RECIPE} is malformed ({error!r})") from error
    except (OSError, StorageError) as error:
        raise CheckpointError(str(error)) from error


def _read_scalars(path: Path) -> dict[str, Any]:
    """What trainer.json holds, each value of its type."""
    try:
        scalars = json.loads(path.read_bytes())
        for name, kind in (("step", int), ("next_sample", int), ("trainer", dict)):
            if type(scalars[name]) is not kind:
                raise TypeError(f"{name} is {scalars[name]!r}")
    except MALFORMED as error:
        raise CheckpointError(f"{path} is malformed ({error!r})") from error
    return scalars


def step_folders(folder: Path) -> dict[int, Path]:
    """Step -> path of every checkpoint under a final name in `folder`, not verified. Empty if the folder is missing."""
    if not folder.is_dir():
        return {}
    matches = ((STEP_FOLDER.fullmatch(path.name), path) for path in sorted(folder.iterdir()) if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _to_host(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Contiguous copies in host memory, so that training may go on changing the originals."""
    host = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            found = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(
                f"{part}[{name!r}] is of type {found}, which no safetensors file holds; "
                "scalars belong into `trainer`, complex128 into view_as_real"
            )
        host[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return host


def _scalars(snapshot: Snapshot) -> dict[str, bytes]:
    """File name -> content, made at once because the trainer goes on changing its dict."""
    content = {"step": snapshot.step, "next_sample": snapshot.next_sample, "trainer": snapshot.trainer}
    try:
        text = json.dumps(content, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"`trainer` of step {snapshot.step} holds a value that is not JSON: {error}") from error
    return {TRAINER: text.encode(), RECIPE: snapshot.recipe.encode()}


def _write_files(folder: Path, tensors: dict[str, dict[str, Tensor]], scalars: dict[str, bytes]) -> None:
    """Write all files of a checkpoint into a new folder, compare the headers with what was meant, and flush."""
    folder.mkdir(parents=True)
    for part, values in tensors.items():
        if not values:
            continue
        write_tensors(folder / part, values)
        meant = {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in values.items()}
        found = describe(folder / part)
        if found != meant:
            wrong = sorted(name for name in meant.keys() | found.keys() if meant.get(name) != found.get(name))
            raise StorageError(f"{folder / part} reads back with other tensors than were written: {wrong[:5]}")
    for name, content in scalars.items():
        (folder / name).write_bytes(content)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def _publish(temporary: Path, final: Path) -> None:
    """Give a complete folder its final name. One that is there already steps aside until the new one has the name."""
    aside = final.with_name(f".old-{final.name}")
    if final.exists():
        os.rename(final, aside)
    os.rename(temporary, final)
    flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove what a killed process left. A folder that had stepped aside for one never renamed gets its name back."""
    for path in sorted(folder.glob(".old-step-*")):
        final = path.with_name(path.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, final)
    for path in folder.glob(".tmp-*"):
        if not _is_alive(path.name.rpartition("-")[2]):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: str) -> bool:
    """Whether another process of this machine has this number. Our own number is a dead process's: we just started."""
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _verify(path: Path, readers: Readers) -> None:
    """Compare every file of a checkpoint with its manifest, and the content of this reader's share with its digest."""
    manifest_path = path / MANIFEST
    try:
        manifest = json.loads(_read_alike(manifest_path, readers))
        version, files = manifest["format"], dict(manifest["files"])
        expected = {name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{manifest_path} is missing: the checkpoint is partial") from error
    except CheckpointError:
        raise
    except MALFORMED as error:
        raise CheckpointError(f"{manifest_path} is malformed ({error!r})") from error
    if version != FORMAT:
        raise CheckpointError(f"{manifest_path} has format {version!r}; this version reads format {FORMAT}")
    for name in (TRAINER, RECIPE):
        if name not in expected:
            raise CheckpointError(f"{manifest_path} does not list {name}")
    for name, (size, _) in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {size}")
    for file in path.rglob("*.safetensors"):
        if str(file.relative_to(path)) not in expected:
            raise CheckpointError(f"{file} is not listed in {MANIFEST}")
    by_size = sorted(expected, key=lambda name: (-expected[name][0], name))  # so that shares take about equally long
    for name in by_size[readers.index :: readers.count]:
        if _digest(path / name) != expected[name][1]:
            raise CheckpointError(f"{path / name} does not match its SHA-256: its content has changed")


def _read_alike(path: Path, readers: Readers) -> bytes:
    """A file's content, which must be the same for all readers: each by itself cannot know of another disk's."""
    content, failure = b"", None
    try:
        content = path.read_bytes()
    except OSError as error:  # raised after the exchange, in which all take part
        failure = error
    digest = hashlib.sha256(content).hexdigest()
    first = readers.first(digest)
    if failure is not None:
        raise failure
    if digest != first:
        raise CheckpointError(f"{path} is another file here than on rank 0: every node must see the same disk")
    return content


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
