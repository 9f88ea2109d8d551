"""A picture of a run's loss, from its records."""

from __future__ import annotations

import io
import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from potamos.files import write_atomically
from potamos.pretrain.records import read_metrics
from potamos.slurm.run_folder import RunFolder

TRAINING, VALIDATION, INK = "#3b6ea5", ("#c8553d", "#4f8a5b", "#8a6bb1", "#b58a2c"), "#333333"


def plot_loss(run: str | os.PathLike[str], out: Path, *, title: str | None = None) -> None:
    """Draw training loss over tokens, with the validations as points, into the PNG file `out`.

    In bits per byte where the records have it (`bits_per_byte`), else in nats per token (`loss`).

    Raises:
        ImportError: matplotlib is not installed; says how to install it.
        ValueError: the run has recorded no training yet, or nothing finite.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ImportError(
            "drawing the loss needs matplotlib, which is not installed: pip install 'potamos[demo]'"
        ) from error
    records = read_metrics(run)
    training = [record for record in records if record["kind"] == "train" and "loss" in record]
    if not training:
        raise ValueError(f"{os.fspath(run)} has no records of training yet (logs/metrics.jsonl): train first")
    key = "bits_per_byte" if all("bits_per_byte" in record for record in training) else "loss"
    tokens, values = _series(training, key)
    if not len(values):
        raise ValueError(f"{os.fspath(run)} has recorded no finite {key} to draw")
    validations = [record for record in records if record["kind"] == "validation"]
    names = sorted({name for record in validations for name in record if name.split("/")[-1] == key})
    held_out = {name: _series(validations, name) for name in names}
    smooth = _smooth(values)

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tokens, values, color=TRAINING, linewidth=0.8, alpha=0.3)
    axes.plot(tokens, smooth, color=TRAINING, linewidth=1.6, label="training")
    lowest = float(np.nanmin(smooth))
    for (name, (points, scores)), color in zip(held_out.items(), itertools.cycle(VALIDATION), strict=False):
        if len(points):
            label = f"{name.rpartition('/')[0] or 'validation'} (last {scores[-1]:.3f})"
            axes.plot(points, scores, "o-", color=color, markersize=4, linewidth=1.0, label=label)
            lowest = min(lowest, float(scores.min()))
    axes.set_xlabel("tokens")
    axes.set_ylabel("bits per byte" if key == "bits_per_byte" else "loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(title or RunFolder.of(run).path.name, loc="left", color=INK)
    # The first steps fall from chance level and would flatten everything after them.
    top = float(smooth[len(smooth) // 25])
    if top > lowest:
        axes.set_ylim(lowest - 0.08 * (top - lowest), top + 0.05 * (top - lowest))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(out, picture.getvalue())


def _series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of the records that have a finite one."""
    pairs = [(record["tokens"], record[key]) for record in records if math.isfinite(record.get(key, math.nan))]
    return np.array([tokens for tokens, _ in pairs], dtype=float), np.array([value for _, value in pairs], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a fiftieth of the curve, over fewer values at both ends."""
    half = len(values) // 100
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
