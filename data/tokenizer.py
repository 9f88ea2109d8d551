"""Tokenizers behind one small interface: text to ids, ids to text, and how many UTF-8 bytes each id stands for.

Two kinds: ``json``, any Hugging Face ``tokenizer.json``; ``gpt2``, GPT-2's byte-pair vocabulary (Radford et al. 2019)
from a folder with ``encoder.json`` and ``vocab.bpe`` or from a ``.tiktoken`` file. Special tokens are never recognised
in text: a document that quotes ``<|endoftext|>`` is encoded letter by letter.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from potamos.data.errors import TokenizerError
from potamos.data.files import write_atomically

SPECIAL_TOKENS = ("<|endoftext|>", "[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]")
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
# GPT-2's pre-tokenisation, with possessive quantifiers so that long runs of one class do not backtrack.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
SLICE_CHARACTERS = 4_000_000

_SURROGATE = re.compile("[\ud800-\udfff]")
# A lone white-space character between two others always begins a pre-token of GPT-2's pattern, so a text may be cut in
# front of it without changing any id. Not so in other patterns, which join a line's end to the mark before it. (Only
# what Unicode calls white space: for Python U+001C to U+001F are too, for the patterns' engines they are marks.)
_SAFE_CUT = re.compile(r"(?<=\S)[ \t\n\r](?=\S)")


def replace_surrogates(text: str) -> str:
    """Replace each lone surrogate, which has no UTF-8 form, by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def byte_to_character() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where printable in Latin-1, else the next of U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(spare)) for byte in range(256)}


class _Backend(Protocol):
    """What a tokenizer library must offer.

    ``pieces`` are the bytes of each id; ``separable`` says that a text cut as `_slices` does gives the same ids.
    """

    kind: str
    sha256: str
    end_of_document: int
    special_ids: frozenset[int]
    pieces: list[bytes]
    byte_level: bool
    separable: bool

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def stream(self) -> Iterator[str] | Any: ...
    def save(self, path: Path) -> None: ...


class Tokenizer:
    """A loaded tokenizer; make one with `load_tokenizer` or `train_bpe`.

    Attributes:
        kind: ``json`` or ``gpt2``.
        vocabulary: number of ids, the highest id plus one.
        end_of_document: the id that closes a document. `encode` never returns it.
        sha256: hexadecimal hash of the content that decides the ids, whatever the layout of the file it came from.
        exact_bytes: whether `token_bytes` sums to the UTF-8 length of every text (byte-level vocabularies).
    """

    def __init__(self, backend: _Backend):
        self._backend = backend
        self.kind = backend.kind
        self.sha256 = backend.sha256
        self.end_of_document = backend.end_of_document
        self.vocabulary = len(backend.pieces)
        self.exact_bytes = backend.byte_level
        self.special_ids = backend.special_ids

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, shape (tokens,), int32, no special ids added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, int32 arrays; the libraries may use several threads."""
        slices, counts = [], []
        for text in texts:
            parts = list(_slices(replace_surrogates(text), SLICE_CHARACTERS if self._backend.separable else None))
            slices += parts
            counts.append(len(parts))
        encoded = iter(self._backend.encode_batch(slices))
        return [np.concatenate([next(encoded) for _ in range(count)]) for count in counts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; special ids give nothing, bytes that are no UTF-8 give U+FFFD."""
        return self._backend.decode([int(i) for i in ids])

    def stream_decoder(self) -> StreamDecoder:
        """A decoder fed one id at a time that never gives half a character."""
        return StreamDecoder(self._backend)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, shape (vocabulary,), int32; 0 for special ids."""
        return np.fromiter((len(piece) for piece in self._backend.pieces), np.int32, self.vocabulary)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the tokenizer to a file that `load_tokenizer` reads back with the same kind and sha256."""
        path = Path(path)
        self._backend.save(path)
        return path


class StreamDecoder:
    """Turns ids that arrive one by one into text; bytes of an unfinished character wait for the next id."""

    def __init__(self, backend: _Backend):
        self._special = backend.special_ids
        self._pieces = backend.pieces
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if backend.byte_level else None
        self._stream = None if backend.byte_level else backend.stream()

    def push(self, token: int) -> str:
        """The text that became certain with this id, often empty."""
        if token in self._special or not 0 <= token < len(self._pieces):
            return ""
        return self._bytes.decode(self._pieces[token]) if self._bytes else self._stream(token)  # type: ignore[misc]

    def flush(self) -> str:
        """The text of bytes still waiting, as U+FFFD where they are no whole character."""
        return self._bytes.decode(b"", True) if self._bytes else ""


