"""Where this process stands among the ranks of a run, and the few collectives that the trainer calls by itself.

`torchrun` (or any launcher that sets the same variables) starts one process a device. `start` reads its environment,
joins the process group and returns a `Rank`; in a single process it joins nothing, and every function below is then
the identity, so the trainer has one path for one process and for a thousand.

    rank = start("cuda")
    try:
        ...
        if any_rank(stop_requested): ...
    finally:
        stop()

The collectives here serve decisions and counts: small tensors, no gradients. What mathematics needs inside a model
goes through an injected axis instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")

DEFAULT_TIMEOUT_SECONDS = 3600.0
"""Longer than the watchdog waits by default: its report says more than a collective's error."""

# Whether the process group is ours to destroy: a caller may have made it before `start`.
_owns_group = False

# The group of the collectives below on CPU tensors; None is the default group. It is one of their own because nothing
# else holds it, so `stop` really ends its threads. DDP never lets go of the group that it was given, and a gloo thread
# that frees a tensor while the interpreter shuts down aborts the process.
_control: dist.ProcessGroup | None = None


class LaunchError(ValueError):
    """The launcher's environment is incomplete, contradicts itself, or asks for a device that is not there."""


class PeerError(ValueError):
    """Another rank failed, and this one ends with it; the message is that rank's."""


@dataclass(frozen=True)
class Rank:
    """One process of a run. The default is the only process there is."""

    rank: int = 0  # in the whole run
    world: int = 1  # processes in the whole run
    local_rank: int = 0  # on this node; also the index of its GPU
    local_world: int = 1  # processes on this node
    node: int = 0

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes shared files and prints."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and GROUP_RANK as torchrun sets them.

        With none of the first three set, this is the single process. LOCAL_WORLD_SIZE defaults to WORLD_SIZE (one
        node) and GROUP_RANK, torchrun's name for the node, to RANK // LOCAL_WORLD_SIZE.

        Without them, in a Slurm step of several tasks, they are what `from_slurm` makes of its variables.

        Raises:
            LaunchError: some of RANK, WORLD_SIZE, LOCAL_RANK are set and others not; a value is no integer or out of
                range; more than one process without MASTER_ADDR and MASTER_PORT to meet at.
        """
        environment = {**from_slurm(environment), **environment}
        required = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        given = [name for name in required if name in environment]
        if not given:
            return cls()
        if missing := [name for name in required if name not in environment]:
            raise LaunchError(
                f"the environment sets {_named(given, environment)} but not {', '.join(missing)}. Start the command "
                f"with torchrun, which sets all of {', '.join(required)}, or unset {', '.join(given)} to run a single "
                "process."
            )
        world = _integer("WORLD_SIZE", environment, low=1)
        rank = _integer("RANK", environment, low=0, below=("WORLD_SIZE", world))
        local_world = _integer(
            "LOCAL_WORLD_SIZE", environment, low=1, below=("WORLD_SIZE + 1", world + 1), default=world
        )
        local_rank = _integer("LOCAL_RANK", environment, low=0, below=("LOCAL_WORLD_SIZE", local_world))
        node = _integer("GROUP_RANK", environment, low=0, below=("WORLD_SIZE", world), default=rank // local_world)
        meeting = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if world > 1 and meeting and not dist.is_initialized():
            raise LaunchError(
                f"WORLD_SIZE={world} asks for several processes, but {' and '.join(meeting)} (the address of rank 0, "
                "where they meet) is not set. Start the command with torchrun, or set it."
            )
        return cls(rank, world, local_rank, local_world, node)


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of a Slurm step (one task per GPU); {} outside of one, or where any is set.

    On one node the ranks meet at this machine, at a port from the job's number and its restarts, so that a requeued job
    does not meet the old one. On several nodes MASTER_ADDR and MASTER_PORT must be given: node names need not resolve.
    """
    step = environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID")
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if step is None or "SLURM_PROCID" not in environment or tasks == "1":
        return {}
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return {}
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "GROUP_RANK": environment.get("SLURM_NODEID", "0"),
    }
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1")
    if nodes == "1":
        job, restart = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + (7 * job + restart) % 12000)}
    elif tasks.isdigit() and nodes.isdigit() and int(tasks) % int(nodes) == 0:
        found["LOCAL_WORLD_SIZE"] = str(int(tasks) // int(nodes))
    return found


def start(device: str | torch.device = "cpu", *, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> Rank:
    """Join the process group that the environment describes and return this process's place in it.

    Args:
        device: "cpu" or "cuda". On CUDA this process's current device becomes `cuda:local_rank`.
        timeout: seconds after which a collective that some rank never entered raises on the others.

    With one process no group is made. On CPU the backend is gloo; on CUDA it is NCCL for CUDA tensors and gloo for CPU
    tensors, so that flags and counts never wait for a stream. A process group that exists already (a notebook's, a
    test's) is used as it is, and left alone by `stop`.

    Raises:
        LaunchError: see `Rank.from_environment`; also no CUDA device for this local rank, a device of another kind,
            or an existing group of another size than the environment says.
    """
    global _owns_group, _control
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise LaunchError(f"device {str(device)!r} is not supported: choose 'cpu' or 'cuda'")
    rank = Rank.from_environment()
    for name, value in from_slurm(os.environ).items():
        os.environ.setdefault(name, value)  # torch reads where to meet from there
    if kind == "cuda":
        _select_gpu(rank)
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank.rank, rank.world):
            raise LaunchError(
                f"the process group already open has rank {dist.get_rank()} of {dist.get_world_size()}, the "
                f"environment says rank {rank.rank} of {rank.world}. Set RANK and WORLD_SIZE to match, or close it."
            )
    elif rank.world > 1:
        dist.init_process_group(
            "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl",
            rank=rank.rank,
            world_size=rank.world,
            timeout=timedelta(seconds=timeout),
            device_id=torch.device("cuda", rank.local_rank) if kind == "cuda" else None,
        )
        _owns_group = True
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, dist.ProcessGroup)
        _control = group
    return rank


