"""What a micro-batch keeps and needs, layer kind by layer kind, counted without memory and without a GPU.

The recipe's own modules run forward and backward on fake tensors (shapes without storage) at their real sizes, spread
over tensor and sequence ranks by the code that trains, with a process group that sends nothing. One layer of each kind
stands for all of its kind. A dispatch mode follows every storage from its birth to its death, so that what is counted
is what autograd really holds, not what a formula by hand remembers of a layer.

Counted are tensors: neither what an allocator rounds them up to, nor what an operation of torch needs inside. Rows hold
one document each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from potamos.data.loader import Rows
from potamos.parallel.apply import Spread
from potamos.parallel.facts import ParameterFacts
from potamos.parallel.mesh import Mesh, Sizes
from potamos.parallel.pipeline import SCHEDULES
from potamos.pretrain import setup
from potamos.pretrain.objectives.base import Batch, System, Terms
from potamos.pretrain.plan_forms import Form, counting
from potamos.pretrain.plan_halves import INPUTS, WEIGHTS, run_in_halves
from potamos.pretrain.recipe import Recipe

CPU = torch.device("cpu")
INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class Change:
    """Bytes above what lived at the beginning: the most in between, and what is left at the end."""

    peak: int = 0
    left: int = 0


@dataclass(frozen=True)
class Unit:
    """The input, a layer of some kind, or the output (norm, scores, loss), on one rank.

    first: forward and backward of a step's first micro-batch, whose backward leaves gradients behind; later: of the
    next ones, which add to them. halves: of a backward that is split, the inputs' half, and the weights' of the first
    and of the next micro-batches; None where no schedule splits, and for the input, whose stage does not. state: bytes
    that the forward leaves and that go when the stage's last layer has run, since nothing carries them.
    """

    first: tuple[Change, Change]
    later: tuple[Change, Change]
    halves: tuple[Change, Change, Change] | None = None
    state: int = 0


@dataclass(frozen=True)
class Held:
    """A parameter as a rank of tensor parallelism holds it. wide: it is never lowered to the compute dtype."""

    name: str
    shape: torch.Size
    whole: torch.Size
    itemsize: int
    wide: bool
    facts: ParameterFacts

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.itemsize


@dataclass(frozen=True)
class Trace:
    """One rank of a layout's tensor and sequence axes.

    units, parameters: by kind of layer, and of the input and the output. layers: the kind of each layer. hidden, batch:
    bytes of a micro-batch's hidden states between layers, and of its ids and targets. tied: bytes of the gradient that
    input and output share.
    """

    units: Mapping[str, Unit]
    parameters: Mapping[str, tuple[Held, ...]]
    layers: tuple[str, ...]
    hidden: int
    batch: int
    tied: int
    form: Form = "torch"
    """Of the kernels that ran."""

    def size(self, unit: str) -> int:
        """Bytes of the parameters of a unit."""
        return sum(held.bytes for held in self.parameters[unit])


def trace(recipe: Recipe, *, tp: int = 1, cp: int = 1, form: Form = "torch") -> Trace:
    """Run micro-batches of `recipe` on fake tensors, as a rank of `tp` x `cp` would, with one form of the kernels.

    Raises:
        LayoutError: the model cannot be split so.
        RuntimeError: this process is a rank already: plan before ranks start.
    """
    layout = replace(
        recipe.parallel.layout(), dp_replicate=1, dp_shard=1, tp=tp, cp=cp, pp=1, schedule="1f1b", compile=None
    )
    system = setup.draft_system(recipe)
    system.train()
    batch = _batch(recipe, system)
    kinds = _keep_one_of_each_kind(recipe, system)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    size = Sizes(cp=cp, tp=tp)
    with _silent_ranks(size.world):
        spread = _Local(system, layout, Mesh(size, 0, "cpu"), CPU, _filler(mode))
        spread.gradients.finish = lambda: None  # the sums after a step's last backward are not a micro-batch's
        with mode:
            batch, batch_bytes = _faked(batch, mode)
            marks = _Marks(spread.system)
            pytree.tree_map_only(Tensor, marks.bytes.follow, [*spread.system.parameters(), *spread.system.buffers()])
            with counting(form), marks.bytes:
                kept = spread.run([batch] * 2, [None] * 2, marks.weigh)  # as long as a step keeps what it returns
                marks.end()
                del kept
                if splits_backward(recipe):
                    spread.zero_grad()
                    _in_halves(spread, batch, marks)
    layers = _kinds(recipe)
    parameters = {kind: tuple(_held(spread, f"model.stack.blocks.{name}.")) for kind, name in kinds.items()}
    parameters[INPUT] = tuple(_held(spread, "model.frontend."))
    inside = ("model.frontend.", "model.stack.blocks.")
    parameters[OUTPUT] = tuple(held for held in _held(spread, "") if not held.name.startswith(inside))
    units = {kind: marks.unit(name) for kind, name in {**kinds, INPUT: INPUT, OUTPUT: OUTPUT}.items()}
    own = sum(held.bytes for held in parameters[OUTPUT])
    shared = sum(change.left for change in units[OUTPUT].first) - own - marks.hidden
    tied = min(max(shared, 0), sum(held.bytes for held in parameters[INPUT]))
    return Trace(units, parameters, layers, marks.hidden, batch_bytes, tied, form)


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make: `live` bytes now, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        pytree.tree_map_only(Tensor, self.follow, result)
        return result

    def follow(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it dies."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


class _Marks:
    """Cuts what `bytes` sees at the borders between units, forward and backward."""

    def __init__(self, system: Any) -> None:
        self.bytes, self.hidden, self.halves = LiveBytes(), 0, False
        self._began = self._dropped = 0
        self._states: dict[str, int] = {}
        self._found: dict[tuple[str, int], list[Change]] = {}
        blocks = system.model.stack.blocks
        names = list(blocks)
        system.register_forward_pre_hook(lambda *_: self._begin())
        system.register_forward_hook(lambda _, __, out: self._drop_states(out.state))
        for before, name in zip([INPUT, *names], names, strict=False):
            blocks[name].register_forward_pre_hook(
                lambda _, inputs, before=before, name=name: self._border(inputs[0], before, name)
            )
        last = names[-1]
        blocks[last].register_forward_hook(lambda _, __, out: self._border(out.hidden, last, OUTPUT))

    def _begin(self) -> None:
        if self._found and not self.halves:  # the backward of the micro-batch before ended
            self.end()
        else:  # what a step does before its first forward is not a unit's
            self.bytes.peak = self._began = self.bytes.live

    def _drop_states(self, states: Any) -> None:
        """One layer stands for many, each of which has a state: what goes with each is not the output's to account."""
        self._dropped = 0
        for name in list(states) if isinstance(states, dict) else ():
            before = self.bytes.live
            del states[name]
            self._states[name] = before - self.bytes.live
            self._dropped += self._states[name]

    def weigh(self, out: Terms) -> Tensor:
        """The loss, between forward and backward."""
        loss = torch.stack([term.weight * term.sum for term in out.terms.values()]).sum()
        self.close(OUTPUT, 0, beside=self._dropped)
        return loss

    def end(self) -> None:
        """The backward of a micro-batch has ended."""
        self.close(INPUT, 1)

    def _border(self, hidden: Tensor, before: str, after: str) -> None:
        self.hidden = hidden.numel() * hidden.element_size()
        self.close(before, 0)
        back = INPUTS if self.halves else 1
        hidden.register_hook(lambda _: self.close(after, back))

    def close(self, name: str, way: int, beside: int = 0) -> None:
        """A unit's forward (0) or backward (1) ends here, the next one begins. beside: bytes that others freed."""
        now = self.bytes
        self._found.setdefault((name, way), []).append(Change(now.peak - self._began, now.live - self._began + beside))
        now.peak = self._began = now.live

    def unit(self, name: str) -> Unit:
        """What was found of a unit."""
        (first, later), (back, later_back) = self._found[name, 0][:2], self._found[name, 1]
        halves = None
        if (name, INPUTS) in self._found:
            weights, later_weights = self._found[name, WEIGHTS]
            halves = (self._found[name, INPUTS][-1], weights, later_weights)
        return Unit((first, back), (later, later_back), halves, self._states.get(name, 0))


