"""Five systems as small as the strain that each puts on the interfaces, and the recipes that name them.

Loaded by path from test_stubs.py, since tests are no package; nothing is registered here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from potamos.data.loader import Rows
from potamos.kernels.dropout import philox
from potamos.parallel.facts import Traits
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.build import ModelSettings, build
from potamos.pretrain.models.interfaces import Context, Mixer, Out, Seq, State
from potamos.pretrain.models.linear import Embedding, Linear, NormOptions
from potamos.pretrain.models.mixers.attention import Attention
from potamos.pretrain.models.stacks.plain import Plain
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.objectives.base import Batch, Objective, Term, Terms

LENGTH, WIDTH, MASK = 16, 24, 303


# --- shared: an encoder that sees both ways, and masked words --------------------------------------------------------


class Encoder(Attention):
    """Attention without a causal mask."""

    traits = replace(Attention.traits, causal=False, carries=False)


def choose(rows: Rows, count: int, seed: int, step: int) -> np.ndarray:
    """(n, L) bool: ``count`` columns of each row, by (seed, step, sample)."""
    chosen = np.zeros((len(rows), rows.tokens.shape[1] - 1), bool)
    for row, sample in enumerate(rows.samples):
        draw = np.random.Generator(np.random.Philox(key=[seed, (step << 32) + int(sample)]))
        chosen[row, draw.permutation(chosen.shape[1])[:count]] = True
    return chosen


class Masked(Objective):
    """A share of the columns is hidden and predicted. ``late``: hidden columns do not enter; a stack adds them."""

    class Options(interfaces.Options):
        kind: str = "masked"
        rate: float = Field(default=0.25, gt=0, lt=1)
        mask: int = MASK
        late: bool = False

    def prepare(self, rows: Rows, *, seed: int, step: int, carried: bool = False) -> Batch:
        hidden = choose(rows, round(self.options.rate * (rows.tokens.shape[1] - 1)), seed, step)
        tokens = rows.tokens[:, :-1].astype(np.int64)
        targets = np.where(hidden & (rows.document_ids[:, :-1] >= 0), tokens, -1)
        whole = Seq(
            positions=torch.from_numpy(rows.positions[:, :-1].astype(np.int64)),
            document_ids=torch.from_numpy(np.ascontiguousarray(rows.document_ids[:, :-1])),
            samples=torch.from_numpy(rows.samples.astype(np.int64)),
            seed=seed,
            step=step,
        )
        if self.options.late:
            columns = torch.from_numpy(np.nonzero(~hidden)[1].reshape(len(rows), -1))
            assert whole.document_ids is not None
            seq = replace(
                whole,
                positions=whole.positions.gather(1, columns),
                document_ids=whole.document_ids.gather(1, columns),
                columns=columns,
                whole=whole,
            )
            inputs = torch.from_numpy(tokens).gather(1, columns)
        else:
            seq, inputs = whole, torch.from_numpy(np.where(hidden, self.options.mask, tokens))
        return Batch(
            inputs={"tokens": inputs},
            seq=seq,
            targets={"masked": torch.from_numpy(targets)},
            counts={"masked": int((targets >= 0).sum())},
            scored=targets,
        )

    def forward(self, model: Model, batch: Batch, state: State = None) -> Terms:
        out = model(batch.inputs, batch.seq, state)
        nll = model.frontend.nll(out.hidden, batch.targets["masked"])
        return Terms({"masked": Term(nll, "masked")}, out.state)


# --- (a) a stream beside the hidden one (Ma et al. 2021, "Luna") -----------------------------------------------------


class LunaStack(Plain):
    """Creates the stream ``luna``: (B, slots, D), the same at the start of every row. Of a cut stack the first part
    does, and hands it on."""

    streams = ("luna",)

    class Options(interfaces.Options):
        kind: str = "luna"
        slots: int = Field(default=4, gt=0)

    def __init__(self, options: Options, context: Context, blocks: nn.ModuleDict, norm: NormOptions) -> None:
        super().__init__(Plain.Options(), context, blocks, norm)
        self.memory = Embedding(options.slots, context.width)

    def forward(self, hidden: Tensor, seq: Seq, state: State = None, *, step: bool = False) -> Out:
        if self.memory is not None:
            seq = seq.with_streams({"luna": self.memory.weight.expand(len(hidden), -1, -1)})
        return super().forward(hidden, seq, state, step=step)

    def part(self, layers: Sequence[str], *, first: bool, last: bool) -> Plain:
        made = super().part(layers, first=first, last=last)
        if not first:
            made._modules["memory"] = None
        return made


class LunaMixer(Mixer):
    """Packs the row into the stream's slots, and reads the row's update from them: linear in the length."""

    traits = Traits(causal=False)

    class Options(interfaces.Options):
        kind: str = "luna"

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__()
        self.last = context.layer == context.layers - 1  # nobody reads what the last layer would write
        self.pack, self.unpack, self.values = (Linear(context.width, context.width) for _ in range(3))
        self.out = Linear(context.width, context.width, into_residual=True)

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        memory, values, size = seq.streams["luna"], self.values(x), math.sqrt(x.shape[-1])
        present = torch.ones_like(x[..., 0]).bool() if seq.document_ids is None else seq.document_ids >= 0
        scores = self.pack(memory) @ values.mT / size
        packed = scores.masked_fill(~present[:, None], -1e9).softmax(-1) @ values
        read = (self.unpack(x) @ packed.mT / size).softmax(-1) @ packed
        return Out(self.out(read), streams={} if self.last else {"luna": memory + packed})

    def mixing_flops(self, length: int) -> float:
        return 1.0


# --- (b) a sequence that grows at a layer (Liao et al. 2022, "Mask More and Mask Later") -----------------------------


class LateStack(Plain):
    """Before layer ``at``, hidden columns take their places as one shared vector."""

    class Options(interfaces.Options):
        kind: str = "late"
        at: int = Field(default=1, ge=0)

    def __init__(self, options: Options, context: Context, blocks: nn.ModuleDict, norm: NormOptions) -> None:
        super().__init__(Plain.Options(), context, blocks, norm)
        self.at = options.at
        self.mask = Embedding(1, context.width)

    def forward(self, hidden: Tensor, seq: Seq, state: State = None, *, step: bool = False) -> Out:
        for layer, block in self.blocks.items():
            if int(layer) == self.at and seq.whole is not None and seq.columns is not None:
                full = self.mask.weight.expand(*seq.whole.positions.shape, -1)
                hidden = full.scatter(1, seq.columns[..., None].expand_as(hidden), hidden)
                seq = seq.whole
            hidden = block(hidden, seq).hidden
        return Out(self.norm(hidden))


# --- (c) state across segments (Dai et al. 2019, "Transformer-XL") ---------------------------------------------------


@dataclass(frozen=True)
class Memory:
    hidden: Tensor
    documents: Tensor


pytree.register_dataclass(Memory)


class XL(Attention):
    """Remembers what entered the layer, not its keys: they are projected anew with the weights of the day."""

    class Options(Attention.Options):
        kind: str = "xl"
        memory: int = Field(default=LENGTH, ge=1)

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        ids = torch.zeros_like(x[..., 0], dtype=torch.int32) if seq.document_ids is None else seq.document_ids
        both = x if state is None else torch.cat([state.hidden, x], 1)
        documents = ids if state is None else torch.cat([state.documents, ids], 1)
        out = super().forward(both, replace(seq, document_ids=documents, positions=documents.long()))
        return Out(out.hidden[:, -x.shape[1] :], state=Memory(both, documents))

    def segment_state(self, state: State) -> State:
        return Memory(state.hidden[:, -self.memory :], state.documents[:, -self.memory :])


# --- (d) a second trunk and two losses (Clark et al. 2020, "ELECTRA") ------------------------------------------------


class Replaced(Masked):
    """A generator fills hidden words in; the model says of every word whether it was. Sampling has no gradient."""

    class Options(interfaces.Options):
        kind: str = "replaced"
        rate: float = Field(default=0.25, gt=0, lt=1)
        mask: int = MASK
        weight: float = 5.0
        generator_layers: int = 1
        late: bool = False

    def build(self, settings: ModelSettings, sequence_length: int) -> None:
        assert isinstance(settings, interfaces.BaseModel)
        smaller: Any = settings.model_copy(update={"layers": self.options.generator_layers, "at": {}})
        self.generator = build(smaller, sequence_length=sequence_length)
        self.head = Linear(settings.width, 1)  # pyright: ignore[reportAttributeAccessIssue]

    def prepare(self, rows: Rows, *, seed: int, step: int, carried: bool = False) -> Batch:
        batch = super().prepare(rows, seed=seed, step=step, carried=carried)
        real = torch.from_numpy(rows.document_ids[:, :-1] >= 0)
        original = torch.from_numpy(rows.tokens[:, :-1].astype(np.int64)).masked_fill(~real, -1)
        counts = {**batch.counts, "words": int(real.sum())}
        return replace(batch, targets={**batch.targets, "original": original}, counts=counts)

    def forward(self, model: Model, batch: Batch, state: State = None) -> Terms:
        masked, original = batch.targets["masked"], batch.targets["original"]
        generated = self.generator(batch.inputs, batch.seq).hidden
        nll = self.generator.frontend.nll(generated, masked)
        with torch.no_grad():
            filled = torch.where(masked >= 0, self._sample(generated, batch.seq), original.clamp(min=0))
        out = model({"tokens": filled}, batch.seq)
        said = self.head(out.hidden).squeeze(-1)
        wrong = (filled != original).to(said.dtype)
        bits = F.binary_cross_entropy_with_logits(said, wrong, reduction="none")
        found = torch.where(original >= 0, bits, 0).sum()
        weight = self.options.weight
        return Terms({"replaced": Term(found, "words", weight), "generator": Term(nll, "masked")})

    def _sample(self, hidden: Tensor, seq: Seq) -> Tensor:
        """Ids drawn from the generator's distribution by a Gumbel maximum keyed by (seed, step, sample, column, id)."""
        scores = self.generator.frontend.logits(hidden)
        key, zero = seq.key("replaced", 0), torch.zeros((), dtype=torch.int64)
        column, identity = torch.arange(scores.shape[1])[:, None], torch.arange(scores.shape[2])
        bits, *_ = philox((identity, column, key.samples[:, None, None], zero), key.philox_key())
        return (scores - (-((bits.double() + 0.5) / 2**32).log()).log()).argmax(-1)


