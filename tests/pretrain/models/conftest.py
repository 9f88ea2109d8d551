"""The contract of registered systems, as a module: ``contract``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    """tests/ is no package (--import-mode=importlib), so the file is loaded by its path, as module `contract`."""
    spec = importlib.util.spec_from_file_location("contract", Path(__file__).with_name("contract.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["contract"] = module
    spec.loader.exec_module(module)
    return module


CONTRACT = _load()


@pytest.fixture(scope="session")
def contract() -> ModuleType:
    """tests/pretrain/models/contract.py."""
    return CONTRACT


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` and `check`: everything registered times everything that it must do."""
    if "case" in metafunc.fixturenames:
        cases = CONTRACT.subjects("mixer", "channel", "positions", "pattern") + CONTRACT.EXTRA
        metafunc.parametrize("case", cases, ids=str)
    if "check" in metafunc.fixturenames:
        metafunc.parametrize("check", CONTRACT.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
