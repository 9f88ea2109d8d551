"""One training step of gpt_125m beside Hugging Face's GPT-2 of the same size, in one process, taking turns.

    python benchmarks/gpt2_step.py [--rows 1] [--length 512] [--rounds 9] [--threads 2]

A step is forward, backward and a fused AdamW update in fp32 on random tokens, without dropout, on both sides; theirs is
`GPT2LMHeadModel` with torch's fused attention and its own loss. Both have the vocabulary of 50,264. First the losses
are compared on equal weights: the two must compute the same thing. The ratio of a round is ours over theirs; the median
of all rounds counts. The table goes to benchmarks/results/gpt2_step.csv.

Our trainer tells the C library to keep freed memory; a program around theirs has no such line. `--keep-memory ours`,
the default, measures each as it is run; `both` and `neither` treat them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import stamp, write_table
from torch import Tensor

from potamos.parallel.facts import parameter_table
from potamos.pretrain.config import load_recipe
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.interfaces import Seq
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.optim import Optimizer
from potamos.pretrain.setup import keep_freed_memory

WITHOUT_DROPOUT = (
    "model.frontend={kind: tokens, vocabulary: 50264}",
    "model.mixer={kind: attention, heads: 12}",
    "model.residual_dropout=0.0",
)


def make_ours(length: int) -> tuple[Model, Callable[[Tensor], Tensor]]:
    """(the model, a step that returns its loss)."""
    recipe = load_recipe("gpt_125m", WITHOUT_DROPOUT)
    model = materialize(recipe.model, seed=0, sequence_length=length)
    optimizer = Optimizer(dict(model.named_parameters()), parameter_table(model), recipe.optimizer)
    accepted = torch.zeros(())

    def step(ids: Tensor) -> Tensor:
        rows = len(ids)
        seq = Seq(positions=torch.arange(ids.shape[1]).expand(rows, -1))
        targets = torch.cat([ids[:, 1:], torch.full((rows, 1), -1)], 1)
        hidden = model({"tokens": ids}, seq).hidden
        loss = model.frontend.nll(hidden, targets) / (rows * (ids.shape[1] - 1))
        loss.backward()
        optimizer.step(1.0, accepted)
        optimizer.zero_grad()
        return loss.detach()

    return model, step


def make_theirs() -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Hugging Face's GPT-2: (the model, a step that returns its loss)."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=50_264,
        n_positions=2_048,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.999), weight_decay=0.1, fused=True)

    def step(ids: Tensor) -> Tensor:
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return model, step


@torch.no_grad()
def copy_weights(ours: Model, theirs: Any) -> None:
    """Give both the same weights: theirs store projections as (inputs, outputs), queries, keys, values side by side."""
    own, body = dict(ours.named_parameters()), theirs.transformer
    copies = {
        "frontend.tokens.weight": body.wte.weight,
        "frontend.positions.weight": body.wpe.weight,
        "stack.norm.weight": body.ln_f.weight,
        "stack.norm.bias": body.ln_f.bias,
    }
    for layer, block in enumerate(body.h):
        for kind in ("weight", "bias"):
            here = f"stack.blocks.{layer}"
            copies[f"{here}.mixer_norm.{kind}"] = getattr(block.ln_1, kind)
            copies[f"{here}.channel_norm.{kind}"] = getattr(block.ln_2, kind)
            for name, part in zip("qkv", getattr(block.attn.c_attn, kind).chunk(3, -1), strict=True):
                copies[f"{here}.mixer.{name}.{kind}"] = part
            copies[f"{here}.mixer.out.{kind}"] = getattr(block.attn.c_proj, kind)
            copies[f"{here}.channel.up.{kind}"] = getattr(block.mlp.c_fc, kind)
            copies[f"{here}.channel.down.{kind}"] = getattr(block.mlp.c_proj, kind)
    assert copies.keys() == own.keys(), "the two models have different parameters"
    for name, value in copies.items():
        stored = value.dim() == 2 and name.startswith("stack.")
        own[name].copy_(value.mT if stored else value)


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`: glibc's defaults, and what is free now goes back to the kernel."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 65_536)  # M_MMAP_MAX
        libc.mallopt(-1, 128 * 1024)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def seconds(step: Callable[[Tensor], Tensor], ids: Tensor, keep: bool) -> float:
    """Of one step, with or without freed memory kept."""
    (keep_freed_memory if keep else return_freed_memory)()
    began = time.perf_counter()
    step(ids)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep-memory", choices=("ours", "both", "neither"), default="ours")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpt2_step.csv")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    (ours, our_step), (theirs, their_step) = make_ours(chosen.length), make_theirs()
    copy_weights(ours, theirs)
    ids = torch.randint(0, 50_257, (chosen.rows, chosen.length))
    first, second = our_step(ids).item(), their_step(ids).item()  # also the warm-up
    assert abs(first - second) < 1e-4, f"losses {first} and {second}: not the same model"
    times = []
    for number in range(chosen.rounds):
        pair = (
            seconds(our_step, ids, keep=chosen.keep_memory != "neither"),
            seconds(their_step, ids, keep=chosen.keep_memory == "both"),
        )
        times.append(pair)
        print(
            f"round {number + 1}: ours {pair[0]:.3f} s, theirs {pair[1]:.3f} s, ratio {pair[0] / pair[1]:.3f}",
            flush=True,
        )
    ratios = [a / b for a, b in times]
    row = {
        "rows": chosen.rows,
        "length": chosen.length,
        "rounds": chosen.rounds,
        "ours_seconds": f"{statistics.median(a for a, _ in times):.3f}",
        "theirs_seconds": f"{statistics.median(b for _, b in times):.3f}",
        "median_ratio": f"{statistics.median(ratios):.3f}",
        "lowest_ratio": f"{min(ratios):.3f}",
        "highest_ratio": f"{max(ratios):.3f}",
        "keep_memory": chosen.keep_memory,
        **stamp(),
        "transformers": version("transformers"),
    }
    write_table(chosen.out, [row])


if __name__ == "__main__":
    main()
