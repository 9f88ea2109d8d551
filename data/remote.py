"""Datasets behind a URL: shards are fetched into a bounded folder on this machine when they are needed.

A shard enters the folder under its name only when its size and sha256 are those of dataset.json. Several processes, the
ranks of a node and also several runs, share one folder (`cache`): each shard is fetched once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from potamos.data.cache import Lease, Space, locked, partial
from potamos.data.errors import DatasetError
from potamos.data.fetch import RemoteError, Retry, download, join, read_url, shown
from potamos.data.files import ShardFiles
from potamos.data.manifest import MANIFEST, Manifest, read_manifest
from potamos.data.shards import index_path
from potamos.files import write_atomically

__all__ = ["CacheSpec", "RemoteError", "RemoteShards", "Retry", "is_url", "open_dataset_files"]

POLL = 0.05  # seconds between looks at what another process does
PATIENCE = 600.0  # seconds that a needed shard waits for room
MANIFEST_LIMIT = 1 << 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSpec:
    """Where shards of datasets behind URLs are kept, how many bytes of them, and how stubbornly they are fetched.

    ``bytes`` bounds all that lies in ``folder``, of all datasets together; it must hold two windows of each dataset of
    the run. ``parallel`` shards of a dataset are fetched at a time. Put the folder on a disk of the node.
    """

    folder: str | os.PathLike[str]
    bytes: int
    parallel: int = 2
    retry: Retry = field(default_factory=Retry)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a dataset's place is a URL and no local path."""
    return "://" in os.fspath(path)


def open_dataset_files(
    path: str | os.PathLike[str], cache: CacheSpec | None = None
) -> tuple[Path, RemoteShards | None]:
    """The folder that holds a dataset's dataset.json and, for a URL, what fetches its shards there.

    ``TokenDataset(folder, files=files)`` then opens the dataset wherever it lies.

    Raises:
        DatasetError: a URL without a cache.
        RemoteError: dataset.json cannot be had.
    """
    if not is_url(path):
        return Path(path), None
    if cache is None:
        raise DatasetError(
            f"dataset {shown(os.fspath(path))} is behind a URL: say where its shards may be kept with data.cache"
        )
    files = RemoteShards(os.fspath(path), cache)
    return files.folder, files


