"""Any ``tokenizer.json``: by Hugging Face's ``tokenizers``, or by ``tiktoken`` where that is certain to be the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.errors import TokenizerError
from potamos.data.tokenizer.core import END_OF_DOCUMENT, ByteStream
from potamos.data.tokenizer.fast import BytePairEncoder
from potamos.data.tokenizer.text import GPT2_CUTS, byte_to_character, character_to_byte
from potamos.files import write_atomically

_PROBE = (
    "It's 1,234.5 o'clock;\r\n\r\n  they'LL   say \"n'est-ce pas?\"\t<|endoftext|>\u00a0\u2003Naïve 東京。ελληνικά ½Ⅷ² "
    "٣٤ \U0001f30a\u200d\U0001f1ec\U0001f1f7 a\u0301\x1c\x00_  \n "
)


class JsonBackend:
    """A tokenizer.json, whatever its model."""

    kind = "json"
    ends: Sequence[str] = END_OF_DOCUMENT
    special: Mapping[str, int]
    cuts: re.Pattern[str] | None

    def __init__(self, content: bytes, place: str):
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
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        added = [t for t in self._spec.get("added_tokens") or [] if t["content"] in self._vocabulary]
        # Their ids are those that the library gives, which are not the file's where that skips some.
        self._added = {t["content"]: self._vocabulary[t["content"]] for t in added}
        self.special = {t["content"]: self._added[t["content"]] for t in added if t.get("special")}
        pieces_are_bytes, prefix = is_byte_level(self._spec)
        self.pieces = self._bytes_of(pieces_are_bytes)
        self.byte_level = pieces_are_bytes and not prefix
        self.cuts = GPT2_CUTS if self.byte_level and is_separable(self._spec) else None
        self._fast = self._make_fast()

    def _make_fast(self) -> BytePairEncoder | None:
        ranks = byte_pair_ranks(self._spec)
        if ranks is None or not all_reachable(ranks, self._tokenizer.model):
            return None
        fast = BytePairEncoder(ranks)
        # Both libraries bring their own tables of Unicode's letters and digits; a text that differs shows a wrong pair.
        same = fast.encode(_PROBE).tolist() == self._tokenizer.encode(_PROBE, add_special_tokens=False).ids
        return fast if same else None

    def _bytes_of(self, pieces_are_bytes: bool) -> list[bytes]:
        to_byte = character_to_byte()
        added, special_ids = set(self._added.values()), set(self.special.values())
        pieces = [b""] * (max(self._vocabulary.values()) + 1)
        for token, index in self._vocabulary.items():
            if index in special_ids:
                continue
            if index in added:  # found in the text as it is written
                pieces[index] = token.encode()
            elif pieces_are_bytes and to_byte.keys() >= set(token):
                pieces[index] = bytes(to_byte[character] for character in token)
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                pieces[index] = bytes([int(token[3:5], 16)])
            else:
                pieces[index] = token.replace("\u2581", " ").removeprefix("##").encode()
        return pieces

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        if self._fast is not None:
            return self._fast.encode_batch(texts, threads)
        if threads == 1 or len(texts) < 2:
            encodings = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        else:  # the library has one pool of threads, of a size of its own choice
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def find(self, name: str) -> int | None:
        return self._vocabulary.get(name)

    def typed(self, name: str, index: int) -> bool:
        if self.byte_level and name not in self._added:
            return True  # an ordinary token, spelt in the bytes' stand-ins
        return index in self._tokenizer.encode(name, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        if self.byte_level:
            return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self) -> ByteStream | _Stream:
        return ByteStream(self.pieces) if self.byte_level else _Stream(self._tokenizer)

    def save(self, path: Path) -> None:
        write_atomically(path, self._content)


class _Stream:
    """The library's own decoder of one id after another, which knows nothing to give at the end."""

    def __init__(self, tokenizer: Any):
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._decoder = tokenizer, DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        return self._decoder.step(self._tokenizer, token) or ""

    def flush(self) -> str:
        return ""


