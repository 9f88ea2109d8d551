"""The attempts of a run: what the batch script asks before and after each one, and what `attempts.jsonl` remembers.

    python -P -m potamos.slurm.attempt begin RUN --job 12 --nodes "n[0-1]" --crashes 3            # prints 0, or done
    python -P -m potamos.slurm.attempt end RUN --attempt 0 --status 137 --told "$(scontrol ...)"  # prints requeue

An attempt ends in one word:

    done      every step of the recipe is trained
    requeue   it stopped on request after saving, or failed and may try again: back into the queue
    busy      another process holds the run's lock, so it did not train: back into the queue
    waiting   either of these, and Slurm has put it back into the queue already
    next      it stopped on request after saving, or was busy, and another job follows
    crashed   it failed, and another job follows
    stopped   someone cancelled it
    failed    it is of no use to go on; the reason says why

Slurm counts a job's restarts, but preemptions raise that count too. Here what fails in a row *without a new checkpoint*
is counted, so a run that makes progress never meets the bound. An attempt without an end was killed from outside (a
node that died, a preemption that would not wait) and is no crash of the run; but a recipe that kills its nodes looks
just so, and therefore ten of them from the same step are the end as well.

Nor is one that found the lock held: by ranks that outlived their node's daemon, or by someone who trains by hand. What
those save is no progress of the attempt either. It waits for them, and so does the next; not for ever.

Standard library only, and quick to start: it runs on the first node of every attempt.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potamos.slurm.lock import await_lock, lock_holder, mark_busy
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.undo import accept

HELD_SECONDS = 300.0
"""How long an attempt waits for the holder of the lock before it gives its nodes back."""
HELD_TIMES = 12
"""So many attempts in a row that found the lock held are the end: an hour of waiting, and what the queue adds to it."""

UNJUDGED_TIMES = 10
"""So many attempts from the same step that nobody was left to judge are the end: nodes do not die that often."""
REFUSED = 3
"""The exit status of `begin` where it is of no use to begin, on this node or another."""

STEP_FOLDER = re.compile(r"step-(\d{8,})")


class AttemptError(ValueError):
    """An attempt cannot begin. The message says why and what to do."""


class UnusableNodeError(AttemptError):
    """An attempt cannot begin on this node, and may on another."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the run. ``verdict`` is None while it runs, and where nobody was left to judge it."""

    number: int
    job: str
    restart: int
    nodes: str
    began: str
    step: int  # of the newest checkpoint at its begin
    ended: str | None = None
    end_step: int | None = None
    status: int | None = None
    verdict: str | None = None
    reason: str | None = None
    fruitless: bool = False  # failed, or was asked to stop, before its first new checkpoint
    held_by: str | None = None  # who held the run's lock, where that kept it from training


@dataclass(frozen=True)
class Told:
    """What Slurm says of the job while an attempt ends. Where it says nothing, nothing came from outside."""

    requeued: bool = False
    cancelled: bool = False
    out_of_time: bool = False
    preempted: bool = False

    @classmethod
    def read(cls, line: str, restart: int) -> Told:
        """From a line of `scontrol show job -o`, and the count of restarts with which the script began.

        A job that is being cancelled and one that is being requeued are both COMPLETING; only the latter has one
        restart more than its script knows of. One that ran into its limit has run for as long.
        """
        said: dict[str, str] = {}
        for word in line.split():
            key, _, value = word.partition("=")
            said.setdefault(key, value)  # the first counts: a folder's name further on may look like a field
        state, count = said.get("JobState", ""), said.get("Restarts", "0")
        requeued = count.isdecimal() and int(count) > restart
        ended = state in ("COMPLETING", "CANCELLED", "TIMEOUT") and not requeued
        out_of_time = state == "TIMEOUT" or (ended and seconds(said.get("RunTime")) >= seconds(said.get("TimeLimit")))
        preempted = said.get("PreemptTime", "None") != "None"
        return cls(requeued, ended and not out_of_time, ended and out_of_time, preempted)

    def __str__(self) -> str:
        if self.preempted:
            return "preempted"
        return "requeued from outside" if self.requeued else ("time limit" if self.out_of_time else "")


