"""Masked language modeling: which tokens are hidden, what stands in their place, and rows without the hidden ones.

Everything is a pure function of the rows and of `RowRandom`: no state, no order of calls. Every array is (n, L), L any
width (`Rows` hold L + 1 columns). A column takes part where its document id is not -1 (padding); special ids, the end
of a document among them, are never hidden and never put in. For rows of a stream:

    mask(rule, rows.tokens, rows.document_ids, vocabulary, RowRandom(seed, "mlm", rows.samples))

    select      which tokens a `MaskRule` hides: single tokens, whole words or n-grams; at a rate or an exact count
    mask        the rows with replacements, and labels                                          (BERT, RoBERTa, DeBERTa)
    mask_late   the rows without their [MASK] positions, in constant shapes                     ("Mask Later")
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from potamos.data.mask_vocabulary import MaskingError, MaskVocabulary
from potamos.data.randomness import RowRandom, below, happens, leading, smallest, sort_keys

UNITS = ("tokens", "words", "ngrams")
# Shares of n-grams of 1, 2, 3 words: proportional to 1 / n (DeBERTa, He et al. 2021).
DEBERTA_NGRAMS = (6 / 11, 3 / 11, 2 / 11)
# Geometric with p = 0.2, cut at 10 words, mean 3.8 (SpanBERT, Joshi et al. 2020, section 3.1).
SPANBERT_NGRAMS = tuple(0.2 * 0.8**n / (1 - 0.8**10) for n in range(10))


@dataclass(frozen=True)
class MaskRule:
    """How tokens are hidden.

    Attributes:
        rate: share of the tokens to hide: 0.15 (BERT, Devlin et al. 2019), 0.5 ("Mask More and Mask Later", Liao et
            al. 2022).
        units: what is hidden together: ``tokens``; ``words`` (whole-word masking); ``ngrams`` of consecutive words.
        exact: hide exactly round(rate * valid) tokens of each row, so that full rows have a constant count; else every
            unit is hidden or not on its own, with probability ``rate``. Units are then taken in random order and the
            last one is cut where the count is reached.
        replacement: shares of hidden tokens that become [MASK], become a random ordinary token, and stay as they are;
            they sum to 1. With ``exact`` they too are counts, each to within one.
        ngrams: share of n-grams of 1, 2, ... words; they sum to 1.

    Raises:
        MaskingError: a number outside its range, an unknown unit.
    """

    rate: float = 0.15
    units: str = "tokens"
    exact: bool = False
    replacement: tuple[float, float, float] = (0.8, 0.1, 0.1)
    ngrams: tuple[float, ...] = DEBERTA_NGRAMS

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise MaskingError(f"masking rate {self.rate} is no share of the tokens; give a number from 0 to 1")
        if self.units not in UNITS:
            raise MaskingError(f"masking units {self.units!r} are unknown; known units: {', '.join(UNITS)}")
        if len(self.replacement) != 3:
            raise MaskingError(f"replacement {self.replacement} must hold three shares: mask, random, keep")
        for name, shares in (("replacement", self.replacement), ("ngrams", self.ngrams)):
            if not shares or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
                raise MaskingError(f"{name} {shares} must be shares that sum to 1")

    def hidden(self, valid: np.ndarray) -> np.ndarray:
        """int64: the exact count of hidden tokens in rows of ``valid`` tokens (half a token rounds to even)."""
        return np.rint(self.rate * np.asarray(valid)).astype(np.int64)

    def removed(self, valid: np.ndarray) -> np.ndarray:
        """int64: how many of the hidden tokens become [MASK] when counts are exact."""
        return np.rint(self.replacement[0] * self.hidden(valid)).astype(np.int64)

    def late_lengths(self, width: int) -> tuple[int, int]:
        """(kept, removed) columns of `mask_late` for rows of this width."""
        removed = int(self.removed(np.array(width)))
        return width - removed, removed


@dataclass(frozen=True, eq=False)
class MaskedRows:
    """Rows with replacements.

    Attributes:
        tokens: (n, L) int32.
        labels: (n, L) int32, the true token where it is to be predicted, -1 elsewhere. ``labels >= 0`` is what was
            hidden, replaced by [MASK], by a random token, or by itself.
    """

    tokens: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class LateMaskedRows:
    """Rows in two parts: S kept columns, the encoder's input, and K removed ones, appended at a later layer.

    S and K are `MaskRule.late_lengths` for every row; each column of a row is in exactly one part, in ascending order.
    Padding is spread over both: document id -1, label -1.

    Attributes:
        kept_ids: (n, S) int32, replaced at random or by themselves where hidden but not removed.
        kept_columns: (n, S) int64, their columns in the row.
        kept_positions, kept_document_ids, kept_labels: (n, S) int32, the row's at these columns.
        masked_columns: (n, K) int64, the columns of [MASK].
        masked_positions, masked_document_ids, masked_labels: (n, K) int32. The label is -1 for padding, and for a
            special token that had to go because a row held fewer ordinary tokens than K.
    """

    kept_ids: np.ndarray
    kept_columns: np.ndarray
    kept_positions: np.ndarray
    kept_document_ids: np.ndarray
    kept_labels: np.ndarray
    masked_columns: np.ndarray
    masked_positions: np.ndarray
    masked_document_ids: np.ndarray
    masked_labels: np.ndarray


def select(
    rule: MaskRule, tokens: np.ndarray, document_ids: np.ndarray, vocabulary: MaskVocabulary, random: RowRandom
) -> np.ndarray:
    """(n, L) bool: the tokens that the rule hides.

    Args:
        tokens: (n, L) integer ids below V.
        document_ids: (n, L) integers, -1 for padding; a word or n-gram never reaches over a change.
        random: of the n rows.

    Raises:
        MaskingError: shapes differ, or the rule needs words and the vocabulary does not tell where they begin.
    """
    check_rows(tokens, document_ids, random)
    if rule.units == "tokens" and not rule.exact:
        hidden = np.zeros(tokens.shape, bool)
        hidden.reshape(-1)[_bernoulli(rule.rate, tokens, document_ids, vocabulary, random)] = True
        return hidden
    maskable = _maskable(tokens, document_ids, vocabulary)
    if rule.exact:
        return _exact(rule, tokens, document_ids, maskable, vocabulary, random) & maskable
    first, lengths = _units(rule, tokens, document_ids, maskable, vocabulary, random)
    hidden = happens(random.halves("select", tokens.shape[1]).reshape(-1)[first], rule.rate)
    return np.repeat(hidden, lengths).reshape(tokens.shape) & maskable


def mask(
    rule: MaskRule, tokens: np.ndarray, document_ids: np.ndarray, vocabulary: MaskVocabulary, random: RowRandom
) -> MaskedRows:
    """Hide tokens and replace them. Arguments and errors as for `select`."""
    if rule.exact:
        inputs, labels, _ = _mask_exactly(rule, tokens, document_ids, vocabulary, random)
        return MaskedRows(inputs, labels)
    if rule.units == "tokens":
        check_rows(tokens, document_ids, random)
        place = _bernoulli(rule.rate, tokens, document_ids, vocabulary, random)
    else:
        place = np.flatnonzero(select(rule, tokens, document_ids, vocabulary, random))
    flat, width = tokens.reshape(-1), tokens.shape[1]
    hidden, row = flat.take(place), place // width
    words = random.at("replace", row, place - row * width)
    # One word an item: its high half says what becomes of the token, its low half which random one it would be.
    action = (words >> np.uint64(32)).astype(np.uint32)
    masked = happens(action, rule.replacement[0])
    new = np.where(masked, np.int32(vocabulary.mask), hidden)
    swap = np.flatnonzero(happens(action, min(sum(rule.replacement[:2]), 1.0)) & ~masked)
    new[swap] = _random_ids(words[swap], vocabulary)
    inputs, labels = flat.astype(np.int32), np.full(flat.size, -1, np.int32)
    inputs[place], labels[place] = new, hidden
    return MaskedRows(inputs.reshape(tokens.shape), labels.reshape(tokens.shape))


def mask_late(
    rule: MaskRule,
    tokens: np.ndarray,
    document_ids: np.ndarray,
    positions: np.ndarray,
    vocabulary: MaskVocabulary,
    random: RowRandom,
) -> LateMaskedRows:
    """Hide tokens and take the [MASK] positions out of the row ("Mask More and Mask Later", Liao et al. 2022).

    Only [MASK] positions go; tokens replaced at random or by themselves stay in the input, labeled.

    Args:
        positions: (n, L) integers, gathered like the rest.

    Raises:
        MaskingError: as for `select`; or the rule's count is not exact, so that rows would differ in length.
    """
    if not rule.exact:
        raise MaskingError("masking late needs a constant count per row; set exact: true in the masking rule")
    inputs, labels, removed = _mask_exactly(rule, tokens, document_ids, vocabulary, random)
    n, width = tokens.shape
    kept, gone = rule.late_lengths(width)
    short = gone - np.count_nonzero(removed, axis=1)
    if short.any():  # rows with padding: so much of it goes with the masked part that all rows are equally long
        padding = document_ids < 0
        removed = removed | (padding & (np.cumsum(padding, axis=1) <= short[:, None]))
    at, out = np.flatnonzero(~removed).reshape(n, kept), np.flatnonzero(removed).reshape(n, gone)
    begin = (np.arange(n) * width)[:, None]
    return LateMaskedRows(
        kept_ids=inputs.take(at),
        kept_columns=at - begin,
        kept_positions=positions.take(at),
        kept_document_ids=document_ids.take(at),
        kept_labels=labels.take(at),
        masked_columns=out - begin,
        masked_positions=positions.take(out),
        masked_document_ids=document_ids.take(out),
        masked_labels=labels.take(out),
    )


def _mask_exactly(
    rule: MaskRule, tokens: np.ndarray, document_ids: np.ndarray, vocabulary: MaskVocabulary, random: RowRandom
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inputs, labels, which became [MASK]), with exact counts of each kind of replacement in every row."""
    check_rows(tokens, document_ids, random)
    maskable = _maskable(tokens, document_ids, vocabulary)
    hidden = _exact(rule, tokens, document_ids, maskable, vocabulary, random)
    count = rule.hidden(np.count_nonzero(document_ids >= 0, axis=1))
    masks = np.rint(rule.replacement[0] * count).astype(np.int64)
    changes = np.rint(min(sum(rule.replacement[:2]), 1.0) * count).astype(np.int64)
    words = random.words("replace", tokens.shape[1])
    # Special tokens are hidden only in rows with too few others, and last: they are the first to be left as they are.
    labeled = hidden & maskable
    rank = np.uint8(2) - hidden - labeled
    keys = sort_keys(words, rank)
    removed = leading(keys, masks)
    swapped = leading(keys, changes) & ~removed & maskable
    inputs = np.where(removed & maskable, np.int32(vocabulary.mask), tokens).astype(np.int32, copy=False)
    place = np.flatnonzero(swapped)
    inputs.reshape(-1)[place] = _random_ids(words.reshape(-1).take(place), vocabulary)
    return inputs, np.where(labeled, tokens, -1).astype(np.int32, copy=False), removed


