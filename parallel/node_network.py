"""The part of `node_check` that nodes do together: meet, see one folder, compare clocks, reduce, exchange in pairs.

They meet at a key-value store on the head node (MASTER_ADDR, MASTER_PORT, as training will), which says who is missing
where a process group would only time out. The head writes the record of a node that cannot write it itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from potamos.parallel.node_local import Machine, Stages
from potamos.parallel.node_record import Limits, Record

PASS_ON_SECONDS = 10.0
"""How long the head waits for the others' last words, and they for the head's file."""
CLOCK_ROUNDS = 5
ROUNDS = 3
REDUCED = {"cpu": 2**22, "cuda": 2**26}
EXCHANGED = {"cpu": 2**20, "cuda": 2**24}
"""Numbers of 4 bytes."""


def examine(
    record: Record,
    limits: Limits,
    machine: Machine,
    run: Path,
    gpus: int,
    stages: Stages,
    save: Callable[[], bool],
    save_of: Callable[[Record], object],
) -> None:
    """Fill in what is found between the nodes, and save the record; `save_of` writes that of another node.

    Every node of the job must call it, those with problems too: the others would take them for missing.
    """
    token = _leave_token(record, run) if record.rank == 0 else None
    try:
        with stages.stage("the meeting", 2.0):
            store, cards = _meet(record, {"node": record.node, "gpus": gpus, "token": token}, limits.timeout)
        if store is None:
            save()
            return
        try:
            if cards is not None:
                with stages.stage("the shared folder"):
                    _look_for_token(record, run, cards[0], min(limits.timeout, PASS_ON_SECONDS))
                _work_together(record, limits, machine, store, cards, stages)
        except RuntimeError as error:  # every error of torch.distributed is one
            record.network = record.network or _first_line(error)
        with stages.stage("the last words", 2.0), contextlib.suppress(RuntimeError):
            _pass_on(record, store, saved=save(), save_of=save_of)
    finally:
        if token is not None:
            Path(run, token[0]).unlink(missing_ok=True)


def _meet(record: Record, card: dict[str, Any], seconds: float) -> tuple[Store | None, list[Any] | None]:
    """The store, None where it cannot be reached, and all nodes' cards in the order of ranks, None where one lacks."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience, began = timedelta(seconds=seconds), time.monotonic()
    record.met = False  # also where the attempt itself never ends
    try:
        store = TCPStore(address, port, record.world, record.rank == 0, timeout=patience, wait_for_workers=False)
    except RuntimeError as error:
        doing = "cannot listen at" if record.rank == 0 else "cannot reach the head node at"
        record.network = f"{doing} {address}:{port}: {_first_line(error)}"
        return None, None
    record.met = True
    names = [f"here/{rank}" for rank in range(record.world)]
    try:
        store.set(names[record.rank], json.dumps(card))
        left = max(0.1, seconds - (time.monotonic() - began))
        store.wait(names, timedelta(seconds=left))
        if store.check(["closed"]):
            record.network = f"came to the meeting after the others had waited {seconds:g} s for it"
            return store, None
        return store, [json.loads(store.get(name)) for name in names]
    except RuntimeError:
        record.network = f"the head node left the meeting at {address}:{port}"
        with contextlib.suppress(RuntimeError):
            store.set("closed", "")
            record.missing = [rank for rank, name in enumerate(names) if not store.check([name])]
            waited = ", ".join(map(str, record.missing))
            record.network = f"waited {seconds:g} s at {address}:{port} for rank {waited} of {record.world}"
        return store, None


def _pass_on(record: Record, store: Store, *, saved: bool, save_of: Callable[[Record], object]) -> None:
    """Tell the head what was found; it writes down what others cannot, and leaves after all who came."""
    line = record.line().decode()
    store.set(f"end/{record.rank}", json.dumps({"saved": saved, "line": line}))
    if record.rank != 0:
        if not saved:
            store.wait([f"written/{record.rank}"], timedelta(seconds=PASS_ON_SECONDS))
        return
    end = time.monotonic() + PASS_ON_SECONDS
    for rank in range(1, record.world):
        with contextlib.suppress(RuntimeError):
            if not store.check([f"here/{rank}"]):
                continue
            store.wait([f"end/{rank}"], timedelta(seconds=max(0.1, end - time.monotonic())))
            told = json.loads(store.get(f"end/{rank}"))
            if not told["saved"]:
                other = Record.parse(told["line"])
                other.problem("run folder", "could not write its record; the head node wrote it down")
                save_of(other)
                store.set(f"written/{rank}", "")


# --- one folder ---------------------------------------------------------------------------------------------------


def _leave_token(record: Record, run: Path) -> tuple[str, str] | None:
    """(name, content) of a file that the others look for; None where the head cannot write, which its record says."""
    name, content = f".preflight-{record.attempt}.shared-{secrets.token_hex(4)}", secrets.token_hex(16)
    try:
        (run / name).write_text(content)
    except OSError:
        return None
    return name, content


