"""What a fitted model does with a batch of images, as one module of PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from npad import devices, ops
from npad.features.backbone import Backbone, filled
from npad.features.tiling import Core, tiling_of
from npad.learned import Learned, LearnedMember, tensors_of
from npad.members import Member
from npad.scoring.fusion import EUCLIDEAN, MAHALANOBIS, PREFIX, scores_and_maps
from npad.scoring.looking import Looking
from npad.settings import Settings

__all__ = ["MemberScorer", "Scorer", "distances", "embeddings", "reduce"]

M = TypeVar("M", bound=nn.Module)
Found = list[tuple[Member, dict[str, Tensor]]]
Levels = Callable[[Backbone, Tensor], list[Tensor]]


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
        self.grid = learned.grid
        self.score_window = score_window
        for tensor in tensors_of(LearnedMember):
            self.register_buffer(tensor.name, getattr(learned, tensor.name))
        self.register_buffer("index", None, persistent=False)
        self._make_index()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Embeddings (B, h, w, D) as the backbone gives them -> the distances, by their names."""
        return self._distances(reduce(x, self.projection), self.mean, self.factor)

    def of_core(self, x: Tensor, core: Core, stride: tuple[int, int]) -> dict[str, Tensor]:
        """As `forward`, of the embeddings of a core alone.

        Parameters
        ----------
        x : (B, h, w, D)
        core : where they are
        stride : pixels (height, width) of a position
        """
        rows, columns = core.on_grid(stride)
        around = core.on_grid(stride, margin=self.score_window // 2)
        (top, bottom), (left, right) = (
            (inner.start - outer.start, min(outer.stop, side) - inner.stop)
            for inner, outer, side in zip((rows, columns), around, self.grid, strict=True)
        )
        # What stands beside the core are no embeddings: there the Gaussians alone are wanted.
        padded = F.pad(reduce(x, self.projection), (0, 0, left, right, top, bottom))
        mean, factor = (
            None if of_all is None else of_all.unflatten(0, self.grid)[around].flatten(0, 1)
            for of_all in (self.mean, self.factor)
        )
        found = self._distances(padded, mean, factor)
        height, width = x.shape[1:3]
        return {kind: d[:, top : top + height, left : left + width] for kind, d in found.items()}

    def _distances(
        self, x: Tensor, mean: Tensor | None, factor: Tensor | None
    ) -> dict[str, Tensor]:
        """Of reduced embeddings, to these Gaussians and to the nominal set."""
        known = self.score_window, self.member.prefix
        return distances(x, mean, factor, self.centroids, *known, index=self.index)

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

    ``torch.export`` takes it with a dynamic batch. The region of interest is a part of it.

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
        self.tiling = tiling_of(networks, settings, learned)
        self.extent = self.tiling.extent
        self.looking: Looking | None = None
        if learned.roi is not None and learned.roi_color is not None:
            grids = (m.grid for m in used)
            self.looking = Looking(learned.roi, learned.roi_color, grids, self.extent)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W), blank outside of regions, and the own regions of those with such."""
        return (images, None) if self.looking is None else self.looking(images)

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

    def distances(self, images: Tensor, levels: Levels = Backbone.levels) -> Found:
        """Images of the size `extent` -> distances of each member, on its grid.

        ``levels`` has a network look at images, or at tiles of them.
        """

        def embed(images: Tensor) -> list[Tensor]:
            return self.embeddings([levels(network, images) for network in self.networks])

        if self.tiling.is_whole:
            return self._distances(embed(images))
        whole: list[dict[str, Tensor]] = [{} for _ in self.members]
        for core, parts in self.tiling.embedded(images, embed):
            for member, x, of_member in zip(self.members, parts, whole, strict=True):
                stride = self.tiling.stride_of(member.grid)
                rows, columns = core.on_grid(stride)
                for kind, d in member.of_core(x, core, stride).items():
                    if kind not in of_member:
                        of_member[kind] = d.new_empty(len(d), *member.grid)
                    of_member[kind][:, rows, columns] = d
        return [(m.member, d) for m, d in zip(self.members, whole, strict=True)]

    def _distances(self, embeddings: Sequence[Tensor]) -> Found:
        return [(m.member, m(x)) for m, x in zip(self.members, embeddings, strict=True)]

    def score(
        self, embeddings: Sequence[Tensor], own: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings, for each member (B, h, w, D) -> scores (B,) and maps (B, H, W), NaN outside.

        ``own`` is what `look` gave beside the images.
        """
        return self.fused(self._distances(embeddings), own)

    def fused(self, found: Found, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `score` gives, of distances."""
        common = self.settings, self.standardization, self.extent
        if self.looking is None:
            return scores_and_maps(found, *common)
        whole = [
            (member, {kind: self.looking.spread(d, own) for kind, d in distances.items()})
            for member, distances in found
        ]
        inside = self.looking.inside(own)
        return scores_and_maps(whole, *common, inside)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) float32 in [0, 1] -> scores (B,) and maps (B, H, W), float32.

        Where the model has a region, also (B, 4, H, W): the fourth channel is 1 inside the image's own
        region and 0 outside.
        """
        with nullcontext() if torch.compiler.is_compiling() else devices.plain(images.device):
            images, own = self.look(images)
            return self.fused(self.distances(self.filled(images)), own)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load: into networks of its own, as they may be in use elsewhere."""
        self.networks = copy.deepcopy(self.networks)
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Scorer:
        """Move: networks of its own, since those that it has may be in use elsewhere."""
        self.networks = copy.deepcopy(self.networks)
        super()._apply(fn, recurse)
        return self
