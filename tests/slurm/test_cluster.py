"""The cluster on this machine: it starts, stops, loses parts and gets them back, and says what is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potamos.slurm import cluster as module
from potamos.slurm import daemons
from potamos.slurm.cluster import Cluster, ClusterError, Shape

PATIENCE = 120.0
ROOT = Path(__file__).resolve().parents[2]


def processes(folder: Path) -> list[str]:
    """Command lines of live processes that mention a folder."""
    found = []
    for pid in daemons.all_pids():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{folder}/" in command and daemons.is_alive(pid):
            found.append(command)
    return found


def command(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """`potamos cluster ...` in a process of its own."""
    environment = dict(os.environ) | ({"PATH": path} if path is not None else {})
    return subprocess.run(
        [sys.executable, "-m", "potamos.pretrain.cli", "cluster", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
        check=False,
    )


def job_state(cluster: Cluster, job: str) -> str:
    return cluster.run("squeue", "-h", "-j", job, "-o", "%T").strip()


# --- up and down ---------------------------------------------------------------------------------------------------


def test_up_use_down(slurm_folder):
    folder = slurm_folder / "whole"
    began = time.monotonic()
    made = command("up", "--folder", str(folder), "--nodes", "3")
    assert (made.returncode, made.stdout) == (0, f"export SLURM_CONF={folder}/slurm.conf\n"), made.stderr
    cluster = Cluster.at(folder)
    try:
        assert cluster.states() == {"n0": "idle", "n1": "idle", "n2": "idle"}
        assert time.monotonic() - began < 60
        assert len(cluster.run("srun", "-N2", "--gpus-per-node=8", "hostname").split()) == 2
        shown = command("status", "--folder", str(folder))
        assert shown.returncode == 0
        assert shown.stdout.splitlines()[:3] == ["n0: idle", "n1: idle", "n2: idle"]

        again = command("up", "--folder", str(folder))
        assert again.returncode == 2
        assert "a cluster of 3 nodes is up" in again.stderr
        assert "Traceback" not in again.stderr
        assert cluster.dead() == [], "the refused second start hurt the first"
        assert len(processes(folder)) >= 5  # munged, slurmctld, three slurmds
    finally:
        stopped = command("down", "--folder", str(folder))
    assert (stopped.returncode, processes(folder)) == (0, [])
    assert cluster.dead() == ["munged", "slurmctld", "slurmd.n0", "slurmd.n1", "slurmd.n2"]
    shown = command("status", "--folder", str(folder))
    assert shown.returncode == 1
    assert "potamos cluster up" in shown.stdout
    assert "was not up" in command("down", "--folder", str(folder)).stderr


def test_down_ends_running_jobs_with_all_their_children(start_cluster, tmp_path):
    cluster = start_cluster(nodes=2)
    pids = tmp_path / "pids"
    # A task that ignores SIGTERM, and one that leaves its process group.
    task = tmp_path / "task.sh"
    task.write_text(f"trap '' TERM; setsid sleep 1234 & echo $! >> {pids}; echo $$ >> {pids}; sleep 1234\n")
    cluster.run("sbatch", "-N2", f"--output={tmp_path}/out", f"--wrap=srun bash {task}")
    cluster.wait(lambda: pids.exists() and len(pids.read_text().split()) == 4, PATIENCE, "two tasks")
    assert cluster.down()
    assert [pid for pid in map(int, pids.read_text().split()) if daemons.is_alive(pid)] == []
    assert processes(cluster.folder) == []


def test_what_a_killed_cluster_left_is_cleaned_and_job_numbers_are_not_given_again(slurm_folder, tmp_path):
    folder = slurm_folder / "killed"
    cluster = Cluster.up(folder, nodes=2, deadline=PATIENCE)
    try:
        job = cluster.run("sbatch", "--parsable", f"--output={tmp_path}/out", "--wrap=sleep 1234").strip()
        cluster.wait(lambda: job_state(cluster, job) == "RUNNING", PATIENCE, "the job to run")
        for name in ("munged", "slurmctld", "slurmd.n0"):  # one node and the job stay
            os.kill(int((folder / "run" / f"{name}.pid").read_text()), signal.SIGKILL)
        cluster.wait(lambda: len(cluster.dead()) == 3, PATIENCE, "three daemons to die")
        cluster = Cluster.up(folder, nodes=1, deadline=PATIENCE)
        assert cluster.states() == {"n0": "idle"}
        assert cluster.run("squeue", "-h") == ""
        assert not [line for line in processes(folder) if "-N n1" in line], "the old cluster's second node lives"
        later = cluster.run("sbatch", "--parsable", f"--output={tmp_path}/out", "--wrap=true").strip()
        assert int(later) > int(job), "a run folder that remembers the old number would meet a stranger"
    finally:
        Cluster.at(folder).down(deadline=PATIENCE)


def test_two_clusters_side_by_side(cluster, start_cluster):
    other = start_cluster(nodes=1)
    assert cluster.run("sinfo", "-h", "-p", "main", "-o", "%D").strip() == "4"
    assert other.run("sinfo", "-h", "-p", "main", "-o", "%D").strip() == "1"
    other.kill_node(0)
    assert cluster.dead() == []
    other.down()
    assert cluster.dead() == []
    assert len(cluster.run("srun", "-N4", "hostname").split()) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="the whole file runs as an ordinary user already")
def test_an_ordinary_user_can_do_it(slurm_folder):
    folder = slurm_folder / "nobody"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    code = (
        "import sys; from potamos.slurm.cluster import Cluster\n"
        f"cluster = Cluster.up({str(folder)!r}, nodes=2, deadline={PATIENCE})\n"
        "try: print(cluster.run('srun', '-N2', '--gpus-per-node=8', 'id', '-u'))\n"
        f"finally: cluster.down(deadline={PATIENCE})\n"
    )
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", code],
        capture_output=True, text=True, timeout=3 * PATIENCE, cwd="/", env=dict(os.environ) | {"HOME": str(folder)},
    )  # fmt: skip
    if "Permission denied" in done.stderr and "potamos" in done.stderr:
        pytest.skip(f"another user cannot read the program here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["65534", "65534"]
    assert processes(folder) == []


# --- what recipes ask for ------------------------------------------------------------------------------------------


def test_fake_gpus_are_counted(cluster):
    for asked in ("--gpus-per-node=8", "--gres=gpu:4", "--gpus-per-task=1"):
        assert cluster.run("srun", "-N2", "--ntasks-per-node=1", asked, "hostname").split() == [_host()] * 2
    with pytest.raises(ClusterError, match="Requested node configuration is not available"):
        cluster.run("srun", "-N1", "--gpus-per-node=9", "hostname", timeout=PATIENCE)


def _host() -> str:
    return os.uname().nodename


def test_long_jobs_of_64_cpus_are_accepted(large_cluster):
    asked = ("-N16", "--ntasks-per-node=8", "--cpus-per-task=8", "--gpus-per-node=8", "--time=30-00:00:00")
    large_cluster.run("sbatch", "--test-only", *asked, "--wrap=true")


def test_a_time_limit_can_be_set(start_cluster):
    cluster = start_cluster(nodes=1, max_time=60)
    with pytest.raises(ClusterError, match="time limit"):
        cluster.run("sbatch", "--time=61", "--wrap=true")
    cluster.run("sbatch", "--test-only", "--time=60", "--wrap=true")
    cluster.down()


def test_urgent_jobs_preempt(cluster, tmp_path):
    out = f"--output={tmp_path}/out"
    low = cluster.run("sbatch", "--parsable", "-N4", "--exclusive", out, "--wrap=sleep 1234").strip()
    cluster.wait(lambda: job_state(cluster, low) == "RUNNING", PATIENCE, "the job to run")
    high = cluster.run("sbatch", "--parsable", "-N4", "-p", "urgent", "--exclusive", out, "--wrap=sleep 1234").strip()
    cluster.wait(lambda: job_state(cluster, high) == "RUNNING", PATIENCE, "the urgent job to run")
    assert job_state(cluster, low) == "PENDING"
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", low)


# --- faults --------------------------------------------------------------------------------------------------------


def test_a_node_dies_and_returns(cluster, tmp_path):
    pids = tmp_path / "pids"
    script = f"srun bash -c 'sleep 1234 & echo $SLURMD_NODENAME $! >> {pids}; wait'"
    job = cluster.run("sbatch", "--parsable", "-N2", f"--output={tmp_path}/out", f"--wrap={script}").strip()
    cluster.wait(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2, PATIENCE, "two tasks")
    tasks = {node: int(pid) for node, pid in map(str.split, pids.read_text().splitlines())}
    node = max(tasks)  # not the one with the batch script
    cluster.kill_node(int(node[1:]))
    assert not daemons.is_alive(tasks.pop(node)), "a task outlived its node"
    assert all(daemons.is_alive(pid) for pid in tasks.values()), "the other node was hurt"
    assert cluster.dead() == [f"slurmd.{node}"]
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    cluster.wait(lambda: job_state(cluster, job) == "PENDING", PATIENCE, "the job to be requeued")
    cluster.run("scancel", job)
    cluster.start_node(int(node[1:]))
    cluster.wait(lambda: cluster.states()[node] == "idle", PATIENCE, "the node to be idle again")
    with pytest.raises(ClusterError, match="no node n4"):
        cluster.kill_node(4)


@pytest.mark.nightly
def test_a_dead_node_is_noticed(start_cluster):
    cluster = start_cluster(nodes=2, node_timeout=5)
    cluster.kill_node(1)
    cluster.wait(lambda: cluster.states()["n1"].startswith("down"), PATIENCE, "the dead node to be noticed")
    cluster.down()


def test_a_job_outlives_its_controller(cluster, tmp_path):
    end, done = tmp_path / "end", tmp_path / "done"
    script = f"until [ -e {end} ]; do sleep 0.1; done; echo $SLURM_JOB_ID >> {done}"
    job = cluster.run("sbatch", "--parsable", f"--output={tmp_path}/out", f"--wrap={script}").strip()
    cluster.wait(lambda: job_state(cluster, job) == "RUNNING", PATIENCE, "the job to run")
    cluster.save(PATIENCE)
    cluster.restart_controller()
    assert cluster.dead() == []
    assert job_state(cluster, job) == "RUNNING"
    end.touch()
    cluster.wait(done.exists, PATIENCE, "the job to end")
    cluster.wait(lambda: not cluster.run("squeue", "-h").strip(), PATIENCE, "the controller to hear of it")
    assert done.read_text().split() == [job], "it was started twice"
    assert cluster.run("sbatch", "--parsable", f"--output={tmp_path}/out", "--wrap=true").strip() == str(int(job) + 1)


# --- what is wrong is said ------------------------------------------------------------------------------------------


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(daemons, "SYSTEM_FOLDERS", ())
    with pytest.raises(ClusterError) as caught:
        Cluster.up(tmp_path / "c")
    assert "apt-get install --no-install-recommends munge slurmctld slurmd slurm-client" in str(caught.value)
    assert not (tmp_path / "c").exists()
    (tmp_path / "munged").touch(mode=0o755)
    with pytest.raises(ClusterError, match="no local Slurm without slurmctld, slurmd,") as caught:
        Cluster.up(tmp_path / "c")
    assert "munge " not in str(caught.value)


def test_a_daemon_that_dies_is_named_with_its_last_words(slurm_folder, monkeypatch):
    folder = slurm_folder / "broken"
    good = module.configuration
    monkeypatch.setattr(module, "configuration", lambda *a: good(*a).replace("select/cons_tres", "select/nonsense"))
    with pytest.raises(ClusterError, match=r"slurmctld .*select/nonsense.*log/slurmctld\.log") as caught:
        Cluster.up(folder, nodes=1, deadline=PATIENCE)
    assert "\n" not in str(caught.value)
    assert processes(folder) == [], "a failed start leaves nothing"


def test_a_taken_port_is_said(slurm_folder, monkeypatch):
    import socket

    folder = slurm_folder / "port"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(daemons, "free_ports", lambda count: taken.getsockname()[1])
        with pytest.raises(ClusterError, match=r"slurmctld died: .*in use.*try again"):
            Cluster.up(folder, nodes=1, deadline=PATIENCE)
    assert processes(folder) == []


def test_a_node_that_never_comes_ends_the_wait(slurm_folder, monkeypatch):
    folder = slurm_folder / "late"
    monkeypatch.setattr(Cluster, "start_node", lambda self, k: None)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"in vain for 1 nodes to be idle \(they are {'n0': 'unk"):
        Cluster.up(folder, nodes=1, deadline=5)
    assert time.monotonic() - began < 60
    assert processes(folder) == []


def test_free_ports_are_free_and_together():
    import socket

    base = daemons.free_ports(20)
    with socket.socket() as taken:
        taken.bind(("", base + 3))
        taken.listen()
        for _ in range(50):
            other = daemons.free_ports(20)
            assert not other <= base + 3 < other + 20


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"nodes": 2000}, "nodes is 2000"),
        ({"gpus": -1}, "gpus is -1"),
        ({"requeue_delay": 4}, "requeue_delay is 4: .* at least 5"),
        ({"memory": 1.5}, "memory is 1.5"),
        ({"max_time": 0}, "max_time is 0"),
    ],
)
def test_impossible_shapes_are_refused(shape, said):
    with pytest.raises(ClusterError, match=said):
        Shape(**shape)


def test_unusable_folders_are_refused(slurm_folder):
    with pytest.raises(ClusterError, match="without blanks"):
        Cluster.up(slurm_folder / "a b")
    with pytest.raises(ClusterError, match="at most 70"):
        Cluster.up(slurm_folder / ("a" * 80))
    (slurm_folder / "mine").mkdir()
    (slurm_folder / "mine" / "thesis.tex").touch()
    with pytest.raises(ClusterError, match="holds other things"):
        Cluster.up(slurm_folder / "mine")
    assert [path.name for path in (slurm_folder / "mine").iterdir()] == ["thesis.tex"]


def test_a_user_without_a_name_is_told(slurm_folder, monkeypatch):
    """As containers have, which run as a number."""
    monkeypatch.setattr(module.pwd, "getpwuid", lambda number: {}[number])
    with pytest.raises(ClusterError, match="has no name here"):
        Cluster.up(slurm_folder / "nameless")


def test_no_cluster_is_said(tmp_path):
    for name in ("down", "status"):
        done = command(name, "--folder", str(tmp_path / "none"))
        assert done.returncode == 2
        assert "start one with potamos cluster up" in done.stderr
    (tmp_path / "cluster.json").write_text("{}")
    with pytest.raises(ClusterError, match="is damaged"):
        Cluster.at(tmp_path)


# --- processes -----------------------------------------------------------------------------------------------------


def test_a_zombie_is_dead():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    daemons.wait(lambda: not daemons.is_alive(pid), 30, "the zombie to be seen as dead")
    os.kill(pid, 0)  # which a test by signal takes for alive
    os.waitpid(pid, 0)
    assert not daemons.is_alive(pid)


def test_a_pid_file_of_another_process_is_not_believed(tmp_path):
    (tmp_path / "x.pid").write_text(str(os.getpid()))
    assert daemons.pid_of(tmp_path / "x.pid", f"{tmp_path}/slurm.conf") is None
    assert daemons.pid_of(tmp_path / "x.pid", "py") == os.getpid()
    (tmp_path / "x.pid").write_text("")
    assert daemons.pid_of(tmp_path / "x.pid", "") is None


def test_ending_a_process_that_ignores_sigterm():
    code = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    began = time.monotonic()
    daemons.end([child.pid], grace=0.3, deadline=60)
    assert time.monotonic() - began >= 0.3
    assert child.wait() == -signal.SIGKILL
