"""Reading URLs: one opener per scheme, bounded retries for what may pass, no credential in any message.

http and https go through the standard library, whose timeouts and status codes are exact. Every other scheme that
fsspec has an implementation of (s3 with s3fs, gs with gcsfs, memory, file, ...) goes through fsspec, and what is left
through WebDataset's own handlers (gs by gsutil, hf, ais, sftp, ...), with its environment variables GOPEN_REWRITE and
USE_AIS_FOR and its switch against local access.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import importlib
import os
import random
import select
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, BinaryIO

from potamos.data.errors import DatasetError

BLOCK_BYTES = 1 << 20
_PASSING = {408, 425, 429}  # of the 4xx status codes; every 5xx may pass


class RemoteError(DatasetError):
    """Something behind a URL cannot be had: it does not exist, access is refused, or it kept failing."""


class _Lasting(Exception):
    """An attempt failed in a way that no further attempt will mend."""


@dataclass(frozen=True)
class Retry:
    """How often to try, how long to wait between attempts, and how long to wait for the next byte.

    The wait before attempt k is ``first * 2^(k-1)`` seconds, at most ``longest``, times a random factor from 1/2 to 1,
    so that the ranks of a job do not all come back at once.
    """

    attempts: int = 6
    first: float = 0.5
    longest: float = 30.0
    timeout: float = 60.0
    sleep: Callable[[float], Any] = time.sleep
    jitter: Callable[[], float] = random.random

    def wait(self, failed: int) -> float:
        """Seconds to wait after this many failures."""
        return min(self.longest, self.first * 2.0 ** (failed - 1)) * (0.5 + 0.5 * self.jitter())


def join(url: str, name: str) -> str:
    """The URL of a file in a folder; a query (an access token of a storage) stays behind it."""
    folder, mark, query = url.partition("?")
    if url.startswith(("http:", "https:")):  # other storages take names as they are
        name = urllib.parse.quote(name)
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def shown(url: str) -> str:
    """A URL without what may be secret: user, password and query."""
    for secret in _secrets(url):
        url = url.replace(secret, "...")
    return url


def _secrets(url: str) -> list[str]:
    """User and password, and the query, of a URL; by hand, since `urllib.parse` rebuilds unknown schemes otherwise."""
    folder, _, query = url.partition("?")
    user = folder.partition("://")[2].partition("/")[0].rpartition("@")[0]
    return [secret for secret in (user, query) if secret]


def read_url(url: str, retry: Retry, *, limit: int = 1 << 30) -> bytes:
    """A whole small file.

    Raises:
        RemoteError: naming the URL, the attempts and the last reason.
    """
    content = bytearray()

    def attempt() -> None:
        content.clear()
        for block in blocks(url, retry.timeout):
            content.extend(block)
            if len(content) > limit:
                raise _Lasting(f"it has more than {limit} bytes")

    try_again(attempt, url, retry)
    return bytes(content)


def download(url: str, file: BinaryIO, retry: Retry, *, size: int, sha256: str, check: Callable[[], None]) -> None:
    """Fetch a file of known size and hash into an open one; ``check`` is called per block and may raise.

    Raises:
        RemoteError: naming the URL, the attempts and the last reason.
    """

    def attempt() -> None:
        file.seek(0)
        digest, got = hashlib.sha256(), 0
        with contextlib.closing(blocks(url, retry.timeout)) as coming:
            for block in coming:
                check()
                got += len(block)
                if got > size:
                    break
                digest.update(block)
                try:
                    file.write(block)
                except OSError as error:
                    raise RemoteError(f"{file.name} cannot be written: {error.strerror}; see to data.cache") from None
        if got != size:
            raise OSError(f"{'more than ' * (got > size)}{min(got, size)} of {size} bytes came")
        if digest.hexdigest() != sha256:
            raise OSError(f"sha256 {digest.hexdigest()[:12]}... came, dataset.json lists {sha256[:12]}...")

    try_again(attempt, url, retry)


def try_again(attempt: Callable[[], None], url: str, retry: Retry) -> None:
    """Run ``attempt`` until it succeeds, fails for good, or has failed ``retry.attempts`` times."""
    for failed in range(1, retry.attempts + 1):
        try:
            return attempt()
        except RemoteError:
            raise
        except (_Lasting, FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise RemoteError(f"{shown(url)} cannot be had: {_reason(error, url)}; {_remedy(error)}") from None
        except (OSError, http.client.HTTPException) as error:  # timeouts and resets are kinds of OSError
            reason = _reason(error, url)
        if failed < retry.attempts:
            retry.sleep(retry.wait(failed))
    raise RemoteError(
        f"{shown(url)} cannot be had: {retry.attempts} attempts failed, the last with: {reason}; see to the storage or "
        f"the network, then start the run again"
    )


def blocks(url: str, timeout: float) -> Generator[bytes, None, None]:
    """The bytes behind a URL; ends early only with an error where the server says how long the file is."""
    url = _rewritten(url)
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme == "pipe":
        raise _Lasting("a pipe is one stream, not a folder with files")
    if not _is_ais(scheme) and scheme in ("http", "https"):
        return _http_blocks(url, timeout)
    if not _is_ais(scheme):
        try:
            return _fsspec_blocks(url)
        except (ImportError, ValueError) as error:
            if scheme not in _gopen().gopen_schemes:
                raise _Lasting(str(error)) from None
    return _gopen_blocks(url, timeout)


def _http_blocks(url: str, timeout: float) -> Generator[bytes, None, None]:
    parts = urllib.parse.urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)))
    request.add_header("User-Agent", "potamos")
    if credentials:
        token = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if 400 <= error.code < 500 and error.code not in _PASSING:
            raise _Lasting(f"status {error.code} {error.reason}") from None
        raise OSError(f"status {error.code} {error.reason}") from None
    with response:
        expected, got = response.length, 0
        while block := response.read1(BLOCK_BYTES):  # what is there: who waits for a whole block hears of nothing else
            got += len(block)
            yield block
        if expected is not None and got != expected:  # http.client gives what came before a cut without an error
            raise OSError(f"{got} of {expected} bytes came")


def _fsspec_blocks(url: str) -> Generator[bytes, None, None]:
    import fsspec

    fs, path = fsspec.url_to_fs(url)

    def read() -> Generator[bytes, None, None]:
        try:
            with fs.open(path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
        except OSError:
            raise
        except Exception as error:  # storages' own errors (of aiohttp, botocore, google-auth) have no common base
            raise OSError(f"{type(error).__name__}: {error}") from None

    return read()


def _gopen_blocks(url: str, timeout: float) -> Generator[bytes, None, None]:
    gopen = _gopen()
    stream = gopen.gopen(url, "rb")
    if not isinstance(stream, gopen.Pipe):
        with stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
        return
    # The handlers start a command and read its output, without a limit of time. WebDataset's own error would show the
    # command, and with it tokens.
    stream.timeout = timeout
    output = stream.proc.stdout
    try:
        while True:
            if not select.select([output], [], [], timeout)[0]:
                stream.proc.kill()
                raise TimeoutError(f"nothing came for {timeout:g} s")
            block = os.read(output.fileno(), BLOCK_BYTES)
            if not block:
                break
            yield block
    finally:
        output.close()
        if stream.proc.poll() is None:
            try:
                stream.proc.wait(timeout)
            except subprocess.TimeoutExpired:
                stream.proc.kill()
                stream.proc.wait()
    if stream.proc.returncode:
        raise OSError(f"its command ended with status {stream.proc.returncode}")


def _gopen() -> Any:
    # The submodule's name is shadowed by the function in WebDataset's package.
    return importlib.import_module("webdataset.gopen")  # late, because WebDataset imports torch


def _is_ais(scheme: str) -> bool:
    """Whether the user sends a scheme through an AIStore cache."""
    return scheme in os.environ.get("USE_AIS_FOR", "").split(":")


def _rewritten(url: str) -> str:
    if "GOPEN_REWRITE" not in os.environ:
        return url
    try:
        return _gopen().rewrite_url(url)
    except ValueError as error:
        raise _Lasting(str(error)) from None


def _reason(error: BaseException, url: str) -> str:
    """An error's words without the secret parts of the URL."""
    text = f"{error}" or type(error).__name__
    written = _secrets(url)
    written += [part for secret in written for part in secret.split(":", 1)[1:] if part]  # libraries take users apart
    for secret in written:
        text = text.replace(secret, "...").replace(urllib.parse.unquote(secret), "...")
    return text


def _remedy(error: BaseException) -> str:
    if isinstance(error, PermissionError) or "status 401" in str(error) or "status 403" in str(error):
        return "see to the credentials of its storage"
    return "check the URL, and that its storage's Python package is installed"
