"""The examination of nodes before a run: each planted fault is found on its node, in words, and nowhere else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from potamos.parallel import node_check, node_network
from potamos.parallel.node_judge import find_bad, read_record, slow_nodes
from potamos.parallel.node_local import Machine, examine_folder, examine_gpus
from potamos.parallel.node_record import Limits, Record, record_path

Make = Callable[[int], Machine]
FEW = "--run-disk=0.001", "--tmp-disk=0.001"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_network, "REDUCED", {"cpu": 2**12})
    monkeypatch.setattr(node_network, "EXCHANGED", {"cpu": 2**12})
    monkeypatch.setattr(node_network, "PASS_ON_SECONDS", 1.0)


def nodes(
    folder: Path,
    machine: Make = lambda rank: Machine(),
    *more: str,
    before: Callable[[int], object] = lambda rank: None,
    after: Callable[[int], object] = lambda rank: None,
    timeout: float = 30.0,
) -> Callable[[int, int], int]:
    """What each rank runs: the check of node n<rank>, as a launcher of one task a node starts it."""
    (folder / "logs").mkdir(exist_ok=True)

    def work(rank: int, world: int) -> int:
        os.environ["SLURMD_NODENAME"] = f"n{rank}"
        os.chdir(folder)
        before(rank)
        status = node_check.main(
            ["--out", "logs", "--attempt", "3", f"--timeout={timeout}", *FEW, *more], machine(rank)
        )
        after(rank)
        return status

    return work


def judged(folder: Path, count: int, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], str]:
    """Status, printed nodes and reasons of the judge."""
    capsys.readouterr()
    names = ",".join(f"n{rank}" for rank in range(count))
    status = node_check.main(["--judge", str(folder / "logs"), "--attempt", "3", "--nodes", names])
    said = capsys.readouterr()
    return status, said.out.split(), said.err


def record(folder: Path, rank: int) -> Record:
    found = read_record(folder / "logs", 3, f"n{rank}")
    assert found is not None, sorted(os.listdir(folder / "logs"))
    return found


def test_good_nodes_pass_with_figures(tmp_path: Path, run_ranks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(3, nodes(tmp_path, lambda _: Machine(), "--pairs"), init=False) == [0, 0, 0]
    for rank in range(3):
        found = record(tmp_path, rank)
        assert (found.node, found.rank, found.world, found.met) == (f"n{rank}", rank, 3, True)
        assert (found.problems, found.network, found.missing) == ([], None, [])
        figures = found.figures
        assert figures["free_gb"]["run disk"] == pytest.approx(Machine().free(tmp_path) / 1e9, rel=0.2)
        assert abs(figures["skew_to_files_s"]) < 0.1
        assert abs(figures["skew_to_head_s"]) < 1.0
        assert [rate > 0 for rate in figures["all_reduce_gb_s"]] == [True]
        assert figures["pairs_gb_s"].keys() == {f"n{other}" for other in range(3)} - {f"n{rank}"}
    assert (tmp_path / "logs" / "preflight-3.n0.json").read_text().count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["logs"], "probe files are removed"
    assert judged(tmp_path, 3, capsys) == (0, [], "")


# --- one planted fault, found where it is ------------------------------------------------------------------------


class NoGpu(Machine):
    def gpus(self) -> int:
        return 0


class FullDisk(Machine):
    def free(self, folder: Path) -> int:
        return 12_000


class WrongClock(Machine):
    """Ahead by what a machine without a time server drifts in months."""

    def now(self) -> float:
        return time.time() + 30


class SlowClock(Machine):
    def now(self) -> float:
        return time.time() - 30


class WrongMatmul(Machine):
    def matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = left @ right
        product[17, 300] += 1  # a single flipped bit
        return product


class StuckDisk(Machine):
    def free(self, folder: Path) -> int:
        time.sleep(60)
        return 0


class ServedClock(Machine):
    """A clock whose files are stamped by it too, as some file systems do: only the other nodes tell."""

    def __init__(self) -> None:
        self.called = 0

    def now(self) -> float:
        self.called += 1
        return time.time() - (7200 if self.called > 2 else 0)


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        (FullDisk, "run disk", r"/.* has 1.2e-05 GB free; 0.001 GB are asked for"),
        (FullDisk, "tmp disk", r"has 1.2e-05 GB free"),
        (WrongClock, "clock", r"this node's clock is (29.9|30.0) s ahead of that of the server of /"),
        (WrongClock, "clock", r"this node's clock is (29.9|30.0) s ahead of most nodes'; limit 5 s"),
        (SlowClock, "clock", r"this node's clock is (29.9|30.0) s behind that of the server of /"),
        (ServedClock, "clock", r"this node's clock is (7200.0|7199.9|7200.1) s behind most nodes'; limit 5 s"),
        (WrongMatmul, "matmul", r"the processor multiplies wrongly: 1 of 147456 sums \(float32\)"),
    ],
)
def test_a_fault_of_one_node_is_found_there_alone(
    fault: type[Machine],
    check: str,
    words: str,
    tmp_path: Path,
    run_ranks: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_ranks(3, nodes(tmp_path, lambda rank: fault() if rank == 1 else Machine()), init=False) == [0, 0, 0]
    assert any(name == check and re.search(words, said) for name, said in record(tmp_path, 1).problems), record(
        tmp_path, 1
    )
    for rank in (0, 2):
        assert (record(tmp_path, rank).problems, record(tmp_path, rank).network) == ([], None)
    status, bad, said = judged(tmp_path, 3, capsys)
    assert (status, bad) == (0, ["n1"])
    assert said.startswith(f"n1: {check}: ") or f"; {check}: " in said


def test_a_clock_between_two_nodes_is_compared_with_the_head(tmp_path: Path, run_ranks: Any) -> None:
    run_ranks(2, nodes(tmp_path, lambda rank: ServedClock() if rank == 1 else Machine()), init=False)
    ((check, words),) = record(tmp_path, 1).problems
    assert check == "clock"
    assert "behind the head node's" in words
    assert record(tmp_path, 1).figures["skew_to_head_s"] == pytest.approx(-7200, abs=1)


def test_of_several_clocks_the_odd_one_is_wrong_though_it_be_the_head_s(tmp_path: Path, run_ranks: Any) -> None:
    run_ranks(3, nodes(tmp_path, lambda rank: ServedClock() if rank == 0 else Machine()), init=False)
    assert [len(record(tmp_path, rank).problems) for rank in range(3)] == [1, 0, 0]
    assert record(tmp_path, 2).figures["skew_to_head_s"] == pytest.approx(7200, abs=1)


def test_a_missing_gpu_is_counted(tmp_path: Path, run_ranks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Two(NoGpu):
        """Two GPUs, played by the processor."""

        def gpus(self) -> int:
            return 2

        def memory(self, gpu: int) -> tuple[int, int]:
            return 79 * 10**9, 80 * 10**9

    def stand_in(_: int) -> None:
        node_check.examine_gpus = lambda record, limits, machine: (  # pyright: ignore[reportAttributeAccessIssue]
            0 * examine_gpus(record, limits, machine)  # the group itself has none here
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("potamos.parallel.node_local._multiply", lambda *_: None)
        work = nodes(tmp_path, lambda rank: NoGpu() if rank == 0 else Two(), "--gpus=2", before=stand_in)
        run_ranks(2, work, init=False)
    ((check, words),) = record(tmp_path, 0).problems
    assert (check, words.partition(" (")[0]) == ("gpus", "sees 0 of 2 GPUs")
    assert record(tmp_path, 1).problems == []
    assert judged(tmp_path, 2, capsys)[:2] == (0, ["n0"])


def test_gpus_that_are_occupied_wrong_or_dead_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Three(Machine):
        def gpus(self) -> int:
            return 3

        def memory(self, gpu: int) -> tuple[int, int]:
            if gpu == 2:
                raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")
            return (80 if gpu else 12) * 10**9, 80 * 10**9

        def matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            if right.dtype == torch.bfloat16:
                return left @ right.roll(1, 0)
            return left @ right

    real = torch.Tensor.to
    here = lambda tensor, *a: real(tensor, *[x for x in a if not str(x).startswith("cuda")])  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "to", here)  # every "GPU" is the processor
    found = Record("n0", 0)
    assert examine_gpus(found, Limits(gpus=3), Three()) == 3
    assert found.problems[0] == (
        "memory", "GPU 0 has 12.0 of 80.0 GB free: another process holds the rest"
    )  # fmt: skip
    assert found.problems[1] == ("gpus", "GPU 2 does not answer: CUDA error: uncorrectable ECC error")
    assert [(check, words.partition(":")[0]) for check, words in found.problems[2:]] == [
        ("matmul", f"GPU {gpu} multiplies wrongly") for gpu in range(3)
    ]
    assert all("(bfloat16)" in words for _, words in found.problems[2:])


# --- folders that are not what they should be --------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = Record("n0", 0)
    examine_folder(found, Limits(), Machine(), tmp_path / "file" / "run")
    assert found.problems == [("run folder", f"{tmp_path}/file/run cannot be written and read: Not a directory")]


def test_a_node_that_cannot_write_its_record_has_the_head_write_it(
    tmp_path: Path, run_ranks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").write_text("")

    def unwritable(rank: int) -> None:
        if rank == 1:  # as under a file system that has gone read-only
            Record.save = _refuse  # pyright: ignore[reportAttributeAccessIssue]

    run_ranks(3, nodes(tmp_path, before=unwritable), init=False)
    found = record(tmp_path, 1)
    assert found.problems == [("run folder", "could not write its record; the head node wrote it down")]
    assert found.figures["all_reduce_gb_s"], "all of its figures are there"
    assert judged(tmp_path, 3, capsys)[:2] == (0, ["n1"])


def _refuse(*_: object) -> None:
    raise OSError(30, "Read-only file system")


def test_a_folder_that_is_not_shared_is_found(
    tmp_path: Path, run_ranks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Node 2 has a folder of the same name, but its own."""
    other = tmp_path / "local"
    (other / "logs").mkdir(parents=True)
    run_ranks(3, nodes(tmp_path, before=lambda rank: os.chdir(other) if rank == 2 else None), init=False)
    assert not record_path(tmp_path / "logs", 3, "n2").exists()
    found = read_record(other / "logs", 3, "n2")
    assert found is not None
    assert found.problems == [("run folder", f"{other} is not the one of n0: it is not shared")]
    assert judged(tmp_path, 3, capsys)[:2] == (0, ["n2"])


