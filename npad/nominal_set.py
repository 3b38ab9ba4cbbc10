"""The nominal set: representatives of all nominal embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npad import ops

METHODS = ("kcenter", "kmeans")
KMEANS_ITERATIONS = 25
KMEANS_SAMPLE = 256  # points per centroid that k-means looks at, as faiss does
ROTATION_SAMPLE = 16384  # projected points whose principal axes come first


class NominalSet:
    """Centroids that stand for all nominal embeddings, chosen in bounded memory.

    Embeddings are collected in a bank. When it is full, it is composed: replaced by its own
    k-center, with as many centres as asked for; ``finalize`` chooses among what is left.

    Parameters
    ----------
    method : "kcenter" (greedy k-center, which keeps rare nominal patches) or "kmeans" (the paper's
        clusters; faiss where it is installed, PyTorch otherwise)
    n_centroids : number of centroids, or a fraction below 1 of all embeddings
    projection : dimensions of the random projection on which k-center works; None is all
    bank_bytes : memory of the bank
    seed : of the projection and of k-means

    Attributes
    ----------
    centroids_ : (K, C) float32
    radius_ : covering radius of the last k-center in the projected space; NaN for k-means

    Notes
    -----
    Greedy k-center, Gonzalez 1985: the covering radius is at most twice the smallest possible, r. Of
    a composition: each part's centres cover it within 2 r_part <= 4 r (centres must be points of
    the part, which costs the second factor 2), and the last k-center covers the centres, a subset of
    the data, within 4 r, so by the triangle inequality all is covered within 8 r. Each further
    composition of already composed parts adds at most 4 r. Merging two sets is a composition of
    their parts, so sets fitted separately and merged agree with one whose bank was full between them.
    """

    def __init__(
        self,
        method: str = "kcenter",
        n_centroids: float = 8192,
        projection: int | None = 128,
        bank_bytes: int = 2 << 30,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"NominalSet: method must be one of {METHODS}, got {method!r}")
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
        self.method = method
        self.n_centroids = n_centroids
        self.projection = projection
        self.bank_bytes = bank_bytes
        self.seed = seed
        self.n_seen = 0
        self._composed: list[Tensor] = []  # centres of the parts so far
        self._bank: list[Tensor] = []  # embeddings not composed yet
        self._banked = 0

    def update(self, x: Tensor) -> NominalSet:
        """Add embeddings, (..., C) float32. A full bank is composed first."""
        for part in x.reshape(-1, x.shape[-1]).split(max(1, self.bank_bytes // (4 * x.shape[-1]))):
            if self._banked and (self._banked + len(part)) * part.shape[1] * 4 > self.bank_bytes:
                self.compose()
            self._bank.append(part.to(torch.float32, copy=True))
            self._banked += len(part)
            self.n_seen += len(part)
        return self

    def merge(self, other: NominalSet) -> NominalSet:
        """Add the embeddings of another set: both banks are composed and the centres joined."""
        if other.method != self.method or other.n_centroids != self.n_centroids:
            raise ValueError(
                f"NominalSet.merge: other chooses {other.n_centroids} by {other.method}, this one "
                f"{self.n_centroids} by {self.method}"
            )
        self.compose()
        other.compose()
        self._composed += other._composed
        self.n_seen += other.n_seen
        return self

    def compose(self) -> NominalSet:
        """Replace the bank by its own k-center."""
        if self._bank:
            points = self._take_bank()
            self._composed.append(points[self._k_center(points, self._target(len(points)), None)])
        return self

    def finalize(self, advance: Callable[[int], None] | None = None) -> NominalSet:
        """Choose ``centroids_``. The bank is given up; what was collected stays composed.

        Parameters
        ----------
        advance : called with the number of centres chosen since the last call

        Raises
        ------
        ValueError : nothing was collected.
        """
        if not self.n_seen:
            raise ValueError("NominalSet.finalize: no embeddings; call update first")
        points = self._take_bank(self._composed)
        self._composed = []
        n = self._target(self.n_seen)
        self.radius_ = float("nan")
        if len(points) <= n:
            self.centroids_, self.radius_ = points, 0.0
        elif self.method == "kcenter":
            self.centroids_ = points[self._k_center(points, n, advance)]
        else:
            self.centroids_ = k_means(points, n, self.seed)
        self._composed.append(self.centroids_)
        return self

    def distance(self, x: Tensor) -> Tensor:
        """(..., C) -> (...): Euclidean distance to the nearest centroid."""
        distance, _ = ops.nearest_centroid(x.reshape(-1, x.shape[-1]), self.centroids_)
        return distance.reshape(x.shape[:-1])

    def _target(self, n: int) -> int:
        return (
            int(self.n_centroids) if self.n_centroids >= 1 else max(1, round(self.n_centroids * n))
        )

    def _take_bank(self, before: list[Tensor] | None = None) -> Tensor:
        """Join the parts into one tensor, letting go of each as it is copied."""
        parts = [*(before or []), *self._bank]
        self._bank = []
        self._banked = 0
        if len(parts) == 1:
            return parts[0]
        points = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1])
        end = len(points)
        while parts:
            part = parts.pop()
            points[end - len(part) : end] = part
            end -= len(part)
        return points

    def _k_center(self, points: Tensor, n: int, advance: Callable[[int], None] | None) -> Tensor:
        if len(points) <= n:
            return torch.arange(len(points), device=points.device)
        done = 0

        def report(now: int, total: int) -> None:
            nonlocal done
            if advance is not None:
                advance(now - done)
            done = now

        with ops.report_progress(report):
            index, radius = ops.farthest_first(self._project(points), n)
        self.radius_ = float(radius[-1])
        return index

    def _project(self, points: Tensor) -> Tensor:
        """Random projection that keeps distances on average, largest variances first.

        The rotation to principal axes changes no distance; with the variance in front, partial
        distances rule points out early.
        """
        channels = points.shape[1]
        if self.projection is None or self.projection >= channels:
            matrix = torch.eye(channels)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            gaussian = torch.randn(channels, self.projection, generator=generator)
            matrix = torch.linalg.qr(gaussian).Q * (channels / self.projection) ** 0.5
        matrix = matrix.to(points.device)
        sample = points[:: max(1, len(points) // ROTATION_SAMPLE)] @ matrix
        _, axes = torch.linalg.eigh((sample - sample.mean(0)).T.double().cov())
        return points @ (matrix @ axes.flip(1).float())


def k_means(points: Tensor, n: int, seed: int) -> Tensor:
    """Lloyd's k-means, by faiss where it is installed and by PyTorch otherwise.

    Parameters
    ----------
    points : (N, C) float32; a seeded sample of 256 per centroid is used
    n : number of centroids, at most N
    seed : of the sample and the start

    Returns
    -------
    (n, C) float32
    """
    generator = torch.Generator().manual_seed(seed)
    if len(points) > KMEANS_SAMPLE * n:
        chosen = torch.randperm(len(points), generator=generator)[: KMEANS_SAMPLE * n]
        points = points[chosen.sort().values.to(points.device)]
    faiss = _faiss()
    if faiss is not None:
        engine = faiss.Kmeans(
            points.shape[1], n, niter=KMEANS_ITERATIONS, seed=seed, min_points_per_centroid=1
        )
        engine.train(points.cpu().numpy())
        return torch.from_numpy(engine.centroids).to(points.device)
    return lloyd(points, n, generator)


def lloyd(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """k-means in PyTorch; a cluster that empties restarts at the point farthest from its centroid."""
    start = torch.randperm(len(points), generator=generator)[:n].to(points.device)
    centroids = points[start]
    for _ in range(KMEANS_ITERATIONS):
        distance, index = ops.nearest_centroid(points, centroids)
        count = torch.bincount(index, minlength=n)
        total = torch.zeros_like(centroids).index_add_(0, index, points)
        moved = total / count.clamp(min=1)[:, None]
        empty = (count == 0).nonzero().flatten()
        moved[empty] = points[distance.argsort(descending=True)[: len(empty)]]
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _faiss() -> Any:
    try:
        import faiss  # noqa: PLC0415  (optional)
    except ImportError:
        return None
    return faiss
