"""Position schemes inside attention against their definitions, written out pair by pair in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.attention import Disentangled, Toeplitz
from potamos.parallel.facts import Traits
from potamos.pretrain.models import registry
from potamos.pretrain.models.initialize import Gpt2, initialize
from potamos.pretrain.models.interfaces import AttentionCall, AttentionPositions, Context, Seq
from potamos.pretrain.models.mixers.attention import Attention
from potamos.pretrain.models.positions.rpe import LearnedBias, RelativePositions
from potamos.pretrain.models.positions.xpos import DecayingRotation, Xpos

WIDTH, HEADS, LENGTH = 16, 4, 40
DIM = WIDTH // HEADS


class Bidirectional(Attention):
    """Attention that sees later keys too."""

    traits = Traits(shard="head", causal=False)


def make(positions: dict[str, Any], *, causal: bool = True, length: int = LENGTH, kv_heads: int | None = None) -> Any:
    """One attention layer in fp64, its weights large enough that every term counts."""
    scheme = registry.lookup("positions", positions["kind"])
    pattern = registry.lookup("pattern", "full")
    context = Context(
        width=WIDTH,
        layers=1,
        sequence_length=length,
        positions=scheme(scheme.Options(**positions)),
        pattern=pattern(pattern.Options(kind="full")),
    )
    kind = Attention if causal else Bidirectional
    options: Any = Attention.Options
    with torch.device("meta"):
        mixer = kind(options(kind="attention", heads=HEADS, kv_heads=kv_heads), context)
    initialize(mixer, Gpt2(Gpt2.Options(std=0.5), layers=1), seed=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return mixer.double()


def hidden() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def run(mixer: Attention, offset: int = 0) -> Tensor:
    return mixer(hidden(), Seq(positions=torch.arange(offset, offset + LENGTH).repeat(2, 1))).hidden


def heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (-1, DIM)).transpose(-3, -2)


def by_hand(mixer: Attention, bias: Any = 0.0, *, causal: bool = True, terms: int = 1, turn: Any = None) -> Tensor:
    """The layer written out; ``bias`` is added to the scores, or made of (q, k); ``turn(x, sign)`` acts on q and k."""
    x = hidden()
    q, k, v = (heads(linear(x)) for linear in (mixer.q, mixer.k, mixer.v))
    k, v = (y.repeat_interleave(HEADS // y.shape[1], 1) for y in (k, v))
    bias = bias(q, k) if callable(bias) else bias
    if turn is not None:
        q, k = turn(q, 1), turn(k, -1)
    scores = q @ k.mT / math.sqrt(terms * DIM) + bias
    if causal:
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    return mixer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def pairs(value: Any) -> Tensor:
    """(L, L) of value(i - j)."""
    return torch.tensor([[value(i - j) for j in range(LENGTH)] for i in range(LENGTH)])


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# --- xPos --------------------------------------------------------------------------------------------------------


def xpos_by_hand(gamma: float, scale_base: float) -> Any:
    """Channels i and i + d/2 are a complex number, turned and scaled (Sun et al. 2022); no center."""
    pair = torch.arange(DIM // 2).double()
    zeta = (2 * pair + gamma * DIM) / ((1 + gamma) * DIM)
    place = torch.arange(LENGTH).double()[:, None]

    def turn(x: Tensor, sign: int) -> Tensor:
        angle = place * 10000.0 ** (-2 * pair / DIM)
        z = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :]) * torch.polar(
            zeta ** (sign * place / scale_base), angle
        )
        return torch.cat([z.real, z.imag], -1)

    return turn


def test_xpos_is_the_formula_whatever_its_center() -> None:
    options = {"kind": "xpos", "gamma": 0.3, "scale_base": 20.0}
    expected = by_hand(make(options), turn=xpos_by_hand(0.3, 20.0))
    for length in (0, LENGTH, 300):  # centers 0, 20, 150: all cancel
        near(run(make(options, length=length)), expected, 1e-5)  # angles and factors are rounded to fp32
    assert (run(make(options)) - run(make({"kind": "rope"}))).abs().max() > 1e-2
    assert (run(make(options)) - by_hand(make(options), turn=xpos_by_hand(0.3, -20.0))).abs().max() > 1e-2


@pytest.mark.parametrize("offset", [1, 100])
def test_xpos_depends_on_distances_only(offset: int) -> None:
    mixer = make({"kind": "xpos", "scale_base": 50.0})
    near(run(mixer, offset), run(mixer), 1e-6 * (offset + LENGTH))


def test_xpos_without_decay_is_rope() -> None:
    """gamma so large that zeta is 1."""
    found = make({"kind": "xpos", "gamma": 1e12})
    near(run(found), run(make({"kind": "rope"})), 1e-9)


def test_xpos_scores_fall_with_the_distance() -> None:
    """Equal queries and keys in the slowest pair: its score falls by zeta over scale_base positions."""
    positions = make({"kind": "xpos", "scale_base": 10.0, "base": 1e8}).positions
    rotary = positions.rotary(torch.arange(31)[None], torch.arange(31)[None])
    x = torch.zeros(1, 1, 31, DIM, dtype=torch.float64)
    x[..., 1] = 1.0  # pair 1 of 2, zeta = (2 + 0.4 * 4) / (1.4 * 4)
    scores = (rotary.rotate_query(x) @ rotary.rotate_key(x).mT)[0, 0]
    expected = ((2 + 0.4 * 4) / (1.4 * 4)) ** (torch.arange(31) / 10) * torch.cos(torch.arange(31).double() * 1e-4)
    near(scores[30, 30 - torch.arange(31)], expected.double(), 1e-5)


def test_xpos_refuses_rows_that_would_overflow() -> None:
    scheme = registry.lookup("positions", "xpos")
    scheme.check(scheme.Options(kind="xpos"), 64, 8192)
    with pytest.raises(ValueError, match=r"scale_base 512 is too small for rows of 65536.*raise it to 3421"):
        scheme.check(scheme.Options(kind="xpos"), 64, 65536)
    scheme.check(scheme.Options(kind="xpos", scale_base=3421.0), 64, 65536)


# --- Sandwich ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [16, 128])
def test_sandwich_is_the_product_of_sinusoidal_embeddings(causal: bool, dim: int) -> None:
    """bias = p_m . p_n / (8 h / H), h = 1 .. H (Chi et al. 2022); what was taken off softmax does not see."""
    place = torch.arange(LENGTH).double()[:, None] / 10000.0 ** (torch.arange(0, dim, 2).double() / dim)
    p = torch.cat([place.sin(), place.cos()], -1)
    strength = 8 * torch.arange(1, HEADS + 1).double() / HEADS
    mixer = make({"kind": "sandwich", "dim": dim}, causal=causal)
    near(run(mixer), by_hand(mixer, (p @ p.T) / strength[:, None, None], causal=causal), 1e-6)
    assert (run(mixer) - by_hand(mixer, causal=causal)).abs().max() > 1e-3


# --- learned by distance -------------------------------------------------------------------------------------------


def t5_bucket_by_hand(distance: int, buckets: int, furthest: int, causal: bool) -> int:
    """Raffel et al. 2020: exact up to half of the buckets, logarithmic up to ``furthest``, the last one beyond."""
    if not causal:
        later = buckets // 2 if distance < 0 else 0
        return later + t5_bucket_by_hand(abs(distance), buckets // 2, furthest, True)
    distance, exact = max(distance, 0), buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(furthest / exact)
    return min(buckets - 1, exact + int(share * (buckets - exact)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("options", "entry"),
    [
        ({"kind": "t5", "buckets": 8, "furthest": 29}, lambda d, c: t5_bucket_by_hand(d, 8, 29, c)),
        ({"kind": "t5"}, lambda d, c: t5_bucket_by_hand(d, 32, 128, c)),
        ({"kind": "rpe", "furthest": 11}, lambda d, c: min(11, max(0 if c else -11, d)) + (0 if c else 11)),
    ],
)
def test_learned_biases_and_their_gradients(options: dict[str, Any], entry: Any, causal: bool) -> None:
    mixer = make(options, causal=causal)
    weight = mixer.positions.weight
    expected = by_hand(mixer, weight[:, pairs(lambda d: entry(d, causal))], causal=causal)
    near(run(mixer), expected)
    loss = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (want,) = torch.autograd.grad((expected * loss).sum(), weight)
    (found,) = torch.autograd.grad((run(mixer) * loss).sum(), weight)
    near(found, want)
    reached = {entry(i - j, causal) for i in range(LENGTH) for j in range(LENGTH) if i >= j or not causal}
    assert {b for b in range(weight.shape[1]) if found[:, b].abs().max() > 1e-9} == reached


def test_t5_begins_as_released() -> None:
    """N(0, 1 / width) whatever the initializer's deviation."""
    scheme = registry.lookup("positions", "t5")
    module = scheme(scheme.Options(kind="t5")).attention(
        Context(width=400, layers=1), heads=64, head_dim=4, causal=True
    )
    initialize(module, Gpt2(Gpt2.Options(std=0.5), layers=1), seed=1)
    assert module.weight.shape == (64, 32)
    assert module.weight.std().item() == pytest.approx(400**-0.5, rel=0.05)


