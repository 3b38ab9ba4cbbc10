"""The model file: a safetensors file with a JSON header. This is its only reader and writer.

Layout of the file, which any safetensors reader opens::

    8 bytes   length of the table, little endian
    table     {"__metadata__": {"npad": HEADER}, name: {"dtype", "shape", "data_offsets"}, ...}
    data      the tensors, in the table's order, without gaps
    HEADER    {"sha256": ..., "format_version": ..., "header": {...}}, as a string

The SHA-256 is that of the whole file with its own 64 digits set to "0", so no changed byte goes
unnoticed. It stands at a fixed place: tensors are hashed while they stream to the disk, and the
digest is filled in last. The package `safetensors` is not used: its writer does not flush to the
disk, and its reader maps the file, so that a later change of the file would reach a loaded model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npad.atomic_file import replacing
from npad.file_names import shown
from npad.progress import Advance, task

__all__ = [
    "FORMAT_VERSION",
    "STATISTICS_VERSION",
    "ModelFileError",
    "check_tensors",
    "read_model",
    "write_model",
]

FORMAT_VERSION = 2
STATISTICS_VERSION = 3  # of what holds statistics, too: the newest that can be read

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NO_DIGEST = b"0" * 64
_LEAD = rb'{"__metadata__":{"npad":"{\"sha256\":\"'  # every table begins so; the digest follows
_DIGEST = slice(8 + len(_LEAD), 8 + len(_LEAD) + len(_NO_DIGEST))
_MAX_TABLE = 64 << 20  # bytes; a length beyond it is not that of a table
_MAX_NDIM = 8
_BLOCK = 16 << 20  # bytes hashed and written or read at once

_NOT_A_MODEL = "is not an npad model file; a model file is written by NPad.save or `npad fit`"
_NO_HEADER = (
    "is a safetensors file but holds no npad model; "
    "if it holds the weights of a backbone, give it with weights="
)
_DAMAGED = "is damaged or was edited; copy it again, or fit and save the model again"
_REMEDIES = {
    errno.ENOENT: "make the folder first",
    errno.ENOTDIR: "make the folder first",
    errno.EEXIST: "give the path of a file",
    errno.ENOSPC: "free some space on the disk or write to another one",
    errno.EDQUOT: "free some space on the disk or write to another one",
    errno.EFBIG: "raise the limit on the size of a file",
    errno.EACCES: "get permission to write the file and its folder, or choose another folder",
    errno.EPERM: "get permission to write the file and its folder, or choose another folder",
    errno.EROFS: "choose a folder on a disk that can be written",
}


class ModelFileError(ValueError):
    """A model file cannot be read or written. The message names file, fault and remedy.

    Attributes
    ----------
    path : Path
    """

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(path, problem)
        self.path = Path(path)
        self._problem = problem

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self._problem}"


def write_model(
    path: str | os.PathLike[str],
    header: dict[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    version: int | None = None,
    progress: bool | None = None,
) -> None:
    """Write a model file: whole, or not at all.

    A full disk, an interrupt, a kill or a power cut leaves what was there before.

    Parameters
    ----------
    path : path
        As in `npad.atomic_file.replacing`: a symbolic link stays and its target is replaced.
    header : dict
        Anything that JSON can hold, without NaN and infinity.
    tensors : mapping of str to Tensor
        float64, float32, float16, bfloat16, int64, int32, int8 or uint8; any shape, strides and device.
        They are written one at a time, and a tensor that is contiguous in memory is not copied.
    version : int, optional
        The oldest format that an npad must know to read it; by default `FORMAT_VERSION`.
    progress : bool, optional
        As `enabled` of `npad.progress.task`.

    Raises
    ------
    ModelFileError
        The folder is missing, the file may not be written, the disk is full.
    TypeError
        `header` is not JSON, or a tensor has a dtype that is not supported.
    ValueError
        `header` holds NaN or infinity, or a tensor has a name that is not free.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    table = _encode_table(header, ordered, version or FORMAT_VERSION)
    size = sum(tensor.nbytes for _, tensor in ordered)
    try:
        with (
            task(f"Writing {Path(path).name}", size, progress, "B") as advance,
            replacing(path) as file,
        ):
            _write(file, table, [tensor for _, tensor in ordered], advance)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk and the folder")
        problem = f"cannot be written: {error.strerror or error}; nothing was changed; {remedy}"
        raise ModelFileError(path, problem) from error


