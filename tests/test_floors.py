"""Which room may import which, read from the source of every module.

    kernels    torch, triton, the standard library
    data       none of the other rooms
    slurm      none of the other rooms
    recipes    none of the other rooms
    parallel   kernels
    pretrain   everything; but pretrain/models imports neither the trainer nor the objectives

`files.py`, beside the rooms, serves them all and imports none. Nothing imports pretrain. Kernels, data, slurm and the
models never import torch.distributed: what crosses ranks reaches a model through an injected axis. Imports inside
functions and under TYPE_CHECKING count too; only the search for circles looks at what runs when a module is imported.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "potamos"

MAY_IMPORT = {
    "": set(),  # the package's own __init__.py
    "files": set(),
    "kernels": set(),
    "data": set(),
    "slurm": set(),
    "recipes": set(),
    "parallel": {"kernels"},
    "pretrain": {"kernels", "data", "slurm", "recipes", "parallel"},
}
KERNELS_MAY_IMPORT = {"torch", "triton", PACKAGE, *sys.stdlib_module_names}
MODELS_MAY_NOT_IMPORT = (f"{PACKAGE}.pretrain.trainer", f"{PACKAGE}.pretrain.objectives")
WITHOUT_DISTRIBUTED = tuple(f"{PACKAGE}.{room}" for room in ("kernels", "data", "slurm", "pretrain.models"))


@dataclass(frozen=True)
class Import:
    importer: str  # full module name
    target: str  # full dotted name, as deep as the statement says
    place: str  # file:line
    at_import: bool  # runs when the importer is imported


def modules_of(root: Path) -> dict[str, Path]:
    """Full name of each module of the package, and its file."""
    found = {PACKAGE: root / "__init__.py"} | {f"{PACKAGE}.{p.stem}": p for p in root.glob("*.py") if p.stem[0] != "_"}
    for room in sorted(MAY_IMPORT.keys() - {"", "files"}):
        for path in sorted((root / room).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imports_of(name: str, path: Path, root: Path) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        place = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
        for target in targets(node, package):
            yield Import(name, target, place, at_import)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False)
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            yield from visit(child, at_import and not lazy)

    yield from visit(ast.parse(path.read_text(), str(path)), True)


def targets(node: ast.AST, package: str) -> list[str]:
    """The modules (or names in modules) that one node imports; relative ones resolved against `package`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parent = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parent, base] if base else parent)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
        return ["torch.distributed"]  # torch imports it by itself, so no import statement is needed to use it
    return []


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def room_of(name: str) -> str:
    return [*name.split("."), ""][1]


def floor_violations(root: Path) -> list[str]:
    found = []
    for name, path in modules_of(root).items():
        room = room_of(name)
        for item in imports_of(name, path, root):
            says = f"{item.place}: {name} imports {item.target}"
            if within(item.target, PACKAGE):
                other = room_of(item.target)
                if other in MAY_IMPORT and other not in (*MAY_IMPORT[room], room, "", "files"):
                    found.append(f"{says}: {room or PACKAGE} may import {sorted(MAY_IMPORT[room]) or 'no other room'}")
            elif room == "kernels" and item.target.split(".")[0] not in KERNELS_MAY_IMPORT:
                found.append(f"{says}: kernels import torch, triton and the standard library")
            if within(name, f"{PACKAGE}.pretrain.models") and any(
                within(item.target, no) for no in MODELS_MAY_NOT_IMPORT
            ):
                found.append(f"{says}: models know neither the trainer nor the objectives")
            if within(item.target, "torch.distributed") and any(within(name, no) for no in WITHOUT_DISTRIBUTED):
                found.append(f"{says}: only an injected axis crosses ranks here")
    return found


def import_circles(root: Path) -> list[list[str]]:
    """Circles among modules that import each other while they are being imported."""
    modules = modules_of(root)
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for item in imports_of(name, path, root):
            if item.at_import and within(item.target, PACKAGE):
                graph[name] |= executed(name, item.target, modules) - {name}
    return strongly_connected(graph)


def executed(importer: str, target: str, modules: dict[str, Path]) -> set[str]:
    """Modules that importing `target` runs: the deepest module of that name, and the packages around it.

    Packages around the importer itself are running already; `from .sibling import x` needs nothing of theirs.
    """
    parts = target.split(".")
    names = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    chain = [name for name in names if name in modules]
    return {name for name in chain[:-1] if not within(importer, name)} | set(chain[-1:])


