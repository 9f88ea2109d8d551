"""URLs of every kind: which library reads them, and what is said of those that lead nowhere."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.dataset import TokenDataset
from potamos.data.errors import DatasetError
from potamos.data.fetch import try_again
from potamos.data.foreign import TokenizerFacts, index_tars
from potamos.data.remote import RemoteError, RemoteShards, open_dataset_files

pytestmark = pytest.mark.usefixtures("no_proxy")
Open = Callable[..., RemoteShards]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_fsspec_urls(dataset: Path, open_remote: Open, scheme: str, remotes: Any) -> None:
    import fsspec

    url = f"file://{dataset}"
    if scheme == "memory":
        fs = fsspec.filesystem("memory")
        for path in dataset.iterdir():
            fs.pipe_file(f"/bucket/pile/{path.name}", path.read_bytes())
        url = "memory://bucket/pile"
    files = open_remote(url)
    assert all(remotes.same(files, dataset, shard) for shard in range(remotes.SHARDS))
    with pytest.raises(RemoteError, match="cannot be had"):
        open_remote(url + "/nothing")


def test_webdataset_schemes_and_rewriting(
    dataset: Path, open_remote: Open, monkeypatch: pytest.MonkeyPatch, remotes: Any
) -> None:
    """Schemes that only WebDataset knows run its handler's command; a failing command is tried again, then an error."""
    import importlib

    gopen = importlib.import_module("webdataset.gopen")
    calls: list[str] = []

    def handler(url: str, mode: str, bufsize: int) -> Any:
        calls.append(url)
        return gopen.Pipe(["cat", url.removeprefix("lab://")], mode=mode, bufsize=bufsize)

    monkeypatch.setitem(gopen.gopen_schemes, "lab", handler)
    assert remotes.same(open_remote(f"lab://{dataset}"), dataset, 3)
    assert len(calls) == 3
    with pytest.raises(RemoteError, match=r"4 attempts failed.*its command ended with status 1"):
        open_remote("lab:///nowhere")
    monkeypatch.setenv("GOPEN_REWRITE", f"store://bucket=lab://{dataset}")
    assert remotes.same(open_remote("store://bucket"), dataset, 4)
    monkeypatch.setattr(importlib.import_module("webdataset.utils"), "enforce_security", True)
    with pytest.raises(RemoteError, match="cannot rewrite URLs"):
        open_remote("store://bucket")


def test_a_stalled_command_is_ended(
    dataset: Path, open_remote: Open, monkeypatch: pytest.MonkeyPatch, remotes: Any
) -> None:
    import importlib

    gopen = importlib.import_module("webdataset.gopen")
    started: list[Any] = []

    def handler(url: str, mode: str, bufsize: int) -> Any:
        started.append(gopen.Pipe(["sleep", "30"], mode=mode, bufsize=bufsize))
        return started[-1]

    monkeypatch.setitem(gopen.gopen_schemes, "lab", handler)
    with pytest.raises(RemoteError, match=r"2 attempts failed.*nothing came for 0\.1 s"):
        open_remote("lab://x", retry=remotes.quick(attempts=2, timeout=0.1))
    assert [pipe.proc.returncode for pipe in started] == [-9, -9]


def test_foreign_tars_behind_a_url(dataset: Path, tmp_path: Path, open_remote: Open, remotes: Any) -> None:
    """Links to tars, as `data index --out` makes them, are followed by whoever serves them."""
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for key in range(20):
                file = io.BytesIO()
                np.save(file, np.random.default_rng(100 * number + key).integers(1, 300, 40))
                info = tarfile.TarInfo(f"{key}.npy")
                info.size = len(file.getvalue())
                tar.addfile(info, io.BytesIO(file.getvalue()))
    index_tars(str(tmp_path / "*.tar"), tmp_path / "d", tokenizer=TokenizerFacts("f" * 64, 300, 0))
    files = open_remote(f"file://{tmp_path / 'd'}")
    remote = TokenDataset(files.folder, files=files)
    for ours, theirs in zip(remotes.every_row(remote), remotes.every_row(TokenDataset(tmp_path / "d")), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(remotes.present(files)) == 3


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("pipe:cat x", "a pipe is one stream"),
        ("nonsense://x/y", "nonsense"),
        ("http://127.0.0.1:1/d", "attempts failed"),
    ],
)
def test_urls_that_lead_nowhere(open_remote: Open, url: str, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        open_remote(url)


def test_a_missing_storage_package_is_named(open_remote: Open) -> None:
    import importlib.util

    absent = next(
        (scheme, package)
        for scheme, package in (("s3", "s3fs"), ("abfs", "adlfs"), ("oss", "ossfs"))
        if importlib.util.find_spec(package) is None
    )
    with pytest.raises(RemoteError, match=f"{absent[1]}.*Python package"):
        open_remote(f"{absent[0]}://bucket/pile")


def test_wrong_dataset_json_is_an_error_that_names_the_url(dataset: Path, tmp_path: Path, open_remote: Open) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    fields = json.loads((copy / "dataset.json").read_bytes())
    (copy / "dataset.json").write_text(json.dumps({**fields, "tokens": fields["tokens"] + 1}))
    with pytest.raises(DatasetError, match=f"file://{copy}"):
        open_remote(f"file://{copy}")
    assert os.listdir(tmp_path / "cache") == []


def test_a_url_needs_a_cache(dataset: Path) -> None:
    with pytest.raises(DatasetError, match=r"data\.cache"):
        open_dataset_files("s3://bucket/pile")
    assert open_dataset_files(dataset) == (dataset, None)


@pytest.mark.parametrize("kind", [OSError, FileNotFoundError])
@pytest.mark.parametrize("words", ["GET {url}: no", "user me, password pa%20ss-word", "login pa ss-word?sig=se-cret"])
def test_no_secret_is_shown_in_the_words_of_a_library(kind: type[OSError], words: str, remotes: Any) -> None:
    url = "s3://me:pa%20ss-word@bucket/d/x.tar?sig=se-cret"

    def fail() -> None:
        raise kind(words.format(url=url))

    with pytest.raises(RemoteError, match=r"s3://\.\.\.@bucket/d/x\.tar\?\.\.\. cannot be had") as caught:
        try_again(fail, url, remotes.quick(attempts=2))
    assert words.split(" ")[0] in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("ss-word", "se-cret"))
