"""The program as it runs now, copied into a run folder, so that later edits change no run that waits or is requeued.

    code/potamos/     the package; the ranks run with PYTHONPATH=code
    code/COMMIT       the checkout's commit, or the version of an installed package
    code/dirty.diff   what the working tree has beyond that commit: `git apply` on the commit gives the tree back

In a checkout the files are those that git tracks or would, as they are in the working tree; else those installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = (".py", ".sh")
LARGEST_NEW_FILE = 1 << 20  # bytes; a dataset that lies about in a checkout is no part of the program
UNKNOWN = "unknown"


class SnapshotError(ValueError):
    """The program cannot be copied; says what stands in the way."""


@dataclass(frozen=True)
class Snapshot:
    """What was copied. ``modified``: the tree differs from ``commit``; ``sha256`` of all paths and contents."""

    commit: str
    modified: bool
    files: int
    sha256: str


def take_snapshot(code: Path, package: Path = PACKAGE) -> Snapshot:
    """Copy the package at ``package`` to ``code``; what was there is replaced only when the copy is whole.

    Raises:
        SnapshotError: there is nothing to copy, or git fails.
    """
    package = package.resolve()
    commit, diff = _state(package)
    files = shipped_files(package)
    if not files:
        raise SnapshotError(f"{package} holds no program to copy")
    new = code.with_name(f".{code.name}.{os.getpid()}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        digest = _copy(package, files, new / "potamos")
        (new / "COMMIT").write_text(f"{commit}\n", encoding="utf-8")
        if diff is not None:
            (new / "dirty.diff").write_bytes(diff)
        _replace(new, code)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return Snapshot(commit, bool(diff), len(files), digest)


def shipped_files(package: Path = PACKAGE) -> list[PurePosixPath]:
    """The program's files, sorted, relative to the package: what a wheel of it would ship. No tests, no benchmarks."""
    listed = _git_files(package)
    if listed is None:
        listed = (PurePosixPath(path.relative_to(package).as_posix()) for path in package.rglob("*"))
    return sorted({path for path in listed if _is_shipped(path, package)})


def _is_shipped(path: PurePosixPath, package: Path) -> bool:
    """Code in folders that are packages all the way up, and the packaged recipes."""
    if any(part.startswith(".") or part == "__pycache__" for part in path.parts):
        return False
    if path.suffix not in SHIPPED and not (path.suffix == ".yaml" and path.parts[0] == "recipes"):
        return False
    folders = [package / folder for folder in path.parents]
    return (package / path).is_file() and all((folder / "__init__.py").is_file() for folder in folders)


def _copy(package: Path, files: Iterable[PurePosixPath], target: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        content = (package / path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(content)
    return digest.hexdigest()


def _replace(new: Path, code: Path) -> None:
    """Put ``new`` in the place of ``code``. A folder cannot be renamed over one that holds files."""
    if not code.exists():
        os.rename(new, code)
        return
    old = new.with_suffix(".old.tmp")
    os.rename(code, old)
    os.rename(new, code)
    shutil.rmtree(old, ignore_errors=True)


# --- git ------------------------------------------------------------------------------------------------------------


def _git(package: Path, *arguments: str, **variables: str) -> bytes | None:
    """What git prints; None if it fails or is not there. The user's own settings must not change what it prints."""
    settings = ("-c", "core.quotePath=false", "-c", "core.autocrlf=false", "-c", "core.fsmonitor=false")
    settings += ("-c", f"safe.directory={package}")  # a colleague's checkout: its program is run already
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *settings, "-C", str(package), *arguments], capture_output=True, check=True, timeout=120,
            stdin=subprocess.DEVNULL, env=kept | {"GIT_LITERAL_PATHSPECS": "1", "GIT_OPTIONAL_LOCKS": "0"} | variables,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _is_checkout(package: Path) -> bool:
    """Whether git knows the package's folder as the top of a checkout, rather than one somewhere above it."""
    top = _git(package, "rev-parse", "--show-toplevel")
    return top is not None and Path(os.fsdecode(top.rstrip(b"\n"))).resolve() == package


def _git_files(package: Path) -> list[PurePosixPath] | None:
    """Paths that are tracked, or not ignored, as the working tree has them; None if this is no checkout."""
    if not _is_checkout(package):
        return None
    out = _git(package, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return None if out is None else [PurePosixPath(os.fsdecode(name)) for name in out.split(b"\0") if name]


def _state(package: Path) -> tuple[str, bytes | None]:
    """The commit, and how the tree differs from it (nothing, if it does not); None where there is no checkout."""
    head = _git(package, "rev-parse", "--verify", "HEAD^{commit}") if _is_checkout(package) else None
    if head is None:
        return f"{UNKNOWN}: potamos {_version()}, installed at {package}", None
    diff = _diff(package)
    if diff is None:
        raise SnapshotError(f"{package}: git cannot say how this tree differs from its commit; see `git diff HEAD`")
    return head.decode().strip(), diff


def _diff(package: Path) -> bytes | None:
    """`git diff HEAD` with new files in it. They are marked as new in a copy of the index: the checkout stays as it is,
    and may be one that this user can only read."""
    out = _git(package, "ls-files", "-z", "--others", "--exclude-standard")
    index, objects = _git_path(package, "index"), _git_path(package, "objects")
    if out is None or index is None or objects is None:
        return None
    new = [name for name in out.split(b"\0") if name and not _is_private(name)]
    fitting = [name for name in new if _size(package, name) <= LARGEST_NEW_FILE]
    with tempfile.TemporaryDirectory() as folder:
        own, names = Path(folder) / "index", Path(folder) / "names"
        if index.exists():
            shutil.copyfile(index, own)
        (Path(folder) / "objects").mkdir()
        places = {
            "GIT_INDEX_FILE": str(own),
            "GIT_OBJECT_DIRECTORY": f"{folder}/objects",
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
        }
        names.write_bytes(b"\0".join(fitting))
        if fitting:
            mark = ("add", "--intent-to-add", f"--pathspec-from-file={names}", "--pathspec-file-nul")
            if _git(package, *mark, **places) is None:
                return None
        options = ("--no-ext-diff", "--no-textconv", "--no-color", "--binary", "--full-index", "--no-renames")
        prefixes = ("--src-prefix=a/", "--dst-prefix=b/")
        diff = _git(package, "diff", *options, *prefixes, "HEAD", **places)
    if diff is None:
        return None
    left = sorted(set(new) - set(fitting))
    return b"".join(b"# left out, larger than 1 MiB: %s\n" % name for name in left) + diff


def _git_path(package: Path, name: str) -> Path | None:
    out = _git(package, "rev-parse", "--path-format=absolute", "--git-path", name)
    return None if out is None else Path(os.fsdecode(out.rstrip(b"\n")))


def _is_private(name: bytes) -> bool:
    """Hidden files (`.env` may hold passwords, and a run folder is shared), and checkouts inside, which are folders."""
    return name.endswith(b"/") or any(part.startswith(b".") for part in name.split(b"/"))


def _size(package: Path, name: bytes) -> int:
    try:
        return os.lstat(os.path.join(os.fsencode(package), name)).st_size
    except OSError:
        return 0


def _version() -> str:
    try:
        return importlib.metadata.version("potamos")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
