"""Shards behind URLs: fetched once, proven, and never skipped, whatever the network does."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.dataset import TokenDataset
from potamos.data.fetch import join, shown
from potamos.data.files import ShardFiles
from potamos.data.loader import SourceSpec, StageSpec, TokenStream
from potamos.data.manifest import read_manifest
from potamos.data.remote import CacheSpec, RemoteError, RemoteShards, Retry

pytestmark = pytest.mark.usefixtures("no_proxy")
Open = Callable[..., RemoteShards]


def test_rows_over_http_equal_local_ones(server: Any, dataset: Path, open_remote: Open, remotes: Any) -> None:
    files = open_remote(server.url)
    remote = TokenDataset(files.folder, files=files)
    local = TokenDataset(dataset)
    assert remote.fingerprint == local.fingerprint
    for ours, theirs in zip(remotes.every_row(remote), remotes.every_row(local), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert server.asked == {"dataset.json": 1} | {
        name: 1 for entry in read_manifest(dataset).shards for name in (entry["name"], entry["name"] + ".idx")
    }


def test_opening_fetches_no_shard(server: Any, open_remote: Open) -> None:
    files = open_remote(server.url)
    TokenDataset(files.folder, files=files)
    assert set(server.asked) == {"dataset.json"}


@pytest.mark.parametrize("trouble", [503, 500, 429, "cut", "wrong", "short"])
def test_what_may_pass_is_tried_again(
    server: Any, dataset: Path, open_remote: Open, trouble: Any, remotes: Any
) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = [trouble, trouble]
    retry = remotes.quick()
    assert remotes.same(open_remote(server.url, retry=retry), dataset, 0)
    assert server.asked[name] == 3
    assert isinstance(retry.sleep, remotes.Waits)
    assert retry.sleep.seconds == [0.5, 1.0]


def test_a_stalled_connection_is_given_up_and_tried_again(
    server: Any, dataset: Path, open_remote: Open, remotes: Any
) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = ["stall"]
    assert remotes.same(open_remote(server.url, retry=remotes.quick(timeout=0.3)), dataset, 0)
    assert server.asked[name] == 2


def test_a_file_without_an_end_is_given_up(server: Any, dataset: Path, open_remote: Open, remotes: Any) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = ["endless"]
    timer = threading.Timer(15, server.release.set)
    timer.start()
    assert remotes.same(open_remote(server.url), dataset, 0)
    assert not server.release.is_set()
    timer.cancel()


def test_another_host_hears_no_password(server: Any, dataset: Path, open_remote: Open, remotes: Any) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = [server.url.replace("127.0.0.1", "localhost")]
    assert remotes.same(open_remote(server.url.replace("http://", "http://me:pass-word@")), dataset, 0)
    assert server.asked[name] == 2
    assert [authorization is None for _, authorization in server.headers].count(True) == 1


def test_dataset_json_is_tried_again_too(server: Any, dataset: Path, open_remote: Open) -> None:
    server.trouble["dataset.json"] = [503, "cut"]
    assert open_remote(server.url).manifest.fingerprint == read_manifest(dataset).fingerprint


@pytest.mark.parametrize(
    ("trouble", "said"),
    [(503, "status 503"), ("cut", "bytes came"), ("wrong", "sha256"), ("short", "bytes came"), ("stall", "timed out")],
)
def test_remote_read_that_keeps_failing_is_an_error_with_url_attempts_and_reason(
    server: Any, dataset: Path, open_remote: Open, trouble: Any, said: str, remotes: Any
) -> None:
    name = read_manifest(dataset).shards[2]["name"]
    server.trouble[name] = [trouble] * 99
    files = open_remote(server.url, retry=remotes.quick(attempts=3, timeout=0.2 if trouble == "stall" else 10))
    with pytest.raises(RemoteError, match="3 attempts failed") as caught:
        files.path(2)
    assert f"{server.url}/{name}" in str(caught.value)
    assert said in str(caught.value)
    assert server.asked[name] == 3
    assert remotes.present(files) == []
    assert not list(files.folder.glob(".*partial"))


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (403, 1), (401, 1), (410, 1), (408, 4), (502, 4)])
def test_what_lasts_is_not_tried_again(
    server: Any, dataset: Path, open_remote: Open, status: int, attempts: int
) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = [status] * 99
    with pytest.raises(RemoteError, match=f"status {status}"):
        open_remote(server.url).path(0)
    assert server.asked[name] == attempts


def test_waits_grow_are_bounded_and_spread() -> None:
    retry = Retry(first=0.5, longest=4.0, jitter=lambda: 1.0)
    assert [retry.wait(k) for k in range(1, 7)] == [0.5, 1, 2, 4, 4, 4]
    assert dataclasses.replace(retry, jitter=lambda: 0.0).wait(3) == 1.0
    drawn = {Retry().wait(1) for _ in range(50)}
    assert len(drawn) > 40
    assert all(0.25 <= wait <= 0.5 for wait in drawn)


def test_remote_read_fails_mid_window(server: Any, dataset: Path, tmp_path: Path, remotes: Any) -> None:
    """A shard in the middle of a window is gone for good: an error when its rows are due, not a row less."""
    name = read_manifest(dataset).shards[7]["name"]
    server.trouble[name] = [503] * 999
    with window_stream(server.url, tmp_path, sum(remotes.shard_bytes(dataset)), remotes.quick(attempts=2)) as stream:
        rows = TokenDataset(dataset).cut(64).total

        def read_all() -> None:
            for first in range(0, rows, 8):
                stream.read(first, 8)

        with pytest.raises(RemoteError, match=f"{name}.*2 attempts failed.*503"):
            read_all()
        server.trouble.clear()
        assert len(stream.read(0, rows)) == rows  # the network is back: nothing was lost


def test_a_failure_ahead_surfaces_when_the_shard_is_needed(
    server: Any, dataset: Path, open_remote: Open, remotes: Any
) -> None:
    names = [entry["name"] for entry in read_manifest(dataset).shards]
    server.trouble[names[1]] = [503] * 99
    files = open_remote(server.url, retry=remotes.quick(attempts=2))
    files.prefetch([0, 1, 2])
    remotes.wait_for(lambda: remotes.present(files) == [names[0], names[2]] and server.asked[names[1]] == 2)
    assert remotes.same(files, dataset, 2)
    with pytest.raises(RemoteError, match=names[1]):
        files.path(1)
    server.trouble.clear()
    assert remotes.same(files, dataset, 1)


def test_fetching_ahead_is_used(server: Any, dataset: Path, open_remote: Open, remotes: Any) -> None:
    files = open_remote(server.url)
    files.prefetch(range(6))
    remotes.wait_for(lambda: len(remotes.present(files)) == 6)
    before = server.asked.copy()
    assert all(remotes.same(files, dataset, shard) for shard in range(6))
    assert server.asked == before


def test_close_ends_the_threads_even_between_attempts(server: Any, dataset: Path, tmp_path: Path, remotes: Any) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = [503] * 99
    cache = CacheSpec(tmp_path / "cache", 10**9, retry=Retry(first=30.0))
    files = RemoteShards(server.url, cache)
    files.prefetch([0])
    remotes.wait_for(lambda: server.asked[name] == 1)
    begun = time.monotonic()
    files.close()
    assert time.monotonic() - begun < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "shard-fetcher"]
    with pytest.raises(RemoteError, match="closed"):
        files.path(1)


def test_no_secret_is_shown(server: Any, dataset: Path, open_remote: Open) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = [503] * 99
    files = open_remote(server.url.replace("http://", "http://me:pass-word@") + "/?sig=se-cret")
    with pytest.raises(RemoteError, match=name) as caught:
        files.path(0)
    token = base64.b64encode(b"me:pass-word").decode()
    assert set(server.headers) == {("sig=se-cret", f"Basic {token}")}
    assert "pass-word" not in str(caught.value)
    assert "se-cret" not in str(caught.value)
    assert shown("s3://key:value@bucket/a?b=c") == "s3://...@bucket/a?..."
    assert join("https://host/a/?b=c", "x y.tar") == "https://host/a/x%20y.tar?b=c"


@contextlib.contextmanager
def window_stream(url: str, folder: Path, limit: int, retry: Retry) -> Iterator[TokenStream]:
    stream = TokenStream(
        [StageSpec(0, (SourceSpec(url),))],
        sequence_length=64,
        seed=3,
        order="window",
        window=3,
        cache=CacheSpec(folder / "cache", limit, retry=retry),
    )
    try:
        yield stream
    finally:
        for dataset in stream.datasets:
            files: ShardFiles | None = dataset.files
            if isinstance(files, RemoteShards):
                files.close()


def test_window_order_over_http_equals_the_local_one(server: Any, dataset: Path, tmp_path: Path, remotes: Any) -> None:
    """Two epochs and a half, a few requests failing, the cache at its least, and never more than two windows there."""
    for number, entry in enumerate(read_manifest(dataset).shards):
        server.trouble[entry["name"]] = [503, "cut"][: number % 3]
    local = TokenStream([StageSpec(0, (SourceSpec(dataset),))], sequence_length=64, seed=3, order="window", window=3)
    limit = sum(sorted(remotes.shard_bytes(dataset))[-6:])
    rows = TokenDataset(dataset).cut(64).total
    most = 0
    with window_stream(server.url, tmp_path, limit, remotes.quick()) as remote:
        assert remote.fingerprint(5 * rows) == local.fingerprint(5 * rows)
        for first in range(0, 5 * rows // 2, 7):
            ours, theirs = remote.read(first, 7), local.read(first, 7)
            for name in ("tokens", "document_ids", "positions", "samples", "source"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
            most = max(most, len(list((tmp_path / "cache").glob("*/*.tar"))))
    assert 3 <= most <= 6
