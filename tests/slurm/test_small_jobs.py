"""Small jobs on a cluster: what is asked of sbatch, what is refused, and what a real Slurm makes of it.

Tests that take `cluster` run on a real one; the others have a false `sbatch` that keeps what it is given.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickletools
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from potamos.pretrain import cli
from potamos.slurm import client
from potamos.slurm.client import NoSlurm, SlurmError
from potamos.slurm.site import Site
from potamos.slurm.small_jobs import RESTARTS, Command, MissingExtra, Resources, Submission, still_queued

PATIENCE = 120.0  # an upper bound, not a wait


@dataclass
class Ended:
    status: int
    out: str
    err: str


@pytest.fixture
def potamos(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`potamos("data", "prepare", ...)`: the console entry, run in this process."""

    def call(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["potamos", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        text = capsys.readouterr()
        return Ended(int(ended.value.code or 0), text.out, text.err)

    return call


def mistake(done: Ended, *words: str) -> None:
    assert done.status == 2, done
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err, done.err


# --- a corpus and a run -------------------------------------------------------------------------------------------

SENTENCE = "the river runs far past quiet mills and old bridges to the sea while rain falls on hills"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven inputs, some documents of which occur twice, and a tokenizer. The folder's name needs quotes."""
    from potamos.data.commands import train

    folder = tmp_path_factory.mktemp("corpus") / "it's $(odd) here"
    (folder / "raw").mkdir(parents=True)
    draw = random.Random(5)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 80))) for _ in range(60)]
    for number in range(7):
        chosen = draw.choices(texts, k=20)
        (folder / "raw" / f"{number}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in chosen))
    train(str(folder / "raw"), 280, folder / "tokenizer.json")
    return folder


@pytest.fixture
def here(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The corpus's folder as working directory: jobs are given relative paths, as users write them."""
    monkeypatch.chdir(corpus)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(corpus / "no configuration"))
    monkeypatch.delenv("POTAMOS_SITE", raising=False)
    return corpus


PREPARE = ("data", "prepare", "raw")
TOKENIZER = ("--tokenizer", "tokenizer.json")


def content(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert len(found) > 2
    return found


# --- what is asked of sbatch --------------------------------------------------------------------------------------


class Scripts:
    """The scripts that the false sbatch was given, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("*.sbatch"))]

    def options(self, number: int) -> dict[str, str]:
        """The lines #SBATCH of a script, as sbatch reads their quotes."""
        lines = [line[len("#SBATCH --") :] for line in self.all()[number].splitlines() if line.startswith("#SBATCH --")]
        pairs = (shlex.split(line)[0].partition("=") for line in lines)
        return {key: value for key, _, value in pairs}


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripts:
    """Slurm's commands on PATH that do nothing but keep what they get; job numbers from 41."""
    folder = tmp_path / "bin"
    folder.mkdir()
    kept = tmp_path / "given"
    kept.mkdir()
    (folder / "sbatch").write_text(
        "#!/bin/bash\n"
        f'cd {shlex.quote(str(kept))}; n=$(ls | grep -c sbatch); cp "$1" "$n.sbatch"; env > "$n.env"\n'
        'echo "Submitted batch job $((41 + n))"\n'
    )
    (folder / "squeue").write_text("#!/bin/bash\n")
    (folder / "scancel").write_text(f'#!/bin/bash\necho "$@" >> {shlex.quote(str(kept / "cancelled"))}\n')
    (folder / "srun").write_text("#!/bin/bash\n")
    (folder / "sinfo").write_text("#!/bin/bash\nprintf 'cpu\\x1f(null)\\x1f64\\x1f1000\\n'\n")
    (folder / "scontrol").write_text(
        "#!/bin/bash\necho 'PartitionName=cpu Default=YES MaxTime=02:00:00 State=UP TotalNodes=4'\n"
        "echo 'PartitionName=long Default=NO MaxTime=UNLIMITED State=UP TotalNodes=4'\n"
    )
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Scripts(kept)


def test_prepare_asks_for_an_array_and_a_job_that_finalizes(
    here: Path, scripts: Scripts, potamos: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    asked = "--cpus=2 --memory=3G --time=1:30:00 --partition=cpu --account=lab --qos=night --constraint=a|b --at-once=2"
    done = potamos(*PREPARE, "asked", *TOKENIZER, "--slurm", 3, *asked.split())
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [
        "job 41: 3 tasks prepare 7 inputs",
        "job 42: makes them one dataset, asked, when all have succeeded",
        "after a failure, the same command goes on with what is finished",
        "watch them: squeue -j 41,42; end them: scancel 41 42",
        f"logs: {shlex.quote(str(here / 'asked.logs'))}/41_*_log.out",
    ]
    first, last = scripts.options(0), scripts.options(1)
    assert first["array"] == "0-2%2"
    wanted = {"cpus-per-task": "2", "mem": "3G", "time": "90", "partition": "cpu", "account": "lab", "qos": "night",
              "constraint": "a|b", "open-mode": "append", "signal": "USR2@30", "requeue": ""}  # fmt: skip
    assert {key: first[key] for key in wanted} == wanted
    assert "wckey" not in first
    assert "dependency" not in first
    assert (last["dependency"], last["kill-on-invalid-dep"]) == ("afterok:41", "yes")
    assert "array" not in last
    assert last["cpus-per-task"] == "1"
    assert "--cpus-per-task=2" in next(line for line in scripts.all()[0].splitlines() if line.startswith("srun "))
    assert "SBATCH_PARTITION" not in (scripts.folder / "0.env").read_text()
    assert os.environ["SBATCH_PARTITION"] == "other"
    for task in range(3):
        words = arguments(here / "asked.logs", f"41_{task}")
        assert words[:4] == ["data", "prepare", "raw", "asked"]
        assert {f"--rank={task}", "--world=3", "--tokenizer=tokenizer.json", "--threads=2"} < set(words)
    assert arguments(here / "asked.logs", "42") == ["data", "finalize", "asked", "--wait=600.0"]


def arguments(folder: Path, job: str) -> list[str]:
    """The words of a task's command."""
    import submitit

    delayed = submitit.helpers.DelayedSubmission.load(folder / f"{job}_submitted.pkl")
    return list(delayed.args[0])


def test_a_task_s_pickle_holds_words_and_one_name(here: Path, scripts: Scripts, potamos: Callable[..., Ended]) -> None:
    """So it does not change with the code, and loads nothing but this."""
    potamos(*PREPARE, "pickled", *TOKENIZER, "--slurm", 2)
    strings: list[str] = []
    named = set()
    for code, value, _ in pickletools.genops((here / "pickled.logs" / "41_0_submitted.pkl").read_bytes()):
        if isinstance(value, str) and "UNICODE" in code.name:
            strings.append(value)
        if code.name in ("GLOBAL", "STACK_GLOBAL"):
            named.add(tuple(strings[-2:]))
    assert named == {("submitit.core.utils", "DelayedSubmission"), ("potamos.slurm.small_jobs", "Command")}
    assert "--rank=0" in strings


def test_duplicates_are_looked_for_by_an_array_of_their_own(
    here: Path, scripts: Scripts, potamos: Callable[..., Ended]
) -> None:
    done = potamos(*PREPARE, "unique", *TOKENIZER, "--slurm", 2, "--deduplicate")
    assert done.out.splitlines()[0] == "job 41: 2 tasks look for duplicates"
    assert [scripts.options(n).get("dependency") for n in range(3)] == [None, "afterany:41", "afterok:42"]
    assert "--wait=5.0" in arguments(here / "unique.logs", "41_1")
    assert {"--wait=600.0", "--deduplicate"} < set(arguments(here / "unique.logs", "42_1"))


def test_no_more_tasks_than_inputs_and_no_longer_than_the_partition_allows(
    here: Path, scripts: Scripts, potamos: Callable[..., Ended]
) -> None:
    potamos(*PREPARE, "many", *TOKENIZER, "--slurm", 500)
    assert scripts.options(0)["array"] == "0-6%7"
    assert scripts.options(0)["time"] == "120"
    potamos(*PREPARE, "long", *TOKENIZER, "--slurm", 1, "--partition", "long")
    assert scripts.options(2)["time"] == "240"
    assert "array" not in scripts.options(2)


def test_the_site_file_serves_small_jobs_too(
    here: Path, scripts: Scripts, potamos: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "prologue: [module load python]\npython: /opt/a b/python\npartition: cpu\naccount: lab\n"
        'environment: {HF_HOME: "/it\'s"}\n'
    )
    monkeypatch.setenv("POTAMOS_SITE", str(site))
    potamos(*PREPARE, "site", *TOKENIZER, "--slurm", 2, "--account", "mine")
    options, text = scripts.options(0), scripts.all()[0]
    assert (options["partition"], options["account"]) == ("cpu", "mine")
    setup = text.split("# setup\n")[1].splitlines()
    assert setup[0] == "module load python"
    assert shlex.split(setup[1]) == ["export", "HF_HOME=/it's"]
    assert "'/opt/a b/python' -P -u -m submitit.core._submit" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


# --- what is refused ----------------------------------------------------------------------------------------------


def test_mistakes_are_told_before_anything_is_queued(
    here: Path, scripts: Scripts, potamos: Callable[..., Ended]
) -> None:
    ask = (*PREPARE, "refused", *TOKENIZER)
    mistake(potamos(*ask, "--partition", "cpu", "--time", "5"), "--partition, --time", "--slurm N")
    mistake(potamos(*ask, "--slurm", 3, "--rank", 1, "--world", 4), "--rank and --world")
    mistake(potamos(*ask, "--slurm", 3, "--time", "soon"), "soon", "hours:minutes:seconds")
    mistake(potamos(*ask, "--slurm", 3, "--time", "UNLIMITED"), "UNLIMITED", "limit")
    mistake(potamos(*ask, "--slurm", 3, "--partition", "x; rm -rf /"), "--partition 'x; rm -rf /'")
    mistake(potamos(*ask, "--slurm", 3, "--memory", "lots"), "--memory 'lots'", "8G")
    mistake(potamos("data", "prepare", "absent", "refused", *TOKENIZER, "--slurm", 3), "absent")
    mistake(potamos(*PREPARE, "refused", "--tokenizer", "absent.json", "--slurm", 3), "absent.json")
    mistake(potamos(*PREPARE, "a%jb", *TOKENIZER, "--slurm", 3), "a%jb.logs", "%")
    assert scripts.all() == []
    assert not (here / "refused.logs").exists()


def test_a_second_submission_waits_for_the_first(
    here: Path, scripts: Scripts, potamos: Callable[..., Ended], tmp_path: Path
) -> None:
    potamos(*PREPARE, "twice", *TOKENIZER, "--slurm", 3)
    columns = ["41_2", "41", "RUNNING", "None", "n1", "1:00", "cpu", "N/A", "me", "prepare", "/here"]
    (tmp_path / "bin" / "squeue").write_text(
        f"#!/bin/bash\nprintf '%s\\n' {shlex.quote(client.SEPARATOR.join(columns))}\n"
    )
    assert still_queued(here / "twice.logs") == ["41_2"]
    mistake(potamos(*PREPARE, "twice", *TOKENIZER, "--slurm", 3), "1 tasks", "squeue -j 41", "scancel 41")
    assert len(scripts.all()) == 2


def test_what_sbatch_refuses_is_told_in_its_words_and_leaves_nothing_queued(
    here: Path, scripts: Scripts, potamos: Callable[..., Ended], tmp_path: Path
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(
        sbatch.read_text().replace(
            "\ncd ",
            '\ngrep -q afterok "$1" && { echo \'sbatch: error: Batch job submission failed: Invalid qos '
            "specification' >&2; exit 1; }\ncd ",
        )
    )
    mistake(potamos(*PREPARE, "invalid", *TOKENIZER, "--slurm", 2), "`sbatch` says: ", "Invalid qos specification")
    assert (scripts.folder / "cancelled").read_text() == "41\n"


def test_without_slurm_or_submitit_one_sentence_says_what_to_do(
    here: Path, potamos: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        mistake(potamos(*PREPARE, "none", *TOKENIZER, "--slurm", 2), "no Slurm here: `sbatch` is not on PATH")
        with pytest.raises(NoSlurm):
            Submission(here / "none", Site(), Resources())
    monkeypatch.setitem(sys.modules, "submitit", None)
    mistake(potamos(*PREPARE, "none", *TOKENIZER, "--slurm", 2), "pip install 'potamos[slurm]'", "unrelated")
    with pytest.raises(MissingExtra):
        Submission(here / "none", Site(), Resources())


def test_submitit_is_imported_only_where_it_is_used() -> None:
    script = (
        "import sys, potamos.slurm.small_jobs, potamos.pretrain.cli, potamos.pretrain.cli_small_jobs\n"
        "print([name for name in ('submitit', 'cloudpickle', 'torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- a task -------------------------------------------------------------------------------------------------------


def test_a_task_fails_where_its_command_does(capfd: pytest.CaptureFixture[str]) -> None:
    assert Command()(["--version"]) == 0
    assert capfd.readouterr().out.startswith("potamos --version\npotamos ")
    with pytest.raises(SlurmError, match="ended with status 2, see above: potamos data finalize '/not here'"):
        Command()(["data", "finalize", "/not here"])
    assert "nothing was prepared for /not here" in capfd.readouterr().err
    assert Command(forgiving=True)(["data", "finalize", "/not here"]) == 2


def test_a_task_s_command_outlives_signals_but_not_its_task(tmp_path: Path) -> None:
    """SIGTERM and SIGUSR2 reach every process of a task; the end of the task ends its command."""
    script = (
        "import os, signal, sys, threading\n"
        "from potamos.slurm import small_jobs\n"
        "sys.executable = '/bin/sh'\n"
        "class Popen(small_jobs.subprocess.Popen):\n"
        "    def __init__(self, command, **options):\n"
        "        said = 'echo $$; kill -TERM $$; kill -USR2 $$; echo alive; exec sleep 600'\n"
        "        super().__init__(['/bin/sh', '-c', said], **options)\n"
        "small_jobs.subprocess.Popen = Popen\n"
        "small_jobs.Command()([])\n"
    )
    task = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert task.stdout is not None
    assert task.stdout.readline() == "potamos\n"
    child = int(task.stdout.readline())
    assert task.stdout.readline() == "alive\n"
    task.kill()
    task.wait()
    until(lambda: not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text(), 20)


def until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# --- on a real Slurm ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_one_process(corpus: Path) -> dict[str, bytes]:
    """What one process makes of the corpus, without duplicates: every array must make the same bytes."""
    from potamos.data.prepare import prepare
    from potamos.data.tokenizer import load_tokenizer

    expected = corpus / "expected" / "d"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(corpus)  # a dataset remembers the names of its inputs as they were given
        prepare("raw", "all", load_tokenizer("json", "tokenizer.json"), expected, deduplicate=True)
    return content(expected)


def gone(folder: Path) -> None:
    """Wait until no job of a folder is in the queue."""
    until(lambda: not still_queued(folder))


def said(folder: Path) -> str:
    """All logs of a folder, for messages."""
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("*_log.out")))


def process(*words: str) -> int | None:
    """The process whose command line has all of the words, in order."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = place.read_bytes().decode(errors="replace").split("\0")
            if "potamos.pretrain.cli" in line and all(word in line for word in words):
                return int(place.parent.name)
    return None


@pytest.mark.usefixtures("cluster")
def test_an_array_makes_the_bytes_of_one_process(
    here: Path, potamos: Callable[..., Ended], of_one_process: dict[str, bytes]
) -> None:
    done = potamos(*PREPARE, "array/d", *TOKENIZER, "--slurm", 3, "--deduplicate", "--memory", "1G")
    assert done.status == 0, done
    gone(here / "array" / "d.logs")
    assert (here / "array" / "d").exists(), said(here / "array" / "d.logs")
    assert content(here / "array" / "d") == of_one_process
    assert "sacct" not in said(here / "array" / "d.logs")
    main = json.loads((here / "array" / "d.logs" / "jobs.json").read_text())["ids"]
    assert [p.name for p in sorted((here / "array" / "d.logs").glob(f"{main[1]}*_log.out"))] == [
        f"{main[1]}_{task}_0_log.out" for task in range(3)
    ], "a log a task, at the place that was printed"


@pytest.mark.usefixtures("cluster")
def test_a_task_that_was_killed_is_made_good_by_the_same_command(
    here: Path, potamos: Callable[..., Ended], of_one_process: dict[str, bytes]
) -> None:
    logs = here / "killed" / "d.logs"
    command = (*PREPARE, "killed/d", *TOKENIZER, "--slurm", 2, "--deduplicate", "--memory", "1G")
    assert potamos(*command).status == 0
    found: list[int] = []
    until(lambda: found.extend(filter(None, [process("killed/d", "--rank=1", "--wait=600.0")])) or found)
    os.kill(found[0], signal.SIGKILL)
    gone(logs)
    assert not (here / "killed" / "d").exists(), "finalize had to wait for all"
    assert "it ended with status -9, see above" in said(logs)
    assert potamos(*command).status == 0
    gone(logs)
    assert (here / "killed" / "d").exists(), said(logs)
    assert content(here / "killed" / "d") == of_one_process


SLEEPER = """
import os, sys, time
if "potamos.pretrain.cli" in sys.orig_argv:
    os.chdir(HERE)
    with open("starts", "a") as file:
        file.write("x")
    while not os.path.exists("go") and os.path.getsize("starts") == 1:
        time.sleep(0.05)
    open("done", "w").close()
    os._exit(0)
"""


@dataclass
class Sleeping:
    """A submitted command whose first start waits until it is let go."""

    shared: Path
    logs: Path
    job: str

    @property
    def starts(self) -> int:
        return os.path.getsize(self.shared / "starts") if (self.shared / "starts").exists() else 0

    @property
    def done(self) -> bool:
        return (self.shared / "done").exists()

    def signal(self, name: str) -> None:
        subprocess.run(["scancel", f"--signal={name}", self.job], check=True, timeout=60)


@pytest.fixture
def sleeping(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sleeping:
    """A small job that runs, in place of a long one: where the nodes look for modules first, one stands in for it."""
    (tmp_path / "sitecustomize.py").write_text(SLEEPER.replace("HERE", repr(str(tmp_path))))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    submitted = Submission(tmp_path / "logs", Site(), Resources(memory="1G", time=120))
    found = Sleeping(tmp_path, tmp_path / "logs", submitted.add("sleeping", [["data", "prepare"]]))
    until(lambda: found.starts == 1)
    return found


def test_a_job_at_its_time_limit_goes_on_in_another_start(sleeping: Sleeping) -> None:
    """submitit takes any stop signal to so short a job for its time limit, and by default gives up after three."""
    import submitit

    sleeping.signal("USR2")
    until(lambda: sleeping.starts == 2)
    gone(sleeping.logs)
    assert sleeping.done
    log = said(sleeping.logs)
    assert "this job is timed-out" in log
    assert f"({RESTARTS - 1} remaining timeouts)" in log
    assert submitit.SlurmJob(sleeping.logs, sleeping.job).state == "UNKNOWN", "what nothing here relies on"


def test_a_preempted_job_uses_the_grace(sleeping: Sleeping) -> None:
    """SIGTERM announces it: who ends then is taken for failed, and is not requeued."""
    sleeping.signal("TERM")
    until(lambda: "Bypassing signal SIGTERM" in said(sleeping.logs))
    assert still_queued(sleeping.logs) == [sleeping.job]
    assert process("data", "prepare"), "the command itself has had the signal too"
    (sleeping.shared / "go").touch()
    gone(sleeping.logs)
    assert (sleeping.done, sleeping.starts) == (True, 1)
    assert "Job completed successfully" in said(sleeping.logs)


@pytest.mark.nightly
def test_a_preempted_job_that_needs_longer_comes_back(sleeping: Sleeping) -> None:
    """Slurm ends it after the grace and requeues it, which it does not do with a job that has ended by itself."""
    everything = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(everything, check=True, capture_output=True, timeout=60)
    gone(sleeping.logs)
    assert (sleeping.done, sleeping.starts) == (True, 2)
    assert "DUE TO PREEMPTION" in said(sleeping.logs)


def test_a_sweep_over_checkpoints_on_the_cluster(
    cluster: Any, trial: Any, tmp_path: Path, here: Path, potamos: Callable[..., Ended]
) -> None:
    """Each row is what `evaluate` of that checkpoint alone says, to the last bit."""
    from potamos.pretrain.evaluations import read_rows
    from potamos.pretrain.runs import open_run, score_run

    run = tmp_path / "run"
    trial.fit(run, "train.steps=12", "checkpoint={every: 4, keep: 3}")
    done = potamos("evaluate", run, "--steps", "all", "--length", "2x", "--slurm", 2, "--memory", "1G", "--device=cpu")
    assert done.status == 0, done
    assert "2 tasks score 3 checkpoints and write into" in done.out
    gone(run / "logs" / "evaluate")
    rows = read_rows(run / "evaluations.csv")
    assert [row.step for row in rows] == [4, 8, 12], said(run / "logs" / "evaluate")
    for row in rows:
        ((name, score),) = score_run(open_run(run, step=row.step), length="2x").items()
        assert (row.data, row.length, row.changes) == (name, 64, "")
        assert (row.bits_per_byte, row.perplexity, row.loss) == (score.bits_per_byte, score.perplexity, score.loss)
        assert (row.targets, row.bytes) == (score.targets, score.bytes)
    assert len({row.loss for row in rows}) == 3
