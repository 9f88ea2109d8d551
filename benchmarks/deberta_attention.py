"""DeBERTa-v3's attention with its projections, beside the module that most of its users run, on this machine's GPU:

    python benchmarks/deberta_attention.py [--out benchmarks/results]

Hugging Face's module with our weights against `attention` between the same projections: base's 12 heads of 64 channels,
16K tokens in rows of 512 to 4096, bf16, forward and backward. Both compute one function (column `error`). The last
command of `make gpu`, after the tests; where transformers is not installed it says so and measures nothing. The table
goes to deberta_attention.csv.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potamos.kernels import bench_attention
from potamos.kernels.attention import Disentangled, Mask, attention
from potamos.kernels.attention.biases import deberta_rows
from potamos.kernels.bench import text_table
from potamos.kernels.bench_attention_cases import AttentionCell, Drawing, Form
from potamos.kernels.check import versions, write_rows
from potamos.kernels.timing import state_of_gpu

BUCKETS, FURTHEST = 256, 512
LENGTHS = (512, 1024, 2048, 4096)
RESULTS = Path(__file__).resolve().parent / "results"


class Projections(torch.nn.Module):
    """The weights of the layer under the names of Hugging Face's module; positions share them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_proj, self.key_proj, self.value_proj = (torch.nn.Linear(width, width) for _ in range(3))


def layer_forms(cell: AttentionCell, device: torch.device, dtype: torch.dtype, backend: Any) -> dict[str, Form]:
    """Hidden states (row, token, width) to attention's output before its last projection."""
    drawing = Drawing(cell, device, dtype)
    width = cell.heads * cell.head_dim
    # fork_rng would restore every GPU's generator; weights are drawn on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = Projections(width).to(device, dtype)
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

    theirs = functools.cache(lambda: _hugging_face(layer, cell.heads, width))
    mask = torch.ones(cell.rows, 1, cell.length, cell.length, dtype=torch.bool, device=device)
    columns = torch.arange(cell.length, device=device)
    place = (columns[:, None] - columns - least).clamp(0, len(rows) - 1)
    relative = (rows.long()[place] - BUCKETS)[None]  # their encoder makes it once for all layers

    def run_theirs() -> Tensor:
        return theirs()(hidden, mask, relative_pos=relative, rel_embeddings=positions)[0]

    leaves = [hidden, positions, *layer.parameters()]
    return {"triton": Form(run, leaves), "hugging face": Form(run_theirs, leaves)}


def _hugging_face(layer: Projections, heads: int, width: int) -> Any:
    """Their module with our weights."""
    from transformers.models.deberta_v2.configuration_deberta_v2 import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    undeclared: Any = {"position_buckets": BUCKETS, "share_att_key": True}  # read by the module all the same
    config = DebertaV2Config(
        hidden_size=width,
        num_attention_heads=heads,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=FURTHEST,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **undeclared,
    )
    theirs: Any = DisentangledSelfAttention(config)
    theirs.query_proj, theirs.key_proj, theirs.value_proj = layer.query_proj, layer.key_proj, layer.value_proj
    return theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU that torch can use on this machine: nothing was timed")
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: DeBERTa's layer is not timed")
        return
    cells = [AttentionCell.of("deberta layer", 64, length, causal=False, heads=12) for length in LENGTHS]
    stamp = {"device": torch.cuda.get_device_name(), **state_of_gpu(), **versions()}
    rows = bench_attention.time_cells(cells, torch.device("cuda"), make=layer_forms)
    write_rows(chosen.out / "deberta_attention.csv", [{**row, **stamp} for row in rows])
    print(text_table(rows, ["case", "length", "direction", "form", "ms", "error", "extra_over_lse_and_dq"]))


if __name__ == "__main__":
    main()
