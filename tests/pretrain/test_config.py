"""Recipes: what is read, what is refused and how it is said, what may change when a run goes on."""

from __future__ import annotations

import math
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from potamos.parallel.facts import Layout
from potamos.pretrain.config import (
    ABSENT,
    RecipeError,
    available,
    differences,
    fingerprint,
    load_recipe,
    parse_recipe,
    resume_check,
    to_yaml,
)
from potamos.pretrain.models import registry
from potamos.pretrain.recipe import AdamW, Constant, Decaying, Muon, Recipe
from potamos.pretrain.recipe_file import Document, read_document, write_text

TEXT = Path(__file__).with_name("small.yaml").read_text(encoding="utf-8")


def parse(*overrides: str, text: str = TEXT) -> Recipe:
    return parse_recipe(text, "r.yaml", overrides)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_components_become_their_own_options() -> None:
    recipe = parse()
    mixer: Any = recipe.model.mixer
    assert (mixer.kind, mixer.state, mixer.head_dim, mixer.rule) == ("h3", 8, 1, "bilinear")
    assert type(mixer) is registry.lookup("mixer", "h3").Options
    assert recipe.objective.kind == "causal"
    assert isinstance(recipe.optimizer, AdamW)
    assert recipe.optimizer.lr == 6e-4
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert isinstance(recipe.schedule, Decaying)
    assert recipe.slurm.time == "12:00:00"
    assert recipe.validation.every == 500
    assert recipe.data.stages[1].start == 640
    assert [s.label for s in recipe.data.stages[1].sources] == ["train", "late"]


def test_an_override_replaces_the_whole_block_of_its_layer_alone() -> None:
    model = parse().model
    assert [model.layer(i).mixer.kind for i in range(3)] == ["h3", "attention", "h3"]
    assert [model.layer(i).positions.kind for i in range(3)] == ["none", "alibi", "none"]
    channels = [model.layer(i).channel for i in range(3)]
    assert [c.kind if c else None for c in channels] == ["mlp", "mlp", None]
    assert parse("model.channel={kind: none}").model.layer(0).channel is None


def test_the_recipe_is_frozen() -> None:
    recipe = parse()
    with pytest.raises(ValidationError):
        recipe.train.steps = 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError):
        recipe.model.mixer.kind = "s4d"  # pyright: ignore[reportAttributeAccessIssue]


def test_layout_has_the_sizes_of_the_section() -> None:
    assert parse().parallel.layout() == Layout()
    layout = parse("parallel={dp_replicate: 2, dp_shard: all, tp: 3, pp: 4, cp: 5, ep: 6, schedule: gpipe}").parallel
    assert layout.layout() == Layout(2, "all", 3, 4, 5, 6, "gpipe", "native")


def test_schedules_and_optimizers_by_kind() -> None:
    constant = parse("schedule={kind: constant, warmup: 3}").schedule
    assert isinstance(constant, Constant)
    assert (constant.warmup, constant.decay, constant.floor) == (3, 0, 1.0)
    muon = parse("optimizer={kind: muon, lr: 0.001, matrix_lr: 0.02, momentum: 0.9}").optimizer
    assert isinstance(muon, Muon)
    assert not isinstance(muon, AdamW)
    assert (muon.matrix_lr, muon.momentum, muon.betas) == (0.02, 0.9, (0.9, 0.95))
    assert parse("optimizer.clip=null").optimizer.clip is None
    assert parse("schedule={kind: wsd, warmup: 10, decay: 90}").schedule.decay == 90


def test_recipe_checks_itself_however_it_is_made() -> None:
    tree = read_document(TEXT, "r.yaml").tree
    assert Recipe.model_validate(tree) == parse()
    tree["model"]["width"] = 25
    with pytest.raises(ValidationError, match="heads 4 does not divide the width 25"):
        Recipe.model_validate(tree)


