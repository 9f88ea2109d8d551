"""The certificate: a layout changes nothing, shown parameter by parameter.

The recipe's model, made small, takes three steps in one process and spread over ranks. Compared are what a mistake can
hide in: each parameter's gradient before clipping, the norm that clips, what two steps of the optimizer did to each
parameter, the losses, and the bits of every piece that several ranks hold. Losses alone prove nothing: clipping and
Adam make them blind to any factor of the gradient.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from potamos.parallel.facts import Layout
from potamos.parallel.local import RankError, run_ranks
from potamos.parallel.mesh import LayoutError, sizes
from potamos.pretrain import environment
from potamos.pretrain.config import fingerprint
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.verify_layouts import PLAIN, matrix, spell, world_of
from potamos.pretrain.verify_small import Reductions, cp_kinds, make_small

Precision = Literal["fp32", "fp64"]


@dataclass(frozen=True)
class Tolerances:
    """Largest relative errors that pass. gradient: also of norms and losses; update: of two optimizer steps. zero: of a
    gradient that is zero but for rounding, against the whole gradient's norm."""

    gradient: float
    update: float
    zero: float
    floor: float = 1e-6
    """A gradient's error is measured against its own norm, or this share of the whole gradient's if that is larger."""


TOLERANCES: dict[Precision, Tolerances] = {
    "fp32": Tolerances(1e-5, 1e-3, float(np.finfo(np.float32).eps)),
    "fp64": Tolerances(1e-10, 1e-9, float(np.finfo(np.float64).eps)),
}

UNSEEN = (
    "adds one number to all scores of a query, which a softmax does not see: its gradient is zero but for rounding, "
    "and of rounding Adam makes steps of any size"
)
ZERO_GRADIENTS = {
    "mixer.k.bias": UNSEEN,
    "mixer.positions.norm.bias": UNSEEN,  # of disentangled attention whose positions are keys only
}
"""Parameters, by the end of their names, that are judged otherwise where their gradient is in fact zero, and why: it
must be zero to rounding, and its update may differ."""


@dataclass(frozen=True)
class Line:
    """One parameter. exempt: why it is judged as a gradient of zero, or None. note: what is wrong beside the errors."""

    name: str
    gradient_norm: float
    gradient_error: float
    update_error: float
    gradient_passed: bool
    update_passed: bool
    exempt: str | None = None
    note: str | None = None

    @property
    def passed(self) -> bool:
        return self.gradient_passed and self.update_passed and self.note is None


@dataclass(frozen=True)
class Scalars:
    """Numbers of one process and of the ranks, one for each step; error is the largest relative one."""

    alone: list[float]
    spread: list[float]
    error: float
    passed: bool


@dataclass(frozen=True)
class Certificate:
    """What `verify` found. scores: of held-out rows, after the last step. failures: in words, why it did not pass.
    device, versions, date (UTC): on what, with what and when."""

    recipe: str
    fingerprint: str
    layout: str
    ranks: int
    dtype: Precision
    tolerances: Tolerances
    reductions: Sequence[str]
    lines: Sequence[Line]
    norms: Scalars
    losses: Scalars
    scores: Scalars
    failures: Sequence[str]
    seconds: float
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def worst_gradient(self) -> Line:
        return max(self._judged, key=lambda line: _order(line.gradient_error))

    @property
    def worst_update(self) -> Line:
        return max(self._judged, key=lambda line: _order(line.update_error))

    @property
    def _judged(self) -> Sequence[Line]:
        return [line for line in self.lines if line.exempt is None] or self.lines

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that JSON does not have (NaN, infinities) as text."""
        return _plain({"passed": self.passed, **asdict(self)})


@dataclass(frozen=True)
class Without:
    """A layout of which there is no certificate. possible: false where the recipe cannot have it, which is no failure.
    why: in a line; told: all that is known of it, with the ranks' tracebacks."""

    layout: str
    why: str
    possible: bool
    told: str = ""


class VerifyTimeout(ValueError):
    """The ranks did not end in time: they wait for each other, or had too little of it."""


def verify(
    recipe: Recipe,
    layout: Layout,
    *,
    dtype: Precision = "fp32",
    reductions: Reductions | None = None,
    timeout: float = 120.0,
) -> Certificate:
    """Compare ``layout`` with one process on a small copy of ``recipe``, on CPU ranks of this machine.

    timeout: seconds for the ranks, after which they are killed and their stacks shown.

    Raises:
        LayoutError: the recipe, as it stands, cannot be spread so.
        ReductionError: no small copy keeps what the layout divides.
        RankTimeout: the ranks wait for each other.
    """
    began = time.perf_counter()
    small = make_small(recipe, layout, reductions or Reductions())
    return verify_small(small.recipe, layout, dtype=dtype, said=small.said, timeout=timeout, began=began, of=recipe)