def test_options_that_cannot_be() -> None:
    t5, deberta = (registry.lookup("positions", name) for name in ("t5", "disentangled"))
    with pytest.raises(ValueError, match="furthest 16 must exceed half of the buckets, 16"):
        t5.check(t5.Options(kind="t5", furthest=16), 16, 64)
    with pytest.raises(ValueError, match="furthest 129 must exceed 129"):
        deberta.check(deberta.Options(kind="disentangled", furthest=129), 16, 64)
    deberta.check(deberta.Options(kind="disentangled", furthest=129, buckets=0), 16, 64)


# --- disentangled --------------------------------------------------------------------------------------------------


def deberta_row_by_hand(distance: int, buckets: int, furthest: int) -> int:
    """He et al. 2020, equation 3, and the second version's logarithmic buckets as released."""
    span = buckets or furthest
    middle = buckets // 2
    if buckets and abs(distance) > middle:
        share = math.log(abs(distance) / middle) / math.log((furthest - 1) / middle)
        distance = int(math.copysign(middle + math.ceil(share * (middle - 1)), distance))
    return min(2 * span - 1, max(0, distance + span))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("terms", ["both", "c2p", "p2c"])
@pytest.mark.parametrize(("buckets", "furthest"), [(0, 12), (8, 33), (0, 64)])
def test_disentangled_scores(buckets: int, furthest: int, terms: str, share: bool, causal: bool) -> None:
    mixer = make(
        {"kind": "disentangled", "buckets": buckets, "furthest": furthest, "terms": terms, "share_att_key": share},
        causal=causal,
    )
    own = mixer.positions
    vectors = torch.nn.functional.layer_norm(own.table.weight, (WIDTH,), own.norm.weight, own.norm.bias, 1e-7)
    row = pairs(lambda d: deberta_row_by_hand(d, buckets, furthest))
    products = 1 + (terms != "p2c") + (terms != "c2p")

    def bias(q: Tensor, k: Tensor) -> Tensor:
        total = torch.zeros(2, HEADS, LENGTH, LENGTH, dtype=torch.float64)
        if terms != "p2c":
            keys = heads((mixer.k if share else own.key)(vectors))
            total = total + torch.einsum("bhid,hijd->bhij", q, keys[:, row])
        if terms != "c2p":
            queries = heads((mixer.q if share else own.query)(vectors))
            total = total + torch.einsum("bhjd,hijd->bhij", k, queries[:, row])
        return total / math.sqrt(products * DIM)

    expected = by_hand(mixer, bias, causal=causal, terms=products)
    near(run(mixer), expected)
    loss = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    # Where rows depend on the bias of position keys not at all, its gradient is 0 in both.
    want = torch.autograd.grad((expected * loss).sum(), [*mixer.parameters()])
    for found, value in zip(torch.autograd.grad((run(mixer) * loss).sum(), [*mixer.parameters()]), want, strict=True):
        near(found, value, 1e-11)


