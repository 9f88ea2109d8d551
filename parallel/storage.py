"""Tensors in a folder of safetensors files.

One process writes whole tensors, through torch.distributed.checkpoint's Hugging Face storage; any process reads any cut
of any of them, so a later layout reads what an earlier one wrote. Only tensors enter: the storage saves anything else
without a word and cannot read it back, so scalars belong into JSON. Nothing here writes or reads a pickle.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
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


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder written by `write_tensors`, each read when it is asked for, and every time anew.

    What comes back is a view of the mapped file: its shape costs nothing, a slice of it reads the pages of that slice,
    and they are let go with it. So a process that takes slices one by one holds no more than the largest of them. To
    write into it changes nothing on the disk. A missing folder holds none.

    Raises:
        StorageError: when it is made, see `describe`; on access, a file that is no longer what it was.
        OSError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {name: path for path, tensors in _headers(folder) for name in tensors}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        path = self._files[name]
        try:
            with safe_open(str(path), framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise StorageError(f"{path}: {name!r} cannot be read ({error})") from error

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def describe(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) from the headers of a folder's files; each file's size is checked against it.

    Raises:
        StorageError: a header is unreadable, a file is shorter or longer than its header says, a name occurs twice, or
            a dtype is not one of `DTYPES`.
    """
    return {name: facts for _, tensors in _headers(folder) for name, facts in tensors.items()}


def _headers(folder: Path) -> list[tuple[Path, dict[str, tuple[str, tuple[int, ...]]]]]:
    found, seen = [], set()
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_header(path)
        for name, (dtype, _) in tensors.items():
            if name in seen:
                raise StorageError(f"{path}: tensor {name!r} is also in another file of this folder")
            if dtype not in DTYPES.values():
                raise StorageError(f"{path}: tensor {name!r} has dtype {dtype}; known: {', '.join(DTYPES.values())}")
        seen |= tensors.keys()
        found.append((path, tensors))
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
