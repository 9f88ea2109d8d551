"""The forward kernel, through the public operations, against their definitions, token by token in fp64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from potamos.kernels.backend import BackendUnavailableError
from potamos.kernels.diag_ssm import Diagonal, DiagState, diag_ssm, diag_ssm_reference, fused, triton
from potamos.kernels.diag_ssm.documents import find_chunks
from potamos.kernels.diag_ssm.reference import kernel, scan_in_torch
from potamos.kernels.flash_conv import H3State, h3_mix
from potamos.kernels.flash_conv.reference import h3_mix_reference

NAMES = ("log_dt", "log_a", "b", "B", "C")
BOUNDARIES = 0.06
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is NaN, so that an output that was not written cannot pass."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def fill(*args, _make=make, **options):
            out = _make(*args, **options)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, fill)
    torch.manual_seed(1)


@pytest.fixture
def make_mix(make_diagonal):
    """make_mix(batch, heads, length, ...) -> values by name, and run(operation, values, **rest) in their dtype."""

    def make(batch: int, heads: int, length: int, *, modes: int = 32, taps: int = 64, head_dim: int = 1, stress=False):
        diag, d = make_diagonal(heads, modes, dtype=torch.float32, stress=stress)
        channels = heads * head_dim
        values = {name: torch.randn(batch, channels, length) for name in "qkv"}
        values |= {"shift": torch.randn(channels, taps) * taps**-0.5, "d_k": torch.randn(channels), "d": d.detach()}
        values |= {name: getattr(diag, name).detach() for name in NAMES}

        def run(operation, values: dict[str, Tensor], **rest):
            diagonal = Diagonal(**{name: values[name] for name in NAMES}, rule=diag.rule)
            q, k, v, shift, d_k, d = (values[name] for name in ("q", "k", "v", "shift", "d_k", "d"))
            if operation is h3_mix:
                rest = {"backend": "triton"} | rest
            return operation(q, k, v, shift, diagonal, d_k=d_k, d=d, head_dim=head_dim, **rest)

        return values, run

    return make


def widen(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in values.items()}


def make_state(batch: int, heads: int, taps: int, modes: int, head_dim: int, dtype=torch.float32) -> H3State:
    """Of document 0 in the first row and 5 in the others."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    shift = torch.randn(batch, heads * head_dim, taps - 1, generator=generator)
    diag = torch.randn(batch, heads, head_dim**2, modes, 2, generator=generator)
    return H3State(shift.to(dtype), diag.to(dtype), torch.tensor([0, 5, 5][:batch], dtype=torch.int32))


CASES = [  # batch, heads, length, modes, taps, head_dim, documents, carried
    (3, 1, 1, 32, 64, 1, False, False),
    (1, 3, 1, 5, 64, 1, True, True),
    (3, 2, 2, 16, 64, 1, False, True),
    (1, 3, 63, 20, 5, 1, True, False),
    (1, 2, 63, 4, 64, 1, False, True),
    (3, 1, 64, 32, 1, 1, True, True),
    (1, 2, 65, 32, 64, 2, True, True),
    (3, 1, 65, 64, 64, 1, False, False),
    (3, 1, 127, 32, 64, 1, True, True),
    (1, 1, 1000, 32, 64, 1, False, True),
    (1, 1, 1024, 32, 30, 1, True, False),
    (1, 2, 1134, 32, 64, 1, True, True),
    (1, 1, 1134, 32, 64, 1, False, False),
]


