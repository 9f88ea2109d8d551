"""What surprises launchers of runs on Slurm, each on a real one: real script, real controller, a trainer without torch.

The runs are queued together and live side by side; each test looks at its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import potamos
from potamos.slurm import daemons
from potamos.slurm.attempt import note_submission
from potamos.slurm.cluster import ClusterError
from potamos.slurm.job import Job
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.script import BODY, script
from potamos.slurm.submit import command

HERE = Path(__file__).parent
PACKAGE = Path(potamos.__file__).parent


# --- toy runs -------------------------------------------------------------------------------------------------------


def put(run: Path, plan: dict[str, Any]) -> None:
    """A run folder with the plan of a toy run."""
    (run / "logs").mkdir(parents=True)
    (run / "toy.json").write_text(json.dumps(plan))
    (run / "recipe.yaml").write_text(f"train: {{steps: {plan['steps']}}}\n")


def queue(life: Any, cluster: Any, folder: Path, runs: list[Path], **asked: Any) -> list[Any]:
    """The script of a job for these runs, with the toy for a trainer, into the queue; as `potamos submit` does."""
    code = folder / "code" / "potamos"
    (code / "pretrain").mkdir(parents=True)
    (folder / "logs").mkdir(exist_ok=True)
    for name in ("__init__.py", "files.py", "slurm"):
        (code / name).symlink_to(PACKAGE / name)
    (code / "pretrain" / "__init__.py").touch()
    (code / "pretrain" / "cli.py").symlink_to(HERE / "toy_trainer.py")
    tasks = tuple(range(len(runs))) if len(runs) > 1 else ()
    job = Job(
        name="toy", folder=folder, runs=tuple(runs), tasks=tasks, array=f"0-{len(runs) - 1}" if tasks else None,
        python=sys.executable, time="30", **asked,
    )  # fmt: skip
    (folder / "submit.sbatch").write_text(script(job))
    number = cluster.run(*command(job)).strip()
    names = [f"{number}_{task}" for task in tasks] or [number]
    for run, name in zip(runs, names, strict=True):
        note_submission(run, [name])
    return [life.Submitted(cluster, RunFolder(run), name) for run, name in zip(runs, names, strict=True)]


TWO = {"nodes": 2, "tasks_per_node": 1}
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole": ({"steps": 3}, {"nodes": 2, "tasks_per_node": 2}),
    "warned": ({"steps": 40, "hold": 20}, TWO),
    "early": ({"steps": 9, "import": 0}, TWO),
    "fails": (
        {"steps": 9, "every": 9, "hold": 5, "die": {"step": 2, "rank": 1, "status": 3, "attempts": [0]}},
        TWO | {"crashes": 1},
    ),
    "no progress": (
        {"steps": 9, "every": 3, "die": {"step": 5, "rank": 1, "status": 3, "attempts": list(range(9))}},
        TWO | {"crashes": 2},
    ),
    "progress": ({"steps": 9, "every": 2, "die": {"step": 3, "rank": 0, "status": 9, "attempts": [0]}}, {"crashes": 1}),
    "requeued": ({"steps": 9, "every": 100, "hold": 4}, {"crashes": 1}),
    "shell": ({"steps": 9, "hold": 5}, {}),
    "given up": ({"steps": 9, "hold": 5}, {}),
    "cancelled": ({"steps": 9, "hold": 5}, TWO),
    "refused": ({"steps": 3, "busy": [0]}, TWO | {"crashes": 1}),
}


@pytest.fixture(scope="module")
def toys(life, module_cluster, slurm_folder):
    """Every toy run, by name, in the queue."""
    found = {}
    for name, (plan, asked) in PLANS.items():
        run = slurm_folder / "toys" / name
        put(run, plan)
        (found[name],) = queue(life, module_cluster, run, [run], **asked)
    folder = slurm_folder / "toys" / "array"
    tasks = [folder / "0", folder / "1"]
    for run in tasks:
        put(run, {"steps": 9, "hold": 5})
    found["array 0"], found["array 1"] = queue(life, module_cluster, folder, tasks)
    return found


def began(toy: Any, attempt: int, rank: int = 0) -> dict[str, str]:
    """Where and how a rank began an attempt; waits for it."""
    path = toy.folder.path / f"began.{attempt}.{rank}"
    toy.until(path.exists, f"attempt {attempt} of rank {rank}")
    return json.loads(path.read_text())


def newest(toy: Any) -> str:
    names = sorted(path.name for path in toy.folder.checkpoints.glob("step-*"))
    return names[-1] if names else ""


def go(toy: Any) -> None:
    (toy.folder.path / "go").touch()


# --- processes of a step --------------------------------------------------------------------------------------------


def test_rank_0_is_on_the_first_node_and_ranks_follow_the_nodes(toys):
    assert toys["whole"].until_ended() == "COMPLETED"
    places = [began(toys["whole"], 0, rank) for rank in range(4)]
    assert [(p["SLURM_NODEID"], p["SLURM_LOCALID"]) for p in places] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert places[0]["SLURMD_NODENAME"] == places[1]["SLURMD_NODENAME"] < places[2]["SLURMD_NODENAME"]


def test_ranks_meet_at_the_address_of_a_node_whose_name_means_nothing_to_the_system(toys):
    place = began(toys["whole"], 0)
    looked_up = subprocess.run(["getent", "hosts", place["SLURMD_NODENAME"]], capture_output=True, check=False)
    assert looked_up.returncode != 0, "the test needs node names that do not resolve"
    assert place["MASTER_ADDR"] == "127.0.0.1"


def test_without_the_first_nodes_address_no_rank_starts():
    body = BODY.read_text()
    assert "localhost" not in body  # N worlds of one, each believing itself whole
    assert body.index('[ -n "$MASTER_ADDR" ] || conclude 1') < body.index(
        'attend "logs/attempt-$ATTEMPT.srun.txt" "${SRUN[@]}"'
    )


def test_one_dead_rank_ends_the_others(toys):
    """Rank 0 would wait for ever."""
    toy = toys["fails"]
    assert toy.until_ended() == "FAILED"
    assert daemons.is_alive(int((toy.folder.path / "importing.0.0").read_text())) is False


def test_a_failed_step_is_a_failed_job(module_cluster, toys):
    """A batch script whose last command succeeds is COMPLETED whatever its steps did."""
    toy = toys["fails"]
    assert toy.until_ended() == "FAILED"
    assert toy.facts()["ExitCode"] == "3:0"
    naive = module_cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=srun false; echo").strip()
    toy.until(lambda: "JobState=COMPLETED" in module_cluster.run("scontrol", "show", "job", naive), "COMPLETED")


def test_no_one_waits_by_sbatch():
    """`sbatch --wait` asks ever more rarely: it took 42 s to see the end of a job of 10 s."""
    sources = [*PACKAGE.joinpath("slurm").glob("*.py"), *PACKAGE.joinpath("pretrain").glob("cli*.py"), BODY]
    assert [path.name for path in sources if re.search(r"sbatch\b[^\n]*--wait\b", path.read_text())] == []


# --- signals --------------------------------------------------------------------------------------------------------


def test_the_warning_reaches_every_rank_and_a_graceful_end_goes_back_into_the_queue(toys):
    """Not the shell (`B:`), and by the script's own `scontrol requeue`: Slurm takes a graceful end for the end."""
    toy = toys["warned"]
    for rank in (0, 1):
        began(toy, 0, rank)
    toy.until(lambda: newest(toy) == "step-00000020", "step 20")
    toy.warn()
    began(toy, 1)
    first = toy.attempts[0]
    assert (first.verdict, first.reason) == ("requeue", "SIGUSR1")
    assert "--signal=B:" not in (toy.folder.script).read_text()


