"""Pictures of a part that lies anywhere, computed pixel by pixel: its place is known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from image_files import save_image


class Pose(NamedTuple):
    """Where the part lies: a shift in widths and heights of the frame, a turn in degrees."""

    dx: float = 0.0
    dy: float = 0.0
    angle: float = 0.0

    def place(self, at: Any, size: tuple[int, int]) -> Any:
        """Pixel (x, y) of an image of this (height, width) at which a place (u, v) of the part is seen.

        Places are fractions of the frame, from its middle: of the part as it lies at rest.
        """
        sides = np.array(size[::-1])
        turned = _rotation(self.angle) @ (sides * at)
        return (sides - 1) / 2 + sides * (self.dx, self.dy) + turned


def random_pose(rng: np.random.Generator, kind: str, shift: float, turn: float) -> Pose:
    dx, dy = rng.uniform(-shift, shift, 2)
    return Pose(dx, dy, rng.uniform(-turn, turn) if kind == "euclidean" else 0.0)


def part(
    size: tuple[int, int],
    pose: Pose = Pose(),  # noqa: B008
    *,
    defect: tuple[float, float] | None = None,
    seed: int | None = None,
    light: float = 1.0,
) -> np.ndarray:
    """(H, W, 3) uint8: a plate with a hole and a bar, and a small bright defect at a place of it."""
    height, width = size
    side = min(size)
    y, x = np.mgrid[:height, :width].astype(float)
    x, y = x - (width - 1) / 2 - width * pose.dx, y - (height - 1) / 2 - height * pose.dy
    (cos, sin), _ = _rotation(pose.angle).T
    x, y = cos * x + sin * y, cos * y - sin * x  # of the part at rest, in pixels from its middle

    def inside(distance: np.ndarray) -> np.ndarray:  # to the border, soft over a pixel or two
        return 1 / (1 + np.exp(np.clip(-distance / (side / 100), -50, 50)))

    plate = inside(np.minimum(0.3 * width - abs(x), 0.25 * height - abs(y)))
    hole = inside(0.09 * side - np.hypot(x + 0.15 * width, y + 0.07 * height))
    bar = inside(
        np.minimum(0.02 * side - abs(x - 0.12 * width), 0.15 * height - abs(y + 0.02 * height))
    )
    image = np.full((*size, 3), 0.25)
    for amount, colour in (
        (plate, (0.7, 0.6, 0.4)),
        (hole, (0.1, 0.2, 0.3)),
        (bar, (0.2, 0.8, 0.2)),
    ):
        image += amount[..., None] * (colour - image)
    if defect is not None:
        u, v = defect
        far = np.hypot(x - u * width, y - v * height) / (side / 40)
        image += np.exp(-(far**2))[..., None] * (1 - image)
    if seed is not None:
        image += np.random.default_rng(seed).normal(0, 0.01, image.shape)
    return np.rint(255 * np.clip(light * image, 0, 1)).astype(np.uint8)


def _rotation(degrees: float) -> np.ndarray:
    """Of (x, y) with y downwards, clockwise as it is seen."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cos, -sin], [sin, cos]])


def write_plates(root: Path, sides: Sequence[int] = (7, 7, 7)) -> Path:
    """A category: 8 parts to fit, 3 good ones, and one with a spot for each side of its mask."""
    size = (64, 64)
    for i in range(8):
        save_image(root / f"train/good/{i}.png", part(size, seed=i))
    for i in range(3):
        save_image(root / f"test/good/{i}.png", part(size, seed=100 + i))
    for i, side in enumerate(sides):
        save_image(root / f"test/spot/{i}.png", part(size, defect=(0, 0.1), seed=200 + i))
        mask = np.zeros(size, np.uint8)
        mask[35 : 35 + side, 28 : 28 + side] = 255
        save_image(root / f"ground_truth/spot/{i}_mask.png", mask)
    return root
