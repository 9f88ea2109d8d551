"""The walk-through in CONTRIBUTING.md shows files as they are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def diffs(page: str) -> dict[str, str]:
    """{path: content} of the new files in the page's diff block."""
    block = re.search(r"```diff\n(.*?)```", page, re.DOTALL)
    assert block is not None, "CONTRIBUTING.md has no diff"
    files: dict[str, list[str]] = {}
    path = ""
    for line in block[1].splitlines():
        if line.startswith("+++ b/"):
            path = line.removeprefix("+++ b/")
            files[path] = []
        elif path and line.startswith("+"):
            files[path].append(line[1:])
        elif line.startswith("diff --git"):
            path = ""
    return {name: "\n".join(lines) + "\n" for name, lines in files.items()}


@pytest.mark.parametrize("path", ["pretrain/models/mixers/linear_attention.py", "recipes/linear_tiny.yaml"])
def test_walk_through_shows_the_file(path: str) -> None:
    shown = diffs((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert shown[path] == (ROOT / path).read_text(encoding="utf-8")


def test_walk_through_is_all_there_is() -> None:
    """No other file of the program names the example mixer: one file and one recipe really are enough."""
    rooms = ("pretrain", "parallel", "kernels", "data", "recipes")
    naming = {
        str(path.relative_to(ROOT))
        for room in rooms
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".yaml") and "linear_attention" in path.read_text(encoding="utf-8")
    }
    assert naming == {"pretrain/models/mixers/linear_attention.py", "recipes/linear_tiny.yaml"}
