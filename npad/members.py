"""What a model is made of: for each embedding of an image, the distances that are taken of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from npad.settings import Settings, uses_gaussians, uses_nominal_set

__all__ = ["Levels", "Member", "members_of"]


class Levels(Protocol):
    """What a network says of its levels; `npad.features.backbone.Backbone` is one."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Levels of the score and of the nominal set, in increasing order."""

    @property
    def map_layers(self) -> tuple[int, ...]:
        """Levels of the Gaussians that make the map, in increasing order."""

    @property
    def level_channels(self) -> Mapping[int, int]:
        """Channels of each of these levels."""


@dataclass(frozen=True)
class Member:
    """An embedding of an image, and the distances that are taken of it.

    Attributes
    ----------
    network : which of the model's backbones it comes from
    levels : of the backbone, in the order of the channels
    own_grid : whether the grid is that of the first of these levels, where it is coarser than that of
        the backbone's embedding
    gaussian : Mahalanobis distances to a Gaussian at each position
    nominal_set : Euclidean distances to a nominal set
    prefix : the score, and the nominal set, know the first so many channels only; None: all of them
    in_score, in_map : whether the Mahalanobis distances are part of the score, and of the map
    """

    network: int
    levels: tuple[int, ...]
    own_grid: bool = False
    gaussian: bool = True
    nominal_set: bool = True
    prefix: int | None = None
    in_score: bool = True
    in_map: bool = True

    def used_by(self, fusion: str) -> Member | None:
        """What a fusion needs of it, if anything."""
        part = replace(
            self,
            gaussian=self.gaussian and uses_gaussians(fusion),
            nominal_set=self.nominal_set and uses_nominal_set(fusion),
        )
        return part if part.gaussian or part.nominal_set else None

    def levels_of(self, network: Levels) -> tuple[int, ...]:
        """The levels that its distances need: those behind the prefix are a Gaussian's alone."""
        return self.levels if self.gaussian or self.prefix is None else network.layers

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "levels": list(self.levels)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Member:
        """From what `to_json` gave.

        Raises
        ------
        KeyError
            That is no member.
        TypeError
            As KeyError.
        ValueError
            As KeyError.
        """
        prefix = values["prefix"]
        read = {
            "network": int(values["network"]),
            "levels": tuple(int(level) for level in values["levels"]),
            "prefix": None if prefix is None else int(prefix),
        }
        return cls(**{**values, **read})


def members_of(settings: Settings, networks: Sequence[Levels]) -> tuple[Member, ...]:
    """The members of a model of these settings and networks.

    Raises
    ------
    ValueError
        ``gaussians="joint"`` with map layers that lack one of the layers.
    """
    found = []
    for i, network in enumerate(networks):
        of_network = _per_layer if settings.gaussians == "per_layer" else _joint
        found += [member.used_by(settings.fusion) for member in of_network(i, network)]
    return tuple(member for member in found if member is not None)


def _per_layer(i: int, network: Levels) -> list[Member]:
    """A Gaussian for each layer on its own grid; the nominal set of all of them."""
    gaussians = [
        Member(
            i,
            (level,),
            own_grid=True,
            nominal_set=False,
            in_score=level in network.layers,
            in_map=level in network.map_layers,
        )
        for level in sorted({*network.layers, *network.map_layers})
    ]
    return [*gaussians, Member(i, network.layers, gaussian=False)]


def _joint(i: int, network: Levels) -> list[Member]:
    """One Gaussian. Channels of the map alone come last: the rest of the factor is the score's."""
    missing = sorted({*network.layers} - {*network.map_layers})
    if missing:
        raise ValueError(
            f"NPad: map_layers={network.map_layers} lacks {missing} of layers={network.layers}: with "
            "gaussians='joint' the score is that of the first channels of the map's Gaussian; add "
            "them, or use gaussians='per_layer'"
        )
    own = [level for level in network.map_layers if level not in network.layers]
    prefix = sum(network.level_channels[level] for level in network.layers)
    return [Member(i, (*network.layers, *own), prefix=prefix if own else None)]
