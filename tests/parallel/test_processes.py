"""Ranks as processes of one machine: their environment, their failures, their signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potamos.parallel.launch import LaunchError, Rank, from_slurm
from potamos.parallel.processes import HOLD_SECONDS, _tell, run_processes

pytestmark = pytest.mark.distributed


def run(tmp_path, program: str, count: int) -> tuple[int, str, str]:
    """`program` in `count` ranks, from a process of its own, so that its terminal can be read."""
    script = tmp_path / "rank.py"
    script.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{program}\n")
    call = f"run_processes([sys.executable, {str(script)!r}], {count})"
    starter = f"import sys; from potamos.parallel.processes import run_processes; sys.exit({call})"
    done = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    return done.returncode, done.stdout, done.stderr


def test_every_rank_gets_its_place(tmp_path):
    program = f"""
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GROUP_RANK")
open(f"{tmp_path}/place-{{rank}}", "w").write(" ".join(os.environ[n] for n in names))
print("from", rank)
"""
    code, out, _ = run(tmp_path, program, 3)
    assert code == 0
    assert out == "from 0\n", "one rank speaks"
    for rank in range(3):
        assert (tmp_path / f"place-{rank}").read_text() == f"{rank} 3 {rank} 3 127.0.0.1 0"


def test_a_failing_rank_ends_all_within_seconds_and_speaks_first(tmp_path):
    program = """
if rank == 2:
    sys.exit("error: no such shard")
time.sleep(600)
"""
    began = time.monotonic()
    code, _, words = run(tmp_path, program, 3)
    assert code == 1
    assert time.monotonic() - began < 20
    assert words.startswith("rank 2 ended with status 1:\nerror: no such shard")


def test_the_cause_comes_before_its_echoes(tmp_path):
    """The others lose their connection and raise too, rank 0 at once."""
    program = """
if rank == 1:
    time.sleep(0.3)
    raise RuntimeError("the true cause")
time.sleep(0.5)
print("a warning", file=sys.stderr)
raise ConnectionError("Connection reset by peer")
"""
    code, _, words = run(tmp_path, program, 3)
    assert code == 1
    assert words.startswith("a warning\n"), "what is no failure is passed on at once"
    assert words.index("rank 1 ended with status 1") < words.index("the true cause") < words.index("Connection reset")


@pytest.mark.parametrize("late", [0, 1])
def test_a_users_mistake_is_said_once(tmp_path, late):
    """Whichever rank leaves first: the other ones leave without a word."""
    wait = f"if rank == {late}:\n    time.sleep(0.3)\n"
    code, _, words = run(tmp_path, wait + "if rank == 0:\n    print('error: wrong', file=sys.stderr)\nsys.exit(2)", 2)
    assert (code, words) == (2, "error: wrong\n")


def test_a_killed_rank_is_named(tmp_path):
    code, _, words = run(tmp_path, "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)", 2)
    assert code == 137
    assert "rank 1 was ended by SIGKILL" in words


GROUP = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
for step in range(1000):
    dist.all_reduce(torch.ones(4))
    time.sleep(0.01)
    if step == 3 and rank == {cause}:
        {end}
"""


@pytest.mark.parametrize("cause", [0, 1])
def test_a_rank_that_raises_in_a_process_group_speaks_first(tmp_path, cause):
    """torch puts the rank in front of each line of a traceback, and the others lose their connection at once."""
    code, _, words = run(tmp_path, GROUP.format(cause=cause, end="raise RuntimeError('the true cause')"), 2)
    assert code == 1
    assert (
        words.splitlines()[0] == ("[rank0]: Traceback (most recent call last):", "rank 1 ended with status 1:")[cause]
    )
    assert f"[rank{cause}]: RuntimeError: the true cause" in words
    assert f"[rank{1 - cause}]: RuntimeError: [" in words, "the other one was in a collective"
    assert words.index("the true cause") < words.index(f"[rank{1 - cause}]: Traceback")


def test_a_rank_that_is_killed_in_a_process_group_is_named_first(tmp_path):
    code, _, words = run(tmp_path, GROUP.format(cause=2, end="os.kill(os.getpid(), signal.SIGKILL)"), 4)
    assert code == 137
    assert words.splitlines()[0] == "rank 2 was ended by SIGKILL"
    assert "[rank0]: Traceback" in words, "the others were in a collective"


