"""Cancelling and requeueing: against a false Slurm that keeps a queue in a file, and once on a real one."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from potamos.slurm import control
from potamos.slurm.client import SlurmError, is_down
from potamos.slurm.control import ControlError, cancel, requeue, requeue_all
from potamos.slurm.job import Job
from potamos.slurm.logs import Follower
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.status import Status, find_runs, statuses
from potamos.slurm.submit import submit

PATIENCE = 120.0  # an upper bound, not a wait

# --- a false Slurm --------------------------------------------------------------------------------------------------

# The queue is a file: a line for each job, as squeue is asked for them. A running job that is told to save leaves if
# there is a file `saves`, and does what `saves` says.
COMMANDS = {
    "squeue": 'cat "$HERE/queue" 2>/dev/null',
    "scancel": """
        ids=" "; told=
        for word; do case $word in --signal=*) told=yes ;; -*) ;; *) ids="$ids$word " ;; esac; done
        [ -n "$told" ] && [ ! -f "$HERE/saves" ] && exit 0
        [ -n "$told" ] && . "$HERE/saves"
        while IFS= read -r line; do
            case $ids in *" ${line%%$'\\x1f'*} "*) ;; *) printf '%s\\n' "$line" ;; esac
        done < "$HERE/queue" > "$HERE/left"
        mv "$HERE/left" "$HERE/queue"
    """,
    "scontrol": "exit 0",
    "sbatch": "echo 77",
}


class FalseSlurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, body in COMMANDS.items():
            path = folder / name
            path.write_text(f"#!/bin/bash\nHERE={folder}\nprintf '%s\\n' \"{name} $*\" >> $HERE/calls\n{body}\n")
            path.chmod(0o755)
        (folder / "queue").touch()

    def queue(self, at: str = "/r", **states: str) -> None:
        """`queue(j12="RUNNING", j7_3="PENDING Resources")`, all of them in this folder."""
        lines = []
        for name, words in states.items():
            job, (state, _, reason) = name[1:], words.partition(" ")
            array = job.partition("_")[0]
            lines.append(
                "\x1f".join([job, array, state, reason or "None", "n0", "9:00", "main", "N/A", "ann", "x", at])
            )
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    def calls(self, command: str) -> list[str]:
        """What it was told, but for the question whether there is a controller."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.split()[0] == command and line != "scontrol ping"]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FalseSlurm:
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(control, "LEAVE", 1.0)
    return FalseSlurm(folder)


def make(path: Path, *jobs: str) -> RunFolder:
    (path / "logs").mkdir(parents=True)
    (path / "recipe.yaml").write_text("name: x\ntrain: {steps: 100}\n")
    if jobs:
        (path / "attempts.jsonl").write_text(json.dumps({"event": "submitted", "jobs": jobs, "at": ""}) + "\n")
        (path / "job.json").write_text('{"job": {"folder": "/r"}}')
    return RunFolder(path)


def test_the_mark_is_there_before_slurm_hears_of_it(tmp_path: Path, slurm: FalseSlurm):
    run = make(tmp_path / "x", "12")
    slurm.queue(j12="RUNNING")
    (slurm.folder / "saves").write_text(f"[ -f '{run.cancelled}' ] && mkdir -p '{run.checkpoints}/step-00000040'\n")
    (done,) = cancel([run], grace=20, poll=0.01)
    assert (done.saved, done.trained, done.left, done.jobs) == (40, True, True, ["12"])
    assert slurm.calls("scancel") == ["scancel --signal=USR1 12"]
    assert json.loads(run.cancelled.read_text()).keys() == {"by", "host", "at"}
    assert str(done) == f"{run.path}: saved at step 40"


def test_what_waits_in_the_chain_goes_first(tmp_path: Path, slurm: FalseSlurm):
    """Or the next job would begin when the one that runs has saved and left."""
    run = make(tmp_path / "x", "12", "13", "14")
    slurm.queue(j12="RUNNING", j13="PENDING Dependency", j14="PENDING Dependency", j15="RUNNING")
    (slurm.folder / "saves").touch()
    cancel([run], grace=20, poll=0.01)
    assert slurm.calls("scancel") == ["scancel 13 14", "scancel --signal=USR1 12"]
    assert "15" in (slurm.folder / "queue").read_text()  # someone else's


