"""A mixer that tensor parallelism cannot split runs whole on every rank, on the whole row, with the same gradients."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from potamos.parallel import axes
from potamos.parallel.facts import Traits
from potamos.pretrain.config import load_recipe
from potamos.pretrain.models import interfaces, registry
from potamos.pretrain.models.interfaces import Context, Mixer, Out, Seq, State
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.verify import verify_small
from potamos.pretrain.verify_layouts import parse_layout

pytestmark = pytest.mark.distributed


class Mean(Mixer):
    """The mean of all values before, of one document. What its linear layers say of columns and rows, and its tag,
    counts for nothing in a region that is not split."""

    traits = Traits(shard="none")
    tags: ClassVar[dict[str, int]] = {"gain": 0}

    class Options(interfaces.Options):
        kind: str = "mean"

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__()
        del options
        self.value = Linear(context.width, context.width, role="column")
        self.gain = nn.Parameter(torch.empty(context.width))
        self.out = Linear(context.width, context.width, role="row", into_residual=True)

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator, std: float, layers: int) -> None:
        del name, std, layers
        parameter.normal_(1.0, 0.1, generator=generator)

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        assert x.shape[1] == seq.positions.shape[1], "it is given whole rows"
        visible = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril().expand(len(x), -1, -1)
        if seq.document_ids is not None:
            visible = visible * (seq.document_ids[:, :, None] == seq.document_ids[:, None])
        return Out(self.out(visible / visible.sum(-1, keepdim=True) @ (self.gain * self.value(x))))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.names("mixer")
    monkeypatch.setattr(registry, "_table", {room: dict(entries) for room, entries in registry._table.items()})
    registry.register("mixer", "mean")(Mean)


def certify(words: str) -> Any:
    recipe = load_recipe(
        "gpt_tiny",
        (
            "model.width=16",
            "model.layers=3",
            "model.frontend={kind: tokens, vocabulary: 40, embedding_dropout: 0.1}",
            "model.residual_dropout=0.1",
            "model.mixer={kind: mean}",
            "model.at={1: {mixer: {kind: attention, heads: 4, dropout: 0.1}}}",
            "data.sequence_length=16",
            "optimizer={kind: adamw, lr: 1.0e-3, clip: 0.05}",
            "schedule={kind: constant}",
            "train={steps: 3, sequences: 12, micro_sequences: 2, seed: 5, device: cpu}",
        ),
    )
    return verify_small(recipe, parse_layout(words.split()), dtype="fp64", timeout=60)


@pytest.mark.parametrize("words", ["tp=2", "tp=2 sequence_parallel=false", "dp_shard=2 tp=2"])
def test_an_unsplit_mixer_has_the_same_gradients(words):
    """Beside a split one, so that hidden states go from slices of the row to whole rows and back."""
    found = certify(words)
    assert found.passed, found.failures
    own = [line for line in found.lines if ".0.mixer." in line.name]
    assert {line.name.rpartition("mixer.")[2] for line in own} >= {"gain", "value.weight", "out.weight"}
    assert all(line.gradient_norm > 0 for line in own)


def test_a_wrong_slice_of_what_it_makes_is_seen(monkeypatch):
    monkeypatch.setattr(axes.TensorAxis, "own", lambda self, x, dim=1: x.chunk(self.size, dim)[0])
    assert not certify("tp=2").passed
