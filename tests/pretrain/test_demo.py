"""The parts of the demo that decide something: the kill, what counts as finished, the verdict."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from potamos.data.commands import prepare_dataset, train
from potamos.pretrain import demo
from potamos.pretrain.config import load_recipe, to_yaml
from potamos.pretrain.evaluate import Score

# Stands for `potamos train`: the first start saves step 4, reaches 5 and hangs; the second finishes.
FAKE = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
again = (run / "checkpoints").exists()
(run / "checkpoints" / "step-00000004").mkdir(parents=True, exist_ok=True)
with open(run / "starts", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if again:
    (run / "recipe.yaml").write_bytes((run.parent / "recipe.yaml").read_bytes())
    (run / "done.json").write_text("{}")
    sys.exit(0)
(run / "state.json").write_text('{"step": 4}')
time.sleep(0.5)
(run / "state.json").write_text('{"step": 5}')
time.sleep(60)
(run / "survived").touch()
"""


def test_demo_kills_training_and_starts_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(FAKE)
    monkeypatch.setattr(demo, "program", lambda: [sys.executable, str(tmp_path / "train.py")])
    recipe = load_recipe("h3_hybrid_tiny", ["train.steps=12"])
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    job = demo.Demo(tmp_path, recipe, ["tokenizer.path=t.json"], ["train.steps=12"])
    assert demo.train_through_a_kill(job) == 0
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts").read_text().splitlines()]
    command = ["train", "h3_hybrid_tiny", "tokenizer.path=t.json", "train.steps=12", "--run", str(tmp_path / "run")]
    assert starts == [command, command]
    assert not (tmp_path / "run" / "survived").exists()
    text = capsys.readouterr().out
    assert "killed (SIGKILL) at step 5. The newest checkpoint is that of step 4" in text
    assert text.count("$ potamos train h3_hybrid_tiny") == 2
    assert job.finished
    assert demo.train_through_a_kill(job) == 0  # finished: not started a third time
    assert len((tmp_path / "run" / "starts").read_text().splitlines()) == 2
    longer = demo.Demo(tmp_path, load_recipe("h3_hybrid_tiny", ["train.steps=13"]), [], [])
    assert not longer.finished


def test_demo_reports_a_training_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "program", lambda: [sys.executable, "-c", "import sys; sys.exit(3)"])
    assert demo.train_through_a_kill(demo.Demo(tmp_path, load_recipe("h3_hybrid_tiny"), [], [])) == 3


@pytest.mark.parametrize(("nats", "status"), [(69.0, 0), (70.0, 1), (float("nan"), 1)])
def test_demo_fails_where_the_bigram_is_not_beaten(
    nats: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = demo.Demo(tmp_path, load_recipe("h3_hybrid_tiny"), [], [])
    found = Score(nats, 20, 100)  # 69 nats are 0.995 bits a byte
    assert demo.summarize_all(job, found, demo.Baselines(unigram=2.0, bigram=1.0, xz=1.8), 3.0) == status
    text = capsys.readouterr()
    for figure in ("1.000", "2.000", "1.800", f"{found.bits_per_byte:.3f}", "tensorboard --logdir"):
        assert figure in text.out
    assert ("do not beat" in text.err) == (status == 1)


def test_demo_keeps_baselines_of_the_same_data_only(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"The river {n} runs to the sea."}) for n in "abc" * 9)
    )
    tokenizer, _ = train(str(tmp_path / "text.jsonl"), 270, tmp_path / "tokenizer.json")
    for split in ("train", "validation"):
        prepare_dataset(str(tmp_path / "text.jsonl"), tmp_path / split, tokenizer_path=tmp_path / "tokenizer.json")
    place = demo.paths_below(tmp_path)
    job = demo.Demo(tmp_path, load_recipe("h3_hybrid_tiny", place), place, [])
    assert demo.read_baselines(job) is None

    class Known:
        def result(self) -> float:
            return 1.5

    made = demo.make_baselines(job, tokenizer, Known())  # type: ignore[arg-type]
    assert demo.read_baselines(job) == made
    assert made.xz == 1.5
    assert made.bigram < made.unigram
    content = json.loads((tmp_path / "baselines.json").read_text())
    (tmp_path / "baselines.json").write_text(json.dumps({**content, "data": ["other", "other"]}))
    assert demo.read_baselines(job) is None
