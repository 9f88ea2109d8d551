"""The script that writes corpora in the layouts of the Pile and of C4: exact, deterministic, readable again."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from potamos.data.sources import documents, meta_value, open_source

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "data_layouts.py"


def write(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def corpora(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    for name, part in (("rivers", texts[:11]), ("mills", texts[11:20])):
        (folder / name).mkdir()
        for number, text in enumerate(part):
            (folder / name / f"{number:02d}.txt").write_text(text, "utf-8")
    return {"rivers": folder / "rivers", "mills": folder / "mills"}


def test_pile(corpora: dict[str, Path], texts: list[str], tmp_path: Path) -> None:
    sources = [f"Pile-CC={corpora['rivers']}", f"FreeLaw={corpora['mills']}"]
    write("pile", tmp_path / "a", *sources, "--files", 3)
    write("pile", tmp_path / "b", *sources, "--files", 3)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["00.jsonl.zst", "01.jsonl.zst", "02.jsonl.zst"]
    records = []
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        records += [json.loads(line) for line in zstandard.ZstdDecompressor().decompress(content).splitlines()]
    assert all(list(r) == ["text", "meta"] and list(r["meta"]) == ["pile_set_name"] for r in records)
    wanted = [*((t, "Pile-CC") for t in texts[:11]), *((t, "FreeLaw") for t in texts[11:20])]
    assert sorted((r["text"], r["meta"]["pile_set_name"]) for r in records) == sorted(wanted)
    subsets = [r["meta"]["pile_set_name"] for r in records]
    assert subsets != sorted(subsets, reverse=True), "subsets are mixed"
    read = list(documents(open_source(str(tmp_path / "a"))))
    assert sorted((d.text, meta_value(d, "meta.pile_set_name")) for d in read) == sorted(wanted)


def test_c4(corpora: dict[str, Path], texts: list[str], tmp_path: Path) -> None:
    write("c4", tmp_path / "a", corpora["rivers"])
    write("c4", tmp_path / "b", corpora["rivers"])
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == [f"c4-train.{n:05d}-of-00004.json.gz" for n in range(4)]
    records = []
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        records += [json.loads(line) for line in gzip.decompress(content).splitlines()]
    assert all(list(r) == ["text", "timestamp", "url"] for r in records)
    assert sorted(r["text"] for r in records) == sorted(texts[:11])
    assert sorted(d.text for d in documents(open_source(str(tmp_path / "a")))) == sorted(texts[:11])


def test_mistakes_are_named_and_help_is_given(tmp_path: Path) -> None:
    done = write("pile", tmp_path / "out", tmp_path / "missing", check=False)
    assert done.returncode == 2
    assert "is no known corpus" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert "c4-train.00000-of-00004.json.gz" in write("--help").stdout
