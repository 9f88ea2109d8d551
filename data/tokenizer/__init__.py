"""Tokenizers behind one small interface: text to ids, ids to text, and how many UTF-8 bytes each id stands for.

Three kinds: ``gpt2``, GPT-2's byte-pair vocabulary (Radford et al. 2019) from ``encoder.json`` and ``vocab.bpe`` or
from a ``.tiktoken`` file; ``json``, any Hugging Face ``tokenizer.json``; ``sentencepiece``, a ``.model`` file (Kudo and
Richardson 2018). `train_bpe` makes a tokenizer.json. Special tokens are never recognised in text: a document that
quotes ``<|endoftext|>`` is encoded letter by letter.
"""

from potamos.data.tokenizer.core import END_OF_DOCUMENT, FILE_NAMES, KINDS, StreamDecoder, Tokenizer
from potamos.data.tokenizer.loading import load_tokenizer
from potamos.data.tokenizer.text import replace_surrogates
from potamos.data.tokenizer.training import SPECIAL_TOKENS, sentinel_names, train_bpe

__all__ = [
    "END_OF_DOCUMENT",
    "FILE_NAMES",
    "KINDS",
    "SPECIAL_TOKENS",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
    "replace_surrogates",
    "sentinel_names",
    "train_bpe",
]
