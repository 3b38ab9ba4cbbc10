"""The ways to choose a nominal set: the one list of them. Imports no PyTorch.

To add one, write a module with its function, a `Choose`, and give it a line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METHODS", "Choose", "Method"]


class Choose(Protocol):
    """A function that chooses centroids."""

    def __call__(
        self,
        points: Tensor,
        n: int,
        *,
        seed: int,
        projection: int | None,
        advance: Callable[[int], None] | None,
    ) -> tuple[Tensor, float]:
        """Choose n centroids; the same arguments give the same ones.

        Parameters
        ----------
        points : (N, C) float32
        n : number of centroids, 1 <= n < N
        seed : of every random choice
        projection : dimensions of a random projection to work on, for a method that can; None is
            the points themselves
        advance : called with the number of centroids chosen since the last call

        Returns
        -------
        centroids : (n, C) float32
        radius : float
            The largest distance of a point to its nearest centroid, in the space that the method
            worked on; NaN where it does not know.
        """


@dataclass(frozen=True)
class Method:
    """A way to choose the centroids of a nominal set.

    Attributes
    ----------
    summary : str
        What it is, for help and docs.
    function : str
        The `Choose`, as "module:name"; imported by `load`.
    working_bytes : callable
        Of the number of points, of centroids and of channels: the bytes that it takes on a CPU beside
        the points and the centroids.
    extra : str, optional
        The extra of npad that installs what the function's module imports, where npad's own
        requirements do not.
    """

    summary: str
    function: str
    working_bytes: Callable[[int, int, int], int]
    extra: str | None = None

    def load(self) -> Choose:
        """Import the function. Called before the work, it tells in time that a package is missing.

        Raises
        ------
        ImportError
            A package is not installed; the message names the extra that brings it.
        """
        module, _, name = self.function.partition(":")
        try:
            return cast(Choose, getattr(import_module(module), name))
        except ImportError as error:
            if self.extra is None:
                raise
            own = next(name for name, method in METHODS.items() if method == self)
            raise ImportError(
                f"nominal_set={own!r} needs a package that cannot be imported ({error}): "
                f'pip install "npad[{self.extra}]", or choose another nominal_set'
            ) from error


KMEANS_SAMPLE: Final = 256  # points per centroid that are looked at: as many as faiss would draw


def _of_k_center(points: int, centroids: int, channels: int) -> int:
    """See csrc/cpu/farthest_first.cpp."""
    return 276 * points + 256 * centroids


def _of_k_means(points: int, centroids: int, channels: int) -> int:
    """The sample, where it is a part; of each of its points the cluster and the distance."""
    sample = min(points, KMEANS_SAMPLE * centroids)
    return (4 * channels * sample if sample < points else 0) + 12 * sample


METHODS: Final = {
    "kcenter": Method(
        "greedy k-center, which keeps rare nominal patches",
        "npad.statistics.k_center:k_center",
        _of_k_center,
    ),
    "kmeans": Method(
        "the paper's clusters, by faiss", "npad.statistics.k_means:k_means", _of_k_means, "faiss"
    ),
}
