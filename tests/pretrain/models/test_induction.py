"""Learning separates right layers from wrong ones: H3 finds induction heads, a plain state-space model does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "induction.py"


@pytest.fixture(scope="module")
def induction(load_module: Callable[[str, Path], ModuleType]) -> ModuleType:
    """benchmarks/induction.py, which is no part of the package."""
    return load_module("induction", BENCHMARK)


def test_answers_follow_the_special_token(induction: ModuleType) -> None:
    tokens, answers = induction.sequences(300, seed=1)
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        places = [i for i, token in enumerate(row) if token == induction.SPECIAL]
        assert len(places) == 2
        assert places[1] == len(row) - 1 > places[0] + 1
        assert row[places[0] + 1] == answer
    assert len(answers.unique()) == induction.SPECIAL
    test, _ = induction.sequences(300, seed=2)
    assert not (tokens[:, None] == test[None]).all(-1).any()


def test_accuracy_counts_right_answers(induction: ModuleType) -> None:
    model = induction.build("h3")
    tokens, answers = induction.sequences(400, seed=4)
    said = model.frontend.logits(model({"tokens": tokens}, induction.places(400)).hidden[:, -1]).argmax(-1)
    assert induction.accuracy(model, tokens, said) == 1.0
    assert induction.accuracy(model, tokens, (said + 1) % induction.VOCABULARY) == 0.0
    half = torch.cat([said[:100], (said[100:] + 1) % induction.VOCABULARY])
    assert induction.accuracy(model, tokens, half) == 0.25
    assert induction.accuracy(model, tokens, answers) < 0.15  # it has learned nothing yet


@pytest.mark.slow
def test_h3_finds_induction_heads_and_s4d_does_not(induction: ModuleType) -> None:
    """At least 99 % and less than 15 % within the same twelve epochs; chance is 5 %."""
    torch.manual_seed(0)
    h3 = 0.0
    for epoch, (_, share) in enumerate(induction.learn("h3", induction.Budget())):
        h3 = share
        if h3 >= 0.99:
            print(f"H3: {100 * h3:.1f} % after {epoch + 1} epochs")
            break
    assert h3 >= 0.99
    shares = [share for _, share in induction.learn("s4d", induction.Budget())]
    assert len(shares) == induction.Budget().epochs
    assert max(shares) < 0.15