# --- (e) an implicit layer (Bai et al. 2019, "Deep Equilibrium Models") ----------------------------------------------


class Equilibrium(Plain):
    """z* = u + damping (block(z*) - z*), and its gradient by the implicit function theorem: no graph through the
    iteration is kept, the backward solves y = J^T y + g by the same iteration."""

    class Options(interfaces.Options):
        kind: str = "equilibrium"
        iterations: int = Field(default=40, gt=0)
        tolerance: float = Field(default=1e-6, gt=0)
        damping: float = Field(default=0.1, gt=0)
        unrolled: bool = False

    def __init__(self, options: Options, context: Context, blocks: nn.ModuleDict, norm: NormOptions) -> None:
        super().__init__(Plain.Options(), context, blocks, norm)
        self.options = options

    def forward(self, hidden: Tensor, seq: Seq, state: State = None, *, step: bool = False) -> Out:
        def f(z: Tensor, u: Tensor) -> Tensor:
            return u + self.options.damping * (self.blocks["0"](z, seq).hidden - z)

        if self.options.unrolled:
            return Out(self.norm(self._solve(lambda z: f(z, hidden), hidden)))
        with torch.no_grad():
            z = self._solve(lambda z: f(z, hidden), hidden)
        if torch.is_grad_enabled():
            again = z.detach().requires_grad_()
            tangent = f(again, hidden.detach())  # a graph of its own, for products with the Jacobian
            z = f(z, hidden)

            def implicit(g: Tensor) -> Tensor:
                return self._solve(lambda y: g + torch.autograd.grad(tangent, again, y, retain_graph=True)[0], g)

            z.register_hook(implicit)
        return Out(self.norm(z))

    def _solve(self, g: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        z = start
        for _ in range(self.options.iterations):
            previous, z = z, g(z)
            if not self.options.unrolled and (z - previous).norm() <= self.options.tolerance * z.norm():
                break
        return z


REGISTERED = {
    ("mixer", "encoder"): Encoder,
    ("mixer", "luna"): LunaMixer,
    ("mixer", "xl"): XL,
    ("stack", "luna"): LunaStack,
    ("stack", "late"): LateStack,
    ("stack", "equilibrium"): Equilibrium,
    ("objective", "masked"): Masked,
    ("objective", "replaced"): Replaced,
}

ENCODER = {"mixer": "{kind: encoder, heads: 4}", "positions": "{kind: rope}", "boundaries": "cross"}
CONTIGUOUS = {"order": "contiguous", "boundaries": "isolate"}
SYSTEMS: dict[str, dict[str, str]] = {
    "luna": {
        **ENCODER,
        "mixer": "{kind: luna}",
        "positions": "{kind: none}",
        "stack": "{kind: luna, slots: 3}",
        "objective": "{kind: masked}",
    },
    "late": {**ENCODER, "stack": "{kind: late, at: 2}", "objective": "{kind: masked, rate: 0.5, late: true}"},
    "xl": {**CONTIGUOUS, "mixer": "{kind: xl, heads: 4, memory: 24}"},
    "memory": {
        **CONTIGUOUS,
        "mixer": "{kind: attention, heads: 4, memory: 24}",
        "positions": "{kind: rope}",
        "at": "{1: {mixer: {kind: h3, state: 4, shift_state: 4}}}",
    },
    "replaced": {**ENCODER, "objective": "{kind: replaced}"},
    "equilibrium": {"layers": "1", "mixer": "{kind: h3, state: 4, shift_state: 4}", "stack": "{kind: equilibrium}"},
}

RECIPE = """
name: {name}
family: stub
model:
  width: 24
  layers: {layers}
  frontend: {{kind: tokens, vocabulary: 304}}
  mixer: {mixer}
  channel: {{kind: mlp, ratio: 2}}
  positions: {positions}
  stack: {stack}
  at: {at}
objective: {objective}
tokenizer: {{kind: json, path: {corpus}/tokenizer.json}}
data:
  sequence_length: 16
  boundaries: {boundaries}
  order: {order}
  stages: [{{from: 0, mixture: [{{path: {corpus}/train}}]}}]
  validation: [{{path: {corpus}/train}}]
optimizer: {{kind: adamw, lr: 5.0e-3}}
schedule: {{kind: constant}}
train: {{steps: 8, sequences: 8, micro_sequences: 4, seed: 3, device: cpu}}
checkpoint: {{every: 4}}
validate: {{every: 8, sequences: 8}}
telemetry: {{every: 4}}
"""
DEFAULTS = {
    "layers": "3",
    "mixer": "{kind: attention, heads: 4}",
    "positions": "{kind: none}",
    "stack": "{kind: plain}",
    "at": "{}",
    "objective": "{kind: causal}",
    "boundaries": "isolate",
    "order": "shuffled",
}
