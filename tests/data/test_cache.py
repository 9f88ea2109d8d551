"""What processes that share a cache agree on, where one ends in the middle or the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potamos.data import cache as cache_module
from potamos.data.cache import Lease, Space
from potamos.data.errors import DatasetError
from potamos.data.manifest import read_manifest
from potamos.data.remote import CacheSpec, RemoteShards


@pytest.fixture(scope="module")
def dataset(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids(tmp_path_factory.mktemp("cache") / "d", [700, 900, 40], chunk_tokens=512)


def test_a_lease_that_ends_while_leases_are_counted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = tmp_path / "d" / "leases"
    leases.mkdir(parents=True)
    space, staying, ending = Space(tmp_path, 10), Lease(tmp_path / "d"), Lease(tmp_path / "d")
    staying.write(["one"])
    ending.write(["two"])
    for name in ("one", "two"):
        (tmp_path / "d" / name).write_bytes(b"12345")
    took = cache_module._lock

    def lock(descriptor: int, path: Path, *, wait: bool) -> bool:
        mine = took(descriptor, path, wait=wait)
        if path == ending._path:
            ending.close()  # between the look at its lock and the look into it
        return mine

    monkeypatch.setattr(cache_module, "_lock", lock)
    with space.held():
        assert not space.free(6)
        assert space.free(5)
    assert (tmp_path / "d" / "one").exists()
    assert not (tmp_path / "d" / "two").exists()
    staying.close()


def test_a_file_system_without_locks(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        DatasetError, match=r"space\.lock cannot be locked \(No locks available\); put data\.cache\.path"
    ):
        RemoteShards(dataset.as_uri(), CacheSpec(tmp_path / "cache", 10**9))


class Dripping(http.server.SimpleHTTPRequestHandler):
    """Sends a tar byte by byte, far more slowly than anybody would wait, but never silent for long."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = source.read()
        begun = time.monotonic()
        while self.path.endswith(".tar") and time.monotonic() - begun < 20:
            outputfile.write(content[:1])
            time.sleep(0.05)
        outputfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def dripping(dataset: Path) -> Iterator[str]:
    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Cut connections are part of the test."""

    server = Server(("127.0.0.1", 0), lambda *given: Dripping(*given, directory=str(dataset)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_close_does_not_wait_for_a_dripping_server(
    dripping: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    files = RemoteShards(dripping, CacheSpec(tmp_path / "cache", 10**9))
    files.prefetch([0])
    claimed = files.folder / f".{read_manifest(dataset).shards[0]['name']}.partial"
    while not claimed.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    begun = time.monotonic()
    files.close()
    assert time.monotonic() - begun < 5
