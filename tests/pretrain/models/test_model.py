"""The whole model: counted parameters, counted operations, GPT-2's logits, and the contract of a hybrid trunk."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from potamos.pretrain.catalog import parameters
from potamos.pretrain.config import load_recipe
from potamos.pretrain.models.build import build, materialize
from potamos.pretrain.models.interfaces import Out, Seq
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.recipe import ModelSection

GPT2 = {
    "width": 32,
    "layers": 3,
    "frontend": {"kind": "tokens", "vocabulary": 61},
    "mixer": {"kind": "attention", "heads": 4},
    "channel": {"kind": "mlp", "ratio": 4, "activation": "gelu_tanh"},
    "positions": {"kind": "learned", "max_length": 48},
}
HYBRID = {
    **GPT2,
    "mixer": {"kind": "h3", "state": 8, "shift_state": 6},
    "positions": {"kind": "none"},
    "at": {1: {"mixer": {"kind": "attention", "heads": 4}, "positions": {"kind": "rope"}}},
}


def make(settings: dict[str, Any], **changes: Any) -> Model:
    section = ModelSection.model_validate({**settings, **changes})
    return materialize(section, seed=3, sequence_length=48)


def tokens(rows: int = 2, length: int = 48) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(8))


def positions(rows: int = 2, length: int = 48) -> Seq:
    return Seq(positions=torch.arange(length).repeat(rows, 1))


# --- parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h3_hybrid_125m", 126_139_392),
        ("h3_hybrid_355m", 361_058_304),
        ("h3_hybrid_1.3b", 1_326_096_384),
        ("h3_hybrid_2.7b", 2_671_134_720),
    ],
)
def test_parameters_of_the_published_hybrids(name: str, expected: int) -> None:
    recipe = load_recipe(name)
    assert parameters(recipe) == expected
    assert expected == _by_hand(recipe.model)


def _by_hand(model: ModelSection) -> int:
    """The same count from the equations of the layers (Fu et al. 2022, section 3; GPT-2 for the rest)."""
    width, attention = model.width, len(model.at)
    norm, projections = 2 * width, 4 * (width**2 + width)
    mlp = 8 * width**2 + 5 * width
    # Shift: B, C and the skip. Diagonal: log dt, log a, b, and B and C of 32 complex modes, and the skip.
    h3 = width * (64 + 64 + 1) + width * (1 + 32 + 32 + 2 * 32 + 2 * 32 + 1)
    return 50_264 * width + norm + model.layers * (2 * norm + projections + mlp) + (model.layers - attention) * h3


# --- operations --------------------------------------------------------------------------------------------------


def counted(model: Model, rows: int, length: int) -> FlopCounterMode:
    """What torch counts in one forward pass with scores. The math form of attention: it is counted on every device."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.frontend.logits(model({"tokens": tokens(rows, length)}, positions(rows, length)).hidden)
    return counter


@pytest.mark.parametrize("length", [16, 48])
@pytest.mark.parametrize("channel", ["mlp", "swiglu"])
def test_flops_of_attention_equal_torchs_count(length: int, channel: str) -> None:
    """torch counts every score, of which a causal model needs (length + 1) / 2 per token; the rest is exact."""
    model = make(GPT2, channel={"kind": channel})
    seen = counted(model, rows=2, length=length).get_total_flops() / (2 * length)
    hidden_pairs = length - (length + 1) / 2
    assert seen - 3 * 4 * 32 * hidden_pairs == model.flops_per_token(length)


def test_flops_of_a_hybrid_have_exact_linears() -> None:
    """The linear layers and the scores as torch counts them; the kernels' own way of computing is not what is asked."""
    model, length = make(HYBRID), 48
    counts = counted(model, rows=2, length=length).get_flop_counts()
    kernels = sum(sum(v.values()) for name, v in counts.items() if name.endswith("mixer.core"))
    assert kernels > 0
    pairs = 4 * 32 * length  # of the one attention layer
    outside = (sum(counts["Global"].values()) - kernels) / (2 * length) - pairs
    mixing = sum(r.mixing_flops(length) for r in model.regions())
    assert outside == model.flops_per_token(length) - mixing
    linears = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    assert outside == linears + 2 * 61 * 32
    attention = 4 * 32 * (length + 1) / 2
    h3 = 32 * (2 * 6 + (6 * 8 + 4) + 4)
    assert mixing == attention + 2 * h3


