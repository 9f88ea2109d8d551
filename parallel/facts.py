"""The vocabulary in which modules state facts about themselves, and the axis handles they call.

A model never imports ``torch.distributed`` and never learns how it is spread. It declares, on its *classes* (attributes
of a Parameter are lost by ``deepcopy``, ``to_empty`` and every wrapper), which dimension of which parameter is split,
how the optimizer must treat it, and what kind of region a module is. Whoever spreads the model reads only these facts.

Legend of the class attributes:

=================================  ===================================================================================
``tags = {parameter: dim}``        the dimension that is split with heads, channels or vocabulary; absent = replicated
``opt = {parameter: {...}}``       optimizer facts: ``lr_cap`` (float), ``decay`` (bool), ``matrix`` (bool, for Muon)
``traits = Traits(...)``           what the region (mixer, channel mixer) allows
``role``                           of a linear layer: ``column``, ``row`` or ``replicated``
``precision = "float32"``          parameters and arithmetic of this module are never lowered
=================================  ===================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

Role = Literal["column", "row", "replicated"]


@dataclass(frozen=True)
class Traits:
    """What a region (a mixer or a channel mixer) allows a layout to do.

    ``shard``: what tensor parallelism splits. ``cp``: ordered preference of ways to split the sequence; empty refuses
    it. ``units``: independent heads or channels, so that a layout that does not divide them is refused before a start.
    ``causal``: position t never sees positions after t. ``carries``: the region hands a state to the next segment.
    ``pp``: whether pipeline stages may cut around it. ``replaces_ffn``: the block needs no channel mixer after it.
    ``checkpointing``: activations may be recomputed.
    """

    shard: Literal["head", "channel", "ff", "none"] = "none"
    cp: tuple[Literal["state", "a2a", "ring", "pointwise"], ...] = ()
    units: int | None = None
    causal: bool = True
    carries: bool = False
    pp: bool = True
    replaces_ffn: bool = False
    checkpointing: bool = True


class Axis:
    """One direction in which a region may be split; this class is the identity of an unsplit one.

    Regions and frontends have attributes ``tp`` and ``cp`` that are this identity on the class; a layout replaces them
    on instances. Everything a model needs across ranks is one of these calls.
    """

    rank: int = 0
    size: int = 1

    def enter(self, x: Tensor) -> Tensor:
        """Entry of a split region: the identity forward, a sum over ranks backward."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """Exit of a split region: a sum over ranks forward, the identity backward."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks of a value whose result is replicated: the identity backward."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """Maximum over ranks, without gradient."""
        return x.detach()

    kind: str = ""
    """Of a split sequence: how the region joins its slices ("state", "a2a", "ring", "pointwise")."""

    @property
    def held(self) -> list[int]:
        """Of a split sequence: the places of this rank's slices in the row, in order."""
        return [0]

    def gather(self, *states: Tensor) -> tuple[Tensor, ...]:
        """Of a split sequence: (held, ...) of this rank's slices -> (slices, ...) of all, in the row's order."""
        return states

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """Of a split sequence: the whole row along `dim` from every rank's slices."""
        del dim
        return x

    def to_units(self, x: Tensor, unit_dim: int, length_dim: int) -> Tensor:
        """Of a split sequence: slices of all heads (channels) -> the whole row of this rank's share of them."""
        del unit_dim, length_dim
        return x

    def to_slices(self, x: Tensor, unit_dim: int, length_dim: int) -> Tensor:
        """The inverse of `to_units`."""
        del unit_dim, length_dim
        return x

    def ring(self, *arguments: Any) -> Tensor:
        """Of a split sequence: attention of this rank's queries over the whole row, `parallel.ring.split_attention`."""
        raise AssertionError("only a split row has a ring")

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's slice of what it holds whole, where hidden states between regions are slices; else all of it."""
        del dim
        return x


IDENTITY = Axis()


def on_share(core: nn.Module, axis: Axis, *arguments: Any) -> Any:
    """`core(*arguments)` with this rank's share of every parameter that it tags: what a rank computes that holds whole
    rows of a share of the channels. Gradients fall on the share; the sum over ranks makes them whole."""
    shares = {}
    for path, module in core.named_modules():
        tags: dict[str, int] = getattr(module, "tags", {})
        for name, parameter in module.named_parameters(recurse=False):
            if name in tags:
                share = parameter.chunk(axis.size, tags[name])[axis.rank]
                shares[f"{path}.{name}" if path else name] = share
    return torch.func.functional_call(core, shares, arguments)


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's axes. ``"all"`` takes what the other axes leave of the world."""

    dp_replicate: int | Literal["all"] = "all"
    dp_shard: int | Literal["all"] = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    schedule: str = "1f1b"
    engine: str = "native"
    sequence_parallel: bool = True
    """Between the regions of tensor parallelism, hidden states are slices of the row."""
    cp_order: Literal["contiguous", "zigzag"] = "zigzag"
    """How sequence slices are dealt; zigzag balances causal attention."""
    cp_kinds: tuple[str, ...] = ()
    """Ways of joining slices to take where a region allows them, before its own preference."""
    checkpointing: Literal["none", "full", "selective"] = "none"
    """What a block computes again in the backward."""
    compile: str | None = None
    """The backend of torch.compile for each block."""


@dataclass(frozen=True)
class ParameterFacts:
    """Resolved facts of one parameter under its fully qualified name."""

    name: str
    module: str
    kind: str
    dim: int | None = None
    role: Role | None = None
    precision: str | None = None
    lr_cap: float | None = None
    decay: bool = True
    matrix: bool = False


def parameter_table(model: nn.Module) -> dict[str, ParameterFacts]:
    """Facts of every parameter, resolved to fully qualified names before anything is wrapped.

    A shared parameter appears once, under the first name that reaches it. ``precision`` is inherited from the nearest
    enclosing module that declares one; ``kind`` is the room of the nearest enclosing region (``mixer``, ``channel``,
    ``frontend``, ...), used to report gradient norms by kind.
    """
    allowed = {f.name for f in fields(ParameterFacts)} - {"name", "module", "kind", "dim", "role", "precision"}
    table: dict[str, ParameterFacts] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        opt: dict[str, dict[str, Any]] = getattr(module, "opt", {})
        tags: dict[str, int] = getattr(module, "tags", {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            facts = dict(opt.get(name, {}))
            unknown = facts.keys() - allowed
            if unknown:
                place = f"{type(module).__name__}.opt[{name!r}]"
                raise ValueError(f"{place} names unknown facts {sorted(unknown)}; known: {sorted(allowed)}")
            full = f"{path}.{name}" if path else name
            table[full] = ParameterFacts(
                name=full,
                module=path,
                kind=_nearest(model, path, "room") or "other",
                dim=tags.get(name),
                role=getattr(module, "role", None),
                precision=_nearest(model, path, "precision"),
                **facts,
            )
    return table


def _nearest(model: nn.Module, path: str, attribute: str) -> Any:
    """The value of ``attribute`` on the innermost module at or above ``path`` whose class declares it."""
    found = getattr(model, attribute, None)
    module = model
    for part in path.split(".") if path else []:
        module = getattr(module, part) if not isinstance(module, nn.ModuleDict) else module[part]
        found = getattr(module, attribute, None) or found
    return found
