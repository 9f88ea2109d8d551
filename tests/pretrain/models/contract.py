"""What every mixer, channel mixer, position scheme and pattern must do, whatever it is.

``subjects()`` makes one case for each registered name and for each choice among its options, so that a new file is held
to the contract without a word here. Each ``check_*`` takes a `Subject` and raises AssertionError; test_contract.py runs
all of them on everything registered, test_planted.py on broken mixers, which must not pass.

Loaded by path from conftest.py, since tests are no package.
"""

from __future__ import annotations

import copy
import itertools
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from potamos.parallel.facts import Traits, parameter_table
from potamos.pretrain.models import registry
from potamos.pretrain.models.initialize import Gpt2, initialize
from potamos.pretrain.models.interfaces import ChannelMixer, Context, Mixer, Out, Seq, State
from potamos.pretrain.models.linear import Linear, set_compute_dtype

WIDTH, ROWS, LENGTH = 16, 3, 70  # longer than a state-space chunk of 64
TOLERANCE = 1e-10
REQUIRED = {int: (4, 128), float: (0.5,)}  # tried in turn for options without a default

SHARDS, SPLITS = ("head", "channel", "ff", "none"), ("state", "a2a", "ring", "pointwise")

# Starts of documents in each row, at and beside the edges of chunks of 16 and 64; and where padding begins.
STARTS, PADDING = ((0, 1, 16, 17, 64), (0, 33), (0,)), (LENGTH, 66, LENGTH)


# --- what is held to the contract --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One registered name with options; the name of a test."""

    room: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        chosen = ",".join(f"{k}={v}" for k, v in self.options.items() if k != "kind")
        return f"{self.room}-{self.name}" + (f"({chosen})" if chosen else "")


class Subject(nn.Module):
    """A region, and the embedding that its position scheme adds, behind one signature."""

    def __init__(self, region: Mixer | ChannelMixer, embedding: nn.Module | None = None) -> None:
        super().__init__()
        self.region, self.embedding = region, embedding

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        x = x if self.embedding is None else x + self.embedding(seq.positions)
        return self.region(x, seq, state) if isinstance(self.region, Mixer) else self.region(x, seq)

    def step(self, x: Tensor, seq: Seq, state: State) -> Out:
        x = x if self.embedding is None else x + self.embedding(seq.positions)
        return self.region.step(x, seq, state) if isinstance(self.region, Mixer) else self.region(x, seq)


def subjects(*rooms: str) -> list[Case]:
    """Every registered name of the rooms with its defaults, and again for every other choice of a yes/no or listed
    option."""
    cases = []
    for room in rooms:
        for name in registry.names(room):
            options = registry.lookup(room, name).Options
            base = _required(room, name)
            cases.append(Case(room, name, base))
            for key, info in options.model_fields.items():
                others = [value for value in _choices(info.annotation) if key != "kind" and value != info.default]
                cases += [Case(room, name, {**base, key: value}) for value in others]
    return cases


def _required(room: str, name: str) -> dict[str, Any]:
    """Values for the options without a default: the first that the system itself accepts."""
    fields = registry.lookup(room, name).Options.model_fields
    needed = [key for key, info in fields.items() if info.is_required() and key != "kind"]
    missing = [key for key in needed if fields[key].annotation not in REQUIRED]
    assert not missing, f"{room} {name}: {missing} need a default, or an entry in REQUIRED, to be tested"
    for values in itertools.product(*(REQUIRED[fields[key].annotation] for key in needed)):
        options = dict(zip(needed, values, strict=True))
        try:
            make(Case(room, name, options))
        except ValueError:
            continue
        return options
    raise AssertionError(f"{room} {name}: none of {REQUIRED} is accepted for {needed}")


def _choices(annotation: Any) -> tuple[Any, ...]:
    if annotation is bool:
        return (False, True)
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def options_of(case: Case) -> Any:
    """The case's options, checked by the system as a recipe would be."""
    system = registry.lookup(case.room, case.name)
    options = system.Options(kind=case.name, **case.options)
    check = getattr(system, "check", None)
    if check is not None:
        check(options, WIDTH, LENGTH)
    return options


