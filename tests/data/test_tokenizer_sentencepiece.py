"""SentencePiece models: ids as the library gives them, what may close a document, bytes, streams, slices, copies."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.errors import TokenizerError
from potamos.data.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer, replace_surrogates
from potamos.data.tokenizer import text as mending

MODELS: dict[str, dict[str, Any]] = {
    "unigram": {},
    "bytes": {"byte_fallback": True, "control_symbols": ["<mask>"], "user_defined_symbols": ["<sep>", "</doc>"]},
    "bpe": {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "no prefix": {"add_dummy_prefix": False, "byte_fallback": True},
    "no end": {"eos_id": -1},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import sentencepiece

    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for name, options in MODELS.items():
        content = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=content, vocab_size=400, hard_vocab_limit=False,
            minloglevel=2, num_threads=1, **options,
        )  # fmt: skip
        paths[name] = folder / f"{name}.model"
        paths[name].write_bytes(content.getvalue())
    return paths


def library(path: Path) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))


CLOSED = [name for name in MODELS if name != "no end"]


@pytest.mark.parametrize("name", CLOSED)
def test_ids_and_texts_are_the_libraries(models: dict[str, Path], texts: list[str], name: str) -> None:
    loaded, reference = load_tokenizer("sentencepiece", models[name]), library(models[name])
    hard = ["", " ", "  two  spaces ", "東京 🌊", "a\tb\n\nc", "</s> <s>", "x" * 300, " \u2581 "]
    wanted = reference.encode([*texts, *hard])
    for threads in (1, 2):
        loaded.threads = threads
        assert [ids.tolist() for ids in loaded.encode_batch([*texts, *hard])] == wanted
    for ids in wanted:
        kept = [i for i in ids if i != reference.unk_id()]
        assert loaded.decode(kept) == reference.decode(kept)
    assert loaded.encode("river").dtype == np.int32
    assert (loaded.kind, loaded.exact_bytes, loaded.vocabulary) == ("sentencepiece", False, reference.get_piece_size())
    assert loaded.end_of_document == reference.eos_id() == loaded.special("</s>")


@pytest.mark.parametrize("name", CLOSED)
@given(text=st.text(max_size=40), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_stream_gives_the_text_of_decode(models: dict[str, Path], name: str, text: str, seed: int) -> None:
    loaded = cached(models[name])
    ids = loaded.encode(replace_surrogates(text) + " 東京").tolist()
    ids += random.Random(seed).choices(range(loaded.vocabulary), k=10)
    decoder = loaded.stream_decoder()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == loaded.decode(ids)


@pytest.mark.parametrize("name", CLOSED)
def test_random_ids_decode_as_in_the_library(models: dict[str, Path], name: str) -> None:
    loaded, reference = cached(models[name]), library(models[name])
    plain = [i for i in range(loaded.vocabulary) if i not in loaded.special_ids and not reference.is_byte(i)]
    rng = random.Random(5)
    spaces = [i for i in plain if reference.id_to_piece(i).startswith("\u2581")]
    for _ in range(300):
        ids = rng.choices(spaces, k=rng.randint(0, 3)) + rng.choices(plain, k=rng.randint(0, 6))
        assert loaded.decode(ids) == reference.decode(ids)


_LOADED: dict[Path, Tokenizer] = {}


def cached(path: Path) -> Tokenizer:
    if path not in _LOADED:
        _LOADED[path] = load_tokenizer("sentencepiece", path)
    return _LOADED[path]


def test_bytes_of_half_a_character_wait(models: dict[str, Path]) -> None:
    loaded = load_tokenizer("sentencepiece", models["bytes"])
    ids = loaded.encode("a 京").tolist()
    decoder = loaded.stream_decoder()
    assert [decoder.push(i) for i in ids[-3:]] == ["", "", "京"]
    decoder = loaded.stream_decoder()
    assert [decoder.push(i) for i in ids[-3:-1]] == ["", ""]
    assert decoder.flush() == "\ufffd"


def test_token_bytes(models: dict[str, Path], texts: list[str]) -> None:
    loaded, reference = load_tokenizer("sentencepiece", models["bytes"]), library(models["bytes"])
    sizes = loaded.token_bytes()
    for index in range(loaded.vocabulary):
        piece = reference.id_to_piece(index)
        if index in loaded.special_ids:
            assert sizes[index] == 0
        elif reference.is_byte(index):
            assert sizes[index] == 1
        else:
            assert sizes[index] == len(piece.replace("\u2581", " ").encode())
    plain = " ".join(texts[1].split())  # nothing that normalisation changes
    assert sizes[loaded.encode(plain)].sum() == 1 + len(plain.encode())  # the space in front


def test_unknown_characters_give_the_unknown_token(models: dict[str, Path]) -> None:
    loaded = load_tokenizer("sentencepiece", models["unigram"])
    ids = loaded.encode("river \U0001f40c").tolist()
    assert loaded.special("<unk>") in ids
    assert loaded.decode(ids).strip() == "river"
    assert (
        load_tokenizer("sentencepiece", models["bytes"]).decode(
            load_tokenizer("sentencepiece", models["bytes"]).encode("river \U0001f40c")
        )
        == "river \U0001f40c"
    )


def test_only_a_control_symbol_closes_documents(models: dict[str, Path]) -> None:
    path = models["bytes"]
    assert load_tokenizer("sentencepiece", path, end_of_document="<mask>").end_of_document == library(path)["<mask>"]
    typed = load_tokenizer("sentencepiece", path)
    assert library(path)["</doc>"] in typed.encode("a</doc>b"), "a user-defined symbol is found in any text"
    for name in ("</doc>", "<sep>", "\u2581the"):
        with pytest.raises(TokenizerError, match="typed in a text becomes the end-of-document id"):
            load_tokenizer("sentencepiece", path, end_of_document=name)
    with pytest.raises(TokenizerError, match="'<end>'"):
        load_tokenizer("sentencepiece", path, end_of_document="<end>")
    with pytest.raises(TokenizerError, match="name one as end_of_document"):
        load_tokenizer("sentencepiece", models["no end"])
    added = load_tokenizer("sentencepiece", models["no end"], special_tokens=("<eod>",), end_of_document="<eod>")
    assert added.end_of_document == library(models["no end"]).get_piece_size()


def test_control_symbols_typed_in_text_stay_text(models: dict[str, Path]) -> None:
    loaded = load_tokenizer("sentencepiece", models["bytes"], special_tokens=("<b>", "</doc>"))
    ids = loaded.encode("a <mask></s> <b>")
    assert not set(ids.tolist()) & loaded.special_ids
    assert loaded.decode(ids) == "a <mask></s> <b>"
    size = library(models["bytes"]).get_piece_size()
    assert (loaded.special("<b>"), loaded.special("</doc>"), loaded.vocabulary) == (size, size + 1, size + 2)
    assert size + 1 not in loaded.encode("a</doc>b")


def test_a_giant_text_is_cut_only_where_no_id_changes(
    models: dict[str, Path], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "  ".join(texts[:20]) + " \n \u00a0x \u200by  東京。 z "
    for name in CLOSED:
        loaded = load_tokenizer("sentencepiece", models[name])
        whole = library(models[name]).encode(text)
        assert loaded.encode(text).tolist() == whole
        cuts = loaded._backend.cuts
        assert (cuts is not None) == (name in ("unigram", "bytes")), name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mending, "SLICE_CHARACTERS", 7)
            if cuts is not None:
                assert len(list(mending.slices(text, 7, cuts))) > 100
            assert loaded.encode(text).tolist() == whole


def test_a_copy_is_the_same_tokenizer(models: dict[str, Path], tmp_path: Path) -> None:
    first = load_tokenizer("sentencepiece", models["bytes"], special_tokens=("<b>",))
    first.save(tmp_path / FILE_NAMES["sentencepiece"])
    again = load_tokenizer("sentencepiece", tmp_path, special_tokens=("<b>",))
    assert (again.sha256, again.special_tokens) == (first.sha256, first.special_tokens)
    assert again.encode("old stone").tolist() == first.encode("old stone").tolist()
    assert load_tokenizer("sentencepiece", models["unigram"]).sha256 != first.sha256
    (tmp_path / "other.model").write_bytes(b"")
    assert load_tokenizer("sentencepiece", tmp_path).sha256 == first.sha256, "the usual name counts"


def test_bad_models_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    content = models["bytes"].read_bytes()
    for name, damaged in [("empty", b""), ("junk", b"not a model"), ("cut", content[: len(content) // 2])]:
        (tmp_path / f"{name}.model").write_bytes(damaged)
        with pytest.raises(TokenizerError, match=f"{name}.model is not a readable SentencePiece model"):
            load_tokenizer("sentencepiece", tmp_path / f"{name}.model")
    with pytest.raises(
        TokenizerError, match=r"should hold one \.model file, but holds cut.model, empty.model, junk.model"
    ):
        load_tokenizer("sentencepiece", tmp_path)


def test_the_library_is_imported_when_a_model_is_loaded() -> None:
    script = (
        "import sys, potamos.data.tokenizer; assert not {'sentencepiece', 'tokenizers', 'tiktoken'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
