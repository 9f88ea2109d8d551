"""The commands as a user meets them: what they print, how they end, and what a mistake looks like."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.pretrain import cli, show

PROGRAM = [sys.executable, "-c", "from potamos.pretrain.cli import main; main()"]
TEXTS = [
    f"The river runs {word} to the sea, and the sea takes the river {word}." for word in ("down", "far", "on")
] * 40

RECIPE = """
name: trial
family: test
description: "a trial"
model:
  width: 16
  layers: 2
  frontend: {kind: tokens, vocabulary: 288}
  mixer: {kind: h3, state: 4, shift_state: 4}
  channel: {kind: mlp}
  at: {1: {mixer: {kind: attention, heads: 2}}}
tokenizer: {kind: json, path: tokenizer.json}
data:
  sequence_length: 32
  stages: [{from: 0, mixture: [{path: text}]}]
  validation: [{path: text, name: held_out}]
optimizer: {kind: adamw, lr: 1.0e-2}
schedule: {kind: constant}
train: {steps: 100000, sequences: 4, micro_sequences: 4, seed: 1, device: cpu, threads: 1}
checkpoint: {every: 2, keep: 2}
validate: {every: 100000}
telemetry: {every: 1}
"""


def start(*arguments: str | Path, cwd: Path, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a dataset and a recipe."""
    from potamos.data.commands import prepare_dataset, train

    folder = tmp_path_factory.mktemp("work")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "text.jsonl").write_text("\n".join(lines))
    train(str(folder / "text.jsonl"), 288, folder / "tokenizer.json")
    prepare_dataset(str(folder / "text.jsonl"), folder / "text", tokenizer_path=folder / "tokenizer.json")
    (folder / "trial.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def interrupted(work: Path) -> subprocess.CompletedProcess[str]:
    """`runs/trial`, trained by the real program until Ctrl-C."""
    process = start("train", "trial.yaml", cwd=work)
    state, limit = work / "runs" / "trial" / "state.json", time.monotonic() + 40
    while not (state.exists() and json.loads(state.read_text())["step"] >= 5):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return finish(process)


@pytest.fixture
def trained(work: Path, interrupted: subprocess.CompletedProcess[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder; the working directory is where the run started."""
    monkeypatch.chdir(work)
    assert interrupted.returncode == 130, interrupted
    return Path("runs/trial")


# --- starting up -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["data", "--help"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from potamos.pretrain.cli import main\n"
        f"sys.argv = ['potamos', *{arguments}]\n"
        "try: main()\n"
        "except SystemExit as ended: status = ended.code\n"
        "print('\\nloaded:', [name for name in ('torch', 'numpy') if name in sys.modules], status)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: [] 0"


def test_signal_handlers_come_before_torch() -> None:
    """A signal during the import of torch already counts; `train` returns the trainer's status."""
    script = (
        "import sys, types\n"
        "from potamos.pretrain import guard\n"
        "from potamos.pretrain.cli import main\n"
        "guard.install_signal_handlers = lambda: print('handlers', 'torch' in sys.modules)\n"
        "def train(recipe, run):\n"
        "    print('training', recipe.name, recipe.train.steps, run, 'torch' in sys.modules)\n"
        "    return 7\n"
        "sys.modules['potamos.pretrain.trainer'] = types.SimpleNamespace(train=train)\n"
        "sys.argv = ['potamos', 'train', 'gpt_tiny', 'train.steps=700']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    expected = f"handlers False\ntraining gpt_tiny 700 {Path('runs/gpt_tiny')} True\n"
    assert (done.stdout, done.returncode) == (expected, 7), done.stderr


# --- recipes -----------------------------------------------------------------------------------------------------


def test_recipes_lists_one_line_each(potamos: Callable[..., Any]) -> None:
    from potamos.pretrain.config import available

    lines = potamos("recipes").out.splitlines()
    assert len(lines) == 1 + len(available())
    rows = {line.split()[0]: line.split()[1:3] for line in lines[1:]}
    assert rows["h3_hybrid_125m"] == ["h3", "126,139,392"]
    assert rows["h3_hybrid_2.7b"] == ["h3", "2,671,134,720"]
    assert rows.keys() == set(available())


def test_recipe_show_gives_a_recipe_back(potamos: Callable[..., Any]) -> None:
    from potamos.pretrain.config import load_recipe, parse_recipe

    done = potamos("recipe", "show", "s4d_tiny", "train.steps=701")
    assert parse_recipe(done.out) == load_recipe("s4d_tiny", ["train.steps=701"])
    assert "steps: 701" in done.out
    assert done.err == ""


# --- training, evaluating, generating ----------------------------------------------------------------------------


def test_interrupted_training_saves_and_exits_130(trained: Path, interrupted: subprocess.CompletedProcess[str]) -> None:
    markers = [path for path in trained.iterdir() if path.name.startswith("stop.")]
    assert len(markers) == 1
    stopped = json.loads(markers[0].read_text())
    assert (trained / "checkpoints" / f"step-{stopped['step']:08d}").is_dir()
    assert not (trained / "done.json").exists()
    assert "Traceback" not in interrupted.stderr


def test_training_goes_on_and_only_rank_0_speaks(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    last = max(int(path.name[5:]) for path in (trained / "checkpoints").iterdir())
    ranks = [
        start(
            *("train", "trial.yaml", f"train.steps={last + 2}", "train.micro_sequences=2", "--run", tmp_path / "run"),
            cwd=trained.parent.parent,
            **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()},
        )
        for rank in range(2)
    ]
    first, second = (finish(process) for process in ranks)
    assert (first.returncode, second.returncode) == (0, 0), (first, second)
    assert f"step {last + 1}/{last + 2}" in first.stdout
    assert f"step {last}/{last + 2}" not in first.stdout
    assert second.stdout == ""
    assert "Traceback" not in second.stderr
    assert (tmp_path / "run" / "done.json").exists()


_port: list[str] = []


def _free_port() -> str:
    import socket

    if not _port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            _port.append(str(probe.getsockname()[1]))
    return _port[0]


def test_evaluate(trained: Path, potamos: Callable[..., Any]) -> None:
    from potamos.data.loader import Windows
    from potamos.pretrain.evaluate import score
    from potamos.pretrain.runs import open_run

    run = open_run(trained)
    windows, sizes = Windows("text", sequence_length=32), run.tokenizer.token_bytes()
    expected = score(run.system, windows, sizes, device="cpu", rows_per_batch=4)
    done = potamos("evaluate", trained)
    header, row = done.out.splitlines()
    assert header.split() == ["data", "bits/byte", "perplexity", "loss", "targets"]
    figures = f"held_out {expected.bits_per_byte:.4f} {expected.perplexity:.2f} {expected.loss:.4f}"
    assert row.split() == [*figures.split(), f"{expected.targets:,}"]
    assert done.err.strip() == f"{trained} at step {run.step}"
    assert potamos("evaluate", trained, "--data", "text").out.splitlines()[1].split()[1:] == row.split()[1:]


def test_evaluate_an_earlier_step(trained: Path, potamos: Callable[..., Any]) -> None:
    newest, earlier = sorted((int(p.name[5:]) for p in (trained / "checkpoints").iterdir()), reverse=True)[:2]
    first, second = (
        potamos("evaluate", trained, "--step", str(newest)),
        potamos("evaluate", trained, "--step", str(earlier)),
    )
    assert f"step {earlier}" in second.err
    assert first.out.splitlines()[1] != second.out.splitlines()[1]


@pytest.fixture(scope="module")
def positioned(work: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{position scheme: a run of two steps}, attention only."""
    from potamos.pretrain.config import load_recipe
    from potamos.pretrain.trainer import train

    folder = tmp_path_factory.mktemp("positioned")
    changes = [
        "model.mixer={kind: attention, heads: 2}",
        "model.at={}",
        "train.steps=2",
        f"tokenizer.path={work}/tokenizer.json",
    ]
    changes += [f"data.stages.0.mixture.0.path={work}/text", f"data.validation.0.path={work}/text"]
    schemes = {"learned": "{kind: learned, max_length: 64}", "rope": "{kind: rope}"}
    schemes["xpos"] = "{kind: xpos, scale_base: 2.0}"
    for name, scheme in schemes.items():
        train(load_recipe(work / "trial.yaml", [*changes, f"model.positions={scheme}"]), folder / name)
    return {name: folder / name for name in schemes}


def test_evaluate_longer_rows(positioned: dict[str, Path], potamos: Callable[..., Any], work: Path) -> None:
    """The same tokens in rows of 128, by number or by multiple; only the first of a row has less before it."""
    from potamos.data.loader import Windows
    from potamos.pretrain.evaluate import score
    from potamos.pretrain.runs import open_run

    run = open_run(positioned["rope"])
    windows = Windows(work / "text", sequence_length=128)
    expected = score(run.system, windows, run.tokenizer.token_bytes(), device="cpu", rows_per_batch=1)
    rows = [
        potamos("evaluate", positioned["rope"], "--length", length).out.splitlines()[1].split()
        for length in ("128", "4x")
    ]
    assert rows[0] == rows[1]
    assert rows[0][1:4] == [f"{expected.bits_per_byte:.4f}", f"{expected.perplexity:.2f}", f"{expected.loss:.4f}"]
    short = potamos("evaluate", positioned["rope"]).out.splitlines()[1].split()
    assert short[1:4] != rows[0][1:4]
    assert short[4] == rows[0][4], "another number of targets: the figures would not compare"


def test_evaluate_with_another_pattern(positioned: dict[str, Path], potamos: Callable[..., Any]) -> None:
    """A pattern wide enough to hide nothing changes nothing; a narrow one does; another width does not fit."""
    run = positioned["rope"]
    wide, narrow = (f"model.pattern={{kind: blockwise, size: {size}}}" for size in (128, 2))
    plain, same, other = (potamos("evaluate", run, *more, "--length=2x").out for more in ([], [wide], [narrow]))
    assert plain == same
    assert plain != other
    potamos("evaluate", run, "model.width=32").assert_mistake("does not fit", "model.width=32")
    potamos("evaluate", run, "model.pattern.kind=blockwize").assert_mistake("blockwize", "blockwise")


def test_evaluate_refuses_lengths_that_it_cannot_have(positioned: dict[str, Path], potamos: Callable[..., Any]) -> None:
    assert potamos("evaluate", positioned["learned"], "--length=2x").status == 0
    potamos("evaluate", positioned["learned"], "--length=4x").assert_mistake("4x", "128", "positions", "end at 64")
    # 16 of half a training row, 80 x 2 / ln(1.4 / 0.4) = 127.7 beyond it, and position 0
    potamos("evaluate", positioned["xpos"], "--length=5x").assert_mistake("5x", "160", "end at 144", "scale_base")
    assert "nan" not in potamos("evaluate", positioned["xpos"], "--length=144").out
    for wrong in ("0", "x", "4.5x", "-3", "long"):
        potamos("evaluate", positioned["rope"], f"--length={wrong}").assert_mistake(wrong, "4x", "128")


def test_generate(trained: Path, potamos: Callable[..., Any]) -> None:
    from potamos.pretrain.generate import generate
    from potamos.pretrain.runs import open_run

    run = open_run(trained)
    options = {"tokens": 20, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": 3}
    expected = "".join(generate(run.model, run.tokenizer, "The river", stop_at_end=False, **options))
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = potamos("generate", trained, "--prompt", "The river", "--past-end", *arguments)
    assert done.out == f"The river{expected}\n"
    assert len(expected) > 10
    other = potamos("generate", trained, "--prompt", "The river", "--past-end", *arguments, "--seed=4")
    assert other.out != done.out


def test_opening_changes_nothing(trained: Path) -> None:
    """A reader must leave a folder alone where a run may be writing, half-written saves included."""
    from potamos.pretrain.runs import open_run

    unfinished = trained / "checkpoints" / ".tmp-step-00099999-1"
    unfinished.mkdir(exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in sorted(trained.rglob("*"))}
    run = open_run(trained)
    assert not run.model.training
    assert {path: path.stat().st_mtime_ns for path in sorted(trained.rglob("*"))} == before
    unfinished.rmdir()


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_mistakes_in_recipes(potamos: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    potamos("recipe", "show", "gpt_tny").assert_mistake("gpt_tny", "gpt_tiny")
    potamos("recipe", "show", "gpt_tiny", "train.stps=3").assert_mistake("train.stps", "steps")
    potamos("recipe", "show", "gpt_tiny", "train.steps").assert_mistake("train.steps")
    potamos("recipe", "show", "missing.yaml").assert_mistake("missing.yaml")
    two = potamos("recipe", "show", "gpt_tiny", "train.stps=3", "modl.width=4")
    two.assert_mistake("train.stps", "modl")
    assert two.err.count("error:") == 1


def test_mistakes_with_runs(trained: Path, potamos: Callable[..., Any], tmp_path: Path) -> None:
    from potamos.pretrain.runs import open_run

    potamos("generate", "runs/trail").assert_mistake("runs/trail", "runs/trial")
    potamos("evaluate", trained, "--step", "99999").assert_mistake("99999", "there are those of steps")
    potamos("evaluate", trained, "--data", "nowhere").assert_mistake("nowhere")
    potamos("generate", trained, "--temperature=-1").assert_mistake("temperature -1.0")
    potamos("generate", trained, "--device", "cuda").assert_mistake("cuda")
    (tmp_path / "new").mkdir()
    potamos("generate", tmp_path / "new").assert_mistake("no checkpoint yet", "potamos train")
    (tmp_path / "new" / "state.json").write_text('{"step": 3}')
    potamos("generate", tmp_path / "new").assert_mistake("stands at step 3")

    broken = shutil.copytree(trained, tmp_path / "broken")
    newest = max((broken / "checkpoints").iterdir(), key=lambda path: path.name)
    file = next((newest / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert open_run(broken).step < open_run(trained).step  # the one before it serves
    potamos("generate", broken, "--step", str(int(newest.name[5:]))).assert_mistake(file.name)


def test_tokenizer_that_changed_since_training(trained: Path, potamos: Callable[..., Any], tmp_path: Path) -> None:
    from potamos.data.tokenizer import train_bpe
    from potamos.pretrain.runs import open_run

    changed = shutil.copytree(trained, tmp_path / "changed")
    copy = changed / "tokenizer.json"
    assert copy.exists()
    train_bpe(["another text altogether, about mountains and wind"], 288, copy)
    potamos("generate", changed).assert_mistake(str(copy), "restore")
    copy.unlink()
    assert open_run(changed).tokenizer.sha256 == open_run(trained).tokenizer.sha256  # the recipe's own file serves


@pytest.fixture
def failing(potamos: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Any]:
    """Run `potamos recipes` while it does something else."""

    def call(action: Callable[[], object]) -> Any:
        monkeypatch.setattr(show, "recipes", lambda entries: action())
        return potamos("recipes")

    return call


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")


def test_errors_of_the_system_are_told_in_words(failing: Callable[..., Any]) -> None:
    done = failing(full_disk)
    done.assert_mistake()
    assert done.err == "error: /disk/file: No space left on device\n"


@pytest.mark.parametrize(
    "fault",
    [
        lambda: np.zeros(3).reshape(2, 2),  # a ValueError of a library
        lambda: int("x"),
        lambda: json.loads("{"),
        lambda: {}["missing"],
    ],
)
def test_faults_of_ours_keep_their_traceback(failing: Callable[..., Any], fault: Callable[[], object]) -> None:
    with pytest.raises((ValueError, KeyError)):
        failing(fault)


def test_plain_value_errors_count_only_where_this_program_raised_them(
    failing: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file that stands for one of ours: what it raises speaks to the user, what it stumbles over does not."""
    (tmp_path / "ours.py").write_text(
        "def told():\n    raise ValueError('set it to 3')\n\n\ndef stumbled():\n    return int('x')\n"
    )
    code = compile((tmp_path / "ours.py").read_text(), str(tmp_path / "ours.py"), "exec")
    ours: dict[str, Callable[[], object]] = {}
    exec(code, ours)
    with pytest.raises(ValueError, match="set it to 3"):
        failing(ours["told"])  # not yet one of the program's files
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "pretrain" / "cli.py"))
    failing(ours["told"]).assert_mistake("set it to 3")
    with pytest.raises(ValueError, match="invalid literal"):
        failing(ours["stumbled"])


def test_traceback_on_request(failing: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTAMOS_TRACEBACK", "1")
    with pytest.raises(OSError, match="No space"):
        failing(full_disk)


def test_other_ranks_speak_only_of_what_is_theirs(
    potamos: Callable[..., Any], failing: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert potamos("recipe", "show", "gpt_tny") == (2, "", "")
    done = failing(full_disk)
    assert (done.status, done.err) == (2, "error: rank 3: /disk/file: No space left on device\n")


# --- data --------------------------------------------------------------------------------------------------------


def test_data_commands(potamos: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The river runs to the sea. " * 50)
    corpus, tokenizer, dataset = tmp_path / "a.txt", tmp_path / "tokenizer.json", tmp_path / "set"
    assert "270 ids" in potamos("data", "tokenizer", corpus, tokenizer, "--vocabulary", "270").out
    assert "of 1 documents in 1 shards" in potamos("data", "prepare", corpus, dataset, "--tokenizer", tokenizer).out
    shown = potamos("data", "inspect", dataset, "--tokenizer", tokenizer, "--tokens", "9").out
    assert "270 ids" in shown
    assert "document 0 (begins here, goes on after this), 9 tokens\nThe river" in shown
    assert "every byte" in potamos("data", "verify", dataset, "--deep").out
    shard = next(dataset.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert potamos("data", "verify", dataset).status == 0
    damaged = potamos("data", "verify", dataset, "--deep")
    assert damaged.status == 1
    assert str(shard) in damaged.err
    potamos("data", "prepare", tmp_path / "none", dataset, "--tokenizer", tokenizer).assert_mistake("none")
    potamos("data", "tokenizer", corpus, tokenizer, "--vocabulary", "9").assert_mistake("vocabulary 9")
    potamos("data", "inspect", tmp_path).assert_mistake(str(tmp_path))
