"""Having the shards of a window at hand before they are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from potamos.data.errors import DatasetError
from potamos.data.remote import RemoteShards
from potamos.data.stages import Stages
from potamos.data.walks import Windowed

CLOSING = 10.0  # seconds that `close` waits for fetches; the threads of one that hangs end with the process


class Lookahead:
    """Tells each dataset which shards are needed now, and which next, as samples are read in order.

    At hand are the window that is being read and the one after it, for each source of the stage that is being read.

    Raises:
        DatasetError: a cache that cannot hold these. Each source would have the others' shards thrown out, and fetch
            its own again for every row.
    """

    def __init__(self, stages: Stages, walks: Sequence[Windowed], window: int):
        self._stages, self._datasets, self._walks = stages, stages.datasets, walks
        # Draws of each dataset from its first window at hand: while others do not come, nothing is to be done.
        self._begin, self._end = np.zeros((2, len(walks)), np.int64)
        for number, stage in enumerate(stages.stages):
            files = [self._datasets[source].files for source in stage.sources]
            remote = [place for place in files if isinstance(place, RemoteShards)]
            needed = sum(place.window_bytes(window) for place in remote)
            if remote and needed > (limit := remote[0].cache.bytes):
                raise DatasetError(
                    f"stage {number}: two windows of {window} shards of its {len(remote)} datasets behind URLs take up "
                    f"to {needed} bytes, data.cache.bytes is {limit}; raise it, or choose a smaller data.window"
                )

    def have(self, samples: np.ndarray, source: np.ndarray, draw: np.ndarray) -> None:
        """Make ready for these samples, ascending, and the draws that they are."""
        away = (draw < self._begin[source]) | (draw >= self._end[source])
        if not away.any():
            return
        used = self._stages.sources(int(samples[0]), int(samples[-1]))
        for number in set(np.flatnonzero(self._end > self._begin).tolist()) - used:  # of a stage that is over
            self._datasets[number].keep([])
            self._begin[number] = self._end[number] = 0
        for number in np.unique(source[away]).tolist():
            draws = draw[source == number]
            self._move(number, int(draws.min()), int(draws.max()))

    def _move(self, number: int, first: int, last: int) -> None:
        """Go on to the window of draw ``first``; drop those before it.

        Only that one counts as at hand, so that draws beyond it come here again. What is kept is two windows, unless
        the draws up to ``last`` lie in more.
        """
        begin = window = self._walks[number].window(first)
        shards = begin.shards.tolist()
        while window is begin or window.end <= last:
            window = self._walks[number].window(window.end)
            shards += window.shards.tolist()
        shards = list(dict.fromkeys(shards))
        self._datasets[number].keep(shards)
        self._datasets[number].files.prefetch(shards)
        self._begin[number], self._end[number] = begin.begin, begin.end

    def close(self) -> None:
        """End what fetches in the background, and wait for it a while: a run that ends must not hang on a server."""
        remote = [dataset.files for dataset in self._datasets if isinstance(dataset.files, RemoteShards)]
        closing = [threading.Thread(target=files.close, name="shard-closer", daemon=True) for files in remote]
        for thread in closing:
            thread.start()
        until = time.monotonic() + CLOSING
        for thread in closing:
            thread.join(max(0.0, until - time.monotonic()))
