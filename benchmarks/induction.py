"""Induction head: which mixers can copy what once followed a token, and which cannot.

    python benchmarks/induction.py [--mixers h3 s4d attention] [--epochs 12] [--seeds 1]

A sequence of 30 tokens out of 20 holds one special token twice, at a random place and at the end; the answer is the
token that followed it the first time. Two layers of width 32 learn it from 5,000 sequences, scored on 500 others; by
chance 1 in 19 is right. Fu et al. 2022 ("Hungry Hungry Hippos", section 3.1 and table 1) use it to show what
state-space models lack and what H3's shift and gates add; they train 400 epochs, this a few.

All mixers have the same trunk, data, optimizer, schedule and number of steps. The table goes to
benchmarks/results/induction.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potamos.parallel.facts import parameter_table
from potamos.parallel.gradients import Gradients
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.interfaces import Seq
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.optim import GradientNorm, Optimizer, schedule_factor
from potamos.pretrain.recipe import AdamW, Decaying, ModelSection

VOCABULARY, LENGTH, SPECIAL = 20, 30, 19
TRAINING, TEST, BATCH = 5_000, 500, 32

# Attention has to find the token before: a bias that falls with the distance serves it best; with rotary or learned
# positions it needs more epochs than this.
MIXERS: dict[str, dict[str, Any]] = {
    "h3": {"mixer": {"kind": "h3"}},
    "s4d": {"mixer": {"kind": "s4d"}},
    "attention": {"mixer": {"kind": "attention", "heads": 4}, "positions": {"kind": "alibi"}},
}


@dataclass(frozen=True)
class Budget:
    """What every mixer gets alike."""

    epochs: int = 12
    lr: float = 5e-3
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Outcome:
    """Share of right answers on the test sequences after each epoch, and what it took."""

    mixer: str
    parameters: int
    accuracy: list[float]
    seconds: float


def sequences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(tokens (count, LENGTH), answers (count,)), both int64."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SPECIAL, (count, LENGTH), generator=generator)
    place = torch.randint(0, LENGTH - 2, (count, 1), generator=generator)  # its follower must come before the end
    tokens.scatter_(1, place, SPECIAL)
    tokens[:, -1] = SPECIAL
    return tokens, tokens.gather(1, place + 1)[:, 0]


def build(mixer: str, seed: int = 0) -> Model:
    """Two layers of width 32."""
    settings = {
        "width": 32,
        "layers": 2,
        "frontend": {"kind": "tokens", "vocabulary": VOCABULARY},
        "channel": {"kind": "mlp", "ratio": 4},
        **MIXERS[mixer],
    }
    return materialize(ModelSection.model_validate(settings), seed, sequence_length=LENGTH)


def learn(mixer: str, budget: Budget, seed: int = 0) -> Iterator[tuple[Model, float]]:
    """Train one mixer; after each epoch, the model and its share of right answers."""
    model = build(mixer, seed)
    parameters, table = dict(model.named_parameters()), parameter_table(model)
    options = AdamW.model_validate({"lr": budget.lr, "weight_decay": budget.weight_decay})
    optimizer, norm = Optimizer(parameters, table, options), GradientNorm(Gradients(parameters), table)
    tokens, answers = sequences(TRAINING, seed=2 * seed + 1)
    test = sequences(TEST, seed=2 * seed + 2)
    order = torch.Generator().manual_seed(seed)
    batches = -(-TRAINING // BATCH)
    steps = budget.epochs * batches
    schedule = Decaying.model_validate({"kind": "cosine", "warmup": steps // 20, "decay": steps, "floor": 0.0})
    accepted = torch.zeros(())
    for epoch in range(budget.epochs):
        for number, chosen in enumerate(torch.randperm(TRAINING, generator=order).split(BATCH)):
            targets = torch.full((len(chosen), LENGTH), -1)
            targets[:, -1] = answers[chosen]
            hidden = model({"tokens": tokens[chosen]}, places(len(chosen))).hidden
            (model.frontend.nll(hidden, targets) / len(chosen)).backward()
            norm.clip(norm.measure()[0], options.clip)
            optimizer.step(schedule_factor(schedule, epoch * batches + number, steps), accepted)
            optimizer.zero_grad()
        yield model, accuracy(model, *test)


def places(rows: int) -> Seq:
    """One document a row."""
    return Seq(positions=torch.arange(LENGTH).repeat(rows, 1))


@torch.no_grad()
def accuracy(model: Model, tokens: Tensor, answers: Tensor) -> float:
    """Share of sequences whose answer has the highest score."""
    scores = model.frontend.logits(model({"tokens": tokens}, places(len(tokens))).hidden[:, -1])
    return (scores.argmax(-1) == answers).double().mean().item()


def measure(mixer: str, budget: Budget, seed: int = 0) -> Outcome:
    """One full training."""
    began, found, parameters = time.perf_counter(), [], 0
    for model, share in learn(mixer, budget, seed):
        found.append(share)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"  {mixer} seed {seed} epoch {len(found)}: {100 * share:.1f} %", flush=True)
    return Outcome(mixer, parameters, found, time.perf_counter() - began)


def main() -> None:
    from machine import stamp, write_table  # beside this script

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--epochs", type=int, default=Budget.epochs)
    parser.add_argument("--lr", type=float, default=Budget.lr)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "induction.csv")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    budget = Budget(epochs=chosen.epochs, lr=chosen.lr)
    rows = []
    for mixer in chosen.mixers:
        for seed in range(chosen.seeds):
            found = measure(mixer, budget, seed)
            solved = next((n + 1 for n, share in enumerate(found.accuracy) if share >= 0.99), None)
            rows.append(
                {
                    "mixer": mixer,
                    "seed": seed,
                    "parameters": found.parameters,
                    "epochs": budget.epochs,
                    "lr": budget.lr,
                    "accuracy": f"{found.accuracy[-1]:.4f}",
                    "epoch_of_99_percent": solved or "",
                    "seconds": f"{found.seconds:.1f}",
                    **stamp(),
                }
            )
    write_table(chosen.out, rows)


if __name__ == "__main__":
    main()
