"""Verdicts on kernels in the user's cache folder, by build, GPU and driver."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from npad.atomic_file import replacing

__all__ = ["Faults", "Key", "cache_folder", "keep", "kept"]

Faults = dict[str, str]  # of the ops whose kernels are wrong
Key = Mapping[str, str]


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/npad``, else ``~/.cache/npad``.

    Raises
    ------
    RuntimeError
        The user has no home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "npad"


def kept(key: Key) -> Faults | None:
    """The verdict that was kept under a key, if there is one that can be read."""
    with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        found = json.loads(_file(key).read_text(encoding="utf-8"))
        if found["key"] == dict(key):
            return {str(op): str(fault) for op, fault in found["faults"].items()}
    return None


def keep(key: Key, faults: Faults) -> None:
    """Keep a verdict, if there is a folder that can be written; else the check runs again."""
    with suppress(OSError, RuntimeError):
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as target:
            target.write(json.dumps({"key": dict(key), "faults": faults}, indent=1).encode())


def _file(key: Key) -> Path:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"check-{digest[:16]}.json"
