"""Span corruption one row at a time, as most collators do it: the oracle of the tests and the pace to beat.

`corrupt_row` follows the same law with the same random words as `potamos.data.spans`, in plain loops over one row's
spans; it is handed the words, so that a timing of it holds no drawing. `draw_row` and `join_row` are the quickest way
found to draw and to write one row in NumPy, without regard for documents, special tokens and padding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from potamos.data.spans import ATTEMPTS, SpanRule

Words = Callable[[str, int], np.ndarray]  # (stream, count) -> uint64 words of this row


def choose(words: Words, stream: str, items: int, count: int) -> list[int]:
    """The first ``count`` different ones among draws from 0..items-1, in order of size."""
    found: set[int] = set()
    drawn = 0
    while len(found) < count:
        word = int(words(stream, drawn // 2 + 1)[drawn // 2])
        found.add((word >> 32 if drawn % 2 else word % 2**32) * items >> 32)
        drawn += 1
    return sorted(found)


def count_spans(rule: SpanRule, valid: int, maskable: int) -> tuple[int, int]:
    """(hidden tokens, spans)."""
    hidden = round(rule.density * valid)
    spans = min(max(round(hidden / rule.mean_span), 1), hidden, (maskable + 1) // 2)
    return (min(hidden, maskable - spans + 1), spans) if spans else (0, 0)


def draw(words: Words, attempt: int, count: int, hidden: int, spans: int) -> list[list[int]]:
    """[start, length] of each span on a line of ``count`` tokens, wherever the walls are."""
    cuts = choose(words, f"lengths {attempt}", hidden - 1, spans - 1)
    edges = [0, *(cut + 1 for cut in cuts), hidden]
    gaps = choose(words, f"gaps {attempt}", count - hidden + 1, spans)
    return [[gap + edge, after - edge] for gap, edge, after in zip(gaps, edges, edges[1:], strict=False)]


def make_way(placed: list[list[int]], walls: list[int]) -> bool:
    """Move spans off the walls, even ones before odd ones; whether all could be."""
    for parity in (0, 1):
        crossing = [[w for w in walls if start < w < start + length] for start, length in placed]
        for number in range(parity, len(placed), 2):
            inside = crossing[number]
            if not inside:
                continue
            start, length = placed[number]
            lower = max(w for w in walls if w <= start)
            upper = min(w for w in walls if w >= start + length)
            if number > 0:
                lower = max(lower, sum(placed[number - 1]) + 1)
            if number + 1 < len(placed):
                upper = min(upper, placed[number + 1][0] - 1)
            moves = []
            if inside[0] - length >= lower:
                moves.append((start + length - inside[0], inside[0] - length))
            if inside[-1] + length <= upper:
                moves.append((inside[-1] - start, inside[-1]))
            if moves:
                placed[number][0] = min(moves, key=lambda move: move[0])[1]
    return not any(start < w < start + length for start, length in placed for w in walls)


def corrupt_row(
    rule: SpanRule,
    tokens: np.ndarray,
    document_ids: np.ndarray,
    maskable: np.ndarray,
    sentinels: np.ndarray,
    words: Words,
) -> tuple[list[int], list[int], list[int], list[int], list[int], int]:
    """(inputs, their documents, their columns, targets, their documents, spans that cross) of one row, unpadded."""
    line = np.flatnonzero(maskable[tokens] & (document_ids >= 0))
    hidden, spans = count_spans(rule, int((document_ids >= 0).sum()), len(line))
    places = document_ids[line]
    walls = [i for i in range(1, len(line)) if line[i] - line[i - 1] > 1 or places[i] != places[i - 1]]
    placed: list[list[int]] = []
    for attempt in range(ATTEMPTS if spans else 0):
        placed = draw(words, attempt, len(line), hidden, spans)
        if not walls or make_way(placed, [0, *walls, len(line)]):
            break
    inputs: list[int] = []
    targets: list[int] = []
    columns: list[int] = []
    sources: list[int] = []
    heads = {int(line[start]): number for number, (start, _) in enumerate(placed)}
    gone = {int(line[start + i]) for start, length in placed for i in range(length)}
    for column in range(len(tokens)):
        if column in heads or (column not in gone and document_ids[column] >= 0):
            inputs.append(int(sentinels[heads[column]]) if column in heads else int(tokens[column]))
            columns.append(column)
    for number, (start, length) in enumerate(placed):
        targets.append(int(sentinels[number]))
        targets += tokens[line[start : start + length]].tolist()
        sources += [int(line[start]), *line[start : start + length].tolist()]
    documents, target_documents = document_ids[columns].tolist(), document_ids[sources].tolist()
    last = int(document_ids.max())
    closing = [int(sentinels[spans])] if rule.final_sentinel else []
    ending = [rule.end_of_sequence] if rule.end_of_sequence is not None else []
    room = rule.lengths(len(tokens))[0] - len(ending)
    inputs, documents, columns = inputs[:room], documents[:room], columns[:room]
    crossed = sum(any(start < w < start + length for w in walls) for start, length in placed)
    return (
        inputs + ending,
        documents + [last] * len(ending),
        columns + [-1] * len(ending),
        targets + closing + ending,
        target_documents + [last] * len(closing + ending),
        crossed,
    )


def draw_row(random: np.random.Generator, width: int, hidden: int, spans: int) -> tuple[np.ndarray, np.ndarray]:
    """(first tokens, lengths) of the spans of one row."""
    cuts = np.sort(random.choice(hidden - 1, spans - 1, replace=False)) + 1
    lengths = np.diff(cuts, prepend=0, append=hidden)
    return np.sort(random.choice(width - hidden + 1, spans, replace=False)) + np.cumsum(lengths) - lengths, lengths


def join_row(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, sentinels: np.ndarray) -> list[np.ndarray]:
    """[input, target] of one row whose spans are given by their first tokens and lengths."""
    spans = len(starts)
    hidden = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    marked = tokens.copy()
    marked[starts] = sentinels[:spans]
    visible = np.ones(len(tokens), bool)
    visible[hidden] = False
    visible[starts] = True
    place = np.cumsum(lengths + 1) - lengths - 1
    target = np.empty(len(hidden) + spans, tokens.dtype)
    inner = np.ones(len(target), bool)
    inner[place] = False
    target[inner], target[place] = tokens[hidden], sentinels[:spans]
    return [marked[visible], target]