# --- YAML 1.2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1.5e+2", -150.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("12", 12),
        ("-7", -7),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("12:00:00", "12:00:00"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("1_000", "1_000"),
        ("2026-11-22", "2026-11-22"),
        ("0b11", "0b11"),
        ("e5", "e5"),
        ("1e", "1e"),
        (".", "."),
        ("'6e-4'", "6e-4"),
        ('"true"', "true"),
        ("[1, 2.5]", (1, 2.5)),
        ("{1: a, b: [c]}", {1: "a", "b": ("c",)}),
        ("!!str 12", "12"),
        ("=", "="),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = read_document(f"a: {text}", "x").tree["a"]
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_float() -> None:
    assert math.isnan(read_document("a: .nan", "x").tree["a"])


PHASES = (Phase.generate, Phase.shrink)  # explaining a failure would take minutes
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        ["6e-4", "1E3", "no", "yes", "on", "12:00:00", "0o17", "017", "0x1F", "1_000", "null", "~", "", "="]
    )
    | st.sampled_from(["true", "- a", "a: b", "# c", " a", "a ", "*a", "&a", "!t", "<<", ".inf", "2001-01-01"])
    | st.text("a\x85\u2028\u2029\ufeff\n\t '\"\\", max_size=6)
)
KEYS = st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=200, deadline=None, phases=PHASES)
@given(st.recursive(LEAVES, lambda x: st.lists(x, max_size=4).map(tuple) | st.dictionaries(KEYS, x, max_size=4)))
def test_what_is_written_is_read_back(tree: object) -> None:
    def same(a: object, b: object) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and a == b

    text = write_text({"top": tree})
    assert same(read_document(text, "x").tree, {"top": tree}), text


SOURCES = st.builds(
    lambda path, name: {"path": path, "name": name},
    st.text(string.printable + "é\u2028\x85\ufeff", min_size=1),
    st.none() | st.text(string.printable, min_size=1),
)


@settings(max_examples=40, deadline=None, phases=PHASES)
@given(
    lr=st.floats(min_value=1e-12, max_value=1e12),
    seed=st.integers(0, 2**63 - 1),
    source=SOURCES,
    time=st.none() | st.from_regex(r"\A[0-9]{1,3}(:[0-9]{2}){0,2}\Z"),
    clip=st.none() | st.floats(min_value=1e-300, max_value=1e300),
)
def test_a_resolved_recipe_round_trips(
    lr: float, seed: int, source: dict[str, Any], time: str | None, clip: float | None
) -> None:
    tree: dict[Any, Any] = dict(read_document(TEXT, "r.yaml").tree)
    tree["optimizer"] = {"kind": "muon", "lr": lr, "clip": clip}
    tree["train"] = {**tree["train"], "seed": seed}
    tree["data"] = {**tree["data"], "validation": (source,)}
    tree["slurm"] = {"time": time}
    recipe = Recipe.model_validate(tree)
    text = to_yaml(recipe)
    again = parse_recipe(text)
    assert again == recipe
    assert to_yaml(again) == text
    assert fingerprint(again) == fingerprint(recipe)
    assert differences(recipe, again) == []


def test_the_resolved_recipe_states_every_setting_in_the_order_of_the_tree() -> None:
    text = to_yaml(parse())
    tree = read_document(text, "x").tree
    assert list(tree)[:6] == ["name", "family", "description", "model", "objective", "tokenizer"]
    assert tree["model"]["mixer"] == {
        "kind": "h3",
        "state": 8,
        "shift_state": 64,
        "head_dim": 1,
        "dt_min": 0.001,
        "dt_max": 0.1,
        "rule": "bilinear",
    }
    assert list(tree["model"]["at"]) == [1, 2]
    assert list(tree["model"]["at"][1]) == ["mixer", "positions"]  # nothing that the layer did not override
    assert tree["model"]["at"][2] == {"channel": None}
    assert tree["data"]["stages"][1]["from"] == 640
    assert tree["validate"] == {"every": 500, "sequences": None}


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_reach_every_kind_of_place() -> None:
    recipe = parse(
        "train.steps=7",
        "optimizer.lr=1e-3",
        "model.at.1.mixer.heads=6",
        "model.at.0={mixer: {kind: attention, heads: 2}}",
        "data.stages.0.mixture.0.path=other/train",
        "data.stages.1.mixture.2={path: third}",
        "data.validation=[]",
        "telemetry.samples.prompts=[a, 'b, c']",
        "model.norm.epsilon=1e-6",
        "slurm.time=1-00:00:00",
        "description=x=y",
        "train.steps=9",
        "schedule.decay=50",
    )
    assert recipe.train.steps == 9
    assert recipe.optimizer.lr == 1e-3
    assert [getattr(recipe.model.layer(i).mixer, "heads", None) for i in range(3)] == [2, 6, None]
    assert recipe.data.stages[0].sources[0].path == "other/train"
    assert [s.path for s in recipe.data.stages[1].sources] == ["demo/train", "demo/late", "third"]
    assert recipe.data.validation == ()
    assert recipe.telemetry.samples.prompts == ("a", "b, c")
    assert (recipe.model.norm.kind, recipe.model.norm.epsilon) == ("layernorm", 1e-6)
    assert recipe.slurm.time == "1-00:00:00"
    assert recipe.description == "x=y"
    assert parse("model.init.std=0.5").model.init.std == 0.5  # pyright: ignore[reportAttributeAccessIssue]


