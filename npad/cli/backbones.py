"""What `npad backbones` shows and `npad fetch` writes."""

from __future__ import annotations

import csv
import hashlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save

from npad.atomic_file import replacing
from npad.features import catalog, offline, timm_models
from npad.features.backbone import Backbone, BackboneError
from npad.settings import Settings

__all__ = ["available", "print_backbones", "write_weights"]

DOWNLOAD: Final = "download"
RUNS: Final = 10  # of which the median is told

Row = dict[str, Any]


def available(measure: bool = False) -> Iterator[Row]:
    """What can be used here now, then npad's default if that would be a download.

    Parameters
    ----------
    measure : time one image on the CPU, for those that need no download

    Yields
    ------
    row : dict with the keys name, weights, channels, image_size, grid and, with `measure`, milliseconds
    """
    here = {"filterbank": "none needed", offline.NETWORK: _of_the_package()}
    here |= dict.fromkeys(timm_models.cached(), "local cache")
    for name, weights in {**here, str(Settings().backbone): DOWNLOAD, **here}.items():
        try:
            sketch = catalog.sketch(name)
        except BackboneError:
            continue  # in the cache, but of no use: it has no inner features
        row: Row = {"name": name, "weights": weights, "channels": sketch.channels}
        row |= {"image_size": sketch.image_size, "grid": sketch.grid}
        if measure:
            ready = sketch.grid is not None and not weights.startswith(DOWNLOAD)
            row["milliseconds"] = _milliseconds(name) if ready else None
        yield row


def _of_the_package() -> str:
    version = offline.version()
    return f"{offline.PACKAGE} {version}" if version else f"{DOWNLOAD}, or npad[offline]"


def _milliseconds(name: str) -> float:
    """Median time from one image to its embeddings, on the threads that are set."""
    network = Backbone(name)
    image = torch.rand(1, 3, *network.default_size)
    times = []
    for _ in range(RUNS + 2):  # the first two find their memory
        start = time.perf_counter()
        network(image)
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[2:]), 1)


def print_backbones(rows: Sequence[Row]) -> None:
    """Print a table on a terminal, else tab-separated columns under the names used in the JSON."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    if not sys.stdout.isatty():
        csv.writer(sys.stdout, delimiter="\t", lineterminator="\n").writerows(cells)
        return
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(f"{cell:{n}}" for cell, n in zip(line, widths, strict=True)).rstrip())
    print(f"any other model of timm: {DOWNLOAD}")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value[0]} x {value[1]}" if isinstance(value, tuple) else str(value)


def write_weights(name: str, path: Path) -> str:
    """Write the pre-trained weights of a network as one safetensors file, for ``weights=``.

    Its metadata say which network they are for, where they come from, and their licence.

    Returns
    -------
    SHA-256 in hex of the file

    Raises
    ------
    BackboneError
        An unknown name, or no download.
    """
    weights, about = catalog.fetch(name)
    content = save({key: value.contiguous() for key, value in weights.items()}, about)
    with replacing(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()