def verify_small(
    recipe: Recipe,
    layout: Layout,
    *,
    dtype: Precision = "fp32",
    said: Sequence[str] = (),
    timeout: float = 120.0,
    began: float | None = None,
    of: Recipe | None = None,
    ranks: Callable[..., list[Any]] = run_ranks,
) -> Certificate:
    """The same for a recipe that is small already, as it stands."""
    import torch

    from potamos.pretrain.verify_steps import train_spread

    began = time.perf_counter() if began is None else began
    world = world_of(layout)
    alone = definition(recipe, dtype, timeout)
    found = ranks(world, train_spread, recipe, layout, getattr(torch, _TORCH[dtype]), timeout=timeout)
    lines, (norms, losses, scores), failures = compare(alone, found, TOLERANCES[dtype])
    return Certificate(
        recipe=(of or recipe).name,
        fingerprint=fingerprint(of or recipe),
        layout=spell(layout),
        ranks=sizes(layout, world).world,
        dtype=dtype,
        tolerances=TOLERANCES[dtype],
        reductions=said,
        lines=lines,
        norms=norms,
        losses=losses,
        scores=scores,
        failures=failures,
        seconds=time.perf_counter() - began,
        device=environment.processor(),
        versions={**environment.versions(), "torch": torch.__version__},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


_TORCH: dict[Precision, str] = {"fp32": "float32", "fp64": "float64"}


@lru_cache(maxsize=16)
def _definition(text: str, dtype: Precision, timeout: float) -> Any:
    import torch

    from potamos.pretrain.config import parse_recipe
    from potamos.pretrain.verify_steps import train_alone

    (record,) = run_ranks(1, train_alone, parse_recipe(text), getattr(torch, _TORCH[dtype]), timeout=timeout)
    return record


def definition(recipe: Recipe, dtype: Precision, timeout: float = 120.0) -> Any:
    """What one process does. The same for every layout that has equally many rows, so kept for the next."""
    from potamos.pretrain.config import to_yaml

    return _definition(to_yaml(recipe), dtype, timeout)


def verify_all(
    recipe: Recipe,
    base: Layout = PLAIN,
    *,
    ranks: int = 8,
    dtype: Precision = "fp32",
    reductions: Reductions | None = None,
    timeout: float = 120.0,
) -> Iterator[Certificate | Without]:
    """A certificate for each layout of the matrix, or why there is none; what breaks under one ends no other."""
    for layout in matrix(cp_kinds(recipe), ranks, base):
        try:
            yield verify(recipe, layout, dtype=dtype, reductions=reductions, timeout=timeout)
        except LayoutError as error:
            yield Without(spell(layout), str(error), possible=False)
        except Exception as error:  # of the ranks, which have ended: theirs may be of any kind
            yield Without(spell(layout), _reason(error), possible=True, told="".join(traceback.format_exception(error)))


def _reason(error: Exception) -> str:
    """In a line; with the kind of error where it is no user's mistake."""
    line = (str(error).splitlines() or [""])[0]
    return line if isinstance(error, ValueError | RankError) else f"{type(error).__name__}: {line}"


def precision(name: str) -> Precision:
    """The name of a precision, checked."""
    if name not in TOLERANCES:
        raise ValueError(f"--dtype {name}: choose one of {', '.join(TOLERANCES)}")
    return name


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(
    alone: Any, found: Sequence[Any], tolerances: Tolerances
) -> tuple[list[Line], tuple[Scalars, Scalars, Scalars], list[str]]:
    """One process's record against those of all ranks: lines; norms, losses, scores; and what failed in words."""
    total = math.sqrt(sum(float(np.square(g).sum()) for g in alone.gradients.values()))
    lines = [_line(name, alone, found, total, tolerances) for name in alone.gradients]
    norms = _scalars(alone.norms, [record.norms for record in found], tolerances.gradient)
    losses = _scalars(alone.losses, [record.losses for record in found], tolerances.gradient)
    scores = _scalars(alone.scores, [record.scores for record in found], tolerances.gradient)
    failures = []
    for what, bad in (
        ("gradients differ", [line.name for line in lines if not line.gradient_passed]),
        ("updates differ", [line.name for line in lines if not line.update_passed]),
        ("not the same on all ranks, or not held as it should be", [line.name for line in lines if line.note]),
    ):
        if bad:
            failures.append(f"{what}: {len(bad)} of {len(lines)} parameters, first {bad[0]}")
    unknown = sorted({name for record in found for name in record.start} - set(alone.gradients))
    if unknown:
        failures.append(f"parameters that one process does not have: {', '.join(unknown)}")
    if not norms.passed:
        failures.append(f"the gradient's norm differs: {norms.alone[0]:.6g} alone, {norms.spread[0]:.6g} spread")
    if not losses.passed:
        failures.append(f"losses differ: {_numbers(losses.alone)} alone, {_numbers(losses.spread)} spread")
    if not scores.passed:
        failures.append(
            f"scores of held-out rows differ: {_numbers(scores.alone)} alone, {_numbers(scores.spread)} spread"
        )
    return lines, (norms, losses, scores), failures


def _line(name: str, alone: Any, found: Sequence[Any], total: float, tolerances: Tolerances) -> Line:
    gradient, update = alone.gradients[name], alone.updates[name]
    size, moved = _norm(gradient), _norm(update)
    scale = max(size, tolerances.floor * total)
    holders = [record for record in found if name in record.gradients]
    errors = [_norm(_minus(record.gradients[name], gradient)) for record in holders]
    changes = [_norm(_minus(record.updates[name], update)) for record in holders]
    error, change = _largest(errors), _largest(changes)
    reason = next((why for end, why in ZERO_GRADIENTS.items() if name.endswith(end)), None)
    exempt = reason if size <= tolerances.floor * total else None
    allowed = tolerances.gradient * scale if exempt is None else tolerances.zero * total
    return Line(
        name=name,
        gradient_norm=size,
        gradient_error=_ratio(error, scale),
        update_error=_ratio(change, moved),
        gradient_passed=bool(error <= allowed),  # so written that NaN does not pass
        update_passed=exempt is not None or bool(change <= tolerances.update * moved),
        exempt=exempt,
        note=_note(name, alone, found, holders),
    )


def _note(name: str, alone: Any, found: Sequence[Any], holders: Sequence[Any]) -> str | None:
    if not holders:
        return "on no rank"
    if any(record.start[name] != alone.start[name] for record in holders):
        return "begins with other values than in one process"
    pieces: dict[tuple[str, int, int], set[str]] = {}
    for record in found:
        for piece, bits in record.copies.items():
            if piece[0] == name:
                pieces.setdefault(piece, set()).add(bits)
    if any(len(bits) > 1 for bits in pieces.values()):
        return "copies on several ranks have come to differ"
    return None


def _scalars(alone: list[float], spread: Sequence[list[float]], tolerance: float) -> Scalars:
    errors = [abs(b - a) / abs(a) if a else abs(b) for record in spread for a, b in zip(alone, record, strict=True)]
    worst = _largest(errors)
    told = max(spread, key=lambda record: _order(_largest([abs(b - a) for a, b in zip(alone, record, strict=True)])))
    return Scalars(alone, told, worst, bool(worst <= tolerance))


def _minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - b if a.shape == b.shape else np.full(1, np.nan)


def _norm(x: np.ndarray) -> float:
    return math.sqrt(float(np.square(x).sum()))


def _largest(errors: Iterable[float]) -> float:
    """The largest; NaN if any is, infinity if there is none."""
    errors = list(errors)
    if any(math.isnan(error) for error in errors):
        return math.nan
    return max(errors, default=math.inf)


def _ratio(error: float, scale: float) -> float:
    return error / scale if scale else (0.0 if error == 0.0 else math.inf)


def _order(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.9g}" for value in values)


# --- writing ---------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_certificates(path: Path, certificates: Sequence[Certificate], without: Sequence[Without] = ()) -> None:
    """All of them as one JSON file. ``refused``: layouts that the recipe cannot have, with the reason; ``broken``:
    those that ended otherwise, with all that is known."""
    from potamos.files import write_atomically

    broken = {one.layout: one.told or one.why for one in without if one.possible}
    document = {
        "passed": all(certificate.passed for certificate in certificates) and not broken,
        "certificates": [certificate.to_json() for certificate in certificates],
        "refused": {one.layout: one.why for one in without if not one.possible},
        "broken": broken,
    }
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
