"""Counting: what is in memory at each moment of a fit and of a prediction.

What learned tensors weigh, `npad.learned.LearnedMember.expected` says; what a network holds while it
runs is counted on tensors without values (`Backbone.activation_bytes`). All else is the sizes of the
tensors that `npad.fitting` and `npad.scoring` make, in the order in which they make them. Who changes
that order changes it here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Final

import torch

from npad import devices
from npad.features.backbone import Backbone, n_parts
from npad.features.projection import STEP
from npad.features.tiling import Tiling, tiling_of
from npad.images.source import default_workers
from npad.learned import LearnedMember
from npad.member_fit import AXES_IMAGES, holds_out
from npad.members import Member, members_of
from npad.nominal_methods import METHODS
from npad.ops.packed import BLOCK, BLOCK_COLUMNS, packed_size, stored_size
from npad.ops.reference import centroid_index_dtype, centroid_index_size
from npad.plan.figures import MemberPlan, Phase, Plan
from npad.settings import MOST_FEATURES, Settings
from npad.statistics.choice import n_sampled
from npad.statistics.gaussian import CHUNK_BYTES
from npad.statistics.holdout import MAX_HELD_OUT
from npad.statistics.nominal_set import BANK_BYTES, BLOCK_BYTES

__all__ = ["planned"]

# A CPU's allocator keeps smaller pieces for later once they are let go of: glibc's largest
# M_MMAP_THRESHOLD. So what a phase has held of them stays with the process.
KEPT_BELOW: Final = 32 << 20
# What else the process takes once it works: threads, and the code that oneDNN writes. So much is there
# beside its weights, as measured, once a ResNet-18 is loaded.
RUNTIME: Final = 8 << 20
SQUARES_AT_ONCE: Final = 8  # (C, C) of float64, while axes are chosen


@dataclass(frozen=True)
class Part:
    """Bytes that are in memory during a phase; in pieces of one size, as they are asked for."""

    what: str
    n_bytes: int
    piece: int = 0
    of_reader: bool = False  # asked for by a thread that reads images: not used by others later


def planned(
    settings: Settings,
    networks: Sequence[Backbone],
    device: torch.device,
    *,
    n_images: int | None = None,
    source_size: tuple[int, int] | None = None,
    statistics: bool = False,
    held: int = 0,
    strips: bool = True,
) -> Plan:
    """Count what a fit of these settings and its model take.

    Parameters
    ----------
    settings : with the size of the images
    networks : the backbones, which may be hollow
    device : where the work is done
    n_images : images to fit; None: as many as fill everything that is bounded
    source_size : (height, width) of the images before they are resized, and of the maps; None: that
        of the settings
    statistics : whether the model keeps them
    held : bytes of all this that are there already
    strips : whether Gaussians may be fitted a strip at a time, where there is no room for all

    Raises
    ------
    ValueError
        A number of images or a size that may not be; settings that do not go together, or not with the
        networks.
    """
    _check(n_images, source_size)
    members = members_of(settings, networks)
    tiling = tiling_of(networks, settings)
    embeddings = [_embedding(member, networks[member.network], tiling) for member in members]
    if n_images is None:
        n_images = _filling(settings, members, embeddings)
    plans = tuple(
        _member_plan(settings, member, *embedding, n_images)
        for member, embedding in zip(members, embeddings, strict=True)
    )
    if source_size is not None:
        source_size = int(source_size[0]), int(source_size[1])
    size = source_size or settings.size
    work = _Work(settings, tuple(networks), device, n_images, size, plans, statistics)
    free = devices.free_bytes(device)
    free = None if free is None else free + held
    fit, n_strips = tuple(_resident(work.fit(), device)), 1
    if strips and settings.may_be_in_strips and not statistics and free is not None:
        while n_strips < tiling.most_strips and _peak(fit) > free:
            n_strips += 1
            fit = tuple(_resident(replace(work, n_strips=n_strips).fit_in_strips(), device))
    return Plan(
        settings,
        device,
        n_images,
        source_size,
        plans,
        work.backbone,
        fit,
        tuple(_resident(work.predict(), device)),
        free,
        statistics,
        n_strips,
    )


def _peak(phases: Sequence[Phase]) -> int:
    return max(phase.n_bytes for phase in phases)


def _check(n_images: Any, source_size: Any) -> None:
    if n_images is not None and not _is_count(n_images):
        raise ValueError(
            f"NPad.plan: n_images must be an int of at least 1, or None, got {n_images!r}"
        )
    match source_size:
        case None:
            return
        case (height, width) if _is_count(height) and _is_count(width):
            return
    raise ValueError(
        f"NPad.plan: source_size must be a positive (height, width), or None, got {source_size!r}"
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _embedding(member: Member, network: Backbone, tiling: Tiling) -> tuple[tuple[int, int], int]:
    """Grid and channels of a member."""
    levels = member.levels_of(network)
    grid = tiling.grid(network, levels[0] if member.own_grid else None)
    return grid, sum(network.level_channels[level] for level in levels)


def _filling(
    settings: Settings, members: Sequence[Member], embeddings: Sequence[tuple[tuple[int, int], int]]
) -> int:
    """Images that fill the bank, the places of those held out, and of those that choose axes."""
    share = settings.holdout
    enough = [AXES_IMAGES, round(MAX_HELD_OUT / share) if share else 1]
    for member, ((height, width), channels) in zip(members, embeddings, strict=True):
        if member.nominal_set:
            known = _reduced(settings, channels)
            enough.append(-(-BANK_BYTES // (4 * known * height * width)) + MAX_HELD_OUT)
    return max(enough)


def _reduced(settings: Settings, channels: int) -> int:
    """Dimensions of which something is learned, before any axes at the end."""
    return min(settings.fixed_features or channels, channels)


def _held_out(settings: Settings, member: Member, n_images: int) -> int:
    """Images that a member is expected to hold out."""
    if settings.holdout == 0 or not holds_out(settings, member):
        return 0
    return min(MAX_HELD_OUT, n_images, max(1, round(settings.holdout * n_images)))


def _member_plan(
    settings: Settings, member: Member, grid: tuple[int, int], channels: int, n_images: int
) -> MemberPlan:
    positions = grid[0] * grid[1]
    fitted = _reduced(settings, channels)
    n_embeddings = n_images * positions
    wanted = settings.n_centroids
    asked = int(wanted) if wanted >= 1 else max(1, round(wanted * n_embeddings))
    n_centroids = min(asked, n_embeddings) if member.nominal_set else 0

    def learned(n_features: int | None) -> dict[str, int]:
        known = LearnedMember(member, channels, grid, 0.0, 1, n_features)
        expected = known.expected(settings, n_centroids).items()
        return {name: shape.numel() * dtype.itemsize for name, dtype, shape in _shapes(expected)}

    reduces = settings.reduces_gaussians and not member.nominal_set
    options: list[int | None] = [None if fitted == channels else fitted]
    if reduces:  # as `npad.features.projection.leading_axes` chooses
        options = list(range(STEP, min(MOST_FEATURES, channels - STEP) + 1, STEP))
        options += [None] if channels < MOST_FEATURES + STEP else []
    n_features = max(options, key=lambda n: sum(learned(n).values()))
    scatter = positions * packed_size(fitted)
    known_to_set = member.prefix or fitted
    room = max(1, BANK_BYTES // (4 * known_to_set))
    return MemberPlan(
        member,
        grid,
        channels,
        n_features,
        n_centroids,
        statistics=8 * positions + 4 * (positions * fitted + scatter) if member.gaussian else 0,
        held_out=_held_out(settings, member, n_images) * 4 * positions * fitted,
        bank=4 * known_to_set * min(n_embeddings, room) if member.nominal_set else 0,
        learned=learned(n_features),
    )


def _shapes(expected: Any) -> Iterator[tuple[str, torch.dtype, torch.Size]]:
    for name, (dtype, shape) in expected:
        yield name, dtype, torch.Size(shape)


Moment = tuple[str, list[Part]]


def _resident(moments: Sequence[Moment], device: torch.device) -> Iterator[Phase]:
    """Phases; a CPU's process keeps what it has had in small pieces."""
    kept = [0, 0]
    for name, parts in moments:
        n_bytes = sum(part.n_bytes for part in parts)
        if device.type == "cpu":
            for i in range(len(kept)):
                small = sum(p.n_bytes for p in parts if p.of_reader == i and p.piece < KEPT_BELOW)
                kept[i] = max(kept[i], small)
                n_bytes += kept[i] - small
        named: dict[str, int] = {}
        for part in parts:
            named[part.what] = named.get(part.what, 0) + part.n_bytes
        yield Phase(name, named, n_bytes)


