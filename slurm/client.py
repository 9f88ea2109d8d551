"""Slurm's commands: run them, and read what they print. Reads text, not JSON, whose plugin many clusters lack."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UNLIMITED = "UNLIMITED"
SEPARATOR = "\x1f"  # of columns: no name, folder or reason holds it, and Slurm passes it through

# Variables of Slurm that say where the cluster is. All others change what commands do or print (SBATCH_PARTITION
# overrules the script, SQUEUE_STATES hides jobs), or describe the job that this program happens to run in.
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_DROPPED = re.compile(r"(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SCANCEL|SCONTROL|SACCT)_")

NO_CLUSTER = (
    ". Is this a machine of the cluster, and is its controller up (scontrol ping)? SLURM_CONF names the cluster's "
    "slurm.conf where it lies elsewhere"
)

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})", re.ASCII)
# A record's key is a word before `=`; what follows reaches to the next such word, so values may hold spaces.
_KEY = re.compile(r"(?:^|(?<=\s))([A-Z][\w/]*(?::\w+)*)=")
# The one value that its user chooses and that others follow: a job's name may look like anything.
_NAME = re.compile(r"(?<=\s)JobName=(.*) (?=UserId=\S+\(\d+\) GroupId=)", re.DOTALL)


class SlurmError(ValueError):
    """Slurm refused something, or does not answer."""


class NoSlurm(SlurmError):
    """This machine has no Slurm commands."""

    def __init__(self, command: str) -> None:
        super().__init__(
            f"no Slurm here: `{command}` is not on PATH. Work on a login node of the cluster, load its module, or try "
            "`potamos cluster up`; `potamos submit --dry-run` prints the script without Slurm"
        )


@dataclass(frozen=True)
class QueueEntry:
    """One job, or one task of an array, that waits or runs.

    ``id`` is ``12``, or ``12_3`` for task 3 of array 12; ``array`` is then ``12``. ``state``: Slurm's word, as in
    RUNNING. ``reason``: why it waits. ``nodes``: a host list, empty while it waits. ``time_left``: seconds, None
    without a limit. ``start``: when it starts or started, as Slurm prints it; empty if unknown. ``folder``: where it
    runs.
    """

    id: str
    array: str | None
    state: str
    reason: str
    nodes: str
    time_left: int | None
    partition: str
    start: str
    user: str
    name: str
    folder: str

    def is_in(self, folders: Iterable[str | os.PathLike[str]]) -> bool:
        """Whether it runs in one of these folders, whatever they are called where it was submitted. Numbers alone do
        not tell whose a job is: another cluster has them too, and a controller that lost its state deals them anew."""
        places = [os.fspath(folder) for folder in folders]
        return self.folder in places or os.path.realpath(self.folder) in map(os.path.realpath, places)


@dataclass(frozen=True)
class Partition:
    """Times in seconds, None without a limit; memory in MiB. What a node has is that of the largest in it. ``gpu``: the
    type of its GPUs as the cluster calls it, if it does."""

    name: str
    nodes: int
    max_nodes: int | None
    max_time: int | None
    default_time: int | None
    default: bool
    state: str
    gpus_per_node: int
    cpus: int
    memory: int
    gpu: str | None = None


# --- running --------------------------------------------------------------------------------------------------------


def run(*argv: str, timeout: float = 30, check: bool = True) -> str:
    """What a Slurm command prints on its standard output.

    Args:
        argv: the command and its arguments, each passed as it is: no shell reads them.
        timeout: seconds until it is killed. Slurm's commands wait for a dead controller, some for minutes.
        check: False returns what it printed though it failed.

    Raises:
        NoSlurm: there is no such command.
        SlurmError: it failed, or did not end in time; in Slurm's own words.
    """
    try:
        done = subprocess.run(
            argv, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout, env=environment(),
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (FileNotFoundError, PermissionError):
        raise NoSlurm(argv[0]) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"`{argv[0]}` did not answer within {timeout:g} s: the controller may be down; see `scontrol ping`"
        ) from None
    if check and done.returncode:
        said = complaint(done.stderr or done.stdout) or f"exit {done.returncode}"
        lost = "configuration source" in said or "Unable to contact slurm" in said
        raise SlurmError(f"`{argv[0]}` says: {said}{NO_CLUSTER if lost else ''}")
    return done.stdout


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables (this process's own by default) without those that change what Slurm's commands do."""
    variables = os.environ if variables is None else variables
    return {name: value for name, value in variables.items() if name in _KEPT or not _DROPPED.match(name)}


def complaint(stderr: str) -> str:
    """What a command complains about, as one line and each thing once."""
    lines = (re.sub(r"^(\w+: )?(error|fatal): ", "", line.strip()) for line in stderr.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line and line != "Batch job submission failed"))


# --- reading --------------------------------------------------------------------------------------------------------


def fields(text: str) -> dict[str, str]:
    """The keys and values of one line of ``scontrol show ... -o``. Values may hold spaces and ``=``.

    Where a value (a comment, a folder) holds what looks like a key of Slurm's, the first of a name counts.
    """
    found: dict[str, str] = {}
    text = text.rstrip()
    if match := _NAME.search(text):
        found["JobName"] = match[1]
        text = text[: match.start()] + text[match.end() :]
    keys = list(_KEY.finditer(text))
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        found.setdefault(key[1], text[key.end() : following.start() if following else None].strip())
    return found


