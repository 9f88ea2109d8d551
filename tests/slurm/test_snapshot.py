"""The copy of the program: what runs now, whatever is edited later, and told apart from its commit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

import potamos
from potamos.slurm.snapshot import SnapshotError, shipped_files, take_snapshot

PACKAGE = Path(potamos.__file__).resolve().parent


def git(folder: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | names).stdout


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


TREE = {
    "__init__.py": "",
    "files.py": "WORD = 'committed'\n",
    "slurm/__init__.py": "",
    "slurm/body.sh": "echo\n",
    "slurm/README.md": "words\n",
    "recipes/__init__.py": "",
    "recipes/tiny.yaml": "name: tiny\n",
    "slurm/other.yaml": "not: shipped\n",
    "tests/test_x.py": "",
    "benchmarks/b.py": "",
    ".typing/stub.py": "",
    ".gitignore": "ignored.py\nruns/\n",
    "runs/__init__.py": "",
}
SHIPPED = {"__init__.py", "files.py", "slurm/__init__.py", "slurm/body.sh", "recipes/__init__.py", "recipes/tiny.yaml"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    write(root, TREE)
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", "--all")
    git(root, "commit", "-q", "-m", "first")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_shipped(checkout: Path):
    assert {str(path) for path in shipped_files(checkout)} == SHIPPED
    (checkout / "slurm" / "new file.py").write_text("")
    (checkout / "slurm" / "ignored.py").write_text("")
    (checkout / "files.py").unlink()
    assert {str(path) for path in shipped_files(checkout)} == SHIPPED - {"files.py"} | {"slurm/new file.py"}


def test_the_copy_is_the_working_tree(checkout: Path, tmp_path: Path):
    clean = take_snapshot(tmp_path / "run" / "code", checkout)
    assert clean.commit == git(checkout, "rev-parse", "HEAD").strip()
    assert not clean.modified
    assert (tmp_path / "run/code/dirty.diff").read_bytes() == b""
    assert (tmp_path / "run/code/COMMIT").read_text() == f"{clean.commit}\n"

    write(checkout, {"files.py": "WORD = 'edited'\n", "slurm/new.py": "NEW = 1\n", "notes.bin": "\0\1"})
    git(checkout, "add", "files.py")  # what is staged is edited as well
    edited = take_snapshot(tmp_path / "run" / "code", checkout)
    assert edited.modified
    assert edited.commit == clean.commit
    assert edited.sha256 != clean.sha256
    assert (tmp_path / "run/code/potamos/files.py").read_text() == "WORD = 'edited'\n"
    assert (tmp_path / "run/code/potamos/slurm/new.py").exists()
    assert os.listdir(tmp_path / "run") == ["code"], "nothing is left beside the copy"


def test_the_diff_gives_the_tree_back(checkout: Path, tmp_path: Path):
    write(checkout, {"files.py": "WORD = 'edited'\n", "slurm/new.py": "NEW = 1\n", "ü b.bin": "\0\1", "empty.py": ""})
    (checkout / "slurm/README.md").unlink()
    (checkout / "big.bin").write_bytes(b"x" * (1 << 20) + b"x")
    before = contents(checkout / ".git")
    take_snapshot(tmp_path / "code", checkout)
    assert contents(checkout / ".git") == before, "the user's checkout may be one that can only be read"
    assert (tmp_path / "code/dirty.diff").read_bytes().startswith(b"# left out, larger than 1 MiB: big.bin\n")
    git(tmp_path, "clone", "-q", str(checkout), str(tmp_path / "clone"))
    git(tmp_path / "clone", "apply", "--binary", str(tmp_path / "code/dirty.diff"))
    (checkout / "big.bin").unlink()
    for folder in (checkout, tmp_path / "clone"):
        shutil.rmtree(folder / ".git")
        shutil.rmtree(folder / "runs", ignore_errors=True)
    assert contents(tmp_path / "clone") == contents(checkout)


def test_new_hidden_files_stay_private(checkout: Path, tmp_path: Path):
    write(checkout, {".env": "PASSWORD=1\n", ".config/token": "secret\n", "slurm/new.py": "NEW = 1\n"})
    take_snapshot(tmp_path / "code", checkout)
    diff = (tmp_path / "code/dirty.diff").read_text()
    assert "slurm/new.py" in diff
    assert "PASSWORD" not in diff
    assert "token" not in diff


def test_the_users_settings_of_git_change_nothing(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(checkout, {"files.py": "WORD = 'edited'\n", "slurm/new.py": ""})
    one = take_snapshot(tmp_path / "one", checkout)
    for key, value in {"diff.noprefix": "true", "color.ui": "always", "diff.external": "false"}.items():
        git(checkout, "config", key, value)
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert take_snapshot(tmp_path / "two", checkout) == one
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_a_colleagues_checkout_is_a_checkout(checkout: Path, tmp_path: Path):
    """Git refuses to look at folders of other users unless told that they are safe."""
    commit = git(checkout, "rev-parse", "HEAD").strip()
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, 65534, 65534)
    assert take_snapshot(tmp_path / "code", checkout).commit == commit


def test_an_installed_package_is_copied_as_it_lies(checkout: Path, tmp_path: Path):
    shutil.rmtree(checkout / ".git")
    git(tmp_path, "init", "-q", str(tmp_path))  # someone else's checkout above it says nothing about it
    (checkout / "slurm/__pycache__").mkdir()
    (checkout / "slurm/__pycache__/x.py").write_text("")
    taken = take_snapshot(tmp_path / "code", checkout)
    assert taken.commit.startswith("unknown: potamos ")
    assert not (tmp_path / "code/dirty.diff").exists()
    assert contents(tmp_path / "code/potamos").keys() == SHIPPED | {"runs/__init__.py"}


def test_a_failed_copy_leaves_the_old_one(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    take_snapshot(tmp_path / "run/code", checkout)
    before = contents(tmp_path / "run/code")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        take_snapshot(tmp_path / "run/code", checkout)
    monkeypatch.undo()
    assert contents(tmp_path / "run/code") == before
    assert os.listdir(tmp_path / "run") == ["code"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SnapshotError, match="holds no program"):
        take_snapshot(tmp_path / "run/code", tmp_path / "empty")


def test_this_package_ships_what_its_wheel_ships():
    """By the rules that tests/test_packaging.py compares with a built wheel."""
    found = set(shipped_files())
    assert PurePosixPath("slurm/body.sh") in found
    assert PurePosixPath("recipes/h3_hybrid_tiny.yaml") in found
    assert not {path.parts[0] for path in found} & {"tests", "benchmarks", ".typing", "build"}
    on_disk = {PurePosixPath(p.relative_to(PACKAGE).as_posix()) for p in (PACKAGE / "slurm").glob("*.py")}
    assert on_disk <= found


def test_a_run_imports_its_copy_though_the_tree_is_edited(tmp_path: Path):
    """As the batch script starts the ranks: -P, PYTHONPATH=code, wherever they stand and whatever is installed."""
    tree = tmp_path / "potamos"
    for path in shipped_files():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / path, tree / path)
    git(tmp_path, "init", "-q", str(tree))
    git(tree, "add", "--all")
    git(tree, "commit", "-q", "-m", "first")
    write(tree, {"slurm/mark.py": "WORD = 'when it was submitted'\n"})
    take_snapshot(tmp_path / "run/code", tree)
    write(tree, {"slurm/mark.py": "WORD = 'edited later'\n", "__init__.py": "raise SystemExit('the tree was run')\n"})
    program = (
        "from potamos.slurm import mark, attempt; import potamos; print(potamos.__file__); print(mark.WORD)\n"
        "from potamos.pretrain.config import load_recipe; print(load_recipe('h3_hybrid_tiny').name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=80,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "run/code")}, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        str(tmp_path / "run/code/potamos/__init__.py"),
        "when it was submitted",
        "h3_hybrid_tiny",
    ], done.stderr
