"""The data section of a recipe: what it means, what is shown of it, and which of its ranges may still change."""

from __future__ import annotations

from pathlib import Path

import pytest

from potamos.pretrain.config import RecipeError, parse_recipe, resume_check, to_yaml
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.recipe_file import read_document

TEXT = Path(__file__).with_name("small.yaml").read_text(encoding="utf-8")


def parse(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, "r.yaml", overrides)


def test_skipped_ranges_may_be_added_ahead_but_not_behind() -> None:
    old = parse("data.skip=[[8, 16], [800, 900]]")
    for later in ("[[8, 16]]", "[[8, 16], [640, 641], [800, 850]]", "[[8, 16], [700, 900]]"):
        assert [key for key, _, _ in resume_check(old, parse(f"data.skip={later}"), 640)] == ["data.skip"]
    for behind in ("[]", "[[800, 900]]", "[[8, 17], [800, 900]]", "[[0, 4], [8, 16]]", "[[8, 16], [639, 700]]"):
        with pytest.raises(RecipeError, match=r"data\.skip: value \[.*at sample 640 .*; add only ranges from 640 on"):
            resume_check(old, parse(f"data.skip={behind}"), 640)
    assert resume_check(old, parse("data.skip=[]"), 8)  # none of them reached


def test_the_data_section_says_what_it_means() -> None:
    plain = parse().data
    assert (plain.order, plain.window, plain.skip) == ("shuffled", None, ())
    assert (plain.on_bad_shard, plain.cache) == ("error", None)
    assert parse("data.order=window").data.window == 16
    assert parse("data.order=window", "data.window=3").data.window == 3
    recipe = parse(
        "tokenizer={kind: sentencepiece, path: a.model, special_tokens: [<x>, <y>], end_of_document: </s>}",
        "data.order=window",
        "data.skip=[[3, 9], [9, 12]]",
        "data.on_bad_shard=skip",
        "data.cache={path: /scratch/cache, bytes: 200000000000}",
        "data.stages.1.mixture={published: pile, path: data/pile}",
        "data.stages.0.mixture.0.path=s3://bucket/early",
    )
    assert recipe.tokenizer.special_tokens == ("<x>", "<y>")
    assert recipe.data.skip == ((3, 9), (9, 12))
    assert recipe.data.cache is not None
    assert recipe.data.cache.bytes == 200_000_000_000
    assert [getattr(stage.mixture, "published", None) for stage in recipe.data.stages] == [None, "pile"]
    assert recipe.data.stages[0].sources[0].label == "early"
    text = to_yaml(recipe)
    assert parse_recipe(text) == recipe
    shown = read_document(text, "x").tree["data"]
    assert (shown["window"], shown["skip"]) == (16, ((3, 9), (9, 12)))
    assert shown["stages"][1]["mixture"] == {"published": "pile", "path": "data/pile"}
