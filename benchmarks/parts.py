"""The hybrid against its parts: h3_hybrid_tiny, gpt_tiny and s4d_tiny at equal steps and (nearly) equal parameters.

    python benchmarks/parts.py [--folder parts] [--seeds 1] [train.steps=600 ...]

Each recipe is trained by the real command on the corpus of `potamos demo`, with the same tokenizer, data order and
number of steps, and scored on the whole held-out split. What a folder already holds (tokenizer, data, a run half done)
is used. Key=value arguments change all recipes alike. The table goes to benchmarks/results/parts.csv.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from machine import stamp, write_table

from potamos.pretrain.catalog import parameters
from potamos.pretrain.config import load_recipe
from potamos.pretrain.demo import CORPUS, paths_below, program
from potamos.pretrain.records import read_metrics
from potamos.pretrain.runs import open_run, score_run

RECIPES = ("h3_hybrid_tiny", "gpt_tiny", "s4d_tiny")


def potamos(*arguments: str) -> None:
    """Run one command of the program; SystemExit with its status where it fails."""
    print("$ potamos", *arguments, flush=True)
    code = subprocess.run([*program(), *arguments]).returncode
    if code != 0:
        raise SystemExit(code)


def prepare(folder: Path, vocabulary: int) -> None:
    """The tokenizer and both splits, made once."""
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        potamos("data", "tokenizer", CORPUS, str(tokenizer), f"--vocabulary={vocabulary}", "--split=train")
    for split in ("train", "validation"):
        if not (folder / split).exists():
            where = str(folder / split)
            potamos("data", "prepare", CORPUS, where, f"--tokenizer={tokenizer}", f"--split={split}")


def measure(name: str, folder: Path, seed: int, changes: list[str]) -> dict[str, Any]:
    """Train one recipe to its end and score it: one row of the table."""
    overrides = [*paths_below(folder), f"train.seed={seed}", *changes]
    recipe = load_recipe(name, overrides)
    run = folder / f"{name}-seed{seed}-steps{recipe.train.steps}"
    began = time.perf_counter()
    if not (run / "done.json").exists():
        potamos("train", name, *overrides, "--run", str(run))
    seconds = time.perf_counter() - began
    (score,) = score_run(open_run(run)).values()
    speeds = [r["tokens_per_second"] for r in read_metrics(run) if r["kind"] == "train"]
    return {
        "recipe": name,
        "seed": seed,
        "parameters": parameters(recipe),
        "steps": recipe.train.steps,
        "held_out_bits_per_byte": f"{score.bits_per_byte:.4f}",
        "held_out_perplexity": f"{score.perplexity:.2f}",
        "tokens_per_second": round(statistics.median(speeds)),
        "seconds": f"{seconds:.0f}",
        **stamp(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/parts"))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "parts.csv")
    chosen = parser.parse_args()
    first = load_recipe(chosen.recipes[0], chosen.changes)
    if first.train.threads is not None:
        torch.set_num_threads(first.train.threads)  # for the row's stamp; each run sets its own
    chosen.folder.mkdir(parents=True, exist_ok=True)
    prepare(chosen.folder, first.model.frontend.vocabulary)  # pyright: ignore[reportAttributeAccessIssue]
    seeds = [first.train.seed + n for n in range(chosen.seeds)]
    rows = [measure(name, chosen.folder, seed, chosen.changes) for seed in seeds for name in chosen.recipes]
    write_table(chosen.out, rows)


if __name__ == "__main__":
    main()
