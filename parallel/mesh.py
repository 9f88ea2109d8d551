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
    if layout.engine != "native":
        raise LayoutError(f"parallel.engine: {layout.engine!r} is not available in this version; use native")
    if layout.ep != 1:
        raise LayoutError(f"parallel.ep: {layout.ep} needs experts, and no layer of this model has any; set it to 1")
    given = {f.name: getattr(layout, f.name) for f in fields(Sizes)}
    open_axes = [axis for axis, size in given.items() if size == "all"]
    fixed = math.prod(size for size in given.values() if size != "all")
    if len(open_axes) > 1:
        raise LayoutError(f"parallel.{open_axes[1]}: only one axis can take what the others leave; give it a number")
    if world % fixed or (not open_axes and world != fixed):
        spelled = " x ".join(f"{axis} {size}" for axis, size in given.items() if size not in (1, "all")) or "1"
        near = _nearest(fixed, world) if open_axes else [fixed]
        raise LayoutError(
            f"parallel: {spelled} needs {' or '.join(map(str, near))} processes, and this run has {world}; start as "
            "many, or change an axis (dp_replicate: all takes what the others leave)"
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
        self._made: dict[tuple[str, ...], DeviceMesh] = {}
        active = tuple(self.active())
        if active:  # an axis of one process needs no group, and a group costs threads
            self._devices = init_device_mesh(
                device, tuple(getattr(sizes, axis) for axis in active), mesh_dim_names=active
            )

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
        active = tuple(axis for axis in axes if getattr(self.sizes, axis) > 1)
        if active not in self._made:  # torch works a slice of a mesh out anew each time
            whole = self._devices
            self._made[active] = whole[active[0]] if len(active) == 1 else whole[active]._flatten("_".join(active))
        return self._made[active]

    def grid(self, outer: tuple[str, ...], inner: tuple[str, ...]) -> DeviceMesh:
        """A two-dimensional mesh of two groups of axes: replicas of shards."""
        assert self._devices is not None, "one process has no groups"
        names = [name for axes in (outer, inner) for name in self.devices(*axes).mesh_dim_names or ()]
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
