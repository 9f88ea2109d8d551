"""Every form of the block FFT kernels that a launch can compile, for compilation ahead of time.

A form is made by the transform, the dtype of u and its gates, which gates there are, and whether length and strides are
multiples of 16. `tests/kernels/triton/test_configurations.py` finds each launch here.
"""

from collections.abc import Iterator
from typing import Any

from ..aot import Configuration
from .triton import (
    CONFIGS,
    CORRELATE_TILE,
    Config,
    long_conv_correlate_kernel,
    long_conv_kernel,
    long_conv_transform_kernel,
    long_conv_weight_gradient_kernel,
)

GATES = {False: "", True: " gated"}
"""Both or none: `fused_long_conv` makes up for a missing one."""
FLOATS = ("twiddles", "spectra", "weights", "x_spectra", "grad_spectra")
SEQUENCES = ("x", "gate", "grad", "grad_gate", "out_gate", "out", "second_gate", "second")


def configurations() -> list[Configuration]:
    """Each transform in one launch, the largest of each precision in blocks too; the spectra and their correlation
    where the kernel's gradient needs them."""
    found = []
    for half, configs in CONFIGS.items():
        for config in configs:
            for dtype in ("bf16", "fp16") if half else ("fp32",):
                for aligned in (True, False):
                    found += _forms(config, dtype, aligned, blocks=config is configs[-1])
            if not half or config is configs[-1]:
                found.append(_correlation(config.points))
    return list({configuration.name: configuration for configuration in found}.values())


def _forms(config: Config, dtype: str, aligned: bool, blocks: bool) -> Iterator[Configuration]:
    for split in (False, True) if blocks else (False,):
        for gated, gates in GATES.items():
            title = f"{gates}{' blocks' if split else ''}"
            flags = {"GATED": gated, "OUT_GATED": gated, "SECOND": False, "SPLIT": split, "ADJOINT": False}
            yield _make(config, f"forward{title}", dtype, aligned, long_conv_kernel, flags)
            flags = flags | {"SECOND": gated, "ADJOINT": True}
            yield _make(config, f"backward{title}", dtype, aligned, long_conv_kernel, flags)
    for gated, gates in GATES.items():
        if config.half:
            flags = {"GATED": gated, "GRAD_GATED": gated}
            yield _make(config, f"kernel gradient{gates}", dtype, aligned, long_conv_weight_gradient_kernel, flags)
        if blocks or not config.half:
            yield _make(config, f"spectra{gates}", dtype, aligned, long_conv_transform_kernel, {"GATED": gated})


def _correlation(points: int) -> Configuration:
    signature: dict[str, str] = {**dict.fromkeys(("channels", "pairs", "blocks", "parts", "group"), "i32")}
    signature |= dict.fromkeys(("x_spectra", "grad_spectra", "out"), "*fp32")
    constants = {"POINTS": points, "TILE": min(points, CORRELATE_TILE)}
    name = f"long_conv correlation fp32 {points}"
    return Configuration(name, long_conv_correlate_kernel, signature, constants, num_stages=3, dtype="fp32")


def _make(config: Config, title: str, dtype: str, aligned: bool, kernel: Any, flags: dict[str, bool]) -> Configuration:
    constants = {**flags, "ALIGNED": aligned, "N1": config.n1, "N2": config.n2, "HALF": config.half}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument in FLOATS or (argument == "out" and kernel is not long_conv_kernel):
            signature[argument] = "*fp32"
        elif argument == "tables":
            signature[argument] = "*fp16" if config.half else "*fp32"
        else:
            signature[argument] = f"*{dtype}" if argument in SEQUENCES else "i32"
    name = f"long_conv {title} {dtype} {config.n1}x{config.n2}{'' if aligned else ' unaligned'}"
    return Configuration(name, kernel, signature, constants, num_warps=config.warps, num_stages=STAGES, dtype=dtype)


STAGES = 3
"""Triton's own default, which the launches leave as it is."""
