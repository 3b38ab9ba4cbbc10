"""A small data set of woven cloth with planted defects, in the MVTec AD layout.

It is for demonstrations and tests: no download, the same bytes from the same seed, and masks that
are exact because the defect and its mask are drawn from one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

__all__ = ["DEFECT_TYPES", "make_dataset"]

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

_PITCH = 8.0  # pixels from one thread to the next
_WARP_COLOUR = np.array([0.70, 0.67, 0.60], dtype=np.float32)  # unbleached cotton
_WEFT_COLOUR = np.array([0.52, 0.56, 0.60], dtype=np.float32)  # blue-grey
_SHED = 0.16  # brightness of what is seen between and below the threads


def make_dataset(
    root: str | Path,
    seed: int = 0,
    *,
    image_size: tuple[int, int] = (256, 256),
    n_train: int = 60,
    n_test_good: int = 15,
    n_defective: int = 25,
) -> Path:
    """Write the data set and return its folder.

    Parameters
    ----------
    root : folder to make, or one that is empty; its name is the name of the category
    seed : equal seeds give equal bytes (with the same versions of NumPy, SciPy and Pillow)
    image_size : (height, width) in pixels, each at least 64
    n_train, n_test_good : number of defect-free images
    n_defective : number of images with one defect, dealt in turn to `DEFECT_TYPES`

    Returns
    -------
    Path of ``root``, with ``train/good/000.png``, ``test/good/000.png``,
    ``test/<type>/000.png`` and ``ground_truth/<type>/000_mask.png`` (8-bit, 0 or 255) below it.

    Raises
    ------
    FileExistsError
        ``root`` holds files already: nothing is ever overwritten.
    ValueError
        A number is out of range.
    """
    root = Path(root)
    if min(image_size) < 64:
        raise ValueError(f"make_dataset: image_size must be at least 64 x 64, got {image_size}")
    for name, count, least in (
        ("n_train", n_train, 1),
        ("n_test_good", n_test_good, 0),
        ("n_defective", n_defective, 0),
    ):
        if count < least:
            raise ValueError(f"make_dataset: {name} must be at least {least}, got {count}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} is not an empty folder; choose another or empty it first")

    for split, (folder, count) in enumerate((("train/good", n_train), ("test/good", n_test_good))):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([seed, split, i])
            _save(_photograph(_Cloth(rng, image_size).render(), rng), root / folder / f"{i:03}.png")
    for i in range(n_defective):
        kind = list(DEFECT_TYPES)[i % len(DEFECT_TYPES)]
        rng = np.random.default_rng([seed, 2, i])
        cloth, mask = DEFECT_TYPES[kind](_Cloth(rng, image_size), rng)
        name = f"{i // len(DEFECT_TYPES):03}"
        for part in ("test", "ground_truth"):
            (root / part / kind).mkdir(parents=True, exist_ok=True)
        _save(_photograph(cloth, rng), root / "test" / kind / f"{name}.png")
        _save(mask.astype(np.uint8) * 255, root / "ground_truth" / kind / f"{name}_mask.png")
    return root


@dataclass
class _Threads:
    """One of the two sets of threads, seen across: which thread a pixel is on, and where on it."""

    index: NDArray[np.int64]  # (H, W) number of the thread
    offset: Array  # (H, W) distance from its middle, in [-0.5, 0.5] of the pitch
    along: Array  # (H, W) position along the thread, in pitches
    tone: Array  # (n_threads,) brightness of every thread
    half_width: Array  # (n_threads,) in pitches


class _Cloth:
    """A 2/2 twill: every weft thread passes over two warp threads and under two, in steps."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.size = size
        y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
        angle = rng.normal(0, 0.008)  # the camera is never quite square to the cloth
        across = x + angle * y + _wander(rng, size) + rng.normal(0, 1.0)
        down = y - angle * x + _wander(rng, size) + rng.normal(0, 1.0)
        self.warp = _spin(across / _PITCH, down / _PITCH, rng)
        self.weft = _spin(down / _PITCH, across / _PITCH, rng)
        self.weft_over = (self.warp.index + self.weft.index) % 4 < 2
        self.warp_there = np.ones(size, dtype=bool)  # false where a thread is missing
        self.weft_there = np.ones(size, dtype=bool)
        fuzz = rng.standard_normal((2, *size), dtype=np.float32)
        self.fuzz = ndimage.gaussian_filter(fuzz, (0, 0.6, 0.6), truncate=3.0)

    def render(self) -> Array:
        """Light the threads: (H, W, 3) float32, reflectance in about [0, 1]."""
        warp, warp_height = self._shade(self.warp, self.weft.offset, ~self.weft_over, 0)
        weft, weft_height = self._shade(self.weft, self.warp.offset, self.weft_over, 1)
        lift = np.float32(0.8)
        warp_seen = np.where(self.warp_there, warp_height + lift * ~self.weft_over, -1)
        weft_seen = np.where(self.weft_there, weft_height + lift * self.weft_over, -1)
        weft_on_top = (weft_seen > warp_seen)[..., None]
        colour = np.where(
            weft_on_top, weft[..., None] * _WEFT_COLOUR, warp[..., None] * _WARP_COLOUR
        )
        colour[np.maximum(weft_seen, warp_seen) < 0] = _SHED * (_WARP_COLOUR + _WEFT_COLOUR)
        picture: Array = ndimage.gaussian_filter(colour, (0.55, 0.55, 0), truncate=3.0)  # the lens
        return picture

    def _shade(self, threads: _Threads, crossing: Array, over: Mask, k: int) -> tuple[Array, Array]:
        u = threads.offset / threads.half_width[threads.index]
        profile = np.sqrt(np.maximum(1 - u * u, 0))  # of a cylinder
        arch = np.where(over, 0.86 + 0.22 * np.cos(np.pi * crossing), np.float32(0.62))
        ply = 0.06 * np.sin(2 * np.pi * (1.7 * threads.along + 0.9 * threads.offset))  # the twist
        light = (0.35 + 0.65 * profile) * arch * (1 - 0.10 * u) + ply + 0.07 * self.fuzz[k]
        return light * threads.tone[threads.index], np.where(profile > 0, profile, np.float32(-1))


