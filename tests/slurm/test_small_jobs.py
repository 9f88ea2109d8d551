"""Small jobs on a cluster: what is asked of sbatch, what is refused, and what a task does with its command.

Here `sbatch` is a false one that keeps what it is given; `test_small_jobs_cluster.py` takes a real Slurm.
"""

from __future__ import annotations

import os
import pickletools
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potamos.slurm import client
from potamos.slurm.client import NoSlurm, SlurmError
from potamos.slurm.site import Site
from potamos.slurm.small_jobs import Command, MissingExtra, Resources, Submission, still_queued

PREPARE = ("data", "prepare", "raw")
TOKENIZER = ("--tokenizer", "tokenizer.json")


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
    in_corpus: Path, scripts: Scripts, potamos: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
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
        f"logs: {shlex.quote(str(in_corpus / 'asked.logs'))}/41_*_log.out",
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
        words = arguments(in_corpus / "asked.logs", f"41_{task}")
        assert words[:4] == ["data", "prepare", "raw", "asked"]
        assert {f"--rank={task}", "--world=3", "--tokenizer=tokenizer.json", "--threads=2"} < set(words)
    assert arguments(in_corpus / "asked.logs", "42") == ["data", "finalize", "asked", "--wait=600.0"]


def arguments(folder: Path, job: str) -> list[str]:
    """The words of a task's command."""
    import submitit

    delayed = submitit.helpers.DelayedSubmission.load(folder / f"{job}_submitted.pkl")
    return list(delayed.args[0])


def test_a_task_s_pickle_holds_words_and_one_name(
    in_corpus: Path, scripts: Scripts, potamos: Callable[..., Any]
) -> None:
    """So it does not change with the code, and loads nothing but this."""
    potamos(*PREPARE, "pickled", *TOKENIZER, "--slurm", 2)
    strings: list[str] = []
    named = set()
    for code, value, _ in pickletools.genops((in_corpus / "pickled.logs" / "41_0_submitted.pkl").read_bytes()):
        if isinstance(value, str) and "UNICODE" in code.name:
            strings.append(value)
        if code.name in ("GLOBAL", "STACK_GLOBAL"):
            named.add(tuple(strings[-2:]))
    assert named == {("submitit.core.utils", "DelayedSubmission"), ("potamos.slurm.small_jobs", "Command")}
    assert "--rank=0" in strings


def test_duplicates_are_looked_for_by_an_array_of_their_own(
    in_corpus: Path, scripts: Scripts, potamos: Callable[..., Any]
) -> None:
    done = potamos(*PREPARE, "unique", *TOKENIZER, "--slurm", 2, "--deduplicate")
    assert done.out.splitlines()[0] == "job 41: 2 tasks look for duplicates"
    assert [scripts.options(n).get("dependency") for n in range(3)] == [None, "afterany:41", "afterok:42"]
    assert "--wait=5.0" in arguments(in_corpus / "unique.logs", "41_1")
    assert {"--wait=600.0", "--deduplicate"} < set(arguments(in_corpus / "unique.logs", "42_1"))


def test_no_more_tasks_than_inputs_and_no_longer_than_the_partition_allows(
    in_corpus: Path, scripts: Scripts, potamos: Callable[..., Any]
) -> None:
    potamos(*PREPARE, "many", *TOKENIZER, "--slurm", 500)
    assert scripts.options(0)["array"] == "0-6%7"
    assert scripts.options(0)["time"] == "120"
    potamos(*PREPARE, "long", *TOKENIZER, "--slurm", 1, "--partition", "long")
    assert scripts.options(2)["time"] == "240"
    assert "array" not in scripts.options(2)


def test_the_site_file_serves_small_jobs_too(
    in_corpus: Path, scripts: Scripts, potamos: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    in_corpus: Path, scripts: Scripts, potamos: Callable[..., Any]
) -> None:
    ask = (*PREPARE, "refused", *TOKENIZER)
    potamos(*ask, "--partition", "cpu", "--time", "5").assert_mistake("--partition, --time", "--slurm N")
    potamos(*ask, "--slurm", 3, "--rank", 1, "--world", 4).assert_mistake("--rank and --world")
    potamos(*ask, "--slurm", 3, "--time", "soon").assert_mistake("soon", "hours:minutes:seconds")
    potamos(*ask, "--slurm", 3, "--time", "UNLIMITED").assert_mistake("UNLIMITED", "limit")
    potamos(*ask, "--slurm", 3, "--partition", "x; rm -rf /").assert_mistake("--partition 'x; rm -rf /'")
    potamos(*ask, "--slurm", 3, "--memory", "lots").assert_mistake("--memory 'lots'", "8G")
    potamos("data", "prepare", "absent", "refused", *TOKENIZER, "--slurm", 3).assert_mistake("absent")
    potamos(*PREPARE, "refused", "--tokenizer", "absent.json", "--slurm", 3).assert_mistake("absent.json")
    potamos(*PREPARE, "a%jb", *TOKENIZER, "--slurm", 3).assert_mistake("a%jb.logs", "%")
    assert scripts.all() == []
    assert not (in_corpus / "refused.logs").exists()


def test_a_second_submission_waits_for_the_first(
    in_corpus: Path, scripts: Scripts, potamos: Callable[..., Any], tmp_path: Path
) -> None:
    potamos(*PREPARE, "twice", *TOKENIZER, "--slurm", 3)
    columns = ["41_2", "41", "RUNNING", "None", "n1", "1:00", "cpu", "N/A", "me", "prepare", "/here"]
    (tmp_path / "bin" / "squeue").write_text(
        f"#!/bin/bash\nprintf '%s\\n' {shlex.quote(client.SEPARATOR.join(columns))}\n"
    )
    assert still_queued(in_corpus / "twice.logs") == ["41_2"]
    potamos(*PREPARE, "twice", *TOKENIZER, "--slurm", 3).assert_mistake("1 tasks", "squeue -j 41", "scancel 41")
    assert len(scripts.all()) == 2


def test_what_sbatch_refuses_is_told_in_its_words_and_leaves_nothing_queued(
    in_corpus: Path, scripts: Scripts, potamos: Callable[..., Any], tmp_path: Path
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(
        sbatch.read_text().replace(
            "\ncd ",
            '\ngrep -q afterok "$1" && { echo \'sbatch: error: Batch job submission failed: Invalid qos '
            "specification' >&2; exit 1; }\ncd ",
        )
    )
    done = potamos(*PREPARE, "invalid", *TOKENIZER, "--slurm", 2)
    done.assert_mistake("`sbatch` says: ", "Invalid qos specification")
    assert (scripts.folder / "cancelled").read_text() == "41\n"


def test_without_slurm_or_submitit_one_sentence_says_what_to_do(
    in_corpus: Path, potamos: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        potamos(*PREPARE, "none", *TOKENIZER, "--slurm", 2).assert_mistake("no Slurm here: `sbatch` is not on PATH")
        with pytest.raises(NoSlurm):
            Submission(in_corpus / "none", Site(), Resources())
    monkeypatch.setitem(sys.modules, "submitit", None)
    potamos(*PREPARE, "none", *TOKENIZER, "--slurm", 2).assert_mistake("pip install 'potamos[slurm]'", "unrelated")
    with pytest.raises(MissingExtra):
        Submission(in_corpus / "none", Site(), Resources())


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


def test_a_task_s_command_outlives_signals_but_not_its_task(until: Callable[..., Any]) -> None:
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
    until(lambda: not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text())
