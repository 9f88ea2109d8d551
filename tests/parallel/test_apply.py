"""Data parallelism changes nothing: gradients, skips, stops, scores and the run itself against one process.

Target counts are made as unequal as they can be: some rows have no target at all, so a mean of means, a sum of local
means or an average over ranks is far off. fp64 throughout where gradients are compared, dropout on.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potamos.data.loader import Loader
from potamos.parallel import data as data_module
from potamos.parallel import launch
from potamos.parallel.apply import LayoutError, Spread, sizes
from potamos.parallel.facts import Layout
from potamos.parallel.launch import PeerError, Rank
from potamos.pretrain import guard, setup, trainer
from potamos.pretrain.checkpoint import CheckpointWriteError
from potamos.pretrain.records import read_metrics

SIXTEEN = "train={steps: 2, sequences: 16, micro_sequences: 4, seed: 5, device: cpu}"


# --- which rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [(), ("data.order=contiguous",)], ids=["shuffled", "contiguous"])
def test_global_batches_do_not_depend_on_the_number_of_ranks(trial, changes):
    stream = setup.open_stream(trial.recipe(SIXTEEN, *changes), trial.tokenizer)

    def batches(worlds):
        """One global batch for each world, which may change from one to the next as on a resume."""
        sample = 0
        for world in worlds:
            parts = []
            for rank in range(world):
                with Loader(
                    stream, sequences=16, rank=rank, world=world, next_sample=sample, allow_repeat=True
                ) as loader:
                    parts.append(next(loader))
                    ended = loader.state_dict()
            sample = ended["next_sample"]
            yield {
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("tokens", "document_ids", "positions", "samples", "source")
            }

    alone = list(batches([1] * 5))
    assert len({batch["tokens"].tobytes() for batch in alone}) == 5
    for worlds in ([2] * 5, [4] * 5, [8] * 5, [16] * 5, [1, 16, 2, 8, 4]):
        for one, many in zip(alone, batches(worlds), strict=True):
            for name, expected in one.items():
                assert np.array_equal(expected, many[name]), (worlds, name)


# --- gradients ------------------------------------------------------------------------------------------------------


def few_targets(rows):
    """Every token of the last quarter of the global batch is a document of its own, but for one pair."""
    documents = rows.document_ids.copy()
    for row, sample in enumerate(rows.samples):
        if sample % 8 >= 6:
            documents[row] = documents[row, 0] + np.arange(documents.shape[1])
            documents[row, 1] = documents[row, 0]
    return type(rows)(rows.tokens, documents, rows.positions, rows.samples, rows.source)


def one_step(trial, run, rank, *changes, steps=1):
    """Gradients and losses of a step in fp64, as the optimizer meets them: summed over ranks, not yet clipped."""
    filler = setup.filler

    def double(*arguments):
        fill = filler(*arguments)
        return lambda system, cut, shapes: (fill(system, cut, shapes), system.double())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "filler", double)
        made = trial.trainer(run, *changes, "optimizer.clip=null", rank=rank)
    made.system.train()
    found = []
    stepped = made.optimizer.step

    def noting(*arguments):
        found.append({name: p.grad.detach().clone() for name, p in made.parameters.items()})
        stepped(*arguments)

    made.optimizer.step = noting
    with Loader(made.stream, sequences=8, rank=rank.rank, world=rank.world, allow_repeat=True) as loader:
        results, targets = [], []
        for _ in range(steps):
            rows = few_targets(next(loader))
            targets.append(sum(int((batch.scored >= 0).sum()) for batch in made.prepare(rows)))
            results.append(made.train_step(rows))
            made.step += 1
    made.telemetry.close("built only")
    return {
        "gradients": found,
        "losses": [result.loss.item() for result in results],
        "norms": [result.norm.item() for result in results],
        "targets": targets[0],
        "parameters": {name: p.detach().clone() for name, p in made.parameters.items()},
    }


def worst(found, expected):
    """The largest error of a gradient, relative to its own norm, or to the whole gradient's where it is nearly zero."""
    errors = []
    for mine, oracle in zip(found["gradients"], expected["gradients"], strict=True):
        whole = torch.stack([g.norm() for g in oracle.values()]).norm()
        for name, gradient in oracle.items():
            error = (mine[name] - gradient).norm() / max(gradient.norm(), 1e-6 * whole)
            errors.append(float("inf") if not math.isfinite(error) else float(error))
    return max(errors)


