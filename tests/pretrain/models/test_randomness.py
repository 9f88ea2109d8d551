"""Every place that drops something draws its own mask."""

from __future__ import annotations

import torch

from potamos.kernels.dropout import DropoutKey, keep_mask
from potamos.pretrain.config import load_recipe
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.interfaces import Seq


def test_no_two_places_share_a_key(monkeypatch) -> None:
    recipe = load_recipe(
        "h3_hybrid_tiny",
        ["model.width=16", "model.layers=3", "model.residual_dropout=0.1", "model.frontend.embedding_dropout=0.1",
         "model.mixer={kind: attention, heads: 2, dropout: 0.1}", "model.at={}"],
    )  # fmt: skip
    model = materialize(recipe.model, seed=0).train()
    asked, plain = [], Seq.key

    def key(self, purpose, layer):
        asked.append(plain(self, purpose, layer).philox_key())
        return plain(self, purpose, layer)

    monkeypatch.setattr(Seq, "key", key)
    positions = torch.arange(5).expand(2, 5)
    for step in range(2):
        model({"tokens": torch.zeros(2, 5, dtype=torch.int64)}, Seq(positions, samples=torch.arange(2), step=step))
    places = 1 + 3 * (1 + 2)  # the embedding; in each layer the scores and two updates of the residual stream
    assert len(asked) == len(set(asked)) == 2 * places


def test_samples_beyond_32_bits_draw_anew() -> None:
    def mask(sample: int) -> torch.Tensor:
        return keep_mask((1, 8, 64), 0.5, key=DropoutKey(0, "test", 0, 0, torch.tensor([sample])))

    assert torch.equal(mask(7), mask(7))
    assert not torch.equal(mask(7), mask(7 + 2**32))
    assert not torch.equal(mask(7 + 2**32), mask(7 + 2**33))
