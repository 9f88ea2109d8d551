"""Span corruption (T5, Raffel et al. 2020, section 3.1.4; UL2, Tay et al. 2022; Atlas, Izacard et al. 2022).

Spans of a row are hidden, each behind one sentinel in the input; the target is every sentinel followed by its span:

    row      the old mill by the river still turns
    input    the <0> by the river <1> turns
    target   <0> old mill <1> still

All rows of a batch are worked out together, and each is a pure function of its tokens and of `RowRandom`. Counts are
exact, so input and target have one length each for a given width: 512 tokens at density 0.15 and mean span 3 have
round(76.8) = 77 hidden tokens in round(77 / 3) = 26 spans, hence 512 - 77 + 26 = 461 and 77 + 26 = 103.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potamos.data.mask_vocabulary import MaskingError
from potamos.data.masking import check_rows
from potamos.data.randomness import RowRandom, distinct

ATTEMPTS = 16  # enough for spans of 3 at density 0.5 in documents of 60 tokens


@dataclass(frozen=True)
class SpanRule:
    """How spans are hidden.

    T5 and Atlas: density 0.15 and mean 3. UL2's denoisers: (0.15, 3), (0.15, 8), (0.5, 3), (0.5, 8), (0.15, 64) and
    (0.5, 64).

    Attributes:
        density: share of the tokens in spans; the count is round(density * tokens).
        mean_span: mean length of a span in tokens; the count of spans is round(hidden tokens / mean_span), at least 1.
        final_sentinel: close the target with one more sentinel, as the figures of the T5 paper do; Atlas does not.
        end_of_sequence: an id put behind input and target, as T5's own training does; Atlas does not.

    Raises:
        MaskingError: a number outside its range.
    """

    density: float = 0.15
    mean_span: float = 3.0
    final_sentinel: bool = False
    end_of_sequence: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise MaskingError(f"span density {self.density} must lie between 0 and 1, both excluded")
        if not 1 <= self.mean_span < float("inf"):
            raise MaskingError(f"mean_span {self.mean_span} must be a length of at least one token")

    def counts(self, valid: np.ndarray, maskable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (hidden tokens, spans) of rows with ``valid`` tokens, of which ``maskable`` may be hidden.

        The second only matters where it is too small for what the first asks: spans keep a token between them.
        """
        hidden = np.rint(self.density * np.asarray(valid)).astype(np.int64)
        spans = np.minimum(np.maximum(np.rint(hidden / self.mean_span).astype(np.int64), 1), hidden)
        spans = np.minimum(spans, (maskable + 1) // 2)
        return np.minimum(hidden, np.maximum(maskable - spans + 1, 0) * (spans > 0)), spans

    def spans(self, width: int) -> int:
        """Spans of a full row."""
        return int(self.counts(np.array(width), np.array(width))[1])

    def sentinels(self, width: int) -> int:
        """How many sentinels rows of this width need."""
        return self.spans(width) + self.final_sentinel

    def lengths(self, width: int) -> tuple[int, int]:
        """(input, target) tokens of rows of this width."""
        hidden, spans = (int(count) for count in self.counts(np.array(width), np.array(width)))
        end = self.end_of_sequence is not None
        return width - hidden + spans + end, hidden + spans + self.final_sentinel + end


@dataclass(frozen=True, eq=False)
class CorruptedRows:
    """Inputs (n, S) and targets (n, T); S and T are `SpanRule.lengths`. Padding has id 0 and document id -1.

    Attributes:
        inputs, input_document_ids: (n, S) int32. A sentinel belongs to the document of its span's first token.
        input_columns: (n, S) int64, the column in the row that each input token comes from (for a sentinel that of the
            span's first token), which gathers positions and the like; -1 for padding and the end of the sequence.
        targets, target_document_ids: (n, T) int32.
        crossed: (n,) int64, spans that reach over the end of a document, because no draw left room for all of them.
    """

    inputs: np.ndarray
    input_document_ids: np.ndarray
    input_columns: np.ndarray
    targets: np.ndarray
    target_document_ids: np.ndarray
    crossed: np.ndarray


def corrupt_spans(
    rule: SpanRule,
    tokens: np.ndarray,
    document_ids: np.ndarray,
    maskable: np.ndarray,
    sentinels: np.ndarray,
    random: RowRandom,
) -> CorruptedRows:
    """Hide spans of every row behind sentinels.

    The arrangement is drawn uniformly from all that have the rule's counts and a visible token between spans: lengths
    are a random composition of the hidden tokens, as T5's are, and spans fall into distinct places between the visible
    ones. (T5's own code makes every row begin with a visible and end with a hidden token; here both ends are free.)

    Special tokens stay visible. A span that would reach over one, or over a change of document, is moved to the nearer
    side where there is room; a row where that fails is drawn again, up to `ATTEMPTS` times in all. Only then, among
    documents shorter than the spans asked for, may a span reach over, with the special token left in the input behind
    its sentinel: the shapes stay what they are, and ``crossed`` counts it. (For the same reason a row of little but
    special tokens, of which too few can be hidden, loses what does not fit at the input's end.)

    Args:
        tokens: (n, L) integer ids below V.
        document_ids: (n, L) integers, -1 for padding.
        maskable: (V,) bool, the ids that may be hidden (`MaskVocabulary.maskable`, `maskable_ids`).
        sentinels: (count,) ids in the order of their use, at least ``rule.sentinels(L)``, none of them maskable.
        random: of the n rows.

    Raises:
        MaskingError: shapes differ, too few sentinels, or sentinels that text may hold too.
    """
    check_rows(tokens, document_ids, random)
    n, width = tokens.shape
    sentinels = _check_sentinels(np.asarray(sentinels, np.int32), rule.sentinels(width), width, maskable)
    valid = document_ids >= 0
    candidates = maskable.take(tokens) & valid
    seen = np.count_nonzero(valid, axis=1)
    hidden, spans = rule.counts(seen, np.count_nonzero(candidates, axis=1))
    result = _empty(n, *rule.lengths(width))
    for rows in _alike(seen, hidden, spans):
        line = _Line.of(candidates[rows], document_ids[rows])
        starts, lengths = _draw(line, int(hidden[rows][0]), int(spans[rows][0]), random.take(rows))
        result.crossed[rows] = line.crossing(starts, lengths).sum(axis=1)
        content = tokens[rows].astype(np.int32), document_ids[rows], valid[rows]
        _write(result, rows, rule, *content, line, starts, lengths, sentinels)
    return result


def _empty(n: int, inputs: int, targets: int) -> CorruptedRows:
    return CorruptedRows(
        inputs=np.zeros((n, inputs), np.int32),
        input_document_ids=np.full((n, inputs), -1, np.int32),
        input_columns=np.full((n, inputs), -1, np.int64),
        targets=np.zeros((n, targets), np.int32),
        target_document_ids=np.full((n, targets), -1, np.int32),
        crossed=np.zeros(n, np.int64),
    )


def _alike(*counts: np.ndarray) -> list[np.ndarray | slice]:
    """The rows in groups of equal counts: one group, unless padding or a lack of ordinary tokens sets some apart."""
    if not counts[0].size:
        return []
    if all((count == count[0]).all() for count in counts):
        return [slice(None)]
    _, group = np.unique(np.stack(counts), axis=1, return_inverse=True)
    return [np.flatnonzero(group.reshape(-1) == number) for number in range(group.max() + 1)]


def _check_sentinels(sentinels: np.ndarray, needed: int, width: int, maskable: np.ndarray) -> np.ndarray:
    if sentinels.ndim != 1 or len(sentinels) < needed:
        raise MaskingError(
            f"span corruption of rows of {width} tokens needs {needed} sentinels, given are {sentinels.size}; add "
            f"special tokens to the tokenizer, or ask for fewer or longer spans"
        )
    sentinels = sentinels[:needed]
    if len(np.unique(sentinels)) < len(sentinels) or maskable[sentinels[sentinels < len(maskable)]].any():
        raise MaskingError(f"sentinels {sentinels[:8]}... must be different ids that no text holds")
    return sentinels


@dataclass(frozen=True, eq=False)
class _Line:
    """The maskable tokens of all rows laid end to end: where spans are drawn.

    Attributes:
        place: their flat index in the rows.
        begin: (n + 1,) where each row begins on the line.
        walls: ascending places on the line, both its ends included, that no span may reach over: it may end before one
            or begin at one.
    """

    place: np.ndarray
    begin: np.ndarray
    walls: np.ndarray

    @classmethod
    def of(cls, maskable: np.ndarray, document_ids: np.ndarray) -> _Line:
        place = np.flatnonzero(maskable)
        begin = np.concatenate([[0], np.cumsum(np.count_nonzero(maskable, axis=1))])
        documents = document_ids.reshape(-1).take(place)
        wall = np.ones(len(place) + 1, bool)
        np.not_equal(place[1:], place[:-1] + 1, out=wall[1:-1])
        wall[1:-1] |= documents[1:] != documents[:-1]
        wall[begin] = True
        return cls(place, begin, np.flatnonzero(wall))

    @property
    def free(self) -> bool:
        """Whether there is no wall but the rows' own ends."""
        return len(self.walls) <= len(self.begin)

    def crossing(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Bool of the shape of ``starts``: the spans with a wall inside."""
        if self.free or not starts.size:
            return np.zeros(starts.shape, bool)
        return self.walls[np.searchsorted(self.walls, starts, "right")] < starts + lengths


def _draw(line: _Line, hidden: int, spans: int, random: RowRandom) -> tuple[np.ndarray, np.ndarray]:
    """(starts on the line, lengths), (n, spans) int64, ascending in every row."""
    starts, lengths = _place(line, np.arange(len(random)), hidden, spans, random, 0)
    failed = np.arange(len(random))
    for attempt in range(1, 1 if line.free else ATTEMPTS):
        failed = failed[line.crossing(starts[failed], lengths[failed]).any(axis=1)]
        if not len(failed):
            break
        starts[failed], lengths[failed] = _place(line, failed, hidden, spans, random.take(failed), attempt)
    return starts, lengths


def _place(
    line: _Line, rows: np.ndarray, hidden: int, spans: int, random: RowRandom, attempt: int
) -> tuple[np.ndarray, np.ndarray]:
    """One draw for some rows of the line, with spans moved off the walls where there is room."""
    begin, end = line.begin[rows], line.begin[rows + 1]
    if spans == 0:
        return np.zeros((len(rows), 0), np.int64), np.zeros((len(rows), 0), np.int64)
    # Cut the hidden tokens at spans - 1 of their hidden - 1 seams: every composition is as likely as every other.
    cuts = distinct(random, f"lengths {attempt}", np.full(len(rows), hidden - 1), spans - 1) + 1
    edges = np.zeros((len(rows), spans + 1), np.int64)
    edges[:, 1:-1], edges[:, -1] = cuts, hidden
    lengths = np.diff(edges, axis=1)
    # The visible tokens leave one more place than they are for spans to fall into, at most one span in each.
    starts = distinct(random, f"gaps {attempt}", end - begin - hidden + 1, spans) + edges[:, :-1] + begin[:, None]
    if not line.free:
        for parity in (0, 1):  # neighbors do not move at once, so none takes the room that another has just taken
            _move(line, starts, lengths, parity)
    return starts, lengths


def _move(line: _Line, starts: np.ndarray, lengths: np.ndarray, parity: int) -> None:
    """Move each even (or odd) span that has walls inside: to end before the first, or to begin at the last of them."""
    row, number = np.nonzero(line.crossing(starts, lengths))
    row, number = row[number % 2 == parity], number[number % 2 == parity]
    if not len(row):
        return
    walls, final, never = line.walls, starts.shape[1] - 1, np.iinfo(np.int64).max
    start, length = starts[row, number], lengths[row, number]
    stop = start + length
    first, last = np.searchsorted(walls, start, "right"), np.searchsorted(walls, stop, "left") - 1
    # A visible token stays between a span and its neighbors, as before.
    lower = np.where(number > 0, (starts + lengths)[row, number - 1] + 1, 0)
    upper = np.where(number < final, starts[row, np.minimum(number + 1, final)] - 1, never)
    left = np.where(walls[first] - length >= np.maximum(walls[first - 1], lower), stop - walls[first], never)
    right = np.where(walls[last] + length <= np.minimum(walls[last + 1], upper), walls[last] - start, never)
    possible = np.minimum(left, right) < never
    moved = start + np.where(left <= right, -left, right)
    starts[row[possible], number[possible]] = moved[possible]


def _write(
    result: CorruptedRows,
    rows: np.ndarray | slice,
    rule: SpanRule,
    tokens: np.ndarray,
    document_ids: np.ndarray,
    valid: np.ndarray,
    line: _Line,
    starts: np.ndarray,
    lengths: np.ndarray,
    sentinels: np.ndarray,
) -> None:
    """Inputs and targets of rows with equal counts, from spans on the line."""
    (n, width), spans = tokens.shape, starts.shape[1]
    heads, marks = line.place.take(starts), sentinels[:spans]
    documents = document_ids.reshape(-1)

    # Where each token of the target comes from: a span's tokens in order, and before them its first one, for the mark.
    parts = lengths + 1
    before = np.cumsum(parts, axis=1) - parts
    source = np.repeat((starts - before - 1).reshape(-1), parts.reshape(-1)).reshape(n, -1)
    source += np.arange(source.shape[1])
    place = before + (np.arange(n) * source.shape[1])[:, None]
    source.reshape(-1)[place] = starts
    source = line.place.take(source)
    targets, target_documents = tokens.reshape(-1).take(source), documents.take(source)
    targets.reshape(-1)[place] = marks

    visible = valid.copy()
    visible.reshape(-1)[source] = False
    visible.reshape(-1)[heads] = True
    tokens.reshape(-1)[heads] = marks
    source = np.flatnonzero(visible).reshape(n, -1)
    inputs, input_documents = tokens.reshape(-1).take(source), documents.take(source)

    last = document_ids.max(axis=1, initial=-1)[:, None]  # ids only rise along a row, or are padding
    ending = [] if rule.end_of_sequence is None else [rule.end_of_sequence]
    closing = [sentinels[spans], *ending] if rule.final_sentinel else ending
    for out, out_documents, ids, ids_documents, extra in (
        (result.inputs, result.input_document_ids, inputs, input_documents, ending),
        (result.targets, result.target_document_ids, targets, target_documents, closing),
    ):
        length = min(ids.shape[1], out.shape[1] - len(extra))
        end = length + len(extra)
        out[rows, :length], out_documents[rows, :length] = ids[:, :length], ids_documents[:, :length]
        out[rows, length:end], out_documents[rows, length:end] = extra, last
    length = min(source.shape[1], result.inputs.shape[1] - len(ending))
    result.input_columns[rows, :length] = source[:, :length] - (np.arange(n) * width)[:, None]
