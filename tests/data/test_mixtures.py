"""Published mixtures, and what is said of mixtures that make no sense."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.errors import MixtureError
from potamos.data.loader import SourceSpec, StageSpec, TokenStream
from potamos.data.mixtures import PILE, PUBLISHED, published, slug
from potamos.data.order import BLOCK, check_weights, quota

# The Pile, Table 1: raw GiB, weight %, epochs, effective GiB.
TABLE = """
Pile-CC|227.12|18.11|1.0|227.12
PubMed Central|90.27|14.40|2.0|180.55
Books3|100.96|12.07|1.5|151.44
OpenWebText2|62.77|10.01|2.0|125.54
ArXiv|56.21|8.96|2.0|112.42
Github|95.16|7.59|1.0|95.16
FreeLaw|51.15|6.12|1.5|76.73
StackExchange|32.20|5.13|2.0|64.39
USPTO Backgrounds|22.90|3.65|2.0|45.81
PubMed Abstracts|19.26|3.07|2.0|38.53
Gutenberg (PG-19)|10.88|2.17|2.5|27.19
OpenSubtitles|12.98|1.55|1.5|19.47
Wikipedia (en)|6.38|1.53|3.0|19.13
DM Mathematics|7.75|1.24|2.0|15.49
Ubuntu IRC|5.52|0.88|2.0|11.03
BookCorpus2|6.30|0.75|1.5|9.45
EuroParl|4.59|0.73|2.0|9.17
HackerNews|3.90|0.62|2.0|7.80
YoutubeSubtitles|3.73|0.60|2.0|7.47
PhilPapers|2.38|0.38|2.0|4.76
NIH ExPorter|1.89|0.30|2.0|3.79
Enron Emails|0.88|0.14|2.0|1.76
"""
ROWS = [line.split("|") for line in TABLE.split("\n") if line]


def test_pile_weights_are_those_of_the_table_and_add_up() -> None:
    assert list(PILE.items()) == [(name, float(weight)) for name, _, weight, _, _ in ROWS]
    assert len(PILE) == 22
    assert sum(PILE.values()) == pytest.approx(100.0, abs=1e-9)
    effective = {name: float(gib) for name, _, _, _, gib in ROWS}
    for name, raw, _, epochs, gib in ROWS:  # a wrong digit would not fit the other columns
        assert PILE[name] == pytest.approx(100 * effective[name] / sum(effective.values()), abs=0.006)
        assert float(raw) * float(epochs) == pytest.approx(float(gib), abs=0.03)


def test_slugs() -> None:
    expected = {
        "Pile-CC": "pile-cc",
        "PubMed Central": "pubmed-central",
        "Wikipedia (en)": "wikipedia-en",
        "Gutenberg (PG-19)": "gutenberg-pg-19",
        "USPTO Backgrounds": "uspto-backgrounds",
        "NIH ExPorter": "nih-exporter",
    }
    assert {name: slug(name) for name in expected} == expected
    assert len({slug(name) for name in PILE}) == 22
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug(name)) for name in PILE)


def test_all_22_pile_subsets_mix_with_an_error_under_one_sample() -> None:
    shares = check_weights(list(PILE.values()), list(PILE))
    for block in (1, 2, 17, 10**6):
        counts = quota(block * BLOCK, shares)
        assert sum(counts) == block * BLOCK
        assert max(abs(count - block * BLOCK * share) for count, share in zip(counts, shares, strict=True)) < 1


def subset_folders(write_ids: Any, root: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        write_ids(root / slug(name), [40] * 6, chunk_tokens=64, seed=seed)


def test_a_whole_pile_needs_no_notice(tmp_path: Path) -> None:
    for name in PILE:
        (tmp_path / slug(name)).mkdir()
        (tmp_path / slug(name) / "dataset.json").write_text("{}")
    sources, notices = published("pile", tmp_path)
    assert notices == ()
    assert [(s.name, s.weight, Path(s.path)) for s in sources] == [(n, w, tmp_path / slug(n)) for n, w in PILE.items()]


def test_missing_subsets_give_their_weight_to_the_others_and_are_named(write_ids: Any, tmp_path: Path) -> None:
    have = ["Github", "Enron Emails", "ArXiv"]
    subset_folders(write_ids, tmp_path, have)
    write_ids(tmp_path / "books", [40], chunk_tokens=64)
    sources, notices = published("pile", tmp_path)
    assert [(s.name, s.weight) for s in sources] == [("ArXiv", 8.96), ("Github", 7.59), ("Enron Emails", 0.14)]
    missing, others = notices
    assert all(name in missing for name in PILE if name not in have)
    assert not any(name in missing for name in have)
    assert "19 of 22 subsets" in missing
    assert "83.31 % of the weight" in missing
    assert f"{100 / 16.69:.4f} times as much" in missing
    assert "books in" in others
    assert "not read" in others
    stream = TokenStream([StageSpec(0, sources)], sequence_length=8, seed=0)
    drawn = np.bincount(stream.read(0, BLOCK).source, minlength=3)
    assert np.abs(drawn - BLOCK * np.array([8.96, 7.59, 0.14]) / 16.69).max() < 1


def test_no_subset_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MixtureError, match=r"holds no subset of the mixture pile; expected folders like pile-cc"):
        published("pile", tmp_path)
    with pytest.raises(MixtureError, match="holds no subset"):
        published("pile", tmp_path / "nowhere")


def test_an_unfinished_subset_is_not_taken_for_a_missing_one(write_ids: Any, tmp_path: Path) -> None:
    subset_folders(write_ids, tmp_path, ["Github"])
    (tmp_path / "arxiv").mkdir()
    with pytest.raises(MixtureError, match=r"arxiv holds no dataset\.json: subset ArXiv is not prepared to its end"):
        published("pile", tmp_path)


def test_unknown_mixtures_and_urls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MixtureError, match="published mixture 'c4' is unknown; known: pile"):
        published("c4", tmp_path)
    with pytest.raises(MixtureError, match="write the sources one by one"):
        published("pile", "s3://bucket/pile")
    assert set(PUBLISHED) == {"pile"}


@pytest.mark.parametrize("weight", [0.0, -0.5, float("nan"), float("inf"), -float("inf")])
def test_a_weight_of_zero_or_below_or_no_number_is_refused_by_source(
    write_ids: Any, tmp_path: Path, weight: float
) -> None:
    paths = [write_ids(tmp_path / name, [40] * 6, chunk_tokens=64, seed=ord(name)) for name in "ab"]
    sources = (SourceSpec(paths[0], 1.0, "web"), SourceSpec(paths[1], weight, "books"))
    with pytest.raises(MixtureError, match="of source books is not a positive number; leave the source out"):
        TokenStream([StageSpec(0, sources)], sequence_length=8, seed=0)


def test_weights_near_the_least_that_can_be_mixed(write_ids: Any, tmp_path: Path) -> None:
    """At the limit every block holds the source twice; just below it is refused with the limit."""
    paths = [write_ids(tmp_path / name, [40] * 6, chunk_tokens=64, seed=ord(name)) for name in "ab"]

    def mixed(share: float) -> TokenStream:
        sources = (SourceSpec(paths[0], 1 - share, "web"), SourceSpec(paths[1], share, "books"))
        return TokenStream([StageSpec(0, sources)], sequence_length=8, seed=0)

    source = mixed(2 / BLOCK).read(0, 3 * BLOCK).source
    assert [int((source[b * BLOCK : (b + 1) * BLOCK] == 1).sum()) for b in range(3)] == [2, 2, 2]
    with pytest.raises(MixtureError, match=r"weight \S+ of source books is 2.*e-05 of the total; the least .* 3.1e-05"):
        mixed(1.9 / BLOCK)
