"""A submission that is refused, or killed, changes nothing: every file is compared, and every moment is killed in."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from potamos.files import write_atomically
from potamos.slurm import attempt, prepare, snapshot, submit, undo
from potamos.slurm.client import SlurmError
from potamos.slurm.job import Job
from potamos.slurm.prepare import SUBMIT_LOCK
from potamos.slurm.run_folder import RunFolder

OLD, NEW = "name: a\ntrain: {steps: 12}\n", "name: a\ntrain: {steps: 24}\n"
CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "link")


class Sbatch:
    """In place of Slurm's commands: ``refuses`` that what is asked, ``kills`` the submission that asks it."""

    def __init__(self) -> None:
        self.refuses = self.kills = ""
        self.count = 0

    def run(self, *argv: str, **_: object) -> str:
        asked = "test" if "--test-only" in argv else argv[0]
        if asked == self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if asked == self.refuses:
            raise SlurmError("`sbatch` says: no")
        self.count += 1
        return f"{self.count}\n"


@pytest.fixture
def sbatch(monkeypatch: pytest.MonkeyPatch) -> Sbatch:
    fake = Sbatch()
    monkeypatch.setattr("potamos.slurm.client.run", fake.run)
    monkeypatch.setattr("potamos.slurm.client.queue", lambda *_, **__: {})
    return fake


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the program that is copied."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "x.py").write_text("old")
    monkeypatch.setattr(prepare, "take_snapshot", lambda code: snapshot.take_snapshot(code, package))
    monkeypatch.setattr(snapshot, "_git", lambda *_, **__: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # killed is the process, not the machine
    return package / "x.py"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = tmp_path / "runs" / "a b"
    return Job(name="a", folder=folder, runs=(folder,))


@pytest.fixture
def seeds(tmp_path: Path) -> Job:
    folder = tmp_path / "runs" / "seeds"
    return Job(name="s", folder=folder, runs=(folder / "seed-3", folder / "seed-8"), tasks=(3, 8), array="3,8")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, apart from the submission's lock, and what nobody takes for a file of a run."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    hidden = {name for name in found if any(part.endswith(".tmp") for part in Path(name).parts)}
    names = found.keys() - hidden - {SUBMIT_LOCK}
    return {name: None if found[name].is_dir() else found[name].read_bytes() for name in names}


def began(job: Job) -> dict[str, bytes | None]:
    """Each run was submitted, saved something, and was cancelled; all that is there then."""
    submit.submit(job, [OLD] * len(job.runs), "torch: 1\n")
    for run in map(RunFolder, job.runs):
        attempt.begin(run, "1", 0, "n0", 3)
        (run.logs / "attempt-0.rank-0.txt").write_text("step 3\n")
        (run.checkpoints / "step-00000003").mkdir(parents=True)
        run.cancelled.write_text("by me")
    return tree(job.folder)


def again(job: Job, program: Path) -> None:
    program.write_text("new")
    submit.submit(job, [NEW] * len(job.runs), "torch: 2\n", refresh_code=True)


def in_a_child(action: Callable[[], object]) -> bool:
    """Whether it got to its end there."""
    child = os.fork()
    if child == 0:
        status = 9
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def killed_at(moment: int, action: Callable[[], object]) -> bool:
    """Do it in a child that is killed before its ``moment``-th change of names; whether that came too late."""

    def cut_short() -> None:
        count = 0

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def counts(*arguments: object, **named: object) -> object:
                nonlocal count
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **named)

            return counts

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        action()

    return in_a_child(cut_short)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refuses", ["test", "sbatch"])
@pytest.mark.parametrize("kind", ["job", "seeds"])
def test_what_is_refused_changes_nothing(kind: str, refuses: str, request, sbatch: Sbatch, program: Path):
    job = request.getfixturevalue(kind)
    before = began(job)
    sbatch.refuses = refuses
    with pytest.raises(SlurmError, match="no"):
        again(job, program)
    assert tree(job.folder) == before
    sbatch.refuses = ""
    again(job, program)
    changed = {name for name, content in tree(job.folder).items() if content != before.get(name)}
    own = {str((run / name).relative_to(job.folder)) for run in job.runs for name in ("recipe.yaml", "environment.txt")}
    assert {*own, "code/potamos/x.py", "job.json"} <= changed, "there was nothing to take back"
    assert not list(job.folder.rglob(".*"))


