"""Tiny runs: a corpus, recipes that train on it in milliseconds, and the comparison of two runs bit for bit.

One `Trial` serves a whole test session (fixture `trial`). Nothing here is a double of the trainer: data go through the
real preparation, recipes through the real reader, and an attempt is the real command in a process of its own. Processes
are forked from the test process, which has imported torch already: a start costs a tenth of a second, and signals,
exit statuses and kills are as real as in a shell.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potamos.data.loader import Rows
from potamos.data.prepare import prepare
from potamos.data.tokenizer import train_bpe
from potamos.parallel.launch import Rank
from potamos.pretrain import checkpoint, cli, guard, trainer
from potamos.pretrain.config import load_recipe
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.records import read_metrics
from potamos.slurm.run_folder import RunFolder

VOCABULARY, LENGTH, CHUNK = 300, 32, 1024
SENTENCE = (
    "the river runs past quiet mills and old stone bridges while rain falls on far hills and the water keeps its "
    "count of days it carries silt seeds leaves small boats and news from town to town until the sea takes all"
)
WORDS = SENTENCE.split()

# Metrics that are the same in every execution of one recipe; the others tell of time and memory.
REPEATABLE = ("step", "next_sample", "tokens", "loss", "loss/causal", "gradient_norm/total", "learning_rate")
REPEATABLE += ("skipped_steps", "gradient_norm/mixer", "gradient_norm/channel", "gradient_norm/frontend")


def make_texts(seed: int, count: int) -> list[str]:
    """Documents of 1 to 30 sentences, so that rows hold from no boundary to several."""
    rng = random.Random(seed)
    sentences = lambda: " ".join(rng.choices(WORDS, k=rng.randint(2, 12))).capitalize() + "."  # noqa: E731
    return [" ".join(sentences() for _ in range(rng.randint(1, 30))) for _ in range(count)]


@dataclass
class Attempt:
    """A forked process that runs the command line; its output goes to a file."""

    pid: int
    run: Path
    log: Path
    status: int | None = None

    @classmethod
    def fork(cls, arguments: Sequence[str], run: Path, before: Callable[[], object] = lambda: None) -> Attempt:
        import torch.distributed.checkpoint
        import torch.utils.tensorboard  # noqa: F401  (or every child would import them)

        run.parent.mkdir(parents=True, exist_ok=True)
        log = run.with_name(f"{run.name}.{time.monotonic_ns()}.log")
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
                os.dup2(file, 1)
                os.dup2(file, 2)
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (pytest's are replaced; the process ends here)
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                code = _run_command(list(arguments), before)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        return cls(pid, run, log)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60.0) -> int:
        """The exit status as a shell reports it: 128 + signal where one ended the process."""
        deadline = time.monotonic() + timeout
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code
            elif time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"the attempt did not end within {timeout} s:\n{self.output}")
            else:
                time.sleep(0.002)
        return self.status

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code
        return self.status is not None

    def until(self, happened: Callable[[], bool], timeout: float = 60.0) -> bool:
        """Wait until ``happened()``; False if the process ended before."""
        deadline = time.monotonic() + timeout
        while not happened():
            if self.ended():
                return happened()
            assert time.monotonic() < deadline, f"waited {timeout} s in vain:\n{self.output}"
            time.sleep(0.0005)
        return True


def _run_command(arguments: list[str], before: Callable[[], object]) -> int:
    guard.clear_stop()
    sys.argv = ["potamos", *arguments]
    try:
        before()
        cli.main()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    return 1


class Crash(Exception):
    """The end of a variant that crashes, instead of a kill."""


def variant(*, poison: dict[int, float] | None = None, crash: int = -1, stop: int = -1) -> type[trainer.Trainer]:
    """A trainer that something happens to, at given numbers of finished steps.

    poison: {step: factor}: one gradient is multiplied by it. crash: nothing of that step happens, nothing is saved.
    stop: a request to stop arrives during that step.
    """

    class Variant(trainer.Trainer):
        def train_step(self, rows: Rows) -> trainer.StepResult:
            if self.step == crash:
                self.checkpoints.wait()  # the process lives on: its writer must not meet the next attempt's
                raise Crash
            if self.step == stop:
                guard.request_stop("SIGTERM")
            factor = (poison or {}).get(self.step)
            if factor is None:
                return super().train_step(rows)
            handle = next(iter(self.parameters.values())).register_hook(lambda gradient: gradient * factor)
            try:
                return super().train_step(rows)
            finally:
                handle.remove()

    return Variant


# --- comparing -----------------------------------------------------------------------------------------------------


def history(run: Path) -> list[dict[str, Any]]:
    """What the run recorded of each step, without what depends on the clock."""
    return [{k: record[k] for k in REPEATABLE} for record in read_metrics(run) if record["kind"] == "train"]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in history(run)]


def newest(run: Path) -> checkpoint.Loaded:
    """The newest checkpoint of a run, verified."""
    folders = checkpoint.step_folders(RunFolder.of(run).checkpoints)
    return checkpoint.load(folders[max(folders)])


def differences(reference: Path, other: Path) -> list[str]:
    """In what two finished runs differ, bit for bit: records of every step, parameters, optimizer, carried state."""
    found = []
    before, after = history(reference), history(other)
    if [r["step"] for r in before] != [r["step"] for r in after]:
        found.append(f"steps {[r['step'] for r in before]} and {[r['step'] for r in after]}")
    for a, b in zip(before, after, strict=False):
        found += [f"step {a['step']}: {k} {a[k]!r} and {b[k]!r}" for k in REPEATABLE if repr(a[k]) != repr(b[k])]
    a, b = newest(reference), newest(other)
    found += [f"{k} {getattr(a, k)} and {getattr(b, k)}" for k in ("step", "next_sample", "trainer")
              if getattr(a, k) != getattr(b, k)]  # fmt: skip
    for part in ("model", "optimizer", "carried"):
        found += [f"{part}.{name}" for name in different_tensors(getattr(a, part), getattr(b, part))]
    return found


def different_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same bits (so NaN equals NaN, and 0 differs from -0)."""
    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name]))


