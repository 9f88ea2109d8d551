"""Real attempts are killed, interrupted and asked to stop, and the run still ends as if nothing had happened.

Moments are drawn from a seed that each failure prints; POTAMOS_TEST_SEED draws others.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SEED = int(os.environ.get("POTAMOS_TEST_SEED", "20"))
CHANGES = ("data.order=contiguous", "train.steps=18", "checkpoint={every: 2, keep: 2}")


@pytest.fixture
def rng():
    print(f"POTAMOS_TEST_SEED={SEED}")
    return random.Random(SEED)


@pytest.fixture(scope="module")
def whole(trial, tmp_path_factory):
    """The run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    attempt = trial.start(run, *CHANGES)
    assert attempt.wait() == 0, attempt.output
    return run


def records(run):
    """Lines in the run's metrics, partial ones included."""
    path = run / "logs" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def folders(run, prefix):
    checkpoints = run / "checkpoints"
    return sorted(checkpoints.glob(f"{prefix}*")) if checkpoints.is_dir() else []


def kill_while_saving(attempt, run):
    """Freeze the process whenever a partial checkpoint shows, and kill it if it is still partial then."""
    while True:
        assert attempt.until(lambda: bool(folders(run, ".tmp-step-"))), f"it ended before:\n{attempt.output}"
        attempt.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, attempt.pid, os.WSTOPPED)
        partial = folders(run, ".tmp-step-")
        attempt.signal(signal.SIGKILL if partial else signal.SIGCONT)
        if partial:
            assert attempt.wait() == 128 + signal.SIGKILL
            return partial


def test_kills_leave_no_trace(trial, whole, rng, tmp_path):
    run = tmp_path / "run"
    for saved in (False, True, True):  # at any moment, then at moments when there is something new to go on from
        before = folders(run, "step-")
        goal = records(run) + rng.randint(0, 4)  # the first is the attempt's own "start"; 0 is a kill before anything
        attempt = trial.start(run, *CHANGES)
        assert attempt.until(
            lambda goal=goal, saved=saved, before=before: (
                records(run) >= goal and not (saved and folders(run, "step-") == before)
            )
        ), attempt.output
        time.sleep(rng.uniform(0, 0.1))
        attempt.signal(signal.SIGKILL)
        assert attempt.wait() == 128 + signal.SIGKILL, attempt.output
        print(f"killed after {records(run)} records, {[f.name for f in folders(run, '')]}")
    partial = kill_while_saving(trial.start(run, *CHANGES), run)
    assert partial == folders(run, ".tmp-step-"), "the kill came in the middle of a save"
    assert folders(run, "step-"), "and there is an earlier one"

    attempt = trial.start(run, *CHANGES)
    assert attempt.wait() == 0, attempt.output
    assert trial.differences(whole, run) == []
    assert not folders(run, ".tmp-"), "what the killed save left is cleared away"
    assert [f.name for f in folders(run, "step-")] == ["step-00000016", "step-00000018"]


def test_signals_stop_at_a_step_and_leave_no_trace(trial, whole, rng, tmp_path):
    run = tmp_path / "run"
    expected = {signal.SIGTERM: 0, signal.SIGUSR1: 0, signal.SIGINT: 130}
    steps = [0]
    for number, (stop, status) in enumerate(expected.items()):
        goal = records(run) + rng.randint(2, 4)  # the first is the attempt's own "start"
        attempt = trial.start(run, *CHANGES)
        assert attempt.until(lambda goal=goal: records(run) >= goal), attempt.output
        time.sleep(rng.uniform(0, 0.03))
        attempt.signal(stop)
        assert attempt.wait() == status, attempt.output
        marker = json.loads((run / f"stop.{number}").read_text())
        assert (marker["reason"], marker["attempt"]) == (stop.name, number)
        assert folders(run, "step-")[-1].name == f"step-{marker['step']:08d}", "saved where it stopped"
        assert json.loads((run / "state.json").read_text())["reason"] == stop.name
        assert not (run / "done.json").exists()
        assert "Traceback" not in attempt.output
        steps.append(marker["step"])
    assert steps == sorted(set(steps)), "every attempt got further"

    attempt = trial.start(run, *CHANGES)
    assert attempt.wait() == 0, attempt.output
    assert (run / "done.json").exists()
    assert trial.differences(whole, run) == []


def test_a_second_interrupt_leaves_at_once(trial, tmp_path):
    run = tmp_path / "run"
    attempt = trial.start(run, *CHANGES, "train.sequences=512", "train.micro_sequences=512", "train.steps=500")
    assert attempt.until(lambda: records(run) >= 1), attempt.output
    attempt.signal(signal.SIGINT)
    assert attempt.until(lambda: "press Ctrl-C again" in attempt.output)
    attempt.signal(signal.SIGINT)
    assert attempt.wait() == 130, attempt.output
    assert not list(run.glob("stop.*"))
    assert "Traceback" not in attempt.output


def test_a_signal_during_the_imports_still_ends_in_a_saved_run(trial, whole, tmp_path):
    """The console script itself, in a new interpreter: handlers stand before torch is imported."""
    run = tmp_path / "run"
    command = [str(Path(sys.executable).with_name("potamos")), "train", "h3_hybrid_tiny"]
    command += [*trial.overrides(*CHANGES), "--run", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not catches(process.pid, signal.SIGTERM):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    early = "torch/lib" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert early, "torch was imported before the handlers were installed"
    assert json.loads((run / "stop.0").read_text())["step"] == 1

    attempt = trial.start(run, *CHANGES)
    assert attempt.wait() == 0, attempt.output
    assert trial.differences(whole, run) == []


def catches(pid, number):
    """Whether a process has a handler for a signal, as Linux tells."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)
