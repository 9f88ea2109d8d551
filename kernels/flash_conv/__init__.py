"""FlashConv for H3: shift convolution, product, diagonal state-space model and gate of one layer, with a carried state.

Source: Fu, Dao, Saab, Thomas, Rudra, Re, "Hungry Hungry Hippos", 2022 (ICLR 2023), section 3 and algorithm 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..backend import Backend, own_precision, resolve_backend
from ..diag_ssm import Diagonal, check_sequence, last_document, step_modes
from ..diag_ssm.chunked import chunked_ssm
from ..diag_ssm.fused import fused_mix, fused_obstacle
from ..diag_ssm.parameters import compute_dtype
from ..diag_ssm.segments import Segments, cut
from .library import operation
from .shift import next_history, shift_conv

__all__ = ["H3State", "h3_mix", "h3_mix_step", "initial_h3_state"]


@dataclass(frozen=True)
class H3State:
    """What the next call needs; fp32 (fp64 for fp64 inputs).

    shift (batch, channel, N - 1): the last raw k, oldest first, zero where they belong to another document;
    diag (batch, H, head_dim^2, M, 2): SSM modes of the products k'[d1] v[d2], index d1 * head_dim + d2;
    document (batch,): id of the last token's document, in the ids' own integer dtype.
    """

    shift: Tensor
    diag: Tensor
    document: Tensor


pytree.register_dataclass(H3State)


def initial_h3_state(
    batch: int, channels: int, taps: int, diag: Diagonal, head_dim: int = 1, dtype: torch.dtype = torch.float32
) -> H3State:
    """The state before any token: zeros; document -1, so that the first token of any document resets it."""
    device = diag.log_a.device
    return H3State(
        torch.zeros(batch, channels, taps - 1, dtype=dtype, device=device),
        torch.zeros(batch, diag.channels, head_dim**2, diag.modes, 2, dtype=dtype, device=device),
        torch.full((batch,), -1, dtype=torch.int32, device=device),
    )


def h3_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    diag: Diagonal,
    *,
    d_k: Tensor,
    d: Tensor,
    head_dim: int = 1,
    document_ids: Tensor | None = None,
    state: H3State | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, H3State]:
    """The core of an H3 layer between its input and output projections.

        k' = shift_conv(k) + d_k k                 depthwise, causal, N taps
        kv[d1, d2] = k'[d1] v[d2]                  per head; channel = head * head_dim + index
        y = causal_conv(kv, K) + d kv              one kernel a head, see `diag_ssm`
        out[d2] = sum_d1 q[d1] y[d1, d2]

    q, k, v: (batch, channel, length), channel = H x head_dim, one float dtype; fastest when the memory order is
    (channel, batch, length), which the output has. shift: (channel, N) taps, tap 0 the current token. d_k: (channel).
    d: (H). document_ids: (batch, length) of any integer dtype, nothing crosses a change of id; None means one document
    (the carried state's, if there is one), which the torch form need not look for on the host. state: what an earlier
    call or step returned.

    Returns the output (q's shape and dtype) and the state after the last token. State and sums are fp32 (fp64 for
    fp64 inputs); the Triton kernel multiplies in q's dtype, the torch form in fp32 or fp64. backend: "auto" is Triton
    on CUDA devices for at most 64 modes (32 in fp32) and 64 taps, else torch. Nothing on the Triton path waits for the
    device; the torch path reads document ids on the host. With head_dim above 1 the kernel mixes head_dim^2 sequences
    a head, for which q, k and v are repeated in memory. Autocast changes nothing inside.
    Under torch.compile the call is one node of the graph, whose backward runs the forward again.

    Numbers that are not finite: from k or v they reach no other document and nothing before the 64 tokens' chunk that
    they are in (counted from the row's or the document's start), but earlier tokens of that chunk, where zero times NaN
    is NaN; from q the output of their own token alone. Gradients then promise nothing: those of the parameters, and of
    any token of the row, may be NaN.
    Raises ValueError for shapes that do not fit, BackendUnavailableError where backend="triton" cannot run.
    """
    _check("h3_mix", q, k, v, shift, diag, d_k, d, head_dim, document_ids, state)
    if torch.compiler.is_compiling():
        leaves = (diag.log_dt, diag.log_a, diag.b, diag.B, diag.C)
        carried = (None, None, None) if state is None else (state.shift, state.diag, state.document)
        y, *after = operation(
            q, k, v, shift, *leaves, d_k, d, document_ids, *carried, head_dim, diag.rule, backend
        )  # fmt: skip
        return y, H3State(*after)
    with own_precision(q):
        return _mix(q, k, v, shift, diag, d_k, d, head_dim, document_ids, state, backend)


def _mix(
    q, k, v, shift, diag: Diagonal, d_k, d, head_dim: int, document_ids, state: H3State | None, backend: Backend
) -> tuple[Tensor, H3State]:
    obstacle = fused_obstacle(q.dtype, diag.modes, shift.shape[1], q.shape[2])
    if resolve_backend(backend, "h3_mix", q, obstacle=obstacle) == "triton":
        return _fused(q, k, v, shift, diag, d_k, d, head_dim, document_ids, state)
    batch, dtype = q.shape[0], compute_dtype(q)
    segments = cut(q.shape[2], document_ids, None if state is None else state.document)
    query, key, value = (x.transpose(0, 1).to(dtype) for x in (q, k, v))
    taps = torch.cat([shift[:, :1].to(dtype) + d_k.to(dtype)[:, None], shift[:, 1:].to(dtype)], 1)
    history = None if state is None else _valid_history(state, document_ids).to(dtype).transpose(0, 1)

    shifted = shift_conv(key, taps, segments, history)
    kv = _outer(shifted, value, segments, head_dim)
    initial = None if state is None else state.diag.to(dtype).transpose(0, 1).flatten(1, 2)
    y, final = chunked_ssm(kv, diag, d, segments, initial)
    out = _gate(query, y, segments, head_dim)

    next_state = H3State(
        next_history(key, shift.shape[1] - 1, document_ids, history).transpose(0, 1),
        final.unflatten(1, (batch, head_dim**2)).transpose(0, 1),
        last_document(document_ids, state, batch, q.device),
    )
    return out.to(q.dtype).transpose(0, 1), next_state


def _fused(q, k, v, shift, diag: Diagonal, d_k, d, head_dim: int, document_ids, state: H3State | None):
    """Everything in one kernel, for larger heads with one sequence for each d1 and d2: what is missing then is the sum
    over d1. Nothing here may look at the numbers of a tensor: the host would wait for the device."""
    query, key, value = (x.to(q.dtype).transpose(0, 1) for x in (q, k, v))
    taps = torch.cat([shift[:, :1].float() + d_k.float()[:, None], shift[:, 1:].float()], 1)
    history = initial = carried = None
    if state is not None:
        history = _valid_history(state, document_ids).float().transpose(0, 1)
        initial, carried = state.diag.float().flatten(1, 2).transpose(0, 1), state.document
    out, modes = fused_mix(
        _of_pairs(query, head_dim, 0), _of_pairs(key, head_dim, 0), _of_pairs(value, head_dim, 1),
        _of_pairs(taps, head_dim, 0), diag, d,
        document_ids=document_ids, carried_document=carried, initial=initial,
        history=None if history is None else _of_pairs(history, head_dim, 0),
    )  # fmt: skip
    if head_dim > 1:
        out = out.unflatten(0, (-1, head_dim, head_dim)).sum(1).flatten(0, 1)
    next_state = H3State(
        next_history(key.float(), shift.shape[1] - 1, document_ids, history).transpose(0, 1),
        modes.transpose(0, 1).unflatten(1, (diag.channels, head_dim**2)),
        last_document(document_ids, state, q.shape[0], q.device),
    )
    return out.transpose(0, 1), next_state


def _of_pairs(x: Tensor, head_dim: int, which: int) -> Tensor:
    """x (H x head_dim, ...) for every pair of the head's indices: (H x head_dim^2, ...), the entry of pair (d1, d2)
    being x's of d1 (which = 0) or d2 (which = 1)."""
    if head_dim == 1:
        return x
    x = x.unflatten(0, (-1, head_dim)).unsqueeze(2 - which)
    return x.expand(-1, head_dim, head_dim, *x.shape[3:]).flatten(0, 2)


def h3_mix_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    diag: Diagonal,
    *,
    d_k: Tensor,
    d: Tensor,
    head_dim: int = 1,
    document_ids: Tensor | None = None,
    state: H3State,
) -> tuple[Tensor, H3State]:
    """One token of `h3_mix`: q, k, v (batch, channel), document_ids (batch,) or None; same state type."""
    if q.dim() != 2:
        raise ValueError(f"h3_mix_step: q must be (batch, channel), got {tuple(q.shape)}")
    ids = None if document_ids is None else document_ids[:, None]
    _check("h3_mix_step", q[..., None], k[..., None], v[..., None], shift, diag, d_k, d, head_dim, ids, state)
    with own_precision(q):
        return _step(q, k, v, shift, diag, d_k, d, head_dim, document_ids, state)


