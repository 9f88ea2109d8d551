"""Tensors in a folder of safetensors files, through torch.distributed.checkpoint's Hugging Face storage.

The storage can write and read any cut of a tensor, so a later layout reads what an earlier one wrote; here one process
writes whole tensors. Only tensors enter: the storage saves anything else without a word and cannot read it back, so
scalars belong into JSON. Nothing here writes or reads a pickle (the storage's readers look at `*.safetensors` alone).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The storage serializes one file in memory before it writes it, so a file's size bounds what a save costs beside the
# tensors themselves.
FILE_BYTES = 1 << 30

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""What a tensor may hold, with safetensors' name for it. (complex128 has none: store `torch.view_as_real`.)"""


class StorageError(ValueError):
    """A folder's files are no complete set of tensors, or a value cannot be stored. The message names which and why."""


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, file_bytes: int = FILE_BYTES) -> None:
    """Write host tensors into `folder/model-*.safetensors` with an index beside them, in files of about `file_bytes`.

    The folder is made if absent. Nothing is atomic here: write into a temporary folder, check it, then rename it.

    Raises:
        StorageError: a value is not a contiguous CPU tensor of a dtype in `DTYPES`.
        OSError: the disk is full, a quota or a permission stands in the way.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    for name, tensor in tensors.items():
        _check_storable(name, tensor)
    folder.mkdir(parents=True, exist_ok=True)
    if not tensors:
        return
    _silence_single_process()
    try:
        save(
            dict(tensors),
            storage_writer=HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_split(tensors, file_bytes)),
            no_dist=True,  # also under torchrun: only this rank writes, from a thread that may not enter collectives
        )
    except CheckpointException as error:
        raise _cause(error) from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder written by `write_tensors`, whole, in host memory. A missing folder holds none.

    Raises:
        StorageError: a file is truncated or is not safetensors.
        OSError: a file cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    described = describe(folder)
    if not described:
        return {}
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    tensors = {name: torch.empty(shape, dtype=dtypes[dtype]) for name, (dtype, shape) in described.items()}
    _silence_single_process()
    try:
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from error
    return tensors


def describe(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) from the headers of a folder's files; each file's size is checked against it.

    Raises:
        StorageError: a header is unreadable, a file is shorter or longer than its header says, a name occurs twice, or
            a dtype is not one of `DTYPES`.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, (dtype, shape) in read_header(path).items():
            if name in found:
                raise StorageError(f"{path}: tensor {name!r} is also in another file of this folder")
            if dtype not in DTYPES.values():
                raise StorageError(f"{path}: tensor {name!r} has dtype {dtype}; known: {', '.join(DTYPES.values())}")
            found[name] = dtype, shape
    return found


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of one safetensors file. The library checks offsets, sizes and the file's length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (str(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        raise StorageError(f"{path}: not a complete safetensors file ({error})") from error


def _check_storable(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise StorageError(f"{name!r} is a {type(tensor).__name__}, not a tensor: scalars belong into the JSON file")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise StorageError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold; it holds {known}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise StorageError(f"tensor {name!r} on {tensor.device} must be contiguous and in host memory to be written")


def _split(tensors: Mapping[str, Tensor], file_bytes: int) -> dict[str, int]:
    """Number (from 1) of the file each tensor goes to, in order, none beyond `file_bytes` but by its last tensor."""
    number, filled, files = 1, 0, {}
    for name, tensor in tensors.items():
        if filled >= file_bytes:
            number, filled = number + 1, 0
        files[name] = number
        filled += tensor.numel() * tensor.element_size()
    return files


def _cause(error: Any) -> BaseException:
    """What happened inside: the storage wraps each rank's exception, a KeyboardInterrupt too, in one of its own."""
    inner = next(iter(error.failures.values()))[0]
    if isinstance(inner, OSError | MemoryError | StorageError) or not isinstance(inner, Exception):
        return inner
    return StorageError(f"{type(inner).__name__}: {json.dumps(str(inner))}")


def _silence_single_process() -> None:
    """The storage warns at each call that it works in a single process, which is what it was told to do."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
