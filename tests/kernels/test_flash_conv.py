"""H3's mixing: the fast form against the equations, with documents, carried state and every head dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from potamos.kernels.diag_ssm import Diagonal
from potamos.kernels.diag_ssm.segments import plain_segments
from potamos.kernels.flash_conv import H3State, h3_mix, h3_mix_step, initial_h3_state
from potamos.kernels.flash_conv.reference import h3_mix_reference
from potamos.kernels.flash_conv.shift import PIECE, shift_conv
from potamos.kernels.once import SecondDerivativeError

NAMES = ("log_dt", "log_a", "b", "B", "C")


@pytest.fixture
def make_case(make_diagonal):
    """make_case(batch, heads, length, ...) -> (leaves by name, call); call(operation, leaves, **rest) runs it."""

    def make(batch: int, heads: int, length: int, *, head_dim=1, taps=64, modes=4, dtype=torch.float64, **kind) -> Any:
        diag, d = make_diagonal(heads, modes, dtype=dtype, **kind)
        channels = heads * head_dim

        def leaf(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_()

        leaves = {name: leaf(batch, channels, length) for name in "qkv"}
        leaves |= {"shift": leaf(channels, taps, scale=taps**-0.5), "d_k": leaf(channels), "d": d}
        leaves |= {name: getattr(diag, name) for name in NAMES}

        def call(operation, values: dict[str, Tensor], **rest):
            diagonal = Diagonal(**{n: values[n] for n in NAMES}, rule=diag.rule)
            q, k, v, shift, d_k, d = (values[n] for n in ("q", "k", "v", "shift", "d_k", "d"))
            return operation(q, k, v, shift, diagonal, d_k=d_k, d=d, head_dim=head_dim, **rest)

        return leaves, call

    return make


def gradients(y: Tensor, state: H3State | None, wrt: dict[str, Tensor], weights_dtype=None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    outputs = [y] if state is None else [y, state.shift, state.diag]
    weights = [torch.randn(o.shape, generator=generator, dtype=weights_dtype or o.dtype) for o in outputs]
    loss = sum(((o * w).sum() for o, w in zip(outputs, weights, strict=True)), torch.zeros(()))
    return dict(zip(wrt, torch.autograd.grad(loss, list(wrt.values()), allow_unused=True), strict=True))


def random_state(batch: int, heads: int, head_dim: int, taps: int, modes: int, document: list[int]) -> H3State:
    shift = torch.randn(batch, heads * head_dim, taps - 1, dtype=torch.float64, requires_grad=True)
    diag = torch.randn(batch, heads, head_dim**2, modes, 2, dtype=torch.float64, requires_grad=True)
    return H3State(shift, diag, torch.tensor(document[:batch], dtype=torch.int32))


CASES = [  # batch, heads, length, head_dim, taps
    (1, 3, 1, 1, 64),
    (3, 3, 2, 1, 64),
    (1, 5, 63, 2, 64),
    (3, 3, 64, 1, 64),
    (1, 2, 65, 4, 5),
    (3, 7, 127, 1, 1),
    (1, 3, 257, 2, 100),
]


@pytest.mark.parametrize(("batch", "heads", "length", "head_dim", "taps"), CASES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_fast_form_is_the_definition(batch, heads, length, head_dim, taps, documents, carried, make_case, assert_close):
    """Outputs, state and every gradient at 1e-10 in fp64."""
    leaves, call = make_case(batch, heads, length, head_dim=head_dim, taps=taps)
    ids = (torch.rand(batch, length) < 0.06).cumsum(1).to(torch.int32) if documents else None
    state = random_state(batch, heads, head_dim, taps, 4, [0, 5, 0]) if carried else None
    wrt = dict(leaves) if state is None else leaves | {"state.shift": state.shift, "state.diag": state.diag}
    want, want_state = call(h3_mix_reference, leaves, document_ids=ids, state=state)
    got, got_state = call(h3_mix, leaves, document_ids=ids, state=state)
    assert_close(got, want, 1e-10, "y")
    assert_close(got_state.diag, want_state.diag, 1e-10, "state.diag")
    if want_state.shift.any():
        assert_close(got_state.shift, want_state.shift, 1e-10, "state.shift")
    else:
        assert not got_state.shift.any()
    assert torch.equal(got_state.document, want_state.document)
    want_gradients = gradients(want, want_state, wrt)
    for name, gradient in gradients(got, got_state, wrt).items():
        reference = want_gradients[name]
        if reference is None or not reference.any():
            assert gradient is None or not gradient.any(), f"d{name} should be zero"
        else:
            assert_close(gradient, reference, 1e-10, f"d{name}")


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("documents", [False, True])
def test_any_split_and_steps_continue_the_whole(documents, head_dim, make_case, assert_close):
    leaves, call = make_case(2, 3, 150, head_dim=head_dim)
    leaves = {name: value.detach() for name, value in leaves.items()}
    ids = (torch.rand(2, 150) < 0.03).cumsum(1).to(torch.int32) if documents else None
    whole, last = call(h3_mix, leaves, document_ids=ids)

    def piece(index) -> dict[str, Tensor]:
        return leaves | {name: leaves[name][:, :, index] for name in "qkv"}

    state, parts = None, []
    for begin, end in ((0, 1), (1, 70), (70, 73), (73, 140)):
        documents_here = None if ids is None else ids[:, begin:end]
        part, state = call(h3_mix, piece(slice(begin, end)), document_ids=documents_here, state=state)
        parts.append(part)
    for t in range(140, 150):
        y, state = call(h3_mix_step, piece(t), document_ids=None if ids is None else ids[:, t], state=state)
        parts.append(y[..., None])
    assert state is not None
    assert_close(torch.cat(parts, 2), whole, 1e-10, "pieces")
    assert_close(state.diag, last.diag, 1e-10, "state.diag")
    assert_close(state.shift, last.shift, 1e-10, "state.shift")


def test_steps_from_the_initial_state(make_case, assert_close):
    leaves, call = make_case(2, 3, 9)
    state, outputs = initial_h3_state(2, 3, 64, Diagonal(**{n: leaves[n] for n in NAMES}), dtype=torch.float64), []
    for t in range(9):
        values = leaves | {name: leaves[name][:, :, t] for name in "qkv"}
        y, state = call(h3_mix_step, values, document_ids=torch.zeros(2).int(), state=state)
        outputs.append(y)
    assert_close(torch.stack(outputs, 2), call(h3_mix, leaves)[0], 1e-10)


@pytest.mark.parametrize("stress", [False, True])
def test_fp32_against_fp64(stress, make_case, assert_close):
    leaves, call = make_case(3, 5, 300, modes=32, dtype=torch.float32, stress=stress)
    wide = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    y, want = call(h3_mix, leaves)[0], call(h3_mix_reference, wide)[0]
    assert_close(y, want, 1e-6, "y")
    expected = gradients(want, None, wide, torch.float32)
    for name, gradient in gradients(y, None, leaves).items():
        assert_close(gradient, expected[name], 1e-5, f"d{name}")


def test_bf16_is_no_worse_than_rounding_its_inputs_and_outputs(make_case, assert_close):
    leaves, call = make_case(2, 6, 300, modes=32, dtype=torch.float32)
    half = leaves | {name: leaves[name].detach().bfloat16().requires_grad_() for name in "qkv"}
    wide = {name: value.detach().double().requires_grad_() for name, value in half.items()}
    (y, state), (want, _) = call(h3_mix, half), call(h3_mix_reference, wide)
    assert y.dtype == torch.bfloat16
    assert state.shift.dtype == state.diag.dtype == torch.float32
    assert_close(y, want, 2.5e-3, "y")
    expected = gradients(want, None, wide, torch.float32)
    for name, gradient in gradients(y, None, half).items():
        assert gradient.dtype == half[name].dtype
        assert_close(gradient, expected[name], 1e-2, f"d{name}")


def test_the_comparison_refuses_typical_bugs(make_case, assert_close):
    leaves, call = make_case(2, 4, 256, modes=32, dtype=torch.float32)
    leaves = {name: value.detach() for name, value in leaves.items()}
    want = call(h3_mix_reference, {name: value.double() for name, value in leaves.items()})[0]
    right = call(h3_mix, leaves)[0]
    assert_close(right, want, 5e-3)
    pieces = [
        call(h3_mix, leaves | {name: leaves[name][..., i : i + 64] for name in "qkv"})[0] for i in range(0, 256, 64)
    ]
    future = {name: leaves[name].roll(-1, 2) for name in "kv"}
    wrong = {
        "zeros": torch.zeros_like(right),
        "shifted by one token": right.roll(1, 2),
        "without D": call(h3_mix, leaves | {"d": torch.zeros_like(leaves["d"])})[0],
        "without D_k": call(h3_mix, leaves | {"d_k": torch.zeros_like(leaves["d_k"])})[0],
        "k and v exchanged": call(h3_mix, leaves | {"k": leaves["v"], "v": leaves["k"]})[0],
        "sees the next token": call(h3_mix, leaves | future)[0],
        "state dropped at each chunk": torch.cat(pieces, 2),
    }
    for name, output in wrong.items():
        with pytest.raises(AssertionError, match="relative rms error"):
            assert_close(output, want, 5e-3, name)


def test_causality_is_exact(make_case):
    leaves, call = make_case(1, 3, 140, dtype=torch.float32)
    y = call(h3_mix, leaves)[0]
    for t in (0, 63, 64, 100):
        for name in "qkv":
            (gradient,) = torch.autograd.grad(y[..., t].sum(), leaves[name], retain_graph=True)
            assert (gradient[..., t + 1 :] == 0).all()
            assert gradient[..., t].any()


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_documents_change_no_bit_and_packed_equals_alone(dtype, head_dim, make_case, assert_close):
    lengths = (40, 1, 90, 7, 64, 3)
    ids = torch.repeat_interleave(torch.tensor([4, 5, 9, 2, -1, 7]), torch.tensor(lengths)).int()[None]
    leaves, call = make_case(1, 3, sum(lengths), head_dim=head_dim, dtype=dtype)
    begin = 41
    inside = slice(begin, begin + 90)

    def run(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        values = values | {name: values[name].detach().clone().requires_grad_() for name in "qkv"}
        y = call(h3_mix, values, document_ids=ids)[0][..., inside]
        return y, *torch.autograd.grad((y * torch.arange(90)).sum(), [values[name] for name in "qkv"])

    original = run(leaves)
    others = {name: 100 * torch.randn_like(leaves[name]) for name in "qkv"}
    for name in "qkv":
        others[name][..., inside] = leaves[name][..., inside].detach()
    for before, after in zip(original, run(leaves | others), strict=True):
        assert torch.equal(before, after)
    for gradient in original[1:]:
        assert not gradient[..., :begin].any()
        assert not gradient[..., begin + 90 :].any()
    only = leaves | {name: leaves[name][..., inside] for name in "qkv"}
    alone = call(h3_mix, only)[0]
    assert_close(original[0], alone, 1e-10 if dtype == torch.float64 else 1e-6)
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(call(h3_mix, leaves)[0][..., inside], alone, 1e-3, "documents ignored")


def test_history_of_another_document_is_not_read(make_case):
    """The carried taps and modes of document 5 do nothing to a call that begins with document 6."""
    leaves, call = make_case(2, 3, 10)
    state = random_state(2, 3, 1, 64, 4, [5, 5])
    ids = torch.full((2, 10), 6, dtype=torch.int32)
    assert torch.equal(call(h3_mix, leaves, document_ids=ids, state=state)[0], call(h3_mix, leaves)[0])
    values = leaves | {name: leaves[name][:, :, 0] for name in "qkv"}
    y, after = call(h3_mix_step, values, document_ids=ids[:, 0], state=state)
    assert torch.allclose(y, call(h3_mix, leaves)[0][..., 0], atol=1e-12)
    assert not after.shift[..., :-1].any()
    assert after.document.tolist() == [6, 6]


def test_gradcheck(make_case):
    """Of everything that takes a gradient, with documents and a carried state."""
    leaves, call = make_case(1, 1, 5, head_dim=2, taps=3, modes=1)
    state = random_state(1, 1, 2, 3, 1, [0])
    ids = torch.tensor([[0, 0, 1, 1, 1]])

    def run(shift, diag, *values):
        carried = H3State(shift, diag, state.document)
        y, after = call(h3_mix, dict(zip(leaves, values, strict=True)), document_ids=ids, state=carried)
        return y, after.diag, after.shift

    assert torch.autograd.gradcheck(run, (state.shift, state.diag, *leaves.values()))


@pytest.mark.parametrize("wrt", ["k", "v", "d_k", "C"])
def test_second_derivatives_are_refused(wrt, make_case):
    leaves, call = make_case(1, 2, 70)
    y = call(h3_mix, leaves)[0].square().sum()
    with pytest.raises(SecondDerivativeError, match="create_graph=True is not possible"):
        torch.autograd.grad(y, leaves[wrt], create_graph=True)


def test_gradients_of_rows_longer_than_a_piece_of_the_filter(make_case, assert_close):
    """The filter's gradient is a sum over pieces of 2,048 tokens; against autograd through the plain convolution."""
    shift, k = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 2, 2 * PIECE + 100, dtype=torch.float64)
    found = []
    for form in ("own", "torch"):
        taps = shift.clone().requires_grad_()
        padded = torch.nn.functional.pad(k, (4, 0))
        if form == "own":
            y = shift_conv(k, taps, plain_segments(k.shape[2]), None)
        else:
            y = torch.stack([(padded[:, :, n : n + k.shape[2]] * taps[:, None, 4 - n, None]) for n in range(5)]).sum(0)
        found.append(torch.autograd.grad((y * torch.arange(k.shape[2]).sin()).sum(), taps)[0])
    assert_close(found[0], found[1], 1e-10)