@pytest.mark.parametrize("kind", ["job", "seeds"])
def test_a_refused_first_submission_leaves_nothing(kind: str, request, sbatch: Sbatch, program: Path):
    job = request.getfixturevalue(kind)
    sbatch.refuses = "sbatch"
    with pytest.raises(SlurmError):
        again(job, program)
    assert tree(job.folder) == {}
    assert not job.folder.exists()
    job.folder.joinpath("code").mkdir(parents=True)
    job.folder.joinpath("logs").mkdir()
    job.folder.joinpath("logs", "mine.txt").write_text("kept")
    with pytest.raises(SlurmError):
        again(job, program)
    assert set(tree(job.folder)) == {"code", "logs", "logs/mine.txt"}


def test_a_refused_resubmission_keeps_the_mark_of_a_cancelled_run(job: Job, sbatch: Sbatch, program: Path):
    before = began(job)
    sbatch.refuses = "sbatch"
    with pytest.raises(SlurmError):
        submit.resubmit(job.folder)
    assert tree(job.folder) == before


def test_the_program_that_is_put_back_is_no_copy_that_later_ones_reach(job: Job, sbatch: Sbatch, program: Path):
    before = began(job)
    sbatch.refuses = "test"
    for text in ("new", "newer"):
        program.write_text(text)
        with pytest.raises(SlurmError):
            again(job, program)
    assert tree(job.folder) == before


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", ["test", "sbatch"])
@pytest.mark.parametrize("kind", ["job", "seeds"])
def test_what_a_killed_submission_changed_is_put_back_by_the_next(
    kind: str, kills: str, request, sbatch: Sbatch, program: Path
):
    job = request.getfixturevalue(kind)
    before = began(job)
    sbatch.kills = kills
    assert not in_a_child(lambda: again(job, program))
    assert tree(job.folder) != before
    sbatch.kills, sbatch.refuses = "", "test"
    with pytest.raises(SlurmError):
        again(job, program)
    assert tree(job.folder) == before


def test_a_submission_may_be_killed_at_any_moment(job: Job, sbatch: Sbatch, program: Path):
    """Also while it takes back what was refused. Every kill leaves what the next one puts back, or nothing to."""
    before = began(job)
    moments = 0
    sbatch.refuses = "sbatch"

    def refused() -> None:
        with pytest.raises(SlurmError):
            again(job, program)

    while not killed_at(moments + 1, refused):
        moments += 1
        assert moments < 200
        undo.roll_back(job.folder)
        assert tree(job.folder) == before, f"killed before change {moments}"
    assert moments > 20
    assert tree(job.folder) == before


def test_what_is_killed_while_it_puts_back_is_put_back_by_the_next(job: Job, sbatch: Sbatch, program: Path):
    before = began(job)
    sbatch.kills = "sbatch"
    assert not in_a_child(lambda: again(job, program))
    moments = 0
    while not killed_at(moments + 1, lambda: undo.roll_back(job.folder)):
        moments += 1
        assert moments < 100
        undo.roll_back(job.folder)
        assert tree(job.folder) == before, f"killed before change {moments}"
        assert not in_a_child(lambda: again(job, program))
    assert moments > 5
    assert tree(job.folder) == before


def test_what_was_accepted_and_has_begun_is_not_put_back(job: Job, sbatch: Sbatch, program: Path):
    """The submission was killed before it could note that."""
    began(job)
    sbatch.kills = "sbatch"
    assert not in_a_child(lambda: again(job, program))
    assert attempt.main(["accepted", str(job.folder)]) == 0
    after = tree(job.folder)
    undo.roll_back(job.folder)
    assert tree(job.folder) == after
    assert after["recipe.yaml"] == NEW.encode()
    assert not list(job.folder.rglob(".*"))


