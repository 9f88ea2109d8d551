"""Where runs stand: from what their folders say, and one question to Slurm. Needs no accounting, nor Slurm itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potamos.slurm import client
from potamos.slurm.attempt import Attempt, is_done, jobs_of, newest_step, read_attempts
from potamos.slurm.client import QueueEntry, SlurmError
from potamos.slurm.lock import lock_holder
from potamos.slurm.run_folder import RunFolder

STATES = {
    "prepared": "never submitted or started",
    "queued": "waits for its first start",
    "running": "trains",
    "requeued": "waits to go on",
    "finished": "every step is trained",
    "stopped": "was asked to stop, and saved",
    "cancelled": "was cancelled",
    "failed": "ended with an error, and nothing goes on with it",
    "stale": "its state says that it trains, but no job and no process does",
    "unknown": "has a job, and Slurm cannot be asked here",
}
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
DEPTH = 3  # of folders below the one asked for
NAMED = 1000  # jobs that squeue is asked for by name; beyond that it is asked for all
LEFT = "left the queue before it began"
PUZZLES = 8  # jobs that ended without a word, of which Slurm is asked one by one
QUIET = 600.0  # seconds without news after which a running run is remarked on
NO_RUNS = frozenset({"code", "checkpoints", "logs", "tensorboard"})  # what a folder of runs may hold beside them


class StatusError(ValueError):
    """A folder that holds no run. Names it, and where the runs are."""


@dataclass(frozen=True)
class Facts:
    """What a run folder says of its run. `done` and `stop` are the markers' content, None without one; ``finished``:
    whether `done` is of the last step that the recipe asks for now."""

    folder: RunFolder
    state: dict[str, Any]
    done: dict[str, Any] | None
    finished: bool
    stop: dict[str, Any] | None
    cancelled: bool
    attempts: Sequence[Attempt]
    jobs: Sequence[str]
    places: Sequence[Path]  # where its jobs run, as Slurm was told

    @property
    def last_attempt(self) -> int | None:
        """The number of the newest attempt, in a job or outside of one."""
        seen = [a.number for a in self.attempts]
        seen += [
            n for n in (_whole(self.state.get("attempt")), _whole((self.stop or {}).get("attempt"))) if n is not None
        ]
        return max(seen, default=None)


@dataclass(frozen=True)
class Status:
    """One run. Numbers are None where nobody has told them yet.

    ``why``: why it waits, or why it ended, or what ended the attempt before. ``eta``: seconds. ``job``: that which
    runs, waits, or ran last. ``behind``: jobs of its chain that wait for this one. ``attempts``: starts of the run;
    ``crashes``: those that failed by themselves. ``saved``: step of the newest checkpoint.
    """

    folder: Path
    state: str
    why: str = ""
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta: float | None = None
    nodes: str = ""
    job: str | None = None
    behind: int = 0
    attempts: int = 0
    crashes: int = 0
    saved: int = 0
    time_left: int | None = None
    updated: str | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON has it, with the folder's own name."""
        return {"name": self.folder.name, **vars(self), "folder": str(self.folder.absolute())}


# --- finding --------------------------------------------------------------------------------------------------------


def find_runs(folders: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The run folders among these and below, each once, in the order of their names.

    Raises:
        StatusError: a folder does not exist.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            beside = folder.parent if folder.parent.is_dir() else Path("runs")
            near = [str(run) for run in _below(beside, 1)][:8] if beside.is_dir() else []
            there = f"; there are: {', '.join(map(printable, near))}" if near else ""
            raise StatusError(f"there is no folder {printable(folder)}{there}")
        found |= dict.fromkeys([folder] if is_run(folder) else _below(folder, DEPTH))
    return list(found)


def is_run(folder: Path) -> bool:
    """Whether a run was prepared or started here. A sweep's own folder is none."""
    return any((folder / name).exists() for name in ("recipe.yaml", "state.json"))


def _below(folder: Path, depth: int) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name not in NO_RUNS and e.name[0] != "." and e.is_dir())
    except OSError:
        return []  # not ours to read
    found = []
    for path in (folder / name for name in names):
        if is_run(path):
            found.append(path)
        elif depth > 1:
            found += _below(path, depth - 1)
    return found


# --- reading --------------------------------------------------------------------------------------------------------


