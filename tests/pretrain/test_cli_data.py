"""`potamos data ...` as a user meets it, on real small corpora: what is printed, what is written, how it ends."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.commands import summarize
from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.tokenizer import load_tokenizer
from potamos.pretrain import plan, progress, setup, show
from potamos.pretrain.config import load_recipe

SENTENCE = "the river runs far past quiet mills and old bridges to the sea"
WORDS = SENTENCE.split()
GROUPS = ("Pile-CC", "Wikipedia (en)")

RECIPE = """
name: trial
family: test
model:
  width: 16
  layers: 1
  frontend: {kind: tokens, vocabulary: 300}
  mixer: {kind: h3, state: 4, shift_state: 4}
  channel: {kind: mlp}
tokenizer: {kind: json, path: tokenizer.json}
data:
  sequence_length: 16
  stages:
    - {from: 0, mixture: [{path: first, weight: 3}, {path: second}]}
    - {from: 100, mixture: [{path: second}]}
  validation: [{path: second, name: held_out}]
optimizer: {kind: adamw, lr: 1.0e-2}
schedule: {kind: constant}
train: {steps: 40, sequences: 4, micro_sequences: 4, seed: 1, device: cpu, threads: 1}
validate: {every: 40, sequences: 2}
"""


def texts(seed: int, count: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(5, 60))) + "." for _ in range(count)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of documents of two groups, some of them twice, and a tokenizer with sentinels."""
    from potamos.data.commands import train

    folder = tmp_path_factory.mktemp("corpus")
    (folder / "raw").mkdir()
    for number in range(3):
        rows = [{"text": text, "meta": {"pile_set_name": GROUPS[i % 2]}} for i, text in enumerate(texts(number, 40))]
        write_lines(folder / "raw" / f"{number}.jsonl", rows + rows[:5])
    train(str(folder / "raw"), 300, folder / "tokenizer.json", special_tokens=["[Q]"], sentinels=3)
    return folder


@pytest.fixture(scope="module")
def prepared(corpus: Path) -> Path:
    """Two datasets and a recipe that mixes them."""
    from potamos.data.commands import prepare_dataset

    for name, source in (("first", "raw"), ("second", "raw/2.jsonl")):
        prepare_dataset(str(corpus / source), corpus / name, tokenizer_path=corpus / "tokenizer.json", chunk_tokens=256)
    (corpus / "trial.yaml").write_text(RECIPE)
    return corpus


def fingerprint(path: Path) -> str:
    return summarize(path).fingerprint


# --- tokenizer ---------------------------------------------------------------------------------------------------


