"""What a checkpoint keeps of a stream: one number, and a fingerprint of what the samples before it were read from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from potamos.data.errors import StateMismatchError

STATE_VERSION = 2
PARTS = ("tokenizer", "seed", "sequence_length", "boundaries", "order", "stages", "skip")


def fingerprint(content: Mapping[str, Any]) -> str:
    """A hash of ``content``, then a short hash of each of its `PARTS`, so that a mismatch can be told by name."""
    assert content.keys() == set(PARTS)
    whole = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    parts = [hashlib.sha256(json.dumps(content[part]).encode()).hexdigest()[:8] for part in PARTS]
    return "-".join([whole, *parts])


def check_state(state: Mapping[str, Any], fingerprint_at: Callable[[int], str]) -> int:
    """Make sure that a saved state continues the stream whose fingerprints these are; returns its next sample.

    Raises:
        StateMismatchError: naming both fingerprints and the parts that differ.
    """
    sample = state.get("next_sample")
    if state.get("version") != STATE_VERSION or type(sample) is not int or sample < 0:
        raise StateMismatchError(
            f"data state {dict(state)} is not of version {STATE_VERSION} with a next_sample; begin a new run"
        )
    theirs, mine = str(state.get("fingerprint")), fingerprint_at(sample)
    if theirs != mine:
        pairs = zip(PARTS, theirs.split("-")[1:], mine.split("-")[1:], strict=False)
        differ = [part for part, a, b in pairs if a != b] or ["everything"]
        remedy = "restore the recipe's data section or begin a new run"
        if differ == ["skip"]:
            remedy = f"only samples from {sample} on can still be skipped: restore the ranges before it"
        raise StateMismatchError(
            f"the checkpoint's data differ from the recipe's in: {', '.join(differ)} (fingerprint {theirs} there, "
            f"{mine} here, at sample {sample}); {remedy}"
        )
    return sample
