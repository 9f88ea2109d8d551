"""What a certificate compares: three steps of training by the definition in one process, and by a layout's ranks.

The definition is written out: all rows at once, one backward, the norm of one list of gradients. The layout's steps are
those that train: the trainer's own, fed with made-up rows instead of a dataset.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from potamos.data.loader import Rows
from potamos.parallel.apply import apply
from potamos.parallel.data import SHARDS
from potamos.parallel.facts import Layout, parameter_table
from potamos.parallel.launch import Rank
from potamos.parallel.mesh import sizes
from potamos.pretrain import carried, evaluate, setup
from potamos.pretrain.models.initialize import generator
from potamos.pretrain.objectives.base import System
from potamos.pretrain.optim import GradientNorm, Optimizer
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.spikes import SpikeGuard
from potamos.pretrain.trainer import Trainer
from potamos.pretrain.verify_rows import STEPS, RowSource

NOISE = 0.02
"""Standard deviation of what is added to every initial value: zeros and ones would hide what multiplies them."""
UPDATES = 2
"""Steps after which updates are compared."""
CPU = torch.device("cpu")


@dataclass
class Record:
    """What three steps left: of the whole model in one process, of its share on a rank.

    losses, norms: of each step, norms before clipping. scores: loss of held-out rows after the last step.
    gradients: of the first step, before clipping, whole, fp64.
    updates: change of each parameter over two steps, whole, fp64. start, copies: digests of initial values (whole) and
    of stored pieces after the last step, the latter by (name, which piece).
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    updates: dict[str, np.ndarray] = field(default_factory=dict)
    start: dict[str, str] = field(default_factory=dict)
    copies: dict[tuple[str, int, int], str] = field(default_factory=dict)
    seconds: float = 0.0


def source_of(recipe: Recipe) -> RowSource:
    """The rows with which a recipe is verified."""
    return RowSource(
        count=recipe.train.sequences,
        length=recipe.data.sequence_length,
        vocabulary=getattr(recipe.model.frontend, "vocabulary", 2),
        isolate=recipe.data.boundaries == "isolate",
        contiguous=recipe.data.order == "contiguous",
        seed=recipe.train.seed,
    )


