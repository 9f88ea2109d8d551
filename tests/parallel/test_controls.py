"""The certificate sees what it is for: every mistake that layouts have been known to make, made on purpose.

Each is planted in the program itself, and the part of the certificate that must tell it is named; so is what stays
silent. A loss curve is silent about most: clipping and Adam hide any factor of the gradient.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from potamos.kernels.diag_ssm import sequence as ssm_sequence
from potamos.kernels.flash_conv import sequence as h3_sequence
from potamos.parallel import axes, context, data, gradients, pipeline, tensor
from potamos.parallel.apply import Spread
from potamos.parallel.facts import Traits
from potamos.parallel.local import RankTimeout
from potamos.parallel.mesh import LayoutError, sizes
from potamos.pretrain import evaluate, trainer
from potamos.pretrain.config import load_recipe
from potamos.pretrain.models import interfaces, registry
from potamos.pretrain.models.frontends.tokens import Tokens
from potamos.pretrain.models.interfaces import Context, Mixer, Out, Seq, State
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.objectives import base
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.verify import Certificate, definition, verify_small
from potamos.pretrain.verify_layouts import parse_layout, world_of
from potamos.pretrain.verify_small import batch

Patch = pytest.MonkeyPatch


# --- systems ---------------------------------------------------------------------------------------------------------


class Shared(Mixer):
    """Attention with what goes wrong elsewhere: a temperature and a gain that all heads share, inside the split region,
    and a sink for each head that takes part of the attention and has no row of its own."""

    traits = Traits(shard="head")
    tags: ClassVar[dict[str, int]] = {"sink": 0}

    class Options(interfaces.Options):
        kind: str = "shared"
        heads: int = Field(default=4, gt=0)

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__()
        self.head_dim = context.width // options.heads
        self.traits = replace(type(self).traits, units=options.heads)
        self.q, self.k, self.v = (Linear(context.width, context.width, role="column") for _ in range(3))
        self.temperature = nn.Parameter(torch.empty(1))
        self.sink = nn.Parameter(torch.empty(options.heads))
        self.gain = nn.Parameter(torch.empty(self.head_dim))
        self.out = Linear(context.width, context.width, role="row", into_residual=True)

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator, std: float, layers: int) -> None:
        del name, std, layers
        parameter.normal_(1.0, 0.1, generator=generator)

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        scores = self.temperature * q @ k.mT / math.sqrt(self.head_dim)
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if seq.document_ids is not None:
            visible = visible & (seq.document_ids[:, :, None] == seq.document_ids[:, None])[:, None]
        scores = scores.masked_fill(~visible, -torch.inf)
        sink = self.sink[:, None, None].expand(*scores.shape[:3], 1)
        y = torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v
        return Out(self.out((y * self.gain).transpose(1, 2).flatten(2)))


def _stubs() -> Any:
    """tests/ is no package (--import-mode=importlib), so the systems are loaded by their path."""
    if "stub_systems" not in sys.modules:
        path = Path(__file__).parent.parent / "pretrain" / "stub_systems.py"
        spec = importlib.util.spec_from_file_location("stub_systems", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["stub_systems"] = module  # pydantic looks annotations up there
        spec.loader.exec_module(module)
    return sys.modules["stub_systems"]


@pytest.fixture(autouse=True)
def systems(monkeypatch: Patch) -> None:
    """The test's own systems are registered while a test runs, and gone afterwards."""
    register_systems(monkeypatch)


def register_systems(patch: Patch) -> None:
    registry.names("mixer")
    registry.names("objective")
    patch.setattr(registry, "_table", {room: dict(entries) for room, entries in registry._table.items()})
    for (room, name), system in {**_stubs().REGISTERED, ("mixer", "shared"): Shared}.items():
        registry.register(room, name)(system)


