"""Registration: an image is shifted, and turned, to where a template shows the part.

OpenCV's ECC finds the motion: Evangelidis, Psarakis, *Parametric Image Alignment Using Enhanced
Correlation Coefficient Maximization*, PAMI 2008. It climbs to the nearest maximum of the correlation,
which brightness and contrast do not change. So that this is the right one, it starts on few pixels,
from the shifts that phase correlation finds at a few angles.

The only module that imports OpenCV.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from npad.images.samples import Array

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Aligned", "Aligner", "Motion", "load_opencv", "tell_of_unaligned"]

Size = tuple[int, int]

AREAS: Final = (64**2, 128**2)  # pixels of the levels, coarse to fine; an image may have fewer
LEAST_SIDE: Final = 8  # of a level
TURNS: Final = (0, -6, 6, -12, 12, -18, 18)  # degrees at which the search starts
N_STARTS: Final = 3  # that are followed on the coarse level
ITERATIONS: Final = 3  # of ECC in a step
SHARES: Final = (1.0, 0.5, 0.25)  # of a step, of which the first that helps is taken
MOST_STEPS: Final = 30
STILL: Final = 0.1  # pixels of a level that no corner moves; OpenCV before 5 rounds to 1/32
LARGEST_SHIFT: Final = 0.25  # of a side
LARGEST_TURN: Final = 30.0  # degrees
LEAST_OVERLAP: Final = 0.5  # of the template, on which the correlation is taken
LEAST_CORRELATION: Final = 0.5
LEAST_CONTRAST: Final = 1e-4  # standard deviation, of white
WORSE: Final = 1e-3  # of correlations: one lower by less may be due to interpolation

NAMED: Final = 3  # images in a warning

_importing = threading.Lock()


def load_opencv(kind: str) -> ModuleType:
    """Import OpenCV. Called before the work, it tells in time that it is missing.

    Raises
    ------
    ImportError
        It is not installed; the message names the extra that brings it.
    """
    with _importing:
        path = os.environ.get("LD_LIBRARY_PATH")
        try:
            import cv2  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(
                f"align={kind!r} needs OpenCV, which cannot be imported ({error}): "
                'pip install "npad[align]", or leave out align'
            ) from error
        finally:  # which the import changes, for all processes that are started later
            if path is None:
                os.environ.pop("LD_LIBRARY_PATH", None)
            elif path != os.environ.get("LD_LIBRARY_PATH"):
                os.environ["LD_LIBRARY_PATH"] = path
    return cv2


def tell_of_unaligned(
    call: str, done: str, unaligned: Sequence[tuple[str, str]], n_images: int
) -> None:
    """Warn, in the name of a call, of images that were fitted or scored as they came."""
    if not unaligned:
        return
    named = "; ".join(f"{name}: {reason}" for name, reason in unaligned[:NAMED])
    more = "; ..." if len(unaligned) > NAMED else ""
    warnings.warn(
        f"{call}: {len(unaligned)} of {n_images} images could not be registered to the template and "
        f"were {done} as they came ({named}{more}); if there are many, the parts do not look alike "
        "enough for align",
        stacklevel=3,
    )


@dataclass(frozen=True)
class Motion:
    """A turn about the middle of the frame and a shift, from a template to an image.

    It has no resolution: it is the same for the image as it came and as it is resized to any size.

    Attributes
    ----------
    dx, dy : the shift, in widths and heights of the frame
    angle : the turn in degrees, clockwise as the image is seen
    aspect : height / width of the image as it came, whose pixels are square
    """

    dx: float = 0.0
    dy: float = 0.0
    angle: float = 0.0
    aspect: float = 1.0

    @property
    def turn(self) -> Array:
        """(2, 2) float64: the turn of (x, y) in widths and heights of the frame."""
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        return np.array([[cos, -sin * self.aspect], [sin / self.aspect, cos]])

    def matrix(self, size: Size) -> Array:
        """(2, 3) float64: from pixels (x, y) of a template of this (height, width) to the image's."""
        sides = np.array(size[::-1], np.float64)
        turn = self.turn * sides[:, None] / sides
        middle = (sides - 1) / 2
        shift = middle + sides * (self.dx, self.dy) - turn @ middle
        return np.column_stack([turn, shift])

    @classmethod
    def of(cls, matrix: Array, size: Size, aspect: float) -> Motion:
        """The motion of a (2, 3) matrix of pixels that are about square on the image."""
        sides = np.array(size[::-1], np.float64)
        middle = (sides - 1) / 2
        dx, dy = (matrix[:, :2] @ middle + matrix[:, 2] - middle) / sides
        angle = math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))
        return cls(float(dx), float(dy), angle, aspect)

    @property
    def inverse(self) -> Motion:
        """From the image to the template."""
        return replace(self, dx=0.0, dy=0.0, angle=0.0).after(self)

    def towards(self, other: Motion, share: float) -> Motion:
        """A share of the way to another motion of the same image."""
        dx, dy, angle = (
            own + share * (there - own)
            for own, there in (
                (self.dx, other.dx),
                (self.dy, other.dy),
                (self.angle, other.angle),
            )
        )
        return Motion(dx, dy, angle, self.aspect)

    def after(self, first: Motion) -> Motion:
        """The motion from where `first` leads: `first`, then that, is this one."""
        angle = self.angle - first.angle
        rest = replace(self, angle=angle)
        dx, dy = np.array((self.dx, self.dy)) - rest.turn @ (first.dx, first.dy)
        return replace(rest, dx=float(dx), dy=float(dy))

    def __str__(self) -> str:
        """As the reasons say it."""
        turn = f" and a turn of {self.angle:.1f} degrees" if self.angle else ""
        return f"a shift of {self.dx:+.1%} of the width and {self.dy:+.1%} of the height{turn}"


