"""Ring attention by itself: outputs and every gradient of the whole row's attention, table and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from potamos.kernels.attention import BiasTerms, DropoutKey, Mask, Toeplitz, attention_reference
from potamos.parallel.context import SequenceAxis, Slices
from potamos.parallel.ring import Ring, ring_attention
from potamos.parallel.slices import held_slices

pytestmark = pytest.mark.distributed

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 48, 8


def leaves(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    found = {name: torch.randn(BATCH, count, LENGTH, DIM, dtype=torch.float64) for name, count in heads.items()}
    found |= {"table": torch.randn(HEADS, 31, dtype=torch.float64), "weight": torch.randn_like(found["q"])}
    return {
        name: x.to(torch.float32 if name == "table" and dtype != torch.float64 else dtype) for name, x in found.items()
    }


def masks() -> dict[str, Mask]:
    torch.manual_seed(1)
    ids = (torch.rand(BATCH, LENGTH) < 0.1).cumsum(1).to(torch.int32)
    ids[1, -5:] = -1
    packed: Any = {"query_documents": ids, "key_documents": ids}
    return {
        "causal documents": Mask(**packed),
        "all documents": Mask(causal=False, **packed),
        "prefix": Mask(prefix=torch.tensor([20, 3])),
        "window": Mask(window=9),
    }


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize(
    ("world", "dtype", "limit"), [(2, torch.float64, 1e-10), (3, torch.float64, 1e-10), (4, torch.bfloat16, 2e-2)]
)
def test_a_ring_is_attention_over_the_row(run_ranks, name, order, world, dtype, limit):
    mask = masks()[name]
    key = DropoutKey(3, "attention", 1, 0, torch.arange(BATCH))
    whole = {n: x.double().requires_grad_(n != "weight") for n, x in leaves(dtype).items()}
    bias = Toeplitz(table=whole["table"], least=-10)
    want, _ = attention_reference(
        whole["q"], whole["k"], whole["v"], mask=mask, bias=bias, scale=0.4, dropout=0.2, dropout_key=key, head_offset=1
    )  # fmt: skip
    names = ["q", "k", "v", "table"]
    expected = torch.autograd.grad((want * whole["weight"]).sum(), [whole[n] for n in names])

    def work(rank: int, world: int) -> Any:
        held = held_slices(order, rank, world)
        own = leaves(dtype)
        for n in ("q", "k", "v", "weight"):
            parts = own[n].chunk(world * len(held), 2)
            own[n] = torch.cat([parts[g] for g in held], 2)
        own = {n: x.detach().requires_grad_(n != "weight") for n, x in own.items()}
        axis = SequenceAxis(Slices(order, dist.group.WORLD), "ring")
        bias = Toeplitz(table=own["table"], least=-10)
        y = axis.ring(own["q"], own["k"], own["v"], mask, bias, 0.4, 0.2, key, 1)
        found = torch.autograd.grad((y * own["weight"]).sum(), [own[n] for n in names])
        return [y.detach(), *found]

    ranks = run_ranks(world, work)
    place = [g for rank in range(world) for g in held_slices(order, rank, world)]
    for i, reference in enumerate((want.detach(), *expected)):
        parts = [rank[i].double() for rank in ranks]
        if i == 4:  # each rank has its part of the table's gradient
            got = torch.stack(parts).sum(0)
        else:
            pieces = [piece for part in parts for piece in part.chunk(len(place) // world, 2)]
            got = torch.cat(
                [piece for _, piece in sorted(zip(place, pieces, strict=True), key=lambda pair: pair[0])], 2
            )
        error = ((got - reference).norm() / reference.norm()).item()
        assert error <= limit, f"{['y', *names][i]}: {error:.1e}"


class Told:
    """A form of attention whose gradients are told by its arguments: that of queries is the keys' number, those of keys
    and values are the queries' number and twice it. In fp32, so that only their sums can be narrow."""

    def forward(self, q, k, v, terms, mask, scale, drop, *, wide):
        assert wide
        return torch.zeros_like(q, dtype=torch.float32), torch.zeros(q.shape[:3])

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, terms, mask, scale, drop, needs):
        queries, keys = q[..., :1, :1].float(), k[..., :1, :1].float()
        return keys.expand(q.shape), queries.expand(k.shape), 2 * queries.expand(v.shape), None, None, None


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_gradients_are_summed_wider_than_they_are_kept(run_ranks, order):
    """256 and three times 0.75: beside 256, bf16 has nothing nearer than 258, so a sum in bf16 stays at 256."""
    shape = (1, 1, 8, 2)

    def work(rank: int, world: int) -> list[float]:
        group = dist.group.WORLD
        assert group is not None
        number = 256.0 if rank == 0 else 0.75
        q, k, v = (torch.full(shape, number, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        y = ring_attention(Ring(group, order), Told(), q, k, v, BiasTerms(), Mask(causal=False), 1.0, None)
        found = torch.autograd.grad(y.sum(), [q, k, v])
        assert all(x.dtype == torch.bfloat16 for x in found)
        return [x.unique().item() for x in found]

    slices = 2 if order == "zigzag" else 1
    total = torch.tensor(slices * (256.0 + 3 * 0.75)).bfloat16().item()
    assert total == slices * 258.0
    assert run_ranks(4, work) == [[total, total, 2 * total]] * 4