def stop() -> None:
    """Leave the process group that `start` joined. Does nothing if it joined none."""
    global _owns_group, _control
    if _owns_group:
        _control = None
        dist.destroy_process_group()
        _owns_group = False


def world_size() -> int:
    """Number of processes in the run: 1 without a process group."""
    if dist.is_initialized():
        return dist.get_world_size()
    # Identity collectives in a process that torchrun started beside others would train each rank alone, silently.
    assert os.environ.get("WORLD_SIZE", "1") == "1", "WORLD_SIZE is set, but start() was not called (or stop() was)"
    return 1


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, equal on every rank. Shape, dtype and device are kept; the argument is not changed.

    Carries no gradient. In one process this is the argument itself, detached.
    """
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_max(tensor: torch.Tensor) -> torch.Tensor:
    """Element-wise maximum over ranks; otherwise as `all_sum`. A NaN may be lost: ask `any_rank` for those."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def _all_reduce(tensor: torch.Tensor, operation: Any) -> torch.Tensor:
    tensor = tensor.detach()
    if world_size() == 1:
        return tensor
    # A strided tensor would be reduced in memory order on each rank, which need not be the same order everywhere.
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=operation, group=_group(result))
    return result


def _group(tensor: torch.Tensor) -> dist.ProcessGroup | None:
    return _control if tensor.device.type == "cpu" else None


def any_rank(flag: bool) -> bool:
    """True on every rank when `flag` is true on at least one. Every rank must call it at the same point."""
    return bool(all_max(torch.tensor([int(bool(flag))])).item())