def _step(
    q, k, v, shift, diag: Diagonal, d_k, d, head_dim: int, document_ids, state: H3State
) -> tuple[Tensor, H3State]:
    batch, dtype = q.shape[0], compute_dtype(q)
    query, key, value = q.to(dtype), k.to(dtype), v.to(dtype)
    ids = None if document_ids is None else document_ids[:, None]
    history, modes = _valid_history(state, ids).to(dtype), state.diag.to(dtype)
    if document_ids is not None:
        modes = torch.where((document_ids == state.document)[:, None, None, None, None], modes, 0)

    window = torch.cat([history, key[..., None]], 2)
    shifted = (window * shift.to(dtype).flip(1)).sum(2) + d_k.to(dtype) * key
    heads = (batch, diag.channels, head_dim)
    kv = (shifted.view(heads)[..., :, None] * value.reshape(heads)[..., None, :]).flatten(1)
    y, modes = step_modes(kv, modes.flatten(1, 2), diag, d, head_dim**2)
    out = (query.reshape(heads)[..., None] * y.view(*heads, head_dim)).sum(2).flatten(1)
    next_modes = modes.unflatten(1, (diag.channels, head_dim**2))
    return out.to(q.dtype), H3State(window[..., 1:], next_modes, last_document(ids, state, batch, q.device))


def _valid_history(state: H3State, document_ids: Tensor | None) -> Tensor:
    if document_ids is None:
        return state.shift
    return torch.where((document_ids[:, 0] == state.document)[:, None, None], state.shift, 0)


def _outer(key: Tensor, value: Tensor, segments: Segments, head_dim: int) -> Tensor:
    """(channel, batch, L) twice -> (H, batch x head_dim^2, C, Q), batch slowest."""
    if head_dim == 1:
        return segments.split(key * value)
    key, value = (segments.split(x).unflatten(0, (-1, head_dim)).transpose(1, 2) for x in (key, value))
    return (key[:, :, :, None] * value[:, :, None]).flatten(1, 3)


def _gate(query: Tensor, y: Tensor, segments: Segments, head_dim: int) -> Tensor:
    """out[d2] = sum_d1 q[d1] y[d1, d2]: query (channel, batch, L), y as from `_outer` -> (channel, batch, L)."""
    if head_dim == 1:
        return query * segments.merge(y)
    batch = query.shape[1]
    y = y.unflatten(1, (batch, head_dim, head_dim))  # (H, batch, d1, d2, C, Q)
    query = segments.split(query).unflatten(0, (-1, head_dim)).transpose(1, 2)  # (H, batch, d1, C, Q)
    out = (query[:, :, :, None] * y).sum(2).transpose(1, 2)  # (H, d2, batch, C, Q)
    return segments.merge(out.flatten(0, 1))


def _check(operation, q, k, v, shift, diag, d_k, d, head_dim, document_ids, state) -> None:
    check_sequence(operation, q, diag, d, document_ids, None)
    if not q.shape == k.shape == v.shape:
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"{operation}: q, k and v must have one shape, got {shapes}")
    for name, x in (("k", k), ("v", v)):
        if not x.is_floating_point():
            raise ValueError(f"{operation}: {name} has dtype {x.dtype}, expected a real floating-point type")
    batch, channels, _ = q.shape
    if channels != diag.channels * head_dim:
        raise ValueError(
            f"{operation}: {channels} channels, but diag has {diag.channels} kernels and head_dim={head_dim}: "
            f"expected {diag.channels * head_dim}"
        )
    if shift.dim() != 2 or shift.shape[0] != channels or shift.shape[1] < 1:
        raise ValueError(f"{operation}: shift must be ({channels}, taps), got {tuple(shift.shape)}")
    if d_k.shape != (channels,):
        raise ValueError(f"{operation}: d_k has shape {tuple(d_k.shape)}, expected ({channels},)")
    if state is not None:
        expected = {
            "shift": (batch, channels, shift.shape[1] - 1),
            "diag": (batch, diag.channels, head_dim**2, diag.modes, 2),
            "document": (batch,),
        }
        for name, shape in expected.items():
            got = tuple(getattr(state, name).shape)
            if got != shape:
                raise ValueError(f"{operation}: state.{name} has shape {got}, expected {shape}")
