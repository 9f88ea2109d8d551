"""The fused kernel behind autograd: from parameters and a carried state to outputs and the next state.

The kernel passes states from chunk to chunk; what a call's last, incomplete chunk adds to the carried state is a
small product in torch. Everything from the model's parameters to the chunk operators is torch's autograd too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..once import differentiable_once
from .chunked import _ChunkOperators, _complex, _toeplitz
from .documents import find_chunks, last_document_mask
from .parameters import Diagonal, discretise
from .segments import CHUNK

MOST_TAPS = CHUNK
MOST_MODES = 64
"""Of 16-bit inputs."""
MOST_MODES_FP32 = 32
"""With more, the backward of fp32 inputs keeps 20 kB a thread in local memory: torch is the better form."""


MOST_TOKENS = 2**31 - 2**16
"""Of a row: places inside one are 32 bits wide in the kernel, and its last tile reaches past the row's end."""


def fused_obstacle(dtype: torch.dtype, modes: int, shift_taps: int = 1, length: int = 1) -> str | None:
    """Why the fused kernel cannot take these sizes, in words that follow "backend='triton' "; None where it can."""
    most = MOST_MODES_FP32 if dtype == torch.float32 else MOST_MODES
    if modes > most:
        return f"takes at most {most} modes of {dtype}, not {modes}"
    if shift_taps > MOST_TAPS:
        return f"takes at most {MOST_TAPS} shift taps, not {shift_taps}"
    if length > MOST_TOKENS:
        return f"takes rows of at most {MOST_TOKENS} tokens, not {length}"
    return None


class _FusedScan(torch.autograd.Function):
    """`triton.scan_forward` with gradients: y and the state after the last whole chunk."""

    @staticmethod
    def forward(ctx, q, k, v, shift_taps, taps, read, write, decay, initial, history, documents):
        from .triton import scan_forward

        y, final, starts = scan_forward(q, k, v, shift_taps, taps, read, write, decay, initial, history, documents)
        ctx.save_for_backward(q, k, v, shift_taps, taps, read, write, decay, history, starts)
        ctx.documents = documents
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_y, grad_final):
        from .triton_backward import scan_backward

        q, k, v, shift_taps, taps, read, write, decay, history, starts = ctx.saved_tensors
        grad_y = torch.zeros_like(v) if grad_y is None else grad_y.contiguous()
        needs = ctx.needs_input_grad
        found = scan_backward(
            grad_y, grad_final, q, k, v, shift_taps, taps, read, write, decay, history, ctx.documents, starts
        )
        return *(x if needed else None for x, needed in zip(found, needs[:10], strict=True)), None


def fused_mix(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    shift_taps: Tensor | None,
    diag: Diagonal,
    d: Tensor | None,
    *,
    document_ids: Tensor | None,
    carried_document: Tensor | None,
    initial: Tensor | None,
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """H3's mixer for one sequence a channel (or, without q, k, shift_taps, the diagonal SSM of v) through the kernel.

    q, k, v (C, B, L) of one dtype; shift_taps (C, n) fp32 with the skip in tap 0; initial (C, B, M, 2) fp32, history
    (C, B, n - 1), already zero where it belongs to another document; carried_document (B,) of that state, or None.
    Returns y like v and the state after the last token (C, B, M, 2) fp32. Nothing waits for the device.
    """
    from .triton import choose_config

    q, k = (None if x is None else x.contiguous() for x in (q, k))
    v = v.contiguous()
    read, write, taps, decay, powers = _operators(diag, d)
    flat = None if initial is None else initial.flatten(-2)
    documents = None
    if document_ids is not None:
        if flat is not None and carried_document is not None:
            # The kernel multiplies by zero what another document left, which is not enough where it is not finite.
            flat = torch.where((document_ids[:, 0] == carried_document)[None, :, None], flat, 0)
        columns = choose_config(v.dtype, diag.modes).columns
        documents = find_chunks(document_ids, carried_document, CHUNK, columns)
    result = _FusedScan.apply(q, k, v, shift_taps, taps, read, write, decay, flat, history, documents)
    assert result is not None
    y, state = result
    if v.shape[2] % CHUNK:
        z, unbroken = _tail(k, v, shift_taps, history, document_ids, carried_document)
        filled, group = z.shape[2], v.shape[0] // diag.channels
        rate, last = _complex(powers[:, filled]), write[:, CHUNK - filled :]
        carried = torch.view_as_real(_complex(state) * rate.repeat_interleave(group, 0)[:, None]).flatten(-2)
        if unbroken is not None:
            carried = torch.where(unbroken[None, :, None], carried, 0)
        state = torch.baddbmm(carried, z, last.repeat_interleave(group, 0))
    return y, state.unflatten(-1, (diag.modes, 2))


def _operators(diag: Diagonal, d: Tensor | None) -> tuple[Tensor, ...]:
    operators = _ChunkOperators.apply(*discretise(diag), CHUNK, torch.float32)
    assert operators is not None
    read, write, taps, decay, powers = operators
    if d is not None:
        taps = torch.cat([taps[:, :1] + d.to(taps.dtype)[:, None], taps[:, 1:]], 1)
    return read, write, taps, decay, powers


def _tail(
    k: Tensor | None,
    v: Tensor,
    shift_taps: Tensor | None,
    history: Tensor | None,
    document_ids: Tensor | None,
    carried_document: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The input of the SSM after the last whole chunk, (C, B, L % 64) fp32, zero outside the row's last document, and
    whether that document began before (B,), None for all."""
    filled = v.shape[2] % CHUNK
    begin = v.shape[2] - filled
    mask = unbroken = None
    if document_ids is not None:
        ids = document_ids[:, max(0, begin - CHUNK) :]
        if begin == 0:
            before = ids[:, :1] if carried_document is None else carried_document[:, None]
            ids = torch.cat([before.expand(-1, CHUNK), ids], 1)  # in the wider of their dtypes
        mask = last_document_mask(ids)
        unbroken = mask[:, CHUNK - 1]
    z = v[:, :, begin:].float()
    if k is not None:
        assert shift_taps is not None
        reach = shift_taps.shape[1] - 1
        window = k[:, :, max(0, begin - reach) :].float()
        if begin == 0:
            past = window.new_zeros(*window.shape[:2], reach) if history is None else history.float()
            window = torch.cat([past, window], 2)
        if mask is not None:
            window = torch.where(mask[None, :, CHUNK - reach :], window, 0)
        # Row i of the band holds the taps that token i reads of the window.
        band = _toeplitz(F.pad(shift_taps, (0, filled - 1)))[:, reach:]
        z = torch.bmm(window, band.transpose(1, 2)) * z
    if mask is not None:
        z = torch.where(mask[None, :, CHUNK:], z, 0)
    return z, unbroken
