"""Tokenizers: round trips, exact bytes, special ids never from text, giant texts, files that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.errors import TokenizerError
from potamos.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, replace_surrogates, train_bpe
from potamos.data.tokenizer import text as mending


def exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())
    assert not set(ids.tolist()) & tokenizer.special_ids
    assert ids.max(initial=0) < tokenizer.vocabulary


def test_round_trip_and_exact_bytes_of_the_corpus(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert (tokenizer.vocabulary, tokenizer.end_of_document, tokenizer.exact_bytes) == (400, 0, True)
    for text in texts:
        exact(tokenizer, text)
    batch = tokenizer.encode_batch(texts)
    assert all(np.array_equal(a, tokenizer.encode(t)) for a, t in zip(batch, texts, strict=True))
    assert not tokenizer.token_bytes()[:6].any()
    assert (tokenizer.token_bytes()[6:] > 0).all()


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    exact(tokenizer, replace_surrogates(text))


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_special_tokens_in_text_stay_text(tokenizer: Tokenizer, name: str) -> None:
    exact(tokenizer, f"a {name}{name} b")


def test_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@given(st.text(max_size=60), st.booleans())
@settings(max_examples=80, deadline=None)
def test_stream_decoder_never_gives_half_a_character(tokenizer: Tokenizer, text: str, special: bool) -> None:
    text = replace_surrogates(text) + "東京🌊"
    decoder = tokenizer.stream_decoder()
    parts = []
    for token in tokenizer.encode(text).tolist():
        parts.append(decoder.push(token))
        if special:
            assert decoder.push(tokenizer.end_of_document) == ""
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text
    assert decoder.flush() == ""


def test_stream_decoder_gives_up_on_a_cut_character_only_at_the_end(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    ids = tokenizer.encode("京").tolist()
    assert len(ids) == 3
    assert [decoder.push(i) for i in ids[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"


def test_long_texts_are_cut_where_no_id_changes(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "     \n\n\n    ".join(part.replace(" the", "    the") for part in texts)
    tokenizer = train_bpe([text], 500, tmp_path / "spaces.json")  # has ids for runs of white space
    assert tokenizer.encode("     x").size < 6
    whole = tokenizer.encode(text)
    monkeypatch.setattr(mending, "SLICE_CHARACTERS", 37)
    assert len(list(mending.slices(text, 37, mending.GPT2_CUTS))) > 100
    assert tokenizer._backend.cuts is mending.GPT2_CUTS
    assert np.array_equal(tokenizer.encode(text), whole)
    monkeypatch.setattr(mending, "SLICE_CHARACTERS", 4)
    assert np.array_equal(tokenizer.encode("x" * 50), tokenizer.encode_batch(["x" * 50])[0])


LLAMA3_PATTERN = (  # as published with Llama 3 (Dubey et al. 2024)
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_split(tokenizer_path: Path, texts: list[str], pattern: str | None, added: str = "") -> Tokenizer:
    """A byte-level tokenizer with a pattern of its own, or with GPT-2's and a token looked for before it."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    made: Any = HuggingFaceTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, made.pre_tokenizer])
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(mending.byte_to_character().values())
    special = ["<|endoftext|>"]
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    if added:
        made.add_tokens([AddedToken(added, normalized=False)])
    made.save(str(tokenizer_path))
    return load_tokenizer("json", tokenizer_path)


@pytest.mark.parametrize(
    ("pattern", "added"), [(LLAMA3_PATTERN, ""), (r"\n|[^\n]+", ""), (None, "past quiet mills")], ids=str
)
def test_texts_that_no_cut_suits_are_encoded_whole(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str | None, added: str
) -> None:
    text = "!\n".join(f"{part} past quiet mills" for part in texts)
    tokenizer = train_split(tmp_path / "tokenizer.json", [text], pattern, added)
    whole = tokenizer.encode(text)
    assert tokenizer.exact_bytes
    in_parts = [tokenizer.encode(part) for part in mending.slices(text, 37, mending.GPT2_CUTS)]
    assert not np.array_equal(np.concatenate(in_parts), whole), "a cut that changes nothing would prove nothing"
    monkeypatch.setattr(mending, "SLICE_CHARACTERS", 37)
    assert np.array_equal(tokenizer.encode(text), whole)


def test_no_cut_at_what_only_python_takes_for_white_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "river!\x1cmills\x1f" * 30
    tokenizer = train_bpe([text], 300, tmp_path / "separators.json")
    whole = tokenizer.encode(text)
    monkeypatch.setattr(mending, "SLICE_CHARACTERS", 5)
    assert np.array_equal(tokenizer.encode(text), whole)


def test_training_gives_the_same_bytes_in_another_process(
    texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    saved = tokenizer.save(tmp_path / "saved.json")
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = (
        "import json, sys; from potamos.data.tokenizer import train_bpe;"
        "train_bpe(json.load(open(sys.argv[1])), 400, sys.argv[2])"
    )
    arguments = [str(tmp_path / "texts.json"), str(tmp_path / "again.json")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=60)
    assert saved.read_bytes() == (tmp_path / "again.json").read_bytes()
    again = load_tokenizer("json", tmp_path / "again.json")
    assert again.sha256 == tokenizer.sha256
    (tmp_path / "layout.json").write_text(json.dumps(json.loads(saved.read_text())))
    assert load_tokenizer("json", tmp_path / "layout.json").sha256 == tokenizer.sha256
    assert train_bpe(texts, 401, tmp_path / "other.json").sha256 != tokenizer.sha256


def test_bad_tokenizers_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    saved = tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="kind 'bpe' is unknown; known kinds: gpt2, json, sentencepiece"):
        load_tokenizer("bpe", saved)
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer("json", tmp_path / "missing.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer("json", tmp_path / "empty")
    (tmp_path / "cut.json").write_bytes(saved.read_bytes()[:500])
    with pytest.raises(TokenizerError, match=r"not a readable tokenizer\.json"):
        load_tokenizer("json", tmp_path / "cut.json")
    with pytest.raises(TokenizerError, match="none of the end-of-document tokens '<end>'"):
        load_tokenizer("json", saved, end_of_document="<end>")
    spec = json.loads(saved.read_text())
    spec["added_tokens"][0]["special"] = False
    (tmp_path / "open.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="becomes the end-of-document id"):
        load_tokenizer("json", tmp_path / "open.json")
    with pytest.raises(TokenizerError, match="vocabulary 100 is too small"):
        train_bpe(["a"], 100, tmp_path / "small.json")


def test_word_piece_decodes_but_promises_no_exact_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocabulary = {"[UNK]": 0, "[SEP]": 1, "river": 2, "##s": 3, "run": 4}
    word_piece = HuggingFaceTokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    word_piece.normalizer = normalizers.Lowercase()
    word_piece.pre_tokenizer = pre_tokenizers.Whitespace()
    word_piece.decoder = decoders.WordPiece()
    word_piece.add_special_tokens(["[UNK]", "[SEP]"])
    word_piece.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer("json", tmp_path)
    assert not loaded.exact_bytes
    assert loaded.end_of_document == 1
    ids = loaded.encode("Rivers run")
    assert ids.tolist() == [2, 3, 4]
    assert loaded.decode(ids) == "rivers run"
    decoder = loaded.stream_decoder()
    assert "".join(map(decoder.push, ids.tolist())) + decoder.flush() == "rivers run"
