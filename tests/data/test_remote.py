"""Shards behind URLs: fetched once, proven, bounded in number, and never skipped, whatever the network does."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.server
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.fetch import join, shown
from potamos.data.files import ShardFiles
from potamos.data.loader import SourceSpec, StageSpec, TokenStream
from potamos.data.manifest import read_manifest
from potamos.data.remote import CacheSpec, RemoteError, RemoteShards, Retry

LENGTHS = [90, 700, 33, 1500, 8, 1100, 256, 900, 40, 2500] * 2
CHUNK = 512
SHARDS = 14


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; ``trouble`` holds, by file name, what to do wrong with the next requests for it."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.trouble, self.asked = root, {}, Counter()
        self.delay, self.headers = 0.0, []
        self.release = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Cut connections are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        path = self.path.partition("?")[0].lstrip("/")
        with server.lock:
            server.asked[path.rpartition("/")[2]] += 1
            server.headers.append((self.path.partition("?")[2], self.headers["Authorization"]))
            troubles = server.trouble.get(path.rpartition("/")[2], [])
            trouble = troubles.pop(0) if troubles else None
        time.sleep(server.delay)
        if isinstance(trouble, int):
            return self.send_error(trouble)
        if isinstance(trouble, str) and trouble.startswith("http"):
            self.send_response(302)
            self.send_header("Location", f"{trouble}{self.path}")
            return self.end_headers()
        try:
            content = (server.root / path).read_bytes()
        except OSError:
            return self.send_error(404)
        if trouble == "wrong":
            content = bytes([content[0] ^ 1]) + content[1:]
        if trouble == "short":
            content = content[:-7]
        self.send_response(200)
        if trouble == "endless":
            self.end_headers()
            while not server.release.wait(0.001):
                self.wfile.write(bytes(1 << 20))
            return None
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if trouble == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        if trouble == "stall":
            self.wfile.write(content[:100])
            server.release.wait(20)
            return None
        self.wfile.write(content)
        return None

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("GOPEN_REWRITE", raising=False)
    monkeypatch.delenv("USE_AIS_FOR", raising=False)


@pytest.fixture(scope="module")
def dataset(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_ids(tmp_path_factory.mktemp("remote") / "d", LENGTHS, chunk_tokens=CHUNK)
    assert len(read_manifest(path).shards) == SHARDS
    return path


@pytest.fixture
def server(dataset: Path) -> Iterator[Server]:
    server = Server(dataset)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


class Waits:
    """In place of sleeping between attempts: remembers how long it should have been."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def quick(attempts: int = 4, timeout: float = 10.0) -> Retry:
    return Retry(attempts=attempts, timeout=timeout, sleep=Waits(), jitter=lambda: 1.0)


def shard_bytes(dataset: Path) -> list[int]:
    return [entry["bytes"] + entry["index_bytes"] for entry in read_manifest(dataset).shards]


Open = Callable[..., RemoteShards]


@pytest.fixture
def open_remote(tmp_path: Path, dataset: Path) -> Iterator[Open]:
    """RemoteShards with a cache that holds ``shards`` shards, closed at the end."""
    opened: list[RemoteShards] = []

    def make(url: str, shards: float = SHARDS, retry: Retry | None = None, patience: float = 20.0) -> RemoteShards:
        limit = int(shards * max(shard_bytes(dataset)))
        cache = CacheSpec(tmp_path / "cache", limit, retry=retry or quick())
        opened.append(RemoteShards(url, cache, patience=patience))
        return opened[-1]

    yield make
    for files in opened:
        files.close()


def present(files: RemoteShards) -> list[str]:
    return sorted(path.name for path in files.folder.glob("*.tar"))


def same(files: RemoteShards, dataset: Path, shard: int) -> bool:
    path = files.path(shard)
    index = path.with_name(path.name + ".idx")
    return all(file.read_bytes() == (dataset / file.name).read_bytes() for file in (path, index))


def every_row(dataset: TokenDataset, length: int = 64) -> tuple[np.ndarray, ...]:
    cut = dataset.cut(length)
    chunk, start = cut.place(np.arange(cut.total))
    return read_rows([dataset], np.zeros(cut.total, np.int64), chunk, start, length + 1, true_positions=True)


