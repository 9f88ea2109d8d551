"""Documents to token shards: every input read, tokenized and written as a part, then all parts made one dataset.

Inputs are shared out to any number of processes. The work grows in the folder ``<out>.prepare`` (`WorkFolder`), which
a killed process leaves such that the same command goes on; the dataset takes its name in one rename at the end. Its
bytes are a function of the documents, the tokenizer and the sizes alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.dedup import bits_of, find_duplicates, save_array
from potamos.data.errors import DatasetError, SourceError
from potamos.data.finalize import (
    DATASET_SETTINGS,
    finalize,
    holds_dataset,
    is_sound,
    read_datasets,
    read_groups,
    refuse_other_things,
    remove_published,
)
from potamos.data.job import Job, Meter, Progress, same_files
from potamos.data.manifest import Manifest
from potamos.data.parts import hash_entry, hash_input, hash_table, is_hashed, is_written, write_part
from potamos.data.shards import CHUNK_TOKENS, token_dtype
from potamos.data.sources import MAX_BAD_RATIO, MAX_LINE_BYTES, Input, Source, open_source
from potamos.data.tokenizer import Tokenizer
from potamos.data.workfolder import Lock, WorkFolder, differences, place_of, poll, read_json

__all__ = ["Progress", "Share", "finalize", "prepare", "prepare_parts"]

WAIT = 600.0


@dataclass(frozen=True)
class Share:
    """What one process of ``world`` was asked for."""

    out: Path
    rank: int
    world: int
    inputs: int  # of this process
    inputs_total: int
    kept: bool  # an equal dataset was there already, so that nothing had to be done


def prepare(
    source: str | os.PathLike[str] | Source,
    split: str,
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    shard_chunks: int | None = None,
    max_bad_ratio: float = MAX_BAD_RATIO,
    max_line_bytes: int = MAX_LINE_BYTES,
    deduplicate: bool = False,
    wait: float = WAIT,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Write the dataset ``out`` from a corpus in this one process: `prepare_parts` with all inputs, then `finalize`.

    Arguments and errors are those of `prepare_parts`.
    """
    prepare_parts(
        source, split, tokenizer, out, chunk_tokens=chunk_tokens, shard_chunks=shard_chunks,
        max_bad_ratio=max_bad_ratio, max_line_bytes=max_line_bytes, deduplicate=deduplicate, wait=wait, force=force,
        progress=progress,
    )  # fmt: skip
    (manifest,) = finalize(out, force=force, wait=wait).values()
    return manifest


