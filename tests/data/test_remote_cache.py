"""The cache of shards behind URLs: bounded, shared by threads and processes, whole after any kill."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.manifest import read_manifest
from potamos.data.remote import RemoteError, RemoteShards

pytestmark = pytest.mark.usefixtures("no_proxy")
Open = Callable[..., RemoteShards]


def test_the_folder_never_outgrows_its_limit(server: Any, dataset: Path, open_remote: Open, remotes: Any) -> None:
    files = open_remote(server.url, shards=4)
    sizes = remotes.shard_bytes(dataset)
    limit, seen = files.cache.bytes, set()
    for shard in [*range(remotes.SHARDS), 3, 13, 0]:
        assert remotes.same(files, dataset, shard)
        lying = [path for path in files.folder.iterdir() if path.is_file() and path.name != "dataset.json"]
        assert sum(path.stat().st_size for path in lying) <= limit
        seen.add(len(remotes.present(files)))
    assert max(seen) == 4
    assert sum(sizes) > 3 * limit


def test_as_many_go_as_a_shard_needs(server: Any, dataset: Path, open_remote: Open, remotes: Any) -> None:
    sizes = remotes.shard_bytes(dataset)
    small, *_, one, two = sorted(range(remotes.SHARDS), key=sizes.__getitem__)
    files = open_remote(server.url, shards=1.999)
    assert sizes[small] + sizes[one] <= files.cache.bytes < sizes[one] + sizes[two]
    for shard in (small, one, two):
        assert remotes.same(files, dataset, shard)
        files.keep([])
        time.sleep(0.02)
    assert remotes.present(files) == [read_manifest(dataset).shards[two]["name"]]


def test_the_least_recently_needed_shard_goes_first(
    server: Any, dataset: Path, open_remote: Open, remotes: Any
) -> None:
    names = [entry["name"] for entry in read_manifest(dataset).shards]
    files = open_remote(server.url, shards=3)
    for shard in (0, 1, 2, 0, 3):  # 0 again: 1 is now the oldest
        files.path(shard)
        files.keep([])
        time.sleep(0.02)
    assert remotes.present(files) == [names[0], names[2], names[3]]


def test_kept_shards_stay(server: Any, dataset: Path, open_remote: Open, remotes: Any) -> None:
    names = [entry["name"] for entry in read_manifest(dataset).shards]
    files = open_remote(server.url, shards=3)
    files.keep([0, 1])
    for shard in (0, 1, 2, 3, 4, 5):
        files.path(shard)
    assert remotes.present(files) == [names[0], names[1], names[5]]
    files.keep([5, 6])
    files.path(6)
    files.path(7)
    assert {names[5], names[6], names[7]} == set(remotes.present(files))


def test_a_limit_below_two_windows_is_refused_with_both_numbers(
    server: Any, dataset: Path, open_remote: Open, remotes: Any
) -> None:
    files = open_remote(server.url, shards=3)
    needed = sum(remotes.shard_bytes(dataset)[:4])
    with pytest.raises(RemoteError, match=f"{files.cache.bytes} cannot hold two windows of shards, {needed} bytes"):
        files.keep([0, 1, 2, 3])
    assert files.window_bytes(2) == sum(sorted(remotes.shard_bytes(dataset))[-4:])


def test_a_limit_below_one_shard_is_refused(server: Any, dataset: Path, open_remote: Open, remotes: Any) -> None:
    with pytest.raises(RemoteError, match=f"below the {max(remotes.shard_bytes(dataset))} bytes of one shard"):
        open_remote(server.url, shards=0.5)


def test_what_a_failed_fetch_left_takes_no_room(server: Any, dataset: Path, open_remote: Open, remotes: Any) -> None:
    """The index came, the tar did not, and both together fill the cache to its last byte."""
    sizes = remotes.shard_bytes(dataset)
    largest = sizes.index(max(sizes))
    server.trouble[read_manifest(dataset).shards[largest]["name"]] = [503] * 2
    files = open_remote(server.url, shards=1, retry=remotes.quick(attempts=2), patience=0.5)
    with pytest.raises(RemoteError, match="503"):
        files.path(largest)
    assert remotes.same(files, dataset, largest)


def test_no_room_is_an_error_after_patience(server: Any, open_remote: Open) -> None:
    other = open_remote(server.url, shards=3)
    other.keep([0, 1, 2])
    for shard in (0, 1, 2):
        other.path(shard)
    files = open_remote(server.url, shards=3, patience=0.2)
    with pytest.raises(RemoteError, match=r"no room for .* are in use; raise it"):
        files.path(9)
    other.close()
    files.path(9)


def test_a_waiting_fetch_ahead_does_not_block_what_is_needed(
    server: Any, dataset: Path, open_remote: Open, remotes: Any
) -> None:
    """Room is taken up by shards fetched ahead: what is needed now takes theirs."""
    files = open_remote(server.url, shards=3)
    files.prefetch(range(10))
    remotes.wait_for(lambda: len(remotes.present(files)) == 3)
    assert remotes.same(files, dataset, 12)
    assert remotes.same(files, dataset, 5)


def test_threads_and_openers_of_one_process_fetch_a_shard_once(
    server: Any, dataset: Path, open_remote: Open, remotes: Any
) -> None:
    server.delay = 0.05
    both = [open_remote(server.url), open_remote(server.url)]
    problems: list[BaseException] = []

    def reader(files: RemoteShards) -> None:
        try:
            assert all(remotes.same(files, dataset, shard) for shard in range(5))
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


def test_two_processes_share_a_cache(server: Any, dataset: Path, tmp_path: Path, remotes: Any) -> None:
    server.delay = 0.02
    wanted = list(range(remotes.SHARDS))
    order = ",".join(map(str, wanted))
    readers = [start_reader(server.url, tmp_path / "cache", 10**9, order) for _ in range(2)]
    results = [reader.communicate(timeout=60) for reader in readers]
    sizes = [entry["bytes"] for entry in read_manifest(dataset).shards]
    for reader, (out, err) in zip(readers, results, strict=True):
        assert reader.returncode == 0, err
        assert list(map(int, out.split())) == sizes
    assert [server.asked[entry["name"]] for entry in read_manifest(dataset).shards] == [1] * remotes.SHARDS


def test_two_processes_share_a_limit(server: Any, dataset: Path, tmp_path: Path, remotes: Any) -> None:
    limit = 5 * max(remotes.shard_bytes(dataset))
    orders = (",".join(map(str, range(remotes.SHARDS))), ",".join(map(str, reversed(range(remotes.SHARDS)))))
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


def test_a_kill_while_fetching_leaves_nothing_partial(server: Any, dataset: Path, tmp_path: Path, remotes: Any) -> None:
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = ["stall"]
    reader = start_reader(server.url, tmp_path / "cache", 10**9, "0")
    (folder,) = remotes.wait_for(lambda: list((tmp_path / "cache").glob("[!.]*/")))
    partial = folder / f".{name}.partial"
    remotes.wait_for(lambda: partial.exists() and server.asked[name] == 1)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    assert partial.exists()
    assert not (folder / name).exists()
    again = start_reader(server.url, tmp_path / "cache", 10**9, "0,1")
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert (folder / name).read_bytes() == (dataset / name).read_bytes()
    assert not list(folder.glob(".*partial"))


def test_what_a_killed_process_left_makes_room(server: Any, dataset: Path, tmp_path: Path, remotes: Any) -> None:
    """Its leases ended with it, and its unfinished files count and go."""
    name = read_manifest(dataset).shards[0]["name"]
    server.trouble[name] = ["stall"]
    limit = 2 * max(remotes.shard_bytes(dataset))
    reader = start_reader(server.url, tmp_path / "cache", limit, "1,0")
    remotes.wait_for(lambda: server.asked[name] == 1)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    again = start_reader(server.url, tmp_path / "cache", limit, "4,5,6")
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert not list((tmp_path / "cache").glob("*/.*partial"))


def test_a_shard_may_go_while_it_is_mapped(server: Any, dataset: Path, open_remote: Open, remotes: Any) -> None:
    files = open_remote(server.url, shards=2)
    remote, local = TokenDataset(files.folder, files=files), TokenDataset(dataset)
    one = read_first_row(remote)
    for shard in range(5, 9):
        files.path(shard)
    assert read_manifest(dataset).shards[0]["name"] not in remotes.present(files)
    np.testing.assert_array_equal(read_first_row(remote), one)
    np.testing.assert_array_equal(one, read_first_row(local))


def read_first_row(dataset: TokenDataset) -> np.ndarray:
    zero = np.zeros(1, np.int64)
    return read_rows([dataset], zero, zero, zero, 65)[0]
