"""The names of everything in a run folder, in one place. Imports nothing heavy: status commands read it too."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run. Creates nothing; serves as a path itself, so that functions take either."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def of(cls, run: str | os.PathLike[str]) -> RunFolder:
        return run if isinstance(run, RunFolder) else cls(Path(run))

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def code(self) -> Path:
        """A copy of the program, where the run was submitted to a cluster."""
        return self.path / "code"

    @property
    def environment(self) -> Path:
        return self.path / "environment.txt"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """One JSON line a record; appended to by every attempt."""
        return self.logs / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def notes(self) -> Path:
        """What an attempt said beside its figures: changes on resume, skipped steps."""
        return self.logs / "notes.log"

    @property
    def begun(self) -> bool:
        """Whether a run was prepared or started here."""
        return any(
            path.exists() for path in (self.recipe, self.checkpoints, self.state, self.logs, self.lock, self.code)
        )

    @property
    def lock(self) -> Path:
        """Held by the process that trains here."""
        return self.path / "lock"

    @property
    def state(self) -> Path:
        """Where the run stands, rewritten atomically by rank 0."""
        return self.path / "state.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def done(self) -> Path:
        """Present when every step was trained."""
        return self.path / "done.json"

    def stop(self, attempt: int) -> Path:
        """Present when this attempt stopped on request, after saving."""
        return self.path / f"stop.{attempt}"

    def busy(self, attempt: int) -> Path:
        """Present when this attempt of a cluster's job did not train, because another process holds the lock."""
        return self.path / f"busy.{attempt}"

    @property
    def attempts(self) -> Path:
        """One JSON line a begin and an end of an attempt that a cluster's job made; see `attempt.py`."""
        return self.path / "attempts.jsonl"

    @property
    def cancelled(self) -> Path:
        """Present when someone cancelled the run: no job goes on with it until it is requeued by hand."""
        return self.path / "cancelled"

    @property
    def job(self) -> Path:
        """What was asked of the cluster."""
        return self.path / "job.json"

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.path / "submit.sbatch"
