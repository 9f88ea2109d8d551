"""Layouts as `potamos verify` takes and prints them, and the matrix of those worth proving."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

from potamos.parallel.facts import Layout
from potamos.parallel.mesh import AXES, LayoutError
from potamos.parallel.pipeline import SCHEDULES
from potamos.pretrain.recipe import Parallel

SETTINGS = tuple(f.name for f in fields(Layout))
PLAIN = Layout(dp_replicate=1)
KINDS = ("state", "a2a", "ring")
COMPILERS = tuple(
    name for kind in get_args(Parallel.model_fields["compile"].annotation) for name in get_args(kind)
)  # as recipes may name them


def world_of(layout: Layout) -> int:
    """Ranks of a layout whose sizes are numbers."""
    return math.prod(getattr(layout, axis) for axis in AXES) * layout.ep


def parse_layout(words: Sequence[str], base: Layout = PLAIN) -> Layout:
    """``base`` with settings as on a command line: tp=2, schedule=zbv, cp_kinds=state,a2a, sequence_parallel=false.

    Raises LayoutError for an unknown setting or a value that it cannot have.
    """
    given: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in SETTINGS:
            raise LayoutError(f"{word!r} is no setting of a layout; write one of {', '.join(SETTINGS)}, as in tp=2")
        if name in given:
            raise LayoutError(f"{name} is given twice, as {given[name]} and {text}; give it once")
        given[name] = _value(name, text)
    return replace(base, **given)


def _value(name: str, text: str) -> Any:
    hint = get_type_hints(Layout)[name]
    if name == "cp_kinds":
        return tuple(_one_of(name, kind, (*KINDS, "pointwise")) for kind in text.split(",") if kind)
    if name == "schedule":
        return _one_of(name, text, tuple(SCHEDULES))
    if name == "compile":
        return None if text == "null" else _one_of(name, text, (*COMPILERS, "null"))
    if hint is bool:
        return _one_of(name, text.lower(), ("true", "false")) == "true"
    if choices := [choice for choice in get_args(hint) if isinstance(choice, str)]:
        return _one_of(name, text, choices)
    if hint is str:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise LayoutError(f"{name}={text}: give a whole number of ranks above 0, as in {name}=2")
    return int(text)


def _one_of(name: str, text: str, known: Iterable[str]) -> str:
    if text not in known:
        raise LayoutError(f"{name}={text}: choose one of {', '.join(known)}")
    return text


def spell(layout: Layout) -> str:
    """As `parse_layout` takes it: what differs from one process, and what matters then."""
    shown = [f"{axis}={size}" for axis in AXES if (size := getattr(layout, axis)) != 1]
    if layout.pp != 1:
        shown.append(f"schedule={layout.schedule}")
    if layout.tp != 1 and not layout.sequence_parallel:
        shown.append("sequence_parallel=false")
    if layout.cp != 1:
        shown.append(f"cp_order={layout.cp_order}")
        shown += [f"cp_kinds={','.join(layout.cp_kinds)}"] if layout.cp_kinds else []
    shown += [f"checkpointing={layout.checkpointing}"] if layout.checkpointing != "none" else []
    shown += [f"compile={layout.compile}"] if layout.compile is not None else []
    return " ".join(shown) or "one process"


def recipe_layout(layout: Layout, most: int) -> Layout:
    """A recipe's own layout on ``most`` ranks at most: 2 for what takes all that are left, and 2 for every larger axis
    where the sizes come to more."""
    given = {axis: 2 if (size := getattr(layout, axis)) == "all" else size for axis in AXES}
    if math.prod(given.values()) > most:
        given = {axis: min(size, 2) for axis, size in given.items()}
    return replace(layout, **given)


def matrix(kinds: Iterable[str], ranks: int = 8, base: Layout = PLAIN) -> Iterator[Layout]:
    """Layouts of up to ``ranks`` processes: every axis alone at 2 and at 4, then pairs and triples at 2 each.

    kinds: ways of joining slices that some layer allows, each tried where a sequence is split.
    """
    own = [kind for kind in KINDS if kind in set(kinds)]
    for layout in _matrix(own):
        layout = replace(base, **layout)
        if world_of(layout) <= ranks:
            yield layout


def _matrix(kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    for size in (2, 4):
        yield {"dp_replicate": size}
        yield {"dp_shard": size}
        yield {"tp": size}
    yield {"tp": 2, "sequence_parallel": False}
    yield {"dp_replicate": 2, "dp_shard": 2}
    for schedule in SCHEDULES:
        yield {"pp": 2, "schedule": schedule}
    yield {"pp": 4}
    for order in ("zigzag", "contiguous"):
        for kind in kinds:
            yield {"cp": 2, "cp_order": order, "cp_kinds": (kind,)}
    yield {"cp": 4}
    for data in ("dp_replicate", "dp_shard"):
        yield {data: 2, "tp": 2}
        yield {data: 2, "pp": 2}
        yield {data: 2, "cp": 2}
        yield {data: 2, "tp": 2, "pp": 2}
    yield {"tp": 2, "pp": 2}
    yield {"tp": 2, "pp": 2, "schedule": "interleaved_1f1b"}
    yield {"tp": 2, "pp": 2, "schedule": "zbv", "sequence_parallel": False}
    yield {"cp": 2, "tp": 2}
    yield {"cp": 2, "tp": 2, "sequence_parallel": False, "cp_order": "contiguous"}
    yield {"cp": 2, "pp": 2}
    yield {"cp": 2, "tp": 2, "pp": 2}
    yield {"dp_shard": 2, "cp": 2, "tp": 2}
    yield {"dp_replicate": 2, "dp_shard": 2, "tp": 2}
    yield {"dp_shard": 2, "tp": 2, "checkpointing": "full"}
    yield {"pp": 2, "schedule": "zero_bubble", "checkpointing": "full"}
    for schedule in ("zero_bubble", "zbv", "dualpipe_v"):
        yield {"pp": 2, "dp_shard": 2, "schedule": schedule}
    yield {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "schedule": "zbv", "checkpointing": "full"}
    if kinds:
        yield {"pp": 2, "cp": 2, "schedule": "zero_bubble", "cp_kinds": kinds[:1]}
        yield {"pp": 2, "cp": 2, "schedule": "zbv", "cp_kinds": kinds[-1:]}
        yield {"pp": 2, "dp_shard": 2, "cp": 2, "schedule": "dualpipe_v", "cp_kinds": kinds}
    yield {"cp": 2, "tp": 2, "checkpointing": "selective"}
