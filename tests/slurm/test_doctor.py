"""The doctor: each thing it looks at, well and ill, and a look at a node of a real Slurm."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from potamos.slurm import client, doctor, machine, storage
from potamos.slurm.client import Partition
from potamos.slurm.doctor import diagnose, judge_nodes, judge_partitions, judge_settings, read_findings
from potamos.slurm.finding import Finding
from potamos.slurm.site import Site

LEVELS = ("ok", "warning", "wrong")


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


def well_formed(findings: list[Finding]) -> None:
    """Every finding is one line, and what is wrong says how to mend it."""
    for finding in findings:
        assert finding.level in LEVELS
        assert finding.text.isprintable(), finding
        assert finding.remedy or finding.level == "ok" or finding.subject in ("network", "infiniband", "limits"), (
            finding
        )


# --- the machine ----------------------------------------------------------------------------------------------------

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 22:55:48 UTC 2024\nGCC version:  gcc\n"
OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)  Thu Jan 23\n"
)


@pytest.mark.parametrize(
    ("text", "cuda", "needed", "level", "words"),
    [
        (DRIVER, "12.8", True, "ok", "535.161.08"),
        (OPEN_DRIVER, "12.8", True, "ok", "570.86.15"),
        (OPEN_DRIVER, "13.0", True, "wrong", "needs 580"),
        (DRIVER, "11.8", False, "ok", "CUDA 11.8"),
        (DRIVER, None, True, "wrong", "without CUDA"),
        (DRIVER, None, False, "warning", "without CUDA"),
        (None, "12.8", True, "wrong", "no NVIDIA driver"),
        (None, "12.8", False, "ok", "no NVIDIA driver"),
        ("nonsense\n", "12.8", True, "wrong", "no NVIDIA driver"),
    ],
)
def test_the_driver_serves_the_cuda_of_torch(tmp_path: Path, text, cuda, needed, level, words):
    place = tmp_path / "version"
    if text is not None:
        place.write_text(text)
    (found,) = machine.driver(needed=needed, cuda=cuda, place=place)
    assert (found.level, words in found.text) == (level, True), found


def test_the_cuda_of_torch_is_what_torch_says():
    torch = pytest.importorskip("torch")
    assert machine.torch_cuda() == torch.version.cuda


def make_net(folder: Path, **states: str) -> Path:
    for name, state in states.items():
        (folder / "net" / name).mkdir(parents=True)
        (folder / "net" / name / "operstate").write_text(state + "\n")
    return folder / "net"


def make_ib(folder: Path, state: str) -> Path:
    port = folder / "ib" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(state)
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    return folder / "ib"


def test_interfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_own_address", lambda: "10.0.0.1")
    net = make_net(tmp_path, lo="unknown", eth0="up", eth1="down", docker0="up", veth12="up", ib0="up")
    none = tmp_path / "none"
    assert machine.interfaces(net) == ["eth0", "ib0"]
    both, no_ib = machine.network({}, node=True, net=net, ib=none)
    assert (both.level, "several interfaces (eth0, ib0)" in both.text) == ("warning", True)
    assert (no_ib.level, no_ib.subject) == ("warning", "infiniband")
    told = {"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "ib0"}
    assert levels(machine.network(told, node=True, net=net, ib=make_ib(tmp_path, "4: ACTIVE\n"))) == ["ok", "ok"]
    wrong = {"NCCL_SOCKET_IFNAME": "bond0", "GLOO_SOCKET_IFNAME": "ib0"}
    assert levels(machine.network(wrong, node=True, net=net, ib=none))[0] == "wrong"
    assert levels(machine.network(wrong, node=False, net=net, ib=none))[0] == "warning"  # nodes may have others
    assert levels(machine.network({}, node=True, net=none, ib=none))[0] == "wrong"


def test_a_name_that_leads_home_is_remarked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    net = make_net(tmp_path, eth0="up")
    monkeypatch.setattr(machine, "_own_address", lambda: "127.0.1.1")
    assert levels(machine.network({}, node=False, net=net, ib=tmp_path)) == ["ok", "warning", "ok"]
    assert levels(machine.network({"GLOO_SOCKET_IFNAME": "eth0"}, node=False, net=net, ib=tmp_path)) == ["ok", "ok"]


@pytest.mark.parametrize(
    ("wanted", "interface", "matches"),
    [("ib", "ib0", True), ("=ib", "ib0", False), ("=ib0,ib1", "ib1", True), ("^docker,lo", "eth0", True),
     ("^eth", "eth0", False), ("eth,ib", "ib0", True), ("bond", "eth0", False), ("^=eth0", "eth01", True)],
)  # fmt: skip
def test_patterns_of_interfaces(wanted: str, interface: str, matches: bool):
    assert machine._matches(wanted, interface) is matches


def test_ports_that_are_down_do_not_count(tmp_path: Path):
    assert machine.ports(make_ib(tmp_path, "1: DOWN\n")) == []
    (tmp_path / "ib" / "mlx5_0" / "ports" / "1" / "state").write_text("4: ACTIVE\n")
    assert machine.ports(tmp_path / "ib") == ["mlx5_0 port 1 400 Gb/sec"]


# --- the file system ------------------------------------------------------------------------------------------------

MOUNTS = """rootfs / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
10.0.0.9@o2ib:/scratch /scratch lustre rw,flock 0 0
tmpfs /scratch/tmp tmpfs rw 0 0
x /odd\\040name beegfs rw 0 0
x /over ext4 rw 0 0
y /over gpfs rw 0 0
torn
"""


@pytest.mark.parametrize(
    ("path", "kind", "place", "shared"),
    [
        ("/home/ann/runs", "nfs4", "/home", True),
        ("/homes/ann", "ext4", "/", False),  # a name that only begins alike
        ("/scratch/x", "lustre", "/scratch", True),
        ("/scratch/tmp/x", "tmpfs", "/scratch/tmp", False),
        ("/odd name/x", "beegfs", "/odd name", True),
        ("/over/x", "gpfs", "/over", True),  # the later mount hides the earlier one
    ],
)
def test_the_file_system_of_a_folder(tmp_path: Path, path: str, kind: str, place: str, shared: bool):
    (tmp_path / "mounts").write_text(MOUNTS)
    assert storage.file_system(Path(path), tmp_path / "mounts") == (kind, place)
    assert bool(storage.SHARED.fullmatch(kind)) is shared
    assert storage.file_system(Path(path), tmp_path / "none") == ("unknown", "/")


def test_a_good_folder_and_what_is_left_in_it(tmp_path: Path):
    folder = tmp_path / 'it\'s\n"x"'
    folder.mkdir()
    found = list(storage.storage(folder, several=False))
    well_formed(found)
    assert [(f.level, f.subject) for f in found if f.subject != "disk"] == [
        ("ok", "file system"), ("ok", "clock"), ("ok", "locks"),
    ]  # fmt: skip
    assert list(folder.iterdir()) == []
    assert next(storage.storage(folder, several=True)).level == "warning"  # tmp_path is no shared file system


def test_a_folder_that_cannot_be_written():
    found = list(storage.storage(Path("/proc"), several=False))
    well_formed(found)
    assert (found[-1].level, found[-1].subject) == ("wrong", "file system")


@pytest.mark.parametrize(
    ("skew", "level"),
    [(0.0, "ok"), (-0.009, "ok"), (1.9, "ok"), (2.5, "warning"), (-90, "warning"), (301, "wrong"), (-301, "wrong")],
)
def test_clocks(skew: float, level: str):
    """A file was written between 1000.0 and 1000.5 of this machine's time."""
    told = storage.clock((1000.5 if skew >= 0 else 1000.0) + skew, 1000.0, 1000.5)
    assert told.level == level
    assert ("ahead" in told.text, "behind" in told.text) == (level != "ok" and skew > 0, level != "ok" and skew < 0)