TOLD = """
import logging, threading
if rank == 0:
    print("before", file=sys.stderr)
    try:
        raise OSError("disk full")
    except OSError:
        logging.exception("the background could not save")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    print("error: checkpoint was not written", file=sys.stderr)
    print("WARNING: going on", file=sys.stderr, flush=True)
{after}
"""


def test_what_rank_0_told_and_outlived_is_not_lost(tmp_path):
    code, _, words = run(tmp_path, TOLD.format(after=""), 2)
    assert code == 0
    parts = (
        "before\n",
        "OSError: disk full\n",
        "ZeroDivisionError",
        "error: checkpoint was not",
        "WARNING: going on\n",
    )
    assert [words.count(part) for part in parts] == [1] * len(parts)
    assert sorted(parts, key=words.index) == list(parts)


def test_nor_where_another_rank_fails(tmp_path):
    code, _, words = run(tmp_path, TOLD.format(after="if rank == 1: sys.exit('error: the cause')"), 2)
    assert code == 1
    assert words.index("rank 1 ended with status 1:\nerror: the cause") < words.index("OSError: disk full")
    assert "WARNING: going on" in words


def test_what_rank_0_tells_and_goes_on_is_seen_while_it_does(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + TOLD.format(after="time.sleep(60)\n")
    )
    call = f"run_processes([sys.executable, {str(script)!r}], 2)"
    starter = f"import sys; from potamos.parallel.processes import run_processes; sys.exit({call})"
    seen = tmp_path / "seen"
    with seen.open("wb") as file:
        running = subprocess.Popen([sys.executable, "-c", starter], stderr=file, cwd=tmp_path)
    try:
        deadline = time.monotonic() + HOLD_SECONDS + 25
        while "WARNING: going on" not in seen.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "OSError: disk full" in seen.read_text()
        assert "WARNING: going on" in seen.read_text()
        assert running.poll() is None
    finally:
        running.terminate()
        running.wait()


BEHIND = "Traceback\nRuntimeError: Connection reset by peer"
CAUSE = "Traceback\nRuntimeError: no such shard"
NOTED = "error: rank 0: model-00001 has 5 bytes"
QUOTED = "error: rank 2: x is missing"
TELLINGS = {
    "rank 0 names itself": ([2, 2, 2], [NOTED, "", ""], 2, NOTED, 2),
    "rank 0 names itself, and one lost it": ([2, 1, 2], [NOTED, BEHIND, ""], 1, NOTED, 2),
    "rank 0 quotes one that is silent": ([2, 1, 3], [QUOTED, BEHIND, ""], 1, QUOTED, 2),
    "rank 0 quotes one that speaks": ([2, 1, 3], [QUOTED, "", CAUSE], 0, "rank 2 ended with status 3:", 3),
    "rank 0 quotes a rank of nowhere": ([2, 1], ["error: rank 9: gone", BEHIND], 1, "error: rank 9", 2),
    "rank 0 has a peer's error": ([2, 3], ["PeerError: no such shard", CAUSE], 0, "rank 1 ended with status 3:", 3),
    "rank 0 lost its connection": ([1, 3], [BEHIND, CAUSE], 0, "rank 1 ended with status 3:", 3),
    "a silent rank left first": ([1, 3, 4], ["", BEHIND, ""], 2, "rank 1 ended with status 3:", 3),
    "a killed rank is not silent": ([1, 1, -9], [BEHIND, BEHIND, ""], 0, "rank 2 was ended by SIGKILL\n", 137),
    "all are silent": ([1, 3], ["", ""], 1, "rank 1 ended with status 3\n", 3),
}  # fmt: skip


@pytest.mark.parametrize("telling", TELLINGS.values(), ids=TELLINGS)
def test_the_cause_is_told_from_its_echoes(telling, capsys):
    codes, words, first, begins, status = telling
    assert _tell(codes, words, first) == status
    assert capsys.readouterr().err.startswith(begins)


def test_a_rank_that_was_ended_from_here_is_no_cause(capsys):
    """It went on when the others left, or hung: the one that failed first speaks first, though it lost a connection."""
    assert _tell([1, -9], ["Connection refused by the store", ""], 0, left=[1]) == 1
    assert capsys.readouterr().err == "Connection refused by the store\n"


LOST = (
    "[rank{n}]: Traceback (most recent call last):\n[rank{n}]:   here\n"
    "[rank{n}]: RuntimeError: Connection closed by peer"
)


