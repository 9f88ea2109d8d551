"""Byte-level byte-pair encoding trained on texts (Sennrich et al. 2016, over bytes)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from potamos.data.errors import TokenizerError
from potamos.data.tokenizer.core import Tokenizer
from potamos.data.tokenizer.loading import load_tokenizer
from potamos.data.tokenizer.text import byte_to_character, replace_surrogates
from potamos.files import write_atomically

SPECIAL_TOKENS = ("<|endoftext|>", "[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]")


def sentinel_names(count: int) -> tuple[str, ...]:
    """Names of the sentinels of span corruption, ``<extra_id_0>`` on (Raffel et al. 2020)."""
    return tuple(f"<extra_id_{number}>" for number in range(count))


def train_bpe(
    texts: Iterable[str],
    vocabulary: int,
    out: str | os.PathLike[str],
    *,
    special_tokens: Sequence[str] = (),
    sentinels: int = 0,
) -> Tokenizer:
    """Train a byte-level BPE tokenizer and write it as a tokenizer.json.

    The first ids are `SPECIAL_TOKENS`, then ``special_tokens`` that are not among them, then ``sentinels`` names of
    `sentinel_names`. The file's bytes are a function of the texts and the arguments alone.

    Args:
        texts: what to learn merges from; read once.
        vocabulary: ids in all, special tokens and sentinels included. A small corpus may yield fewer: see the result's
            ``vocabulary``.
        out: the file to write.

    Raises:
        TokenizerError: too small a vocabulary, or a bad name.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = _special_names(special_tokens, sentinels)
    smallest = 256 + len(special)
    if vocabulary < smallest:
        raise TokenizerError(f"vocabulary {vocabulary} is too small; every byte and special token needs {smallest}")
    tokenizer: Any = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(byte_to_character().values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((replace_surrogates(text) for text in texts), trainer)
    content = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1).encode() + b"\n"
    write_atomically(Path(out), content)
    return load_tokenizer("json", out)


def _special_names(added: Sequence[str], sentinels: int) -> list[str]:
    if isinstance(added, str):
        raise TokenizerError(f"special_tokens {added!r} must be a list of names, not one text")
    if sentinels < 0:
        raise TokenizerError(f"sentinels {sentinels} must be 0 or more")
    names = [*SPECIAL_TOKENS, *(name for name in added if name not in SPECIAL_TOKENS), *sentinel_names(sentinels)]
    if len(set(names)) < len(names) or not all(names):
        raise TokenizerError(f"special_tokens {list(added)!r}: every name must be given, and once")
    return names