class HeldOut:
    """Rows in the place of a validation set, one fewer than a step has: in few batches, but more than there are data
    ranks, and so many that some of several are without one in the end."""

    def __init__(self, recipe: Recipe, ranks: int) -> None:
        rows = replace(source_of(recipe), contiguous=False, seed=recipe.train.seed + 1).rows(STEPS - 1)
        self.rows = rows.slice(1, len(rows))  # the first has no target, and would hide that it is counted twice
        self.sequence_length = recipe.data.sequence_length
        batches = {size: -(-len(self.rows) // size) for size in (4, 3, 2)}
        fitting = (size for size, count in batches.items() if count > ranks and (ranks == 1 or count % ranks))
        self.rows_per_batch = next(fitting, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, begin: int, count: int) -> Rows:
        """Rows begin to begin + count."""
        return self.rows.slice(begin, begin + count)


def noise(seed: int, name: str, shape: torch.Size) -> Tensor:
    """What is added to the initial value of a parameter, by (seed, name) alone."""
    return NOISE * torch.randn(shape, generator=generator(seed, f"noise:{name}"), dtype=torch.float32)


def digest(value: Tensor) -> str:
    """Equal for equal bits."""
    return hashlib.blake2b(value.detach().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def _wide(value: Tensor) -> np.ndarray:
    return value.detach().to(torch.float64, copy=True).numpy()


# --- one process -----------------------------------------------------------------------------------------------------


def train_alone(rank: int, world: int, recipe: Recipe, dtype: torch.dtype) -> Record:
    """The definition. For `run_ranks`, which keeps the caller's default dtype as it was."""
    del rank, world
    torch.set_default_dtype(dtype)
    began, record, source = time.perf_counter(), Record(), source_of(recipe)
    system = setup.build_system(recipe, CPU)
    parameters = dict(system.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(noise(recipe.train.seed, name, parameter.shape))
    record.start = {name: digest(p) for name, p in parameters.items()}
    before = {name: _wide(p) for name, p in parameters.items()}
    optimizer = Optimizer(parameters, parameter_table(system), recipe.optimizer)
    state, carries = None, source.contiguous
    system.train()
    for step in range(STEPS):
        batch = system.objective.prepare(source.rows(step), seed=recipe.train.seed, step=step, carried=carries)
        out = system(batch, state)
        loss = torch.stack([t.weight * t.sum / max(1, batch.counts[t.count]) for t in out.terms.values()]).sum()
        loss.backward()
        if carries:
            state = carried.detach(system.model.stack.segment_state(out.state))
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        record.losses.append(loss.item())
        record.norms.append(norm.item())
        if step == 0:
            record.gradients = {name: _wide(g) for name, g in gradients.items()}
        if recipe.optimizer.clip is not None:
            for g in gradients.values():
                g.mul_((recipe.optimizer.clip / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step(1.0, torch.zeros((), dtype=torch.float32))
        optimizer.zero_grad()
        if step + 1 == UPDATES:
            record.updates = {name: _wide(p) - before[name] for name, p in parameters.items()}
    record.scores = [_score_alone(system, HeldOut(recipe, 1).rows, recipe.train.seed)]
    record.seconds = time.perf_counter() - began
    return record


@torch.no_grad()
def _score_alone(system: System, rows: Rows, seed: int) -> float:
    """All rows at once: nats of their targets over the number of these."""
    system.eval()
    batch = system.objective.prepare(rows, seed=seed, step=0)
    term = system(batch).terms[system.objective.options.kind]
    return float(term.sum / batch.counts[term.count])


# --- a layout --------------------------------------------------------------------------------------------------------


class Rehearsal(Trainer):
    """A trainer of a spread system without a dataset, a run folder or an end."""

    def __init__(self, recipe: Recipe, layout: Layout, rank: Rank) -> None:
        self.recipe, self.rank, self.device, self.reader = recipe, rank, CPU, None
        self.sizes = sizes(layout, rank.world)
        self.micro_batches = recipe.train.sequences // (self.sizes.data * recipe.train.micro_sequences)
        self.spread = apply(setup.draft_system(recipe), layout, rank.rank, rank.world, CPU, setup.filler(recipe, CPU))
        self.system = self.spread.system
        self.model, self.objective = self.system.model, self.system.objective
        self.parameters = self.spread.stored
        self.norm = Witness(self.spread.gradients, self.spread.table)
        self.optimizer = Optimizer(self.parameters, self.spread.table, recipe.optimizer, self.spread.matrices)
        self.guard = SpikeGuard(recipe.optimizer.window, recipe.optimizer.spike, CPU)
        self.source = source_of(recipe)
        self.token_bytes = np.ones(self.source.vocabulary, np.int64)
        self.carries, self.step = self.source.contiguous, 0
        self.carried = [None] * self.micro_batches

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of what this rank stores; every rank of a stage calls."""
        return {name: self.spread.whole(name, value) for name, value in values.items()}

    def rehearse(self) -> None:
        """One step on this rank's rows."""
        rows = self.source.rows(self.step)
        share = len(rows) // self.sizes.data
        begin = self.spread.data_index * share
        self.result = self.train_step(rows.slice(begin, begin + share))
        self.step += 1

    def score(self, recipe: Recipe) -> float:
        """The loss of held-out rows, as training validates."""
        held_out: Any = HeldOut(recipe, self.sizes.data)
        return evaluate.score(
            self.system,
            held_out,
            self.token_bytes,
            device=CPU,
            rows_per_batch=held_out.rows_per_batch,
            seed=recipe.train.seed,
            spread=self.spread,
        ).loss

    def copies(self) -> dict[tuple[str, int, int], str]:
        """Digests of stored pieces: ranks that hold the same piece must hold the same bits."""
        place, found = self.spread.mesh, {}
        for name, value in self.parameters.items():
            cut = place.index("tp") if self.spread.cuts[name].dim is not None else -1
            shard = place.index(*SHARDS) if isinstance(self.spread.parameters[name], DTensor) else -1
            found[name, cut, shard] = digest(value)
        return found


class Witness(GradientNorm):
    """Keeps what gradients were when their norm was taken, before anything clips them."""

    gradients_seen: dict[str, Tensor]

    def measure(self) -> tuple[Tensor, Tensor]:
        names = self.gradients.parameters
        self.gradients_seen = {n: local.detach().clone() for n in names if (local := self._local(n)) is not None}
        return super().measure()

    def _local(self, name: str) -> Tensor | None:
        gradient = self.gradients.parameters[name].grad
        return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def train_spread(rank: int, world: int, recipe: Recipe, layout: Layout, dtype: torch.dtype) -> Record:
    """The same three steps as one rank of a layout makes them."""
    torch.set_default_dtype(dtype)
    began, record = time.perf_counter(), Record()
    rehearsal = Rehearsal(recipe, layout, Rank(rank, world, rank, world))
    with torch.no_grad():
        for name, parameter in rehearsal.parameters.items():
            extra = noise(recipe.train.seed, name, rehearsal.spread.shapes[name]).to(dtype)
            parameter.add_(rehearsal.spread.local(name, extra))
    before = {name: p.clone() for name, p in rehearsal.whole(rehearsal.parameters).items()}
    place = rehearsal.spread.mesh
    speaks = place.index("dp_replicate", *SHARDS, "tp") == 0
    rehearsal.system.train()
    for step in range(STEPS):
        rehearsal.rehearse()
        record.losses.append(rehearsal.result.loss.item())
        record.norms.append(rehearsal.result.norm.item())
        if step == 0:
            seen = rehearsal.whole(rehearsal.norm.gradients_seen)
            record.gradients = {name: _wide(g) for name, g in seen.items()} if speaks else {}
        if step + 1 == UPDATES:
            after = rehearsal.whole(rehearsal.parameters)
            record.updates = {n: _wide(p) - _wide(before[n]) for n, p in after.items()} if speaks else {}
    record.scores = [rehearsal.score(recipe)]
    record.start = {name: digest(p) for name, p in before.items()} if speaks else {}
    record.copies = rehearsal.copies()
    record.seconds = time.perf_counter() - began
    return record
