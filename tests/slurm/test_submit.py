"""Queueing a job, with stand-ins for Slurm's commands that write down what they were told."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from potamos.slurm import client, prepare
from potamos.slurm.attempt import jobs_of
from potamos.slurm.checks import SubmitError, user_name
from potamos.slurm.client import NoSlurm, SlurmError
from potamos.slurm.job import Container, Job
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.submit import check_dependency, command, job_of, resubmit, submit

RECIPE = "name: trial\ntrain: {steps: 12}\n"


@dataclass
class Slurm:
    """Commands in a folder: `calls` is what they were told, `says` changes what one does."""

    folder: Path

    def says(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\0" "${{0##*/}}" "$@" $\'\\n\' >>"{self.folder}/calls"\n{body}\n')
        path.chmod(0o755)

    def queue(self, *entries: tuple[str, str, Path]) -> None:
        """(id, state, folder) of what squeue tells, whatever it is asked."""
        rows = (
            client.SEPARATOR.join(
                (job, job.partition("_")[0], state, "Priority", "", "1:00", "gpu", "N/A", "me", "x", str(at))
            )
            for job, state, at in entries
        )
        (self.folder / "queue.txt").write_text("".join(row + "\n" for row in rows))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        lines = path.read_text().split("\0\n\0")[:-1] if path.exists() else []
        return [line.split("\0") for line in lines]

    def of(self, name: str) -> list[list[str]]:
        return [words[1:] for words in self.calls if words[0] == name]


SBATCH = """
for word in "$@"; do [ "$word" = --test-only ] && { echo "sbatch: Job 7 to start" >&2; exit 0; }; done
count=$(($(cat "$0.count" 2>/dev/null || echo 11) + 1)); echo $count >"$0.count"; echo "$count;cluster"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    fake = Slurm(tmp_path / "bin")
    fake.says("sbatch", SBATCH)
    fake.says("squeue", 'cat "${0%/*}/queue.txt"')
    fake.says("scancel", "")
    fake.says("scontrol", "echo JobId=7 JobState=PENDING")
    fake.queue()
    return fake


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "take_snapshot", lambda code: (code / "potamos").mkdir(parents=True, exist_ok=True))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = tmp_path / "runs" / "it's a $(trial)"
    return Job(name="trial", folder=folder, runs=(folder,))


@pytest.fixture
def seeds(tmp_path: Path) -> Job:
    folder = tmp_path / "runs" / "seeds"
    return Job(name="s", folder=folder, runs=(folder / "seed-3", folder / "seed-8"), tasks=(3, 8), array="3,8%1")


def asked(folder: Path) -> dict[str, object]:
    return json.loads((folder / "job.json").read_text())


# --- what is queued -------------------------------------------------------------------------------------------------


def test_a_job_is_tested_and_queued(slurm: Slurm, job: Job):
    found = submit(job, [RECIPE], "torch: 2\n")
    assert found.ids == ("12",)
    start = ["--parsable", f"--chdir={job.folder}"]
    assert slurm.of("sbatch") == [
        [*start, "--test-only", f"{job.folder}/submit.sbatch"],
        [*start, f"{job.folder}/submit.sbatch"],
    ]
    assert jobs_of(job.folder) == ["12"]
    told = asked(job.folder)
    assert told["ids"] == ["12"]
    assert told["command"] == ["sbatch", *start, f"{job.folder}/submit.sbatch"]
    assert job_of(told) == job


def test_the_users_variables_do_not_overrule_the_script(slurm: Slurm, job: Job, monkeypatch: pytest.MonkeyPatch):
    """sbatch lets SBATCH_PARTITION win over the script, and one called inside a job inherits that job's."""
    monkeypatch.setenv("SBATCH_PARTITION", "elsewhere")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    slurm.says("sbatch", f'env >"{slurm.folder}/env"\n{SBATCH}')
    submit(job, [RECIPE], "")
    seen = (slurm.folder / "env").read_text()
    assert "SBATCH_" not in seen
    assert "SLURM_JOB_ID" not in seen