def test_disentangled_without_positions_is_attention_at_a_third_of_the_temperature() -> None:
    """Zero vectors: plain attention whose scores are divided by sqrt(3 d)."""
    mixer = make({"kind": "disentangled", "share_att_key": False})
    with torch.no_grad():
        mixer.positions.norm.weight.zero_()
        mixer.positions.norm.bias.zero_()
        mixer.positions.query.bias.zero_()
    near(run(mixer), by_hand(mixer, terms=3))


def test_disentangled_shares_key_heads_among_grouped_queries() -> None:
    mixer = make({"kind": "disentangled", "buckets": 0, "furthest": 12, "terms": "c2p"}, kv_heads=2)
    own = mixer.positions
    vectors = torch.nn.functional.layer_norm(own.table.weight, (WIDTH,), own.norm.weight, own.norm.bias, 1e-7)
    row = pairs(lambda d: deberta_row_by_hand(d, 0, 12))
    keys = heads(mixer.k(vectors)).repeat_interleave(2, 0)
    bias = lambda q, k: torch.einsum("bhid,hijd->bhij", q, keys[:, row]) / math.sqrt(2 * DIM)  # noqa: E731
    near(run(mixer), by_hand(mixer, bias, terms=2))


# --- all of them -----------------------------------------------------------------------------------------------------

