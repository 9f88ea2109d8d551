"""Triton's interpreter for these tests: kernels run on the CPU, instruction by instruction, as numpy calls.

The interpreter is chosen when a kernel is decorated, so the variable is set before any kernel is imported. bf16 is
an integer type to it: products of bf16 tiles would be of the bits, and casts to bf16 truncate where GPUs round to
nearest. `create_dot` is therefore replaced by one that widens bf16 operands and `_convert_float` by one that rounds;
test_interpreter.py watches both what is wrong and that the replacements are right. Kernels do all other arithmetic in
fp32.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np

if os.environ["TRITON_INTERPRET"] == "1":
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

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float
