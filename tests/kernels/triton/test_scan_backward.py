"""The backward kernel against fp64 autograd of the equations, chunk by chunk, and through the public operations.

Every test runs on memory that is NaN until written, so that a forgotten store or a read past the end shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from potamos.kernels.diag_ssm import Diagonal, diag_ssm, triton_backward
from potamos.kernels.diag_ssm.documents import Chunks, find_chunks
from potamos.kernels.diag_ssm.triton_backward import ScanGradients, scan_backward
from potamos.kernels.flash_conv import H3State, h3_mix

CHUNK, COLUMNS = 64, 16
SPAN = CHUNK * COLUMNS
ORDER = ("q", "k", "v", "shift", "taps", "read", "write", "decay")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def pairs(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()  # there are no half-precision complex numbers
    return torch.view_as_complex(wide.unflatten(-1, (-1, 2)))


def mixer(x: dict[str, Tensor], documents: Chunks | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y, the state after the last whole chunk, and those before every super-chunk, one chunk after another."""
    v = x["v"]
    (channels, batch, length), dtype = v.shape, v.dtype
    group, chunks = channels // x["taps"].shape[0], -(-length // CHUNK)
    taps, read, write, decay = (x[n].repeat_interleave(group, 0) for n in ("taps", "read", "write", "decay"))
    number = torch.zeros(batch, length) if documents is None else documents.relative
    number = F.pad(number, (0, chunks * CHUNK - length), value=-1)
    goes_on = torch.ones(batch, chunks, dtype=torch.bool) if documents is None else documents.continues.bool()
    lag = torch.arange(CHUNK)[:, None] - torch.arange(CHUNK)
    toeplitz = torch.where(lag >= 0, taps[:, lag.clamp(0)], 0)
    padded = {n: F.pad(x[n], (0, chunks * CHUNK - length)) for n in ("k", "v") if n in x}
    if "k" in x:
        shift = F.pad(x["shift"], (0, CHUNK - x["shift"].shape[1]))
        lower, upper = torch.where(lag >= 0, shift[:, lag.clamp(0)], 0), torch.where(lag < 0, shift[:, lag % CHUNK], 0)
        history = x.get("history", v.new_zeros(channels, batch, 0))
        before, before_number = F.pad(history, (CHUNK - history.shape[2], 0)), torch.zeros(batch, CHUNK)
    state = pairs(x["initial"]) if "initial" in x else pairs(torch.zeros(channels, batch, decay.shape[1], dtype=dtype))
    states, outputs = [], []
    for c in range(chunks):
        here = slice(c * CHUNK, (c + 1) * CHUNK)
        own, ends = number[:, here], number[:, c * CHUNK + CHUNK - 1, None]
        same = (own[:, :, None] == own[:, None, :]).to(dtype)
        carried = ((own == 0) & goes_on[:, c, None]).to(dtype)
        z = padded["v"][:, :, here]
        if "k" in x:
            key = padded["k"][:, :, here]
            from_before = before * (before_number == before_number[:, -1:]).to(dtype)
            shifted = torch.einsum("cij,cbj->cbi", upper, from_before) * carried
            z = z * (shifted + torch.einsum("cij,bij,cbj->cbi", lower, same, key))
            before, before_number = key, own
        states.append(torch.view_as_real(state).flatten(-2))
        seen = torch.einsum("cin,cbn->cbi", read, states[-1].to(dtype)) * carried
        outputs.append(torch.einsum("cij,bij,cbj->cbi", toeplitz, same, z) + seen)
        update = torch.einsum("cjn,cbj->cbn", write, z * (own == ends).to(dtype))
        passes = goes_on[:, c] & (ends[:, 0] == 0)
        state = pairs(update) + torch.where(passes[None, :, None], pairs(decay)[:, None] * state, 0)
    states.append(torch.view_as_real(state).flatten(-2))
    y = torch.cat(outputs, 2)[:, :, :length]
    return x["q"] * y if "q" in x else y, states[length // CHUNK], torch.stack(states[:chunks:COLUMNS], 2)


def make_case(batch=1, heads=2, length=100, group=1, modes=8, taps=64, dtype=torch.float32, absent=()) -> Any:
    """Inputs at unit scale with slow and fast modes, and the gradients of the outputs."""
    channels = heads * group

    def normal(*shape: int, scale=1.0) -> Tensor:
        return scale * torch.randn(*shape)

    sizes = torch.rand(heads, modes) * 0.3 + 0.7
    x = {n: normal(channels, batch, length).to(dtype) for n in "qkv"}
    x |= {"shift": normal(channels, taps, scale=taps**-0.5), "taps": normal(heads, CHUNK, scale=0.125)}
    x |= {n: normal(heads, CHUNK, 2 * modes, scale=0.125) for n in ("read", "write")}
    x["decay"] = torch.view_as_real(torch.polar(sizes, normal(heads, modes))).flatten(-2).contiguous()
    x |= {"initial": normal(channels, batch, 2 * modes), "history": normal(channels, batch, taps - 1).to(dtype)}
    x = {n: value for n, value in x.items() if n not in absent}
    grads = [normal(channels, batch, length).to(dtype), normal(channels, batch, 2 * modes)]
    return x, grads if "final" not in absent else [grads[0], None]


def wanted(x: dict[str, Tensor], grads, documents=None, dtype=torch.float64) -> dict[str, Tensor]:
    leaves = {n: value.to(dtype).requires_grad_() for n, value in x.items()}
    y, final, _ = mixer(leaves, documents)
    loss = (y * grads[0].to(dtype)).sum()
    if grads[1] is not None:
        loss = loss + (final * grads[1]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}


def got(x: dict[str, Tensor], grads, documents=None, **rest) -> ScanGradients:
    with torch.no_grad():
        starts = mixer({n: value.double() for n, value in x.items()}, documents)[2].float()
    inputs = [x.get(n) for n in ORDER]
    return scan_backward(*grads, *inputs, x.get("history"), documents, starts, **rest)  # type: ignore[call-arg]


SSM = ("q", "k", "shift", "history")
CASES = {
    "row": {"length": 1134},
    "rows": {"batch": 3, "heads": 1, "length": 200, "modes": 5, "taps": 7},
    "aligned": {"length": SPAN, "heads": 1, "absent": ("initial", "history")},
    "whole chunks": {"length": 192, "heads": 1, "modes": 32},
    "no final": {"length": 129, "absent": ("final",)},
    "one token": {"length": 1, "absent": ("final",)},
    "ssm": {"heads": 1, "group": 3, "length": 150, "absent": SSM},
}


def check(x: dict[str, Tensor], grads, found: ScanGradients, want: dict[str, Tensor], tolerance: float, close) -> None:
    for name in x:
        close(getattr(found, name), want[name], tolerance, name)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, assert_close):
    torch.manual_seed(0)
    x, grads = make_case(**CASES[name])
    want = wanted(x, grads)
    silent = [n for n in x if not want[n].any()]  # nothing leaves a row's only chunk
    assert set(silent) <= ({"write", "decay"} if name == "one token" else set())
    found = got(x, grads)
    check({n: x[n] for n in x if n not in silent}, grads, found, want, 1e-5, assert_close)
    for n in silent:
        assert not getattr(found, n).any()


