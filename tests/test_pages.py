"""What the pages name is there: files, targets of make, commands and their options, recipes."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from potamos.pretrain import cli
from potamos.pretrain.config import available

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md")])
SUFFIXES = ".py", ".sh", ".csv", ".md", ".yaml"
ELSEWHERE = {  # files that pages name and that are no part of the project
    "recipe.yaml", "site.yaml", "my.yaml", "mine.yaml", "evaluations.csv",
}  # fmt: skip

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(page: Path) -> list[str]:
    """Lines of code, but for those of a diff, and code within lines."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(?!diff)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^    (\S.*)$", prose, re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", prose, flags=re.MULTILINE))
    return [*(line for block in fenced for line in block.splitlines()), *lines, *(" ".join(s.split()) for s in spans)]


def commands(lines: Iterable[str]) -> list[list[str]]:
    """The words behind `potamos` of every command among lines of code."""
    found = []
    for line in (line for line in lines if "potamos " in line):
        inner = re.search(r"\$\((potamos .*?)\)", line)
        words = shlex.split(inner[1] if inner else re.sub(r"\.\.\.|[][](?=--)", "", line), comments=True)
        if "potamos" in words[:1] or ("potamos" in words and words[0] in ("torchrun", "srun")):
            choices = (word.split("|") for word in words[words.index("potamos") + 1 :])
            found += map(list, itertools.product(*choices))
    return found


def problem(words: Sequence[str]) -> str | None:
    """What is wrong with a command; words in capitals stand for a user's own."""
    command: Any = typer.main.get_command(cli.app)
    rest = list(words)
    while rest and hasattr(command, "commands"):
        name = rest.pop(0)
        if name in options(command):
            return None
        if name not in command.commands:
            return f"no command {name!r}"
        command = command.commands[name]
    for word in rest:
        name = word.partition("=")[0]
        if re.match(r"--?[a-z]", name) and name not in options(command):
            return f"no option {name}"
    takes = [parameter.name for parameter in command.params if parameter.param_type_name == "argument"]
    if rest and takes[:1] == ["recipe"] and not rest[0].endswith(".yaml") and rest[0].islower():
        return None if rest[0] in available() else f"no recipe {rest[0]!r}"
    return None


def options(command: Any) -> set[str]:
    return {"--help"}.union(*(parameter.opts + parameter.secondary_opts for parameter in command.params))


def leaves(command: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its name in full."""
    if not hasattr(command, "commands"):
        yield " ".join(path), command
        return
    for name, each in command.commands.items():
        yield from leaves(each, *path, name)


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    assert {" ".join(words): said for words in commands(code(page)) if (said := problem(words))} == {}


@pytest.mark.parametrize(("name", "command"), [*leaves(typer.main.get_command(cli.app))])
def test_every_command_has_an_example_that_works(name: str, command: Any) -> None:
    paragraphs = [" ".join(paragraph.split()) for paragraph in command.help.split("\n\n")]
    assert any(re.match(rf'Example: (eval "\$\()?potamos {name}\b', paragraph) for paragraph in paragraphs)
    shown = re.findall(r": ((?:torchrun |eval |potamos ).+?)(?=\. |$)", "\n".join(paragraphs), re.MULTILINE)
    assert {" ".join(words): said for words in commands(shown) if (said := problem(words))} == {}


def test_options_named_alone_exist() -> None:
    spans = {line.split()[0].partition("=")[0] for line in code(ROOT / "README.md") if line.startswith("--")}
    assert len(spans) > 5
    assert spans <= {option for _, command in leaves(typer.main.get_command(cli.app)) for option in options(command)}


def test_what_is_wrong_with_a_command() -> None:
    assert problem(["train", "h3_hybrid_tiny", "train.steps=200", "--run", "runs/trial"]) is None
    assert problem(["--version"]) is None
    assert problem(["trian", "h3_hybrid_tiny"]) == "no command 'trian'"
    assert problem(["data", "prepare", "--tokeniser=x"]) == "no option --tokeniser"
    assert problem(["logs", "RUN", "-g"]) == "no option -g"
    assert problem(["train", "h4_hybrid_tiny"]) == "no recipe 'h4_hybrid_tiny'"
    assert sum(len(commands(code(page))) for page in PAGES) > 50, "they are not found any more"


@pages
def test_targets_of_make_exist(page: Path) -> None:
    listed = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed is not None
    called = [line.partition(" #")[0].split() for line in code(page) if line.startswith("make ")]
    named = {word for _, *words in called for word in words if re.fullmatch("[a-z]+", word)}
    assert named <= {*listed[1].split()}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    """From the page's folder or the root; a plain name anywhere below the page, or among the results."""
    named = {word for line in code(page) for word in line.split() if re.fullmatch(r"[\w./*-]+", word)}
    files = {word for word in named if word.endswith(SUFFIXES) and Path(word).name not in ELSEWHERE}
    places = ROOT, page.parent, ROOT / "benchmarks" / "results"
    missing = {f for f in files if not any(any(place.glob(f)) for place in places)}
    assert {f for f in missing if "/" in f or not any(page.parent.rglob(f))} == set()
