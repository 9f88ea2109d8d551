"""Generation: recurrence equals the full forward, sampling is what it says, text is whole characters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from potamos.data.tokenizer import Tokenizer, train_bpe
from potamos.pretrain.generate import Continuation, GenerationError, Sampling, generate, generate_ids, uniform
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.interfaces import Seq
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.recipe import ModelSection

VOCABULARY, END = 23, 0

ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "h3": {"mixer": {"kind": "h3", "state": 4, "shift_state": 5}},
    "h3_heads": {"mixer": {"kind": "h3", "state": 4, "shift_state": 3, "head_dim": 2}},
    "s4d": {"mixer": {"kind": "s4d", "state": 4}},
    "attention_none": {"mixer": ATTENTION},
    "attention_rope": {"mixer": ATTENTION, "positions": {"kind": "rope"}},
    "attention_alibi": {"mixer": ATTENTION, "positions": {"kind": "alibi"}},
    "attention_learned": {"mixer": ATTENTION, "positions": {"kind": "learned", "max_length": 90}},
    "attention_sinusoidal": {"mixer": ATTENTION, "positions": {"kind": "sinusoidal"}},
    "hybrid": {
        "mixer": {"kind": "h3", "state": 4, "shift_state": 5},
        "at": {1: {"mixer": ATTENTION, "positions": {"kind": "rope"}}},
    },
}


def make_model(name: str, *, std: float = 0.4) -> Model:
    """A small fp64 model whose scores differ enough between tokens for every mistake to show."""
    section = ModelSection.model_validate(
        {
            "width": 16,
            "layers": 3,
            "frontend": {"kind": "tokens", "vocabulary": VOCABULARY, "tied": False},
            "channel": {"kind": "mlp"},
            "init": {"kind": "gpt2", "std": std},
            **MODELS[name],
        }
    )
    return materialize(section, seed=7, sequence_length=64).double()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return make_model(request.param)


def make_ids(rows: int, length: int, *, documents: bool) -> Tensor:
    """Random ids; with documents, ends at different columns of each row, one of them inside the recurrent part."""
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))
    if documents:
        for row in range(rows):
            ids[row, [3 + 2 * row, length // 2 - row, length - 5 + row]] = END
    return ids


def whole_scores(model: Model, ids: Tensor, *, isolate: bool = True) -> Tensor:
    """Scores at every column by one forward pass, documents and positions counted by hand."""
    documents, positions = torch.zeros_like(ids, dtype=torch.int32), torch.zeros_like(ids)
    for row, tokens in enumerate(ids.tolist()):
        document = position = 0
        for column, token in enumerate(tokens):
            documents[row, column], positions[row, column] = document, position
            document, position = (document + 1, 0) if token == END and isolate else (document, position + 1)
    with torch.no_grad():
        return model.frontend.logits(model({"tokens": ids}, Seq(positions, documents)).hidden)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("prefix", [1, 21])
def test_prefill_then_step_equals_forward(model: Model, documents: bool, prefix: int) -> None:
    ids = make_ids(3, 40, documents=documents)
    expected = whole_scores(model, ids)
    rows = Continuation(model, END)
    found = [rows.prefill(ids[:, :prefix])] + [rows.step(ids[:, column]) for column in range(prefix, 40)]
    torch.testing.assert_close(torch.stack(found, 1), expected[:, prefix - 1 :], rtol=0, atol=1e-10)
    assert expected[:, prefix - 1 :].std(dim=1).mean() > 0.1  # scores that change from column to column


def test_documents_matter(model: Model) -> None:
    """The comparison above would miss a boundary that no path honors; here it must change the scores."""
    ids = make_ids(3, 40, documents=True)
    assert (whole_scores(model, ids) - whole_scores(model, ids, isolate=False)).abs().max() > 1e-3


def test_crossing_continues_one_document(model: Model) -> None:
    ids = make_ids(2, 24, documents=True)
    rows = Continuation(model, END, isolate=False)
    rows.prefill(ids[:, :9])
    found = torch.stack([rows.step(ids[:, column]) for column in range(9, 24)], 1)
    torch.testing.assert_close(found, whole_scores(model, ids, isolate=False)[:, 9:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("stop_at_end", [False, True])
def test_greedy_recurrence_equals_greedy_forward(model: Model, stop_at_end: bool) -> None:
    prompts = make_ids(3, 12, documents=True)
    with torch.no_grad():
        model.frontend.get_parameter("head.weight")[END] *= 2.0  # so that documents end now and then
    found = list(
        generate_ids(model, prompts, tokens=40, end_of_document=END, sampling=Sampling(0.0), stop_at_end=stop_at_end)
    )
    ids = prompts
    finished = torch.zeros(3, dtype=torch.bool)
    for chosen in found:
        scores = whole_scores(model, ids)[:, -1]
        scores[ids[:, -1] == END, END] = -math.inf
        expected = scores.argmax(-1).where(~finished, END)
        assert torch.equal(chosen, expected)
        ids = torch.cat([ids, chosen[:, None]], 1)
        if stop_at_end:
            finished |= chosen == END
    assert finished.all() if len(found) < 40 else not finished.all()
    assert (ids[:, 12:] == END).any()


def state_sizes(model: Model, mixer: str) -> list[int]:
    """Numbers held in the states of every layer with this mixer, while eight tokens are generated."""
    rows = Continuation(model, END)
    rows.prefill(torch.ones(1, 5, dtype=torch.int64))
    sizes = []
    for token in range(1, 9):
        rows.step(torch.tensor([token]))
        layers = [n for n, block in model.stack.blocks.items() if type(block.mixer).__name__.lower() == mixer]
        assert layers
        sizes.append(sum(leaf.numel() for n in layers for leaf in pytree.tree_leaves(rows.state[n])))
    return sizes


def test_state_is_constant_for_state_spaces_and_grows_by_one_token_for_attention() -> None:
    hybrid, s4d = make_model("hybrid"), make_model("s4d")
    assert len(set(state_sizes(hybrid, "h3"))) == 1
    assert len(set(state_sizes(s4d, "s4d"))) == 1
    sizes = state_sizes(hybrid, "attention")
    one_token = 2 * (2 * 4) + 1  # keys and values of two key heads of four channels, and the document
    assert [b - a for a, b in itertools.pairwise(sizes)] == [one_token] * 7


def test_model_is_left_in_training_mode() -> None:
    model = make_model("hybrid")
    model.stack.blocks["0"].eval()
    modes = {name: part.training for name, part in model.named_modules()}
    pieces = generate_ids(model, torch.ones(1, 2, dtype=torch.int64), tokens=4, end_of_document=END)
    next(pieces)
    assert torch.is_grad_enabled()  # also between two tokens, while the generator is suspended
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert len(list(pieces)) <= 3


# --- sampling ----------------------------------------------------------------------------------------------------


def reference_distribution(scores: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """One row of probabilities by the definitions, token by token."""
    values = [s / temperature for s in scores.tolist()]
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top_k]
    weights = {i: math.exp(values[i] - max(values)) for i in order}
    total = sum(weights.values())
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if top_p is not None and mass >= top_p:
            break
    kept_total = sum(weights[i] for i in kept)
    return [weights[i] / kept_total if i in kept else 0.0 for i in range(len(values))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.5, None, None),
        (2.0, 4, None),
        (1.0, None, 0.6),
        (0.7, 5, 0.8),
        (1.0, 1, None),
        (1.0, 99, 1.0),
    ],
)
def test_sampled_frequencies(temperature: float, top_k: int | None, top_p: float | None) -> None:
    scores = torch.tensor([0.3, 2.0, -1.0, 1.4, 0.3, 1.9, -4.0, 0.0])
    expected = torch.tensor(reference_distribution(scores, temperature, top_k, top_p))
    draws = 40_000
    chosen = Sampling(temperature, top_k, top_p, seed=5).choose(scores.expand(draws, -1), column=3)
    frequency = torch.bincount(chosen, minlength=8) / draws
    assert (frequency[expected == 0] == 0).all()
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((frequency - expected).abs() <= 4 * spread + 1e-6).all()


def test_temperature_zero_and_ties_take_the_lower_id() -> None:
    scores = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert Sampling(0.0).choose(scores, 0).item() == 1
    assert {Sampling(1.0, top_k=1, seed=s).choose(scores, 0).item() for s in range(20)} == {1}
    assert Sampling(1e-30).choose(torch.tensor([[0.0, 9.0, 1.0]]), 0).item() == 1


def test_excluded_ids_are_never_drawn() -> None:
    scores = torch.full((5000, 6), -math.inf)
    scores[:, [2, 4]] = 0.0
    assert set(Sampling(1.0).choose(scores, 1).tolist()) == {2, 4}


def test_a_draw_takes_the_token_whose_share_it_falls_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares are half-open, [0, 1/4) first: a draw on a bound belongs to the token that begins there."""
    from potamos.pretrain import generate as module

    for draw, token in ((0.0, 0), (0.249, 0), (0.25, 1), (0.75, 3), (1.0 - 2.0**-53, 3)):
        monkeypatch.setattr(module, "uniform", lambda *_, draw=draw: torch.tensor([draw], dtype=torch.float64))
        assert Sampling(1.0).choose(torch.zeros(1, 4), 0).item() == token


