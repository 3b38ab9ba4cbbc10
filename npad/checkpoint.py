"""A fit that is written down on its way, so that one that was killed goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npad._version import __version__
from npad.file_names import shown
from npad.fitting import Fit
from npad.images.source import ImageSource
from npad.kept_statistics import expected_in_file, in_file, of_file, other_backbones
from npad.model_file import (
    STATISTICS_VERSION,
    ModelFileError,
    check_tensors,
    read_model,
    write_model,
)
from npad.settings import OF_A_FIT, Settings

__all__ = ["Checkpoint"]

# What must be the same for the result to be the same, bit for bit; weights are known by their hash.
_COMPARED = [*OF_A_FIT, "rois", "score_window", "backbone_dtype", "compile", "batch_size"]
_REMEDY = "give what it was begun with, or remove this file, and the fit begins anew"


class Checkpoint:
    """Where a fit is written down.

    Parameters
    ----------
    path : of the file: a model file's format, with statistics and no model
    every : images from one time to the next

    Raises
    ------
    ValueError
        What is no path, or no number of at least 1.
    """

    _images: ImageSource
    _files: list[tuple[str, int]]
    _backbones: list[dict[str, Any]]

    def __init__(self, path: str | os.PathLike[str], every: int) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"NPad.fit: checkpoint must be the path of a file, got {path!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"NPad.fit: every must be an int of at least 1, got {every!r}")
        self._path = Path(path)
        self._every = every
        self._written: int | None = None  # images of the fit that the file holds

    def begin(
        self, fit: Fit, images: ImageSource, backbones: Sequence[Mapping[str, Any]]
    ) -> tuple[Fit, int]:
        """Take up the fit that the file holds, or begin.

        Parameters
        ----------
        fit : one that has seen nothing
        images : which it gets
        backbones : name and weights_hash of each

        Returns
        -------
        fit : that one, or what the file holds of another such
        start : the position of the next image

        Raises
        ------
        ModelFileError
            The file is damaged, is no checkpoint, or is that of another fit, whose difference is named.
        ValueError
            Images that are no files, or whose regions of interest are not beside them.
        """
        if images.paths is None:
            raise ValueError(
                "NPad.fit: checkpoint needs images in files, a folder or a list of paths: those in "
                "memory and those of a stream are gone when the program is"
            )
        if images.regions is not None and images.regions.own is not None:
            raise ValueError(
                "NPad.fit: checkpoint needs the regions of images as masks beside them, as with "
                "NPad(rois='{}_roi.png'): a list of them is gone when the program is"
            )
        self._images, self._files = images, _listed(images.paths)
        self._backbones = [dict(backbone) for backbone in backbones]
        if not self._path.exists():
            return fit, 0
        try:
            header, tensors = read_model(self._path)
        except ModelFileError as error:
            problem = f"{error.args[1]}; give another checkpoint, or remove this one to begin anew"
            raise ModelFileError(self._path, problem) from error
        if "checkpoint" not in header:
            raise ModelFileError(self._path, "is no checkpoint, but a model; give another file")
        try:
            self._check_same(fit, header)
            check_tensors(self._path, tensors, expected_in_file(header))
            found = of_file(header, tensors, **vars(fit.settings))
            if not found.looks_where(fit):
                raise self._other("is of a fit with another roi")
            self._restore(header["checkpoint"])
            start = int(header["checkpoint"]["next"])
            if not found.n_images <= start <= len(self._files):
                raise ValueError(
                    f"{found.n_images} images come before {start} of {len(self._files)}"
                )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ModelFileError):
                raise
            problem = (
                f"cannot be used as a checkpoint ({error!r}); remove it, and the fit begins anew"
            )
            raise ModelFileError(self._path, problem) from error
        self._written = found.n_images
        return found, start

    def write(self, fit: Fit, position: int) -> None:
        """Write the fit down, if it has begun or if it is time to.

        Parameters
        ----------
        position : of the next image

        Raises
        ------
        ModelFileError
            The file cannot be written; what was there before is whole.
        """
        if self._written is not None and fit.n_images - self._written < self._every:
            return
        values, tensors = in_file(fit)
        progress = {
            "files": self._files,
            "next": position,
            "skipped": self._images.skipped,
            "unaligned": self._images.unaligned,
            "undeclared": [*self._images.undeclared.items()],
            "other_sizes": [(i, *one) for i, one in self._images.other_sizes.items()],
        }
        header = {
            "npad_version": __version__,
            "checkpoint": progress,
            "backbones": self._backbones,
            **values,
        }
        write_model(self._path, header, tensors, version=STATISTICS_VERSION, progress=False)
        self._written = fit.n_images

    def _restore(self, values: Mapping[str, Any]) -> None:
        """What the source has met so far."""
        self._images.skipped[:] = [(str(name), str(reason)) for name, reason in values["skipped"]]
        self._images.unaligned[:] = [(str(name), str(why)) for name, why in values["unaligned"]]
        self._images.undeclared.update((int(i), int(x)) for i, x in values["undeclared"])
        self._images.other_sizes.update(
            (int(i), (str(name), (int(height), int(width))))
            for i, name, (height, width) in values["other_sizes"]
        )

    def _check_same(self, fit: Fit, header: Mapping[str, Any]) -> None:
        """Raise what a file of another fit differs in."""
        if header["npad_version"] != __version__:
            raise self._other(
                f"was written by npad {header['npad_version']}, this is {__version__}"
            )
        settings = Settings(**header["statistics"]["settings"])
        differences = fit.settings.differences(settings, _COMPARED)
        if differences:
            raise self._other(f"is of a fit with other settings: {'; '.join(differences)}")
        other = other_backbones(self._backbones, header["backbones"])
        if other:
            raise self._other(f"is of a fit on another backbone: {other}")
        files = [(str(name), int(size)) for name, size in header["checkpoint"]["files"]]
        if files != self._files:
            raise self._other(f"is of a fit of other images: {_difference(files, self._files)}")

    def _other(self, problem: str) -> ModelFileError:
        return ModelFileError(self._path, f"{problem}; {_REMEDY}")


def _listed(paths: Sequence[str]) -> list[tuple[str, int]]:
    """Name, below the folder that holds all, and size of each file; the folder may have moved."""
    full = [Path(path).absolute() for path in paths]
    root = os.path.commonpath([path.parent for path in full])
    return [(os.path.relpath(path, root), _size(path)) for path in full]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1  # the fit will say what is wrong with it


def _difference(before: Sequence[tuple[str, int]], now: Sequence[tuple[str, int]]) -> str:
    """Between two lists of files, in words."""
    sizes, new = dict(before), dict(now)
    found = {
        "gone": [name for name in sizes if name not in new],
        "new": [name for name in new if name not in sizes],
        "changed": [name for name in new if sizes.get(name, new[name]) != new[name]],
    }
    said = [
        f"{len(names)} {what}, such as {shown(names[0])}" for what, names in found.items() if names
    ]
    return "; ".join(said) or "their order"