def seconds(text: str | None) -> float:
    """Of days-hours:minutes:seconds as Slurm prints it; anything else (UNLIMITED, nothing) has no end."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text or "")
    if match is None:
        return float("inf")
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def read_attempts(run: str | os.PathLike[str]) -> list[Attempt]:
    """The attempts that the batch script began in this folder, in order; lines that are no record are passed over."""
    attempts: dict[int, Attempt] = {}
    for record in _records(RunFolder.of(run)):
        with contextlib.suppress(KeyError):
            number = record["attempt"]
            if record["event"] == "begin":
                facts = {key: record[key] for key in ("job", "restart", "nodes", "step")}
                attempts[number] = Attempt(number=number, began=record["at"], **facts)
            elif record["event"] == "end" and number in attempts:
                facts = {key: record[key] for key in ("status", "verdict", "reason", "fruitless")}
                facts["held_by"] = record.get("held_by")
                attempts[number] = replace(attempts[number], ended=record["at"], end_step=record["step"], **facts)
    return list(attempts.values())


def note_submission(run: str | os.PathLike[str], jobs: Sequence[str], *, anew: bool = True) -> None:
    """Remember that these jobs were submitted for the run: what failed before no longer counts, unless not ``anew``."""
    _append(RunFolder.of(run), {"event": "submitted", "jobs": list(jobs)} | ({} if anew else {"anew": False}))


def jobs_of(run: str | os.PathLike[str]) -> list[str]:
    """The jobs submitted for this run and those that took their places, oldest first."""
    return [job for record in _records(RunFolder.of(run)) if record["event"] == "submitted" for job in record["jobs"]]


def begin(folder: RunFolder, job: str, restart: int, nodes: str, crashes: int) -> int | None:
    """The number of the attempt that begins now, or None where every step is trained already.

    Where another process holds the run's lock, the attempt is marked as its ranks would mark it, and need not start.

    Raises:
        AttemptError: `crashes` attempts in a row failed without a new checkpoint, `UNJUDGED_TIMES` were killed from
            outside at one step, or the run was cancelled.
        UnusableNodeError: this node cannot write into the folder.
    """
    if is_done(folder):
        return None
    if folder.cancelled.exists():
        raise AttemptError(f"{folder.path} was cancelled; go on with: potamos requeue {folder.path}")
    last = _fruitless(folder)
    if len(last) >= crashes:
        raise AttemptError(
            f"{len(last)} attempts in a row ended without a new checkpoint, the last with: {last[-1].reason}. "
            f"Mend that, then: potamos requeue {folder.path}"
        )
    if (lost := _unjudged(folder)) >= UNJUDGED_TIMES:
        raise AttemptError(_give_up(folder, lost))
    number = _next_number(folder)
    record = {"event": "begin", "attempt": number, "job": job, "restart": restart, "nodes": nodes}
    try:
        _append(folder, record | {"step": newest_step(folder, strict=True)})
        if (holder := lock_holder(folder.lock)) is not None:
            mark_busy(folder, number, holder)
    except OSError as error:
        remedy = "the run folder must lie on a file system that the nodes share and may write to"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "make room on its file system, or in your quota there"
        node = os.uname().nodename
        raise UnusableNodeError(f"{node} cannot write into {folder.path} ({error.strerror}): {remedy}") from error
    return number


def end(
    folder: RunFolder, number: int, status: int, told: Told, *, requeue: bool, crashes: int, why: str = ""
) -> tuple[str, str]:
    """How attempt `number` ended, and why; remembers it.

    Args:
        status: srun's exit status.
        requeue: whether this job may go back into the queue, rather than another follow.
        crashes: how many attempts in a row may be of no use.
        why: the reason, where the ranks never started.

    Raises:
        OSError: the folder cannot be read now. An unread checkpoint must not look like a crash.
    """
    began = next((attempt.step for attempt in read_attempts(folder) if attempt.number == number), 0)
    step, stop = newest_step(folder, strict=True), folder.stop(number)
    fruitless, verdict, held_by = False, "waiting" if told.requeued else "requeue", _holder(folder, number)
    if is_done(folder):
        verdict, reason = "done", "finished"
    elif folder.cancelled.exists() or told.cancelled:
        verdict, reason = "stopped", "cancelled"
    elif held_by is not None:
        reason = ", ".join(filter(None, [f"{held_by} holds the run's lock", str(told)]))
        if not told.requeued and len(_held(folder)) + 1 >= HELD_TIMES:
            remedy = f"end that process, then: potamos requeue {folder.path}"
            verdict, reason = "failed", f"{reason} ({HELD_TIMES} attempts in a row found it so; {remedy})"
        elif not told.requeued:
            verdict = "busy" if requeue else "next"
    else:
        fruitless = step <= began and not (told.requeued or told.preempted)
        reason = (
            str(_read(stop).get("reason", "asked to stop")) if stop.exists() else (why or _why(folder, number, status))
        )
        reason = ", ".join(filter(None, [reason, str(told)])) + (", before the first new checkpoint" * fruitless)
        if fruitless and len(_fruitless(folder)) + 1 >= crashes:
            verdict, reason = "failed", f"{reason} ({crashes} such attempts in a row)"
        elif not requeue:
            verdict = "next" if stop.exists() else "crashed"
    record = {"event": "end", "attempt": number, "status": status, "verdict": verdict, "reason": reason, "step": step}
    try:
        _append(folder, record | {"fruitless": fruitless} | ({"held_by": held_by} if held_by else {}))
    except OSError as error:  # go on all the same: the next begin refuses if it cannot write either
        print(f"attempts.jsonl could not be written ({error.strerror})", file=sys.stderr)
    return verdict, reason


def replaced(folder: RunFolder, number: int, bad_nodes: str) -> None:
    """Attempt `number` found nodes that cannot be used, and another job takes its place."""
    reason = f"nodes {bad_nodes} failed the check before training"
    facts = {"status": 0, "verdict": "next", "reason": reason, "step": newest_step(folder), "fruitless": False}
    _append(folder, {"event": "end", "attempt": number, **facts})


def newest_step(folder: RunFolder, *, strict: bool = False) -> int:
    """The step of the newest checkpoint under a final name; 0 without one.

    Raises:
        OSError: with ``strict``, where the checkpoints are there and cannot be listed.
    """
    try:
        names = os.listdir(folder.checkpoints)
    except OSError as error:
        if strict and not isinstance(error, FileNotFoundError):
            raise
        return 0
    return max((int(match[1]) for name in names if (match := STEP_FOLDER.fullmatch(name))), default=0)


def is_done(folder: RunFolder) -> bool:
    """Whether the run was trained to the last step that its recipe asks for now."""
    if not folder.done.exists():
        return False
    import yaml

    recipe = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
    step = _read(folder.done).get("step")
    return isinstance(step, int) and step >= int(recipe["train"]["steps"])


def _fruitless(folder: RunFolder) -> list[Attempt]:
    """The attempts of no use since the last one that was of some, or since the run was last submitted.

    Those without an end are passed over: what killed them says nothing about the run.
    """
    attempts = _since_submission(folder)
    found: list[Attempt] = []
    for earlier, attempt in zip([None, *attempts], attempts, strict=False):
        if earlier is not None and attempt.step > earlier.step:
            found.clear()  # also progress of an attempt that nobody judged
        if attempt.verdict is not None and attempt.fruitless:
            found.append(attempt)
        elif attempt.verdict is not None and (attempt.end_step or 0) > attempt.step:
            found.clear()
    return found


def _unjudged(folder: RunFolder) -> int:
    """How many attempts from the newest step were never judged. One that was, and of no use, does not part them."""
    count, step = 0, -1
    for attempt in _since_submission(folder):
        if attempt.step > step:
            count, step = 0, attempt.step
        count += attempt.status is None  # also the one that was given up for them
    return count if newest_step(folder) <= step else 0


def _give_up(folder: RunFolder, lost: int) -> str:
    """Why attempts that nobody judged are the end; noted as that of the last one, for those who look at the run."""
    step = newest_step(folder)
    reason = (
        f"{lost} attempts in a row from step {step} were killed from outside (nodes that died, preemptions without "
        "time to save). See what the recipe does to its nodes, or save more often; then: potamos requeue "
    ) + str(folder.path)
    last = next(attempt for attempt in reversed(_since_submission(folder)) if attempt.status is None)
    record = {"event": "end", "attempt": last.number, "status": None, "verdict": "failed", "reason": reason}
    with contextlib.suppress(OSError):  # said all the same
        _append(folder, record | {"step": step, "fruitless": False})
    return reason


def _held(folder: RunFolder) -> list[Attempt]:
    """The newest attempts, as far as they found the lock held; those without an end are passed over."""
    judged = [attempt for attempt in _since_submission(folder) if attempt.verdict is not None]
    others = [place for place, attempt in enumerate(judged, 1) if attempt.held_by is None]
    return judged[max(others, default=0) :]


def _holder(folder: RunFolder, number: int) -> str | None:
    """Who kept attempt ``number`` from training; None where nobody did."""
    path = folder.busy(number)
    return str(_read(path).get("holder", "another process")) if path.exists() else None


def _since_submission(folder: RunFolder) -> list[Attempt]:
    records = list(_records(folder))
    since = max(
        (n for n, record in enumerate(records) if record["event"] == "submitted" and record.get("anew", True)),
        default=-1,
    )
    numbers = {record["attempt"] for record in records[since + 1 :] if record["event"] == "begin"}
    return [attempt for attempt in read_attempts(folder) if attempt.number in numbers]


def _next_number(folder: RunFolder) -> int:
    """One more than any attempt that left a trace, those outside of Slurm included: their markers must not be ours."""
    seen = {attempt.number for attempt in read_attempts(folder)}
    for kind in ("stop", "busy"):
        seen |= {int(path.suffix[1:]) for path in folder.path.glob(f"{kind}.*") if path.suffix[1:].isdecimal()}
    state = _read(folder.state).get("attempt")
    return max(seen | ({state} if isinstance(state, int) else set()), default=-1) + 1


# --- reasons ------------------------------------------------------------------------------------------------------

_OWN = re.compile(r"^(?:\[rank\d+\]: )?(?:ERROR: )?([A-Za-z_.]*(?:Error|Exception|Interrupt)(?:: .*)?|error: .*)$")
_OF_ANOTHER = re.compile(
    r"PeerError|rank \d+: |[Cc]onnection (closed|reset|refused)|Broken pipe|[Tt]imed out|"
    r"remote (process|error)|(network|unhandled system) error|ncclRemoteError"
)
_SRUN = re.compile(r"srun: error: (\S+: tasks? \S+: .*)$")


def _why(folder: RunFolder, number: int, status: int) -> str:
    """The words of the rank that failed by itself, and first; else what srun says of it, else the status."""
    others = []
    for path in sorted(
        folder.logs.glob(f"attempt-{number}.rank-*.txt"), key=lambda p: (p.stat().st_mtime_ns, _rank(p))
    ):
        for line in reversed(_last_lines(path)):
            if match := _OWN.match(line.strip()):
                text = f"rank {_rank(path)}: {match[1].removeprefix('error: ')}"
                if not _OF_ANOTHER.search(match[1]):
                    return text[:300]
                others.append(text)
                break
    lines = _last_lines(folder.logs / f"attempt-{number}.srun.txt")
    told = [match[1] for line in lines if (match := _SRUN.search(line.strip()))]
    first = next((line for line in told if "Terminated" not in line), None)
    return (first or next(iter(others + told), f"srun ended with status {status} and left no words{_room(folder)}"))[
        :300
    ]


def _room(folder: RunFolder) -> str:
    """A remark on the disk where it has no room: then words are what it has no room for."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < 1 << 20:
            return ": the disk of the run folder is full"
    return ""


