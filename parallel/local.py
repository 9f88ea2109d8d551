"""Runs one function on several gloo ranks of this machine, forked from this process.

Forking a process that has already imported torch starts eight ranks in about a quarter of a second, where a fresh
interpreter for each would take many seconds. Ranks meet through a file, so no port is taken and several callers may run
side by side. For CPUs: a process that has used a GPU cannot be forked.

What a rank returns comes back through an anonymous pipe as a pickle. Nothing but a child of this very process, running
this very code, holds the writing end, so no outside bytes are ever unpickled; and pickle carries exactly what callers
return (tensors of every dtype, nested dicts) and the exception objects that they expect.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import os
import pickle
import selectors
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02
# A rank that is killed makes its peers fail within milliseconds ("Connection closed by peer"). After the first failure
# the parent waits this long for the others, so that it can tell the cause from its echoes.
GRACE_SECONDS = 0.3


class RankError(RuntimeError):
    """A rank failed without an exception that can be raised here: it died, or its exception cannot be pickled."""


class RankTimeout(RankError):
    """The ranks did not all return in time; the message holds each stuck rank's stack."""


@dataclass(frozen=True)
class _Job:
    """What every rank of one call is given."""

    world: int
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    timeout: float
    threads: int
    port: int | None  # set when `fn` makes the process group itself
    scratch: Path


@dataclass
class _Child:
    """One forked rank as its parent sees it."""

    rank: int
    pid: int
    pipe: int
    received: bytearray = field(default_factory=bytearray)
    pipe_open: bool = True
    status: int | None = None  # waitpid's status once the process has ended
    seen_at: float = 0.0  # when its report or its death was noticed (monotonic seconds)
    report: dict[str, Any] | None = None

    @property
    def failed(self) -> bool:
        return "error" in self.report if self.report is not None else self.status is not None

    @property
    def vanished(self) -> bool:
        """Ended without a word: killed by a signal, or left through os._exit."""
        return self.report is None and self.status is not None

    def describe(self) -> str:
        if self.report is not None:
            return f"rank {self.rank} raised:\n{self.report['traceback']}" if self.failed else ""
        assert self.status is not None
        if os.WIFSIGNALED(self.status):
            return f"rank {self.rank} died by {signal.Signals(os.WTERMSIG(self.status)).name}"
        return f"rank {self.rank} exited with status {os.WEXITSTATUS(self.status)} before it returned"


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, init: bool = True, threads: int = 1
) -> list[Any]:
    """Run `fn(rank, world, *args)` in `world` forked processes and return their results in the order of ranks.

    Args:
        world: number of ranks.
        fn: any callable, closures included (a fork needs no pickle to hand it over).
        timeout: seconds for all ranks together, start included; also the timeout of every gloo collective.
        init: True enters a gloo process group before `fn`. False leaves that to `fn` and sets MASTER_ADDR and
            MASTER_PORT to a free local port beside the variables below.
        threads: torch threads of each rank.

    Each rank sees torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and GROUP_RANK in its environment.

    Raises:
        the exception of the rank that failed first, its traceback and the other ranks' failures in its notes;
        RankError when a rank died or its exception cannot be pickled; RankTimeout.
        In each case every rank has been killed and reaped before the error is raised.
    """
    assert world >= 1, world
    _preload()
    sys.stdout.flush()
    sys.stderr.flush()  # or each child prints the parent's unwritten text once more
    hold_read, hold_write = os.pipe()  # children stay, sockets open, until the parent closes its end
    children: list[_Child] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        job = _Job(world, fn, args, timeout, threads, None if init else _free_port(), Path(scratch))
        try:
            for rank in range(world):
                read, write = os.pipe()
                with warnings.catch_warnings():
                    # Python 3.12 warns of forking beside threads (torch's, a timer's). The child runs on one
                    # thread of its own and takes no lock of theirs: it never returns into this code.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    pid = os.fork()
                if pid == 0:
                    os.close(hold_write)
                    os.close(read)
                    for sibling in children:
                        os.close(sibling.pipe)
                    _child(rank, job, write, hold_read)
                os.close(write)
                os.set_blocking(read, False)
                children.append(_Child(rank, pid, read))
            finished = _collect(children, time.monotonic() + timeout)
            stacks = "" if finished else _stacks(children, job.scratch)
        finally:
            os.close(hold_write)
            os.close(hold_read)
            _reap(children)
    _raise_first_failure(children)
    if not finished:
        stuck = ", ".join(str(child.rank) for child in children if child.report is None)
        raise RankTimeout(f"rank {stuck} of {world} did not return within {timeout:g} s\n{stacks}")
    return [child.report["value"] for child in children if child.report is not None]


