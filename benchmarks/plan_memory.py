"""What `potamos plan` says of memory beside the measured peak of real steps on CPU ranks.

    python benchmarks/plan_memory.py [--only tiny]

`predicted` is counted on fake tensors before anything runs. `tensors` follows every storage through two real steps of
the fullest rank; `allocator` is torch's own record of its CPU allocator in a third step, which also knows what
operations allocate inside. The table goes to benchmarks/results/plan_memory.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from machine import stamp, write_table

from potamos.parallel.local import run_ranks
from potamos.parallel.mesh import sizes
from potamos.pretrain import setup
from potamos.pretrain.config import load_recipe
from potamos.pretrain.plan_measure import measure
from potamos.pretrain.plan_memory import memory
from potamos.pretrain.plan_trace import trace

TINY = ("data.sequence_length=128", "train={steps: 2, sequences: 8, micro_sequences: 2, seed: 1, device: cpu}")
LARGE = ("data.sequence_length=256", "train={steps: 2, sequences: 2, micro_sequences: 1, seed: 1, device: cpu}")
CASES = (
    ("h3_hybrid_tiny", 1, "", TINY),
    ("h3_hybrid_tiny", 2, "dp_shard=2", TINY),
    ("h3_hybrid_tiny", 2, "tp=2", TINY),
    ("h3_hybrid_tiny", 2, "pp=2", TINY),
    ("h3_hybrid_tiny", 2, "cp=2", TINY),
    ("h3_hybrid_tiny", 2, "dp_replicate=2", TINY),
    ("h3_hybrid_tiny", 2, "dp_shard=2 checkpointing=full", TINY),
    ("h3_hybrid_tiny", 4, "tp=2 pp=2 schedule=interleaved_1f1b", (*TINY, "model.layers=6")),
    ("h3_hybrid_tiny", 2, "pp=2 schedule=zero_bubble", (*TINY, "model.layers=6")),
    ("gpt_tiny", 2, "dp_shard=2", TINY),
    ("gpt_tiny", 2, "pp=2 schedule=zero_bubble", (*TINY, "model.layers=8")),
    ("gpt_tiny", 2, "pp=2 schedule=zbv", (*TINY, "model.layers=8")),
    ("gpt_tiny", 4, "pp=2 dp_shard=2 schedule=dualpipe_v", (*TINY, "model.layers=4", "train.sequences=16")),
    ("s4d_tiny", 2, "tp=2", TINY),
    ("h3_hybrid_125m", 1, "", LARGE),
    ("h3_hybrid_125m", 1, "checkpointing=full", LARGE),
)


def compare(name: str, world: int, layout: str, changes: tuple[str, ...]) -> dict[str, Any]:
    """One layout: predicted and measured, in MiB."""
    axes = tuple(f"parallel.{word}" for word in layout.split())
    replicas = () if "dp_replicate" in layout else ("parallel.dp_replicate=1",)
    recipe = load_recipe(name, (*changes, *replicas, *axes))
    size = sizes(recipe.parallel.layout(), world)
    began = time.perf_counter()
    plan = memory(recipe, trace(recipe, tp=size.tp, cp=size.cp), size, setup.draft_system(recipe).stage_costs())
    seconds = time.perf_counter() - began
    found = run_ranks(world, lambda rank, world: measure(recipe, rank, world, allocator=True), timeout=300)
    tensors, allocator = max(each.tensors for each in found), max(each.allocator or 0 for each in found)
    return {
        "recipe": name,
        "layout": layout or "one process",
        "precision": recipe.train.precision,
        "rows": recipe.train.micro_sequences,
        "length": recipe.data.sequence_length,
        "predicted_mib": f"{plan.peak / 2**20:.2f}",
        "tensors_mib": f"{tensors / 2**20:.2f}",
        "allocator_mib": f"{allocator / 2**20:.2f}",
        "predicted_over_tensors": f"{plan.peak / tensors:.4f}",
        "predicted_over_allocator": f"{plan.peak / allocator:.4f}",
        "fullest_in": plan.when,
        "plan_seconds": f"{seconds:.1f}",
        **stamp(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose recipe or layout holds this word")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan_memory.csv")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        if chosen.only in f"{case[0]} {case[2]}":
            rows.append(compare(*case))
            print(*case[:3], rows[-1]["predicted_over_tensors"], rows[-1]["predicted_over_allocator"], flush=True)
    write_table(chosen.out, rows)


if __name__ == "__main__":
    main()
