"""The harness that starts ranks is itself tested: every other distributed test believes it."""

import os
import signal
import socket
import time

import harness
import pytest
import torch
import torch.distributed as dist


@pytest.fixture
def assert_reaped(monkeypatch):
    """A function asserting that every rank forked in this test is gone, and no zombie is left of it."""
    fork, forked = os.fork, []

    def recorded():
        pid = fork()
        forked.append(pid)
        return pid

    def check():
        assert forked
        for pid in forked:
            with pytest.raises(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    monkeypatch.setattr(os, "fork", recorded)
    return check


def test_returns_each_ranks_value_in_order(run_ranks):
    def work(rank, world, base):
        return {"rank": rank, "world": world, "tensor": torch.full((3,), base + rank, dtype=torch.bfloat16)}

    values = run_ranks(3, work, 10)
    assert [value["rank"] for value in values] == [0, 1, 2]
    assert [value["world"] for value in values] == [3, 3, 3]
    for rank, value in enumerate(values):
        assert value["tensor"].dtype == torch.bfloat16
        assert torch.equal(value["tensor"], torch.full((3,), 10 + rank, dtype=torch.bfloat16))


def test_all_reduce_sums_over_ranks(run_ranks):
    def work(rank, world):
        total = torch.tensor([10.0**rank], dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    assert run_ranks(4, work) == [1111.0] * 4


def test_results_larger_than_a_pipe_arrive(run_ranks):
    values = run_ranks(2, lambda rank, world: torch.arange(1_000_000) + rank)
    assert torch.equal(values[1], torch.arange(1_000_000) + 1)


def test_ranks_run_on_one_thread_and_see_torchruns_environment(run_ranks):
    def work(rank, world):
        return torch.get_num_threads(), os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]

    assert run_ranks(2, work) == [(1, "0", "2", "0"), (1, "1", "2", "1")]
    assert "RANK" not in os.environ


def test_a_forked_rank_can_run_backward_after_the_parent_did(run_ranks):
    torch.set_num_threads(2)

    def gradient():
        weight = torch.ones(200, 200, requires_grad=True)
        (weight @ weight).sum().backward()
        assert weight.grad is not None
        return weight.grad.sum().item()

    expected = gradient()
    assert run_ranks(2, lambda rank, world: gradient()) == [expected, expected]


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_the_rank_that_raised_is_the_error_and_the_waiting_ones_die(run_ranks, assert_reaped, culprit):
    def work(rank, world):
        if rank == culprit:
            raise KeyError(f"bad shard on rank {rank}")
        dist.all_reduce(torch.ones(1))  # waits for the culprit for ever
        return os.getpid()

    start = time.monotonic()
    with pytest.raises(KeyError, match=f"bad shard on rank {culprit}") as caught:
        run_ranks(3, work, timeout=60)
    assert time.monotonic() - start < 5
    assert f"rank {culprit} raised" in caught.value.__notes__[0]
    assert "in work" in caught.value.__notes__[0]
    assert_reaped()


def test_an_exception_that_cannot_be_pickled_still_arrives_as_text(run_ranks):
    class Local(Exception):
        pass

    def work(rank, world):
        raise Local("only here")

    with pytest.raises(harness.RankError, match="Local: only here"):
        run_ranks(2, work)


def test_a_value_that_cannot_be_pickled_is_an_error(run_ranks):
    with pytest.raises((AttributeError, TypeError, harness.RankError), match=r"pickle|local object"):
        run_ranks(1, lambda rank, world: lambda: None)


def test_exit_inside_a_rank_does_not_leave_the_test_process(run_ranks):
    def work(rank, world):
        raise SystemExit(130)

    with pytest.raises(SystemExit) as caught:
        run_ranks(2, work)
    assert caught.value.code == 130


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_before_its_peers_echoes(run_ranks, assert_reaped, victim):
    def work(rank, world):
        dist.all_reduce(torch.ones(1))
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))  # fails on the peers: "Connection closed by peer"

    start = time.monotonic()
    with pytest.raises(harness.RankError, match=rf"\Arank {victim} died by SIGKILL"):
        run_ranks(3, work)
    assert time.monotonic() - start < 5
    assert_reaped()


def test_a_rank_that_leaves_without_returning_is_an_error(run_ranks):
    def work(rank, world):
        if rank == 1:
            os._exit(3)
        return rank

    with pytest.raises(harness.RankError, match="rank 1 exited with status 3"):
        run_ranks(2, work)


def test_timeout_names_the_stuck_rank_and_where_it_waits(run_ranks, assert_reaped):
    def sleepy_function(rank, world):
        if rank == 1:
            time.sleep(60)
        return rank

    start = time.monotonic()
    with pytest.raises(harness.RankTimeout, match=r"\Arank 1 of 2 did not return within 1 s") as caught:
        run_ranks(2, sleepy_function, timeout=1.0)
    assert time.monotonic() - start < 5
    assert "sleepy_function" in str(caught.value)
    assert_reaped()


def test_a_deadlock_inside_gloo_times_out_with_stacks(run_ranks, assert_reaped):
    def work(rank, world):
        if rank == 0:
            dist.recv(torch.ones(1), src=1)
        else:
            dist.recv(torch.ones(1), src=0)

    # gloo's own timeout equals the harness's, so either may be first.
    with pytest.raises(RuntimeError, match=r"did not return within 2 s|[Tt]imed out"):
        run_ranks(2, work, timeout=2.0)
    assert_reaped()


def test_the_harness_is_used_by_tests_marked_distributed(request):
    assert request.node.get_closest_marker("distributed") is not None
    assert request.node.get_closest_marker("kernels") is None


@pytest.mark.parametrize("attempt", ["connect", "connect_ex", "name"])
def test_no_test_reaches_the_network_not_even_from_a_rank(run_ranks, attempt):
    def reach(rank=0, world=1):
        with socket.socket() as connection:
            connection.settimeout(1)
            if attempt == "name":
                socket.getaddrinfo("example.org", 80)
            else:
                getattr(connection, attempt)(("192.0.2.1", 80))  # reserved for documentation (RFC 5737)

    with pytest.raises(RuntimeError, match="tests run without a network"):
        reach()
    with pytest.raises(RuntimeError, match="tests run without a network"):
        run_ranks(1, reach)


def test_this_machine_may_be_reached():
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(("localhost", server.getsockname()[1]))


def test_a_killed_rank_is_the_cause_even_when_its_echo_was_heard_first():
    echo = harness._Child(0, pid=0, pipe=0, seen_at=1.0)
    echo.report = {"error": RuntimeError("Connection closed by peer"), "traceback": "Connection closed by peer"}
    killed = harness._Child(1, pid=0, pipe=0, seen_at=1.1, status=signal.SIGKILL)
    with pytest.raises(harness.RankError, match=r"\Arank 1 died by SIGKILL") as caught:
        harness._raise_first_failure([echo, killed])
    assert caught.value.__notes__ == ["then rank 0 raised:\nConnection closed by peer"]


def test_of_two_ranks_that_raise_the_first_in_time_is_the_error():
    late, early = (harness._Child(rank, pid=0, pipe=0, seen_at=2.0 - rank) for rank in (0, 1))
    for child in (late, early):
        error = ValueError(f"from rank {child.rank}")
        child.report = {"error": error, "traceback": str(error)}
    with pytest.raises(ValueError, match=r"\Afrom rank 1") as caught:
        harness._raise_first_failure([late, early])
    assert caught.value.__notes__ == ["rank 1 raised:\nfrom rank 1", "then rank 0 raised:\nfrom rank 0"]
