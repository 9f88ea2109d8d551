"""`diag_ssm` registered with torch.library: the form that `torch.compile` sees."""

import torch
from torch import Tensor

from ..library import register
from .parameters import Diagonal, DiagState, compute_dtype

DIAGONAL = "Tensor log_dt, Tensor log_a, Tensor b, Tensor B, Tensor C"


def channel_major(x: Tensor) -> Tensor:
    """An empty tensor of x's shape (batch, channel, length) in the memory order (channel, batch, length)."""
    return x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)


def owned(x: Tensor) -> Tensor:
    """A contiguous copy: results of an operation share no memory with its arguments."""
    return x.clone(memory_format=torch.contiguous_format)


def owned_channel_major(x: Tensor) -> Tensor:
    """(batch, channel, length) in the memory order of `channel_major`, copied only if it is in another one."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def document_dtype(ids: Tensor | None, carried: Tensor | None) -> torch.dtype:
    """What `last_document` returns for a call's document ids and the document of its carried state."""
    known = carried if ids is None else ids
    return torch.int32 if known is None else known.dtype


def _run(u, log_dt, log_a, b, B, C, d, ids, modes, document, rule, backend) -> tuple[Tensor, Tensor, Tensor]:
    from . import diag_ssm

    state = None if modes is None else DiagState(modes, document)
    diag = Diagonal(log_dt, log_a, b, B, C, rule)
    y, after = diag_ssm(u, diag, d=d, document_ids=ids, state=state, backend=backend)
    return owned_channel_major(y), owned(after.modes), owned(after.document)


def _fake(u, log_dt, log_a, b, B, C, d, ids, modes, document, rule, backend) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, _ = u.shape
    after = u.new_empty(batch, channels, log_a.shape[1], 2, dtype=compute_dtype(u))
    return channel_major(u), after, u.new_empty(batch, dtype=document_dtype(ids, document))


operation = register(
    "diag_ssm",
    f"Tensor u, {DIAGONAL}, Tensor? d, Tensor? document_ids, Tensor? modes, Tensor? document",
    "str rule, str backend",
    3,
    _run,
    _fake,
)
"""(y, modes, document) of `diag_ssm`: one node of a traced graph."""


def traced_diag_ssm(
    u: Tensor, diag: Diagonal, d: Tensor | None, document_ids: Tensor | None, state: DiagState | None, backend: str
) -> tuple[Tensor, DiagState]:
    """`diag_ssm` by the registered operation."""
    carried = (None, None) if state is None else (state.modes, state.document)
    leaves = (diag.log_dt, diag.log_a, diag.b, diag.B, diag.C)
    y, modes, document = operation(u, *leaves, d, document_ids, *carried, diag.rule, backend)
    return y, DiagState(modes, document)
