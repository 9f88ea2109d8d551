"""GPT-2's vocabulary, from the files it was published in or from tiktoken's."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from potamos.data.errors import TokenizerError
from potamos.data.tokenizer.core import ByteStream
from potamos.data.tokenizer.fast import BytePairEncoder
from potamos.data.tokenizer.text import GPT2_CUTS, character_to_byte
from potamos.files import write_atomically

_END = "<|endoftext|>"


class Gpt2Backend:
    """GPT-2's ranks, run by ``tiktoken``; the id after them is ``<|endoftext|>``."""

    kind = "gpt2"
    byte_level = True
    cuts: re.Pattern[str] | None = GPT2_CUTS
    ends: Sequence[str] = (_END,)
    special: Mapping[str, int]

    def __init__(self, ranks: dict[bytes, int]):
        self.pieces = [piece for piece, _ in sorted(ranks.items(), key=lambda item: item[1])] + [b""]
        self.special = {_END: len(ranks)}
        self._encoder = BytePairEncoder(ranks)
        digest = hashlib.sha256(b"gpt2\n")
        for piece in self.pieces:
            digest.update(base64.b64encode(piece) + b"\n")
        self.sha256 = digest.hexdigest()

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        return self._encoder.encode_batch(texts, threads)

    def find(self, name: str) -> int | None:
        return self.special.get(name)  # other ids are pieces of text without a name

    def typed(self, name: str, index: int) -> bool:
        return False

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def stream(self) -> ByteStream:
        return ByteStream(self.pieces)

    def save(self, path: Path) -> None:
        lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(self.pieces[:-1])]
        write_atomically(path, b"".join(lines))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes to rank, ranks 0..n-1, from a .tiktoken file or a folder of encoder.json (or vocab.json) and merges.

    Raises:
        TokenizerError: no such files, or not a whole vocabulary.
    """
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
        raise TokenizerError(
            f"{path} is not a GPT-2 vocabulary ({error}); name the folder with encoder.json and vocab.bpe, or with "
            f"vocab.json and merges.txt, or a .tiktoken file"
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(
            f"{path}: ranks are not 0 to {len(ranks) - 1} each once, every byte among them; the file is damaged"
        )
    return ranks


def _ranks_of_merges(encoder: Path, merges: Path) -> dict[bytes, int]:
    to_byte = character_to_byte()
    vocabulary: dict[str, int] = json.loads(encoder.read_text("utf-8"))
    ranks = {bytes(to_byte[c] for c in token): i for token, i in vocabulary.items() if token != _END}
    # tiktoken merges the pair with the lowest id first; that is GPT-2's algorithm only if ids follow the merges' order.
    lines = merges.read_text("utf-8").splitlines()
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    for order, (left, right) in enumerate(pairs):
        if vocabulary.get(left + right) != 256 + order:
            raise TokenizerError(f"{merges}: merge {left} {right} is not id {256 + order} of {encoder.name}")
    if len(ranks) != 256 + len(pairs):
        raise TokenizerError(
            f"{encoder} holds {len(ranks)} tokens, but 256 bytes and {len(pairs)} merges of {merges.name} are "
            f"{256 + len(pairs)}; the two do not belong together"
        )
    return ranks
