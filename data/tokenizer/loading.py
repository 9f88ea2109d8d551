"""Which file a kind of tokenizer is read from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from potamos.data.errors import TokenizerError
from potamos.data.tokenizer.core import KINDS, Backend, Tokenizer
from potamos.data.tokenizer.gpt2 import Gpt2Backend, read_ranks
from potamos.data.tokenizer.hugging_face import JsonBackend
from potamos.data.tokenizer.sentence_piece import SentencePieceBackend

_MODEL_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def load_tokenizer(
    kind: str,
    path: str | os.PathLike[str],
    *,
    end_of_document: str | None = None,
    special_tokens: Sequence[str] = (),
    threads: int | None = None,
) -> Tokenizer:
    """Load a tokenizer from local files.

    Args:
        kind: ``json`` (a tokenizer.json, or a folder that holds one), ``gpt2`` (a .tiktoken file, or a folder with
            encoder.json and vocab.bpe or with vocab.json and merges.txt) or ``sentencepiece`` (a .model file, or a
            folder that holds one).
        path: file or folder.
        end_of_document: the token that closes a document; when not given, found among the usual names, or the
            end-of-sentence symbol of a SentencePiece model. It must be one that no text can give.
        special_tokens: names that get the next ids above the vocabulary, in this order, unless the file has special
            tokens of these names. No text gives them.
        threads: see `Tokenizer`.

    Raises:
        TokenizerError: unknown kind, missing or unreadable file, no end-of-document token or one that text can give,
            bad names of special tokens.
    """
    path = Path(path)
    if kind not in KINDS:
        raise TokenizerError(f"tokenizer kind {kind!r} is unknown; known kinds: {', '.join(KINDS)}")
    if not path.exists():
        raise TokenizerError(f"tokenizer path {path} does not exist")
    backend, place = _open(kind, path)
    return Tokenizer(
        backend, place, end_of_document=end_of_document, special_tokens=special_tokens, threads=threads
    )  # fmt: skip


def _open(kind: str, path: Path) -> tuple[Backend, str]:
    if kind == "gpt2":
        return Gpt2Backend(read_ranks(path)), str(path)
    if kind == "json":
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(f"tokenizer folder {path} holds no tokenizer.json")
        return JsonBackend(file.read_bytes(), str(file)), str(file)
    file = _model_file(path) if path.is_dir() else path
    return SentencePieceBackend(file.read_bytes(), str(file)), str(file)


def _model_file(folder: Path) -> Path:
    usual = [folder / name for name in _MODEL_FILES if (folder / name).is_file()]
    found = usual or sorted(folder.glob("*.model"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise TokenizerError(f"tokenizer folder {folder} should hold one .model file, but holds {names}; name the file")
    return found[0]
