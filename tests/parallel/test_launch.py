"""parallel.launch: reading torchrun's environment, joining and leaving the group, the trainer's collectives."""

import math
import time

import pytest
import torch
import torch.distributed as dist

from potamos.parallel import launch
from potamos.parallel.launch import LaunchError, Rank

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def without(*names, **changes):
    return {name: value for name, value in (TORCHRUN | changes).items() if name not in names}


def test_an_empty_environment_is_a_single_process():
    assert Rank.from_environment({"PATH": "/bin", "MASTER_ADDR": "left over"}) == Rank(0, 1, 0, 1, 0)
    assert Rank().is_main


def test_torchruns_environment_is_read():
    rank = Rank.from_environment(TORCHRUN)
    assert rank == Rank(rank=5, world=8, local_rank=1, local_world=4, node=1)
    assert not rank.is_main
    assert Rank.from_environment(without("GROUP_RANK")).node == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, r"RANK=0 but not WORLD_SIZE, LOCAL_RANK\. Start the command with torchrun"),
        ({"WORLD_SIZE": "4"}, r"WORLD_SIZE=4 but not RANK, LOCAL_RANK"),
        (without("LOCAL_RANK"), r"RANK=5, WORLD_SIZE=8 but not LOCAL_RANK"),
        (without("MASTER_ADDR"), r"WORLD_SIZE=8 .* MASTER_ADDR .* not set"),
        (without("MASTER_ADDR", "MASTER_PORT"), r"MASTER_ADDR and MASTER_PORT"),
        (without(RANK="8"), r"RANK=8 .* less than WORLD_SIZE = 8"),
        (without(RANK="-1"), r"RANK=-1 .* at least 0"),
        (without(WORLD_SIZE="0"), r"WORLD_SIZE=0 .* at least 1"),
        (without(LOCAL_RANK="4"), r"LOCAL_RANK=4 .* less than LOCAL_WORLD_SIZE = 4"),
        (without(LOCAL_WORLD_SIZE="9"), r"LOCAL_WORLD_SIZE=9"),
        (without(WORLD_SIZE="two"), r"WORLD_SIZE='two' in the environment is no integer"),
    ],
)
def test_a_half_set_or_contradictory_environment_is_refused(environment, message):
    with pytest.raises(LaunchError, match=message):
        Rank.from_environment(environment)


def test_one_process_joins_nothing_and_every_collective_is_the_identity():
    tensor = torch.tensor([1.5, -2.0])
    assert launch.start("cpu") == Rank()
    try:
        assert not dist.is_initialized()
        assert torch.equal(launch.all_sum(tensor), tensor)
        assert torch.equal(launch.all_max(tensor), tensor)
        assert launch.any_rank(True) is True
        assert launch.any_rank(False) is False
        launch.barrier()
        assert launch.broadcast_object({"step": 3, "loss": 2.5, "name": None}) == {"step": 3, "loss": 2.5, "name": None}
        assert launch.broadcast_object((1, 2)) == [1, 2]
    finally:
        launch.stop()


def test_forgetting_start_beside_other_processes_is_caught(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AssertionError, match=r"start\(\) was not called"):
        launch.all_sum(torch.ones(1))


def test_unknown_and_absent_devices_are_refused(monkeypatch):
    with pytest.raises(LaunchError, match="choose 'cpu' or 'cuda'"):
        launch.start("meta")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LaunchError, match=r"needs cuda:0, but this process sees no CUDA device"):
        launch.start("cuda")


def test_start_joins_what_the_environment_describes_and_stop_leaves_it(run_ranks):
    def work(rank, world):
        place = launch.start("cpu", timeout=20)
        inside = dist.get_rank(), dist.get_world_size(), dist.get_backend()
        total = launch.all_sum(torch.tensor([10.0**rank])).item()
        launch.stop()
        launch.stop()  # a second call finds nothing to leave
        return place, inside, total, dist.is_initialized()

    results = run_ranks(3, work, init=False)
    for rank, (place, inside, total, still_in) in enumerate(results):
        assert place == Rank(rank, 3, rank, 3, 0)
        assert inside == (rank, 3, "gloo")
        assert total == 111.0
        assert not still_in


def test_a_group_made_elsewhere_is_used_and_left_alone(run_ranks):
    def work(rank, world):
        place = launch.start("cpu")
        launch.stop()
        return place.rank, dist.is_initialized()

    assert run_ranks(2, work) == [(0, True), (1, True)]


def test_a_group_that_contradicts_the_environment_is_refused(run_ranks, monkeypatch):
    def work(rank, world):
        monkeypatch.setenv("RANK", str(1 - rank))
        launch.start("cpu")

    with pytest.raises(LaunchError, match="already open has rank"):
        run_ranks(2, work)


def test_sums_and_maxima_over_ranks(run_ranks):
    def work(rank, world):
        # Rank 2's tensor is laid out column-major: the same numbers, another memory order.
        values = torch.tensor([[1.0, -7.0, 3.0], [0.5, 2.0, -1.0]], dtype=torch.float64) * (rank + 1)
        if rank == 2:
            values = values.t().contiguous().t()
        kept = values.clone()
        values.requires_grad_()
        total, most = launch.all_sum(values), launch.all_max(values)
        counts = launch.all_sum(torch.tensor(2**40 + rank))
        return total, most, counts, torch.equal(values.detach(), kept), total.requires_grad

    base = torch.tensor([[1.0, -7.0, 3.0], [0.5, 2.0, -1.0]], dtype=torch.float64)
    for total, most, counts, unchanged, tracked in run_ranks(3, work):
        assert torch.equal(total, base * 6)
        assert torch.equal(most, torch.maximum(base, base * 3))
        assert counts.item() == 3 * 2**40 + 3
        assert counts.shape == ()
        assert unchanged
        assert not tracked


@pytest.mark.parametrize("raised_on", [None, 0, 2])
def test_any_rank_is_true_everywhere_when_true_somewhere(run_ranks, raised_on):
    results = run_ranks(3, lambda rank, world: launch.any_rank(rank == raised_on))
    assert results == [raised_on is not None] * 3


@pytest.mark.parametrize("source", [0, 1])
def test_broadcast_object_sends_the_sources_value(run_ranks, source):
    def work(rank, world):
        value = {"run": f"Ποταμός-{rank}", "steps": (rank, 2), "loss": float("inf"), "long": "x" * 100_000}
        return launch.broadcast_object(value, source)

    first, *others = run_ranks(3, work)
    assert first["run"] == f"Ποταμός-{source}"
    assert first["steps"] == [source, 2]
    assert math.isinf(first["loss"])
    assert len(first["long"]) == 100_000
    assert others == [first, first]


def test_what_is_no_json_value_fails_on_every_rank_and_none_waits(run_ranks):
    def work(rank, world):
        with pytest.raises(TypeError, match="cannot send set between ranks"):
            launch.broadcast_object({1, 2} if rank == 0 else None)
        with pytest.raises(LaunchError, match=r"source 2 is no rank of a run with 2: use 0 to 1"):
            launch.broadcast_object(1, source=2)
        return launch.broadcast_object(rank)

    assert run_ranks(2, work, timeout=20) == [0, 0]


def test_barrier_holds_the_early_rank(run_ranks, tmp_path):
    def work(rank, world):
        if rank == 1:
            # The late rank leaves its mark just before the barrier; the early one must see it just after.
            time.sleep(0.3)
            (tmp_path / "late").touch()
        launch.barrier()
        return (tmp_path / "late").exists()

    assert run_ranks(2, work) == [True, True]