def test_a_document_that_begins_in_a_short_call_forgets_the_history(make_case):
    """Two tokens of document 0, two of document 1: of the next call's history only the last two are not zero."""
    leaves, call = make_case(1, 3, 4, taps=9)
    ids, state = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32), random_state(1, 3, 1, 9, 4, [0])
    for operation in (h3_mix, h3_mix_reference):
        _, after = call(operation, leaves, document_ids=ids, state=state)
        assert not after.shift[..., :-2].any()
        assert torch.equal(after.shift[..., -2:], leaves["k"][..., -2:])


def test_state_is_an_opaque_tree(make_case):
    leaves, call = make_case(2, 3, 10)
    _, state = call(h3_mix, leaves)
    flat, structure = pytree.tree_flatten(state)
    assert len(flat) == 3
    assert state.diag.requires_grad
    detached = pytree.tree_map(lambda tensor: tensor.detach(), state)
    assert isinstance(detached, H3State)
    assert not detached.diag.requires_grad
    assert isinstance(pytree.tree_unflatten(flat, structure), H3State)


def test_any_memory_order(make_case):
    leaves, call = make_case(2, 3, 70)
    values = {name: leaves[name].detach() for name in leaves}
    channel_last = values | {name: values[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    channel_first = values | {name: values[name].transpose(0, 1).contiguous().transpose(0, 1) for name in "qkv"}
    want = call(h3_mix, values)[0]
    assert torch.equal(call(h3_mix, channel_last)[0], want)
    assert torch.equal(call(h3_mix, channel_first)[0], want)


def test_bad_arguments_are_named(make_case):
    leaves, call = make_case(2, 4, 8)
    for change, message in (
        ({"k": leaves["k"][..., :7]}, r"one shape, got q \(2, 4, 8\), k \(2, 4, 7\)"),
        ({"shift": leaves["shift"][:3]}, r"shift must be \(4, taps\)"),
        ({"d_k": leaves["d_k"][:3]}, "d_k has shape"),
        ({"d": leaves["d"][:3]}, "d has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call(h3_mix, leaves | change)
    with pytest.raises(ValueError, match=r"state\.diag has shape"):
        call(h3_mix, leaves, state=random_state(2, 4, 1, 64, 5, [0, 0]))
    with pytest.raises(ValueError, match=r"takes fp32, fp16 or bf16, not torch\.float64"):
        call(h3_mix, leaves, backend="triton")
    for name, dtype in (("q", torch.int64), ("k", torch.complex64), ("v", torch.bool)):
        which = "the input" if name == "q" else name
        with pytest.raises(ValueError, match=f"{which} has dtype {dtype}"):
            call(h3_mix, leaves | {name: leaves[name].detach().to(dtype)})
