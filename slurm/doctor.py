"""What stands between this machine and a run on the cluster: each thing looked at, and how to mend what is wrong.

Everything here looks and changes nothing, but for a small file in the folder of the runs, which is taken away again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from potamos.slurm import client
from potamos.slurm.client import Partition, SlurmError, format_time
from potamos.slurm.finding import Finding, Level
from potamos.slurm.machine import driver, network, torch_cuda, versions
from potamos.slurm.site import Site, SiteError, load_site
from potamos.slurm.status import printable
from potamos.slurm.storage import LOCK, NOT_SHARED, storage

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
JOB_SECONDS = 120.0  # that the look at a node may take, waiting for one included
SHOWN = 8  # of many nodes alike
KILL_WAIT = 15  # seconds: a batch script needs a third of it to judge ranks that hang until the time limit
BAD = ("DOWN", "DRAIN", "FAIL", "INVAL", "NOT_RESPONDING")
_CREDENTIAL = re.compile(r"cred_expire=(\d+)")


def diagnose(folder: Path, *, job: bool = False, partition: str | None = None) -> Iterator[Finding]:
    """Look at everything, in the order in which a job meets it; a finding as soon as it is there.

    Args:
        folder: where runs are to live; made if absent.
        job: look at a node as well, in a job of a minute.
        partition: for that job; by default the site's, else the cluster's own.
    """
    yield from versions()
    yield from driver(needed=False, cuda=torch_cuda())
    yield from look_at_env()
    site, findings = look_at_site()
    yield from findings
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield Finding("wrong", "file system", f"{printable(folder)} cannot be made: {error.strerror}", "name another")
        return
    yield from network({**os.environ, **site.environment}, node=False)
    slurm = list(look_at_slurm(site))
    yield from storage(folder, several=not _within(folder, site.shared) and _several_machines())
    yield from slurm
    if job and not any(finding.level == "wrong" and finding.subject in ("slurm", "controller") for finding in slurm):
        yield from look_at_node(folder, site, partition or site.partition)


def _within(folder: Path, shared: tuple[Path, ...]) -> bool:
    return any(folder.resolve().is_relative_to(place) for place in shared)


def _several_machines() -> bool:
    """Whether the cluster has nodes that are other machines than this one; so it is taken to be where nothing says."""
    try:
        return any(record.get("NodeHostName") != os.uname().nodename for record in client.show("node"))
    except SlurmError:
        return True


# --- the site -------------------------------------------------------------------------------------------------------


def look_at_site() -> tuple[Site, list[Finding]]:
    """The site file, with everything it names that this machine can check."""
    try:
        site = load_site()
    except SiteError as error:
        return Site(), [Finding("wrong", "site file", str(error), "mend that line")]
    if site.source is None:
        text = "none: jobs run what is on PATH, with the cluster's own partition and account"
        return site, [Finding("ok", "site file", text)]
    found = []
    if site.python and os.path.isabs(site.python) and not os.access(site.python, os.X_OK):
        text = f"python: {printable(site.python)} cannot be run on this machine"
        found.append(Finding("warning", "site file", text, "mend its path, if nodes lack it too"))
    for place in site.shared:
        if not place.is_dir():
            text = f"shared: {printable(place)} is no folder here"
            found.append(Finding("wrong", "site file", text, "mend it, or take it out"))
    if site.container is not None and site.container.kind == "apptainer" and shutil.which("apptainer") is None:
        text = "container: no `apptainer` on this machine"
        found.append(
            Finding("warning", "site file", text, "see that nodes have it, or load its module in the prologue")
        )
    return site, found or [Finding("ok", "site file", printable(site.source))]


# --- Slurm ----------------------------------------------------------------------------------------------------------


def look_at_slurm(site: Site) -> Iterator[Finding]:
    """Commands, controller, authentication, what is configured, partitions, nodes."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        yield Finding(
            "wrong", "slurm", f"not on PATH: {', '.join(missing)}",
            "work on a login node, load the cluster's Slurm module, or try `potamos cluster up`",
        )  # fmt: skip
        return
    try:
        yield Finding("ok", "slurm", client.run("sinfo", "--version", timeout=10).strip().removeprefix("slurm "))
        up = client.alive()
    except SlurmError as error:
        up = False
        yield Finding("warning", "slurm", str(error), "set SLURM_CONF, or ask who runs the cluster")
    if not up:
        yield Finding(
            "wrong", "controller", "does not answer",
            "see `scontrol ping`; is SLURM_CONF that of this cluster, and munge running here?",
        )  # fmt: skip
        return
    yield Finding("ok", "controller", "answers")
    try:
        settings = configuration(client.run("scontrol", "show", "config"))
        yield from authentication(settings)
        yield from judge_settings(settings)
        yield from judge_partitions(client.partitions(), site)
        yield from judge_nodes(client.show("node"))
    except SlurmError as error:
        yield Finding("wrong", "controller", str(error), "try again; if it stays so, ask who runs the cluster")