def test_a_clock_that_counts_whole_seconds_is_right():
    assert storage.clock(1000.0, 1000.9, 1000.95).level == "ok"


@pytest.mark.parametrize(("free", "level"), [(500, "wrong"), (5_000, "warning"), (50_000, "ok")])
def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str):
    usage = type("Usage", (), {"free": free << 20, "total": 100_000 << 20})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert next(storage._room(tmp_path)).level == level


def test_a_folder_that_is_another_on_the_node(tmp_path: Path):
    assert levels(storage.shared_with(tmp_path, "token")) == ["wrong"]
    (tmp_path / storage.LOCK).write_text("another")
    assert levels(storage.shared_with(tmp_path, "token")) == ["wrong"]
    (tmp_path / storage.LOCK).write_text("token")
    assert levels(storage.shared_with(tmp_path, "token")) == ["ok", "warning"]  # nobody holds the lock


# --- Slurm's own words ----------------------------------------------------------------------------------------------

CONFIG = """Configuration data as of 2026-11-22T10:05:24
AuthInfo                = socket=/tmp/c/munge.sock,cred_expire=5
AuthType                = auth/munge
KillWait                = 3 sec
PreemptMode             = REQUEUE
SlurmctldHost[0]        = vm(127.0.0.1)
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at vm is UP
"""
# As 22.05.8 writes a node, drained with `reason="disk = bad | \\"x\\" it's State=IDLE"`.
DRAINED = (
    "NodeName=n1 Arch=x86_64 CPUTot=4 Gres=gpu:8 NodeAddr=127.0.0.1 NodeHostName=vm OS=Linux 6.18 #1 SMP @0  "
    "RealMemory=4000 State=IDLE+DRAIN ThreadsPerCore=1 Partitions=main,urgent  AllocTRES= "
    'Reason=disk = bad | "x" it\'s  [root@2026-11-22T10:05:35]'
)
IDLE = DRAINED.replace("n1", "n0").replace("IDLE+DRAIN", "IDLE+PLANNED").partition(" Reason=")[0]