def together(action: Callable[[], T]) -> T:
    """`action()` on every rank; where it raises on some, it raises on all, so that none waits for one that has left.

    A rank that failed raises its own error, the others a `PeerError` with the message of the first of those.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    if any_rank(error is not None):
        fail_together(error)
    return cast(T, result)


def on_main(action: Callable[[], T]) -> T | None:
    """`action()` on the main rank, whose result it returns there, and None elsewhere, once it is done.

    What one rank does for all may fail, and the others, who wait for it next, would wait in vain: a failure is raised
    on all, as by `together`.
    """
    is_main = world_size() == 1 or dist.get_rank() == 0
    return together(lambda: action() if is_main else None)


def fail_together(error: Exception | None) -> NoReturn:
    """End every rank, once all know that at least one has an `error` (None on the others).

    Raises:
        the rank's own error where it has one, else a `PeerError` with the message of the first rank that has.
    """
    message = first_failure(error)
    assert message is not None, "no rank has an error"
    raise error or PeerError(message)


def first_failure(error: Exception | None) -> str | None:
    """What went wrong on the first rank that has an `error`, in words, on every rank; None where none has one."""
    world = world_size()
    rank = dist.get_rank() if world > 1 else 0
    first = world - int(all_max(torch.tensor(0 if error is None else world - rank)).item())
    if first == world:
        return None
    message = broadcast_object(None if error is None else _in_words(error), first)
    return message if world == 1 else f"rank {first}: {message}"


def _in_words(error: Exception) -> str:
    """What a user reads; the type as well where it is no mistake of theirs."""
    text = str(error)
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def barrier() -> None:
    """Return once every rank has called this. Waits on the host; no CUDA stream is involved."""
    if world_size() > 1:
        all_sum(torch.zeros(1))  # a CPU tensor, hence gloo: dist.barrier would enqueue work on the GPU


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Rank `source`'s `value` on every rank; the other ranks' `value` is ignored.

    The value travels as JSON (no pickle), and every rank, the source and a single process included, gets what JSON
    makes of it: tuples become lists, integer keys strings. So nothing depends on the number of ranks.

    Raises:
        TypeError: the value is no JSON value. Raised on every rank, so that none is left waiting.
        LaunchError: no such `source`.
    """
    world = world_size()
    if not 0 <= source < world:
        raise LaunchError(f"source {source} is no rank of a run with {world}: use 0 to {world - 1}")
    is_source = world == 1 or dist.get_rank() == source
    text, problem = None, None
    if is_source:
        try:
            text = json.dumps(value)
        except (TypeError, ValueError) as error:  # ValueError: a value that contains itself
            problem = f"cannot send {type(value).__name__} between ranks: {error}"
    if world > 1:
        text, problem = json.loads(_broadcast_text(json.dumps([text, problem]) if is_source else None, source))
    if problem is not None:
        raise TypeError(problem)
    assert text is not None
    return json.loads(text)


def _broadcast_text(text: str | None, source: int) -> str:
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text is not None else None
    length = torch.tensor([0 if content is None else content.numel()])
    dist.broadcast(length, source, group=_control)
    buffer = torch.empty(int(length), dtype=torch.uint8) if content is None else content
    dist.broadcast(buffer, source, group=_control)
    return bytes(buffer.tolist()).decode()


def _select_gpu(rank: Rank) -> None:
    count = torch.cuda.device_count()
    if rank.local_rank >= count:
        seen = "no CUDA device" if count == 0 else f"{count} CUDA device{'s' if count > 1 else ''}"
        raise LaunchError(
            f"LOCAL_RANK={rank.local_rank} needs cuda:{rank.local_rank}, but this process sees {seen}. Start at most "
            "one process per GPU (torchrun --nproc-per-node), check CUDA_VISIBLE_DEVICES, or choose device cpu."
        )
    torch.cuda.set_device(rank.local_rank)


def _integer(
    name: str,
    environment: Mapping[str, str],
    *,
    low: int,
    below: tuple[str, int] | None = None,
    default: int | None = None,
) -> int:
    if default is not None and name not in environment:
        return default
    text = environment[name]
    try:
        value = int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r} in the environment is no integer") from None
    if value < low or (below is not None and value >= below[1]):
        bound = "" if below is None else f" and less than {below[0]} = {below[1]}"
        raise LaunchError(f"{name}={value} in the environment must be at least {low}{bound}")
    return value


def _named(names: list[str], environment: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={environment[name]}" for name in names)