def test_draws_are_a_function_of_seed_column_and_row() -> None:
    draws = uniform(1, 20_000, 0)
    assert ((draws >= 0) & (draws < 1)).all()
    assert draws.unique().numel() == 20_000
    assert abs(draws.mean().item() - 0.5) < 0.01
    assert torch.equal(draws[:7], uniform(1, 7, 0))
    for other in (uniform(2, 20_000, 0), uniform(1, 20_000, 1)):
        assert abs(torch.corrcoef(torch.stack([draws, other]))[0, 1].item()) < 0.03
    assert (draws * 2**53).remainder(1).eq(0).all()
    assert (draws * 2**53).remainder(2).mean().item() == pytest.approx(0.5, abs=0.02)  # the last bit is random too


def test_rows_and_runs_reproduce() -> None:
    model = make_model("hybrid")
    prompts = make_ids(3, 5, documents=False)

    def run(prompts: Tensor, seed: int) -> Tensor:
        sampling = Sampling(1.0, seed=seed)
        return torch.stack(
            list(generate_ids(model, prompts, tokens=12, end_of_document=END, sampling=sampling, stop_at_end=False)), 1
        )

    first = run(prompts, 1)
    assert torch.equal(first, run(prompts, 1))
    assert not torch.equal(first, run(prompts, 2))
    assert torch.equal(first[:1], run(prompts[:1], 1))  # other rows change nothing
    prefix = torch.cat([prompts, first[:, :4]], 1)
    assert torch.equal(first[:, 4:], run(prefix, 1)[:, :8])  # continuing what was written goes on the same


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(GenerationError, match=word):
        Sampling(**settings)