def _spin(position: Array, along: Array, rng: np.random.Generator) -> _Threads:
    """Lay threads at every whole position, each a little off its place, in tone and in width."""
    first = int(np.floor(position.min())) - 1
    n = int(np.ceil(position.max())) + 2 - first
    place = rng.normal(0, 0.05, n).astype(np.float32)
    index = np.floor(position).astype(np.int64) - first
    offset = (position - np.floor(position) - 0.5 + place[index]).clip(-0.5, 0.5)
    tone = rng.normal(1.0, 0.035, n).astype(np.float32)
    half_width = rng.normal(0.5, 0.015, n).astype(np.float32)
    return _Threads(index, offset.astype(np.float32), along, tone, half_width)


def _wander(rng: np.random.Generator, size: tuple[int, int], amplitude: float = 1.2) -> Array:
    """A smooth random field, about ``amplitude`` pixels high, that bends the threads."""
    coarse = Image.fromarray(amplitude * rng.standard_normal((5, 5), dtype=np.float32))
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32)


def _photograph(cloth: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Uneven light, exposure and sensor noise; (H, W, 3) uint8."""
    height, width = cloth.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    direction = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0.02, 0.09)
    light = 1 + slope * (np.cos(direction) * x + np.sin(direction) * y) - 0.05 * (x * x + y * y)
    exposed = cloth * (light * rng.normal(1.0, 0.03))[..., None]
    noise = rng.standard_normal(cloth.shape, dtype=np.float32)
    exposed = exposed + noise * (0.008 + 0.014 * np.sqrt(np.maximum(exposed, 0)))
    pixels: NDArray[np.uint8] = (255 * exposed.clip(0, 1) + 0.5).astype(np.uint8)
    return pixels


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(pixels).save(path, compress_level=1)


# --- defects: each takes a cloth and returns its picture and the mask of what was changed ---


def _centre(rng: np.random.Generator, size: tuple[int, int]) -> tuple[float, float]:
    return rng.uniform(0.15, 0.85) * size[0], rng.uniform(0.15, 0.85) * size[1]


def _blob(
    rng: np.random.Generator, size: tuple[int, int], radius: float, roughness: float = 0.22
) -> Array:
    """Signed height of an irregular round patch: positive inside, 1 in the middle."""
    cy, cx = _centre(rng, size)
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    angle = np.arctan2(y - cy, x - cx)
    edge = np.full(size, radius, dtype=np.float32)
    for k in range(2, 6):
        edge += (
            radius * rng.normal(0, roughness / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
        )
    stretch = rng.uniform(0.75, 1.0)
    height: Array = (1 - np.hypot((y - cy) / stretch, x - cx) / edge).astype(np.float32)
    return height


def _broken_thread(cloth: _Cloth, rng: np.random.Generator) -> tuple[Array, Mask]:
    """One thread is missing over a stretch; what lies below it shows."""
    along_x = rng.random() < 0.5
    threads = cloth.weft if along_x else cloth.warp
    cy, cx = (int(c) for c in _centre(rng, cloth.size))
    middle, half = threads.along[cy, cx], rng.uniform(0.8, 3.0)
    gone = (threads.index == threads.index[cy, cx]) & (np.abs(threads.along - middle) < half)
    (cloth.weft_there if along_x else cloth.warp_there)[gone] = False
    return cloth.render(), gone


def _misweave(cloth: _Cloth, rng: np.random.Generator) -> tuple[Array, Mask]:
    """One to three threads float over a stretch where they should go under and over."""
    along_x = rng.random() < 0.5
    threads = cloth.weft if along_x else cloth.warp
    cy, cx = (int(c) for c in _centre(rng, cloth.size))
    middle, half = threads.along[cy, cx], rng.uniform(1.2, 3.0)
    first, count = threads.index[cy, cx], rng.integers(1, 4)
    floating = (threads.index >= first) & (threads.index < first + count)
    floating &= np.abs(threads.along - middle) < half
    cloth.weft_over[floating] = along_x
    return cloth.render(), floating


def _hole(cloth: _Cloth, rng: np.random.Generator) -> tuple[Array, Mask]:
    """A puncture: inside is nothing, and the threads around it are pushed aside into shadow."""
    blob = _blob(rng, cloth.size, rng.uniform(4.5, 10.0), roughness=0.5)
    picture, mask = cloth.render(), blob > 0
    rim = 0.4 * np.clip(blob / 0.25, 0, 1)[..., None]
    empty = np.clip((blob - 0.35) / 0.12 + 0.25 * cloth.fuzz[0], 0, 1)[..., None]  # frayed
    return picture * (1 - rim) * (1 - empty) + empty * 0.6 * _SHED, mask


def _stain(cloth: _Cloth, rng: np.random.Generator) -> tuple[Array, Mask]:
    """A dried drop, darker and browner, with the darker rim that drying leaves."""
    blob = _blob(rng, cloth.size, rng.uniform(8.0, 20.0))
    picture, mask = cloth.render(), blob > 0
    rim = np.exp(-(((blob - 0.12) / 0.10) ** 2))
    strength = rng.uniform(0.07, 0.24) * (0.7 + 0.6 * rim) * np.clip(blob / 0.10, 0, 1)
    absorbed = np.array([0.75, 0.95, 1.25], dtype=np.float32)
    return picture * (1 - strength[..., None] * absorbed), mask


def _contamination(cloth: _Cloth, rng: np.random.Generator) -> tuple[Array, Mask]:
    """A loose fibre of another colour lies on the cloth, with its shadow."""
    height, width = cloth.size
    cy, cx = _centre(rng, cloth.size)
    t = np.linspace(-1, 1, 400)
    heading, bend, half = rng.uniform(0, np.pi), rng.normal(0, 14), rng.uniform(9, 26)
    wave = bend * (t * t - 0.3) + rng.normal(0, 4) * np.sin(3 * t)
    path_y = cy + half * t * np.sin(heading) + wave * np.cos(heading)
    path_x = cx + half * t * np.cos(heading) - wave * np.sin(heading)
    on = (path_y >= 0) & (path_y <= height - 1) & (path_x >= 0) & (path_x <= width - 1)
    line = np.ones(cloth.size, dtype=bool)
    line[np.round(path_y[on]).astype(int), np.round(path_x[on]).astype(int)] = False
    distance = ndimage.distance_transform_edt(line)
    thickness, opacity = rng.uniform(0.5, 1.3), rng.uniform(0.5, 1.0)
    fibre = np.clip(thickness + 0.5 - distance, 0, 1)[..., None]
    from_shadow = np.pad(distance, ((1, 0), (1, 0)), mode="edge")[:-1, :-1]
    shadow = np.clip(1 - from_shadow / (2.2 * thickness), 0, 1)[..., None]
    colours = np.array([[0.16, 0.15, 0.16], [0.30, 0.16, 0.14], [0.80, 0.78, 0.74]], np.float32)
    picture = cloth.render() * (1 - 0.3 * opacity * shadow)
    mask = (fibre + shadow)[..., 0] > 0
    fibre = opacity * fibre
    return picture * (1 - fibre) + fibre * colours[rng.integers(3)], mask


_Defect = Callable[[_Cloth, np.random.Generator], tuple[Array, Mask]]

DEFECT_TYPES: dict[str, _Defect] = {
    "broken_thread": _broken_thread,
    "contamination": _contamination,
    "hole": _hole,
    "misweave": _misweave,
    "stain": _stain,
}