def test_a_request_to_requeue_is_a_mark_and_no_exit_status(toys):
    """srun reports the first rank's status, and kill-on-bad-exit kills the others for it."""
    toy = toys["warned"]
    began(toy, 1)
    assert toy.attempts[0].status == 0
    assert json.loads(toy.folder.stop(0).read_text())["step"] == 20
    told = [path.read_text() for path in toy.folder.logs.glob("attempt-0.rank-*.txt")]
    assert len(told) == 2, "a rank's log is missing"


def test_a_requeued_job_meets_at_another_port(toys):
    toy = toys["warned"]
    assert began(toy, 0)["MASTER_PORT"] != began(toy, 1)["MASTER_PORT"]


def test_logs_are_appended_to(toys):
    toy = toys["warned"]
    began(toy, 1)
    text = (toy.folder.logs / f"job-{toy.job}.txt").read_text()
    assert " attempt 0 of " in text
    assert " attempt 1 of " in text


def test_a_requeue_takes_as_long_as_a_credential_lives(toys, module_cluster):
    """Two minutes where nobody changed `cred_expire`; five seconds here."""
    toy = toys["warned"]
    assert began(toy, 1)["SLURM_RESTART_COUNT"] == "1"
    first, second = toy.attempts[:2]
    waited = (datetime.fromisoformat(second.began) - datetime.fromisoformat(first.ended)).total_seconds()
    assert module_cluster.shape.requeue_delay <= waited < 100


