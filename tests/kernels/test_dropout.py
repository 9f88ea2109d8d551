"""Counter-based dropout: published vectors, Triton's bits, and the same mask however the work is split."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from potamos.kernels.dropout import DropoutKey, attention_keep_mask, dropout, keep_mask, philox

KEY = DropoutKey(seed=1, purpose="embedding", step=2, layer=3, samples=torch.tensor([5, 2**40 + 7, 0]))


def words(counters: tuple[int, ...], key: int) -> list[str]:
    c0, c1, c2, c3 = (torch.tensor(c) for c in counters)
    return [f"{int(word):08x}" for word in philox((c0, c1, c2, c3), key)]


def test_random123_known_answers():
    """kat_vectors of Random123, philox4x32 with 10 rounds."""
    assert words((0, 0, 0, 0), 0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = 0xFFFFFFFF
    assert words((ones,) * 4, ones << 32 | ones) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(pi, 0x299F31D0 << 32 | 0xA4093822) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


TRITON_PROGRAM = """
import sys, torch, triton, triton.language as tl

@triton.jit
def bits(counters, out, seed, n: tl.constexpr):
    i = tl.arange(0, n)
    c0 = tl.load(counters + i)
    c1 = tl.load(counters + n + i)
    c2 = tl.load(counters + 2 * n + i)
    c3 = tl.load(counters + 3 * n + i)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c3)
    s0, s1, s2, s3 = tl.randint4x(seed, i)
    tl.store(out + i, r0.to(tl.int64))
    tl.store(out + n + i, r1.to(tl.int64))
    tl.store(out + 2 * n + i, r2.to(tl.int64))
    tl.store(out + 3 * n + i, r3.to(tl.int64))
    tl.store(out + 4 * n + i, s0.to(tl.int64))
    tl.store(out + 5 * n + i, s1.to(tl.int64))
    tl.store(out + 6 * n + i, s2.to(tl.int64))
    tl.store(out + 7 * n + i, s3.to(tl.int64))

n, seed = 16, int(sys.argv[1])
counters = (torch.arange(4 * n, dtype=torch.int64) * 2654435761 % 2**32).to(torch.uint32)
out = torch.zeros(8 * n, dtype=torch.int64)
bits[(1,)](counters, out, seed, n)
print(*(out & 0xFFFFFFFF).tolist())
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is only packaged for Linux")
def test_same_bits_as_triton(tmp_path):
    """tl.philox and tl.randint4x, run by Triton's interpreter in a process of its own."""
    program = tmp_path / "bits.py"
    program.write_text(TRITON_PROGRAM)
    seed, n = 0x1234_5678_9ABC_DEF0, 16
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(program), str(seed)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    got = torch.tensor([int(word) for word in result.stdout.split()]).view(2, 4, n)
    c0, c1, c2, c3 = (torch.arange(4 * n) * 2654435761 % 2**32).view(4, n)
    assert torch.equal(got[0], torch.stack(philox((c0, c1, c2, c3), seed)))
    zero = torch.zeros(n, dtype=torch.int64)
    assert torch.equal(got[1], torch.stack(philox((torch.arange(n), zero, zero, zero), seed)))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mean_and_variance(p):
    keep = keep_mask((3, 200, 500), p, key=KEY).double()
    count = keep.numel()
    assert abs(keep.mean() - (1 - p)) < 4 * (p * (1 - p) / count) ** 0.5
    x = torch.randn(3, 200, 500)
    y = dropout(x, p, key=KEY)
    assert abs(y.square().mean() / x.square().mean() - 1 / (1 - p)) < 0.02
    assert torch.equal(y, torch.where(keep.bool(), x * (1 / (1 - p)), 0))


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].item()


