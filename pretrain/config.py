"""Recipes: read, override, check, write, compare. The tree itself is in ``recipe.py``.

recipe = load_recipe("h3_hybrid_tiny", ["train.steps=100"])
Path("recipe.yaml").write_text(to_yaml(recipe))
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from typing_extensions import is_typeddict

from potamos.data.skips import SkipList
from potamos.pretrain.component import Component, Location, suggestion
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.recipe_file import (
    COMMAND_LINE,
    Document,
    RecipeError,
    dotted,
    override,
    read_document,
    show,
    write_text,
)

__all__ = [
    "ABSENT",
    "Change",
    "Recipe",
    "RecipeError",
    "available",
    "differences",
    "fingerprint",
    "load_recipe",
    "parse_recipe",
    "resume_check",
    "to_yaml",
]

# --- reading and writing ---------------------------------------------------------------------------------


def available() -> list[str]:
    """Names of the packaged recipes, sorted."""
    folder = importlib.resources.files("potamos.recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a packaged name (``h3_hybrid_tiny``) or of a file (anything with a slash or a suffix).

    ``overrides`` are ``key=value`` with dotted keys: ``train.steps=100``, ``data.stages.0.mixture.0.path=data/c4`` or
    ``model.at.1.mixer={kind: attention, heads: 4}``.

    Raises:
        RecipeError: no such recipe, or it is refused; one line for each problem.
    """
    text, source = _read(name_or_path)
    return parse_recipe(text, source, overrides)


