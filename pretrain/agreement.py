"""What all ranks must have alike, the data, and how one that cannot read them takes the others along.

A rank that raises by itself leaves the others waiting in a collective. So a failure to read is kept until the next
collective that is there anyway, and rows without text take the place of those that are missing until then.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from potamos.data.dataset import TokenDataset
from potamos.data.errors import DatasetError
from potamos.data.loader import Loader, Rows, TokenStream
from potamos.parallel import launch

if TYPE_CHECKING:
    from potamos.pretrain.setup import Validation

END = 2**62  # beyond every sample: a fingerprint at this place covers all stages


class Reader:
    """A loader's rows; blank ones, and ``failure``, from where it fails on."""

    def __init__(self, loader: Loader, length: int) -> None:
        self._loader, self._length = loader, length
        self.failure: Exception | None = None

    def rows(self) -> Rows:
        """This rank's rows of the next global batch."""
        if self.failure is None:
            try:
                return next(self._loader)
            except Exception as error:  # raised by whoever asks all ranks for it, as itself
                self.failure = error
        return blank_rows(self._loader.sequences // self._loader.world, self._length)


def blank_rows(count: int, length: int) -> Rows:
    """``count`` rows of one document of zeros: their targets have the names of real ones, which is all they are for."""
    tokens = np.zeros((count, length + 1), np.int32)
    positions = np.tile(np.arange(length + 1, dtype=np.int32), (count, 1))
    return Rows(tokens, np.zeros_like(tokens), positions, np.arange(count), np.zeros(count, np.int32))


def check_same_data(stream: TokenStream, validation: list[Validation]) -> None:
    """Make sure that every rank reads what rank 0 reads, shards left out included: one node's copy may be an older one.

    Raises:
        DatasetError: on a rank that reads something else; the others raise its message.
    """
    datasets = [*stream.datasets, *(held_out.windows.dataset for held_out in validation)]
    mine = launch.together(lambda: [stream.fingerprint(END), *map(_identity, datasets)])
    theirs = launch.broadcast_object(mine)
    launch.together(lambda: _compare(mine, theirs, datasets))


def _identity(dataset: TokenDataset) -> list[object]:
    return [dataset.fingerprint, list(dataset.dropped)]


def _compare(mine: list, theirs: list, datasets: list[TokenDataset]) -> None:
    if mine == theirs:
        return
    different = "; ".join(_differences(mine[1:], theirs[1:], datasets)) or "the order of samples"
    raise DatasetError(
        f"the data on {socket.gethostname()} are not rank 0's: {different}; give every node the same files"
    )


def _differences(mine: list, theirs: list, datasets: list[TokenDataset]) -> Iterator[str]:
    for (fingerprint, dropped), (their_fingerprint, their_dropped), dataset in zip(mine, theirs, datasets, strict=True):
        if dropped != their_dropped:
            yield f"dataset {dataset.path} lacks the shards {dropped or 'none'} here, {their_dropped or 'none'} there"
        elif fingerprint != their_fingerprint:
            yield f"dataset {dataset.path} has fingerprint {fingerprint[:12]} here, {their_fingerprint[:12]} there"
