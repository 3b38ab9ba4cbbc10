"""Weights of a backbone: read from a file, loaded strictly, hashed. Knows nothing of timm."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class BackboneError(RuntimeError):
    """The backbone cannot be built, or its weights cannot be had; the message says what to do."""


def load_weights(
    net: nn.Module, name: str, path: Path, whole_model: Callable[[], Iterable[str]]
) -> None:
    """Load a file strictly into the part of a model that is in use.

    Parameters
    ----------
    net : features of the model up to the deepest chosen layer; changed in place.
    name : of the model, for messages.
    path : a safetensors file, or a torch file that is read with ``weights_only=True``.
    whole_model : gives the weight names of the whole model, asked for only if the file holds more
        than `net` needs: those names may be there, others may not.

    Raises
    ------
    BackboneError
        The file cannot be read, or names or shapes do not fit.
    """
    # timm's wrapper for features renames `stages.0` to `stages_0` and may add `model.`
    given = {_plain(key): value for key, value in _read_state(path).items()}
    wanted = {key: value for key, value in net.state_dict().items() if not _is_counter(key)}
    missing = [key for key in wanted if _plain(key) not in given]
    if missing:
        raise BackboneError(
            f"{path}: {len(missing)} of {len(wanted)} weights of {name!r} are missing "
            f"({_some(missing)}); is it a checkpoint of another model, or of fewer layers?"
        )
    shapes = [
        f"{key} is {tuple(given[_plain(key)].shape)}, not {tuple(value.shape)}"
        for key, value in wanted.items()
        if given[_plain(key)].shape != value.shape
    ]
    if shapes:
        raise BackboneError(
            f"{path}: {len(shapes)} weights do not have the shape that {name!r} needs "
            f"({_some(shapes)}); is it a checkpoint of another variant?"
        )
    extra = given.keys() - {_plain(key) for key in wanted}
    if extra:
        unknown = sorted(
            key for key in extra - {_plain(key) for key in whole_model()} if not _is_counter(key)
        )
        if unknown:
            raise BackboneError(
                f"{path}: {len(unknown)} weights have no place in {name!r} ({_some(unknown)}); "
                "is it a checkpoint of another model?"
            )
    net.load_state_dict({key: given[_plain(key)] for key in wanted}, strict=False)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise BackboneError(f"{path}: weights: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that are no pickle, torch's reader raises anything
        raise BackboneError(
            f"{path}: weights: neither a whole safetensors file (*.safetensors) nor a torch file "
            f"of tensors alone ({first_line(error)})"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BackboneError(f"{path}: weights: it holds no state dict (a dict of tensors)")
    return dict(state)


def _plain(key: str) -> str:
    for prefix in ("module.", "model."):
        key = key.removeprefix(prefix)
    return key.replace(".", "_")


def _is_counter(key: str) -> bool:
    """Batches seen in training: no part of the function, and absent from older files."""
    return key.endswith("num_batches_tracked")


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def first_line(error: Exception) -> str:
    """First line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex over name, dtype, shape and bytes of all weights, counters left out."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        if not _is_counter(key):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
