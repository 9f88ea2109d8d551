"""What attention should reach on one H100 or H200, and how a measured table answers.

Bounds for the plain cases follow the published figures of FlashAttention-2, Triton, cuDNN and FlashAttention-3 (Shah
et al., "FlashAttention-3", 2024; H100 SXM, 16K tokens, 2048 channels). The ratios are to torch's kernels in the same
run. Where no figure is published, a case must not be slower than what its users have without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .goals import Goal

Row = Mapping[str, Any]
Value = Callable[[Sequence[Row]], float | None]
FORWARD, BACKWARD = "forward", "backward"
FROM_2K = (2048, 4096, 8192, 16_384)
FROM_4K = FROM_2K[1:]


def figures(rows: Iterable[Row], column: str, form: str, lengths: Iterable[int], **where: Any) -> list[float]:
    """A column's values, one a length, of the rows of `form` that agree with `where`; empty if one is missing."""
    chosen = {**where, "form": form}
    found = {row["length"]: row[column] for row in rows if all(row[name] == value for name, value in chosen.items())}
    values = [found.get(length, "") for length in lengths]
    return [] if "" in values else [float(value) for value in values]


def _least(lengths: Iterable[int], **where: Any) -> Value:
    """TFLOP/s of ours at the worst length."""
    return lambda rows: min(figures(rows, "tflops", "triton", lengths, **where), default=None)


def _over(peer: str, lengths: Iterable[int], causal: Iterable[bool] = (True,), **where: Any) -> Value:
    """Times faster than a peer, at the worst length."""

    def value(rows: Sequence[Row]) -> float | None:
        ratios = []
        for kind in causal:
            theirs, ours = (figures(rows, "ms", f, lengths, causal=kind, **where) for f in (peer, "triton"))
            if not (theirs and ours):
                return None
            ratios += [a / b for a, b in zip(theirs, ours, strict=True)]
        return min(ratios)

    return value


def _memory(rows: Sequence[Row]) -> float | None:
    return max(
        (
            float(row["extra_over_lse_and_dq"])
            for row in rows
            if row["case"] == "plain" and row.get("extra_over_lse_and_dq", "") != ""
        ),
        default=None,
    )


def _window(rows: Sequence[Row]) -> float | None:
    """TFLOP/s over the pairs that a window leaves, as a share of the plain causal kernel's."""
    where = {"head_dim": 128, "causal": True, "direction": FORWARD}
    window, plain = (figures(rows, "tflops", "triton", [16_384], case=case, **where) for case in ("window", "plain"))
    return window[0] / plain[0] if window and plain else None


def _plain() -> Iterable[Goal]:
    h128, h64 = ({"case": "plain", "head_dim": dim} for dim in (128, 64))
    forward: dict[str, Any] = {"direction": FORWARD}
    name = "forward, causal, head 128, L >= 4K"
    yield Goal(f"{name}: times torch flash", 1.0, None, None, False, _over("flash", FROM_4K, **h128, **forward))
    yield Goal(f"{name}: TFLOP/s", None, 400, 520, False, _least(FROM_4K, causal=True, **h128, **forward))
    yield Goal(f"{name}: times torch cuDNN", None, 0.75, 0.95, False, _over("cudnn", FROM_4K, **h128, **forward))
    name = "forward, causal, head 64, L >= 2K"
    yield Goal(f"{name}: times torch flash", 1.0, None, None, False, _over("flash", FROM_2K, **h64, **forward))
    yield Goal(f"{name}: TFLOP/s", None, 330, None, False, _least(FROM_2K, causal=True, **h64, **forward))
    yield Goal(f"{name}: times torch cuDNN", None, None, 0.95, False, _over("cudnn", FROM_2K, **h64, **forward))
    for where, rate in ((h128, 310), (h64, 280)):
        backward = {**where, "direction": BACKWARD}
        name = f"backward, head {where['head_dim']}, L >= 4K"
        both = (True, False)
        yield Goal(f"{name}: times torch flash", 0.85, 1.0, None, False, _over("flash", FROM_4K, both, **backward))
        rates = _least(FROM_4K, causal=False, **backward)
        yield Goal(f"{name}, not causal: TFLOP/s", None, rate, 420, False, rates)
        yield Goal(f"{name}: times torch cuDNN", None, None, 0.85, False, _over("cudnn", FROM_4K, both, **backward))


def _others() -> Iterable[Goal]:
    yield Goal("memory beside outputs and gradients / (lse and dq in fp32), most", 1.0, None, None, True, _memory)
    for direction in (FORWARD, BACKWARD):
        way: dict[str, Any] = {"direction": direction}
        packed = _over("padded flash", [16_384], case="documents", **way)
        yield Goal(f"packed documents, {direction}: times padded rows by torch flash", 1.0, None, None, False, packed)
        eager = _over("eager", (512, 1024, 2048, 4096), (False,), case="deberta", **way)
        yield Goal(f"DeBERTa, {direction}, L = 512..4K: times eager torch", 1.0, None, None, False, eager)
        alibi = _over("in memory", [4096], case="alibi", **way)
        yield Goal(f"ALiBi, {direction}, L = 4K: times torch with the bias in memory", 1.0, None, None, False, alibi)
    name = "window of 1K in 16K, forward: TFLOP/s as a share of plain causal"
    yield Goal(name, 0.5, None, None, False, _window)
    for heads in (16, 4):
        decode = _over("flash", (1024, 4096, 16_384, 65_536), case="decode", kv_heads=heads, direction=FORWARD)
        name = f"decoding, {heads} kv heads, cache of 1K..64K: times torch flash"
        yield Goal(name, 1.0, None, None, False, decode)
    rotary = _over("torch", [4096], case="rotary", head_dim=128, direction=FORWARD)
    yield Goal("rotary: times torch's form", 1.0, None, None, False, rotary)


GOALS = (*_plain(), *_others())
