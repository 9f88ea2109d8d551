"""Special tokens beyond a file's own, the end of document, and what the sha256 stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.dataset import TokenDataset
from potamos.data.errors import TokenizerError, TokenizerMismatchError
from potamos.data.prepare import prepare
from potamos.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, sentinel_names, train_bpe


@pytest.fixture(scope="module")
def path(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer.save(tmp_path_factory.mktemp("special") / "tokenizer.json")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest .tiktoken file: every byte and no merge, so that nothing but bytes is needed to check it."""
    import base64

    path = tmp_path_factory.mktemp("ranks") / "bytes.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    return path


def test_added_tokens_get_the_ids_above_the_vocabulary(tokenizer: Tokenizer, path: Path) -> None:
    names = ("<a>", "[MASK]", "<b>", "river")
    more = load_tokenizer("json", path, special_tokens=names)
    assert [more.special(name) for name in names] == [400, SPECIAL_TOKENS.index("[MASK]"), 401, 402]
    assert more.vocabulary == 403
    assert more.special_ids == {*range(6), 400, 401, 402}
    assert more.token_bytes().shape == (403,)
    assert not more.token_bytes()[400:].any()
    assert [len(piece) for piece in more.pieces] == more.token_bytes().tolist()
    assert np.array_equal(more.token_bytes()[:400], tokenizer.token_bytes())
    assert (more.sha256, more.end_of_document) == (tokenizer.sha256, tokenizer.end_of_document)


def test_added_tokens_are_never_recognised_in_text(tokenizer: Tokenizer, path: Path, texts: list[str]) -> None:
    more = load_tokenizer("json", path, special_tokens=("<a>", "river", "the"))
    for text in [*texts, "the <a>river</a> <a><a> [MASK]"]:
        assert more.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert max(more.encode(text)) < 400


def test_added_tokens_decode_to_nothing(path: Path) -> None:
    more = load_tokenizer("json", path, special_tokens=("<a>",))
    ids = more.encode("old stone bridges").tolist()
    mixed = [400, *ids[:2], 400, *ids[2:], 401, 10**6, -1]
    assert more.decode(mixed) == more.decode(np.array(mixed)) == "old stone bridges"
    decoder = more.stream_decoder()
    assert "".join(map(decoder.push, mixed)) + decoder.flush() == "old stone bridges"


def test_a_saved_copy_with_the_same_names_is_the_same_tokenizer(path: Path, ranks: Path, tmp_path: Path) -> None:
    for kind, file in (("json", path), ("gpt2", ranks)):
        first = load_tokenizer(kind, file, special_tokens=("<a>", "<b>"), end_of_document="<b>")
        copy = first.save(tmp_path / kind)
        again = load_tokenizer(kind, copy, special_tokens=("<a>", "<b>"), end_of_document="<b>")
        assert again.special_tokens == first.special_tokens
        assert (again.sha256, again.vocabulary) == (first.sha256, first.vocabulary)
        assert again.end_of_document == first.special("<b>")


def test_gpt2_grows_above_its_own_end_of_document(ranks: Path) -> None:
    plain = load_tokenizer("gpt2", ranks)
    more = load_tokenizer("gpt2", ranks, special_tokens=("<|endoftext|>", "[MASK]", *sentinel_names(2)))
    assert (plain.vocabulary, plain.end_of_document) == (257, 256)
    assert [more.special(name) for name in ("[MASK]", "<extra_id_0>", "<extra_id_1>")] == [257, 258, 259]
    assert (more.vocabulary, more.end_of_document, more.sha256) == (260, 256, plain.sha256)
    assert more.encode("[MASK]<extra_id_0>").tolist() == list(b"[MASK]<extra_id_0>")


def test_an_unknown_name_lists_what_there_is(path: Path) -> None:
    more = load_tokenizer("json", path, special_tokens=("<a>",))
    with pytest.raises(
        TokenizerError, match=r"no special token '\[MSK\]'; it has '<\|endoftext\|>', '\[MASK\]'.*'<a>'"
    ):
        more.special("[MSK]")


@pytest.mark.parametrize("names", ["[MASK]", ("<a>", "<a>"), ("<a>", "")], ids=str)
def test_bad_names_are_refused(path: Path, names: Any, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="special_tokens"):
        load_tokenizer("json", path, special_tokens=names)
    with pytest.raises(TokenizerError, match="special_tokens"):
        train_bpe(["a"], 400, tmp_path / "out.json", special_tokens=names)