SMALL = (
    "model.width=16",
    "model.frontend={kind: tokens, vocabulary: 40, embedding_dropout: 0.1}",
    "model.residual_dropout=0.1",
    "model.channel={kind: mlp, ratio: 2}",
    "model.mixer={kind: h3, state: 4, shift_state: 6}",
    "data.sequence_length=16",
    "optimizer={kind: adamw, lr: 1.0e-3, clip: 0.05}",
    "schedule={kind: constant}",
)
SHARED = ("model.at={1: {mixer: {kind: shared}}}",)
ROTATED = ("model.at={1: {mixer: {kind: attention, heads: 4, dropout: 0.1}, positions: {kind: rope}}}",)
LUNA = (
    "model.mixer={kind: luna}",
    "model.at={}",
    "model.stack={kind: luna, slots: 3}",
    "model.init={kind: gpt2, std: 0.5}",  # near zero all slots are alike, and what tells them apart has no gradient
    "objective={kind: masked, mask: 39}",
)


def certify(words: str, changes: tuple[str, ...] = SHARED, *, layers: int = 2, dtype: Any = "fp64", **more: Any) -> Any:
    return verify_small(small(words, changes, layers), parse_layout(words.split()), dtype=dtype, **more)


def small(words: str, changes: tuple[str, ...], layers: int = 2) -> Recipe:
    layout = parse_layout(words.split())
    rows, micro = batch(layout, sizes(layout, world_of(layout)), 6)
    train = f"train={{steps: 3, sequences: {rows}, micro_sequences: {micro}, seed: 5, device: cpu}}"
    return load_recipe("h3_hybrid_tiny", [*SMALL, f"model.layers={layers}", *changes, train])


# --- mistakes --------------------------------------------------------------------------------------------------------


def partial_sums_left(patch: Patch) -> None:
    """What ranks hold alike keeps each rank's part of its gradient."""
    relabel(patch, lambda name, cut: replace(cut, partial=False))


def row_bias_inside(patch: Patch) -> None:
    """The bias of a row layer, added after the sum, is taken for a part of the region: its gradient is summed."""
    relabel(patch, lambda name, cut: replace(cut, partial=cut.partial or name.endswith(("out.bias", "down.bias"))))


def relabel(patch: Patch, change: Callable[[str, Any], Any]) -> None:
    split = tensor.split
    patch.setattr(tensor, "split", lambda *a: {name: change(name, cut) for name, cut in split(*a).items()})


def shards_average(patch: Patch) -> None:
    """FSDP as it comes divides by its ranks."""
    shard = data.shard

    def averaging(*arguments: Any) -> Any:
        root = shard(*arguments)
        for module in root.modules():
            if isinstance(module, data.FSDPModule):
                module.set_gradient_divide_factor(2.0)
        return root

    patch.setattr(data, "shard", averaging)


def replicas_average(patch: Patch) -> None:
    """DDP as it comes divides by its ranks."""
    add = data._sum_bucket
    patch.setattr(data, "_sum_bucket", lambda group, bucket: add(group, bucket).then(lambda f: f.value() / 2))


def schedule_scales(patch: Patch) -> None:
    """Schedules as they come divide by the number of micro-batches."""
    for name, schedule in pipeline.SCHEDULES.items():
        kind = schedule.kind
        scaling = replace(schedule, kind=lambda *a, kind=kind, **k: kind(*a, **{**k, "scale_grads": True}))
        patch.setitem(pipeline.SCHEDULES, name, scaling)


def vocabulary_summed_backward(patch: Patch) -> None:
    """The sum over the vocabulary's slices sums the gradient too, as torch.distributed.nn's all-reduce does."""
    nll = Tokens.nll
    patch.setattr(Tokens, "nll", lambda self, *a: axes._SumGradient.apply(nll(self, *a), self.tp.group))


def counts_of_own(patch: Patch) -> None:
    """Each data rank divides by the number of its own targets, and the two by their number."""

    def own(self: Any, batches: Any) -> Any:
        return {"tokens": 2.0 * max(1, sum(batch.counts["tokens"] for batch in batches))}, 1.0

    patch.setattr(trainer.Trainer, "total_counts", own)


def tied_apart(patch: Patch) -> None:
    """The two ends of a pipeline keep their own gradients of the table that they share."""
    finish = gradients.Gradients.finish

    def without(self: Any) -> None:
        self.tied_group = None
        finish(self)

    patch.setattr(gradients.Gradients, "finish", without)


def tied_twice(patch: Patch) -> None:
    """Both ends of a pipeline count the table that they share in the norm."""
    counts = gradients.Gradients._counts

    def twice(self: Any, name: str) -> bool:
        self.counts_tied = True
        return counts(self, name)

    patch.setattr(gradients.Gradients, "_counts", twice)


