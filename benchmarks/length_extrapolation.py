"""Position schemes on rows longer than they were trained on: perplexity at 1, 2, 4 and 8 times the training length.

    python benchmarks/length_extrapolation.py [train.sequences=32 ...] [--steps 900] [--seeds 1] [--schemes rope ...]

A small attention model is trained once for each scheme, by the real command, with the same data, order and number of
steps, in rows of 64 tokens of the corpus of `potamos demo`. Each is then scored on the held-out split cut into longer
rows, which are the same tokens with more before them: a scheme that serves longer rows gets better, ratio < 1.
`xpos+blockwise` is the model of `xpos` evaluated with blockwise causal attention (Sun et al. 2022), blocks of half the
training length. What a folder already holds is used. The table goes to benchmarks/results/length_extrapolation.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from machine import stamp, write_table
from parts import potamos, prepare

from potamos.pretrain.catalog import parameters
from potamos.pretrain.config import load_recipe
from potamos.pretrain.demo import paths_below
from potamos.pretrain.runs import open_run, score_run

TRAINED, MULTIPLES = 64, (1, 2, 4, 8)
VOCABULARY = 2048

# {row of the table: (position scheme, changes when it is evaluated)}
SCHEMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sinusoidal": ("sinusoidal", ()),
    "rope": ("rope", ()),
    "xpos": ("xpos", ()),
    "xpos+blockwise": ("xpos", (f"model.pattern={{kind: blockwise, size: {TRAINED // 2}}}",)),
    "alibi": ("alibi", ()),
    "sandwich": ("sandwich", ()),
    "t5": ("t5", ()),
    "none": ("none", ()),
}

MODEL = (
    "model.width=128",
    "model.layers=2",
    f"model.frontend.vocabulary={VOCABULARY}",
    "model.mixer={kind: attention, heads: 4}",
    "model.channel={kind: mlp, ratio: 4, activation: gelu_tanh}",
    f"data.sequence_length={TRAINED}",
    "train.sequences=32",
    "train.micro_sequences=32",
    "telemetry.every=20",
    "telemetry.samples.every=null",
)


def trained(scheme: str, folder: Path, seed: int, steps: int, changes: list[str]) -> tuple[Path, float]:
    """The run folder of a scheme, trained to its end, and how long that took now."""
    length = [f"{key}={steps}" for key in ("train.steps", "schedule.decay", "checkpoint.every", "validate.every")]
    which = [f"model.positions={{kind: {scheme}}}", f"train.seed={seed}"]
    overrides = [*MODEL, *length, *paths_below(folder), *which, *changes]
    run = folder / f"{scheme}-seed{seed}-steps{steps}"
    began = time.perf_counter()
    if not (run / "done.json").exists():
        potamos("train", "gpt_tiny", *overrides, "--run", str(run))
    return run, time.perf_counter() - began


def measure(name: str, folder: Path, seed: int, steps: int, changes: list[str]) -> dict[str, Any]:
    """Train one scheme and score it at every length: one row of the table."""
    scheme, evaluated_with = SCHEMES[name]
    run, seconds = trained(scheme, folder, seed, steps, changes)
    opened = open_run(run, overrides=evaluated_with)
    scores = {}
    for multiple in MULTIPLES:
        (scores[multiple],) = score_run(opened, length=f"{multiple}x").values()
        print(f"{name}: {multiple}x: perplexity {scores[multiple].perplexity:.2f}", flush=True)
    assert len({score.targets for score in scores.values()}) == 1, "every length scores the same tokens"
    return {
        "scheme": name,
        "seed": seed,
        "parameters": parameters(opened.recipe),
        "steps": opened.step,
        "trained_at": TRAINED,
        "bits_per_byte": f"{scores[1].bits_per_byte:.4f}",
        **{f"perplexity_{TRAINED * m}": f"{scores[m].perplexity:.2f}" for m in MULTIPLES},
        **{f"ratio_{TRAINED * m}": f"{scores[m].perplexity / scores[1].perplexity:.3f}" for m in MULTIPLES[1:]},
        "seconds": f"{seconds:.0f}",
        **stamp(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/length_extrapolation"))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "length_extrapolation.csv")
    chosen = parser.parse_args()
    first = load_recipe("gpt_tiny", [*MODEL, *chosen.changes])
    if first.train.threads is not None:
        torch.set_num_threads(first.train.threads)  # for the row's stamp; each run sets its own
    chosen.folder.mkdir(parents=True, exist_ok=True)
    prepare(chosen.folder, VOCABULARY)
    seeds = [first.train.seed + n for n in range(chosen.seeds)]
    rows = [
        measure(name, chosen.folder, seed, chosen.steps, chosen.changes) for seed in seeds for name in chosen.schemes
    ]
    write_table(chosen.out, rows)


if __name__ == "__main__":
    main()