class RemoteShards(ShardFiles):
    """The shards of one dataset behind a URL, as files of a cache folder.

    Safe to use from several threads. A fetch in the background that fails is tried again when the shard is needed, and
    only then raises. `close` ends the background threads and gives up the shards.

    Raises:
        RemoteError: dataset.json cannot be had, or the limit is below the size of one shard.
        DatasetError: what lies there is no dataset.
    """

    def __init__(self, url: str, cache: CacheSpec, *, patience: float = PATIENCE):
        if url.startswith("pipe:"):
            raise DatasetError(f"{url.split()[0]} ...: a pipe is one stream and no dataset; give the URL of a folder")
        self.url, self.cache, self._patience = url, cache, patience
        root = Path(cache.folder)
        self.folder, self.manifest = self._fetch_manifest(root)
        self._sizes = [entry["bytes"] + entry["index_bytes"] for entry in self.manifest.shards]
        if max(self._sizes) > cache.bytes:
            raise RemoteError(
                f"{shown(url)}: data.cache.bytes {cache.bytes} is below the {max(self._sizes)} bytes of one shard; "
                f"raise it"
            )
        self._space = Space(root, cache.bytes)
        with self._space.held():
            self._lease = Lease(self.folder)
        self._changed = threading.Condition()
        self._closed = threading.Event()
        # A wait between attempts should not outlast `close`.
        pause = self._closed.wait if cache.retry.sleep is time.sleep else cache.retry.sleep
        self._retry = replace(cache.retry, sleep=pause)
        self._kept: set[int] = set()
        self._used: set[int] = set()  # handed out or fetched since the last `keep`
        self._wanted: list[int] = []
        self._asked = 0  # counts the changes of what is wanted
        self._needed: list[int] = []  # by callers of `path`, who wait
        self._fetching: set[int] = set()
        self._threads: list[threading.Thread] = []

    def path(self, shard: int) -> Path:
        """The local file of a shard, fetched if need be.

        Raises:
            RemoteError: it cannot be had, or there is no room for it.
        """
        deadline = time.monotonic() + self._patience
        with self._changed:
            self._needed.append(shard)
            while shard in self._fetching:
                self._changed.wait()
            self._fetching.add(shard)
        try:
            while (hindrance := self._try(shard)) is not None:
                if hindrance == "no room" and not self._let_go() and time.monotonic() > deadline:
                    name, size = self.manifest.shards[shard]["name"], self._sizes[shard]
                    raise RemoteError(
                        f"{shown(self.url)}: no room for {name} ({size} bytes) in {self._patience:g} s: "
                        f"{self._space.used} of data.cache.bytes {self.cache.bytes} are in use; raise it"
                    )
                self._closed.wait(POLL)
        finally:
            with self._changed:
                self._needed.remove(shard)
            self._done(shard)
        return self.folder / self.manifest.shards[shard]["name"]

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch these in the background, the first ones first; takes the place of what was asked for before."""
        with self._changed:
            self._check_open()
            self._wanted = list(shards)
            self._asked += 1
            missing = min(self.cache.parallel, len(self._wanted)) - len(self._threads)
            for _ in range(missing):
                thread = threading.Thread(target=self._work, name="shard-fetcher", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def keep(self, shards: Sequence[int]) -> None:
        """Only these are needed from now on; the rest make room, least recently used first.

        Raises:
            RemoteError: together they are larger than the limit.
        """
        kept = set(shards)
        self.check_room(sum(self._sizes[shard] for shard in kept))
        with self._changed:
            self._check_open()
            self._kept, self._used = kept, set()
            self._wanted = [shard for shard in self._wanted if shard in kept]
            self._asked += 1
            self._renew()
            self._changed.notify_all()

    def check_room(self, needed: int) -> None:
        """Refuse a limit that cannot hold ``needed`` bytes of this dataset at once, two windows of it."""
        if needed > self.cache.bytes:
            raise RemoteError(
                f"{shown(self.url)}: data.cache.bytes {self.cache.bytes} cannot hold two windows of shards, {needed} "
                f"bytes; raise it, or choose a smaller data.window"
            )

    def window_bytes(self, shards: int) -> int:
        """Bytes that two windows of so many shards take at most."""
        return sum(sorted(self._sizes, reverse=True)[: 2 * shards])

    def close(self) -> None:
        """End the background threads and let go of all shards."""
        with self._changed:
            self._closed.set()
            self._wanted = []
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._lease.close()

    def _fetch_manifest(self, root: Path) -> tuple[Path, Manifest]:
        """dataset.json, first into a folder of this process, because its fingerprint names the final one."""
        content = read_url(join(self.url, MANIFEST), self.cache.retry, limit=MANIFEST_LIMIT)
        incoming = root / f".incoming-{uuid.uuid4().hex}"
        try:
            write_atomically(incoming / MANIFEST, content)
            manifest = read_manifest(incoming)
            folder = root / manifest.fingerprint[:16]
            for name in ("leases", "locks"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            write_atomically(folder / MANIFEST, content)
            return folder, manifest
        except DatasetError as error:
            here = os.fspath(incoming)
            raise type(error)(str(error).replace(here, shown(self.url))) from None
        except OSError as error:
            raise RemoteError(f"data.cache.path {root} cannot be written: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                (incoming / MANIFEST).unlink(missing_ok=True)
                incoming.rmdir()

    def _work(self) -> None:
        """A background thread: try the first wanted shard that nobody fetches, go on with the next."""
        while True:
            with self._changed:
                while (shard := self._next()) is None and not self._closed.is_set():
                    self._changed.wait()
                if shard is None or self._closed.is_set():
                    return
                self._wanted.remove(shard)
                self._fetching.add(shard)
                asked = self._asked
            hindrance = None
            try:
                hindrance = self._try(shard)
            except Exception as error:  # raised where the shard is needed, by trying again
                if not self._closed.is_set():
                    _log.warning("fetching ahead: %s", error)
            with self._changed:
                if hindrance is not None and asked == self._asked:
                    self._wanted.append(shard)
            self._done(shard)
            if hindrance is not None:
                self._closed.wait(POLL if hindrance == "elsewhere" else 10 * POLL)  # looking for room reads folders

    def _next(self) -> int | None:
        taken = self._fetching.union(self._needed)
        return next((shard for shard in self._wanted if shard not in taken), None)

    def _try(self, shard: int) -> str | None:
        """Bring a shard here and lease it, or say what hinders: ``elsewhere`` (another process does), ``no room``."""
        with self._changed:
            self._check_open()
            self._used.add(shard)
            self._renew()
        lock = self.folder / "locks" / self.manifest.shards[shard]["name"]
        if not self._is_here(shard):
            with locked(lock, wait=False) as mine:
                if not mine:
                    return "elsewhere"
                if not self._is_here(shard):
                    if not self._claim(shard):
                        return "no room"
                    self._fetch(shard)
        lock.touch()
        return None

    def _is_here(self, shard: int) -> bool:
        entry = self.manifest.shards[shard]
        path = self.folder / entry["name"]
        try:
            return (path.stat().st_size, index_path(path).stat().st_size) == (entry["bytes"], entry["index_bytes"])
        except FileNotFoundError:
            return False

    def _claim(self, shard: int) -> bool:
        """Claim a shard's bytes by files of their sizes, for which shards that nobody needs are given up."""
        with self._space.held():
            for path, _ in self._files(shard):  # what an attempt that failed left does not count twice
                path.unlink(missing_ok=True)
                partial(path).unlink(missing_ok=True)
            if not self._space.free(self._sizes[shard]):
                return False
            for path, size in self._files(shard):
                with open(partial(path), "wb") as file:
                    file.truncate(size)
        return True

    def _let_go(self) -> bool:
        """Give up leases on what was only fetched ahead or used before; whether there were any."""
        with self._changed:
            if self._used <= self._kept | self._fetching:
                return False
            self._used &= self._fetching
            self._renew()
            return True

    def _fetch(self, shard: int) -> None:
        entry = self.manifest.shards[shard]
        begun = time.monotonic()
        files = self._files(shard)
        try:
            # The index first: no tar is ever without one.
            for (path, size), sha256 in zip(files, (entry["index_sha256"], entry["sha256"]), strict=True):
                with open(partial(path), "r+b") as file:
                    url = join(self.url, path.name)
                    download(url, file, self._retry, size=size, sha256=sha256, check=self._check_open)
                    file.flush()
                    os.fsync(file.fileno())
                with self._space.held():  # whoever counts sees a file under one of its names
                    os.replace(partial(path), path)
        except OSError as error:
            raise RemoteError(f"{files[1][0]} cannot be written: {error.strerror}; see to data.cache.path") from None
        finally:
            for path, _ in files:
                partial(path).unlink(missing_ok=True)
        _log.info("fetched %s/%s in %.1f s", shown(self.url), entry["name"], time.monotonic() - begun)

    def _files(self, shard: int) -> tuple[tuple[Path, int], tuple[Path, int]]:
        """Index and tar with their sizes."""
        entry = self.manifest.shards[shard]
        path = self.folder / entry["name"]
        return (index_path(path), entry["index_bytes"]), (path, entry["bytes"])

    def _renew(self) -> None:
        """Write down what this process needs, in a moment in which nothing is given up."""
        needed = self._kept | self._used | self._fetching
        names = [self.manifest.shards[shard]["name"] for shard in sorted(needed)]
        with self._space.held():
            self._lease.write(names)

    def _done(self, shard: int) -> None:
        with self._changed:
            self._fetching.discard(shard)
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RemoteError(f"{shown(self.url)}: its files are closed")