def test_rows_over_http_equal_local_ones(server: Server, dataset: Path, open_remote: Open) -> None:
    files = open_remote(server.url)
    remote = TokenDataset(files.folder, files=files)
    local = TokenDataset(dataset)
    assert remote.fingerprint == local.fingerprint
    for ours, theirs in zip(every_row(remote), every_row(local), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert server.asked == {"dataset.json": 1} | {
        name: 1 for entry in read_manifest(dataset).shards for name in (entry["name"], entry["name"] + ".idx")
    }


def test_opening_fetches_no_shard(server: Server, open_remote: Open) -> None:
    files = open_remote(server.url)
    TokenDataset(files.folder, files=files)
    assert set(server.asked) == {"dataset.json"}


@pytest.mark.parametrize("trouble", [503, 500, 429, "cut", "wrong", "short"])
def test_what_may_pass_is_tried_again(server: Server, dataset: Path, open_remote: Open, trouble: Any) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = [trouble, trouble]
    retry = quick()
    assert same(open_remote(server.url, retry=retry), dataset, 0)
    assert server.asked[name] == 3
    assert isinstance(retry.sleep, Waits)
    assert retry.sleep.seconds == [0.5, 1.0]


def test_a_stalled_connection_is_given_up_and_tried_again(server: Server, dataset: Path, open_remote: Open) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = ["stall"]
    assert same(open_remote(server.url, retry=quick(timeout=0.3)), dataset, 0)
    assert server.asked[name] == 2


def test_a_file_without_an_end_is_given_up(server: Server, dataset: Path, open_remote: Open) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = ["endless"]
    timer = threading.Timer(15, server.release.set)
    timer.start()
    assert same(open_remote(server.url), dataset, 0)
    assert not server.release.is_set()
    timer.cancel()


def test_another_host_hears_no_password(server: Server, dataset: Path, open_remote: Open) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = [server.url.replace("127.0.0.1", "localhost")]
    assert same(open_remote(server.url.replace("http://", "http://me:pass-word@")), dataset, 0)
    assert server.asked[name] == 2
    assert [authorization is None for _, authorization in server.headers].count(True) == 1


def test_dataset_json_is_tried_again_too(server: Server, dataset: Path, open_remote: Open) -> None:
    server.trouble["dataset.json"] = [503, "cut"]
    assert open_remote(server.url).manifest.fingerprint == read_manifest(dataset).fingerprint


@pytest.mark.parametrize(
    ("trouble", "said"),
    [(503, "status 503"), ("cut", "bytes came"), ("wrong", "sha256"), ("short", "bytes came"), ("stall", "timed out")],
)
def test_remote_read_that_keeps_failing_is_an_error_with_url_attempts_and_reason(
    server: Server, dataset: Path, open_remote: Open, trouble: Any, said: str
) -> None:
    name = read_manifest(dataset).shards[2]["name"]
    server.trouble[name] = [trouble] * 99
    files = open_remote(server.url, retry=quick(attempts=3, timeout=0.2 if trouble == "stall" else 10))
    with pytest.raises(RemoteError, match="3 attempts failed") as caught:
        files.path(2)
    assert f"{server.url}/{name}" in str(caught.value)
    assert said in str(caught.value)
    assert server.asked[name] == 3
    assert present(files) == []
    assert not list(files.folder.glob(".*partial"))


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (403, 1), (401, 1), (410, 1), (408, 4), (502, 4)])
def test_what_lasts_is_not_tried_again(
    server: Server, dataset: Path, open_remote: Open, status: int, attempts: int
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


def test_remote_read_fails_mid_window(server: Server, dataset: Path, tmp_path: Path) -> None:
    """A shard in the middle of a window is gone for good: an error when its rows are due, not a row less."""
    name = read_manifest(dataset).shards[7]["name"]
    server.trouble[name] = [503] * 999
    with window_stream(server.url, tmp_path, sum(shard_bytes(dataset)), quick(attempts=2)) as stream:
        rows = TokenDataset(dataset).cut(64).total

        def read_all() -> None:
            for first in range(0, rows, 8):
                stream.read(first, 8)

        with pytest.raises(RemoteError, match=f"{name}.*2 attempts failed.*503"):
            read_all()
        server.trouble.clear()
        assert len(stream.read(0, rows)) == rows  # the network is back: nothing was lost


def test_a_failure_ahead_surfaces_when_the_shard_is_needed(server: Server, dataset: Path, open_remote: Open) -> None:
    names = [entry["name"] for entry in read_manifest(dataset).shards]
    server.trouble[names[1]] = [503] * 99
    files = open_remote(server.url, retry=quick(attempts=2))
    files.prefetch([0, 1, 2])
    wait_for(lambda: present(files) == [names[0], names[2]] and server.asked[names[1]] == 2)
    assert same(files, dataset, 2)
    with pytest.raises(RemoteError, match=names[1]):
        files.path(1)
    server.trouble.clear()
    assert same(files, dataset, 1)


def test_fetching_ahead_is_used(server: Server, dataset: Path, open_remote: Open) -> None:
    files = open_remote(server.url)
    files.prefetch(range(6))
    wait_for(lambda: len(present(files)) == 6)
    before = server.asked.copy()
    assert all(same(files, dataset, shard) for shard in range(6))
    assert server.asked == before


def test_the_folder_never_outgrows_its_limit(server: Server, dataset: Path, open_remote: Open) -> None:
    files = open_remote(server.url, shards=4)
    sizes = shard_bytes(dataset)
    limit, seen = files.cache.bytes, set()
    for shard in [*range(SHARDS), 3, 13, 0]:
        assert same(files, dataset, shard)
        lying = [path for path in files.folder.iterdir() if path.is_file() and path.name != "dataset.json"]
        assert sum(path.stat().st_size for path in lying) <= limit
        seen.add(len(present(files)))
    assert max(seen) == 4
    assert sum(sizes) > 3 * limit


def test_as_many_go_as_a_shard_needs(server: Server, dataset: Path, open_remote: Open) -> None:
    sizes = shard_bytes(dataset)
    small, *_, one, two = sorted(range(SHARDS), key=sizes.__getitem__)
    files = open_remote(server.url, shards=1.999)
    assert sizes[small] + sizes[one] <= files.cache.bytes < sizes[one] + sizes[two]
    for shard in (small, one, two):
        assert same(files, dataset, shard)
        files.keep([])
        time.sleep(0.02)
    assert present(files) == [read_manifest(dataset).shards[two]["name"]]


def test_the_least_recently_needed_shard_goes_first(server: Server, dataset: Path, open_remote: Open) -> None:
    names = [entry["name"] for entry in read_manifest(dataset).shards]
    files = open_remote(server.url, shards=3)
    for shard in (0, 1, 2, 0, 3):  # 0 again: 1 is now the oldest
        files.path(shard)
        files.keep([])
        time.sleep(0.02)
    assert present(files) == [names[0], names[2], names[3]]


def test_kept_shards_stay(server: Server, dataset: Path, open_remote: Open) -> None:
    names = [entry["name"] for entry in read_manifest(dataset).shards]
    files = open_remote(server.url, shards=3)
    files.keep([0, 1])
    for shard in (0, 1, 2, 3, 4, 5):
        files.path(shard)
    assert present(files) == [names[0], names[1], names[5]]
    files.keep([5, 6])
    files.path(6)
    files.path(7)
    assert {names[5], names[6], names[7]} == set(present(files))


def test_a_limit_below_two_windows_is_refused_with_both_numbers(
    server: Server, dataset: Path, open_remote: Open
) -> None:
    files = open_remote(server.url, shards=3)
    needed = sum(shard_bytes(dataset)[:4])
    with pytest.raises(RemoteError, match=f"{files.cache.bytes} cannot hold two windows of shards, {needed} bytes"):
        files.keep([0, 1, 2, 3])
    assert files.window_bytes(2) == sum(sorted(shard_bytes(dataset))[-4:])


def test_a_limit_below_one_shard_is_refused(server: Server, dataset: Path, open_remote: Open) -> None:
    with pytest.raises(RemoteError, match=f"below the {max(shard_bytes(dataset))} bytes of one shard"):
        open_remote(server.url, shards=0.5)


def test_what_a_failed_fetch_left_takes_no_room(server: Server, dataset: Path, open_remote: Open) -> None:
    """The index came, the tar did not, and both together fill the cache to its last byte."""
    sizes = shard_bytes(dataset)
    largest = sizes.index(max(sizes))
    server.trouble[read_manifest(dataset).shards[largest]["name"]] = [503] * 2
    files = open_remote(server.url, shards=1, retry=quick(attempts=2), patience=0.5)
    with pytest.raises(RemoteError, match="503"):
        files.path(largest)
    assert same(files, dataset, largest)


def test_no_room_is_an_error_after_patience(server: Server, open_remote: Open) -> None:
    other = open_remote(server.url, shards=3)
    other.keep([0, 1, 2])
    for shard in (0, 1, 2):
        other.path(shard)
    files = open_remote(server.url, shards=3, patience=0.2)
    with pytest.raises(RemoteError, match=r"no room for .* are in use; raise it"):
        files.path(9)
    other.close()
    files.path(9)


def test_a_waiting_fetch_ahead_does_not_block_what_is_needed(server: Server, dataset: Path, open_remote: Open) -> None:
    """Room is taken up by shards fetched ahead: what is needed now takes theirs."""
    files = open_remote(server.url, shards=3)
    files.prefetch(range(10))
    wait_for(lambda: len(present(files)) == 3)
    assert same(files, dataset, 12)
    assert same(files, dataset, 5)


def test_close_ends_the_threads_even_between_attempts(server: Server, dataset: Path, tmp_path: Path) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = [503] * 99
    cache = CacheSpec(tmp_path / "cache", 10**9, retry=Retry(first=30.0))
    files = RemoteShards(server.url, cache)
    files.prefetch([0])
    wait_for(lambda: server.asked[name] == 1)
    begun = time.monotonic()
    files.close()
    assert time.monotonic() - begun < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "shard-fetcher"]
    with pytest.raises(RemoteError, match="closed"):
        files.path(1)


