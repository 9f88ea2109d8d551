"""A folder of fetched shards that several processes share within a bound of bytes.

What they agree on are flock locks in the folder itself, which end with the process that holds them, however it ends:

    CACHE/space.lock            held while files are counted, given up, claimed or take their name
    CACHE/<dataset>/            named by the fingerprint: dataset.json, shards and indexes
    CACHE/<dataset>/leases/     one file per process, locked while it lives: the shards that it needs
    CACHE/<dataset>/locks/      one file per shard, locked while it is fetched; its time is that of the last use
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from potamos.data.errors import DatasetError
from potamos.data.manifest import MANIFEST
from potamos.data.shards import index_path

_PARTIAL = ".partial"


def partial(path: Path) -> Path:
    """The name of a file that is not yet complete."""
    return path.with_name(f".{path.name}{_PARTIAL}")


class Lease:
    """A locked file that says which shards of a dataset a living process needs; made and used in `Space.held`."""

    def __init__(self, folder: Path):
        self._path = folder / "leases" / uuid.uuid4().hex
        self._file = open(self._path, "w+b")  # noqa: SIM115  (held as long as the process needs shards)
        _lock(self._file.fileno(), self._path, wait=True)

    def write(self, names: Sequence[str]) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(names).encode())
        self._file.flush()

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()


class Space:
    """The bytes of a cache folder, shared with other processes."""

    def __init__(self, root: Path, limit: int):
        self._root, self._limit = root, limit
        self.used = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else counts, claims or gives up meanwhile."""
        with locked(self._root / "space.lock", wait=True):
            yield

    def free(self, wanted: int) -> bool:
        """Give up shards that no living process needs until ``wanted`` more bytes fit; False if they never do."""
        shards: dict[Path, int] = {}  # bytes of each shard with its index and its unfinished files
        leased: set[Path] = set()
        for folder in self._root.iterdir():
            if not (folder / "leases").is_dir():
                continue
            leased |= {folder / name for name in _leased(folder / "leases")}
            for path in folder.iterdir():
                if MANIFEST in path.name or path.is_dir():
                    continue
                shard = folder / path.name.removeprefix(".").removesuffix(_PARTIAL).removesuffix(".idx")
                with contextlib.suppress(FileNotFoundError):
                    shards[shard] = shards.get(shard, 0) + path.stat().st_size
        self.used = sum(shards.values())
        for shard in sorted(shards.keys() - leased, key=_last_use):
            if self.used + wanted <= self._limit:
                break
            for path in (shard, index_path(shard)):
                path.unlink(missing_ok=True)
                partial(path).unlink(missing_ok=True)
            self.used -= shards[shard]
        return self.used + wanted <= self._limit


def _last_use(shard: Path) -> float:
    try:
        return (shard.parent / "locks" / shard.name).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _leased(leases: Path) -> set[str]:
    """Names of the shards that living processes need; what dead ones left is removed."""
    names: set[str] = set()
    for path in leases.iterdir():
        # A process may give up its lease, which takes no turn, at any moment.
        with contextlib.suppress(FileNotFoundError), locked(path, wait=False) as dead:
            if dead:
                path.unlink(missing_ok=True)
            else:
                content = path.read_bytes()
                names |= set(json.loads(content)) if content else set()
    return names


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file; without ``wait`` gives False if another process holds it.

    Raises:
        DatasetError: the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _lock(descriptor, path, wait=wait)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, *, wait: bool) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be locked ({error.strerror}); put data.cache.path on a file system with locks, best on a "
            f"disk of the node"
        ) from None
    return True
