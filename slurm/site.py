"""What a cluster wants of every job: ``~/.config/potamos/site.yaml``, written once by whoever knows the cluster.

    prologue:                        # lines of shell, run at the top of every job, as they are
      - module load cuda/12.8
      - source ~/venv/bin/activate
    python: /shared/venv/bin/python  # the interpreter on the nodes; this one by default
    partition: gpu                   # where a recipe names none; likewise account, qos, constraint
    environment: {NCCL_SOCKET_IFNAME: ib0}
    shared: [/home, /scratch]        # folders that all nodes see: runs must lie inside
    container: {kind: pyxis, mounts: [/scratch], arguments: [--container-writable], python: python3}

A recipe's own values and the command line win over these. Everything is text as it is written: no value is
interpreted, so ``NCCL_DEBUG: 1`` and ``no`` stay what they look like.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NoReturn

import yaml

from potamos.slurm.job import VARIABLE

PLACE = "POTAMOS_SITE"
KINDS = ("pyxis", "apptainer")


class SiteError(ValueError):
    """The site file cannot be used. Names file, line and key, and what would do."""


@dataclass(frozen=True)
class SiteContainer:
    """How this cluster runs containers. The image comes from a recipe or the command line."""

    kind: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    python: str = "python3"


@dataclass(frozen=True)
class Site:
    """A site file's content; without a file, nothing is set. ``source``: the file, None without one."""

    prologue: tuple[str, ...] = ()
    python: str | None = None
    container: SiteContainer | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    shared: tuple[Path, ...] = ()
    source: Path | None = field(default=None, compare=False)


def site_path() -> Path:
    """Where the site file is looked for: ``$POTAMOS_SITE``, else ``potamos/site.yaml`` of the user's configuration."""
    if named := os.environ.get(PLACE):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "potamos" / "site.yaml"


def load_site(path: Path | None = None) -> Site:
    """The site file at ``path``, or where `site_path` says.

    Raises:
        SiteError: it cannot be read, or holds what no site has; also if ``path`` or ``$POTAMOS_SITE`` names no file.
    """
    named = path is not None or bool(os.environ.get(PLACE))
    path = site_path() if path is None else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if named:
            raise SiteError(f"{path}: there is no such site file; write one, or unset {PLACE}") from None
        return Site()
    except UnicodeDecodeError:
        raise SiteError(f"{path}: not text in UTF-8") from None
    except OSError as error:
        raise SiteError(f"{path}: cannot be read: {error.strerror}") from None
    return read_site(text, path)


def read_site(text: str, source: Path) -> Site:
    """The site that ``text`` describes; ``source`` is what errors call it. Raises SiteError."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        raise SiteError(f"{source}:{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    return _Reader(source).site(node)


class _Reader:
    """Turns nodes into values. Scalars are taken as they are written, so YAML's own readings play no part."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def site(self, node: yaml.Node | None) -> Site:
        found: dict[str, object] = {"source": self.source}
        if node is None or _is_null(node):
            return Site(**found)  # pyright: ignore[reportArgumentType]
        known = [f.name for f in fields(Site) if f.name != "source"]
        for key, value in self.entries(node, "", known):
            if _is_null(value):
                continue
            if key == "prologue":
                found[key] = self.lines(value, key)
            elif key == "container":
                found[key] = self.container(value)
            elif key == "environment":
                found[key] = self.variables(value)
            elif key == "shared":
                found[key] = tuple(Path(each) for each in self.folders(value, key))
            else:
                found[key] = self.text(value, key)
        return Site(**found)  # pyright: ignore[reportArgumentType]

    def container(self, node: yaml.Node) -> SiteContainer:
        found: dict[str, object] = {}
        for key, value in self.entries(node, "container", [f.name for f in fields(SiteContainer)]):
            name = f"container.{key}"
            if key == "kind":
                found[key] = self.text(value, name)
                if found[key] not in KINDS:
                    self.fail(value, f"{name}: {found[key]!r} is none of {', '.join(KINDS)}")
            elif key == "python":
                found[key] = self.text(value, name)
            else:
                found[key] = tuple(self.texts(value, name))
        return SiteContainer(**found)  # pyright: ignore[reportArgumentType]

    def variables(self, node: yaml.Node) -> dict[str, str]:
        found = {}
        for name, value in self.entries(node, "environment", None):
            if not VARIABLE.fullmatch(name):
                self.fail(value, f"environment: {name!r} is no name of a variable: use letters, digits and _")
            found[name] = self.text(value, f"environment.{name}", empty=True)
        return found

    def entries(self, node: yaml.Node, inside: str, known: list[str] | None) -> Iterator[tuple[str, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{inside or 'a site file'}: expected keys and values (`partition: gpu`)")
        seen: set[str] = set()
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            name = f"{inside}.{key}" if inside else f"{key}"
            if key is None or (known is not None and key not in known):
                near = difflib.get_close_matches(str(key), known or [], n=1)
                hint = f"; did you mean `{near[0]}`?" if near else ""
                self.fail(key_node, f"{name}: unknown key{hint} (known here: {', '.join(known or [])})")
            if key in seen:
                self.fail(key_node, f"{name}: given twice; remove one of them")
            seen.add(key)
            yield key, value

    def lines(self, node: yaml.Node, name: str) -> tuple[str, ...]:
        """A list of lines, or a block of text with a line each."""
        texts = [node.value] if isinstance(node, yaml.ScalarNode) else self.texts(node, name)
        return tuple(line for text in texts for line in text.split("\n") if line.strip())

    def folders(self, node: yaml.Node, name: str) -> list[str]:
        found = [os.path.expanduser(text) for text in self.texts(node, name)]
        for text in found:
            if not os.path.isabs(text):
                self.fail(node, f"{name}: {text!r} is relative; give the whole path, as in /scratch")
        return found

    def texts(self, node: yaml.Node, name: str) -> list[str]:
        if not isinstance(node, yaml.SequenceNode):
            self.fail(node, f"{name}: expected a list, as in [a, b]")
        return [self.text(item, name) for item in node.value]

    def text(self, node: yaml.Node, name: str, *, empty: bool = False) -> str:
        if not isinstance(node, yaml.ScalarNode) or _is_null(node):
            self.fail(node, f"{name}: expected text")
        if not node.value and not empty:
            self.fail(node, f"{name}: is empty; give a value, or take the key out")
        return node.value

    def fail(self, node: yaml.Node, message: str) -> NoReturn:
        raise SiteError(f"{self.source}:{node.start_mark.line + 1}: {message}")


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"
