"""No value of a recipe, a site file or a folder's name is ever read by a shell as anything but itself.

The script that a submission would queue is run by bash, on a machine whose only commands are stand-ins and the few
tools that the script uses. One of them, `pwned`, is what every hostile value tries to start.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from potamos.pretrain.config import RecipeError, load_recipe, parse_recipe
from potamos.pretrain.job_draft import absolute, draft, texts, with_options
from potamos.slurm.checks import SubmitError, check_names
from potamos.slurm.job import Job, JobError
from potamos.slurm.script import header, script
from potamos.slurm.site import Site, SiteContainer, read_site

TOOLS = ("paste", "sed", "head", "date", "mkdir", "hostname", "tee", "env", "sleep", "dirname", "basename", "cat", "mv")
STANDINS = {
    "pwned": 'echo "$@" >>"$RECORD/pwned"',
    "scontrol": 'case "$*" in *hostnames*) echo n0 ;; *node*) echo "NodeName=n0 NodeAddr=127.0.0.1 State=UP" ;;'
    ' "show job"*) echo "JobId=12 JobState=RUNNING" ;; ping) echo UP ;; esac',
    "srun": 'printf "%s\\0" "$@" >"$RECORD/srun"; env -0 >"$RECORD/env"; printf "%s\\0" "$PWD" >"$RECORD/pwd"',
}
PYTHON = 'case $4 in begin) echo 0 ;; end) echo done ;; esac; printf "%s\\0" "$PWD" >>"$RECORD/judged"'

HOSTILE = [
    "$(pwned 1)", "`pwned 2`", "'; pwned 3; '", '"; pwned 4; "', "; pwned 5", "| pwned 6", "&& pwned 7", "$((pwned))",
    "a b  c", "it's", "-rf", "--wrap=pwned", "*", "~", "#x", "${IFS}", "!!", "{a,b}", "é\u2028\x7f", "=", "$'\\x41'",
]  # fmt: skip
# Up to U+FFFF, beyond which JSON's escapes, by which the tests write values into YAML, are no escapes of YAML's.
TEXT = st.text(
    st.characters(max_codepoint=0xFFFF, exclude_categories=("Cs",), exclude_characters="\0\n"), min_size=1, max_size=24
)
WILD = st.one_of(TEXT, st.sampled_from(HOSTILE), st.tuples(TEXT, st.sampled_from(HOSTILE)).map("".join))
NAMES = WILD.map(lambda text: "".join(c for c in text if c.isprintable() and c not in "/%\\:")).filter(
    lambda text: text.strip(".") and len(text.encode()) < 200
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bin`, all that is on PATH, and `record`, where the stand-ins write."""
    folder = tmp_path_factory.mktemp("machine")
    for name in ("bin", "record"):
        (folder / name).mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (folder / "bin" / name).symlink_to(found)
    for name, body in STANDINS.items():
        write_command(folder / "bin" / name, body)
    return folder


def write_command(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run_script(text: str, machine: Path) -> dict[str, list[str]]:
    """What the stand-ins wrote down, in words, when bash ran a script as Slurm would."""
    record = machine / "record"
    for path in record.iterdir():
        path.unlink()
    place = machine / "submit.sbatch"
    place.write_text(text, encoding="utf-8")
    syntax = subprocess.run(["/bin/bash", "-n", str(place)], capture_output=True, text=True, check=False)
    assert (syntax.returncode, syntax.stderr) == (0, "")
    variables = {"PATH": str(machine / "bin"), "RECORD": str(record), "HOME": str(machine), "LC_ALL": "C.UTF-8"}
    variables |= {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n0", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(
        ["/bin/bash", str(place)], cwd=machine, env=variables, capture_output=True, text=True, timeout=60, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes().decode().split("\0")[:-1] for path in record.iterdir()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, python=NAMES, image=WILD, mount=NAMES, value=WILD, description=WILD)
@example("a b", "$(pwned)", "'; pwned '", "`pwned`", '"; pwned "', "$(pwned)")
def test_every_value_arrives_byte_for_byte(machine: Path, name, python, image, mount, value, description):
    folder = machine / "runs" / name
    shutil.rmtree(machine / "runs", ignore_errors=True)
    folder.mkdir(parents=True)
    interpreter = machine / "pythons" / python / "python"
    shutil.rmtree(machine / "pythons", ignore_errors=True)
    write_command(interpreter, PYTHON)
    site = Site(
        python=str(interpreter),
        prologue=(f"export FROM_SITE={shlex.quote(value)}", "true # a site's own lines run as they are"),
        environment={"WILD": value},
        container=SiteContainer("apptainer", mounts=(mount,), python=python),
    )
    wild = json.dumps(description)
    recipe = load_recipe("h3_hybrid_tiny", [f"description={wild}", f"tokenizer.path={json.dumps(name)}"])
    recipe = absolute(recipe, machine)
    recipe = recipe.model_copy(update={"slurm": recipe.slurm.model_copy(update={"container": image})})
    if any(mark in str(path) for path in (folder, machine / name) for mark in ",:"):
        with pytest.raises(SubmitError, match="cannot be mounted"):
            draft(recipe, site, folder)
        recipe = recipe.model_copy(update={"slurm": recipe.slurm.model_copy(update={"container": None})})
    if (asked := recipe.slurm.container) is not None and asked.startswith("/"):
        return  # an image that must exist
    job = draft(recipe, site, folder)
    found = run_script(script(job), machine)
    assert "pwned" not in found
    assert found["pwd"] == [str(folder)]
    assert set(found["judged"]) == {str(folder)}
    seen = {name: text for name, _, text in (entry.partition("=") for entry in found["env"])}
    assert seen["WILD"] == seen["FROM_SITE"] == value
    assert seen["PYTHONPATH"] == f"{folder}/code"
    ranks = ["-P", "-m", "potamos.pretrain.cli", "train", "recipe.yaml", "--run", "."]
    assert found["srun"][-7:] == ranks
    if job.container is None:
        assert found["srun"][-8] == str(interpreter)
    else:
        mounts = [str(folder), mount, *job.container.mounts[1:]]
        binds = [word for each in dict.fromkeys(mounts) for word in ("--bind", each)]
        at = found["srun"].index("apptainer")
        assert found["srun"][at : at + 3 + len(binds)] == ["apptainer", "exec", *binds, image]
        assert found["srun"][-8] == python


@settings(max_examples=25, deadline=None)
@given(text=WILD)
def test_what_a_recipe_says_of_itself_stays_in_its_file(text: str):
    recipe = load_recipe("h3_hybrid_tiny", [f"description={json.dumps(text)}", f"tokenizer.path={json.dumps(text)}"])
    (written,) = texts(recipe, ())
    assert parse_recipe(written) == recipe
    job = draft(recipe, Site(), Path("/shared/run"))
    assert script(job) == script(draft(load_recipe("h3_hybrid_tiny"), Site(), Path("/shared/run")))


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(["time", "memory", "partition", "account", "qos", "constraint", "reservation", "exclude"]),
       text=st.one_of(WILD, st.text("gpu1-0:[]|&,@;$` '\"", max_size=8)))  # fmt: skip