@pytest.mark.parametrize("schedule", [(1, 3), (2, 1)])
def test_rows_in_segments(schedule, assert_close):
    """Rows cut in two and three, several of the pieces in one program; the last one shorter."""
    torch.manual_seed(1)
    x, grads = make_case(batch=2, heads=1, length=2 * SPAN + 70)
    check(x, grads, got(x, grads, schedule=schedule), wanted(x, grads), 1e-5, assert_close)


@pytest.mark.parametrize("final", [SPAN, 2 * SPAN, SPAN + 20])
def test_final_state_enters_where_it_was_read(final, assert_close):
    """At the end of a super-chunk, with one segment or two; and where a segment of less than a chunk comes after it."""
    torch.manual_seed(2)
    x, grads = make_case(heads=1, length=final)
    check(x, grads, got(x, grads, schedule=(1, 2)), wanted(x, grads), 1e-5, assert_close)


def documents_at(length: int, *rows: tuple[int, ...]) -> Chunks:
    """Rows of documents that begin at the given tokens; what was before token 0 goes on unless 0 is given."""
    ids = torch.zeros(len(rows), length, dtype=torch.int32)
    for row, starts in enumerate(rows):
        for start in starts:
            ids[row, start:] += 1
    return find_chunks(ids, torch.zeros(len(rows)), CHUNK, COLUMNS)


@pytest.mark.parametrize(
    ("length", "rows", "case"),
    [
        (300, [(22, 36, 120, 123, 200), (0, 64, 299)], {}),
        (SPAN + 70, [(100, SPAN - 3), (300, SPAN + 10)], {"taps": 5}),
        (300, [(70, 75)], {"group": 2, "absent": (*SSM, "initial")}),
    ],
)
def test_documents(length, rows, case, assert_close):
    torch.manual_seed(3)
    x, grads = make_case(batch=len(rows), heads=1, length=length, **case)
    documents = documents_at(length, *rows)
    check(x, grads, got(x, grads, documents), wanted(x, grads, documents), 1e-5, assert_close)


def test_documents_in_segments(assert_close):
    """One row goes on where it is cut, another begins a document just there, a third just before."""
    torch.manual_seed(4)
    x, grads = make_case(batch=3, heads=1, length=SPAN + 100)
    documents = documents_at(SPAN + 100, (200,), (SPAN,), (SPAN - 9,))
    want = wanted(x, grads, documents)
    check(x, grads, got(x, grads, documents, schedule=(1, 6)), want, 1e-5, assert_close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, assert_close):
    """At most three times the error of the same equations in torch in that dtype, and at most one percent."""
    torch.manual_seed(5)
    x, grads = make_case(heads=2, length=400, modes=32, dtype=dtype)
    want, plain, found = wanted(x, grads), wanted(x, grads, dtype=dtype), got(x, grads)
    for name, reference in want.items():
        error = (plain[name].double() - reference).norm() / reference.norm()
        assert_close(getattr(found, name), reference, min(3 * float(error), 1e-2), name)
    assert found.q is not None
    assert found.q.dtype == found.v.dtype == dtype
    assert found.taps is not None
    assert found.taps.dtype == torch.float32


