"""The certificate itself: what it compares with what, how a recipe is made small, what it prints.

That it sees every known mistake of a layout is shown by tests/parallel/test_controls.py.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.pipelining import schedules

from potamos.parallel import gradients, pipeline
from potamos.parallel.check import _takes
from potamos.parallel.facts import Layout
from potamos.parallel.local import RankTimeout
from potamos.parallel.mesh import LayoutError, Sizes, sizes
from potamos.parallel.pipeline import SCHEDULES, held_stages
from potamos.pretrain import verify as verify_module
from potamos.pretrain import verify_layouts, verify_steps
from potamos.pretrain.config import available, load_recipe
from potamos.pretrain.recipe import Muon
from potamos.pretrain.verify import TOLERANCES, compare, verify
from potamos.pretrain.verify_layouts import matrix, parse_layout, recipe_layout, spell, world_of
from potamos.pretrain.verify_small import ReductionError, Reductions, batch, make_small, micro_batches
from potamos.pretrain.verify_steps import Record

TOLERANCE = TOLERANCES["fp64"]


# --- comparing -------------------------------------------------------------------------------------------------------


def record() -> Record:
    """Three parameters: one large, one small, one whose gradient is zero by nature."""
    random = np.random.default_rng(0)
    gradients = {"a": random.normal(size=(4, 3)), "b": 1e-3 * random.normal(size=5), "x.mixer.k.bias": np.zeros(2)}
    return Record(
        losses=[3.0, 2.5, 2.0],
        norms=[1.0, 0.9, 0.8],
        scores=[2.25, 2.375, 2.5],
        gradients=gradients,
        updates={name: 1e-3 * np.sign(g) + 1e-4 for name, g in gradients.items()},
        start={name: f"start {name}" for name in gradients},
        copies={(name, -1, -1): f"end {name}" for name in gradients},
    )


def spread() -> list[Record]:
    """Two ranks that found the same; only the first tells whole tensors."""
    first, second = record(), record()
    second.gradients, second.updates, second.start = {}, {}, {}
    return [first, second]


def test_equal_records_pass():
    lines, (norms, losses, scores), failures = compare(record(), spread(), TOLERANCE)
    assert failures == []
    assert all(line.passed for line in lines)
    assert norms.passed
    assert losses.passed
    assert scores.passed
    assert [line.name for line in lines if line.exempt] == ["x.mixer.k.bias"]


def scaled(name: str, factor: float) -> Callable[[list[Record]], None]:
    def change(found: list[Record]) -> None:
        found[0].gradients[name] = found[0].gradients[name] * factor

    return change


def set_to(part: str, name: str, value: float) -> Callable[[list[Record]], None]:
    def change(found: list[Record]) -> None:
        getattr(found[0], part)[name] = np.full_like(getattr(found[0], part)[name], value)

    return change


def on_second(part: str) -> Callable[[list[Record]], None]:
    def change(found: list[Record]) -> None:
        getattr(found[1], part)[2] *= 1.0 + 1e-6

    return change


def unknown_on_second(part: str) -> Callable[[list[Record]], None]:
    def change(found: list[Record]) -> None:
        getattr(found[1], part)[1] = math.nan

    return change


def copies_differ(found: list[Record]) -> None:
    found[1].copies["b", -1, -1] = "another end"


def other_start(found: list[Record]) -> None:
    found[0].start["b"] = "another start"


def lose(found: list[Record]) -> None:
    del found[0].gradients["b"]


def transpose(found: list[Record]) -> None:
    found[0].gradients["a"] = found[0].gradients["a"].T


def second_holder_differs(found: list[Record]) -> None:
    """Two stages hold a tied table, and only the later one is wrong."""
    found[1].gradients["a"] = found[0].gradients["a"] * 1.001
    found[1].updates["a"], found[1].start["a"] = found[0].updates["a"], found[0].start["a"]


def stranger(found: list[Record]) -> None:
    found[1].start["c"] = "who?"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (scaled("a", 2.0), "gradients differ: 1 of 3 parameters, first a"),
        (scaled("b", 1.0 + 1e-9), "gradients differ: 1 of 3 parameters, first b"),
        (scaled("b", math.nan), "gradients differ"),
        (scaled("b", 0.0), "gradients differ"),
        (set_to("gradients", "x.mixer.k.bias", 1e-12), "gradients differ"),
        (set_to("updates", "a", math.nan), "updates differ: 1 of 3 parameters, first a"),
        (set_to("updates", "b", 0.0), "updates differ"),
        (on_second("norms"), "the gradient's norm differs"),
        (on_second("losses"), "losses differ"),
        (on_second("scores"), "scores of held-out rows differ"),
        (unknown_on_second("norms"), "the gradient's norm differs"),
        (unknown_on_second("losses"), "losses differ: 3, 2.5, 2 alone, 3, nan, 2 spread"),
        (unknown_on_second("scores"), "scores of held-out rows differ"),
        (copies_differ, "not the same on all ranks"),
        (other_start, "not the same on all ranks"),
        (lose, "gradients differ: 1 of 3 parameters, first b"),
        (transpose, "gradients differ"),
        (second_holder_differs, "gradients differ: 1 of 3 parameters, first a"),
        (stranger, "parameters that one process does not have: c"),
    ],
)
def test_what_differs_is_said(change, says):
    found = spread()
    change(found)
    *_, failures = compare(record(), found, TOLERANCE)
    assert any(failure.startswith(says) for failure in failures), failures


def test_a_gradient_of_zero_is_excused_by_name_alone():
    """Its update may be anything where it is a key bias; of another parameter it may not."""
    found = spread()
    found[0].updates["x.mixer.k.bias"] = np.ones(2)
    lines, *_, failures = compare(record(), found, TOLERANCE)
    assert failures == []
    (excused,) = [line for line in lines if line.exempt]
    assert "softmax" in (excused.exempt or "")
    alone, found = record(), spread()
    for one in (alone, found[0]):
        one.gradients["b"] = np.zeros(5)
    found[0].updates["b"] = np.ones(5)
    assert compare(alone, found, TOLERANCE)[-1] == ["updates differ: 1 of 3 parameters, first b"]


def test_a_key_bias_with_a_gradient_is_judged_like_all():
    alone, found = record(), spread()
    alone.gradients["x.mixer.k.bias"] = found[0].gradients["x.mixer.k.bias"] = np.ones(2)
    found[0].updates["x.mixer.k.bias"] = np.ones(2)
    assert compare(alone, found, TOLERANCE)[-1] == ["updates differ: 1 of 3 parameters, first x.mixer.k.bias"]


# --- a small copy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h3_hybrid_125m", "h3_hybrid_2.7b", "gpt_125m"])
def test_a_small_copy_keeps_the_kinds_of_layers(name):
    recipe = load_recipe(name)
    small = make_small(recipe, parse_layout(["tp=2", "cp=2"]), Reductions())
    kinds = {recipe.model.layer(i).mixer.kind for i in range(recipe.model.layers)}
    assert {small.recipe.model.layer(i).mixer.kind for i in range(small.recipe.model.layers)} == kinds
    assert small.recipe.model.width <= 64
    assert small.recipe.model.layers <= 4
    assert f"model.width: {small.recipe.model.width} (was {recipe.model.width})" in small.said
    assert f"data.sequence_length: 32 (was {recipe.data.sequence_length})" in small.said
    assert small.recipe.optimizer.kind == recipe.optimizer.kind
    assert small.recipe.model.residual_dropout == recipe.model.residual_dropout


def test_a_small_copy_keeps_the_update_rule():
    changes = ["optimizer={kind: muon, lr: 0.01, matrix_lr: 0.02, momentum: 0.8, clip: 2.0, spike: 6.0}"]
    small = make_small(load_recipe("h3_hybrid_125m", changes), parse_layout(["tp=2"]), Reductions())
    own = small.recipe.optimizer
    assert isinstance(own, Muon)
    assert (own.momentum, own.lr, own.matrix_lr, own.clip, own.spike) == (0.8, 1e-3, 1e-3, 0.25, None)
    assert {"optimizer.matrix_lr: 0.001 (was 0.02)", "optimizer.spike: None (was 6.0)"} <= set(small.said)


def test_sizes_that_are_asked_for_are_taken():
    wanted = Reductions(width=48, layers=5, length=64, vocabulary=100, rows=24)
    recipe = make_small(load_recipe("h3_hybrid_125m"), parse_layout(["dp_shard=2"]), wanted).recipe
    assert (recipe.model.width, recipe.model.layers, recipe.data.sequence_length) == (48, 5, 64)
    assert (recipe.model.frontend.vocabulary, recipe.train.sequences) == (100, 24)  # pyright: ignore
    assert [recipe.model.layer(i).mixer.kind for i in range(5)] == ["h3", "attention", "h3", "attention", "h3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "tp=8",
            r"parallel\.tp: 8 does not divide the 12 key-value heads of model\.stack\.blocks\.1\.mixer; "
            r"use 4, or 6 with a vocabulary of 50268, or 12 with a vocabulary of 50268$",
        ),
        (
            "tp=5",
            r"parallel\.tp: 5 does not divide the 768 channels of model\.stack\.blocks\.0\.mixer, the 3072 inner "
            r"channels of .*blocks\.0\.channel, the 12 key-value heads of .*blocks\.1\.mixer, the 50264 entries of "
            r"model\.frontend\.tokens\.weight; use 4, or 6 with a vocabulary of 50268$",
        ),
        ("pp=8 schedule=zbv", r"parallel\.pp: 16 stages need as many layers, the model has 12"),
        ("cp=3", r"data\.sequence_length: 2048 cannot be cut into 6 slices for cp 3; use 2046 or 2052"),
        ("ep=2", r"parallel\.ep: 2 needs experts"),
        (
            "pp=2 schedule=zbv compile=inductor",
            r"parallel\.compile: 'inductor' does not go with schedule zbv: .*; leave it out, or use interleaved_1f1b",
        ),
        (
            "pp=2 schedule=zero_bubble checkpointing=selective",
            r"parallel\.checkpointing: selective does not go with schedule zero_bubble, .*; use full, none",
        ),
    ],
)
def test_what_the_full_recipe_cannot_have_is_refused(words, message):
    with pytest.raises(LayoutError, match=message):
        make_small(load_recipe("h3_hybrid_125m"), parse_layout(words.split()), Reductions())


def test_a_width_that_fits_no_head_is_refused():
    with pytest.raises(ReductionError, match=r"no copy of width 50 .*heads 12 does not divide the width 50.*--width"):
        make_small(load_recipe("h3_hybrid_125m"), parse_layout(["tp=2"]), Reductions(width=50))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_take_the_micro_batches_chosen_for_them(name, ranks, monkeypatch):
    """Asked of torch itself: its classes refuse numbers that they cannot order."""

    class Stage:
        is_first = is_last = has_backward = True

        def __init__(self, index: int) -> None:
            self.stage_index, self.num_stages = index, ranks * SCHEDULES[name].stages
            self.group_size, self.group_rank, self.submod = ranks, 0, None
            self.stage_index_to_group_rank = {
                stage: rank for rank in range(ranks) for stage in held_stages(SCHEDULES[name], rank, ranks)
            }

    monkeypatch.setattr(schedules, "_PipelineScheduleRuntime", schedules._PipelineScheduleRuntime)
    stages = [Stage(index) for index in held_stages(SCHEDULES[name], 0, ranks)]

    def made(count: int) -> bool:
        """Whether torch does."""
        with contextlib.suppress(ValueError):
            SCHEDULES[name].kind(stages if SCHEDULES[name].stages > 1 else stages[0], count, loss_fn=lambda *a: a)
            return True
        return False

    counts = range(1, 6 * ranks)
    assert [n for n in counts if _takes(name, ranks, n)] == [n for n in counts if made(n)]
    count = micro_batches(name, ranks)
    assert made(count)
    assert count % 2 == 1
    assert count >= 3


def test_every_rank_has_equally_many_rows():
    for layout in matrix(("state", "a2a", "ring")):
        size = sizes(layout, world_of(layout))
        rows, micro = batch(layout, size, 12)
        per_rank, rest = divmod(rows, size.data)
        assert rest == 0
        assert per_rank % micro == 0
        assert per_rank // micro >= 3
    assert batch(Layout(), Sizes(), 12) == (12, 4)


def test_no_parameter_begins_with_values_that_are_all_alike(run_ranks, monkeypatch):
    """Gains of one and biases of zero would hide what multiplies them: noise of 0.02 lies on all, in both trainings."""
    assert float(verify_steps.noise(5, "a", torch.Size([10000])).std()) == pytest.approx(0.02, rel=0.05)
    monkeypatch.setattr(verify_steps, "digest", lambda value: str(len(value.unique()) == value.numel() > 1))
    layout = parse_layout(["dp_shard=2"])
    recipe = make_small(load_recipe("s4d_tiny"), layout, Reductions()).recipe
    (alone,) = run_ranks(1, verify_steps.train_alone, recipe, torch.float64)
    for found in (alone, run_ranks(2, verify_steps.train_spread, recipe, layout, torch.float64)[0]):
        plain = {name: alike for name, alike in found.start.items() if name.endswith(("norm.weight", "bias"))}
        assert len(plain) > 4
        assert set(plain.values()) == {"True"}, plain


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_layouts_are_spelled_as_they_are_read():
    for layout in matrix(("state", "a2a", "ring")):
        again = parse_layout(spell(layout).split())
        assert spell(again) == spell(layout)
        assert world_of(again) == world_of(layout)
    assert spell(parse_layout([])) == "one process"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tp=two", r"tp=two: give a whole number of ranks above 0, as in tp=2"),
        ("tp=0", r"tp=0: give a whole number"),
        ("dp_shard=all", r"dp_shard=all: give a whole number"),
        ("pt=2", r"'pt=2' is no setting of a layout; write one of dp_replicate, .*tp.*, as in tp=2"),
        ("tp", r"'tp' is no setting"),
        ("schedule=2f2b", r"schedule=2f2b: choose one of gpipe, 1f1b"),
        ("cp_kinds=state,loop", r"cp_kinds=loop: choose one of state, a2a, ring"),
        ("cp_order=spiral", r"cp_order=spiral: choose one of contiguous, zigzag"),
        ("sequence_parallel=2", r"sequence_parallel=2: choose one of true, false"),
        ("compile=foo", r"compile=foo: choose one of inductor, aot_eager, null"),
    ],
)
def test_a_wrong_setting_is_named(word, message):
    with pytest.raises(LayoutError, match=message):
        parse_layout([word])


def test_a_setting_given_twice_is_refused():
    with pytest.raises(LayoutError, match="tp is given twice, as 2 and 4"):
        parse_layout(["tp=2", "tp=4"])


def test_a_recipes_own_layout_is_cut_to_the_ranks_that_there_are():
    assert recipe_layout(Layout(), 8) == Layout(dp_replicate=2)
    assert recipe_layout(Layout(dp_replicate=1, dp_shard="all", tp=4), 8) == Layout(dp_replicate=1, dp_shard=2, tp=4)
    large = Layout(dp_replicate=4, dp_shard=16, tp=8)
    assert recipe_layout(large, 8) == Layout(dp_replicate=2, dp_shard=2, tp=2)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def verified(potamos: Callable[..., Any]) -> Callable[..., Any]:
    """`verified(...)`: `potamos verify ...`."""
    return partial(potamos, "verify")


def test_the_command_prints_every_parameter_and_writes_json(verified, run_ranks, tmp_path):
    ended = verified("s4d_tiny", "tp=2", "model.residual_dropout=0.1", "--json", tmp_path / "found.json")
    assert ended.status == 0, ended.out + ended.err
    assert "model.stack.blocks.1.mixer.core.diagonal.log_dt" in ended.out
    assert "PASS: tp=2" in ended.out
    assert "model.width: 32 (was 192)" in ended.out
    document = json.loads((tmp_path / "found.json").read_text())
    (certificate,) = document["certificates"]
    assert document["passed"] is certificate["passed"] is True
    assert (certificate["layout"], certificate["ranks"], certificate["dtype"]) == ("tp=2", 2, "fp32")
    names = {line["name"] for line in certificate["lines"]}
    assert {"model.frontend.tokens.weight", "model.stack.norm.weight"} <= names
    assert all(line["gradient_error"] <= 1e-5 for line in certificate["lines"])
    assert len(certificate["losses"]["alone"]) == len(certificate["norms"]["spread"]) == 3
    assert len(certificate["scores"]["alone"]) == 1
    assert certificate["versions"]["torch"] == torch.__version__
    assert certificate["versions"]["python"] == platform.python_version()
    assert "cores" in certificate["device"]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(certificate["date"])) < timedelta(minutes=5)
    assert "score of held-out rows: alone" in ended.out


def test_a_layout_that_changes_a_gradient_ends_in_status_1(verified, run_ranks, tmp_path, monkeypatch):
    finish = gradients.Gradients.finish

    def doubled(self):
        finish(self)
        self.parameters["model.stack.norm.weight"].grad.mul_(2.0)

    monkeypatch.setattr(gradients.Gradients, "finish", doubled)
    ended = verified("s4d_tiny", "tp=2", "--json", tmp_path / "found.json")
    assert ended.status == 1
    assert "gradients differ: 1 of" in ended.out
    assert "FAIL: tp=2" in ended.out
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["passed"] is False
    assert [line["name"] for c in document["certificates"] for line in c["lines"] if not line["gradient_passed"]] == [
        "model.stack.norm.weight"
    ]


def test_not_a_number_fails_and_is_written_as_text(verified, run_ranks, tmp_path, monkeypatch):
    finish = gradients.Gradients.finish

    def poisoned(self):
        finish(self)
        self.parameters["model.stack.norm.weight"].grad.fill_(math.nan)

    monkeypatch.setattr(gradients.Gradients, "finish", poisoned)
    assert verified("s4d_tiny", "tp=2", "--json", tmp_path / "found.json").status == 1
    text = (tmp_path / "found.json").read_text()
    assert '"nan"' in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_all_layouts_are_a_line_each(verified, run_ranks, tmp_path, monkeypatch):
    layouts = [{"tp": 2}, {"dp_shard": 2}, {"pp": 4}]
    monkeypatch.setattr(verify_layouts, "_matrix", lambda kinds: iter(layouts))
    ended = verified("s4d_tiny", "--all", "--json", tmp_path / "found.json")
    assert ended.status == 0, ended.out + ended.err
    lines = ended.out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["pass", "tp=2"], ["pass", "dp_shard=2"]]
    assert lines[2].startswith("pp=4 schedule=1f1b: not possible (parallel.pp: 4 stages need as many layers")
    assert lines[-1].startswith("PASS: 2 of 2 layouts pass, 1 are not possible")
    assert list(json.loads((tmp_path / "found.json").read_text())["refused"]) == ["pp=4 schedule=1f1b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("s4d_tiny", "pt=2"), "'pt=2' is no setting of a layout"),
        (("s4d_tiny", "tp=5"), "parallel.tp: 5 does not divide"),
        (("s4d_tiny", "tp=2", "--dtype", "bf16"), "--dtype bf16: choose one of fp32, fp64"),
        (("s4d_tiny", "tp=2", "model.widht=3"), "widht"),
        (("no_such_recipe", "tp=2"), "no packaged recipe"),
    ],
)
def test_a_users_mistake_is_one_message(verified, arguments, message):
    ended = verified(*arguments)
    assert ended.status == 2
    assert message in ended.err.replace("\n       ", " ")
    assert "Traceback" not in ended.err


def broken(self, *arguments, **more):
    raise ArithmeticError("no more numbers")


def test_a_rank_that_fails_is_the_error(run_ranks, monkeypatch):
    """All ranks end at once, and the one that failed says why."""
    monkeypatch.setattr(pipeline.Pipeline, "run", broken)
    with pytest.raises(ArithmeticError, match="no more numbers"):
        verify(load_recipe("s4d_tiny"), parse_layout(["pp=2"]))


def test_what_breaks_under_one_layout_ends_no_other(verified, run_ranks, tmp_path, monkeypatch):
    """No small copy, ranks that wait for ever, a rank that fails: each is told, and written, beside what passed."""
    monkeypatch.setattr(pipeline.Pipeline, "run", broken)
    fit = verify_module.make_small

    def stuck(recipe, layout, wanted):
        if layout.tp == 4:
            raise RankTimeout("rank 0 of 4 did not return within 120 s\nrank 0 was at:\n  somewhere")
        return fit(recipe, layout, wanted)

    monkeypatch.setattr(verify_module, "make_small", stuck)
    layouts = [{"tp": 2}, {"pp": 4}, {"tp": 4}, {"pp": 2}, {"dp_shard": 2}, {"tp": 5}]
    monkeypatch.setattr(verify_layouts, "_matrix", lambda kinds: iter(layouts))
    path = tmp_path / "found.json"
    ended = verified("gpt_tiny", "model.layers=4", "--layers", "2", "--all", "--json", path)
    assert ended.status == 1, ended.out + ended.err
    lines = [line for line in ended.out.splitlines() if line]
    assert [line.split()[:2] for line in (lines[0], lines[4])] == [["pass", "tp=2"], ["pass", "dp_shard=2"]]
    assert lines[1].startswith("FAIL  pp=4 schedule=1f1b: no copy of width 32 to ")
    assert lines[2] == "FAIL  tp=4: rank 0 of 4 did not return within 120 s"
    assert lines[3] == "FAIL  pp=2 schedule=1f1b: ArithmeticError: no more numbers"
    assert lines[5].startswith("tp=5: not possible")
    assert lines[6].startswith("FAIL: 2 of 5 layouts pass, 3 ended without a certificate, 1 are not possible")
    document = json.loads(path.read_text())
    assert document["passed"] is False
    assert [certificate["layout"] for certificate in document["certificates"]] == ["tp=2", "dp_shard=2"]
    assert list(document["refused"]) == ["tp=5"]
    assert list(document["broken"]) == ["pp=4 schedule=1f1b", "tp=4", "pp=2 schedule=1f1b"]
    assert "rank 0 was at:" in document["broken"]["tp=4"]
    assert "in broken" in document["broken"]["pp=2 schedule=1f1b"], "the rank's own traceback"


def test_nothing_but_what_broke_is_no_pass(verified, run_ranks, monkeypatch):
    monkeypatch.setattr(pipeline.Pipeline, "run", broken)
    monkeypatch.setattr(verify_layouts, "_matrix", lambda kinds: iter([{"dp_shard": 2}, {"pp": 2}]))
    ended = verified("s4d_tiny", "--all")
    assert ended.status == 1
    assert ended.out.splitlines()[-1].startswith("FAIL: 1 of 2 layouts pass")


def test_ranks_that_do_not_end_are_one_message(verified, run_ranks, monkeypatch):
    """Status 1 says that something differs, and nothing was compared."""
    monkeypatch.setattr(pipeline.Pipeline, "run", lambda *arguments, **more: time.sleep(60))
    ended = verified("s4d_tiny", "pp=2", "--timeout", "2")
    ended.assert_mistake("did not return within 2 s", "--timeout", "POTAMOS_TRACEBACK=1")
    assert len(ended.err.splitlines()) == 1


def test_every_recipe_has_a_small_copy():
    for name in available():
        small = make_small(load_recipe(name), parse_layout(["dp_shard=2"]), Reductions())
        assert small.recipe.model.width <= 64, name
        assert copy.deepcopy(small.said) == small.said


@pytest.mark.parametrize("words", ["tp=2", "dp_shard=2"])
def test_states_that_rows_carry_go_with_data_parallelism_alone(words, run_ranks):
    """In contiguous order each row continues in the next step from the state that it came to."""
    changes = ["data.order=contiguous", "model.layers=2", "model.width=24", "model.mixer={kind: s4d, state: 4}"]
    recipe = load_recipe("s4d_tiny", changes)
    layout = parse_layout([words])
    if words == "tp=2":
        with pytest.raises(LayoutError, match=r"parallel: tp 2: data\.order: contiguous .*; set tp, pp and cp to 1"):
            verify(recipe, layout)
    else:
        found = verify(recipe, layout, dtype="fp64")
        assert found.passed, found.failures
