"""What npad runs on: versions, kernels, devices."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch

from npad._version import __version__
from npad.ops import _extension

PACKAGES = (
    "timm",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
    "opencv-python-headless",
)


def info() -> dict[str, Any]:
    """Versions, kernels and devices in use, as JSON types.

    Returns
    -------
    dict with the keys npad, kernels, threads, python, platform, cores, torch, cuda, gpus, packages
    """
    installed = versions(*PACKAGES)
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "npad": __version__,
        "kernels": _extension.info(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "packages": {name: installed.get(name) for name in PACKAGES},
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
