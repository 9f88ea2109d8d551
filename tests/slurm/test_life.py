"""One run through everything that happens to runs on a cluster: it ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import time
from types import SimpleNamespace

import pytest

from potamos.slurm import daemons

STEPS, MORE = 52, 6
# Rank 0 says why: that it was asked, or that it heard of another that was a step sooner.
ASKED = ("SIGUSR1", "another rank was asked to stop")


@pytest.fixture(scope="module")
def text(life, slurm_folder):
    folder = slurm_folder / "text"
    folder.mkdir()
    return life.prepare_text(folder)


@pytest.fixture(scope="module")
def runs(life, module_cluster, slurm_folder, text):
    """Of one recipe: `hurt`, to which everything happens, and `whole`, to which nothing does, once it is asked for."""
    start = lambda name, steps=STEPS: life.submit(  # noqa: E731
        module_cluster, slurm_folder / "runs" / name, *text, *life.short_run(steps)
    )
    return SimpleNamespace(hurt=start("hurt"), start=start)


@pytest.fixture(scope="module")
def hurt(runs):
    return runs.hurt


# --- faults, in this order, to one job ------------------------------------------------------------------------------


def test_a_warning_before_the_time_limit(hurt):
    outage = hurt.suffer("warning", hurt.warn)
    assert (outage.saved, outage.again) == (True, 0)
    assert hurt.attempts[0].verdict == "requeue"
    assert hurt.attempts[0].reason in ASKED


def test_preemption_by_a_higher_partition(hurt):
    outage = hurt.suffer("preemption", hurt.preempt)
    assert (outage.saved, outage.again) == (True, 0)
    assert hurt.facts()["Restarts"] == "2"


def test_a_rank_is_killed(hurt):
    outage = hurt.suffer("killed rank", hurt.kill_rank)
    assert not outage.saved
    assert outage.again <= 3 + 1  # steps since the newest checkpoint, which is of every third
    killed = hurt.attempts[2]
    assert killed.verdict == "requeue"
    assert "Killed" in (killed.reason or "") or "137" in (killed.reason or ""), killed.reason


def test_a_node_dies(hurt):
    died = []
    outage = hurt.suffer("dead node", lambda: died.append(hurt.kill_node(tell=True)))
    assert died[0] not in hurt.nodes()
    assert not outage.saved
    hurt.revive(died[0])


def test_the_first_node_dies(hurt):
    """With rank 0, which saves, and the batch script, which judges: only Slurm is left to requeue the job."""
    died = []
    outage = hurt.suffer("dead first node", lambda: died.append(hurt.kill_node(tell=True, first=True)))
    assert died[0] not in hurt.nodes()
    assert not outage.saved
    assert outage.again <= 3 + 1
    assert [attempt.verdict for attempt in hurt.attempts[-2:]] == [None, None]  # nobody judged the one that died
    hurt.revive(died[0])


def test_an_operator_requeues(hurt):
    outage = hurt.suffer("requeue", hurt.requeue)
    assert (outage.saved, outage.again) == (True, 0)


def test_the_controller_restarts(hurt):
    before = len(hurt.attempts)
    outage = hurt.suffer("controller", hurt.cluster.restart_controller, first=hurt.cluster.save, restarts=False)
    assert len(hurt.attempts) == before, "the run was disturbed"
    assert outage.again == 0
    assert hurt.state() == "RUNNING"


# --- the end --------------------------------------------------------------------------------------------------------


def test_it_ends(hurt, capsys):
    assert hurt.until_ended() == "COMPLETED"
    assert hurt.done
    assert hurt.attempts[-1].verdict == "done"
    # As it must be where all of it has happened: a new attempt for each but the controller's restart.
    assert len(hurt.attempts) == 1 + sum(outage.restarted for outage in hurt.outages)
    with capsys.disabled():
        print()
        for o in hurt.outages:
            print(f"  {o.fault} after step {o.step}: {o.seconds} s to the first new step, {o.again} steps again")


@pytest.fixture(scope="module")
def whole(runs):
    run = runs.start("whole")
    assert run.until_ended() == "COMPLETED"
    assert len(run.attempts) == 1
    return run


def test_same_losses_and_weights_as_a_run_that_was_left_alone(hurt, whole, trial):
    assert [record["step"] for record in whole.records()] == list(range(1, STEPS + 1))
    assert trial.differences(whole.folder.path, hurt.folder.path) == []
    # Not for want of looking: nearly every step is another loss, and the faults did make it train some steps twice.
    assert len(set(trial.losses(whole.folder.path))) > STEPS * 0.9
    assert len(hurt.records()) > STEPS


def test_a_requeue_of_a_finished_run_does_nothing(hurt, whole):
    attempts, metrics = hurt.attempts, hurt.folder.metrics.read_bytes()
    began = time.monotonic()
    hurt.requeue()
    hurt.until(lambda: hurt.state() != "COMPLETED", "the job to be queued again")
    assert hurt.until_ended() == "COMPLETED"
    assert time.monotonic() - began < 60
    assert (hurt.attempts, hurt.folder.metrics.read_bytes()) == (attempts, metrics)


def test_it_goes_on_with_fewer_nodes_on_the_same_data(hurt, whole, runs, life, text, trial):
    alone = ["parallel={dp_replicate: 1}", "slurm={nodes: 1, tasks_per_node: 1}"]
    fewer = life.submit(hurt.cluster, hurt.folder.path, *text, *life.short_run(STEPS + MORE), *alone)
    further = runs.start("whole", STEPS + MORE)
    for run in (fewer, further):
        assert run.until_ended() == "COMPLETED"
    expected, found = (trial.history(run.folder.path)[STEPS:] for run in (further, fewer))
    assert [record["next_sample"] for record in found] == [4 * (STEPS + 1 + i) for i in range(MORE)]
    assert [record["tokens"] for record in found] == [record["tokens"] for record in expected]
    # Another number of ranks adds in another order; other data would be another loss altogether.
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-3)
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert found[1]["loss"] != pytest.approx(expected[0]["loss"], rel=1e-3)


# --- other ends ------------------------------------------------------------------------------------------------------


def test_a_signal_during_the_imports_is_kept_and_one_rank_is_enough_and_a_cancelled_run_stays_away(
    life, module_cluster, slurm_folder, text
):
    """Three ways to stop a run that would go on for days."""
    run = life.submit(module_cluster, slurm_folder / "runs" / "signals", *text, *life.short_run(100_000))
    run.until(lambda: len(run.ranks()) >= 2, "the ranks to start")
    assert run.records() == []
    run.warn()  # while torch is being imported: its default action would kill the ranks
    run.until(lambda: run.attempts[0].verdict, "the first attempt to end")
    assert (run.attempts[0].status, run.attempts[0].verdict) == (0, "requeue")
    assert run.attempts[0].reason in ASKED
    assert run.attempts[0].end_step == 1, "the first step after the imports was not the last"

    run.until(lambda: len(run.attempts) == 2, "the second attempt")
    run.until_progress()
    daemons.send(run.ranks(1), signal.SIGUSR1)  # ranks must agree: a save by some alone is no checkpoint
    run.until(lambda: run.attempts[1].verdict, "the second attempt to end")
    assert (run.attempts[1].status, run.attempts[1].verdict) == (0, "requeue")
    assert run.attempts[1].reason == "another rank was asked to stop"
    assert json.loads(run.folder.stop(1).read_text())["step"] == run.attempts[1].end_step == run.step

    run.until(lambda: len(run.attempts) == 3, "the third attempt")
    run.until_progress()
    module_cluster.run("scancel", run.job)
    assert run.until_ended() == "CANCELLED"
    assert run.facts()["Restarts"] == "2"
    assert run.attempts[2].verdict in ("stopped", None)


def test_a_run_that_cannot_go_on_stops_after_its_bound_and_says_why(life, module_cluster, slurm_folder, text):
    """Text that went bad on the disk: the same rank dies at the same step, whenever it gets there."""
    good, bad = slurm_folder / "text" / "text", slurm_folder / "bad-text"
    shutil.copytree(good, bad)
    (shard,) = bad.glob("*.tar")
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        block = file.read(4096)
        file.seek(-len(block), 1)
        file.write(bytes(255 - byte for byte in block))
    read_bad = [part.replace(str(good), str(bad)) for part in text]
    run = life.submit(
        module_cluster, slurm_folder / "runs" / "crash", *read_bad, *life.short_run(100_000), "slurm.crashes=2"
    )
    assert run.until_ended() == "FAILED"
    *_, before, last = run.attempts
    assert (last.verdict, last.step, last.end_step) == ("failed", before.end_step, before.end_step)
    assert [attempt.verdict for attempt in run.attempts[:-1]] == ["requeue"] * (len(run.attempts) - 1)
    reached = [
        max((r["step"] for r in run.records() if r["attempt"] == a.number), default=a.step) for a in (before, last)
    ]
    assert reached[0] == reached[1], "it did not die where it died before"
    assert shard.name in (last.reason or "")
    assert "2 such attempts in a row" in (last.reason or "")
    assert run.facts()["ExitCode"] != "0:0"
