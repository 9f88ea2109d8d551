"""h3_hybrid_tiny trained through the kernel it uses, and through that kernel's definition: the same losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.diag_ssm.parameters import discretise
from potamos.kernels.flash_conv import h3_mix
from potamos.kernels.flash_conv.reference import h3_mix_reference
from potamos.parallel.facts import parameter_table
from potamos.pretrain.config import load_recipe
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.interfaces import Seq
from potamos.pretrain.models.mixers import h3
from potamos.pretrain.optim import Optimizer

STEPS, ROWS, LENGTH, VOCABULARY = 50, 2, 80, 64
SMALL = ("model.frontend={kind: tokens, vocabulary: 64, tied: true}",)


def dense_mix(q, k, v, shift, diag, *, d_k, d, head_dim, document_ids, state) -> tuple[Tensor, None]:
    """The mixer as two matrices of all pairs of tokens, in fp32: no chunk, no state, no FFT."""
    assert head_dim == 1
    assert state is None
    lag = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    seen = (lag >= 0) & (document_ids[:, :, None] == document_ids[:, None])  # (batch, to, from)

    def convolve(x: Tensor, taps: Tensor) -> Tensor:
        matrix = torch.where(lag < taps.shape[1], taps[:, lag.clamp(0, taps.shape[1] - 1)], 0)
        return torch.einsum("hij,bij,bhj->bhi", matrix, seen.float(), x)

    a_bar, b_bar, c = discretise(diag)
    powers = a_bar[:, None] ** torch.arange(q.shape[2])[None, :, None]
    kernel = 2 * ((c * b_bar)[:, None] * powers).sum(-1).real.float()
    kv = (convolve(k, shift) + d_k[:, None] * k) * v
    return q * (convolve(kv, kernel) + d[:, None] * kv), None


def losses(mix: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, steps: int = STEPS) -> list[float]:
    """fp32 steps of the recipe's model and optimizer, with `mix` in every H3 layer. Rows cross a chunk's end, and a
    document ends inside each."""
    calls = 0

    def counted(*arguments: Any, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        return mix(*arguments, **rest)

    monkeypatch.setattr(h3, "h3_mix", counted)
    recipe = load_recipe("h3_hybrid_tiny", SMALL)
    model = materialize(recipe.model, seed=0, sequence_length=LENGTH)
    optimizer = Optimizer(dict(model.named_parameters()), parameter_table(model), recipe.optimizer)
    generator = torch.Generator().manual_seed(1)
    successor = torch.randperm(VOCABULARY, generator=generator)
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    found = []
    for step in range(steps):
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        tokens[:, 1::2] = successor[tokens[:, :-1:2]]  # every second token can be learned
        ends = torch.randint(1, LENGTH, (ROWS, 1), generator=generator)
        seq = Seq(positions=positions, document_ids=(positions >= ends).int(), step=step)
        hidden = model({"tokens": tokens[:, :-1]}, seq).hidden
        loss = model.frontend.nll(hidden, tokens[:, 1:]) / (ROWS * LENGTH)
        loss.backward()
        optimizer.step(1.0, torch.zeros(()))
        optimizer.zero_grad()
        found.append(loss.item())
    assert calls == 2 * steps  # the recipe's two H3 layers
    return found


def without_memory(q: Tensor, k: Tensor, v: Tensor, shift: Tensor, diag: Any, **rest: Any) -> Any:
    """A planted bug: the state is lost at the end of the first chunk."""
    documents = rest.pop("document_ids")
    parts = [slice(0, 64), slice(64, None)]
    ys = [
        h3_mix(q[..., part], k[..., part], v[..., part], shift, diag, document_ids=documents[:, part], **rest)[0]
        for part in parts
    ]
    return torch.cat(ys, 2), None


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_the_recipe_learns_the_same_through_the_kernel_and_its_definition(monkeypatch):
    through_kernel = losses(h3_mix, monkeypatch)
    assert through_kernel[-1] < 0.9 * through_kernel[0]
    through_definition = losses(dense_mix, monkeypatch)
    assert difference(through_kernel, through_definition) <= 1e-3
    assert difference(losses(h3_mix_reference, monkeypatch, 1), through_definition[:1]) <= 1e-6
    assert difference(losses(without_memory, monkeypatch, 15), through_definition[:15]) > 1e-3
