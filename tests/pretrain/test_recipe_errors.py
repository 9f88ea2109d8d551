"""What is refused in a recipe: each mistake is named with file, line, key, value, the nearest name and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potamos.pretrain.config import RecipeError, parse_recipe
from potamos.pretrain.models import interfaces, registry
from potamos.pretrain.models.interfaces import Positions
from potamos.pretrain.recipe import Recipe

TEXT = Path(__file__).with_name("small.yaml").read_text(encoding="utf-8")


def parse(*overrides: str, text: str = TEXT) -> Recipe:
    return parse_recipe(text, "r.yaml", overrides)


def problems(*overrides: str, text: str = TEXT) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(*overrides, text=text)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def only(*overrides: str, text: str = TEXT) -> str:
    found = problems(*overrides, text=text)
    assert len(found) == 1, found
    return found[0]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1: a recipe is a mapping of sections"),
        ("- a", "r.yaml:1: a recipe is a mapping of sections"),
        ("a: 1\nb: 2\na: 3", "r.yaml:3: a: given twice, first on line 1; remove one of them"),
        ("a:\n  x: 1\n  x: 2", "r.yaml:3: a.x: given twice, first on line 2; remove one of them"),
        ("a: {1: x, 01: y}", "r.yaml:1: a.1: given twice, first on line 1; remove one of them"),
        ("a: &b 1\nc: *b", "r.yaml:2: *b: recipes have no aliases; write the block out"),
        ("\na: [1", "r.yaml:2: not valid YAML: "),
        ("a: b: c", "r.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2", "r.yaml:2: not valid YAML: "),
        ("a: \x00", "r.yaml:1: not valid YAML: unacceptable character"),
        ("a: 1\n---\nb: 2", "r.yaml:2: not valid YAML: "),
        ("true: 1", "r.yaml:1: recipe: a key is a name or a whole number; put it in quotes"),
        ("a:\n  ? [b]\n  : 1", "r.yaml:2: a: a key is a name or a whole number; put it in quotes"),
        ("a: !!python/name:os.system x", "r.yaml:1: a: tag 'tag:yaml.org,2002:python/name:os.system' is not read"),
        ("a: !!python/object/apply:os.system [x]", "r.yaml:1: a: tag "),
        ("a: !!set {b}", "r.yaml:1: a: tag 'tag:yaml.org,2002:set' is not read"),
        ("a: !!int b", "r.yaml:1: a: "),
        ("a: " + "9" * 5000, "r.yaml:1: a: "),
        ("a: " + "[" * 3000 + "]" * 3000, "r.yaml:1: more than 40 blocks inside one another"),
    ],
)
def test_what_is_no_recipe_file_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert caught.value.problems[0].startswith(message)


# --- what is refused, and how it is said ------------------------------------------------------------------------------


def edited(old: str, new: str) -> str:
    assert TEXT.count(old) == 1
    return TEXT.replace(old, new)


# An edit of small.yaml, and below it what is said: line, key, value, what is wrong.
MISTAKES = r"""
# An unknown key: the nearest valid name of that very block.
state: 8 => stat: 8
! 8: model.mixer.stat: value 8: unknown key; did you mean `state`? (known here: kind,
heads: 4 => heads: 4, kv_head: 2
! 12: model.at.1.mixer.kv_head: value 2: unknown key; did you mean `kv_heads`?
  channel: null =>   chanel: null
! 15: model.at.2.chanel: value null: unknown key; did you mean `channel`?
optimizer: => optimiser:
! 27: optimiser: value {"kind": "adamw", "lr": 0.0006, "betas": [0.9, 0.95]}: unknown key; did you mean `optimizer`?
vocabulary: 64 => vocabulary: 64, tyed: true
! 7: model.frontend.tyed: value true: unknown key; did you mean `tied`?
weight: 3.0 => wieght: 3.0
! 25: data.stages.1.mixture.1.wieght: value 3.0: unknown key; did you mean `weight`?
steps: 100 => steps: 100, seeds: 3
! 29: train.seeds: value 3: unknown key; did you mean `seed`?
{time: 12:00:00} => {node: 3}
! 30: slurm.node: value 3: unknown key; did you mean `nodes`?
# An unknown kind or choice: the nearest registered name.
kind: h3 => kind: h33
! 8: model.mixer.kind: value "h33": unknown mixer; did you mean `h3`?
kind: alibi => kind: alibbi
! 13: model.at.1.positions.kind: value "alibbi": unknown positions; did you mean `alibi`?
kind: adamw => kind: adam
! 27: optimizer.kind: value "adam": unknown optimizer; did you mean `adamw`?
kind: cosine => kind: cosin
! 28: schedule.kind: value "cosin": unknown schedule; did you mean `cosine`?
kind: json => kind: jsn
! 16: tokenizer.kind: value "jsn": expected one of json, gpt2, sentencepiece; did you mean `json`?
{kind: h3, state => {state
! 8: model.mixer: value {"state": 8}: `kind` is missing; name one of attention,
{kind: mlp, ratio: 2} => mlp
! 9: model.channel: value "mlp": expected a block with `kind`; write {kind: mlp}
kind: h3 => kind: 3
! 8: model.mixer.kind: value 3: expected text
# A wrong type: the value and what was expected.
width: 24 => width: '24'
! 5: model.width: value "24": expected a whole number
width: 24 => width: 24.5
! 5: model.width: value 24.5: expected a whole number
width: 24 => width: true
! 5: model.width: value true: expected a whole number
lr: 6e-4 => lr: 6e-4x
! 27: optimizer.lr: value "6e-4x": expected a number
lr: 6e-4 => lr: .inf
! 27: optimizer.lr: value Infinity: expected a finite number
betas: [0.9, 0.95] => betas: 0.9
! 27: optimizer.betas: value 0.9: expected a list
time: 12:00:00 => time: 120
! 30: slurm.time: value 120: expected text; put it in quotes
{kind: attention, heads: 4} => {kind: attention, heads: 4, bias: no}
! 12: model.at.1.mixer.bias: value "no": expected true or false
[{path: demo/validation}] => [demo/v]
! 26: data.validation.0: value "demo/v": expected a block of keys
[{path: demo/validation}] => [{path: 3}]
! 26: data.validation.0.path: value 3: expected text; put it in quotes
name: small => name: a/b
! 1: name: value "a/b": does not match ^[A-Za-z0-9]
# A value out of range.
width: 24 => width: 0
! 5: model.width: value 0: must be above 0
betas: [0.9, 0.95] => betas: [0.9, 1.0]
! 27: optimizer.betas.1: value 1.0: a decay rate lies in [0, 1)
betas: [0.9, 0.95] => betas: [-0.1, 0.9]
! 27: optimizer.betas.0: value -0.1: a decay rate lies in [0, 1)
state: 8 => state: 7
! 8: model.mixer.state: value 7: must be a multiple of 2
steps: 100 => steps: 100, seed: -1
! 29: train.seed: value -1: must be at least 0
# Combinations.
heads: 4 => heads: 5
! 12: model.at.1.mixer.heads: value 5: heads 5 does not divide the width 24
heads: 4 => heads: 4, kv_heads: 3
! 12: model.at.1.mixer.kv_heads: value 3: kv_heads 3 does not divide heads 4; choose a
state: 8 => head_dim: 5
! 8: model.mixer.head_dim: value 5: head_dim 5 does not divide the width 24
    2: =>     3:
! 14: model.at.3: value 3: there is no such layer: 3 layers are numbered 0 to 2
    2: =>     -1:
! 14: model.at.-1: value -1: there is no such layer: 3 layers are numbered 0 to 2
    2: =>     last:
! 14: model.at.last: value "last": layers are named by their number, 0-based
kind: alibi => kind: learned, max_length: 9
! 13: model.at.1.positions.max_length: value 9: max_length 9 is below
micro_sequences: 4 => micro_sequences: 3
! 29: train.sequences: value 8: not a multiple of train.micro_sequences 3
warmup: 10 => warmup: 101
! 28: schedule.decay: value 100: less than the warm-up of 101 steps
kind: cosine, warmup: 10 => kind: wsd, warmup: 1
! 28: schedule.decay: value 100: with warm-up 1 more than train.steps
from: 0 => from: 1
! 20: data.stages.0.from: value 1: the first stage starts at sample 0; set from: 0
from: 640 => from: 0
! 22: data.stages.1.from: value 0: stages start one after another; the one before
weight: 3.0 => weight: 0
! 23: data.stages.1.mixture: value [1.0, 0.0]: weight 0.0 of source late is not a positive
weight: 3.0 => weight: -1
! 23: data.stages.1.mixture: value [1.0, -1.0]: weight -1.0 of source late
weight: 3.0 => weight: .nan
! 25: data.stages.1.mixture.1.weight: value NaN: expected a finite number
weight: 3.0 => weight: 1e-6
! 23: data.stages.1.mixture: value [1.0, 1e-06]: weight 1e-06 of source late
path: demo/late => path: other/train
! 25: data.stages.1.mixture.1: value "other/train": a second source called 'train'; give
[{path: demo/train}] => [{path: demo/train, paht: x}]
! 21: data.stages.0.mixture.0.paht: value "x": unknown key; did you mean `path`? (known here: path, name, weight)
[{path: demo/train}] => {published: pyle, path: data/pile}
! 21: data.stages.0.mixture.published: value "pyle": expected one of pile; did you mean `pile`?
[{path: demo/train}] => {published: pile, path: x, folder: data/pile}
! 21: data.stages.0.mixture.folder: value "data/pile": unknown key (known here: published, path)
[{path: demo/train}] => {published: pile}
! 21: data.stages.0.mixture.path: missing; add it
[{path: demo/train}] => pile
! 21: data.stages.0.mixture: value "pile": expected a list
[{path: demo/train}] => {published: pile, path: 's3://bucket/pile'}
! 21: data.stages.0.mixture.path: value "s3://bucket/pile": no local folder, so its subsets
{path: demo/late, weight => {path: 's3://bucket/late', weight
! 25: data.stages.1.mixture.1.path: value "s3://bucket/late": is behind a URL, and order shuffled
[{path: demo/validation}] => [{path: a}, {path: 's3://b/v'}]
! 26: data.validation.1.path: value "s3://b/v": held-out data are read whole at every validation; copy
kind: json, path: demo/tokenizer.json => kind: json, path: a, special_tokens: [a, b, a]
! 16: tokenizer.special_tokens.2: value "a": named twice
kind: json, path: demo/tokenizer.json => kind: json, path: a, special_tokens: a
! 16: tokenizer.special_tokens: value "a": expected a list
kind: json, path: demo/tokenizer.json => kind: json, path: a, end_of_document: 0
! 16: tokenizer.end_of_document: value 0: expected text; put it in quotes
  stages: =>   order: windo\n  stages:
! 19: data.order: value "windo": expected one of shuffled, contiguous, window; did you mean `window`?
  stages: =>   window: 4\n  stages:
! 19: data.window: value 4: would do nothing in data.order: shuffled; take it out, or set
  stages: =>   window: 0\n  order: window\n  stages:
! 19: data.window: value 0: must be above 0
  stages: =>   skip: [[0, 4], [8, 8]]\n  stages:
! 19: data.skip.1: value [8, 8]: a range is [first, end) with 0 <= first < end
  stages: =>   skip: [[-1, 4]]\n  stages:
! 19: data.skip.0: value [-1, 4]: a range is [first, end) with 0 <= first < end
  stages: =>   skip: [3]\n  stages:
! 19: data.skip.0: value 3: expected a list
  stages: =>   skip: [[3, 8, 9]]\n  stages:
! 19: data.skip.0:
  stages: =>   skip: [[3, 8.5]]\n  stages:
! 19: data.skip.0.1: value 8.5: expected a whole number
  stages: =>   on_bad_shard: ignore\n  stages:
! 19: data.on_bad_shard: value "ignore": expected one of error, skip
  stages: =>   cache: {path: c, bytes: 2e11}\n  stages:
! 19: data.cache.bytes: value 200000000000.0: expected a whole number
  stages: =>   cache: {path: c}\n  stages:
! 19: data.cache.bytes: missing; add it
  stages: =>   cache: c\n  stages:
! 19: data.cache: value "c": expected a block of keys
kind: adamw => kind: adamw, momentum: 0.9
! 27: optimizer.momentum: value 0.9: unknown key (known here: kind, lr,
decay: 100 => decay: 100, warmupp: 3
! 28: schedule.warmupp: value 3: unknown key; did you mean `warmup`?
slurm: => parallel: {dp_shard: all}\nslurm:
! 30: parallel.dp_shard: value "all": dp_replicate is all as well
slurm: => parallel: {dp_shard: some}\nslurm:
! 30: parallel.dp_shard: value "some": expected a whole number above 0, or "all"
slurm: => parallel: {dp_shard: true}\nslurm:
! 30: parallel.dp_shard: value true: expected a whole number
slurm: => checkpoint: {every: 10, keep_every: 25}\nslurm:
! 30: checkpoint.keep_every: value 25: not a multiple of checkpoint.every 10
slurm: => telemetry: {samples: {every: 5}}\nslurm:
! 30: telemetry.samples.prompts: value []: there is nothing to continue; add a prompt
"""
ROWS = [row for row in MISTAKES.splitlines() if row and not row.startswith("# ")]


@pytest.mark.parametrize(("edit", "message"), list(zip(ROWS[::2], ROWS[1::2], strict=True)), ids=ROWS[::2])
def test_each_mistake_names_file_line_key_value_and_remedy(edit: str, message: str) -> None:
    old, new = edit.split(" => ")
    found = problems(text=edited(old, new.replace("\\n", "\n")))
    assert any(problem.startswith(f"r.yaml:{message.removeprefix('! ')}") for problem in found), "\n".join(found)
    assert len(found) == (2 if old == "optimizer:" else 1), "\n".join(found)  # a misspelt section is also missing


def test_a_missing_key_says_what_belongs_there() -> None:
    text = edited("  mixer: {kind: h3, state: 8}\n", "")
    assert only(text=text).startswith(
        "r.yaml:4: model.mixer: missing; add it, as in {kind: attention} (kinds: attention, "
    )
    text = edited("tokenizer: {kind: json, path: demo/tokenizer.json}\n", "")
    assert (
        only(text=text)
        == "r.yaml:1: tokenizer: missing; add it with its keys kind, path, special_tokens, end_of_document"
    )
    assert only(text=edited("vocabulary: 64", "tied: true")) == "r.yaml:7: model.frontend.vocabulary: missing; add it"


def test_data_behind_a_url_need_a_place_to_be_kept() -> None:
    far = ("data.order=window", "data.stages.1.mixture.0.path=s3://bucket/train")
    assert only(*far).startswith(
        'command line: data.stages.1.mixture.0.path: value "s3://bucket/train": is behind a URL; say where its shards '
        "may be kept: data.cache"
    )
    assert parse(*far, "data.cache={path: c, bytes: 9}").data.cache is not None


def test_every_problem_is_listed_in_the_order_of_the_file() -> None:
    text = edited("state: 8", "stat: 8").replace("sequences: 8", "sequences: 7").replace("steps: 100", "steps: x")
    text = text.replace("warmup: 10", "warmup: 200").replace("demo/validation}", "demo/validation, nam: 3}")
    found = problems("model.layers=2.5", text=text)
    keys = [line.split(": ")[1] for line in found]
    assert keys == ["model.mixer.stat", "data.validation.0.nam", "schedule.decay", "train.steps", "model.layers"]
    assert [line.split(": ")[0] for line in found] == [f"r.yaml:{n}" for n in (8, 26, 28, 29)] + ["command line"]


def test_component_checks_do_not_wait_for_other_sections() -> None:
    found = problems("model.at.1.mixer.heads=5", "data.validatoin=[]", "train.steps=0")
    assert [line.split(": ")[1] for line in found] == ["model.at.1.mixer.heads", "data.validatoin", "train.steps"]


def test_a_position_scheme_that_cannot_serve_the_heads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Even(Positions):
        class Options(interfaces.Options):
            kind: str = "even"

        def attention(self, context: Any, *, head_dim: int, **rest: Any) -> interfaces.AttentionPositions:
            if head_dim % 2:
                raise ValueError(f"heads of {head_dim} channels are odd; choose another number of heads")
            return interfaces.AttentionPositions()

    registry.names("positions")
    monkeypatch.setitem(registry._table["positions"], "even", Even)
    message = only("model.at.1.mixer.heads=8", "model.at.1.positions.kind=even")
    assert message.startswith("r.yaml:11: model.at.1: value {")
    assert message.endswith("layer 1 cannot be built: heads of 3 channels are odd; choose another number of heads")
    assert parse("model.at.1.mixer.heads=4", "model.at.1.positions.kind=even").model.layer(1).positions.kind == "even"


def test_rotary_positions_need_pairs_of_channels() -> None:
    message = only("model.at.1.mixer.heads=8", "model.at.1.positions.kind=rope")
    assert "layer 1 cannot be built: rotary: 1.0 of head_dim=3" in message
    assert parse("model.at.1.positions.kind=rope").model.layer(1).positions.kind == "rope"


def test_braces_in_a_value_are_only_braces() -> None:
    assert '"{x}"' in only("model.mixer.kind='{x}'")
    assert '"{lr}"' in only("optimizer.lr='{lr}'")


def test_a_long_value_is_cut() -> None:
    line = only(f"train.device={'x' * 500}")
    assert len(line) < 200
    assert "..." in line


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.steps", "command line: 'train.steps' is no override; write key=value, as in train.steps=1000"),
        ("=3", "command line: '=3' is no override; write key=value"),
        ("train..steps=3", "command line: 'train..steps=3' is no override; write key=value"),
        ("train.stepz=3", "command line: train.stepz: value 3: unknown key; did you mean `steps`?"),
        ("trian.steps=3", 'command line: trian: value {"steps": 3}: unknown key; did you mean `train`?'),
        ("train.steps=many", 'command line: train.steps: value "many": expected a whole number'),
        ("train.steps=", "command line: train.steps: value null: expected a whole number"),
        ("train.steps=[1", "command line: train.steps: not valid YAML: "),
        ("train={steps: 1, steps: 2}", "command line: train.steps: given twice"),
        ("train.steps.x=3", "command line: train.steps.x: train.steps is 100, which has no keys"),
        ("data.stages.x.from=3", "command line: data.stages.x: no such entry of a list (entries: 0 to 1; 0-based)"),
        ("data.stages.5.from=3", "command line: data.stages.5: no such entry of a list (entries: 0 to 1; 0-based)"),
        ("data.stages.-1.from=3", "command line: data.stages.-1: no such entry of a list (entries: 0 to 1; 0-based)"),
        ("model.mixer.kind=attention", "r.yaml:8: model.mixer.state: value 8: unknown key; to change the kind replace"),
        ("model.mixer.stat=64", "command line: model.mixer.stat: value 64: unknown key; did you mean `state`?"),
        ("model.at.7.mixer={kind: h3}", "command line: model.at.7: value 7: there is no such layer"),
        ("train.sequences=6", "command line: train.sequences: value 6: not a multiple of train.micro_sequences 4"),
    ],
)
def test_a_mistaken_override_is_named_as_such(assignment: str, message: str) -> None:
    assert any(line.startswith(message) for line in problems(assignment))


def test_all_mistaken_overrides_are_listed() -> None:
    assert len(problems("a", "train.steps.x=3", "=")) == 3


@pytest.mark.parametrize(
    ("change", "place", "why"),
    [
        ("model.at.2.positions={kind: rope}", "model.at.2.positions.kind", "which this layer does not have"),
        ("model.at.1.positions={kind: learned, max_length: 64}", "model.at.1.positions.kind", "set model.positions"),
        ("model.positions={kind: rope}", "model.positions.kind", "which no layer has"),
    ],
)
def test_positions_that_would_do_nothing_are_refused(change: str, place: str, why: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(change)
    assert len(caught.value.problems) == 1
    assert place in str(caught.value)
    assert why in str(caught.value)


def test_positions_that_some_layer_asks_for_are_taken() -> None:
    assert parse("model.positions={kind: rope}", "model.at.1={mixer: {kind: attention, heads: 4}}")
    assert parse("model.positions={kind: learned, max_length: 64}")
