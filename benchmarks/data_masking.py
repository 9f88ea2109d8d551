"""Masking and span corruption in tokens per second of one core, beside span corruption of one row at a time.

    python benchmarks/data_masking.py [--batches 8x2048 64x512] [--seconds 1]

Rows hold documents of 200 to 1,800 random ids of a GPT-2 vocabulary, closed by an end of document. A figure is the
median over repeated calls, in time of the process, of the whole work from rows to the arrays a model takes: choosing,
replacing, labels, gathering. What works on a row at a time is explained in naive_spans.py. The table goes to
benchmarks/results/data_masking.csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import stamp, write_table
from naive_spans import corrupt_row, draw_row, join_row

from potamos.data.mask_vocabulary import MaskVocabulary
from potamos.data.masking import MaskRule, mask, mask_late, select
from potamos.data.randomness import RowRandom
from potamos.data.spans import SpanRule, corrupt_spans

END, MASK, SENTINELS = 50_256, 50_257, np.arange(50_258, 50_258 + 1024)


def vocabulary() -> MaskVocabulary:
    """As many ids as GPT-2's, and as large a share of them as there begins a word, and sentinels."""
    rng = np.random.default_rng(0)
    pieces = [b" word" if starts else b"part" for starts in rng.random(END) < 0.65]
    special = range(END, int(SENTINELS[-1]) + 1)
    return MaskVocabulary.of_pieces([*pieces, *([b""] * len(special))], frozenset(special), MASK)


def make_rows(n: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, document ids, positions."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, END, (n, width)).astype(np.int32)
    document_ids, positions = np.zeros((n, width), np.int32), np.tile(np.arange(width, dtype=np.int32), (n, 1))
    for row in range(n):
        place = 0
        while (place := place + int(rng.integers(200, 1800))) < width:
            tokens[row, place - 1] = END
            document_ids[row, place:] += 1
            positions[row, place:] = np.arange(width - place)
    return tokens, document_ids, positions


def median_seconds(call: Callable[[], Any], least: float) -> float:
    """Of repeated calls, for at least so long and at least five times, after one that is not counted."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < least:
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return statistics.median(times)


def cases(table: MaskVocabulary, rows: tuple[np.ndarray, ...], random: RowRandom) -> dict[str, Callable[[], Any]]:
    tokens, document_ids, positions = rows
    width = tokens.shape[1]

    def masked(**fields: Any) -> Callable[[], Any]:
        rule = MaskRule(**fields)
        return lambda: mask(rule, tokens, document_ids, table, random)

    def late(**fields: Any) -> Callable[[], Any]:
        rule = MaskRule(exact=True, **fields)
        return lambda: mask_late(rule, tokens, document_ids, positions, table, random)

    def spans(density: float, mean: float) -> Callable[[], Any]:
        rule = SpanRule(density, mean)
        return lambda: corrupt_spans(rule, tokens, document_ids, table.maskable, SENTINELS, random)

    streams = {
        name: random.words(name, width) for attempt in range(16) for name in (f"lengths {attempt}", f"gaps {attempt}")
    }

    def in_loops() -> None:
        for row in range(len(tokens)):
            words = lambda stream, count, row=row: streams[stream][row, :count]  # noqa: E731
            corrupt_row(SpanRule(), tokens[row], document_ids[row], table.maskable, SENTINELS, words)

    hidden, count = (int(x) for x in SpanRule().counts(np.array(width), np.array(width)))

    def in_numpy() -> list[np.ndarray]:
        parts = []
        for row in range(len(tokens)):
            generator = np.random.Generator(np.random.Philox(key=[1, row]))
            starts, lengths = draw_row(generator, width, hidden, count)
            parts.append(join_row(tokens[row], starts, lengths, SENTINELS))
        return [np.stack(side) for side in zip(*parts, strict=True)]

    plain = MaskRule()
    hidden, count = (int(x) for x in SpanRule().counts(np.array(width), np.array(width)))
    rng = np.random.default_rng(2)

    def parts(total: int) -> np.ndarray:
        return np.diff(np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1, prepend=0, append=total)

    lengths = np.stack([parts(hidden) for _ in tokens])
    gaps = np.stack([parts(width - hidden) for _ in tokens])
    starts = np.cumsum(gaps + lengths, axis=1) - lengths

    def joined() -> None:
        for row in range(len(tokens)):
            join_row(tokens[row], starts[row], lengths[row], SENTINELS)

    return {
        "bernoulli 15 %, chosen only": lambda: select(plain, tokens, document_ids, table, random),
        "bernoulli 15 %": masked(),
        "whole words 15 %": masked(units="words"),
        "n-grams 15 %": masked(units="ngrams"),
        "exact 15 %": masked(exact=True),
        "exact whole words 15 %": masked(units="words", exact=True),
        "exact 50 %, late": late(rate=0.5),
        "exact 50 %, late, all [MASK]": late(rate=0.5, replacement=(1.0, 0.0, 0.0)),
        "spans 15 %, mean 3": spans(0.15, 3.0),
        "spans 15 %, mean 8": spans(0.15, 8.0),
        "spans 50 %, mean 3": spans(0.5, 3.0),
        "spans 15 %, mean 3, a row at a time": in_loops,
        "the same in NumPy, documents disregarded": in_numpy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", default=["8x2048", "64x512"], metavar="ROWSxTOKENS")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time for each figure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_masking.csv")
    chosen = parser.parse_args()
    table = vocabulary()
    results = []
    for batch in chosen.batches:
        n, width = map(int, batch.split("x"))
        rows = make_rows(n, width)
        for name, call in cases(table, rows, RowRandom(1, "benchmark", np.arange(n))).items():
            seconds = median_seconds(call, chosen.seconds)
            speed = {
                "million_tokens_per_second": f"{n * width / seconds / 1e6:.1f}",
                "microseconds": f"{seconds * 1e6:.0f}",
            }
            results.append({"what": name, "rows": n, "tokens": width, **speed, **stamp(), "numpy": np.__version__})
    write_table(chosen.out, results)


if __name__ == "__main__":
    main()
