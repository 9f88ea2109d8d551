"""The tokenizer that the rest of the program sees, and what a library must offer to stand behind it."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from potamos.data.errors import TokenizerError
from potamos.data.tokenizer import text as mending

KINDS = ("gpt2", "json", "sentencepiece")
# What a run calls its own copy of each kind's file.
FILE_NAMES = {"gpt2": "tokenizer.tiktoken", "json": "tokenizer.json", "sentencepiece": "tokenizer.model"}
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Stream(Protocol):
    """Decodes ids one by one: what `StreamDecoder` offers, without special ids."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class Backend(Protocol):
    """What a tokenizer library must offer.

    Attributes:
        sha256: of the content that decides the ids of a text, whatever the layout of the file it came from.
        pieces: the bytes of each id, none for special ids.
        special: ids by name that no text gives (but for the unknown token, where there is one).
        ends: names of tokens that may close a document, the likeliest first.
        byte_level: whether the pieces of a text's ids join to exactly its bytes.
        cuts: before which characters a text may be cut without changing an id; None where nothing is known.
    """

    kind: str
    sha256: str
    pieces: list[bytes]
    special: Mapping[str, int]
    ends: Sequence[str]
    byte_level: bool
    cuts: re.Pattern[str] | None

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]: ...
    def find(self, name: str) -> int | None: ...  # the id of a token of this name, special or not
    def typed(self, name: str, index: int) -> bool: ...  # whether a text can give the id that `find` found
    def decode(self, ids: Sequence[int]) -> str: ...
    def stream(self) -> Stream: ...
    def save(self, path: Path) -> None: ...