def read_model(
    path: str | os.PathLike[str], *, progress: bool | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a model file. Runs no code from it.

    Parameters
    ----------
    path : path
    progress : bool, optional
        As `enabled` of `npad.progress.task`.

    Returns
    -------
    header : dict
        As JSON gives it back: tuples became lists, keys became strings.
    tensors : dict of str to Tensor
        On the CPU, contiguous, in memory of their own: the file may change afterwards.

    Raises
    ------
    ModelFileError
        The file is missing, is not a model, is cut short or damaged, or has a newer format.
    """
    try:
        if not Path(path).is_file():
            problem = "is not a file" if Path(path).exists() else "there is no such file"
            raise ModelFileError(path, f"{problem}; give the path of a model file")
        with Path(path).open("rb") as file:
            return _read(path, file, progress)
    except OSError as error:
        raise ModelFileError(
            path, f"cannot be read: {error.strerror or error}; check its permissions and the disk"
        ) from error


def check_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    """Check that a model file held exactly the tensors that its header calls for.

    Parameters
    ----------
    path : path
        The file, for the message.
    tensors : mapping of str to Tensor
    expected : mapping of str to (dtype, shape)

    Raises
    ------
    ModelFileError
        A tensor is missing, unknown, or of another dtype or shape; the message names it.
    """
    remedy = "fit and save the model again"
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ModelFileError(path, f"tensor {name!r} is missing; {remedy}")
        if name not in expected:
            raise ModelFileError(path, f"tensor {name!r} is no part of the model; {remedy}")
        dtype, shape = expected[name]
        tensor = tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, tuple(shape)):
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ModelFileError(
                path,
                f"tensor {name!r} must be {dtype} of shape {tuple(shape)}, got {got}; {remedy}",
            )


# Writing


def _encode_table(header: dict[str, Any], tensors: list[tuple[str, Tensor]], version: int) -> bytes:
    """Length and table, padded so that the data is aligned to 8 bytes; the digest is zeros yet."""
    content = {"sha256": _NO_DIGEST.decode(), "format_version": version, "header": header}
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    table: dict[str, Any] = {"__metadata__": {"npad": text}}
    end = 0
    for name, tensor in tensors:
        if name == "__metadata__":
            raise ValueError(f"npad: the name {name!r} is not free for a tensor")
        if tensor.dtype not in _DTYPE_NAMES:
            known = ", ".join(map(str, _DTYPE_NAMES))
            raise TypeError(f"npad: tensor {name!r} must be one of {known}, got {tensor.dtype}")
        begin, end = end, end + tensor.nbytes
        table[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(table, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _write(file: BufferedWriter, table: bytes, tensors: list[Tensor], advance: Advance) -> None:
    digest = hashlib.sha256(table)
    file.write(table)
    for tensor in tensors:
        for block in _blocks(tensor.detach().cpu().contiguous()):
            digest.update(block)
            file.write(block)
            advance(len(block))
    file.seek(_DIGEST.start)
    file.write(digest.hexdigest().encode())


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """Memory of a contiguous CPU tensor, piece by piece."""
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(data), _BLOCK):
        yield data[begin : begin + _BLOCK]


# Reading


def _read(
    path: str | os.PathLike[str], file: BufferedReader, progress: bool | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    size = os.fstat(file.fileno()).st_size
    length = file.read(8)
    n_table = int.from_bytes(length, "little")
    if len(length) < 8 or not 2 <= n_table <= _MAX_TABLE:
        raise ModelFileError(path, _NOT_A_MODEL if size else "is empty; save the model again")
    table = length + file.read(n_table)
    if len(table) < 8 + n_table:
        begins_well = _LEAD.startswith(table[8 : _DIGEST.start])
        raise ModelFileError(path, _cut_short(size, 8 + n_table) if begins_well else _NOT_A_MODEL)
    header, entries = _decode_table(path, table[8:])
    layout = _decode_layout(path, entries)
    n_data = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout)
    if size < len(table) + n_data:
        raise ModelFileError(path, _cut_short(size, len(table) + n_data))
    if size > len(table) + n_data or not table[8:].startswith(_LEAD):
        raise ModelFileError(path, _DAMAGED)

    digest = hashlib.sha256(table[: _DIGEST.start] + _NO_DIGEST + table[_DIGEST.stop :])
    tensors = {}
    with task(f"Reading {Path(path).name}", n_data, progress, "B") as advance:
        for name, dtype, shape in layout:
            with torch.inference_mode(False):  # the model outlives a program's
                flat = torch.empty(math.prod(shape), dtype=dtype, device="cpu")
            for block in _blocks(flat):
                if file.readinto(block) < len(block):
                    raise ModelFileError(path, "became shorter while it was read; read it again")
                digest.update(block)
                advance(len(block))
            tensors[name] = flat.reshape(shape)
    if digest.hexdigest().encode() != table[_DIGEST]:
        raise ModelFileError(path, _DAMAGED)
    return header, tensors


def _decode_table(
    path: str | os.PathLike[str], encoded: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and the tensors' entries. The version is judged before anything that may follow it."""
    malformed = ModelFileError(path, _DAMAGED if encoded.startswith(_LEAD) else _NOT_A_MODEL)
    try:
        entries = json.loads(encoded.decode())
        metadata = entries.pop("__metadata__", {})
        content = json.loads(metadata["npad"]) if "npad" in metadata else None
        version = content["format_version"] if content is not None else 0
    except (AttributeError, KeyError, TypeError, RecursionError, ValueError) as error:
        raise malformed from error
    if content is None:
        raise ModelFileError(path, _NO_HEADER)
    if type(version) is int and version > STATISTICS_VERSION:
        raise ModelFileError(
            path,
            f"was written by a newer npad, format {version}; this one reads up to "
            f"{STATISTICS_VERSION}; upgrade npad",
        )
    header = content.get("header")
    if type(version) is not int or version < 1 or not isinstance(header, dict):
        raise malformed
    return header, entries


def _decode_layout(
    path: str | os.PathLike[str], entries: dict[str, Any]
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor, in the order of the data, which must have no gaps."""
    layout = []
    end = 0
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, stop]} if (
                begin == end
                and kind in _DTYPES
                and len(shape) <= _MAX_NDIM
                and all(type(n) is int and n >= 0 for n in shape)
                and math.prod(max(n, 1) for n in shape) < 1 << 59  # strides fit in 64 bits
                and stop == begin + math.prod(shape) * _DTYPES[kind].itemsize
            ):
                layout.append((name, _DTYPES[kind], tuple(shape)))
                end = stop
            case _:
                raise ModelFileError(
                    path, f"tensor {name!r} is described wrongly: the file {_DAMAGED}"
                )
    return layout


def _cut_short(size: int, expected: int) -> str:
    return (
        f"is cut short: {size} of {expected} bytes; copy it again, or fit and save the model again"
    )
