"""Tensor parallelism: every split region's parameters are cut along their declared dimension, and its axis set.

A region (mixer or channel mixer) is split where its trait names what to shard. Inside it, column layers and tagged
parameters hold this rank's slice, row layers sum; the region is entered once and left in its row layer. A region that
cannot be split runs whole on every rank, each on the full row.

Parameters become plain local tensors: the model, its kernels and its optimizer never meet a distributed type here. What
was cut, and whose gradients are partial sums, is remembered by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potamos.parallel.axes import TensorAxis
from potamos.parallel.facts import Axis, Traits
from potamos.parallel.mesh import LayoutError


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism treats one parameter.

    dim: the dimension that is cut, None where every rank holds all of it. partial: the gradient of each rank is a part
    of a sum. shape: of the whole parameter.
    """

    dim: int | None
    partial: bool
    shape: torch.Size


def is_region(module: nn.Module) -> bool:
    """A mixer or a channel mixer, by what its class declares."""
    return getattr(module, "room", None) in ("mixer", "channel")


def traits_of(region: nn.Module) -> Traits:
    """What a region allows."""
    return region.traits  # pyright: ignore[reportReturnType]


def is_frontend(module: nn.Module) -> bool:
    """What embeds and scores."""
    return getattr(module, "room", None) == "frontend"


def check_units(system: nn.Module, ranks: int) -> None:
    """Refuse a size that does not divide the heads or channels of a region, or a table's entries, before anything is
    built: all that it does not divide, and the nearest sizes that divide everything."""
    units: dict[tuple[int, str], str] = {}
    tables: dict[int, str] = {}
    for path, region in system.named_modules():
        count = traits_of(region).units if is_region(region) and traits_of(region).shard != "none" else None
        if count is not None:
            what = {"head": "key-value heads", "ff": "inner channels"}.get(traits_of(region).shard, "channels")
            units.setdefault((count, what), path)
        if is_frontend(region):
            for name, parameter, dim in _tagged(region):
                tables.setdefault(parameter.shape[dim], f"{path}.{name}")
    bad = [f"the {count} {what} of {path}" for (count, what), path in units.items() if count % ranks]
    bad += [f"the {count} entries of {path}" for count, path in tables.items() if count % ranks]
    if bad:
        remedy = _near(ranks, [count for count, _ in units], list(tables))
        raise LayoutError(f"parallel.tp: {ranks} does not divide {', '.join(bad)}; {remedy}")


def _near(ranks: int, units: list[int], tables: list[int]) -> str:
    """The nearest sizes below and above that divide all; and what vocabulary would let through a nearer one, for a
    vocabulary is easily padded."""

    def around(numbers: list[int]) -> list[int]:
        common = math.gcd(*numbers)
        fits = [n for n in range(1, common + 1) if common % n == 0]
        return [*[n for n in fits if n < ranks][-1:], *[n for n in fits if n >= ranks][:1]]

    words = [f"use {' or '.join(map(str, around([*units, *tables])))}"]
    for n in around(units) if units else [ranks]:
        padded = {-(-count // n) * n for count in tables if count % n}
        if padded:
            words.append(f"{n} with a vocabulary of {', '.join(map(str, sorted(padded)))}")
    return ", or ".join(words)


def split(system: nn.Module, axis: TensorAxis | None) -> dict[str, Cut]:
    """Cut `system` for this rank in place; returns what was done to each parameter, by name. None cuts nothing."""
    cuts: dict[str, Cut] = {}
    seen: dict[int, nn.Parameter] = {}
    for path, module, region in _with_regions(system):
        inside = region is not None and (is_frontend(region) or traits_of(region).shard != "none")
        if axis is not None:
            _connect(module, region, inside, axis)
        tags: dict[str, int] = getattr(module, "tags", {}) if inside else {}
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:  # shared: cut once
                module._parameters[name] = seen[id(parameter)]
                continue
            full = f"{path}.{name}" if path else name
            dim = tags.get(name)
            after = getattr(module, "role", None) == "row" and name == "bias"
            if axis is None:
                cuts[full] = Cut(None, False, parameter.shape)
                continue
            split_region = inside and region is not None and not is_frontend(region)
            partial = dim is None and (axis.sequence or (split_region and not after))
            cuts[full] = Cut(dim, partial, parameter.shape)
            if dim is not None:
                local = nn.Parameter(_slice(parameter.detach(), dim, axis), requires_grad=parameter.requires_grad)
                seen[id(parameter)] = module._parameters[name] = local
        if axis is not None:
            for name, buffer in list(module.named_buffers(recurse=False)):
                if name in tags:
                    module._buffers[name] = _slice(buffer, tags[name], axis)
    return cuts


def _slice(x: Tensor, dim: int, axis: Axis) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank].clone(memory_format=torch.contiguous_format)


def _connect(module: nn.Module, region: nn.Module | None, inside: bool, axis: TensorAxis) -> None:
    """Give the axis to whom it concerns: split regions and their row layers, frontends, and what lies between."""
    if region is None or is_frontend(region):
        if hasattr(module, "tp"):
            module.tp = axis  # pyright: ignore[reportArgumentType]
        return
    if inside and hasattr(module, "tp"):
        module.tp = axis  # pyright: ignore[reportArgumentType]
    if module is region and (inside or axis.sequence):
        module.register_forward_pre_hook(lambda _, inputs: (axis.enter(inputs[0]), *inputs[1:]))
        if not inside:  # whole on every rank: hand on this rank's slice
            module.register_forward_hook(lambda _, __, out: _leave(out, axis))


def _leave(out: Any, axis: Axis) -> Any:
    out.hidden = axis.own(out.hidden)
    return out


def _tagged(region: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    for path, module in region.named_modules():
        for name, dim in getattr(module, "tags", {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                yield (f"{path}.{name}" if path else name), parameter, dim


def _with_regions(system: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Every module with its path and the innermost region or frontend that it is part of."""

    def walk(path: str, module: nn.Module, region: nn.Module | None) -> Iterator[Any]:
        here = module if is_region(module) or is_frontend(module) else region
        yield path, module, here
        for name, child in module.named_children():
            yield from walk(f"{path}.{name}" if path else name, child, here)

    seen: set[int] = set()
    for path, module, region in walk("", system, None):
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module, region
