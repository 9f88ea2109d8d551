"""Slurm's commands, in stand-ins that print what Slurm 22.05.8 printed."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potamos.slurm import client
from potamos.slurm.client import NoSlurm, SlurmError

JOB = (
    "JobId=4 ArrayJobId=2 ArrayTaskId=2 JobName=wrap UserId=ann(10) GroupId=ann(10) Account=(null) JobState=PENDING "
    "Reason=None Dependency=(null) Restarts=0 AllocNode:Sid=localhost:12691 ReqNodeList=(null) CPUs/Task=1 "
    "ReqB:S:C:T=0:0:*:* TRES=cpu=1,mem=100M,node=1,billing=1 NtasksPerN:B:S:C=0:0:*:* Command=/a b/c=d.sh "
    "WorkDir=/tmp/with space StdErr=/tmp/x.out Power= "
)
NODE = (
    "NodeName=n0 CPUTot=64 Gres=gpu:8 NodeAddr=10.0.0.1 OS=Linux 6.1 #1 SMP PREEMPT_DYNAMIC @0  RealMemory=64000 "
    "State=DOWN+DRAIN Partitions=main,urgent  CfgTRES=cpu=64,mem=62.50G AllocTRES= "
    "Reason=Not responding [slurm@2026-01-01T00:00:00]"
)
MAIN = (
    "PartitionName=main AllowGroups=ALL Default=YES DefaultTime=00:10:00 MaxNodes=2 MaxTime=UNLIMITED Nodes=n[0-3] "
    "State=UP TotalCPUs=256 TotalNodes=4 TRES=cpu=256,mem=250G,node=4"
)
URGENT = MAIN.replace("=main", "=urgent").replace("Default=YES", "Default=NO").replace("UNLIMITED", "1-12:00:00")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a command of this name on PATH, alone with the system's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name: str, body: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write


def printed(tmp_path: Path, name: str, text: str) -> str:
    path = tmp_path / f"{name}.txt"
    path.write_text(text)
    return f"cat '{path}'"


# --- records --------------------------------------------------------------------------------------------------------


def test_values_hold_spaces_and_equal_signs():
    job = client.fields(JOB)
    assert job["Command"] == "/a b/c=d.sh"
    assert job["WorkDir"] == "/tmp/with space"
    assert job["Power"] == ""
    assert job["TRES"] == "cpu=1,mem=100M,node=1,billing=1"
    assert job["ReqB:S:C:T"] == "0:0:*:*"
    assert job["CPUs/Task"] == "1"
    assert job["AllocNode:Sid"] == "localhost:12691"
    node = client.fields(NODE)
    assert node["OS"] == "Linux 6.1 #1 SMP PREEMPT_DYNAMIC @0"
    assert node["Partitions"] == "main,urgent"
    assert node["AllocTRES"] == ""
    assert node["Reason"].startswith("Not responding [slurm@")


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1))
def test_a_name_cannot_pretend_to_be_another_field(name: str):
    for forged in (name, f"{name} JobState=RUNNING", f"{name} UserId=root(0) GroupId=x JobState=DONE"):
        job = client.fields(JOB.replace("JobName=wrap", f"JobName={forged}"))
        assert (job["JobName"], job["JobState"], job["UserId"]) == (forged, "PENDING", "ann(10)")


def test_a_folder_cannot_pretend_to_be_another_field():
    assert client.fields(JOB.replace("with space", "x JobState=RUNNING JobId=1"))["JobState"] == "PENDING"


def test_show_reads_every_record_and_no_remark(command, tmp_path: Path):
    command("scontrol", printed(tmp_path, "nodes", f"{NODE}\n{NODE.replace('n0', 'n1')}\n"))
    assert [node["NodeName"] for node in client.show("node")] == ["n0", "n1"]
    command("scontrol", "echo No jobs in the system")
    assert client.show("job") == []


def test_show_passes_slurms_own_words(command):
    command("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    with pytest.raises(SlurmError, match="`scontrol` says: slurm_load_jobs error: Invalid job id specified"):
        client.show("job", "99")


# --- the queue ------------------------------------------------------------------------------------------------------


def row(*columns: str) -> str:
    return client.SEPARATOR.join(columns) + "\n"


QUEUE = row("2_3", "2", "PENDING", "JobArrayTaskLimit", "", "10:00", "main", "N/A", "ann", "wrap", "/tmp") + row(
    "7", "7", "RUNNING", "None", "n[0-1]", "1-00:00:09", "main", "2026-11-22T10:02:58", "ann", "a|b c=d", "/tmp/a b"
)


def test_the_queue_by_task(command, tmp_path: Path):
    command("squeue", printed(tmp_path, "queue", QUEUE))
    found = client.queue()
    waiting, running = found["2_3"], found["7"]
    assert (waiting.array, waiting.reason, waiting.nodes, waiting.start) == ("2", "JobArrayTaskLimit", "", "")
    assert (running.array, running.reason, running.nodes) == (None, "", "n[0-1]")
    assert (waiting.time_left, running.time_left) == (600, 86409)
    assert (running.name, running.folder) == ("a|b c=d", "/tmp/a b")


def test_the_queue_asks_for_the_jobs_named(command, tmp_path: Path):
    command("squeue", f'printf "%s\\n" "$@" >{tmp_path}/asked')
    assert client.queue(["7", "12"]) == {}
    asked = (tmp_path / "asked").read_text().split("\n")
    assert asked[asked.index("--jobs") + 1] == "12,7"
    assert "--array" in asked
    assert "--all" in asked
    command("squeue", "exit 1")
    assert client.queue([]) == {}, "of no jobs, nothing is asked: without --jobs, squeue would list everyone's"


def test_forgotten_jobs_are_in_no_queue(command):
    command("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert client.queue(["999"]) == {}


# --- partitions -----------------------------------------------------------------------------------------------------


def test_partitions_have_the_largest_of_their_nodes(command, tmp_path: Path):
    command("scontrol", printed(tmp_path, "partitions", f"{MAIN}\n{URGENT}\n"))
    command(
        "sinfo",
        printed(
            tmp_path,
            "nodes",
            row("main", "gpu:h100:8(S:0-1)", "64", "64000")
            + row("main", "(null)", "128+", "512000")
            + row("urgent", "gpu:a100:2,gpu:v100:2", "32", "1000"),
        ),
    )
    main, urgent = client.partitions()["main"], client.partitions()["urgent"]
    assert (main.gpus_per_node, main.cpus, main.memory, main.nodes, main.max_nodes) == (8, 128, 512000, 4, 2)
    assert (main.max_time, main.default_time, main.default, main.state) == (None, 600, True, "UP")
    assert (main.gpu, urgent.gpu) == ("h100", "a100")
    assert (urgent.gpus_per_node, urgent.max_time, urgent.default) == (4, 36 * 3600, False)


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu:8", 8),
        ("gpu:h100:8(S:0-1)", 8),
        ("gpu:a100:4(S:0,2),gpu:v100:2(S:1)", 6),
        ("shard:64,gpu:4", 4),
        ("(null)", 0),
        ("", 0),
        ("gpumem:80", 0),
        ("gpu:gtx1080:2,nvme:1", 2),
    ],
)
def test_gpus_of_every_type_are_counted(gres: str, count: int):
    assert client.gpus(gres) == count


# --- running --------------------------------------------------------------------------------------------------------


def test_without_slurm_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (client.queue, client.partitions, client.alive, lambda: client.run("sbatch", "x")):
        with pytest.raises(NoSlurm, match=r"is not on PATH.*--dry-run"):
            call()


def test_a_silent_controller_is_given_up_on(command):
    command("squeue", "trap '' TERM INT; exec sleep 60")
    began = time.monotonic()
    with pytest.raises(SlurmError, match=r"`squeue` did not answer within 0.3 s.*scontrol ping"):
        client.run("squeue", timeout=0.3)
    assert time.monotonic() - began < 5


def test_alive(command):
    command("scontrol", 'echo "Slurmctld(primary) at vm is DOWN"; exit 1')
    assert not client.alive()
    command("scontrol", 'echo "Slurmctld(primary) at a is DOWN"; echo "Slurmctld(backup) at b is UP"; exit 1')
    assert client.alive(), "one of two controllers serves"
    command("scontrol", "exec sleep 60")
    assert not client.alive(timeout=0.3)


def test_arguments_reach_a_command_as_they_are(command, tmp_path: Path):
    command("scontrol", f'printf "%s\\0" "$@" >{tmp_path}/asked')
    words = ["update", "JobId=1", "a b", "$(touch x)", "'\"`;&|", "*", "", "\n"]
    client.run("scontrol", *words)
    assert (tmp_path / "asked").read_text() == "".join(f"{word}\0" for word in words)


def test_variables_that_change_the_commands_are_dropped(command, monkeypatch: pytest.MonkeyPatch):
    for name in ("SBATCH_PARTITION", "SQUEUE_STATES", "SLURM_TIME_FORMAT", "SLURM_JOB_ID", "SINFO_FORMAT"):
        monkeypatch.setenv(name, "other")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    command("squeue", "env")
    seen = dict(line.split("=", 1) for line in client.run("squeue").splitlines() if "=" in line)
    assert seen["SLURM_CONF"] == "/etc/slurm.conf"
    assert seen["HOME"] == os.environ["HOME"]
    assert "other" not in seen.values()


def test_a_complaint_is_one_line():
    said = "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid\n\n"
    assert client.complaint(said) == "invalid partition specified: nope; Batch job submission failed: Invalid"
    assert client.complaint("a: error: x\na: error: x\n") == "x"


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:00", 5400),
        ("2-3", 183600),
        ("2-3:4", 183840),
        ("2-00:00:00", 172800),
        ("0", 0),
        ("UNLIMITED", None),
        ("infinite", None),
        ("N/A", None),
    ],
)
def test_times(text: str, seconds: int | None):
    assert client.parse_time(text) == seconds


@given(st.integers(0, 10**8))
def test_times_come_back(seconds: int):
    assert client.parse_time(client.format_time(seconds)) == seconds


@pytest.mark.parametrize("text", ["1:2:3:4", "-5", "2 days", "1-", "1-2:3:4:5", "1h", "٣"])
def test_what_is_no_time_is_refused(text: str):
    with pytest.raises(SlurmError, match="is no time: write days-hours:minutes:seconds"):
        client.parse_time(text)
