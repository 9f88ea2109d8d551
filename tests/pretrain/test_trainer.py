"""The trainer: what a step does and does not do, what a run tells, how it ends and goes on."""

from __future__ import annotations

import json
import math
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from potamos.pretrain import opening, setup
from potamos.pretrain.config import RecipeError
from potamos.pretrain.records import read_metrics
from potamos.pretrain.trainer import StepResult, Trainer

PACKAGE = Path(__file__).resolve().parents[2]
NAN = float("nan")
FEW = ("train.steps=4", "checkpoint={every: 2, keep: 5}", "validate={every: 100}")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="module")
def finished(trial, tmp_path_factory):
    """A run of four steps with a step skipped, saved at each second step."""
    run = tmp_path_factory.mktemp("finished") / "run"
    samples = "telemetry={every: 1, samples: {every: 4, prompts: ['the river'], tokens: 4}}"
    assert trial.fit(run, *FEW, samples, kind=trial.variant(poison={2: NAN})) == 0
    return run


@pytest.fixture
def copy(finished, run):
    """A copy of the finished run, to go on with or to damage."""
    shutil.copytree(finished, run)
    return run


# --- a step ---------------------------------------------------------------------------------------------------------


def place() -> str:
    """The innermost line of this package that is being executed."""
    others = ("/tests/", "/site-packages/")  # an environment may lie inside the checkout
    frames = [
        f
        for f in traceback.extract_stack()
        if f.filename.startswith(str(PACKAGE)) and not any(other in f.filename for other in others)
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}" if frames else ""