def test_every_part_of_the_key_draws_anew():
    shape = (3, 100, 200)
    first = keep_mask(shape, 0.5, key=KEY)
    others = {
        "seed": dataclasses.replace(KEY, seed=2),
        "purpose": dataclasses.replace(KEY, purpose="residual"),
        "step": dataclasses.replace(KEY, step=3),
        "layer": dataclasses.replace(KEY, layer=2),
        "samples": dataclasses.replace(KEY, samples=KEY.samples + 1),
    }
    bound = 4 / first.numel() ** 0.5
    for name, key in others.items():
        assert abs(correlation(first, keep_mask(shape, 0.5, key=key))) < bound, name
    assert abs(correlation(first[0], first[1])) < bound * 3**0.5, "rows"
    assert abs(correlation(first[:, 1:], first[:, :-1])) < bound * 1.1, "positions"
    assert abs(correlation(first[..., 1:], first[..., :-1])) < bound * 1.1, "channels"
    assert torch.equal(first, keep_mask(shape, 0.5, key=dataclasses.replace(KEY)))
    joined = dataclasses.replace(KEY, step=23, layer=1).philox_key()
    assert joined != dataclasses.replace(KEY, step=2, layer=31).philox_key()


def test_slices_equal_the_whole_bitwise():
    x = torch.randn(3, 40, 30)
    whole = dropout(x, 0.3, key=KEY)
    rows = [dropout(x[i : i + 1], 0.3, key=dataclasses.replace(KEY, samples=KEY.samples[i : i + 1])) for i in range(3)]
    assert torch.equal(torch.cat(rows), whole)
    positions = torch.arange(40)
    shards = [dropout(x[:, i : i + 13], 0.3, key=KEY, positions=positions[i : i + 13]) for i in range(0, 40, 13)]
    assert torch.equal(torch.cat(shards, 1), whole)
    order = torch.stack([torch.randperm(40) for _ in range(3)])
    picked = x.gather(1, order[..., None].expand(x.shape))
    want = whole.gather(1, order[..., None].expand(x.shape))
    assert torch.equal(dropout(picked, 0.3, key=KEY, positions=order), want)
    channels = [dropout(x[..., i : i + 7], 0.3, key=KEY, channel_offset=i) for i in range(0, 30, 7)]
    assert torch.equal(torch.cat(channels, 2), whole)
    assert not torch.equal(torch.cat([dropout(x[..., i : i + 7], 0.3, key=KEY) for i in range(0, 30, 7)], 2), whole)


def test_attention_slices_equal_the_whole_bitwise():
    whole = attention_keep_mask((3, 4, 17, 21), 0.4, key=KEY)
    for query, keys, heads in ((0, 5, 1), (9, 3, 2), (16, 20, 3)):
        part = attention_keep_mask(
            (3, 4 - heads, 17 - query, 21 - keys),
            0.4,
            key=KEY,
            query_offset=query,
            key_offset=keys,
            head_offset=heads,
        )
        assert torch.equal(part, whole[:, heads:, query:, keys:])
    assert abs(whole.double().mean() - 0.6) < 4 * (0.24 / whole.numel()) ** 0.5
    assert abs(correlation(whole[:, 0], whole[:, 1])) < 0.15


def test_gradient_uses_the_same_mask():
    x = torch.randn(3, 10, 9, requires_grad=True)
    y = dropout(x, 0.5, key=KEY)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, keep_mask((3, 10, 9), 0.5, key=KEY) * 2.0)


def test_half_precision_scales_in_fp32():
    x = torch.randn(3, 10, 9).bfloat16()
    y = dropout(x, 0.1, key=KEY)
    assert y.dtype == torch.bfloat16
    want = torch.where(keep_mask((3, 10, 9), 0.1, key=KEY), x.float() * (1 / 0.9), 0).bfloat16()
    assert torch.equal(y, want)


def test_bad_arguments_are_named():
    x = torch.randn(3, 10, 9)
    assert dropout(x, 0.0, key=KEY) is x
    with pytest.raises(ValueError, match=r"0 <= p < 1, got 1\.0"):
        dropout(x, 1.0, key=KEY)
    with pytest.raises(ValueError, match=r"int64 \(2,\), got torch.int64 \(3,\)"):
        dropout(x[:2], 0.1, key=KEY)
