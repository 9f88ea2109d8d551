"""What every test starts from: one thread, fixed seeds, no network, marks by folder, and the harness for ranks."""

from __future__ import annotations

import gc
import importlib.util
import ipaddress
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

# Set before torch or tokenizers is imported. Tests are small: one thread is faster than two, its sums have one order,
# and a forked rank inherits no idle pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # for the subprocesses that the hook below does not reach
# Started under torchrun or inside a Slurm job, the test process itself is still a single process.
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

gc.disable()  # thousands of modules and tests are to come, none of them garbage: `pytest_runtestloop`

TESTS = Path(__file__).resolve().parent
# The first mark whose folder holds the test; a file name decides where a folder does not.
FOLDER_MARKS = {"kernels": "kernels", "parallel": "distributed", "resume": "resume"}
FILE_MARKS = {"test_harness": "distributed", "test_distributed": "distributed", "test_resume": "resume"}


def _load(name: str, path: Path) -> ModuleType:
    """tests/ is no package (--import-mode=importlib), so a module of it is loaded by its path, under a name given."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the harness's classes are pickled by this name
    spec.loader.exec_module(module)
    return module


harness = _load("harness", TESTS / "harness.py")


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: only addresses of this machine may be reached. Unlike a patched class, nothing gets around it."""
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
        if isinstance(address, tuple) and not _is_local(address[0]):
            raise RuntimeError(f"a test tried to reach {address[0]!r}: tests run without a network")
    elif event == "socket.getaddrinfo" and not _is_local(args[0]):
        raise RuntimeError(f"a test tried to look up {args[0]!r}: tests run without a network")


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", _HOST_NAME):
        return True
    try:
        address = ipaddress.ip_address(str(host).split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


_HOST_NAME = os.uname().nodename
sys.addaudithook(_refuse_network)


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(TESTS) if item.path.is_relative_to(TESTS) else item.path
        marks = {mark for folder, mark in FOLDER_MARKS.items() if folder in path.parts[:-1]}
        marks |= {mark for stem, mark in FILE_MARKS.items() if path.stem.startswith(stem)}
        if "slurm_folder" in getattr(item, "fixturenames", ()):  # whatever starts a cluster puts it there
            marks.add("slurm")
        if "run_ranks" in getattr(item, "fixturenames", ()):
            marks.add("distributed")
        for mark in marks:
            item.add_marker(mark)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """What was imported and collected is set apart from what tests make, so that no collection goes through it again,
    here or in a forked rank, whose pages it would copy."""
    gc.freeze()
    gc.enable()


_begun: dict[str, None] = {}  # tests that run now, on any worker


def pytest_runtest_logstart(nodeid: str) -> None:
    _begun[nodeid] = None


def pytest_runtest_logfinish(nodeid: str) -> None:
    _begun.pop(nodeid, None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """At a target's limit, or at Ctrl-C: which tests ran. A worker's stack does not reach the terminal."""
    for nodeid in _begun:
        terminalreporter.write_line(f"interrupted: {nodeid}")


@pytest.fixture(scope="session")
def load_module() -> Callable[[str, Path], ModuleType]:
    """`load_module(name, path)`: for folders that keep what their tests share in a module."""
    return _load


@pytest.fixture
def run_ranks() -> Any:
    """`run_ranks(world, fn, *args, timeout=60)`: see tests/harness.py."""
    return harness.run_ranks


class Ended(NamedTuple):
    """How a command ended, and what it wrote."""

    status: int
    out: str
    err: str

    def assert_mistake(self, *words: str) -> None:
        """It was told as a user's mistake, in a message with all of the words."""
        assert self.status == 2, self
        assert self.err.startswith("error: "), self.err
        assert "Traceback" not in self.err, self.err
        for word in words:
            assert word in self.err, self.err


@pytest.fixture
def potamos(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`potamos("data", "plan", ...)`: the console entry, run in this process, -> (status, out, err)."""
    from potamos.pretrain import cli

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["potamos", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        text = capfd.readouterr()
        return Ended(int(ended.value.code or 0), text.out, text.err)

    return call


@pytest.fixture(scope="session")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small corpus and tiny runs of it: see tests/trial.py, loaded only for whoever asks, because it needs torch."""
    return _load("trial", TESTS / "trial.py").Trial(tmp_path_factory.mktemp("trial"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """An empty folder named as a run's would be."""
    folder = tmp_path / "runs" / "trial"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def _fixed_start() -> None:
    """Each test begins from the same seeds and global settings, whatever the one before it left behind."""
    random.seed(0)
    # Only what is loaded already: a test of data alone should not pay for importing torch.
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
