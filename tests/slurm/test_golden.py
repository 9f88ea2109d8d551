"""`potamos submit RECIPE --dry-run` for every packaged recipe, as it was last looked at.

The part that is the same for every job is slurm/body.sh itself, and is told by one line. To write the files anew:

    POTAMOS_WRITE_GOLDEN=1 pytest tests/slurm/test_golden.py

and read what `git diff tests/slurm/golden` says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from potamos.pretrain import submission
from potamos.pretrain.cli import app
from potamos.pretrain.config import available
from potamos.slurm.script import BODY

GOLDEN = Path(__file__).resolve().parent / "golden"
WRITE = "POTAMOS_WRITE_GOLDEN"
SAME = "# --- slurm/body.sh follows, as it is ---\n"


@pytest.fixture(autouse=True)
def _bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Slurm, no site file, an empty folder to stand in."""
    for name in ("PATH", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "POTAMOS_SITE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def dry_run(*arguments: str) -> tuple[str, str]:
    """Standard output, with what depends on this machine replaced, and standard error."""
    done = CliRunner().invoke(app, ["submit", *arguments, "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert BODY.read_text() in done.stdout, "the script that was printed does not hold the body as it is"
    text = done.stdout.replace(BODY.read_text(), SAME)
    return text.replace(os.getcwd(), "/HERE").replace(sys.executable, "/PYTHON"), done.stderr


@pytest.mark.parametrize("recipe", available())
def test_the_script_of_every_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch):
    forecast = submission.Forecast("h100", 1.0, 10**9, 10**9)  # the plan is tested elsewhere, and writes nothing here
    monkeypatch.setattr(submission, "foresee", lambda *_: forecast)
    found, _ = dry_run(recipe)
    assert os.listdir() == [], "a dry run wrote something"
    place = GOLDEN / f"{recipe}.sbatch"
    if os.environ.get(WRITE) == "1":
        GOLDEN.mkdir(exist_ok=True)
        place.write_text(found, encoding="utf-8")
    known = place.read_text(encoding="utf-8") if place.exists() else "(no such file)"
    assert found == known, f"{place.name} differs. If that is meant: {WRITE}=1 pytest tests/slurm/test_golden.py"
    checked = subprocess.run(["/bin/bash", "-n"], input=found, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_there_is_no_golden_file_without_a_recipe():
    assert {path.stem for path in GOLDEN.glob("*.sbatch")} == set(available())


def test_a_dry_run_tells_what_it_expects_beside_the_script():
    """The real plan, on one of the production recipes."""
    out, err = dry_run("h3_hybrid_1.3b", "--nodes", "4")
    assert "#SBATCH --nodes=4\n" in out
    assert "plan: " in err
    assert "cost: at most 1,536 GPU-hours" in err  # 4 x 8 GPUs x 48 hours
    assert "plan: " not in out
    assert out.endswith(
        "# sbatch --parsable --chdir=/HERE/runs/h3_hybrid_1.3b /HERE/runs/h3_hybrid_1.3b/submit.sbatch\n"
    )
