"""How fast tokens are read: the loader beside stock WebDataset and a bare memory map, in one run, taking turns.

Speeds are tokens per second of processor time, all threads of the process together, so they hold per core whatever
else the machine does. Every round measures every reader once, each time beginning with another, and the median counts.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.errors import DatasetError
from potamos.data.loader import Loader
from potamos.data.manifest import read_manifest
from potamos.data.stages import SourceSpec, StageSpec
from potamos.data.stream import TokenStream
from potamos.data.synthetic import write_random, write_sparse
from potamos.data.windows import Windows

FAR_SAMPLE = 10**12
MEMBER_TOKENS = 1024  # of the tars of small samples that stock pipelines are usually fed with
_SEED = 17

Measured = tuple[int, float]  # tokens, seconds of processor time


@dataclass(frozen=True)
class BenchRow:
    """One thing measured: ``unit`` is ``Mtok/s/core`` (more is better), ``ms`` or ``s`` (less is better)."""

    name: str
    unit: str
    median: float
    lowest: float
    highest: float
    count: int  # measurements


@dataclass(frozen=True)
class BenchReport:
    """What `bench` measured; ``path`` is None for random tokens."""

    path: Path | None
    batch: int
    length: int
    tokens: int  # that a round reads of the loader
    rows: tuple[BenchRow, ...]


def bench(
    path: Path | None = None,
    *,
    rounds: int = 7,
    batch: int = 8,
    length: int = 2048,
    tokens: int = 24_000_000,
    seconds: float = 0.5,
    shards: int = 2800,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure reading ``batch`` rows of ``length`` tokens at a time.

    Args:
        path: a prepared dataset; by default one of ``tokens`` random tokens is made in a temporary folder.
        rounds: measurements of each reader, after one that does not count.
        batch, length: of what the loader gives.
        tokens: what the loader reads a round, at most; also how much is copied for the readers of other formats.
        seconds: for how long every other reader reads a round.
        shards: of the dataset of holes that the first batch of many shards is taken from.
        progress: told what is being done.

    Raises:
        DatasetError: ``path`` holds no dataset of token chunks, or less than a row.
    """
    tell = progress or (lambda _: None)
    with tempfile.TemporaryDirectory(prefix="potamos-bench-") as temporary:
        folder = Path(temporary)
        tell("writing what is to be read")
        dataset = path if path is not None else write_random(folder / "random", tokens)
        if read_manifest(dataset).layout != "chunks":
            raise DatasetError(f"dataset {dataset} is not of token chunks; name one that `potamos data prepare` wrote")
        readers = _readers(dataset, folder, batch, length, tokens, seconds)
        samples: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(rounds + 1):  # the first fills caches
            tell(f"round {number} of {rounds}")
            turns = itertools.islice(itertools.cycle(readers.items()), number, number + len(readers))
            for name, read in turns:
                count, spent = read()
                if number:
                    samples[name].append(count / spent / 1e6)
        tell(f"seeking to sample {FAR_SAMPLE:,}")
        rows = [_row(name, "Mtok/s/core", figures) for name, figures in samples.items()]
        seeks = _seeks(dataset, batch, length, 4 * rounds)
        rows.append(_row("seek to sample 10^12, first batch", "ms", seeks))
        tell(f"opening {shards:,} shards")
        holes = write_sparse(folder / "holes", shards)
        here = [first_batch(holes, batch, length) for _ in range(rounds)]
        rows.append(_row(f"first batch of {shards:,} shards", "s", here))
        fresh = [_first_batch_elsewhere(holes, batch, length) for _ in range(rounds)]
        rows.append(_row(f"first batch of {shards:,} shards, new process", "s", fresh))
    return BenchReport(path, batch, length, tokens, tuple(rows))


def _row(name: str, unit: str, figures: list[float]) -> BenchRow:
    return BenchRow(name, unit, statistics.median(figures), min(figures), max(figures), len(figures))


def _open(path: Path, length: int, boundaries: str) -> TokenStream:
    stages = [StageSpec(0, (SourceSpec(path),))]
    return TokenStream(stages, sequence_length=length, seed=_SEED, boundaries=boundaries)


# --- readers: each call reads for a while and says how much in what time ----------------------------------


def _readers(
    dataset: Path, folder: Path, batch: int, length: int, tokens: int, seconds: float
) -> dict[str, Callable[[], Measured]]:
    manifest = read_manifest(dataset)
    dtype, shards = manifest.dtype, [str(dataset / shard["name"]) for shard in manifest.shards]
    flat = _copy_flat(dataset, folder / "flat.bin", dtype, tokens)
    members = _copy_members(flat, dtype, folder / "members")
    ids = _LoaderPasses(dataset, batch, length, tokens, "cross")
    documents = _LoaderPasses(dataset, batch, length, tokens, "isolate")
    shape = f"{batch} x {length}"
    return {
        f"loader {shape}, token ids, first pass (checksums made)": ids.first,
        f"loader {shape}, token ids, later passes": ids.later,
        f"loader {shape}, document ids and positions, first pass (checksums made)": documents.first,
        f"loader {shape}, document ids and positions, later passes": documents.later,
        "memory map, random windows of 1,025 to int64": lambda: _random_windows(flat, dtype, seconds),
        "stock webdataset, these shards, decoded": lambda: _for(seconds, _webdataset(shards)),
        f"stock webdataset, these shards, decoded and cut into {shape} in order": (
            lambda: _for(seconds, _batches(shards, batch, length))
        ),
        f"stock webdataset, samples of {MEMBER_TOKENS:,} tokens, decoded": lambda: _for(
            seconds, _webdataset([members])
        ),
    }