class HostReads(TorchDispatchMode):
    """Notes every operation by which the host would wait for a device's value."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if any(name.startswith(waiting) for waiting in self.WAITING):
            self.found.append(f"{name} {place()}")
        return func(*args, **(kwargs or {}))


def noting(reads: HostReads, name: str):
    """A method of Tensor that leaves a note before it does its work."""
    original = getattr(Tensor, name)

    def method(self, *arguments, **settings):
        reads.found.append(f"{name} {place()}")
        return original(self, *arguments, **settings)

    return method


@pytest.mark.parametrize(
    ("changes", "tolerated"),
    [
        # What runs in place of Triton's kernels on a CPU plans tiles there, and chunks of rows with boundaries.
        (("data.boundaries=cross",), ("kernels/attention/chunked.py",)),
        ((), ("kernels/attention/chunked.py", "kernels/diag_ssm/segments.py", "kernels/flash_conv/shift.py")),
        (
            ("data.order=contiguous", "train.precision=bf16", "optimizer={kind: adamw, lr: 1.0e-2, spike: 4.0}"),
            ("kernels/attention/chunked.py", "kernels/diag_ssm/segments.py", "kernels/flash_conv/shift.py"),
        ),
    ],
    ids=["cross", "isolate", "carried"],
)
def test_a_step_never_waits_for_the_device(trial, run, monkeypatch, changes, tolerated):
    trainer = trial.trainer(run, *changes)
    trainer.system.train()
    trainer.train_step(trainer.stream.read(0, 8))  # so that there are moments, and carried state
    trainer.step = 1
    rows = trainer.stream.read(8, 8)
    # Counting a batch that has not been sent to the device yet is the host's own business.
    batches, counts = trainer.prepare(rows), trainer.total_counts(trainer.prepare(rows))
    monkeypatch.setattr(trainer, "prepare", lambda _: batches)
    monkeypatch.setattr(trainer, "total_counts", lambda _: counts)
    reads = HostReads()
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, noting(reads, name))
    with reads:
        result = trainer.train_step(rows)
        assert [read for read in reads.found if not any(file in read for file in tolerated)] == []
        reads.found.clear()
        assert result.loss.item() > 0
        assert bool(result.refused == 0)
        assert len([result.norm.tolist(), result.norms.cpu()]) == len(reads.found) - 2, "the detector works"


@pytest.mark.parametrize(
    ("poison", "skipped"),
    [({3: NAN}, [4]), ({2: float("inf"), 3: NAN}, [3, 4]), ({8: 1e6}, [9]), ({8: 1.0}, [])],
    ids=["nan", "twice", "spike", "none"],
)
def test_a_bad_step_is_skipped_counted_and_named(trial, run, capsys, poison, skipped):
    states = {}

    class Watched(trial.variant(poison=poison)):
        def train_step(self, rows):
            result = super().train_step(rows)
            tensors = self.parameters | self.optimizer.state_tensors()
            states[self.step + 1] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            return result

    changes = ("train.steps=10", "telemetry={every: 5}", "checkpoint={every: 4}")
    assert trial.fit(run, *changes, kind=Watched) == 0
    unchanged = [step for step in range(2, 11) if not trial.different_tensors(states[step - 1], states[step])]
    assert unchanged == skipped, "parameters and moments of a skipped step are those before it, to the bit"
    assert trial.history(run)[-1]["skipped_steps"] == len(skipped)
    told = [line for line in capsys.readouterr().out.splitlines() if "skipped:" in line]
    assert told == [
        f"step {step} skipped: samples {8 * step - 8} to {8 * step - 1} (to leave them out when going on from an "
        f"earlier checkpoint, add to data.skip: [{8 * step - 8}, {8 * step}])"
        for step in skipped
    ]
    assert math.isfinite(trial.losses(run)[-1])


def test_a_skipped_step_is_named_when_the_run_stops_before_the_next_log_line(trial, run, capsys):
    kind = trial.variant(poison={1: NAN}, stop=2)
    assert trial.fit(run, "telemetry={every: 10}", kind=kind) == 0
    assert "step 2 skipped: samples 8 to 15" in capsys.readouterr().out


def test_a_skipped_step_is_named_by_the_samples_that_it_read(trial, run, capsys):
    assert trial.fit(run, "data.skip=[[8, 16]]", kind=trial.variant(poison={1: NAN}, stop=2)) == 0
    assert "step 2 skipped: samples 16 to 23" in capsys.readouterr().out


def test_state_that_overflowed_is_not_carried_on(trial, run):
    """Activations that overflow once cost one step, not every step after it."""

    class Overflowing(Trainer):
        def train_step(self, rows):
            values = self.parameters["model.stack.blocks.0.mixer.v.weight"]
            kept = values.detach().clone()
            if self.step == 2:
                values.data.mul_(math.inf)
            try:
                return super().train_step(rows)
            finally:
                if self.step == 2:
                    values.data.copy_(kept)

    assert trial.fit(run, "data.order=contiguous", "train.steps=6", kind=Overflowing) == 0
    assert [record["skipped_steps"] for record in trial.history(run)] == [0, 0, 1, 1, 1, 1]


# --- what a run tells -----------------------------------------------------------------------------------------------


def board(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def text(accumulator, tag: str) -> str:
    return "\n".join(event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(tag))


def test_tensorboard_shows_everything(finished):
    shown = board(finished)
    names = ["loss", "perplexity", "bits_per_byte", "learning_rate", "tokens_per_second", "mfu", "data_wait"]
    names += ["memory_bytes", "skipped_steps", "tokens"]
    scalars = {f"train/{name}" for name in names}
    scalars |= {f"gradient_norm/{kind}" for kind in ("total", "mixer", "channel", "frontend")}
    scalars |= {f"validation/held_out/{name}" for name in ("loss", "perplexity", "bits_per_byte")}
    assert scalars <= set(shown.Tags()["scalars"])
    for tag in scalars - {tag for tag in scalars if tag.startswith("validation")}:
        assert [event.step for event in shown.Scalars(tag)] == [1, 2, 3, 4], tag
    assert "the river" in text(shown, "sample/0/text_summary")
    assert "model:" in text(shown, "recipe/text_summary")
    assert "sequence_length: 32" in text(shown, "recipe/text_summary")


def test_tensorboard_shows_what_was_planned_beside_what_is_reached(finished):
    """Both in one chart, as its page of custom scalars reads it."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # pyright: ignore[reportAttributeAccessIssue]

    shown, planned = board(finished), "plan/predicted_tokens_per_second"
    recorded = [record for record in read_metrics(finished) if record["kind"] == "train"]
    assert [event.step for event in shown.Scalars(planned)] == [1, 2, 3, 4]
    assert [event.value for event in shown.Scalars(planned)] == pytest.approx([r[planned] for r in recorded])
    reached = [event.value for event in shown.Scalars("train/tokens_per_second")]
    assert reached == pytest.approx([r["tokens_per_second"] for r in recorded])
    (event,) = shown.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    (chart,) = category.chart
    assert list(chart.multiline.tag) == ["train/tokens_per_second", planned]