def test_damaged_weights_are_named() -> None:
    model = make_model("s4d")
    with torch.no_grad():
        model.get_parameter("stack.blocks.0.mixer.out.weight").fill_(math.nan)
    with pytest.raises(GenerationError, match="not finite"):
        next(generate_ids(model, torch.ones(1, 2, dtype=torch.int64), tokens=1, end_of_document=END))


# --- text --------------------------------------------------------------------------------------------------------

TEXTS = ["the river runs to the sea \u00e9\u00e8 and the sea takes the river"] * 4


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_bpe(TEXTS, 280, tmp_path / "tokenizer.json")


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> list[list[int]]:
    """Let `Sampling.choose` follow a script; returns, as they come, the ids that were open to it."""
    open_ids: list[list[int]] = []
    script: Iterator[int] = iter(tokens)

    def choose(self: Sampling, scores: Tensor, column: int) -> Tensor:
        open_ids.append(torch.nonzero(scores[0] > -math.inf)[:, 0].tolist())
        return torch.tensor([next(script)])

    monkeypatch.setattr(Sampling, "choose", choose)
    return open_ids


def text_model(vocabulary: int) -> Model:
    section = ModelSection.model_validate(
        {
            "width": 8,
            "layers": 1,
            "frontend": {"kind": "tokens", "vocabulary": vocabulary},
            "mixer": {"kind": "attention", "heads": 2},
            "channel": {"kind": "mlp"},
        }
    )
    return materialize(section, seed=1)


def test_pieces_are_whole_characters(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokenizer.encode("\u00e9a\U0001f30ab").tolist()
    assert len(ids) > 4  # characters in several tokens
    scripted(monkeypatch, ids)
    pieces = list(generate(text_model(288), tokenizer, "the", tokens=len(ids)))
    assert "".join(pieces) == "\u00e9a\U0001f30ab"
    assert "\ufffd" not in "".join(pieces)
    assert "" not in pieces


def test_half_a_character_at_the_end_is_told(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = tokenizer.encode("\U0001f30a").tolist()
    assert rest
    scripted(monkeypatch, [first])
    assert list(generate(text_model(288), tokenizer, "the", tokens=1)) == ["\ufffd"]


def test_end_of_document_stops_or_parts(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    end = tokenizer.end_of_document
    river, sea = tokenizer.encode(" river").tolist(), tokenizer.encode("sea").tolist()
    script = [*river, end, *sea]
    scripted(monkeypatch, script)
    assert "".join(generate(text_model(288), tokenizer, "the", tokens=len(script))) == " river"
    scripted(monkeypatch, script)
    text = "".join(generate(text_model(288), tokenizer, "the", tokens=len(script), stop_at_end=False))
    assert text == " river\n\nsea"


def test_only_ids_of_text_are_open(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    end = tokenizer.end_of_document
    open_ids = scripted(monkeypatch, [100, 101, end])
    list(generate(text_model(tokenizer.vocabulary + 9), tokenizer, "", tokens=3))
    text_ids = set(range(tokenizer.vocabulary)) - tokenizer.special_ids
    assert set(open_ids[0]) == text_ids  # a document does not begin with its end
    assert set(open_ids[1]) == set(open_ids[2]) == text_ids | {end}


def test_empty_prompt_begins_a_document(tokenizer: Tokenizer) -> None:
    rows = Continuation(text_model(288), tokenizer.end_of_document)
    rows.prefill(torch.tensor([[tokenizer.end_of_document]]))
    assert (rows.documents.tolist(), rows.positions.tolist()) == ([1], [0])
    crossing = Continuation(text_model(288), tokenizer.end_of_document, isolate=False)
    crossing.prefill(torch.tensor([[tokenizer.end_of_document]]))
    assert (crossing.documents.tolist(), crossing.positions.tolist()) == ([0], [1])


def test_mistakes_are_told_before_the_first_piece(tokenizer: Tokenizer) -> None:
    with pytest.raises(GenerationError, match="tokens 0"):
        generate(text_model(288), tokenizer, "the", tokens=0)
    with pytest.raises(GenerationError, match="temperature"):
        generate(text_model(288), tokenizer, "the", tokens=3, temperature=-2.0)
    with pytest.raises(GenerationError, match="empty prompt"):
        generate_ids(text_model(288), torch.empty(1, 0, dtype=torch.int64), tokens=1, end_of_document=0)
