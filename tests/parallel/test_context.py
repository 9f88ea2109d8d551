"""Slices of a sequence on gloo ranks: outputs and every gradient of the unsplit layer, and who takes part in what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from potamos.kernels.diag_ssm import Diagonal
from potamos.kernels.diag_ssm.sequence import diag_ssm_correct, diag_ssm_local
from potamos.kernels.flash_conv import h3_mix
from potamos.kernels.flash_conv.sequence import (
    by_row,
    by_slice,
    combine,
    fold,
    h3_mix_correct,
    h3_mix_local,
    halo_tail,
    halos,
    unfold,
)
from potamos.parallel.context import Slices, gather_states, held_slices

NAMES = ("log_dt", "log_a", "b", "B", "C")
HEADS, MODES, BATCH = 3, 4, 3


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str = "value") -> None:
    """Relative error in the 2-norm; a reference of zeros would prove nothing and is refused."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert want.norm() > 1e-8, f"{name}: the reference is zero"
    error = ((got - want).norm() / want.norm()).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def make_values(length: int, head_dim: int, taps: int) -> dict[str, Tensor]:
    torch.manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    channels = HEADS * head_dim
    values = {name: normal(BATCH, channels, length) for name in "qkv"}
    values |= {"shift": normal(channels, taps) / taps**0.5, "d_k": normal(channels), "d": normal(HEADS)}
    values |= {"log_dt": normal(HEADS) - 4, "log_a": 0.3 * normal(HEADS, MODES) - 0.7, "b": 3 * normal(HEADS, MODES)}
    values |= {"B": normal(HEADS, MODES, 2), "C": normal(HEADS, MODES, 2)}
    return {name: value.requires_grad_() for name, value in values.items()}


def diagonal(values: dict[str, Tensor]) -> Diagonal:
    return Diagonal(*(values[name] for name in NAMES), rule="bilinear")


