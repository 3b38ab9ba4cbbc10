"""From images to a grid of embeddings: a frozen timm network, or the filter bank."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from npad import devices, ops
from npad.features import timm_models
from npad.features.batch_norm import fold_batch_norm
from npad.features.defaults import (
    REFUSALS,
    default_layers,
    default_map_layers,
    likely_sizes,
    size_that_works,
)
from npad.features.filter_bank import N_LEVELS, FilterBank
from npad.features.live_bytes import LiveBytes
from npad.features.weights import BackboneError, load_weights, weights_hash

__all__ = [
    "Backbone",
    "BackboneError",
    "filled",
    "levels_in_parts",
    "n_parts",
    "shared_backbone",
    "whole_strides",
]

_FILTER_BANK_LAYERS: Final = (1, 2, 3)  # fine scales decide on texture: measured, see the docs
# On a CPU a larger batch goes through the network in parts: an activation of more than 32 MB would be
# memory that the system hands out, and clears, anew for every layer of every batch. As measured on two
# cores with images of 256 x 256.
_PIXELS_AT_ONCE: Final = 4 * 256**2
_LARGE: Final = (1024, 1024)  # an image in which it shows how far a network looks
_IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Backbone(nn.Module):
    """Frozen network from images to embeddings on one grid.

    Each chosen layer is averaged over a 3 x 3 patch at its own resolution, brought to the grid of
    the first chosen layer and concatenated. The patch is always divided by 9, zeros around the
    border counted: dividing by the pixels inside gives the border a larger spread than the rest,
    and its false alarms then decide the image score.

    Parameters
    ----------
    name : any timm model with ``features_only``, or ``"filterbank"``, which needs no download.
    layers : levels of the network (timm's ``out_indices``). Default: those of
        `npad.features.defaults`; levels 1, 2 and 3 of the filter bank.
    map_layers : levels that are also wanted; None: those of `npad.features.defaults`.
    weights : a safetensors file, or a torch file (read with ``weights_only=True``), that holds a
        timm checkpoint of the whole model or a state dict of its ``features_only`` form, by itself
        or as a part of something larger. Default: for ``"tf_efficientnet_lite0"`` those of the extra
        ``npad[offline]`` where it is installed; else timm's own pre-trained weights, from its cache
        or downloaded.
    dtype : float32, float16 or bfloat16: in which the network computes. The filter bank, whose
        variances float16 would not hold, stays in float32.
    compile : run the network through ``torch.compile``, which compiles at the first batch of each
        size.
    hollow : make it without values, on the meta device: weights are neither looked for nor read, and
        nothing but shapes and sizes can be asked of it.

    Attributes
    ----------
    name, layers, map_layers : as chosen; layers in increasing order.
    channels : channels of the embedding, all of ``layers`` together.
    level_channels : channels of each level that `levels` gives, by its number.
    weights_hash : SHA-256 in hex over name, dtype, shape and bytes of all weights in use, as they
        were loaded; it does not depend on the file they came from.

    Raises
    ------
    BackboneError
        An unknown name, no download, or weights that do not fit.
    ValueError
        Layers that the network does not have; weights for the filter bank.

    Notes
    -----
    Batch normalisations are folded into the convolutions before them (see `fold_batch_norm`).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        layers: Sequence[int] | None = None,
        weights: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,  # noqa: A002
        map_layers: Sequence[int] | None = (),
        *,
        hollow: bool = False,
    ) -> None:
        super().__init__()
        with devices.plain(torch.device("cpu")):
            self._build(name, layers, map_layers, weights, dtype, hollow)
        if hollow:
            self.to("meta")
        self._compiles = compile
        self._compile_features()

    def _build(
        self,
        name: str,
        layers: Sequence[int] | None,
        map_layers: Sequence[int] | None,
        weights: str | Path | None,
        dtype: torch.dtype,
        hollow: bool,
    ) -> None:
        self.name = name
        self.net: nn.Module
        if name == "filterbank":
            if weights is not None:
                raise ValueError("weights: the filter bank is fixed and takes none")
            levels = [2 ** (level + 1) for level in range(N_LEVELS + 1)]
            chosen = _FILTER_BANK_LAYERS if layers is None else layers
            self._choose(chosen, map_layers, levels, first=1)
            bank = FilterBank(self._taken)
            self.net, self._reductions = bank, bank.reductions
            channels = [bank.n_channels] * len(self._taken)
            self._takes_any_size = True
            self._likely_sizes = likely_sizes()
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
            dtype = torch.float32
        else:
            outline = timm_models.outline(name)
            reductions, config = outline.reductions, outline.config
            chosen = default_layers(reductions) if layers is None else layers
            self._choose(chosen, map_layers, reductions)
            self._takes_any_size = (
                len(set(reductions)) > 1
            )  # a transformer of one grid says what it takes
            self._likely_sizes = likely_sizes(reductions, outline.width, config)
            file = None
            if not hollow:
                file = timm_models.installed(name) if weights is None else Path(weights)
            download = file is None and not hollow
            net = timm_models.features(name, config, self._taken, pretrained=download)
            if file is not None:
                load_weights(net, name, file, lambda: timm_models.whole_model_keys(name))
            self.net, self._reductions = net, net.feature_info.reduction()
            channels = net.feature_info.channels()
            mean, std = config.get("mean", _IMAGENET[0]), config.get("std", _IMAGENET[1])
        self.level_channels = dict(zip(self._taken, map(int, channels), strict=True))
        self.channels = sum(self.level_channels[level] for level in self.layers)
        self._channels_last_output = timm_models.is_channels_last(self.net)
        # Not persistent: they belong to the name, not to the weights.
        self.register_buffer("mean", _of_channels(mean), persistent=False)
        self.register_buffer("std", _of_channels(std), persistent=False)
        self._grids: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
        self._activations: dict[tuple[int, tuple[int, int]], tuple[int, list[int]]] = {}
        self._reaches: dict[tuple[int, int], int | None] = {}
        self.weights_hash = "" if hollow else weights_hash(self.net.state_dict())
        self.requires_grad_(False)
        self.eval()
        fold_batch_norm(self.net)
        self.net.to(dtype).to(memory_format=torch.channels_last)
        self.dtype = dtype

    def _choose(
        self,
        layers: Sequence[int],
        map_layers: Sequence[int] | None,
        reductions: Sequence[int],
        first: int = 0,
    ) -> None:
        """Check the levels that are wanted, and what of the network is needed for them."""
        self.layers = _checked("layers", self.name, layers, reductions, first)
        if map_layers is None:
            map_layers = default_map_layers(self.layers, reductions, first)
        chosen = map_layers or self.layers
        self.map_layers = _checked("map_layers", self.name, chosen, reductions, first)
        self._taken = tuple(sorted({*self.layers, *self.map_layers}))

    def _compile_features(self) -> None:
        # A function, not a module: that would be a second entry for the same weights.
        self._compiled = torch.compile(self._features, dynamic=False) if self._compiles else None

    def __getstate__(self) -> dict[str, Any]:
        """All but the compiled function, which goes on running the network that it was made of."""
        return {**vars(self), "_compiled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile_features()

    @property
    def identity(self) -> dict[str, Any]:
        """What a model must find again: name, layers and weights_hash, as JSON types."""
        return {
            "name": self.name,
            "layers": list(self.layers),
            "weights_hash": self.weights_hash,
        }

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the backbone is frozen."""
        return super().train(False)

    @property
    def stride(self) -> int:
        """Pixels, up to a multiple of which a side of an image is filled."""
        return self.cell if self._takes_any_size else 1

    @property
    def cell(self) -> int:
        """Pixels along a side of which every level makes whole positions."""
        return math.lcm(*map(int, self._reductions))

    @property
    def default_size(self) -> tuple[int, int]:
        """Size (H, W) of images where none is chosen: see `npad.features.defaults`."""
        return size_that_works(self._likely_sizes, self.grid)

    def grid(
        self,
        image_size: tuple[int, int],
        own_of: int | None = None,
        *,
        before: tuple[int, int] | None = None,
        argument: str = "image_size",
    ) -> tuple[int, int]:
        """Grid (h, w) of the embeddings of images of this size (H, W).

        That of the first of ``layers``; or a level's own, where it is coarser. ``before`` is their size
        before they are filled up to whole strides, which an error names, as it does the argument.

        Raises
        ------
        ValueError
            Images smaller than the stride of the deepest layer, a grid smaller than 2 x 2, or a size
            that the network does not take.
        """
        if image_size not in self._grids:
            self._grids[image_size] = self._dry_grids(image_size, before or image_size, argument)
        return self._grid_of(self._grids[image_size], own_of)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of a batch, in one piece (see `levels_in_parts`).

        Parameters
        ----------
        images : (B, 3, H, W) float32 in [0, 1]; the network's own mean and standard deviation are
            applied here.

        Returns
        -------
        (B, h, w, C) float32, contiguous, of ``layers``; (h, w) is ``grid((H, W))`` and C is
        ``channels``.

        Raises
        ------
        TypeError
            Another dtype.
        ValueError
            Another shape, or a size that `grid` refuses.
        """
        return self.combined(self.levels(images), self.layers)

    def combined(
        self,
        features: Sequence[Tensor],
        levels: Sequence[int],
        *,
        own_grid: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Some levels of what `levels` gave, in this order, as embeddings (B, h, w, C).

        Their grid is that of the first of ``layers``, if none is given; with ``own_grid`` that of the
        first of these levels, where it is coarser.
        """
        by_level = dict(zip(self._taken, features, strict=True))
        if grid is None:
            sides = {level: x.shape[2:] for level, x in by_level.items()}
            grid = self._grid_of(sides, levels[0] if own_grid else None)
        return ops.embed([by_level[level] for level in levels], grid)

    def _grid_of(self, sides: Mapping[int, Sequence[int]], level: int | None) -> tuple[int, int]:
        height, width = sides[self.layers[0]]
        if level is None:
            return height, width
        return min(height, sides[level][0]), min(width, sides[level][1])

    def levels(self, images: Tensor) -> list[Tensor]:
        """Features of a batch: one (B, channels, height, width) for each level that is taken.

        Those of ``layers`` and ``map_layers``, in increasing order. Takes and raises what `forward`
        does.
        """
        _check(images)
        traced = torch.compiler.is_compiling()  # by a program that compiles or exports this module
        if not traced:
            self.grid((images.shape[2], images.shape[3]))
        network = self._features if traced or self._compiled is None else self._compiled
        alone = nullcontext() if traced else _alone(images.device)
        with alone, _exact_convolutions() if images.device.type == "cuda" else nullcontext():
            return network(self._normalized(images))

    def _normalized(self, images: Tensor) -> Tensor:
        x = (images.detach() - self.mean) / self.std  # nothing is trained through it
        return x.to(self.dtype, memory_format=torch.channels_last)

    def _features(self, x: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.net(x)
        return [f.permute(0, 3, 1, 2) for f in features] if self._channels_last_output else features

    def _dry_grids(
        self, image_size: tuple[int, int], before: tuple[int, int], argument: str
    ) -> dict[int, tuple[int, int]]:
        try:
            grids = self._meta_grids(image_size)
        except REFUSALS as error:
            grid, reason = (0, 0), f": {error}"
        else:
            grid = grids[self.layers[0]]
            reason = f": the embedding grid would be {grid[0]} x {grid[1]}"
        stride = max(self._reductions)
        if min(before) < stride:
            reason = f": it is smaller than the stride {stride} of layer {self.layers[-1]}"
        elif min(grid) >= 2:
            return grids
        raise ValueError(
            f"{argument} {before} does not work with backbone {self.name!r}{reason}; "
            f"{self._least_size()}"
        )

    def _meta_grids(self, image_size: tuple[int, int]) -> dict[int, tuple[int, int]]:
        """Run a copy on tensors without data: only shapes are computed."""
        grids = timm_models.grids_of(self._on_meta().net, image_size, self.dtype)
        return dict(zip(self._taken, grids, strict=True))

    def _on_meta(self) -> Backbone:
        """A copy without values, since other threads and models may be running the network itself."""
        return self._copy(lambda value: value.to("meta"))

    def _copy(self, of_value: Callable[[Tensor], Tensor]) -> Backbone:
        """One with other weights and buffers."""
        state = [*self.parameters(), *self.buffers()]
        return copy.deepcopy(self, {id(value): of_value(value) for value in state})

    def reach(self, image_size: tuple[int, int]) -> int | None:
        """Pixels beside a position that its embedding depends on, at most.

        Seen by what a NaN in the middle of an image reaches, whatever the weights. None where it
        reaches a border: as in a network that attends to, or averages, all of the image. None also
        where that depends on the place of the NaN, as with windows that are counted from a border. The
        image has this size (H, W) where the network does not take any.
        """
        if self._takes_any_size:
            with suppress(ValueError):  # windows that must fill images
                self.grid(_LARGE)
                image_size = _LARGE
        if image_size not in self._reaches:
            self._reaches[image_size] = self._seen_reach(image_size)
        return self._reaches[image_size]

    def _seen_reach(self, image_size: tuple[int, int]) -> int | None:
        network = self._copy(lambda value: torch.zeros_like(value, device="cpu")).float()
        middle = [side // 2 // self.cell * self.cell for side in image_size]
        middle[1] += self.cell  # another place than along the other axis
        images = torch.zeros(1, 3, *image_size, dtype=torch.float32, device="cpu")
        # On both sides of a border.
        rows, columns = (slice(place - 1, place + 1) for place in middle)
        images[..., rows, columns] = torch.nan
        with torch.no_grad(), devices.plain(images.device):
            features = network._features(images)
            embeddings = [network.combined(features, self._taken)]
            embeddings += [
                network.combined(features, [level], own_grid=True) for level in self._taken
            ]
        found: tuple[list[int], list[int]] = [], []
        for x in embeddings:
            touched = x[0].isnan().any(-1)
            for axis, (place, side) in enumerate(zip(middle, image_size, strict=True)):
                (along,) = touched.any(1 - axis).nonzero(as_tuple=True)
                stride = side // touched.shape[axis]
                first, last = int(along[0]), int(along[-1]) + 1
                if first == 0 or last == touched.shape[axis]:
                    return None
                found[axis].extend([place - first * stride, last * stride - place])
        return max(found[0]) if found[0] == found[1] else None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in use."""
        return sum(value.nbytes for value in [*self.net.parameters(), *self.net.buffers()])

    def activation_bytes(self, n_images: int, image_size: tuple[int, int]) -> tuple[int, list[int]]:
        """What `levels` holds at once of a batch of this size, and what it returns.

        Counted on tensors without values. What a convolution takes for itself is not in it.

        Returns
        -------
        the most bytes at once, beside weights and images
        bytes of each level that is taken
        """
        key = n_images, image_size
        if key not in self._activations:
            network = self._on_meta()
            images = torch.empty(n_images, 3, *image_size, device="meta", dtype=torch.float32)
            with torch.no_grad(), LiveBytes() as live:
                levels = network._features(network._normalized(images))
            self._activations[key] = live.peak, [level.nbytes for level in levels]
        return self._activations[key]

    def _least_size(self) -> str:
        for side in range(max(self._reductions), 1025):
            try:
                if min(self._meta_grids((side, side))[self.layers[0]]) >= 2:
                    return f"the least that works is {side} x {side}"
            except REFUSALS:
                continue
        return "no square image of at most 1024 pixels works"


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.float32:
        raise TypeError(f"images must be float32 in [0, 1], got {images.dtype}")


def _of_channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)


def n_parts(n_images: int, image_size: tuple[int, int], device: torch.device) -> int:
    """Into how many parts `levels_in_parts` splits a batch."""
    if device.type != "cpu":
        return 1
    at_once = max(1, _PIXELS_AT_ONCE // max(1, image_size[0] * image_size[1]))
    return max(1, -(-n_images // at_once))


def levels_in_parts(network: Backbone, images: Tensor) -> list[Tensor]:
    """What ``network.levels(images)`` gives; on a CPU the network sees a few images at a time.

    Takes and raises what `Backbone.forward` does.
    """
    _check(images)
    n = n_parts(len(images), (images.shape[2], images.shape[3]), images.device)
    if n == 1:
        return network.levels(images)
    parts = [network.levels(part) for part in images.tensor_split(n)]
    return [torch.cat(level) for level in zip(*parts, strict=True)]


def whole_strides(
    networks: Sequence[Backbone], image_size: tuple[int, int], *, tiled: bool = False
) -> tuple[int, int]:
    """Size (H, W) of images that are filled up to whole strides of all networks.

    Images that are `tiled` are filled up for a network that takes one size alone, too: it sees tiles.
    """
    strides = (network.cell if tiled else network.stride for network in networks)
    stride = math.lcm(*strides)
    height, width = (-(-side // stride) * stride for side in image_size)
    return height, width


def filled(images: Tensor, extent: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) of at least this (H, W): what is missing repeats the last row and column.

    A cell that an image fills in part would else count for a whole one, and all of the map would be out
    of place, by as much as the part that is missing.
    """
    below, beside = extent[0] - images.shape[2], extent[1] - images.shape[3]
    return F.pad(images, (0, beside, 0, below), mode="replicate") if below or beside else images


_lock = threading.Lock()  # of the two below; never held for long
_backbones: WeakValueDictionary[tuple[object, ...], Backbone] = WeakValueDictionary()
_turns: WeakValueDictionary[tuple[object, ...], threading.Lock] = WeakValueDictionary()


def shared_backbone(
    name: str,
    layers: Sequence[int] | None,
    weights: str | Path | None,
    dtype: torch.dtype,
    compile: bool,  # noqa: A002
    device: torch.device,
    map_layers: Sequence[int] | None = (),
) -> Backbone:
    """A backbone on a device, the same object for the same arguments as long as one is in use.

    A line with forty parts has forty models and one network. A file of weights that has been
    replaced is read again. Threads that ask for the same one wait for it to be built once; others
    do not wait.

    Raises
    ------
    BackboneError
        As `Backbone`.
    ValueError
        As `Backbone`.
    """
    file: tuple[object, ...] | None = None
    if weights is not None and Path(weights).exists():
        state = Path(weights).stat()
        file = Path(weights).resolve(), state.st_mtime_ns, state.st_size
    chosen = [None if given is None else tuple(given) for given in (layers, map_layers)]
    key = name, *chosen, file, dtype, compile, device
    with _lock:
        turn = _turns.setdefault(key, threading.Lock())
    with turn:
        with _lock:
            backbone = _backbones.get(key)
        if backbone is None:  # downloads, reads and builds: minutes, perhaps
            with devices.plain(device):
                backbone = Backbone(name, layers, weights, dtype, compile, map_layers).to(device)
            with _lock:
                _backbones[key] = backbone
    return backbone


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """As if nothing were set around the network."""
    with devices.plain(device), devices.exact_products:
        yield


_exact_lock = threading.Lock()


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """On a GPU, float32 convolutions without TF32, and the same algorithm on every run.

    The settings are the process's, so one thread at a time has them; it only queues work meanwhile.
    `torch.backends.cudnn.flags` does the same up to torch 2.8. From 2.9 on it raises where a program
    has used ``fp32_precision``, and leaves behind a precision that is set in place of an inherited one.
    """
    cudnn: Any = torch.backends.cudnn
    before: list[tuple[Any, str, object]] = []

    def change(owner: Any, name: str, value: object) -> None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    with _exact_lock:
        try:
            change(cudnn, "enabled", True)
            change(cudnn, "benchmark", False)
            change(cudnn, "deterministic", True)
            if not hasattr(cudnn, "conv"):
                change(cudnn, "allow_tf32", False)
            else:  # the outermost that convolutions inherit from: it alone can be restored as it was
                for owner in (torch.backends, cudnn, cudnn.conv):
                    if cudnn.conv.fp32_precision == "tf32" and owner.fp32_precision != "ieee":
                        change(owner, "fp32_precision", "ieee")
            yield
        finally:
            for owner, name, value in reversed(before):
                setattr(owner, name, value)


def _checked(
    argument: str, name: str, layers: Sequence[int], reductions: Sequence[int], first: int
) -> tuple[int, ...]:
    chosen = tuple(sorted(set(layers)))
    if not chosen or len(chosen) != len(layers):
        raise ValueError(f"{argument} must be one or more different levels, got {list(layers)}")
    if chosen[0] < first or chosen[-1] >= len(reductions):
        levels = ", ".join(f"{i} (1/{r})" for i, r in enumerate(reductions) if i >= first)
        raise ValueError(
            f"{argument} {list(layers)}: backbone {name!r} has levels {levels}, by their reduction"
        )
    return chosen
