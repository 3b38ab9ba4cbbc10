"""The template to which images are registered: what nominal images have in common."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from npad.images.alignment import Aligner, Motion, UnalignedError

__all__ = ["n_template_images", "nominal_aligner"]

Sample: TypeAlias = "tuple[Tensor, tuple[int, int]]"  # an image and its size as it came

MOST_IMAGES: Final = 32
LEAST_IMAGES: Final = 5
MOST_PIXELS: Final = 1 << 22  # of all of them: their median needs them at once
N_CANDIDATES: Final = 4
N_JUDGES: Final = 12
ROUNDS: Final = 2


def n_template_images(size: tuple[int, int]) -> int:
    """How many nominal images of this (height, width) a template is made of, at most."""
    return max(LEAST_IMAGES, min(MOST_IMAGES, MOST_PIXELS // (size[0] * size[1])))


def nominal_aligner(samples: Sequence[Sample], kind: str, workers: int = 1) -> Aligner:
    """For the median of nominal images, each registered to it.

    It starts from the image to which others are registered best, which no stray one is. Then it moves
    to the middle of where the parts are, so that as little as can be leaves the frame.

    Parameters
    ----------
    samples : images (3, H, W) float32 in [0, 1], and the (height, width) of each as it came
    kind : as for `Aligner`
    workers : threads
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="npad-align") as pool:
        aligner = _most_central(samples, kind, pool)
        for _ in range(ROUNDS):
            tried = pool.map(partial(_motion, aligner), samples)
            pairs = zip(samples, tried, strict=True)
            found = [(image.numpy(), motion) for (image, _), (motion, _) in pairs if motion]
            if not found:
                break
            middle = _middle([motion for _, motion in found])
            moved = [aligner.moved(pixels, motion.after(middle)) for pixels, motion in found]
            median = torch.from_numpy(np.median(moved, axis=0))
            aligner = Aligner(median, kind, n_images=len(found))
    return aligner


def _most_central(samples: Sequence[Sample], kind: str, pool: ThreadPoolExecutor) -> Aligner:
    """Of a few images, the one with which others correlate best once they are registered to it."""
    candidates = [Aligner(image, kind) for image, _ in _spread(samples, N_CANDIDATES)]
    judges = _spread(samples, N_JUDGES)

    def standing(aligner: Aligner) -> float:
        return float(np.median([_motion(aligner, sample)[1] for sample in judges]))

    standings = list(pool.map(standing, candidates))
    return candidates[int(np.argmax(standings))]


def _spread(samples: Sequence[Sample], n: int) -> Sequence[Sample]:
    """At most n of them, evenly."""
    places = np.linspace(0, len(samples) - 1, min(n, len(samples)))
    return [samples[int(place)] for place in places]


def _motion(aligner: Aligner, sample: Sample) -> tuple[Motion | None, float]:
    image, size = sample
    try:
        return aligner.motion(image.numpy(), size)
    except UnalignedError:
        return None, 0.0


def _middle(motions: Sequence[Motion]) -> Motion:
    dx, dy, angle, aspect = np.median([(m.dx, m.dy, m.angle, m.aspect) for m in motions], axis=0)
    return Motion(float(dx), float(dy), float(angle), float(aspect))
