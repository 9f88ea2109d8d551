"""The recipe's tokenizer and data settings reach what they name; a run keeps a tokenizer that does the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from potamos.data.prepare import prepare
from potamos.data.tokenizer import load_tokenizer
from potamos.pretrain import setup
from potamos.pretrain.runs import open_run, score_run


@pytest.fixture(scope="module")
def sentence_pieces(trial: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of the trial's text, and the text prepared with it, closed by an added token."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    lines = [json.loads(line)["text"] for line in (trial.folder / "train.jsonl").read_text().splitlines()]
    with open(folder / "pieces.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=120, model_type="bpe", minloglevel=2
        )
    tokenizer = load_tokenizer("sentencepiece", folder / "pieces.model", special_tokens=["<x>"], end_of_document="<x>")
    prepare(trial.folder / "train.jsonl", "all", tokenizer, folder / "train", chunk_tokens=1024)
    return folder


def overrides(folder: Path, section: str) -> list[str]:
    path = folder / "pieces.model"
    return [
        f"tokenizer={{kind: sentencepiece, path: {path}, {section}}}",
        f"data.stages=[{{from: 0, mixture: [{{path: {folder / 'train'}}}]}}]",
        "data.validation=[]",
        "train.steps=2",
    ]


def test_a_run_keeps_its_tokenizer_special_tokens_included(trial: Any, sentence_pieces: Path, tmp_path: Path) -> None:
    changes = overrides(sentence_pieces, "special_tokens: [<x>, <y>], end_of_document: <x>")
    assert trial.fit(tmp_path / "run", *changes) == 0
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == (sentence_pieces / "pieces.model").read_bytes()
    run = open_run(tmp_path / "run")
    assert (run.tokenizer.special("<x>"), run.tokenizer.special("<y>")) == (120, 121)
    assert (run.tokenizer.end_of_document, run.tokenizer.vocabulary) == (120, 122)
    assert score_run(run, sentence_pieces / "train")


def test_data_closed_by_another_token_are_refused(trial: Any, sentence_pieces: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was prepared with tokenizer \w{12}, the run uses \w{12}"):
        trial.trainer(tmp_path / "run", *overrides(sentence_pieces, "special_tokens: [<x>]"))


def test_added_tokens_count_in_the_vocabulary(trial: Any, tmp_path: Path) -> None:
    size = trial.tokenizer.vocabulary
    with pytest.raises(ValueError, match=rf"vocabulary: {size} is below the {size + 1} ids of tokenizer"):
        trial.trainer(tmp_path / "run", "tokenizer.special_tokens=['<new>']")
    assert setup.open_tokenizer(trial.recipe("tokenizer.special_tokens=['[MASK]']")).vocabulary == size


def test_the_settings_of_the_order_reach_the_stream(trial: Any) -> None:
    changes = ("data.order=window", "data.window=3", "data.skip=[[4, 9], [7, 12]]")
    stream = setup.open_stream(trial.recipe(*changes), trial.tokenizer)
    assert (stream.order, stream.window, stream.skip.ranges) == ("window", 3, ((4, 12),))
    assert setup.open_stream(trial.recipe("data.order=window"), trial.tokenizer).window == 16