def is_byte_level(spec: dict[str, Any]) -> tuple[bool, bool]:
    """Whether ids stand for exact bytes of the text, and whether a space is put in front of it."""

    def parts(entry: dict[str, Any] | None) -> list[dict[str, Any]]:
        if entry is None:
            return []
        inner = entry.get("pretokenizers") or entry.get("decoders")
        return [p for e in inner for p in parts(e)] if inner else [entry]

    levels = [p for p in parts(spec.get("pre_tokenizer")) if p.get("type") == "ByteLevel"]
    exact = bool(levels) and (spec.get("model") or {}).get("type") == "BPE" and not spec.get("normalizer")
    return exact, any(p.get("add_prefix_space") for p in levels)


def is_separable(spec: dict[str, Any]) -> bool:
    """Whether the text is split by GPT-2's pattern and nothing else: no pattern of its own, and no added token that is
    looked for in the text first (special ones are not, see `JsonBackend`)."""
    splitter = spec["pre_tokenizer"]
    plain = splitter["type"] == "ByteLevel" and splitter.get("use_regex", True)
    return plain and all(token.get("special") for token in spec.get("added_tokens") or [])


def byte_pair_ranks(spec: dict[str, Any]) -> dict[bytes, int] | None:
    """Bytes to id of a file that describes byte-pair encoding as GPT-2 does it; None for every other.

    A setting that is not known here counts as another kind of tokenizer. What merges and bytes do not make is left out:
    no text gives it. Ids must rise with the order of the merges, because tiktoken merges by id.
    """
    model, splitter = spec.get("model") or {}, spec.get("pre_tokenizer") or {}
    plain_splitter = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    plain_model = {
        "type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    if spec.get("normalizer") is not None or splitter.get("add_prefix_space") is not False:
        return None
    for given, plain, harmless in (
        (splitter, plain_splitter, {"trim_offsets"}),
        (model, plain_model, {"vocab", "merges", "unk_token", "fuse_unk"}),
    ):
        if any(key not in harmless and (value or None) != (plain.get(key) or None) for key, value in given.items()):
            return None
        if given.get("type") != plain["type"]:
            return None
    if not all(token.get("special") for token in spec.get("added_tokens") or []):
        return None
    return _ranks(model["vocab"], model["merges"], {t["id"] for t in spec.get("added_tokens") or []})


def _ranks(vocabulary: dict[str, int], merges: list[Any], special_ids: set[int]) -> dict[bytes, int] | None:
    to_byte = character_to_byte()
    if not vocabulary.keys() >= to_byte.keys():
        return None
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    made = [vocabulary.get("".join(pair), -1) for pair in pairs]
    if any(a >= b for a, b in zip([-1, *made], made, strict=False)):
        return None
    names = [*to_byte, *("".join(pair) for pair in pairs)]
    if not to_byte.keys() >= set().union(*names):
        return None
    ranks = {bytes(to_byte[character] for character in name): vocabulary[name] for name in names}
    return None if special_ids & set(ranks.values()) else ranks


def all_reachable(ranks: dict[bytes, int], model: Any) -> bool:
    """Whether the merges make every token from its own bytes, which makes two different algorithms agree.

    tiktoken takes a pre-token that is in the vocabulary as it is, and otherwise merges any two neighbours that join to
    a known token, lowest id first; byte-pair encoding merges listed pairs, in their order. Suppose that every token is
    made from its own bytes, and that ids rise with the merges. Merging inside a stretch of text whose ends no merge has
    crossed goes as if the stretch were alone, so when two neighbours join to token t and no lower merge is left, they
    are the very pair that t's own bytes come to: a listed pair. So both do the same steps; and a whole pre-token that
    is in the vocabulary is what merging would come to.
    """
    character = byte_to_character()
    return all(
        [token.id for token in model.tokenize("".join(character[byte] for byte in piece))] == [index]
        for piece, index in ranks.items()
    )
