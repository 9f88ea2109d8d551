"""A recipe as text: YAML 1.2 scalars, the line of every key, overrides from the command line.

PyYAML's own loader reads ``6e-4`` as text, ``12:00:00`` as 43200 and ``no`` as false, and keeps the last of two equal
keys. Only its parser is used here: values are built below from the node tree, so nothing in a file can name a Python
object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Where a value stands in the tree: names and whole numbers (list indices, layers)."""

COMMAND_LINE = "command line"
DEEPEST = 40
LONGEST_VALUE = 72  # characters of a value that an error shows


class RecipeError(ValueError):
    """A recipe is refused. ``problems``: one line for each thing wrong, ``file:line: key: value ...: what, remedy``."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass
class Document:
    """A tree of dicts, tuples and scalars, and for each path in it the place it was written at."""

    tree: dict[str | int, Any]
    source: str
    places: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """``file:line`` of ``path``, or of the nearest block around it (a missing key has no line of its own)."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, f"{self.source}:1")

    def get(self, path: Path) -> Any:
        """The value at ``path``; None where there is none."""
        value: Any = self.tree
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def show(value: Any) -> str:
    """A value as an error names it: JSON, which tells the text "12" from the number 12, cut to a readable length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def dotted(path: Path) -> str:
    """``model.at.1.mixer``: how errors and overrides write a path."""
    return ".".join(map(str, path))


# --- reading ---------------------------------------------------------------------------------------------

# The core schema of YAML 1.2.2, section 10.3.2: (tag, pattern, first characters).
CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
)


class _Parser(yaml.SafeLoader):
    """PyYAML's parser with the scalars of YAML 1.2. Its constructors are never called."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own convention)


for _tag, _pattern, _first in CORE_SCHEMA:
    _Parser.add_implicit_resolver(_tag, _pattern, _first)  # pyright: ignore[reportArgumentType]


def read_document(text: str, source: str) -> Document:
    """Parse a recipe's text; ``source`` is the file's name in errors.

    Raises:
        RecipeError: not YAML, not a mapping, a key given twice, an alias, a tag, or a key that is no plain name.
    """
    node = _compose(text, source)
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError([f"{source}:1: a recipe is a mapping of sections (`name: ...`, `model: ...`)"])
    document = Document({}, source)
    problems: list[str] = []
    document.tree = _build(node, (), document, problems)
    if problems:
        raise RecipeError(problems)
    return document


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Parser):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):  # refused before they can multiply
                raise RecipeError([f"{source}:{line}: *{event.anchor}: recipes have no aliases; write the block out"])
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise RecipeError([f"{source}:{line}: more than {DEEPEST} blocks inside one another; a recipe has ten"])
        return yaml.compose(text, Loader=_Parser)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise RecipeError([f"{source}:{line}: not valid YAML: {error.problem or error.context}"]) from None
    except yaml.YAMLError as error:
        raise RecipeError([f"{source}:1: not valid YAML: {' '.join(str(error).split())}"]) from None


def _build(node: yaml.Node, path: Path, document: Document, problems: list[str]) -> Any:
    """The value of a node. Lists become tuples, so that what is frozen holds only what is frozen."""

    def refuse(at: yaml.Node, message: str) -> None:
        problems.append(f"{document.source}:{at.start_mark.line + 1}: {message}")

    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        built: dict[str | int, Any] = {}
        lines: dict[str | int, int] = {}
        for key_node, value_node in node.value:
            key = _key(key_node)
            if key is None:
                refuse(key_node, f"{dotted(path) or 'recipe'}: a key is a name or a whole number; put it in quotes")
                continue
            here = (*path, key)
            line = key_node.start_mark.line + 1
            if key in built:
                refuse(key_node, f"{dotted(here)}: given twice, first on line {lines[key]}; remove one of them")
                continue
            lines[key] = line
            document.places[here] = f"{document.source}:{line}"
            built[key] = _build(value_node, here, document, problems)
        return built
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        for index, item in enumerate(node.value):
            document.places[(*path, index)] = f"{document.source}:{item.start_mark.line + 1}"
        return tuple(_build(item, (*path, index), document, problems) for index, item in enumerate(node.value))
    if isinstance(node, yaml.ScalarNode):
        try:
            return _scalar(node)
        except ValueError as error:
            refuse(node, f"{dotted(path)}: {error}")
            return None
    refuse(node, f"{dotted(path)}: tag {node.tag!r} is not read; recipes hold plain values")
    return None