def test_signals_that_come_while_the_program_is_being_imported_are_kept(toys):
    """Without handlers SIGUSR1 would kill the process."""
    toy = toys["early"]
    for rank in (0, 1):
        toy.until((toy.folder.path / f"importing.0.{rank}").exists, "the ranks to start")
    toy.warn()
    (toy.folder.path / "imported").touch()
    toy.until(lambda: toy.attempts and toy.attempts[0].verdict, "the end of the first attempt")
    assert (toy.attempts[0].status, toy.folder.stop(0).exists()) == (0, True)


def test_the_shell_waits_on_when_a_signal_ends_its_wait(toys, module_cluster):
    toy = toys["shell"]
    toy.until(lambda: newest(toy) == "step-00000005", "step 5")
    module_cluster.run("scancel", "--batch", "--signal=TERM", toy.job)
    log = toy.folder.logs / f"job-{toy.job}.txt"
    toy.until(lambda: "was sent SIGTERM" in log.read_text(), "the shell to hear of it")
    go(toy)
    assert toy.until_ended() == "COMPLETED"
    assert [attempt.verdict for attempt in toy.attempts] == ["done"]


def test_a_user_who_cancels_means_it(toys, module_cluster):
    toy = toys["cancelled"]
    toy.until(lambda: newest(toy) == "step-00000005", "step 5")
    module_cluster.run("scancel", toy.job)
    assert toy.until_ended() == "CANCELLED"
    assert toy.facts()["Restarts"] == "0"
    assert [attempt.verdict for attempt in toy.attempts] == ["stopped"]


def test_what_waits_for_a_finished_run_does_not_start_after_one_that_was_given_up(toys, module_cluster, life):
    """As `potamos cancel` does it: the ranks save and the script ends by itself, which would look like success."""
    toy = toys["given up"]
    toy.until(lambda: newest(toy) == "step-00000005", "step 5")
    after = ("--dependency=afterok:" + toy.job, "--kill-on-invalid-dep=yes")
    waiting = module_cluster.run("sbatch", "--parsable", *after, "--output=/dev/null", "--wrap=true").strip()
    toy.folder.cancelled.touch()
    toy.warn()
    assert toy.until_ended() == "FAILED"
    assert [attempt.verdict for attempt in toy.attempts] == ["stopped"]
    assert life.Submitted(module_cluster, toy.folder, waiting).until_ended() == "CANCELLED"


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_a_crashing_job_stops_after_its_bound_and_says_why(toys):
    """The first attempt brought a checkpoint; two in a row did not."""
    toy = toys["no progress"]
    assert toy.until_ended() == "FAILED"
    assert [(a.verdict, a.step, a.end_step) for a in toy.attempts] == [
        ("requeue", 0, 3), ("requeue", 3, 3), ("failed", 3, 3),
    ]  # fmt: skip
    reason = toy.attempts[-1].reason
    assert "rank 1: RuntimeError: step 5 cannot be done" in reason
    assert "2 such attempts in a row" in reason
    assert reason in (toy.folder.logs / f"job-{toy.job}.txt").read_text()