def enter_without_sum(patch: Patch) -> None:
    """Each rank's part of a region's input gradient goes on as if it were all of it."""
    patch.setattr(axes._SumGradient, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


def no_halo(patch: Patch) -> None:
    """The convolution of a slice begins as at the row's start."""
    halos = h3_sequence.halos
    patch.setattr(h3_sequence, "halos", lambda tails, first: halos(tails, first) * 0 + first[:1] * 0)


def no_carry(patch: Patch) -> None:
    """The state of a slice begins as at the row's start."""
    combine = ssm_sequence.combine
    for module in (ssm_sequence, h3_sequence):
        patch.setattr(module, "combine", lambda *a: combine(*a) * 0)


def positions_of_the_slice(patch: Patch) -> None:
    """Positions count from where the rank's slice begins."""
    reposition(patch, lambda seq: replace(seq, positions=torch.arange(seq.positions.shape[1]).expand_as(seq.positions)))


def columns_of_the_slice(patch: Patch) -> None:
    """Randomness is keyed by the column in the slice, not in the row."""
    reposition(patch, lambda seq: replace(seq, columns=torch.arange(seq.positions.shape[1])))


def reposition(patch: Patch, change: Callable[[Seq], Seq]) -> None:
    slices = base.Batch.slices

    def wrong(self: base.Batch, *arguments: Any) -> base.Batch:
        cut = slices(self, *arguments)
        return replace(cut, seq=change(cut.seq))

    patch.setattr(base.Batch, "slices", wrong)


def samples_of_the_rank(patch: Patch) -> None:
    """Randomness is keyed by the row's place on its rank."""
    prepare = trainer.Trainer.prepare

    def wrong(self: Any, rows: Any) -> Any:
        return prepare(self, replace(rows, samples=rows.samples % len(rows)))

    patch.setattr(trainer.Trainer, "prepare", wrong)


def every_rank_draws_its_own(patch: Patch) -> None:
    """Initial values depend on the rank."""
    from potamos.pretrain import setup

    filler = setup.filler
    patch.setattr(
        setup,
        "filler",
        lambda recipe, device: filler(
            recipe.model_copy(
                update={"train": recipe.train.model_copy(update={"seed": 5 + torch.distributed.get_rank()})}
            ),
            device,
        ),
    )


def norm_forgets_slices(patch: Patch) -> None:
    """The norm takes one rank's slice of what is cut for the whole, as where heads' own parameters were forgotten."""
    counts = gradients.Gradients._counts

    def without(self: Any, name: str) -> bool:
        return counts(self, name) and not (self.cuts[name].dim is not None and self.mesh.index("tp") > 0)

    patch.setattr(gradients.Gradients, "_counts", without)


def clipping_forgotten(patch: Patch) -> None:
    """The norm is taken, and nothing is scaled by it."""
    patch.setattr(gradients.Gradients, "clip", lambda self, total, limit: None)


def clipping_of_one_slice(patch: Patch) -> None:
    """Only what is stored whole is scaled."""

    def clip(self: Any, total: Tensor, limit: float) -> None:
        factor = (limit / (total + 1e-6)).clamp(max=1.0)
        for name, parameter in self.parameters.items():
            if self.cuts[name].dim is None:
                parameter.grad.mul_(factor)

    patch.setattr(gradients.Gradients, "clip", clip)


def streams_without_gradient(patch: Patch) -> None:
    """Of what crosses a border between stages, only the hidden states hand their gradient back."""
    sent = pipeline._sent
    patch.setattr(pipeline, "_sent", lambda x: sent(x) if x.shape[1] != 3 else sent(x).detach() + 0 * sent(x))


@dataclass(frozen=True)
class Control:
    """A mistake, the layout that it is made in, and what sees it: parts of the certificate whose error is beyond what
    single precision explains. few: it touches some of the parameters only."""

    mistake: Callable[[Patch], None]
    words: str
    seen: str
    few: bool = False
    changes: tuple[str, ...] = SHARED


EVERYTHING = "gradients norm updates losses"
CONTROLS = [
    Control(partial_sums_left, "tp=2", EVERYTHING + " copies", few=True),
    Control(partial_sums_left, "tp=2 sequence_parallel=false", "gradients updates copies", few=True),
    Control(shards_average, "dp_shard=2", "gradients norm"),
    Control(replicas_average, "dp_replicate=2", "gradients norm"),
    Control(schedule_scales, "pp=2", "gradients norm"),
    Control(vocabulary_summed_backward, "tp=2", "gradients norm"),
    Control(counts_of_own, "dp_shard=2", EVERYTHING),
    Control(tied_apart, "pp=2", EVERYTHING + " copies", few=True),
    Control(tied_twice, "pp=2", "norm updates", few=True),
    Control(row_bias_inside, "tp=2 sequence_parallel=false", "gradients norm updates", few=True),
    Control(enter_without_sum, "tp=2 sequence_parallel=false", EVERYTHING + " copies"),
    Control(no_halo, "cp=2", "gradients norm updates", changes=ROTATED),
    Control(no_carry, "cp=2", "gradients norm updates", changes=ROTATED),
    Control(positions_of_the_slice, "cp=2 cp_kinds=ring", "gradients norm updates", changes=ROTATED),
    Control(columns_of_the_slice, "cp=2", EVERYTHING, changes=ROTATED),
    Control(samples_of_the_rank, "dp_replicate=2", EVERYTHING),
    Control(every_rank_draws_its_own, "tp=2", EVERYTHING + " copies start"),
    Control(norm_forgets_slices, "tp=2", "norm updates"),
    Control(clipping_forgotten, "dp_shard=2", "norm updates"),
    Control(clipping_of_one_slice, "tp=2", "norm updates losses"),
    Control(streams_without_gradient, "pp=2", EVERYTHING, few=True, changes=LUNA),
]


def seen_in(found: Certificate) -> set[str]:
    """The parts of a certificate that tell, beyond what single precision explains."""
    judged = [line for line in found.lines if line.exempt is None]
    errors = {
        "gradients": max(line.gradient_error for line in judged) / 1e-5,
        "updates": max(line.update_error for line in judged) / 1e-3,
        "norm": found.norms.error / 1e-5,
        "losses": found.losses.error / 1e-5,
    }
    notes = " ".join(line.note or "" for line in found.lines)
    told = {part for part, words in (("copies", "come to differ"), ("start", "begins with")) if words in notes}
    return {part for part, error in errors.items() if not error <= 1} | told


@pytest.mark.parametrize("control", CONTROLS, ids=lambda c: f"{c.mistake.__name__}, {c.words}")
def test_a_mistake_is_seen(monkeypatch, control):
    definition(small(control.words, control.changes), "fp64")  # by an honest process
    control.mistake(monkeypatch)
    found = certify(control.words, control.changes)
    assert not found.passed
    assert seen_in(found) == set(control.seen.split())
    wrong = [line for line in found.lines if not line.gradient_passed]
    if "gradients" in control.seen and not control.few:
        assert len(wrong) > len(found.lines) / 2


@pytest.mark.parametrize(("words", "changes"), sorted({(c.words, c.changes) for c in CONTROLS}))
def test_without_a_mistake_it_passes(words, changes):
    found = certify(words, changes)
    assert found.passed, found.failures


@pytest.mark.parametrize(
    ("words", "where", "name", "wrong"),
    [
        ("cp=2", Spread, "first_slices", True),  # every slice counts the targets of the whole row
        ("dp_shard=2", evaluate, "_shares", lambda *a, shares=evaluate._shares: ((*s[:2], True) for s in shares(*a))),
        ("tp=2", evaluate, "evaluating", lambda system: torch.no_grad()),  # dropout goes on
    ],
)
def test_a_mistake_of_validation_is_seen(monkeypatch, words, where, name, wrong):
    monkeypatch.setattr(where, name, wrong)
    (failure,) = certify(words, ROTATED).failures
    assert failure.startswith("scores of held-out rows differ")


def test_a_rank_whose_graph_lacks_an_exchange_stops_the_others(monkeypatch):
    """One rank that has no use for a state still takes part in its gradient; else the others wait for it."""
    gather = context.gather_states

    def useless(*states: Tensor, group: Any = None) -> tuple[Tensor, ...]:
        found = gather(*states, group=group)
        return tuple(part.detach() for part in found) if torch.distributed.get_rank(group) == 0 else found

    monkeypatch.setattr(context, "gather_states", useless)
    with pytest.raises(
        (RankTimeout, RuntimeError), match=r"did not return within|[Tt]imed out|closed|mismatch|not match"
    ):
        certify("cp=2", ROTATED, timeout=6.0)


# --- what other programs got wrong ------------------------------------------------------------------------------------


def test_the_degree_of_tensor_parallelism_does_not_change_the_loss():
    """A loss that depends on how many ranks share a layer."""
    found = [certify(words) for words in ("tp=2", "tp=4", "tp=2 sequence_parallel=false")]
    for certificate in found:
        assert certificate.passed, certificate.failures
        assert certificate.losses.spread == pytest.approx(found[0].losses.alone, rel=1e-13)


def test_replicas_shards_and_shards_in_replicas_have_one_norm():
    """A norm that is larger by the number of ranks where parameters are copied, not cut."""
    found = [certify(words) for words in ("dp_replicate=4", "dp_shard=4", "dp_replicate=2 dp_shard=2")]
    for certificate in found:
        assert certificate.passed, certificate.failures
        assert certificate.norms.spread == pytest.approx(found[0].norms.alone, rel=1e-13)


@pytest.mark.parametrize("words", ["pp=2", "pp=2 schedule=zero_bubble", "pp=2 dp_shard=2 cp=2"])
def test_shards_stages_and_slices_together_where_fresh_memory_is_not_a_number(words):
    """A wrong loss of the three together, and NaN from stages once memory that nobody wrote to is filled with it."""
    definition(small(words, ROTATED, layers=4), "fp64")
    torch.use_deterministic_algorithms(True)
    try:
        found = certify(words, ROTATED, layers=4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.passed, found.failures


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("words", ["pp=2 dp_shard=2", "pp=2 tp=2"])
def test_the_table_of_both_ends_stays_one(words, tied):
    """A tied embedding whose gradient lacks the other end's, so that the head comes to differ from it."""
    found = certify(words, (*SHARED, f"model.frontend={{kind: tokens, vocabulary: 40, tied: {tied}}}"))
    assert found.passed, found.failures
    ends = [line for line in found.lines if line.name.startswith("model.frontend.")]
    assert len(ends) == (1 if tied == "true" else 2)
    assert all(line.note is None for line in ends), "bit for bit"


def test_fewer_key_heads_than_ranks_are_refused_by_name():
    """Key heads that several ranks would have to share: training that explodes after thousands of steps."""
    keys = "model.at={1: {mixer: {kind: attention, heads: 4, kv_heads: 1}}}"
    with pytest.raises(LayoutError, match=r"parallel\.tp: 2 does not divide the 1 key-value heads of .*1\.mixer"):
        certify("tp=2", (keys,))
    assert certify("tp=2", (keys.replace("kv_heads: 1", "kv_heads: 2"),)).passed


@pytest.mark.parametrize("words", ["tp=2", "tp=2 sequence_parallel=false", "dp_shard=2 tp=2", "pp=2 tp=4"])
def test_what_heads_share_inside_a_region_gets_the_gradient_of_all(words):
    """A scale or a norm inside a split layer, the same for all heads: each rank sees its own heads' gradient only. And
    a parameter of each head's own (a sink) counts in the norm, whole."""
    found = certify(words)
    assert found.passed, found.failures
    inside = {line.name.rpartition(".")[2] for line in found.lines if ".1.mixer." in line.name}
    assert {"temperature", "gain", "sink"} <= inside


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["pp=2", "pp=2 schedule=interleaved_1f1b", "pp=2 schedule=zbv", "dp_shard=2 pp=4"])
def test_a_second_stream_crosses_the_borders_of_stages(words):
    """Hidden states and a memory that every layer reads and writes; the memory's first value is a parameter of the
    first stage alone, which gets its gradient through all stages."""
    found = certify(words, LUNA, layers=4)
    assert found.passed, found.failures
    assert any(line.name == "model.stack.memory.weight" for line in found.lines)


@pytest.mark.parametrize(("words", "trait"), [("cp=2", "its trait cp is empty")])
def test_what_a_system_does_not_allow_is_refused_by_its_trait(words, trait):
    with pytest.raises(LayoutError, match=trait):
        certify(words, LUNA)
