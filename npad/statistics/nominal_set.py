"""The nominal set: representatives of all nominal embeddings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npad import ops
from npad.learned import Expected
from npad.nominal_methods import METHODS

__all__ = ["BANK_BYTES", "BLOCK_BYTES", "NominalSet"]

BANK_BYTES = 2 << 30
# Of the bank, as it grows: memory that the system has back when a block is let go of. What comes in
# pieces below 32 MB stays with the process, and the bank would be there twice when it is joined.
BLOCK_BYTES = 64 << 20


class NominalSet:
    """Centroids that stand for all nominal embeddings, chosen in bounded memory.

    Embeddings are collected in a bank. When it is full, it is composed: replaced by the centroids
    of its own content, as many as asked for; ``finalize`` chooses among the centroids of all parts.

    Parameters
    ----------
    method : how they are chosen, one of `npad.nominal_methods.METHODS`
    n_centroids : number of centroids, or a fraction below 1 of all embeddings; where there are
        fewer embeddings, all are kept
    projection : dimensions of the random projection on which the method works, if it can; None is
        the embeddings themselves, with no copy of them
    bank_bytes : memory of the bank
    seed : of every random choice

    Attributes
    ----------
    centroids_ : (K, C) float32; with k-center, embeddings that were seen
    radius_ : no embedding seen is farther from the nearest centroid, in the space that k-center worked
        on: the covering radius, or its bound where parts were composed; NaN for k-means
    n_seen : number of embeddings so far

    Raises
    ------
    ValueError
        An argument out of its range.
    ImportError
        The method needs a package that is not installed.

    Notes
    -----
    Greedy k-center covers any part of the data within 2 r, where r is the smallest radius of k balls
    that cover all of it (Gonzalez 1985): were a point farther, it and the centres would be k + 1
    points more than 2 r apart, two of them in one ball. A composition covers within 4 r: a point is
    within 2 r of a centre of its part, and that centre, itself a point of the data, within 2 r of a
    final one (Malkomes et al., *Fast distributed k-center clustering with outliers on massive data*,
    2015). Where the centres of the parts outgrow the bank they are composed again, for another 2 r
    at most. ``radius_`` adds up what the k-centers reached: that of the centres, and the largest of the
    parts. With a projection all this holds in the projected space; with a fraction, r of a part is
    that of its own number of centres.

    A part is composed by itself, so sets fitted separately and then merged have the centroids, bit
    for bit, of one set whose bank was full exactly between them.
    """

    def __init__(
        self,
        method: str = "kcenter",
        n_centroids: float = 8192,
        projection: int | None = None,
        bank_bytes: int = BANK_BYTES,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(
                f"NominalSet: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}"
            )
        whole = n_centroids >= 1 and n_centroids == int(n_centroids)
        if not (whole or 0 < n_centroids < 1):
            raise ValueError(
                "NominalSet: n_centroids must be a whole number of at least 1 or a fraction between "
                f"0 and 1, got {n_centroids}"
            )
        if projection is not None and projection < 1:
            raise ValueError(f"NominalSet: projection must be at least 1 or None, got {projection}")
        if bank_bytes < 1:
            raise ValueError(f"NominalSet: bank_bytes must be positive, got {bank_bytes}")
        self._choose_points = METHODS[method].load()
        self.method = method
        self.n_centroids = n_centroids
        self.projection = projection
        self.bank_bytes = bank_bytes
        self.seed = seed
        self.n_seen = 0
        self._composed: list[Tensor] = []  # centres of the parts so far
        self._radii: list[float] = []  # within which each of them covers its part
        self._bank: list[Tensor] = []  # embeddings not composed yet: the filled rows of blocks
        self._block: Tensor | None = None  # the last of these, with the rows that are free
        self._sums: list[Tensor] = []  # of updates whose values are not known to be finite
        self._banked = 0
        self._chosen: Tensor | None = None  # by the last finalize

    def update(self, x: Tensor) -> NominalSet:
        """Add embeddings, (..., C). A bank that they do not fit into is composed first.

        Raises
        ------
        ValueError
            No channels, another number of them than before, or NaN or infinite values; those of a
            tensor on a GPU, for which nothing waits, are told by ``compose`` and ``finalize``.
        """
        if x.ndim == 0 or x.shape[-1] == 0:
            raise ValueError(f"NominalSet.update: x must have shape (..., C), got {tuple(x.shape)}")
        channels = x.shape[-1]
        self._check_channels("update", channels)
        if x.numel() == 0:
            return self
        self._sums.append(x.sum(dtype=torch.float64))
        if x.device.type == "cpu":  # elsewhere a look would wait for all that is queued
            self._check_finite()
        room = max(1, self.bank_bytes // (4 * channels))  # embeddings
        for part in x.detach().reshape(-1, channels).split(room):
            if self._banked and self._banked + len(part) > room:
                self.compose()
            self._keep(part)
            self.n_seen += len(part)
        return self

    def _keep(self, x: Tensor) -> None:
        """Copy embeddings (N, C) into the bank."""
        self._banked += len(x)
        while len(x):
            if self._block is None or len(self._bank[-1]) == len(self._block):
                rows = max(1, min(BLOCK_BYTES, self.bank_bytes) // (4 * x.shape[1]))
                self._block = x.new_empty(rows, x.shape[1], dtype=torch.float32)
                self._bank.append(self._block[:0])
            start = len(self._bank[-1])
            stop = min(len(self._block), start + len(x))
            self._block[start:stop] = x[: stop - start]
            self._bank[-1] = self._block[:stop]
            x = x[stop - start :]

    def _take_bank(self) -> Tensor:
        """All embeddings of the bank, which is empty afterwards."""
        self._block = None
        self._banked = 0
        return _take(self._bank)

    def merge(self, other: NominalSet) -> NominalSet:
        """Add the embeddings of another set: both banks are composed and the centroids joined.

        The other stays a set of its own.

        Raises
        ------
        ValueError
            The sets have different settings or channels.
        """
        for name in ("method", "n_centroids", "projection", "seed"):
            own, others = getattr(self, name), getattr(other, name)
            if own != others:
                raise ValueError(
                    f"NominalSet.merge: {name} is {own!r} here and {others!r} in other; "
                    "only sets of the same settings merge"
                )
        if other.n_seen:
            self._check_channels("merge", other._channels())
        self.compose()
        other.compose()
        self._composed += other._composed
        self._radii += other._radii
        self.n_seen += other.n_seen
        return self

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As JSON types and tensors; what belongs to the constructor is not in it."""
        self._check_finite()
        parts = {"bank": self._bank, "composed": self._composed}
        values = {name: [len(x) for x in part] for name, part in parts.items()}
        tensors = {f"{name}.{i}": x for name, part in parts.items() for i, x in enumerate(part)}
        radii = [None if math.isnan(radius) else radius for radius in self._radii]
        return {"n_seen": self.n_seen, "radii": radii, "chosen": self._is_chosen, **values}, tensors

    @staticmethod
    def expected(values: Mapping[str, Any], channels: int) -> Expected:
        """Dtype and shape of each tensor of a `state`, by its values and the channels."""
        return {
            f"{name}.{i}": (torch.float32, (int(n), channels))
            for name in ("bank", "composed")
            for i, n in enumerate(values[name])
        }

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Become what `state` was taken from, in a set of the same arguments."""
        self.n_seen = int(values["n_seen"])
        self._bank, self._composed = (
            [tensors[f"{name}.{i}"] for i in range(len(values[name]))]
            for name in ("bank", "composed")
        )
        self._block = None  # what comes next begins a block of its own
        self._banked = sum(map(len, self._bank))
        self._radii = [math.nan if radius is None else float(radius) for radius in values["radii"]]
        if len(self._radii) != len(self._composed):
            raise ValueError(f"{len(self._composed)} parts have {len(self._radii)} radii")
        if values["chosen"]:
            ((self.centroids_, self.radius_),) = zip(self._composed, self._radii, strict=True)
            self._chosen = self.centroids_

    def copy(self) -> NominalSet:
        """One that goes on by itself."""
        other = copy.copy(self)
        other._bank, other._composed = list(self._bank), list(self._composed)
        other._radii, other._sums = list(self._radii), list(self._sums)
        other._block = None  # whose free rows are this one's
        return other

    def compose(self) -> NominalSet:
        """Replace the bank by its own centroids."""
        self._check_finite()
        rows = sum(map(len, self._composed))
        if self.n_centroids >= 1 and rows > 0 and rows * 4 * self._channels() > self.bank_bytes:
            centres, radius = self._choose(_take(self._composed), int(self.n_centroids))
            self._composed, self._radii = [centres], [radius + _largest(self._radii)]
        if self._bank:
            points = self._take_bank()
            centres, radius = self._choose(points, self._target(len(points)))
            self._composed.append(centres)
            self._radii.append(radius)
        return self

    def finalize(self, advance: Callable[[int], None] | None = None) -> NominalSet:
        """Choose ``centroids_``. The bank is given up; the set can be updated and merged further.

        Parameters
        ----------
        advance : called with the number of centroids chosen since the last call

        Raises
        ------
        ValueError
            Nothing was collected.
        """
        if not self.n_seen:
            raise ValueError("NominalSet.finalize: no embeddings; call update first")
        self._check_finite()
        if self._is_chosen:
            return self  # nothing new
        if self._composed:
            self.compose()
        points = _take(self._composed) if self._composed else self._take_bank()
        self.centroids_, radius = self._choose(points, self._target(self.n_seen), advance)
        self.radius_ = radius + _largest(self._radii)
        self._chosen = self.centroids_
        self._composed.append(self.centroids_)
        self._radii = [self.radius_]
        return self

    @property
    def _is_chosen(self) -> bool:
        """Whether the last finalize has chosen from all that was seen."""
        return not self._bank and len(self._composed) == 1 and self._composed[0] is self._chosen

    def distance(self, x: Tensor) -> Tensor:
        """(..., C) -> (...): Euclidean distance to the nearest centroid."""
        distance, _ = ops.nearest_centroid(x.reshape(-1, x.shape[-1]), self.centroids_)
        return distance.reshape(x.shape[:-1])

    def _target(self, n: int) -> int:
        """Number of centroids for n embeddings."""
        return (
            int(self.n_centroids) if self.n_centroids >= 1 else max(1, round(self.n_centroids * n))
        )

    def _channels(self) -> int:
        return int((self._bank or self._composed)[0].shape[1])

    def _check_finite(self) -> None:
        """Look at the sums of the updates since the last time."""
        if self._sums:
            total = torch.stack(self._sums).sum()
            self._sums.clear()
            if not bool(total.isfinite()):
                raise ValueError(
                    "NominalSet.update: x holds NaN or infinite values; a backbone that overflows in "
                    "float16 needs backbone_dtype='bfloat16' or 'float32'"
                )

    def _check_channels(self, call: str, channels: int) -> None:
        if self.n_seen and channels != self._channels():
            raise ValueError(
                f"NominalSet.{call}: {channels} channels, but the embeddings so far have "
                f"{self._channels()}"
            )

    def _choose(
        self, points: Tensor, n: int, advance: Callable[[int], None] | None = None
    ) -> tuple[Tensor, float]:
        """The centroids of the points, and their covering radius."""
        if len(points) <= n:
            return points, 0.0
        return self._choose_points(
            points, n, seed=self.seed, projection=self.projection, advance=advance
        )


def _largest(radii: Sequence[float]) -> float:
    """Of some parts; NaN where one is not known."""
    return math.nan if any(map(math.isnan, radii)) else max(radii, default=0.0)


def _take(parts: list[Tensor]) -> Tensor:
    """Join the parts into one tensor and empty the list, letting go of each part as it is copied."""
    if len(parts) == 1:
        return parts.pop()
    points = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1])
    end = len(points)
    while parts:
        part = parts.pop()
        points[end - len(part) : end] = part
        end -= len(part)
    return points