def region_of(case: Case, layer: int = 0) -> tuple[Any, nn.Module | None]:
    """(region, embedding) of a case on the current default device; positions and patterns act inside attention."""
    options = {case.room: options_of(case)}
    positions = options.get("positions", registry.lookup("positions", "none").Options(kind="none"))
    pattern = options.get("pattern", registry.lookup("pattern", "full").Options(kind="full"))
    context = Context(
        width=WIDTH,
        layers=2,
        layer=layer,
        sequence_length=LENGTH,
        positions=registry.lookup("positions", positions.kind)(positions),
        pattern=registry.lookup("pattern", pattern.kind)(pattern),
    )
    room, host = (case.room, options[case.room]) if case.room in ("mixer", "channel") else ("mixer", _attention())
    region = registry.lookup(room, host.kind)(host, context)
    return region, context.positions.embedding(context) if context.positions is not None else None


def _attention() -> Any:
    return registry.lookup("mixer", "attention").Options(kind="attention", heads=4)


def make(case: Case) -> Subject:
    """The case in fp64, at values of which none is special: initial ones with noise, biases included."""
    with torch.device("meta"):
        subject = Subject(*region_of(case))
    return fill(subject)


def fill(subject: Subject) -> Subject:
    """Initial values (std 0.3, so that nothing is small) and noise on top; fp64; evaluation mode."""
    initialize(subject, Gpt2(Gpt2.Options(std=0.3), layers=2), seed=5)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in subject.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return subject.double().eval()


# --- sequences -----------------------------------------------------------------------------------------------------


