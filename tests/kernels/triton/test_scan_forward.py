"""The forward kernel against the definition, token by token, in fp64."""

import pytest
import torch

from potamos.kernels.diag_ssm import Diagonal
from potamos.kernels.diag_ssm.chunked import _ChunkOperators
from potamos.kernels.diag_ssm.parameters import discretise
from potamos.kernels.diag_ssm.triton import scan_forward
from potamos.kernels.flash_conv.reference import h3_mix_reference


def test_plain(make_diagonal, assert_close):
    torch.manual_seed(0)
    diag, d = make_diagonal(2, 32, dtype=torch.float32)
    q, k, v = (torch.randn(2, 1, 1134) for _ in range(3))
    shift, d_k = torch.randn(2, 64) / 8, torch.randn(2)
    with torch.no_grad():
        wide = Diagonal(*(getattr(diag, n).double() for n in ("log_dt", "log_a", "b", "B", "C")), rule=diag.rule)
        r, w, taps, decay, _ = _ChunkOperators.apply(*discretise(wide), 64, torch.float32)
        taps[:, 0] += d
        shift_taps = shift.clone()
        shift_taps[:, 0] += d_k
        y, final, starts = scan_forward(q, k, v, shift_taps, taps, r, w, decay, None, None)
        args = [x.transpose(0, 1).double() for x in (q, k, v)]
        want, state = h3_mix_reference(*args, shift.double(), wide, d_k=d_k.double(), d=d.double())
    assert_close(y.transpose(0, 1), want, 1e-6)