@pytest.fixture(scope="module")
def alone(trial, tmp_path_factory):
    """Two steps of one process with one micro-batch: the definition."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return one_step(trial, run, Rank(), "train.micro_sequences=8", steps=2)


def test_the_definition_is_worth_comparing_with(alone):
    assert all(gradient.dtype == torch.float64 for gradient in alone["gradients"][0].values())
    zero = [name for name, gradient in alone["gradients"][0].items() if gradient.norm() == 0]
    assert zero == []
    assert alone["losses"][1] < alone["losses"][0]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_equals_one_batch(trial, tmp_path, alone, micro):
    found = one_step(trial, tmp_path / "run", Rank(), f"train.micro_sequences={micro}", steps=2)
    assert found["targets"] == alone["targets"]
    assert worst(found, alone) <= 1e-10
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-12)


@pytest.mark.parametrize(("world", "micro"), [(2, 4), (2, 1), (4, 2), (4, 1)])
def test_ranks_equal_one_process(trial, tmp_path, run_ranks, alone, world, micro):
    """(2, 1) and (4, 1) accumulate micro-batches without communication but for the last."""

    def work(rank, world):
        return one_step(
            trial, tmp_path / "run", Rank(rank, world, rank, world), f"train.micro_sequences={micro}", steps=2
        )

    found = run_ranks(world, work)
    targets = [rank["targets"] for rank in found]
    assert sum(targets) == alone["targets"]
    assert max(targets) > {2: 1.8, 4: 20}[world] * min(targets), "the ranks' targets are meant to be unequal"
    for rank in found:
        assert worst(rank, alone) <= 1e-10
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-12)
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-12)
        assert not trial.different_tensors(rank["parameters"], found[0]["parameters"]), "ranks stay equal, to the bit"


def average(patch):
    """What DDP does by itself: divide the sum of the ranks' gradients by their number."""
    add = data_module._sum_bucket

    def hook(group, bucket):
        return add(group, bucket).then(lambda future: future.value() / launch.world_size())

    patch.setattr(data_module, "_sum_bucket", hook)


def mean_of_means(patch):
    """Each rank divides by its own count, and the two by their number."""

    def counts(self, batches):
        own = {name: 2 * max(1, sum(batch.counts[name] for batch in batches)) for name in batches[0].counts}
        return own, 1.0

    patch.setattr(trainer.Trainer, "total_counts", counts)


def never_sync(patch):
    sync = Spread._sync
    patch.setattr(Spread, "_sync", lambda self, last: sync(self, last=False))


def key_dropout_by_place(patch):
    """Randomness keyed by where a row lies on its rank instead of by its global index."""
    prepare = trainer.Trainer.prepare

    def wrong(self, rows):
        renamed = type(rows)(rows.tokens, rows.document_ids, rows.positions, rows.samples % 4, rows.source)
        return prepare(self, renamed)

    patch.setattr(trainer.Trainer, "prepare", wrong)


@pytest.mark.parametrize("bug", [average, mean_of_means, never_sync, key_dropout_by_place])
def test_the_comparison_sees_wrong_parallelism(trial, tmp_path, run_ranks, alone, monkeypatch, bug):
    bug(monkeypatch)

    def work(rank, world):
        return one_step(trial, tmp_path / "run", Rank(rank, world, rank, world), "train.micro_sequences=2", steps=2)

    assert max(worst(rank, alone) for rank in run_ranks(2, work)) > 1e-3


# --- agreement ------------------------------------------------------------------------------------------------------


def fit(trial, run, *changes, kind=None):
    """A function for `run_ranks` that trains; each rank returns its exit status and what it was given to read."""

    def work(rank, world):
        read = []

        base: Any = kind(rank) if kind else trainer.Trainer

        class Reading(base):
            def prepare(self, rows):
                read.append((self.step, rows.samples.tolist()))
                return super().prepare(rows)

        made = trial.trainer(run, *changes, rank=Rank(rank, world, rank, world), kind=Reading)
        status = made.fit()
        parameters = {name: p.detach().clone() for name, p in made.parameters.items()}
        return {"status": status, "read": read, "step": made.step, "parameters": parameters}

    return work