@pytest.mark.parametrize("kind", ["job", "seeds"])
@pytest.mark.parametrize("where", ["accept", "_note"])
def test_what_was_accepted_and_written_down_is_not_put_back(
    kind: str, where: str, request, sbatch: Sbatch, program: Path, monkeypatch: pytest.MonkeyPatch
):
    """The submission was killed before it was done; the job waited, and was taken out of the queue."""
    job = request.getfixturevalue(kind)
    began(job)
    with monkeypatch.context() as patch:
        patch.setattr(undo if where == "accept" else submit, where, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert not in_a_child(lambda: again(job, program))
    sbatch.count = 4  # the child's
    assert (job.folder / ".undo").exists()
    after = tree(job.folder)
    for run in job.runs:
        (run / "cancelled").write_text("by me")
        submit.resubmit(run)
    for name in ("recipe.yaml", "environment.txt"):
        assert all((run / name).read_bytes() == after[str((run / name).relative_to(job.folder))] for run in job.runs)
    assert (job.runs[-1] / "recipe.yaml").read_text() == NEW
    assert (job.folder / "code/potamos/x.py").read_text() == "new"
    for number, run in enumerate(job.runs):
        suffixes = [f"_{task}" for task in job.tasks[number : number + 1]] or [""]
        # "2" and "4" are what the fake says to --test-only; each is written down once, in the order of the queue.
        jobs = attempt.jobs_of(run)
        assert jobs[:2] == [f"2{suffixes[0]}", f"4{suffixes[0]}"], jobs
        assert len(jobs) == 3
    with contextlib.suppress(SlurmError):
        again(job, program)
    assert not list(job.folder.rglob(".*")), "also the array's own folder is settled by its next submission"


def test_what_was_half_written_down_is_finished(
    seeds: Job, sbatch: Sbatch, program: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed between the first run's job.json and the second's."""
    began(seeds)

    def once(path: Path, content: bytes) -> None:
        write_atomically(path, content)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(submit, "write_atomically", once)
        assert not in_a_child(lambda: again(seeds, program))
    told = [(run / "job.json").read_bytes() for run in seeds.runs]
    assert told[0] != told[1]
    for folder in (*reversed(seeds.runs), seeds.folder):
        submit._settle(folder)
        assert (folder / "job.json").read_bytes() == told[0]
    assert [attempt.jobs_of(run) for run in seeds.runs] == [["2_3", "4_3"], ["2_8", "4_8"]]
    assert not list(seeds.folder.rglob(".*"))


def test_what_was_taken_back_after_it_was_written_down_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk was full before the last word: whenever that is cut short, all folders hear the same of it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folders, begun, moments, back = [tmp_path / "a", tmp_path / "b"], tmp_path / "begun", 0, 0

    def refused() -> None:
        with (
            contextlib.suppress(OSError),
            undo.unless_accepted({folder: ["job.json"] for folder in folders}) as pending,
        ):
            for folder in folders:
                (folder / "job.json").write_text(json.dumps({"submission": pending.token}))
            begun.touch()
            raise OSError(28, "No space left on device")

    def prepared() -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        begun.unlink(missing_ok=True)
        (folders[0] / "job.json").write_text('{"submission": "before"}')

    prepared()
    before = tree(tmp_path)
    while not killed_at(moments + 1, refused):
        moments += 1
        if begun.exists():
            begun.unlink()
            verdicts = {undo.settle(folder) is not None for folder in folders}
            assert len(verdicts) == 1, f"killed before change {moments}"
            if verdicts == {False}:
                assert tree(tmp_path) == before, f"killed before change {moments}"
                back += 1
        prepared()
    begun.unlink()
    assert back > 5
    assert tree(tmp_path) == before


def test_a_roll_back_that_fails_does_not_hide_the_refusal(
    job: Job, sbatch: Sbatch, program: Path, monkeypatch: pytest.MonkeyPatch
):
    before = began(job)
    sbatch.refuses = "sbatch"

    def full(folder: Path) -> None:
        if not (folder / ".undo").exists():
            return
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(undo, "roll_back", full)
        with pytest.raises(SlurmError, match="`sbatch` says: no"):
            again(job, program)
    with pytest.raises(SlurmError, match="no"):  # the next one puts back first
        again(job, program)
    assert tree(job.folder) == before


def test_what_killed_ones_left_goes(job: Job, sbatch: Sbatch, program: Path):
    began(job)
    for name in (".undo.new.77.tmp", ".undo.old.78.tmp", ".code.new.79.tmp"):
        (job.folder / name / "kept").mkdir(parents=True)
    (job.folder / ".job.json.80.tmp").write_text("{")
    (job.folder / ".state.json.81.tmp").write_text("{")  # a trainer's
    again(job, program)
    assert [path.name for path in job.folder.glob(".*")] == [".state.json.81.tmp"]


def test_a_run_that_goes_on_keeps_what_it_was_begun_with(job: Job, sbatch: Sbatch, program: Path):
    """Program and environment belong together; each attempt writes down its own."""
    began(job)
    program.write_text("new")
    submit.submit(job, [NEW], "torch: 2\n")
    assert (job.folder / "environment.txt").read_text() == "torch: 1\n"
    assert (job.folder / "code/potamos/x.py").read_text() == "old"


def test_leftovers_are_no_other_files(job: Job, sbatch: Sbatch, program: Path):
    sbatch.kills = "sbatch"
    assert not in_a_child(lambda: again(job, program))
    for name in ("recipe.yaml", "environment.txt", "submit.sbatch"):
        (job.folder / name).unlink()
    sbatch.kills = ""
    again(job, program)
    assert (job.folder / "recipe.yaml").read_text() == NEW
