"""Which nodes of a job are to be left out, from the records that they left. Standard library only."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from potamos.parallel.node_record import Record, record_path

JUDGED, NONE_PASSED = 0, 4
SHARED_CHECKS = ("run folder", "run disk")
"""What is as likely the fault of a server that all nodes use."""
SLOW = 0.5
"""Share of the usual bandwidth below which a node is pointed out."""


def judge(folder: Path, attempt: int, nodes: Sequence[str]) -> int:
    """Print the bad nodes, a line each, and why on standard error.

    Returns:
        0, or 4 where no node has passed, so that leaving them out would not help: the job, the shared folder or the
        cluster is at fault. Then nothing is printed.
    """
    records = {node: read_record(folder, attempt, node) for node in nodes}
    bad = find_bad(records)
    for node, reason in bad.items():
        print(f"{node}: {reason}", file=sys.stderr)
    for warning in slow_nodes([record for record in records.values() if record is not None]):
        print(f"warning: {warning}", file=sys.stderr)
    if bad and len(bad) == len(nodes) and not (len(nodes) == 1 and _is_of_one_node(records[nodes[0]])):
        print(f"none of {len(nodes)} nodes passed the check; leaving them out would not mend that", file=sys.stderr)
        return NONE_PASSED
    for node in bad:
        print(node)
    return JUDGED


def read_record(folder: Path, attempt: int, node: str) -> Record | None:
    """None where there is none, or where it is of no use."""
    try:
        return Record.parse(record_path(folder, attempt, node).read_bytes())
    except (OSError, ValueError):
        return None


def find_bad(records: Mapping[str, Record | None]) -> dict[str, str]:
    """Bad nodes and why, in the order of `records`.

    A node's own problems make it bad, and so does the lack of a record. Trouble between nodes counts against those
    whom the others waited for, then against the head that most did not reach, or the few that did not reach it. What
    is left of it is taken for an echo where anything was found, else for the fault of the few that met it, if few did.
    """
    bad: dict[str, str] = {}
    for node, record in records.items():
        if record is None:
            bad[node] = "left no record: it hangs, was ended, or cannot write into the folder"
        elif record.problems:
            bad[node] = "; ".join(f"{check}: {words}" for check, words in record.problems)
    known = {node: record for node, record in records.items() if record is not None}
    here = [record for record in known.values() if record.met]
    for node, record in known.items():
        waiting = [other for other in here if other.node != node and record.rank in other.missing]
        if node not in bad and len(waiting) * 2 > len([other for other in here if other.node != node]):
            bad[node] = f"did not come to the meeting: {len(waiting)} of {len(known) - 1} others waited for it"
    head = next((node for node, record in known.items() if record.rank == 0), None)
    cut_off = [node for node, record in known.items() if record.met is False and record.rank != 0]
    if head is not None and (head not in bad or cut_off):
        if len(cut_off) >= 2 and 2 * len(cut_off) > len(known) - 1:
            bad = {node: why for node, why in bad.items() if node not in cut_off or known[node].problems}
            bad.setdefault(head, f"{len(cut_off)} of {len(known) - 1} others could not reach it")
        elif head not in bad:
            bad |= {node: known[node].network or "" for node in cut_off if node not in bad}
    troubled = {node: record.network for node, record in known.items() if record.network and node not in bad}
    if not bad and troubled:
        few = 2 * len(troubled) < len(known)
        bad = {
            n: f"network: {why}" for n, why in (troubled if few else {n: r.network for n, r in known.items()}).items()
        }
    return {node: bad[node] for node in records if node in bad}


def slow_nodes(records: Sequence[Record]) -> list[str]:
    """A sentence for each node whose pairs are slow beside all pairs. A warning only: neighbors' traffic slows too."""
    pairs = {record.node: record.figures.get("pairs_gb_s") or {} for record in records}
    rates = [rate for found in pairs.values() for rate in found.values()]
    if len(pairs) < 3 or not rates:
        return []  # of two nodes, both are as slow
    usual = statistics.median(rates)
    return [
        f"{node} exchanges {statistics.median(found.values()):.3g} GB/s with another node, {usual:.3g} is usual here"
        for node, found in pairs.items()
        if found and statistics.median(found.values()) < SLOW * usual
    ]


def _is_of_one_node(record: Record | None) -> bool:
    return record is not None and any(check not in SHARED_CHECKS for check, _ in record.problems)
