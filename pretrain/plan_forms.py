"""Which form of the kernels a plan counts: what a GPU would run, on a machine that has none.

On fake tensors a Triton form does all that its host side does, which is to make its outputs and what its backward
keeps, and launches nothing. The choice between the forms is the one that a GPU would make.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import Tensor

Form = Literal["torch", "triton"]

MULTIPROCESSORS = 132
"""Of an H100: how finely kernels cut rows, and so how many partial sums they hold, which is little."""


def form_on(device: str) -> Form:
    """What kernels run on a kind of device, here: "triton" on a GPU if its compiler is installed to be asked."""
    return "triton" if device != "cpu" and importlib.util.find_spec("triton") is not None else "torch"


@contextmanager
def counting(form: Form) -> Iterator[None]:
    """Let kernels choose as on a CPU ("torch") or as on a GPU ("triton"), and launch nothing."""
    if form == "torch":
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from potamos.kernels import backend, cross_entropy
    from potamos.kernels.diag_ssm import triton as scans

    def choose(wanted: str, operation: str, inputs: Tensor | None = None, *, obstacle: str | None = None) -> Form:
        if wanted == "auto" and inputs is not None:
            usable = obstacle is None and inputs.dtype in backend.TRITON_DTYPES
            return "triton" if usable else "torch"
        return backend.resolve_backend(wanted, operation, inputs, obstacle=obstacle)

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if (
                name.startswith(f"{backend.__package__}.")
                and module is not backend
                and "resolve_backend" in vars(module)
            ):
                stack.enter_context(_replaced(module, "resolve_backend", choose))
        # Kernels are of the second kind where TRITON_INTERPRET was set when they were imported.
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(_replaced(kind, "run", lambda *_, **__: None))
        stack.enter_context(_replaced(scans, "_multiprocessors", lambda _: MULTIPROCESSORS))
        chunks = cross_entropy._CHUNK_ROWS
        stack.enter_context(_replaced(cross_entropy, "_CHUNK_ROWS", {**chunks, "cpu": chunks["cuda"]}))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
