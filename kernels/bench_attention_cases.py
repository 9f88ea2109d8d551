"""What attention is measured on, and the forms that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention import Disentangled, Mask, Rotary, Toeplitz, attention
from .attention.biases import alibi_slopes, bias_values, deberta_rows, resolve_bias, t5_bucket
from .attention.masks import documents_from_lengths
from .attention.rotary import rotary_angles, rotary_frequencies, turn_by_torch

TOKENS, WIDTH = 16_384, 2048
"""Tokens of all rows and channels of all heads, the shapes of FlashAttention-3's figures (Shah et al. 2024)."""
WINDOW = 1024


@dataclass(frozen=True)
class AttentionCell:
    """One shape of one case: rows of `length` tokens (of a cache of `length` keys, for a single query, in "decode")."""

    case: str
    head_dim: int
    length: int
    causal: bool
    heads: int
    rows: int
    kv_heads: int

    @classmethod
    def of(cls, case: str, head_dim: int, length: int, *, causal: bool = True, **rest: int) -> AttentionCell:
        """The usual 16K tokens and 2048 channels unless `rest` says otherwise."""
        heads = rest.get("heads", WIDTH // head_dim)
        rows, kv_heads = rest.get("rows", max(1, TOKENS // length)), rest.get("kv_heads", heads)
        return cls(case, head_dim, length, causal, heads, rows, kv_heads)

    @property
    def pairs(self) -> float:
        """Query-key pairs of one head in all rows, half of the square under causality (the usual counting)."""
        if self.case == "decode":
            return self.rows * self.length
        if self.case == "documents":
            return sum(n * n for n in document_lengths(self.rows * self.length)) / 2
        if self.case == "window":
            reach = min(WINDOW, self.length)
            return self.rows * (self.length - reach / 2) * reach
        return self.rows * self.length**2 / (2 if self.causal else 1)

    @property
    def operations(self) -> float:
        """Multiplications and additions of the forward's two products; the backward's five are counted 2.5 times."""
        return 4 * self.pairs * self.heads * self.head_dim

    @property
    def elements(self) -> int:
        """Of q."""
        return self.rows * self.heads * self.length * self.head_dim

    @property
    def cache_elements(self) -> int:
        """Of k and v."""
        return 2 * self.rows * self.kv_heads * self.length * self.head_dim


class Form(NamedTuple):
    """One way to compute a case. leaves: what takes a gradient; compare: its output as the first form arranges it."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    compare: Callable[[Tensor], Tensor] = lambda out: out


def plain_cells() -> Iterator[AttentionCell]:
    for head_dim in (128, 64, 256):
        for causal in (True, False):
            for length in (16_384, 8192, 4096, 2048, 1024, 512):
                yield AttentionCell.of("plain", head_dim, length, causal=causal)


CELLS = (
    *(cell for cell in plain_cells() if cell.head_dim < 256 and cell.length >= 2048),
    AttentionCell.of("documents", 128, TOKENS),
    *(AttentionCell.of("deberta", 64, n, causal=False, heads=12) for n in (512, 1024, 2048, 4096)),
    AttentionCell.of("window", 128, TOKENS),
    AttentionCell.of("alibi", 128, 4096),
    AttentionCell.of("table", 64, 2048),
    *(AttentionCell.of("decode", 128, n, rows=8, kv_heads=h) for h in (16, 4) for n in (1024, 4096, 16_384, 65_536)),
    *(AttentionCell.of("rotary", dim, 4096) for dim in (64, 128)),
    *(cell for cell in plain_cells() if cell.head_dim == 256 or cell.length < 2048),
)
"""In the order in which they are measured: what the goals ask for first, lest the time runs out."""


def document_lengths(tokens: int) -> list[int]:
    """Lengths of documents that fill `tokens`: log-uniform from 128 to 4096; always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        exponent = 7 + 5 * torch.rand((), generator=generator, device="cpu").item()
        lengths.append(min(left, int(2**exponent)))
    return lengths


class Drawing:
    """Tensors of one cell, unit variance, in the memory order of a projection: (row, token, head, channel)."""

    def __init__(self, cell: AttentionCell, device: torch.device, dtype: torch.dtype) -> None:
        self.cell, self.device, self.dtype = cell, device, dtype
        self.generator = torch.Generator(device=device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(self.dtype)

    def sequence(self, heads: int, length: int, rows: int = 0) -> Tensor:
        """(row, head, token, channel)."""
        shape = (rows or self.cell.rows, length, heads, self.cell.head_dim)
        return self.normal(*shape).transpose(1, 2).requires_grad_()

    def inputs(self) -> list[Tensor]:
        cell = self.cell
        return [self.sequence(heads, cell.length) for heads in (cell.heads, cell.kv_heads, cell.kv_heads)]


def forms(cell: AttentionCell, device: torch.device, dtype: torch.dtype, backend: Any = "triton") -> dict[str, Form]:
    """The forms of a cell by name, ours, "triton", first. backend: what ours is asked for."""
    drawing = Drawing(cell, device, dtype)
    if cell.case == "rotary":
        return _rotary(drawing, backend)
    if cell.case == "decode":
        return _decode(drawing, backend)
    if cell.case == "documents":
        return _documents(drawing, backend)
    q, k, v = leaves = drawing.inputs()
    if cell.case == "plain":
        mask = Mask(causal=cell.causal)
        ours = Form(lambda: attention(q, k, v, mask=mask, backend=backend), leaves)
        return {"triton": ours, **_library(q, k, v, causal=cell.causal)}
    if cell.case == "window":
        mask = Mask(window=WINDOW)
        ours = Form(lambda: attention(q, k, v, mask=mask, backend=backend), leaves)
        return {"triton": ours}
    if cell.case == "deberta":
        return _deberta(drawing, leaves, backend)
    return _toeplitz(drawing, leaves, backend)


def _library(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> dict[str, Form]:
    """torch's own kernels, each by name."""

    def of(library: SDPBackend) -> Form:
        def run() -> Tensor:
            with sdpa_kernel(library):
                grouped = q.shape[1] != k.shape[1]
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        return Form(run, [q, k, v])

    return {"flash": of(SDPBackend.FLASH_ATTENTION), "cudnn": of(SDPBackend.CUDNN_ATTENTION)}


def _documents(drawing: Drawing, backend: Any) -> dict[str, Form]:
    """Documents packed into one row, beside the same documents as padded rows of the longest one's length."""
    cell = drawing.cell
    tokens = cell.rows * cell.length
    lengths = torch.tensor(document_lengths(tokens), device=drawing.device)
    ends = lengths.cumsum(0)
    ids = documents_from_lengths(torch.cat([ends.new_zeros(1), ends]), tokens)
    mask = Mask(query_documents=ids, key_documents=ids)
    packed = [drawing.sequence(cell.heads, tokens, rows=1) for _ in range(3)]
    most = int(lengths.max())
    rows, columns = ids[0].long(), torch.arange(tokens, device=drawing.device) - (ends - lengths)[ids[0].long()]

    def padded(x: Tensor) -> Tensor:
        wide = x.new_zeros(len(lengths), most, cell.heads, cell.head_dim)
        wide[rows, columns] = x.detach()[0].transpose(0, 1)
        return wide.transpose(1, 2).requires_grad_()

    def gather(out: Tensor) -> Tensor:
        return out.transpose(1, 2)[rows, columns].transpose(0, 1)[None]

    q, k, v = (padded(x) for x in packed)
    peers = {
        f"padded {name}": Form(form.run, form.leaves, gather) for name, form in _library(q, k, v, causal=True).items()
    }
    return {"triton": Form(lambda: attention(*packed, mask=mask, backend=backend), packed), **peers}


def _deberta(drawing: Drawing, inputs: list[Tensor], backend: Any) -> dict[str, Form]:
    """DeBERTa-v3's disentangled attention, beside the same written out as released models compute it."""
    cell, (q, k, v) = drawing.cell, inputs
    rows, least = deberta_rows(256, 256, 512)
    keys, queries = (drawing.normal(cell.heads, 512, cell.head_dim).requires_grad_() for _ in range(2))
    bias = Disentangled(keys, queries, rows.to(drawing.device), least)
    mask, scale = Mask(causal=cell.causal), (3 * cell.head_dim) ** -0.5
    columns = torch.arange(cell.length, device=drawing.device)

    def eager() -> Tensor:
        terms = bias_values(resolve_bias(bias, q, k, scale), columns, columns, q.dtype)
        return (q @ k.mT * scale + terms).softmax(-1) @ v

    leaves = [*inputs, keys, queries]
    ours = Form(lambda: attention(q, k, v, mask=mask, bias=bias, scale=scale, backend=backend), leaves)
    return {"triton": ours, "eager": Form(eager, leaves)}


def _toeplitz(drawing: Drawing, inputs: list[Tensor], backend: Any) -> dict[str, Form]:
    """ALiBi, or T5's buckets with their gradient, beside torch's attention with the same bias and mask in memory: they
    are made once, outside of what is timed, and take no gradient, which favors it."""
    cell, (q, k, v) = drawing.cell, inputs
    leaves = inputs
    if cell.case == "alibi":
        bias = Toeplitz(slopes=alibi_slopes(cell.heads).to(drawing.device))
    else:
        buckets = torch.randn(cell.heads, 32, generator=drawing.generator, device=drawing.device)
        table = buckets[:, t5_bucket(torch.arange(128, device=drawing.device))].requires_grad_()
        bias, leaves = Toeplitz(table=table), [*inputs, table]
    columns = torch.arange(cell.length, device=drawing.device)
    with torch.no_grad():
        added = bias_values(resolve_bias(bias, q, k, cell.head_dim**-0.5), columns, columns, torch.float32)
        added = torch.where(columns[:, None] >= columns, added, float("-inf")).to(q.dtype)
    ours = Form(lambda: attention(q, k, v, mask=Mask(), bias=bias, backend=backend), leaves)
    return {"triton": ours, "in memory": Form(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=added), inputs)}


def _decode(drawing: Drawing, backend: Any) -> dict[str, Form]:
    """The newest token's query against the whole cache."""
    cell = drawing.cell
    q = drawing.sequence(cell.heads, 1)
    k, v = (drawing.sequence(cell.kv_heads, cell.length) for _ in range(2))
    mask = Mask(query_offset=cell.length - 1)
    ours = Form(lambda: attention(q, k, v, mask=mask, backend=backend), [q, k, v])
    return {"triton": ours, **_library(q, k, v, causal=False)}


def _rotary(drawing: Drawing, backend: Any) -> dict[str, Form]:
    """Queries turned by their positions, with the angles' tables given: into new memory, in place, and by torch."""
    cell = drawing.cell
    x = drawing.sequence(cell.heads, cell.length)
    positions = torch.arange(cell.length, device=drawing.device)[None]
    frequencies = rotary_frequencies(cell.head_dim).to(drawing.device)
    described = Rotary(frequencies, positions, positions)
    angles = rotary_angles(frequencies, positions)
    cos, sin = angles.cos(), angles.sin()
    found = {"triton": Form(lambda: described.rotate_query(x), [x])}
    if backend == "triton":
        from .attention.triton_rotary import turn

        own = x.detach().clone()
        places = cos[:, 0], sin[:, 0]
        # Measured again and again, it turns what it has turned: no value for a comparison.
        found["in place"] = Form(lambda: turn(own, *places, own, interleaved=False), [], lambda _: x.detach()[:0])
    return found | {"torch": Form(lambda: turn_by_torch(x, cos, sin, False), [x])}
