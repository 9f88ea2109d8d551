"""Triton's interpreter for these tests: kernels run on the CPU, instruction by instruction, as numpy calls.

The interpreter is chosen when a kernel is decorated, so the variable is set before any kernel is imported. bf16 is
an integer type to it: products of bf16 tiles would be of the bits, and casts to bf16 truncate where GPUs round to
nearest. `create_dot` is therefore replaced by one that widens bf16 operands and `_convert_float` by one that rounds;
test_interpreter.py watches both what is wrong and that the replacements are right. Kernels do all other arithmetic in
fp32.

It is also slow where nothing asks for it: a scan combines element by element, and every call of a device function
looks through the whole language for what to replace. Here a scan combines whole slices, in the same order, and the
language is looked through once a launch; test_interpreter.py holds both against what they replace.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    _create_dot = interpreter.InterpreterBuilder.create_dot
    _convert_float = interpreter._convert_float

    def _widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return _convert_float(handle.data, handle.dtype.scalar, tl.float32, None).view(np.float32)

    def convert_float(data, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
            return _convert_float(data, input_dtype, output_dtype, rounding_mode)
        bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even; a carry into the exponent is right
        return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(_widen(a), _widen(b), dtype=np.float32).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def scan_by_slices(self, input):
        shape, steps = np.delete(input[0].handle.data.shape, self.axis), input[0].handle.data.shape[self.axis]

        def at(step: int) -> list[np.ndarray]:
            return [x.handle.data.take(step, self.axis) for x in input]

        def tensors(slices: list[np.ndarray]) -> tuple:
            return tuple(self.to_tensor(x, kind.dtype) for x, kind in zip(slices, input, strict=True))

        def values(found) -> list[np.ndarray]:
            found = found if isinstance(found, tuple) else (found,)
            arrays = (np.asarray(x.handle.data if isinstance(x, tl.tensor) else x) for x in found)
            return [np.broadcast_to(x.squeeze() if x.size == 1 else x, shape) for x in arrays]

        slices = [at(0)]
        for step in range(1, steps):
            slices.append(values(self.combine_fn.fn(*tensors(slices[-1]), *tensors(at(step)))))
        return list(tensors([np.stack(each, self.axis) for each in zip(*slices, strict=True)]))

    _numpy_dtype = functools.cache(interpreter._get_np_dtype)  # which makes a table of all types at each call

    def numpy_dtype(kind) -> np.dtype:
        pointers = isinstance(kind.scalar, tl.pointer_type)  # these, and blocks, have no hash
        return np.dtype(np.uint64) if pointers else _numpy_dtype(kind.scalar)

    _call_launch = interpreter.GridExecutor.__call__
    _patched: set[int] = set()  # modules whose language is replaced in the launch that runs

    def call_launch(self, *arguments, **options):
        _patched.clear()
        return _call_launch(self, *arguments, **options)

    def call_function(self, *arguments, **options):
        module = id(self.fn.__globals__)
        if module not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(module)
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float
    interpreter._get_np_dtype = numpy_dtype
    interpreter.ScanOps.by_element = interpreter.ScanOps.generic_scan  # type: ignore[attr-defined]
    interpreter.ScanOps.generic_scan = scan_by_slices
    interpreter.GridExecutor.__call__ = call_launch
    interpreter.InterpretedFunction.__call__ = call_function


class TwoDevices(TorchFunctionMode):
    """What a GPU would refuse: one operation on tensors of the default device and on tensors of the host.

    On a GPU these tests run with it as the default device. Here all memory is the host's, so tensors carry a mark:
    those made without a device are the accelerator's, those made with device="cpu" or moved by `.cpu()` or `.to("cpu")`
    the host's; a `torch.device` taken from another tensor says nothing, and marks nothing. Numbers (no dimensions) may
    mix.
    """

    MAY_MIX = ("__get__", "__set__", "to", "type_as", "copy_", "grad", "backward", "__setitem__")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        marks = [mark for x in tensors if x.dim() and (mark := getattr(x, "_mark", None)) is not None]
        by_host_index = name == "__getitem__" and marks[:1] == ["accelerator"]  # allowed, the other way round is not
        if len(set(marks)) > 1 and name not in self.MAY_MIX and not by_host_index:
            raise RuntimeError(f"{name}: tensors of the accelerator and of the host")
        out = func(*args, **kwargs)
        if name == "grad":
            inputs = [args[1]] if isinstance(args[1], torch.Tensor) else args[1]
            for gradient, x in zip(out, inputs, strict=True):
                self.put(gradient, getattr(x, "_mark", None))
            return out
        mark = self.mark_of_result(name, tensors, marks, args, kwargs)
        if name in ("cpu", "to") and out is args[0] and getattr(out, "_mark", None) != mark:
            out = out.view_as(out)  # on a GPU it would be a copy
        for x in pytree.tree_leaves(out):
            self.put(x, mark)
        return out

    @staticmethod
    def mark_of_result(name: str, tensors: list, marks: list[str], args: tuple, kwargs: dict) -> str | None:
        device = next((x for x in (kwargs.get("device"), *args[1:]) if isinstance(x, (str, torch.device))), None)
        if name == "cpu" or (isinstance(device, str) and name != "einsum"):
            return "host" if name == "cpu" or device == "cpu" else "accelerator"
        if name == "to" and len(tensors) > 1:
            return getattr(tensors[1], "_mark", None)
        if device is not None or (not tensors and name in ("from_numpy", "frombuffer")):
            return None
        return marks[0] if marks else None if tensors else "accelerator"

    @staticmethod
    def put(x, mark: str | None) -> None:
        if isinstance(x, torch.Tensor) and mark is not None:
            x._mark = mark  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def two_devices(request) -> Iterator[None]:
    """Every interpreted test runs on two devices in name, but for those that `torch.compile` traces, which sees no
    marks; on a GPU there are two."""
    if not INTERPRETED or "compile" in request.node.name:
        yield
        return
    with TwoDevices():
        yield