def _look_for_token(record: Record, run: Path, head: dict[str, Any], seconds: float) -> None:
    """Whether this node's run folder is the head's. File servers may take seconds to show a new file."""
    if head["token"] is None:
        return
    name, content = head["token"]
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if (run / name).read_text() == content:
                return
        if time.monotonic() > end:
            return record.problem("run folder", f"{run.absolute()} is not the one of {head['node']}: it is not shared")
        time.sleep(0.1)


# --- clocks and collectives ---------------------------------------------------------------------------------------


def _work_together(
    record: Record, limits: Limits, machine: Machine, store: Store, cards: list[Any], stages: Stages
) -> None:
    """Everything that needs a process group. As many GPUs take part as the node with the fewest has."""
    rails = min(card["gpus"] for card in cards)
    with stages.stage("the process group"):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if rails else "gloo",
            store=PrefixStore("group", store),
            rank=record.rank,
            world_size=record.world,
            timeout=timedelta(seconds=2 * limits.timeout),  # the stage's own limit comes first
        )
    with stages.stage("the clocks"):
        _compare_clocks(record, limits, machine)
    rates = []
    for device in [f"cuda:{gpu}" for gpu in range(rails)] or ["cpu"]:
        with stages.stage(f"the all-reduce of {device}"):
            rates.append(round(_reduce(record, device), 3))
    record.figures["all_reduce_gb_s"] = rates
    if limits.pairs:
        with stages.stage("the pairs"):
            record.figures["pairs_gb_s"] = _exchange(record, cards, "cuda:0" if rails else "cpu")
    if record.network is None:
        with stages.stage("the end"):
            dist.destroy_process_group()


def _compare_clocks(record: Record, limits: Limits, machine: Machine) -> None:
    """Seconds between this clock and the usual one (of two nodes, the head's), read just after all have met.

    What delays one of them in between only adds to the difference, so the smallest of several counts.
    """
    differences, to_head = [], []
    for _ in range(CLOCK_ROUNDS):
        dist.all_reduce(torch.zeros(1))
        now = torch.tensor([machine.now()], dtype=torch.float64)
        clocks = [torch.empty_like(now) for _ in range(record.world)]
        dist.all_gather(clocks, now)
        times = [clock.item() for clock in clocks]
        usual = statistics.median_low(times) if record.world > 2 else times[0]
        differences.append(now.item() - usual)
        to_head.append(now.item() - times[0])
    skew = min(differences, key=abs)
    record.figures |= {"skew_to_head_s": round(min(to_head, key=abs), 3), "skew_to_nodes_s": round(skew, 3)}
    if abs(skew) > limits.skew:
        way = "ahead of" if skew > 0 else "behind"
        whose = "most nodes'" if record.world > 2 else "the head node's"
        record.problem("clock", f"this node's clock is {abs(skew):.1f} s {way} {whose}; limit {limits.skew:g} s")


def _reduce(record: Record, device: str) -> float:
    """Sum whole numbers over the nodes; the bus bandwidth in GB/s, that of NCCL's tests: 2 (n - 1) / n bytes a byte."""
    size = REDUCED[device.partition(":")[0]]
    expected = record.world * (record.world + 1) / 2
    best = float("inf")
    for round_ in range(1 + ROUNDS):  # the first one connects
        values = torch.full((size,), record.rank + 1.0, device=device)
        dist.all_reduce(torch.zeros(1))
        began = time.monotonic()
        dist.all_reduce(values)
        right = bool((values == expected).all())  # waits for the device
        if round_:
            best = min(best, time.monotonic() - began)
        if not right:
            wrong = values[values != expected][0].item()
            record.network = record.network or f"the all-reduce of {device} gives {wrong:g} instead of {expected:g}"
    return 2 * (record.world - 1) / record.world * 4 * size / best / 1e9


def _exchange(record: Record, cards: list[Any], device: str) -> dict[str, float]:
    """GB/s of sending to and receiving from each other node, all nodes in pairs at a time."""
    sent = torch.ones(EXCHANGED[device.partition(":")[0]], device=device)
    found: dict[str, float] = {}
    for partners in _tournament(record.world):
        peer = partners[record.rank]
        best = float("inf")
        for _ in range(1 + ROUNDS):
            received = torch.empty_like(sent)
            dist.all_reduce(torch.zeros(1))
            if peer == record.rank:
                continue
            began = time.monotonic()
            both = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
            for work in dist.batch_isend_irecv(both):
                work.wait()
            received[-1].item()  # waits for the device
            best = min(best, time.monotonic() - began)
        if peer != record.rank:
            found[cards[peer]["node"]] = round(4 * sent.numel() / best / 1e9, 3)
    return found


def _tournament(count: int) -> list[list[int]]:
    """Rounds in which each meets one other; each pair meets once. An odd one rests, which is to meet itself."""
    seats = count + count % 2
    rounds = []
    for shift in range(seats - 1):
        circle = [0, *((shift + place) % (seats - 1) + 1 for place in range(seats - 1))]
        partners = list(range(count))
        for left, right in zip(circle[: seats // 2], reversed(circle[seats // 2 :]), strict=True):
            if max(left, right) < count:
                partners[left], partners[right] = right, left
        rounds.append(partners)
    return rounds


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