def splits_backward(recipe: Recipe) -> bool:
    """Whether the recipe's pipeline takes the gradients of weights later than those of inputs."""
    return recipe.parallel.pp > 1 and SCHEDULES[recipe.parallel.schedule].splits_backward


def _in_halves(spread: Spread, batch: Batch, marks: _Marks) -> None:
    """Two more micro-batches, whose backward is split."""
    if spread.sizes.cp > 1:
        batch = batch.slices(spread.slices.held, spread.slices.count)
    blocks = spread.system.model.stack.blocks
    units: dict[str, list[Any]] = {name: list(block.parameters()) for name, block in blocks.items()}
    inside = {id(parameter) for own in units.values() for parameter in own}
    units[OUTPUT] = [parameter for parameter in spread.parameters.values() if id(parameter) not in inside]
    marks.halves = True
    for _ in range(2):
        run_in_halves(lambda: marks.weigh(spread.system(batch)), next(iter(blocks.values())), units, marks.close)


class _Local(Spread):
    """A system cut over tensor and sequence ranks alone; how data ranks share it is for others to add."""

    def _spread_data(self, *_: Any) -> nn.Module:
        return self.system


def _kinds(recipe: Recipe) -> tuple[str, ...]:
    """The kind of each layer by name; later kinds of one name are told apart by their first layer."""
    known: dict[str, str] = {}
    names = []
    for index in range(recipe.model.layers):
        layer = recipe.model.layer(index)
        spelled = repr(layer)
        if spelled not in known:
            name = layer.mixer.kind if layer.channel is None else f"{layer.mixer.kind} + {layer.channel.kind}"
            known[spelled] = f"{name} (as layer {index})" if name in known.values() else name
        names.append(known[spelled])
    return tuple(names)


