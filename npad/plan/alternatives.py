"""What to change where a plan does not fit: every piece of advice is itself planned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import torch

from npad import devices
from npad.features.backbone import Backbone
from npad.features.tiling import with_overlap
from npad.plan.counting import planned
from npad.plan.figures import Plan
from npad.settings import Settings, uses_gaussians, uses_nominal_set

__all__ = ["Alternative", "alternatives", "hollow_networks", "refuse"]

_FEATURES: Final = (256, 192, 128, 96, 64, 48, 32, 16)
_SHARES: Final = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)  # of a side of the images
_CENTROIDS: Final = (8192, 4096, 2048, 1024)
_TILES: Final = (2048, 1024, 512)
_SIDES: Final = 32  # of which sides are multiples: the stride of most networks' deepest level

Changes = dict[str, Any]


@dataclass(frozen=True)
class Alternative:
    """Other arguments, and what they would take.

    Attributes
    ----------
    changes : arguments of NPad, by name; and ``statistics``, of ``fit``
    plan : with these
    """

    changes: Changes
    plan: Plan

    def __str__(self) -> str:
        """The arguments, as they are written in Python, and what they give."""
        given = ", ".join(f"{name}={_written(value)}" for name, value in self.changes.items())
        sizes = (self.plan.fit_peak, self.plan.predict_peak, self.plan.model)
        fit, predict, model = map(devices.shown_size, sizes)
        return f"{given} (fit {fit}, predict {predict}, model {model})"

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        plan = self.plan
        changes = {k: list(v) if isinstance(v, tuple) else v for k, v in self.changes.items()}
        return {
            "changes": changes,
            "fit_peak": plan.fit_peak,
            "predict_peak": plan.predict_peak,
            "model": plan.model,
        }


def _written(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]:
        return str(value[0])  # a size, both sides
    return repr(value)


def hollow_networks(settings: Settings) -> list[Backbone]:
    """The backbones of these settings without their weights: enough for a plan.

    Raises
    ------
    BackboneError
        An unknown name.
    ValueError
        Layers that a network does not have.
    """
    dtype = getattr(torch, settings.backbone_dtype or "float32")
    levels = settings.layers, settings.levels_of_maps
    return [_hollow(name, *levels, dtype) for name, _ in settings.networks]


@lru_cache(maxsize=32)
def _hollow(
    name: str,
    layers: tuple[int, ...] | None,
    map_layers: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> Backbone:
    return Backbone(name, layers, dtype=dtype, map_layers=map_layers, hollow=True)


def alternatives(plan: Plan, *, predict: bool = True) -> list[Alternative]:
    """What fits instead.

    Parameters
    ----------
    plan : that does not fit
    predict : whether predicting must fit, too

    Returns
    -------
    For each argument by which a change alone is enough, the least such change. Where none is, one
    alternative with as many changes as it takes; nothing where even all of them are not enough.
    """
    free = plan.free
    if free is None:
        return []

    def need(other: Plan) -> int:
        return max(other.fit_peak, other.predict_peak if predict else 0)

    tried = [[_changed(plan, change) for change in ladder] for ladder in _ladders(plan)]
    steps = [[one for one in ladder if one is not None] for ladder in tried]
    enough = ((one for one in ladder if need(one.plan) <= free) for ladder in steps)
    alone = [one for ladder in enough if (one := next(ladder, None))]
    if alone:
        return alone
    known: Changes = {}
    least = need(plan)
    for ladder in steps:
        last = None
        for step in ladder:
            last = _changed(plan, {**known, **step.changes})
            if last is not None and need(last.plan) <= free:
                return [last]
        if last is not None and need(last.plan) < least:
            known, least = last.changes, need(last.plan)
    return []


def _ladders(plan: Plan) -> Iterator[list[Changes]]:
    """Of each argument, changes from the least to the largest; first the arguments that cost least."""
    settings = plan.settings
    networks = hollow_networks(settings)
    layers = networks[0].layers if len(networks) == 1 else ()
    halves = (settings.batch_size >> i for i in range(1, settings.batch_size.bit_length()))
    if plan.keeps_statistics:
        yield [{"statistics": False}]
    if settings.calibration_folds is not None:
        yield [{"calibration_folds": None}]
    yield [{"batch_size": n} for n in halves]
    tiles = _tiles(settings.size) if settings.tile is None else []
    if tiles and all(network.reach(settings.size) is not None for network in networks):
        yield [{"tile": tile} for tile in tiles]
    if uses_gaussians(settings.fusion):
        if settings.gaussians == "joint" and any(len(m.member.levels) > 1 for m in plan.members):
            yield [{"gaussians": "per_layer"}]
        smaller = ["float16", "int8"] if settings.factor_dtype == "float32" else ["int8"]
        yield [{"factor_dtype": dtype} for dtype in smaller if dtype != settings.factor_dtype]
        if any(network.map_layers != network.layers for network in networks):
            yield [{"map_layers": ()}]
    most = settings.fixed_features or max(member.channels for member in plan.members)
    yield [{"n_features": n} for n in _FEATURES if n < most]
    yield [{"image_size": size} for size in _smaller(settings.size)]
    yield [{"layers": layers[i:]} for i in range(1, len(layers))]
    yield [{"layers": layers[:-i]} for i in range(1, len(layers))]
    if uses_nominal_set(settings.fusion):
        n = max(member.n_centroids for member in plan.members)
        yield [{"n_centroids": fewer} for fewer in _CENTROIDS if fewer < n]
        if uses_gaussians(settings.fusion):
            yield [{"nominal_set": None, "fusion": "mahalanobis"}]


def _smaller(size: tuple[int, int]) -> list[tuple[int, int]]:
    sizes = [tuple(int(side * share) // _SIDES * _SIDES for side in size) for share in _SHARES]
    return [(h, w) for h, w in dict.fromkeys(sizes) if min(h, w) >= _SIDES]


def _tiles(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Where several make an image; exact ones, that is."""
    sizes = ((min(size[0], side), min(size[1], side)) for side in _TILES)
    return [(h, w) for h, w in sizes if 2 * h * w <= size[0] * size[1]]