def test_metrics_agree_with_each_other(trial, finished):
    record = read_metrics(finished)[-2]
    assert (record["kind"], record["step"], record["next_sample"], record["tokens"]) == ("train", 4, 32, 32 * 32)
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    rows = setup.open_stream(trial.recipe(*FEW), trial.tokenizer).read(24, 8)
    inside = rows.document_ids[:, 1:] == rows.document_ids[:, :-1]
    bytes_of = trial.tokenizer.token_bytes()[rows.tokens[:, 1:]][inside].sum()
    assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2) * inside.sum() / bytes_of)
    kinds = [record[f"gradient_norm/{kind}"] for kind in ("mixer", "channel", "frontend", "other") if
             f"gradient_norm/{kind}" in record]  # fmt: skip
    stack = record.get("gradient_norm/stack", 0.0)
    assert record["gradient_norm/total"] == pytest.approx(math.hypot(*kinds, stack))
    assert record["memory_bytes"] > 2**20
    assert 0 <= record["data_wait"] < 1


def test_likelihood_is_that_of_the_objectives_own_term(trial, run):
    """Beside others the loss is more than what text costs, and perplexity of a sum means nothing."""
    trainer = trial.trainer(run, "telemetry={every: 1}")
    loss, own, aside = (torch.tensor(value) for value in (5.0, 2.0, 3.0))
    zero, norms = torch.zeros(()), torch.ones(len(trainer.norm.kinds))
    trainer.step = 1
    trainer.observe(StepResult(loss, {"causal": own, "aside": aside}, zero, norms, zero, 0.25), 0.0)
    trainer.telemetry.close("built only")
    (record,) = (record for record in read_metrics(run) if record["kind"] == "train")
    assert (record["loss"], record["loss/causal"], record["loss/aside"]) == (5.0, 2.0, 3.0)
    assert record["perplexity"] == pytest.approx(math.exp(2.0))
    assert record["bits_per_byte"] == pytest.approx(2.0 / math.log(2) * 0.25)