def same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    raw = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (a, b)]
    return torch.equal(*raw)


class Trial:
    """The corpus of a session, and what makes runs of it and compares them; tests reach this module through it."""

    Crash = Crash
    variant = staticmethod(variant)
    differences, history, losses = staticmethod(differences), staticmethod(history), staticmethod(losses)
    newest, different_tensors = staticmethod(newest), staticmethod(different_tensors)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts = {"train": make_texts(1, 120), "held_out": make_texts(2, 12)}
        self.tokenizer = train_bpe(texts["train"], VOCABULARY, folder / "tokenizer.json")
        for name, documents in texts.items():
            source = folder / f"{name}.jsonl"
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
            prepare(source, "all", self.tokenizer, folder / name, chunk_tokens=CHUNK, shard_chunks=2)

    def overrides(self, *changes: str) -> list[str]:
        """Key=value arguments that make `h3_hybrid_tiny` tiny; ``changes`` come last and win.

        Everything that a resume could forget is on: every kind of dropout, the spike rule, Muon beside AdamW, more than
        one micro-batch, a schedule that moves, and (in contiguous order) H3's state and attention's memory.
        """
        attention = "{mixer: {kind: attention, heads: 2, dropout: 0.1, memory: 16}}"
        return [
            "model.width=32",
            "model.layers=2",
            f"model.frontend={{kind: tokens, vocabulary: {self.tokenizer.vocabulary}, embedding_dropout: 0.1}}",
            "model.mixer={kind: h3, state: 8, shift_state: 8}",
            "model.channel={kind: mlp, ratio: 4, activation: gelu_tanh}",
            f"model.at={{1: {attention}}}",
            "model.residual_dropout=0.1",
            f"tokenizer.path={self.folder / 'tokenizer.json'}",
            f"data.sequence_length={LENGTH}",
            f"data.stages=[{{from: 0, mixture: [{{path: {self.folder / 'train'}}}]}}]",
            f"data.validation=[{{path: {self.folder / 'held_out'}}}]",
            "optimizer={kind: muon, lr: 1.0e-2, matrix_lr: 0.02, spike: 6.0, window: 8}",
            "schedule={kind: linear, warmup: 3, decay: 40}",
            "train={steps: 12, sequences: 8, micro_sequences: 4, seed: 5, device: cpu}",
            "checkpoint={every: 4, keep: 2}",
            "validate={every: 6, sequences: 6}",
            "telemetry={every: 1}",
            *changes,
        ]

    def recipe(self, *changes: str) -> Recipe:
        """The tiny recipe with ``changes``."""
        return load_recipe("h3_hybrid_tiny", self.overrides(*changes))

    def trainer(self, run: Path, *changes: str, rank: Rank | None = None, kind: type | None = None) -> trainer.Trainer:
        """A trainer of the recipe with ``changes``, of class ``kind`` (a subclass of `Trainer`)."""
        guard.clear_stop()
        return (kind or trainer.Trainer)(self.recipe(*changes), run, rank or Rank())

    def fit(self, run: Path, *changes: str, kind: type | None = None) -> int:
        """Train in this process, or go on; the exit status."""
        return self.trainer(run, *changes, kind=kind).fit()

    def start(self, run: Path, *changes: str, before: Callable[[], object] = lambda: None) -> Attempt:
        """`potamos train` in a process of its own, after ``before()`` there."""
        return Attempt.fork(["train", "h3_hybrid_tiny", *self.overrides(*changes), "--run", str(run)], run, before)