def _changed(plan: Plan, changes: Changes) -> Alternative | None:
    """None where these cannot be."""
    given = dict(changes)
    statistics = given.pop("statistics", plan.keeps_statistics)
    try:
        settings = replace(plan.settings, **given)
        networks = hollow_networks(settings)
        if (settings.fixed_features or 0) > min(network.channels for network in networks):
            return None  # which no fit takes
        settings = with_overlap(settings, networks)
        other = planned(
            settings,
            networks,
            plan.device,
            n_images=plan.n_images,
            source_size=plan.source_size,
            statistics=statistics,
        )
    except ValueError:
        return None
    return Alternative(changes, replace(other, free=plan.free))


def refuse(plan: Plan) -> None:
    """Refuse before the work a fit that cannot fit: Linux would promise the memory and kill us later.

    Raises
    ------
    MemoryError
        What is needed, what is free, and what fits instead.
    """
    if plan.free is None or plan.fit_peak <= plan.free or _fits_halved(plan, plan.free):
        return
    peak = max(plan.fit, key=lambda phase: phase.n_bytes)
    most = sorted(peak.parts.items(), key=lambda part: part[1], reverse=True)[:2]
    parts = ", ".join(f"{devices.shown_size(n)} of it {what}" for what, n in most)
    instead = "; ".join(map(str, alternatives(plan, predict=False)))
    remedy = (
        f"what fits: {instead}" if instead else "no other arguments that npad knows of are enough"
    )
    raise MemoryError(
        f"NPad.fit: {devices.shown_size(plan.fit_peak)} are needed ({parts}), "
        f"{devices.shown_size(plan.free)} are free on {plan.device}; {remedy}"
    )


def _fits_halved(plan: Plan, free: int) -> bool:
    """A GPU says in time that a batch is too large; it is halved then, once."""
    if plan.device.type != "cuda":
        return False
    halved = _changed(plan, {"batch_size": -(-plan.settings.batch_size // 2)})
    return halved is not None and halved.plan.fit_peak <= free
