"""A real Slurm of several nodes on this machine, for trying recipes unmodified and for the tests.

munged, slurmctld and one slurmd a node, all of this user and inside one folder: own key, own ports, own state; several
clusters may run side by side, and none needs root, systemd or cgroups. GPUs are empty files that Slurm counts: a job
that asks for eight a node is accepted and scheduled, and finds no CUDA device. Delays that take minutes on a real
cluster (a requeue, the notice of a dead node, the grace of a preemption) take seconds here.

Written for Slurm 22.05 as Debian 12 packages it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potamos.files import write_atomically
from potamos.slurm import daemons
from potamos.slurm.daemons import ClusterError

DEFAULT_FOLDER = Path("~/.potamos/cluster")
# munge's and slurmstepd's sockets live in the folder, and a socket's path may have 107 characters.
LONGEST_FOLDER = 70


@dataclass(frozen=True)
class Shape:
    """What a cluster pretends to be, and how patient it is. The defaults take the packaged recipes as they are.

    cpus, gpus, memory (MiB) are of each node, whatever this machine has. max_time: minutes, None for no limit. Seconds:
    `requeue_delay` until a requeued job may start again (Slurm's default is 120, which it also takes where less than 5
    is asked), `node_timeout` of silence until a node counts as dead (300), `kill_wait` from SIGTERM to SIGKILL of a job
    that is ended (30), `grace` of a job that another preempts (0).
    """

    nodes: int = 2
    cpus: int = 64
    gpus: int = 8
    memory: int = 1_000_000
    max_time: int | None = None
    requeue_delay: int = 5
    node_timeout: int = 5
    kill_wait: int = 15
    grace: int = 10

    def __post_init__(self) -> None:
        least = {"gpus": 0, "grace": 0, "requeue_delay": 5}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low = least.get(field.name, 1)
            if not (value is None and field.name == "max_time") and (not isinstance(value, int) or value < low):
                raise ClusterError(f"{field.name} is {value!r}: it must be a whole number, at least {low}")
        if self.nodes > 1024:
            raise ClusterError(f"nodes is {self.nodes}: one machine takes up to 1024 (6 MB of memory each)")


class Cluster:
    """A cluster in a folder. `Cluster.up` starts one, `Cluster.at` finds one that was started; neither owns it: it
    outlives this process until `down`."""

    def __init__(self, folder: Path, shape: Shape, port: int) -> None:
        self.folder, self.shape, self.port = folder, shape, port

    # --- from outside ----------------------------------------------------------------------------------------------

    @classmethod
    def up(cls, folder: str | os.PathLike[str] = DEFAULT_FOLDER, *, deadline: float = 60.0, **shape: Any) -> Cluster:
        """Start a cluster and return it when every node is idle, in a second or two. What a killed one left is removed.

        Args:
            folder: made if absent; everything is inside.
            deadline: seconds until it must stand.
            shape: fields of `Shape`.

        Raises:
            ClusterError: programs missing, a cluster up already in this folder, a folder that Slurm cannot use, a
                daemon that does not start (then nothing is left running).
        """
        wanted = Shape(**shape)
        daemons.programs()
        place = _usable(Path(folder).expanduser())
        with _hold(place):
            if (place / "cluster.json").exists():
                old = cls.at(place)
                if not old.dead():
                    raise ClusterError(
                        f"a cluster of {old.shape.nodes} nodes is up in {place} already. To use it: {old.export}; "
                        f"to stop it: potamos cluster down --folder {place}"
                    )
                old._stop(deadline)
            cluster = cls(place, wanted, daemons.free_ports(wanted.nodes + 1))
            cluster._lay_out()
            try:
                cluster._start(deadline)
            except BaseException:  # also Ctrl-C: daemons outlive whoever starts them
                cluster._stop(30.0)
                raise
        return cluster

    @classmethod
    def at(cls, folder: str | os.PathLike[str] = DEFAULT_FOLDER) -> Cluster:
        """The cluster that was started in a folder, running or not.

        Raises:
            ClusterError: none was.
        """
        place = Path(folder).expanduser().resolve()
        try:
            facts = json.loads((place / "cluster.json").read_bytes())
            return cls(place, Shape(**facts["shape"]), int(facts["port"]))
        except FileNotFoundError:
            raise ClusterError(f"no cluster in {place}: start one with potamos cluster up --folder {place}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ClusterError(
                f"{place / 'cluster.json'} is damaged ({error}): remove the folder and start a cluster anew"
            ) from error

    def down(self, *, deadline: float = 60.0) -> bool:
        """Stop everything; jobs end at once, as in a power cut. Returns whether anything ran."""
        with _hold(self.folder):
            ran = len(self.dead()) < 2 + self.shape.nodes
            self._stop(deadline)
        return ran

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What makes sbatch, squeue and the others talk to this cluster."""
        return {"SLURM_CONF": str(self.conf)}

    @property
    def export(self) -> str:
        """The same for a shell."""
        return f"export SLURM_CONF={self.conf}"

    def run(self, *command: str, timeout: float = 60.0) -> str:
        """Standard output of a Slurm command on this cluster.

        Raises:
            ClusterError: it failed, or did not answer within `timeout` seconds.
        """
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                env=self._full_environment(),
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"`{' '.join(command)}` did not answer within {timeout:g} s") from error
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["(it said nothing)"]
            raise ClusterError(f"`{' '.join(command)}` failed with exit status {done.returncode}: {said[-1]}")
        return done.stdout

    def states(self) -> dict[str, str]:
        """The state of each node as sinfo writes it: idle, mix, alloc, down, unk; * where it does not respond."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines()
        return dict(line.split() for line in lines)

    def dead(self) -> list[str]:
        """The daemons that do not run."""
        return [name for name in self._daemons() if self._pid(name) is None]

    def wait(self, condition: Callable[[], object], deadline: float, what: str) -> None:
        """Until `condition()` is true.

        Raises:
            ClusterError: it was not within `deadline` seconds.
        """
        daemons.wait(condition, deadline, what)

    # --- faults ----------------------------------------------------------------------------------------------------

    def kill_node(self, k: int) -> None:
        """Node `n<k>` dies: SIGKILL to its slurmd, and to every process of a job there. The controller is not told."""
        self._kill_nodes([self._node(k)])

    def start_node(self, k: int) -> None:
        """Node `n<k>` comes back; it is idle within a second or so."""
        name = self._node(k)
        command = [daemons.programs()["slurmd"], "-N", name, "-f", str(self.conf)]
        self._launch(f"slurmd.{name}", command, deadline=60.0)

    def kill_controller(self) -> None:
        """SIGKILL to slurmctld; jobs go on without it.

        The start of a job alone does not make it save its state, and of a job that it has not saved as running the next
        controller believes that it is still to be started. See `save`.
        """
        pid = self._pid("slurmctld")
        daemons.send([pid] if pid else [], signal.SIGKILL)
        daemons.wait(lambda: self._pid("slurmctld") is None, 30.0, "slurmctld to die")

    def start_controller(self, *, clear: bool = False, deadline: float = 60.0) -> None:
        """slurmctld with the jobs that it knew; with `clear` without them, but not giving their numbers again."""
        command = [daemons.programs()["slurmctld"], *(["-c"] if clear else []), "-f", str(self.conf)]
        self._launch("slurmctld", command, deadline=deadline)
        self._until(self._controller_answers, deadline, "slurmctld to answer")

    def restart_controller(self) -> None:
        """SIGKILL to slurmctld, and a new one that takes up what it had saved."""
        self.kill_controller()
        self.start_controller()

    def save(self, deadline: float = 60.0) -> None:
        """Make slurmctld write down what it knows of jobs at this moment, which it does when one is changed."""
        jobs = self.run("squeue", "-h", "-t", "RUNNING", "-o", "%A").split()
        began, state = time.time(), self.folder / "state" / "job_state"
        if jobs:
            self.run("scontrol", "update", f"JobId={jobs[0]}", "AdminComment=running")
            daemons.wait(lambda: state.stat().st_mtime > began, deadline, "slurmctld to save its state")

    # --- inside ----------------------------------------------------------------------------------------------------

    def _node(self, k: int) -> str:
        if not 0 <= k < self.shape.nodes:
            raise ClusterError(f"there is no node n{k}: the cluster has n0 to n{self.shape.nodes - 1}")
        return f"n{k}"

    def _nodes(self) -> list[str]:
        return [f"n{k}" for k in range(self.shape.nodes)]

    def _daemons(self) -> list[str]:
        return ["munged", "slurmctld", *(f"slurmd.{name}" for name in self._nodes())]

    def _pid(self, name: str) -> int | None:
        return daemons.pid_of(self.folder / "run" / f"{name}.pid", f"{self.folder}/")

    def _log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.log"

    def _full_environment(self) -> dict[str, str]:
        # What a surrounding job exports is about another cluster.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        path = os.pathsep.join((kept.get("PATH", os.defpath), *daemons.SYSTEM_FOLDERS))
        return kept | {"PATH": path} | self.environment

    def _launch(self, name: str, command: list[str], *, deadline: float) -> None:
        """Start one daemon and see it alive. Its pid file goes first: slurmctld kills whom an old one names."""
        (self.folder / "run" / f"{name}.pid").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._log(name).rename(self._log(name).with_suffix(".old"))  # so that its complaints are of this start
        daemons.launch(name, command, self._full_environment(), self._log(name), deadline=deadline)
        self._until(lambda: self._pid(name) is not None, deadline, f"{name} to start", by=name)

    def _has_died(self, name: str) -> bool:
        """Whether a daemon that had written its pid file is gone. A file of this second may not hold its number yet."""
        try:
            age = time.time() - (self.folder / "run" / f"{name}.pid").stat().st_mtime
        except FileNotFoundError:
            return False
        return age > 1 and self._pid(name) is None

    def _until(self, condition: Callable[[], bool], deadline: float, what: str, by: str | None = None) -> None:
        """`wait`, ended early by the death of a daemon that has started, or by its last words."""

        def look() -> bool:
            if condition():
                return True
            for name in [by] if by else self._daemons():
                if self._has_died(name) or "fatal:" in daemons.complaint(self._log(name)):
                    raise daemons.failure(name, self._log(name), "died")
            return False

        daemons.wait(look, deadline, what)

    def _start(self, deadline: float) -> None:
        """Everything, in order; returns when all nodes are idle."""
        found, at = daemons.programs(), self.folder
        (at / "munge.sock").unlink(missing_ok=True)
        # --force: only this user and root reach the folder, whatever munged thinks of the folders above it.
        munged = [found["munged"], "--force", f"--socket={at}/munge.sock", f"--key-file={at}/munge.key"]
        munged += [f"--pid-file={at}/run/munged.pid", f"--log-file={self._log('munged')}", f"--seed-file={at}/run/seed"]
        self._launch("munged", munged, deadline=deadline)
        self.start_controller(clear=True, deadline=deadline)
        for k in range(self.shape.nodes):
            self.start_node(k)
        try:
            self._until(self._all_idle, deadline, f"{self.shape.nodes} nodes to be idle")
        except ClusterError as error:
            raise ClusterError(f"{error} (they are {self.states()}; see {at / 'log'})") from error

    def _controller_answers(self) -> bool:
        try:
            return "is UP" in self.run("scontrol", "ping", timeout=20)
        except ClusterError:
            return False

    def _all_idle(self) -> bool:
        states = self.states()
        if refused := [name for name, state in states.items() if state.startswith(("inval", "drain"))]:
            reason = self.run("sinfo", "-h", "-R", "-o", "%E").strip()
            raise ClusterError(f"slurmctld refuses {', '.join(refused)}: {reason or 'see its log'}")
        return len(states) == self.shape.nodes and set(states.values()) == {"idle"}

    def _kill_nodes(self, names: list[str]) -> None:
        """SIGKILL to slurmds and to all processes of jobs on these nodes, again until none is left."""

        def doomed() -> set[int]:
            # A slurmstepd clears its environment but logs where its slurmd does; tasks may outlive it, or hide from it.
            found = {pid for name in names if (pid := self._pid(f"slurmd.{name}"))}
            for name in names:
                found |= daemons.that_hold_open(self._log(f"slurmd.{name}"))
                found |= daemons.that_hold_open(self._log(f"slurmd.{name}").with_suffix(".old"))
                found |= daemons.with_environment({"SLURMD_NODENAME": name} | self.environment)
            return {pid for pid in daemons.with_descendants(found) - {os.getpid()} if daemons.is_alive(pid)}

        def dead() -> bool:
            found = doomed()
            # Stopped first: a slurmstepd that lives a moment longer than its script tells the controller of a failed
            # job, which a node that has lost its power does not.
            daemons.send(found, signal.SIGSTOP)
            daemons.send(found, signal.SIGKILL)
            return not found

        daemons.wait(dead, 30.0, f"the processes of {', '.join(names)} to die")

    def _stop(self, deadline: float) -> None:
        """The controller first, so that it does not see its nodes die; then nodes with their jobs; then munged."""
        for name in ("slurmctld", "munged"):
            if name == "munged":
                self._kill_nodes(self._nodes())
            if pid := self._pid(name):
                daemons.end([pid], grace=10.0, deadline=deadline)
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        shutil.rmtree(self.folder / "spool", ignore_errors=True)

    def _lay_out(self) -> None:
        """Folders, key, fake GPUs and configuration."""
        at = self.folder
        for name in ("state", "run", "log", "dev", *(f"spool/{node}" for node in self._nodes())):
            (at / name).mkdir(parents=True, exist_ok=True)
        for device in range(self.shape.gpus):
            (at / "dev" / f"nvidia{device}").touch()
        key = at / "munge.key"
        if not key.exists():
            with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(os.urandom(128))
        # A count alone is refused (the node becomes INVAL): the files must be there.
        devices = f"Name=gpu File={at}/dev/nvidia[0-{self.shape.gpus - 1}]\n" if self.shape.gpus else ""
        write_atomically(at / "gres.conf", devices.encode())
        write_atomically(self.conf, configuration(at, self.shape, self.port).encode())
        facts = {"shape": dataclasses.asdict(self.shape), "port": self.port}
        write_atomically(at / "cluster.json", (json.dumps(facts, indent=1) + "\n").encode())


def configuration(folder: Path, shape: Shape, port: int) -> str:
    """The text of slurm.conf."""
    user = _user_name()
    host = os.uname().nodename.partition(".")[0]
    gpus = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    last = shape.nodes - 1
    members = f"n[0-{last}]" if last else "n0"
    limit = "UNLIMITED" if shape.max_time is None else str(shape.max_time)
    default = 60 if shape.max_time is None else min(60, shape.max_time)
    nodes = "\n".join(
        f"NodeName=n{k} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1 + k} "
        f"CPUs={shape.cpus} RealMemory={shape.memory}{gpus} State=UNKNOWN"
        for k in range(shape.nodes)
    )
    return f"""\