def check_rows(tokens: np.ndarray, document_ids: np.ndarray, random: RowRandom) -> None:
    """Raise MaskingError unless the arrays are (n, L) and the random numbers are of n rows."""
    if tokens.ndim != 2 or tokens.shape != document_ids.shape or len(random) != len(tokens):
        raise MaskingError(
            f"tokens {tokens.shape}, document ids {document_ids.shape} and random numbers of {len(random)} rows do not "
            f"fit; all need the same rows, and the first two the same width"
        )


def _maskable(tokens: np.ndarray, document_ids: np.ndarray, vocabulary: MaskVocabulary) -> np.ndarray:
    return vocabulary.maskable.take(tokens) & (document_ids >= 0)


def _random_ids(words: np.ndarray, vocabulary: MaskVocabulary) -> np.ndarray:
    """Ordinary ids from the low halves of words."""
    return vocabulary.ordinary[below(words & np.uint64(0xFFFFFFFF), len(vocabulary.ordinary))]


def _bernoulli(
    rate: float, tokens: np.ndarray, document_ids: np.ndarray, vocabulary: MaskVocabulary, random: RowRandom
) -> np.ndarray:
    """The flat indices of hidden tokens."""
    place = np.flatnonzero(happens(random.halves("select", tokens.shape[1]), rate))
    possible = vocabulary.maskable.take(tokens.reshape(-1).take(place))  # the table is read for these few alone
    possible &= document_ids.reshape(-1).take(place) >= 0
    return place[possible]


