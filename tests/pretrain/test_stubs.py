"""Five systems that strain the interfaces, registered here alone, go through the real recipe, trunk and trainer.

An extra stream that every layer updates (Luna), an input that grows at a layer (late masking), state carried across
segments (Transformer-XL), a second trunk with a loss of its own (replaced-token detection), an implicit backward (deep
equilibrium). They are as small as the strain allows; what is proven is that trunk and trainer need not know them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from potamos.data.prepare import prepare
from potamos.data.sources import TextList
from potamos.data.tokenizer import train_bpe
from potamos.parallel.facts import parameter_table
from potamos.parallel.gradients import Gradients
from potamos.parallel.launch import Rank
from potamos.pretrain import setup
from potamos.pretrain.config import RecipeError, load_recipe
from potamos.pretrain.models import registry
from potamos.pretrain.models.interfaces import Seq, State
from potamos.pretrain.optim import GradientNorm, Optimizer
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.trainer import Trainer


def _load() -> Any:
    """tests/ is no package (--import-mode=importlib), so the systems are loaded by their path."""
    spec = importlib.util.spec_from_file_location("stub_systems", Path(__file__).with_name("stub_systems.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stub_systems"] = module  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    return module


systems = _load()
WORDS = ["the", "river", "runs", "to", "sea", "and", "old", "mills", "turn", "while", "rain", "falls", "on", "hills"]


# --- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stubs are registered while these tests run, and gone afterwards."""
    registry.names("mixer")
    registry.names("objective")
    monkeypatch.setattr(registry, "_table", {room: dict(entries) for room, entries in registry._table.items()})
    for (room, name), system in systems.REGISTERED.items():
        registry.register(room, name)(system)