@functools.cache
def _preload() -> None:
    """Import, once and before any fork, what each rank would otherwise spend one to four seconds importing."""
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.pipelining
    import torch.distributed.tensor.parallel  # noqa: F401


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(rank: int, job: _Job, write: int, hold: int) -> None:
    """The forked process: run, report, wait until the parent lets go. Never returns."""
    try:
        _die_with_parent()
        # Python's own handlers cannot run while a rank waits inside gloo; faulthandler's is plain C.
        stack_file = (job.scratch / f"stack-{rank}").open("w")
        faulthandler.register(signal.SIGUSR2, file=stack_file, all_threads=False)
        try:
            report = {"value": _call(rank, job)}
            payload = pickle.dumps(report)
        except BaseException as error:  # also SystemExit, KeyboardInterrupt and a test's own outcomes
            payload = _failure(error)
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(write, "wb") as pipe:
            pipe.write(payload)
        os.read(hold, 1)  # returns when the parent closes its end, or is gone
    finally:
        os._exit(0)  # no atexit, no teardown: those belong to the parent


def _call(rank: int, job: _Job) -> Any:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(job.threads)  # the parent's OpenMP threads do not exist here; waiting for them would hang
    world = str(job.world)
    os.environ.update(RANK=str(rank), WORLD_SIZE=world, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=world, GROUP_RANK="0")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name need not resolve
    if job.port is not None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job.port))
    else:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job.scratch}/rendezvous",
            rank=rank,
            world_size=job.world,
            timeout=timedelta(seconds=job.timeout),
        )
    return job.fn(rank, job.world, *job.args)


def _failure(error: BaseException) -> bytes:
    """The report of a rank that raised. The exception object travels only if it survives a round trip."""
    report: dict[str, Any] = {"error": None, "traceback": "".join(traceback.format_exception(error))}
    report["at"] = time.monotonic()
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        report["error"] = error
    return pickle.dumps(report)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _collect(children: list[_Child], deadline: float) -> bool:
    """Read reports until all ranks have one, or one has failed (and its echoes are in); False past the deadline."""
    failed_at: float | None = None
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.pipe, selectors.EVENT_READ, child)
        while True:
            for key, _ in selector.select(POLL_SECONDS):
                _read(key.data)
                if not key.data.pipe_open:
                    selector.unregister(key.fd)
            now = time.monotonic()
            for child in children:
                _poll(child, now)
            if all(child.report is not None or child.status is not None for child in children):
                return True
            if failed_at is None and any(child.failed for child in children):
                failed_at = now
            if failed_at is not None and now - failed_at > GRACE_SECONDS:
                return True
            if now > deadline:
                return failed_at is not None
            if not selector.get_map():
                time.sleep(POLL_SECONDS)


def _read(child: _Child) -> None:
    """Take what the pipe holds; at its end, parse the report (a killed writer leaves half a one, or none)."""
    while child.pipe_open:
        try:
            chunk = os.read(child.pipe, 1 << 20)
        except BlockingIOError:
            return
        child.received += chunk
        if not chunk:
            child.pipe_open = False
            with contextlib.suppress(EOFError, pickle.UnpicklingError):
                report = pickle.loads(child.received)
                child.report, child.seen_at = report, report.get("at", time.monotonic())


def _poll(child: _Child, now: float) -> None:
    if child.status is None:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid:
            child.status, child.seen_at = status, child.seen_at or now
            _read(child)


def _stacks(children: list[_Child], scratch: Path) -> str:
    """Where each rank that has not reported is waiting."""
    stuck = [child for child in children if child.report is None and child.status is None]
    for child in stuck:
        os.kill(child.pid, signal.SIGUSR2)
    time.sleep(GRACE_SECONDS)
    files = ((child.rank, scratch / f"stack-{child.rank}") for child in stuck)
    return "\n".join(f"rank {rank} was at:\n{file.read_text()}" for rank, file in files if file.exists())


def _reap(children: list[_Child]) -> None:
    """End every child that is still there. Ranks that reported leave by themselves; the others are killed."""
    for child in children:
        os.close(child.pipe)
        if child.status is None and child.report is None:
            os.kill(child.pid, signal.SIGKILL)
    patience = time.monotonic() + 2.0
    for child in children:
        while child.status is None and time.monotonic() < patience:
            _poll_exit(child)
        if child.status is None:
            os.kill(child.pid, signal.SIGKILL)
            child.status = os.waitpid(child.pid, 0)[1]


def _poll_exit(child: _Child) -> None:
    pid, status = os.waitpid(child.pid, os.WNOHANG)
    if pid:
        child.status = status
    else:
        time.sleep(0.001)


def _raise_first_failure(children: list[_Child]) -> None:
    """Raise the cause. A rank that vanished comes before one that raised: the second is most likely its echo."""
    failures = sorted((c for c in children if c.failed and c.seen_at), key=lambda c: (not c.vanished, c.seen_at))
    if not failures:
        return
    first, *echoes = failures
    error = first.report["error"] if first.report is not None else None
    if error is None:
        error = RankError(first.describe())
    else:
        error.add_note(first.describe())
    for echo in echoes:
        error.add_note(f"then {echo.describe()}")
    raise error