def strongly_connected(graph: dict[str, set[str]]) -> list[list[str]]:
    """Components of more than one node, by mutual reachability (the graph has a hundred nodes)."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for following in graph[waiting.pop()] - seen:
                seen.add(following)
                waiting.append(following)
        reach[start] = seen
    circles = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(circle) for circle in sorted(circles)]


def test_the_floors_hold():
    assert floor_violations(ROOT) == []


def test_no_import_circles():
    assert import_circles(ROOT) == []


def test_the_scan_sees_the_whole_package():
    modules = modules_of(ROOT)
    assert {room_of(name) for name in modules} == set(MAY_IMPORT)
    assert modules[f"{PACKAGE}.parallel.launch"] == ROOT / "parallel" / "launch.py"
    launch = {item.target for item in imports_of(f"{PACKAGE}.parallel.launch", ROOT / "parallel" / "launch.py", ROOT)}
    assert {"torch", "torch.distributed", "datetime.timedelta"} <= launch


# What follows tests the tests: each planted import must be found, and each permitted one must not.


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"__init__.py": "", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("kernels/op/__init__.py", "import numpy"),
        ("kernels/op/__init__.py", "from potamos.data import order"),
        ("kernels/op/__init__.py", "from ...data.order import Order"),
        ("kernels/op/__init__.py", "def f():\n    import torch.distributed as dist"),
        ("kernels/op/__init__.py", "from torch import distributed"),
        ("kernels/op/__init__.py", "import torch\n\ndef f():\n    return torch.distributed.get_rank()"),
        ("data/order.py", "from .. import kernels"),
        ("data/order.py", "class A:\n    def f(self):\n        from ..pretrain.config import Recipe"),
        ("data/order.py", "import importlib\nimportlib.import_module('potamos.parallel.launch')"),
        ("data/order.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from potamos.parallel import Rank"),
        ("slurm/submit.py", "from potamos.pretrain.config import Recipe"),
        ("slurm/submit.py", "import torch.distributed.run"),
        ("parallel/apply.py", "import potamos.pretrain.models"),
        ("parallel/apply.py", "from potamos.data.order import Order"),
        ("recipes/__init__.py", "from ..pretrain import config"),
        ("__init__.py", "from .kernels import attention"),
        ("pretrain/models/trunk.py", "from ..trainer import fit"),
        ("pretrain/models/trunk.py", "from potamos.pretrain.objectives.causal import Causal"),
        ("pretrain/models/trunk.py", "from potamos.pretrain import objectives"),
        ("pretrain/models/mixers/h3.py", "import torch.distributed"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, text):
    (found,) = floor_violations(plant(tmp_path, {file: text}))
    assert found.startswith(f"{file}:{text.count(chr(10)) + 1}: ")  # the last line of each text


def test_permitted_imports_are_permitted(tmp_path):
    files = {
        "kernels/op/__init__.py": "import math, torch, triton.language as tl\nfrom . import a\nfrom ..x import y",
        "data/order.py": "import numpy, torch\nfrom .shards import Shard\nimport potamos\nfrom potamos.data import a",
        "parallel/launch.py": "import torch.distributed\nfrom potamos.kernels import op",
        "pretrain/trainer.py": "import torch.distributed\nfrom . import models, objectives\nfrom ..data import order",
        "pretrain/objectives/causal.py": "from ..models import trunk",
        "pretrain/models/trunk.py": "from potamos.parallel.facts import Axis\nfrom potamos.kernels import op",
    }
    assert floor_violations(plant(tmp_path, files)) == []


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        (
            {"data/a.py": "from .b import x", "data/b.py": "from potamos.data.a import y"},
            ["potamos.data.a", "potamos.data.b"],
        ),
        (  # through a package's __init__.py
            {
                "kernels/op/__init__.py": "from .triton import f",
                "kernels/op/triton.py": "from potamos.kernels.op import g",
            },
            ["potamos.kernels.op", "potamos.kernels.op.triton"],
        ),
        (  # a class body runs at import; so does the package around a target
            {
                "data/a/__init__.py": "from potamos.data.b import x",
                "data/a/leaf.py": "",
                "data/b.py": "class B:\n    from .a import leaf",
            },
            ["potamos.data.a", "potamos.data.b"],
        ),
    ],
)
def test_a_planted_circle_is_found(tmp_path, files, circle):
    assert import_circles(plant(tmp_path, files)) == [circle]


def test_re_exports_and_late_imports_are_no_circles(tmp_path):
    files = {
        "kernels/op/__init__.py": "from .reference import f\nfrom . import triton",
        "kernels/op/triton.py": "from . import reference\nfrom .reference import f",
        "kernels/op/reference.py": "def f():\n    from .triton import g",
        "data/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B",
        "data/b.py": "from .a import A",
    }
    assert import_circles(plant(tmp_path, files)) == []