def inputs(values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return values["q"], values["k"], values["v"]


def make_documents(length: int, step: int) -> Tensor:
    """Row 0: one document over all slices; row 1: documents that begin at slices' borders and beside them; row 2:
    documents of about half a slice."""
    starts = torch.zeros(BATCH, length, dtype=torch.bool)
    for border in range(step, length, 2 * step):
        starts[1, [border, min(border + step + 1, length - 1), border - 1]] = True
    starts[2] = torch.rand(length) < 2 / step
    return starts.cumsum(1).to(torch.int32)


def loss_weights(length: int, channels: int) -> Tensor:
    return torch.randn(BATCH, channels, length, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def spread_h3(values: dict[str, Tensor], ids: Tensor | None, slices: Slices, head_dim: int) -> Tensor:
    """One rank's share of `h3_mix`: two exchanges, the halo's and the states'."""
    held, count = slices.held, len(slices.held)
    diag, taps = diagonal(values), values["shift"].shape[1]
    q, k, v = (fold(values[name], count) for name in "qkv")
    reach = max(1, taps - 1)
    (tails,) = slices.gather(by_slice(halo_tail(k, taps), count))
    before_k = by_row(halos(tails, k.new_zeros(BATCH, k.shape[1], reach))[held])
    rest: dict[str, Any] = {}
    if ids is not None:
        rows = fold(ids, count)
        (tails,) = slices.gather(by_slice(halo_tail(rows, taps), count))
        before_ids = by_row(halos(tails, rows.new_full((BATCH, reach), -1))[held])
        rest = {"document_ids": rows, "before_ids": before_ids}
    kernel: dict[str, Any] = {"d_k": values["d_k"], "d": values["d"], "before_k": before_k, "head_dim": head_dim}
    y, end, transition = h3_mix_local(q, k, v, values["shift"], diag, **kernel, **rest)
    states = combine(*slices.gather(by_slice(end, count), by_slice(transition, count)))
    return unfold(h3_mix_correct(y, q, diag, by_row(states[held]), head_dim=head_dim, **rest), count)


def share(x: Tensor, order: Any, rank: int, world: int) -> Tensor:
    """The slices of the last dimension that a rank holds, side by side."""
    held = held_slices(order, rank, world)
    parts = x.detach().chunk(world * len(held), -1)
    return torch.cat([parts[g] for g in held], -1)


def unshare(parts: list[Tensor], order: Any) -> Tensor:
    """The inverse of `share`, from all ranks."""
    world = len(parts)
    slices: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        held = held_slices(order, rank, world)
        slices |= dict(zip(held, part.chunk(len(held), -1), strict=True))
    return torch.cat([slices[g] for g in sorted(slices)], -1)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    ("world", "head_dim", "taps", "step", "packed"),
    [(2, 1, 64, 70, True), (3, 1, 64, 24, True), (4, 1, 64, 66, True), (4, 2, 5, 16, True), (2, 1, 64, 64, False)],
)
def test_h3_over_ranks_is_h3(order, world, head_dim, taps, step, packed, run_ranks):
    """fp64, 1e-10: outputs, gradients of inputs and of every parameter, summed over ranks."""
    length = step * world * (2 if order == "zigzag" else 1)
    values = make_values(length, head_dim, taps)
    ids = make_documents(length, step) if packed else None
    weights = loss_weights(length, HEADS * head_dim)
    diag = diagonal(values)
    rest: dict[str, Any] = {"d_k": values["d_k"], "d": values["d"], "head_dim": head_dim}
    want, _ = h3_mix(*inputs(values), values["shift"], diag, **rest, document_ids=ids)
    expected = dict(zip(values, torch.autograd.grad((want * weights).sum(), list(values.values())), strict=True))

    def work(rank: int, world: int) -> Any:
        local = {n: x.detach().requires_grad_() for n, x in values.items()}
        local |= {n: share(values[n], order, rank, world).requires_grad_() for n in "qkv"}
        local_ids = None if ids is None else share(ids, order, rank, world)
        y = spread_h3(local, local_ids, Slices(order), head_dim)
        loss = (y * share(weights, order, rank, world)).sum()
        gradients = torch.autograd.grad(loss, list(local.values()))
        return y.detach(), dict(zip(local, gradients, strict=True))

    results = run_ranks(world, work)
    assert_close(unshare([y for y, _ in results], order), want, 1e-10, "y")
    for name, reference in expected.items():
        parts = [gradients[name] for _, gradients in results]
        got = unshare(parts, order) if name in "qkv" else torch.stack(parts).sum(0)
        assert_close(got, reference, 1e-10, f"d{name}")
    with pytest.raises(AssertionError, match="relative error"):  # what no exchange at all would give
        assert_close(torch.stack([g["log_a"] for _, g in results])[0] * world, expected["log_a"], 1e-10)


def test_the_gradient_of_a_state_reaches_earlier_ranks(run_ranks):
    """Only the last rank has a loss; the first one's inputs receive its gradient through the states alone."""

    def work(rank: int, world: int) -> Any:
        torch.manual_seed(0)
        values = make_values(8 * world, 1, 1)
        diag = diagonal(values)
        u = share(values["k"], "contiguous", rank, world).requires_grad_()
        y, end, transition = diag_ssm_local(u, diag, d=None)
        states = combine(*gather_states(end, transition))
        y = diag_ssm_correct(y, diag, states[rank])
        (gradient,) = torch.autograd.grad(y.sum() * (rank == world - 1), u)
        return gradient.abs().max().item()

    assert min(run_ranks(3, work)) > 1e-3


def test_gather_and_its_backward(run_ranks):
    """Backward: every rank's part receives the sum of what all ranks want of it, whatever each of them uses."""

    def work(rank: int, world: int) -> Any:
        x = torch.full((2,), float(rank), dtype=torch.float64, requires_grad=True)
        flags = torch.tensor([rank, -rank])
        z = torch.full((3, 1), 10.0 * rank, dtype=torch.float64, requires_grad=True)
        parts, all_flags, other = gather_states(x, flags, z)
        assert all_flags.tolist() == [[r, -r] for r in range(world)]
        assert other[:, 0, 0].tolist() == [10.0 * r for r in range(world)]
        # A different graph on every rank: rank r uses the parts up to r, weighted; and rank 0 only its own.
        weight = torch.arange(1.0, world + 1, dtype=torch.float64)[:, None] * (rank + 1)
        loss = (parts[: rank + 1] * weight[: rank + 1]).sum() + (0 * other).sum()
        gradient, zero = torch.autograd.grad(loss, (x, z))
        assert not zero.any()
        return parts.detach()[:, 0].tolist(), gradient.tolist()

    world = 3
    for rank, (parts, gradient) in enumerate(run_ranks(world, work)):
        assert parts == [0.0, 1.0, 2.0]
        assert gradient == [float((rank + 1) * sum(s + 1 for s in range(rank, world)))] * 2


def test_the_first_slice_takes_part_in_every_exchange(run_ranks):
    """The state before the first slice is zero, yet rank 0's backward must reach the collective, or all would hang."""

    def work(rank: int, world: int) -> Any:
        end = torch.ones(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
        states = combine(*gather_states(end, torch.full_like(end, 0.5)))
        halo = halos(gather_states(end[..., 0])[0], torch.zeros(1, 1, 1, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(states[rank].sum() + halo[rank].sum(), end)
        return gradient.abs().sum().item()

    first, last = run_ranks(2, work, timeout=20)
    assert first > 0
    assert last == 0


def test_who_holds_which_slice(run_ranks):
    assert [held_slices("contiguous", r, 3) for r in range(3)] == [[0], [1], [2]]
    assert [held_slices("zigzag", r, 3) for r in range(3)] == [[0, 5], [1, 4], [2, 3]]
    with pytest.raises(ValueError, match="'ring'"):
        held_slices("ring", 0, 2)  # type: ignore[arg-type]

    def work(rank: int, world: int) -> Any:
        slices = Slices("zigzag")
        (gathered,) = slices.gather(torch.tensor(slices.held))
        return gathered.tolist(), dist.get_rank() == rank

    assert run_ranks(3, work) == [([0, 1, 2, 3, 4, 5], True)] * 3
