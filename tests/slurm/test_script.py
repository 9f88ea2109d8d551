"""The batch script as text, and run by bash with commands that only write down what they were told."""

import json
import os
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.slurm.attempt import jobs_of
from potamos.slurm.job import Container, Job, JobError
from potamos.slurm.script import BODY, header, script

RUN = Path("/shared/runs/trial")
JOB = Job(name="trial", folder=RUN, runs=(RUN,), nodes=2, gpus_per_node=8, tasks_per_node=8, time="2-00:00:00")


def values(text: str) -> str:
    """The part of a script between its header and its body."""
    return text.partition(BODY.read_text())[0]


def evaluate(text: str, *names: str) -> dict[str, list[str]]:
    """What bash makes of the assignments: each variable's words."""
    show = "".join(f'printf "%s\\0" {name} "${{{name}[@]}}" ""\n' for name in names)
    # As bytes: text mode would turn every carriage return into a line's end.
    done = subprocess.run(["bash", "-u"], input=(values(text) + show).encode(), capture_output=True, timeout=10)
    assert done.returncode == 0, done.stderr
    found, rest = {}, done.stdout.decode().split("\0")[:-1]
    while rest:
        end = rest.index("")
        found[rest[0]], rest = rest[1:end], rest[end + 1 :]
    return found


def test_what_the_scheduler_reads():
    lines = header(JOB)
    for line in (
        "#SBATCH --signal=USR1@180",  # to the ranks; with B: only the shell would hear it
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --time=2-00:00:00",
        "#SBATCH --output=logs/job-%j.txt",
    ):
        assert line in lines
    assert "#SBATCH --no-requeue" in header(replace(JOB, requeue=False))
    assert not any("None" in line for line in lines)


def test_the_script_is_bash():
    container = Container("apptainer", "/images/a b.sif")
    for job in (
        JOB,
        replace(JOB, container=container),
        replace(JOB, prologue=("module load cuda", "source 'a b'/env")),
    ):
        done = subprocess.run(["bash", "-n"], input=script(job), capture_output=True, text=True, timeout=10)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_header_comes_before_any_command():
    """sbatch stops reading at the first line that is neither a comment nor empty."""
    before, found, _ = script(JOB).partition("TASKS=")
    assert found
    assert [line for line in before.splitlines() if line and not line.startswith("#")] == []


WILD = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\n"), min_size=1, max_size=30)
PATHS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(folder=PATHS, python=WILD, image=WILD, value=WILD)
def test_every_value_arrives_in_bash_as_it_was(folder, python, image, value):
    run = Path("/shared") / ("x" + folder)
    job = replace(
        JOB,
        folder=run,
        runs=(run,),
        python=python,
        container=Container("apptainer", image, mounts=(value,)),
        environment={"WILD": value},
    )
    found = evaluate(script(job), "RUNS", "CODE", "PYTHON", "CONTAINER", "WILD")
    assert found["RUNS"] == [str(run)]
    assert found["CODE"] == [f"{run}/code"]
    assert found["PYTHON"] == [python]
    assert found["WILD"] == [value]
    assert found["CONTAINER"] == ["apptainer", "exec", "--nv", "--bind", str(run), "--bind", value, image]


@settings(max_examples=200, deadline=None)
@given(
    text=st.one_of(WILD, st.sampled_from(["a b", "$(id)", "a;id", "a\nb", "`id`", "--wrap=id", "", "a'b", 'a"b', "é"]))
)
@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "reservation", "exclude", "constraint", "memory", "time"]
)
def test_no_value_brings_a_second_word_to_the_scheduler(key, text):
    try:
        job = replace(JOB, **{key: text})
    except JobError as error:
        said = str(error)
    else:
        said = None
    if said is not None:
        assert f"slurm.{key}: {text!r}" in said
        return
    lines = header(job)
    assert len(lines) == len(set(lines))
    assert all(
        line.isprintable() and line.isascii() and shlex.split(line, comments=False) == line.split() for line in lines
    )
    assert all(len(line.split()) == 2 for line in lines)


def test_a_relative_folder_or_one_with_a_line_end_is_refused():
    for folder in (Path("runs/trial"), Path("/shared/a\nb")):
        with pytest.raises(JobError, match=r"choose another|whole path"):
            replace(JOB, folder=folder, runs=(folder,))


def test_tasks_per_gpu():
    with pytest.raises(JobError, match="each GPU has one task"):
        replace(JOB, tasks_per_node=4)