def test_an_override_leaves_the_text_alone() -> None:
    document = read_document(TEXT, "r.yaml")
    assert isinstance(document, Document)
    before = repr(document.tree)
    parse("data.stages.0.mixture.0.path=x", "model.width=48")
    assert repr(read_document(TEXT, "r.yaml").tree) == before


# --- finding recipes --------------------------------------------------------------------------------------------------


def test_a_path_is_read_and_a_bare_name_is_packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT, encoding="utf-8")
    assert load_recipe(path) == load_recipe(str(path)) == parse()
    assert load_recipe(path, ["train.steps=3"]).train.steps == 3
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine.yaml") == parse()
    (tmp_path / "gpt_tiny").mkdir()
    assert load_recipe("gpt_tiny").name == "gpt_tiny"
    with pytest.raises(RecipeError, match=r"no packaged recipe 'mine'.*write mine\.yaml for a file"):
        load_recipe("mine")


def test_the_file_is_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT.replace("width", "widht"), encoding="utf-8")
    with pytest.raises(
        RecipeError, match=re.escape(f"{path}:5: model.widht: value 24: unknown key; did you mean `width`?")
    ):
        load_recipe(path)


def test_what_cannot_be_found_or_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no packaged recipe 'gpt_tyni'; did you mean `gpt_tiny`\? \(known: "):
        load_recipe("gpt_tyni")
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot be read: No such file or directory; packaged: \w+, "):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match=r"binary\.yaml: not text in UTF-8 \(byte 6\)"):
        load_recipe(tmp_path / "binary.yaml")


# --- comparing --------------------------------------------------------------------------------------------------------


def test_differences_name_each_leaf() -> None:
    assert differences(parse(), parse()) == []
    changed = parse("optimizer.lr=1e-3", "model.at.1.mixer.heads=2", "data.stages.1.mixture.1.weight=2")
    assert differences(parse(), changed) == [
        ("model.at.1.mixer.heads", 4, 2),
        ("data.stages.1.mixture.1.weight", 3.0, 2.0),
        ("optimizer.lr", 6e-4, 1e-3),
    ]
    other = parse("model.at.1={mixer: {kind: h3, state: 8}}", "data.validation=[]")
    found = {key: (old, new) for key, old, new in differences(parse(), other)}
    assert found["model.at.1.mixer.kind"] == ("attention", "h3")
    assert found["model.at.1.mixer.heads"] == (4, ABSENT)
    assert found["model.at.1.mixer.state"] == (ABSENT, 8)
    assert found["data.validation"] == (ABSENT, ())


LEAF_CHANGES = [
    "name=other",
    "model.width=48",
    "model.at.1.mixer.dropout=0.1",
    "model.residual_dropout=0.1",
    "model.norm.epsilon=1e-6",
    "tokenizer.path=x",
    "data.boundaries=cross",
    "data.stages.1.from=641",
    "optimizer.weight_decay=0.2",
    "schedule.floor=0.2",
    "train.seed=1",
    "slurm.nodes=2",
]


def test_the_fingerprint_is_of_the_resolved_recipe() -> None:
    prints = {fingerprint(parse(change)) for change in LEAF_CHANGES} | {fingerprint(parse())}
    assert len(prints) == len(LEAF_CHANGES) + 1
    assert fingerprint(parse()) == fingerprint(parse("train.seed=0", "parallel.tp=1", "model.stack={kind: plain}"))
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(parse()))