def test_a_chain_waits_for_each_other_whatever_the_end(slurm: Slurm, job: Job):
    found = submit(replace(job, requeue=False), [RECIPE], "", after="7", chain=3)
    assert found.ids == ("12", "13", "14")
    dependencies = [[word for word in words if word.startswith("--d")] for words in slurm.of("sbatch")]
    first = ["--dependency=afterok:7"]
    assert dependencies == [first, first, ["--dependency=afterany:12"], ["--dependency=afterany:13"]]
    assert all("--kill-on-invalid-dep=yes" in words for words in slurm.of("sbatch"))
    assert jobs_of(job.folder) == ["12", "13", "14"]


def test_a_chain_is_queued_whole_or_not_at_all(slurm: Slurm, job: Job):
    slurm.says("sbatch", f'[ -e "$0.count" ] && {{ echo "sbatch: error: QOSMaxSubmitJob" >&2; exit 1; }}\n{SBATCH}')
    with pytest.raises(SlurmError, match="QOSMaxSubmitJob"):
        submit(job, [RECIPE], "", chain=2)
    assert slurm.of("scancel") == [["12"]]
    assert jobs_of(job.folder) == []
    assert not (job.folder / "job.json").exists()


def test_an_array_knows_its_runs(slurm: Slurm, seeds: Job):
    submit(seeds, [RECIPE, RECIPE], "")
    assert [jobs_of(run) for run in seeds.runs] == [["12_3"], ["12_8"]]
    assert all(job_of(asked(place)) == seeds for place in (seeds.folder, *seeds.runs))
    assert not any(word.startswith("--array") for words in slurm.of("sbatch") for word in words), "the script says it"


@pytest.mark.parametrize("after", ["12", "12_3"])
def test_dependencies_are_numbers_of_jobs(after: str):
    check_dependency(after)
    check_dependency(None)


@pytest.mark.parametrize("after", ["", "0", "x", "12:13", "12,13", "12 --hold", "$(id)", "١٢"])
def test_what_is_no_dependency(after: str):
    with pytest.raises(SubmitError, match=r"--after: .* is no job; give the number"):
        check_dependency(after)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_without_slurm_nothing_is_written(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSlurm, match=r"no Slurm here: `squeue` is not on PATH.*--dry-run"):
        submit(job, [RECIPE], "")
    assert not (job.folder / "submit.sbatch").exists()


def test_what_the_controller_refuses_is_not_queued(slurm: Slurm, job: Job):
    slurm.says("sbatch", 'echo "allocation failure: Invalid account or account/partition combination" >&2; exit 1')
    with pytest.raises(SlurmError, match="`sbatch` says: allocation failure: Invalid account"):
        submit(job, [RECIPE], "")
    assert len(slurm.of("sbatch")) == 1
    assert jobs_of(job.folder) == []


def test_a_second_submission_is_refused_with_the_first_ones_number(slurm: Slurm, job: Job):
    submit(job, [RECIPE], "")
    slurm.queue(("12", "PENDING", job.folder))
    with pytest.raises(SubmitError, match=r"has job 12 already \(PENDING, Priority\).*potamos cancel '/"):
        submit(job, [RECIPE], "")
    assert slurm.of("squeue")[-1][-2:] == ["--jobs", "12"]
    slurm.queue(("12", "PENDING", Path("/elsewhere")))  # a stranger's, of the same number
    assert submit(job, [RECIPE], "").ids == ("13",)


def test_an_array_is_taken_while_one_of_its_tasks_is(slurm: Slurm, seeds: Job):
    submit(seeds, [RECIPE] * 2, "")
    slurm.queue(("12_8", "RUNNING", seeds.folder))
    with pytest.raises(SubmitError, match="has job 12_8 already"):
        submit(seeds, [RECIPE] * 2, "")