@pytest.mark.parametrize(("batch", "heads", "length", "modes", "taps", "head_dim", "documents", "carried"), CASES)
def test_the_mixer_is_its_definition(
    batch, heads, length, modes, taps, head_dim, documents, carried, make_mix, assert_close, monkeypatch
):
    monkeypatch.setattr(fused, "MOST_MODES_FP32", fused.MOST_MODES)  # fp32 sees more of the tiles of 64 modes than bf16
    values, run = make_mix(batch, heads, length, modes=modes, taps=taps, head_dim=head_dim)
    ids = (torch.rand(batch, length) < BOUNDARIES).cumsum(1).int() if documents else None
    narrow = make_state(batch, heads, taps, modes, head_dim) if carried else None
    wide = make_state(batch, heads, taps, modes, head_dim, torch.float64) if carried else None
    got, state = run(h3_mix, values, document_ids=ids, state=narrow)
    want, want_state = run(h3_mix_reference, widen(values), document_ids=ids, state=wide)
    assert_close(got, want, 1e-6, "y")
    assert_close(state.diag, want_state.diag, 1e-6, "state.diag")
    assert torch.equal(state.shift.double(), want_state.shift)
    assert torch.equal(state.document, want_state.document)
    assert got.dtype == state.diag.dtype == torch.float32


@pytest.mark.parametrize(("length", "documents", "carried"), [(65, False, True), (150, True, True), (64, True, False)])
def test_channels_share_kernels_in_a_diagonal_ssm(length, documents, carried, make_diagonal, assert_close):
    diag, d = make_diagonal(2, 7, rule="zoh", dtype=torch.float32)
    wide = Diagonal(*(getattr(diag, name).detach().double() for name in NAMES), rule="zoh")
    u, modes = torch.randn(3, 6, length), torch.randn(3, 6, 7, 2)
    ids = (torch.rand(3, length) < BOUNDARIES).cumsum(1).int() if documents else None
    document = torch.tensor([0, 5, 0], dtype=torch.int32)
    states = (DiagState(modes, document), DiagState(modes.double(), document)) if carried else (None, None)
    got, state = diag_ssm(u, diag, d=d, document_ids=ids, state=states[0], backend="triton")
    want, want_state = diag_ssm_reference(u.double(), wide, d=d.double(), document_ids=ids, state=states[1])
    assert_close(got, want, 1e-6, "y")
    assert_close(state.modes, want_state.modes, 1e-6, "modes")


def test_undamped_modes_and_large_readouts(make_mix, assert_close):
    values, run = make_mix(1, 2, 1100, stress=True)
    assert_close(run(h3_mix, values)[0], run(h3_mix_reference, widen(values))[0], 1e-6)


@pytest.mark.parametrize("documents", [False, True])
def test_segments_of_a_row_join_exactly(documents, make_mix, assert_close, monkeypatch):
    """Four super-chunks in one to four pieces: the definition, and the states that the backward starts from."""
    values, run = make_mix(1, 1, 3 * 1024 + 70)
    ids = None
    if documents:  # A segment without any boundary, one with some, one with none but at its first token.
        ids = torch.zeros(1, 3 * 1024 + 70, dtype=torch.int32)
        for begin in (1100, 1111, 1500, 2048):
            ids[:, begin:] += 1
    state = make_state(1, 1, 64, 32, 1)
    want, want_state = run(
        h3_mix_reference, widen(values), document_ids=ids, state=make_state(1, 1, 64, 32, 1, torch.float64)
    )
    calls, starts = [], []
    scan_forward = triton.scan_forward

    def spy(*args, block=None, **options):
        result = scan_forward(*args, block=triton.Config(segments=calls[-1]), **options)
        starts.append(result[2])
        return result

    monkeypatch.setattr(triton, "scan_forward", spy)
    for segments in (1, 2, 4):
        calls.append(segments)
        got, got_state = run(h3_mix, values, document_ids=ids, state=state)
        assert_close(got, want, 1e-6, f"y of {segments}")
        assert_close(got_state.diag, want_state.diag, 1e-6, f"state of {segments}")
    for other in starts[1:]:
        assert_close(other, starts[0], 1e-6, "states before super-chunks")


