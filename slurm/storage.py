"""Whether runs can live in a folder: seen by all nodes, writable, with locks, a right clock, and room."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from potamos.slurm.finding import GIB, Finding, Level, text_of
from potamos.slurm.lock import lock_holder
from potamos.slurm.status import printable

SHARED = re.compile(
    r"nfs\d?|lustre|gpfs|mmfs|beegfs|ceph|wekafs|panfs|orangefs|pvfs2?|afs|cifs|smb\d?|9p|virtiofs|gfs2|ocfs2|daos|fuse\..*"
)
SKEW, SKEW_MUNGE = 2.0, 300.0  # seconds; munge refuses credentials that are older
STAMP, LOCK = ".potamos-doctor.stamp", "lock"
NOT_SHARED = "keep runs on a file system that all nodes share, and list it as `shared:` in site.yaml"
NO_LOCKS = "mount it with locks (Lustre: -o flock; NFS: not nolock): without, nothing stops two jobs in one run folder"


def shared_with(folder: Path, token: str) -> Iterator[Finding]:
    """Whether this node sees what the submitting machine has just written into ``folder``, and the lock it holds."""
    if text_of(folder / LOCK) != token:
        yield Finding("wrong", "shared folder", f"what was written to {printable(folder)} is not here", NOT_SHARED)
        return
    yield Finding("ok", "shared folder", "what is written there is seen here")
    if lock_holder(folder / LOCK) is None:
        yield Finding("warning", "locks", "a lock that the submitting machine holds is not seen here", NO_LOCKS)
    else:
        yield Finding("ok", "locks", "one that the submitting machine holds is seen here")


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> tuple[str, str]:
    """Kind and mount point of the file system that holds ``path``; ("unknown", "/") where nothing says."""
    resolved, found = path.resolve(), ("unknown", Path("/"))
    for line in text_of(mounts).splitlines():
        words = line.split(" ")
        if len(words) < 3:
            continue
        place = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[1]))
        # A later mount covers an earlier one on the same place.
        if resolved.is_relative_to(place) and len(place.parts) >= len(found[1].parts):
            found = (words[2], place)
    return found[0], str(found[1])


def storage(folder: Path, *, several: bool = True, mounts: Path = Path("/proc/mounts")) -> Iterator[Finding]:
    """Whether runs can live in ``folder``: seen by all nodes, writable, with locks, a right clock, and room.

    Args:
        several: whether the nodes are other machines than this one.
    """
    kind, place = file_system(folder, mounts)
    name = printable(folder)
    if several and not SHARED.fullmatch(kind):
        yield Finding(
            "warning", "file system", f"{name} is on {kind} ({printable(place)}), which looks like this machine's own",
            "keep runs where all nodes see them, and list such folders as `shared:` in site.yaml; --job tries it",
        )  # fmt: skip
    else:
        yield Finding("ok", "file system", f"{name} is on {kind} ({printable(place)})")
    stamp = folder / f"{STAMP}.{socket.gethostname()}.{os.getpid()}"
    try:
        yield from _try_writing(folder, stamp)
    except OSError as error:
        yield Finding(
            "wrong", "file system", f"{name} cannot be written to: {error.strerror}",
            "choose another folder for runs, or ask for the right to write there",
        )  # fmt: skip
        return
    finally:
        _remove(stamp)
    yield from _room(folder)


def _try_writing(folder: Path, stamp: Path) -> Iterator[Finding]:
    began, before = time.monotonic(), time.time()
    with open(stamp, "w") as file:
        file.write("potamos doctor\n")
        file.flush()
        os.fsync(file.fileno())
        after, seconds = time.time(), time.monotonic() - began
        yield clock(os.stat(stamp).st_mtime, before, after)
        yield _locks(file.fileno(), stamp, folder)
    if seconds > 1.0:
        yield Finding("warning", "file system", f"a line took {seconds:.1f} s to reach the disk", "try another folder")


def clock(told: float, before: float, after: float) -> Finding:
    """The file server's clock against this machine's: a file was written between ``before`` and ``after``."""
    skew = told - min(max(told, before - 0.01), after)  # file systems round down, by up to a tick
    if told < before and before - told < 1.0:
        skew = 0.0  # some count whole seconds
    if abs(skew) <= SKEW:
        return Finding("ok", "clock", "that of the file system agrees with this machine's")
    which = "ahead of" if skew > 0 else "behind"
    return Finding(
        "wrong" if abs(skew) > SKEW_MUNGE else "warning", "clock",
        f"the file system's is {abs(skew):.0f} s {which} that of {printable(socket.gethostname())}",
        "have both follow one time server (chronyc tracking); ages and orders of files are wrong until then",
    )  # fmt: skip


def _locks(descriptor: int, path: Path, folder: Path) -> Finding:
    """Whether a lock that this process takes is seen by another one."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return Finding("warning", "locks", f"{printable(folder)} refuses them: {error.strerror}", NO_LOCKS)
    code = "import sys; from potamos.slurm.lock import lock_holder; from pathlib import Path; "
    code += "sys.exit(lock_holder(Path(sys.argv[1])) is None)"
    seen = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=60, check=False)
    if seen.returncode == 0:
        return Finding("ok", "locks", "one process sees another's")
    return Finding("warning", "locks", f"{printable(folder)} takes them, but no other process sees them", NO_LOCKS)


def _room(folder: Path) -> Iterator[Finding]:
    room, system = shutil.disk_usage(folder), os.statvfs(folder)
    free = f"{room.free / GIB:,.1f} GiB free of {room.total / GIB:,.1f}"
    if room.free < 20 * GIB:
        level: Level = "wrong" if room.free < GIB else "warning"
        yield Finding(level, "disk", free, "remove old checkpoints, or choose another folder: a full disk ends runs")
    else:
        yield Finding("ok", "disk", f"{free}; a quota may leave less")
    if system.f_files and system.f_favail < 10_000:
        yield Finding("warning", "disk", f"room for only {system.f_favail:,} more files", "remove files that are done")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # as much in the way as before
