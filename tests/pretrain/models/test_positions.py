"""Position schemes against their definitions, inside attention and in the embedding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.pretrain.models import registry
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.interfaces import Context, Seq
from potamos.pretrain.models.linear import Embedding
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.recipe import ModelSection

WIDTH, HEADS, LENGTH, VOCABULARY = 16, 4, 20, 29


def make(positions: dict[str, Any]) -> Model:
    section = ModelSection.model_validate(
        {
            "width": WIDTH,
            "layers": 1,
            "frontend": {"kind": "tokens", "vocabulary": VOCABULARY},
            "mixer": {"kind": "attention", "heads": HEADS},
            "channel": None,
            "positions": positions,
            "init": {"kind": "gpt2", "std": 0.5},
        }
    )
    return materialize(section, seed=1, sequence_length=LENGTH).double()


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))


def run(model: Model, offset: int = 0) -> Tensor:
    return model({"tokens": tokens()}, Seq(positions=torch.arange(offset, offset + LENGTH).repeat(2, 1))).hidden


def by_hand(model: Model, embedded: Tensor, bias: Tensor, turn: Any = lambda x: x) -> Tensor:
    """The one-layer model written out: ``bias`` (heads, L, L) is added to scores, ``turn`` acts on queries and keys."""
    block, norm = model.stack.blocks["0"], torch.nn.functional.layer_norm
    x = norm(embedded, (WIDTH,), block.mixer_norm.weight, block.mixer_norm.bias)  # pyright: ignore
    q, k, v = (
        getattr(block.mixer, name)(x).view(2, LENGTH, HEADS, WIDTH // HEADS).transpose(1, 2) for name in ("q", "k", "v")
    )
    scores = turn(q) @ turn(k).transpose(2, 3) / math.sqrt(WIDTH // HEADS) + bias
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, LENGTH, WIDTH)
    y = embedded + y @ block.mixer.out.weight.T + block.mixer.out.bias  # pyright: ignore
    return norm(y, (WIDTH,), model.stack.get_parameter("norm.weight"), model.stack.get_parameter("norm.bias"))


def embedded(model: Model) -> Tensor:
    return model.frontend.get_parameter("tokens.weight")[tokens()]


def test_none_is_plain_attention() -> None:
    model = make({"kind": "none"})
    torch.testing.assert_close(run(model), by_hand(model, embedded(model), torch.zeros(())), rtol=0, atol=1e-12)
    assert torch.equal(run(model), run(model, offset=7))


def test_alibi_adds_slopes_times_distance() -> None:
    """Slopes 2^-2, 2^-4, 2^-6, 2^-8 for four heads (Press et al. 2021, section 3)."""
    model = make({"kind": "alibi"})
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64)
    bias = -slopes[:, None, None] * distance
    torch.testing.assert_close(run(model), by_hand(model, embedded(model), bias), rtol=0, atol=1e-12)
    assert torch.equal(run(model), run(model, offset=7))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rope_rotates_by_complex_numbers(interleaved: bool, fraction: float) -> None:
    """Pair n is a complex number times exp(i pos base^(-2n/d)) (Su et al. 2021, equation 34); angles are fp32."""
    model = make({"kind": "rope", "base": 100.0, "fraction": fraction, "interleaved": interleaved})
    rotated = int(WIDTH // HEADS * fraction)
    pairs = rotated // 2
    order = torch.arange(rotated).view(pairs, 2) if interleaved else torch.arange(rotated).view(2, pairs).T
    angle = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(pairs).double() / pairs)

    def turn(x: Tensor) -> Tensor:
        z = torch.complex(x[..., order[:, 0]], x[..., order[:, 1]]) * torch.polar(torch.ones_like(angle), angle)
        out = x.clone()
        out[..., order[:, 0]], out[..., order[:, 1]] = z.real, z.imag
        return out

    expected = by_hand(model, embedded(model), torch.zeros(()), turn)
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    assert (run(model) - by_hand(model, embedded(model), torch.zeros(()))).abs().max() > 1e-2


@pytest.mark.parametrize("offset", [1, 1000])
def test_rope_depends_on_distances_only(offset: int) -> None:
    """Shifting every position changes nothing but rounding of fp32 angles: one part in 2^24 of the position."""
    model = make({"kind": "rope"})
    torch.testing.assert_close(run(model, offset), run(model), rtol=0, atol=1e-6 * (offset + LENGTH))
    stretched = Seq(positions=2 * torch.arange(LENGTH).repeat(2, 1))
    assert (model({"tokens": tokens()}, stretched).hidden - run(model)).abs().max() > 5e-2


def test_rope_refuses_what_it_cannot_pair() -> None:
    with pytest.raises(ValueError, match="an even number is needed"):
        make({"kind": "rope", "fraction": 0.26})


def test_learned_adds_its_table() -> None:
    model = make({"kind": "learned", "max_length": 32})
    table = model.frontend.get_parameter("positions.weight")
    for offset in (0, 12):
        x = embedded(model) + table[offset : offset + LENGTH]
        torch.testing.assert_close(run(model, offset), by_hand(model, x, torch.zeros(())), rtol=0, atol=1e-12)


def test_learned_names_the_position_that_it_lacks() -> None:
    model = make({"kind": "learned", "max_length": 32})
    with pytest.raises(ValueError, match=r"position 32 is beyond positions\.max_length 32"):
        run(model, offset=13)


def test_sinusoidal_is_the_formula() -> None:
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos (Vaswani et al. 2017, section 3.5)."""
    options = registry.lookup("positions", "sinusoidal").Options(kind="sinusoidal")
    table = registry.lookup("positions", "sinusoidal")(options).embedding(Context(width=7, layers=1))
    found = table(torch.tensor([[0, 1, 50_000]]))
    for place, position in enumerate((0, 1, 50_000)):
        for channel in range(7):
            angle = position / 10000 ** (channel // 2 * 2 / 7)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert abs(found[0, place, channel].item() - expected) < 1e-6
    assert not list(table.parameters())


def test_only_absolute_schemes_embed() -> None:
    adds = {}
    for name in registry.names("positions"):
        scheme = registry.lookup("positions", name)
        options = scheme.Options(kind=name, **({"max_length": 9} if name == "learned" else {}))
        adds[name] = scheme(options).embedding(Context(width=8, layers=1))
    assert isinstance(adds["learned"], Embedding)
    assert {name for name in ("none", "alibi", "rope") if adds[name] is not None} == set()


def test_xpos_has_numbers_to_the_end_that_it_names() -> None:
    """A query and the key of its own position make the same score anywhere; well beyond the end there is none."""
    model = make({"kind": "xpos", "scale_base": 2.0}).float()
    end = model.max_positions
    assert end is not None
    scheme: Any = next(m for m in model.modules() if getattr(m, "max_positions", None) and m is not model)
    x = torch.randn(1, 1, 4, WIDTH // HEADS)
    for places, sound in (([0, LENGTH // 2, end // 2, end - 1], True), ([2 * end] * 4, False)):
        positions = torch.tensor([places])
        turned = scheme.rotary(positions, positions)
        scores = (turned.rotate_query(100 * x) * turned.rotate_key(100 * x)).sum(-1)
        right = ((100 * x).square().sum(-1) - scores).abs() <= 1e-4 * scores.abs()
        assert bool(right.all()) is sound
    assert make({"kind": "rope"}).max_positions is None
    assert make({"kind": "learned", "max_length": 32}).max_positions == 32