def show(kind: str, name: str | None = None) -> list[dict[str, str]]:
    """The records of ``scontrol show KIND [NAME]``: jobs, nodes, partitions. Empty if there are none.

    Raises:
        SlurmError: there is none of that name.
    """
    out = run("scontrol", "show", kind, *([name] if name is not None else []), "-o")
    return [fields(line) for line in out.splitlines() if _KEY.match(line)]


_COLUMNS = ("%i", "%F", "%T", "%r", "%N", "%L", "%P", "%S", "%u", "%j", "%Z")


def queue(jobs: Iterable[str] | None = None, *, user: str | None = None) -> dict[str, QueueEntry]:
    """What waits or runs, by id, one entry for each task of an array; of ``jobs`` or of one user alone if given.

    Args:
        jobs: ids; ``12`` stands for every task of array 12. Those that the cluster has forgotten are left out.
    """
    wanted = None if jobs is None else sorted(set(jobs))
    if wanted == []:
        return {}
    command = ["squeue", "--noheader", "--array", "--all", "-o", SEPARATOR.join(_COLUMNS)]
    if user is not None:
        command += ["--user", user]
    try:
        out = run(*command, *(["--jobs", ",".join(wanted)] if wanted is not None else []))
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    entries = (_entry(line) for line in out.splitlines() if line.count(SEPARATOR) >= len(_COLUMNS) - 1)
    return {entry.id: entry for entry in entries}


def _entry(line: str) -> QueueEntry:
    task, job, state, reason, nodes, left, partition, start, user, name, folder = line.split(
        SEPARATOR, len(_COLUMNS) - 1
    )
    return QueueEntry(
        id=task, array=job if task != job else None, state=state, reason="" if reason == "None" else reason,
        nodes=nodes, time_left=parse_time(left), partition=partition, start="" if start == "N/A" else start, user=user,
        name=name, folder=folder,
    )  # fmt: skip


def partitions() -> dict[str, Partition]:
    """Every partition that this user may see, with what its nodes have."""
    sizes: dict[str, list[tuple[int, int, int]]] = {}
    types: dict[str, str] = {}
    for line in run("sinfo", "--noheader", "--all", "--exact", "-o", SEPARATOR.join(("%R", "%G", "%c", "%m"))).split(
        "\n"
    ):
        if line.count(SEPARATOR) == 3:
            name, gres, cpus, memory = line.split(SEPARATOR)
            if match := re.search(r"(?:^|,)gpu:([^:,(]*[^:,(\d][^:,(]*)", gres):
                types.setdefault(name, match[1])
            sizes.setdefault(name, []).append((gpus(gres), int(cpus.strip("+") or 0), int(memory.strip("+") or 0)))
    found = {}
    for record in show("partition"):
        name = record["PartitionName"]
        most = [max(column) for column in zip(*sizes.get(name, [(0, 0, 0)]), strict=True)]
        maximum = record.get("MaxNodes", UNLIMITED)
        found[name] = Partition(
            name=name,
            nodes=int(record.get("TotalNodes", 0)),
            max_nodes=int(maximum) if maximum.isdigit() else None,
            max_time=parse_time(record.get("MaxTime", UNLIMITED)),
            default_time=parse_time(record.get("DefaultTime", UNLIMITED)),
            default=record.get("Default") == "YES",
            state=record.get("State", "UP"),
            gpus_per_node=most[0],
            cpus=most[1],
            memory=most[2],
            gpu=types.get(name),
        )
    return found


def gpus(gres: str) -> int:
    """How many GPUs a node's generic resources hold, of all types: ``gpu:h100:8(S:0-1),shard:64`` holds 8."""
    bare = re.sub(r"\([^)]*\)", "", gres)
    return sum(int(m[1]) for m in re.finditer(r"(?:^|,)gpu:(?:[^:,]+:)?(\d+)(?=,|$)", bare))


def alive(timeout: float = 10) -> bool:
    """Whether a controller answers.

    Raises:
        NoSlurm: there is no such command.
    """
    try:
        return " is UP" in run("scontrol", "ping", timeout=timeout, check=False)
    except NoSlurm:
        raise
    except SlurmError:
        return False


def is_down(timeout: float = 10) -> bool:
    """Whether no controller answers: known at once where squeue would try for 9 s, or 18 s when asked for one job."""
    try:
        said = run("scontrol", "ping", timeout=timeout, check=False)
    except NoSlurm:
        return False  # whatever is asked next says so
    except SlurmError:
        return True
    return " is DOWN" in said and " is UP" not in said


def check_answers() -> None:
    """Refuse at once what would wait for a controller that is away.

    Raises:
        SlurmError: it is.
    """
    if is_down():
        raise SlurmError(
            "the controller does not answer, so nothing was done; see `scontrol ping`, and try again later"
        )


# --- times ----------------------------------------------------------------------------------------------------------


def parse_time(text: str) -> int | None:
    """Seconds of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None for what has no limit.

    Raises:
        SlurmError: it is no such time.
    """
    if text.strip().upper() in {UNLIMITED, "INFINITE", "NOT_SET", "N/A", "NONE", "INVALID", ""}:
        return None
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise SlurmError(f"{text!r} is no time: write days-hours:minutes:seconds, as in 2-00:00:00, or minutes")
    numbers = [int(number) for number in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, *[*numbers, 0][:2]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def format_time(seconds: int | None) -> str:
    """Seconds as Slurm reads and writes them: ``2-00:00:00``, ``01:30:00``; UNLIMITED for None."""
    if seconds is None:
        return UNLIMITED
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}-' if days else ''}{hour:02}:{minute:02}:{second:02}"
