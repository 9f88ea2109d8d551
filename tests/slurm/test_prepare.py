"""The folder that a job runs in: what is written, what is refused, and what is left alone."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from potamos.slurm import prepare as module
from potamos.slurm.job import Job
from potamos.slurm.prepare import PrepareError, begun, check_folder, is_done, prepare
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.script import script
from potamos.slurm.snapshot import SnapshotError

RECIPE = "name: trial\ntrain: {steps: 12}\n"


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The program is copied by a stand-in, which is what test_snapshot.py is for; the folders that it was told."""
    taken: list[Path] = []

    def take(code: Path) -> None:
        taken.append(code)
        (code / "potamos").mkdir(parents=True, exist_ok=True)
        (code / "COMMIT").write_text(f"commit{len(taken)}\n")
        (code / "dirty.diff").write_text("changed" if len(taken) > 1 else "")

    monkeypatch.setattr(module, "take_snapshot", take)
    return taken


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = tmp_path / "runs" / 'it\'s a "trial"'
    return Job(name="trial", folder=folder, runs=(folder,))


@pytest.fixture
def seeds(tmp_path: Path) -> Job:
    folder = tmp_path / "runs" / "seeds"
    runs = (folder / "seed-1", folder / "seed-2")
    return Job(name="seeds", folder=folder, runs=runs, tasks=(1, 2), array="1-2")


def files(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_run_folder(job: Job):
    prepared = prepare(job, [RECIPE], "torch: 2\n")
    assert files(job.folder) == {
        "recipe.yaml": RECIPE,
        "environment.txt": "torch: 2\n",
        "submit.sbatch": script(job),
        "code/COMMIT": "commit1\n",
        "code/dirty.diff": "",
    }
    assert (job.folder / "logs").is_dir(), "Slurm makes no folder for its log, and ends the job without one"
    assert (prepared.commit, prepared.modified, prepared.refreshed, prepared.continued) == (
        "commit1",
        False,
        True,
        False,
    )


def test_the_folder_of_an_array_is_no_run_itself(seeds: Job):
    prepare(seeds, [RECIPE, RECIPE.replace("12", "13")], "torch: 2\n")
    found = files(seeds.folder)
    assert found.keys() == {
        "submit.sbatch", "code/COMMIT", "code/dirty.diff", "seed-1/recipe.yaml", "seed-1/environment.txt",
        "seed-2/recipe.yaml", "seed-2/environment.txt",
    }  # fmt: skip
    assert found["seed-2/recipe.yaml"] == RECIPE.replace("12", "13")
    assert all((place / "logs").is_dir() for place in (seeds.folder, *seeds.runs))


def test_what_was_prepared_and_never_ran_is_prepared_anew(job: Job, copies: list[Path]):
    prepare(job, [RECIPE], "torch: 1\n")
    (job.folder / ".code.123.tmp").mkdir()  # a command that was killed left it
    again = prepare(replace(job, nodes=2), [RECIPE.replace("12", "24")], "torch: 2\n")
    assert again.refreshed
    assert again.modified
    assert len(copies) == 2
    found = files(job.folder)
    assert found["recipe.yaml"] == RECIPE.replace("12", "24")
    assert found["environment.txt"] == "torch: 2\n"
    assert "--nodes=2" in found["submit.sbatch"]


@pytest.mark.parametrize(
    "trace",
    ["state.json", "checkpoints/step-00000004/trainer.json", "attempts.jsonl", "done.json"],
)
def test_a_run_that_has_begun_keeps_its_code(job: Job, copies: list[Path], trace: str):
    prepare(job, [RECIPE], "torch: 1\n")
    (job.folder / trace).parent.mkdir(parents=True, exist_ok=True)
    record = {"event": "begin", "attempt": 0, "job": "1", "restart": 0, "nodes": "n0", "step": 0, "at": "now"}
    (job.folder / trace).write_text(json.dumps(record) + "\n")
    assert begun(RunFolder(job.folder))
    kept = prepare(job, [RECIPE.replace("12", "24")], "torch: 2\n")
    assert (kept.refreshed, kept.continued, kept.commit, len(copies)) == (False, True, "commit1", 1)
    assert files(job.folder)["recipe.yaml"] == RECIPE.replace("12", "24"), "more steps may be asked for"
    assert files(job.folder)["environment.txt"] == "torch: 1\n"
    fresh = prepare(job, [RECIPE], "torch: 2\n", refresh_code=True)
    assert (fresh.refreshed, fresh.commit, len(copies)) == (True, "commit2", 2)


def test_a_run_that_began_without_a_copy_gets_one(job: Job, copies: list[Path]):
    """Trained on a workstation first, then submitted."""
    job.folder.mkdir(parents=True)
    (job.folder / "state.json").write_text("{}")
    assert prepare(job, [RECIPE], "").refreshed
    assert copies == [job.folder / "code"]


def test_being_submitted_is_not_having_begun(job: Job):
    prepare(job, [RECIPE], "")
    (job.folder / "attempts.jsonl").write_text('{"event": "submitted", "jobs": ["12"]}\n')
    assert not begun(RunFolder(job.folder))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_refused(job: Job, seeds: Job):
    for each in (job, seeds):
        each.folder.mkdir(parents=True)
        (each.folder / "thesis.tex").write_text("years of work")
        with pytest.raises(PrepareError, match=r"holds other files and no runs?; name a new folder with --run"):
            prepare(each, [RECIPE] * len(each.runs), "")
        assert files(each.folder) == {"thesis.tex": "years of work"}


def test_an_array_does_not_go_into_a_run(seeds: Job, job: Job):
    prepare(job, [RECIPE], "")
    inside = replace(seeds, folder=job.folder, runs=(job.folder / "seed-1", job.folder / "seed-2"))
    with pytest.raises(PrepareError, match="holds a run of its own, and this is for several"):
        check_folder(inside)


def test_files_in_the_way(job: Job, seeds: Job):
    for each in (job, seeds):
        each.folder.parent.mkdir(exist_ok=True)
        each.folder.write_text("")
        with pytest.raises(PrepareError, match="is a file; name a folder"):
            check_folder(each)
    seeds.folder.unlink()
    seeds.folder.mkdir()
    (seeds.folder / "seed-2").write_text("")
    with pytest.raises(PrepareError, match=r"seed-2 is a file"):
        check_folder(seeds)


def test_nothing_partial_has_a_final_name(job: Job):
    """A full disk, by the limit on the size of a file: SIGXFSZ is ignored by Python, so writing fails with EFBIG."""
    prepare(job, [RECIPE], "")
    before = files(job.folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(RECIPE) + 10, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(27)):
            prepare(job, [RECIPE + "#" * 100], "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = files(job.folder)
    assert after.keys() == before.keys()
    assert after["recipe.yaml"] == RECIPE
    prepare(job, [RECIPE], "")


def test_a_failed_copy_writes_no_script(job: Job, monkeypatch: pytest.MonkeyPatch):
    def fail(_: Path) -> None:
        raise SnapshotError("no program")

    monkeypatch.setattr(module, "take_snapshot", fail)
    with pytest.raises(SnapshotError):
        prepare(job, [RECIPE], "")
    assert not (job.folder / "submit.sbatch").exists()


def test_done_is_measured_by_the_recipe_of_now(tmp_path: Path):
    run = RunFolder(tmp_path)
    assert not is_done(run, RECIPE)
    run.done.write_text("torn {")
    assert not is_done(run, RECIPE)
    for step, done in ((11, False), (12, True), (13, True)):
        run.done.write_text(json.dumps({"step": step}))
        assert is_done(run, RECIPE) == done
