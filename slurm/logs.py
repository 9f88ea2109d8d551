"""What a run printed: which file to look at, and following it from one attempt into the next.

    logs/attempt-K.rank-R.txt   everything rank R of attempt K printed
    logs/attempt-K.srun.txt     srun's own words: which task ended how
    logs/job-ID.txt             the batch script; that of an array's task lies in the folder of the array

Files are asked again and again rather than watched: the writers sit on other machines, of which no kernel here hears.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from potamos.slurm.attempt import Attempt, jobs_of, read_attempts
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.status import Status, printable, read_json, statuses

ENDED = ("finished", "stopped", "cancelled", "failed", "stale", "prepared")
POLL = 0.5  # seconds between two looks at a file
ASK = 5.0  # seconds between two questions to Slurm, which serves many
BLOCK = 1 << 20

_RANK_FILE = re.compile(r"attempt-(\d+)\.rank-(\d+)\.txt")
# How the reason of an attempt names who ended it: in its own words, or in those of srun.
_CULPRIT = re.compile(r"rank (\d+):|\S+: tasks? (\d+)")


class LogError(ValueError):
    """A log that does not exist. Says which there are."""


@dataclass(frozen=True)
class Log:
    """A file to show; ``attempt`` and ``rank`` are None where it is not one of a rank."""

    path: Path
    attempt: int | None = None
    rank: int | None = None


def choose(
    run: str | os.PathLike[str], *, rank: int | None = None, attempt: int | None = None, job: bool = False
) -> Log:
    """The log to look at.

    By default that of the newest attempt: of the rank that ended it where it failed, else of rank 0; and the batch
    script's where no rank has started yet. A run outside of Slurm has only its notes.

    Args:
        job: the batch script's.

    Raises:
        LogError: there is no such run, attempt, rank or job; names those that there are.
    """
    folder = RunFolder.of(run)
    if not folder.path.is_dir():
        raise LogError(f"there is no run folder {printable(folder.path)}")
    attempts = {a.number: a for a in read_attempts(folder)}
    ranks = _rank_files(folder)
    known = sorted({*attempts, *ranks})
    if attempt is not None and attempt not in known:
        raise LogError(f"{printable(folder.path)} has no attempt {attempt}; {_there_are('attempts', known)}")
    number = attempt if attempt is not None else max(known, default=None)
    if job:
        return _job_log(folder, attempts.get(-1 if number is None else number))
    if number is not None and (log := _of_attempt(folder, number, attempts.get(number), ranks.get(number, {}), rank)):
        return log
    if rank is not None:
        raise LogError(f"no rank has started yet in {printable(folder.path)}; --job shows what the batch script said")
    if jobs_of(folder):
        return _job_log(folder, attempts.get(-1 if number is None else number))
    if folder.notes.is_file():
        return Log(folder.notes)
    raise LogError(
        f"{printable(folder.path)} has no logs: it was never submitted; a run that is started by hand prints to its "
        "terminal"
    )


def _of_attempt(
    folder: RunFolder, number: int, attempt: Attempt | None, ranks: dict[int, Path], rank: int | None
) -> Log | None:
    if rank is not None and ranks and rank not in ranks:
        raise LogError(f"attempt {number} has no rank {rank}; {_there_are('ranks', sorted(ranks))}")
    if not ranks:
        return None
    wanted = rank if rank is not None else culprit(attempt)
    chosen = wanted if wanted in ranks else min(ranks)
    return Log(ranks[chosen], number, chosen)


def culprit(attempt: Attempt | None) -> int | None:
    """The rank that ended an attempt, as its reason names it; None where none did."""
    match = _CULPRIT.match(attempt.reason or "") if attempt is not None and attempt.status else None
    return int(match[1] or match[2]) if match else None


def _rank_files(folder: RunFolder) -> dict[int, dict[int, Path]]:
    found: dict[int, dict[int, Path]] = {}
    try:
        names = os.listdir(folder.logs)
    except OSError:
        return {}
    for name in names:
        if match := _RANK_FILE.fullmatch(name):
            found.setdefault(int(match[1]), {})[int(match[2])] = folder.logs / name
    return found


def _job_log(folder: RunFolder, attempt: Attempt | None) -> Log:
    job = attempt.job if attempt is not None else next(iter(reversed(jobs_of(folder))), None)
    if job is None:
        raise LogError(f"{printable(folder.path)} was never submitted, so no batch script has said anything")
    for home in (folder, _home(folder)):  # a task of an array has its log in the folder of the array
        if (path := home.logs / f"job-{job}.txt").is_file():
            return Log(path)
    raise LogError(f"job {job} of {printable(folder.path)} has not begun: see potamos status")


def _home(folder: RunFolder) -> RunFolder:
    """The folder that a run's job was submitted from; its own, but for the runs of an array."""
    asked = (read_json(folder.job) or {}).get("job")
    home = asked.get("folder") if isinstance(asked, dict) else None
    return RunFolder(Path(home)) if isinstance(home, str) else folder


