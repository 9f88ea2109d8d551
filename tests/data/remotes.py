"""Datasets behind a server that misbehaves, and what tests of them ask; a module, by the fixture `remotes`."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.manifest import read_manifest
from potamos.data.remote import RemoteShards, Retry

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


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)
    return value