# --- GPT-2 -------------------------------------------------------------------------------------------------------


def gpt2_pair(heads: int = 4) -> tuple[Model, Any]:
    """Our model and Hugging Face's GPT-2 with the same fp64 weights, none of them special."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=48,
        n_embd=32,
        n_layer=3,
        n_head=heads,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    ours = make(GPT2).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        copy_gpt2(ours, theirs)
    return ours, theirs


def copy_gpt2(ours: Model, theirs: Any) -> None:
    body, own = theirs.transformer, dict(ours.named_parameters())

    def put(name: str, value: Tensor) -> None:
        own.pop(name).copy_(value)

    put("frontend.tokens.weight", body.wte.weight)
    put("frontend.positions.weight", body.wpe.weight)
    put("stack.norm.weight", body.ln_f.weight)
    put("stack.norm.bias", body.ln_f.bias)
    for layer, block in enumerate(body.h):
        here = f"stack.blocks.{layer}."
        for kind in ("weight", "bias"):
            put(f"{here}mixer_norm.{kind}", getattr(block.ln_1, kind))
            put(f"{here}channel_norm.{kind}", getattr(block.ln_2, kind))
            # Their projections are stored as (inputs, outputs), queries, keys and values side by side.
            for name, value in zip("qkv", getattr(block.attn.c_attn, kind).chunk(3, -1), strict=True):
                put(f"{here}mixer.{name}.{kind}", value.T)
            put(f"{here}mixer.out.{kind}", getattr(block.attn.c_proj, kind).T)
            put(f"{here}channel.up.{kind}", getattr(block.mlp.c_fc, kind).T)
            put(f"{here}channel.down.{kind}", getattr(block.mlp.c_proj, kind).T)
    assert not own, f"not copied: {sorted(own)}"


@pytest.mark.filterwarnings("ignore")
def test_logits_loss_and_gradients_are_gpt2s() -> None:
    ours, theirs = gpt2_pair()
    ids = tokens()
    expected = theirs(ids).logits
    hidden = ours({"tokens": ids}, positions()).hidden
    torch.testing.assert_close(ours.frontend.logits(hidden), expected, rtol=0, atol=1e-9)
    assert expected.std() > 0.5
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -1)], 1)
    loss = ours.frontend.nll(hidden, targets)
    expected_loss = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-9)
    loss.backward()
    expected_loss.backward()
    body = theirs.transformer
    for got, want in [
        (ours.frontend.get_parameter("tokens.weight"), body.wte.weight),
        (ours.frontend.get_parameter("positions.weight"), body.wpe.weight),
        (ours.stack.get_parameter("blocks.0.channel.up.bias"), body.h[0].mlp.c_fc.bias),
        (ours.stack.get_parameter("blocks.2.mixer_norm.weight"), body.h[2].ln_1.weight),
    ]:
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-9)
        assert want.grad.abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore")
def test_gpt2_comparison_sees_a_wrong_activation() -> None:
    ours, theirs = gpt2_pair()
    for block in ours.stack.blocks.values():
        block.get_submodule("channel").activation = nn.functional.gelu  # pyright: ignore[reportArgumentType]
    ids = tokens()
    ours_logits = ours.frontend.logits(ours({"tokens": ids}, positions()).hidden)
    assert (ours_logits - theirs(ids).logits).abs().max() > 1e-6


# --- the trunk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GPT2, HYBRID], ids=["gpt2", "hybrid"])
@pytest.mark.parametrize("norm", [{"place": "pre"}, {"kind": "rmsnorm", "place": "post"}], ids=["pre", "post_rms"])
def test_trunk_continues_and_steps(settings: dict[str, Any], norm: dict[str, str]) -> None:
    """Whole rows = a segment, another one, then single tokens; in fp64, gradients included."""
    model = make(settings, norm=norm, init={"kind": "gpt2", "std": 0.3}).double()
    ids, seq = tokens(), positions()

    def places(begin: int, end: int) -> Seq:
        return Seq(positions=seq.positions[:, begin:end], columns=torch.arange(begin, end))

    def run(*cuts: int) -> dict[str, Tensor]:
        model.zero_grad()
        out: Out = model({"tokens": ids[:, : cuts[0]]}, places(0, cuts[0]))
        parts = [out.hidden]
        for begin, end in zip(cuts, [*cuts[1:], 48], strict=True):
            call = model if end - begin > 1 else model.step
            if begin < end:
                out = call({"tokens": ids[:, begin:end]}, places(begin, end), out.state)
                parts.append(out.hidden)
        hidden = torch.cat(parts, 1)
        (model.frontend.logits(hidden).log_softmax(-1)[..., 5]).sum().backward()
        return {"hidden": hidden.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, found = run(48), run(20, 41, *range(42, 48))
    assert expected.keys() == found.keys()
    assert len(expected) == 1 + sum(1 for _ in model.parameters())
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        assert (found[name] - value).abs().max() <= 1e-10 * scale, name


def test_untied_scores_have_their_own_table() -> None:
    tied, untied = make(GPT2), make(GPT2, frontend={"kind": "tokens", "vocabulary": 61, "tied": False})
    extra = dict(untied.named_parameters()).keys() - dict(tied.named_parameters()).keys()
    assert extra == {"frontend.head.weight"}
    hidden = torch.randn(2, 5, 32)
    assert not torch.equal(untied.frontend.logits(hidden), hidden @ untied.frontend.get_parameter("tokens.weight").T)
    assert torch.equal(tied.frontend.logits(hidden), hidden @ tied.frontend.get_parameter("tokens.weight").T)


def test_segment_state_keeps_what_each_layer_says() -> None:
    """Attention without memory hands nothing on, with memory its last keys; state-space layers hand on everything."""
    model = make(HYBRID)
    state = model({"tokens": tokens()}, positions()).state
    assert set(state) == {"0", "1", "2"}
    assert set(model.stack.segment_state(state)) == {"0", "2"}
    remembering = make(HYBRID, at={1: {"mixer": {"kind": "attention", "heads": 4, "memory": 5}}})
    kept = remembering.stack.segment_state(remembering({"tokens": tokens()}, positions()).state)
    assert set(kept) == {"0", "1", "2"}
    assert kept["1"].keys.shape[2] == 5
    assert make(GPT2).stack.segment_state(make(GPT2)({"tokens": tokens()}, positions()).state) is None


def test_dropout_depends_on_sample_and_column_not_on_the_cut() -> None:
    """Rows in another order and rows cut in two drop the same elements."""
    model = make(
        HYBRID,
        residual_dropout=0.3,
        frontend={"kind": "tokens", "vocabulary": 61, "embedding_dropout": 0.2},
        at={1: {"mixer": {"kind": "attention", "heads": 4, "dropout": 0.2}}},
    ).double()
    ids = tokens(rows=3)
    samples = torch.tensor([40, 7, 2**40])

    def run(order: list[int], cuts: list[int], seed: int = 1) -> Tensor:
        state, parts = None, []
        for begin, end in itertools.pairwise(cuts):
            columns = torch.arange(begin, end)
            seq = Seq(columns.repeat(3, 1), samples=samples[order], columns=columns, seed=seed, step=4)
            out = model({"tokens": ids[order, begin:end]}, seq, state)
            state = out.state
            parts.append(out.hidden)
        return torch.cat(parts, 1)

    whole = run([0, 1, 2], [0, 48])
    assert not torch.allclose(whole, run([0, 1, 2], [0, 48], seed=2))
    order = [2, 0, 1]
    torch.testing.assert_close(run(order, [0, 48]), whole[order], rtol=0, atol=1e-10)
    torch.testing.assert_close(run([0, 1, 2], [0, 19, 48]), whole, rtol=0, atol=1e-10)
    model.eval()
    assert torch.equal(run([0, 1, 2], [0, 48]), run([0, 1, 2], [0, 48], seed=2))


def test_meta_model_has_no_memory_and_the_same_names() -> None:
    section = ModelSection.model_validate(HYBRID)
    with torch.device("meta"):
        empty = build(section, sequence_length=48)
    assert all(p.is_meta for p in empty.parameters())
    filled = materialize(section, seed=3, sequence_length=48)
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in filled.named_parameters()]
    again, other = materialize(section, seed=3), materialize(section, seed=4)
    for (name, a), b, c in zip(filled.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not name.endswith("q.weight") or not torch.equal(a, c)
