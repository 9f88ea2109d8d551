"""Patterns against their definitions, pair by pair; their reach through layers; broken ones, which must not pass."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.parallel.facts import Axis
from potamos.pretrain.models import registry
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.initialize import Gpt2, initialize
from potamos.pretrain.models.interfaces import AttentionCall, Context, Pattern, Seq
from potamos.pretrain.models.mixers.attention import Attention
from potamos.pretrain.models.patterns.bigbird import BigBird, visible_blocks
from potamos.pretrain.models.patterns.local import Local
from potamos.pretrain.recipe import ModelSection

WIDTH, HEADS, LENGTH = 16, 4, 52
BIGBIRD: Any = BigBird.Options
LOCAL: Any = Local.Options
ATTENTION: Any = Attention.Options


def pattern_of(kind: str, **options: Any) -> Pattern:
    system = registry.lookup("pattern", kind)
    return system(system.Options(kind=kind, **options))


def visible(
    pattern: Pattern, *, causal: bool, keys: int = LENGTH, queries: int | None = None, layer: int = 0, heads: Any = None
) -> Tensor:
    """(1 or heads, queries, keys) bool."""
    call = AttentionCall(
        layer=layer,
        causal=causal,
        heads=heads if heads is not None else range(HEADS),
        queries=queries or keys,
        keys=keys,
        device=torch.device("cpu"),
    )
    return pattern.mask(call).visible(call.queries, keys, call.device)[0]


def pairs(sees: Any, causal: bool) -> Tensor:
    """(L, L) of sees(i, j), and of the past alone where causal."""
    rows = [[bool(sees(i, j)) and (j <= i or not causal) for j in range(LENGTH)] for i in range(LENGTH)]
    return torch.tensor(rows)


# --- the definitions -----------------------------------------------------------------------------------------------

DEFINED = [
    ("full", {}, 0, lambda i, j: True),
    ("blockwise", {"size": 7}, 0, lambda i, j: abs(i // 7 - j // 7) <= 1),
    ("blockwise", {"size": 5, "behind": 2}, 1, lambda i, j: abs(i // 5 - j // 5) <= 2),
    ("blockwise", {"size": 9, "behind": 0}, 0, lambda i, j: i // 9 == j // 9),
    ("local", {"size": 6}, 1, lambda i, j: i // 6 == j // 6),
    ("local", {"size": 6, "shift": True}, 0, lambda i, j: i // 6 == j // 6),
    ("local", {"size": 6, "shift": True}, 3, lambda i, j: (i + 3) // 6 == (j + 3) // 6),
    ("local", {"size": 6, "form": "overlapping", "shift": True}, 1, lambda i, j: abs((i + 3) // 6 - (j + 3) // 6) <= 1),
    ("local", {"size": 6, "form": "sliding"}, 0, lambda i, j: abs(i - j) < 6),
    ("local", {"size": 1, "form": "sliding"}, 0, lambda i, j: i == j),
    ("local", {"size": 6, "form": "sliding", "first": 2}, 0, lambda i, j: abs(i - j) < 6 or i < 2 or j < 2),
    ("local", {"size": 6, "first": 1}, 0, lambda i, j: i // 6 == j // 6 or i < 1 or j < 1),
    ("butterfly", {"size": 4, "first": 0}, 0, lambda i, j: (i // 4 ^ j // 4).bit_count() <= 1),
    ("butterfly", {"size": 4}, 0, lambda i, j: (i // 4 ^ j // 4).bit_count() <= 1 or min(i, j) < 4),
    ("butterfly", {"size": 3, "first": 2, "factors": 2}, 0, lambda i, j: i // 3 ^ j // 3 in (0, 1, 2) or min(i, j) < 6),
    ("bigbird", {"size": 4, "first": 0, "random": 0}, 0, lambda i, j: abs(i // 4 - j // 4) <= 1),
]  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kind", "options", "layer", "sees"), DEFINED)
def test_visible_pairs(kind: str, options: dict[str, Any], layer: int, sees: Any, causal: bool) -> None:
    found = visible(pattern_of(kind, **options), causal=causal, layer=layer)
    assert torch.equal(found, pairs(sees, causal).expand_as(found))


@pytest.mark.parametrize("kind", registry.names("pattern"))
def test_rows_of_a_mask_do_not_depend_on_where_it_is_cut(kind: str) -> None:
    """Queries against a cache: the last rows of the whole, for every number of keys, where causal."""
    options = {"size": 4} if "size" in registry.lookup("pattern", kind).Options.model_fields else {}
    pattern = pattern_of(kind, **options)
    whole = visible(pattern, causal=True)
    for keys, queries in ((1, 1), (9, 1), (17, 1), (33, 33), (40, 5), (LENGTH, 11)):
        part = visible(pattern, causal=True, keys=keys, queries=queries)
        assert torch.equal(part.expand(len(whole), -1, -1), whole[:, keys - queries : keys, :keys])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("full", {}),
        ("blockwise", {"size": 32}),
        ("local", {"size": 32}),
        ("local", {"size": 32, "form": "overlapping"}),
        ("local", {"size": 32, "form": "sliding", "first": 3}),
        ("bigbird", {"size": 8}),
        ("butterfly", {"size": 8}),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_work_is_counted_by_visible_keys(kind: str, options: dict[str, Any], causal: bool) -> None:
    pattern = pattern_of(kind, **options)
    counted = visible(pattern, causal=causal, keys=2048).double().sum(-1).mean().item()
    assert pattern.visible_keys(2048, causal=causal) == pytest.approx(counted, rel=0.1)
    lengths = [pattern.visible_keys(n, causal=causal) for n in range(1, 400)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 1.0


def test_a_sliding_window_cannot_be_shifted() -> None:
    with pytest.raises(ValueError, match="shift moves blocks"):
        Local.check(LOCAL(size=4, form="sliding", shift=True), 16, 64)
    with pytest.raises(ValueError, match="window 2 must be odd"):
        BigBird.check(BIGBIRD(size=4, window=2), 16, 64)


# --- BigBird -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("first", "window", "random"), [(1, 3, 3), (2, 5, 4), (0, 1, 2)])
def test_bigbird_blocks(first: int, window: int, random: int, causal: bool) -> None:
    """Global blocks and the window in full; beside them exactly ``random`` others, or all where fewer are left."""
    options, blocks = BIGBIRD(size=4, first=first, window=window, random=random), 23
    seen = visible_blocks(options, 5, range(HEADS), blocks, causal)
    ends = {*range(first)} if causal else {*range(first), *range(blocks - first, blocks)}
    for head, i in itertools.product(range(HEADS), range(blocks)):
        found = set(seen[head, i].nonzero().flatten().tolist())
        reach = set(range(i + 1)) if causal else set(range(blocks))
        if i in ends:
            assert found == reach
            continue
        fixed = (ends | {j for j in range(blocks) if abs(i - j) <= window // 2}) & reach
        assert fixed <= found <= reach
        assert len(found - fixed) == min(random, len(reach - fixed))


@pytest.mark.parametrize("causal", [True, False])
def test_bigbird_draws_evenly_and_for_each_head_and_layer(causal: bool) -> None:
    """400 heads: each of the blocks beyond window and global ones comes about equally often, and pairs too."""
    options, blocks, row = BIGBIRD(size=4, random=2), 14, 12
    seen = visible_blocks(options, 0, range(400), blocks, causal)[:, row]
    candidates = list(range(1, row - 1))  # the last block is global or later, those beside the row's own are its window
    counts = seen[:, candidates].double().sum(0)
    assert counts.sum() == 800
    expected = 800 / len(candidates)
    assert (counts - expected).abs().max() < 5 * expected**0.5
    together = {tuple(sorted(head.nonzero().flatten().tolist())) for head in seen[:, candidates]}
    assert len(together) > 0.8 * len(candidates) * (len(candidates) - 1) / 2
    one, other, seeded = (
        visible_blocks(o, layer, range(8), blocks, causal)
        for o, layer in ((options, 0), (options, 1), (options.model_copy(update={"seed": 1}), 0))
    )
    assert not torch.equal(one, other)
    assert not torch.equal(one, seeded)


@pytest.mark.parametrize("causal", [True, False])
def test_bigbird_is_the_same_for_any_split_of_the_heads(causal: bool) -> None:
    pattern = pattern_of("bigbird", size=4)
    whole = visible(pattern, causal=causal, layer=2)
    for part in (range(0, 1), range(1, 3), range(3, 4)):
        found = visible(pattern, causal=causal, layer=2, heads=part)
        assert torch.equal(found, whole[part.start : part.stop])


def test_a_shard_of_an_attention_layer_has_its_heads_blocks() -> None:
    """Rank 1 of 2 holds heads 2 and 3; with their weights it gives what these heads give in the whole layer."""

    class Second(Axis):
        rank, size = 1, 2

    whole = layer_of("bigbird", {"size": 4})
    shard = layer_of("bigbird", {"size": 4})
    half = slice(WIDTH // 2, None)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            ours, theirs = getattr(shard, name), getattr(whole, name)
            ours.weight = torch.nn.Parameter(theirs.weight[half])
            ours.bias = torch.nn.Parameter(theirs.bias[half])
        shard.out.weight = torch.nn.Parameter(whole.out.weight[:, half])
        only = whole.out.weight.clone()
        only[:, : WIDTH // 2] = 0
        whole.out.weight.copy_(only)
        shard.get_parameter("out.bias").copy_(whole.get_parameter("out.bias"))
    shard.tp = Second()
    seq = Seq(positions=torch.arange(LENGTH).repeat(2, 1))
    torch.testing.assert_close(shard(hidden(), seq).hidden, whole(hidden(), seq).hidden, rtol=0, atol=1e-12)
    shard.tp = Axis()
    assert (shard(hidden(), seq).hidden - whole(hidden(), seq).hidden).abs().max() > 1e-3


# --- inside a layer and through layers ------------------------------------------------------------------------------


def layer_of(kind: str, options: dict[str, Any], memory: int = 0) -> Attention:
    """One attention layer in fp64; its weights depend on nothing but their names."""
    context = Context(
        width=WIDTH,
        layers=1,
        sequence_length=LENGTH,
        pattern=pattern_of(kind, **options),
    )
    with torch.device("meta"):
        mixer = Attention(ATTENTION(kind="attention", heads=HEADS, memory=memory), context)
    initialize(mixer, Gpt2(Gpt2.Options(std=0.5), layers=1), seed=1)
    return mixer.double()


def hidden() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def by_hand(mixer: Attention, seen: Tensor) -> Tensor:
    q, k, v = (linear(hidden()).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (mixer.q, mixer.k, mixer.v))
    scores = (q @ k.mT / (WIDTH // HEADS) ** 0.5).masked_fill(~seen, -torch.inf)
    return mixer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("kind", "options", "layer", "sees"), [case for case in DEFINED if case[2] == 0])
def test_attention_over_a_pattern(kind: str, options: dict[str, Any], layer: int, sees: Any) -> None:
    del layer
    mixer = layer_of(kind, options)
    found = mixer(hidden(), Seq(positions=torch.arange(LENGTH).repeat(2, 1))).hidden
    torch.testing.assert_close(found, by_hand(mixer, pairs(sees, True)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["blockwise", "local"])
def test_kept_keys_stay_where_they_were_in_their_document(kind: str) -> None:
    """With a memory of 9 keys a segment sees of the past what the pattern and the memory leave."""
    mixer, cut = layer_of(kind, {"size": 8}, memory=9), 29
    past = mixer(hidden()[:, :cut], Seq(positions=torch.arange(cut).repeat(2, 1))).state
    rest = Seq(positions=torch.arange(cut, LENGTH).repeat(2, 1))
    found = mixer(hidden()[:, cut:], rest, mixer.segment_state(past)).hidden
    beside = 1 if kind == "blockwise" else 0
    seen = pairs(lambda i, j: 0 <= i // 8 - j // 8 <= beside and j >= cut - 9, True)
    seen[:cut] = True  # rows that are not compared
    torch.testing.assert_close(found, by_hand(mixer, seen)[:, cut:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("blockwise", {"size": 6}),
        ("local", {"size": 6}),
        ("local", {"size": 6, "shift": True}),
        ("local", {"size": 6, "form": "sliding"}),
        ("local", {"size": 6, "form": "sliding", "first": 1}),
        ("butterfly", {"size": 4, "first": 0}),
        ("bigbird", {"size": 4, "random": 1}),
    ],
)
def test_receptive_field_of_two_layers(kind: str, options: dict[str, Any]) -> None:
    """A token's gradient reaches exactly what two hops of the pattern reach."""
    section = {
        "width": WIDTH,
        "layers": 2,
        "frontend": {"kind": "tokens", "vocabulary": LENGTH},
        "mixer": {"kind": "attention", "heads": HEADS},
        "channel": None,
        "pattern": {"kind": kind, **options},
        "init": {"kind": "gpt2", "std": 0.5},
    }
    model = materialize(ModelSection.model_validate(section), seed=1, sequence_length=LENGTH).double()
    x = hidden()[:1].requires_grad_()
    y = model.stack(x, Seq(positions=torch.arange(LENGTH)[None])).hidden
    hops = [visible(pattern_of(kind, **options), causal=True, layer=layer).any(0).double() for layer in range(2)]
    reached = (hops[1] @ hops[0]) > 0
    for token in (0, 7, 30, LENGTH - 1):
        (gradient,) = torch.autograd.grad(y[0, token, 0], x, retain_graph=True)
        assert torch.equal(gradient[0].abs().amax(-1) > 0, reached[token])
    assert 0 < reached.sum() < LENGTH * (LENGTH + 1) / 2 or kind == "bigbird" or "first" in options


