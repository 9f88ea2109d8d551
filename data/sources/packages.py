"""Corpora that come as installed Python packages: finding one without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from potamos.data.errors import SourceError


def find_package(name: str, inside: str, install: str) -> tuple[Path, str]:
    """A path inside an installed package that is there, and the package's version ("unknown" without metadata).

    Raises:
        SourceError: the package or the path is missing; the message ends with ``install``.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"source {name!r} needs the Python package {name}, which is not installed; {install}")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        raise SourceError(f"source {name!r}: {path} is missing; {install}")
    try:
        return path, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return path, "unknown"
