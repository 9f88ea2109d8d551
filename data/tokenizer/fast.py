"""Byte-level byte-pair encoding by ``tiktoken``, several times as fast as Hugging Face's and with the same ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# GPT-2's pre-tokenisation. The alternatives that a plain automaton can run stand in one group, for which the engine
# then enters its backtracking part once per match; that is a third faster than the usual form. `\s++$` keeps a long
# run of white space at the end of a text, which is where `slices` leaves it, from being walked with a stack.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
_TASK_CHARACTERS = 65_536  # texts of a thread's task: enough that handing it over costs nothing beside it


class BytePairEncoder:
    """Encodes with GPT-2's pattern and ``ranks``: the id of each byte string, lower ids merged first."""

    def __init__(self, ranks: dict[bytes, int]):
        import tiktoken

        # A special token is never recognised here, but the library searches for an empty pattern where there is none.
        special = {"<|endoftext|>": max(ranks.values()) + 1}
        self._encoding = tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32."""
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """Ids of each text; one thread encodes in the caller's."""
        tasks = list(_tasks(texts))
        if threads == 1 or len(tasks) < 2:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(min(threads, len(tasks))) as pool:  # the library releases the interpreter's lock
            done = pool.map(lambda task: [self.encode(text) for text in task], tasks)
            return [ids for part in done for ids in part]


def _tasks(texts: Sequence[str]) -> Iterator[list[str]]:
    task: list[str] = []
    size = 0
    for text in texts:
        task.append(text)
        size += len(text)
        if size >= _TASK_CHARACTERS:
            yield task
            task, size = [], 0
    if task:
        yield task