def test_settings():
    settings = doctor.configuration(CONFIG)
    assert settings["SlurmctldHost[0]"] == "vm(127.0.0.1)"
    requeue, limit, preemption = judge_settings(settings)
    assert (limit.level, "KillWait is 3 s" in limit.text, "KillWait=15" in limit.remedy) == ("warning", True, True)
    assert "waits 5 s" in requeue.text
    assert "has 3 s to save" in requeue.text
    assert preemption.level == "ok"
    plain = doctor.configuration(
        CONFIG.replace(",cred_expire=5", "").replace("REQUEUE", "OFF").replace("3 sec", "15 sec")
    )
    assert [f.text for f in judge_settings(plain)] == ["a requeued job waits 120 s; one that is ended has 15 s to save"]
    assert levels(judge_settings(plain | {"KillWait": "14 sec"})) == ["ok", "warning"]
    assert levels(judge_settings({"PreemptMode": "GANG,CANCEL"})) == ["ok", "warning"]


@pytest.mark.parametrize(
    ("body", "level"),
    [('[ "$*" = "--block-signal=USR1 --block-signal=TERM true" ]', "ok"),
     ('echo "env: unrecognized option" >&2; exit 125', "warning"), (None, "warning")],
)  # fmt: skip
def test_an_env_that_cannot_hold_signals_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body, level):
    if body is not None:
        (tmp_path / "env").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "env").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = list(doctor.look_at_env())
    well_formed(found)
    assert levels(found) == [level]


def test_nodes():
    found = list(judge_nodes([client.fields(DRAINED), client.fields(IDLE)]))
    well_formed(found)
    assert (found[0].level, found[0].text) == ("ok", "1 of 2 can be had (2 with 8 GPUs)")
    assert found[1].text == 'n1 idle+drain: disk = bad | "x" it\'s [root@2026-11-22T10:05:35]'
    assert levels(judge_nodes([client.fields(DRAINED)])) == ["wrong", "warning"]
    many = [client.fields(DRAINED.replace("n1", f"n{k}").replace("disk", f"disk {k % 20}")) for k in range(400)]
    found = list(judge_nodes([*many, client.fields(IDLE)]))
    assert len(found) < 12
    assert found[1].text.startswith("n0,n20,n40,n60,n80,n100,n120,n140 and 12 more idle+drain: disk 0")
    assert found[-1].text == "12 more reasons"


def partition(name: str, **other) -> Partition:
    values = {"nodes": 4, "max_nodes": None, "max_time": 3600, "default_time": 600, "default": False, "state": "UP"}
    values |= {"gpus_per_node": 8, "cpus": 64, "memory": 1 << 20}
    return Partition(name=name, **(values | other))


def test_partitions():
    two = {"main": partition("main", default=True), "old": partition("old", state="DOWN")}
    found = list(judge_partitions(two, Site()))
    well_formed(found)
    assert levels(found) == ["ok", "warning"]
    assert (
        "main (default): nodes 4, 8 GPUs a node, 64 CPUs, 1024 GiB, at most 01:00:00, 00:10:00 where" in found[0].text
    )
    assert levels(judge_partitions(two, Site(partition="old"))) == ["ok", "wrong"]
    assert levels(judge_partitions(two, Site(partition="none"))) == ["ok", "warning", "wrong"]
    assert levels(judge_partitions({"main": partition("main")}, Site())) == ["ok", "warning"]
    assert levels(judge_partitions({}, Site())) == ["wrong"]


