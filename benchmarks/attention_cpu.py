"""Attention on a CPU: in tiles, by torch's fused kernel with mask and bias in memory, and with the scores written out.

    python benchmarks/attention_cpu.py [--rounds 7] [--threads 1]

Cases that torch's fused kernel has no form of its own for; fp32, 4 or 8 heads of 64 channels; forward + backward, for
one query against a cache forward alone. Each round runs all three forms; times are the process's own (with more than
one thread those of the clock), so that a busy machine matters little. Ratios are of medians, over the chunked form;
`auto` is what `attention` picks and how its time stands to the faster of the first two (1.00: it is the faster one).
peak: most memory beyond the inputs. The table goes to benchmarks/results/attention_cpu.csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import stamp, write_table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from potamos.kernels.attention import (
    Bias,
    Decision,
    Disentangled,
    Mask,
    Toeplitz,
    alibi_slopes,
    attention,
    attention_reference,
    deberta_rows,
)
from potamos.kernels.attention.biases import resolve_bias, resolve_row
from potamos.kernels.attention.dispatch import FormName, form_of, run_fused
from potamos.kernels.attention.function import attend

DIM = 64
RULES = ("documents", "window", "slopes", "table", "disentangled")


class Cell(NamedTuple):
    """A shape: queries sit at the end of the keys."""

    rows: int
    heads: int
    queries: int
    keys: int


CELLS = (
    Cell(16, 4, 64, 64), Cell(8, 4, 128, 128), Cell(8, 4, 256, 256), Cell(2, 8, 512, 512), Cell(1, 8, 2048, 2048),
    Cell(4, 8, 1, 1024), Cell(4, 8, 1, 16384), Cell(1, 8, 1, 131072),
)  # fmt: skip


class Problem:
    """One case: inputs, mask and bias, and a way to run each form."""

    def __init__(self, cell: Cell, rule: str) -> None:
        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, requires_grad=True)

        first = cell.keys - cell.queries
        self.q = leaf(cell.rows, cell.heads, cell.queries, DIM)
        self.k, self.v = (leaf(cell.rows, cell.heads, cell.keys, DIM) for _ in range(2))
        ids = (torch.arange(cell.keys, dtype=torch.int32) // max(1, cell.keys // 3)).expand(cell.rows, -1)
        self.mask = Mask(query_offset=first)
        if rule == "documents":
            self.mask = Mask(query_offset=first, query_documents=ids[:, first:], key_documents=ids)
        elif rule == "window":
            self.mask = Mask(query_offset=first, window=max(1, cell.keys // 4))
        self.extra: tuple[Tensor, ...] = ()
        self.bias: Bias | None = None
        if rule == "slopes":
            self.bias = Toeplitz(alibi_slopes(cell.heads))
        elif rule == "table":
            self.extra = (leaf(cell.heads, 129),)
            self.bias = Toeplitz(table=self.extra[0])
        elif rule == "disentangled":
            self.extra = (leaf(cell.heads, 128, DIM), leaf(cell.heads, 128, DIM))
            rows, least = deberta_rows(64, 64, 512)
            self.bias = Disentangled(self.extra[0], self.extra[1], rows, least)
        self.upper = torch.randn_like(self.q)
        self.decodes = cell.queries == 1

    def forward(self, form: FormName | None) -> Tensor:
        """The output by a form; None is the definition."""
        if form is None:
            return attention_reference(self.q, self.k, self.v, mask=self.mask, bias=self.bias)[0]
        scale = DIM**-0.5
        if self.decodes and isinstance(self.bias, Disentangled):
            terms = resolve_row(self.bias, self.q, self.k, scale, self.mask.query_offset)
        else:
            terms = resolve_bias(self.bias, self.q, self.k, scale)
        if form == "chunked":
            return attend(form_of(Decision(form, "")), self.q, self.k, self.v, terms, self.mask, scale)[0]
        return run_fused(Decision(form, ""), self.q, self.k, self.v, self.mask, terms, scale)

    def run(self, form: FormName | None) -> Callable[[], None]:
        """A call to time."""

        def call() -> None:
            if self.decodes:
                with torch.no_grad():
                    self.forward(form)
            else:
                torch.autograd.grad(self.forward(form), (self.q, self.k, self.v, *self.extra), self.upper)

        return call


def seconds(run: Callable[[], None]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    run()
    return clock() - began


def peak(run: Callable[[], None]) -> int:
    """Most bytes allocated at once beyond those from before, inside torch's operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    results: Any = record.profiler
    live = most = 0
    memory = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def measure(cell: Cell, rule: str, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    problem = Problem(cell, rule)
    chosen = attention(problem.q, problem.k, problem.v, mask=problem.mask, bias=problem.bias, explain=True).form
    runs = {"chunked": problem.run("chunked"), "in_memory": problem.run("sdpa_mask"), "plain": problem.run(None)}
    peaks = {name: peak(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    middle = {name: statistics.median(found) for name, found in times.items()}
    auto = {"chunked": "chunked", "sdpa_mask": "in_memory"}.get(chosen, chosen)
    row: dict[str, Any] = {"case": rule, **cell._asdict(), "ways": "forward" if problem.decodes else "both"}
    row |= {f"{name}_ms": f"{1e3 * value:.2f}" for name, value in middle.items()}
    row |= {f"{name}_over_chunked": f"{middle[name] / middle['chunked']:.2f}" for name in ("in_memory", "plain")}
    row |= {f"{name}_peak_mib": f"{value / 2**20:.1f}" for name, value in peaks.items()}
    fastest = min(middle["chunked"], middle["in_memory"])
    return {**row, "auto": auto, "auto_over_faster": f"{middle[auto] / fastest:.2f}" if auto in middle else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention_cpu.csv")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    rows = [measure(cell, rule, chosen.rounds) for cell in CELLS for rule in RULES]
    write_table(chosen.out, [{**row, "rounds": chosen.rounds, **stamp()} for row in rows])


if __name__ == "__main__":
    main()
