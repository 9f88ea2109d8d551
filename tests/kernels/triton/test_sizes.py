"""Rows by the million: addresses beyond 2^31 and launches beyond the 65,535 programs of a grid's second axis."""

from __future__ import annotations

import builtins
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from potamos.kernels.diag_ssm import diag_ssm, triton, triton_backward
from potamos.kernels.diag_ssm.documents import Chunks, find_chunks
from potamos.kernels.diag_ssm.fused import MOST_TOKENS, fused_obstacle
from potamos.kernels.flash_conv import h3_mix
from potamos.kernels.long_conv import long_conv, triton_launch
from potamos.kernels.long_conv import triton as long_conv_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LENGTH, MODES = 1024, 16
FAR = 2**31 // LENGTH
"""The row whose first token is element 2^31 of (row, token)."""
virtual = pytest.mark.skipif(
    not INTERPRETED, reason="runs one program of two million on memory that is never touched: only an interpreter can"
)


class Recorder:
    """A kernel that notes the grids it is launched on."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.fixture
def only_program(monkeypatch):
    """only_program(n): of a launch of more programs than n (large enough that no tile is), the interpreter runs
    program n alone.

    Tensors are as large as the launch says, but memory that nothing touches costs nothing. The interpreter writes its
    arguments back when a kernel is done; on the CPU they never left, and writing would touch all of them.
    """
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)

    def choose(program: int) -> None:
        def chosen(*bounds: int):
            return [program] if len(bounds) == 1 and bounds[0] > program else builtins.range(*bounds)

        monkeypatch.setattr(interpreter, "range", chosen, raising=False)

    return choose


def row_of(x: Tensor, rows: int, row: int) -> Tensor:
    """(1, rows, LENGTH) untouched memory that holds x in one row."""
    out = torch.empty(1, rows, LENGTH, dtype=x.dtype)
    out[0, row] = x
    return out


def documents_of(ids: Tensor, rows: int, row: int) -> Chunks:
    """The chunks of one row of ids, as row `row` of many."""
    found = find_chunks(ids[None], None, triton.CHUNK, 16)

    def spread(x: Tensor) -> Tensor:
        out = torch.empty(rows, *x.shape[1:], dtype=x.dtype)
        out[row] = x[0]
        return out

    return Chunks(*(spread(x) for x in found))


@virtual
@pytest.mark.parametrize("documents", [False, True])
def test_a_row_beyond_2_to_the_31(documents, only_program, monkeypatch):
    """Row 2,097,152 of 1,024 tokens gives bitwise what it gives as the only row: forward, backward and the adjoint."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(LENGTH, dtype=torch.float16) for _ in range(4))
    taps, read, write, decay = (1, 64), (1, 64, 2 * MODES), (1, 64, 2 * MODES), (1, 2 * MODES)
    operators: Any = [torch.randn(shape) / 8 for shape in (taps, read, write, decay)]
    shift = torch.randn(1, 5)
    ids = (torch.arange(LENGTH) // 300).int()
    results = []
    for rows, row in ((1, 0), (FAR + 1, FAR)):
        inputs: Any = [row_of(x, rows, row) for x in (q, k, v)]
        chunks = documents_of(ids, rows, row) if documents else None
        launches = {
            name: Recorder(getattr(triton_backward, name)) for name in ("scan_backward_kernel", "adjoint_kernel")
        }
        forward = Recorder(triton.scan_fwd_kernel)
        with monkeypatch.context() as patch:
            patch.setattr(triton, "scan_fwd_kernel", forward)
            for name, launch in launches.items():
                patch.setattr(triton_backward, name, launch)
            if row:
                only_program(row)
            forward_arguments: Any = [*inputs, shift, *operators, None, None, chunks]
            y, final, starts = triton.scan_forward(*forward_arguments)
            arguments: Any = [row_of(grad, rows, row), None, *inputs, shift, *operators, None, chunks, starts]
            found = triton_backward.scan_backward(*arguments, schedule=(1, 1))
            local = torch.empty(1, rows, 1, 2 * MODES)
            relative, continues = (None, None) if chunks is None else chunks[:2]
            constants = {"Q": 64, "NB": 16, "M": 32, "DOT": triton_backward.DOT[torch.float16]}
            constants |= {"GATE": True, "DOCUMENTS": documents}
            launches["adjoint_kernel"][(rows,)](
                inputs[0], row_of(grad, rows, row), operators[1], operators[3], operators[3], relative, continues,
                local, rows, LENGTH, 1, MODES, 1, 1, 1, LENGTH // 64, 0, **constants,
            )  # fmt: skip
        grids = forward.grids + launches["scan_backward_kernel"].grids
        assert grids == [(rows,), (rows,)], "one program a row, all on the first axis"
        assert found.q is not None
        assert found.k is not None
        state = final[0, row], starts[0, row], found.initial[0, row], local[0, row]
        results.append([y[0, row], found.q[0, row], found.k[0, row], found.v[0, row], *(x.flatten() for x in state)])
    for got, want in zip(results[1], results[0], strict=True):
        assert want.isfinite().all()
        assert torch.equal(got, want)
    assert results[0][-1].any(), "the adjoint"


@virtual
def test_blocks_beyond_2_to_the_31(only_program):
    """The correlation of `long_conv` for the last of 262,145 parts, whose spectra begin 2^31 numbers into the row's."""
    points, blocks = 4096, 2**18 + 1
    x, grad = (torch.empty(1, 1, blocks, 2, points) for _ in range(2))
    out = torch.empty(1, 1, blocks, 2, points)
    x[0, 0, 0], grad[0, 0, -1] = torch.randn(2, points), torch.randn(2, points)
    tiles = points // long_conv_triton.CORRELATE_TILE
    only_program(tiles * (blocks - 1) + 2)
    Recorder(long_conv_triton.long_conv_correlate_kernel)[(tiles * blocks,)](
        x, grad, out, 1, 1, blocks, blocks, 1, POINTS=points, TILE=long_conv_triton.CORRELATE_TILE
    )
    here = slice(2 * long_conv_triton.CORRELATE_TILE, 3 * long_conv_triton.CORRELATE_TILE)
    a, b = (torch.complex(*pair[:, here]) for pair in (grad[0, 0, -1], x[0, 0, 0]))
    torch.testing.assert_close(torch.complex(*out[0, 0, -1, :, here]), a * b.conj())


@virtual
def test_a_row_of_the_long_convolution_beyond_2_to_the_31(only_program):
    """Row 2,097,152 of 1,024 tokens gives bitwise what it gives as the only row."""
    torch.manual_seed(0)
    row, taps, results = torch.randn(LENGTH, dtype=torch.float16), torch.randn(1, 40), []
    for rows, at in ((1, 0), (FAR + 1, FAR)):
        if at:
            only_program(at // 2)
        u = row_of(row, rows, at).transpose(0, 1)
        results.append(triton_launch.forward(u, taps, None, None)[at, 0])
    assert results[0].any()
    assert torch.equal(*results)


ROWS = 4 if INTERPRETED else 70_000
"""On a GPU more than the second axis of a grid can have; interpreted a check of the arithmetic alone."""


def test_many_rows_are_the_torch_form(make_diagonal, assert_close):
    device = torch.get_default_device()
    diag, d = make_diagonal(1, 2, dtype=torch.float32)
    torch.manual_seed(0)
    q, k, v = (torch.randn(ROWS, 1, 3, requires_grad=True) for _ in range(3))
    shift, d_k, taps = torch.randn(1, 2), torch.randn(1), torch.randn(1, 3)
    ids = torch.tensor([0, 0, 1], device=device).expand(ROWS, -1)
    operations = {
        "h3_mix": lambda form: h3_mix(q, k, v, shift, diag, d_k=d_k, d=d, document_ids=ids, backend=form)[0],
        "diag_ssm": lambda form: diag_ssm(v, diag, d=d, document_ids=ids, backend=form)[0],
        "long_conv": lambda form: long_conv(v, taps, pre_gate=k, post_gate=q, backend=form),
    }
    for name, run in operations.items():
        y, want = run("triton"), run("torch")
        assert_close(y[-3:], want[-3:], 1e-6, name)
        gradients, wanted = (torch.autograd.grad(x.square().sum(), [v])[0] for x in (y, want))
        assert_close(gradients[-3:], wanted[-3:], 1e-5, name)


def test_every_launch_has_one_axis(make_diagonal, monkeypatch):
    """Segments included: only the first axis of a grid takes more than 65,535 programs."""
    kernels = {
        triton: ("scan_fwd_kernel",),
        triton_backward: ("scan_backward_kernel", "adjoint_kernel"),
        triton_launch: ("_convolve", "_transform", "_weight_gradient", "_correlate"),
    }
    recorders = []
    for module, names in kernels.items():
        for name in names:
            recorders.append(Recorder(getattr(module, name)))
            monkeypatch.setattr(module, name, recorders[-1])
    monkeypatch.setattr(triton, "choose_segments", lambda programs, supers, multiprocessors: supers)
    monkeypatch.setattr(triton_backward, "plan", lambda channels, batch, supers: (1, 1))
    diag, d = make_diagonal(1, 2, dtype=torch.float32)
    v = torch.randn(1, 1, 1030, requires_grad=True)
    diag_ssm(v, diag, d=d, backend="triton")[0].sum().backward()
    for length in (2100, 300):
        u, taps = torch.randn(1, 1, length, requires_grad=True), torch.randn(1, length, requires_grad=True)
        long_conv(u.half(), taps, backend="triton").sum().backward()
    assert all(recorder.grids for recorder in recorders)
    assert all(math.prod(grid[1:]) == 1 for recorder in recorders for grid in recorder.grids)


def test_rows_longer_than_32_bits_are_left_to_torch():
    assert fused_obstacle(torch.bfloat16, 32, 64, MOST_TOKENS) is None
    assert fused_obstacle(torch.bfloat16, 32, 64, MOST_TOKENS + 1) == (
        "takes rows of at most 2147418112 tokens, not 2147418113"
    )
