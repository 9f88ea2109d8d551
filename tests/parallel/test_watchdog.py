"""A rank that hangs is found, named and ended; one that works is left alone."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from potamos.parallel.watchdog import EXIT_CODE, Watchdog, join

pytestmark = pytest.mark.distributed


def hanging(folder, stuck: int, *, silent: bool = False):
    """Ranks all-reduce in turns; `stuck` does not come to the third one."""

    def work(rank, world):
        codes = []

        def leave(code):
            codes.append(code)
            os.kill(os.getpid(), signal.SIGALRM)  # in place of os._exit, which the harness could not tell from a death

        class Left(Exception):
            pass

        def raise_left(*_):
            raise Left

        signal.signal(signal.SIGALRM, raise_left)
        dog = Watchdog(folder, rank, world, seconds=60 if silent and rank == stuck else 0.6, gather=1.0, exit=leave)
        try:
            with dog:
                for step in range(3):
                    dog.beat(f"step {step + 1}")
                    if step == 2 and rank == stuck:
                        while True:
                            time.sleep(0.05)
                    work = dist.all_reduce(torch.zeros(3, 5), async_op=True)
                    assert work is not None
                    while not work.is_completed():
                        time.sleep(0.02)
        except Left:
            pass
        return codes

    return work


def test_a_hang_is_reported_with_the_rank_that_is_behind(tmp_path, run_ranks):
    assert run_ranks(3, hanging(tmp_path, 1), timeout=30) == [[EXIT_CODE]] * 3
    report = (tmp_path / "hang.txt").read_text()
    assert "3 of 3 ranks report that nothing moves" in report
    assert "Behind the others: rank 1." in report
    first = report.index("rank 1 on ")
    assert first < report.index("rank 0 on "), "the rank behind comes first"
    assert "collectives entered: 2, the last: all_reduce of (3, 5)" in report
    assert "collectives entered: 3, the last: all_reduce of (3, 5)" in report
    assert "time.sleep(0.05)" in report, "the stack shows where"
    assert "'step 3'" in report
    assert [path.name for path in tmp_path.iterdir()] == ["hang.txt"]


def test_a_rank_that_is_gone_is_named(tmp_path):
    report = join(["3 4\nrank 0\n", "3 4\nrank 2\n"], [0, 2], 4)
    assert "2 of 4 ranks" in report
    assert "No report from rank 1, 3" in report
    same = join(["3 4\nrank 0\n", "3 4\nrank 1\n"], [0, 1], 2)
    assert "look at the network" in same


def report_of(folder, rank: int, gather: float, left: dict[int, bool]) -> threading.Thread:
    """A rank that hangs; when it leaves, whether there was a report by then."""

    def leave(_: int) -> None:
        left[rank] = (folder / "hang.txt").exists()

    dog = Watchdog(folder, rank, 2, seconds=0.2, gather=gather, exit=leave)
    thread = threading.Thread(target=dog._watch)
    thread.start()
    return thread


@pytest.mark.parametrize("slow", [0, 1])
def test_whoever_leaves_first_leaves_a_report(tmp_path, slow):
    """A launcher that sees one rank leave kills the others: one that is done waiting waits for who joins the parts."""
    left = {}
    for thread in [report_of(tmp_path, rank, 1.5 if rank == slow else 0.8, left) for rank in (0, 1)]:
        thread.join(timeout=20)
    assert left == {0: True, 1: True}
    assert "2 of 2 ranks report" in (tmp_path / "hang.txt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["hang.txt"]


def test_a_part_whose_rank_has_died_is_joined_by_another(tmp_path):
    (tmp_path / ".hang-0.txt").write_text("3 4\nrank 0 on a node, killed since\n")
    left, began = {}, time.monotonic()
    report_of(tmp_path, 1, 0.3, left).join(timeout=20)
    assert left == {1: True}
    assert time.monotonic() - began < 10
    report = (tmp_path / "hang.txt").read_text()
    assert "2 of 2 ranks report" in report
    assert "killed since" in report


def test_no_rank_takes_itself_for_the_lowest_while_parts_are_removed(tmp_path, monkeypatch):
    for rank in range(3):
        (tmp_path / f".hang-{rank}.txt").write_text("3 4\nrank\n")
    lowest, unlink = [], Path.unlink

    def watched(path, **named):
        unlink(path, **named)
        lowest.append(min((part.name for part in tmp_path.glob(".hang-*")), default=""))

    monkeypatch.setattr(Path, "unlink", watched)
    Watchdog(tmp_path, 0, 3, seconds=1.0)._join(1.0)
    assert lowest == [".hang-0.txt", ".hang-0.txt", ""]


def test_a_report_that_cannot_be_written_keeps_nobody(tmp_path, capsys):
    (tmp_path / "folder").write_text("a file")
    left = {}
    report_of(tmp_path / "folder", 0, 0.1, left).join(timeout=20)
    assert left == {0: False}
    assert "no report of it: FileExistsError: [Errno 17] File exists" in capsys.readouterr().err


def test_progress_keeps_it_quiet_and_the_end_restores_torch(tmp_path):
    original, ended = dist.all_reduce, []
    with Watchdog(tmp_path, 0, 1, seconds=0.4, exit=ended.append) as dog:
        assert dist.all_reduce is not original
        for step in range(10):
            dog.beat(str(step))
            time.sleep(0.08)
    assert dist.all_reduce is original
    assert ended == []
    assert list(tmp_path.iterdir()) == []


def test_without_a_limit_it_does_nothing(tmp_path):
    original = dist.all_reduce
    with Watchdog(tmp_path, 0, 1, seconds=None) as dog:
        dog.beat("a")
        assert dist.all_reduce is original