ClusterName=potamos
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# Slurm holds a requeued job back until the old credential cannot be used any more.
AuthInfo=socket={folder}/munge.sock,cred_expire={shape.requeue_delay}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
# No cgroups, no accounting: what any container has. Jobs that ended are in a text file.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={max(1, shape.memory // shape.cpus)}
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
# Believe the processors and the memory that are configured below.
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
# A job that no partition can ever run is refused at once.
EnforcePartLimits=ALL
SlurmdTimeout={shape.node_timeout}
KillWait={shape.kill_wait}
UnkillableStepTimeout={max(10, 5 * shape.kill_wait)}
TCPTimeout=2
MessageTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes={members} Default=YES MaxTime={limit} DefaultTime={default} PriorityTier=10 \
GraceTime={shape.grace} PreemptMode=REQUEUE
PartitionName=urgent Nodes={members} MaxTime={limit} DefaultTime={default} PriorityTier=100 PreemptMode=OFF
"""


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ClusterError(
            f"user {os.geteuid()} has no name here, and Slurm needs one (SlurmUser): give it a line in /etc/passwd, or "
            "run as another user"
        ) from None


def _usable(folder: Path) -> Path:
    """The folder, made if absent."""
    folder = folder.resolve()
    if not re.fullmatch(r"[\w./+@~-]+", str(folder), re.ASCII):
        raise ClusterError(
            f"the folder {str(folder)!r} cannot stand in Slurm's configuration: choose one without blanks and signs, "
            "with --folder"
        )
    if len(str(folder)) > LONGEST_FOLDER:
        raise ClusterError(
            f"the folder {folder} has {len(str(folder))} characters, which makes its sockets' names longer than the "
            f"system's 107: choose one of at most {LONGEST_FOLDER}, with --folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise ClusterError(f"the folder {folder} belongs to another user ({folder.stat().st_uid}): choose another")
    if set(os.listdir(folder)) and not (folder / "lock").exists():
        raise ClusterError(f"the folder {folder} holds other things: choose an empty or a new one, with --folder")
    return folder


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """One `up` or `down` at a time in a folder."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(f"another `potamos cluster` command is at work in {folder}") from None
        yield
