"""A rank that hangs is found, named and ended; one that works is left alone."""

from __future__ import annotations

import os
import signal
import time

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
