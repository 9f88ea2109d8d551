"""What a system implements: Mixer, Positions, Pattern, ChannelMixer, Stack, Frontend, Initializer.

A new system is one file that subclasses one of these and registers it (``registry.register``). The trunk and the
trainer know these classes and nothing else, so neither holds a test on a system's name.

Shapes: B rows, L columns (tokens of a row), D model width. Positions restart with each document; columns do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from potamos.kernels.dropout import DropoutKey
from potamos.parallel.facts import IDENTITY, Axis, Traits

if TYPE_CHECKING:
    from potamos.kernels.attention import Bias, Mask, Rotary

State = Any
"""An opaque tree of tensors, batch first. The trainer detaches, stores and drops it, and never looks inside."""


class Options(BaseModel):
    """The settings of one system in a recipe. Frozen; an unknown key or a wrong type is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: str


OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True)
class Seq:
    """Everything about the sequence that is not the hidden stream.

    positions: (B, L) int64, position inside the document (shown to position schemes).
    document_ids: (B, L) int32, equal numbers = same document, -1 = padding; None = every row is one document that
        begins with the row (the loader knows this without asking the device). No loader has a number come back after
        another one; if one did, attention would see both stretches and a carried state would be reset between them.
    samples: (B,) int64, global sample index of each row: the key of all randomness.
    columns: (L,) or (B, L) int64, which columns of the full row these are; None = 0..L-1. A slice or a shortened
        input carries its own, so that randomness and causality do not depend on how a row was cut.
    whole: the full-length description when this one describes only part of the row (late masking).
    streams: named tensors that travel with the hidden stream through every layer and across stages.
    seed, step: of the run; together with ``samples`` they key every random decision.
    """

    positions: Tensor
    document_ids: Tensor | None = None
    samples: Tensor | None = None
    columns: Tensor | None = None
    whole: Seq | None = None
    streams: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    step: int = 0

    def key(self, purpose: str, layer: int) -> DropoutKey:
        """The counter-based key of one random decision, independent of rank, worker, micro-batch and split."""
        samples = self.samples
        if samples is None:
            samples = torch.arange(self.positions.shape[0], device=self.positions.device)
        return DropoutKey(seed=self.seed, purpose=purpose, step=self.step, layer=layer, samples=samples)

    @property
    def row(self) -> Seq:
        """The description of the whole row, where this one is of slices of it."""
        return self if self.whole is None else self.whole

    @property
    def all_columns(self) -> Tensor:
        """(1 or B, L) int64: ``columns``, spelled out."""
        if self.columns is None:
            return torch.arange(self.positions.shape[1], device=self.positions.device)[None]
        return self.columns if self.columns.dim() == 2 else self.columns[None]

    def with_streams(self, streams: Mapping[str, Tensor]) -> Seq:
        """A copy in which ``streams`` replace or join the present ones."""
        return replace(self, streams={**self.streams, **streams}) if streams else self


@dataclass
class Out:
    """What a mixer, a channel mixer, a block, a stack or a model returns.

    hidden: (B, L', D); L' may differ from the input's length.
    columns: (B, L') which columns of the row ``hidden`` holds, when not all; columns, not positions.
    state: what the next segment of the same row needs; None where nothing is carried.
    streams: updates of named streams (``Seq.streams``).
    aux: extra loss terms, {name: (sum, name of the count that divides it)}.
    taps: activations that an objective asked for, {name: tensor}.
    """

    hidden: Tensor
    columns: Tensor | None = None
    state: State = None
    streams: dict[str, Tensor] = field(default_factory=dict)
    aux: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    taps: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Where a module stands: what its constructor may know beside its own options."""

    width: int
    layers: int
    layer: int = 0
    vocabulary: int = 0
    sequence_length: int = 0
    positions: Positions | None = None
    pattern: Pattern | None = None


class Region(nn.Module):
    """A module that a layout enters and leaves once per axis: mixers and channel mixers, and likewise frontends."""

    Options: ClassVar[type[Options]]
    room: ClassVar[str]
    traits: Traits = Traits()
    tp: Axis = IDENTITY
    cp: Axis = IDENTITY

    def mixing_flops(self, length: int) -> float:
        """Forward floating-point operations per token at row length ``length`` beyond 2 per weight of its linears."""
        del length
        return 0.0

    def handed_on(self, length: int, itemsize: int) -> float:
        """Bytes that a slice of ``length`` tokens of one row has for the ranks that hold the row's others, where slices
        are joined by states (way ``state``); ``itemsize``: of the dtype that layers compute in."""
        del length, itemsize
        return 0.0


class Mixer(Region):
    """Sequence mixing: the only place where tokens meet. ``inputs`` (column linears) -> ``core`` -> ``out`` (row)."""

    room = "mixer"

    @property
    def counts_columns(self) -> bool:
        """Whether what a token sees depends on its column in the row: a packed document then differs from the same
        document alone, though other documents change nothing."""
        return False

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        """Mix x (B, L, D). With ``state``, continue the rows from which it came; return the state to go on with."""
        raise NotImplementedError

    def step(self, x: Tensor, seq: Seq, state: State) -> Out:
        """One token, x (B, 1, D). The default runs the parallel form on a row of one, which is right for any mixer
        whose ``forward`` continues a state; override it where a recurrence is cheaper."""
        return self.forward(x, seq, state)

    def segment_state(self, state: State) -> State:
        """What of a training segment's state goes on to the next segment; None drops it."""
        return state