def test_all_ranks_skip_what_one_rank_cannot_use(trial, tmp_path, run_ranks):
    """One rank's gradient is NaN once, and beyond all measure later."""
    poison = {2: math.nan, 9: 1e6}

    def kind(rank):
        return trial.variant(poison=poison if rank == 1 else None)

    ranks = run_ranks(2, fit(trial, tmp_path / "run", kind=kind))
    assert [rank["status"] for rank in ranks] == [0, 0]
    assert not trial.different_tensors(ranks[0]["parameters"], ranks[1]["parameters"])
    assert all(bool(torch.isfinite(p).all()) for p in ranks[0]["parameters"].values())
    skipped = [record["skipped_steps"] for record in trial.history(tmp_path / "run")]
    assert skipped == [0, 0, *[1] * 7, *[2] * 3]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(trial, tmp_path, run_ranks):
    class Signalled(trainer.Trainer):
        def train_step(self, rows):
            if self.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().train_step(rows)

    def work(rank, world):
        guard.install_signal_handlers()
        return fit(trial, tmp_path / "run", kind=lambda r: Signalled if r == 1 else trainer.Trainer)(rank, world)

    ranks = run_ranks(2, work)
    assert [(rank["status"], rank["step"]) for rank in ranks] == [(130, 6), (130, 6)]
    assert trial.newest(tmp_path / "run").step == 6
    marker = json.loads((tmp_path / "run" / "stop.0").read_text())
    assert (marker["step"], marker["reason"]) == (6, "another rank was asked to stop")


def test_all_ranks_end_when_the_last_save_fails(trial, tmp_path, run_ranks, monkeypatch):
    from potamos.pretrain import checkpoint

    def full(folder, tensors):
        raise OSError(28, "No space left on device", str(folder))

    def work(rank, world):
        monkeypatch.setattr(checkpoint, "write_tensors", full)
        try:
            fit(trial, tmp_path / "run", "train.steps=2")(rank, world)
        except (CheckpointWriteError, PeerError) as error:
            return str(error)

    messages = run_ranks(2, work, timeout=30)
    assert "No space left on device" in messages[0]
    assert messages[1] == f"rank 0: {messages[0]}"
    assert not (tmp_path / "run" / "done.json").exists()


def test_validation_scores_are_equal(trial, tmp_path, run_ranks):
    """11 windows in batches of 4: the ranks do not get equally many, and the last batch is not full."""
    changes = ("validate={every: 6, sequences: 11}", "train.micro_sequences=2")

    def work(rank, world):
        made = trial.trainer(tmp_path / f"{world}", *changes, rank=Rank(rank, world, rank, world))
        made.validate()
        made.telemetry.close("built only")

    scores = []
    for world in (1, 2, 4):
        run_ranks(world, work) if world > 1 else work(0, 1)
        scores.append(read_metrics(tmp_path / f"{world}")[0]["held_out/loss"])
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-12)


# --- elastic --------------------------------------------------------------------------------------------------------


SKIPPED = [*range(12, 15), *range(30, 41)]
WINDOWS = ("data.order=window", "data.window=1", "data.skip=[[12, 15], [30, 41]]")