def _keep_one_of_each_kind(recipe: Recipe, system: System) -> dict[str, str]:
    """Drop all layers but the first of each kind; {kind: its name in the stack}."""
    blocks = system.model.stack.blocks
    kept: dict[str, str] = {}
    for kind, name in zip(_kinds(recipe), list(blocks), strict=True):
        if kind in kept:
            del blocks[name]
        else:
            kept[kind] = name
    return kept


def _batch(recipe: Recipe, system: System) -> Batch:
    rows, length = recipe.train.micro_sequences, recipe.data.sequence_length + 1
    made = Rows(
        tokens=np.zeros((rows, length), np.int64),
        document_ids=np.repeat(np.arange(rows, dtype=np.int32)[:, None], length, 1),
        positions=np.repeat(np.arange(length, dtype=np.int32)[None], rows, 0),
        samples=np.arange(rows),
        source=np.zeros(rows, np.int32),
    )
    return system.objective.prepare(made, seed=recipe.train.seed, step=0)


def _faked(batch: Batch, mode: FakeTensorMode) -> tuple[Batch, int]:
    """The batch on fake tensors, and the bytes of its own storages."""
    sizes: dict[int, int] = {}

    def change(value: Any) -> Any:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return mode.from_tensor(value)
        if isinstance(value, Mapping):
            return {name: change(item) for name, item in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: change(getattr(value, f.name)) for f in fields(value)})
        return value

    return change(batch), sum(sizes.values())


def _filler(mode: FakeTensorMode) -> Callable[..., None]:
    def fill(system: nn.Module, *_: Any) -> None:
        with mode:
            system.to_empty(device=CPU)

    return fill


def _held(spread: Spread, prefix: str) -> Iterator[Held]:
    for name, parameter in spread.parameters.items():
        if name.startswith(prefix):
            facts = spread.table[name]
            wide = facts.precision == "float32"
            yield Held(name, parameter.shape, spread.cuts[name].shape, parameter.element_size(), wide, facts)


@contextmanager
def _silent_ranks(world: int) -> Iterator[None]:
    """A process group of `world` ranks in which nothing is sent and this process is rank 0."""
    if world == 1:
        yield
        return
    if dist.is_initialized():
        raise RuntimeError("this process is a rank of a run: a layout's memory is planned before its ranks start")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