class ChannelMixer(Region):
    """Feed-forward, experts: acts on each token alone."""

    room = "channel"

    def forward(self, x: Tensor, seq: Seq) -> Out:
        """Transform x (B, L, D) token by token."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention layer: what its positions and its pattern may know of the queries and keys that meet.

    heads: global indices of the query heads at hand, of which a tensor-parallel shard holds some. keys: how many; the
    ``queries`` queries are the last of them, so query i stands at column ``query_offset`` + i. Columns count from the
    oldest key at hand: the first of the row, unless the layer keeps only so many keys of earlier segments.
    query_documents, key_documents: (B, n) int32; None where every row is one document.
    query_positions, key_positions: (B, n) int32, positions inside documents; None where these are the columns, and
    where the pattern does not count in positions.
    """

    layer: int
    causal: bool
    heads: range
    queries: int
    keys: int
    device: torch.device
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None

    @property
    def query_offset(self) -> int:
        """Column of the first query."""
        return self.keys - self.queries


Projection = Callable[[Tensor], Tensor]
"""A layer's own projection of vectors (n, D) to heads, (heads at hand, n, head dim)."""


class AttentionPositions(nn.Module):
    """The position scheme inside one attention layer. Returns descriptions for the kernel, never an L x L tensor.

    terms: how many products of vectors a score sums; scores are divided by sqrt(terms x head dim). max_positions: how
    many positions the scheme has numbers for, None for any.
    """

    room = "positions"
    terms: int = 1
    max_positions: int | None = None

    def rotary(self, query_positions: Tensor, key_positions: Tensor) -> Rotary | None:
        """How queries and keys at these positions, (B, L) each, are rotated. Keys are rotated once and then kept, so
        that what is done to a key depends on its own position alone."""
        del query_positions, key_positions
        return None

    def bias(self, call: AttentionCall, query: Projection, key: Projection) -> Bias | None:
        """What is added to the scores of this call. ``query`` and ``key`` are the layer's projections (keys come in
        its key heads), for schemes whose positions are vectors."""
        del call, query, key
        return None

    def mixing_flops(self) -> float:
        """Forward floating-point operations per token that the bias costs."""
        return 0.0


class Positions:
    """A position scheme: something added to the embedding, something inside attention, or both."""

    Options: ClassVar[type[Options]]
    room: ClassVar[str] = "positions"

    def __init__(self, options: Any) -> None:
        self.options = options

    def embedding(self, context: Context) -> nn.Module | None:
        """A module that maps positions (B, L) to (B, L, D) to be added to the input; None for none."""
        del context
        return None

    def attention(self, context: Context, *, heads: int, head_dim: int, causal: bool) -> AttentionPositions | None:
        """A module for one attention layer with ``heads`` query heads of ``head_dim``; None for none."""
        del context, heads, head_dim, causal
        return None


class Pattern:
    """Which keys a query may see, as a description for the attention kernel."""

    Options: ClassVar[type[Options]]
    room: ClassVar[str] = "pattern"

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def counts(self) -> Literal["distances", "positions", "columns"]:
        """What visibility depends on beside documents: distances and positions are a document's own wherever it
        stands, so that it is the same packed and alone; columns are the row's. Key positions are kept for "positions"
        only."""
        return "distances"

    def mask(self, call: AttentionCall) -> Mask:
        """The mask of a call."""
        raise NotImplementedError

    def visible_keys(self, length: int, *, causal: bool) -> float:
        """Keys that a query of a row of ``length`` sees on average, to count work by; never falls with the length."""
        return (length + 1) / 2 if causal else float(length)


class Stack(nn.Module):
    """How blocks, depth, time and length compose. Owns ``blocks``, a ModuleDict keyed by the global layer index."""

    Options: ClassVar[type[Options]]
    room: ClassVar[str] = "stack"
    blocks: nn.ModuleDict

    def forward(self, hidden: Tensor, seq: Seq, state: State = None, *, step: bool = False) -> Out:
        """Run hidden (B, L, D) through the blocks; with ``step``, one token by the recurrent forms."""
        raise NotImplementedError

    def segment_state(self, state: State) -> State:
        """What of a training segment's state goes on to the next segment, by default all of it."""
        return state

    streams: ClassVar[tuple[str, ...]] = ()
    """Names of the streams that travel beside the hidden states from layer to layer."""

    def part(self, layers: Sequence[str], *, first: bool, last: bool) -> Stack:
        """A stack with these of the blocks, for one stage of a pipeline; ``first`` begins and ``last`` ends the depth.

        Raises ValueError where the stack cannot be cut; the default cannot.
        """
        raise ValueError(f"a {type(self).__name__} stack cannot be cut into pipeline stages; set parallel.pp to 1")


class Frontend(Region):
    """What enters and what leaves; one module with one name, on the first and on the last pipeline stage."""

    room = "frontend"
    compute: torch.dtype | None = None
    max_positions: int | None = None
    """Positions that the input can express; None for any number."""

    def embed(self, inputs: Mapping[str, Tensor], seq: Seq) -> Out:
        """Turn a batch's inputs into hidden (B, L, D), and create the streams that travel with it."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., vocabulary) of hidden states (..., D)."""
        raise NotImplementedError

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of -log p(target) in nats, 0-dimensional, over targets (B, L) int64 that are not -1; fp32 or better.

        A method of the frontend, not of the objective, so that a split vocabulary never leaves it."""
        raise NotImplementedError


class Initializer:
    """Fills the parameters of a model; registered in the room ``init``."""

    Options: ClassVar[type[Options]]
    room: ClassVar[str] = "init"

    def __init__(self, options: Any) -> None:
        self.options = options

    def fill(self, module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter in place from ``generator``, which is keyed by (seed, fully qualified name)."""
        raise NotImplementedError