def test_rows_are_cut_where_they_are_few_and_long():
    assert triton.choose_segments(768, 128, 132) == 1  # enough channels
    assert triton.choose_segments(8, 4, 132) == 1  # too short
    assert triton.choose_segments(100, 1000, 132) == 5  # as many as there are places
    assert triton.choose_segments(8, 32, 132) == 8  # at least four super-chunks each
    assert triton.choose_segments(1, 100_000, 132) == triton.MOST_SEGMENTS


def plain_half_precision(values: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The mixer as one writes it in torch in a half-precision type: Toeplitz matrices of the rounded taps."""
    length = values["q"].shape[2]
    q, k, v = (values[name].to(dtype).transpose(0, 1) for name in "qkv")  # (channel, batch, L)
    lag = torch.arange(length)[:, None] - torch.arange(length)[None, :]

    def convolve(taps: Tensor, x: Tensor) -> Tensor:
        taps = torch.nn.functional.pad(taps, (0, max(0, length - taps.shape[1])))
        return x @ torch.where(lag >= 0, taps[:, lag.clamp(min=0)], 0).to(dtype).transpose(1, 2)

    z = (convolve(values["shift"], k) + values["d_k"].to(dtype)[:, None, None] * k) * v
    log_dt, log_a, b, B, C = (values[name] for name in NAMES)
    taps = kernel(Diagonal(log_dt, log_a, b, B, C), length)
    return (q * (convolve(taps, z) + values["d"].to(dtype)[:, None, None] * z)).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [False, True])
def test_half_precision_is_as_good_as_plain_torch_in_it(dtype, documents, make_mix, assert_close):
    values, run = make_mix(2, 3, 300)
    values |= {name: values[name].to(dtype) for name in "qkv"}
    ids = torch.zeros(2, 300, dtype=torch.int32) if documents else None
    got, state = run(h3_mix, values, document_ids=ids)
    want = run(h3_mix_reference, widen(values))[0]
    assert got.dtype == dtype
    assert state.shift.dtype == state.diag.dtype == torch.float32
    assert_close(got, want, 5e-3 if dtype == torch.bfloat16 else 1e-3)
    error = (got.double() - want).square().mean((0, 2)).sqrt() / want.square().mean((0, 2)).sqrt()
    plain = (plain_half_precision(values, dtype).double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error.square().mean().sqrt() <= 2 * plain
    assert error.max() <= 2 * error.mean()


def test_the_comparison_refuses_typical_bugs(make_mix, assert_close):
    values, run = make_mix(1, 3, 256)
    want = run(h3_mix_reference, widen(values))[0]
    right = run(h3_mix, values)[0]
    pieces = [run(h3_mix, values | {n: values[n][..., i : i + 64] for n in "qkv"})[0] for i in range(0, 256, 64)]
    tail = run(h3_mix, {n: torch.cat([x, x], 2) if n in ("q", "k", "v") else x for n, x in values.items()})[0][
        ..., 256:
    ]
    wrong = {
        "zeros": torch.zeros_like(right),
        "shifted by one token": right.roll(1, 2),
        "without D": run(h3_mix, values | {"d": torch.zeros(3)})[0],
        "without D_k": run(h3_mix, values | {"d_k": torch.zeros(3)})[0],
        "state dropped at each chunk": torch.cat(pieces, 2),
        "circular": tail,
        "sees the next token": run(h3_mix, values | {n: values[n].roll(-1, 2) for n in "kv"})[0],
    }
    for tolerance in (1e-6, 5e-3):
        assert_close(right, want, tolerance)
        for name, output in wrong.items():
            with pytest.raises(AssertionError, match="relative rms error"):
                assert_close(output, want, tolerance, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causality_is_exact(dtype, make_mix):
    values, run = make_mix(1, 2, 150)
    values |= {name: values[name].to(dtype) for name in "qkv"}
    before = run(h3_mix, values)[0]
    for token in (1, 64, 100):
        changed = {name: values[name].clone() for name in "qkv"}
        for x in changed.values():
            x[..., token:] = 100 * torch.randn_like(x[..., token:])
        after = run(h3_mix, values | changed)[0]
        assert torch.equal(before[..., :token], after[..., :token])
        assert not torch.equal(before[..., token], after[..., token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_documents_change_no_bit_and_packed_equals_alone(dtype, make_mix, assert_close):
    lengths = (40, 1, 90, 7, 64, 3)
    ids = torch.repeat_interleave(torch.tensor([4, 5, 9, 2, -1, 7]), torch.tensor(lengths)).int()[None]
    values, run = make_mix(1, 2, sum(lengths))
    values |= {name: values[name].to(dtype) for name in "qkv"}
    inside = slice(41, 131)
    packed = run(h3_mix, values, document_ids=ids)[0][..., inside]
    others = {name: 100 * torch.randn_like(values[name]) for name in "qkv"}
    for name, x in others.items():
        x[..., inside] = values[name][..., inside]
    assert torch.equal(run(h3_mix, values | others, document_ids=ids)[0][..., inside], packed)
    only = run(h3_mix, values | {name: values[name][..., inside] for name in "qkv"})[0]
    assert_close(packed, only, 1e-6 if dtype == torch.float32 else 5e-3)
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(run(h3_mix, values)[0][..., inside], only, 5e-3, "documents ignored")


def test_relative_numbers_of_documents():
    ids = torch.tensor([[3, 3, 4, 4, 4, 6, 7, 8, 8, 8]])
    chunks = find_chunks(ids, None, 4, 2)
    assert chunks.relative.tolist() == [[0, 0, 1, 1, 0, 1, 2, 3, 0, 0]]
    assert chunks.continues.tolist() == [[1, 1, 1]]
    assert chunks.unbroken.tolist() == [[False, False, True]]
    assert chunks.most.tolist() == [[3, 0]]
    assert find_chunks(ids, torch.tensor([2]), 4, 2).continues.tolist() == [[0, 1, 1]]
    assert find_chunks(ids, torch.tensor([3]), 2, 2).continues.tolist() == [[1, 0, 1, 0, 1]]


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("carried", [False, True])
def test_nothing_waits_for_the_device(carried, head_dim, make_mix, monkeypatch):
    """Fake tensors have no values: whatever the host wanted to read would raise."""

    def fake_scan(q, k, v, shift_taps, taps, read, write, decay, *rest, **options):
        state = v.new_empty(*v.shape[:2], decay.shape[1], dtype=torch.float32)
        return torch.empty_like(v), state, state[:, :, None]

    values, run = make_mix(2, 3, 100, head_dim=head_dim)
    monkeypatch.undo()
    monkeypatch.setattr(triton, "scan_forward", fake_scan)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(value) for name, value in values.items()}
        ids = mode.from_tensor(torch.zeros(2, 100, dtype=torch.int32))
        state = None
        if carried:
            shift, diag, document = (mode.from_tensor(x) for x in vars(make_state(2, 3, 64, 32, head_dim)).values())
            state = H3State(shift, diag, document)
        y, after = run(h3_mix, fakes, document_ids=ids, state=state)
    assert y.shape == (2, 3 * head_dim, 100)
    assert after.diag.shape == (2, 3, head_dim**2, 32, 2)


def test_segments_states_wait_for_nothing():
    with FakeTensorMode():
        local, unbroken = torch.randn(2, 3, 4, 8), torch.ones(3, 20, dtype=torch.bool)
        states = triton.segment_states(local, torch.randn(2, 8), 4, None, unbroken)
    assert states.shape == (2, 3, 5, 8)


def test_operators_in_torch_are_the_kernel(assert_close):
    """The definition at the level of operators, arbitrary ones, with a group and documents."""
    shapes = {"taps": (2, 64), "read": (2, 64, 10), "write": (2, 64, 10), "decay": (2, 10), "initial": (4, 1, 10)}
    x = {"v": torch.randn(4, 1, 150)} | {name: torch.randn(shape) / 8 for name, shape in shapes.items()}
    rest: dict[str, Any] = {"q": None, "k": None, "shift_taps": None, "history": None}
    documents = find_chunks((torch.rand(1, 150) < BOUNDARIES).cumsum(1), None, 64, 16)
    y, final, starts = triton.scan_forward(**x, **rest, documents=documents)
    want, want_final = scan_in_torch(**widen(x), **rest, documents=documents)
    assert_close(y, want, 1e-6, "y")
    assert_close(final, want_final, 1e-6, "final")
    assert torch.equal(starts[:, :, 0], x["initial"])


def test_what_the_kernel_cannot_take_is_refused_by_name(make_mix, monkeypatch):
    values, run = make_mix(1, 2, 8, taps=65)
    with pytest.raises(BackendUnavailableError, match="at most 64 shift taps, not 65"):
        run(h3_mix, values)
    many, run_many = make_mix(1, 1, 8, modes=65)
    with pytest.raises(BackendUnavailableError, match=r"at most 32 modes of torch\.float32, not 65"):
        run_many(h3_mix, many)
    values["shift"] = values["shift"][:, :64]
    with pytest.raises(BackendUnavailableError, match=r"fp32, fp16 or bf16, not torch\.float64"):
        run(h3_mix, widen(values))
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(BackendUnavailableError, match="needs a CUDA device, or TRITON_INTERPRET=1"):
            run(h3_mix, values)


def test_auto_takes_the_torch_form_on_the_cpu(make_mix, monkeypatch):
    values, run = make_mix(1, 2, 8)
    values = {name: x.cpu() for name, x in values.items()}
    monkeypatch.setattr(triton, "scan_forward", None)
    with torch.device("cpu"):
        run(h3_mix, values, backend="auto")
    if INTERPRETED:
        with pytest.raises(TypeError):
            run(h3_mix, values, backend="triton")


@pytest.mark.parametrize(
    ("batch", "length", "taps", "head_dim", "documents", "carried"),
    [(1, 65, 64, 1, False, True), (2, 130, 5, 1, True, True), (1, 63, 64, 1, True, False), (1, 64, 64, 2, True, True)],
)
def test_gradients_of_everything(batch, length, taps, head_dim, documents, carried, make_mix, assert_close):
    """Of output and final state, with respect to inputs, parameters and the carried state, at 1e-5."""
    values, run = make_mix(batch, 2, length, modes=6, taps=taps, head_dim=head_dim)
    ids = (torch.rand(batch, length) < BOUNDARIES).cumsum(1).int() if documents else None
    found = []
    for operation, dtype in ((h3_mix, torch.float32), (h3_mix_reference, torch.float64)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in values.items()}
        state = None
        if carried:
            state = make_state(batch, 2, taps, 6, head_dim, dtype)
            leaves |= {"history": state.shift.requires_grad_(), "modes": state.diag.requires_grad_()}
        y, after = run(operation, leaves, document_ids=ids, state=state)
        generator = torch.Generator(torch.get_default_device()).manual_seed(3)
        outputs = (y, after.shift, after.diag)
        loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
        assert isinstance(loss, Tensor)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found.append(dict(zip(leaves, gradients, strict=True)))
    for name, want in found[1].items():
        got = found[0][name]
        if want is None or not want.any():
            assert got is None or not got.any(), f"d{name} should be zero"
        else:
            assert_close(got, want, 1e-5, f"d{name}")


def test_what_another_document_left_is_not_read(make_mix):
    values, run = make_mix(2, 2, 10)
    ids = torch.full((2, 10), 6, dtype=torch.int32)
    y, after = run(h3_mix, values, document_ids=ids, state=make_state(2, 2, 64, 32, 1))
    alone, after_alone = run(h3_mix, values)
    assert torch.equal(y, alone)
    assert torch.equal(after.diag, after_alone.diag)
    assert torch.equal(after.shift, after_alone.shift)
    assert after.document.tolist() == [6, 6]
