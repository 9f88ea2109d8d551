"""`h3_mix` registered with torch.library: the form that `torch.compile` sees."""

from torch import Tensor

from ..diag_ssm.library import DIAGONAL, channel_major, document_dtype, owned, owned_channel_major
from ..diag_ssm.parameters import Diagonal, compute_dtype
from ..library import register


def _run(
    q, k, v, shift, log_dt, log_a, b, B, C, d_k, d, ids, history, modes, document, head_dim, rule, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import H3State, h3_mix

    state = None if modes is None else H3State(history, modes, document)
    diag = Diagonal(log_dt, log_a, b, B, C, rule)
    y, after = h3_mix(
        q, k, v, shift, diag, d_k=d_k, d=d, head_dim=head_dim, document_ids=ids, state=state, backend=backend
    )
    return owned_channel_major(y), owned(after.shift), owned(after.diag), owned(after.document)


def _fake(
    q, k, v, shift, log_dt, log_a, b, B, C, d_k, d, ids, history, modes, document, head_dim, rule, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, _ = q.shape
    dtype = compute_dtype(q)
    return (
        channel_major(q),
        q.new_empty(batch, channels, shift.shape[1] - 1, dtype=dtype),
        q.new_empty(batch, log_a.shape[0], head_dim**2, log_a.shape[1], 2, dtype=dtype),
        q.new_empty(batch, dtype=document_dtype(ids, document)),
    )


operation = register(
    "h3_mix",
    f"Tensor q, Tensor k, Tensor v, Tensor shift, {DIAGONAL}, Tensor d_k, Tensor d, Tensor? document_ids, "
    "Tensor? history, Tensor? modes, Tensor? document",
    "int head_dim, str rule, str backend",
    4,
    _run,
    _fake,
)
"""(y, shift, diag, document) of `h3_mix`: one node of a traced graph."""