def _key(node: yaml.Node) -> str | int | None:
    if not isinstance(node, yaml.ScalarNode) or node.tag.rpartition(":")[2] not in ("str", "int"):
        return None
    try:
        return _scalar(node)
    except ValueError:
        return None


def _scalar(node: yaml.ScalarNode) -> Any:
    kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
    match kind:
        case "str":
            return text
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            base = {"0x": 16, "0o": 8}.get(text[:2], 10)
            return int(text, base)  # int() itself refuses thousands of digits with a ValueError
        case "float":
            special = text.lower()
            return float(special.replace(".", "") if special.lstrip("+-") in (".inf", ".nan") else text)
    raise ValueError(f"tag {node.tag!r} is not read; recipes hold plain values")


# --- overrides -------------------------------------------------------------------------------------------


def override(document: Document, assignments: Sequence[str]) -> None:
    """Apply ``key=value`` overrides in order; values are read by the rules of a file (``{kind: h3}``, lists).

    Blocks and entries on the way are made where they are missing; whether the key exists is for the schema to say.

    Raises:
        RecipeError: no key or no "=", a value that is not YAML, or a path through something that is no block.
    """
    problems: list[str] = []
    for assignment in assignments:
        try:
            _assign(document, assignment)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)


def _assign(document: Document, assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    path = tuple(int(part) if re.fullmatch(r"-?[0-9]+", part) else part for part in key.strip().split("."))
    if not equals or "" in path:
        raise RecipeError([f"{COMMAND_LINE}: {assignment!r} is no override; write key=value, as in train.steps=1000"])
    value, inside = _read_value(text, path)
    _replace(document, path, value)
    document.places = {p: place for p, place in document.places.items() if p[: len(path)] != path}
    made = (path[:depth] for depth in range(1, len(path)) if path[:depth] not in document.places)
    document.places |= dict.fromkeys((*made, path, *inside), COMMAND_LINE)


def _read_value(text: str, path: Path) -> tuple[Any, list[Path]]:
    """A value and the paths in it."""
    read, problems = Document({}, COMMAND_LINE), []
    try:
        node = _compose(text, COMMAND_LINE)
    except RecipeError as error:
        unread = (problem.split(": ", 1)[1] for problem in error.problems)
        raise RecipeError(f"{COMMAND_LINE}: {dotted(path)}: {problem}" for problem in unread) from None
    value = None if node is None else _build(node, path, read, problems)
    if problems:
        raise RecipeError(f"{COMMAND_LINE}: {problem.split(': ', 1)[1]}" for problem in problems)
    return value, list(read.places)


def _replace(document: Document, path: Path, value: Any) -> None:
    """Put ``value`` at ``path``; tuples on the way are copied."""

    def into(block: Any, depth: int) -> Any:
        if depth == len(path):
            return value
        part, here = path[depth], dotted(path[: depth + 1])
        if block is None:
            block = {}
        if isinstance(block, Mapping):
            return {**block, part: into(block.get(part), depth + 1)}
        if isinstance(block, tuple):
            if not isinstance(part, int) or not 0 <= part <= len(block):
                known = f"0 to {len(block) - 1}" if block else "none yet"
                raise RecipeError([f"{COMMAND_LINE}: {here}: no such entry of a list (entries: {known}; 0-based)"])
            old = block[part] if part < len(block) else None
            return (*block[:part], into(old, depth + 1), *block[part + 1 :])
        raise RecipeError([f"{COMMAND_LINE}: {here}: {dotted(path[:depth])} is {show(block)}, which has no keys"])

    document.tree = into(document.tree, 0)


# --- writing ---------------------------------------------------------------------------------------------


class _Writer(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 *or* 1.2 would read as something else; leaf blocks go on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        del indentless  # lists stand inside their key
        super().increase_indent(flow, False)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes these line breaks of YAML 1.1 bare and folds them on reading; only double quotes escape them.
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


for _tag, _pattern, _first in CORE_SCHEMA:
    _Writer.add_implicit_resolver(_tag, _pattern, _first)  # pyright: ignore[reportArgumentType]
_Writer.add_representer(str, _Writer.represent_str)


def write_text(tree: Mapping[str, Any]) -> str:
    """The YAML of a plain tree, in its own order; `read_document` gives the tree back."""
    return yaml.dump(
        _plain(tree), Dumper=_Writer, sort_keys=False, width=120, allow_unicode=True, default_flow_style=None
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
