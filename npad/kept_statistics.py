"""The statistics that a model keeps of its images, for more images and for other models to be added."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from npad.fitting import Fit
from npad.learned import Expected
from npad.member_fit import under
from npad.model_file import ModelFileError
from npad.nominal_scores import NominalScores

__all__ = [
    "expected_in_file",
    "in_file",
    "of_file",
    "of_model_file",
    "other_backbones",
    "required",
    "tell_of_calibrations",
    "tell_of_repeats",
    "to_merge",
]

_NAME: Final = "statistics"  # of the entry in the header, and before the names of tensors


def in_file(fit: Fit) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the header and the tensors of a model file have more for them."""
    values, tensors = fit.state()
    return {_NAME: values}, {f"{_NAME}.{name}": tensor for name, tensor in tensors.items()}


def expected_in_file(header: Mapping[str, Any]) -> Expected:
    """Dtype and shape of the tensors that a file with this header has more; none without statistics.

    Raises
    ------
    KeyError
        The header is not that of statistics.
    TypeError
        As KeyError.
    ValueError
        As KeyError.
    """
    if _NAME not in header:
        return {}
    return {f"{_NAME}.{name}": what for name, what in Fit.expected(header[_NAME]).items()}


def of_file(header: Mapping[str, Any], tensors: Mapping[str, Tensor], **changed: Any) -> Fit:
    """What `in_file` was given.

    Parameters
    ----------
    tensors : those of the file, which `expected_in_file` has found right
    changed : as for `Fit.from_state`

    Raises
    ------
    KeyError
        As for `expected_in_file`.
    TypeError
        As KeyError.
    ValueError
        As KeyError.
    """
    return Fit.from_state(header[_NAME], under(_NAME, tensors), **changed)


def of_model_file(
    path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], **changed: Any
) -> Fit | None:
    """As `of_file`; None where the model file holds no statistics.

    Raises
    ------
    ModelFileError
        They are damaged.
    """
    if _NAME not in header:
        return None
    try:
        fit = of_file(header, tensors, **changed)
        if fit.n_images != header["n_images"]:
            raise ValueError(f"they are of {fit.n_images} images, it of {header['n_images']}")
        if header[_NAME]["fill"] != header.get("roi_color"):
            raise ValueError("they fill what is outside of a region in another colour")
    except (KeyError, TypeError, ValueError) as error:
        problem = (
            f"has statistics that this npad cannot use ({error!r}); fit and save the model again"
        )
        raise ModelFileError(path, problem) from error
    return fit


def required(statistics: Fit | None, call: str) -> Fit:
    """Statistics that must be there.

    Raises
    ------
    ValueError
        They are not; how to have them.
    """
    if statistics is None:
        raise ValueError(
            f"{call}: this needs the statistics of the images, which the model has not kept; give "
            "statistics=True when it is fitted and when it is saved"
        )
    return statistics


def other_backbones(
    own: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> str | None:
    """In what the backbones of two fits differ, in words; None where they are the same."""
    names = [
        ", ".join(f"{one['name']} with weights {one['weights_hash'][:12]}" for one in backbones)
        for backbones in (own, others)
    ]
    keys = [
        [(one["name"], one["weights_hash"]) for one in backbones] for backbones in (own, others)
    ]
    return None if keys[0] == keys[1] else f"{names[0]} in one and {names[1]} in the other"


def to_merge(
    own: Fit,
    own_backbones: Sequence[Mapping[str, Any]],
    others: Fit | None,
    others_backbones: Sequence[Mapping[str, Any]],
) -> Fit:
    """The statistics of another model, if those of one can take them in; `Fit.merge` compares the rest.

    Raises
    ------
    ValueError
        They cannot, and why.
    """
    theirs = required(others, "NPad.merge")
    if theirs is own:
        raise ValueError(
            "NPad.merge: a model cannot be merged with itself: its images would count twice"
        )
    difference = other_backbones(own_backbones, others_backbones)
    if difference:
        raise ValueError(
            f"NPad.merge: the models were fitted on different backbones: {difference}; merge models of "
            "the same"
        )
    return theirs


def tell_of_calibrations(call: str, calibrations: Iterable[NominalScores | None]) -> None:
    """Warn that what models were calibrated with holds no longer."""
    sizes = [str(len(one.scores)) for one in calibrations if one is not None]
    if sizes:
        warnings.warn(
            f"{call}: the scores of the model are other ones now, and its calibration is dropped: call "
            f"calibrate again with the nominal images of before ({' and '.join(sizes)}), none of which "
            "may have been fitted",
            stacklevel=3,
        )


def tell_of_repeats(fit: Fit, n_before: int, call: str) -> None:
    """Warn where images had been fitted before these, of which each counts twice now."""
    before = set(fit.fingerprints[:n_before])
    n = sum(one in before for one in fit.fingerprints[n_before:])
    if n:
        warnings.warn(
            f"{call}: {n} of {len(fit.fingerprints) - n_before} images had been fitted before, and "
            "count twice now",
            stacklevel=3,
        )