def parse_recipe(text: str, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe written in ``text``; ``source`` is what errors call the file."""
    document = read_document(text, source)
    override(document, overrides)
    try:
        return Recipe.model_validate(document.tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, document)) from None


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, defaults included; `parse_recipe` gives an equal recipe back."""
    return write_text(_dump(recipe))


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe: equal for equal recipes, whatever their files looked like."""
    return hashlib.sha256(json.dumps(_dump(recipe), sort_keys=True).encode()).hexdigest()


def _dump(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(by_alias=True)


def _read(name_or_path: str | Path) -> tuple[str, str]:
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and len(path.parts) == 1 and path.suffix.lower() not in (".yaml", ".yml"):
        known = available()
        if name_or_path not in known:
            remedy = f"write {path}.yaml for a file" if path.with_suffix(".yaml").exists() else "give a path for a file"
            near = suggestion(name_or_path, known)
            raise RecipeError([f"no packaged recipe {name_or_path!r}{near} (known: {', '.join(known)}); {remedy}"])
        packaged = importlib.resources.files("potamos.recipes") / f"{name_or_path}.yaml"
        return packaged.read_text(encoding="utf-8"), str(packaged)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}: not text in UTF-8 (byte {error.start}); is this a recipe?"]) from None
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read: {error.strerror}; packaged: {', '.join(available())}"]) from None


# --- errors ----------------------------------------------------------------------------------------------

UNIONS = (typing.Union, types.UnionType)
EXPECTED = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "string_type": "expected text; put it in quotes",
    "string_too_short": "must not be empty",
    "tuple_type": "expected a list",
    "dict_type": "expected a block of keys",
    "model_type": "expected a block of keys",
    "model_attributes_type": "expected a block of keys",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "expected {min_length} entries, {actual_length} given",
    "too_long": "expected {max_length} entries, {actual_length} given",
    "string_pattern_mismatch": "does not match {pattern}",
}


def _explain(error: ValidationError, document: Document) -> list[str]:
    """One line for each problem: place: key: value: what is wrong; nearest name; remedy."""
    lines = [(path, line) for path, line in (_explain_one(dict(e), document) for e in error.errors())]
    order = {place: index for index, place in enumerate(document.places)}
    lines.sort(key=lambda item: next((order[p] for p in _upward(item[0]) if p in order), -1))
    return list(dict.fromkeys(line for _, line in lines))


def _upward(path: Location) -> Iterator[Location]:
    return (path[:end] for end in range(len(path), 0, -1))


def _explain_one(error: dict[str, Any], document: Document) -> tuple[Location, str]:
    context = error.get("ctx", {})
    path: Location = context.get("location", error["loc"])
    value, what = error["input"], error["type"]
    if path and path[-1] == "[key]":
        path = path[:-1]
        value, text = path[-1], "layers are named by their number, 0-based"
    elif what == "missing":
        return path, f"{document.place(path)}: {dotted(path)}: missing; add it{_meaning(path, document)}"
    elif what == "extra_forbidden":
        names = _names(path[:-1], document)
        switched = document.place((*path[:-1], "kind")) == COMMAND_LINE != document.place(path)
        remedy = f"; to change the kind replace the whole block, {dotted(path[:-1])}={{kind: ..., ...}}"
        near = remedy if switched else suggestion(path[-1], names)
        text = f"unknown key{near} (known here: {', '.join(names)})"
    elif what == "literal_error":
        choices = _choices(path, document)
        text = f"expected one of {', '.join(choices)}{suggestion(value, choices)}" if choices else error["msg"]
    elif what == "problem":
        value = document.get(path) if value is None else value
        text = context["text"]
    elif what == "value_error":
        text = str(context["error"])
    else:
        text = EXPECTED[what].format(**context) if what in EXPECTED else error["msg"]
    return path, f"{document.place(path)}: {dotted(path)}: value {show(value)}: {text}"


def _meaning(path: Location, document: Document) -> str:
    """What may stand at a missing key."""
    component = _component(path, document)
    if component is not None:
        return f", as in {{kind: {component.default or component.kinds()[0]}}} (kinds: {', '.join(component.kinds())})"
    names = _names(path, document)
    return f" with its keys {', '.join(names)}" if names else ""


def _names(path: Location, document: Document) -> list[str]:
    """The keys that the block at ``path`` may have."""
    return list(_fields(_annotation(path, document)))


def _choices(path: Location, document: Document) -> list[str]:
    return [str(value) for value in _literals(_annotation(path, document))]


def _component(path: Location, document: Document) -> Component | None:
    """The component that the field at ``path`` holds."""
    parent = _annotation(path[:-1], document)
    return _marker(_fields(parent).get(str(path[-1]))) if path else None


def _annotation(path: Location, document: Document) -> Any:
    """The type at ``path`` of the tree; for a component's block, the settings of the kind that the document names."""
    annotation: Any = Recipe
    for depth, part in enumerate(path, start=1):
        if fields := _fields(annotation):
            annotation = fields.get(str(part))
        else:  # a list or a mapping of numbers: all entries are alike
            inside = typing.get_args(_plain(annotation))
            annotation = next((a for a in reversed(inside) if a is not Ellipsis), None)
        if (component := _marker(annotation)) is not None:
            block = document.get(path[:depth])
            annotation = component.options(block.get("kind") if isinstance(block, Mapping) else None)
        elif typing.get_origin(_plain(annotation)) in UNIONS:
            annotation = _of_form(annotation, document.get(path[:depth]))
    return annotation


def _of_form(union: Any, value: Any) -> Any:
    """Of a union of a block and a list, the one whose form ``value`` has; other unions as they are."""
    form = dict if isinstance(value, Mapping) else tuple
    for member in typing.get_args(_plain(union)):
        if (typing.get_origin(member) or (dict if _fields(member) else None)) is form:
            return member
    return union


def _fields(annotation: Any) -> dict[str, Any]:
    """Annotations of a block's keys, as they are written in YAML; empty for what is no block."""
    annotation = _plain(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {
            info.alias or name: typing.Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
            for name, info in annotation.model_fields.items()
        }
    if is_typeddict(annotation):
        return typing.get_type_hints(annotation, include_extras=True)
    return {}


def _plain(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _marker(annotation: Any) -> Component | None:
    return next((m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Component)), None)


def _literals(annotation: Any) -> list[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return list(arguments)
    if origin in (*UNIONS, typing.Annotated):
        return [value for argument in arguments for value in _literals(argument)]
    return []


# --- comparing -------------------------------------------------------------------------------------------


class _Absent:
    def __repr__(self) -> str:
        return "absent"


SKIP = ("data", "skip")
ABSENT = _Absent()
"""The value of a key that only the other recipe has."""

Change = tuple[str, Any, Any]
"""(dotted key, old value, new value)."""

# What may change when a run is continued. Nothing else may: it would make the finished part another run's.
FREE_SECTIONS = ("name", "family", "description", "parallel", "slurm", "checkpoint", "validate", "telemetry")
FREE = {"train": ("steps", "sequences", "micro_sequences"), "data": ("cache",)}


def differences(old: Recipe, new: Recipe) -> list[Change]:
    """Every leaf in which two recipes differ, in the order of the file."""
    return [(dotted(path), before, after) for path, before, after in _differences(old, new)]


def resume_check(old: Recipe, new: Recipe, next_sample: int) -> list[Change]:
    """Whether a run of ``old`` that has come to sample ``next_sample`` may continue as ``new``.

    Free to change are how the run is spread, submitted, saved, scored and logged, its labels, ``train.steps``,
    ``sequences`` and ``micro_sequences``, where tokenizer and datasets lie and shards are cached (whether they are the
    same is for their hashes to say, see `TokenStream.check_state`), and what begins at or after ``next_sample``: data
    stages and the ranges of ``data.skip``.

    Returns:
        The changes, for the log.

    Raises:
        RecipeError: other changes, one line for each.
    """
    begun = max(sum(stage.start < next_sample for stage in recipe.data.stages) for recipe in (old, new))
    allowed, refused = [], []
    for path, before, after in _differences(old, new):
        moved = path[0] in ("tokenizer", "data") and path[-1] == "path" and ABSENT not in (before, after)
        free = path[0] in FREE_SECTIONS or (len(path) > 1 and path[1] in FREE.get(str(path[0]), ()))
        later_stage = path[:2] == ("data", "stages") and len(path) > 2 and int(path[2]) >= begun
        later_range = path == SKIP and SkipList(before).before(next_sample) == SkipList(after).before(next_sample)
        (allowed if free or moved or later_stage or later_range else refused).append((dotted(path), before, after))
    if refused:
        raise RecipeError(
            f"{key}: value {_show(after)}: the run was started with {_show(before)}, and at sample {next_sample} this "
            f"can no longer change; {_remedy(key, next_sample)}, or start a new run folder"
            for key, before, after in refused
        )
    return allowed


def _remedy(key: str, next_sample: int) -> str:
    return f"add only ranges from {next_sample} on" if key == dotted(SKIP) else "set it back"


def _show(value: Any) -> str:
    return repr(value) if value is ABSENT else show(value)


def _differences(old: Recipe, new: Recipe) -> list[tuple[Location, Any, Any]]:
    before, after = dict(_leaves(_dump(old), ())), dict(_leaves(_dump(new), ()))
    paths = list(dict.fromkeys([*before, *after]))
    pairs = [(path, before.get(path, ABSENT), after.get(path, ABSENT)) for path in paths]
    return [(path, a, b) for path, a, b in pairs if a is ABSENT or b is ABSENT or a != b]


def _leaves(value: Any, path: Location) -> Iterator[tuple[Location, Any]]:
    if path == SKIP:  # one thing: a range put in front of others changes no other
        yield path, value
        return
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else None
    if items is None or not value:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, (*path, key))
