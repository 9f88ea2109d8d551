"""Tile tables against the mask itself, pair by pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potamos.kernels.attention import BlockLayout, Blocks, Mask
from potamos.kernels.attention.tiles import Visits, key_visits, query_visits, tile_matrices

CPU = torch.device("cpu")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Mask, int, int, int, int]:
    """A mask of any kind, lengths, tile sizes."""

    def integer(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def maybe(low: int, high: int) -> int | None:
        return draw(st.none() | st.integers(low, high))

    generator = torch.Generator().manual_seed(integer(0, 10**6))

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    queries, keys = integer(1, 40), integer(1, 40)
    query_offset, key_offset = integer(0, 30), integer(0, 30)
    batch, heads = integer(1, 2), integer(1, 2)
    mask = Mask(
        causal=draw(st.booleans()),
        query_offset=query_offset,
        key_offset=key_offset,
        window=maybe(1, 25),
        prefix=draw(st.none() | st.integers(0, 50) | st.just(random(0, 50, batch))),
        blocks=draw(st.none() | st.builds(Blocks, *(st.integers(a, b) for a, b in ((1, 9), (0, 2), (0, 2), (0, 5))))),
        first=draw(st.sampled_from([0, 0, 3, 12])),
    )
    documents = draw(st.sampled_from(["none", "packed", "any"]))
    if documents != "none":
        row = random(-1, 3, batch, 90)
        if documents == "packed":
            row = row.clamp(min=0).cumsum(1, dtype=torch.int32) // integer(5, 30)
            row[:, integer(1, 90) :] = -1
        ours, theirs = row[:, query_offset : query_offset + queries], row[:, key_offset : key_offset + keys]
        mask = replace(mask, query_documents=ours, key_documents=theirs)
    if draw(st.booleans()):
        row = draw(st.sampled_from([random(0, 40, batch, 90), torch.arange(90, dtype=torch.int32)[None] % 17]))
        ours, theirs = row[:, query_offset : query_offset + queries], row[:, key_offset : key_offset + keys]
        mask = replace(mask, query_positions=ours, key_positions=theirs)
    if draw(st.booleans()):
        size = integer(1, 20)
        seen = torch.rand(heads, -(-80 // size), -(-80 // size), generator=generator) < 0.5
        mask = replace(mask, layout=BlockLayout.from_dense(seen, size))
    return mask, queries, keys, integer(1, 12), integer(1, 12)


def tiled(visible: Tensor, tile_q: int, tile_k: int, fill: bool) -> Tensor:
    """(batch, heads, query tiles, key tiles, tile_q x tile_k); beyond the edges stands `fill`."""
    queries, keys = visible.shape[2:]
    padding = (0, -keys % tile_k, 0, -queries % tile_q)
    whole = torch.nn.functional.pad(visible, padding, value=fill)
    return whole.unflatten(3, (-1, tile_k)).unflatten(2, (-1, tile_q)).transpose(3, 4).flatten(4)


def truth(mask: Mask, queries: int, keys: int, tile_q: int, tile_k: int) -> tuple[Tensor, Tensor]:
    """Which tile pairs have a visible pair, and which have no hidden one and no edge."""
    visible = mask.visible(queries, keys, CPU)
    return tiled(visible, tile_q, tile_k, False).any(-1), tiled(visible, tile_q, tile_k, False).all(-1)


def read(visits: Visits, tiles: int) -> tuple[Tensor, Tensor]:
    """The table as matrices (batch, heads, own tiles, tiles): visited, and visited as full. Checks its form."""
    table = visits.table
    assert table.dtype == torch.int32
    assert table.is_contiguous()
    visited = torch.zeros(*table.shape[:3], tiles, dtype=torch.bool)
    full = visited.clone()
    for place in torch.cartesian_prod(*(torch.arange(n) for n in table.shape[:3])).tolist():
        row = table[tuple(place)].tolist()
        if visits.lists:
            count_full, count, listed = row[0], row[1], row[2:]
            assert 0 <= count_full <= count <= len(listed)
            groups = listed[:count_full], listed[count_full:count]
            assert all(group == sorted(set(group)) for group in groups)
            assert not set(groups[0]) & set(groups[1])
        else:
            low, full_low, full_high, high = row
            assert 0 <= low <= full_low <= full_high <= high <= tiles
            assert full_low < full_high or full_low == high
            groups = range(full_low, full_high), [*range(low, full_low), *range(full_high, high)]
        for tile in groups[0]:
            full[(*place, tile)] = visited[(*place, tile)] = True
        for tile in groups[1]:
            visited[(*place, tile)] = True
    return visited, full


def check(mask: Mask, queries: int, keys: int, tile_q: int, tile_k: int) -> None:
    """No visible pair is missed, no hidden pair is called visible."""
    some, full = truth(mask, queries, keys, tile_q, tile_k)
    for visits, want_some, want_full in (
        (query_visits(mask, queries, keys, tile_q, tile_k, CPU), some, full),
        (key_visits(mask, queries, keys, tile_q, tile_k, CPU), some.transpose(2, 3), full.transpose(2, 3)),
    ):
        visited, called_full = read(visits, want_some.shape[3])
        assert visited.shape[2] == want_some.shape[2]
        assert (visited | ~want_some).all(), "a visible pair would be missed"
        assert (want_full | ~called_full).all(), "a hidden pair would be seen"


@settings(max_examples=300, deadline=None)
@given(problems())
def test_no_visible_pair_is_missed_and_no_hidden_one_seen(problem):
    check(*problem)


DOCUMENTS = torch.tensor([[0] * 20 + [1] * 30 + [-1] * 14, [5] * 64], dtype=torch.int32)
LAYOUT = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4
SHARP = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "later queries": Mask(query_offset=13),
    "later keys": Mask(key_offset=13),
    "window": Mask(window=11),
    "both-sided window": Mask(window=11, causal=False),
    "documents": Mask(query_documents=DOCUMENTS, key_documents=DOCUMENTS),
    "documents, both directions": Mask(causal=False, query_documents=DOCUMENTS, key_documents=DOCUMENTS),
    "prefix": Mask(prefix=21),
    "prefix per row": Mask(prefix=torch.tensor([4, 30])),
    "prefix and window": Mask(prefix=9, window=8),
    "blocks": Mask(blocks=Blocks(8, 1, 1), causal=False),
    "blocks, shifted": Mask(blocks=Blocks(16, 1, shift=8)),
    "global tokens": Mask(window=8, first=8, causal=False),
    "layout": Mask(layout=BlockLayout.from_dense(LAYOUT, 8), causal=False),
    "layout, causal": Mask(layout=BlockLayout.from_dense(LAYOUT, 8)),
}


@pytest.mark.parametrize("lengths", [(64, 64), (61, 64), (64, 50)])
@pytest.mark.parametrize("name", SHARP)
def test_no_work_is_wasted_on_ordinary_masks(name, lengths):
    """Where tiles are as fine as the mask's own blocks, every visited tile is needed and every full one known."""
    mask, (queries, keys) = SHARP[name], lengths
    if mask.query_documents is not None:
        mask = replace(mask, query_documents=DOCUMENTS[:, :queries], key_documents=DOCUMENTS[:, :keys])
    some, full = tile_matrices(mask, queries, keys, 8, 4, CPU)
    want_some, want_full = truth(mask, queries, keys, 8, 4)
    assert torch.equal(some.expand_as(want_some), want_some)
    assert torch.equal(full.expand_as(want_full), want_full)
    visited, called_full = read(query_visits(mask, queries, keys, 8, 4, CPU), some.shape[3])
    assert torch.equal(visited, want_some)
    assert torch.equal(called_full, want_full)
    seen_by, called_full = read(key_visits(mask, queries, keys, 8, 4, CPU), some.shape[2])
    assert torch.equal(seen_by, want_some.transpose(2, 3))
    assert torch.equal(called_full, want_full.transpose(2, 3))