def _exact(
    rule: MaskRule,
    tokens: np.ndarray,
    document_ids: np.ndarray,
    maskable: np.ndarray,
    vocabulary: MaskVocabulary,
    random: RowRandom,
) -> np.ndarray:
    """The exact count of every row: all ordinary tokens before any special one, no padding."""
    words = random.words("select", tokens.shape[1])
    if rule.units != "tokens":
        first, lengths = _units(rule, tokens, document_ids, maskable, vocabulary, random)
        words = np.repeat(words.reshape(-1)[first], lengths).reshape(tokens.shape)
    valid = document_ids >= 0
    rank = None if maskable.all() else np.uint8(2) - valid - maskable
    return smallest(words, rule.hidden(np.count_nonzero(valid, axis=1)), rank)


def _units(
    rule: MaskRule,
    tokens: np.ndarray,
    document_ids: np.ndarray,
    maskable: np.ndarray,
    vocabulary: MaskVocabulary,
    random: RowRandom,
) -> tuple[np.ndarray, np.ndarray]:
    """(flat index of the first token, length) of every unit, in order; together they cover all rows.

    A token that cannot be hidden is a unit of its own. N-grams are laid end to end over a row's words, their lengths
    drawn one after the other, and cut where a document ends: hiding each of them or not, independently, hides every
    token at the rule's rate.
    """
    if vocabulary.starts_word is None:
        raise MaskingError(
            f"masking units {rule.units!r}: no token of the vocabulary begins with a space, so words cannot be told "
            f"apart; use units: tokens, or a byte-level or SentencePiece vocabulary"
        )
    fresh = np.ones(tokens.shape, bool)
    fresh[:, 1:] = ~(maskable[:, 1:] & maskable[:, :-1]) | (document_ids[:, 1:] != document_ids[:, :-1])
    starts = fresh | vocabulary.starts_word.take(tokens)
    first = np.flatnonzero(starts)
    if rule.units == "ngrams":
        first = first[fresh.reshape(-1)[first] | _ngram_starts(rule, np.count_nonzero(starts, axis=1), random)]
    return first, np.diff(first, append=tokens.size)


def _ngram_starts(rule: MaskRule, words: np.ndarray, random: RowRandom) -> np.ndarray:
    """bool, one for each word of every row in order: True where a drawn n-gram begins. words: (n,) counts."""
    most = int(words.max(initial=0))
    drawn = random.halves("ngrams", most)
    lengths = np.ones(drawn.shape, np.int64)
    for share in np.cumsum(rule.ngrams)[:-1]:
        lengths += ~happens(drawn, min(share, 1.0))
    begins = np.zeros((len(words), most), bool)
    ordinal = np.cumsum(lengths, axis=1) - lengths
    row, number = np.nonzero(ordinal < words[:, None])
    begins[row, ordinal[row, number]] = True
    return begins[np.arange(most) < words[:, None]]