# --- broken patterns -----------------------------------------------------------------------------------------------


class CountsColumns(Local):
    """Cuts blocks by column and says that it cuts them by position."""

    def mask(self, call: AttentionCall) -> Any:
        return replace(super().mask(call), query_positions=None, key_positions=None)


class SaysPositions(BigBird):
    """A layout of columns that claims to be the same packed and alone."""

    counts = "positions"  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]


class DrawsByLength(BigBird):
    """Draws other blocks when the row has grown."""

    def mask(self, call: AttentionCall) -> Any:
        options = self.options.model_copy(update={"seed": call.keys})
        return BigBird(options).mask(call)


class SeesAll(Local):
    def mask(self, call: AttentionCall) -> Any:
        return replace(super().mask(call), causal=False, blocks=None)


class ForgetsDocuments(Local):
    def mask(self, call: AttentionCall) -> Any:
        return replace(super().mask(call), query_documents=None, key_documents=None)


class ForgetsOffset(Local):
    """Takes the queries for the first tokens of the row."""

    def mask(self, call: AttentionCall) -> Any:
        return replace(super().mask(call), query_offset=0)


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (CountsColumns, "packing"),
        (SaysPositions, "packing"),
        (DrawsByLength, "splits"),
        (DrawsByLength, "steps"),
        (SeesAll, "causality"),
        (ForgetsDocuments, "isolation"),
        (ForgetsOffset, "splits"),
        (ForgetsOffset, "steps"),
    ],
)
def test_a_broken_pattern_fails(
    contract: ModuleType, monkeypatch: pytest.MonkeyPatch, broken: type[Pattern], name: str
) -> None:
    registry.names("pattern")
    monkeypatch.setitem(registry._table["pattern"], "broken", broken)
    subject = contract.make(contract.Case("pattern", "broken", {"size": 4}))
    with pytest.raises(AssertionError):
        getattr(contract, f"check_{name}")(subject)