def test_a_job_that_was_just_going_back_into_the_queue_is_taken_out(
    tmp_path: Path, slurm: FalseSlurm, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(control, "AGAIN", 0.0)
    run = make(tmp_path / "x", "12")
    slurm.queue(j12="COMPLETING")
    (slurm.folder / "saves").write_text("sed -i s/COMPLETING/PENDING/ $HERE/queue; exit 0\n")
    began = time.monotonic()
    (done,) = cancel([run], grace=60, poll=0.01)
    assert time.monotonic() - began < 30  # not when the grace is over
    assert done.left
    assert slurm.calls("scancel") == ["scancel --signal=USR1 12", "scancel 12"]


def test_ranks_that_start_late_are_told_too(tmp_path: Path, slurm: FalseSlurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(control, "AGAIN", 0.0)
    run = make(tmp_path / "x", "12")
    slurm.queue(j12="RUNNING")
    (slurm.folder / "saves").write_text("[ $(grep -c USR1 $HERE/calls) -ge 3 ] || exit 0\n")
    assert cancel([run], grace=20, poll=0.01)[0].left
    assert slurm.calls("scancel") == ["scancel --signal=USR1 12"] * 3


def test_what_does_not_save_in_time_is_ended(tmp_path: Path, slurm: FalseSlurm):
    run, told = make(tmp_path / "x", "12"), []
    slurm.queue(j12="RUNNING")
    (done,) = cancel([run], grace=0.05, poll=0.01, tell=told.append)
    assert slurm.calls("scancel") == ["scancel --signal=USR1 12", "scancel 12"]
    assert str(done).endswith("ended before its first checkpoint")
    assert told == ["1 job told to save; up to 0 s for it"]
    slurm.queue(j12="RUNNING")
    cancel([run], grace=0, poll=0.01)
    assert slurm.calls("scancel")[2:] == ["scancel 12"]


def test_one_task_or_the_whole_sweep(tmp_path: Path, slurm: FalseSlurm):
    runs = [make(tmp_path / "sweep" / f"lr={k}", f"7_{k}") for k in range(3)]
    slurm.queue(j7_0="RUNNING", j7_1="PENDING Resources", j7_2="PENDING Resources")
    (slurm.folder / "saves").touch()
    (done,) = cancel([runs[1]], grace=20, poll=0.01)
    assert str(done) == f"{runs[1].path}: taken out of the queue"
    assert [run.cancelled.exists() for run in runs] == [False, True, False]
    done = cancel([tmp_path / "sweep"], grace=20, poll=0.01)
    assert [each.folder.name for each in done] == ["lr=0", "lr=2"]
    assert all(run.cancelled.exists() for run in runs)
    assert slurm.calls("scancel") == ["scancel 7_1", "scancel 7_2", "scancel --signal=USR1 7_0"]


def test_nothing_to_cancel_is_said(tmp_path: Path, slurm: FalseSlurm, held: Callable[[Path], Any]):
    run = make(tmp_path / "x", "12")
    with pytest.raises(ControlError, match="no job of it waits or runs"):
        cancel([run])
    assert not run.cancelled.exists()  # or the next submission would refuse to begin
    with held(run.lock):
        with pytest.raises(ControlError, match="process 7 on vm trains it; press Ctrl-C"):
            cancel([run])
        with pytest.raises(ControlError, match="is trained by process 7 on vm"):
            requeue(run)


def test_ranks_that_outlive_their_job_are_named(tmp_path: Path, slurm: FalseSlurm, held: Callable[[Path], Any]):
    """Their slurmd was gone, and Slurm calls the job ended."""
    first, second, _ = (make(tmp_path / "sweep" / name, f"7_{k}") for k, name in enumerate("abc"))
    slurm.queue(j7_0="RUNNING")
    (slurm.folder / "saves").touch()
    with held(first.lock), held(second.lock):
        done = cancel([tmp_path / "sweep"], grace=20, poll=0.01)
    left = "no job of it is left, but process 7 on vm trains it; send that SIGTERM on its machine"
    assert [str(each) for each in done] == [f"{run.path}: {left}" for run in (first, second)]
    assert [(each.left, each.jobs) for each in done] == [(False, ["7_0"]), (False, [])]


@pytest.mark.parametrize("ask", [lambda run: cancel([run]), requeue, lambda run: list(requeue_all([run.path.parent]))])
def test_a_controller_that_is_away_is_not_waited_for(tmp_path: Path, slurm: FalseSlurm, ask: Callable[..., object]):
    """Slurm's other commands try for 9 to 18 s."""
    run = make(tmp_path / "x", "12")
    slurm.queue(j12="RUNNING")
    before = {path.name for path in run.path.iterdir()}
    for name in ("squeue", "scancel", "sbatch"):
        (slurm.folder / name).write_text("#!/bin/bash\nexec sleep 20\n")
    (slurm.folder / "scontrol").write_text("#!/bin/bash\necho 'Slurmctld(primary) at head is DOWN'\nexit 1\n")
    began = time.monotonic()
    with pytest.raises(SlurmError, match=r"the controller does not answer, so nothing was done; see `scontrol ping`"):
        ask(run)
    assert time.monotonic() - began < 9
    assert {path.name for path in run.path.iterdir()} == before


def test_a_slurm_that_refuses_is_heard(tmp_path: Path, slurm: FalseSlurm):
    run = make(tmp_path / "x", "12")
    slurm.queue(j12="RUNNING")
    scancel = slurm.folder / "scancel"
    scancel.write_text(
        "#!/bin/bash\necho 'scancel: error: Kill job error on job id 12: Access/permission denied' >&2\nexit 1\n"
    )
    with pytest.raises(SlurmError, match="permission denied"):
        cancel([run], grace=0)
    # As 22.05.8 says of a job that has no step yet, or that has just left: no reason to give up on the others.
    for words in (
        "Kill job error on job id 5: Job can not be altered now, try again later",
        "Kill job error on job id 999: Invalid job id specified",
    ):
        scancel.write_text(f"#!/bin/bash\necho 'scancel: error: {words}' >&2\nexit 1\n")
        assert not cancel([run], grace=0, poll=0.5)[0].left


def test_requeue_by_state(tmp_path: Path, slurm: FalseSlurm):
    run = make(tmp_path / "x", "7_3")
    slurm.queue(j7_3="RUNNING")
    assert requeue(run, grace=0).endswith("job 7_3 goes back into the queue")
    slurm.queue(j7_3="PENDING Priority")
    with pytest.raises(ControlError, match="job 7_3 waits already \\(Priority\\)"):
        requeue(run)
    slurm.queue(j7_3="COMPLETING")
    with pytest.raises(ControlError, match="still ending"):
        requeue(run)
    slurm.queue(j7_3="PENDING JobHeldUser")
    assert requeue(run).endswith("was held; released")
    assert slurm.calls("scontrol") == ["scontrol requeue 7_3", "scontrol release 7_3"]
    slurm.queue()
    run.done.write_text('{"step": 100, "at": "2026-01-01T00:00:00+00:00"}')
    with pytest.raises(ControlError, match=r"finished at step 100: raise train\.steps"):
        requeue(run)
    run.recipe.write_text("name: x\ntrain: {steps: 200}\n")
    with pytest.raises(SlurmError, match="never submitted"):  # got past that it is finished
        requeue(run)
    with pytest.raises(ControlError, match="no run folder"):
        requeue(tmp_path / "none")


def test_a_run_saves_before_it_is_requeued(tmp_path: Path, slurm: FalseSlurm):
    """Slurm's own requeue would grant it KillWait, too little for a large model."""
    run = make(tmp_path / "x", "12")
    slurm.queue(j12="RUNNING")
    assert requeue(run, grace=0.05, poll=0.01).endswith("job 12 goes back into the queue")  # deaf
    assert slurm.calls("scontrol") == ["scontrol requeue 12"]
    (slurm.folder / "saves").write_text("sed -i s/RUNNING/PENDING/ $HERE/queue; exit 0\n")
    assert requeue(run, grace=20, poll=0.01).endswith("job 12 has saved and goes back into the queue")
    assert slurm.calls("scontrol") == ["scontrol requeue 12"]


def test_a_job_that_leaves_for_good_is_followed_by_another(
    tmp_path: Path, slurm: FalseSlurm, monkeypatch: pytest.MonkeyPatch
):
    """The last of a chain, or one that may not be requeued: COMPLETING is not yet on its way back."""
    monkeypatch.setattr(control, "resubmit", lambda run: ["77"])
    run = make(tmp_path / "x", "12", "13")
    ends = "sed -i s/RUNNING/COMPLETING/ $HERE/queue; (sleep 0.3; sed -i /^12/d $HERE/queue) >/dev/null 2>&1 & exit 0\n"
    (slurm.folder / "saves").write_text(ends)
    slurm.queue(j12="RUNNING")
    assert requeue(run, grace=20, poll=0.01).endswith("job 12 has ended; submitted again, job 77")
    slurm.queue(j12="RUNNING", j13="PENDING Dependency")
    assert requeue(run, grace=20, poll=0.01).endswith("job 12 has ended; job 13 goes on")
    slurm.queue(j12="RUNNING")
    (slurm.folder / "saves").write_text(f"echo '{{\"step\": 100}}' > '{run.done}'\n{ends}")
    assert requeue(run, grace=20, poll=0.01).endswith("job 12 has ended; the run is finished")
    run.done.unlink()
    slurm.queue(j12="RUNNING")
    (slurm.folder / "saves").write_text("sed -i s/RUNNING/COMPLETING/ $HERE/queue; exit 0\n")
    assert "job 12 is still ending" in requeue(run, grace=0.1, poll=0.01)
    assert slurm.calls("scontrol") == []


def test_a_number_does_not_make_a_job_ours(tmp_path: Path, slurm: FalseSlurm):
    """Two clusters that share a home, or a controller that lost its state: job 12 is someone else's."""
    run = make(tmp_path / "x", "12")
    slurm.queue(j12="RUNNING", at="/elsewhere")
    with pytest.raises(ControlError, match="no job of it waits or runs"):
        cancel([run])
    assert slurm.calls("scancel") == []
    with pytest.raises(SlurmError, match="never submitted"):  # and not: told to save
        requeue(run)
    assert slurm.calls("scancel") == []
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (run.path / "job.json").write_text(json.dumps({"job": {"folder": str(tmp_path / "link")}}))
    slurm.queue(j12="RUNNING", at=str(tmp_path / "real"))  # by another name
    (slurm.folder / "saves").touch()
    assert cancel([run], grace=20, poll=0.01)[0].jobs == ["12"]


def test_of_a_sweep_those_are_requeued_that_can_be(tmp_path: Path, slurm: FalseSlurm, monkeypatch: pytest.MonkeyPatch):
    runs = [make(tmp_path / "sweep" / f"lr={k}", f"7_{k}") for k in range(3)]
    runs[0].done.write_text('{"step": 100}')
    slurm.queue(j7_1="PENDING Priority")
    monkeypatch.setattr(control, "resubmit", lambda run: ["9"])
    first, second, third = control.requeue_all([tmp_path / "sweep"])
    assert "is finished" in first
    assert "waits already" in second
    assert third == f"{runs[2].path}: submitted again, job 9"
    with pytest.raises(ControlError, match="is finished"):
        list(control.requeue_all([runs[0]]))


def test_a_run_that_was_never_submitted_is_not_requeued(tmp_path: Path, slurm: FalseSlurm):
    with pytest.raises(SlurmError, match="never submitted"):
        requeue(make(tmp_path / "x"))


# --- a real one -----------------------------------------------------------------------------------------------------

# Stands for the interpreter: trains by counting, saves and stops as the trainer does, in milliseconds. Files in the run
# folder say what a test wants of it. Where one rank fails, the others cannot agree on a stop any more.
TRAINER = """#!{python}
import json, os, pathlib, signal, sys, time
if "potamos.pretrain.cli" not in sys.argv:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1, signal.SIGTERM])
attempt, rank = int(os.environ["POTAMOS_ATTEMPT"]), int(os.environ["SLURM_PROCID"])
def write(name, **facts):
    if rank == 0:
        pathlib.Path(name + ".tmp").write_text(json.dumps(facts))
        os.replace(name + ".tmp", name)
def save():
    if rank == 0:
        os.makedirs(f"checkpoints/step-{{step:08}}", exist_ok=True)
step = max([int(n[5:]) for n in os.listdir("checkpoints")], default=0) if os.path.isdir("checkpoints") else 0
print(f"attempt {{attempt}} from {{step}}", flush=True)
while True:
    step += 1
    state = dict(attempt=attempt, step=step, total_steps=100000, loss=1 / step, tokens_per_second=10.0, eta=60.0)
    write("state.json", **state, reason="running", updated=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
    if os.path.exists(f"fail.{{attempt}}"):
        save()
        raise RuntimeError("planted") if rank == 1 else ConnectionError("Connection closed by peer")
    if asked:
        save()
        write(f"stop.{{attempt}}", attempt=attempt, reason=asked[0], step=step)
        write("state.json", **state, reason=asked[0], updated=None)
        sys.exit(0)
    if os.path.exists("finish"):
        step = 100000
        save()
        write("done.json", step=step, at=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
        write("state.json", **dict(state, step=step), reason="finished", updated=None)
        sys.exit(0)
    time.sleep(0.05)
"""
RECIPE = "name: x\ntrain: {steps: 100000}\n"


@pytest.fixture
def trainer(slurm_folder: Path) -> str:
    path = slurm_folder / "trainer"
    path.write_text(TRAINER.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def until(condition: Callable[[], Any], what: Callable[[], Any] = lambda: "") -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, what()
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def following(run: Path) -> Iterator[tuple[bytearray, list[Any]]]:
    """What a follower writes and tells; it must have ended by itself when the block has."""
    out: bytearray = bytearray()
    told: list[Any] = []
    follower = Follower(run, out.extend, told.append, poll=0.05, ask=0.2)
    thread = threading.Thread(target=lambda: told.append(follower.follow()), daemon=True)
    thread.start()
    yield out, told
    thread.join(PATIENCE)
    assert not thread.is_alive(), told


def test_a_run_is_watched_requeued_cancelled_and_finished(cluster, trainer: str, slurm_folder: Path):
    """Requeued by hand, a rank fails, cancelled, sent back, finished; and followed until it is cancelled."""
    run = slurm_folder / 'it\'s "x"'
    job = Job(name="x", folder=run, runs=(run,), nodes=2, time="10", python=trainer)
    (first,) = submit(job, [RECIPE], "environment").ids

    def state() -> Status:
        return statuses([run])[0]

    def trains(attempt: int) -> bool:
        return state().state == "running" and state().attempts == attempt + 1 and state().eta is not None

    with following(run) as (out, told):
        until(lambda: trains(0), state)
        assert (state().job, state().nodes, state().why) == (first, "n[0-1]", "")
        with pytest.raises(SlurmError, match=f"has job {first} already"):
            submit(job, [RECIPE], "environment")
        assert requeue(run, grace=PATIENCE, poll=0.1).endswith(f"job {first} has saved and goes back into the queue")
        assert "before: SIGUSR1" in until(lambda: state().state == "requeued" and state().why, state)
        with pytest.raises(ControlError, match="waits already"):
            requeue(run)
        until(lambda: trains(1), state)
        (run / "fail.1").touch()
        until(lambda: trains(2), state)
        assert state().crashes == 1
        assert state().why == "before: rank 1: RuntimeError: planted"
        (done,) = cancel([run], grace=PATIENCE, poll=0.2)
        assert (done.left, done.trained) == (True, True)
        assert done.saved == json.loads((run / "stop.2").read_text())["step"] > 0
        assert (state().state, state().job) == ("cancelled", first)
    for attempt in range(3):
        assert f"attempt {attempt} from".encode() in out
    assert "attempt 1 ended: rank 1: RuntimeError: planted (its log: --attempt 1 --rank 1)" in told
    assert told[-1].state == "cancelled"
    assert cluster.run("squeue", "-h") == ""  # nothing has put it back

    (run / "finish").touch()
    second = requeue(run).partition("job ")[2].partition(",")[0]
    assert int(second) > int(first)
    assert not RunFolder(run).cancelled.exists()
    until(lambda: state().state == "finished", state)
    with pytest.raises(ControlError, match=r"raise train\.steps"):
        requeue(run)
    assert f"from {done.saved}" in (run / "logs" / "attempt-3.rank-0.txt").read_text()


def test_a_real_controller_that_is_away_is_noticed_at_once(cluster, tmp_path: Path):
    run = make(tmp_path / "x", "12")
    assert not is_down()
    cluster.kill_controller()
    began = time.monotonic()
    for ask in (lambda: cancel([run]), lambda: requeue(run)):
        with pytest.raises(SlurmError, match="the controller does not answer"):
            ask()
    assert time.monotonic() - began < 9  # as long as one squeue waits
    cluster.start_controller()
    with pytest.raises(ControlError, match="no job of it waits or runs"):
        cancel([run])


def test_a_sweep_on_a_real_slurm(cluster, trainer: str, slurm_folder: Path):
    """An array: one task at a time is cancelled and goes on alone; then all the rest at once."""
    folder = slurm_folder / "sweep"
    runs = tuple(folder / f"lr={k}" for k in range(3))
    job = Job(name="x", folder=folder, runs=runs, tasks=(0, 1, 2), array="0-2%2", time="10", python=trainer)
    (array,) = submit(job, [RECIPE] * 3, "environment").ids

    def states() -> list[str]:
        return [each.state for each in statuses(find_runs([folder]))]

    until(lambda: states() == ["running", "running", "queued"], states)
    assert [each.job for each in statuses(runs)] == [f"{array}_{k}" for k in range(3)]
    cancel([runs[0]], grace=PATIENCE, poll=0.2)
    until(lambda: states() == ["cancelled", "running", "running"], states)
    (runs[0] / "finish").touch()
    requeue(runs[0])
    until(lambda: states() == ["finished", "running", "running"], states)
    assert len(cancel([folder], grace=PATIENCE, poll=0.2)) == 2
    assert states() == ["finished", "cancelled", "cancelled"]
    assert cluster.run("squeue", "-h") == ""
