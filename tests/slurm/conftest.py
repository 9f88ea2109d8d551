"""A corpus for jobs that prepare it; and a real Slurm, `cluster`, of four nodes, clean for each test that takes it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from potamos.slurm import daemons
from potamos.slurm.cluster import Cluster

# Upper bounds, not waits: a machine that runs other work besides is many times slower.
PATIENCE = 120.0
PREFIX = "potamos-slurm-"


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    """`until(condition, what)` waits for something true, and returns it; `what` says what was waited for in vain."""

    def wait(condition: Callable[[], Any], what: str = "it") -> Any:
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < end, f"waited in vain for {what}"
            time.sleep(0.05)
        return found

    return wait


# --- a corpus, for jobs that prepare it -------------------------------------------------------------------------------

SENTENCE = "the river runs far past quiet mills and old bridges to the sea while rain falls on hills"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven inputs, some documents of which occur twice, and a tokenizer. The folder's name needs quotes."""
    from potamos.data.commands import train

    folder = tmp_path_factory.mktemp("corpus") / "it's $(odd) here"
    (folder / "raw").mkdir(parents=True)
    draw = random.Random(5)
    texts = [" ".join(draw.choices(SENTENCE.split(), k=draw.randint(3, 80))) for _ in range(60)]
    for number in range(7):
        chosen = draw.choices(texts, k=20)
        (folder / "raw" / f"{number}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in chosen))
    train(str(folder / "raw"), 280, folder / "tokenizer.json")
    return folder


@pytest.fixture
def in_corpus(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The corpus's folder as working directory: jobs are given relative paths, as users write them."""
    monkeypatch.chdir(corpus)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(corpus / "no configuration"))
    monkeypatch.delenv("POTAMOS_SITE", raising=False)
    return corpus


# --- clusters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def slurm_folder() -> Iterator[Path]:
    """A folder with a short name (sockets have long ones) that every user may enter; pytest's own may be neither."""
    try:
        daemons.programs()
    except daemons.ClusterError as error:
        if os.environ.get("POTAMOS_NEED_SLURM") == "1":
            raise
        pytest.skip(str(error))
    remove_orphans()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    folder.chmod(0o755)
    (folder / "owner").write_text(str(os.getpid()))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def remove_orphans() -> None:
    """Clusters of test sessions that were killed, which could not stop them."""
    for owner in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/owner"):
        if owner.stat().st_uid == os.geteuid() and not daemons.is_alive(int(owner.read_text() or 0)):
            for facts in owner.parent.glob("*/cluster.json"):
                Cluster.at(facts.parent).down(deadline=PATIENCE)
            shutil.rmtree(owner.parent, ignore_errors=True)


@pytest.fixture(scope="session")
def start_cluster(slurm_folder: Path) -> Iterator[Callable[..., Cluster]]:
    """`start_cluster(**shape)`: a cluster of its own, stopped when the session ends."""
    started: list[Cluster] = []

    def start(**shape: Any) -> Cluster:
        cluster = Cluster.up(slurm_folder / f"c{len(started)}", deadline=PATIENCE, **shape)
        started.append(cluster)
        return cluster

    yield start
    for cluster in started:
        cluster.down(deadline=PATIENCE)


@pytest.fixture(scope="session")
def session_cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    """Four nodes, 8 GPUs and 64 CPUs each, no time limit. Nodes are noticed dead late: tests set them down."""
    return start_cluster(nodes=4, node_timeout=60, kill_wait=15, grace=10)


@pytest.fixture(scope="session")
def large_cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    """Sixteen such nodes, for what only the largest recipes need. Set SLURM_CONF from its `environment`."""
    return start_cluster(nodes=16)


@pytest.fixture(scope="session")
def life(load_module: Callable[[str, Path], ModuleType]) -> ModuleType:
    """Runs on a cluster that are hurt and watched: see life.py."""
    return load_module("slurm_life", Path(__file__).with_name("life.py"))


@pytest.fixture(scope="module")
def module_cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The same, clean again only after all tests of a file. SLURM_CONF is not set."""
    yield session_cluster
    restore(session_cluster)


@pytest.fixture
def cluster(session_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The session's cluster, idle and with an empty queue; SLURM_CONF names it for whatever the test starts."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    for name, value in session_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield session_cluster
    restore(session_cluster)


def restore(cluster: Cluster) -> None:
    """No jobs, every node idle: what a test may have left otherwise."""
    if "slurmctld" in cluster.dead():
        cluster.start_controller()
    for k in range(cluster.shape.nodes):
        if f"slurmd.n{k}" in cluster.dead():
            cluster.start_node(k)
    began, killed = time.monotonic(), False
    cluster.run("scancel", "--user", str(os.geteuid()))
    while cluster.run("squeue", "-h", "-o", "%i %T %R").strip():
        if not killed and time.monotonic() - began > 2:  # what catches SIGTERM
            cluster.run("scancel", "--signal=KILL", "--full", "--user", str(os.geteuid()))
            killed = True
        assert time.monotonic() - began < PATIENCE, cluster.run("squeue")
        time.sleep(0.1)
    for name, state in cluster.states().items():
        if state.startswith(("down", "drain", "drng")):
            cluster.run("scontrol", "update", f"nodename={name}", "state=resume")
    cluster.wait(lambda: set(cluster.states().values()) == {"idle"}, PATIENCE, "all nodes to be idle")


@pytest.fixture(scope="session")
def held() -> Callable[[Path], Any]:
    """`with held(lock)`: another process holds it, by the name of process 7 on vm."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 7 on vm\\n')"
    )
    code += "; f.flush(); print('held', flush=True); sys.stdin.read()"

    @contextlib.contextmanager
    def hold(lock: Path) -> Iterator[None]:
        child = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield
        finally:
            child.communicate()

    return hold