class Texts(TextList):
    """A corpus in memory: short sentences of few words, so that a handful of steps is enough to learn something."""

    shard_chunks = 4

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        super().__init__([" ".join(draw.choice(WORDS, draw.integers(4, 60))) + "." for _ in range(80)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_bpe(Texts().texts, 300, folder / "tokenizer.json")
    prepare(Texts(), "train", tokenizer, folder / "train", chunk_tokens=512)
    return folder


Load = Callable[..., Recipe]


@pytest.fixture
def load(corpus: Path, tmp_path: Path) -> Load:
    """load(name, *overrides): the recipe of a stub, written to a file and read as any other."""

    def read(name: str, *overrides: str) -> Recipe:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            systems.RECIPE.format(name=name, corpus=corpus, **{**systems.DEFAULTS, **systems.SYSTEMS[name]})
        )
        return load_recipe(path, overrides)

    return read


def run(recipe: Recipe, folder: Path) -> tuple[list[float], Trainer]:
    """Train to the end in ``folder``; the loss of every step of this attempt."""
    trainer, losses = Trainer(recipe, folder, Rank()), []
    observe = trainer.observe

    def watch(result: Any, data_wait: float) -> None:
        losses.append(result.loss.item())
        observe(result, data_wait)

    trainer.observe = watch  # pyright: ignore[reportAttributeAccessIssue]
    assert trainer.fit() == 0
    return losses, trainer


# --- every stub ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_trains_and_resumes_to_the_bit(name: str, load: Load, tmp_path: Path) -> None:
    """Eight steps; then four, a new process's worth of objects, and four more: the same losses and weights."""
    losses, trainer = run(load(name), tmp_path / "whole")
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.02, losses
    first, _ = run(load(name, "train.steps=4"), tmp_path / "halves")
    second, resumed = run(load(name), tmp_path / "halves")
    assert first + second == losses
    assert trainer.parameters.keys() == resumed.parameters.keys()
    for key, parameter in trainer.parameters.items():
        assert torch.equal(parameter, resumed.parameters[key]), key
    for key, tensor in trainer.optimizer.state_tensors().items():
        assert torch.equal(tensor, resumed.optimizer.state_tensors()[key]), key


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_every_parameter_learns(name: str, load: Load) -> None:
    """No parameter is without a gradient: streams have one creator, and nothing is made that nobody reads."""
    system = setup.build_system(load(name), torch.device("cpu"))
    rows = setup.open_stream(load(name), setup.open_tokenizer(load(name))).read(0, 4)
    batch = system.objective.prepare(rows, seed=0, step=0, carried="order" in systems.SYSTEMS[name])
    terms = system(batch).terms
    torch.stack([term.weight * term.sum / batch.counts[term.count] for term in terms.values()]).sum().backward()
    silent = [n for n, p in system.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent


def test_mistakes_in_a_stub_are_told_like_any_other(load: Load) -> None:
    with pytest.raises(RecipeError, match="did you mean `slots`"):
        load("luna", "model.stack={kind: luna, slotz: 3}")
    with pytest.raises(RecipeError, match="did you mean `equilibrium`"):
        load("equilibrium", "model.stack={kind: equilibriun}")


# --- late masking ----------------------------------------------------------------------------------------------------


def test_mask_added_at_the_first_layer_is_the_usual_mask(load: Load) -> None:
    """Late masking before layer 0 is masked language modeling, the mask's vector being the mask token's embedding."""
    late = setup.build_system(load("late", "model.stack.at=0"), torch.device("cpu")).double()
    usual = setup.build_system(
        load("late", "model.stack={kind: plain}", "objective.late=false"), torch.device("cpu")
    ).double()
    state = late.state_dict()
    mask = state.pop("model.stack.mask.weight")
    usual.load_state_dict(state)
    with torch.no_grad():
        usual.model.frontend.get_parameter("tokens.weight")[systems.MASK] = mask[0]
        late.model.frontend.get_parameter("tokens.weight")[systems.MASK] = mask[0]
    rows = setup.open_stream(load("late"), setup.open_tokenizer(load("late"))).read(0, 6)
    batches = [s.objective.prepare(rows, seed=1, step=2) for s in (late, usual)]
    assert batches[0].inputs["tokens"].shape == (6, 8)
    assert batches[1].inputs["tokens"].shape == (6, 16)
    a, b = (s(batch).terms["masked"].sum for s, batch in zip((late, usual), batches, strict=True))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    later = setup.build_system(load("late"), torch.device("cpu")).double()
    later.load_state_dict(late.state_dict())
    assert (later(batches[0]).terms["masked"].sum - a).abs() > 1e-6


# --- state across segments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xl", "memory"])
def test_carried_state_is_that_of_a_plain_loop(name: str, load: Load, tmp_path: Path) -> None:
    """The trainer's losses, to the bit, from a loop that keeps each slot's state by itself."""
    recipe = load(name)
    losses, trainer = run(recipe, tmp_path / "run")
    assert all(not leaf.requires_grad for leaf in pytree.tree_leaves(trainer.carried))

    system = setup.build_system(recipe, torch.device("cpu"))
    stream = setup.open_stream(recipe, setup.open_tokenizer(recipe))
    parameters = dict(system.named_parameters())
    table = parameter_table(system)
    optimizer, norm = Optimizer(parameters, table, recipe.optimizer), GradientNorm(Gradients(parameters), table)
    states: list[State] = [None, None]
    for step, loss in enumerate(losses):
        batches = [
            system.objective.prepare(stream.read(8 * step + 4 * half, 4), seed=3, step=step, carried=True)
            for half in (0, 1)
        ]
        count = sum(batch.counts["tokens"] for batch in batches)
        total = 0.0
        for half, batch in enumerate(batches):
            out = system.model(batch.inputs, batch.seq, states[half])
            nll = system.model.frontend.nll(out.hidden, batch.targets["tokens"]) / count
            nll.backward()
            total += nll.detach()
            kept = system.model.stack.segment_state(out.state)
            states[half] = pytree.tree_map_only(Tensor, Tensor.detach, kept)
        assert float(total) == loss, f"step {step}"
        norm.clip(norm.measure()[0], recipe.optimizer.clip)
        optimizer.step(1.0, torch.zeros(()))
        optimizer.zero_grad()
    for mine, kept in zip(pytree.tree_leaves(trainer.carried), pytree.tree_leaves(states), strict=True):
        assert torch.equal(mine, kept)


@pytest.mark.parametrize("name", ["xl", "memory"])
def test_a_long_memory_is_one_long_row(name: str, load: Load) -> None:
    """With memory for everything, segments read one after another score what one row of all of them scores."""
    recipe = load(name, f"model.mixer.memory={8 * systems.LENGTH}")
    system = setup.build_system(recipe, torch.device("cpu")).double().eval()
    stream = setup.open_stream(recipe, setup.open_tokenizer(recipe))
    rows = [stream.read(8 * segment, 4) for segment in range(4)]
    batches = [system.objective.prepare(r, seed=0, step=0, carried=True) for r in rows]
    state, parts = None, []
    for batch in batches:
        out = system.model(batch.inputs, batch.seq, state)
        state = system.model.stack.segment_state(out.state)
        parts.append(out.hidden)
    ids = [batch.seq.document_ids for batch in batches]
    whole = Seq(torch.cat([b.seq.positions for b in batches], 1), torch.cat([i for i in ids if i is not None], 1))
    expected = system.model({"tokens": torch.cat([b.inputs["tokens"] for b in batches], 1)}, whole).hidden
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-10)
    alone = torch.cat([system.model(batch.inputs, batch.seq).hidden for batch in batches], 1)
    assert (alone - expected).abs().max() > 1e-3


def test_carried_state_may_be_dealt_to_other_micro_batches(load: Load, tmp_path: Path) -> None:
    """Stored by slot: on resume with other micro-batches the same numbers go on, up to the order of sums."""
    losses, _ = run(load("memory"), tmp_path / "whole")
    run(load("memory", "train.steps=4"), tmp_path / "halves")
    second, _ = run(load("memory", "train.micro_sequences=2"), tmp_path / "halves")
    assert second == pytest.approx(losses[4:], rel=1e-5)
    forgetful = load("memory", "model.mixer.memory=0", "model.at={}")
    assert run(forgetful, tmp_path / "forgetful")[0][4:] != pytest.approx(losses[4:], rel=1e-3)


# --- two trunks ------------------------------------------------------------------------------------------------------


def test_two_terms_are_divided_by_their_own_counts(load: Load, tmp_path: Path) -> None:
    """loss = 5 sum(found) / words + sum(nll) / masked, over the global batch and not over micro-batches."""
    recipe = load("replaced")
    trainer = Trainer(recipe, tmp_path / "run", Rank())
    rows = trainer.stream.read(0, 8)
    found = trainer.train_step(rows)
    fresh = setup.build_system(recipe, torch.device("cpu"))
    batch = fresh.objective.prepare(rows, seed=3, step=0)
    assert batch.counts == {"masked": 8 * 4, "words": 8 * 16}
    terms = fresh(batch).terms
    words, masked = terms["replaced"].sum / 128, terms["generator"].sum / 32
    torch.testing.assert_close(found.loss, (5 * words + masked).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.terms["replaced"], words.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.terms["generator"], masked.detach(), rtol=1e-5, atol=0)
    assert any(name.startswith("objective.generator.stack.blocks.0") for name in trainer.parameters)
    # Two trunks of one shape under two names start differently.
    own = trainer.model.get_parameter("frontend.tokens.weight")
    assert not torch.equal(own, trainer.objective.get_parameter("generator.frontend.tokens.weight"))
    trainer.telemetry.close("finished")


# --- an implicit backward --------------------------------------------------------------------------------------------


def test_implicit_gradient_is_the_unrolled_one(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:

    def make(*overrides: str) -> Any:
        exact = ("model.stack.tolerance=1e-14", "model.stack.iterations=200", "model.init={kind: gpt2, std: 0.1}")
        return setup.build_system(load("equilibrium", *exact, *overrides), torch.device("cpu")).double()

    implicit, unrolled = make(), make("model.stack.unrolled=true")
    rows = setup.open_stream(load("equilibrium"), setup.open_tokenizer(load("equilibrium"))).read(0, 4)
    results = []
    for system in (implicit, unrolled):
        loss = system(system.objective.prepare(rows, seed=0, step=0)).terms["causal"].sum
        loss.backward()
        results.append({"loss": loss.detach()} | {n: p.grad for n, p in system.named_parameters()})
    for name, want in results[1].items():
        scale = max(1.0, want.abs().max().item())
        assert (results[0][name] - want).abs().max() <= 1e-9 * scale, name
    # Without the solve in the backward, the gradient is that of one application: visibly another one.
    monkeypatch.setattr(Tensor, "register_hook", lambda *_: None)
    shallow = make()
    shallow(shallow.objective.prepare(rows, seed=0, step=0)).terms["causal"].sum.backward()
    want = results[1]["model.stack.blocks.0.channel.up.weight"]
    assert (shallow.model.stack.get_parameter("blocks.0.channel.up.weight").grad - want).norm() > 0.01 * want.norm()