def test_a_token_of_the_file_that_text_cannot_give_keeps_its_id(tmp_path: Path) -> None:
    """As in a vocabulary list that does not mark its special tokens."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import models, pre_tokenizers

    vocabulary = {"[UNK]": 0, "[SEP]": 1, "river": 2, "[MASK]": 3, "run": 4}
    word_piece = HuggingFaceTokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    word_piece.pre_tokenizer = pre_tokenizers.Whitespace()
    word_piece.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer("json", tmp_path, special_tokens=("[MASK]", "run"))
    assert loaded.special_tokens == {"[MASK]": 3, "run": 5, "[SEP]": 1}
    assert loaded.decode([2, 3, 1]) == "river"
    assert loaded.token_bytes().tolist() == [5, 0, 5, 0, 3, 0]


def test_training_puts_special_tokens_and_sentinels_first(texts: list[str], tmp_path: Path) -> None:
    added = ("[MASK]", "<query>")
    made = train_bpe(texts, 500, tmp_path / "tokenizer.json", special_tokens=added, sentinels=100)
    names = [*SPECIAL_TOKENS, "<query>", *(f"<extra_id_{i}>" for i in range(100))]
    assert [made.special(name) for name in names] == list(range(107))
    assert made.special_ids == set(range(107))
    assert (made.vocabulary, made.end_of_document) == (500, 0)
    text = "<extra_id_0> <query> [MASK]"
    assert made.encode(text).min() >= 107
    assert made.decode(made.encode(text)) == text
    again = load_tokenizer("json", tmp_path, special_tokens=sentinel_names(100))
    assert again.special_tokens == made.special_tokens
    with pytest.raises(TokenizerError, match="vocabulary 362 is too small; every byte and special token needs 363"):
        train_bpe(texts, 362, tmp_path / "small.json", special_tokens=added, sentinels=100)
    with pytest.raises(TokenizerError, match="sentinels -1"):
        train_bpe(texts, 400, tmp_path / "small.json", sentinels=-1)


def test_another_end_of_document_is_another_tokenizer(tokenizer: Tokenizer, path: Path, ranks: Path) -> None:
    assert load_tokenizer("json", path, end_of_document="<|endoftext|>").sha256 == tokenizer.sha256
    chosen = load_tokenizer("json", path, end_of_document="[SEP]")
    assert chosen.end_of_document == SPECIAL_TOKENS.index("[SEP]")
    first, second = (
        load_tokenizer("gpt2", ranks, special_tokens=names, end_of_document="<eod>")
        for names in (("<eod>",), ("[MASK]", "<eod>"))
    )
    assert (first.end_of_document, second.end_of_document) == (257, 258)
    hashes = {tokenizer.sha256, chosen.sha256, load_tokenizer("gpt2", ranks).sha256, first.sha256, second.sha256}
    assert len(hashes) == 5
    # An added token becomes the end of document only when it is named so, even if it has a usual name.
    assert load_tokenizer("gpt2", ranks, special_tokens=("</s>",)).end_of_document == 256
    assert load_tokenizer("json", path, special_tokens=("<eos>",)).sha256 == tokenizer.sha256
    with pytest.raises(TokenizerError, match=r"'<end>'; name one as end_of_document"):
        load_tokenizer("gpt2", ranks, end_of_document="<end>")


def test_an_ordinary_token_cannot_close_documents(path: Path) -> None:
    vocabulary = json.loads(path.read_text("utf-8"))["model"]["vocab"]
    for name in ("e", "Ġthe"):
        assert name in vocabulary
        with pytest.raises(TokenizerError, match="typed in a text becomes the end-of-document id"):
            load_tokenizer("json", path, end_of_document=name)
        added = load_tokenizer("json", path, special_tokens=(name,), end_of_document=name)
        assert added.end_of_document == 400 == added.special(name)


def test_a_special_token_that_merges_make_is_found(path: Path, tmp_path: Path) -> None:
    """Marked special in the file, but its letters are an ordinary token too, so a text gives its id."""
    spec = json.loads(path.read_text("utf-8"))
    vocabulary = spec["model"]["vocab"]
    name = next(name for name in vocabulary if name.isascii() and name.isalpha() and len(name) > 1)
    token = {**spec["added_tokens"][0], "id": vocabulary[name], "content": name}
    spec["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(TokenizerError, match=f"'{name}' typed in a text becomes the end-of-document id"):
        load_tokenizer("json", tmp_path, end_of_document=name)
    backend: Any = load_tokenizer("json", tmp_path)._backend
    assert backend._fast is None


def test_a_usual_name_that_text_can_give_does_not_close_documents(path: Path, tmp_path: Path) -> None:
    spec = json.loads(path.read_text("utf-8"))
    spec["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(TokenizerError, match="typed in a text becomes"):
        load_tokenizer("json", tmp_path)
    added = load_tokenizer("json", tmp_path, special_tokens=("<|endoftext|>",))
    assert added.end_of_document == added.special("<|endoftext|>") == 400
    assert added.sha256 != load_tokenizer("json", tmp_path, end_of_document="[SEP]").sha256
    backend: Any = added._backend
    assert added.sha256 != backend.sha256
    assert 400 not in added.encode("<|endoftext|>")


def test_a_dataset_of_another_tokenizer_is_refused(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    """The tokenizer was trained again since the data were prepared: same size, other ids."""
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts[:5]):
        (tmp_path / "text" / f"{number}.txt").write_text(text, "utf-8")
    prepare(str(tmp_path / "text"), "all", tokenizer, tmp_path / "data", chunk_tokens=64)
    again = train_bpe(texts[:30], 400, tmp_path / "again.json")
    assert again.vocabulary == tokenizer.vocabulary
    TokenDataset(tmp_path / "data", tokenizer_sha256=tokenizer.sha256)
    with pytest.raises(TokenizerMismatchError, match=f"{tokenizer.sha256[:12]}.*{again.sha256[:12]}"):
        TokenDataset(tmp_path / "data", tokenizer_sha256=again.sha256)


def test_tokens_added_to_a_file_stand_for_what_is_written(path: Path, tmp_path: Path) -> None:
    """Also those that look like the signs with which other vocabularies spell spaces, bytes and the insides of words;
    the ids of a file that skips some are those that the library gives."""
    spec = json.loads(path.read_text())
    names = ("##x", "<0x0A>", "## y", "\u2581z")
    for number, name in enumerate(names):
        spec["added_tokens"].append({
            "id": 400 + 2 * number, "content": name, "special": False, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False,
        })  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer("json", tmp_path / "t.json")
    text = "old ##x <0x0A> ## y \u2581z stone"
    ids = tokenizer.encode(text)
    assert set(range(400, 404)) <= set(ids.tolist())
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.push, ids.tolist())) + decoder.flush() == text