def test_what_a_node_prints_is_found_behind_its_prologue():
    assert list(read_findings('Loading cuda/12.8\n[{"level": "ok", "subject": "a", "text": "b", "remedy": ""}]\n')) == [
        Finding("ok", "a", "b")
    ]
    for text in ("", "Loading\nbash: line 1: python: command not found\x1b[0m\n", "[1, 2]", '{"level": 3}'):
        (found,) = read_findings(text)
        well_formed([found])
        assert found.level == "wrong"


# --- as a whole -----------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No site file, no cluster."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("POTAMOS_SITE", raising=False)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    return tmp_path


def site(home: Path, text: str) -> None:
    (home / "config" / "potamos").mkdir(parents=True)
    (home / "config" / "potamos" / "site.yaml").write_text(text)


def test_without_slurm(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(home))
    found = list(diagnose(home / "runs", job=True))
    well_formed(found)
    wrong = [finding for finding in found if finding.level == "wrong"]
    assert [finding.subject for finding in wrong] == ["slurm"]
    assert "potamos cluster up" in wrong[0].remedy


def test_a_controller_that_does_not_answer(home: Path, monkeypatch: pytest.MonkeyPatch):
    for name in doctor.COMMANDS:
        (home / name).write_text(
            "#!/bin/sh\necho 'slurm_load: error: Unable to contact slurm controller' >&2\nexit 1\n"
        )
        (home / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:/usr/bin:/bin")
    found = list(diagnose(home / "runs", job=True))
    well_formed(found)
    assert [finding.subject for finding in found if finding.level == "wrong"] == ["controller"]


def test_a_site_file_that_is_wrong(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(home))
    site(home, "partitoin: gpu\n")
    _, (found,) = doctor.look_at_site()
    assert (found.level, "did you mean partition" in found.text.replace("`", "")) == ("wrong", True), found.text


def test_what_a_site_file_names_is_looked_for(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(home))
    site(home, f"python: {home}/none\nshared: [{home}/absent, {home}]\ncontainer: {{kind: apptainer}}\n")
    _, found = doctor.look_at_site()
    well_formed(found)
    assert levels(found) == ["warning", "wrong", "warning"]


def test_on_a_real_slurm(home: Path, cluster, slurm_folder: Path):
    """A node is drained with odd words; another is looked at by a job. There are no GPUs behind what Slurm counts."""
    site(home, 'prologue: [echo loading]\nenvironment: {POTAMOS_ODD: "it\'s $(x) \\"y\\""}\npartition: main\n')
    runs = slurm_folder / "odd 'name' runs"
    cluster.run("scontrol", "update", "nodename=n3", "state=drain", 'reason=a = b | it\'s "x" y')
    found = list(diagnose(runs, job=True))
    well_formed(found)
    texts = {finding.subject: finding.text for finding in found if not finding.text.startswith("on n")}
    assert texts["munge"] == "makes credentials and accepts them"
    assert texts["controller"] == "answers"
    assert next(f.text for f in found if f.subject == "nodes") == "3 of 4 can be had (4 with 8 GPUs)"
    (drained,) = (f.text for f in found if f.text.startswith("n3 "))
    assert drained.startswith('n3 idle+drain: a = b | it\'s "x" y [')
    node = {f.subject: f.level for f in found if f.text.startswith("on n")}
    assert (node["shared folder"], node["torch"], node["clock"]) == ("ok", "ok", "ok")
    assert [f.level for f in found if f.text.startswith("on n") and f.subject == "locks"] == ["ok"]
    if not os.path.exists("/proc/driver/nvidia/version"):
        assert [f.subject for f in found if f.level == "wrong"] == ["driver", "gpus"]
    assert list(runs.iterdir()) == []


def test_a_node_that_does_not_share_the_folder(home: Path, cluster, slurm_folder: Path):
    """The nodes of this cluster are one machine: what is taken away by the prologue is not there on the node."""
    site(home, "prologue: ['rm -rf \"$1\"']\npartition: main\n")
    runs = slurm_folder / "unshared"
    runs.mkdir()
    found = list(doctor.look_at_node(runs, doctor.look_at_site()[0], "main"))
    assert [(f.level, f.subject) for f in found] == [("wrong", "shared folder")]
    found = list(doctor.look_at_node(runs, Site(), "nowhere"))
    assert [(f.level, f.subject) for f in found] == [("wrong", "node")]
    assert "partition" in found[0].text
