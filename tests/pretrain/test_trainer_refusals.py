"""What the trainer refuses before it starts, and what it does with damaged checkpoints and full disks."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from potamos.data.errors import DatasetError, StateMismatchError, TokenizerMismatchError
from potamos.data.manifest import MANIFEST, make_manifest, read_manifest
from potamos.data.prepare import prepare
from potamos.data.tokenizer import train_bpe
from potamos.parallel.check import check_micro_batches
from potamos.parallel.facts import Layout
from potamos.parallel.launch import Rank
from potamos.parallel.mesh import LayoutError, Sizes
from potamos.pretrain import checkpoint
from potamos.pretrain.config import RecipeError
from potamos.pretrain.opening import micro_batches
from potamos.pretrain.trainer import Trainer

FEW = ("train.steps=4", "checkpoint={every: 2, keep: 5}", "validate={every: 100}")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="module")
def finished(trial, tmp_path_factory):
    """A run of four steps saved at each second step."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert trial.fit(run, *FEW) == 0
    return run


@pytest.fixture
def copy(finished, run):
    """A copy of the finished run, to go on with or to damage."""
    shutil.copytree(finished, run)
    return run


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "near"), [(3, "use 12"), (16, "use 64"), (4, "use 16")])
def test_rows_that_do_not_fit_the_ranks_are_refused(trial, ranks, near):
    recipe = trial.recipe()
    with pytest.raises(ValueError, match=rf"train.sequences: 8 is not a multiple of {ranks} data ranks x .* 4; {near}"):
        micro_batches(recipe, ranks)
    assert micro_batches(recipe, 2) == 1
    with pytest.raises(RecipeError, match=r"train.sequences: value 8: not a multiple of train.micro_sequences 3"):
        trial.recipe("train.micro_sequences=3")


def test_states_that_cannot_be_carried_are_refused_before_anything_starts(trial, run):
    changes = ("data.order=contiguous", "parallel={dp_replicate: 1, tp: 2}")
    with pytest.raises(LayoutError, match=r"parallel: tp 2: data\.order: contiguous .* set tp, pp and cp to 1"):
        trial.trainer(run, *changes, rank=Rank(0, 2, 0, 2))
    assert not run.exists()


def test_another_tokenizer_than_the_datas_is_refused(trial, run, tmp_path):
    other = train_bpe(["other words altogether"] * 9, 280, tmp_path / "other.json")
    assert other.sha256 != trial.tokenizer.sha256
    with pytest.raises(TokenizerMismatchError, match="prepare") as caught:
        trial.trainer(run, f"tokenizer.path={tmp_path / 'other.json'}")
    assert str(trial.folder / "train") in str(caught.value)
    assert not (run / "checkpoints").exists(), "refused before anything was written"


def test_a_model_with_fewer_ids_than_the_tokenizer_is_refused(trial, run):
    known = trial.tokenizer.vocabulary
    with pytest.raises(ValueError, match=rf"model.frontend.vocabulary: {known - 1} is below the {known} ids"):
        trial.trainer(run, f"model.frontend={{kind: tokens, vocabulary: {known - 1}}}")


def test_a_token_beyond_the_vocabulary_is_refused(trial, run, tmp_path):
    """A dataset that names the right tokenizer but holds an id that it does not have."""
    known = trial.tokenizer.vocabulary
    shutil.copytree(trial.folder / "train", tmp_path / "train")
    written = {k: v for k, v in read_manifest(tmp_path / "train").fields.items() if k not in ("format", "version")}
    (tmp_path / "train" / MANIFEST).write_bytes(make_manifest({**written, "max_token": known}).to_bytes())
    with pytest.raises(DatasetError, match=rf"train holds token id {known}, .* vocabulary ends at {known - 1}"):
        trial.trainer(run, f"data.stages=[{{from: 0, mixture: [{{path: {tmp_path / 'train'}}}]}}]")


def test_other_data_than_the_runs_is_refused(trial, copy, tmp_path):
    """The place of the data may change, their content may not."""
    source = tmp_path / "other.jsonl"
    source.write_text(json.dumps({"text": "one bridge and then another " * 400}) + "\n")
    prepare(source, "all", trial.tokenizer, tmp_path / "other", chunk_tokens=1024)
    other = f"data.stages=[{{from: 0, mixture: [{{path: {tmp_path / 'other'}}}]}}]"
    with pytest.raises(StateMismatchError, match="the checkpoint's data differ from the recipe's in: stages"):
        trial.fit(copy, *FEW, "train.steps=6", other)


def test_data_that_were_moved_are_the_same_data(trial, copy, run, tmp_path):
    shutil.copytree(trial.folder / "train", tmp_path / "moved")
    moved = f"data.stages=[{{from: 0, mixture: [{{path: {tmp_path / 'moved'}}}]}}]"
    assert trial.fit(copy, *FEW, "train.steps=6", moved) == 0
    assert trial.fit(run, *FEW, "train.steps=6") == 0
    assert trial.differences(run, copy) == []


def test_a_checkpoint_that_contradicts_itself_about_the_data_is_refused(trial, copy):
    """The trainer's count and the stream's state are two records of one place."""
    loaded = trial.newest(copy)
    trainer = trial.trainer(copy, *FEW)
    trainer.telemetry.close("built only")
    with pytest.raises(checkpoint.CheckpointError, match="sample 40 comes next, and that the data go on at 32"):
        trainer.restore(dataclasses.replace(loaded, next_sample=40))
    trainer.restore(loaded)
    assert trainer.next_sample == 32


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(trial, copy):
    loaded = trial.newest(copy)
    model = {name: tensor.clone() for name, tensor in loaded.model.items()}
    name = "model.frontend.tokens.weight"
    model["model.extra.weight"] = torch.zeros(2)
    del model["model.stack.norm.weight"]
    model[name] = model[name][:-1]
    trainer = trial.trainer(copy, *FEW)
    trainer.telemetry.close("built only")
    with pytest.raises(ValueError, match="holds another model's parameters") as caught:
        trainer.restore(dataclasses.replace(loaded, model=model))
    shape = tuple(loaded.model[name].shape)
    assert str(caught.value).splitlines()[1:] == [
        "  model.extra.weight: only in the checkpoint",
        f"  {name}: {(shape[0] - 1, shape[1])} stored, {shape} in the model",
        "  model.stack.norm.weight: only in the model",
    ]


