"""The rows with which a layout is verified: as uneven as a loader could hand them out."""

from __future__ import annotations

import numpy as np
import pytest

from potamos.parallel.context import held_slices
from potamos.pretrain.verify_rows import STEPS, RowSource


def targets(source: RowSource, step: int) -> np.ndarray:
    """(rows, columns) bool: where the next token belongs to the same document."""
    ids = source.rows(step).document_ids
    return (ids[:, 1:] == ids[:, :-1]) & (ids[:, :-1] >= 0)


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_rows_are_as_uneven_as_can_be(isolate, contiguous):
    source = RowSource(count=12, length=32, vocabulary=50, isolate=isolate, contiguous=contiguous)
    first, second, third = (targets(source, step) for step in range(STEPS))
    assert not first[:6].any()
    assert first[6:].any()
    assert not third[0].any()
    assert len(set(third.sum(1).tolist())) > 3
    assert second.any()
    assert not second[:, 16:].any()
    if isolate:
        assert not second[:, :8].any()
    for order in ("contiguous", "zigzag"):  # some rank of a split sequence has nothing to predict in the second step
        slices = 2 if order == "contiguous" else 4
        per_slice = second.reshape(12, slices, -1).sum((0, 2))
        held = [per_slice[held_slices(order, rank, 2)].sum() for rank in (0, 1)]
        assert max(held) > 0
        if isolate:
            assert min(held) == 0


def test_documents_cross_every_border():
    ids = RowSource(count=12, length=32, vocabulary=50).rows(2).document_ids
    for border in range(4, 32, 4):
        assert (ids[:, border] == ids[:, border - 1]).any()
        assert (ids[:, border] != ids[:, border - 1]).any()
    assert len(np.unique(ids[ids >= 0])) > 12


def test_rows_are_a_function_of_the_step():
    source = RowSource(count=6, length=16, vocabulary=50)
    again = RowSource(count=6, length=16, vocabulary=50)
    for step in range(STEPS):
        for name in ("tokens", "document_ids", "positions", "samples"):
            assert np.array_equal(getattr(source.rows(step), name), getattr(again.rows(step), name))
    assert not np.array_equal(source.rows(0).tokens, source.rows(1).tokens)
    assert np.concatenate([source.rows(step).samples for step in range(STEPS)]).tolist() == list(range(18))


def test_positions_restart_with_each_document():
    rows = RowSource(count=12, length=32, vocabulary=50).rows(2)
    for ids, positions in zip(rows.document_ids, rows.positions, strict=True):
        starts = np.flatnonzero(positions == 0)
        assert starts[0] == 0
        assert np.array_equal(np.delete(np.diff(positions), starts[1:] - 1), np.ones(32 - len(starts[1:])))
        inside = ids >= 0
        assert len(np.unique(ids[inside])) >= len(starts[starts < inside.sum()])


def test_in_contiguous_order_rows_go_on():
    source = RowSource(count=4, length=16, vocabulary=50, contiguous=True)
    for step in range(STEPS - 1):
        before, after = source.rows(step), source.rows(step + 1)
        assert np.array_equal(before.tokens[:, -1], after.tokens[:, 0])
        assert np.array_equal(before.positions[:, -1], after.positions[:, 0])