def test_a_run_that_makes_progress_never_meets_the_bound(toys):
    """Of one crash; also where its next attempt crashes after further progress."""
    toy = toys["progress"]
    assert toy.until_ended() == "COMPLETED"
    assert [attempt.verdict for attempt in toy.attempts] == ["requeue", "done"]


def test_requeues_from_outside_are_no_crashes(toys):
    """They raise Slurm's own count of restarts all the same. Nothing is saved here, and one crash would end it."""
    toy = toys["requeued"]
    began(toy, 0)
    toy.requeue()
    assert began(toy, 1)["SLURM_RESTART_COUNT"] == "1"
    go(toy)
    assert toy.until_ended() == "COMPLETED"
    assert [attempt.verdict for attempt in toy.attempts] == ["waiting", "done"]


def test_ranks_that_were_refused_the_lock_have_not_crashed(toys):
    """The run may crash once, and then this would have been it."""
    toy = toys["refused"]
    assert toy.until_ended() == "COMPLETED"
    assert [attempt.verdict for attempt in toy.attempts] == ["busy", "done"]
    assert toy.attempts[0].reason == "process 7 on vm holds the run's lock"


def test_a_job_waits_for_ranks_that_outlived_another(life, module_cluster, slurm_folder, held):
    run = slurm_folder / "toys" / "waits"
    put(run, {"steps": 3})
    with held(run / "lock"):
        (toy,) = queue(life, module_cluster, run, [run], **TWO, crashes=1)
        log = toy.folder.logs / f"job-{toy.job}.txt"
        toy.until(lambda: log.exists() and "process 7 on vm holds the run's lock" in log.read_text(), "the job to wait")
        assert toy.ranks() == set()
    assert toy.until_ended() == "COMPLETED"
    assert [(attempt.verdict, attempt.restart) for attempt in toy.attempts] == [("done", 0)]


# --- where Slurm acts by itself -------------------------------------------------------------------------------------


def test_slurm_was_quicker_with_the_requeue(module_cluster, slurm_folder):
    """After the death of a node our own `scontrol requeue` is told that the job is pending, which is no failure."""
    held = module_cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true").strip()
    with pytest.raises(ClusterError, match="pending"):
        module_cluster.run("scontrol", "requeue", held)
    functions = re.findall(r"^(?:controller|requeue)\(\) \{.*?^\}", BODY.read_text(), re.DOTALL | re.MULTILINE)
    assert len(functions) == 2
    functions = "\n".join(functions)
    ours = f"fail() {{ echo failed; exit 1; }}; sleep() {{ :; }}; RUN=/r; JOB={held}\n{functions}\nrequeue"
    assert "failed" not in module_cluster.run("bash", "-c", ours)
    with pytest.raises(ClusterError):  # and what is a failure is one
        module_cluster.run("bash", "-c", ours.replace(f"JOB={held}", "JOB=99999999"))
    module_cluster.run("scancel", held)


def test_an_arrays_task_is_requeued_by_its_own_name(toys):
    """The plain number of a task is that of no job or of the whole array."""
    one, other = toys["array 0"], toys["array 1"]
    for toy in (one, other):
        toy.until(lambda toy=toy: newest(toy) == "step-00000005", "step 5")
    other.warn()
    began(other, 1)
    for toy in (one, other):
        go(toy)
        assert toy.until_ended() == "COMPLETED"
    assert [a.verdict for a in other.attempts] == ["requeue", "done"]
    assert [a.verdict for a in one.attempts] == ["done"]
    assert {a.job for a in other.attempts} == {other.job}


