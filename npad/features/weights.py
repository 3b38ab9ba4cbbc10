"""Weights of a backbone: found in a checkpoint, loaded strictly, hashed. Knows nothing of timm."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from npad.features.checkpoints import UnfitError, read_tensors
from npad.features.offline import timm_names

__all__ = ["BackboneError", "load_weights", "places", "weights_hash"]


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
    path : a safetensors file, or a torch file that is read with ``weights_only=True``; the tensors
        may lie in dicts, and their names may have a prefix.
    whole_model : gives the weight names of the whole model, asked for only if there is more than
        `net` needs: those names may be there, others may not.

    Raises
    ------
    BackboneError
        The file cannot be read, or names, shapes or values do not fit.
    """
    try:
        given = timm_names(read_tensors(path))
        wanted = _Wanted(name, net.state_dict(), whole_model)
        net.load_state_dict(wanted.found_in(given), strict=False)
    except UnfitError as unfit:
        raise BackboneError(f"{path}: {unfit}") from unfit.__cause__


def places(weights: str | None, model: Path) -> list[str | None]:
    """Where the weights that a model file names may lie, the likeliest first.

    Another folder may be the current one by now, or both files may have been copied to a machine
    without the old folders.
    """
    if weights is None:
        return [None]
    name = re.split(r"[/\\]", weights)[-1]
    beside = [model.parent / weights, model.parent / name]
    return list(dict.fromkeys([weights, *(str(path) for path in beside if path.is_file())]))


@dataclass(frozen=True, eq=False)
class _Wanted:
    """The weights that a network needs.

    They are looked for under every prefix that the names of a file have: a wrapper such as
    "module.", the model that it was a part of, a dict of the checkpoint. One prefix must have all.
    """

    model: str
    state: dict[str, Tensor]
    whole_model: Callable[[], Iterable[str]]

    def found_in(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the network, from those of a file."""
        if not given:
            raise UnfitError("it holds no state dict (a dict of tensors)")
        keys = {_plain(key): key for key in self.state if not _is_counter(key)}
        under = _by_prefix(given, keys.keys())
        whole = {prefix: names for prefix, names in under.items() if len(names) == len(keys)}
        if not whole:
            raise self._missing(given, keys, under)
        fitting: dict[str, dict[str, Tensor]] = {}
        problems = []
        for prefix in sorted(whole, key=len):
            names = whole[prefix]
            found = {key: given[names[plain]] for plain, key in keys.items()}
            deeper = tuple(p for p in whole if p != prefix and p.startswith(prefix))
            own = [
                k for k in given if k.startswith(prefix) and not (deeper and k.startswith(deeper))
            ]
            problem = self._misfit(found) or self._excess(
                [key.removeprefix(prefix) for key in own], names.keys()
            )
            if problem:
                problems.append(problem)
            elif not any(_equal(found, other) for other in fitting.values()):
                fitting[prefix] = found
        if not fitting:
            raise UnfitError(problems[0])
        if len(fitting) > 1:
            raise UnfitError(
                f"it holds {self.model!r} more than once, with other values, under "
                f"{_some([*map(repr, fitting)])}; save the one that is meant alone"
            )
        (found,) = fitting.values()
        return found

    def _missing(
        self,
        given: Iterable[str],
        keys: Mapping[str, str],
        under: Mapping[str, Mapping[str, str]],
    ) -> UnfitError:
        found = max(under.values(), key=len, default={})
        missing = [key for plain, key in keys.items() if plain not in found]
        used = set(found.values())
        rest = [key for key in given if key not in used and not _is_counter(key)]
        return UnfitError(
            f"{len(missing)} of {len(keys)} weights of {self.model!r} are missing ({_some(missing)}); "
            f"the file holds {_some(rest or [*given])}; is it a checkpoint of another model, or of "
            "fewer layers?"
        )

    def _misfit(self, found: Mapping[str, Tensor]) -> str | None:
        """Shapes and values that are not the network's."""
        shapes = [
            f"{key} is {tuple(x.shape)}, not {tuple(self.state[key].shape)}"
            for key, x in found.items()
            if x.shape != self.state[key].shape
        ]
        if shapes:
            return (
                f"{len(shapes)} weights do not have the shape that {self.model!r} needs "
                f"({_some(shapes)}); is it a checkpoint of another variant?"
            )
        kinds = [
            f"{key} is {x.dtype}"
            for key, x in found.items()
            if x.is_floating_point() != self.state[key].is_floating_point()
        ]
        if kinds:
            return f"{len(kinds)} weights are no floating point ({_some(kinds)}): is it quantised?"
        broken = [key for key, x in found.items() if not bool(x.float().isfinite().all())]
        if broken:
            return (
                f"{len(broken)} weights hold NaN or infinite values ({_some(broken)}); "
                "download or train them again"
            )
        return None

    def _excess(self, given: Iterable[str], wanted: Collection[str]) -> str | None:
        """Names, without their prefix, that have no place in the model.

        A part of it that is not in use may be another, as the classifier of a model that was trained
        further.
        """
        rest = [key for key in given if _plain(key) not in wanted and not _is_counter(key)]
        if not rest:
            return None
        whole = list(self.whole_model())
        known = {_plain(key) for key in whole}
        unused = {
            part
            for part in map(_part, whole)
            if not any(plain.startswith(part) for plain in wanted)
        }
        unknown = [key for key in rest if _plain(key) not in known and _part(key) not in unused]
        if not unknown:
            return None
        return (
            f"{len(unknown)} weights have no place in {self.model!r} ({_some(sorted(unknown))}); "
            "is it a checkpoint of another model?"
        )


def _by_prefix(given: Iterable[str], wanted: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each prefix under which wanted names were found, their names in the file."""
    names = set(wanted)
    under: dict[str, dict[str, str]] = {}
    for key in given:
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
            plain = key[start:].replace(".", "_")
            if plain in names:
                under.setdefault(key[:start], {})[plain] = key
    return under


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(x.dtype == other[key].dtype and torch.equal(x, other[key]) for key, x in one.items())


def _plain(key: str) -> str:
    """Without what timm's wrapper for features does to a name: `stages.0` to `stages_0`, `model.`."""
    return key.removeprefix("model.").replace(".", "_")


def _part(key: str) -> str:
    """The part of a model that a weight belongs to, as its plain name begins."""
    return key.removeprefix("model.").split(".")[0] + "_"


def _is_counter(key: str) -> bool:
    """Batches seen in training: no part of the function, and absent from older files."""
    return key.endswith("num_batches_tracked")


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex over name, dtype, shape and bytes of all weights, counters left out."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        if not _is_counter(key):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
