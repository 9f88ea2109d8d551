"""Gradients of the fused chunked scan in one Triton kernel: data, operators and states in a single pass over memory.

Legend as in `chunked`: Q tokens a chunk, M modes, N = 2 M, and NB consecutive chunks of one row side by side as the
columns of every tile. With k' = S_lower k_c + S_upper k_(c-1), z = k' v, y = T z + R p, out = q y and the states
p_c before a chunk and x_c = D p_c + W z_c after it, the reverse pass over dy = q grad is

    e_c = R^T dy_c + conj(D) h_c         h_(c-1) = e_c, h_c the adjoint of x_c
    dz  = T^T dy + W^T h,    dk' = v dz,   dk = S_lower^T dk'_c + S_upper^T dk'_(c+1)
    dT  = dy z^T,  dR = dy p^T,  dW = h z^T,  dD = sum conj(p) h,
    dS = dk' k_c^T on and below the diagonal, dk' k_(c-1)^T above it

Nothing is stored by the forward but the state before every NB chunks; the states in between are scanned again. HBM
traffic in half precision: q, k, v and the gradient in, three gradients out = 14 bytes per token-channel, and
4 N / (Q NB) = 0.25 for the states; with the forward's 8.25 that is 2.8 times the forward. To this come a program's
sums, 33 kB written and read once: 1 byte for two programs a channel of 131,072 tokens. A long row with few others
beside it is cut into segments that run at once, for 4 bytes more (q and the gradient, for the adjoint alone).

All four operator gradients stay in registers. In bf16 and fp16 on sm_90a with up to 32 modes nothing is spilled where
a row begins and ends a call, with documents or without (Triton 3.7.1); with anything at its borders, 52 and 76 bytes a
thread; with 64 modes 44 to 372. sm_80 has no product that reads operands from shared memory, fp32 no tensor cores:
they spill more (`spills` states how much of each form). No speed of this kernel has been measured.

Every program adds up its share of the rows in registers and writes one partial sum per operator; they are added in a
fixed order, so that two runs agree bitwise.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .chunked import _complex
from .documents import Chunks
from .triton import (
    _ceil,
    aligned,
    compose,
    even,
    load_lower,
    load_state,
    load_upper,
    padded_modes,
    segment_states,
    store_state,
)


class BackwardConfig(NamedTuple):
    """Chunks side by side in a tile, warps a program, and stages of the software pipeline."""

    columns: int = 16
    warps: int = 8
    stages: int = 2


@triton.jit
def _mode_column(n):
    """Where row n of a state tile lives in memory, which interleaves real and imaginary parts.

    Rows come as eight real parts, then their eight imaginary parts: a thread of a tensor-core tile holds rows n and
    n + 8, thus whole complex numbers.
    """
    return ((n // 16) * 8 + n % 8) * 2 + (n // 8) % 2


@triton.jit
def _split(x, M: tl.constexpr, NB: tl.constexpr):
    """A state tile (2 M, NB) -> real and imaginary parts, each (M, NB)."""
    re, im = tl.split(tl.permute(tl.reshape(x, [M // 8, 2, 8, NB]), (0, 2, 3, 1)))
    return tl.reshape(re, [M, NB]), tl.reshape(im, [M, NB])


@triton.jit
def _join(re, im, M: tl.constexpr, NB: tl.constexpr):
    """The inverse of `_split`."""
    return tl.reshape(tl.permute(tl.reshape(tl.join(re, im), [M // 8, 8, NB, 2]), (0, 3, 1, 2)), [2 * M, NB])


@triton.jit
def _column(x, which):
    """The column of x (rows, NB) where `which` (1, NB) is true."""
    return tl.sum(tl.where(which, x, 0.0), 1)


@triton.jit
def _within(operator, x, number, most, DOT: tl.constexpr, DOCUMENTS: tl.constexpr):
    """operator @ x (Q, NB), each document of a column for itself."""
    if DOCUMENTS:
        result = tl.zeros(x.shape, tl.float32)
        for document in range(0, most + 1):
            here = number == document
            own = tl.dot(operator, tl.where(here, x, 0.0).to(DOT), input_precision="ieee")
            result += tl.where(here, own, 0.0)
    else:
        result = tl.dot(operator, x, input_precision="ieee")
    return result


@triton.jit
def _products(total, left, right, number, most, DOT: tl.constexpr, DOCUMENTS: tl.constexpr):
    """total + left @ right^T, the gradient of the operator in left = operator @ right, of pairs in one document."""
    if DOCUMENTS:
        for document in range(0, most + 1):
            here = number == document
            x, y = tl.where(here, left, 0.0).to(DOT), tl.where(here, right, 0.0).to(DOT)
            total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    else:
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total


@triton.jit
def _adjoint(e, a_r, a_i, ar, ai, M: tl.constexpr, NB: tl.constexpr):
    """The reverse scan f_c = e_c + conj(A_c) f_(c+1) of one tile, f_NB = a.

    Returns the adjoint of the state after each chunk (M, NB) twice, and f_0 (M) twice.
    """
    c = tl.arange(0, NB)
    first, last = c[None, :] == 0, c[None, :] == NB - 1
    e_r, e_i = _split(e, M, NB)  # type: ignore[misc]
    e_r = tl.where(last, e_r + ar * a_r[:, None] + ai * a_i[:, None], e_r)
    e_i = tl.where(last, e_i + ar * a_i[:, None] - ai * a_r[:, None], e_i)
    scanned = tl.associative_scan((ar, -ai, e_r, e_i), 1, compose, reverse=True)
    f_r, f_i = scanned[2], scanned[3]
    following = tl.broadcast_to(tl.minimum(c + 1, NB - 1)[None, :], [M, NB])
    h_r = tl.where(last, a_r[:, None], tl.gather(f_r, following, 1))
    h_i = tl.where(last, a_i[:, None], tl.gather(f_i, following, 1))
    return h_r, h_i, _column(f_r, first), _column(f_i, first)


@triton.jit
def _diagonals(x, Q: tl.constexpr):
    """(Q, Q) -> (Q, Q) whose row l is x[(j + l) % Q, j]: one lag to a row, those above the diagonal wrapped around."""
    i = tl.arange(0, Q)
    return tl.gather(x, (i[:, None] + i[None, :]) % Q, 0)


SIZES = ("batch", "group", "modes", "taps", "supers", "per_segment", "segments", "parts", "per_part", "final_chunk")
SIZES += ("history_taps", "after_modes", "final_modes")
"""Numbers to the compiler, whatever their value, as in `triton`."""


@triton.jit(do_not_specialize=SIZES)
def scan_backward_kernel(
    Q_, K_, V_, GRAD_, SHIFT_, TAPS_, READ_, WRITE_, DECAY_, STARTS_, HISTORY_, AFTER_, FINAL_,
    RELATIVE_, CONTINUES_, MOST_,
    DQ_, DK_, DV_, HALO_, BEFORE_, DSHIFT_, DTAPS_, DREAD_, DWRITE_, DDECAY_,
    batch, length, group, modes, taps, supers, per_segment, segments, parts, per_part, final_chunk,
    history_taps, after_modes, final_modes,
    Q: tl.constexpr, NB: tl.constexpr, M: tl.constexpr, DOT: tl.constexpr,
    SHIFT: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr, BORDERS: tl.constexpr,
):  # fmt: skip
    """One program per (channel, part), channel slowest; a part is `per_part` segments of the channel's rows.

    BORDERS: rows have something before or after them: `history_taps` tokens of HISTORY_, `after_modes` modes of AFTER_
    behind each segment, `final_modes` modes of FINAL_; each may be zero. One flag for the three, so that there are two
    forms of the kernel to compile and not eight.
    """
    program = tl.program_id(0)
    h = (program // parts).to(tl.int64)
    part = program % parts
    kernel = h // group
    i, c = tl.arange(0, Q), tl.arange(0, NB)
    state = _mode_column(tl.arange(0, 2 * M))
    real = state < 2 * modes
    chunks = tl.cdiv(length, Q)
    first, last = c[None, :] == 0, c[None, :] == NB - 1
    lag = i[:, None] - i[None, :]
    t = load_lower(TAPS_ + kernel * Q, Q, Q, DOT)
    pair = i[:, None] * 2 * modes + state[None, :]
    operator = kernel * Q * 2 * modes + pair
    read = tl.load(READ_ + operator, mask=real[None, :], other=0.0).to(DOT)
    write = tl.load(WRITE_ + operator, mask=real[None, :], other=0.0).to(DOT)
    rate_r, rate_i = load_state(DECAY_ + kernel * 2 * modes, modes, M)
    if SHIFT:
        lower = load_lower(SHIFT_ + h * taps, taps, Q, DOT)
        upper = load_upper(SHIFT_ + h * taps, taps, Q, DOT)
    dt, ds = tl.zeros([Q, Q], tl.float32), tl.zeros([Q, Q], tl.float32)
    dread, dwrite = tl.zeros([Q, 2 * M], tl.float32), tl.zeros([Q, 2 * M], tl.float32)
    ddecay_r, ddecay_i = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    before_first = tl.broadcast_to(tl.maximum(c - 1, 0)[None, :], [M, NB])
    following = tl.broadcast_to(tl.minimum(c + 1, NB - 1)[None, :], [Q, NB])

    for task in range(part * per_part, tl.minimum((part + 1) * per_part, batch * segments)):
        b = (task // segments).to(tl.int64)
        segment = task % segments
        row = h * batch + b
        base = row * length
        begin = segment * per_segment
        end = tl.minimum(begin + per_segment, supers)
        a_r, a_i = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
        if BORDERS:
            a_r, a_i = load_state(AFTER_ + (row * segments + segment) * 2 * modes, after_modes, M)
            final_r, final_i = load_state(FINAL_ + row * 2 * modes, final_modes, M)
            # Elsewhere the final state is read at the beginning of chunk `final_chunk`, which is in some segment.
            ends_with_it = (final_chunk == end * NB) & (end == supers)
            a_r = tl.where(ends_with_it, final_r, a_r)
            a_i = tl.where(ends_with_it, final_i, a_i)
        halo = tl.zeros([Q], tl.float32)
        # Hoisted out of the loop, the addresses of the operators' tiles would take a hundred registers.
        for step in tl.range(0, end - begin, disable_licm=True):
            sup = end - 1 - step
            column = sup * NB + c
            tok = column[None, :] * Q + i[:, None]
            inside = tok < length
            number = tok  # read where there are documents only
            most = 0
            v = tl.load(V_ + base + tok, mask=inside, other=0.0).to(tl.float32)
            ar = tl.broadcast_to(rate_r[:, None], [M, NB])
            ai = tl.broadcast_to(rate_i[:, None], [M, NB])
            if DOCUMENTS:
                number = tl.load(RELATIVE_ + b * length + tok, mask=inside, other=-1).to(tl.int32)
                end_token = tl.minimum(column * Q + Q - 1, length - 1)
                latest = tl.load(RELATIVE_ + b * length + end_token).to(tl.int32)
                goes_on = tl.load(CONTINUES_ + b * chunks + column, mask=column < chunks, other=0) != 0
                carried = (number == 0) & goes_on[None, :]
                keep = (goes_on & (latest == 0))[None, :]
                ar = tl.where(keep, ar, 0.0)
                ai = tl.where(keep, ai, 0.0)
                most = tl.load(MOST_ + b * supers + sup)
            # The forward's product z again.
            z = v
            if SHIFT:
                k = tl.load(K_ + base + tok, mask=inside, other=0.0).to(DOT)
                past = tl.load(K_ + base + tok - Q, mask=(tok >= Q) & (tok - Q < length), other=0.0).to(DOT)
                if BORDERS:
                    back = tok - Q + history_taps
                    earlier = tl.load(HISTORY_ + row * history_taps + back, mask=(tok < Q) & (back >= 0), other=0.0)
                    past = tl.where(tok < Q, earlier.to(DOT), past)
                if DOCUMENTS:
                    behind = (tok >= Q) & (tok - Q < length)
                    past_number = tl.load(RELATIVE_ + b * length + tok - Q, mask=behind, other=0).to(tl.int32)
                    end_before = tl.minimum(tl.maximum(column * Q - 1, 0), length - 1)
                    tail = tl.load(RELATIVE_ + b * length + end_before).to(tl.int32)
                    past = tl.where((past_number == tail[None, :]) | (tok < Q), past, 0.0).to(DOT)
                from_before = tl.dot(upper, past, input_precision="ieee")
                if DOCUMENTS:
                    from_before = tl.where(carried, from_before, 0.0)
                shifted = from_before + _within(lower, k, number, most, DOT, DOCUMENTS)
                z = shifted * v
            z = z.to(DOT)
            # The states before each chunk again.
            z_last = z
            if DOCUMENTS:
                z_last = tl.where(number == latest[None, :], z, 0.0).to(DOT)
            s_r, s_i = load_state(STARTS_ + (row * supers + sup) * 2 * modes, modes, M)
            x_r, x_i = _split(tl.dot(tl.trans(write), z_last, input_precision="ieee"), M, NB)
            x_r = tl.where(first, x_r + ar * s_r[:, None] - ai * s_i[:, None], x_r)
            x_i = tl.where(first, x_i + ar * s_i[:, None] + ai * s_r[:, None], x_i)
            _, _, x_r, x_i = tl.associative_scan((ar, ai, x_r, x_i), 1, compose)
            p_r = tl.where(first, s_r[:, None], tl.gather(x_r, before_first, 1))
            p_i = tl.where(first, s_i[:, None], tl.gather(x_i, before_first, 1))
            p = _join(p_r, p_i, M, NB).to(DOT)
            # What the output's gradient says to q and y.
            dy = tl.load(GRAD_ + base + tok, mask=inside, other=0.0).to(tl.float32)
            if GATE:
                y = tl.dot(read, p, input_precision="ieee")
                if DOCUMENTS:
                    y = tl.where(carried, y, 0.0)
                y += _within(t, z, number, most, DOT, DOCUMENTS)
                tl.store(DQ_ + base + tok, (dy * y).to(DQ_.dtype.element_ty), mask=inside)
                dy *= tl.load(Q_ + base + tok, mask=inside, other=0.0).to(tl.float32)
            dy = dy.to(DOT)
            dy_carried = dy
            if DOCUMENTS:
                dy_carried = tl.where(carried, dy, 0.0).to(DOT)
            # The adjoints of the states after each chunk.
            e = tl.dot(tl.trans(read), dy_carried, input_precision="ieee")
            if BORDERS:
                final = tl.load(FINAL_ + row * 2 * modes + state, mask=state < 2 * final_modes, other=0.0)
                e += tl.where((column == final_chunk)[None, :], final[:, None], 0.0)
            h_r, h_i, f_r, f_i = _adjoint(e, a_r, a_i, ar, ai, M, NB)
            active_r = h_r
            active_i = h_i
            if DOCUMENTS:
                active_r = tl.where(keep, h_r, 0.0)
                active_i = tl.where(keep, h_i, 0.0)
            ddecay_r += tl.sum(active_r * p_r + active_i * p_i, 1)
            ddecay_i += tl.sum(active_i * p_r - active_r * p_i, 1)
            a_r = f_r
            a_i = f_i
            hs = _join(h_r, h_i, M, NB).to(DOT)
            dz = tl.dot(write, hs, input_precision="ieee")
            dread = tl.dot(dy_carried, tl.trans(p), dread, input_precision="ieee")
            dwrite = tl.dot(z_last, tl.trans(hs), dwrite, input_precision="ieee")
            dt = _products(dt, dy, z, number, most, DOT, DOCUMENTS)
            if DOCUMENTS:
                dz = tl.where(number == latest[None, :], dz, 0.0)
            dz += _within(tl.trans(t), dy, number, most, DOT, DOCUMENTS)
            # Back through the product and the shift.
            if SHIFT:
                tl.store(DV_ + base + tok, (dz * shifted).to(DV_.dtype.element_ty), mask=inside)
                dk1 = (dz * v).to(DOT)
                dk1_up = dk1
                if DOCUMENTS:
                    dk1_up = tl.where(carried, dk1, 0.0).to(DOT)
                up = tl.dot(tl.trans(upper), dk1_up, input_precision="ieee")
                dk = tl.where(last, halo[:, None], tl.gather(up, following, 1))
                halo = _column(up, first)
                if DOCUMENTS:
                    dk = tl.where(number == latest[None, :], dk, 0.0)
                dk += _within(tl.trans(lower), dk1, number, most, DOT, DOCUMENTS)
                below = _products(tl.zeros([Q, Q], tl.float32), dk1, k, number, most, DOT, DOCUMENTS)
                above = tl.dot(dk1_up, tl.trans(past), input_precision="ieee")
                ds += tl.where(lag >= 0, below, above)
                tl.store(DK_ + base + tok, dk.to(DK_.dtype.element_ty), mask=inside)
            else:
                tl.store(DV_ + base + tok, dz.to(DV_.dtype.element_ty), mask=inside)
        if SHIFT and DOCUMENTS:
            tail = RELATIVE_ + b * length + begin * NB * Q - Q
            near = tl.load(tail + i, mask=(begin > 0) & (i >= 0), other=0)
            halo = tl.where(near == tl.load(tail + Q - 1, mask=begin > 0, other=0), halo, 0.0)
        if segment == 0:
            store_state(BEFORE_ + row * 2 * modes, a_r, a_i, modes, M)
        if SHIFT:
            tl.store(HALO_ + (row * segments + segment) * Q + i, halo)

    out = program.to(tl.int64)
    tl.store(DTAPS_ + out * Q + i, tl.sum(tl.where(i[:, None] + i[None, :] < Q, _diagonals(dt, Q), 0.0), 1))
    if SHIFT:
        tl.store(DSHIFT_ + out * Q + i, tl.sum(_diagonals(ds, Q), 1))
    tl.store(DREAD_ + out * Q * 2 * modes + pair, dread, mask=real[None, :])
    tl.store(DWRITE_ + out * Q * 2 * modes + pair, dwrite, mask=real[None, :])
    store_state(DDECAY_ + out * 2 * modes, ddecay_r, ddecay_i, modes, M)


ADJOINT_SIZES = ("batch", "group", "modes", "supers", "per_segment", "segments", "final_chunk", "final_modes")


@triton.jit(do_not_specialize=ADJOINT_SIZES)
def adjoint_kernel(
    Q_, GRAD_, READ_, DECAY_, FINAL_, RELATIVE_, CONTINUES_, LOCAL_,
    batch, length, group, modes, supers, per_segment, segments, final_chunk, final_modes,
    Q: tl.constexpr, NB: tl.constexpr, M: tl.constexpr, DOT: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The adjoint of the state before each segment, as if nothing came after; programs as `scan_fwd_kernel`'s."""
    program = tl.program_id(0)
    segment = program % segments
    row = (program // segments).to(tl.int64)
    h, b = row // batch, row % batch
    i, c = tl.arange(0, Q), tl.arange(0, NB)
    state = _mode_column(tl.arange(0, 2 * M))
    real = state < 2 * modes
    chunks = tl.cdiv(length, Q)
    pair = i[:, None] * 2 * modes + state[None, :]
    read = tl.load(READ_ + h // group * Q * 2 * modes + pair, mask=real[None, :], other=0.0).to(DOT)
    rate_r, rate_i = load_state(DECAY_ + h // group * 2 * modes, modes, M)
    base = row * length
    begin = segment * per_segment
    end = tl.minimum(begin + per_segment, supers)
    final_r, final_i = load_state(FINAL_ + row * 2 * modes, final_modes, M)
    ends_with_it = (final_chunk == end * NB) & (end == supers)
    a_r = tl.where(ends_with_it, final_r, 0.0)
    a_i = tl.where(ends_with_it, final_i, 0.0)
    for step in tl.range(0, end - begin, disable_licm=True):
        column = (end - 1 - step) * NB + c
        tok = column[None, :] * Q + i[:, None]
        inside = tok < length
        dy = tl.load(GRAD_ + base + tok, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            dy *= tl.load(Q_ + base + tok, mask=inside, other=0.0).to(tl.float32)
        ar = tl.broadcast_to(rate_r[:, None], [M, NB])
        ai = tl.broadcast_to(rate_i[:, None], [M, NB])
        if DOCUMENTS:
            number = tl.load(RELATIVE_ + b * length + tok, mask=inside, other=-1).to(tl.int32)
            end_token = tl.minimum(column * Q + Q - 1, length - 1)
            latest = tl.load(RELATIVE_ + b * length + end_token).to(tl.int32)
            goes_on = tl.load(CONTINUES_ + b * chunks + column, mask=column < chunks, other=0) != 0
            keep = (goes_on & (latest == 0))[None, :]
            ar = tl.where(keep, ar, 0.0)
            ai = tl.where(keep, ai, 0.0)
            dy = tl.where((number == 0) & goes_on[None, :], dy, 0.0)
        e = tl.dot(tl.trans(read), dy.to(DOT), input_precision="ieee")
        final = tl.load(FINAL_ + row * 2 * modes + state, mask=state < 2 * final_modes, other=0.0)
        e += tl.where((column == final_chunk)[None, :], final[:, None], 0.0)
        _, _, a_r, a_i = _adjoint(e, a_r, a_i, ar, ai, M, NB)
    store_state(LOCAL_ + program.to(tl.int64) * 2 * modes, a_r, a_i, modes, M)


class ScanGradients(NamedTuple):
    """What `scan_backward` returns; None where there was no such input or nothing was asked for."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    shift: Tensor | None
    taps: Tensor | None
    read: Tensor | None
    write: Tensor | None
    decay: Tensor | None
    initial: Tensor
    history: Tensor | None


DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
PROGRAMS = 1024
"""Programs to aim for: several waves on any accelerator. A constant, so that sums have one order everywhere."""
FEWEST_PROGRAMS = 128
"""Where there are fewer rows than this, rows are cut."""


def choose_config(dtype: torch.dtype, modes: int) -> BackwardConfig:
    """The tile of an input dtype; 8 warps, because four (64, 64) fp32 sums alone take 128 registers a thread of 4."""
    return BackwardConfig(stages=1 if dtype == torch.float32 else 2)


def plan(channels: int, batch: int, supers: int) -> tuple[int, int]:
    """(super-chunks a segment, segments a part).

    A part is a program and writes sums as large as its operators, so a program takes several rows where there are
    enough of them. Rows are cut only where they are too few for the device, never to less than four super-chunks.
    """
    segments = max(1, min(supers // 4, 2 * FEWEST_PROGRAMS // (channels * batch)))
    per_segment = _ceil(supers, segments)
    tasks = batch * _ceil(supers, per_segment)
    parts = min(tasks, _ceil(PROGRAMS, channels))
    return per_segment, _ceil(tasks, parts)


def scan_backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    shift: Tensor | None,
    taps: Tensor,
    read: Tensor,
    write: Tensor,
    decay: Tensor,
    history: Tensor | None,
    documents: Chunks | None,
    starts: Tensor,
    *,
    config: BackwardConfig | None = None,
    schedule: tuple[int, int] | None = None,
) -> ScanGradients:
    """Gradients of `scan_forward`.

    grad_y like y, grad_final like final or None; the others as `scan_forward` had them, `starts` as it returned them
    (so `config.columns` must be the forward's). q is None without a gate; k, shift and history where z = v.
    The operators' gradients are computed whether or not anyone wants them: without them the kernel is another one.
    schedule (super-chunks a segment, segments a part) replaces `plan`'s.

    Gradients of q, k, v have their dtype, all others are fp32. Two calls agree bitwise.
    """
    config = config or choose_config(v.dtype, read.shape[2] // 2)
    channels, batch, length = v.shape
    heads, chunk, modes = read.shape[0], read.shape[1], read.shape[2] // 2
    supers, columns = starts.shape[2], config.columns
    assert supers == _ceil(length, chunk * columns), "the forward's configuration had other columns"
    per_segment, per_part = schedule or plan(channels, batch, supers)
    segments = _ceil(supers, per_segment)
    parts = _ceil(batch * segments, per_part)
    relative, continues, most = (None, None, None) if documents is None else documents[:3]
    grad_y, v = even(grad_y), even(v)
    q, k = (None if x is None else even(x) for x in (q, k))
    relative = None if relative is None else even(relative, last=True)
    taps, read, write, decay = (aligned(x) for x in (taps, read, write, decay))
    sizes = [batch, v.shape[2], channels // heads, modes]
    shift, history, grad_final = (None if x is None else aligned(x) for x in (shift, history, grad_final))
    reach, final_modes = 0 if history is None else history.shape[2], 0 if grad_final is None else modes
    constants: dict[str, Any] = {
        "Q": chunk, "NB": columns, "M": padded_modes(modes), "DOT": DOT[v.dtype], "GATE": q is not None,
        "DOCUMENTS": documents is not None, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=v.device)

    after, final = None, decay if grad_final is None else grad_final  # where nothing is read any address will do
    if segments > 1:
        local = new(channels, batch, segments, 2 * modes)
        inputs = [q, grad_y, read, decay, final, relative, continues, local, *sizes]
        inputs += [supers, per_segment, segments, length // chunk, final_modes]
        with torch.cuda.device_of(v):
            adjoint_kernel[(channels * batch * segments,)](*inputs, **constants)
        after = adjoints_after(local, decay, per_segment * columns, documents)

    borders = after is not None or final_modes > 0 or reach > 0
    beyond = (history if reach else decay, decay if after is None else after, final) if borders else (None,) * 3
    inputs = [q, k, v, grad_y, shift, taps, read, write, decay, starts, *beyond, relative, continues, most]
    dq, dk, dv = (None if x is None else torch.empty_like(x) for x in (q, k, v))
    before = new(channels, batch, 2 * modes)
    halo = None if k is None else new(channels, batch, segments, chunk)
    shapes = [(chunk,), (chunk, 2 * modes), (chunk, 2 * modes), (2 * modes,)]
    sums = [None if k is None else new(channels, parts, chunk), *(new(channels, parts, *shape) for shape in shapes)]
    outputs = [dq, dk, dv, halo, before, *sums]
    sizes += [0 if shift is None else shift.shape[1], supers, per_segment, segments, parts, per_part, length // chunk]
    sizes += [reach, 0 if after is None else modes, final_modes]
    constants |= {"SHIFT": k is not None, "BORDERS": borders}
    with torch.cuda.device_of(v):
        scan_backward_kernel[(channels * parts,)](*inputs, *outputs, *sizes, **constants)
    assert dv is not None
    dhistory = None
    if halo is not None and dk is not None and k is not None:
        for s in range(1, segments):  # what a segment's first chunk says of the tokens before it
            begin = s * per_segment * columns * chunk
            dk[:, :, begin - chunk : begin] += halo[:, :, s]
        if history is not None:
            dhistory = halo[:, :, 0, chunk - history.shape[2] :].to(history.dtype)
    dq, dk, dv = (None if x is None else x[:, :, :length] for x in (dq, dk, dv))
    assert dv is not None
    dshift = None if shift is None or sums[0] is None else sums[0].sum(1)[:, : shift.shape[1]]
    dtaps, dread, dwrite, ddecay = (None if x is None else x.unflatten(0, (heads, -1)).sum((1, 2)) for x in sums[1:])
    return ScanGradients(dq, dk, dv, dshift, dtaps, dread, dwrite, ddecay, before, dhistory)


def adjoints_after(local: Tensor, decay: Tensor, span: int, documents: Chunks | None) -> Tensor:
    """What each segment of `span` chunks receives from those after it: the scan over segments, backwards.

    local (C, B, S, N), the adjoint before each segment if nothing came after it; decay (H, N). Returns the adjoint
    after each segment, (C, B, S, N).
    """
    unbroken = None
    if documents is not None:
        spare = local.shape[2] * span - documents.unbroken.shape[1]
        unbroken = F.pad(documents.unbroken, (0, spare)).unflatten(1, (-1, span)).flip(1).flatten(1)
    # Not a product with a tensor made of [1, -1]: that would be copied from the host, which waits for the device.
    conjugate = torch.view_as_real(_complex(decay).conj().resolve_conj()).flatten(-2)
    return segment_states(local[:, :, 1:].flip(2), conjugate, span, None, unbroken).flip(2).contiguous()