def test_a_job_after_one_that_failed_does_not_wait_for_ever(module_cluster, slurm_folder, life):
    """Slurm leaves it in the queue with DependencyNeverSatisfied, unless told to drop it."""
    folder = slurm_folder / "after"
    job = Job(name="after", folder=folder, runs=(folder,))
    (folder / "logs").mkdir(parents=True)
    (folder / "submit.sbatch").write_text("#!/bin/sh\n#SBATCH --output=/dev/null\ntrue\n")
    failed = module_cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=false").strip()
    naive = module_cluster.run(
        "sbatch", "--parsable", f"--dependency=afterok:{failed}", "--output=/dev/null", "--wrap=true"
    ).strip()
    ours = module_cluster.run(*command(job, after=failed)).strip()
    chained = module_cluster.run(*command(job, previous=failed)).strip()
    seen = {name: life.Submitted(module_cluster, RunFolder(folder), number)
            for name, number in (("naive", naive), ("ours", ours), ("chained", chained))}  # fmt: skip
    assert seen["ours"].until_ended() == "CANCELLED"
    assert seen["chained"].until_ended() == "COMPLETED", "the next of a chain goes on after any end"
    seen["naive"].until(lambda: "DependencyNeverSatisfied" in seen["naive"].facts()["Reason"], "Slurm to notice")
    assert seen["naive"].state() == "PENDING"
    module_cluster.run("scancel", naive)


# --- nightly: as long as Slurm itself takes -------------------------------------------------------------------------


@pytest.mark.nightly
def test_the_real_time_limit(life, start_cluster, slurm_folder):
    """Slurm's limits are minutes, and its warning may come a minute early."""
    cluster = start_cluster(nodes=2)
    run = slurm_folder / "limit"
    put(run, {"steps": 100_000})
    (toy,) = queue(life, cluster, run, [run], **TWO, warning=15)
    cluster.run("scontrol", "update", f"JobId={toy.job}", "TimeLimit=1")
    began(toy, 0)
    start = time.monotonic()
    began(toy, 1)
    assert 15 < time.monotonic() - start < 150
    assert (toy.attempts[0].verdict, toy.attempts[0].reason) == ("requeue", "SIGUSR1")
    cluster.down()


@pytest.mark.nightly
def test_ranks_that_hang_until_the_time_limit(life, module_cluster, slurm_folder):
    """They hear neither the warning nor the end. The script judges without them: nobody else would requeue the job."""
    run = slurm_folder / "deaf"
    put(run, {"steps": 3, "deaf": [0]})
    (toy,) = queue(life, module_cluster, run, [run], **TWO, warning=15)
    module_cluster.run("scontrol", "update", f"JobId={toy.job}", "TimeLimit=1")
    began(toy, 0)
    start = time.monotonic()
    toy.until(lambda: toy.attempts[0].verdict, "the script to judge")
    assert time.monotonic() - start > 50, "it must have been the limit"
    assert toy.until_ended() == "COMPLETED"
    assert [(attempt.verdict, attempt.restart) for attempt in toy.attempts] == [("requeue", 0), ("done", 1)]
    assert "time limit" in toy.attempts[0].reason
    assert toy.facts()["Restarts"] == "1"


@pytest.mark.nightly
def test_the_default_delay_of_a_requeue(life, start_cluster, slurm_folder):
    cluster = start_cluster(nodes=2, requeue_delay=120)
    run = slurm_folder / "delay"
    put(run, {"steps": 9, "hold": 5})
    (toy,) = queue(life, cluster, run, [run], **TWO)
    toy.until(lambda: newest(toy) == "step-00000005", "step 5")
    toy.warn()
    start = time.monotonic()
    began(toy, 1)
    assert 100 < time.monotonic() - start < 240
    cluster.down()