# --- nodes that hang, come late or cannot be reached -------------------------------------------------------------


def test_a_node_that_sleeps_is_found_by_its_missing_file(
    tmp_path: Path, run_ranks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 2 comes when the others have left; what it could still say changes nothing."""
    sleep = lambda rank: (time.sleep(3.2), os._exit(0)) if rank == 2 else None  # noqa: E731
    with contextlib.suppress(RuntimeError):
        run_ranks(4, nodes(tmp_path, before=sleep, timeout=1.0), init=False)
    for rank in (0, 1, 3):
        found = record(tmp_path, rank)
        assert found.problems == []
        assert found.missing == [2]
        assert "rank 2 of 4" in str(found.network)
    status, bad, said = judged(tmp_path, 4, capsys)
    assert (status, bad) == (0, ["n2"])
    assert said == "n2: left no record: it hangs, was ended, or cannot write into the folder\n"


def test_a_node_that_comes_too_late_is_the_bad_one(
    tmp_path: Path, run_ranks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    late = lambda rank: time.sleep(1.5) if rank == 1 else None  # noqa: E731
    with contextlib.suppress(RuntimeError):  # it may be left in the middle of the meeting
        run_ranks(3, nodes(tmp_path, before=late, timeout=1.0), init=False)
    assert record(tmp_path, 1).problems == []
    status, bad, said = judged(tmp_path, 3, capsys)
    assert (status, bad) == (0, ["n1"])
    assert "2 of 2 others waited for it" in said


def forked(work: Callable[[], object]) -> int:
    """The exit status of a process of its own: a stage that hangs ends its whole process."""
    if (pid := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_stage_that_hangs_is_left_and_named(tmp_path: Path) -> None:
    """The process ends by itself, its record written, while a call into a dead file system does not return."""
    began = time.monotonic()
    work = nodes(tmp_path, lambda _: StuckDisk(), timeout=0.3)
    assert forked(lambda: work(0, 1)) == 0
    assert time.monotonic() - began < 20
    assert record(tmp_path, 0).problems == [("disks", "no end within 0.3 s")]


def test_no_head_to_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    work = nodes(tmp_path, timeout=1.0)
    assert forked(lambda: os._exit(work(1, 2))) == 0
    found = record(tmp_path, 1)
    assert (found.met, found.problems) == (False, [])
    assert re.match(rf"cannot reach the head node at 127.0.0.1:{port}: |the meeting did not end", str(found.network))


def test_a_wrong_sum_is_found(tmp_path: Path, run_ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    real = dist.all_reduce

    def damaged(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        done = real(tensor, *arguments, **options)
        if tensor.numel() > 1:
            tensor[5] += 1
        return done

    monkeypatch.setattr(dist, "all_reduce", damaged)
    run_ranks(2, nodes(tmp_path), init=False)
    assert record(tmp_path, 0).network == "the all-reduce of cpu gives 4 instead of 3"


# --- judging -----------------------------------------------------------------------------------------------------


def good(rank: int, world: int = 4, /, **changes: Any) -> Record:
    return Record(f"n{rank}", 3, rank, world, met=True, **changes)


def bad_of(*records: Record | None) -> list[str]:
    return list(find_bad({f"n{rank}": found for rank, found in enumerate(records)}))


def test_echoes_of_a_bad_node_are_no_faults() -> None:
    waiting: dict[str, Any] = {"missing": [2], "network": "waited 180 s for rank 2 of 4"}
    assert bad_of(good(0, **waiting), good(1, **waiting), None, good(3, **waiting)) == ["n2"]
    timed_out: dict[str, Any] = {"network": "the all-reduce of cuda:0 did not end within 180 s"}
    stuck = good(1, problems=[("gpus", "no end within 180 s")])
    assert bad_of(good(0, **timed_out), stuck, good(2, **timed_out), good(3, **timed_out)) == ["n1"]


def test_a_head_that_nobody_reaches_is_bad_itself() -> None:
    cut = [Record(f"n{r}", 3, r, 4, met=False, network="cannot reach the head node") for r in (1, 2, 3)]
    head = good(0, missing=[1, 2, 3], network="waited 180 s for rank 1, 2, 3 of 4")
    assert bad_of(head, *cut) == ["n0"]


def test_a_node_that_cannot_reach_the_head_is_bad() -> None:
    waiting: dict[str, Any] = {"missing": [3], "network": "waited 180 s for rank 3 of 4"}
    cut = Record("n3", 3, 3, 4, met=False, network="cannot reach the head node")
    assert bad_of(good(0, **waiting), good(1, **waiting), good(2, **waiting), cut) == ["n3"]
    two = good(0, 2, missing=[1], network="waited"), Record("n1", 3, 1, 2, met=False, network="cannot reach")
    assert bad_of(*two) == ["n1"]
    gone = None, Record("n1", 3, 1, 2, met=False, network="cannot reach")
    assert bad_of(*gone) == ["n0"], "the head left no record, so that nobody could reach it"


def test_trouble_of_few_is_theirs_and_trouble_of_all_is_nobodys(capsys: pytest.CaptureFixture[str]) -> None:
    assert bad_of(good(0), good(1), good(2), good(3, network="Connection reset by peer")) == ["n3"]
    alone = good(0, missing=[1], network="waited 180 s for rank 1 of 4")
    assert bad_of(alone, good(1), good(2), good(3)) == ["n0"], "nobody else missed n1"
    everyone = [good(rank, network="the all-reduce of cuda:0 did not end within 180 s") for rank in range(4)]
    assert bad_of(*everyone) == ["n0", "n1", "n2", "n3"]


def write(folder: Path, *records: Record) -> None:
    for found in records:
        found.save(folder / "logs")


def test_nodes_that_all_fail_are_not_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job whose every node is excluded would never start again."""
    assert judged(tmp_path, 2, capsys)[:2] == (4, [])  # as where srun itself failed
    full = ("run disk", ". has 0 GB free; 1 GB are asked for")
    write(tmp_path, good(0, 2, problems=[full]), good(1, 2, problems=[full]))
    status, bad, said = judged(tmp_path, 2, capsys)
    assert (status, bad) == (4, [])
    assert "n0: run disk: . has 0 GB free" in said
    assert said.endswith("none of 2 nodes passed the check; leaving them out would not mend that\n")
    assert judged(tmp_path, 1, capsys)[:2] == (4, [])  # of one node, too, where the folder is at fault
    write(tmp_path, Record("n0", 3, problems=[("gpus", "sees 7 of 8 GPUs")]))
    assert judged(tmp_path, 1, capsys)[:2] == (0, ["n0"])


@pytest.mark.parametrize("line", ["", "{", "[]", '{"node": "n0"}', '{"node": "n0", "attempt": 3, "new": 1}', "3"])
def test_a_torn_or_foreign_record_counts_as_none(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    record_path(tmp_path / "logs", 3, "n0").write_text(line)
    write(tmp_path, good(1, 2))
    assert judged(tmp_path, 2, capsys)[:2] == (0, ["n0"])


def test_an_older_attempts_record_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, good(0, 2), good(1, 2))
    os.rename(record_path(tmp_path / "logs", 3, "n1"), record_path(tmp_path / "logs", 2, "n1"))
    assert judged(tmp_path, 2, capsys)[:2] == (0, ["n1"])


def test_a_slow_node_is_pointed_out_but_not_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = lambda rank: {f"n{o}": 4.0 if 2 in (o, rank) else 20.0 for o in range(5) if o != rank}  # noqa: E731
    found = [good(rank, 5, figures={"pairs_gb_s": rates(rank)}) for rank in range(5)]
    assert slow_nodes(found) == ["n2 exchanges 4 GB/s with another node, 20 is usual here"]
    write(tmp_path, *found)
    status, bad, said = judged(tmp_path, 5, capsys)
    assert (status, bad) == (0, [])
    assert said == "warning: n2 exchanges 4 GB/s with another node, 20 is usual here\n"


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
def test_every_pair_meets_once(count: int) -> None:
    met = []
    for partners in node_network._tournament(count):
        assert [partners[partners[node]] for node in range(count)] == list(range(count)), "partners agree"
        met += [(node, peer) for node, peer in enumerate(partners) if node < peer]
    assert sorted(met) == [(a, b) for a in range(count) for b in range(a + 1, count)]


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_as_a_script_calls_it(tmp_path: Path) -> None:
    """A single node, for real; then the judge, which must not wait for torch to be imported."""
    (tmp_path / "logs").mkdir()
    call = [sys.executable, "-P", "-m", "potamos.parallel.node_check", "--attempt", "3"]
    environment = {**os.environ, "SLURMD_NODENAME": "n0"}
    done = subprocess.run(
        [*call, "--out", "logs", *FEW], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["figures"]["gpus"] == 0
    assert record(tmp_path, 0).problems == []
    script = "import sys; from potamos.parallel.node_check import main; s = main(); assert 'torch' not in sys.modules"
    judge = [sys.executable, "-P", "-c", f"{script}; sys.exit(s)", "--judge", "logs", "--attempt", "3"]
    done = subprocess.run([*judge, "--nodes", "n0,n1"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "n1\n"), done.stderr


def test_a_node_without_a_meeting_point_is_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert node_check.main(["--out", str(tmp_path), "--attempt", "3"]) == 2
    assert "MASTER_ADDR and MASTER_PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--timeout", "nan"], ["--skew", "-1"], ["--gpus", "x"], ["--out", "a", "--judge", "b"]]
)
def test_wrong_calls_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        node_check.main(["--out", "logs", "--attempt", "3", *wrong])
    assert ended.value.code == 2
    assert "error: argument" in capsys.readouterr().err