class Tokenizer:
    """A loaded tokenizer; make one with `load_tokenizer` or `train_bpe`.

    Attributes:
        kind: ``gpt2``, ``json`` or ``sentencepiece``.
        vocabulary: number of ids, the highest id plus one, added special tokens included.
        end_of_document: the id that closes a document. `encode` never returns it.
        sha256: hexadecimal hash of what decides the ids of texts and the end of document. Special tokens that were
            added on loading change neither, so they do not change it.
        special_tokens: id by name of every special token; see `special`.
        special_ids: the ids among them.
        pieces: the UTF-8 bytes of each id of the vocabulary, none for special ids.
        exact_bytes: whether `token_bytes` sums to the UTF-8 length of every text (byte-level vocabularies).
        threads: how many threads `encode_batch` may use; None for one per core that this process may run on.
    """

    def __init__(
        self,
        backend: Backend,
        place: str,
        *,
        end_of_document: str | None = None,
        special_tokens: Sequence[str] = (),
        threads: int | None = None,
    ):
        if threads is not None and threads < 1:
            raise TokenizerError(f"threads {threads} must be at least 1, or None for the cores of this process")
        self._backend, self.threads = backend, threads
        self.kind = backend.kind
        self.exact_bytes = backend.byte_level
        self.special_tokens = dict(backend.special)
        _add_special(self.special_tokens, special_tokens, backend)
        end = self._find_end(place, end_of_document)
        self.end_of_document = self.special_tokens[end]
        self.sha256 = backend.sha256
        usual = self._usual_end()
        if usual is None or self.end_of_document != backend.find(usual):  # the usual one follows from the file
            chosen = f"{backend.sha256}\n{self.end_of_document} {end}"
            self.sha256 = hashlib.sha256(chosen.encode()).hexdigest()
        self.special_ids = frozenset(self.special_tokens.values())
        self.vocabulary = max(len(backend.pieces), 1 + max(self.special_ids))
        self.pieces = [b"" if i in self.special_ids else piece for i, piece in enumerate(backend.pieces)]
        self.pieces += [b""] * (self.vocabulary - len(self.pieces))

    def _usual_end(self) -> str | None:
        return next((name for name in self._backend.ends if self._backend.find(name) is not None), None)

    def _find_end(self, place: str, wanted: str | None) -> str:
        """Name of the token that closes documents, from then on among the special ones."""
        name = wanted if wanted is not None else self._usual_end()
        index = self._backend.find(name) if name is not None else None
        if name is not None and self.special_tokens.get(name, index) != index:
            return name  # one that was added above the vocabulary
        if name is None or index is None:
            names = (wanted,) if wanted is not None else self._backend.ends
            missing = f"none of the end-of-document tokens {', '.join(map(repr, names))}" if names else "no such token"
            raise TokenizerError(
                f"{place}: what closes a document? It has {missing}; name one as end_of_document, which may be one "
                f"that special_tokens adds"
            )
        if self._backend.typed(name, index):
            raise TokenizerError(
                f"{place}: {name!r} typed in a text becomes the end-of-document id; mark it special in the file, "
                f"or name another token as end_of_document"
            )
        self.special_tokens[name] = index
        return name

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, shape (tokens,), int32, no special ids added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, int32 arrays, by `threads` threads."""
        whole = [mending.replace_surrogates(text) for text in texts]
        threads = self.threads or usable_cores()
        cuts, limit = self._backend.cuts, mending.SLICE_CHARACTERS
        if cuts is None or all(len(text) <= limit for text in whole):
            return self._backend.encode_batch(whole, threads)
        parts = [list(mending.slices(text, limit, cuts)) for text in whole]
        encoded = iter(self._backend.encode_batch([part for of_text in parts for part in of_text], threads))
        return [np.concatenate([next(encoded) for _ in of_text]) for of_text in parts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; special ids and ids beyond the vocabulary give nothing, bytes that are no UTF-8 U+FFFD."""
        known = [int(i) for i in ids if 0 <= i < self.vocabulary and int(i) not in self.special_ids]
        return self._backend.decode(known)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder fed one id at a time that never gives half a character."""
        return StreamDecoder(self._backend.stream(), self.vocabulary, self.special_ids)

    def special(self, name: str) -> int:
        """The id of a special token.

        Raises:
            TokenizerError: there is none of that name; lists those that there are.
        """
        if name not in self.special_tokens:
            known = ", ".join(f"{n!r}" for n in sorted(self.special_tokens, key=self.special_tokens.__getitem__))
            raise TokenizerError(
                f"the {self.kind} tokenizer has no special token {name!r}; it has {known}; add it with special_tokens"
            )
        return self.special_tokens[name]

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, shape (vocabulary,), int32; 0 for special ids."""
        return np.fromiter((len(piece) for piece in self.pieces), np.int32, self.vocabulary)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the vocabulary to a file that `load_tokenizer` reads back with the same kind.

        The file is the one that was loaded, or its equal: added special tokens and a chosen end of document are not in
        it. Give `load_tokenizer` the same ``special_tokens`` and ``end_of_document`` again and every id, and the
        sha256, will be the same.
        """
        path = Path(path)
        self._backend.save(path)
        return path


class StreamDecoder:
    """Turns ids that arrive one by one into text; bytes of an unfinished character wait for the next id."""

    def __init__(self, stream: Stream, vocabulary: int, special_ids: frozenset[int]):
        self._stream, self._vocabulary, self._special_ids = stream, vocabulary, special_ids

    def push(self, token: int) -> str:
        """The text that became certain with this id, often empty."""
        if token in self._special_ids or not 0 <= token < self._vocabulary:
            return ""
        return self._stream.push(token)

    def flush(self) -> str:
        """The text of bytes still waiting, as U+FFFD where they are no whole character."""
        return self._stream.flush()


class ByteStream:
    """Decodes pieces that are exact bytes."""

    def __init__(self, pieces: list[bytes]):
        self._pieces = pieces
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._bytes.decode(self._pieces[token])

    def flush(self) -> str:
        return self._bytes.decode(b"", True)


def usable_cores() -> int:
    """Cores that this process may run on, which a batch system or a container often makes fewer than there are."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _add_special(known: dict[str, int], names: Sequence[str], backend: Backend) -> None:
    """Give each name that is no special token yet the next id above the vocabulary."""
    if isinstance(names, str):
        raise TokenizerError(f"special_tokens {names!r} must be a list of names, not one text")
    repeated = [name for name in names if list(names).count(name) > 1]
    if repeated or not all(names):
        raise TokenizerError(f"special_tokens {list(names)!r}: every name must be given, and once")
    upper = max(len(backend.pieces), 1 + max(known.values(), default=-1))
    for name in names:
        if name in known:
            continue
        index = backend.find(name)
        if index is not None and not backend.typed(name, index):
            known[name] = index  # a token of the file that no text gives, though not marked special there
        else:
            known[name], upper = upper, upper + 1