def test_mfu_counts_what_a_hybrid_computes(trial, run):
    """An oracle by hand, layer by layer; a hybrid must never be charged for attention in every layer."""
    trainer = trial.trainer(run)
    width, length, vocabulary = 32, 32, trial.tokenizer.vocabulary
    mlp = 2 * (width * 4 * width) * 2
    h3 = 4 * 2 * width * width + width * (2 * 8 + (8 // 2) * (8 + 4) + 4 + 4)
    attention = 4 * 2 * width * width + 2 * 2 * width * (length + 1) / 2
    assert trainer.flops_per_token == 3 * (h3 + attention + 2 * mlp + 2 * width * vocabulary)
    trainer.telemetry.close("built only")
    assert trial.fit(run) == 0
    for record in (r for r in read_metrics(run) if r["kind"] == "train"):
        peak = trainer.flops_per_token * record["tokens_per_second"] / record["mfu"]
        assert 0 < record["mfu"] < 1
        assert 1e8 < peak < 1e14


@pytest.mark.parametrize(
    "error", [ValueError, KeyError, AssertionError, ZeroDivisionError, RecursionError, MemoryError]
)
def test_a_prediction_that_fails_ends_no_run(trial, run, monkeypatch, caplog, error):
    def fail(*_):
        raise error("nobody knows")

    monkeypatch.setattr(opening, "predict", fail)
    assert trial.fit(run, "train.steps=1", "validate={every: 100}") == 0
    assert "no prediction of the speed: " in caplog.text
    (line,) = [line for line in read_metrics(run) if "loss" in line]
    assert "plan/predicted_tokens_per_second" not in line


def test_a_log_has_a_line_for_each_interval(trial, run, capsys):
    assert trial.fit(run, "telemetry={every: 5}", "validate={every: 6}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  loss")[0] for line in lines if "tokens/s" in line] == [
        "step  5/12",
        "step 10/12",
        "step 12/12",
    ]
    for word in ("loss ", "bits/byte", "lr ", "norm ", "tokens/s", "ETA "):
        assert word in lines[-2]
    assert [line.split("  ")[0] for line in lines if "validation" in line] == ["step 6", "step 12"]
    assert lines[0].startswith("h3_hybrid_tiny: 36,448 parameters, step 0 of 12, ")


# --- ending and going on --------------------------------------------------------------------------------------------


def test_a_finished_run_is_marked_and_has_nothing_more_to_do(trial, copy, capsys):
    done = json.loads((copy / "done.json").read_text())
    assert (done["step"], done["next_sample"]) == (4, 32)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    assert trial.fit(copy, *FEW) == 0
    assert "nothing to do: 4 steps are trained, train.steps is 4; raise it to go on" in capsys.readouterr().out
    kept = [path for path in before if "checkpoints" in path.parts or path.name == "done.json"]
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)
    assert [record["step"] for record in trial.history(copy)] == [1, 2, 3, 4]


def test_more_steps_go_on_from_the_end(trial, copy, run, tmp_path, capsys):
    poisoned = trial.variant(poison={2: NAN})
    more = (*FEW, "train.steps=6")
    assert trial.fit(copy, *more, kind=poisoned) == 0
    assert "resumed with train.steps: 6 (was 4)" in capsys.readouterr().out
    assert json.loads((copy / "done.json").read_text())["step"] == 6
    assert "steps: 6" in (copy / "recipe.yaml").read_text()
    assert trial.fit(tmp_path / "whole", *more, kind=poisoned) == 0
    assert trial.differences(tmp_path / "whole", copy) == []


def test_changes_that_may_be_made_are_logged(trial, copy, capsys):
    changes = ("train.steps=5", "train.micro_sequences=2", "validate.every=3", "checkpoint.keep=1")
    assert trial.fit(copy, *FEW, *changes) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed with")]
    assert set(told) >= {
        "resumed with train.steps: 5 (was 4)",
        "resumed with train.micro_sequences: 2 (was 4)",
        "resumed with validate.every: 3 (was 100)",
        "resumed with checkpoint.keep: 1 (was 5)",
    }


def test_changes_that_may_not_be_made_are_all_named(trial, copy):
    with pytest.raises(RecipeError) as caught:
        trial.fit(copy, *FEW, "train.steps=8", "train.seed=6", "model.residual_dropout=0.2", "optimizer.lr=0.1")
    message = str(caught.value)
    for part in ("train.seed: value 6: the run was started with 5", "model.residual_dropout", "optimizer.lr"):
        assert part in message
    assert "train.steps" not in message
    assert trial.newest(copy).step == 4


def test_larger_batches_go_on_with_the_next_row(trial, copy, capsys):
    read = []

    class Reading(Trainer):
        def prepare(self, rows):
            read.extend(rows.samples.tolist())
            return super().prepare(rows)

    assert trial.fit(copy, *FEW, "train.steps=6", "train.sequences=16", kind=Reading) == 0
    assert read == list(range(32, 64))
    assert "resumed with train.sequences: 16 (was 8)" in capsys.readouterr().out


def test_rows_that_carry_state_keep_their_number(trial, run):
    assert trial.fit(run, *FEW, "data.order=contiguous") == 0
    with pytest.raises(ValueError, match=r"train.sequences: 16: the run was started with 8, and in contiguous order"):
        trial.fit(run, *FEW, "data.order=contiguous", "train.steps=6", "train.sequences=16")
