"""SentencePiece models (Kudo and Richardson 2018), unigram or byte-pair, run by ``sentencepiece``."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.errors import TokenizerError
from potamos.files import write_atomically

_SPACE = "\u2581"  # how a model spells a space
_BEFORE_WORD = re.compile(r" (?=\S)")


class SentencePieceBackend:
    """A ``.model`` file. Only its control symbols, which no text gives, can close documents.

    A model normalises text (by default NFKC, runs of white space, a space in front), so pieces are not exactly the
    bytes of the text. The unknown token stands for lost text: it counts as special and gives nothing back.
    """

    kind = "sentencepiece"
    byte_level = False
    ends: Sequence[str]
    special: Mapping[str, int]
    cuts: re.Pattern[str] | None

    def __init__(self, content: bytes, place: str):
        import sentencepiece

        model: Any = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(content)
            size: int = model.get_piece_size()
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{place} is not a readable SentencePiece model: {error}") from None
        if size == 0:
            raise TokenizerError(f"{place} is not a readable SentencePiece model: it has no pieces")
        self._model, self._content = model, content
        self.sha256 = hashlib.sha256(b"sentencepiece\n" + content).hexdigest()
        names = [model.id_to_piece(i) for i in range(size)]
        self._ids = {name: i for i, name in enumerate(names)}
        self.special = {n: i for i, n in enumerate(names) if model.is_control(i) or model.is_unknown(i)}
        self.ends = (names[model.eos_id()],) if model.eos_id() >= 0 else ()
        self.pieces = [self._bytes_of(i, name) for i, name in enumerate(names)]
        self.cuts = _BEFORE_WORD if self._words_stand_alone(names) else None

    def _bytes_of(self, index: int, name: str) -> bytes:
        model = self._model
        if model.is_control(index) or model.is_unknown(index) or model.is_unused(index):
            return b""
        return bytes([int(name[3:5], 16)]) if model.is_byte(index) else name.replace(_SPACE, " ").encode()

    def _words_stand_alone(self, names: list[str]) -> bool:
        """Whether each word of a text is encoded for itself, its space in front of it, wherever the text is cut.

        So it is where no piece reaches over a space (nor can the unknown one, a space being known) and the model drops
        spaces at both ends of a text but puts one in front.
        """
        known = [name for name, piece in zip(names, self.pieces, strict=True) if piece]
        spans = any(_SPACE in name[1:] or any(c.isspace() for c in name) for name in known)
        word = self._encode("x").tolist()
        alike = {" x": word, "  x": word, "x ": word, "x x": word + word}
        return _SPACE in known and not spans and all(self._encode(text).tolist() == ids for text, ids in alike.items())

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text, out_type=int), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        if threads == 1 or len(texts) < 2:
            return [self._encode(text) for text in texts]
        rows = self._model.encode(list(texts), out_type=int, num_threads=min(threads, len(texts)))
        return [np.array(row, dtype=np.int32) for row in rows]

    def find(self, name: str) -> int | None:
        return self._ids.get(name)

    def typed(self, name: str, index: int) -> bool:
        return not self._model.is_control(index)  # user-defined symbols are looked for in every text

    def decode(self, ids: Sequence[int]) -> str:
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self) -> _Stream:
        return _Stream(self.pieces, *self._dropped_spaces())

    def _dropped_spaces(self) -> tuple[bool, bool]:
        """Whether decoding drops the space that a text's first piece begins with, and further ones after it."""
        begins = [i for i, piece in enumerate(self.pieces) if piece.startswith(b" ") and len(piece) > 1]
        first = bool(begins) and not self._model.decode(begins[:1]).startswith(" ")
        alone = self._ids.get(_SPACE)
        return first, first and alone is not None and not self._model.decode([alone, *begins[:1]]).startswith(" ")

    def save(self, path: Path) -> None:
        write_atomically(path, self._content)


class _Stream:
    """Decodes ids one by one; byte pieces wait until they are a whole character."""

    def __init__(self, pieces: list[bytes], drop_first: bool, drop_all: bool):
        self._pieces, self._drop_first, self._drop_all = pieces, drop_first, drop_all
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        piece = self._pieces[token]
        if self._drop_first and piece:
            kept = piece.removeprefix(b" ")
            self._drop_first = self._drop_all and kept == b""
            piece = kept
        return self._bytes.decode(piece)

    def flush(self) -> str:
        return self._bytes.decode(b"", True)
