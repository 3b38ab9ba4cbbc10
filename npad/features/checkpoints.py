"""Files of weights: all tensors that one holds, or what it is instead. Runs no code from them."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["UnfitError", "first_line", "read_tensors"]

_HEAD: Final = 64  # bytes that tell what a file is
# What is taken for weights and is none, by how it begins.
_OTHERS: Final = {
    rb"version https://git-lfs": "a pointer of Git LFS, which stands for the file: run 'git lfs pull'",
    rb"(\xef\xbb\xbf)?\s*<": "a web page, or another text of tags; download the file itself",
    rb"\s*[{\[]": "a text of JSON; give the file of tensors beside it",
    rb"\x89HDF": "a file of Keras (HDF5); give a checkpoint of PyTorch",
    rb"GGUF": "a GGUF file; give a checkpoint of PyTorch",
    rb"\x93NUMPY": "an array of NumPy; give a checkpoint of PyTorch",
    rb"\x1f\x8b|7z\xbc\xaf|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd": "a compressed file; unpack it first",
    rb"\x08[\x01-\x20][\x12\x3a]": "an ONNX model; give the checkpoint that it was exported from",
}
_BEFORE_ARCHIVES: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of PyTorch up to 1.5
_PICKLE: Final = rb"\x80[\x02-\x05]"
# In the archive of TorchScript, or of torch.export.
_PROGRAM: Final = r"(^|/)(code/|constants\.pkl$|archive_format$|serialized_exported_program)"


class UnfitError(Exception):
    """A file is not what it is taken for; the text follows its name."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their whole names: keys of dicts around them are part of these.

    Parameters
    ----------
    path : a safetensors file or a torch file, whatever its suffix

    Raises
    ------
    UnfitError
        There is none, it cannot be read, or it is something else.
    """
    try:
        if not path.exists():
            where = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise UnfitError(f"there is no such file of weights{where}; give weights= where it is")
        if not path.is_file():
            raise UnfitError(
                "this is no file; give a file, such as the model.safetensors in a folder"
            )
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise UnfitError(f"the file cannot be read ({error.strerror or error})") from error
    if not head:
        raise UnfitError("the file is empty; download or copy it again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return _read_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        _check_archive(path)
        return _read_torch(path)
    for beginning, what in _OTHERS.items():
        if re.match(beginning, head):
            raise UnfitError(f"this is {what}")
    if head.startswith(_BEFORE_ARCHIVES):
        return _read_torch(path)
    if re.match(_PICKLE, head):
        raise _python_objects("a pickle")
    raise UnfitError(
        "this is neither a safetensors file nor a torch file; download or copy it again"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        end = 8 + int.from_bytes(file.read(8), "little")
        encoded = file.read(end - 8)
        found = file.seek(0, os.SEEK_END)
    try:
        table = json.loads(encoded)
        metadata = table.pop("__metadata__", {})
        is_model = "npad" in metadata
        size = end + max((entry["data_offsets"][1] for entry in table.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UnfitError(_damaged(end, found)) from error
    if is_model:
        raise UnfitError(
            "this is a model of npad, for NPad.load and `npad predict`; "
            "give the file of the backbone's weights that it was fitted on"
        )
    if size > found:
        raise UnfitError(_damaged(size, found))
    try:
        return load_file(path)
    except Exception as error:  # a dtype that it does not know, gaps between the tensors
        raise UnfitError(f"the safetensors file cannot be read ({first_line(error)})") from error


def _damaged(size: int, found: int) -> str:
    reason = f"cut short, {found} of {size} bytes" if size > found else "damaged"
    return f"the safetensors file is {reason}; download or copy it again"


def _check_archive(path: Path) -> None:
    """Look into a zip: a torch file is one, and so is much else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UnfitError("the torch file is cut short; download or copy it again") from error
    if any(re.search(_PROGRAM, name) for name in names):
        raise UnfitError(
            "this is a program (TorchScript or torch.export), not its weights; "
            "save the state dict alone: torch.save(module.state_dict(), path)"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise UnfitError("this is a zip archive but no torch file; unpack it first")


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        # A file, since of a path torch heeds the suffix; the warning is of what the next line refuses.
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Without PyTorch's own words, which advise to run the code of a file that nobody has seen.
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise _python_objects(name[1] if name else "or is damaged") from None
    except Exception as error:  # on damaged bytes, torch's reader raises anything
        raise UnfitError(
            f"the torch file is damaged or cut short ({first_line(error)}); download or copy it again"
        ) from error
    return dict(_tensors(content, ""))


def _python_objects(what: str) -> UnfitError:
    return UnfitError(
        f"it holds Python objects ({what}), which are not read, since they can run any code; if the "
        "file is trusted, save its state dict alone, in the program that made it: "
        "torch.save(model.state_dict(), path), or as safetensors"
    )


def _tensors(content: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{prefix}{key}.")
    elif isinstance(content, Tensor) and prefix:
        yield prefix[:-1], content


def first_line(error: Exception) -> str:
    """First line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
