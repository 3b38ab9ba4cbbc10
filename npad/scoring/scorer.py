"""What a fitted model does with a batch of images, as one module of PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from npad import devices, ops
from npad.features.backbone import Backbone, filled, whole_strides
from npad.learned import Learned, LearnedMember, tensors_of
from npad.members import Member
from npad.scoring.fusion import EUCLIDEAN, MAHALANOBIS, PREFIX, scores_and_maps
from npad.settings import Settings

__all__ = ["MemberScorer", "Scorer", "distances", "embeddings", "extent_of", "reduce"]

M = TypeVar("M", bound=nn.Module)


def embeddings(
    members: Sequence[Member], networks: Sequence[Backbone], levels: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Of each member, (B, h, w, D), from what ``levels`` of the networks gave."""
    found = []
    for m in members:
        network = networks[m.network]
        needed = m.levels_of(network)
        found.append(network.combined(levels[m.network], needed, own_grid=m.own_grid))
    return found


def reduce(x: Tensor, projection: Tensor | None) -> Tensor:
    """Embeddings (..., D) -> (..., C), where a fit has chosen axes."""
    if projection is None:
        return x
    with nullcontext() if torch.compiler.is_compiling() else devices.exact_products:
        return x @ projection


def distances(
    x: Tensor,
    mean: Tensor | None,
    factor: Tensor | None,
    centroids: Tensor | None,
    score_window: int,
    prefix: int | None = None,
    *,
    index: Tensor | None = None,
) -> dict[str, Tensor]:
    """The distances of embeddings that a member takes, each (N, h, w), by their names."""
    found = {}
    if mean is not None and factor is not None:
        grid = x.shape[1], x.shape[2]
        found[MAHALANOBIS] = ops.mahalanobis(x, mean, factor, grid, score_window, prefix)
        if prefix is not None:
            found[PREFIX], found[MAHALANOBIS] = found[MAHALANOBIS].unbind()
    if centroids is not None:
        known = x[..., :prefix].flatten(0, 2)
        distance, _ = ops.nearest_centroid(known, centroids, index)
        found[EUCLIDEAN] = distance.reshape(x.shape[:3])
    return found


def extent_of(
    networks: Sequence[Backbone], settings: Settings, learned: Learned | None = None
) -> tuple[int, int]:
    """Pixels (H, W) that the grids cover, of a fitted model or of one that is to be."""
    fills = learned is None or learned.filled
    return whole_strides(networks, settings.size) if fills else settings.size


class MemberScorer(nn.Module):
    """From embeddings to distances.

    The learned tensors are buffers under the names of `npad.learned.LearnedMember`.
    """

    projection: Tensor | None
    mean: Tensor | None
    factor: Tensor | None
    centroids: Tensor | None
    index: Tensor | None  # of the centroids

    def __init__(self, learned: LearnedMember, score_window: int) -> None:
        super().__init__()
        self.member = learned.member
        self.score_window = score_window
        for tensor in tensors_of(LearnedMember):
            self.register_buffer(tensor.name, getattr(learned, tensor.name))
        self.register_buffer("index", None, persistent=False)
        self._make_index()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Embeddings (B, h, w, D) as the backbone gives them -> the distances, by their names."""
        return distances(
            reduce(x, self.projection),
            self.mean,
            self.factor,
            self.centroids,
            self.score_window,
            self.member.prefix,
            index=self.index,
        )

    def _make_index(self) -> None:
        """Of the centroids that it has now; that of others would find wrong distances."""
        self.index = None if self.centroids is None else ops.centroid_index(self.centroids)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> MemberScorer:
        """Move; the index is then that of the device."""
        super()._apply(fn, recurse)
        self._make_index()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load into tensors of its own, as they may be in use elsewhere."""
        for tensor in tensors_of(LearnedMember):
            value = getattr(self, tensor.name)
            setattr(self, tensor.name, None if value is None else value.clone())
        super()._load_from_state_dict(*arguments)
        self._make_index()


class Modules(nn.ModuleList, Generic[M]):
    """A list of modules of one class, which PyTorch leaves untyped."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...


class Scorer(nn.Module):
    """From images to scores and anomaly maps: the backbones, and what a fit has learned.

    ``torch.export`` takes it with a dynamic batch.

    Parameters
    ----------
    networks : the backbones, which may be other models' too: moving the scorer moves copies of them
    learned : what the fit left
    settings : of the model
    """

    def __init__(self, networks: Sequence[Backbone], learned: Learned, settings: Settings) -> None:
        super().__init__()
        self.networks: Modules[Backbone] = Modules(networks)
        used = learned.used_by(settings).members
        self.members: Modules[MemberScorer] = Modules(
            MemberScorer(m, settings.score_window) for m in used
        )
        self.settings = settings
        self.standardization = learned.standardization
        self.extent = extent_of(networks, settings, learned)

    def filled(self, images: Tensor) -> Tensor:
        """Images as the networks take them, of the size `extent`."""
        return filled(images, self.extent)

    def levels(self, images: Tensor) -> list[list[Tensor]]:
        """Features of images at the levels of each network."""
        images = self.filled(images)
        return [network.levels(images) for network in self.networks]

    def embeddings(self, levels: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Of each member, (B, h, w, D)."""
        return embeddings([m.member for m in self.members], list(self.networks), levels)

    def score(self, embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings, for each member (B, h, w, D) -> scores (B,) and maps (B, H, W)."""
        found = [(m.member, m(x)) for m, x in zip(self.members, embeddings, strict=True)]
        return scores_and_maps(found, self.settings, self.standardization, self.extent)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) float32 in [0, 1] -> scores (B,) and maps (B, H, W), float32."""
        if torch.compiler.is_compiling():
            return self.score(self.embeddings(self.levels(images)))
        with devices.plain(images.device):
            return self.score(self.embeddings(self.levels(images)))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load: into networks of its own, as they may be in use elsewhere."""
        self.networks = copy.deepcopy(self.networks)
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Scorer:
        """Move: networks of its own, since those that it has may be in use elsewhere."""
        self.networks = copy.deepcopy(self.networks)
        super()._apply(fn, recurse)
        return self
