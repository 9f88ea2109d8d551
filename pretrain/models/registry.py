"""One table of every system: ``register`` fills it, recipes name its entries.

A room is a family of interchangeable systems (mixer, positions, pattern, channel, stack, frontend, objective, init).
Every file of a room's package is imported once on first use, so that a new system needs its file and nothing else.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

_table: dict[str, dict[str, Any]] = {}
_packages = [f"potamos.pretrain.models.{room}" for room in ("mixers", "positions", "channels", "stacks", "frontends")]
_packages += ["potamos.pretrain.models.patterns", "potamos.pretrain.models.initialize"]
_loaded: set[str] = set()


class UnknownName(ValueError):
    """A recipe names a system that is not registered."""

    def __init__(self, room: str, name: str) -> None:
        known = names(room)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {room} {name!r}{hint} (known: {', '.join(known)})")


def register(room: str, name: str) -> Callable[[T], T]:
    """Class decorator: make a class known as ``name`` in ``room``. The class has an ``Options`` of its settings."""

    def enter(cls: T) -> T:
        present = _table.setdefault(room, {}).get(name)
        if present is not None and (present.__module__, present.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{room} {name!r} is registered twice: by {present.__module__} and by {cls.__module__}")
        _table[room][name] = cls
        return cls

    return enter


def add_package(package: str) -> None:
    """Import every module of ``package`` on the next look-up; how rooms outside the models join the table."""
    if package not in _packages:
        _packages.append(package)


def _load() -> None:
    for package in [p for p in _packages if p not in _loaded]:
        _loaded.add(package)
        module = importlib.import_module(package)
        for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
            importlib.import_module(f"{package}.{found.name}")


def names(room: str) -> list[str]:
    """The registered names of a room, sorted."""
    _load()
    return sorted(_table.get(room, {}))


def lookup(room: str, name: str) -> Any:
    """The class registered as ``name`` in ``room``; UnknownName with the nearest name otherwise."""
    _load()
    try:
        return _table[room][name]
    except KeyError:
        raise UnknownName(room, name) from None