def statuses(
    folders: Iterable[str | os.PathLike[str]], *, now: datetime | None = None, tell: Callable[[str], None] | None = None
) -> list[Status]:
    """Where each of these run folders stands.

    Args:
        tell: is told, once, why Slurm could not be asked, if there was anything to ask it.
    """
    now = now or datetime.now(UTC)
    with ThreadPoolExecutor(16) as pool:  # a shared file system answers many questions as fast as one
        facts = list(pool.map(_read, folders))
        entries, silence = ask(job for fact in facts if isinstance(fact, Facts) for job in fact.jobs)
        if silence and tell:
            tell(silence)
        found = list(pool.map(lambda fact: judge(fact, entries, now) if isinstance(fact, Facts) else fact, facts))
    if entries is None:
        return found
    puzzles = [n for n, each in enumerate(found) if each.job and (each.state == "stale" or each.why.endswith(LEFT))]
    for n in puzzles[:PUZZLES]:
        found[n] = replace(found[n], why=found[n].why + _last_words(found[n].job or ""))
    return found


def _last_words(job: str) -> str:
    """How Slurm says that a job ended, which it remembers for some minutes only."""
    try:
        (record,) = client.show("job", job)
    except (SlurmError, ValueError):
        return ""
    reason = record.get("Reason", "None")
    return f": {record.get('JobState', '').lower()}" + (f", {reason}" if reason not in ("None", "") else "")


