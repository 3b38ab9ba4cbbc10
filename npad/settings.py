"""Every argument of NPad, once: its default, its check, its help. Imports no library.

``NPad.__init__`` stores what it is given; a `Settings` is made, and with it every check, when the
arguments are used. The options of the command line, the JSON of a model file and the table in the docs
are read from the fields of `Settings`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Final

from npad.file_names import shown
from npad.nominal_methods import METHODS

__all__ = [
    "ARGUMENTS",
    "CHECKPOINT_EVERY",
    "FUSIONS",
    "LEAST_RATE",
    "MAX_PIXELS",
    "MOST_SIGMA",
    "NATIVE",
    "OF_A_FIT",
    "Argument",
    "Drawn",
    "Settings",
    "sigma_by_size",
    "uses_gaussians",
    "uses_nominal_set",
]

FUSIONS: Final = ("product", "sum", "mahalanobis", "euclidean")
GAUSSIANS: Final = ("per_layer", "joint")
DTYPES: Final = ("float32", "float16", "bfloat16")  # of a backbone
FACTOR_DTYPES: Final = (*DTYPES, "int8")
ALIGNMENTS: Final = ("translation", "euclidean")
REDUCTIONS: Final = ("pca", "random")
WINDOWS: Final = (1, 3, 5)
NATIVE: Final = "native"
MAX_PIXELS: Final = 178_956_970  # Pillow's own limit
CHECKPOINT_EVERY: Final = 200  # images of a fit from one time that it is written to the next
MOST_SIGMA: Final = 16.0  # pixels of smoothing, unless more are asked for
LEAST_RATE: Final = 1e-9  # of false alarms: one that would need a billion images

# Of n_features="auto".
KEPT_VARIANCE: Final = 0.999  # see bench/study_features.py
MOST_FEATURES: Final = 192


def sigma_by_size(image_size: tuple[int, int]) -> float:
    """Standard deviation of the smoothing, in pixels: 4 where the shorter side is 256."""
    return 4.0 * min(image_size) / 256


def uses_gaussians(fusion: str) -> bool:
    """Whether the Mahalanobis map is part of a fusion."""
    return fusion != "euclidean"


def uses_nominal_set(fusion: str) -> bool:
    """Whether the Euclidean map is part of a fusion."""
    return fusion != "mahalanobis"


# --------------------------------------------------------------------------------------------------
# Checks. A check turns a value into the one to use, or raises what the message "must be ..." says.


class _UnfitError(Exception):
    """A value is not what its argument may be; the text follows "must be"."""


Check = Callable[[Any], Any]


def _int(what: str, allowed: Callable[[int], bool]) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, Integral) and not isinstance(value, bool) and allowed(int(value)):
            return int(value)
        raise _UnfitError(what)

    return check


def _number(what: str, allowed: Callable[[float], bool]) -> Check:
    def check(value: Any) -> float:
        with suppress(OverflowError):  # of an int that no float holds
            if isinstance(value, Real) and not isinstance(value, bool) and allowed(float(value)):
                return int(value) if isinstance(value, Integral) else float(value)
        raise _UnfitError(what)

    return check


def _one_of(*choices: Any) -> Check:
    def check(value: Any) -> Any:
        for choice in choices:  # a text may be NumPy's; 1 is not True
            if isinstance(value, type(choice)) and value == choice:
                return choice
        raise _UnfitError(f"one of {', '.join(map(repr, choices))}")

    return check


def _or_none(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _text(what: str) -> Check:
    def check(value: Any) -> str:
        if isinstance(value, str) and value:
            return value
        raise _UnfitError(what)

    return check


def _one_or_more(check: Check, what: str) -> Check:
    """Of one value, or of a list of them, which becomes a tuple; a list of one is that one."""

    def check_all(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return check(value)
        if not value:
            raise _UnfitError(what)
        values = tuple(map(check, value))
        return values if len(values) > 1 else values[0]

    return check_all


_BACKBONE: Final = "the name of a timm model or 'filterbank', or a list of such names"
_PATH: Final = "the path of a file, or a list of one for each backbone"


def _backbone(value: Any) -> str:
    """As timm names it, whose models stand on the Hugging Face hub under timm/."""
    name: str = _text(_BACKBONE)(value)
    return re.sub(r"^(hf[-_]hub:)?timm/(?=.)", "", name)


def _path(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return str(os.fspath(value))
    raise _UnfitError(_PATH)


def _height_width(value: Any) -> tuple[int, int]:
    side = _int("", lambda n: n >= 1)
    sides = (
        list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 2
    )
    try:
        height, width = map(side, sides)
    except (_UnfitError, ValueError):
        raise _UnfitError("a positive int or (height, width)") from None
    return height, width


def _image_size(value: Any) -> tuple[int, int] | str:
    if isinstance(value, str) and value == NATIVE:
        return NATIVE
    try:
        return _height_width(value)
    except _UnfitError as unfit:
        raise _UnfitError(f"{unfit}, or {NATIVE!r}") from None


@dataclass(frozen=True, eq=False)
class Drawn:
    """A mask in memory, (H, W) of bool or uint8; equal to itself alone, as settings are compared."""

    array: Any

    def __repr__(self) -> str:
        return f"an array of shape {tuple(self.array.shape)}"


_ROI: Final = (
    "the path of a mask, an (H, W) array of bool or uint8, or a rectangle (top, left, height, width) "
    "in fractions of the image, from 0 to 1"
)


def _region(value: Any) -> Any:
    if isinstance(value, Drawn):
        return value
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return str(os.fspath(value))
    shape, dtype = getattr(value, "shape", ()), str(getattr(value, "dtype", ""))
    if len(shape) == 2 and 0 not in shape and re.fullmatch(r"(torch\.)?(bool|uint8)", dtype):
        return Drawn(value)
    number = _number(_ROI, lambda n: 0 <= n <= 1)
    if isinstance(value, (list, tuple)) and len(value) == 4:
        top, left, height, width = (float(number(x)) for x in value)
        if height > 0 and width > 0 and max(top + height, left + width) <= 1 + 1e-9:
            return top, left, height, width
    raise _UnfitError(_ROI)


def _pattern(value: Any) -> str:
    if isinstance(value, str) and value.count("{}") == 1:
        return value
    raise _UnfitError(
        "a pattern such as '{}_roi.png', in which {} is the name of an image without its suffix"
    )


def _map_levels(value: Any) -> tuple[int, ...]:
    return () if isinstance(value, (list, tuple)) and not value else _levels(value)


def _levels(value: Any) -> tuple[int, ...]:
    level = _int("", lambda n: n >= 0)
    try:
        given = (value,) if isinstance(value, Integral) else value
        levels = () if isinstance(given, Iterator) else tuple(map(level, given))  # read again later
    except (_UnfitError, TypeError):
        levels = ()
    if not levels:
        numbers = _numbers_of(value)
        which = f"by their numbers, here {numbers}" if numbers else "such as (2, 3)"
        raise _UnfitError(f"a sequence of levels {which}")
    return levels


def _numbers_of(names: Any) -> tuple[int, ...]:
    """The levels that layers of a ResNet are, from their names; none where a name is another."""
    names = names.split(",") if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)):
        return ()
    found = [re.fullmatch(r"(?:layer)?(\d+)", str(name).strip()) for name in names]
    return tuple(int(match[1]) for match in found if match) if all(found) else ()


def _n_centroids(value: Any) -> float:
    number: float = _number("a whole number of at least 1 or a fraction below 1", lambda n: n > 0)(
        value
    )
    if 0 < number < 1:
        return number
    if math.isfinite(number) and number == int(number):
        return int(number)
    raise _UnfitError("a whole number of at least 1 or a fraction below 1")


def _auto_or(check: Check) -> Check:
    return lambda value: "auto" if isinstance(value, str) and value == "auto" else check(value)


def _is_odd(n: int) -> bool:
    return n >= 1 and n % 2 == 1


def _device(value: Any) -> Any:
    """Whether it is there, only PyTorch can say: see `npad.devices.resolve`."""
    return value


_odd = _int("an odd int of at least 1", _is_odd)
_odd_or_auto = _auto_or(_int("'auto' or an odd int of at least 1", _is_odd))
_eps = _auto_or(_number("'auto' or a number of at least 0", lambda n: 0 <= n < math.inf))
_share = _number("a number from 0 to 1", lambda n: 0 <= n <= 1)
_count = _int("an int of at least 1", lambda n: n >= 1)
_rate = _number(f"a number from {LEAST_RATE} to below 1", lambda n: LEAST_RATE <= n < 1)


# --------------------------------------------------------------------------------------------------
# What the command line makes of a word.


def _parse_switch(text: str) -> bool:
    return {"on": True, "off": False}[text]


def _parse_levels(text: str) -> tuple[int, ...]:
    numbers = _numbers_of(text.split(","))
    if numbers and "layer" in text:
        written = ",".join(map(str, numbers))
        raise LookupError(f"{text!r} are names: levels are given by their numbers, here {written}")
    return tuple(int(part) for part in text.split(","))


def _parse_map_levels(text: str) -> tuple[int, ...]:
    return () if text == "none" else _parse_levels(text)


def _parse_names(text: str) -> str | list[str]:
    names = text.split(",")
    return names if len(names) > 1 else text


def _parse_files(text: str) -> str | list[str | None]:
    if Path(text).is_file() or "," not in text:
        return _parse_file(text)
    return [_parse_file(part) if part else None for part in text.split(",")]


def _parse_size(text: str) -> int | tuple[int, int]:
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError(text)
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _parse_image_size(text: str) -> str | int | tuple[int, int]:
    return text if text == NATIVE else _parse_size(text)


def _parse_number(text: str) -> float:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def _parse_auto_or(number: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: text if text == "auto" else number(text)


def _parse_features(text: str) -> int | str | None:
    return None if text == "all" else _parse_auto_or(int)(text)


def _parse_or_none(text: str) -> str | None:
    return None if text == "none" else text


def _parse_roi(text: str) -> str | tuple[float, ...]:
    parts = text.split(",")
    if Path(text).is_file() or len(parts) != 4:
        return _parse_file(text)
    return tuple(map(float, parts))


def _parse_file(text: str) -> str:
    if not Path(text).is_file():
        raise FileNotFoundError(f"there is no file {shown(text)}")
    return text


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    """What is known about an argument of NPad.

    Attributes
    ----------
    name, default : as in NPad's signature
    help : one or two sentences
    values : what may be given, in short; the command line shows it
    unset : what None stands for, where it is the default
    check : turns a value into the one to use, or raises `_UnfitError`
    parse : turns a word of the command line into a value; None where there is no option
    kept : whether a model file holds it; of ``roi`` it holds the mask
    live : whether a fitted model heeds a change; what others say is fixed by the fit
    """

    name: str
    default: Any
    help: str
    values: str
    unset: str | None
    check: Check
    parse: Callable[[str], Any] | None
    kept: bool
    live: bool

    @property
    def default_text(self) -> str:
        """The default as the help and the docs show it."""
        if self.unset is not None:
            return self.unset
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return str(self.default)


def _argument(
    default: Any,
    help: str,  # noqa: A002
    values: str,
    check: Check,
    parse: Callable[[str], Any] | None = str,
    *,
    unset: str | None = None,
    kept: bool = True,
    live: bool = False,
) -> Any:
    known = {"help": help, "values": values, "unset": unset, "check": check, "parse": parse}
    return field(default=default, metadata={**known, "kept": kept, "live": live})


@dataclass(frozen=True)
class Settings:
    """The arguments of a model, checked and in the form in which they are used.

    Raises
    ------
    ValueError
        A value that an argument may not have, or two that exclude each other. The message names the
        argument and what it may be.
    """

    backbone: str | tuple[str, ...] = _argument(
        "wide_resnet50_2",
        'A timm model with features_only, or "filterbank", which needs no download; or a list of '
        "them, whose distances are fused.",
        "NAME[,NAME]",
        _one_or_more(_backbone, _BACKBONE),
        _parse_names,
    )
    layers: tuple[int, ...] | None = _argument(
        None,
        "Feature levels, as timm counts them (out_indices), of each backbone.",
        "I,J",
        _or_none(_levels),
        _parse_levels,
        unset="strides 8 and 16; half and three quarters of a transformer's blocks",
    )
    map_layers: tuple[int, ...] | None = _argument(
        None,
        "Levels whose Gaussians make the map, where these are not those of the score; none: those of "
        "layers.",
        "I,J|none",
        _or_none(_map_levels),
        _parse_map_levels,
        unset="those of layers, and that of half their least stride",
    )
    gaussians: str = _argument(
        "per_layer",
        "A Gaussian at each position of each layer's own grid, or a joint one over all channels, which "
        "is several times larger.",
        "|".join(GAUSSIANS),
        _one_of(*GAUSSIANS),
    )
    image_size: tuple[int, int] | str | None = _argument(
        None,
        "Pixels to which images are resized, height x width; nothing is cropped. native: those of the "
        "first image fitted.",
        "N|HxW|native",
        _or_none(_image_size),
        _parse_image_size,
        unset="256; 224 to 512 for a transformer, by its cost",
    )
    tile: tuple[int, int] | None = _argument(
        None,
        "Pixels of a tile, height x width, that a backbone sees at once of a large image; the rest of "
        "the model is of the whole image.",
        "N|HxW",
        _or_none(_height_width),
        _parse_size,
        unset="the whole image",
    )
    overlap: int | None = _argument(
        None,
        "Pixels that neighbouring tiles share: half of them beside a tile are for its embeddings to "
        "see, and are not scored twice.",
        "N",
        _or_none(_int("an int of at least 0", lambda n: n >= 0)),
        int,
        unset="what the backbones see beside a position, so that tiles change nothing; of those that "
        "see everything a quarter of a tile",
    )
    roi: Any = _argument(
        None,
        "Region of interest of all images: a mask, bright where they are looked at, or a rectangle "
        "(top, left, height, width) in fractions of the image. Outside nothing is fitted or scored, "
        "and maps are NaN.",
        "FILE|T,L,H,W",
        _or_none(_region),
        _parse_roi,
        unset="the whole image",
        kept=False,
    )
    rois: str | None = _argument(
        None,
        "Where the region of interest of each image is, as a mask beside it: {} is the name of the "
        "image without its suffix.",
        "PATTERN",
        _or_none(_pattern),
        unset="images have none of their own",
        live=True,
    )
    align: str | None = _argument(
        None,
        "Register each image to a template of nominal ones: by a shift (translation), or by a shift "
        "and a turn (euclidean). Needs OpenCV: npad[align].",
        "|".join([*ALIGNMENTS, "none"]),
        _one_of(*ALIGNMENTS, None),
        _parse_or_none,
        unset="none",
    )
    bit_depth: int | None = _argument(
        None,
        "Bits that the camera fills of 16-bit images that do not say it themselves.",
        "N",
        _or_none(_int("an int from 1 to 16", lambda n: 1 <= n <= 16)),
        int,
        unset="16",
    )
    max_pixels: int = _argument(
        MAX_PIXELS,
        "Pixels of an image; one of more is refused, as it may be a decompression bomb.",
        "N",
        _count,
        int,
        kept=False,
        live=True,
    )
    weights: str | tuple[str | None, ...] | None = _argument(
        None,
        "The backbone's weights: a safetensors file, or a torch file, of which only tensors are read. "
        "A list of them for a list of backbones.",
        "FILE[,FILE]",
        _one_or_more(_or_none(_path), _PATH),
        _parse_files,
        unset="those of npad[offline], or timm downloads them",
        live=True,  # the file may have moved; other weights are refused by their hash
    )
    window: int | str = _argument(
        "auto",
        "Side of the training window, in positions of the grid; auto is the one of 1, 3 and 5 that "
        "makes held-out nominal embeddings most likely, and 3 where none are held out.",
        "auto|ODD",
        _odd_or_auto,
        _parse_auto_or(int),
    )
    score_window: int = _argument(
        1, "Side of the evaluation window, in positions of the grid.", "ODD", _odd, int, live=True
    )
    eps: float | str = _argument(
        "auto",
        "Added to every variance, in squared units of the features; auto makes held-out nominal "
        "embeddings most likely.",
        "auto|X",
        _eps,
        _parse_auto_or(float),
    )
    nominal_set: str | None = _argument(
        "kcenter",
        "How the centroids are chosen: "
        + "; ".join(f"{name}, {method.summary}" for name, method in METHODS.items())
        + "; none chooses none.",
        "|".join([*METHODS, "none"]),
        _one_of(*METHODS, None),
        _parse_or_none,
    )
    n_centroids: float = _argument(
        8192,
        "Number of centroids; below 1, a fraction of all nominal embeddings.",
        "N",
        _n_centroids,
        _parse_number,
    )
    fusion: str = _argument(
        None,
        "How both distances become one map: their product, the sum of both standardised on held-out "
        "nominal images, or one alone.",
        "|".join(FUSIONS),
        _or_none(_one_of(*FUSIONS)),
        unset="product; mahalanobis without centroids",
        live=True,
    )
    fusion_weight: float = _argument(
        0.4,
        "Share of the Mahalanobis distances in the score, with product and sum, 0 to 1; the Euclidean "
        "have the rest.",
        "X",
        _share,
        float,
        live=True,
    )
    map_weight: float = _argument(
        0.3,
        "The same share in the map.",
        "X",
        _share,
        float,
        live=True,
    )
    smoothing: float | None = _argument(
        None,
        "Standard deviation, in pixels of image_size, of the Gaussian that smooths maps. A smaller one "
        "shows smaller defects, and more of what is none.",
        "X",
        _or_none(_number("a number of at least 0", lambda n: 0 <= n < math.inf)),
        float,
        unset="4 where the shorter side is 256, growing with it to 16",
        live=True,
    )
    factor_dtype: str = _argument(
        "int8",
        "Storage of the Gaussians' factors; int8 has a scale for every 256 numbers.",
        "|".join(FACTOR_DTYPES),
        _one_of(*FACTOR_DTYPES),
    )
    n_features: int | str | None = _argument(
        "auto",
        "Dimensions to which embeddings are reduced. auto keeps, of each layer's Gaussians, the "
        f"principal components that hold {KEPT_VARIANCE} of the nominal variance, {MOST_FEATURES} at "
        "most, and all of the nominal set; with gaussians='joint' it keeps all.",
        "auto|N|all",
        _or_none(_auto_or(_int("'auto', None or an int of at least 1", lambda n: n >= 1))),
        _parse_features,
    )
    reduction: str = _argument(
        "pca",
        "How embeddings are reduced, with a number of n_features: by principal axes of a sample of "
        "nominal embeddings, or by random orthogonal ones.",
        "|".join(REDUCTIONS),
        _one_of(*REDUCTIONS),
    )
    holdout: float = _argument(
        0.1,
        "Fraction of the images, 64 at most, kept from the fit while eps and the standardisation are "
        "chosen, 0 to 0.5; they are fitted afterwards.",
        "X",
        _number("a number from 0 to 0.5", lambda n: 0 <= n <= 0.5),
        float,
    )
    false_alarm_rate: float = _argument(
        0.01,
        "Share of nominal images that may be alarms, and of those whose map may show any marked pixel; "
        "thresholds follow from it once the model is calibrated.",
        "X",
        _rate,
        float,
        live=True,
    )
    confidence: float | None = _argument(
        None,
        "With which probability over the images of the calibration the thresholds keep that rate.",
        "X",
        _or_none(_rate),
        float,
        unset="the rate is kept on average over calibrations",
        live=True,
    )
    calibration_folds: int | None = _argument(
        None,
        "Calibrate while fitting, with the images fitted: in so many folds, of which each is scored by "
        "a model of the others. The model is the same without.",
        "N",
        _or_none(_int("an int of at least 2", lambda n: n >= 2)),
        int,
        unset="no calibration",
        kept=False,
    )
    seed: int = _argument(
        0,
        "Seed of every random choice.",
        "N",
        _int("an int of at most 64 bits", lambda n: -(2**63) <= n < 2**63),
        int,
    )
    device: Any = _argument(
        "cpu",
        "Torch device, such as cpu or cuda:0; auto is a GPU if there is one.",
        "DEVICE",
        _device,
        kept=False,
        live=True,
    )
    backbone_dtype: str | None = _argument(
        None,
        "In which the backbone computes.",
        "|".join(DTYPES),
        _or_none(_one_of(*DTYPES)),
        unset="float32; float16 to score on a GPU",
        live=True,
    )
    compile: bool = _argument(
        False,
        "Run the backbone through torch.compile.",
        "on|off",
        _one_of(True, False),
        _parse_switch,
        live=True,
    )
    batch_size: int = _argument(
        8, "Images that go through the backbone together.", "N", _count, int, live=True
    )
    progress: bool | None = _argument(
        None,
        "Progress bars: None shows them on a terminal or in a notebook, for work of over two seconds; "
        "False never does.",
        "on|off",
        _one_of(True, False, None),
        None,
        unset="on a terminal",
        kept=False,
        live=True,
    )

    def __post_init__(self) -> None:
        for argument in ARGUMENTS:
            value = getattr(self, argument.name)
            try:
                object.__setattr__(self, argument.name, argument.check(value))
            except _UnfitError as unfit:
                raise ValueError(f"NPad: {argument.name} must be {unfit}, got {value!r}") from None
        if self.fusion is None:
            fusion = "product" if self.nominal_set else "mahalanobis"
            object.__setattr__(self, "fusion", fusion)
        if uses_nominal_set(self.fusion) and self.nominal_set is None:
            raise ValueError(
                f"NPad: fusion={self.fusion!r} needs a nominal set; "
                "give nominal_set, or fusion='mahalanobis'"
            )
        names, files = self._names, self._files
        if len(set(names)) < len(names):
            raise ValueError(f"NPad: backbone must be a list of different models, got {names}")
        if len(files) != len(names):
            given = shown(files[0]) if len(files) == 1 and files[0] else f"{len(files)} files"
            raise ValueError(
                f"NPad: weights must be one file for each of {', '.join(names)}, in this order and "
                f"None where a backbone needs none, got {given}"
            )
        self._check_tile()
        if self.gaussians == "joint" and self.fixed_features is not None and self.map_layers:
            raise ValueError(
                "NPad: n_features mixes the channels of all layers, and gaussians='joint' with "
                "map_layers needs them apart; leave out one, or use gaussians='per_layer'"
            )
        if self.align is not None and (self.roi is not None or self.rois is not None):
            raise ValueError(
                "NPad: align and a region of interest exclude each other: a region is that of an image "
                "as it comes; leave out align, or roi and rois"
            )
        if self.reduction == "random" and self.n_features == "auto":
            raise ValueError(
                "NPad: reduction='random' has no order by which n_features='auto' could choose; give "
                "a number of n_features, or use reduction='pca'"
            )
        if self.holdout == 0 and (self.chooses_eps or self.fusion == "sum"):
            raise ValueError(
                "NPad: eps='auto' and fusion='sum' need held-out images; "
                "use holdout > 0, or a number for eps and another fusion"
            )

    def _check_tile(self) -> None:
        if self.tile is None:
            if self.overlap is not None:
                raise ValueError(
                    f"NPad: overlap={self.overlap} is that of tiles; give tile, or leave it out"
                )
            return
        size = self.image_size
        if isinstance(size, tuple) and (self.tile[0] > size[0] or self.tile[1] > size[1]):
            raise ValueError(
                f"NPad: tile={self.tile} is larger than the images, of which image_size={size}; give "
                "(height, width) of at most that, or leave it out"
            )
        cut = () if not isinstance(size, tuple) else zip(self.tile, size, strict=True)
        if any((self.overlap or 0) >= tile < side for tile, side in cut):
            raise ValueError(
                f"NPad: overlap must be less than the sides of a tile, {self.tile}, got {self.overlap}"
            )

    @property
    def _names(self) -> tuple[str, ...]:
        return (self.backbone,) if isinstance(self.backbone, str) else self.backbone

    @property
    def _files(self) -> tuple[str | None, ...]:
        if isinstance(self.weights, tuple):
            return self.weights
        return (None,) * len(self._names) if self.weights is None else (self.weights,)

    @property
    def networks(self) -> tuple[tuple[str, str | None], ...]:
        """Name and weights of each backbone."""
        return tuple(zip(self._names, self._files, strict=True))

    @property
    def levels_of_maps(self) -> tuple[int, ...] | None:
        """`map_layers` as a backbone takes it: none where no Gaussian uses them."""
        joined = self.gaussians == "joint" and self.fixed_features is not None
        return () if joined or not uses_gaussians(self.fusion) else self.map_layers

    @property
    def size(self) -> tuple[int, int]:
        """`image_size` once it is known: a fit takes that of the backbone, or of the images.

        Raises
        ------
        ValueError
            It is not known.
        """
        if not isinstance(self.image_size, tuple):
            raise ValueError(f"image_size is {self.image_size}, which only a fit may be given")
        return self.image_size

    @property
    def sigma(self) -> float:
        """Standard deviation of the smoothing, in pixels.

        Where none is chosen it grows with images, as what they show of a defect does, up to that of
        1024 pixels: beyond, defects of a few positions would be lost.
        """
        if self.smoothing is not None:
            return self.smoothing
        return min(sigma_by_size(self.size), MOST_SIGMA)

    @property
    def images_at_once(self) -> int:
        """Images of a batch: those of `batch_size` tiles, where there are tiles."""
        if self.tile is None:
            return self.batch_size
        tiles = math.prod(self.size) / math.prod(self.tile)
        return max(1, int(self.batch_size / tiles))

    @property
    def scoring(self) -> dict[str, Any]:
        """What a fitted model heeds and its scores depend on, but for the precision of arithmetic."""
        names = ("score_window", "fusion", "fusion_weight", "map_weight", "smoothing")
        return {name: getattr(self, name) for name in names}

    @property
    def chooses_eps(self) -> bool:
        """Whether eps is chosen on held-out images."""
        return self.eps == "auto" and uses_gaussians(self.fusion)

    @property
    def windows(self) -> tuple[int, ...]:
        """Training windows to choose from."""
        if self.window == "auto":
            return WINDOWS if self.holdout else WINDOWS[1:2]
        return (int(self.window),)

    @property
    def chooses_axes(self) -> bool:
        """Whether axes are chosen on nominal embeddings."""
        return self.fixed_features is not None and self.reduction == "pca"

    @property
    def fixed_features(self) -> int | None:
        """To how many dimensions embeddings are reduced before anything is learned of them."""
        return self.n_features if isinstance(self.n_features, int) else None

    @property
    def may_be_in_strips(self) -> bool:
        """Whether Gaussians can be fitted a strip of the grid at a time."""
        whole = self.fusion == "sum" or self.calibration_folds or self.roi or self.rois
        return self.tile is not None and self.gaussians == "per_layer" and not whole

    @property
    def reduces_gaussians(self) -> bool:
        """Whether Gaussians are reduced once they are learned."""
        return self.n_features == "auto" and self.gaussians == "per_layer"

    def changed_by(self, given: Mapping[str, Any]) -> Settings:
        """These of a fitted model, but for the arguments given that it heeds."""
        return replace(self, **{a.name: given[a.name] for a in ARGUMENTS if a.live})

    def differences(self, other: Settings, names: Iterable[str]) -> list[str]:
        """Those of these arguments that are others there, with both values, in words."""
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} is {a!r} in one and {b!r} in the other" for name, a, b in pairs if a != b]

    def to_json(self) -> dict[str, Any]:
        """What a model file keeps, as JSON types."""
        values = {a.name: getattr(self, a.name) for a in ARGUMENTS if a.kept}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


ARGUMENTS: Final = tuple(Argument(f.name, f.default, **f.metadata) for f in fields(Settings))

# What decides which statistics a fit gathers; a fusion may be changed to another that they serve.
OF_A_FIT: Final = tuple(a.name for a in ARGUMENTS if a.kept and (not a.live or a.name == "fusion"))
