"""The chunked form as one Triton kernel: H3's whole mixer (shift filter, product, SSM, gate), or a plain diagonal SSM.

One program walks one row of one channel, `Config.columns` chunks of 64 tokens at a time (a super-chunk): the columns
of every tile are consecutive chunks, so all loads are contiguous, the products inside chunks are (64, 64) @ (64,
columns) on tensor cores and the recurrence between the columns is an associative scan. With k the raw key, p and x
the states before and after a chunk (M complex numbers):

    k' = L k_c + U k_{c-1}        the shift filter, lower and upper Toeplitz parts of its taps
    z = k' v,   y = T z + R p,   out = q y
    p_{c+1} = x_c = D p_c + W z_c

Documents: tokens carry their document's number relative to the chunk's first token; T and L are applied once per
number that occurs in the super-chunk, to the tokens of that number alone.

Legend: C channels, H kernels of C / H channels each, B rows, L tokens, Q = 64 tokens a chunk, M modes, N = 2 M of
real and imaginary parts interleaved.
Sources: Fu et al. 2022 (H3), section 4; Dao and Gu 2024 (SSD), section 6; Blelloch 1990 for the scan.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .documents import Chunks

CHUNK = 64
"""Tokens per chunk: the shortest side that wgmma takes, and as many taps as H3's shift filter has."""


@triton.jit
def compose(left_re, left_im, left_add_re, left_add_im, right_re, right_im, right_add_re, right_add_im):
    """Two steps x -> a x + b of complex numbers, left first, as one."""
    re = right_re * left_re - right_im * left_im
    im = right_re * left_im + right_im * left_re
    add_re = right_re * left_add_re - right_im * left_add_im + right_add_re
    add_im = right_re * left_add_im + right_im * left_add_re + right_add_im
    return re, im, add_re, add_im


@triton.jit
def compose_apart(left_re, left_im, left_add_re, left_add_im, right_re, right_im, right_add_re, right_add_im):
    """`compose` where a = 0 ends a document: nothing passes, not even what is not finite."""
    re, im, add_re, add_im = compose(  # pyright: ignore[reportGeneralTypeIssues]
        left_re, left_im, left_add_re, left_add_im, right_re, right_im, right_add_re, right_add_im
    )
    stops = (right_re == 0) & (right_im == 0)
    return re, im, tl.where(stops, right_add_re, add_re), tl.where(stops, right_add_im, add_im)


@triton.jit
def load_lower(taps, count, CHUNK: tl.constexpr, DOT: tl.constexpr):
    """(Q, Q) with entry [i, j] = taps[i - j] where 0 <= i - j < count, else zero: what a chunk takes from itself."""
    lag = tl.arange(0, CHUNK)[:, None] - tl.arange(0, CHUNK)[None, :]
    return tl.load(taps + lag, mask=(lag >= 0) & (lag < count), other=0.0).to(DOT)


@triton.jit
def load_upper(taps, count, CHUNK: tl.constexpr, DOT: tl.constexpr):
    """(Q, Q) with entry [i, j] = taps[Q + i - j] where i < j: what a chunk takes from the chunk before."""
    lag = CHUNK + tl.arange(0, CHUNK)[:, None] - tl.arange(0, CHUNK)[None, :]
    return tl.load(taps + lag, mask=(lag < CHUNK) & (lag < count), other=0.0).to(DOT)


@triton.jit
def load_pairs(operator, modes, CHUNK: tl.constexpr, MODES: tl.constexpr, DOT: tl.constexpr):
    """An operator (Q, N), pairs interleaved -> its real and imaginary parts, (Q, M) each, zero beyond `modes`."""
    i, m = tl.arange(0, CHUNK), tl.arange(0, MODES)
    at = operator + i[:, None] * (2 * modes) + 2 * m[None, :]
    real = (m < modes)[None, :] & (i >= 0)[:, None]
    return tl.load(at, mask=real, other=0.0).to(DOT), tl.load(at + 1, mask=real, other=0.0).to(DOT)


@triton.jit
def load_state(state, modes, MODES: tl.constexpr):
    """A state (N), pairs interleaved -> its real and imaginary parts (M) each, zero beyond `modes`."""
    m = tl.arange(0, MODES)
    return tl.load(state + 2 * m, mask=m < modes, other=0.0), tl.load(state + 2 * m + 1, mask=m < modes, other=0.0)