def test_pyxis_gets_options_and_apptainer_a_command():
    pyxis = script(
        replace(JOB, container=Container("pyxis", "nvcr.io/torch:1", mounts=("/data", "/a:/b"), python="py"))
    )
    found = evaluate(pyxis, "CONTAINER_OPTIONS", "CONTAINER", "RANK_PYTHON", "PYTHON")
    assert found["CONTAINER_OPTIONS"] == [
        "--container-image=nvcr.io/torch:1",
        f"--container-mounts={RUN}:{RUN},/data:/data,/a:/b",
    ]
    assert found["CONTAINER"] == []
    assert (found["RANK_PYTHON"], found["PYTHON"]) == (["py"], ["python3"])


# --- the body, with the cluster's commands replaced by ones that write down what they were told --------------------


class Desk:
    """A folder of commands in front of PATH, and what they were called with."""

    def __init__(self, tmp_path: Path):
        self.bin, self.calls, self.run = tmp_path / "bin", tmp_path / "calls", tmp_path / "it's a run"
        for folder in (self.bin, self.run / "code" / "potamos" / "slurm"):
            folder.mkdir(parents=True)
        (self.run / "recipe.yaml").write_text("train: {steps: 5}\n")
        self.command(
            "scontrol",
            'case "$1 $2" in "show hostnames") printf "n7\\nn8\\n" ;;'
            ' "show node") echo "NodeName=$3 Arch=x NodeAddr=${ADDRESS-10.0.0.7} NodeHostName=$3" ;;'
            ' "show job") echo "JobState=${STATE-RUNNING} Restarts=${RESTARTS-0} RunTime=${RAN-00:00:09}"'
            ' "TimeLimit=00:10:00" "Comment=${COMMENT-}" ;;'
            ' ping*) echo "Slurmctld(primary) at host is ${CONTROLLER-UP}" ;;'
            ' "show config") echo "KillWait                = 3 sec" ;;'
            ' requeue*) [ -z "${DENY-}" ] || { echo "$DENY" >&2; exit 1; } ;; esac',
        )
        self.command("sleep", "")

    def command(self, name: str, body: str) -> None:
        path = self.bin / name
        note = 'printf "%s" "${0##*/}" >>"$CALLS"; printf " %q" "$@" >>"$CALLS"; echo >>"$CALLS"'
        path.write_text(f"#!/bin/bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def start(
        self, job: Job | None = None, *, leader: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs the script; as ``leader`` of processes of its own, to whom the signals for it go as well."""
        job = job or Job(name="t", folder=self.run, runs=(self.run,), nodes=2, tasks_per_node=2, python=self.python)
        place = {
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "n[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "CALLS": str(self.calls),
        }
        kept = {"PATH": f"{self.bin}:{os.environ['PATH']}", "POTAMOS_SOURCE": str(Path(BODY).parents[1])}
        return subprocess.run(
            ["bash", "-s"],
            input=script(job),
            text=True,
            capture_output=True,
            timeout=60,
            cwd="/",
            start_new_session=leader,
            env={**kept, **place, **environment},
        )

    @property
    def python(self) -> str:
        """The real interpreter, on the real package: CODE of these jobs holds none."""
        import sys

        path = self.bin / "py"
        source = Path(BODY).parents[1] / ".typing"
        path.write_text(
            f'#!/bin/bash\nexport PYTHONPATH={shlex.quote(str(source))}\nexec {shlex.quote(sys.executable)} "$@"\n'
        )
        path.chmod(0o755)
        return str(path)

    def told(self, name: str) -> list[list[str]]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [shlex.split(line)[1:] for line in lines if line.split()[0] == name]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def test_how_the_ranks_are_started(desk):
    seen = 'env | grep -E "^(MASTER|POTAMOS_A|OMP|RANK|WORLD|LOCAL|GROUP)" | sort >"$CALLS.env"'
    desk.command("srun", seen + '; echo "{\\"step\\": 5}" >done.json')
    left_over = dict.fromkeys(PLACES, "5")
    done = desk.start(SLURM_RESTART_COUNT="2", SLURM_CPUS_PER_TASK="3", **left_over)
    assert done.returncode == 0, done.stderr
    (words,) = desk.told("srun")
    assert words[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=3"]
    assert "--output=logs/attempt-0.rank-%t.txt" in words
    assert "--open-mode=append" in words
    at = words.index("env")
    assert words[at : at + 4] == ["env", "--block-signal=USR1", "--block-signal=TERM", desk.python]
    assert words[at + 4 :] == ["-P", "-m", "potamos.pretrain.cli", "train", "recipe.yaml", "--run", "."]
    port = 20000 + 7 * 41 + 2
    environment = Path(f"{desk.calls}.env").read_text().split()
    assert environment == ["MASTER_ADDR=10.0.0.7", f"MASTER_PORT={port}", "OMP_NUM_THREADS=3", "POTAMOS_ATTEMPT=0"]
    assert desk.told("scontrol")[-1][0] != "requeue"


def test_without_an_address_nothing_starts(desk):
    desk.command("srun", "")
    assert desk.start(ADDRESS="").returncode == 0
    assert desk.told("srun") == []  # least of all a world of one on each node
    asked = [words for words in desk.told("scontrol") if words[:2] == ["show", "node"]]
    assert len(asked) == 10
    assert "node n7 has no NodeAddr" in ends(desk)[0]["reason"]
    assert ends(desk)[0]["fruitless"]  # bounded, and elsewhere it may have one
    assert ["requeue", "41"] in desk.told("scontrol")


def test_an_address_that_came_late_is_used(desk):
    desk.command("srun", 'echo "$MASTER_ADDR" >"$CALLS.env"; echo "{\\"step\\": 5}" >done.json')
    at_first('"show node"', "exit 1", desk, times=3)
    assert desk.start().returncode == 0
    assert Path(f"{desk.calls}.env").read_text() == "10.0.0.7\n"


def test_a_taken_port_is_passed_over(desk):
    import socket

    desk.command("srun", 'env | grep MASTER_PORT >"$CALLS.env"; echo "{\\"step\\": 5}" >done.json')
    for job in range(40, 60):  # one whose port is free here
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", 20000 + 7 * job))
            except OSError:
                continue
            server.listen()
            assert desk.start(SLURM_JOB_ID=str(job)).returncode == 0
            assert Path(f"{desk.calls}.env").read_text().strip() == f"MASTER_PORT={20000 + 7 * job + 1}"
            return
    pytest.fail("no port between 20280 and 20420 is free")


def test_success_without_a_mark_is_no_success(desk):
    """A batch script whose last command succeeds is COMPLETED, whatever became of the ranks."""
    desk.command("srun", "exit 0")
    done = desk.start(job=Job(name="t", folder=desk.run, runs=(desk.run,), python=desk.python, crashes=1))
    assert done.returncode == 1
    assert "failed" in done.stdout
    assert ["requeue", "41"] not in desk.told("scontrol")


def test_the_ranks_status_is_the_jobs(desk):
    desk.command("srun", "exit 143")
    done = desk.start(job=Job(name="t", folder=desk.run, runs=(desk.run,), python=desk.python, crashes=1))
    assert done.returncode == 143


def at_first(words, instead, desk, *, times=1):
    """`scontrol` does something else the first few times that it is called with these words."""
    path = desk.bin / "scontrol"
    note, _, rest = path.read_text().partition('case "$1 $2" in ')
    count = f'n=$(($(cat "$CALLS.n" 2>/dev/null) + 1)); echo $n >"$CALLS.n"; [ $n -gt {times} ] || {{ {instead}; }}'
    path.write_text(f'{note}case "$1 $2" in {words}) {count} ;; esac\ncase "$1 $2" in {rest}')


def stopping(number=0):
    return f'mkdir -p checkpoints/step-00000003; echo "{{\\"reason\\": \\"SIGUSR1\\"}}" >stop.{number}'


def test_ranks_that_found_the_lock_held_go_back_into_the_queue(desk):
    """By their mark: their exit status would be a crash, and one is the end here."""
    job = Job(name="t", folder=desk.run, runs=(desk.run,), python=desk.python, crashes=1)
    desk.command("srun", 'echo "{\\"holder\\": \\"process 7 on vm\\"}" >busy.0; exit 2')
    done = desk.start(job)
    assert done.returncode == 0, done.stderr
    assert ["requeue", "41"] in desk.told("scontrol")
    assert (ends(desk)[0]["verdict"], ends(desk)[0]["held_by"]) == ("busy", "process 7 on vm")


def test_no_rank_starts_while_the_lock_is_held(desk, held):
    """Waited for in vain, five minutes long, which `patience` stands for."""
    real = desk.python
    patience = "potamos.slurm.attempt.HELD_SECONDS = 0.1"
    desk.command(
        "judge",
        f'case "$*" in *" await "*) exec {shlex.quote(real)} -c "import potamos.slurm.attempt, sys; {patience};'
        f' sys.exit(potamos.slurm.attempt.main(sys.argv[4:]))" "$@" ;; *) exec {shlex.quote(real)} "$@" ;; esac',
    )
    desk.command("srun", "")
    job = Job(name="t", folder=desk.run, runs=(desk.run,), python=str(desk.bin / "judge"), crashes=1)
    with held(desk.run / "lock"):
        done = desk.start(job)
    assert done.returncode == 0, done.stderr
    assert "process 7 on vm holds the run's lock, and trains here still" in done.stdout
    assert desk.told("srun") == []
    assert ["requeue", "41"] in desk.told("scontrol")
    assert ends(desk)[0]["verdict"] == "busy"


def test_a_run_that_saved_is_requeued_by_the_script(desk):
    desk.command("srun", stopping())
    done = desk.start()
    assert ["requeue", "41"] in desk.told("scontrol")
    assert done.returncode == 0


def test_slurm_was_quicker(desk):
    desk.command("srun", stopping())
    done = desk.start(DENY="Job is pending execution for job 41")
    assert (done.returncode, "already on its way" in done.stdout) == (0, True)
    assert ["300"] in desk.told("sleep")  # Slurm ends the script while it waits


@pytest.mark.parametrize(
    ("answer", "words"),
    [("Job/step already completing or completed for job 41", True), ("Invalid job id specified for job 41", False),
     ("Requested operation is presently disabled for job 41", False), ("Access/permission denied for job 41", False)],
)  # fmt: skip
def test_what_is_an_answer_to_a_requeue_is_not_asked_again(desk, answer, words):
    desk.command("srun", stopping())
    done = desk.start(DENY=answer)
    assert done.returncode == (0 if words else 1)
    assert len([asked for asked in desk.told("scontrol") if asked == ["requeue", "41"]]) == 1
    assert (f"could not be requeued ({answer})" in done.stderr) != words
    assert ("potamos requeue" in done.stderr) != words


@pytest.mark.parametrize(
    "answer",
    ["slurm_requeue error: Socket timed out on send/recv operation", "Unexpected message received for job 41"],
)
@pytest.mark.parametrize("times", [9, 10])
def test_an_answer_that_was_lost_is_no_refusal(desk, answer, times):
    """With a controller that is up a moment later."""
    desk.command("srun", stopping())
    at_first("requeue*", f'echo "{answer}" >&2; exit 1', desk, times=times)
    done = desk.start()
    assert done.returncode == (0 if times == 9 else 1)
    assert len([asked for asked in desk.told("scontrol") if asked == ["requeue", "41"]]) == 10
    assert ("could not be requeued" in done.stderr) == (times == 10)


def test_a_job_that_slurm_requeued_is_left_to_it(desk):
    desk.command("srun", "exit 143")
    done = desk.start(STATE="COMPLETING", RESTARTS="1")
    assert done.returncode == 0
    assert ["requeue", "41"] not in desk.told("scontrol")


def test_a_cancelled_job_is_not_requeued(desk):
    desk.command("srun", stopping())
    done = desk.start(STATE="COMPLETING")
    assert done.returncode != 0  # or what waits for its success (afterok) would start
    assert ["requeue", "41"] not in desk.told("scontrol")
    assert '"stopped"' in (desk.run / "attempts.jsonl").read_text()


def test_an_arrays_task_is_requeued_by_its_own_name(desk, tmp_path):
    """The plain number of the last task is that of the whole array."""
    runs = (tmp_path / "a b", tmp_path / "c'd")
    for run in runs:
        run.mkdir()
        (run / "recipe.yaml").write_text("train: {steps: 5}\n")
    job = Job(name="t", folder=desk.run, runs=runs, tasks=(4, 7), array="4,7", python=desk.python)
    desk.command("srun", stopping() + '; pwd >"$CALLS.pwd"')
    assert desk.start(job, SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="7").returncode == 0
    assert Path(f"{desk.calls}.pwd").read_text().strip() == str(runs[1])
    assert ["requeue", "41_7"] in desk.told("scontrol")
    refused = desk.start(job, SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="5")
    assert refused.returncode == 1
    assert "task 5 has no run folder" in refused.stderr


def test_a_signal_to_the_script_does_not_end_the_wait(desk):
    """`wait` returns at once when the shell traps a signal; the ranks are still saving then."""
    desk.command(
        "srun",
        f'kill -TERM $PPID; /bin/sleep 0.3; kill -TERM $PPID; /bin/sleep 0.3; {stopping()}; echo saved >"$CALLS.saved"',
    )
    desk.command("judge", f'exec {shlex.quote(desk.python)} "$@"')
    done = desk.start(Job(name="t", folder=desk.run, runs=(desk.run,), python=str(desk.bin / "judge")))
    assert done.stdout.count("was sent SIGTERM") == 2
    assert (
        len([words for words in desk.told("judge") if "outside" in words]) == 1
    )  # or each would have its own patience
    assert Path(f"{desk.calls}.saved").exists()
    assert '"requeue"' in (desk.run / "attempts.jsonl").read_text()


def test_a_chain_leaves_the_rest_to_the_next_job(desk):
    job = Job(name="t", folder=desk.run, runs=(desk.run,), python=desk.python, requeue=False)
    desk.command("srun", stopping())
    assert desk.start(job).returncode == 1  # not finished; the chain's next job starts after any end (afterany)
    assert ends(desk)[0]["verdict"] == "next"
    desk.command("srun", "exit 9")
    assert desk.start(job).returncode == 9
    assert not [words for words in desk.told("scontrol") if words[0] == "requeue"]


def test_a_finished_run_ends_at_once(desk):
    (desk.run / "done.json").write_text('{"step": 5}')
    desk.command("srun", "")
    assert desk.start().returncode == 0
    assert desk.told("srun") == []


def test_what_an_accepted_submission_replaced_is_forgotten_when_the_job_begins(desk, tmp_path):
    """Of the run and of the array it belongs to; a submission that was killed could not do so."""
    run = tmp_path / "a b"
    for folder in (desk.run, run):
        (folder / ".undo").mkdir(parents=True)
    (run / "recipe.yaml").write_text("train: {steps: 5}\n")
    desk.command("srun", stopping())
    job = Job(name="t", folder=desk.run, runs=(run,), tasks=(4,), array="4", python=desk.python)
    assert desk.start(job, SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="4").returncode == 0
    assert not any((folder / ".undo").exists() for folder in (desk.run, run))


def mark(desk):
    """The comment that the script asked Slurm to keep."""
    (words,) = [words for words in desk.told("scontrol") if words[0] == "update"]
    assert words[1] == "JobId=41"
    return words[2]


def test_a_folder_that_is_not_there_may_be_on_another_node(desk, tmp_path):
    gone = tmp_path / "gone"
    job = Job(name="t", folder=desk.run, runs=(gone,), python=desk.python)
    done = desk.start(job, SLURM_RESTART_COUNT="2")
    assert done.returncode == 0
    assert f"{gone} cannot be entered and written on" in done.stderr
    assert ["requeue", "41"] in desk.told("scontrol")
    assert ["60"] in desk.told("sleep")
    assert mark(desk) == "Comment=1-starts-failed-until-restart-2"


@pytest.mark.parametrize(
    ("comment", "following"),
    [("8-starts-failed-until-restart-2", 9), ("9-starts-failed-until-restart-2", None),
     ("9-starts-failed-until-restart-1", 1), ("my own", 1)],
)  # fmt: skip
def test_starts_that_fail_in_a_row_are_bounded(desk, tmp_path, comment, following):
    job = Job(name="t", folder=desk.run, runs=(tmp_path / "gone",), python=desk.python)
    done = desk.start(job, SLURM_RESTART_COUNT="3", RESTARTS="3", COMMENT=comment)
    requeued = ["requeue", "41"] in desk.told("scontrol")
    assert (done.returncode, requeued) == ((1, False) if following is None else (0, True))
    if following is None:
        assert "10 starts in a row failed; mend that, then: potamos requeue" in done.stderr
    else:
        assert mark(desk) == f"Comment={following}-starts-failed-until-restart-3"


def test_a_cancelled_job_that_could_not_begin_is_not_requeued(desk, tmp_path):
    job = Job(name="t", folder=desk.run, runs=(tmp_path / "gone",), python=desk.python)
    assert desk.start(job, STATE="COMPLETING").returncode == 1
    assert desk.start(replace(job, requeue=False)).returncode == 1
    assert ["requeue", "41"] not in desk.told("scontrol")


def test_a_begin_that_fails_is_tried_again_and_a_refusal_is_not(desk):
    real, judged = shlex.quote(desk.python), str(desk.bin / "judge")
    desk.command("judge", f'case "$*" in *" begin "*) exit 1 ;; *) exec {real} "$@" ;; esac')
    desk.command("srun", "")
    job = Job(name="t", folder=desk.run, runs=(desk.run,), python=judged)
    done = desk.start(job)
    assert "no attempt could begin on" in done.stderr
    assert len([words for words in desk.told("judge") if "begin" in words]) == 3
    assert ["requeue", "41"] in desk.told("scontrol")
    assert desk.told("srun") == []
    desk.calls.unlink()
    desk.command("judge", f'exec {real} "$@"')
    (desk.run / "cancelled").touch()
    assert desk.start(job).returncode == 1
    assert len([words for words in desk.told("judge") if "begin" in words]) == 1
    assert ["requeue", "41"] not in desk.told("scontrol")


@pytest.mark.parametrize("times", [3, 99])
def test_an_end_that_could_not_be_judged_is_judged_again_and_goes_back_into_the_queue(desk, times):
    real = shlex.quote(desk.python)
    count = f'n=$(($(cat "$CALLS.n" 2>/dev/null) + 1)); echo $n >"$CALLS.n"; [ $n -gt {times} ] || exit 1'
    desk.command("judge", f'case "$*" in *" end "*) {count} ;; esac; exec {real} "$@"')
    desk.command("srun", stopping())
    done = desk.start(Job(name="t", folder=desk.run, runs=(desk.run,), python=str(desk.bin / "judge")))
    assert (done.returncode, ["requeue", "41"] in desk.told("scontrol")) == (0, True)
    assert ("could not be judged" in done.stderr) == (times == 99)
    if times == 99:
        assert mark(desk) == "Comment=1-starts-failed-until-restart-0"
    else:
        assert ends(desk)[0]["verdict"] == "requeue"


def test_bad_nodes_are_left_to_a_new_job(desk):
    job = Job(name="t", folder=desk.run, runs=(desk.run,), python=str(desk.bin / "judge"), preflight=True, exclude="n1")
    real = desk.python
    desk.command("judge", f'case "$*" in *--judge*) echo n8 ;; *slurm.attempt*) exec {shlex.quote(real)} "$@" ;; esac')
    desk.command("srun", "")
    desk.command("sbatch", "echo 42")
    done = desk.start(job, POTAMOS_EXCLUDE="n3")
    assert done.returncode == 1, done.stderr  # the run is not finished
    assert len(desk.told("srun")) == 1  # the check alone
    (words,) = desk.told("sbatch")
    assert "--exclude=n8,n1,n3" in words
    assert words[-1] == f"{desk.run}/submit.sbatch"
    assert "n8 failed the check" in (desk.run / "attempts.jsonl").read_text()


def preflight(desk, checks: str, judged: str, **changes) -> Job:
    """A job that examines its nodes: what the check does, and what the judge of it does."""
    real = desk.python
    desk.command("judge", f'case "$*" in *--judge*) {judged} ;; *slurm.attempt*) exec {shlex.quote(real)} "$@" ;; esac')
    desk.command("srun", f'case "$*" in *node_check*) {checks} ;; *) {stopping()} ;; esac')
    desk.command("sbatch", 'echo "restart=${SLURM_RESTART_COUNT-none} exclude=$POTAMOS_EXCLUDE" >"$CALLS.env"; echo 42')
    return replace(
        Job(name="t", folder=desk.run, runs=(desk.run,), python=str(desk.bin / "judge"), preflight=True), **changes
    )


def ends(desk) -> list[dict]:
    records = [json.loads(line) for line in (desk.run / "attempts.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "end"]


def test_the_job_that_goes_on_without_bad_nodes_is_remembered_and_counts_anew(desk):
    job = preflight(desk, "true", "echo n8", tasks=(5,), array="5")
    place = {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "5"}
    assert desk.start(job, SLURM_RESTART_COUNT="3", **place).returncode == 1
    assert Path(f"{desk.calls}.env").read_text() == "restart=none exclude=n8\n"
    assert "--array=5" in desk.told("sbatch")[0]
    assert jobs_of(desk.run) == ["42"]
    (check,) = desk.told("srun")
    assert check.index("--kill-on-bad-exit=0") > check.index("--kill-on-bad-exit=1")  # the last one counts
    assert "--wait=600" in check


LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


def test_a_submission_whose_answer_was_lost_is_tried_again(desk):
    job = preflight(desk, "true", "echo n8")
    count = 'n=$(($(cat "$CALLS.n" 2>/dev/null) + 1)); echo $n >"$CALLS.n"'
    desk.command("squeue", "")
    desk.command("sbatch", f'{count}; [ $n -gt 3 ] || {{ echo "{LOST}" >&2; exit 1; }}; echo 42')
    assert desk.start(job).returncode == 1
    assert len(desk.told("sbatch")) == 4
    assert jobs_of(desk.run) == ["42"]
    assert ends(desk)[0]["verdict"] == "next"


def test_a_submission_that_was_accepted_unheard_is_not_made_twice(desk):
    job = preflight(desk, "true", "echo n8")
    desk.command("squeue", 'echo "40 follows-41-attempt-9"; echo "43 follows-41-attempt-0"')
    desk.command("sbatch", f'echo "{LOST}" >&2; exit 1')
    assert desk.start(job).returncode == 1
    (words,) = desk.told("sbatch")
    assert "--comment=follows-41-attempt-0" in words
    assert jobs_of(desk.run) == ["43"]


@pytest.mark.parametrize(("answer", "times"), [(LOST, 10), ("Invalid partition name specified", 1)])
def test_without_a_job_that_follows_the_attempt_failed_and_this_job_goes_on(desk, answer, times):
    job = preflight(desk, "true", "echo n8")
    desk.command("squeue", "")
    desk.command("sbatch", f'echo "{answer}" >&2; exit 1')
    assert desk.start(job).returncode == 0
    assert len(desk.told("sbatch")) == times
    assert (ends(desk)[0]["verdict"], ends(desk)[0]["fruitless"]) == ("requeue", True)
    assert f"no job without them could be submitted ({answer})" in ends(desk)[0]["reason"]
    assert ["requeue", "41"] in desk.told("scontrol")


def test_a_chain_leaves_bad_nodes_to_its_next_job(desk):
    """Another job would train in the folder beside the next link."""
    done = desk.start(preflight(desk, "true", "echo n8", requeue=False))
    assert done.returncode == 1
    assert desk.told("sbatch") == []
    assert ends(desk)[0]["verdict"] == "next"


def test_a_stop_while_nodes_are_examined_blames_no_node(desk):
    job = preflight(desk, "kill -TERM $PPID; /bin/sleep 0.3", "exit 4")
    done = desk.start(job)
    assert done.returncode == 0, done.stderr
    assert len(desk.told("srun")) == 1
    assert "env" in desk.told("srun")[0]  # which holds the ranks' signals back there too
    assert ["requeue", "41"] in desk.told("scontrol")
    assert "while the nodes were examined" in ends(desk)[0]["reason"]


def test_no_node_that_passes_is_a_failed_attempt_and_not_the_end(desk):
    done = desk.start(preflight(desk, "true", "exit 4"))
    assert done.returncode == 0
    assert ["requeue", "41"] in desk.told("scontrol")
    assert (ends(desk)[0]["fruitless"], "no node passed" in ends(desk)[0]["reason"]) == (True, True)


def test_ranks_that_hang_at_the_time_limit_are_judged_before_slurm_kills_the_script(desk):
    desk.command("srun", "/bin/sleep 0.3; kill -TERM $PPID; exec /bin/sleep 50")
    began = time.monotonic()
    done = desk.start(STATE="COMPLETING", RAN="00:10:01")
    assert time.monotonic() - began < 30
    assert done.returncode == 0, done.stderr
    assert ["requeue", "41"] in desk.told("scontrol")
    assert "time limit" in ends(desk)[0]["reason"]


def test_ranks_that_are_deaf_at_the_time_limit_leave_a_script_that_judges(desk):
    """Slurm's SIGTERM goes to every process of the script: bash's word on the killed srun must not meet a dead pipe."""
    desk.command("srun", "trap '' TERM; /bin/sleep 0.3; kill -TERM -- -$PPID; exec /bin/sleep 50")
    began = time.monotonic()
    done = desk.start(STATE="COMPLETING", RAN="00:10:01", leader=True)
    assert time.monotonic() - began < 30
    assert done.returncode == 0, done.stderr
    assert "Killed" in done.stderr
    assert ends(desk)[0]["status"] == 137
    assert "time limit" in ends(desk)[0]["reason"]
    assert ["requeue", "41"] in desk.told("scontrol")


def test_the_words_of_srun_are_kept_and_shown(desk):
    words = "srun: error: n7: task 0: Killed"
    term = "/bin/sleep 0.3; kill -TERM -- -$PPID; /bin/sleep 0.3"
    desk.command("srun", f"trap '' TERM; {term}; echo '{words}' >&2; exit 1")
    done = desk.start(leader=True)
    assert "n7: task 0: Killed" in done.stderr
    assert "n7: task 0: Killed" in (desk.run / "logs" / "attempt-0.srun.txt").read_text()


def test_what_slurm_says_of_a_job_is_heard_only_when_the_controller_is_back(desk):
    """Unheard, a cancelled job would look like one that may go on."""
    at_first('ping*|"show job"', "exit 1", desk, times=20)
    desk.command("srun", f'rm "$CALLS.n"; {stopping()}')  # away again
    desk.start(STATE="COMPLETING")
    assert int(Path(f"{desk.calls}.n").read_text()) > 20
    assert ends(desk)[0]["verdict"] == "stopped"
    assert ["requeue", "41"] not in desk.told("scontrol")


def test_a_word_of_the_controller_that_was_lost_is_asked_for_again(desk):
    at_first('"show job"', "exit 1", desk, times=3)
    desk.command("srun", stopping())
    desk.start(STATE="COMPLETING")
    assert ends(desk)[0]["verdict"] == "stopped"


def test_ranks_that_save_in_the_grace_of_a_preemption_are_let(desk):
    desk.command("srun", f"kill -TERM $PPID; /bin/sleep 1; {stopping()}")
    assert desk.start().returncode == 0
    assert ends(desk)[0]["reason"] == "SIGUSR1"


def test_a_controller_that_is_away_is_waited_for(desk):
    """Away when the attempt ends: nobody else would requeue the job."""
    away, up, down = '[ -f "$CALLS.away" ]', "Slurmctld(primary) at host is UP", "Slurmctld(primary) at host is DOWN"
    desk.command(
        "scontrol",
        'n=$(cat "$CALLS.n" 2>/dev/null || echo 0); case "$1 $2" in "show hostnames") echo n7 ;;'
        ' "show node") echo "NodeName=n7 NodeAddr=10.0.0.7" ;; "show job") echo "JobState=RUNNING Restarts=0" ;;'
        f' ping*) {away} && {{ n=$((n + 1)); echo $n >"$CALLS.n"; [ $n -lt 4 ] || rm "$CALLS.away"; }};'
        f' {away} && echo "{down}" || echo "{up}" ;;'
        f' requeue*) {away} && {{ echo "Unexpected message received for job 41" >&2; exit 1; }} ;; esac; exit 0',
    )
    desk.command("srun", stopping() + '; touch "$CALLS.away"')
    done = desk.start()
    assert done.returncode == 0, done.stderr
    assert "waiting for it" in done.stdout
    assert ["requeue", "41"] in desk.told("scontrol")


@pytest.mark.parametrize("line", ["set -euo pipefail", "set -e", "set -u"])
def test_a_strict_prologue_changes_nothing(desk, line):
    desk.command("srun", "exit 137")
    job = Job(name="t", folder=desk.run, runs=(desk.run,), python=desk.python, prologue=(line,))
    assert desk.start(job).returncode == 0
    assert ends(desk)[0]["verdict"] == "requeue"
    assert ["requeue", "41"] in desk.told("scontrol")


def test_options_of_the_shell_that_the_prologue_set_end_with_it(desk):
    desk.command("srun", f'echo "$SHELLOPTS" >"$CALLS.env"; {stopping()}')
    line = "export SHELLOPTS; set -euo pipefail"
    desk.start(Job(name="t", folder=desk.run, runs=(desk.run,), python=desk.python, prologue=(line,)))
    assert {"nounset", "errexit", "pipefail"} & set(Path(f"{desk.calls}.env").read_text().strip().split(":")) == set()


def test_a_path_that_modules_set_is_kept_behind_the_runs_own(desk):
    desk.command("srun", f'echo "$PYTHONPATH" >"$CALLS.env"; {stopping()}')
    desk.start(PYTHONPATH="/opt/site")
    assert Path(f"{desk.calls}.env").read_text() == f"{desk.run}/code:/opt/site\n"
