"""Stop requests, marker files, and the steps that are skipped on the device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from potamos.pretrain import guard
from potamos.pretrain.spikes import SkippedStep, SpikeGuard

# ---- signals -----------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    guard.clear_stop()
    guard.install_signal_handlers()
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    guard.clear_stop()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_requests_a_stop(number: signal.Signals, code: int) -> None:
    assert guard.stop_requested() is None
    os.kill(os.getpid(), number)
    assert guard.stop_requested() == guard.Stop(number.name, code)
    for again in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler repeats itself; the first reason holds
        os.kill(os.getpid(), again)
    assert guard.stop_requested() == guard.Stop(number.name, code)


@pytest.mark.usefixtures("handlers")
def test_a_second_interrupt_raises_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert guard.stop_requested() == guard.Stop("SIGINT", 130)


@pytest.mark.usefixtures("handlers")
def test_an_echo_of_the_same_keystroke_is_no_second_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes Ctrl-C on to workers that the terminal has signalled already."""
    now = [100.0]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    os.kill(os.getpid(), signal.SIGINT)
    now[0] += 0.2
    os.kill(os.getpid(), signal.SIGINT)
    now[0] += 1.5
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_need_no_torch_and_survive_its_import() -> None:
    code = """
import os, signal, sys
from potamos.pretrain.guard import install_signal_handlers, stop_requested
heavy = {"torch", "numpy", "rich", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
install_signal_handlers()
os.kill(os.getpid(), signal.SIGTERM)
print(stop_requested())
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert output.stdout == "Stop(reason='SIGTERM', exit_code=0)\n"


def test_a_request_from_within() -> None:
    guard.clear_stop()
    guard.request_stop("time limit")
    guard.request_stop("other", 3)
    assert guard.stop_requested() == guard.Stop("time limit", 0)
    guard.clear_stop()
    assert guard.stop_requested() is None


def test_markers(run_folder: Path) -> None:
    stop = guard.write_stop(run_folder, 4, guard.Stop("SIGUSR1"), step=12, next_sample=96)
    assert stop == run_folder / "stop.4"
    content = json.loads(stop.read_text())
    assert content.pop("at").startswith("20")
    assert content == {"attempt": 4, "reason": "SIGUSR1", "step": 12, "next_sample": 96}
    done = guard.write_done(run_folder, attempt=5, step=20, next_sample=160, loss=1.5)
    assert json.loads(done.read_text()).items() >= {"attempt": 5, "step": 20, "next_sample": 160, "loss": 1.5}.items()
    guard.remove_done(run_folder)
    guard.remove_done(run_folder)
    assert sorted(path.name for path in run_folder.iterdir()) == ["stop.4"]  # no temporary file left, either


# ---- spikes ------------------------------------------------------------------------------------------------------


def naive(norms: list[float], losses: list[float], window: int, threshold: float | None, patience: int) -> list[bool]:
    """The rule, in fp64 lists."""
    history: list[float] = []
    decisions, spikes = [], 0
    for norm, loss in zip(norms, losses, strict=True):
        finite = np.isfinite(norm) and np.isfinite(loss)
        spike = False
        if finite and threshold is not None and len(history) >= max(2, window // 2):
            recent = np.array(history[-window:])
            spike = norm > recent.mean() + threshold * max(recent.std(ddof=1), 0.01 * recent.mean())
        accepted = bool(finite and not spike)
        decisions.append(accepted)
        if accepted:
            history.append(norm)
            spikes = 0
        elif spike:
            spikes += 1
            if spikes >= patience:
                history, spikes = [], 0
    return decisions


def make_norms(count: int, seed: int) -> tuple[list[float], list[float]]:
    """Norms with spikes, values that are not finite, and a lasting change of level."""
    random = np.random.default_rng(seed)
    norms = random.lognormal(0.0, 0.2, count)
    norms[random.random(count) < 0.05] *= 30
    norms[count // 2 :] *= 8
    norms[random.random(count) < 0.03] = np.nan
    norms[random.random(count) < 0.03] = np.inf
    losses = random.normal(3.0, 0.1, count)
    losses[random.random(count) < 0.03] = np.nan
    return [float(norm) for norm in norms.astype(np.float32)], [float(loss) for loss in losses.astype(np.float32)]


@pytest.mark.parametrize("threshold", [2.0, 5.0, None])
@pytest.mark.parametrize(("window", "patience"), [(2, 1), (7, 3), (32, 16)])
def test_decisions_equal_the_naive_rule(window: int, patience: int, threshold: float | None) -> None:
    norms, losses = make_norms(300, seed=window)
    guarded = SpikeGuard(window, threshold, patience=patience)
    decisions = [bool(guarded.accept(torch.tensor(n), torch.tensor(x))) for n, x in zip(norms, losses, strict=True)]
    meant = naive(norms, losses, window, threshold, patience)
    assert decisions == meant
    assert 5 < meant.count(False) < 250
    assert int(guarded.skipped) == meant.count(False)
    trailing = len(meant) - max(i for i, accepted in enumerate(meant) if accepted) - 1
    assert int(guarded.in_a_row) == trailing


def test_one_spike_is_skipped_and_leaves_no_trace() -> None:
    with_spike, without = SpikeGuard(8, 4.0), SpikeGuard(8, 4.0)
    loss = torch.tensor(2.0)
    for norm in (1.0, 1.1, 0.9, 1.05, 0.95, 1.2, 1.0, 1.1, 0.8):
        assert with_spike.accept(torch.tensor(norm), loss)
        without.accept(torch.tensor(norm), loss)
    assert not with_spike.accept(torch.tensor(50.0), loss)
    assert not with_spike.accept(torch.tensor(float("nan")), loss)
    assert int(with_spike.in_a_row) == 2
    assert with_spike.accept(torch.tensor(1.3), loss)
    assert int(with_spike.in_a_row) == 0
    without.accept(torch.tensor(1.3), loss)
    assert torch.equal(with_spike.state_tensors()["norms"], without.state_tensors()["norms"])
    assert int(with_spike.skipped) == 2


def test_constant_norms_make_no_spike_of_rounding() -> None:
    guarded = SpikeGuard(8, 3.0)
    for _ in range(20):
        assert guarded.accept(torch.tensor(1.0), torch.tensor(2.0))
    assert guarded.accept(torch.tensor(1.0 + 1e-6), torch.tensor(2.0))
    assert not guarded.accept(torch.tensor(1.5), torch.tensor(2.0))


def test_resumed_decisions_are_those_of_the_uninterrupted_run() -> None:
    norms, losses = make_norms(200, seed=1)
    straight = SpikeGuard(16, 3.0, patience=4)
    first, second = SpikeGuard(16, 3.0, patience=4), SpikeGuard(16, 3.0, patience=4)
    decisions: list[tuple[bool, bool]] = []
    for index, (norm, loss) in enumerate(zip(norms, losses, strict=True)):
        current = first if index < 77 else second
        if index == 77:
            saved = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
            second.load_tensors(saved)
            first.accept(torch.tensor(9.0), torch.tensor(9.0))  # what was loaded is a copy
        pair = torch.tensor(norm), torch.tensor(loss)
        decisions.append((bool(straight.accept(*pair)), bool(current.accept(*pair))))
    assert all(left == right for left, right in decisions)
    for name, tensor in straight.state_tensors().items():
        assert torch.equal(tensor, second.state_tensors()[name]), name


def test_state_of_another_window_is_refused() -> None:
    with pytest.raises(ValueError, match="the window changed"):
        SpikeGuard(8, 3.0).load_tensors(SpikeGuard(9, 3.0).state_tensors())
    state = SpikeGuard(8, 3.0).state_tensors()
    del state["norms"]
    with pytest.raises(ValueError, match="expected"):
        SpikeGuard(8, 3.0).load_tensors(state)
    for bad in ((1, 3.0), (8, 0.0), (8, float("nan"))):
        with pytest.raises(ValueError):
            SpikeGuard(*bad)


class NoSync(TorchDispatchMode):
    """Fails on every operation whose result the host must wait for."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device() -> None:
    with pytest.raises(AssertionError, match="waits"), NoSync():
        torch.ones(()).item()
    with pytest.raises(AssertionError, match="waits"), NoSync():
        bool(torch.ones(()) > 0)
    guarded = SpikeGuard(4, 3.0, patience=2)
    for index, value in enumerate((1.0, 2.0, 1.0, 2.0, 90.0, float("nan"), 1.5, 90.0, 90.0, 90.0)):
        norm, loss = torch.tensor(value), torch.tensor(1.0)
        with NoSync():
            guarded.record(index, 0, 7, ~guarded.accept(norm, loss))
            guarded.state_tensors()
    assert int(guarded.skipped) == 4
    # A device that holds no values: whoever asks for one fails.
    meta = SpikeGuard(4, 3.0, device="meta")
    assert meta.accept(torch.empty((), device="meta"), torch.empty((), device="meta")).shape == ()