@triton.jit
def store_state(state, re, im, modes, MODES: tl.constexpr):
    """The inverse of `load_state`."""
    m = tl.arange(0, MODES)
    tl.store(state + 2 * m, re, mask=m < modes)
    tl.store(state + 2 * m + 1, im, mask=m < modes)


SIZES = ("batch", "group", "modes", "shift_taps", "segments", "segment_supers", "whole_chunks", "initial_modes")
"""Sizes that are numbers to the compiler, whatever their value: one form of the kernel serves them all. Triton would
make another one wherever one of them is 1 or a multiple of 16. `length` always is such a multiple (`even`)."""


@triton.jit(do_not_specialize=SIZES)
def scan_fwd_kernel(
    Q_, K_, V_, Y_, SHIFT_, TAPS_, READ_, WRITE_, DECAY_, INITIAL_, HISTORY_, RELATIVE_, CONTINUES_, MOST_,
    FINAL_, STARTS_, batch, length, group, modes, shift_taps, segments, segment_supers, whole_chunks, initial_modes,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr, MODES: tl.constexpr, DOT: tl.constexpr, SHIFT: tl.constexpr,
    GATE: tl.constexpr, HISTORY: tl.constexpr, DOCUMENTS: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """One program per (channel, row, segment), channel slowest: neighbors share a channel's operators in the L2 cache.

    One grid axis for all three, because only the first may exceed 65,535. Without OUTPUT only the state after each
    segment is computed. `length` is a multiple of 16, of which `whole_chunks` chunks are whole in the caller's row;
    `initial_modes` is `modes`, or zero where there is no state to begin with.
    """
    program = tl.program_id(0)
    segment = program % segments
    row = (program // segments).to(tl.int64)
    channel, b = row // batch, row % batch
    head = channel // group
    i, c = tl.arange(0, CHUNK), tl.arange(0, COLUMNS)
    first = c[None, :] == 0
    previous = tl.broadcast_to(tl.maximum(c - 1, 0)[None, :], [MODES, COLUMNS])
    if SHIFT:
        shift_lower = load_lower(SHIFT_ + channel * shift_taps, shift_taps, CHUNK, DOT)
        shift_upper = load_upper(SHIFT_ + channel * shift_taps, shift_taps, CHUNK, DOT)
    write_at = WRITE_ + head * CHUNK * 2 * modes
    write_re, write_im = load_pairs(write_at, modes, CHUNK, MODES, DOT)  # pyright: ignore[reportGeneralTypeIssues]
    write_re, write_im = tl.trans(write_re), tl.trans(write_im)
    if OUTPUT:
        toeplitz = load_lower(TAPS_ + head * CHUNK, CHUNK, CHUNK, DOT)
        read_re, read_im = load_pairs(READ_ + head * CHUNK * 2 * modes, modes, CHUNK, MODES, DOT)
    decay_re, decay_im = load_state(DECAY_ + head * 2 * modes, modes, MODES)

    base = row * length
    supers = tl.cdiv(length, CHUNK * COLUMNS)
    at_segment = program.to(tl.int64) * 2 * modes
    state_re, state_im = load_state(INITIAL_ + at_segment, initial_modes, MODES)

    for n in range(segment * segment_supers, tl.minimum((segment + 1) * segment_supers, supers)):
        if OUTPUT:
            store_state(STARTS_ + (row * supers + n) * 2 * modes, state_re, state_im, modes, MODES)
        chunk = n * COLUMNS + c
        token = chunk[None, :] * CHUNK + i[:, None]
        before = token - CHUNK
        inside = token < length
        came_before = (before >= 0) & (before < length)
        v = tl.load(V_ + base + token, mask=inside, other=0.0)
        if DOCUMENTS:
            numbers = RELATIVE_ + b * length
            number = tl.load(numbers + token, mask=inside, other=0).to(tl.int32)
            end = tl.minimum(chunk * CHUNK + CHUNK, length) - 1
            end_number = tl.load(numbers + end, mask=chunk * CHUNK < length, other=0).to(tl.int32)[None, :]
            chunks = tl.cdiv(length, CHUNK)
            continues = (tl.load(CONTINUES_ + b * chunks + chunk, mask=chunk < chunks, other=0) != 0)[None, :]
            from_before = continues & (number == 0)
            most = tl.load(MOST_ + b * supers + n)
        if SHIFT:
            k = tl.load(K_ + base + token, mask=inside, other=0.0)
            k_before = tl.load(K_ + base + before, mask=came_before, other=0.0)
            if HISTORY:
                past = before + shift_taps - 1
                at = HISTORY_ + row * (shift_taps - 1) + past
                earlier = tl.load(at, mask=(before < 0) & (past >= 0), other=0.0).to(k_before.dtype)
                k_before = tl.where(before < 0, earlier, k_before)
            if DOCUMENTS:
                # Of the chunk before, only its last document can go on here.
                before_number = tl.load(numbers + before, mask=came_before, other=0).to(tl.int32)
                began = (chunk > 0) & (chunk * CHUNK <= length)
                before_end = tl.load(numbers + chunk * CHUNK - 1, mask=began, other=0).to(tl.int32)[None, :]
                k_before = tl.where(before_number == before_end, k_before, 0.0)
            shifted = tl.dot(shift_upper, k_before, input_precision="ieee")
        if DOCUMENTS:
            if SHIFT:
                shifted = tl.where(from_before, shifted, 0.0)
            z = tl.zeros([CHUNK, COLUMNS], DOT)
            y = tl.zeros([CHUNK, COLUMNS], tl.float32)
            for document in range(0, most + 1):
                here = number == document
                if SHIFT:
                    own = tl.dot(shift_lower, tl.where(here, k, 0.0), shifted, input_precision="ieee")
                    part = tl.where(here, own * v.to(tl.float32), 0.0).to(DOT)
                else:
                    part = tl.where(here, v, 0.0)
                z = tl.where(here, part, z)
                if OUTPUT:
                    y += tl.where(here, tl.dot(toeplitz, part, input_precision="ieee"), 0.0)
            ending = tl.where(number == end_number, z, 0.0)
        else:
            if SHIFT:
                shifted = tl.dot(shift_lower, k, shifted, input_precision="ieee")
                z = (shifted * v.to(tl.float32)).to(DOT)
            else:
                z = v
            ending = z
            if OUTPUT:
                y = tl.dot(toeplitz, z, input_precision="ieee")
        x_re = tl.dot(write_re, ending, input_precision="ieee")
        x_im = tl.dot(write_im, ending, input_precision="ieee")
        a_re = tl.broadcast_to(decay_re[:, None], [MODES, COLUMNS])
        a_im = tl.broadcast_to(decay_im[:, None], [MODES, COLUMNS])
        if DOCUMENTS:
            passes = continues & (end_number == 0)
            a_re, a_im = tl.where(passes, a_re, 0.0), tl.where(passes, a_im, 0.0)
        # The carried state enters the first column's update; scanning then gives the state after every chunk.
        add_re = a_re * state_re[:, None] - a_im * state_im[:, None]
        add_im = a_re * state_im[:, None] + a_im * state_re[:, None]
        if DOCUMENTS:
            # Not the product with zero alone: of a state that is not finite it is NaN.
            x_re = tl.where(first & passes, x_re + add_re, x_re)
            x_im = tl.where(first & passes, x_im + add_im, x_im)
            a_re, a_im, x_re, x_im = tl.associative_scan((a_re, a_im, x_re, x_im), 1, compose_apart)
        else:
            x_re = tl.where(first, x_re + add_re, x_re)
            x_im = tl.where(first, x_im + add_im, x_im)
            a_re, a_im, x_re, x_im = tl.associative_scan((a_re, a_im, x_re, x_im), 1, compose)
        if OUTPUT:
            p_re = tl.where(first, state_re[:, None], tl.gather(x_re, previous, 1)).to(DOT)
            p_im = tl.where(first, state_im[:, None], tl.gather(x_im, previous, 1)).to(DOT)
            if DOCUMENTS:
                carried = tl.dot(read_re, p_re, input_precision="ieee")
                carried = tl.dot(read_im, p_im, carried, input_precision="ieee")
                y += tl.where(from_before, carried, 0.0)
            else:
                y = tl.dot(read_re, p_re, y, input_precision="ieee")
                y = tl.dot(read_im, p_im, y, input_precision="ieee")
            if GATE:
                y *= tl.load(Q_ + base + token, mask=inside, other=0.0).to(tl.float32)
            tl.store(Y_ + base + token, y.to(Y_.dtype.element_ty), mask=inside)
        # After the last whole chunk of the super-chunk; there may be none in the row's last super-chunk.
        last = tl.minimum(whole_chunks - n * COLUMNS, COLUMNS) - 1
        state_re = tl.where(last < 0, state_re, tl.sum(tl.where(c[None, :] == last, x_re, 0.0), 1))
        state_im = tl.where(last < 0, state_im, tl.sum(tl.where(c[None, :] == last, x_im, 0.0), 1))
    store_state(FINAL_ + at_segment, state_re, state_im, modes, MODES)


@dataclass(frozen=True)
class Config:
    """How a call is cut: chunks per super-chunk, warps and pipeline stages of a program, segments of a row (None:
    chosen from the number of programs and the length)."""

    columns: int = 16
    warps: int = 4
    stages: int = 2
    segments: int | None = None


_DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
PROGRAMS_AT_ONCE = 4
"""Programs of the forward that share a multiprocessor, by their registers."""
MOST_SEGMENTS = 64


def choose_config(dtype: torch.dtype, modes: int) -> Config:
    """The cut for an input dtype and a number of modes: more warps where tiles would not fit the registers."""
    wide = modes > 32 or dtype == torch.float32
    return Config(warps=8 if wide else 4)


def choose_segments(programs: int, supers: int, multiprocessors: int) -> int:
    """Pieces that a row of `supers` super-chunks is cut into, so that few rows still occupy the device.

    A cut row is read twice, once for its states alone, so cutting pays where it more than doubles the programs at
    work; a segment shorter than four super-chunks would spend its time on loading operators.
    """
    places = PROGRAMS_AT_ONCE * multiprocessors
    pieces = min(places // programs, supers // 4, MOST_SEGMENTS)
    return pieces if pieces > 2 else 1


def scan_forward(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    shift_taps: Tensor | None,
    taps: Tensor,
    read: Tensor,
    write: Tensor,
    decay: Tensor,
    initial: Tensor | None,
    history: Tensor | None,
    documents: Chunks | None = None,
    *,
    block: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixer (q, k, shift_taps given) or the plain SSM of v (all three None) from its chunk operators.

    q, k, v: (C, B, L), one dtype of fp32, fp16, bf16; operators fp32 as `_ChunkOperators` makes them:
    shift_taps (C, n <= 64), taps (H, 64), read and write (H, 64, N), decay (H, N). initial (C, B, N) fp32 and history
    (C, B, n - 1) may be None. documents: from `find_chunks` with this block's columns.

    Returns y like v, the state after the last whole chunk (C, B, N) fp32, and the states before each super-chunk
    (C, B, supers, N) fp32, from which the backward recomputes the others.
    """
    modes = decay.shape[1] // 2
    block = block or choose_config(v.dtype, modes)
    channels, batch, length = v.shape
    supers = _ceil(length, CHUNK * block.columns)
    segments = block.segments or choose_segments(channels * batch, supers, _multiprocessors(v.device))
    piece = _ceil(supers, segments)
    segments = _ceil(supers, piece)
    q, k = (None if x is None else even(x) for x in (q, k))
    v = even(v)
    taps, read, write, decay = (aligned(x) for x in (taps, read, write, decay))
    shift_taps, initial, history = (None if x is None else aligned(x) for x in (shift_taps, initial, history))
    y = torch.empty_like(v)
    starts = torch.empty(channels, batch, supers, 2 * modes, dtype=torch.float32, device=v.device)
    assert block.columns >= 16
    assert documents is None or documents.most.shape[1] == supers
    constants: dict[str, Any] = {
        "CHUNK": CHUNK, "COLUMNS": block.columns, "MODES": padded_modes(modes), "DOT": _DOT[v.dtype],
        "SHIFT": shift_taps is not None, "GATE": q is not None, "HISTORY": history is not None and history.shape[2] > 0,
        "DOCUMENTS": documents is not None, "num_warps": block.warps, "num_stages": block.stages,
    }  # fmt: skip
    if not constants["HISTORY"]:
        history = None
    relative, continues, most = (None, None, None) if documents is None else documents[:3]
    relative = None if relative is None else even(relative, last=True)

    def launch(pieces: int, before: Tensor | None, output: bool) -> Tensor:
        final = torch.empty(channels, batch, pieces, 2 * modes, dtype=torch.float32, device=v.device)
        flags: dict[str, Any] = constants | {"OUTPUT": output}
        with torch.cuda.device_of(v):  # Triton launches on the current device, whatever its arguments are on
            scan_fwd_kernel[(channels * batch * pieces,)](
                q, k, v, y, shift_taps, taps, read, write, decay, final if before is None else before, history,
                relative, continues, most, final, starts, batch, v.shape[2], channels // decay.shape[0], modes,
                0 if shift_taps is None else shift_taps.shape[1], pieces, piece, length // CHUNK,
                0 if before is None else modes, **flags,
            )  # fmt: skip
        return final

    if segments > 1:
        chunks = piece * block.columns
        unbroken = None if documents is None else documents.unbroken
        initial = segment_states(launch(segments - 1, None, False), decay, chunks, initial, unbroken)
    return y[:, :, :length], launch(segments, initial, True)[:, :, -1], starts


LENGTH_UNIT = 16
"""What the kernels' row length is a multiple of: vectors of 16 bytes in every type, and Triton's own step."""


def even(x: Tensor, last: bool = False) -> Tensor:
    """Rows (..., L) in memory as the kernels take it, made longer to a multiple of 16 tokens by zeros, or by the last
    token: tokens after the last one change nothing before them, and what is computed for them is cut off.

    A copy for other lengths only. It costs less than what it saves: the kernels then read every row in whole vectors.
    """
    spare = -x.shape[-1] % LENGTH_UNIT
    if not spare:
        return aligned(x)
    more = x[..., -1:].expand(*x.shape[:-1], spare) if last else x.new_zeros(*x.shape[:-1], spare)
    return torch.cat([x, more], -1)


def aligned(x: Tensor) -> Tensor:
    """x contiguous, at an address that is a multiple of 16 bytes: Triton compiles another kernel for any other."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def padded_modes(modes: int) -> int:
    """Modes as a side of a tile: 32, for which the kernel is made, or 64. A tile of 16 would leave the memory traffic
    and most products as they are, and make every form of the kernels a third time."""
    return 32 if modes <= 32 else 64


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segment_states(
    local: Tensor, decay: Tensor, chunks: int, initial: Tensor | None, unbroken: Tensor | None
) -> Tensor:
    """The state before each segment, (C, B, S, N), from what each but the last adds, local (C, B, S - 1, N).

    decay (H, N) over one chunk, `chunks` of them a segment; initial (C, B, N) or None; unbroken (B, chunks of the
    row) or None. Log2(S) steps, each composing every segment with the one 1, 2, 4, ... before it.
    """
    channels, batch, _, n = local.shape
    first = local.new_zeros(channels, batch, 1, n) if initial is None else initial[:, :, None]
    x = torch.view_as_complex(torch.cat([first, local], 2).unflatten(3, (n // 2, 2)))
    rate = _power(torch.view_as_complex(decay.double().unflatten(1, (n // 2, 2))), chunks).to(x.dtype)
    rate = rate.repeat_interleave(channels // decay.shape[0], 0)[:, None, None].expand(-1, -1, x.shape[2], -1)
    if unbroken is not None:
        whole = unbroken[:, : chunks * (x.shape[2] - 1)].unflatten(1, (x.shape[2] - 1, chunks)).all(2)
        rate = rate * F.pad(whole, (1, 0))[None, :, :, None]
    step = 1
    while step < x.shape[2]:
        passed = rate[:, :, step:] * x[:, :, :-step]
        if unbroken is not None:  # zero times what is not finite is NaN, which must not reach another document
            passed = torch.where(rate[:, :, step:] == 0, 0, passed)
        x = torch.cat([x[:, :, :step], x[:, :, step:] + passed], 2)
        rate = torch.cat([rate[:, :, :step], rate[:, :, step:] * rate[:, :, :-step]], 2)
        step *= 2
    return torch.view_as_real(x).flatten(3)


def _power(x: Tensor, exponent: int) -> Tensor:
    """x ** exponent by squaring; torch's complex power is not defined at zero, where a strong decay underflows to."""
    result = torch.ones_like(x)
    while exponent:
        if exponent & 1:
            result = result * x
        x, exponent = x * x, exponent >> 1
    return result
