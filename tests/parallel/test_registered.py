"""Whatever is registered goes with every axis: a new mixer, position scheme or pattern is in this test by its name.

The matrix varies layouts over three systems; here two layouts meet every system: one that cuts tensors and stages and
splits the backward, one that cuts rows.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from potamos.parallel.facts import Layout
from potamos.parallel.mesh import sizes
from potamos.parallel.split_backward import join
from potamos.pretrain.config import load_recipe
from potamos.pretrain.models import registry
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.verify import verify_small
from potamos.pretrain.verify_layouts import parse_layout, world_of
from potamos.pretrain.verify_small import batch

LAYOUTS = ("pp=2 tp=2 schedule=zbv", "cp=2")
ROOMS = ("mixer", "positions", "pattern", "channel")
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"heads": 4, "kv_heads": 2},
    "h3": {"state": 4, "shift_state": 6, "head_dim": 2},
    "s4d": {"state": 4},
    "linear_attention": {"heads": 4},
    "learned": {"max_length": 16},
    "disentangled": {"buckets": 8, "furthest": 40},
    "t5": {"buckets": 8, "furthest": 30},
    "bigbird": {"size": 4},
    "blockwise": {"size": 4},
    "butterfly": {"size": 4},
    "local": {"size": 4},
}
"""Sizes that suit rows of 16 tokens; a name that is missing takes its defaults."""
VARIANTS = [("positions", "disentangled", {"terms": "c2p"}), ("positions", "disentangled", {"share_att_key": False})]
CASES = [(room, name, {}) for room in ROOMS for name in registry.names(room)] + VARIANTS


def recipe_of(room: str, name: str, more: dict[str, Any], layout: Layout) -> Recipe:
    size = sizes(layout, world_of(layout))
    rows, micro = batch(layout, size, 6)
    kind = json.dumps({"kind": name, **OPTIONS.get(name, {}), **more})
    return load_recipe(
        "gpt_tiny",
        [
            "model.width=16",
            f"model.layers={4 if size.pp > 1 else 2}",
            "model.frontend={kind: tokens, vocabulary: 40}",
            "model.channel={kind: mlp, ratio: 2}",
            "model.mixer={kind: attention, heads: 4}",
            "model.positions={kind: none}",
            f"model.{room}={kind}",
            "data.sequence_length=16",
            "optimizer={kind: adamw, lr: 1.0e-3, clip: 0.5}",
            "schedule={kind: constant}",
            f"train={{steps: 3, sequences: {rows}, micro_sequences: {micro}, seed: 5, device: cpu}}",
        ],
    )


@pytest.mark.parametrize(("room", "name", "more"), CASES)
@pytest.mark.parametrize("words", LAYOUTS)
def test_it_goes_with_the_layout(room, name, more, words):
    layout = parse_layout(words.split())
    found = verify_small(recipe_of(room, name, more, layout), layout, dtype="fp64", timeout=60)
    assert found.passed, "\n".join(found.failures)
    assert found.ranks == world_of(layout)


def group(params: str, intermediates: str) -> dict[str, set[str]]:
    return {"params": set(params), "intermediates": set(intermediates)}


def test_groups_that_share_an_operation_are_joined_where_the_first_was():
    groups = [group("a", "A"), group("b", "B"), group("c", "C"), group("bd", "BD"), group("ad", "AD")]
    assert join(groups) == [group("abd", "ABD"), group("c", "C")]
    assert join(groups[:3]) == groups[:3]
    assert join([]) == []
