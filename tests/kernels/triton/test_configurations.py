"""What is compiled ahead of time is what launches compile: every launch of the public operations is in the list, and
every entry of the list is launched. Nothing is computed here."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from potamos.kernels.aot import Configuration
from potamos.kernels.diag_ssm import DiagState, diag_ssm, triton, triton_backward
from potamos.kernels.diag_ssm import configurations as scan_configurations
from potamos.kernels.flash_conv import H3State, h3_mix
from potamos.kernels.long_conv import configurations as long_conv_configurations
from potamos.kernels.long_conv import long_conv, triton_launch
from potamos.kernels.long_conv import triton as long_conv_triton

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int32: "i32"}
SCAN, LONG_CONV = scan_configurations.configurations(), long_conv_configurations.configurations()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = {
    "scan_fwd_kernel": triton.SIZES,
    "scan_backward_kernel": triton_backward.SIZES,
    "adjoint_kernel": triton_backward.ADJOINT_SIZES,
} | dict.fromkeys([name for name in dir(long_conv_triton) if name.endswith("_kernel")], long_conv_triton.SIZES)


def form(kernel: Any, constants: dict, types: dict, warps: int, stages: int) -> tuple:
    """All that two launches of one binary have in common."""
    return kernel.fn.__name__, frozenset(constants.items()), frozenset(types.items()), warps, stages


class Launches:
    """Stands in for a kernel: notes the form that each launch would compile, and runs nothing."""

    def __init__(self, kernel: Any, forms: set) -> None:
        self.kernel, self.forms = kernel, forms

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        types = {}
        for name, value in zip(self.kernel.arg_names, args, strict=False):
            if value is None:
                constants[name] = None
            elif isinstance(value, torch.Tensor):
                assert value.data_ptr() % 16 == 0, f"{name}: at an odd address, which is another form"
                types[name] = f"*{TYPES[value.dtype]}"
            else:
                assert value < 2**31
                types[name] = "i32"
                if name not in SIZES[self.kernel.fn.__name__]:
                    assert value > 1
                    assert value % 16 == 0, f"{name} = {value} is specialised"
        assert {*types, *constants} == {*self.kernel.arg_names}
        self.forms.add(form(self.kernel, constants, types, num_warps, num_stages))


def listed(configurations: list[Configuration]) -> dict[tuple, str]:
    return {form(c.kernel, c.constants, c.signature, c.num_warps, c.num_stages): c.name for c in configurations}


def compare(launched: set, configurations: list[Configuration]) -> None:
    known = listed(configurations)
    unknown = [f for f in launched if f not in known]
    assert not unknown, f"launched, but not compiled ahead of time: {unknown[0]}"
    assert not [name for f, name in known.items() if f not in launched], "compiled ahead of time, but never launched"


@pytest.fixture
def forms(monkeypatch) -> set:
    found: set = set()
    for module, names in (
        (triton, ("scan_fwd_kernel",)),
        (triton_backward, ("scan_backward_kernel", "adjoint_kernel")),
        (triton_launch, ("_convolve", "_transform", "_weight_gradient", "_correlate")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Launches(getattr(module, name), found))
    return found


def test_sizes_are_not_specialised():
    """The compiler is told so; `Launches` takes it from the same names."""
    kernels = [triton.scan_fwd_kernel, triton_backward.scan_backward_kernel, triton_backward.adjoint_kernel]
    kernels += [getattr(long_conv_triton, name) for name in dir(long_conv_triton) if name.endswith("_kernel")]
    for kernel in kernels:
        told = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize")
        numbers = {name for name in kernel.arg_names if name in SIZES[kernel.fn.__name__]}
        assert numbers
        assert told is not None
        assert set(told) == numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_of_the_scan(dtype, forms, make_diagonal, monkeypatch):
    """Lengths and batches that are 1, even and odd; documents, a carried state, segments, a loss of the state."""
    for modes, cut in product((3, 40) if dtype != torch.float32 else (32,), (False, True)):
        monkeypatch.setattr(triton, "choose_segments", lambda programs, supers, n, cut=cut: supers if cut else 1)
        monkeypatch.setattr(triton_backward, "plan", lambda channels, batch, supers, cut=cut: (1 if cut else supers, 1))
        diag, d = make_diagonal(1, modes, dtype=torch.float32)
        for length, documents, carried in product((2048 + 7, 1040) if cut else (1, 64), (False, True), (False, True)):
            batch, document = 1 + length % 2, torch.zeros(1 + length % 2, dtype=torch.int32)
            taps = 1 + 4 * (length % 2)  # without a filter there is no history
            ids = torch.zeros(batch, length, dtype=torch.int32) if documents else None
            q, k, v = (torch.randn(batch, 1, length + 1, dtype=dtype)[..., 1:].requires_grad_() for _ in range(3))
            shift, d_k = torch.randn(1, taps), torch.randn(1)
            state = (
                H3State(torch.randn(batch, 1, taps - 1), torch.randn(batch, 1, 1, modes, 2), document)
                if carried
                else None
            )
            y, after = h3_mix(q, k, v, shift, diag, d_k=d_k, d=d, document_ids=ids, state=state, backend="triton")
            (y.sum() + (after.diag.sum() if carried else 0)).backward()
            state = DiagState(torch.randn(batch, 1, modes, 2), document) if carried else None
            y, after = diag_ssm(v, diag, d=d, document_ids=ids, state=state, backend="triton")
            (y.sum() + (after.modes.sum() if carried else 0)).backward()
    compare(forms, [c for c in SCAN if c.dtype == TYPES[dtype]])


@pytest.mark.parametrize("half", [True, False])
def test_every_form_of_the_long_convolution(half, forms):
    """Each transform, in one launch and in blocks; gates, one of them, none; a gate of another type; odd addresses."""
    lengths = (65, 512, 513, 1024, 1025, 2048, 2049, 4096) if half else (65, 256, 257, 512, 513, 1024)
    for dtype, length, gates in product(DTYPES[:2] if half else DTYPES[2:], lengths, ("", "pre", "post", "both")):
        u, kernel = torch.randn(2, 1, length + 1, dtype=dtype)[..., 1:].requires_grad_(), torch.randn(1, 65)
        gate = {"pre_gate": torch.randn_like(u).float(), "post_gate": torch.randn_like(u)}
        options = {name: x.requires_grad_() for name, x in gate.items() if gates in ("both", name.split("_")[0])}
        long_conv(u, kernel.requires_grad_(), **options, backend="triton").sum().backward()
    compare(
        forms,
        [
            c
            for c in LONG_CONV
            if (c.constants.get("POINTS") == 4096 if "POINTS" in c.constants else c.constants["HALF"]) == half
        ],
    )