def test_what_reaches_the_scheduler_is_one_plain_word(key: str, text: str):
    """The values that do reach the script: refused, or on their line as they are, and nothing else changes."""
    try:
        recipe = with_options("h3_hybrid_tiny", [f"slurm.{key}={json.dumps(text)}"], {})
        lines, refusal = header(draft(recipe, Site(), Path("/shared/run"))), None
    except (JobError, RecipeError) as error:
        lines, refusal = [], str(error)
    if refusal is not None:
        assert f"slurm.{key}: " in refusal
        return
    plain = header(draft(load_recipe("h3_hybrid_tiny"), Site(), Path("/shared/run")))
    (added,) = [line for line in lines if line not in plain]
    option = {"memory": "mem"}.get(key, key)
    assert added == f"#SBATCH --{option}={text}"
    assert [line for line in lines if line != added] == plain
    assert not set(text) & set(" \t'\"\\`$;#<>~!{}")


@settings(max_examples=25, deadline=None)
@given(lines=st.lists(WILD.filter(str.strip), max_size=3), value=WILD)
def test_a_site_file_is_taken_as_it_is_written(lines: list[str], value: str):
    """Its own lines are the one thing that a shell reads: exactly they, in their order, before everything else."""
    text = json.dumps({"prologue": lines, "environment": {"A": value}, "python": value})
    site = read_site(text, Path("site.yaml"))
    assert (list(site.prologue), site.environment, site.python) == (lines, {"A": value}, value)
    job = draft(load_recipe("h3_hybrid_tiny"), site, Path("/shared/run"))
    written = script(job)
    assert "\n".join(["", *lines, ""]) in written
    bare = script(
        draft(load_recipe("h3_hybrid_tiny"), Site(environment={"A": value}, python=value), Path("/shared/run"))
    )
    assert set(written.split("\n")) - set(bare.split("\n")) <= {*lines, "# The site's own lines."}


@given(name=WILD)
def test_folders_that_no_script_can_name_are_refused(name: str):
    folder = Path("/shared") / ("x" + name)
    bad = any(ord(c) < 32 or ord(c) == 127 or c in "%\\:" for c in name)
    with pytest.raises((JobError, SubmitError)) if bad else contextlib.nullcontext():
        job = Job(name="x", folder=folder, runs=(folder,))
        check_names(job)
        assert not any(ord(c) < 32 for c in script(job).replace("\n", "").replace("\t", ""))


def test_the_stand_ins_would_notice(machine: Path):
    """A planted hole: the same script with a value that bash does read."""
    folder = machine / "runs" / "x"
    folder.mkdir(parents=True, exist_ok=True)
    write_command(machine / "pythons" / "p" / "python", PYTHON)
    job = draft(load_recipe("h3_hybrid_tiny"), Site(python=f"{machine}/pythons/p/python"), folder)
    assert "pwned" not in run_script(script(job), machine)
    holed = script(job).replace("CRASHES=3", "CRASHES=$(pwned hole)")
    assert "pwned" in run_script(holed, machine)