def test_the_comparison_can_fail(assert_close):
    """Zeros, a shift by one token, and every missing term fail the assertion that the kernel passes."""
    torch.manual_seed(6)
    x, grads = make_case(heads=1, length=300)
    want, found = wanted(x, grads), got(x, grads)
    for name in x:
        value = getattr(found, name)
        assert_close(value, want[name], 1e-5, name)
        for wrong in (torch.zeros_like(value), value.roll(1, -1)):
            with pytest.raises(AssertionError):
                assert_close(wrong, want[name], 1e-5, name)
    without = {
        "read": ("q", "v", "write", "decay"),  # states unread
        "write": ("q", "v", "read"),  # states unwritten
        "decay": ("q", "v", "read", "write", "initial"),  # states dropped at each chunk
        "taps": ("q", "v", "k", "shift"),
        "initial": ("q", "read", "decay"),
        "history": ("q", "v", "shift", "taps"),
    }
    for term, changed in without.items():
        other = wanted(x | {term: torch.zeros_like(x[term])}, grads)
        for name in changed:
            with pytest.raises(AssertionError):
                assert_close(getattr(found, name), other[name], 1e-5, name)
    for name in ("v", "write", "decay", "initial"):  # the final state's gradient dropped
        with pytest.raises(AssertionError):
            assert_close(getattr(found, name), wanted(x, [grads[0], None])[name], 1e-5, name)


def test_twice_is_bitwise_equal():
    torch.manual_seed(7)
    x, grads = make_case(batch=2, heads=1, length=90)
    once, again = got(x, grads), got(x, grads)
    for name in x:
        assert torch.equal(getattr(once, name), getattr(again, name)), name


PARAMETERS = ("log_dt", "log_a", "b", "B", "C")
BACKENDS: tuple[tuple[Literal["triton", "torch"], torch.dtype], ...] = (
    ("triton", torch.float32),
    ("torch", torch.float64),
)


def test_every_parameter_of_the_mixer(make_diagonal, assert_close, monkeypatch):
    """Through the public operation, a row in two segments, against the torch form in fp64; bugs must fail."""
    monkeypatch.setattr(triton_backward, "plan", lambda channels, batch, supers: (1, 2))
    torch.manual_seed(8)
    length, taps = SPAN + 70, 64
    diag, d = make_diagonal(1, 4, dtype=torch.float32)
    x = {n: torch.randn(1, 1, length) for n in "qkv"} | {"shift": torch.randn(1, taps) / 8, "d_k": torch.randn(1)}
    x |= {"d": d} | {n: getattr(diag, n) for n in PARAMETERS}
    x |= {"history": torch.randn(1, 1, taps - 1), "modes": torch.randn(1, 1, 1, 4, 2)}
    found = {}
    for backend, dtype in BACKENDS:
        leaves = {n: value.detach().to(dtype).requires_grad_() for n, value in x.items()}
        q, k, v, shift, d_k, d = (leaves[n] for n in ("q", "k", "v", "shift", "d_k", "d"))
        state = H3State(leaves["history"], leaves["modes"], torch.zeros(1, dtype=torch.int32))
        same = Diagonal(**{n: leaves[n] for n in PARAMETERS}, rule=diag.rule)
        y, after = h3_mix(q, k, v, shift, same, d_k=d_k, d=d, state=state, backend=backend)
        torch.manual_seed(9)
        loss = (y * torch.randn(y.shape)).sum() + (after.diag * torch.randn(after.diag.shape)).sum()
        found[backend] = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for name, want in found["torch"].items():
        value = found["triton"][name]
        assert_close(value, want, 1e-5, name)
        for wrong in (torch.zeros_like(value), value * 1.001, value.roll(1, -1) if value.shape[-1] > 1 else -value):
            with pytest.raises(AssertionError):
                assert_close(wrong, want, 1e-5, name)


def test_every_parameter_of_the_diagonal_ssm(make_diagonal, assert_close):
    """Two channels to a kernel, documents, fp64 reference."""
    torch.manual_seed(10)
    diag, d = make_diagonal(1, 3, dtype=torch.float32)
    ids = (torch.arange(150) // 70).int().expand(2, -1)
    x = {"u": torch.randn(2, 2, 150), "d": d} | {n: getattr(diag, n) for n in PARAMETERS}
    weights, found = torch.randn(2, 2, 150), {}
    for backend, dtype in BACKENDS:
        leaves = {n: value.detach().to(dtype).requires_grad_() for n, value in x.items()}
        same = Diagonal(**{n: leaves[n] for n in PARAMETERS}, rule=diag.rule)
        y, after = diag_ssm(leaves["u"], same, d=leaves["d"], document_ids=ids, backend=backend)
        loss = (y * weights).sum() + after.modes.sum()
        found[backend] = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for name, want in found["torch"].items():
        assert_close(found["triton"][name], want, 1e-5, name)