def configuration(text: str) -> dict[str, str]:
    """What ``scontrol show config`` prints, by key."""
    pairs = (line.partition("=") for line in text.splitlines() if re.match(r"\w[\w\[\]]*\s+=", line))
    return {key.strip(): value.strip() for key, _, value in pairs}


def authentication(settings: Mapping[str, str]) -> Iterator[Finding]:
    """Whether munge makes credentials here that it accepts itself."""
    if settings.get("AuthType") != "auth/munge":
        yield Finding("ok", "authentication", settings.get("AuthType", "unknown"))
        return
    match = re.search(r"socket=([^,]+)", settings.get("AuthInfo", ""))
    at = ["--socket", match[1]] if match else []
    if shutil.which("munge") is None or shutil.which("unmunge") is None:
        yield Finding("ok", "munge", "its commands are not on PATH, but the controller accepts this machine")
        return
    try:
        made = subprocess.run(["munge", *at, "-n"], capture_output=True, timeout=10, check=True)
        subprocess.run(["unmunge", *at], input=made.stdout, capture_output=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stderr", None) or b""
        text = " ".join(said.decode(errors="replace").split()) or str(error)
        yield Finding("warning", "munge", printable(text), "start munged here: systemctl start munge")
        return
    yield Finding("ok", "munge", "makes credentials and accepts them")


def look_at_env() -> Iterator[Finding]:
    """Whether `env` can hold back the signals that reach ranks while Python starts, as the batch script asks of it."""
    try:
        command = ["env", "--block-signal=USR1", "--block-signal=TERM", "true"]
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (subprocess.SubprocessError, OSError):
        done = None
    if done is not None and done.returncode == 0:
        yield Finding("ok", "env", "holds signals back")
        return
    yield Finding(
        "warning", "env", "has no --block-signal on this machine, and no rank starts on a node without it",
        "see that the nodes, and the container's image, have GNU coreutils 8.31 or newer: env --version",
    )  # fmt: skip


def judge_settings(settings: Mapping[str, str]) -> Iterator[Finding]:
    """What of a cluster's configuration decides how runs survive."""
    credential = _CREDENTIAL.search(settings.get("AuthInfo", ""))
    delay = int(credential[1]) if credential else 120
    wait = re.match(r"\d+", settings.get("KillWait", ""))
    text = f"a requeued job waits {delay} s; one that is ended has {wait[0] if wait else '?'} s to save"
    yield Finding("ok", "requeue", text)
    if wait is not None and int(wait[0]) < KILL_WAIT:
        yield Finding(
            "warning", "time limit", f"KillWait is {wait[0]} s: too short to judge ranks that hang until the limit",
            f"ask who runs the cluster for KillWait={KILL_WAIT} or more (Slurm's default is 30)",
        )  # fmt: skip
    modes = [mode.strip() for mode in settings.get("PreemptMode", "OFF").split(",")]
    if "CANCEL" in modes:
        yield Finding(
            "warning", "preemption", "PreemptMode is CANCEL: a preempted job is ended, not put back",
            "submit with --chain N, so that another job goes on with the run",
        )  # fmt: skip
    elif modes != ["OFF"]:
        yield Finding("ok", "preemption", ",".join(modes).lower())


def judge_partitions(partitions: Mapping[str, Partition], site: Site) -> Iterator[Finding]:
    """Every partition's limits; whether jobs have one to go to."""
    if not partitions:
        yield Finding("wrong", "partition", "there is none that you may use", "ask who runs the cluster for access")
        return
    for partition in partitions.values():
        name = partition.name + (" (default)" if partition.default else "")
        text = f"{name}: nodes {partition.nodes}, {partition.gpus_per_node} GPUs a node, {partition.cpus} CPUs, "
        text += f"{partition.memory / 1024:.0f} GiB, at most {format_time(partition.max_time)}"
        if partition.default_time is not None and partition.default_time != partition.max_time:
            text += f", {format_time(partition.default_time)} where no time is asked for"
        if partition.state == "UP":
            yield Finding("ok", "partition", text)
        else:
            chosen = site.partition == partition.name or (site.partition is None and partition.default)
            yield Finding(
                "wrong" if chosen else "warning", "partition", f"{text}; it is {partition.state}",
                "choose another with --partition, or `partition:` in site.yaml",
            )  # fmt: skip
    names = ", ".join(partitions)
    if site.partition is not None and site.partition not in partitions:
        yield Finding(
            "wrong", "partition", f"site.yaml asks for {printable(site.partition)}, which this cluster lacks",
            f"choose among {names}",
        )  # fmt: skip
    elif site.partition is None and not any(partition.default for partition in partitions.values()):
        yield Finding("warning", "partition", "none is the default", f"set `partition:` in site.yaml: one of {names}")


def judge_nodes(records: list[dict[str, str]]) -> Iterator[Finding]:
    """How many nodes can be had, and why others cannot; GPUs as Slurm counts them."""
    bad = {r["NodeName"]: r for r in records if any(word in r.get("State", "").upper() for word in BAD)}
    gpus = Counter(client.gpus(r.get("Gres", "")) for r in records)
    what = ", ".join(f"{count} with {each} GPUs" for each, count in sorted(gpus.items(), reverse=True))
    level: Level = "ok" if len(bad) < len(records) else "wrong"
    remedy = "" if level == "ok" else "ask who runs the cluster; reasons follow"
    yield Finding(level, "nodes", f"{len(records) - len(bad)} of {len(records)} can be had ({what})", remedy)
    reasons: dict[str, list[str]] = {}
    for name, record in bad.items():
        reason = " ".join(record.get("Reason", "no reason given").split())
        reasons.setdefault(f"{record['State'].lower()}: {printable(reason)}", []).append(name)
    for reason, names in list(reasons.items())[:SHOWN]:
        shown = ",".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        yield Finding(
            "warning", "nodes", f"{shown} {reason}", "scontrol update nodename=NAME state=resume, once mended"
        )
    if len(reasons) > SHOWN:
        yield Finding("warning", "nodes", f"{len(reasons) - SHOWN} more reasons", "sinfo -R lists all")


# --- a node ---------------------------------------------------------------------------------------------------------

# Where the folder is not shared, the program is not there either, so the shell must say it.
_NODE = """
[ -e "$1/lock" ] || { printf '%s\\n' "$3"; exit 0; }
export PYTHONPATH=$1
exec "$2" -P -m potamos.slurm.machine "$1" --token "$4" --gpus "$5"
"""


def look_at_node(folder: Path, site: Site, partition: str | None) -> Iterator[Finding]:
    """What a node says of itself, in a job of a minute with the site's own prologue, environment and interpreter."""
    try:
        known = client.partitions()
        place = Path(tempfile.mkdtemp(prefix=".potamos-doctor-", dir=folder.absolute()))
    except (SlurmError, OSError) as error:
        yield Finding("wrong", "node", printable(error), "see the lines above")
        return
    chosen = known.get(partition) if partition else next((p for p in known.values() if p.default), None)
    gpus = 1 if chosen is not None and chosen.gpus_per_node else 0
    options = {"nodes": 1, "ntasks": 1, "time": 2, "immediate": int(JOB_SECONDS / 2), "job-name": "potamos-doctor"}
    options |= {key: getattr(site, key) for key in ("account", "qos", "constraint")}
    options |= {"partition": partition, "gpus-per-node": gpus or None}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(site.environment.items())]
    absent = Finding("wrong", "shared folder", f"{printable(folder)} on the node is not the one here", NOT_SHARED)
    try:
        (place / "potamos").symlink_to(Path(__file__).resolve().parent.parent)
        with open(place / LOCK, "w") as held:
            token = secrets.token_hex(8)
            held.write(token)
            held.flush()
            os.fsync(held.fileno())
            with contextlib.suppress(OSError):  # a file system without locks, of which `storage` has told
                fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            out = client.run(
                "srun", *(f"--{key}={value}" for key, value in options.items() if value is not None),
                "bash", "-c", "\n".join([*site.prologue, *exports, _NODE]), "potamos-doctor",
                str(place), site.python or sys.executable, json.dumps([asdict(absent)]), token, str(gpus),
                timeout=JOB_SECONDS,
            )  # fmt: skip
        yield from read_findings(out)
    except (SlurmError, OSError) as error:
        remedy = "if all nodes are taken, try again later or with another --partition"
        yield Finding("wrong", "node", printable(error), remedy)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def read_findings(out: str) -> Iterator[Finding]:
    """What a node printed; its prologue may have printed before it."""
    for line in reversed(out.splitlines()):
        try:
            return iter([Finding(**record) for record in json.loads(line)])
        except (ValueError, TypeError):
            continue
    text = printable(out.strip()[-200:]) or "nothing"
    return iter([Finding("wrong", "node", f"the look at a node printed: {text}", "see the prologue in site.yaml")])
