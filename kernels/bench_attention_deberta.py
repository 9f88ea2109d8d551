"""DeBERTa-v3's attention with its projections, beside the module that most of its users run: Hugging Face's, if it is
installed on the machine that measures."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .attention import Disentangled, Mask, attention
from .attention.biases import deberta_rows
from .bench_attention_cases import Drawing, Form

BUCKETS, FURTHEST = 256, 512


class Projections(torch.nn.Module):
    """The weights of the layer under the names of Hugging Face's module; positions share them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_proj, self.key_proj, self.value_proj = (torch.nn.Linear(width, width) for _ in range(3))


def layer_forms(drawing: Drawing, backend: Any) -> dict[str, Form]:
    """Hidden states (row, token, width) to attention's output before its last projection."""
    cell, device = drawing.cell, drawing.device
    width = cell.heads * cell.head_dim
    # fork_rng would restore every GPU's generator; weights are drawn on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = Projections(width).to(device, drawing.dtype)
    hidden = drawing.normal(cell.rows, cell.length, width).requires_grad_()
    positions = drawing.normal(2 * BUCKETS, width).requires_grad_()
    rows, least = deberta_rows(BUCKETS, BUCKETS, FURTHEST)
    rows, scale = rows.to(device), (3 * cell.head_dim) ** -0.5

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (cell.heads, cell.head_dim)).transpose(-2, -3)

    def run() -> Tensor:
        q, k, v = (split(project(hidden)) for project in (layer.query_proj, layer.key_proj, layer.value_proj))
        bias = Disentangled(split(layer.key_proj(positions)), split(layer.query_proj(positions)), rows, least)
        out = attention(q, k, v, mask=Mask(causal=False), bias=bias, scale=scale, backend=backend)
        return out.transpose(1, 2).flatten(2)

    leaves = [hidden, positions, *layer.parameters()]
    found = {"triton": Form(run, leaves)}
    if importlib.util.find_spec("transformers") is not None:
        theirs = functools.cache(lambda: _hugging_face(layer, cell.heads, width))  # made when it is first run
        mask = torch.ones(cell.rows, 1, cell.length, cell.length, dtype=torch.bool, device=device)
        columns = torch.arange(cell.length, device=device)
        place = (columns[:, None] - columns - least).clamp(0, len(rows) - 1)
        relative = (rows.long()[place] - BUCKETS)[None]  # their encoder makes it once for all layers
        found["hugging face"] = Form(
            lambda: theirs()(hidden, mask, relative_pos=relative, rel_embeddings=positions)[0], leaves
        )
    return found


def _hugging_face(layer: Projections, heads: int, width: int) -> Any:
    """Their module with our weights."""
    configuration = importlib.import_module("transformers.models.deberta_v2.configuration_deberta_v2")
    modeling = importlib.import_module("transformers.models.deberta_v2.modeling_deberta_v2")
    config = configuration.DebertaV2Config(
        hidden_size=width,
        num_attention_heads=heads,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=BUCKETS,
        max_relative_positions=FURTHEST,
        share_att_key=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = modeling.DisentangledSelfAttention(config)
    theirs.query_proj, theirs.key_proj, theirs.value_proj = layer.query_proj, layer.key_proj, layer.value_proj
    return theirs