def load_tokenizer(kind: str, path: str | os.PathLike[str], *, end_of_document: str | None = None) -> Tokenizer:
    """Load a tokenizer from local files.

    Args:
        kind: ``json`` (a tokenizer.json, or a folder that holds one) or ``gpt2``.
        path: file or folder.
        end_of_document: the token that closes a document; found among the usual names when not given.

    Raises:
        TokenizerError: unknown kind, missing or unreadable file, no end-of-document token.
    """
    path = Path(path)
    if kind not in ("json", "gpt2"):
        raise TokenizerError(f"tokenizer kind {kind!r} is unknown; known kinds: gpt2, json")
    if not path.exists():
        raise TokenizerError(f"tokenizer path {path} does not exist")
    if kind == "gpt2":
        return Tokenizer(_TiktokenBackend(_read_ranks(path)))
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise TokenizerError(f"tokenizer folder {path} holds no tokenizer.json")
    return Tokenizer(_JsonBackend(file.read_bytes(), str(file), end_of_document))


def train_bpe(texts: Iterable[str], vocabulary: int, out: str | os.PathLike[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016, over bytes) and write it as a tokenizer.json.

    Ids 0 to 5 are `SPECIAL_TOKENS`; the file's bytes are a function of the texts and the size alone. A small corpus may
    yield fewer ids than asked for: see the result's ``vocabulary``.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocabulary < smallest:
        raise TokenizerError(f"vocabulary {vocabulary} is too small; every byte and special token needs {smallest}")
    tokenizer: Any = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(byte_to_character().values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((replace_surrogates(text) for text in texts), trainer)
    content = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1).encode() + b"\n"
    write_atomically(Path(out), content)
    return load_tokenizer("json", out)


def _slices(text: str, limit: int | None) -> Iterator[str]:
    """Cut a very long text where no id can change, to bound the memory of one call into the library."""
    begin = 0
    while limit is not None and len(text) - begin > limit:
        cut = _SAFE_CUT.search(text, begin + limit)
        if cut is None:
            break
        yield text[begin : cut.start()]
        begin = cut.start()
    yield text[begin:] if begin else text


class _JsonBackend:
    """A tokenizer.json, run by Hugging Face's ``tokenizers``."""

    kind = "json"

    def __init__(self, content: bytes, place: str, end_of_document: str | None):
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        try:
            self._spec: dict[str, Any] = json.loads(content)
            self._tokenizer: Any = HuggingFaceTokenizer.from_str(content.decode())
        except Exception as error:  # the library raises a bare Exception for a malformed file
            raise TokenizerError(f"{place} is not a readable tokenizer.json: {error}") from None
        self._content = content
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
        canonical = json.dumps(self._spec, sort_keys=True, separators=(",", ":")).encode()
        self.sha256 = hashlib.sha256(canonical).hexdigest()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.special_ids = frozenset(t["id"] for t in self._spec.get("added_tokens", []) if t.get("special"))
        self.end_of_document = self._find_end(vocabulary, place, end_of_document)
        self.byte_level, prefix = _is_byte_level(self._spec)
        self.pieces = self._bytes_of(vocabulary)
        self.byte_level = self.byte_level and not prefix
        self.separable = self.byte_level and _is_separable(self._spec)

    def _find_end(self, vocabulary: dict[str, int], place: str, wanted: str | None) -> int:
        names = (wanted,) if wanted is not None else END_OF_DOCUMENT
        for name in names:
            if name in vocabulary:
                if vocabulary[name] in self._tokenizer.encode(name, add_special_tokens=False).ids:
                    raise TokenizerError(
                        f"{place}: {name!r} typed in a text becomes the end-of-document id; mark it special in the file"
                    )
                return vocabulary[name]
        raise TokenizerError(f"{place} has none of the end-of-document tokens {', '.join(map(repr, names))}")

    def _bytes_of(self, vocabulary: dict[str, int]) -> list[bytes]:
        to_byte = {character: byte for byte, character in byte_to_character().items()}
        added = {t["id"] for t in self._spec.get("added_tokens", [])}
        pieces = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            if index in self.special_ids:
                continue
            if self.byte_level and index not in added:
                pieces[index] = bytes(to_byte[character] for character in token)
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                pieces[index] = bytes([int(token[3:5], 16)])
            else:
                pieces[index] = token.replace("\u2581", " ").removeprefix("##").encode()
        return pieces

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        if self.byte_level:
            return b"".join(self.pieces[i] for i in ids if 0 <= i < len(self.pieces)).decode("utf-8", "replace")
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self) -> Any:
        from tokenizers.decoders import DecodeStream

        decoder: Any = DecodeStream(skip_special_tokens=True)
        return lambda token: decoder.step(self._tokenizer, token) or ""

    def save(self, path: Path) -> None:
        write_atomically(path, self._content)