def inputs(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def plain() -> Seq:
    """One document a row."""
    return Seq(positions=torch.arange(LENGTH).repeat(ROWS, 1))


def packed() -> Seq:
    """Several documents a row, numbered through as a loader does; row 1 ends in padding."""
    ids, positions = torch.full((ROWS, LENGTH), -1, dtype=torch.int32), torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    for number, (row, begin, end) in enumerate(spans()):
        ids[row, begin:end] = 7 + number
        positions[row, begin:end] = torch.arange(end - begin)
    return Seq(positions=positions, document_ids=ids)


def spans() -> list[tuple[int, int, int]]:
    """(row, begin, end) of every document of `packed`."""
    return [
        (row, begin, end)
        for row, starts in enumerate(STARTS)
        for begin, end in itertools.pairwise([*starts, PADDING[row]])
    ]


def part(seq: Seq, begin: int, end: int) -> Seq:
    """Columns ``begin`` to ``end`` of every row."""
    return Seq(
        positions=seq.positions[:, begin:end],
        document_ids=None if seq.document_ids is None else seq.document_ids[:, begin:end],
        columns=torch.arange(begin, end),
    )


def real(seq: Seq) -> Tensor:
    """(ROWS, LENGTH, 1) fp64: 1 where there is a token, 0 on padding, whose outputs mean nothing."""
    ids = torch.zeros(ROWS, LENGTH) if seq.document_ids is None else seq.document_ids
    return (ids >= 0).double()[..., None]


def gradients(subject: Subject, x: Tensor, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """d sum(y * weight) / d every parameter, and d x."""
    leaves = {"x": x, **dict(subject.named_parameters())}
    found = torch.autograd.grad((y * weight).sum(), [*leaves.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    """Every entry equal to 1e-10 relative to the largest element; not vacuous, NaN fails."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        scale = max(1.0, expected.abs().max().item())
        error = (got[name] - expected).abs().max().item()
        assert error <= TOLERANCE * scale, f"{what}: {name} is off by {error:.2e} at scale {scale:.1e}"
    assert max(v.abs().max().item() for v in want.values()) > 1e-3, f"{what}: nothing to compare"


def weights() -> Tensor:
    return inputs(seed=2)


def whole(subject: Subject, seq: Seq) -> dict[str, Tensor]:
    """Output and every gradient of the parallel form."""
    x = inputs().requires_grad_()
    y = subject(x, seq).hidden
    return {"y": y.detach() * real(seq), **gradients(subject, x, y, weights() * real(seq))}


# --- the contract ----------------------------------------------------------------------------------------------------


def check_shapes(subject: Subject) -> None:
    """(B, L, D) in and out, for every length; calls do not change their arguments and give the same bits twice."""
    for length in (1, 2, 17, LENGTH):
        x, seq = inputs()[:, :length], part(packed(), 0, length)
        before = x.clone()
        out = subject(x, seq)
        assert out.hidden.shape == x.shape
        assert out.hidden.dtype == x.dtype
        assert torch.equal(x, before), "the input was changed in place"
        assert torch.equal(subject(x, seq).hidden, out.hidden), "two calls differ: something is remembered"


def check_causality(subject: Subject) -> None:
    """A token changes no bit before it, and has exactly no gradient from there."""
    for seq in (plain(), packed()):
        x = inputs().requires_grad_()
        y = subject(x, seq).hidden
        for t in (1, 16, 40, 63, 64, LENGTH - 1):
            changed = x.detach().clone()
            changed[:, t:] = inputs(seed=3)[:, t:]
            after = subject(changed, seq).hidden
            assert torch.equal(after[:, :t], y[:, :t]), f"tokens from {t} on change outputs before them"
            assert not torch.equal(after[:, t:], y[:, t:]), f"tokens from {t} on change nothing"
            (gradient,) = torch.autograd.grad(y[:, :t].sum(), x, retain_graph=True)
            assert torch.count_nonzero(gradient[:, t:]) == 0, f"outputs before {t} have a gradient after it"


def check_splits(subject: Subject) -> None:
    """Whole = segments with carried state, wherever they are cut: outputs and every gradient."""
    for seq in (plain(), packed()):
        expected = whole(subject, seq)
        for cuts in ((0, 1, LENGTH), (0, 31, 33, 64, 65, LENGTH), (0, 16, 32, 48, 64, LENGTH)):
            x, state, parts = inputs().requires_grad_(), None, []
            for begin, end in itertools.pairwise(cuts):
                out = subject(x[:, begin:end], part(seq, begin, end), state)
                state = out.state
                parts.append(out.hidden)
            y = torch.cat(parts, 1)
            found = {"y": y.detach() * real(seq), **gradients(subject, x, y, weights() * real(seq))}
            assert_near(found, expected, f"cut at {cuts[1:-1]}")


def check_steps(subject: Subject) -> None:
    """Whole = a prefix, then one token at a time by the recurrent form: outputs and every gradient."""
    for seq in (plain(), packed()):
        expected = whole(subject, seq)
        for prefix in (1, 37):
            x = inputs().requires_grad_()
            out = subject(x[:, :prefix], part(seq, 0, prefix))
            parts = [out.hidden]
            for t in range(prefix, LENGTH):
                out = subject.step(x[:, t : t + 1], part(seq, t, t + 1), out.state)
                parts.append(out.hidden)
            y = torch.cat(parts, 1)
            found = {"y": y.detach() * real(seq), **gradients(subject, x, y, weights() * real(seq))}
            assert_near(found, expected, f"prefix {prefix}, then steps")


def check_isolation(subject: Subject) -> None:
    """Other documents' tokens change no bit of a document's outputs, nor of any gradient of a loss on it."""
    seq = packed()
    for row, begin, end in spans():
        weight = torch.zeros(ROWS, LENGTH, WIDTH, dtype=torch.float64)
        weight[row, begin:end] = weights()[row, begin:end]
        results = []
        for other in (1, 3):
            x = inputs(seed=other)
            x[row, begin:end] = inputs()[row, begin:end]
            x.requires_grad_()
            y = subject(x, seq).hidden
            found = gradients(subject, x, y, weight)
            outside = found["x"].clone()
            outside[row, begin:end] = 0
            assert torch.count_nonzero(outside) == 0, f"document {row}:{begin}-{end} has a gradient outside itself"
            results.append((y[row, begin:end].detach(), found))
        (y_a, a), (y_b, b) = results
        assert torch.equal(y_a, y_b), f"document {row}:{begin}-{end} changes with another"
        for name in a:
            assert torch.equal(a[name], b[name]), f"document {row}:{begin}-{end}: gradient of {name} changes"


def check_packing(subject: Subject) -> None:
    """Documents packed in rows = each alone: outputs and the sum of every gradient. Where columns of the row count,
    each alone at its own columns."""
    seq = packed()
    expected = whole(subject, seq)
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    for row, begin, end in spans():
        x = inputs()[row : row + 1, begin:end].clone().requires_grad_()
        if getattr(subject.region, "counts_columns", False):
            padded, seq_alone = _in_its_columns(x, begin, end)
            y = subject(padded, seq_alone).hidden[:, begin:end]
        else:
            y = subject(x, Seq(positions=torch.arange(end - begin)[None])).hidden
        found["y"][row, begin:end] = y.detach()[0]
        for name, value in gradients(subject, x, y, weights()[row : row + 1, begin:end]).items():
            place = found[name][row : row + 1, begin:end] if name == "x" else found[name]
            place += value
    assert_near(found, expected, "documents alone")


def _in_its_columns(x: Tensor, begin: int, end: int) -> tuple[Tensor, Seq]:
    """A row of padding with the document x (1, n, D) in columns ``begin`` to ``end``."""
    positions, ids = torch.zeros(1, LENGTH, dtype=torch.int64), torch.full((1, LENGTH), -1, dtype=torch.int32)
    positions[0, begin:end], ids[0, begin:end] = torch.arange(end - begin), 3
    return nn.functional.pad(x, (0, 0, begin, LENGTH - end)), Seq(positions=positions, document_ids=ids)


def check_state(subject: Subject) -> None:
    """State is a tree of batch-first tensors of one structure, that no call changes; rows do not meet in it."""
    seq, x = packed(), inputs()
    first = subject(x[:, :1], part(seq, 0, 1)).state
    if first is None:
        assert not subject.region.traits.carries, "traits say that state is carried, but there is none"
        return
    assert subject.region.traits.carries, "there is state, but traits do not say that it is carried"
    longer = subject(x[:, :40], part(seq, 0, 40)).state
    kept = [leaf.clone() for leaf in pytree.tree_leaves(longer)]
    stepped = subject.step(x[:, 40:41], part(seq, 40, 41), longer).state
    continued = subject(x[:, 40:], part(seq, 40, LENGTH), longer).state
    for tree in (first, longer, stepped, continued):
        assert pytree.tree_structure(tree) == pytree.tree_structure(first)
        for leaf in pytree.tree_leaves(tree):
            assert isinstance(leaf, Tensor)
            assert leaf.shape[0] == ROWS, f"a leaf of state has shape {tuple(leaf.shape)}: batch comes first"
    for leaf, before in zip(pytree.tree_leaves(longer), kept, strict=True):
        assert torch.equal(leaf, before), "continuing from a state changed it"
    # Rows in another order: the same states in that order, so that they may be dealt to other micro-batches.
    order = torch.tensor([2, 0, 1])
    seq = Seq(positions=seq.positions[order], document_ids=packed().document_ids[order])  # pyright: ignore
    permuted = subject(x[order, :40], part(seq, 0, 40)).state
    for leaf, want in zip(pytree.tree_leaves(permuted), pytree.tree_leaves(longer), strict=True):
        torch.testing.assert_close(leaf, want[order], rtol=TOLERANCE, atol=TOLERANCE)


def check_segment_state(subject: Subject) -> None:
    """What a training segment hands on: nothing, or a batch-first tree from which the next segment runs."""
    if not isinstance(subject.region, Mixer):
        return
    seq, x = packed(), inputs()
    kept = subject.region.segment_state(subject(x[:, :40], part(seq, 0, 40)).state)
    leaves = [] if kept is None else pytree.tree_leaves(kept)
    assert all(leaf.shape[0] == ROWS for leaf in leaves)
    out = subject(x[:, 40:], part(seq, 40, LENGTH), pytree.tree_map(Tensor.detach, kept) if leaves else None)
    assert out.hidden.isfinite().all()
    again = subject.region.segment_state(out.state)
    assert (again is None) == (kept is None)


def check_gradients(subject: Subject) -> None:
    """Every parameter has a gradient, and gradcheck agrees with it along a random direction."""
    found = whole(subject, packed())
    silent = [name for name, value in found.items() if not value.abs().max() > 0]
    assert not silent, f"no gradient: {silent}"
    generator = torch.Generator().manual_seed(4)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in subject.named_parameters()}
    slope = sum((direction[name] * found[name]).sum().item() for name in direction)
    size, sides = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy(subject)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter.add_(sign * size * direction[name])
            sides.append((moved(inputs(), packed()).hidden * weights() * real(packed())).sum().item())
    measured = (sides[0] - sides[1]) / (2 * size)
    assert abs(slope - measured) <= 1e-6 * max(1.0, abs(measured)), f"slope {slope}, by differences {measured}"


def check_bf16(subject: Subject) -> None:
    """fp32 parameters with bf16 products: finite, near fp32, gradients in fp32."""
    subject = copy.deepcopy(subject).float()
    x, seq = inputs(dtype=torch.float32), packed()
    exact = subject(x, seq).hidden * real(seq).float()
    set_compute_dtype(subject, torch.bfloat16)
    low = subject(x, seq).hidden * real(seq).float()
    assert low.isfinite().all()
    error = ((low - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert error < 0.05, f"bf16 is off by {error:.3f} of the output"
    low.float().square().sum().backward()
    for name, parameter in subject.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"


def check_state_dict(subject: Subject) -> None:
    """A state dict carries everything, and names nothing else."""
    other = copy.deepcopy(subject)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(float("nan"))
    other.load_state_dict(subject.state_dict(), strict=True)
    assert torch.equal(other(inputs(), packed()).hidden, subject(inputs(), packed()).hidden)
    assert subject.state_dict().keys() == dict(subject.named_parameters()).keys(), "a buffer would need a checkpoint"


def check_facts(subject: Subject) -> None:
    """Traits, tags and optimizer facts are valid and speak of what is there."""
    traits = subject.region.traits
    assert isinstance(traits, Traits)
    assert traits.shard in SHARDS
    assert all(split in SPLITS for split in traits.cp)
    assert traits.units is None or traits.units > 0
    assert traits.shard == "none" or traits.units is not None, "what can be split must say into how many units"
    table = parameter_table(subject)
    assert table.keys() == dict(subject.named_parameters()).keys()
    roles = {m.role for m in subject.region.modules() if isinstance(m, Linear)}
    if traits.shard != "none":
        assert {"column", "row"} <= roles, "a split region is entered by column layers and left by row layers"
    for path, module in subject.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for declared in ("opt", "tags"):
            for name in getattr(module, declared, {}):
                assert hasattr(module, name), f"{path}.{declared} names {name!r}, which is no parameter"
        for name, dim in getattr(module, "tags", {}).items():
            if name in own:
                assert 0 <= dim < own[name].dim(), f"{path}.tags[{name!r}] is {dim}, the shape {tuple(own[name].shape)}"
    core = getattr(subject.region, "core", None)
    if core is not None:
        assert core.precision == "float32"
        for name, parameter in core.named_parameters():
            facts = table[f"region.core.{name}"]
            assert facts.precision == "float32"
            assert facts.dim is not None, f"core.{name} has no tag: how would a layout split it?"
            assert parameter.shape[facts.dim] % (traits.units or 1) == 0, f"core.{name} does not split into units"


def check_flops(subject: Subject) -> None:
    """Mixing costs something, is finite and never falls with the length; a channel mixer may cost only its linears."""
    short, long = (subject.region.mixing_flops(length) for length in (64, 4096))
    linears = sum(2.0 * m.weight.numel() for m in subject.modules() if isinstance(m, Linear))
    assert 0.0 <= short <= long < float("inf")
    assert long <= 64 * max(short, linears), "more than linear in the length"
    assert long > 0.0 or isinstance(subject.region, ChannelMixer)


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
CAUSAL_ONLY = {"check_causality", "check_splits", "check_steps"}

# Sizes that take another path than the defaults do.
EXTRA = [
    Case("mixer", "h3", {"state": 4, "shift_state": 5, "head_dim": 4}),
    Case("mixer", "attention", {"heads": 4, "kv_heads": 2, "memory": 9}),
    Case("positions", "rope", {"fraction": 0.5}),
    Case("positions", "disentangled", {"buckets": 0, "furthest": 12, "share_att_key": False}),
    Case("positions", "disentangled", {"buckets": 8, "furthest": 40}),
    Case("positions", "t5", {"buckets": 8, "furthest": 30}),
    Case("pattern", "local", {"form": "sliding", "size": 9, "first": 2}),
    Case("pattern", "blockwise", {"size": 16, "behind": 2}),
    Case("pattern", "bigbird", {"size": 8, "first": 0, "window": 1, "random": 2}),
    Case("pattern", "butterfly", {"size": 2, "first": 0, "factors": 3}),
]
