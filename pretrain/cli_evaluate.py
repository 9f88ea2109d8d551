"""``potamos evaluate``: one checkpoint, or several side by side, here or on a cluster. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potamos.pretrain import cli_small_jobs as jobs
from potamos.pretrain import show
from potamos.pretrain.arguments import Device, Overrides, RunPath, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from potamos.pretrain.evaluations import Evaluation


def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    data: Annotated[
        Path | None, typer.Option(help="A prepared dataset; the recipe's validation sets by default.")
    ] = None,
    length: Annotated[
        str | None, typer.Option(help="Tokens of a row, or a multiple of the training rows, as in 4x.")
    ] = None,
    step: Step = None,
    steps: Annotated[
        str | None, typer.Option(metavar="STEPS", help="Several checkpoints: all, or as in 100,200; keeps a table.")
    ] = None,
    device: Device = "auto",
    slurm: jobs.Slurm = None,
    partition: jobs.Partition = None,
    account: jobs.Account = None,
    qos: jobs.Qos = None,
    constraint: jobs.Constraint = None,
    time: jobs.Time = None,
    memory: jobs.Memory = None,
    cpus: jobs.Cpus = None,
    gpus: jobs.Gpus = None,
    at_once: jobs.AtOnce = None,
) -> None:
    """Score held-out text: bits per byte, perplexity, loss.

    Rows of any length score the same tokens. Key=value changes what does not touch the weights, such as the pattern.

    Example: potamos evaluate runs/h3_hybrid_tiny --data demo/validation

    Longer rows: potamos evaluate runs/xpos_tiny 'model.pattern={kind: blockwise, size: 128}' --length 4x

    Every checkpoint, as a table in RUN/evaluations.csv: potamos evaluate runs/h3_hybrid_tiny --steps all

    The same on a cluster, by 4 jobs: potamos evaluate runs/h3_hybrid_125m --steps all --slurm 4 --gpus 1
    """
    wanted = jobs.resources(
        slurm, partition=partition, account=account, qos=qos, constraint=constraint, time=time, memory=memory,
        cpus=cpus, gpus=gpus, at_once=at_once,
    )  # fmt: skip
    if steps is None:
        if slurm is not None:
            raise jobs.OptionError(f"--slurm {slurm} shares out checkpoints: name them, as in --steps all")
        return _one(run, overrides or [], data, length, step, device)
    if step is not None:
        raise jobs.OptionError(f"--step {step} and --steps {steps}: give one of them")
    from potamos.pretrain.evaluations import evaluate_steps, parse_steps, table_path

    numbers = parse_steps(run, steps)
    if slurm is not None and wanted is not None:
        words = [*(overrides or []), *jobs.options(data=data, length=length, device=device)]
        return jobs.submit_evaluations(wanted, slurm, run, numbers, words, table_path(run))
    found = evaluate_steps(
        run, numbers, data=data, length=length, overrides=overrides or [], device=device,
        done=lambda at: show.note(f"{run} at step {at}"),
    )  # fmt: skip
    _table(found)
    show.note(f"kept in {table_path(run)}")


def _one(run: Path, overrides: list[str], data: Path | None, length: str | None, step: int | None, device: str) -> None:
    from potamos.pretrain.runs import open_run, score_run

    opened = open_run(run, step=step, device=device, overrides=overrides)
    scores = score_run(opened, data, length=length)
    show.note(f"{run} at step {opened.step}")
    show.scores(scores)


def _table(rows: Sequence[Evaluation]) -> None:
    table = show._table("data", right=("step", "bits/byte", "perplexity", "loss", "targets"))
    for row in rows:
        table.add_row(
            row.data, f"{row.step:,}", f"{row.bits_per_byte:.4f}", f"{row.perplexity:.2f}", f"{row.loss:.4f}",
            f"{row.targets:,}",
        )  # fmt: skip
    show.out.print(table)