RELATIVE = ["none", "rope", "xpos", "alibi", "sandwich", "t5", "rpe", "disentangled"]


@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_schemes_do_not_see_where_a_document_begins(kind: str) -> None:
    mixer = make({"kind": kind})
    near(run(mixer, offset=17), run(mixer), 1e-5)


@pytest.mark.parametrize("kind", ["alibi", "sandwich"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_shard_of_heads_has_their_part_of_the_bias(kind: str, causal: bool) -> None:
    """Constants are cut by global head; parameters are cut by whoever splits the model."""
    positions: AttentionPositions = make({"kind": kind}, causal=causal).positions
    whole, shard = (
        positions.bias(_call(part, causal), lambda x: x, lambda x: x) for part in (range(HEADS), range(2, 4))
    )
    assert isinstance(whole, Toeplitz)
    assert isinstance(shard, Toeplitz)
    all_of, some = ((b.slopes if b.table is None else b.table) for b in (whole, shard))
    assert all_of is not None
    assert some is not None
    assert torch.equal(all_of[2:4], some)
    assert not torch.equal(all_of[:2], some)
    assert whole.least == shard.least


def _call(part: range, causal: bool) -> AttentionCall:
    return AttentionCall(layer=0, causal=causal, heads=part, queries=5, keys=9, device=torch.device("cpu"))


def test_descriptions_do_not_grow_with_the_square_of_the_length() -> None:
    """Nothing of length x length, nor of batch x length, is made by a scheme."""
    for kind in ("alibi", "sandwich", "t5", "rpe", "disentangled"):
        mixer = make({"kind": kind})
        call = AttentionCall(
            layer=0, causal=True, heads=range(HEADS), queries=1, keys=100_000, device=torch.device("cpu")
        )
        bias = mixer.positions.bias(call, mixer._query, mixer._key)
        parts = (
            (bias.position_keys, bias.position_queries) if isinstance(bias, Disentangled) else (bias.slopes, bias.table)
        )
        assert all(part is None or part.numel() <= HEADS * 2**17 for part in parts)


# --- broken schemes --------------------------------------------------------------------------------------------------


class CountsFromTheQueries(RelativePositions):
    """Takes the first query for the first token of the row."""

    def attention(self, context: Context, **rest: Any) -> AttentionPositions:
        class Bias(LearnedBias):
            def bias(self, call: AttentionCall, query: Any, key: Any) -> Toeplitz:
                return replace(super().bias(call, query, key), least=call.query_offset)

        plain: Any = super().attention(context, **rest)
        return Bias(len(plain.weight), plain.entries, plain.least)


class LearnsNothing(RelativePositions):
    """A table that no gradient reaches."""

    def attention(self, context: Context, **rest: Any) -> AttentionPositions:
        class Bias(LearnedBias):
            def bias(self, call: AttentionCall, query: Any, key: Any) -> Toeplitz:
                return Toeplitz(table=self.weight.detach()[:, self.entries], least=self.least)

        plain: Any = super().attention(context, **rest)
        return Bias(len(plain.weight), plain.entries, plain.least)


class MovesItsCenter(Xpos):
    """Counts from the first position of each call, though keys are kept from one to the next."""

    def attention(self, context: Context, **rest: Any) -> AttentionPositions:
        class Rotation(DecayingRotation):
            def rotary(self, query_positions: Tensor, key_positions: Tensor) -> Any:
                return replace(super().rotary(query_positions, key_positions), center=int(query_positions[0, 0]))

        return Rotation(rest["head_dim"], base=1e4, gamma=0.4, scale_base=20.0, interleaved=False, center=0)


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (CountsFromTheQueries, "splits"),
        (CountsFromTheQueries, "steps"),
        (LearnsNothing, "gradients"),
        (MovesItsCenter, "splits"),
        (MovesItsCenter, "steps"),
    ],
)
def test_a_broken_scheme_fails(
    contract: ModuleType, monkeypatch: pytest.MonkeyPatch, broken: type[RelativePositions], name: str
) -> None:
    registry.names("positions")
    monkeypatch.setitem(registry._table["positions"], "broken", broken)
    subject = contract.make(contract.Case("positions", "broken"))
    with pytest.raises(AssertionError):
        getattr(contract, f"check_{name}")(subject)