class _LoaderPasses:
    """The loader over one dataset, opened anew for each first pass, so that every block is read for the first time."""

    def __init__(self, dataset: Path, batch: int, length: int, tokens: int, boundaries: str):
        self._open: Callable[[], TokenStream] = lambda: _open(dataset, length, boundaries)
        (source,) = self._open().describe()
        self._batch, self._length = batch, length
        self._batches = max(1, min(tokens // length, source.samples_per_epoch) // batch)
        self._stream: TokenStream | None = None

    def first(self) -> Measured:
        self._stream = self._open()
        return self._read(self._stream)

    def later(self) -> Measured:
        if self._stream is None:
            self.first()
        stream, self._stream = self._stream, None
        assert stream is not None
        for block in range(8):  # so that the order of the rows is worked out again too
            stream.read(FAR_SAMPLE + block * 10**6, 1)
        return self._read(stream)

    def _read(self, stream: TokenStream) -> Measured:
        with Loader(stream, sequences=self._batch, allow_repeat=True) as loader:
            begin = time.process_time()
            for _ in range(self._batches):
                next(loader)
            spent = time.process_time() - begin
        return self._batches * self._batch * self._length, spent


def _random_windows(flat: Path, dtype: np.dtype, seconds: float) -> Measured:
    data = np.memmap(flat, dtype, mode="r")
    rng = np.random.default_rng(_SEED)

    def read() -> Iterator[int]:
        while True:
            for start in rng.integers(0, max(1, len(data) - MEMBER_TOKENS), 256).tolist():
                yield len(data[start : start + MEMBER_TOKENS + 1].astype(np.int64))

    return _for(seconds, read())


def _stock(urls: list[str]) -> Iterator[np.ndarray]:
    """Tokens of each sample of a plain pipeline, over and over."""
    from webdataset.compat import WebDataset

    dataset: Any = WebDataset(urls, shardshuffle=False).decode()
    while True:
        for sample in dataset:
            yield sample["tok.npy"]


def _webdataset(urls: list[str]) -> Iterator[int]:
    return map(len, _stock(urls))


def _batches(urls: list[str], batch: int, length: int) -> Iterator[int]:
    """Tokens of each int32 batch of neighbouring rows, each row with the token after it, as the loader's rows have."""
    for tokens in _stock(urls):
        rows = np.lib.stride_tricks.sliding_window_view(tokens, min(length + 1, len(tokens)))[::length]
        for start in range(0, len(rows), batch):
            yield rows[start : start + batch].astype(np.int32)[:, 1:].size


def _for(seconds: float, counts: Iterator[int]) -> Measured:
    next(counts)  # opening is not reading
    begin, until = time.process_time(), time.perf_counter() + seconds
    tokens = 0
    for count in counts:
        tokens += count
        if time.perf_counter() > until:
            break
    return tokens, time.process_time() - begin


def _copy_flat(dataset: Path, flat: Path, dtype: np.dtype, tokens: int) -> Path:
    """The first tokens of a dataset as bare numbers, which leave a memory map nothing to do but to copy."""
    windows = Windows(dataset, sequence_length=MEMBER_TOKENS)
    with open(flat, "wb") as file:
        for start in range(0, min(len(windows), max(1, tokens // MEMBER_TOKENS)), 256):
            rows = windows.read(start, 256)
            kept = rows.tokens[:, :-1][rows.document_ids[:, 1:] >= 0]  # a chunk's last token begins the next
            file.write(kept.astype(dtype).tobytes())
    return flat


def _copy_members(flat: Path, dtype: np.dtype, folder: Path) -> str:
    """The same tokens as one tar of small samples, written by the stock writer."""
    from webdataset.writer import TarWriter

    folder.mkdir()
    data = np.fromfile(flat, dtype)
    path = str(folder / "samples.tar")
    with TarWriter(path) as writer:
        for number, start in enumerate(range(0, max(1, len(data) - MEMBER_TOKENS + 1), MEMBER_TOKENS)):
            writer.write({"__key__": f"{number:08d}", "tok.npy": data[start : start + MEMBER_TOKENS]})
    return path


# --- latencies --------------------------------------------------------------------------------------------


def _seeks(dataset: Path, batch: int, length: int, count: int) -> list[float]:
    """Milliseconds to the first batch of loaders that begin at far samples, each at another."""
    stream = _open(dataset, length, "isolate")
    times = []
    for number in range(count):
        sample = FAR_SAMPLE + number * 10**7
        begin = time.perf_counter()
        with Loader(stream, sequences=batch, next_sample=sample, allow_repeat=True) as loader:
            next(loader)
            times.append(1e3 * (time.perf_counter() - begin))
    return times


def first_batch(path: Path, batch: int, length: int) -> float:
    """Seconds from nothing open to the first batch."""
    begin = time.perf_counter()
    stream = _open(path, length, "isolate")
    with Loader(stream, sequences=batch, allow_repeat=True) as loader:
        next(loader)
        return time.perf_counter() - begin


def _first_batch_elsewhere(path: Path, batch: int, length: int) -> float:
    """The same in a new process, its start and imports included."""
    script = (
        "import sys; from pathlib import Path; from potamos.data.bench import first_batch; "
        "first_batch(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
    )
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", script, str(path), str(batch), str(length)], check=True)
    return time.perf_counter() - begin
