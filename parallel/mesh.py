"""The mesh: which axis of parallelism each process of a run serves, from a layout and the number of processes.

The order of the axes, slowest first, is pipeline, replicas, shards, sequence slices, tensor slices: what talks most
sits closest together, inside a node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from potamos.parallel.facts import Layout

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


class LayoutError(ValueError):
    """A layout that this run cannot have; names the axis and what to change."""


@dataclass(frozen=True)
class Sizes:
    """A layout in numbers: no "all" is left."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        """Processes."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def data(self) -> int:
        """How many ways a global batch is cut."""
        return self.dp_replicate * self.dp_shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """The place of a process on each axis."""
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return place

    def data_rank(self, rank: int) -> int:
        """Which part of the global batch a process reads: the same on all that share a row."""
        place = self.coordinates(rank)
        return place["dp_replicate"] * self.dp_shard + place["dp_shard"]

    def __str__(self) -> str:
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "1 process"


def sizes(layout: Layout, world: int) -> Sizes:
    """The sizes of a layout's axes among `world` processes. Raises LayoutError where they do not multiply to it."""
    given = {f.name: getattr(layout, f.name) for f in fields(Sizes)}
    open_axes = [axis for axis, size in given.items() if size == "all"]
    fixed = math.prod(size for size in given.values() if size != "all")
    if len(open_axes) > 1:
        raise LayoutError(f"parallel.{open_axes[1]}: only one axis can take what the others leave; give it a number")
    if world % fixed or (not open_axes and world != fixed):
        spelled = " x ".join(f"{axis} {size}" for axis, size in given.items() if size not in (1, "all")) or "1"
        near = _nearest(fixed, world) if open_axes else [fixed]
        raise LayoutError(
            f"parallel: {spelled} = {fixed} processes do not make up the {world} of this run; start "
            f"{' or '.join(map(str, near))}, or change an axis (dp_replicate: all takes what the others leave)"
        )
    given |= dict.fromkeys(open_axes, world // fixed)
    return Sizes(**given)


def _nearest(unit: int, wanted: int) -> list[int]:
    below = wanted // unit * unit
    return [n for n in (below, below + unit) if n > 0]


class Mesh:
    """This process's place and its groups: `group(axis, ...)` is the processes that differ in these axes alone."""

    def __init__(self, sizes: Sizes, rank: int, device: str = "cpu") -> None:
        self.sizes, self.rank = sizes, rank
        self.place = sizes.coordinates(rank)
        self._devices: DeviceMesh | None = None
        if sizes.world > 1:
            shape = tuple(getattr(sizes, axis) for axis in AXES)
            self._devices = init_device_mesh(device, shape, mesh_dim_names=AXES)

    def size(self, *axes: str) -> int:
        """Processes along the axes together."""
        return math.prod(getattr(self.sizes, axis) for axis in axes)

    def group(self, *axes: str) -> dist.ProcessGroup:
        """The processes that differ from this one in these axes alone, slowest axis first. Every rank must ask for the
        same groups in the same order: the first time makes them."""
        return self.devices(*axes).get_group()

    def devices(self, *axes: str) -> DeviceMesh:
        """The same as a one-dimensional mesh."""
        assert self._devices is not None, "one process has no groups"
        mesh = self._devices[axes if len(axes) > 1 else axes[0]]
        return mesh if len(axes) == 1 else mesh._flatten("_".join(axes))

    def grid(self, outer: tuple[str, ...], inner: tuple[str, ...]) -> DeviceMesh:
        """A two-dimensional mesh of two groups of axes: replicas of shards."""
        assert self._devices is not None, "one process has no groups"
        names = [a[0] if len(a) == 1 else "_".join(a) for a in (outer, inner)]
        for axes in (outer, inner):
            if len(axes) > 1:
                self.devices(*axes)
        return self._devices[tuple(names)]

    def index(self, *axes: str) -> int:
        """This process's rank in `group(*axes)`."""
        at = 0
        for axis in axes:
            at = at * getattr(self.sizes, axis) + self.place[axis]
        return at

    def active(self) -> Iterator[str]:
        """Axes with more than one process."""
        return (axis for axis in AXES if getattr(self.sizes, axis) > 1)