def test_a_second_array_leaves_the_first_ones_script_alone(slurm: Slurm, seeds: Job):
    submit(seeds, [RECIPE] * 2, "")
    before = (seeds.folder / "submit.sbatch").read_text()
    more = replace(seeds, runs=(seeds.folder / "seed-9",), tasks=(9,), array="9")
    slurm.queue(("12_8", "RUNNING", seeds.folder))  # no task of the new array
    with pytest.raises(SubmitError, match="has job 12_8 already"):
        submit(more, [RECIPE], "")
    slurm.queue()
    with pytest.raises(SubmitError, match=r"holds seed-3, seed-8 of another array.*--run.*potamos requeue .*seed-3"):
        submit(more, [RECIPE], "")
    assert (seeds.folder / "submit.sbatch").read_text() == before
    assert not more.runs[0].exists()
    wider = replace(seeds, runs=(*seeds.runs, seeds.folder / "seed-9"), tasks=(3, 8, 9), array="3,8,9")
    assert submit(wider, [RECIPE] * 3, "").ids == ("13",)


def test_a_task_goes_on_beside_the_others(slurm: Slurm, seeds: Job):
    submit(seeds, [RECIPE] * 2, "")
    slurm.queue(("12_8", "RUNNING", seeds.folder))
    assert resubmit(seeds.runs[0]) == ["13"]
    slurm.queue(("99_3", "RUNNING", seeds.folder))  # of which nothing was written down
    with pytest.raises(SubmitError, match="has job 99_3 already"):
        resubmit(seeds.runs[0])


def test_a_job_that_nobody_wrote_down_is_found_by_its_folder(slurm: Slurm, job: Job):
    """The command that queued it was killed before it could."""
    slurm.queue(("77", "PENDING", Path("/elsewhere")), ("99", "RUNNING", job.folder))
    with pytest.raises(SubmitError, match="has job 99 already"):
        submit(job, [RECIPE], "")
    assert ["--user", user_name()] == slurm.of("squeue")[-1][-2:]