def _there_are(what: str, numbers: list[int]) -> str:
    if not numbers:
        return f"it has no {what} yet"
    shown = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 8 else ", ".join(map(str, numbers))
    return f"there are {what} {shown}"


# --- reading --------------------------------------------------------------------------------------------------------


def read(path: Path, lines: int | None = None) -> Iterator[bytes]:
    """A file in pieces, or its last lines."""
    with open(path, "rb") as file:
        if lines is not None:
            file.seek(_start_of_last(lines, path))
        while piece := file.read(BLOCK):
            yield piece


def _start_of_last(lines: int, path: Path) -> int:
    """Where the last lines of a file begin; reads no more of it than these. A last line without an end counts."""
    with open(path, "rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        left = lines
        while position > 0:
            size = min(BLOCK, position)
            position -= size
            file.seek(position)
            block = file.read(size)
            at = len(block)
            while (at := block.rfind(b"\n", 0, at)) >= 0:
                if position + at == end - 1:
                    continue  # that of the last line
                left -= 1
                if left <= 0:
                    return position + at + 1 if lines > 0 else end
    return 0 if lines > 0 else end


@dataclass
class Follower:
    """Writes what is added to a run's log, across requeues, until the run ends.

    Args:
        write: gets the bytes.
        tell: gets remarks: which file comes now, what is waited for, how an attempt or the run ended.
        status: how the run stands.
    """

    run: Path
    write: Callable[[bytes], object]
    tell: Callable[[str], object]
    rank: int | None = None
    attempt: int | None = None
    job: bool = False
    lines: int | None = None
    poll: float = POLL
    ask: float = ASK
    status: Callable[[Path], Status] = lambda run: statuses([run])[0]

    def follow(self) -> Status:
        """Follow to the end; how the run stands then. With a given attempt, to the end of that."""
        log: Log | None = None
        place, asked, sure, said = 0, -math.inf, False, ""
        while True:
            found = self._look()
            if found is not None and (log is None or found.path != log.path):
                place, log = self._change(log, place, found), found
            before, place = place, place if log is None else self._drain(log, place)
            if place != before:
                sure = False
            elif sure or time.monotonic() - asked >= self.ask:
                asked, status = time.monotonic(), self.status(self.run)
                over = self._over(status)
                if over and sure:  # twice in a row, without a word between
                    self._tell_end(log)
                    return status
                news = "" if over or status.state == "running" else f"{status.state}: {printable(status.why)}"
                if news and news != said:
                    self.tell(news)
                sure, said = over, news or said
            time.sleep(self.poll)

    def _change(self, old: Log | None, place: int, new: Log) -> int:
        """Go over to another file; where to begin in it. The first one may be long, so only its last lines count."""
        if old is not None:
            self._drain(old, place)
            self._tell_end(old)
        self.tell(f"==> {printable(new.path)}")
        return _start_of_last(self.lines, new.path) if old is None and self.lines is not None else 0

    def _look(self) -> Log | None:
        """The file to follow now. Of a running attempt it is that of rank 0, whoever fails later."""
        try:
            found = choose(self.run, rank=self.rank, attempt=self.attempt, job=self.job)
        except LogError:
            if not Path(self.run).is_dir() or (self.attempt is not None and self.attempt not in _known(self.run)):
                raise
            return None
        if self.rank is None and found.rank:
            return choose(
                self.run, rank=min(_rank_files(RunFolder.of(self.run))[found.attempt or 0]), attempt=found.attempt
            )
        return found

    def _over(self, status: Status) -> bool:
        if self.attempt is None:
            return status.state in ENDED
        later = max(_known(self.run), default=self.attempt) > self.attempt
        ended = any(a.number == self.attempt and a.ended for a in read_attempts(self.run))
        return later or ended or status.state in ENDED

    def _drain(self, log: Log, place: int) -> int:
        """Write what has been added behind ``place``; where the file ends now. Opened anew each time: only then does
        a network file system ask for news."""
        try:
            with open(log.path, "rb") as file:
                if file.seek(0, os.SEEK_END) < place:
                    place = 0  # someone emptied it
                file.seek(place)
                while piece := file.read(BLOCK):
                    self.write(piece)
                    place += len(piece)
        except FileNotFoundError:
            return 0
        return place

    def _tell_end(self, log: Log | None) -> None:
        ended = next((a for a in read_attempts(self.run) if log and a.number == log.attempt and a.verdict), None)
        if log is None or ended is None:
            return
        who = culprit(ended)
        look = f" (its log: --attempt {ended.number} --rank {who})" if who is not None and who != log.rank else ""
        self.tell(f"attempt {ended.number} ended: {printable(ended.reason or ended.verdict)}{look}")


def _known(run: str | os.PathLike[str]) -> set[int]:
    return {*(a.number for a in read_attempts(run)), *_rank_files(RunFolder.of(run))}
