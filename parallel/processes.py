"""Several processes of one machine, one per rank, as a launcher starts them: same command, torchrun's environment.

Signals are passed on to every rank, so Ctrl-C and a scheduler's signals mean what they mean for one process. When a
rank fails, the others cannot go on: they are ended within seconds, and its words come first.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 5.0
"""How long the other ranks have to end by themselves after one has failed."""
HOLD_SECONDS = 5.0
"""How long what looks like rank 0's end is held back while no rank has ended: then it was told of, and work goes on."""
ECHO = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|Timed out waiting|PeerError")
"""What ranks say that another one has left."""
QUOTE = re.compile(r"rank (\d+): ")
"""How a rank passes on what another one has said."""
RANKS = "ranks.txt"
"""In a run's logs: all that the ranks of its last failure said."""
LONGEST_LINE = 240
"""Characters of an echo that are shown."""
FAILURE = re.compile(r"(\[rank\d+\]: )?(Traceback \(most recent call last\)|error: )")
"""How the words of a failing rank begin; torch puts the rank in front once the process group is up."""


def run_processes(
    command: Sequence[str], count: int, environment: Mapping[str, str] = os.environ, logs: Path | None = None
) -> int:
    """Run `command` once per rank and wait for all; the exit status of the rank that failed first, or 0.

    Rank 0 writes to this process's terminal. What the others write to standard error is kept, and what rank 0 writes
    once it fails is held back, until all have ended: then the words of the rank that caused it come first. Where no
    rank ends, rank 0's are passed on after HOLD_SECONDS.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
        ranks: list[subprocess.Popen[bytes]] = []
        before = {number: signal.getsignal(number) for number in PASSED_ON}
        first = _Words()
        try:
            for number in PASSED_ON:
                signal.signal(number, lambda number, _: [_send(rank, number) for rank in ranks])
            for rank in range(count):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
                with Path(scratch, f"{rank}").open("wb") as words:
                    ranks.append(
                        subprocess.Popen(
                            command,
                            env={**environment, **meeting, **place},
                            stdin=subprocess.DEVNULL,
                            stdout=None if rank == 0 else subprocess.DEVNULL,
                            stderr=subprocess.PIPE if rank == 0 else words,
                            start_new_session=True,  # a terminal's Ctrl-C comes through this process, once
                            preexec_fn=_die_with_parent,
                        )
                    )
                if rank == 0:
                    first.follow(ranks[0])
            failed_first = _wait(ranks, first)
            left = [n for n, rank in enumerate(ranks) if rank.poll() is None]
            for rank in ranks:
                _send(rank, signal.SIGKILL)
                rank.wait()
            kept = [first.end(), *(Path(scratch, f"{n}").read_text(errors="replace").strip() for n in range(1, count))]
            return _tell([rank.returncode for rank in ranks], kept, failed_first, left, logs)
        finally:
            for rank in ranks:
                _send(rank, signal.SIGKILL)
                rank.wait()
            for number, handler in before.items():
                signal.signal(number, handler)


class _Words:
    """What rank 0 writes to standard error: passed on at once, until it begins to tell of a failure."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._since = 0.0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def follow(self, rank: subprocess.Popen[bytes]) -> None:
        """Read until the rank closes it."""
        assert rank.stderr is not None
        self._thread = threading.Thread(target=self._read, args=(rank.stderr,), daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Pass on what was held back for long enough: no rank has ended, so it was a logged error or a thread's."""
        with self._lock:
            if self._held and time.monotonic() - self._since > HOLD_SECONDS:
                _say("".join(self._held))
                self._held.clear()

    def end(self) -> str:
        """What was held back."""
        if self._thread is not None:
            self._thread.join(timeout=5)
        return "".join(self._held).strip()

    def _read(self, source: IO[bytes]) -> None:
        for line in source:
            text = line.decode(errors="replace")
            with self._lock:
                if not self._held and not FAILURE.match(text):
                    _say(text)
                    continue
                if not self._held:
                    self._since = time.monotonic()
                self._held.append(text)


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _wait(ranks: list[subprocess.Popen[bytes]], words: _Words) -> int | None:
    """Until all have ended, or one has failed and the others have had their time; the rank seen to fail first."""
    first, deadline = None, float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        if first is None:
            first = next((n for n, code in enumerate(codes) if code), None)
            if first is not None:
                deadline = time.monotonic() + GRACE_SECONDS
        if None not in codes or time.monotonic() > deadline:
            return first
        if first is None:
            words.go_on()
        time.sleep(0.02)


def _tell(
    codes: Sequence[int],
    words: Sequence[str],
    first: int | None,
    left: Sequence[int] = (),
    logs: Path | None = None,
) -> int:
    """Say what each failed rank said, the cause before its echoes; the cause's exit status, or 0.

    `left` are the ranks that went on until they were ended from here, which no cause does.
    """
    failed = [n for n, code in enumerate(codes) if code]
    # Of a user's mistake rank 0 alone speaks; one that leaves without a word beside it is not the cause.
    silent = {n for n in failed if codes[n] > 0 and not words[n]}
    failed.sort(key=lambda n: (n in left, n in silent, _is_echo(n, words), n != first, n))
    full = _keep(codes, words, failed, logs) if any(words[n] for n in failed[1:]) else None
    said: set[str] = set()
    for n in failed:
        if full is not None and n != failed[0] and words[n] and _is_echo(n, words):
            text = f"rank {n} ended with it: {_echo(words[n])}"
        elif n == 0 and words[0]:
            text = words[0]
        elif words[n] and words[n] not in said:
            text = f"rank {n} {_how(codes[n])}:\n{words[n]}"
        elif n == failed[0] and n > 0:
            text = f"rank {n} {_how(codes[n])}"
        else:
            continue
        said.add(words[n])
        _say(f"{text}\n")
    if full is not None:
        _say(f"all that the ranks said: {full}\n")
    if not codes[0] and words[0]:  # an error that it told of and outlived
        _say(f"{words[0]}\n")
    if not failed:
        return 0
    code = codes[failed[0]]
    return 128 - code if code < 0 else code


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _keep(codes: Sequence[int], words: Sequence[str], failed: Sequence[int], logs: Path | None) -> Path | None:
    """The file with all that failed ranks said, the cause first; None where it could not be written."""
    if logs is None or not logs.is_dir():
        return None
    half = logs / f".{RANKS}.half"
    try:
        half.write_text("\n\n".join(f"rank {n} {_how(codes[n])}:\n{words[n]}" for n in failed) + "\n", encoding="utf-8")
        os.replace(half, logs / RANKS)
    except OSError:  # a full disk: then it is all said
        return None
    return logs / RANKS


def _echo(words: str) -> str:
    """The line that tells of another rank's end, or the last one."""
    lines = words.splitlines()
    line = next((line for line in reversed(lines) if ECHO.search(line)), lines[-1])
    return re.sub(r"^\[rank\d+\]: ", "", line).strip()[:LONGEST_LINE]


def _is_echo(rank: int, words: Sequence[str]) -> bool:
    """Whether a rank only says what has become of another, or quotes one that speaks for itself."""
    others = {int(match[1]) for match in QUOTE.finditer(words[rank])} - {rank}
    return bool(ECHO.search(words[rank])) or any(n < len(words) and words[n] for n in others)


def _die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it ends, however it ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _send(rank: subprocess.Popen[bytes], number: int) -> None:
    if rank.poll() is None:
        rank.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