def test_a_run_folder_that_is_a_file_is_refused(trial, run):
    run.write_text("a letter")
    attempt = trial.start(run, *FEW)
    assert attempt.wait() == 2
    assert str(run) in attempt.output
    assert "Traceback" not in attempt.output
    assert run.read_text() == "a letter"


# --- damaged checkpoints, full disks --------------------------------------------------------------------------------


def damage_tensor(folder: Path) -> None:
    file = next((folder / "model").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    file = next((folder / "optimizer").glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)


def drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [damage_tensor, truncate, drop_manifest])
def test_a_damaged_checkpoint_is_passed_over(trial, finished, copy, caplog, damage):
    damage(copy / "checkpoints" / "step-00000004")
    trainer = trial.trainer(copy, *FEW)
    assert trainer.step == 2
    assert any("skipping checkpoint step-00000004" in record.message for record in caplog.records)
    assert trainer.fit() == 0
    assert trial.differences(finished, copy) == []


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_over(trial, copy):
    for folder in (copy / "checkpoints").iterdir():
        damage_tensor(folder)
    with pytest.raises(checkpoint.CheckpointError, match="none of the 2 checkpoints"):
        trial.trainer(copy, *FEW)


def full_disk(monkeypatch, *, full):
    """Writing a checkpoint's tensors fails while ``full()``."""
    write = checkpoint.write_tensors

    def failing(folder, tensors):
        if full():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "partial.safetensors").write_bytes(b"\0" * 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        write(folder, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", failing)


def test_training_outlives_a_full_disk(trial, run, monkeypatch, caplog):
    steps = []

    class Watched(Trainer):
        def save(self, *, wait):
            super().save(wait=wait)
            self.checkpoints._settle()
            steps.append((self.step, [path.name for path in sorted((run / "checkpoints").iterdir())]))

    full_disk(monkeypatch, full=lambda: len(steps) == 1)
    assert trial.fit(run, "train.steps=6", "checkpoint={every: 2, keep: 5}", kind=Watched) == 0
    assert steps == [
        (2, ["step-00000002"]),
        (4, ["step-00000002"]),
        (6, ["step-00000002", "step-00000006"]),
    ]
    assert any("No space left on device" in r.message and "Training goes on" in r.message for r in caplog.records)


def test_the_systems_own_refusal_is_survived_and_then_told(trial, run):
    """No double of a full disk: the kernel refuses to let any file grow beyond a size that only a model reaches."""
    attempt = trial.start(run, *FEW, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)))
    assert attempt.wait() == 2, attempt.output
    assert "File too large" in attempt.output
    assert "Traceback" not in attempt.output
    assert trial.losses(run)[-1] < trial.losses(run)[0]
    assert len(trial.losses(run)) == 4, "the failed save at step 2 did not end the run"
    assert list((run / "checkpoints").iterdir()) == []


def test_a_save_that_fails_is_told_to_whoever_watches(trial, run):
    """Each save waits for the one before, so that of step 2 has failed by the time that step 4 is told of."""
    attempt = trial.start(
        run, *FEW, "checkpoint.every=1", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    )
    assert attempt.wait() == 2, attempt.output
    state = json.loads((run / "state.json").read_text())
    assert (state["step"], state["save_every"]) == (4, 1)
    assert state["save_failed"] in [{"step": step, "why": "File too large"} for step in (2, 3)]


def test_a_last_save_that_fails_is_an_error(trial, finished, run, tmp_path, monkeypatch):
    full_disk(monkeypatch, full=lambda: bool(list(run.glob("checkpoints/step-*2"))))
    attempt = trial.start(run, *FEW)
    assert attempt.wait() == 2, attempt.output
    assert "No space left on device" in attempt.output
    assert "The last one is step-00000002" in attempt.output
    assert "Traceback" not in attempt.output
    assert not (run / "done.json").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert json.loads((run / "state.json").read_text())["reason"] == "failed: CheckpointWriteError"
    monkeypatch.undo()
    attempt = trial.start(run, *FEW)
    assert attempt.wait() == 0, attempt.output
    assert trial.newest(run).step == 4


def test_a_rank_alone_may_not_be_asked_for_more(trial, run):
    with pytest.raises(ValueError, match=r"dp_replicate 2 needs 2 processes, and this run has 1"):
        trial.trainer(run, "parallel.dp_replicate=2", rank=None)


@pytest.mark.parametrize(
    ("schedule", "count", "near"),
    [("1f1b", 1, "2"), ("interleaved_1f1b", 5, "4 or 6"), ("zero_bubble", 5, "4 or 6"), ("dualpipe_v", 2, "4")],
)
def test_micro_batches_that_a_schedule_cannot_order_are_refused(schedule, count, near):
    layout, size = Layout(dp_replicate=1, pp=2, schedule=schedule), Sizes(pp=2)
    with pytest.raises(LayoutError, match=f"{schedule} over 2 stages cannot order {count} .* make them {near} by"):
        check_micro_batches(layout, size, count)
    for fine in map(int, near.split(" or ")):
        check_micro_batches(layout, size, fine)
    check_micro_batches(layout, Sizes(), count)
