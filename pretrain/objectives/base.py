"""What an objective is: it turns rows of tokens into a batch with counted targets, and outputs into sums.

Every loss term is a sum and the *name* of a count; counts are known from the batch. The trainer adds counts over
micro-batches and ranks before the first backward and divides each sum once, so accumulation, data parallelism and
uneven numbers of targets cannot change a gradient. There is no mean of means anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from potamos.data.loader import Rows
from potamos.pretrain.models.build import ModelSettings
from potamos.pretrain.models.interfaces import Options, Out, Seq, State
from potamos.pretrain.models.trunk import Model, ModelPart


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    inputs: what the frontend embeds. seq: its description. targets: what the objective compares with, -1 = none.
    counts: targets of each loss term in this micro-batch. scored: the text tokens whose likelihood is measured, as
    NumPy on the host, -1 elsewhere; bits per byte divides by their bytes.
    """

    inputs: Mapping[str, Tensor]
    seq: Seq
    targets: Mapping[str, Tensor]
    counts: Mapping[str, int]
    scored: np.ndarray

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``. Toward a GPU they are pinned first, so that the copies run
        beside the host and the kernels before them instead of waiting for both."""
        if device.type == "cpu":
            return self
        return self.pin()._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The same batch in page-locked host memory; the batch itself where there is no GPU.

        The memory is torch's to reuse: it keeps a pinned tensor until the copies from it are done.
        """
        return self._map(Tensor.pin_memory) if torch.cuda.is_available() else self

    def slices(self, held: Sequence[int], count: int) -> Batch:
        """The places ``held`` of ``count`` equal slices of every row, side by side; ``seq.whole`` describes the row.

        What has another second dimension than the row's length is kept as it is."""
        length = self.seq.positions.shape[1]
        if length % count:
            raise ValueError(f"a row of {length} columns cannot be cut into {count} slices")
        step = length // count
        columns = torch.cat([torch.arange(g * step, (g + 1) * step) for g in held])
        columns = columns.to(self.seq.positions.device)

        def cut(x: Tensor) -> Tensor:
            return x[:, columns] if x.dim() >= 2 and x.shape[1] == length else x

        seq = replace(
            self.seq,
            positions=cut(self.seq.positions),
            document_ids=None if self.seq.document_ids is None else cut(self.seq.document_ids),
            columns=columns,
            whole=self.seq,
        )
        inputs = {name: cut(value) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, seq=seq, targets={n: cut(x) for n, x in self.targets.items()})

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            inputs={name: change(value) for name, value in self.inputs.items()},
            seq=_map_seq(self.seq, change),
            targets={name: change(value) for name, value in self.targets.items()},
        )


def _map_seq(seq: Seq, change: Callable[[Tensor], Tensor]) -> Seq:
    mapped: dict[str, Any] = {}
    for f in fields(seq):
        value = getattr(seq, f.name)
        if isinstance(value, Tensor):
            mapped[f.name] = change(value)
        elif isinstance(value, Seq):
            mapped[f.name] = _map_seq(value, change)
        elif isinstance(value, Mapping):
            mapped[f.name] = {name: change(item) for name, item in value.items()}
    return replace(seq, **mapped)


@dataclass(frozen=True)
class Term:
    """One loss term of a micro-batch: weight * sum / (total of the count's name)."""

    sum: Tensor
    count: str
    weight: float = 1.0


@dataclass
class Terms:
    """The terms of one micro-batch, {name: Term}, and the state that its rows go on with."""

    terms: dict[str, Term] = field(default_factory=dict)
    state: State = None

    def detached(self) -> Terms:
        """What is left to tell of them when their gradients are another's business."""
        terms = {name: replace(term, sum=term.sum.detach()) for name, term in self.terms.items()}
        return Terms(terms, self.state)


class Objective(nn.Module):
    """What is optimized. A module, because an objective may own parameters or a second trunk."""

    Options: ClassVar[type[Options]]
    room: ClassVar[str] = "objective"

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options

    def build(self, settings: ModelSettings, sequence_length: int) -> None:
        """Make what the objective owns beside the model: a second trunk, a head. Called once, on the meta device; every
        parameter is then filled like the model's, from (seed, its name). ``settings``: the model's."""
        del settings, sequence_length

    def prepare(self, rows: Rows, *, seed: int, step: int, carried: bool = False) -> Batch:
        """Turn rows into a batch, on the host. Random choices are keyed by (seed, step, sample) alone.

        ``carried``: rows continue the previous step's, so document ids must be given even where a row has but one.
        """
        raise NotImplementedError

    def forward(self, model: Model, batch: Batch, state: State = None) -> Terms:
        """The loss terms of a batch under ``model``; ``state`` continues rows of the previous step."""
        raise NotImplementedError


class System(nn.Module):
    """Model and objective as one module: what a layout wraps and what a training step calls."""

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, state: State = None) -> Terms:
        return self.objective(self.model, batch, state)

    def stage_costs(self) -> tuple[list[float], float, float]:
        """Forward cost of each layer, of embedding and of scoring, to balance stages by: weights of linear layers."""
        model = self.model
        layers = [float(sum(p.numel() for p in block.parameters())) for block in model.stack.blocks.values()]
        return layers, 0.0, model.frontend.mixing_flops(0) / 2.0

    def drop_ends(self) -> None:
        """Forget what only the first and the last stage of a pipeline need."""
        self.model.frontend = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.model.stack.norm = nn.Identity()  # pyright: ignore[reportArgumentType]

    def part(self, layers: Sequence[str], *, first: bool, last: bool) -> SystemPart:
        """The system's part with these layers: one stage of a pipeline. The objective is the last part's."""
        return SystemPart(self.model.part(layers, first=first, last=last), self.objective if last else None)


@dataclass
class Handover:
    """What a part sends to the next one, and the state that its rows go on with."""

    sent: tuple[Tensor, ...]
    state: State = None

    def detached(self) -> Handover:
        """What is left to tell once it is sent."""
        return Handover((), self.state)


class SystemPart(nn.Module):
    """A system between two cuts of a pipeline."""

    def __init__(self, model: ModelPart, objective: Objective | None) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, received: tuple[Tensor, ...], state: State = None) -> Handover | Terms:
        """``received``: the hidden states and the streams, in the order of the stack's ``streams``."""
        names = self.model.stack.streams
        if not self.model.first:
            hidden, *streams = received
            self.model.received = Out(hidden, streams=dict(zip(names, streams, strict=True)))
        if self.objective is not None:
            return self.objective(self.model, batch, state)
        out = self.model(batch.inputs, batch.seq, state)
        if out.aux:
            found = sorted(out.aux)
            raise ValueError(f"pipeline stages cannot hand on the auxiliary losses {found}; set parallel.pp to 1")
        return Handover((out.hidden, *(out.streams[name] for name in names)), out.state)


def with_auxiliary(terms: Terms, aux: Mapping[str, tuple[Tensor, str]], weights: Mapping[str, float]) -> Terms:
    """Add the auxiliary losses of a model's output; each weighs what ``weights`` says, 1 by default."""
    for name, (value, count) in aux.items():
        terms.terms[name] = Term(value, count, weights.get(name, 1.0))
    return terms
