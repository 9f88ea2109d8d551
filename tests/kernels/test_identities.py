"""One function, many forms: recurrence, FFT, chunks, slices, ranks, steps and compiled graphs, in fp64 at 1e-10.

Each form of `h3_mix` gives the output and the gradient of every input and parameter; the sum of a fixed random
projection is the loss. The recurrence is the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.diag_ssm import Diagonal
from potamos.kernels.diag_ssm.reference import kernel
from potamos.kernels.diag_ssm.sequence import by_row, by_slice, combine, fold, halos, unfold
from potamos.kernels.flash_conv import h3_mix, h3_mix_step, initial_h3_state
from potamos.kernels.flash_conv.reference import h3_mix_reference
from potamos.kernels.flash_conv.sequence import h3_mix_correct, h3_mix_local, halo_tail
from potamos.kernels.long_conv import long_conv

NAMES = ("log_dt", "log_a", "b", "B", "C")
BATCH, HEADS, LENGTH, TAPS, MODES = 2, 3, 144, 20, 4
RANKS = 3

Values = dict[str, Tensor]
Exchange = Callable[..., tuple[Tensor, ...]]


def arguments(values: Values) -> tuple[Tensor, Tensor, Tensor, Tensor, Diagonal]:
    diag = Diagonal(*(values[name] for name in NAMES), rule="zoh")
    return values["q"], values["k"], values["v"], values["shift"], diag


def rest(values: Values) -> dict[str, Any]:
    return {"d_k": values["d_k"], "d": values["d"]}


def recurrence(values: Values, ids: Tensor | None) -> Tensor:
    return h3_mix_reference(*arguments(values), **rest(values), document_ids=ids)[0]


def chunked(values: Values, ids: Tensor | None) -> Tensor:
    return h3_mix(*arguments(values), **rest(values), document_ids=ids)[0]


def compiled(values: Values, ids: Tensor | None) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(chunked, backend="aot_eager", fullgraph=True)(values, ids)


def fft(values: Values, ids: Tensor | None) -> Tensor:
    """Two long convolutions with gates; packed documents one by one, as an FFT knows none."""
    q, k, v, shift, diag = arguments(values)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shifted = long_conv(k, shift, d=values["d_k"])
        return long_conv(shifted, kernel(diag, k.shape[2]), d=values["d"], pre_gate=v, post_gate=q)

    if ids is None:
        return alone(q, k, v)
    rows = []
    for row in range(BATCH):
        lengths = torch.unique_consecutive(ids[row], return_counts=True)[1].tolist()
        parts = (x[row : row + 1].split(lengths, 2) for x in (q, k, v))
        rows.append(torch.cat([alone(*part) for part in zip(*parts, strict=True)], 2))
    return torch.cat(rows)


def stepped(values: Values, ids: Tensor | None) -> Tensor:
    q, k, v, shift, diag = arguments(values)
    state, outputs = initial_h3_state(BATCH, HEADS, TAPS, diag, dtype=torch.float64), []
    for t in range(LENGTH):
        id_ = None if ids is None else ids[:, t]
        inputs = (q[..., t], k[..., t], v[..., t], shift, diag)
        y, state = h3_mix_step(*inputs, **rest(values), document_ids=id_, state=state)
        outputs.append(y)
    return torch.stack(outputs, 2)


def over_slices(values: Values, ids: Tensor | None, count: int, held: list[int], exchange: Exchange) -> Tensor:
    """`count` slices of this holder, `held` their places; exchange(x (count, ...), ...) gives those of all."""
    q, k, v, shift, diag = arguments(values)
    q, k, v = (fold(x, count) for x in (q, k, v))
    (tails,) = exchange(by_slice(halo_tail(k, TAPS), count))
    before = {"before_k": by_row(halos(tails, k.new_zeros(BATCH, HEADS, TAPS - 1))[held])}
    documents: dict[str, Any] = {}
    if ids is not None:
        rows = fold(ids, count)
        (tails,) = exchange(by_slice(halo_tail(rows, TAPS), count))
        before_ids = by_row(halos(tails, rows.new_full((BATCH, TAPS - 1), -1))[held])
        documents = {"document_ids": rows, "before_ids": before_ids}
    y, end, transition = h3_mix_local(q, k, v, shift, diag, **rest(values), **before, **documents)
    states = combine(*exchange(by_slice(end, count), by_slice(transition, count)))
    return unfold(h3_mix_correct(y, q, diag, by_row(states[held]), **documents), count)


def sliced(values: Values, ids: Tensor | None) -> Tensor:
    return over_slices(values, ids, 4, [0, 1, 2, 3], lambda *states: states)


FORMS = {"fft": fft, "chunked": chunked, "compiled": compiled, "step": stepped, "slices": sliced}


@pytest.fixture
def case(make_diagonal) -> Values:
    diag, d = make_diagonal(HEADS, MODES)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    values = {name: leaf(BATCH, HEADS, LENGTH) for name in "qkv"}
    values |= {"shift": leaf(HEADS, TAPS), "d_k": leaf(HEADS), "d": d}
    return values | {name: getattr(diag, name) for name in NAMES}


def documents() -> Tensor:
    """Starts next to, at and away from the borders of chunks (64) and of slices (24, 36)."""
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    starts[0, [24, 36, 37, 63, 100]] = 1
    starts[1, [64, 71, 72, 73]] = 1
    return starts.cumsum(1).to(torch.int32)


def projection() -> Tensor:
    return torch.randn(BATCH, HEADS, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def check(output: Tensor, gradients: Values, values: Values, ids: Tensor | None, assert_close) -> None:
    want = recurrence(values, ids)
    assert_close(output, want, 1e-10, "y")
    expected = torch.autograd.grad((want * projection()).sum(), list(values.values()))
    for name, reference in zip(values, expected, strict=True):
        assert_close(gradients[name], reference, 1e-10, f"d{name}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_is_the_recurrence(form, packed, case, assert_close):
    ids = documents() if packed else None
    y = FORMS[form](case, ids)
    gradients = torch.autograd.grad((y * projection()).sum(), list(case.values()))
    check(y, dict(zip(case, gradients, strict=True)), case, ids, assert_close)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_ranks_are_the_recurrence(order, packed, case, assert_close, run_ranks):
    from potamos.parallel.context import Slices, held_slices

    ids = documents() if packed else None
    places = [held_slices(order, rank, RANKS) for rank in range(RANKS)]
    count = len(places[0])

    def share(x: Tensor, rank: int) -> Tensor:
        parts = x.detach().chunk(RANKS * count, 2 if x.dim() == 3 else 1)
        return torch.cat([parts[g] for g in places[rank]], -1)

    def work(rank: int, world: int) -> Any:
        slices = Slices(order)
        local = {n: (share(x, rank) if n in "qkv" else x.detach()).requires_grad_() for n, x in case.items()}
        y = over_slices(local, None if ids is None else share(ids, rank), count, slices.held, slices.gather)
        gradients = torch.autograd.grad((y * share(projection(), rank)).sum(), list(local.values()))
        return y.detach(), dict(zip(local, gradients, strict=True))

    results = run_ranks(RANKS, work)
    back = torch.tensor(places).flatten().argsort().tolist()

    def whole(parts: list[Tensor]) -> Tensor:
        pieces = [piece for part in parts for piece in part.chunk(count, 2)]
        return torch.cat([pieces[i] for i in back], 2)

    gradients = {name: [found[name] for _, found in results] for name in case}
    merged = {n: whole(parts) if n in "qkv" else torch.stack(parts).sum(0) for n, parts in gradients.items()}
    check(whole([y for y, _ in results]), merged, case, ids, assert_close)


def test_forms_that_differ_are_told_apart(case, assert_close):
    """What each form would give if it lost one thing must fail the comparison."""
    ids = documents()
    want = recurrence(case, ids)
    zero = {name: torch.zeros_like(case[name]) for name in case}
    wrong = {
        "no documents": chunked(case, None),
        "no D": chunked(case | {"d": zero["d"]}, ids),
        "no D_k": chunked(case | {"d_k": zero["d_k"]}, ids),
        "no state": chunked(case | {"C": zero["C"]}, ids),
        "late": chunked(case, ids).roll(1, 2),
        "zeros": torch.zeros_like(want),
        "no exchange": over_slices(case, ids, 4, [0, 1, 2, 3], lambda *x: tuple(torch.zeros_like(s) for s in x)),
    }
    for name, output in wrong.items():
        with pytest.raises(AssertionError, match="relative rms error"):
            assert_close(output, want, 1e-10, name)