def test_threads_and_openers_of_one_process_fetch_a_shard_once(
    server: Server, dataset: Path, open_remote: Open
) -> None:
    server.delay = 0.05
    both = [open_remote(server.url), open_remote(server.url)]
    problems: list[BaseException] = []

    def reader(files: RemoteShards) -> None:
        try:
            assert all(same(files, dataset, shard) for shard in range(5))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=reader, args=(files,)) for files in both for _ in range(2)]
    for files in both:
        files.prefetch(range(5))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    names = [entry["name"] for entry in read_manifest(dataset).shards[:5]]
    assert [server.asked[name] for name in names] == [1] * 5


READER = """
import sys
from potamos.data.remote import CacheSpec, RemoteShards, Retry
url, folder, limit, shards = sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(s) for s in sys.argv[4].split(",")]
files = RemoteShards(url, CacheSpec(folder, limit, retry=Retry(first=0.01)))
files.prefetch(shards)
for shard in shards:
    print(files.path(shard).stat().st_size, flush=True)
"""


def start_reader(url: str, cache: Path, limit: int, shards: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, url, str(cache), str(limit), shards]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_a_cache(server: Server, dataset: Path, tmp_path: Path) -> None:
    server.delay = 0.02
    wanted = list(range(SHARDS))
    order = ",".join(map(str, wanted))
    readers = [start_reader(server.url, tmp_path / "cache", 10**9, order) for _ in range(2)]
    results = [reader.communicate(timeout=60) for reader in readers]
    sizes = [entry["bytes"] for entry in read_manifest(dataset).shards]
    for reader, (out, err) in zip(readers, results, strict=True):
        assert reader.returncode == 0, err
        assert list(map(int, out.split())) == sizes
    assert [server.asked[entry["name"]] for entry in read_manifest(dataset).shards] == [1] * SHARDS


