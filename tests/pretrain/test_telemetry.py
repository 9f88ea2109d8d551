"""What a run tells: records that read back bit for bit, TensorBoard without replays, state, console, picture."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import random
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.pretrain import guard
from potamos.pretrain import telemetry as telemetry_module
from potamos.pretrain.console import duration
from potamos.pretrain.plot import _smooth
from potamos.pretrain.records import RecordWriter
from potamos.pretrain.telemetry import Progress, Telemetry, attempt_number, plot_loss, read_metrics, write_environment
from potamos.slurm.run_folder import RunFolder


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _event_files_sort_by_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files by name: second, host, process, then a count, of which 10 sorts before 9."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


def open_telemetry(run: Path, attempt: int = 0, **given: Any) -> Telemetry:
    defaults: dict[str, Any] = {"total_steps": 100, "stream": io.StringIO(), "clock": Clock()}
    defaults["tokens_before"] = lambda sample: 32 * sample
    return Telemetry(run, attempt, **(defaults | given))


def train(telemetry: Telemetry, steps: range, loss_of: Any) -> None:
    for step in steps:
        telemetry.log(step, {"loss": loss_of(step)}, next_sample=step * 8)


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_losses_read_back_bit_for_bit(run_folder: Path) -> None:
    generator = random.Random(3)
    losses = [struct.unpack("<f", struct.pack("<f", generator.gauss(3, 1)))[0] for _ in range(50)]
    losses += [generator.random() for _ in range(50)] + [math.nan, math.inf, -math.inf, 5e-324, 1e308, -0.0]
    telemetry = open_telemetry(run_folder, attempt=4)
    train(telemetry, range(1, len(losses) + 1), lambda step: losses[step - 1])
    found = [record["loss"] for record in read_metrics(run_folder)]
    assert [struct.pack("<d", loss) for loss in found] == [struct.pack("<d", loss) for loss in losses]
    first = read_metrics(run_folder)[0]
    assert first.items() >= {"kind": "train", "attempt": 4, "step": 1, "next_sample": 8, "tokens": 256}.items()
    for line in RunFolder(run_folder).metrics.read_text().splitlines():  # strict JSON, whoever reads it
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_resumed_attempt_supersedes_what_it_trains_again(run_folder: Path) -> None:
    first = open_telemetry(run_folder, 0)
    train(first, range(1, 10), lambda step: 10.0 + step)
    first.validation(5, {"loss": 7.5}, next_sample=40)
    first.validation(8, {"loss": 7.8}, next_sample=64)
    # Killed here: never closed. The next attempt goes on from a checkpoint of step 6 and reaches step 7 so far.
    second = open_telemetry(run_folder, 1, step=6, next_sample=48)
    assert [record["step"] for record in read_metrics(run_folder)] == [1, 2, 3, 4, 5, 5, 6]
    train(second, range(7, 8), lambda step: 20.0 + step)

    found = [(record["kind"], record["step"], record["attempt"], record["loss"]) for record in read_metrics(run_folder)]
    expected = [("train", step, 0, 10.0 + step) for step in range(1, 7)] + [("train", 7, 1, 27.0)]
    assert found == [*expected[:5], ("validation", 5, 0, 7.5), *expected[5:]]

    shown = events(run_folder)
    assert shown["train/loss"] == [(step, 10.0 + step) for step in range(1, 7)] + [(7, 27.0)]
    assert shown["validation/loss"] == [(5, 7.5)]

    third = open_telemetry(run_folder, 2)  # from the first step: nothing of before remains
    train(third, range(1, 3), lambda step: 30.0 + step)
    assert [(record["step"], record["loss"]) for record in read_metrics(run_folder)] == [(1, 31.0), (2, 32.0)]
    assert events(run_folder)["train/loss"] == [(1, 31.0), (2, 32.0)]


def test_tags_texts_and_several_datasets(run_folder: Path) -> None:
    telemetry = open_telemetry(run_folder)
    telemetry.log(1, {"loss": 2.0, "gradient_norm/mixer": 0.5, "mfu": 0.4}, next_sample=8)
    telemetry.validation(1, {"a/loss": 2.5, "a/bits_per_byte": 1.0}, next_sample=8)
    telemetry.validation(1, {"b/loss": 3.5}, next_sample=8)
    telemetry.text("recipe", 1, "name: trial\n  *indented*\n")
    telemetry.close("finished")
    shown = events(run_folder)
    assert shown["gradient_norm/mixer"] == [(1, 0.5)]
    assert {"train/loss", "train/mfu", "train/tokens_per_second", "validation/a/loss"} <= shown.keys()
    assert shown["train/tokens"] == [(1, 256.0)]
    validation = read_metrics(run_folder)[1]
    assert (validation["a/loss"], validation["a/bits_per_byte"], validation["b/loss"]) == (2.5, 1.0, 3.5)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_folder / "tensorboard"))
    accumulator.Reload()
    (event,) = accumulator.Tensors("recipe/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "    name: trial\n      *indented*\n"
    with pytest.raises(ValueError, match="may not be named"):
        open_telemetry(run_folder, 1).log(2, {"step": 1.0}, next_sample=16)


def test_torn_and_foreign_lines_are_skipped(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(open_telemetry(run_folder, 0), range(1, 6), float)
    path = RunFolder(run_folder).metrics
    path.write_bytes(path.read_bytes()[:-9])  # the machine went down in the middle of step 5
    train(open_telemetry(run_folder, 1, step=2, next_sample=16), range(3, 4), float)
    with open(path, "ab") as file:
        file.write(b'[1, 2]\n\n{"kind": "train"}\n\xff\xfe\n')
    with caplog.at_level(logging.WARNING):
        assert [record["loss"] for record in read_metrics(run_folder)] == [1.0, 2.0, 3.0]
    assert caplog.text.count("is skipped") == 4
    assert f"{path}:6 " in caplog.text


def test_state_is_complete_and_always_whole(run_folder: Path) -> None:
    clock = Clock()
    telemetry = open_telemetry(run_folder, 3, step=10, next_sample=80, save_every=5, clock=clock)
    read = lambda: json.loads((run_folder / "state.json").read_text())  # noqa: E731
    assert read().items() >= {"attempt": 3, "step": 10, "next_sample": 80, "reason": "running", "loss": None}.items()
    clock.now += 4.0
    telemetry.log(12, {"loss": 2.5}, next_sample=96)
    state = read()
    assert state.pop("updated").startswith("20")
    # 16 samples of 32 tokens in 4 s; 88 steps left at 2 s each.
    expected = {"attempt": 3, "step": 12, "next_sample": 96, "total_steps": 100, "loss": 2.5}
    expected |= {"tokens_per_second": 128.0, "eta": 176.0, "reason": "running"}
    assert state == expected | {"save_every": 5, "save_failed": None}
    telemetry.log(13, {"loss": 9.0, "tokens_per_second": 7.0}, next_sample=104)
    assert read()["step"] == 12  # at most one write a second
    clock.now += 2.0
    telemetry.log(14, {"loss": math.nan, "tokens_per_second": 7.0}, next_sample=112, save_failed=(10, "no room"))
    assert read()["save_failed"] == {"step": 10, "why": "no room"}
    assert (read()["loss"], read()["tokens_per_second"]) == (None, 7.0)
    telemetry.close("SIGTERM")
    assert (read()["step"], read()["reason"]) == (14, "SIGTERM")
    telemetry.log(15, {"loss": 1.0}, next_sample=120)  # closed: no longer tells
    assert len(read_metrics(run_folder)) == 3
    assert not list(run_folder.glob(".state*"))


def test_time_left_ignores_start_up_and_stalls_but_not_validations() -> None:
    clock = Clock()
    progress = Progress(0, clock)
    assert progress.left(1000) is None

    def go(seconds: float, step: int) -> None:
        clock.now += seconds
        progress.update(step)

    go(60.0, 10)  # compiles
    assert progress.left(1000) == pytest.approx(990 * 6.0)
    for index in range(2, 52):
        go(1.0, index * 10)
    assert progress.left(1000) == pytest.approx(490 * 0.1)
    for index in range(52, 92):
        go(3.0 if index % 2 else 1.0, index * 10)  # a validation of 2 s in every second interval
    for index in range(92, 97):
        go(1.0, index * 10)
    # In the last 50 intervals: 20 of 3 s and 30 of 1 s.
    assert progress.left(1000) == pytest.approx(40 * 0.18)
    go(3600.0, 970)  # the laptop slept
    left = progress.left(1000)
    assert left is not None
    assert left < 30 * 0.5
    assert progress.left(900) == 0.0


# TensorBoard's own writing thread ends with the error and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_does_not_end_training(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stream = io.StringIO()
    telemetry = open_telemetry(run_folder, stream=stream)
    telemetry.log(1, {"loss": 1.0}, next_sample=8)
    path = RunFolder(run_folder).metrics
    whole = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write = telemetry_module.write_atomically
    monkeypatch.setattr(telemetry_module, "write_atomically", full)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 30, before[1]))  # room for half a record
        with caplog.at_level(logging.WARNING):
            train(telemetry, range(2, 5), float)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    monkeypatch.setattr(telemetry_module, "write_atomically", write)
    train(telemetry, range(5, 7), float)
    telemetry.close("finished")
    assert [record["loss"] for record in read_metrics(run_folder)] == [1.0, 5.0, 6.0]
    assert stream.getvalue().count("step") == 6
    # TensorBoard's thread may tell of the last failure one log late; new files are small and may hold some steps.
    shown = [step for step, _ in events(run_folder)["train/loss"]]
    assert (shown[0], shown[-1]) == (1, 6)
    assert caplog.text.count("could not be recorded") == 2  # one warning a reason
    assert "No space left" in caplog.text


def test_plain_lines_in_a_file(run_folder: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    telemetry = open_telemetry(run_folder, stream=stream, clock=clock)
    for step in (50, 51):
        clock.now += 75.0
        metrics = {"loss": 3.14159, "bits_per_byte": 1.5, "learning_rate": 6e-4, "gradient_norm/total": 0.5}
        telemetry.log(step, metrics, next_sample=step * 800)
    telemetry.note("step 7 skipped: samples 48 to 55 [not markup]")
    telemetry.close("finished")
    assert stream.getvalue().splitlines() == [
        "step  50/100  loss 3.1416  1.5000 bits/byte  lr 6.00e-04  norm 0.50  17,067 tokens/s  ETA 1:15",
        "step  51/100  loss 3.1416  1.5000 bits/byte  lr 6.00e-04  norm 0.50  341 tokens/s  ETA 1:01:15",
        "step 7 skipped: samples 48 to 55 [not markup]",
    ]
    assert [duration(s) for s in (None, 0.4, 59.6, 3600, 90061)] == ["?", "0:00", "1:00", "1:00:00", "25:01:01"]


def test_a_live_line_on_a_terminal(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    before = sys.stdout, sys.stderr
    telemetry = open_telemetry(run_folder, stream=stream)
    train(telemetry, range(1, 4), float)
    telemetry.note("[not markup]")
    telemetry.close("finished")
    text = stream.getvalue()
    assert "\x1b[" in text  # redrawn in place
    assert "loss 3.0000" in text
    assert "3/100" in text
    assert "[not markup]" in text
    assert (sys.stdout, sys.stderr) == before


def test_other_ranks_write_and_print_nothing(run_folder: Path) -> None:
    stream = io.StringIO()
    telemetry = open_telemetry(run_folder, 5, main=False, stream=stream)
    train(telemetry, range(1, 3), float)
    telemetry.validation(2, {"loss": 1.0}, next_sample=16)
    telemetry.text("sample", 2, "text")
    telemetry.note("note")
    telemetry.close("finished")
    assert telemetry.attempt == 5
    assert list(run_folder.iterdir()) == []
    assert stream.getvalue() == ""


def test_attempt_numbers(run_folder: Path) -> None:
    assert attempt_number(run_folder, {}) == 0
    assert attempt_number(run_folder / "absent", {}) == 0
    open_telemetry(run_folder, 0)  # killed before its first log
    assert attempt_number(run_folder, {}) == 1
    guard.write_stop(run_folder, 4, guard.Stop("SIGTERM"), step=1)
    assert attempt_number(run_folder, {}) == 5
    (run_folder / "state.json").write_text('{"attempt": 8}')
    assert attempt_number(RunFolder(run_folder), {}) == 9
    (run_folder / "state.json").write_text("torn {")
    assert attempt_number(run_folder, {}) == 5
    assert attempt_number(run_folder, {"POTAMOS_ATTEMPT": "2"}) == 2
    for bad in ("", "-1", "one"):
        with pytest.raises(ValueError, match="POTAMOS_ATTEMPT"):
            attempt_number(run_folder, {"POTAMOS_ATTEMPT": bad})


def test_environment_names_versions(run_folder: Path) -> None:
    import torch

    text = write_environment(run_folder).read_text()
    facts = dict(line.split(": ", 1) for line in text.splitlines())
    assert facts["python"] == sys.version.split()[0]
    assert facts["torch"] == torch.__version__
    assert facts["numpy"] == np.__version__
    assert facts.keys() >= {"potamos", "triton", "platform", "processor", "devices"}


def test_smoothing_is_a_centred_mean() -> None:
    values = np.random.default_rng(0).normal(size=350)
    expected = []
    for index in range(350):
        reach = min(3, index, 349 - index)
        expected.append(values[index - reach : index + reach + 1].mean())
    np.testing.assert_allclose(_smooth(values), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(_smooth(values[:99]), values[:99], rtol=1e-12, atol=1e-12)


def make_curve(run: Path, count: int = 400) -> None:
    generator = random.Random(0)
    writer = RecordWriter(run, 0)
    for step in range(1, count + 1):
        loss = 1.4 + 4 * step**-0.5 + generator.gauss(0, 0.05)
        writer.write("train", step, step * 16, step * 4096, {"loss": loss * 2.2, "bits_per_byte": loss})
        if step % 50 == 0:
            metrics = {"heldout/loss": loss * 2.3, "heldout/bits_per_byte": loss + 0.05}
            writer.write("validation", step, step * 16, step * 4096, metrics)
    writer.write("train", count + 1, 0, (count + 1) * 4096, {"loss": math.nan, "bits_per_byte": math.nan})
    writer.close()


def test_the_loss_is_drawn(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is an extra")
    make_curve(run_folder)
    drawn: list[Any] = []
    savefig = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or savefig(self, *a, **k))
    plot_loss(run_folder, tmp_path / "pictures" / "loss.png")
    picture = (tmp_path / "pictures" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    (axes,) = drawn[0].axes
    assert axes.get_ylabel() == "bits per byte"
    raw, smooth, validation = axes.lines
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 400
    np.testing.assert_array_equal(validation.get_xdata(), np.arange(50, 401, 50) * 4096)
    low, high = axes.get_ylim()
    assert low < min(smooth.get_ydata()) < high < max(raw.get_ydata())


def test_what_cannot_be_drawn_says_why(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib.figure", reason="matplotlib is an extra")
    with pytest.raises(ValueError, match="no records of training"):
        plot_loss(run_folder, tmp_path / "loss.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'potamos\[demo\]'"):
        plot_loss(run_folder, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