@pytest.mark.parametrize(
    "change",
    [
        "name=other",
        "family=other",
        "description=other",
        "parallel.tp=2",
        "slurm.nodes=9",
        "checkpoint.every=5",
        "validate.every=5",
        "telemetry.every=5",
        "train.steps=200",
        "train.sequences=16",
        "train.micro_sequences=2",
        "data.stages.1.mixture.1.weight=9",
        "data.stages.1.from=650",
        "data.stages.2={from: 900, mixture: [{path: x}]}",
        "data.stages.1.mixture={published: pile, path: x}",
        "data.cache={path: x, bytes: 1000}",
        "data.skip=[[640, 648]]",
        "data.skip=[[700, 800], [900, 901]]",
        "data.stages.0.mixture.0.path=x",
        "data.validation.0.path=x",
        "tokenizer.path=x",
    ],
)
def test_what_may_change_on_resume(change: str) -> None:
    allowed = resume_check(parse(), parse(change), next_sample=640)
    assert allowed == differences(parse(), parse(change))
    assert allowed


@pytest.mark.parametrize(
    "change",
    [
        "model.width=48",
        "model.at.1.mixer.heads=2",
        "model.residual_dropout=0.1",
        "tokenizer.kind=gpt2",
        "data.sequence_length=16",
        "data.boundaries=cross",
        "data.order=contiguous",
        "data.validation=[]",
        "data.stages.0.mixture.0.weight=9",
        "optimizer.lr=1e-3",
        "schedule.decay=99",
        "train.seed=1",
        "train.precision=bf16",
        "train.threads=1",
        "train.device=cpu",
        "data.allow_repeat=true",
        "data.on_bad_shard=skip",
        "data.skip=[[639, 640]]",
        "data.skip=[[639, 900]]",
        "data.stages.0.mixture={published: pile, path: x}",
        "tokenizer.special_tokens=[x]",
        "tokenizer.end_of_document=x",
    ],
)
def test_what_may_not_change_on_resume(change: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resume_check(parse(), parse(change, "train.steps=101"), next_sample=640)
    key = change.split("=")[0]
    assert all(line.startswith(key) and "the run was started with" in line for line in caught.value.problems)
    assert len(caught.value.problems) == len(differences(parse(), parse(change)))
    assert "train.steps" not in str(caught.value)


def test_every_forbidden_change_is_listed_with_both_values() -> None:
    with pytest.raises(RecipeError) as caught:
        resume_check(parse(), parse("optimizer.lr=1e-3", "train.seed=4"), next_sample=1)
    first, second = caught.value.problems
    assert first.startswith("optimizer.lr: value 0.001: the run was started with 0.0006, and at sample 1 this can no")
    assert second.startswith("train.seed: value 4: the run was started with 0")
    assert first.endswith("set it back, or start a new run folder")


def test_a_stage_is_fixed_once_its_first_sample_is_drawn() -> None:
    old, new = parse(), parse("data.stages.1.mixture.1.weight=9")
    assert resume_check(old, new, next_sample=640)
    with pytest.raises(RecipeError, match=r"data\.stages\.1\.mixture\.1\.weight: value 9\.0"):
        resume_check(old, new, next_sample=641)
    first = parse("data.stages.0.mixture.0.weight=9")
    assert resume_check(old, first, next_sample=0)  # nothing drawn yet
    with pytest.raises(RecipeError):
        resume_check(old, first, next_sample=1)


def test_later_stages_may_come_and_go_but_not_into_the_past() -> None:
    one = parse("data.stages=[{from: 0, mixture: [{path: demo/train}]}]")
    assert {key for key, _, _ in resume_check(parse(), one, 640)} >= {"data.stages.1.from"}
    assert resume_check(one, parse(), 640)
    with pytest.raises(RecipeError, match=r"data\.stages\.1\.from: value 640: the run was started with absent"):
        resume_check(one, parse(), 641)
    with pytest.raises(RecipeError, match=r"data\.stages\.1\.from: value absent: the run was started with 640"):
        resume_check(parse(), one, 641)
    with pytest.raises(RecipeError, match=r"data\.stages\.1\.from: value 600: the run was started with 640"):
        resume_check(parse(), parse("data.stages.1.from=600"), 640)
    with pytest.raises(RecipeError, match=r"data\.stages\.1\.from: value 700: the run was started with 640"):
        resume_check(parse(), parse("data.stages.1.from=700"), 641)


def test_packaged_names_are_listed() -> None:
    assert {"h3_hybrid_tiny", "gpt_tiny", "s4d_tiny"} <= set(available())
    assert available() == sorted(available())
