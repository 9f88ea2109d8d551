"""From a path, folder or glob on the command line to files, and from files to inputs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from potamos.data.errors import SourceError
from potamos.data.sources.base import Input


def find_files(name: str, suffixes: Sequence[str]) -> tuple[Path, list[Path]]:
    """The root that input names are relative to, and the sorted files that a path, folder or glob stands for.

    A folder stands for its files with one of the suffixes, recursively, without hidden ones and without going through
    links to other folders. What cannot be read is listed too, so that it fails later instead of being left out.

    Raises:
        SourceError: a file or glob names one with none of the suffixes, or a folder cannot be listed.
    """
    path = Path(name)
    if path.is_dir():
        return path, sorted(_walk(path, tuple(suffixes)))
    if path.is_file():
        root, files = path.parent, [path]
    else:
        root = _fixed_part(path)
        files = sorted({match for match in map(Path, glob.glob(name, recursive=True)) if not match.is_dir()})
    for file in files:
        if not file.name.endswith(tuple(suffixes)):
            raise SourceError(
                f"{file}: what kind of file this is cannot be told from its name; known endings: {', '.join(suffixes)}"
            )
    return root, files


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise SourceError(f"{error.filename}: cannot be listed: {error.strerror}; mend or leave out the folder")

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.endswith(suffixes) and not name.startswith("."):
                yield Path(place, name)


def named_inputs(paths: Sequence[Path], root: Path) -> list[Input]:
    """One input a file."""
    return [Input(relative(path, root), (path,), file_size(path)) for path in paths]


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def file_size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; mend or leave out the file") from None


def _fixed_part(pattern: Path) -> Path:
    """The folders of a glob in front of its first wildcard."""
    fixed = Path(pattern.anchor)
    for part in pattern.relative_to(pattern.anchor).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed
