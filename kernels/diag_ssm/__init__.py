"""Diagonal state-space models (S4D, and the long memory of H3): a causal convolution with a constant-size state."""

import torch
from torch import Tensor

from ..backend import Backend, own_precision, resolve_backend
from .chunked import chunked_ssm
from .fused import fused_mix, fused_obstacle
from .library import traced_diag_ssm
from .parameters import Diagonal, DiagState, compute_dtype, discretise
from .reference import diag_ssm_reference
from .segments import cut

__all__ = ["DiagState", "Diagonal", "diag_ssm", "diag_ssm_reference", "diag_ssm_step", "initial_diag_state"]


def initial_diag_state(batch: int, channels: int, diag: Diagonal, dtype: torch.dtype = torch.float32) -> DiagState:
    """The state before any token: zero modes; document -1, so that the first token of any document resets it."""
    device = diag.log_a.device
    modes = torch.zeros(batch, channels, diag.modes, 2, dtype=dtype, device=device)
    return DiagState(modes, torch.full((batch,), -1, dtype=torch.int32, device=device))


def diag_ssm(
    u: Tensor,
    diag: Diagonal,
    *,
    d: Tensor | None,
    document_ids: Tensor | None = None,
    state: DiagState | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, DiagState]:
    """y = causal_conv(u, K) + d u with K[l] = 2 Re sum_n C_n Bbar_n Abar_n^l.

    u: (batch, channel, length), any float dtype; channel = H x group, channel c uses kernel c // group. Fastest when
    the memory order is (channel, batch, length); the output has that order.
    d: (H) or None. document_ids: (batch, length) of any integer dtype; the state resets wherever the id differs from
    the token before (the first token: from `state.document`). None means one document, the carried state's if there is
    one, which the torch form need not look for on the host.
    state: what an earlier call or step returned. Returns y (u's shape and dtype) and the state after the last token.

    State and sums are fp32 (fp64 for fp64 inputs); the Triton kernel multiplies in u's dtype, the torch form in fp32
    or fp64. Memory is linear in length. backend: "auto" is Triton on CUDA devices for at most 64 modes (32 in
    fp32), else torch; on the Triton path nothing waits for the device, on the torch path document ids are read on the
    host. Autocast changes nothing inside. Under torch.compile the call is one node of the graph, whose backward runs
    the forward again.

    Numbers in u that are not finite reach no other document and nothing before the 64 tokens' chunk that they are in
    (counted from the row's or the document's start), but earlier tokens of that chunk, where zero times NaN is NaN.
    Gradients then promise nothing: those of the parameters, and of any token of the row, may be NaN.
    Raises ValueError for shapes that do not fit, BackendUnavailableError where backend="triton" cannot run.
    """
    check_sequence("diag_ssm", u, diag, d, document_ids, state)
    if torch.compiler.is_compiling():
        return traced_diag_ssm(u, diag, d, document_ids, state, backend)
    with own_precision(u):
        return _run(u, diag, d, document_ids, state, backend)


def _run(
    u: Tensor, diag: Diagonal, d: Tensor | None, document_ids: Tensor | None, state: DiagState | None, backend: Backend
) -> tuple[Tensor, DiagState]:
    chosen = resolve_backend(backend, "diag_ssm", u, obstacle=fused_obstacle(u.dtype, diag.modes, length=u.shape[2]))
    batch, channels, _ = u.shape
    if chosen == "triton":
        carried = None if state is None else state.document
        initial = None if state is None else state.modes.float().transpose(0, 1)
        y, modes = fused_mix(
            None, None, u.transpose(0, 1), None, diag, d,
            document_ids=document_ids, carried_document=carried, initial=initial, history=None,
        )  # fmt: skip
        document = last_document(document_ids, state, batch, u.device)
        return y.transpose(0, 1), DiagState(modes.transpose(0, 1), document)
    group, dtype = channels // diag.channels, compute_dtype(u)
    segments = cut(u.shape[2], document_ids, None if state is None else state.document)
    z = segments.split(u.transpose(0, 1).to(dtype))
    z = regroup(z, diag.channels)
    initial = None if state is None else regroup(state.modes.to(dtype).transpose(0, 1), diag.channels)
    y, final = chunked_ssm(z, diag, d, segments, initial)
    y = segments.merge(ungroup(y, group))
    modes = ungroup(final, group).transpose(0, 1)
    return y.to(u.dtype).transpose(0, 1), DiagState(modes, last_document(document_ids, state, batch, u.device))


def diag_ssm_step(
    u: Tensor,
    diag: Diagonal,
    *,
    d: Tensor | None,
    document_ids: Tensor | None = None,
    state: DiagState,
) -> tuple[Tensor, DiagState]:
    """One token: u (batch, channel), document_ids (batch,) or None; the recurrence behind `diag_ssm`, same state."""
    if u.dim() != 2:
        raise ValueError(f"diag_ssm_step: u must be (batch, channel), got {tuple(u.shape)}")
    ids = None if document_ids is None else document_ids[:, None]
    check_sequence("diag_ssm_step", u[:, :, None], diag, d, ids, state)
    group, dtype = u.shape[1] // diag.channels, compute_dtype(u)
    with own_precision(u):
        modes = state.modes.to(dtype)
        if document_ids is not None:
            modes = torch.where((document_ids == state.document)[:, None, None, None], modes, 0)
        y, modes = step_modes(u.to(dtype), modes, diag, d, group)
    return y.to(u.dtype), DiagState(modes, last_document(ids, state, u.shape[0], u.device))


def step_modes(z: Tensor, modes: Tensor, diag: Diagonal, d: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """s = Abar s + Bbar z, y = 2 Re(C s) + d z for z (batch, channel) and modes (batch, channel, M, 2)."""
    complex_dtype = torch.complex128 if z.dtype == torch.float64 else torch.complex64
    a_bar, b_bar, c = (x.to(complex_dtype).repeat_interleave(group, 0) for x in discretise(diag))
    s = a_bar * torch.view_as_complex(modes.contiguous()) + b_bar * z[..., None]
    y = 2 * (c * s).real.sum(-1)
    if d is not None:
        y = y + d.to(z.dtype).repeat_interleave(group) * z
    return y, torch.view_as_real(s)


def regroup(x: Tensor, heads: int) -> Tensor:
    """(H x group, batch, ...) -> (H, batch x group, ...), batch slowest: sequences that share a kernel side by side."""
    if x.shape[0] == heads:
        return x
    return x.unflatten(0, (heads, -1)).transpose(1, 2).flatten(1, 2)


def ungroup(x: Tensor, group: int) -> Tensor:
    """The inverse of `regroup`."""
    if group == 1:
        return x
    return x.unflatten(1, (-1, group)).transpose(1, 2).flatten(0, 1)


def last_document(document_ids: Tensor | None, state, batch: int, device: torch.device) -> Tensor:
    """(batch,): the document that a carried state belongs to after this call, in the ids' dtype."""
    if document_ids is not None:
        return document_ids[:, -1]
    return torch.zeros(batch, dtype=torch.int32, device=device) if state is None else state.document


def check_sequence(operation: str, u: Tensor, diag: Diagonal, d: Tensor | None, document_ids: Tensor | None, state):
    """Refuse inputs whose shapes do not fit each other, and numbers that have no fractions or an imaginary part."""
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"{operation}: the input must be (batch, channel, length), none zero, got {tuple(u.shape)}")
    if not u.is_floating_point():
        raise ValueError(f"{operation}: the input has dtype {u.dtype}, expected a real floating-point type")
    batch, channels, length = u.shape
    if channels % diag.channels:
        raise ValueError(f"{operation}: {channels} channels are not a multiple of the {diag.channels} kernels of diag")
    if d is not None and d.shape != (diag.channels,):
        raise ValueError(f"{operation}: d has shape {tuple(d.shape)}, expected ({diag.channels},)")
    if document_ids is not None and document_ids.shape != (batch, length):
        raise ValueError(f"{operation}: document_ids has shape {tuple(document_ids.shape)}, expected {(batch, length)}")
    expected = (batch, channels, diag.modes, 2)
    if not isinstance(state, DiagState):
        return
    for name, shape in (("modes", expected), ("document", (batch,))):
        if (got := tuple(getattr(state, name).shape)) != shape:
            raise ValueError(f"{operation}: state.{name} has shape {got}, expected {shape}")
