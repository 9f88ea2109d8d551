"""H3's mixer on a CPU: the chunked form against torch's rfft form, and h3_hybrid_tiny's training step before and after.

    python benchmarks/flash_conv_cpu.py [--before REVISION] [--rounds 9] [--threads 1]

Forms: forward + backward, fp32, width 192; the chunked form makes its operators from the parameters and carries the
state, the rfft form is given the long kernel. Each round runs both, so that a busy machine slows both; the ratio of a
round is chunked over rfft. The diagonal SSM alone: likewise, and by the length of its chunks. Documents: the chunked
form with document ids over the same without, for ids that never change and for packed documents of 1,000 tokens in the
mean. With --before, a training step of h3_hybrid_tiny (16 rows of 256 tokens, the recipe's optimizer) with the kernels
of that git revision against those of the checkout, now over before. Medians count; the tables go to
benchmarks/results/flash_conv_cpu.csv.
"""

from __future__ import annotations

import argparse
import importlib
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import stamp, write_table

from potamos.kernels import flash_conv
from potamos.kernels.bench import both_ways
from potamos.kernels.bench_cases import Cell, Problem, long_kernel
from potamos.kernels.diag_ssm import diag_ssm
from potamos.kernels.diag_ssm.chunked import chunked_ssm
from potamos.kernels.diag_ssm.segments import plain_segments
from potamos.kernels.long_conv import long_conv
from potamos.parallel.facts import parameter_table
from potamos.pretrain.config import load_recipe
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.interfaces import Seq
from potamos.pretrain.models.mixers import h3
from potamos.pretrain.optim import Optimizer

ROOT = Path(__file__).resolve().parent.parent
CELLS = (Cell(192, 256, 16), Cell(192, 1024, 4), Cell(192, 4096, 1), Cell(192, 1000, 4))


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(what: str, first: tuple[str, Callable], second: tuple[str, Callable], rounds: int) -> dict[str, Any]:
    """Run both by turns; the ratio is first over second."""
    runs = (first[1], second[1])
    for run in runs:
        run()
    times = [(seconds(runs[0]), seconds(runs[1])) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in times)
    one, two = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return {
        "what": what,
        "first": first[0],
        "first_ms": f"{one:.1f}",
        "second": second[0],
        "second_ms": f"{two:.1f}",
        "median_ratio": f"{statistics.median(ratios):.3f}",
        "lowest_ratio": f"{ratios[0]:.3f}",
        "highest_ratio": f"{ratios[-1]:.3f}",
        "rounds": rounds,
    }


def forms(cell: Cell, rounds: int) -> dict[str, Any]:
    """The chunked form over the rfft form on one shape."""
    problem = Problem.draw(cell, torch.device("cpu"), torch.float32)
    runs = []
    for name, (run, leaves) in (("chunked", problem.mixer("torch")), ("rfft", problem.rfft())):
        runs.append((name, both_ways(run, leaves, problem.grad)))
    return compare(f"h3_mix {cell.rows} x {cell.length}", runs[0], runs[1], rounds)


def ssm(rows: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """The diagonal SSM alone: `diag_ssm` over the FFT convolution that is given the kernel, and chunks of other lengths
    over those of 64 tokens."""
    problem = Problem.draw(Cell(192, length, rows), torch.device("cpu"), torch.float32)
    diag, u, d = problem.diagonal(), problem.leaves["v"], problem.leaves["d"]
    kernel = long_kernel(diag, length).requires_grad_()
    parameters = [diag.log_dt, diag.log_a, diag.b, diag.B, diag.C]

    def chunks(count: int) -> tuple[str, Callable]:
        def run() -> torch.Tensor:
            segments = plain_segments(length, count)
            return segments.merge(chunked_ssm(segments.split(u.transpose(0, 1)), diag, d, segments, None)[0])

        return f"chunks of {count}", both_ways(run, [u, d, *parameters], problem.grad.transpose(0, 1))

    own = ("chunked", both_ways(lambda: diag_ssm(u, diag, d=d)[0], [u, d, *parameters], problem.grad))
    fft = ("rfft", both_ways(lambda: long_conv(u, kernel, d=d, backend="torch"), [u, d, kernel], problem.grad))
    what = f"diag_ssm {rows} x {length}"
    return [compare(what, own, fft, rounds), *(compare(what, chunks(n), chunks(64), rounds) for n in (16, 32, 128))]


def documents(cell: Cell, rounds: int) -> list[dict[str, Any]]:
    """The chunked form with document ids over the same without: one document a row, and packed ones."""
    titles = {"": "without ids", "one": "ids, one document a row", "packed": "ids, packed documents"}
    runs = {}
    for kind, title in titles.items():
        problem = Problem.draw(replace(cell, documents=kind), torch.device("cpu"), torch.float32)
        runs[kind] = (title, both_ways(*problem.mixer("torch"), problem.grad))
    what = f"h3_mix {cell.rows} x {cell.length} documents"
    return [compare(what, runs[kind], runs[""], rounds) for kind in ("one", "packed")]


def kernels_of(revision: str, folder: Path) -> Any:
    """`h3_mix` as it was at a git revision, imported beside today's under another name."""
    packed = subprocess.run(["git", "archive", revision, "kernels"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder / "before", filter="data")
    (folder / "before" / "__init__.py").write_text("")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("before.kernels.flash_conv").h3_mix
    finally:
        sys.path.remove(str(folder))


def training_step(mix: Callable) -> Callable[[], float]:
    """A step of the recipe on random tokens, two documents a row, with `mix` in every H3 layer; returns the loss."""
    recipe = load_recipe("h3_hybrid_tiny")
    rows, length = recipe.train.sequences, recipe.data.sequence_length
    model = materialize(recipe.model, seed=0, sequence_length=length)
    optimizer = Optimizer(dict(model.named_parameters()), parameter_table(model), recipe.optimizer)
    tokens = torch.randint(4096, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).expand(rows, -1)
    seq = Seq(positions=positions, document_ids=(positions >= 100).int())

    def step() -> float:
        h3.h3_mix = mix  # type: ignore[assignment]
        loss = model.frontend.nll(model({"tokens": tokens[:, :-1]}, seq).hidden, tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        optimizer.step(1.0, torch.zeros(()))
        optimizer.zero_grad()
        return loss.item()

    return step


def before_and_after(revision: str, rounds: int) -> dict[str, Any]:
    """Today's training step over that of a revision; first their losses must agree."""
    with tempfile.TemporaryDirectory() as folder:
        then, now = training_step(kernels_of(revision, Path(folder))), training_step(flash_conv.h3_mix)
        losses = then(), now()
        assert abs(losses[0] - losses[1]) < 1e-5 * losses[0], f"the two compute different losses: {losses}"
        return compare("h3_hybrid_tiny training step", ("now", now), (f"before ({revision})", then), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="REVISION")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "flash_conv_cpu.csv")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = [forms(cell, chosen.rounds) for cell in CELLS]
    rows += ssm(16, 256, chosen.rounds) + ssm(2, 2048, chosen.rounds)
    rows += documents(Cell(192, 4096, 4), chosen.rounds)
    if chosen.before is not None:
        rows.append(before_and_after(chosen.before, chosen.rounds))
    write_table(chosen.out, [{**row, **stamp()} for row in rows])


if __name__ == "__main__":
    main()