def test_skipped_steps_are_reported_with_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = SpikeGuard(4, 3.0)
    for step, value in enumerate((1.0, 2.0, float("inf"), 1.0, 2.0, 90.0, 1.0), start=1):
        refused = 1.0 - guarded.accept(torch.tensor(value), torch.tensor(0.0)).float()
        guarded.record(step, step * 8, step * 8 + 7, refused)
    transfers = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: transfers.append(1) or tolist(self))
    assert guarded.report() == [SkippedStep(3, 24, 31), SkippedStep(6, 48, 55)]
    assert len(transfers) == 1
    assert guarded.report() == []
    guarded.record(8, 64, 71, torch.tensor(True))
    assert guarded.report() == [SkippedStep(8, 64, 71)]


def test_a_request_after_the_end_kills_nothing():
    """Python gives handlers up while it leaves, and a signal's default action would end a rank that has saved."""
    program = (
        "import atexit, os, signal, sys\n"
        "from potamos.pretrain.guard import ignore_signals, install_signal_handlers\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=(signal.SIGUSR1, signal.SIGTERM)):\n"
        "        [kill(pid, number) for number in numbers]\n"
        "install_signal_handlers()\n"
        "sys.last = Last()\n"  # goes with the interpreter
        "if sys.argv[1:]: ignore_signals()\n"
    )
    ended = [subprocess.run([sys.executable, "-c", program, *a], timeout=60).returncode for a in (["ignore"], [])]
    assert ended == [0, -signal.SIGUSR1]