def test_a_tokenizer_has_the_special_tokens_that_it_was_asked_for(
    corpus: Path, potamos: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "tokenizer.json"
    done = potamos(
        *("data", "tokenizer", corpus / "raw", out, "--vocabulary=300", "--special=[Q]", "--special=[A]"),
        "--sentinels=4",
    )
    assert done.status == 0, done.err
    assert "300 ids from 135 documents" in done.out
    made = load_tokenizer("json", out)
    for name in ("[Q]", "[A]", "<extra_id_0>", "<extra_id_3>"):
        assert made.special(name) not in made.encode(name).tolist()
    potamos("data", "tokenizer", corpus / "raw", out, "--vocabulary=260").assert_mistake("vocabulary 260", "262")
    potamos("data", "tokenizer", corpus / "raw", out, "--sentinels=-1").assert_mistake("sentinels -1")


# --- prepare and finalize ----------------------------------------------------------------------------------------


def test_shares_and_one_process_give_the_same_dataset(
    corpus: Path, potamos: Callable[..., Any], tmp_path: Path
) -> None:
    common = (corpus / "raw", "--tokenizer", corpus / "tokenizer.json", "--deduplicate")
    alone = potamos("data", "prepare", *common, tmp_path / "alone")
    assert alone.status == 0, alone.err
    assert re.search(r"alone: [\d,]+ tokens of 120 documents in 3 shards", alone.out)
    early = potamos("data", "finalize", tmp_path / "shared", "--wait=0")
    early.assert_mistake("shared")
    shares = [
        potamos("data", "prepare", *common, tmp_path / "shared", f"--rank={rank}", "--world=2", "--wait=0")
        for rank in (1, 0, 1)
    ]
    # Duplicates are known when every input was looked through: the first to begin finds that, and is started again.
    assert [share.status for share in shares] == [2, 0, 0], [share.err for share in shares]
    assert "waited" in shares[0].err or "run" in shares[0].err
    told = (
        f"{tmp_path / 'shared'}: process 0 of 2 has done its 2 of 3 inputs; when all have, run: potamos data finalize"
    )
    assert shares[1].out.startswith(told)
    joined = potamos("data", "finalize", tmp_path / "shared")
    assert joined.status == 0, joined.err
    assert joined.out.partition(": ")[2] == alone.out.partition(": ")[2]
    assert fingerprint(tmp_path / "shared") == fingerprint(tmp_path / "alone")
    again = potamos("data", "prepare", *common, tmp_path / "shared")
    assert (again.status, again.err) == (0, f"{tmp_path / 'shared'} is there already, and equal\n")


def test_groups_become_datasets_that_a_published_mixture_finds(
    corpus: Path, potamos: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = potamos(
        *("data", "prepare", corpus / "raw", "pile", "--tokenizer", corpus / "tokenizer.json"),
        "--by=meta.pile_set_name",
    )
    assert done.status == 0, done.err
    assert [line.split(":")[0] for line in done.out.splitlines()] == ["pile/pile-cc", "pile/wikipedia-en"]
    assert potamos("data", "inspect", "pile").out == done.out
    sound = potamos("data", "verify", "pile", "--deep")
    assert (sound.status, sound.out.count(": sound (")) == (0, 2)
    (tmp_path / "trial.yaml").write_text(RECIPE)
    shutil.copy(corpus / "tokenizer.json", tmp_path)
    mixture = "data.stages=[{from: 0, mixture: {published: pile, path: pile}}]"
    shown = potamos("data", "plan", "trial.yaml", mixture, "data.validation=[]")
    assert shown.status == 0, shown.err
    assert re.search(r"^0 from 0 +Pile-CC +92\.21 % ", shown.out, re.MULTILINE)  # 18.11 of 18.11 + 1.53
    assert re.search(r"^0 from 0 +Wikipedia \(en\) +7\.79 % ", shown.out, re.MULTILINE)
    assert "mixture pile: 20 of 22 subsets are not in pile (PubMed Central, Books3, " in shown.out
    assert potamos("train", "trial.yaml", mixture, "data.validation=[]", "train.steps=2").status == 0
    notes = (tmp_path / "runs" / "trial" / "logs" / "notes.log").read_text()
    assert notes.count("mixture pile: 20 of 22 subsets are not in pile") == 1
    none = potamos("data", "plan", "trial.yaml", "data.stages=[{from: 0, mixture: {published: pile, path: raw}}]")
    none.assert_mistake("raw holds no subset of the mixture pile")
    shard = min((tmp_path / "pile" / "wikipedia-en").glob("*.tar"))
    shard.unlink()
    torn = potamos("data", "verify", "pile")
    assert (torn.status, torn.out.count(": sound ("), torn.err.count("is missing")) == (1, 1, 1)


def test_what_was_left_out_is_told(corpus: Path, potamos: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"text": text, "meta": {"set": "AB"[i % 2]}} for i, text in enumerate(texts(1, 9))]
    write_lines(tmp_path / "some.jsonl", [*rows, *rows[:3], {"text": " ", "meta": {"set": "A"}}, {"text": 5}])
    told = f"left out: 1 blank documents, 3 duplicates, 1 bad records, listed in {tmp_path}"
    for name, more in {"whole": (), "grouped": ("--by=meta.set",)}.items():
        out = ("data", "prepare", tmp_path / "some.jsonl", tmp_path / name, "--tokenizer", corpus / "tokenizer.json")
        done = potamos(*out, "--deduplicate", "--max-bad-ratio=0.5", *more)
        assert done.out.splitlines()[-1] == f"{told}/{name}.rejects.jsonl", done.err
        assert potamos("data", "finalize", tmp_path / name).out == done.out
    write_lines(tmp_path / "all.jsonl", rows)
    whole = ("data", "prepare", tmp_path / "all.jsonl", tmp_path / "all", "--tokenizer", corpus / "tokenizer.json")
    assert "left out" not in potamos(*whole).out


def test_bad_records_are_bounded(corpus: Path, potamos: Callable[..., Any], tmp_path: Path) -> None:
    write_lines(tmp_path / "bad.jsonl", [{"text": text} for text in [*texts(1, 9), "long " * 400]])
    command = ("data", "prepare", tmp_path / "bad.jsonl", tmp_path / "out", "--tokenizer", corpus / "tokenizer.json")
    potamos(*command, "--max-line-bytes=1000").assert_mistake("bad.jsonl", "max-bad-ratio")
    done = potamos(*command, "--max-line-bytes=1000", "--max-bad-ratio=0.2", "--force")
    assert done.status == 0, done.err
    assert "of 9 documents" in done.out
    assert f"left out: 1 bad records, listed in {tmp_path / 'out.rejects.jsonl'}\n" in done.out
    (rejected,) = (tmp_path / "out.rejects.jsonl").read_text().splitlines()
    assert json.loads(rejected)["place"] == "bad.jsonl:10"
    potamos(*command, "--max-bad-ratio=2", "--force").assert_mistake("max-bad-ratio 2")
    potamos(*command, "--rank=2", "--world=2").assert_mistake("rank 2 of world 2")
    potamos(*command, "--kind=gpt2").assert_mistake("tokenizer.json")
    potamos(*command, "--threads=0").assert_mistake("threads 0")


# --- looking into datasets ---------------------------------------------------------------------------------------


def test_a_row_is_the_one_that_training_reads(prepared: Path, potamos: Callable[..., Any]) -> None:
    path, tokenizer = prepared / "first", load_tokenizer("json", prepared / "tokenizer.json")
    dataset = TokenDataset(path)
    cut = dataset.cut(16)
    for row in (0, 17, cut.total - 1):
        (chunk,), (start,) = cut.place(np.array([row]))
        ids = read_rows([dataset], np.zeros(1, int), np.array([chunk]), np.array([start]), 16)[0][0]
        done = potamos(
            *("data", "inspect", path, "--tokenizer", prepared / "tokenizer.json", f"--sample={row}", "--tokens=16")
        )
        head, _, text = done.out.partition(f"row {row} is in chunk {chunk}, from token {start} on\n")
        assert "documents" in head
        shown = "".join(line for line in text.splitlines() if not re.match(r"document \d+ \(", line))
        assert shown == tokenizer.decode(ids)
        by_chunk = potamos(
            *("data", "inspect", path, "--tokenizer", prepared / "tokenizer.json", "--tokens=16"),
            *(f"--chunk={chunk}", f"--start={start}"),
        )
        assert text.endswith(by_chunk.out.partition("fingerprint")[2].partition("\n")[2])
    beyond = potamos("data", "inspect", path, "--tokenizer", prepared / "tokenizer.json", f"--sample={cut.total}")
    beyond.assert_mistake("there is no row")


def test_verify_finds_damage_by_reading_every_byte(prepared: Path, potamos: Callable[..., Any], tmp_path: Path) -> None:
    path = shutil.copytree(prepared / "second", tmp_path / "copy")
    assert potamos("data", "verify", path, "--deep").status == 0
    shard = min(path.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[1600] ^= 1
    shard.write_bytes(content)
    assert potamos("data", "verify", path).status == 0
    found = potamos("data", "verify", path, "--deep")
    assert found.status == 1
    assert shard.name in found.err


def test_tars_of_other_tools_are_indexed_planned_and_trained_on(
    prepared: Path, potamos: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared)
    tokenizer = load_tokenizer("json", prepared / "tokenizer.json")
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, text in enumerate(texts(10 + number, 30)):
                data = io.BytesIO()
                np.save(data, tokenizer.encode(text).astype(np.uint16))
                info = tarfile.TarInfo(f"{key:04d}.ids.npy")
                info.size = len(data.getvalue())
                tar.addfile(info, io.BytesIO(data.getvalue()))
    pattern = f"{tmp_path}/{{000..001}}.tar"
    done = potamos("data", "index", pattern, "--tokenizer", "tokenizer.json", "--field", "ids.npy")
    assert done.status == 0, done.err
    assert re.fullmatch(r"indexed 2 tars: [\d,]+ tokens of 60 documents\n", done.out)
    stages = f"data.stages=[{{from: 0, mixture: [{{path: {tmp_path}}}]}}]"
    assert potamos("data", "plan", "trial.yaml", stages).status == 0
    run = ("--run", tmp_path / "run")
    assert potamos("train", "trial.yaml", stages, "train.steps=2", *run).status == 0
    potamos("data", "index", tmp_path / "none").assert_mistake("none")


# --- plan --------------------------------------------------------------------------------------------------------


def test_the_plan_counts_what_the_run_reads(
    prepared: Path, potamos: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the rows themselves, one by one; without a model."""
    monkeypatch.chdir(prepared)

    def no_model(*_: object) -> None:
        raise AssertionError("a plan builds no model")

    monkeypatch.setattr(setup, "build_system", no_model)
    changes = ["data.skip=[[10, 30], [90, 110]]", "data.order=window", "data.window=2"]
    recipe = load_recipe("trial.yaml", changes)
    stream = setup.open_stream(recipe, setup.open_tokenizer(recipe))
    numbers = stream.samples(0, 160)
    source, stage = stream.rows(numbers).source, (numbers >= 100).astype(int)
    found = plan.plan(recipe)
    assert (found.samples, found.end, found.tokens) == (160, 200, 160 * 16)
    assert [(p.stage, p.name) for p in found.sources] == [(0, "first"), (0, "second"), (1, "second")]
    for entry, dataset in zip(found.sources, (0, 1, 1), strict=True):
        drawn = int(((source == dataset) & (stage == entry.stage)).sum())
        assert (entry.samples, entry.tokens) == (drawn, 16 * drawn)
        rows = stream.datasets[dataset].cut(16).total
        assert (entry.samples_per_epoch, entry.epochs) == (rows, pytest.approx(drawn / rows))
    done = potamos("data", "plan", "trial.yaml", *changes)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "trial: 40 steps of 4 rows of 16 tokens"
    cells = [re.split(r"  +", line.strip()) for line in lines[1:6]]
    assert cells[0] == ["stage", "source", "share", "samples", "tokens", "epochs", "rows an epoch", "unread tokens"]
    shown = [(row[0], row[1], row[2], *(int(cell.replace(",", "")) for cell in row[3:5])) for row in cells[1:4]]
    assert shown == [
        ("0 from 0", "first", "75.00 %", found.sources[0].samples, found.sources[0].tokens),
        ("0 from 0", "second", "25.00 %", found.sources[1].samples, found.sources[1].tokens),
        ("1 from 100", "second", "100.00 %", found.sources[2].samples, found.sources[2].tokens),
    ]
    repeats = [row[5].endswith(" repeats") for row in cells[1:4]]
    gone = [p.epochs_before + p.epochs > 1 for p in found.sources]
    assert repeats == gone
    assert cells[4] == ["in all", "160", "2,560"]
    assert "data.skip leaves out 40 samples; the run ends at sample 200" in done.out
    assert re.search(r"validation held_out: [\d,]+ tokens, 2 of [\d,]+ windows scored each time", done.out)


def test_the_plan_marks_what_is_read_again(
    prepared: Path, potamos: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared)
    few, many = (
        potamos("data", "plan", "trial.yaml", "train.steps=2"),
        potamos("data", "plan", "trial.yaml", "train.steps=900"),
    )
    assert "repeats" not in few.out
    assert many.out.count("repeats") == 1
    assert "repeats" in many.out.splitlines()[4]


def test_a_plan_refuses_what_training_refuses(
    prepared: Path, potamos: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared)
    huge = ("train.sequences=2000", "train.steps=1")
    messages = [potamos(*command, "trial.yaml", *huge) for command in (("data", "plan"), ("train", "--run", "small"))]
    for done in messages:
        done.assert_mistake("needs", "rows of 16 tokens")
    assert messages[0].err == messages[1].err
    assert potamos("data", "plan", "trial.yaml", *huge, "data.allow_repeat=true").status == 0
    potamos("data", "plan", "trial.yaml", "data.stages.0.mixture.0.path=nowhere").assert_mistake("nowhere")
    potamos("data", "plan", "trial.yaml", "tokenizer.path=nowhere").assert_mistake("tokenizer.path: nowhere")


# --- bench and passages ------------------------------------------------------------------------------------------


def test_bench_prints_a_line_for_each_reader(
    prepared: Path, potamos: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from potamos.data import bench

    asked: list[dict[str, Any]] = []

    def measure(path: Path | None, **given: Any) -> bench.BenchReport:
        asked.append({"path": path, **given})
        given["progress"]("round 1 of 3")
        rows = (
            bench.BenchRow("loader", "Mtok/s/core", 123.4, 99.94, 1234.5, 3),
            bench.BenchRow("seek", "ms", 3.456, 3, 4, 3),
        )
        return bench.BenchReport(path, given["batch"], given["length"], 1000, rows)

    monkeypatch.setattr(bench, "bench", measure)
    done = potamos("data", "bench", prepared / "first", "--rounds=3", "--batch=2", "--length=16", "--shards=5")
    assert [{k: v for k, v in given.items() if k != "progress"} for given in asked] == [
        {"path": prepared / "first", "rounds": 3, "batch": 2, "length": 16, "shards": 5}
    ]
    assert done.err == "round 1 of 3\n"
    assert [line.split() for line in done.out.splitlines()[1:]] == [
        ["measured", "median", "from", "to", "unit"],
        ["loader", "123", "99.9", "1,234", "Mtok/s/core"],
        ["seek", "3.46", "3", "4", "ms"],
    ]
    monkeypatch.undo()
    missing = potamos("data", "bench", prepared / "none")
    assert (missing.status, missing.err.count("error: ")) == (2, 1)
    assert f"error: {prepared / 'none'} holds no dataset.json" in missing.err


def test_passages_are_written_and_counted(corpus: Path, potamos: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "passages.jsonl"
    done = potamos("data", "passages", corpus / "raw", out, "--words=20", "--min-words=8")
    assert done.status == 0, done.err
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.out.startswith(f"{out}: {len(written)} passages of 135 documents")
    assert all(8 <= len(passage["text"].split()) <= 20 for passage in written)
    potamos("data", "passages", corpus / "raw", tmp_path / "x.txt").assert_mistake("x.txt", ".jsonl")


# --- progress ----------------------------------------------------------------------------------------------------


def reported(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> list[str]:
    """What `preparing` prints of 40 s of work in which a tenth is done every 4 s."""
    from rich.console import Console

    from potamos.data.commands import Progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream, clock = Terminal(), iter(range(0, 4000, 2))  # two looks at the clock a report
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(show, "err", Console(file=stream, width=160, force_terminal=terminal, color_system=None))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.preparing() as report:
        for tenth in range(1, 11):
            report(Progress(tenth * 10**6, 10**7, tenth, 50 * tenth, 3 * tenth * 10**6, tenth // 5, 2, "hashing"))
    return [
        line.strip()
        for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue()))
        if line.strip()
    ]


def test_progress_is_a_line_now_and_then_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = reported(monkeypatch, terminal=False)
    assert 2 <= len(lines) <= 4
    assert re.fullmatch(
        r"\d0 %  hashing  input [12] of 2  \d documents  \d+ tokens  1\.0 MB/s of text  ETA \d:\d\d", lines[0]
    )


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = reported(monkeypatch, terminal=True)
    assert len(lines) >= 9
    assert any("100%" in line and "input 2 of 2" in line and "500 tokens" in line for line in lines)