def test_two_processes_share_a_limit(server: Server, dataset: Path, tmp_path: Path) -> None:
    limit = 5 * max(shard_bytes(dataset))
    orders = (",".join(map(str, range(SHARDS))), ",".join(map(str, reversed(range(SHARDS)))))
    readers = [start_reader(server.url, tmp_path / "cache", limit, order) for order in orders]
    largest = 0
    while any(reader.poll() is None for reader in readers):
        with contextlib.suppress(FileNotFoundError):  # files come and go while they are listed
            files = [p for p in (tmp_path / "cache").glob("*/*") if ".tar" in p.name]
            largest = max(largest, sum(path.stat().st_size for path in files if path.is_file()))
        time.sleep(0.005)
    for reader in readers:
        _, err = reader.communicate()
        assert reader.returncode == 0, err
    assert 0 < largest <= limit


def test_a_kill_while_fetching_leaves_nothing_partial(server: Server, dataset: Path, tmp_path: Path) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = ["stall"]
    reader = start_reader(server.url, tmp_path / "cache", 10**9, "0")
    (folder,) = wait_for(lambda: list((tmp_path / "cache").glob("[!.]*/")))
    partial = folder / f".{name}.partial"
    wait_for(lambda: partial.exists() and server.asked[name] == 1)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    assert partial.exists()
    assert not (folder / name).exists()
    again = start_reader(server.url, tmp_path / "cache", 10**9, "0,1")
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert (folder / name).read_bytes() == (dataset / name).read_bytes()
    assert not list(folder.glob(".*partial"))