def _rank(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _last_lines(path: Path, size: int = 65536) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


# --- files --------------------------------------------------------------------------------------------------------


def _records(folder: RunFolder) -> Iterator[dict[str, Any]]:
    try:
        text = folder.attempts.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a full disk or a machine that went down
        if isinstance(record, dict) and isinstance(record.get("event"), str):
            yield record


def _append(folder: RunFolder, record: dict[str, Any]) -> None:
    """One write of one line, begun anew where a torn line stands before it, and flushed to the disk."""
    record["at"] = datetime.now(UTC).isoformat(timespec="milliseconds")
    with open(folder.attempts, "a+b", buffering=0) as file:
        torn = False
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# --- what the batch script calls ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m potamos.slurm.attempt", description="Judge attempts of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("accepted", "await", "begin", "end", "follow", "outside"):
        command = commands.add_parser(name)
        command.add_argument("run", type=Path)
        command.add_argument("--crashes", type=int, default=3)
        command.add_argument("--job", default="")
        command.add_argument("--restart", type=int, default=0)
        command.add_argument("--nodes", default="")
        command.add_argument("--attempt", type=int, default=0)
        command.add_argument("--status", type=int, default=0)
        command.add_argument("--told", default="")
        command.add_argument("--bad-nodes", default="")
        command.add_argument("--why", default="")
        command.add_argument("--requeue", type=int, default=1)
    asked = parser.parse_args(arguments)
    folder = RunFolder(asked.run.absolute())
    try:
        if asked.command == "begin":
            number = begin(folder, asked.job, asked.restart, asked.nodes, asked.crashes)
            print("done" if number is None else number)
        elif asked.command == "follow":
            note_submission(folder, [asked.job.partition(";")[0]], anew=False)
        elif asked.command == "accepted":
            accept(folder.path)
        elif asked.command == "await":
            patience = HELD_SECONDS * (1 if asked.requeue else HELD_TIMES)  # a chain's jobs are few, and soon used up
            await_lock(folder, patience, lambda text: print(text, flush=True))
        elif asked.command == "outside":
            print(Told.read(asked.told, asked.restart))
        elif asked.bad_nodes:
            replaced(folder, asked.attempt, asked.bad_nodes)
        else:
            requeue = bool(asked.requeue)
            told = Told.read(asked.told, asked.restart)
            verdict, reason = end(
                folder, asked.attempt, asked.status, told, requeue=requeue, crashes=asked.crashes, why=asked.why
            )
            print(verdict)
            print(f"attempt {asked.attempt}: {verdict}: {reason}", file=sys.stderr)
    except (AttemptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, AttemptError) and not isinstance(error, UnusableNodeError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
