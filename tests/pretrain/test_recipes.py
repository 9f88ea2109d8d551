"""The packaged recipes: each loads, says what it is, builds, and has the size and the numbers it claims."""

from __future__ import annotations

import importlib.resources
import re
from typing import Any

import pytest
import torch

from potamos.pretrain.config import available, differences, load_recipe, parse_recipe, to_yaml
from potamos.pretrain.models.build import build, materialize
from potamos.pretrain.models.interfaces import Seq
from potamos.pretrain.recipe import Recipe

TINY = ("gpt_tiny", "h3_hybrid_tiny", "s4d_tiny")


def text_of(name: str) -> str:
    return (importlib.resources.files("potamos.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def parameters(recipe: Recipe) -> int:
    with torch.device("meta"):
        model = build(recipe.model, sequence_length=recipe.data.sequence_length)
    return sum(p.numel() for p in model.parameters())


def test_the_families_are_there() -> None:
    hybrids = [f"h3_hybrid_{size}" for size in ("tiny", "125m", "355m", "1.3b", "2.7b")]
    assert {*hybrids, "gpt_tiny", "gpt_125m", "s4d_tiny"} <= set(available())


@pytest.mark.parametrize("name", available())
def test_every_recipe_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert name.split("_")[0] == recipe.family.split("_")[0], "recipes are named <family>_<size>"
    assert re.fullmatch(r"[a-z0-9_]+_(tiny|[0-9.]+[mb])", name), "recipes are named <family>_<size>"
    assert 10 < len(recipe.description) < 100
    assert text_of(name).startswith("# ")
    assert parse_recipe(to_yaml(recipe)) == recipe
    assert all(isinstance(getattr(recipe.model.layer(i).mixer, "kind", None), str) for i in range(recipe.model.layers))
    claimed = re.search(r"([\d,]+) parameters", text_of(name))
    if claimed:
        assert parameters(recipe) == int(claimed[1].replace(",", ""))


# Fu et al. 2023 and its released configuration for the Pile: width, layers, heads, attention layers, learning rate,
# rows of a batch, steps, cosine, warm-up, initial deviation (of the largest sqrt(2 / (5 width))), parameters.
H3 = {
    "h3_hybrid_125m": (768, 12, 12, {1, 8}, 6e-4, 256, 800_000, 600_000, 8_000, 0.02, 126_139_392),
    "h3_hybrid_355m": (1024, 24, 16, {1, 13}, 3e-4, 256, 800_000, 600_000, 8_000, 0.02, 361_058_304),
    "h3_hybrid_1.3b": (2048, 24, 16, {1, 13}, 2e-4, 512, 400_000, 300_000, 4_000, 0.02, 1_326_096_384),
    "h3_hybrid_2.7b": (2560, 32, 20, {10, 21}, 1.6e-4, 512, 400_000, 300_000, 4_000, 0.0125, 2_671_134_720),
}  # fmt: skip


@pytest.mark.parametrize("name", H3)
def test_h3_hybrids_have_the_released_numbers(name: str) -> None:
    width, layers, heads, attention, lr, batch, steps, decay, warmup, std, size = H3[name]
    recipe = load_recipe(name)
    model: Any = recipe.model
    assert (model.width, model.layers) == (width, layers)
    mixers: list[Any] = [model.layer(i).mixer for i in range(layers)]
    assert {i for i, mixer in enumerate(mixers) if mixer.kind == "attention"} == attention
    assert {(m.heads, m.dropout) for m in mixers if m.kind == "attention"} == {(heads, 0.1)}
    assert {(m.state, m.shift_state, m.head_dim, m.rule) for m in mixers if m.kind == "h3"} == {(64, 64, 1, "bilinear")}
    assert (model.frontend.vocabulary, model.frontend.tied, model.frontend.embedding_dropout) == (50264, True, 0.1)
    assert (model.channel.ratio, model.channel.activation, model.residual_dropout) == (4.0, "gelu_tanh", 0.0)
    assert (model.positions.kind, model.norm.kind, model.norm.place) == ("none", "layernorm", "pre")
    assert model.init.std == pytest.approx(std, rel=1e-12)
    optimizer = recipe.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.betas) == ("adamw", lr, (0.9, 0.999))
    assert (optimizer.weight_decay, optimizer.clip) == (0.1, 1.0)
    assert recipe.schedule.model_dump() == {"kind": "cosine", "warmup": warmup, "decay": decay, "floor": 0.1}
    train = recipe.train
    assert (train.steps, train.sequences, train.precision, train.seed) == (steps, batch, "bf16", 2222)
    assert (recipe.data.sequence_length, recipe.tokenizer.kind) == (2048, "gpt2")
    assert parameters(recipe) == size
    gpus = (recipe.slurm.nodes or 1) * (recipe.slurm.gpus_per_node or 1)
    assert batch % (gpus * train.micro_sequences) == 0


def test_the_baseline_differs_from_the_hybrid_in_mixers_and_positions_alone() -> None:
    keys = {key for key, _, _ in differences(load_recipe("h3_hybrid_125m"), load_recipe("gpt_125m"))}
    labels = {"name", "family", "description"}
    assert {
        key for key in keys - labels if not key.startswith(("model.mixer.", "model.positions.", "model.at"))
    } == set()
    model: Any = load_recipe("gpt_125m").model
    assert (model.mixer.kind, model.mixer.heads, model.positions.max_length) == ("attention", 12, 2048)
    # GPT-2 small with 2048 positions: 12 layers of 12 d^2 + 13 d, the final norm, vocabulary and positions.
    assert parameters(load_recipe("gpt_125m")) == 12 * (12 * 768**2 + 13 * 768) + 2 * 768 + (50264 + 2048) * 768


# What each has in place of gpt_tiny's rotary positions and full pattern, and how many parameters more.
VARIANTS = {
    "xpos_tiny": ("positions", "xpos", 0),
    "alibi_tiny": ("positions", "alibi", 0),
    "sandwich_tiny": ("positions", "sandwich", 0),
    "nopos_tiny": ("positions", "none", 0),
    "t5_tiny": ("positions", "t5", 3 * 6 * 32),
    "rpe_tiny": ("positions", "rpe", 3 * 6 * 129),
    "local_tiny": ("pattern", "local", 0),
    "bigbird_tiny": ("pattern", "bigbird", 0),
    "butterfly_tiny": ("pattern", "butterfly", 0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_attention_differ_in_one_component(name: str) -> None:
    room, kind, more = VARIANTS[name]
    base, recipe = load_recipe("gpt_tiny"), load_recipe(name)
    changed = {key for key, _, _ in differences(base, recipe)} - {"name", "family", "description"}
    assert {key.rsplit(".", 1)[0] for key in changed} == {f"model.{room}"}
    assert getattr(recipe.model, room).kind == kind
    assert parameters(recipe) - parameters(base) == more


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_attention_learn_from_the_past_alone(name: str) -> None:
    """The recipe's own model at full row length: finite, and no token changes what comes before it."""
    recipe = load_recipe(name)
    model = materialize(recipe.model, seed=1, sequence_length=recipe.data.sequence_length)
    tokens = torch.randint(0, 4096, (1, 256))
    changed = torch.cat([tokens[:, :150], torch.randint(0, 4096, (1, 106))], 1)
    seq = Seq(positions=torch.arange(256)[None])
    with torch.no_grad():
        before, after = (model({"tokens": t}, seq).hidden for t in (tokens, changed))
    assert before.isfinite().all()
    assert torch.equal(before[:, :150], after[:, :150])
    assert not torch.equal(before[:, 150:], after[:, 150:])


def test_tiny_recipes_differ_in_the_model_alone_and_are_of_one_size() -> None:
    recipes = {name: load_recipe(name) for name in TINY}
    for recipe in recipes.values():
        keys = [key for key, _, _ in differences(recipes["h3_hybrid_tiny"], recipe)]
        assert {key.split(".")[0] for key in keys} <= {"name", "family", "description", "model"}
    sizes = [parameters(recipe) for recipe in recipes.values()]
    assert max(sizes) / min(sizes) < 1.02, dict(zip(TINY, sizes, strict=True))
    kinds = {name: [r.model.layer(i).mixer.kind for i in range(r.model.layers)] for name, r in recipes.items()}
    assert set(kinds["gpt_tiny"]) == {"attention"}
    assert set(kinds["s4d_tiny"]) == {"s4d"}
    assert set(kinds["h3_hybrid_tiny"]) == {"h3", "attention"}