def test_two_submissions_at_once(slurm: Slurm, job: Job):
    job.folder.mkdir(parents=True)
    lock = job.folder / prepare.SUBMIT_LOCK
    program = (
        "import fcntl, sys\nf = open(sys.argv[1], 'a')\nfcntl.lockf(f, fcntl.LOCK_EX)\nprint(1, flush=True)\ninput()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(SubmitError, match="is being submitted by another command"):
            submit(job, [RECIPE], "")
        assert slurm.of("sbatch") == []
    finally:
        other.communicate("\n", timeout=10)
    submit(job, [RECIPE], "")
    with open(lock, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of


def test_a_finished_run_is_refused_until_more_is_asked_for(slurm: Slurm, job: Job):
    job.folder.mkdir(parents=True)
    (job.folder / "recipe.yaml").write_text(RECIPE)
    (job.folder / "done.json").write_text('{"step": 12}')
    with pytest.raises(SubmitError, match=r"is finished; raise train\.steps"):
        submit(job, [RECIPE], "")
    assert submit(job, [RECIPE.replace("12", "24")], "").ids == ("12",)


def test_an_array_is_finished_when_all_its_runs_are(slurm: Slurm, seeds: Job):
    prepare.prepare(seeds, [RECIPE] * 2, "")
    (seeds.runs[0] / "done.json").write_text('{"step": 12}')
    submit(seeds, [RECIPE] * 2, "")
    (seeds.runs[1] / "done.json").write_text('{"step": 12}')
    with pytest.raises(SubmitError, match="is finished"):
        submit(seeds, [RECIPE] * 2, "")


def test_submitting_takes_a_cancelled_mark_away_unless_it_fails(slurm: Slurm, job: Job):
    job.folder.mkdir(parents=True)
    (job.folder / "recipe.yaml").write_text(RECIPE)
    mark = RunFolder(job.folder).cancelled
    mark.write_text("by me")
    slurm.says("sbatch", f'case "$*" in *--test-only*) ;; *) exit 1 ;; esac\n{SBATCH}')
    with pytest.raises(SlurmError):
        submit(job, [RECIPE], "")
    assert mark.read_text() == "by me"
    slurm.says("sbatch", SBATCH)
    submit(job, [RECIPE], "")
    assert not mark.exists()


# --- once more ------------------------------------------------------------------------------------------------------


def test_a_run_is_submitted_again_as_it_was(slurm: Slurm, job: Job):
    container = Container("apptainer", "/a b.sif", mounts=("/data",), arguments=("--cleanenv",))
    job = replace(job, requeue=False, container=container, environment={"A": "b c"}, prologue=("module load x",))
    submit(job, [RECIPE], "", after="7", chain=2)
    text = (job.folder / "submit.sbatch").read_text()
    assert resubmit(job.folder) == ["14", "15"]
    assert not any("afterok" in word for word in slurm.of("sbatch")[-2]), "what it waited for then is past"
    assert (job.folder / "submit.sbatch").read_text() == text
    assert jobs_of(job.folder) == ["12", "13", "14", "15"]
    assert job_of(asked(job.folder)) == job
    slurm.queue(("14", "RUNNING", job.folder))
    with pytest.raises(SubmitError, match="has job 14 already"):
        resubmit(job.folder)


def test_one_run_of_an_array_is_submitted_again_alone(slurm: Slurm, seeds: Job, monkeypatch: pytest.MonkeyPatch):
    submit(seeds, [RECIPE] * 2, "")
    monkeypatch.chdir(seeds.folder)
    assert resubmit("seed-8") == ["13"]
    assert slurm.of("sbatch")[-1] == [
        "--parsable", f"--chdir={seeds.folder}", "--array=8", f"{seeds.folder}/submit.sbatch",
    ]  # fmt: skip
    assert jobs_of(seeds.runs[1]) == ["12_8", "13_8"]
    assert jobs_of(seeds.runs[0]) == ["12_3"]
    assert asked(seeds.folder)["ids"] == ["12"]
    assert job_of(asked(seeds.runs[1])) == seeds, "so that it can be submitted a third time"


def test_a_run_that_was_moved_needs_another_script(slurm: Slurm, job: Job, seeds: Job):
    submit(job, [RECIPE], "")
    moved = job.folder.rename(job.folder.with_name("moved"))
    with pytest.raises(
        SubmitError, match=r"moved was submitted as .*trial\).*potamos submit .*moved/recipe.yaml --run"
    ):
        resubmit(moved)
    assert len(slurm.of("sbatch")) == 2
    assert not job.folder.exists()


def test_a_job_that_cannot_be_written_down_is_taken_back(slurm: Slurm, job: Job, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("potamos.slurm.submit.write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        submit(job, [RECIPE], "")
    assert slurm.of("scancel") == [["12"]]
    assert jobs_of(job.folder) == []


@pytest.mark.parametrize("content", [None, "torn {", "[]", '{"job": {}}', '{"job": {"name": "a b"}}'])
def test_what_was_never_submitted(slurm: Slurm, tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "job.json").write_text(content)
    with pytest.raises(SubmitError, match="was never submitted"):
        resubmit(tmp_path)


def test_commands_name_whole_paths(job: Job):
    words = command(job)
    assert words[0] == "sbatch"
    assert os.path.isabs(words[-1])
    assert words[-1] == str(RunFolder(job.folder).script)


def NASTY() -> list[str]:
    return ["a b", "it's", '"q"', "$(touch pwned)", "`touch pwned`", "a;touch pwned", "&|*?"]


@pytest.mark.parametrize("name", NASTY())
def test_names_with_spaces_and_quotes_reach_sbatch_as_they_are(slurm: Slurm, tmp_path: Path, name: str):
    folder = tmp_path / "runs" / name
    submit(Job(name="trial", folder=folder, runs=(folder,)), [RECIPE], "")
    assert slurm.of("sbatch")[-1] == ["--parsable", f"--chdir={folder}", f"{folder}/submit.sbatch"]
    assert not list(tmp_path.rglob("pwned"))
