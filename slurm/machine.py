"""What a machine has of what a run needs: versions, driver, network, limits.

Serves `doctor.py` on the machine that one submits from and, as ``python -m potamos.slurm.machine``, on a node.
Imports no torch: what it wants to know of it, torch's files say.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from potamos.slurm.finding import GIB, Finding, Level, text_of
from potamos.slurm.status import printable
from potamos.slurm.storage import shared_with, storage

# The oldest driver for each CUDA: NVIDIA, "CUDA Compatibility", table of minor version compatibility.
DRIVERS = {11: 450, 12: 525, 13: 580}


# --- versions -------------------------------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    """Of this program, Python and what it computes with."""
    yield Finding("ok", "potamos", _version("potamos") or "not installed, run from its sources")
    yield Finding("ok", "python", f"{sys.version.split()[0]}, {printable(sys.executable)}")
    torch = _version("torch")
    if torch is None:
        yield Finding(
            "wrong", "torch", f"{sys.executable} has no torch",
            "install it there, or name another interpreter with `python:` in site.yaml",
        )  # fmt: skip
        return
    cuda = torch_cuda()
    yield Finding("ok", "torch", f"{torch}, " + (f"for CUDA {cuda}" if cuda else "for CPUs only"))
    triton = _version("triton")
    if triton is None and cuda:
        yield Finding("warning", "triton", "not installed: kernels run in their slow form", "pip install triton")
    elif triton is not None:
        yield Finding("ok", "triton", triton)


def torch_cuda() -> str | None:
    """The CUDA that torch was built for, from its own file; None for a build without."""
    spec = importlib.util.find_spec("torch")
    for place in (spec.submodule_search_locations if spec else None) or ():
        try:
            text = (Path(place) / "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        if match := re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE):
            return match[1]
    return None


def driver(
    *, needed: bool, cuda: str | None = None, place: Path = Path("/proc/driver/nvidia/version")
) -> Iterator[Finding]:
    """NVIDIA's driver, against the CUDA that torch was built for. A login node needs none."""
    try:
        match = re.search(r"Kernel Module.*?\s(\d+)\.(\d+(?:\.\d+)?)\s", place.read_text())
    except OSError:
        match = None
    if match is None:
        if needed:
            yield Finding(
                "wrong", "driver", "no NVIDIA driver here", "ask for nodes with GPUs: partition or constraint"
            )
        else:
            yield Finding("ok", "driver", "no NVIDIA driver here, where no GPU is asked for")
        return
    found = f"{match[1]}.{match[2]}"
    least = DRIVERS.get(int(cuda.partition(".")[0])) if cuda else None
    if cuda is None:
        yield Finding(
            "wrong" if needed else "warning", "driver", f"NVIDIA {found}, but torch was built without CUDA",
            "install a torch that was built for CUDA",
        )  # fmt: skip
    elif least is not None and int(match[1]) < least:
        yield Finding(
            "wrong", "driver", f"NVIDIA {found} is too old for torch's CUDA {cuda}, which needs {least}",
            f"install a torch that was built for an older CUDA, or ask for a driver from {least} on",
        )  # fmt: skip
    else:
        yield Finding("ok", "driver", f"NVIDIA {found}, good for torch's CUDA {cuda}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- network --------------------------------------------------------------------------------------------------------


def network(
    variables: Mapping[str, str],
    *,
    node: bool,
    net: Path = Path("/sys/class/net"),
    ib: Path = Path("/sys/class/infiniband"),
) -> Iterator[Finding]:
    """The interfaces that NCCL and gloo may use, what they were told to use, and InfiniBand.

    Args:
        variables: what the ranks will have set.
        node: whether ranks run here; elsewhere the interfaces may be others.
    """
    up = interfaces(net)
    bad: Level = "wrong" if node else "warning"
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = variables.get(name)
        if wanted and not any(_matches(wanted, interface) for interface in (*up, "lo")):
            yield Finding(
                bad, "network", f"{name}={wanted}, but this machine has {', '.join(up) or 'no interface'}",
                "set it to the nodes' interface under `environment:` in site.yaml (ip -br address shows them)",
            )  # fmt: skip
    told = all(variables.get(name) for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"))
    if len(up) > 1 and not told:
        yield Finding(
            "warning", "network", f"several interfaces ({', '.join(up)}), and ranks may choose different ones",
            "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME under `environment:` in site.yaml",
        )  # fmt: skip
    elif up:
        yield Finding("ok", "network", ", ".join(up))
    else:
        yield Finding(bad, "network", "no interface but the loopback is up: only runs on one node can meet", "")
    if up and not variables.get("GLOO_SOCKET_IFNAME") and (own := _own_address()) and own.startswith("127."):
        yield Finding(
            "warning", "network", f"{printable(socket.gethostname())} is {own} to itself, where no other node finds it",
            "set GLOO_SOCKET_IFNAME under `environment:` in site.yaml",
        )  # fmt: skip
    active = ports(ib)
    if active:
        yield Finding("ok", "infiniband", ", ".join(active))
    elif node:
        yield Finding("warning", "infiniband", "no active port: ranks on several nodes talk over TCP, slowly", "")
    else:
        yield Finding("ok", "infiniband", "none on this machine")


def interfaces(net: Path = Path("/sys/class/net")) -> list[str]:
    """The interfaces that are up, without the loopback and those of containers and virtual machines."""
    try:
        names = sorted(os.listdir(net))
    except OSError:
        return []
    virtual = re.compile(r"lo|docker.*|veth.*|virbr.*|br-.*|cni.*|flannel.*|cali.*|ifb\d+|dummy\d+|tunl\d+|sit\d+")
    return [
        name for name in names if not virtual.fullmatch(name) and text_of(net / name / "operstate") in ("up", "unknown")
    ]


def ports(ib: Path = Path("/sys/class/infiniband")) -> list[str]:
    """Active InfiniBand (or RoCE) ports, with their rates."""
    found = []
    for state in sorted(ib.glob("*/ports/*/state")):
        if "ACTIVE" in text_of(state):
            rate = text_of(state.with_name("rate")).split(" (")[0]
            found.append(f"{state.parent.parent.parent.name} port {state.parent.name}" + (f" {rate}" if rate else ""))
    return found


def _matches(wanted: str, interface: str) -> bool:
    """Whether a pattern of NCCL's names an interface: prefixes, ``=`` for whole names, ``^`` for all but these."""
    if wanted.startswith("^"):
        return not _matches(wanted[1:], interface)
    if wanted.startswith("="):
        return interface in wanted[1:].split(",")
    return any(part and interface.startswith(part) for part in wanted.split(","))


def _own_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


# --- on a node ------------------------------------------------------------------------------------------------------


def limits(shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """What the system grants a process: memory that it may pin for InfiniBand, shared memory, open files."""
    pinned, files = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if ports() and pinned != resource.RLIM_INFINITY:
        yield Finding(
            "wrong", "limits", f"a process may pin only {pinned / GIB:.2f} GiB, too little for InfiniBand",
            "ask for unlimited memlock on the nodes (PropagateResourceLimitsExcept=MEMLOCK in slurm.conf)",
        )  # fmt: skip
    if files < 4096:
        yield Finding(
            "warning", "limits", f"only {files} open files", "put `ulimit -n 65536` into site.yaml's prologue"
        )
    try:
        room = shutil.disk_usage(shm)
    except OSError:
        yield Finding("warning", "limits", f"no {shm}: NCCL and data readers share memory there", "")
        return
    if room.total < GIB:
        yield Finding(
            "warning", "limits", f"{shm} has only {room.total / GIB:.2f} GiB", "give containers --shm-size=16g"
        )
    else:
        yield Finding("ok", "limits", f"{files} open files, {room.total / GIB:.0f} GiB in {shm}")


def gpus(wanted: int) -> Iterator[Finding]:
    """What torch sees of the GPUs that Slurm gave; the one place that imports it."""
    try:
        import torch

        seen = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding("wrong", "gpus", f"torch cannot be used: {error}", "see the lines on torch and the driver")
        return
    what = f"{len(seen)} {seen[0]}" if seen else "none"
    if len(seen) < wanted:
        yield Finding(
            "wrong", "gpus", f"asked for {wanted}, torch sees {what}",
            "see the line on the driver; in slurm.conf, GresTypes and gres.conf must name the devices",
        )  # fmt: skip
    else:
        yield Finding("ok", "gpus", f"torch sees {what}")


def on_node(place: Path, token: str, gpus_wanted: int) -> list[Finding]:
    """Everything worth looking at where ranks will run. ``place``: made by `doctor.py` in the folder of the runs."""
    found = [*versions(), *driver(needed=gpus_wanted > 0, cuda=torch_cuda()), *gpus(gpus_wanted)]
    found += [*network(os.environ, node=True), *limits(), *shared_with(place, token)]
    found += [finding for finding in storage(place.parent, several=False) if finding.subject != "locks"]
    node = printable(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    return [replace(finding, text=f"on {node}: {finding.text}") for finding in found]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m potamos.slurm.machine", description="Look at this node.")
    parser.add_argument("place", type=Path)
    parser.add_argument("--token", required=True)
    parser.add_argument("--gpus", type=int, default=0)
    asked = parser.parse_args()
    print(json.dumps([asdict(finding) for finding in on_node(asked.place, asked.token, asked.gpus)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