def test_work_grows_with_what_is_visible():
    """A window of 64 over 4096 columns: two tiles of 64 for each, not 64; a layout with one block in 16: one in 16."""
    table = query_visits(Mask(window=64), 4096, 4096, 64, 64, CPU).table
    assert (table[..., 3] - table[..., 0]).tolist() == [[[1] + [2] * 63]]
    layout = BlockLayout.from_dense(torch.eye(16, dtype=torch.bool)[None], 256)
    table = query_visits(Mask(causal=False, layout=layout), 4096, 4096, 128, 128, CPU).table
    assert (table[..., :2] == 2).all()
    assert table.shape == (1, 1, 32, 4)


def test_the_check_refuses_wrong_tables(monkeypatch):
    """Planted: nothing is ever visited; everything is called full."""
    from potamos.kernels.attention import tiles

    right = tiles.tile_matrices
    mask, problem = SHARP["documents"], (64, 64, 8, 4)
    for wrong, message in (
        (lambda *a: (right(*a)[0].roll(1, 3), right(*a)[1].roll(1, 3)), "missed|seen"),
        (lambda *a: (torch.zeros_like(right(*a)[0]),) * 2, "missed"),
        (lambda *a: (torch.ones_like(right(*a)[0]),) * 2, "seen"),
    ):
        monkeypatch.setattr(tiles, "tile_matrices", wrong)
        tiles._recent.clear()
        with pytest.raises(AssertionError, match=message):
            check(mask, *problem)
    tiles._recent.clear()


def test_tables_are_remembered_until_their_tensors_change():
    documents = DOCUMENTS.clone()
    mask = Mask(query_documents=documents, key_documents=documents)
    first = query_visits(mask, 64, 64, 8, 4, CPU).table
    # Every layer describes the mask anew, with views of its own.
    again = query_visits(Mask(query_documents=documents[:, :], key_documents=documents[:, :]), 64, 64, 8, 4, CPU).table
    assert again is first
    assert query_visits(replace(mask, causal=False), 64, 64, 8, 4, CPU).table is not first
    documents[1, :32] = 4
    changed = query_visits(mask, 64, 64, 8, 4, CPU).table
    assert not torch.equal(changed, first)
    check(mask, 64, 64, 8, 4)
    assert query_visits(Mask(), 64, 64, 8, 4, CPU).table is query_visits(Mask(), 64, 64, 8, 4, CPU).table
    with torch.inference_mode():
        ids = DOCUMENTS.clone()
        check(Mask(query_documents=ids, key_documents=ids), 64, 64, 8, 4)