@dataclass(frozen=True, eq=False)
class Aligned:
    """An image in the frame of the template, or as it came.

    Attributes
    ----------
    image : (3, H, W) float32 in [0, 1]
    motion : from the template to the image as it came; None where it was left as it came
    reason : why it was left; None where it was not
    """

    image: Tensor
    motion: Motion | None
    reason: str | None


class UnalignedError(Exception):
    """An image cannot be registered; the text says why."""


class Aligner:
    """Registers images to a template. Safe from several threads.

    Parameters
    ----------
    template : (3, H, W) float32 in [0, 1]
    kind : "translation", or "euclidean": also a turn
    n_images : of how many images the template is the median

    Raises
    ------
    ImportError
        OpenCV is not installed.
    """

    def __init__(self, template: Tensor, kind: str, n_images: int = 1) -> None:
        self._cv2: Any = load_opencv(kind)
        self.template = template.detach().cpu().numpy()
        self.kind = kind
        self.n_images = n_images
        self._grey = _grey(self.template)
        self.size: Size = self._grey.shape[0], self._grey.shape[1]

    def __call__(self, image: Tensor, size: Size) -> Aligned:
        """Bring an image into the template's frame.

        What was outside the image is filled with what the template shows there, which is no defect.

        Parameters
        ----------
        image : (3, H, W) float32 in [0, 1], of the template's size
        size : (height, width) of the image as it came, whose pixels are square
        """
        pixels = image.numpy()
        try:
            motion, _ = self.motion(pixels, size)
        except UnalignedError as error:
            return Aligned(image, None, str(error))
        filled = self._filled(self.moved(pixels, motion), motion)
        return Aligned(torch.from_numpy(filled), motion, None)

    def motion(self, pixels: Array, size: Size) -> tuple[Motion, float]:
        """From the template to an image, and the correlation of both there.

        Parameters
        ----------
        pixels, size : the image, as for a call

        Raises
        ------
        UnalignedError
            None is found, or none that can be believed.
        """
        aspect = size[0] / size[1]
        grey = _grey(pixels)
        if grey.std() < LEAST_CONTRAST:
            raise UnalignedError("it has no contrast")
        still = Motion(aspect=aspect)
        coarse, *finer = self._levels(grey, aspect)
        climbed = (self._climb(coarse, start) for start in self._starts(coarse, still))
        found = [(coarse.correlation(motion), motion) for motion in climbed if motion is not None]
        best = max(found, key=lambda pair: pair[0], default=(0.0, None))[1]
        fine = coarse
        for fine in finer:
            best = None if best is None else self._climb(fine, best)
        if best is None:
            raise UnalignedError("the search for the motion does not converge")
        if max(abs(best.dx), abs(best.dy)) > LARGEST_SHIFT or abs(best.angle) > LARGEST_TURN:
            limit = f" or {LARGEST_TURN:g} degrees" if best.angle else ""
            raise UnalignedError(
                f"it would take {best}, more than {LARGEST_SHIFT:.0%} of a side{limit}"
            )
        correlation = fine.correlation(best)
        if not correlation >= LEAST_CORRELATION:
            raise UnalignedError(
                f"its correlation with the template is {correlation:.2f}, below {LEAST_CORRELATION:g}"
            )
        before = fine.correlation(still)
        if correlation < before - WORSE:
            raise UnalignedError(
                f"its correlation with the template would fall from {before:.3f} to {correlation:.3f}"
            )
        return best, correlation

    def moved(self, pixels: Array, motion: Motion) -> Array:
        """An image (3, H, W) in the template's frame; past its edges it goes on as they are."""
        cv2, size = self._cv2, self.size
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        whole = cv2.warpAffine(
            np.ascontiguousarray(pixels.transpose(1, 2, 0)),
            motion.matrix(size), size[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE,
        )  # fmt: skip
        return np.ascontiguousarray(np.clip(whole, 0, 1).transpose(2, 0, 1))

    def _filled(self, moved: Array, motion: Motion) -> Array:
        """An image that `moved` gave, with the template past its edges, in the light of the image."""
        seen = _seen(self._cv2, motion.matrix(self.size), self.size)
        beyond = [
            _in_light_of(*pair, seen > 0.5) for pair in zip(self.template, moved, strict=True)
        ]
        return (seen * moved + (1 - seen) * np.stack(beyond)).astype(np.float32)

    def _levels(self, grey: Array, aspect: float) -> list[_Level]:
        """The template and an image, coarse to fine, on pixels that are square on the image."""
        height, width = self.size
        areas = [area for area in AREAS if area < height * width] or [height * width]
        if self.kind == "translation":  # which is one on any pixels
            aspect = height / width
        return [_Level(self._cv2, self._grey, grey, _canvas(area, aspect)) for area in areas]

    def _starts(self, level: _Level, still: Motion) -> list[Motion]:
        """The motions of the highest correlations among a few."""
        turns = TURNS if self.kind == "euclidean" else TURNS[:1]
        turned = [Motion(angle=angle, aspect=still.aspect) for angle in turns]
        starts = [motion for start in turned for motion in (start, level.shifted(start))]
        return sorted(starts, key=level.correlation, reverse=True)[:N_STARTS]

    def _climb(self, level: _Level, motion: Motion) -> Motion | None:
        """The motion of the nearest maximum of the correlation, or None where it is not reached.

        ECC's own steps overshoot where an image is not much like the template.
        """
        highest = level.correlation(motion)
        for _ in range(MOST_STEPS):
            whole = level.step(motion, self.kind)
            if whole is None:
                return None
            for share in SHARES:
                found = motion.towards(whole, share)
                correlation = level.correlation(found)
                if correlation > highest:
                    break
            else:
                return motion
            if level.distance(motion, found) < STILL:
                return found
            motion, highest = found, correlation
        return None


class _Level:
    """A template and an image on few pixels.

    Parameters
    ----------
    cv2 : OpenCV
    template, image : (H, W) float32
    size : (height, width) of both on this level
    """

    def __init__(self, cv2: Any, template: Array, image: Array, size: Size) -> None:
        self._cv2 = cv2
        self.size = size
        self.template, self.image = (self._reduced(x) for x in (template, image))

    def _reduced(self, x: Array) -> Array:
        shrinks = self.size[0] <= x.shape[0] and self.size[1] <= x.shape[1]
        way = self._cv2.INTER_AREA if shrinks else self._cv2.INTER_LINEAR
        small = self._cv2.resize(x, self.size[::-1], interpolation=way)
        return self._cv2.GaussianBlur(small, (5, 5), 0)

    def _moved(self, motion: Motion) -> Array:
        flags = self._cv2.INTER_LINEAR | self._cv2.WARP_INVERSE_MAP
        return self._cv2.warpAffine(
            self.image,
            motion.matrix(self.size),
            self.size[::-1],
            flags=flags,
            borderMode=self._cv2.BORDER_REPLICATE,
        )

    def shifted(self, motion: Motion) -> Motion:
        """A motion with the shift behind it at which phase correlation has its peak."""
        hann = self._cv2.createHanningWindow(self.size[::-1], self._cv2.CV_32F)
        template = self.template.copy()  # OpenCV multiplies by the window in place
        shift, _ = self._cv2.phaseCorrelate(template, self._moved(motion), hann)
        matrix = motion.matrix(self.size)
        matrix[:, 2] += matrix[:, :2] @ shift
        return Motion.of(matrix, self.size, motion.aspect)

    def step(self, motion: Motion, kind: str) -> Motion | None:
        """Some iterations of ECC from a motion; None where they lead nowhere."""
        cv2 = self._cv2
        ways = {"translation": cv2.MOTION_TRANSLATION, "euclidean": cv2.MOTION_EUCLIDEAN}
        until = (cv2.TERM_CRITERIA_COUNT, ITERATIONS, 0.0)
        matrix = motion.matrix(self.size).astype(np.float32)
        try:
            _, matrix = cv2.findTransformECC(
                self.template, self.image, matrix, ways[kind], until, None, 1
            )
        except cv2.error:  # no overlap is left, or no gradient
            return None
        return Motion.of(matrix.astype(np.float64), self.size, motion.aspect)

    def distance(self, a: Motion, b: Motion) -> float:
        """The largest distance, in pixels of this level, between where both move a corner."""
        height, width = self.size
        corners = np.array([[x, y, 1] for x in (0, width - 1) for y in (0, height - 1)])
        apart = corners @ (a.matrix(self.size) - b.matrix(self.size)).T
        return float(np.hypot(*apart.T).max())

    def correlation(self, motion: Motion) -> float:
        """Of the template and the image where both are seen; -1 where that is too little."""
        seen = _seen(self._cv2, motion.matrix(self.size), self.size) > 0.5
        if seen.mean() < LEAST_OVERLAP:
            return -1.0
        a, b = self.template[seen].astype(np.float64), self._moved(motion)[seen].astype(np.float64)
        a -= a.mean()
        b -= b.mean()
        scale = math.sqrt(float(a @ a) * float(b @ b))
        return float(a @ b) / scale if scale > 0 else -1.0


def _seen(cv2: Any, matrix: Array, size: Size) -> Array:
    """How much of each pixel of the template's frame an image shows, 0 to 1; (H, W) float32."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(np.ones(size, np.float32), matrix, size[::-1], flags=flags)


def _in_light_of(template: Array, image: Array, seen: Array) -> Array:
    """A channel of the template, its brightness and contrast such that it is nearest to an image's.

    By least squares, over the pixels that are seen of both.
    """
    a, b = template[seen].astype(np.float64), image[seen].astype(np.float64)
    from_mean = a - a.mean()
    spread = float(from_mean @ from_mean)
    contrast = float(from_mean @ b) / spread if spread > 0 else 0.0
    return np.clip(b.mean() + contrast * (template - a.mean()), 0, 1)


def _canvas(area: int, aspect: float) -> Size:
    """(height, width) of about this many pixels and this aspect."""
    height, width = math.sqrt(area * aspect), math.sqrt(area / aspect)
    return max(LEAST_SIDE, round(height)), max(LEAST_SIDE, round(width))


def _grey(pixels: Array) -> Array:
    return pixels.mean(0, dtype=np.float32)