def test_an_echo_is_a_line_where_the_logs_have_the_rest(tmp_path, capsys):
    words = [LOST.format(n=0), "", LOST.format(n=2), "Traceback\nMemoryError: of its own"]
    assert _tell([1, -9, 1, 1], words, 1, logs=tmp_path) == 137
    kept = tmp_path / "ranks.txt"
    assert capsys.readouterr().err.splitlines() == [
        "rank 1 was ended by SIGKILL",
        "rank 3 ended with status 1:",
        "Traceback",
        "MemoryError: of its own",
        "rank 0 ended with it: RuntimeError: Connection closed by peer",
        "rank 2 ended with it: RuntimeError: Connection closed by peer",
        f"all that the ranks said: {kept}",
    ]
    text = kept.read_text()
    assert text.startswith("rank 1 was ended by SIGKILL:\n")
    assert all(each in text for each in words)
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.txt"]


@pytest.mark.parametrize("logs", [None, "absent", "file"])
def test_where_no_log_takes_them_echoes_are_told_in_full(tmp_path, capsys, logs):
    (tmp_path / "file").write_text("no folder")
    assert _tell([1, -9], [LOST.format(n=0), ""], 1, logs=None if logs is None else tmp_path / logs) == 137
    assert capsys.readouterr().err == f"rank 1 was ended by SIGKILL\n{LOST.format(n=0)}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank(tmp_path, number):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys, time\nrank = os.environ['RANK']\n"
        f"def leave(*_):\n    open(f'{tmp_path}/got-' + rank, 'w').close()\n    sys.exit(0)\n"
        f"signal.signal({int(number)}, leave)\nopen(f'{tmp_path}/up-' + rank, 'w').close()\ntime.sleep(60)\n"
    )
    pid = os.fork()
    if pid == 0:
        os._exit(run_processes([sys.executable, str(script)], 2))
    while len(list(tmp_path.glob("up-*"))) < 2:
        time.sleep(0.02)
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(list(tmp_path.glob("got-*"))) == 2


def test_train_on_two_processes(trial, tmp_path):
    """The command trains, and a signal stops all of its processes at one step, with everything saved."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "potamos.pretrain.cli", "train", "h3_hybrid_tiny"]
    command += [
        *trial.overrides("train.steps=4", "parallel={dp_replicate: 1, tp: 2}"),
        "--run",
        str(run),
        "--nproc",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = tmp_path / "whole"
    assert trial.fit(whole, "train.steps=4") == 0
    assert trial.losses(run) == pytest.approx(trial.losses(whole), rel=1e-5)
    refused = subprocess.run([*command[:-1], "3"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "needs 2 processes, and this run has 3" in refused.stderr


def test_a_rank_that_is_killed_in_training_leaves_its_echoes_in_the_logs(trial, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "potamos.pretrain.cli", "train", "h3_hybrid_tiny"]
    command += [*trial.overrides("train.steps=100000", "parallel={dp_replicate: 1, tp: 2}"), "--run", str(run)]
    running = subprocess.Popen([*command, "--nproc", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while '"step": 1' not in _text(run / "logs" / "metrics.jsonl") and time.monotonic() < deadline:
            time.sleep(0.05)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)  # rank 1, started second
        _, words = running.communicate(timeout=60)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 137
    lines = words[words.index("rank 1 was ended by SIGKILL") :].splitlines()
    assert lines[1].startswith("rank 0 ended with it: "), words
    assert lines[2:] == [f"all that the ranks said: {run / 'logs' / 'ranks.txt'}"]
    assert "Traceback" in (run / "logs" / "ranks.txt").read_text()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_ID": "41",
}  # fmt: skip


def test_a_slurm_task_knows_its_place():
    meeting = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "20300"}
    assert Rank.from_environment({**SLURM, **meeting}) == Rank(5, 8, 1, 4, 1)
    with pytest.raises(LaunchError, match="MASTER_ADDR and MASTER_PORT"):
        Rank.from_environment(SLURM)


def test_on_one_node_the_port_follows_job_and_restart():
    one = {**SLURM, "SLURM_STEP_NUM_NODES": "1"}
    assert from_slurm(one)["MASTER_PORT"] == str(20000 + 7 * 41)
    assert from_slurm({**one, "SLURM_RESTART_COUNT": "2"})["MASTER_PORT"] == str(20000 + 7 * 41 + 2)
    assert Rank.from_environment(one).world == 8


def test_what_is_no_slurm_step_of_several_tasks_is_one_process():
    script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert Rank.from_environment(script) == Rank()
    assert Rank.from_environment({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) == Rank()
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert Rank.from_environment({**SLURM, **given}) == Rank()
