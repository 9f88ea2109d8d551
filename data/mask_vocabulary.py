"""What masking needs to know of a vocabulary: which ids may be hidden, and which begin a word."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from potamos.data.errors import DataError

if TYPE_CHECKING:
    from potamos.data.tokenizer import Tokenizer


class MaskingError(DataError):
    """A masking rule, or the vocabulary or rows it is given, make no sense."""


@dataclass(frozen=True, eq=False)
class MaskVocabulary:
    """What masking needs to know of a vocabulary of V ids; make it once with `of_tokenizer`.

    Attributes:
        mask: the id of [MASK].
        maskable: (V,) bool, False for special ids.
        starts_word: (V,) bool, True where a token begins a word; None where the vocabulary does not tell.
        ordinary: (count,) int32, the maskable ids: what random replacements are drawn from.
    """

    mask: int
    maskable: np.ndarray
    starts_word: np.ndarray | None
    ordinary: np.ndarray

    @classmethod
    def of_pieces(cls, pieces: Sequence[bytes], special: Collection[int], mask: int) -> MaskVocabulary:
        """From the UTF-8 bytes of every id, the ids that are special, and the id of [MASK], one of them.

        Raises:
            MaskingError: [MASK] is not special or not in the vocabulary, or nothing else is.
        """
        if mask not in special or not 0 <= mask < len(pieces):
            raise MaskingError(f"the id {mask} of [MASK] is not among the special ids {sorted(special)[:20]}")
        maskable = maskable_ids(pieces, special)
        starts = np.array([_starts_word(piece) for piece in pieces])
        spaced = any(piece[:1].isspace() and len(piece) > 1 for piece in pieces)
        return cls(mask, maskable, starts if spaced else None, np.flatnonzero(maskable).astype(np.int32))

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer, mask: str = "[MASK]") -> MaskVocabulary:
        """From a tokenizer with a special token of this name.

        Raises:
            TokenizerError: the tokenizer has no such token.
        """
        return cls.of_pieces(tokenizer.pieces, tokenizer.special_ids, tokenizer.special(mask))


def maskable_ids(pieces: Sequence[bytes], special: Collection[int]) -> np.ndarray:
    """(V,) bool: the ids that may be hidden, those that stand for text. Holes in the numbering stand for none.

    Raises:
        MaskingError: there are none.
    """
    maskable = np.array([bool(piece) and i not in special for i, piece in enumerate(pieces)], bool)
    if not maskable.any():
        raise MaskingError(f"all {len(pieces)} ids of the vocabulary are special; nothing can be masked")
    return maskable


def _starts_word(piece: bytes) -> bool:
    """Whether a token begins a word: its first character is white space or a mark, neither letter, number nor accent.

    A first byte that is the rest of a character, or of a character whose end is in the next token, goes on the word.
    """
    if not piece:
        return False
    size = 1 + sum(piece[0] >= lead for lead in (0xC0, 0xE0, 0xF0))
    try:
        return unicodedata.category(piece[:size].decode("utf-8"))[0] not in "LNM"
    except UnicodeDecodeError:
        return False