@dataclass(frozen=True)
class _Work:
    """The order of the work, and what each of its moments has in memory."""

    settings: Settings
    networks: tuple[Backbone, ...]
    device: torch.device
    n_images: int
    source_size: tuple[int, int]
    members: tuple[MemberPlan, ...]
    keeps_statistics: bool
    n_strips: int = 1

    @property
    def backbone(self) -> int:
        return sum(network.nbytes for network in self.networks)

    @property
    def _batch(self) -> int:
        return min(self.settings.images_at_once, self.n_images)

    @cached_property
    def _tiling(self) -> Tiling:
        return tiling_of(self.networks, self.settings)

    @property
    def _base(self) -> list[Part]:
        runtime = [Part("libraries at work", RUNTIME)] if self.device.type == "cpu" else []
        return [Part("backbone", self.backbone), *runtime]

    # ----------------------------------------------------------------------------------------------
    # A batch, up to its embeddings.

    def _images(self) -> Iterator[Moment]:
        """A batch is decoded, and lies there; on a CPU."""
        if self.device.type != "cpu":
            return
        height, width = self.settings.size
        one, workers = 12 * height * width, default_workers()
        ahead = min(self._batch + workers, self.n_images)
        decoded = 0
        if self.source_size != self.settings.size:
            # Pillow has four bytes for a colour; what it resizes first is as wide as the result.
            decoded = workers * 4 * self.source_size[0] * (self.source_size[1] + width)
        yield (
            "a batch is decoded",
            [
                Part("images decoded ahead", (ahead + self._batch) * one, one, True),
                Part("batch of images", self._batch * one, self._batch * one),
                Part("images being decoded", decoded, decoded // workers, True),
            ],
        )

    def _embedded(self) -> Iterator[Moment]:
        """A batch goes through the networks."""
        height, width = self.settings.size
        extent, tile = self._tiling.extent, self._tiling.tile
        batch, one = self._batch, 12 * height * width
        images = [Part("batch of images", batch * one, batch * one)]
        if self.device.type == "cpu":
            ahead = min(batch + default_workers(), self.n_images)
            images.append(Part("images decoded ahead", ahead * one, one, True))
        if extent != self.settings.size:
            whole = 12 * batch * extent[0] * extent[1]
            images.append(Part("images filled up", whole, whole))
        seen = self._seen
        if not self._tiling.is_whole:
            tiles = 12 * seen * tile[0] * tile[1]
            images.append(Part("tiles", tiles, tiles))
        levels: list[Part] = []
        for network in self.networks:
            n = n_parts(seen, tile, self.device)
            at_once = -(-seen // n)
            peak, sizes = network.activation_bytes(at_once, tile)
            before = Part("features", (seen - at_once) * sum(sizes) // at_once, max(sizes))
            yield "the backbone runs", [*images, *levels, before, Part("activations", peak)]
            own = [
                Part("features", size * seen // at_once, size * seen // at_once) for size in sizes
            ]
            if n > 1:
                parts = [Part("features", size * seen // at_once, size) for size in sizes]
                yield "parts of a batch are joined", [*images, *levels, *own, *parts]
            levels += own
        yield "features become embeddings", [*images, *levels, *self._of_tiles()]

    @property
    def _seen(self) -> int:
        """Images, or tiles of them, that the networks see at once."""
        return self._batch if self._tiling.is_whole else self._tiling.at_a_time(self._batch)

    @property
    def _tile_share(self) -> float:
        """Of an image."""
        return math.prod(self._tiling.tile) / math.prod(self._tiling.extent)

    def _of_tiles(self) -> list[Part]:
        """The embeddings of what the networks see at once."""
        sizes = [int(self._seen * self._tile_share * m.embedding) for m in self.members]
        return [Part("embeddings", size, size) for size in sizes]

    def _embeddings(self) -> list[Part]:
        """Those of a batch."""
        sizes = [self._batch * member.embedding for member in self.members]
        return [Part("embeddings", size, size) for size in sizes]

    def _stitched(self, share: float = 1.0) -> list[Part]:
        """Those of a batch, or of a strip of it, while its tiles are seen."""
        if self._tiling.is_whole:
            return []
        sizes = [int(share * part.n_bytes) for part in self._embeddings()]
        return [Part("embeddings", size, size) for size in sizes]

    # ----------------------------------------------------------------------------------------------
    # Fitting.

    def fit(self) -> list[Moment]:
        """The moments of a fit, in order."""
        base = [*self._base]
        found: list[Moment] = []

        def add(moments: Iterator[Moment], more: Sequence[Part]) -> None:
            found.extend((name, [*base, *more, *parts]) for name, parts in moments)

        add(self._looked_at(), [])
        folds = self._folds()
        add(self._gathered(), [*folds, *self._learning(self.members)])
        model: list[Part] = []
        for i, member in enumerate(self.members):
            left = self.members if self.keeps_statistics else self.members[i:]
            banks = [m for m in self.members[: i + 1] if m.bank]  # of those before are centroids
            rest = [*folds, *model, *self._learning(left, without_bank=banks)]
            if self.keeps_statistics:
                rest += self._statistics([member])  # a copy, which takes the images held out
            own = self._bank(member)
            add(self._chosen(member), [*rest, *own])
            if not self.keeps_statistics:
                rest.remove(self._held_out(member))
            add(self._returned(member), [*rest, *own])
            add(self._finalized(member), rest)
            model += self._model(member)
        kept = [*folds, *model]
        if self.keeps_statistics:
            kept += self._learning(self.members, without_bank=self.members)
        found.append(("the model is there", [*base, *kept]))
        add(self._scored_by_folds(model), kept)
        return found

    def _batches(self) -> Iterator[Moment]:
        """A batch, from its files to its embeddings."""
        yield from self._images()
        for name, parts in self._embedded():
            yield name, [*self._stitched(), *parts]

    def _looked_at(self) -> Iterator[Moment]:
        """A sample chooses axes, where they are chosen before."""
        if self.settings.chooses_axes:
            moments = [4 * packed_size(member.channels) for member in self.members]
            for name, parts in self._batches():
                yield name, [Part("choice of axes", sum(moments), max(moments)), *parts]

    def _gathered(self) -> Iterator[Moment]:
        """Batches come, and are taken in."""
        yield from self._batches()
        yield from self._taken()
        yield from self._composed()

    def fit_in_strips(self) -> list[Moment]:
        """As `fit`, of `npad.strip_fit`."""
        base = [*self._base]
        found: list[Moment] = []

        def add(moments: Iterator[Moment], more: Sequence[Part]) -> None:
            found.extend((name, [*base, *more, *parts]) for name, parts in moments)

        gaussians = [member for member in self.members if member.member.gaussian]
        sets = [member for member in self.members if member.bank]
        add(self._looked_at(), [])
        overview = [self._overview(member) for member in gaussians]
        add(self._gathered(), [*overview, *(part for one in sets for part in self._bank(one))])
        kept: list[Part] = []
        for i, member in enumerate(sets):
            banks = [part for other in sets[i + 1 :] for part in self._bank(other)]
            chosen = self._centroids_of(member, member.bank)
            found.append(("centroids are chosen", [*base, *overview, *kept, *banks, *chosen]))
            kept.append(chosen[-1])
        squares = [SQUARES_AT_ONCE * 8 * member.channels**2 for member in gaussians]
        choice = Part("choice of axes", max(squares), max(squares) // SQUARES_AT_ONCE)
        found.append(("axes are chosen", [*base, *overview, *kept, choice]))
        add(self._batches(), [*kept, *map(self._patches, gaussians)])
        done = 0.0
        for share in self._strip_shares():
            learning = [self._strip(member, share) for member in gaussians]
            model = [part for m in gaussians for part in self._done(m, done)]
            if not done:
                add(self._images(), [*kept, *model, *learning])
            add(self._embedded(), [*kept, *model, *learning, *self._stitched(share)])
            for i, member in enumerate(gaussians):  # whose statistics go when it is done
                model = [part for m in gaussians[:i] for part in self._done(m, done + share)]
                model += [part for m in gaussians[i + 1 :] for part in self._done(m, done)]
                own = [*self._done(member, done + share), *self._done(member, share, of_strip=True)]
                parts = [*kept, *model, *learning[i:], *own, self._chunk(member)]
                found.append(("covariances are factored", [*base, *parts]))
            done += share
        return found

    def _strip_shares(self) -> list[float]:
        """Of the grid."""
        axis = self._tiling.long_axis
        strips = self._tiling.strips(self.n_strips)
        lengths = (cores[-1].last[axis] - cores[0].first[axis] for cores in strips)
        return [length / self._tiling.extent[axis] for length in lengths]

    def _done(self, member: MemberPlan, share: float, *, of_strip: bool = False) -> list[Part]:
        """Gaussians that are written: what a CPU is asked for is there once it is."""
        if self.device.type != "cpu" and not of_strip:
            share = 1.0
        what = "Gaussians of a strip" if of_strip else "model"
        sizes = [int(share * part.n_bytes) for part in self._model(member, centroids=False)]
        return [Part(what, size, size) for size in sizes]

    def _overview(self, member: MemberPlan) -> Part:
        """Means and variances of positions, and moments of all embeddings."""
        channels = _reduced(self.settings, member.channels)
        means = member.positions * (4 * channels + 8)
        return Part("means of all positions", means + 8 * packed_size(channels), means)

    def _patches(self, member: MemberPlan) -> Part:
        """Statistics of the windows of a sample."""
        dimensions = member.n_features or member.channels
        n = n_sampled(dimensions) * max(self.settings.windows) ** 2
        size = 4 * n * packed_size(dimensions)
        return Part("statistics of a sample", size, size)

    def _strip(self, member: MemberPlan, share: float) -> Part:
        """Statistics of a strip, and of the rows of the one before that its windows reach."""
        dimensions, side = member.n_features or member.channels, min(member.grid)
        n = int(share * member.positions) + 2 * (max(self.settings.windows) // 2) * side
        size = 4 * n * (packed_size(dimensions) + dimensions)
        return Part("statistics of a strip", size, size)

    def _learning(
        self, members: Sequence[MemberPlan], without_bank: Sequence[MemberPlan] = ()
    ) -> list[Part]:
        """What a fit has gathered of members."""
        found = [*self._statistics(members), *map(self._held_out, members)]
        for member in members:
            found += [] if member in without_bank else self._bank(member)
        return found

    def _folds(self) -> list[Part]:
        """Each has statistics of its own; all of them see what the whole fit sees."""
        n = self.settings.calibration_folds or 0
        statistics = self._statistics(self.members) * n
        return [*statistics, *self._learning(self.members)[len(statistics) // n :]] if n else []

    def _scored_by_folds(self, model: Sequence[Part]) -> Iterator[Moment]:
        """The folds but one are merged, and a model made of them."""
        if self.settings.calibration_folds is not None:
            chunks = [self._chunk(m) for m in self.members if m.member.gaussian]
            largest = sorted(chunks, key=lambda chunk: chunk.n_bytes)[-1:]
            yield "a fold is scored", [*self._statistics(self.members), *model, *largest]

    def _statistics(self, members: Sequence[MemberPlan]) -> list[Part]:
        """Each tensor by itself: it is asked for at once."""
        found = []
        for member in members:
            if member.statistics:
                fitted = _reduced(self.settings, member.channels)
                scatter = 4 * member.positions * packed_size(fitted)
                found.append(Part("statistics", scatter, scatter))
                found.append(Part("statistics", member.statistics - scatter))
        return found

    def _held_out(self, member: MemberPlan) -> Part:
        n = _held_out(self.settings, member.member, self.n_images)
        return Part("images held out", member.held_out, member.held_out // max(1, n))

    def _bank(self, member: MemberPlan) -> list[Part]:
        if not member.bank:
            return []
        blocks = -(-member.bank // BLOCK_BYTES) * BLOCK_BYTES
        touched = member.bank if self.device.type == "cpu" else blocks
        return [Part("bank of embeddings", touched, BLOCK_BYTES)]

    def _taken(self) -> Iterator[Moment]:
        """Embeddings are reduced, and those that are not held out copied."""
        for member in self.members:
            size = self._batch * 4 * member.positions * _reduced(self.settings, member.channels)
            copies = 2 if self._reduces(member) else 1
            taken = [Part("embeddings to fit", copies * size, size)]
            if member.bank:
                taken += [self._prefix(member), self._sum(size)]
            yield "embeddings are fitted", [*self._embeddings(), *taken]

    def _prefix(self, member: MemberPlan) -> Part:
        """The channels of a batch that the nominal set knows, where it knows a part."""
        size = 4 * self._batch * member.positions * (member.member.prefix or 0)
        return Part("embeddings of the nominal set", size, size)

    def _sum(self, size: int) -> Part:
        """Of embeddings for the nominal set, to see that they are finite; a CPU copies them."""
        copy = 2 * size if self.device.type == "cpu" else 0
        return Part("sum in float64", copy, copy)

    def _reduces(self, member: MemberPlan) -> bool:
        return _reduced(self.settings, member.channels) < member.channels

    def _composed(self) -> Iterator[Moment]:
        """Of a bank that is full the centroids are taken, and of those of several such."""
        for member in self.members:
            row = 4 * (member.member.prefix or _reduced(self.settings, member.channels))
            if member.bank and member.bank < self.n_images * member.positions * row:
                yield "the bank is composed", self._centroids_of(member, member.bank)[1:]

    def _centroids_of(self, member: MemberPlan, points: int) -> list[Part]:
        """Centroids are chosen of points, given in bytes."""
        row = 4 * (member.member.prefix or _reduced(self.settings, member.channels))
        method = METHODS[str(self.settings.nominal_set)]
        working = method.working_bytes(points // row, member.n_centroids, row // 4)
        joined = BLOCK_BYTES if points > BLOCK_BYTES else 0  # the last block to be copied
        centroids = member.learned["centroids"]
        return [
            Part("bank of embeddings", points, points),
            Part("choice of centroids", max(joined, working), max(joined, working)),
            Part("centroids", centroids, centroids),
        ]

    def _chosen(self, member: MemberPlan) -> Iterator[Moment]:
        """Window and eps are chosen on the images held out, which are then fitted."""
        if not member.held_out:
            return
        parts = [Part("copy of those held out", member.held_out, member.held_out)]
        if member.member.gaussian:
            dimensions = member.n_features or member.channels
            reduced = member.held_out * dimensions // _reduced(self.settings, member.channels)
            n = min(n_sampled(dimensions), member.positions)
            sample = 4 * n * dimensions**2
            yield "axes are chosen", [*parts, *self._axes(member)]
            parts += [
                Part("reduced copy of those held out", reduced, reduced),
                Part("sample of covariances", 4 * sample, sample),
            ]
        yield "window and eps are chosen", parts
        if self.settings.fusion == "sum":
            yield "distances are standardised", self._measured(member)

    def _measured(self, member: MemberPlan) -> list[Part]:
        """A model is made, for its distances of the images held out, and let go of."""
        parts = [
            Part("copy of those held out", member.held_out, member.held_out),
            Part("model", member.model, member.model),
        ]
        if member.member.gaussian:
            parts.append(self._chunk(member))
        if member.bank:  # which is there already
            parts += self._centroids_of(member, member.bank)[1:]
        return parts

    def _returned(self, member: MemberPlan) -> Iterator[Moment]:
        """Those held out are fitted."""
        size = member.held_out
        if size:
            parts = [Part("copy of those held out", size, size)]
            if member.bank and self.settings.fusion == "sum":  # else it has them already
                parts.append(self._sum(size))
            yield "those held out are fitted", parts

    def _axes(self, member: MemberPlan) -> list[Part]:
        """Principal axes of all embeddings of a member, in float64."""
        if not (self.settings.reduces_gaussians and not member.member.nominal_set):
            return []
        square, means = 8 * member.channels**2, 8 * member.positions * member.channels
        scatter = 8 * packed_size(member.channels)
        summed = min(member.positions, max(1, CHUNK_BYTES // scatter)) * scatter
        return [
            Part("choice of axes", SQUARES_AT_ONCE * square, square),
            Part("choice of axes", 3 * means, means),
            Part("choice of axes", summed, summed),
        ]

    def _finalized(self, member: MemberPlan) -> Iterator[Moment]:
        """Covariances are factored, and centroids chosen."""
        if member.member.gaussian:
            bank = self._bank(member)
            yield "axes are chosen", [*bank, *self._axes(member)]
            model = self._model(member, centroids=False)
            yield "covariances are factored", [*bank, *model, self._chunk(member)]
        if member.bank:
            model = self._model(member, centroids=False)
            yield "centroids are chosen", [*model, *self._centroids_of(member, member.bank)]

    def _model(self, member: MemberPlan, *, centroids: bool = True) -> list[Part]:
        sizes = member.learned.items()
        return [Part("model", n, n) for name, n in sizes if centroids or name != "centroids"]

    def _chunk(self, member: MemberPlan) -> Part:
        """Of a GPU the least: it takes a share of what is free."""
        channels = _reduced(self.settings, member.channels)
        kept = member.n_features or channels
        at_once = max(torch.get_num_threads(), CHUNK_BYTES // (4 * channels**2))
        n = min(at_once, member.positions)
        covariance = 4 * (channels**2 + (channels * kept + kept**2 if kept < channels else 0))
        factor = 4 * (kept**2 + packed_size(kept)) + self._storing(kept)
        return Part("covariances at work", n * max(covariance, factor), 4 * n * channels**2)

    def _storing(self, channels: int) -> int:
        """Of a packed factor as it is stored, and what `npad.ops.packed.store` takes for it."""
        dtype = getattr(torch, self.settings.factor_dtype)
        stored = stored_size(channels, dtype) * dtype.itemsize
        of_panel = 4 * BLOCK * -(-channels // BLOCK_COLUMNS)
        return stored + (2 * of_panel if dtype == torch.int8 else 0)

    # ----------------------------------------------------------------------------------------------
    # Predicting.

    def predict(self) -> list[Moment]:
        """The moments of a batch, once the model is there."""
        base = [*self._base]
        for member in self.members:
            base += [Part("model", n, n) for n in member.learned.values()]
            base += self._index(member)
        found = [(name, [*base, *parts]) for name, parts in self._images()]
        maps = self._maps()
        for name, parts in self._embedded():
            found.append((name, [*base, maps[0], *parts]))
        last = found[-1][1]
        share = self._tile_share
        for member in self.members:
            if not self._tiling.is_whole and member.member.gaussian:
                learned = (member.learned[name] for name in ("mean", "factor"))
                of_tile = [Part("Gaussians of a tile", int(share * n)) for n in learned]
                found.append(("a tile is compared", [*last, *of_tile]))
            if member.n_features is not None:
                size = int(self._batch * share * 4 * member.positions * member.n_features)
                found.append(("embeddings are reduced", [*last, Part("embeddings", size, size)]))
            if member.bank:
                found.append(("centroids are searched", [*last, self._prefix(member)]))
        found.append(("maps are made", [*last, *maps[1:]]))
        return found

    def _index(self, member: MemberPlan) -> list[Part]:
        if not member.n_centroids:
            return []
        dtype = centroid_index_dtype(self.device)
        channels = member.learned["centroids"] // (4 * member.n_centroids)
        size = centroid_index_size(member.n_centroids, channels, dtype) * dtype.itemsize
        return [Part("index of the centroids", size, size)]

    def _maps(self) -> list[Part]:
        """Those that the caller has still, those of this batch, and both at the model's size."""
        height, width = self._tiling.extent
        own = 4 * self._batch * height * width
        asked = 4 * self._batch * self.source_size[0] * self.source_size[1]
        return [
            Part("maps of the batch before", asked, asked),
            Part("maps", 2 * own, own),
            Part("maps", asked if self.source_size != self.settings.size else 0, asked),
        ]