class _TiktokenBackend:
    """GPT-2's ranks, run by ``tiktoken`` (six times as fast as a tokenizer.json of the same vocabulary)."""

    kind = "gpt2"
    byte_level = separable = True

    def __init__(self, ranks: dict[bytes, int]):
        import tiktoken

        self.end_of_document = len(ranks)
        self.special_ids = frozenset([self.end_of_document])
        self.pieces = [piece for piece, _ in sorted(ranks.items(), key=lambda item: item[1])] + [b""]
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
        )
        digest = hashlib.sha256(b"gpt2\n")
        for piece in self.pieces:
            digest.update(base64.b64encode(piece) + b"\n")
        self.sha256 = digest.hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
        return [np.array(row, dtype=np.int32) for row in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids if 0 <= i < len(self.pieces)).decode("utf-8", "replace")

    def stream(self) -> Any:
        raise AssertionError("byte-level vocabularies are decoded from their bytes")

    def save(self, path: Path) -> None:
        lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(self.pieces[:-1])]
        write_atomically(path, b"".join(lines))


def _is_byte_level(spec: dict[str, Any]) -> tuple[bool, bool]:
    """Whether ids stand for exact bytes of the text, and whether a space is put in front of it."""

    def parts(entry: dict[str, Any] | None) -> list[dict[str, Any]]:
        if entry is None:
            return []
        inner = entry.get("pretokenizers") or entry.get("decoders")
        return [p for e in inner for p in parts(e)] if inner else [entry]

    levels = [p for p in parts(spec.get("pre_tokenizer")) if p.get("type") == "ByteLevel"]
    exact = bool(levels) and (spec.get("model") or {}).get("type") == "BPE" and not spec.get("normalizer")
    return exact, any(p.get("add_prefix_space") for p in levels)


def _is_separable(spec: dict[str, Any]) -> bool:
    """Whether the text is split by GPT-2's pattern and nothing else: no pattern of its own, and no added token that is
    looked for in the text first (special ones are not, see `_JsonBackend`)."""
    splitter = spec["pre_tokenizer"]
    plain = splitter["type"] == "ByteLevel" and splitter.get("use_regex", True)
    return plain and all(token.get("special") for token in spec.get("added_tokens", []))


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes to rank, ranks 0..n-1, from a .tiktoken file or a folder of encoder.json (or vocab.json) and merges."""
    try:
        if path.is_file():
            rows = (line.split() for line in path.read_bytes().splitlines() if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
        else:
            names = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}
            found = next((n for n in names if (path / n).is_file() and (path / names[n]).is_file()), None)
            if found is None:
                raise TokenizerError(f"{path} holds neither encoder.json with vocab.bpe nor vocab.json with merges.txt")
            ranks = _ranks_of_merges(path / found, path / names[found])
    except (ValueError, KeyError, OSError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path} is not a GPT-2 vocabulary: {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise TokenizerError(f"{path}: ranks are not 0 to {len(ranks) - 1} each once; the file is damaged")
    return ranks


def _ranks_of_merges(encoder: Path, merges: Path) -> dict[bytes, int]:
    to_byte = {character: byte for byte, character in byte_to_character().items()}
    vocabulary: dict[str, int] = json.loads(encoder.read_text("utf-8"))
    ranks = {bytes(to_byte[c] for c in token): i for token, i in vocabulary.items() if token != "<|endoftext|>"}
    # tiktoken merges the pair with the lowest id first; that is GPT-2's algorithm only if ids follow the merges' order.
    lines = merges.read_text("utf-8").splitlines()
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    for order, (left, right) in enumerate(pairs):
        if vocabulary.get(left + right) != 256 + order:
            raise TokenizerError(f"{merges}: merge {left} {right} is not id {256 + order} of {encoder.name}")
    return ranks