def test_what_a_killed_process_left_makes_room(server: Server, dataset: Path, tmp_path: Path) -> None:
    """Its leases ended with it, and its unfinished files count and go."""
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = ["stall"]
    limit = 2 * max(shard_bytes(dataset))
    reader = start_reader(server.url, tmp_path / "cache", limit, "1,0")
    wait_for(lambda: server.asked[name] == 1)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    again = start_reader(server.url, tmp_path / "cache", limit, "4,5,6")
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert not list((tmp_path / "cache").glob("*/.*partial"))


def test_a_shard_may_go_while_it_is_mapped(server: Server, dataset: Path, open_remote: Open) -> None:
    files = open_remote(server.url, shards=2)
    remote, local = TokenDataset(files.folder, files=files), TokenDataset(dataset)
    one = read_first_row(remote)
    for shard in range(5, 9):
        files.path(shard)
    assert read_manifest(dataset).shards[0]["name"] not in present(files)
    np.testing.assert_array_equal(read_first_row(remote), one)
    np.testing.assert_array_equal(one, read_first_row(local))


def read_first_row(dataset: TokenDataset) -> np.ndarray:
    zero = np.zeros(1, np.int64)
    return read_rows([dataset], zero, zero, zero, 65)[0]


def test_no_secret_is_shown(server: Server, dataset: Path, open_remote: Open) -> None:
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


def test_window_order_over_http_equals_the_local_one(server: Server, dataset: Path, tmp_path: Path) -> None:
    """Two epochs and a half, a few requests failing, the cache at its least, and never more than two windows there."""
    for number, entry in enumerate(read_manifest(dataset).shards):
        server.trouble[entry["name"]] = [503, "cut"][: number % 3]
    local = TokenStream([StageSpec(0, (SourceSpec(dataset),))], sequence_length=64, seed=3, order="window", window=3)
    limit = sum(sorted(shard_bytes(dataset))[-6:])
    rows = TokenDataset(dataset).cut(64).total
    most = 0
    with window_stream(server.url, tmp_path, limit, quick()) as remote:
        assert remote.fingerprint(5 * rows) == local.fingerprint(5 * rows)
        for first in range(0, 5 * rows // 2, 7):
            ours, theirs = remote.read(first, 7), local.read(first, 7)
            for name in ("tokens", "document_ids", "positions", "samples", "source"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
            most = max(most, len(list((tmp_path / "cache").glob("*/*.tar"))))
    assert 3 <= most <= 6


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)
    return value