def _read(folder: str | os.PathLike[str]) -> Facts | Status:
    """One damaged folder must not hide the others."""
    try:
        return read_facts(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Status(Path(folder), "unknown", why=f"its files cannot be read: {type(error).__name__}: {error}")


def ask(jobs: Iterable[str]) -> tuple[Mapping[str, QueueEntry] | None, str | None]:
    """The queue's entries of these jobs; None, and why, where Slurm does not say."""
    wanted = {job.partition("_")[0] for job in jobs}  # an array as a whole, however many tasks it has
    if wanted and client.is_down():
        return None, "what waits and runs is not known: the controller does not answer; see `scontrol ping`"
    try:
        return client.queue(wanted if len(wanted) <= NAMED else None), None
    except SlurmError as error:
        return None, f"what waits and runs is not known: {error}"


def read_facts(run: str | os.PathLike[str]) -> Facts:
    folder = RunFolder.of(run)
    stops = [path for path in folder.path.glob("stop.*") if path.suffix[1:].isdecimal()]
    newest = max(stops, key=lambda path: int(path.suffix[1:]), default=None)
    return Facts(
        folder=folder,
        state=read_json(folder.state) or {},
        done=(done := read_json(folder.done)),
        finished=done is not None and _is_finished(folder, done),
        stop=read_json(newest) if newest else None,
        cancelled=folder.cancelled.exists(),
        attempts=read_attempts(folder),
        jobs=jobs_of(folder),
        places=places_of(folder),
    )


def places_of(folder: RunFolder) -> list[Path]:
    """The folder that its job was submitted in: of an array the array's. Without word of it, what it may have been."""
    told = (read_json(folder.job) or {}).get("job")
    place = told.get("folder") if isinstance(told, dict) else None
    return (
        [Path(place)] if isinstance(place, str) and "\0" not in place else [folder.path, folder.path.absolute().parent]
    )


def _is_finished(folder: RunFolder, done: Mapping[str, Any]) -> bool:
    """`is_done`, as the batch script asks it; without a recipe to compare with, the marker's word."""
    import yaml

    try:
        return is_done(folder)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return _whole(done.get("step")) is not None


def read_json(path: Path) -> dict[str, Any] | None:
    """A small file of facts; None if it is absent, {} if it is not what it should be."""
    try:
        content = json.loads(path.read_bytes())
    except OSError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


# --- judging --------------------------------------------------------------------------------------------------------


def judge(facts: Facts, queue: Mapping[str, QueueEntry] | None, now: datetime) -> Status:
    """A run's status from its folder and the queue (None where Slurm cannot be asked)."""
    own = entries_of(facts, queue or {})
    runs = [entry for entry in own if entry.state not in WAITING]
    waits = [entry for entry in own if entry.state in WAITING]
    base = _figures(facts)
    if facts.finished and not runs:  # what waits is the rest of its chain
        return replace(base, state="finished", why="")
    if runs and not (runs[0].state == "COMPLETING" and facts.cancelled and lock_holder(facts.folder.lock) is None):
        return _running(base, facts, runs[0], len(waits), now)
    if waits and not facts.cancelled:
        return _waiting(base, facts, waits)
    return _ended(base, facts, queue is not None, now)


def entries_of(facts: Facts, queue: Mapping[str, QueueEntry]) -> list[QueueEntry]:
    """The entries of a run's jobs, in their order; those of every task where a job is named that is an array. What has
    the number of its job but runs elsewhere is another's."""
    named = {entry.id: entry for job in facts.jobs for entry in queue.values() if job in (entry.id, entry.array)}
    return [entry for entry in named.values() if entry.is_in(facts.places)]


def _figures(facts: Facts) -> Status:
    state, attempts = facts.state, facts.attempts
    started = _whole(state.get("attempt"))
    return Status(
        folder=facts.folder.path,
        state="",
        step=_whole(state.get("step")),
        total_steps=_whole(state.get("total_steps")),
        loss=_number(state.get("loss")),
        tokens_per_second=_number(state.get("tokens_per_second")),
        nodes=str(attempts[-1].nodes or "") if attempts else "",
        job=facts.jobs[-1] if facts.jobs else None,
        attempts=len(attempts) or (0 if started is None else started + 1),
        crashes=sum(map(crashed, attempts)),
        saved=newest_step(facts.folder),
        updated=_text(state.get("updated")),
    )


def crashed(attempt: Attempt) -> bool:
    """Whether an attempt failed by itself, rather than being asked to stop, cancelled or put back from outside."""
    failed = attempt.verdict in ("requeue", "crashed", "failed") and attempt.held_by is None
    return failed and bool(attempt.status)


def _running(base: Status, facts: Facts, entry: QueueEntry, behind: int, now: datetime) -> Status:
    told = facts.attempts[-1].number if facts.attempts else None
    since = _age(base.updated, now)
    before = [attempt for attempt in facts.attempts if attempt.number != told]
    if facts.cancelled:
        why = "is being cancelled"
    elif entry.state != "RUNNING":
        why = entry.state.lower().replace("_", " ")
    elif told is None or _whole(facts.state.get("attempt")) != told:
        why = "starting"  # what state.json says is of the attempt before
        since = None
    else:
        why = f"before: {_end_of(before[-1])}" if before else ""
    if since is not None and (trouble := _saving(base, facts)):
        why = trouble + (f"; {why}" if why else "")
    if since is not None and since > QUIET:
        why = f"no news for {_minutes(since)}" + (f"; {why}" if why else "")
    return replace(
        base, state="running", why=why, nodes=entry.nodes or base.nodes, job=entry.id, behind=behind,
        time_left=entry.time_left, eta=_eta(facts.state, since) if since is not None else None,
    )  # fmt: skip


def _saving(base: Status, facts: Facts) -> str:
    """A remark on checkpoints that are not written; empty where all is well, or where nothing tells.

    A save is under way while the steps after it are trained, and the next waits for it: only where two that were begun
    are not there has something gone wrong. That of the step that is told of has not begun.
    """
    failed, every = facts.state.get("save_failed"), _whole(facts.state.get("save_every"))
    last = f"the last checkpoint is of step {base.saved}" if base.saved else "there is no checkpoint yet"
    if isinstance(failed, dict) and (step := _whole(failed.get("step"))) is not None and step > base.saved:
        return f"the save of step {step} failed ({failed.get('why')}); {last}"
    if not every or every < 1 or base.step is None:
        return ""
    due = (base.step - 1) // every * every - every  # the last but one that was begun
    return f"saves lag: {last}, and they are due every {every}" if base.saved < due else ""


def _waiting(base: Status, facts: Facts, waits: Sequence[QueueEntry]) -> Status:
    first = waits[0]
    again = any(attempt.job == first.id for attempt in facts.attempts) or bool(facts.attempts and len(facts.jobs) > 1)
    why = first.reason or first.state.lower().replace("_", " ")
    if first.start:
        why += f", may start {first.start.replace('T', ' ')}"
    if facts.attempts:
        why += f"; before: {_end_of(facts.attempts[-1])}"
    return replace(base, state="requeued" if again else "queued", why=why, job=first.id, behind=len(waits) - 1)


def _ended(base: Status, facts: Facts, asked: bool, now: datetime) -> Status:
    """A run that no job runs or waits for, as far as is known."""
    reason, last = str(facts.state.get("reason") or ""), facts.attempts[-1] if facts.attempts else None
    if alive := _signs_of_life(facts, asked, now):
        alive = "; ".join(filter(None, [alive, _saving(base, facts)]))
        return replace(base, state="running", why=alive, eta=_eta(facts.state, _age(base.updated, now) or 0.0))
    if facts.cancelled:
        return replace(base, state="cancelled", why="")
    # What judged an earlier attempt does not speak for one that ran after it, outside of Slurm.
    verdict = last.verdict if last is not None and last.number == facts.last_attempt else None
    why = _end_of(last) if last is not None else ""
    if verdict == "done" or (verdict is None and reason == "finished"):
        trained = f"was trained to step {(facts.done or {}).get('step')}, and its recipe asks for more"
        return replace(base, state="stopped", why=f"{trained}; no job follows")
    if verdict in ("failed", "stopped"):
        return replace(base, state="failed" if verdict == "failed" else "cancelled", why=why)
    if facts.jobs and not asked:
        ended = f"; {why}" if last is not None and last.verdict is not None else ""  # without a word, it may still run
        return replace(base, state="unknown", why=f"job {facts.jobs[-1]}{ended}")
    if verdict is not None:  # it was to go on, and nothing does
        saved = facts.stop is not None and facts.stop.get("attempt") == facts.last_attempt
        return replace(base, state="stopped" if saved else "failed", why=f"{why}; no job follows")
    if reason == "running":
        return replace(base, state="stale", why=f"no job and no process trains it; last news {base.updated or 'never'}")
    if reason.startswith("failed"):
        return replace(base, state="failed", why=reason)
    if facts.stop is not None and facts.stop.get("attempt") == facts.last_attempt:
        return replace(base, state="stopped", why=str(facts.stop.get("reason") or reason))
    if last is not None:
        return replace(base, state="failed", why=f"{why}; no job follows")
    places = [place for place in facts.places if place.is_dir()]
    if facts.jobs and places and not any(RunFolder(place).logs.is_dir() for place in places):
        remedy = "there is no logs/ any more, without which Slurm cannot begin; potamos requeue makes it again"
        return replace(base, state="failed", why=f"{remedy}; job {facts.jobs[-1]} {LEFT}")
    if facts.jobs:
        return replace(base, state="cancelled", why=f"job {facts.jobs[-1]} {LEFT}")
    return replace(base, state="stopped" if reason else "prepared", why=reason)


def _signs_of_life(facts: Facts, asked: bool, now: datetime) -> str | None:
    """What speaks for it that a run trains which has no job as far as is known; None if nothing does.

    A held lock does, be it that of ranks which outlived their node's daemon. While Slurm does not answer so does recent
    news of an attempt that nobody has judged.
    """
    silence = "Slurm does not answer" if facts.jobs and not asked else ""
    if holder := lock_holder(facts.folder.lock):
        lost = "has no job in the queue, but is trained by " if facts.jobs and asked else ""
        return f"{lost}{holder}" + (f"; {silence}" if silence else "")
    since, last = _age(_text(facts.state.get("updated")), now), facts.attempts[-1] if facts.attempts else None
    current = last is not None and last.verdict is None and _whole(facts.state.get("attempt")) == last.number
    if silence and current and facts.state.get("reason") == "running" and since is not None and since <= QUIET:
        return f"{silence}; last news {since:.0f} s ago"
    return None


def _end_of(attempt: Attempt) -> str:
    if attempt.verdict is None:
        return "killed from outside"
    return attempt.reason or attempt.verdict


# --- values that others wrote ---------------------------------------------------------------------------------------


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _time(text: object) -> datetime | None:
    try:
        time = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time


def _age(text: str | None, now: datetime) -> float | None:
    time = _time(text)
    return None if time is None else max(0.0, (now - time).total_seconds())


def _eta(state: Mapping[str, Any], since: float) -> float | None:
    left = _number(state.get("eta"))
    return None if left is None else max(0.0, left - since)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def printable(text: object) -> str:
    """A name as one line: control characters, and what is no text, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