def prepare_parts(
    source: str | os.PathLike[str] | Source,
    split: str,
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    shard_chunks: int | None = None,
    max_bad_ratio: float = MAX_BAD_RATIO,
    max_line_bytes: int = MAX_LINE_BYTES,
    deduplicate: bool = False,
    by: str | None = None,
    rank: int = 0,
    world: int = 1,
    wait: float = WAIT,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Share:
    """Write the parts of every ``world``-th input from ``rank`` on; `finalize` makes a dataset of all parts.

    Parts that are there already are not written again, whoever wrote them: run the same command again after a failure
    or a kill, with the same or another ``world``. An input that fails does not keep the others from being prepared.

    Args:
        source: what `open_source` understands, or a source of your own.
        split: ``train``, ``validation`` or ``all``.
        tokenizer: its end-of-document id closes every document.
        out: the dataset's folder. An equal dataset there is kept; another one is replaced only with ``force``.
        chunk_tokens: stride of the chunks; a row never crosses one.
        shard_chunks: chunks a shard, by default what suits the source.
        max_bad_ratio: share of an input's records that may be bad before it fails.
        max_line_bytes: a longer line, or a larger text file, is a bad record.
        deduplicate: keep only the first of documents with equal texts, over all inputs. Reads every input twice.
        by: a dotted path into the documents' meta, for instance ``meta.pile_set_name``: one dataset a value, in a
            folder each. A document without a value is a bad record.
        wait: seconds to wait for what other processes are at.
        force: replace another dataset, and unfinished work with other settings.

    Bad records are listed in ``<out>.rejects.jsonl``, of an input that failed in ``<out>.prepare/parts``.

    Raises:
        SourceError: nothing to read, or inputs that cannot be read or are too bad; names all of them.
        TokenizerError: the tokenizer loses text or writes its own end-of-document id.
        DatasetError: ``out`` or its work folder hold something else, or other processes' work is waited for in vain.
    """
    if not 0 <= rank < world:
        raise DatasetError(f"rank {rank} of world {world}: ranks are numbered 0 to world - 1")
    out = place_of(out)
    opened = source if not isinstance(source, (str, os.PathLike)) else open_source(
        source, split, max_line_bytes=max_line_bytes
    )  # fmt: skip
    inputs = opened.inputs()
    _check_inputs(opened, inputs)
    job = Job(opened, inputs, tokenizer, chunk_tokens, shard_chunks or opened.shard_chunks, max_bad_ratio, by)
    mine = range(rank, len(inputs), world)
    share = Share(out, rank, world, len(mine), len(inputs), kept=False)
    settings = _settings(job, split, deduplicate)
    refuse_other_things(out)
    remove_published(out)
    if not force and holds_dataset(out) and _is_kept(job, out, settings, mine):
        return Share(out, rank, world, len(mine), len(inputs), kept=True)
    work = WorkFolder(out)
    try:
        with work.joined(settings, replace=force, wait=wait):
            meter = Meter([inputs[number] for number in mine], 2 if deduplicate else 1, progress)
            # A process without inputs has no reason to wait for the others' hashes.
            counts = _find_duplicates(job, work, mine, meter, wait) if deduplicate and mine else None
            _write_parts(job, work, mine, meter, wait, counts)
    except OSError as error:
        place = error.filename or work.path
        raise DatasetError(
            f"{place}: {error.strerror or error}; nothing half written has a final name: mend this and run the same "
            f"command again, which goes on with what is finished"
        ) from error
    return share


def _check_inputs(source: Source, inputs: Sequence[Input]) -> None:
    if not inputs:
        raise SourceError(f"the source {source.description} has nothing to read")
    for input in inputs:
        if not input.name.isprintable():  # nor are bytes that are no UTF-8
            raise SourceError(f"the file name {input.name!r} cannot be written down as text; rename the file")


def _settings(job: Job, split: str, deduplicate: bool) -> dict[str, Any]:
    """What all processes must agree on, in terms of JSON; part of it goes into dataset.json."""
    tokenizer = job.tokenizer
    settings = {
        "source": job.source.description,
        "split": split,
        "tokenizer": {
            "kind": tokenizer.kind,
            "sha256": tokenizer.sha256,
            "vocabulary": tokenizer.vocabulary,
            "end_of_document": tokenizer.end_of_document,
        },
        "dtype": token_dtype(tokenizer.vocabulary).str,
        "chunk_tokens": job.chunk_tokens,
        "shard_chunks": job.shard_chunks,
        "deduplicated": deduplicate,
        "by": job.by,
        "inputs": [input.name for input in job.inputs],
    }
    return json.loads(json.dumps(settings))  # as it is read back, for instance tuples as lists


def _is_kept(job: Job, out: Path, settings: dict[str, Any], mine: Sequence[int]) -> bool:
    """Whether the dataset at ``out`` is the one asked for, and whole; this process looks at its own inputs.

    Raises:
        DatasetError: it is another one.
    """
    remedy = "choose another place or --force"
    try:
        groups = read_groups(out)
        fields = groups or read_datasets(out)[out].fields
    except DatasetError as error:
        raise DatasetError(f"{out} holds a dataset that cannot be read ({error}); {remedy}") from None
    parts = fields["inputs"] if groups else fields["parts"]
    names = [part["input" if groups else "name"] for part in parts]
    there = {**{key: fields.get(key) for key in DATASET_SETTINGS}, "by": fields.get("by"), "inputs": names}
    if there != settings:
        raise DatasetError(f"{out} already holds another dataset ({differences(there, settings)}); {remedy}")
    for number in mine:
        input, files = job.inputs[number], parts[number]["files"]
        if not input.files:
            return False  # texts that are in no file: only preparing them again tells
        if not same_files(job.source, input, files):
            raise DatasetError(f"{out} already holds a dataset of other texts: {input.name} has changed; {remedy}")
    return is_sound(out)


# --- the two stages ----------------------------------------------------------------------------------------------


def _write_parts(
    job: Job, work: WorkFolder, mine: Sequence[int], meter: Meter, wait: float, counts: list[int] | None
) -> None:
    meter.begin("tokenizing")
    found = np.load(work.duplicates, mmap_mode="r", allow_pickle=False) if counts is not None else None

    def write(number: int) -> None:
        if found is None or counts is None:
            write_part(job, work, number, meter, None, None)
        else:
            hashed = read_json(hash_entry(work, number))
            write_part(job, work, number, meter, bits_of(found, counts, number), hashed)

    _each(job, mine, meter, is_done=lambda number: is_written(job, work, number), lock=work.part_lock, do=write,
          wait=wait)  # fmt: skip


def _find_duplicates(job: Job, work: WorkFolder, mine: Sequence[int], meter: Meter, wait: float) -> list[int]:
    """Hash this process's inputs, wait for the others' hashes, and compare all; returns the documents of each input."""
    meter.begin("hashing")
    _each(job, mine, meter, is_done=lambda number: is_hashed(job, work, number), lock=work.hash_lock,
          do=lambda number: hash_input(job, work, number, meter), wait=wait)  # fmt: skip
    missing: list[int] = list(range(len(job.inputs)))
    for _ in poll(wait):
        missing = [number for number in missing if not hash_entry(work, number).exists()]
        if not missing:
            break
    if missing:
        raise DatasetError(
            f"duplicates can only be found when all inputs are hashed; after {wait:.0f} s there is still nothing of "
            f"{_some(job.inputs, missing)}. Their processes are still at it, have failed, or were not started: run the "
            f"same command again to go on"
        )
    counts = [read_json(hash_entry(work, number))["documents"] for number in range(len(job.inputs))]
    for _ in poll(wait):
        with work.duplicates_lock().holding() as turn:
            if work.duplicates.exists():
                return counts
            if turn:
                tables = [hash_table(work, number) for number in range(len(job.inputs))]
                save_array(work.duplicates, find_duplicates(tables, counts))
                return counts
    raise DatasetError(
        f"another process is still comparing documents after {wait:.0f} s; run the same command again to go on"
    )


def _each(
    job: Job,
    numbers: Sequence[int],
    meter: Meter,
    *,
    is_done: Callable[[int], bool],
    lock: Callable[[int], Lock],
    do: Callable[[int], None],
    wait: float,
) -> None:
    """Do what is not done for every input; one that another process is at comes last.

    Raises:
        SourceError: inputs that failed, after all others were done.
        DatasetError: another process did not come to an end with an input.
    """
    failed: dict[int, SourceError] = {}

    def attempt(number: int) -> bool:
        with lock(number).holding() as mine:
            if not mine:
                return False
            try:
                if not is_done(number):
                    do(number)
                meter.finish(job.inputs[number])
            except SourceError as error:
                failed[number] = error
            return True

    busy = [number for number in numbers if not attempt(number)]
    for _ in poll(wait if busy else 0.0):
        busy = [number for number in busy if not attempt(number)]
        if not busy:
            break
    if failed:
        raise _failure(job.inputs, failed)
    if busy:
        raise DatasetError(
            f"another process is still at work on {_some(job.inputs, busy)} after {wait:.0f} s; run the same command "
            f"again when it has ended"
        )


def _failure(inputs: Sequence[Input], failed: dict[int, SourceError]) -> SourceError:
    if len(inputs) == 1:
        return next(iter(failed.values()))
    listed = "".join(f"\n  {error}" for error in failed.values())
    return SourceError(
        f"{len(failed)} of {len(inputs)} inputs failed; what others gave is kept, so mend these and run the same "
        f"command again:{listed}"
    )


def _some(inputs: Sequence[Input], numbers: Sequence[int]) -> str:
    names = ", ".join(inputs[number].name for number in numbers[:10])
    return f"{names} and {len(numbers) - 10} more inputs" if len(numbers) > 10 else names
