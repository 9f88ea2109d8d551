"""What a run writes down of itself under a layout: the figures of one process, to rounding, in half precision too."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from potamos.parallel import ring
from potamos.parallel.launch import Rank
from potamos.pretrain.records import read_metrics

pytestmark = pytest.mark.distributed


def figures(trial, run_ranks, run, axes: str, *changes: str) -> list[dict[str, Any]]:
    """The records of a run's steps, with everything that is logged."""
    layout = f"parallel={{dp_replicate: 1, {axes}}}"
    world = math.prod(int(size) for size in re.findall(r"(?:dp_shard|tp|pp|cp): (\d)", axes))

    def work(rank: int, world: int) -> int:
        return trial.trainer(run, *changes, layout, rank=Rank(rank, world, rank, world)).fit()

    assert run_ranks(world, work) == [0] * world
    return [record for record in read_metrics(run) if record["kind"] == "train"]


# --- every figure -----------------------------------------------------------------------------------------------------

MODEL = ("model.at={1: {mixer: {kind: attention, heads: 4}}}", "train.micro_sequences=1", "train.steps=2")
MODEL += ("model.layers=2", "validate={every: 99, sequences: 1}", "optimizer={kind: adamw, lr: 1.0e-3}")
CLOCK = {"tokens_per_second", "mfu", "data_wait", "memory_bytes", "seconds", "time", "attempt"}
CLOCK |= {"plan/predicted_tokens_per_second"}


@pytest.fixture(scope="module")
def alone(trial, tmp_path_factory):
    made = trial.trainer(tmp_path_factory.mktemp("alone") / "run", *MODEL)
    rows = [made.stream.read(8 * step, 8) for step in range(2)]
    assert made.fit() == 0
    return [record for record in read_metrics(made.folder.path) if record["kind"] == "train"], rows


def test_bits_per_byte_are_nats_over_the_bytes_of_the_scored_text(trial, alone):
    """By loops: a target counts its token's bytes, the end of a document and a token after it none."""
    records, batches = alone
    sizes = trial.tokenizer.token_bytes()
    for record, rows in zip(records, batches, strict=True):
        scored = [
            int(token)
            for tokens, ids in zip(rows.tokens, rows.document_ids, strict=True)
            for token, document, before in zip(tokens[1:], ids[1:], ids[:-1], strict=True)
            if document == before
        ]
        expected = record["loss"] / math.log(2) * len(scored) / sum(int(sizes[token]) for token in scored)
        assert record["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("axes", ["tp: 2, pp: 2", "dp_shard: 2, pp: 2", "cp: 2, tp: 2"])
def test_every_figure_is_that_of_one_process(trial, tmp_path, run_ranks, alone, axes):
    found = figures(trial, run_ranks, tmp_path / "run", axes, *MODEL)
    assert len(found) == len(alone[0]) == 2
    for record, expected in zip(found, alone[0], strict=True):
        assert record.keys() == expected.keys()
        names = {name for name, value in expected.items() if isinstance(value, int | float)} - CLOCK
        assert {"loss", "bits_per_byte", "perplexity", "gradient_norm/total", "tokens", "skipped_steps"} <= names
        for name in names:
            assert record[name] == pytest.approx(expected[name], rel=1e-5), name


# --- half precision ---------------------------------------------------------------------------------------------------

# Weights of N(0, 0.1), so that attention matters to the loss from the first step on.
RING = ("model.layers=2", "model.at={}", "model.mixer={kind: attention, heads: 4}", "model.init={kind: gpt2, std: 0.1}")
RING += ("train={steps: 3, sequences: 4, micro_sequences: 4, seed: 5, device: cpu}",)
RING += ("validate={every: 99, sequences: 1}", "optimizer={kind: adamw, lr: 1.0e-3}")
HALF = "train={steps: 3, sequences: 4, micro_sequences: 4, seed: 5, device: cpu, precision: bf16}"
# bf16 rounds by u = 2^-9 at most. About 16 results are rounded one after the other on the way through two layers, whose
# errors add up like their root: 4 u of a logit, forward and backward. Logits vary by 0.1 sqrt(32) = 0.6, so a token's
# loss of 5.8 moves by 4 u 0.6 / 5.8 = 8e-4 of itself, and their mean by less. A gradient moves by 4 u of itself.
LIMITS = {"loss": 2**-10, "gradient_norm/total": 2**-7, "gradient_norm/mixer": 2**-7}


@pytest.fixture(scope="module")
def rows(trial, tmp_path_factory):
    """One process in fp32 and in bf16."""
    found = {}
    for name, changes in {"fp32": RING, "bf16": (*RING, HALF)}.items():
        run = tmp_path_factory.mktemp(name) / "run"
        assert trial.fit(run, *changes) == 0
        found[name] = [record for record in read_metrics(run) if record["kind"] == "train"]
    return found


def beyond(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    return [
        f"step {e['step']}: {name} {f[name]} and {e[name]}"
        for f, e in zip(found, expected, strict=True)
        for name, limit in LIMITS.items()
        if not abs(f[name] / e[name] - 1) <= limit
    ]


AXES = "cp: 2, cp_kinds: [ring]"


def test_a_ring_in_half_precision_trains_as_one_process_does(trial, tmp_path, run_ranks, rows):
    found = figures(trial, run_ranks, tmp_path / "run", AXES, *RING, HALF)
    assert beyond(found, rows["fp32"]) == []
    assert beyond(found, rows["bf16"]) == []
    exact = pytest.approx([record["gradient_norm/total"] for record in rows["fp32"]], rel=1e-5)
    assert [record["gradient_norm/total"] for record in found] != exact, "nothing was rounded"


def plain_mean(patch):
    merge = ring.merge
    patch.setattr(ring, "merge", lambda outs, lses: ((outs[0] + outs[1]) / 2, merge(outs, lses)[1]))


def gradients_left_at_the_neighbor(patch):
    pass_on = ring.Ring.pass_on
    patch.setattr(ring.Ring, "pass_on", lambda self, *x: x if len(x) == 4 else pass_on(self, *x))


def own_slices_alone(patch):
    visible = ring._Pairs.visible
    patch.setattr(ring._Pairs, "visible", lambda self, stop: [] if stop else visible(self, stop))


@pytest.mark.parametrize(
    "bug", [plain_mean, gradients_left_at_the_neighbor, own_slices_alone], ids=lambda b: b.__name__
)
def test_the_bound_is_tight_enough_to_see_a_wrong_ring(trial, tmp_path, run_ranks, rows, monkeypatch, bug):
    bug(monkeypatch)
    found = figures(trial, run_ranks, tmp_path / "run", AXES, *RING, HALF)
    assert beyond(found, rows["fp32"])
    assert beyond(found, rows["bf16"])