@pytest.mark.parametrize(
    "changes", [(), ("data.order=contiguous",), WINDOWS], ids=["shuffled", "carried state", "windows, samples left out"]
)
def test_a_run_goes_on_with_other_numbers_of_ranks(trial, tmp_path, run_ranks, changes):
    """1 rank, then 2, then 4, then 1 again: the same rows at the same steps, and the same losses to rounding."""
    order = [sample for sample in range(200) if changes is not WINDOWS or sample not in SKIPPED]
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = (*changes, "train.micro_sequences=2", "optimizer={kind: adamw, lr: 1.0e-3}")
    assert trial.fit(whole, *changes) == 0
    read: dict[int, list[int]] = {}
    for world, stop in ((1, 2), (2, 5), (4, 8), (1, -1)):
        work = fit(trial, run, *changes, kind=lambda _, stop=stop: trial.variant(stop=stop))
        ranks = run_ranks(world, work) if world > 1 else [work(0, 1)]
        assert {rank["status"] for rank in ranks} == {0}
        for rank in ranks:
            for step, samples in rank["read"]:
                read.setdefault(step, []).extend(samples)
    assert read == {step: order[8 * step : 8 * step + 8] for step in range(12)}
    assert trial.losses(run) == pytest.approx(trial.losses(whole), rel=2e-6)
    before, after = trial.newest(whole), trial.newest(run)
    for name, expected in before.carried.items():
        if expected.is_floating_point():
            torch.testing.assert_close(after.carried[name], expected, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(after.carried[name], expected)


def test_rows_do_not_depend_on_when_ranks_batches_and_stages_changed(trial, tmp_path, run_ranks):
    """A run whose number of ranks, batch size, later stages and later skips change on the way reads, sample by sample,
    what the recipe it ends with says, as one process that was never interrupted."""
    train, other = trial.folder / "train", trial.folder / "held_out"
    first = f"{{from: 0, mixture: [{{path: {train}}}]}}"
    second = f"{{from: 50, mixture: [{{path: {train}, weight: 2}}, {{path: {other}}}]}}"
    third = f"{{from: 100, mixture: [{{path: {other}, weight: 2}}, {{path: {train}}}]}}"
    segments = [  # ranks, rows of a step, stages, skips, steps
        (1, 8, [first], [], 4),
        (2, 16, [first, second], [[40, 45]], 6),
        (4, 8, [first, second], [[40, 45], [77, 80]], 9),
        (1, 16, [first, second, third], [[40, 45], [77, 80], [110, 130]], 12),
    ]
    run, read, everything = tmp_path / "run", [], []

    class Reading(trainer.Trainer):
        def prepare(self, rows):
            read.append((self.step, self.rank.rank, rows))
            return super().prepare(rows)

    for world, sequences, stages, skips, steps in segments:
        changes = (
            f"data.stages=[{', '.join(stages)}]",
            f"data.skip={skips}",
            "data.allow_repeat=true",
            f"train={{steps: {steps}, sequences: {sequences}, micro_sequences: 2, seed: 5, device: cpu}}",
        )

        def work(rank, size, changes=changes):
            read.clear()
            assert trial.trainer(run, *changes, rank=Rank(rank, size, rank, size), kind=Reading).fit() == 0
            return list(read)

        ranks = run_ranks(world, work) if world > 1 else [work(0, 1)]
        found = sorted((item for rank in ranks for item in rank), key=lambda item: item[:2])
        everything += [rows for _, _, rows in found]
    stream = setup.open_stream(trial.recipe(*changes), trial.tokenizer)
    numbers = np.concatenate([rows.samples for rows in everything])
    skipped = {*range(40, 45), *range(77, 80), *range(110, 130)}
    assert numbers.tolist() == [sample for sample in range(172) if sample not in skipped][: len(numbers)]
    assert len(numbers) == 4 * 8 + 2 * 16 + 3 * 8 + 3 * 16
    expected = stream.rows(numbers)
    for name in ("tokens", "document_ids", "positions", "source"):
        found = np.concatenate([getattr(rows, name) for rows in everything])
        assert np.array_equal(found, getattr(expected, name)), name
    assert len(set(expected.source.tolist())) == 2


def test_a_resume_with_the_same_ranks_is_bitwise_too(trial, tmp_path, run_ranks):
    """With two ranks a sum has one order, so even here every bit must be that of the uninterrupted run."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = ("data.order=contiguous", "train.precision=bf16")
    run_ranks(2, fit(trial, whole, *changes))
    run_ranks(2, fit(trial, run, *changes, kind=lambda _: trial.variant(stop=6)))
    run_ranks(2, fit(trial, run, *changes))
    assert trial.differences(whole, run) == []


def test_carried_state_is_gathered_bit_for_bit(trial, run_ranks):
    """Negative zeros and NaNs with a payload included, in the order of the rows."""
    values = torch.randint(-(2**31), 2**31 - 1, (8, 3), dtype=torch.int64).int()
    floats = values.view(torch.float32).clone()
    floats[5] = -0.0
    halves = torch.randn(8, 2, 5).bfloat16() * torch.tensor([1.0, 0.0]).bfloat16()[:, None]

    def work(rank, world):
        micro = [slice(4 * rank, 4 * rank + 2), slice(4 * rank + 2, 4 * rank + 4)]
        states = [{"a": floats[rows], "b": (values[rows, 0], halves[rows].transpose(1, 2))} for rows in micro]
        place = Rank(rank, world, rank, world)
        stored = trainer.carried.gather(states, place)
        dealt = trainer.carried.scatter(stored, lambda: states[0], 2, place, torch.device("cpu"))
        for state, again in zip(states, dealt, strict=True):
            assert not trial.different_tensors(flat(state), flat(again))
        return stored

    def flat(state):
        return {"a": state["a"], "b.0": state["b"][0], "b.1": state["b"][1]}

    expected = {"leaf.0": floats, "leaf.1": values[:, 0], "leaf.2": halves.transpose(1, 2)}
    for stored in run_ranks(2, work):
        assert not trial.different_tensors(expected, stored)


def test_losing_the_carried_state_on_the_way_is_seen(trial, tmp_path, monkeypatch):
    """The losses above would show it."""
    changes = ("data.order=contiguous", "train.micro_sequences=2", "optimizer={kind: adamw, lr: 1.0e-3}")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert trial.fit(whole, *changes) == 0
    assert trial.fit(run, *changes, kind=trial.variant(stop=5)) == 0
    monkeypatch.setattr(trainer.carried, "scatter", lambda stored, example, count, *_: [None] * count)
    assert trial.fit(run, *changes) == 0
    assert trial.losses(run) != pytest.approx(trial.losses(whole), rel=2e-6)


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "world", "message"),
    [
        (Layout(dp_replicate=2), 4, r"dp_replicate 2 needs 2 processes, and this run has 4; .*dp_replicate: all"),
        (Layout(dp_replicate="all", dp_shard="all"), 2, r"parallel.dp_shard: only one axis can take what"),
        (Layout(tp=3), 4, r"tp 3 needs 3 or 6 processes, and this run has 4"),
        (Layout(dp_replicate=1, tp=2, pp=2), 8, r"pp 2 x tp 2 needs 4 processes, and this run has 8"),
        (Layout(ep=2), 2, r"parallel.ep: 2 needs experts"),
        (Layout(engine="other"), 1, r"parallel.engine: 'other'"),
    ],
)
def test_layouts_that_cannot_run_are_refused_by_name(layout, world, message):
    with pytest.raises(LayoutError, match=message):
        sizes(layout, world)


def test_one_process_is_not_wrapped(trial, tmp_path):
    made = trial.trainer(tmp_path / "run")
    made.telemetry.close("built only")
    assert made.spread.runner is made.system
    assert all(made.spread.stored[name] is p for name, p in made.system.named_parameters())
    assert sizes(Layout(), 4).data == sizes(Layout(dp_replicate=4), 4).data == 4
    assert sizes(Layout(dp_shard=2, tp=2), 8).data == 4


# --- leaving --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_threads_of_the_last_collectives_end_with_the_run(run_ranks):
    """One that frees a tensor while the interpreter shuts down aborts the process. DDP's linger, idle since long."""

    def threads(expected):
        """How many there are, once they are as many as expected, or at last: a new thread has no name at first."""
        deadline = time.monotonic() + 5
        while True:
            names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
            found = names.count("pt_gloo_runloop")
            if found == expected or time.monotonic() > deadline:
                return found

    def work(rank, world, wrapped):
        launch.start()
        if wrapped:
            everyone = torch.distributed.group.WORLD
            assert everyone is not None
            system = data_module.replicate(torch.nn.Linear(2, 2), everyone, torch.device("cpu"))
            system(torch.ones(1, 2)).sum().backward()
        launch.barrier()
        running = threads(4)
        launch.stop()
        return running, threads(2 if wrapped else 0)

    assert run_ranks(2, work, False, init=False) == [(4, 0)] * 2
    assert run_ranks(2, work, True, init=False) == [(4, 2)] * 2


# --- torchrun -------------------------------------------------------------------------------------------------------


def test_torchrun_trains(trial, tmp_path):
    """The console script under torchrun. Without the two dashes torchrun takes `--run` for an option of its own."""
    run = tmp_path / "run"
    programs = Path(sys.executable).parent
    command = [str(programs / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python", "--"]
    command += [str(programs / "potamos"), "train", "h3_hybrid_tiny", *trial.overrides("train.steps=4")]
    done = subprocess.run(
        [*command, "--run", str(run)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else None,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "done.json").read_text())["step"] == 4
    assert [record["step"] for record in trial.history(run)] == [1, 2, 3, 4]
    assert done.stdout.count("step 4/4") == 1, "one rank speaks"
    lines = (run / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines].count("start") == 1, "one rank writes"
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]

    whole = tmp_path / "whole"
    assert trial.fit(whole, "train.steps=4") == 0
    assert trial.losses(run) == pytest.approx(trial.losses(whole), rel=1e-5)
