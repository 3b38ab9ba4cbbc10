"""The backbones of a model: made when they are first used, and shared by its copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from npad.features.backbone import Backbone, BackboneError, shared_backbone
from npad.features.tiling import Tiling
from npad.features.weights import places
from npad.learned import LearnedMember
from npad.members import Member
from npad.model_file import ModelFileError
from npad.settings import Settings

__all__ = ["Networks", "check_embeddings", "grid_of"]

Identities = Sequence[Mapping[str, Any]]  # name and weights_hash of each backbone


class Networks:
    """The backbones that a model has made; several threads may ask for them."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Backbone] = {}

    def copy(self) -> Networks:
        """One that goes on by itself, with the same backbones."""
        other = Networks()
        other._made = dict(self._made)
        return other

    def keep(self, networks: Sequence[Backbone]) -> None:
        """Let go of all others."""
        self._made = {key: network for key, network in self._made.items() if network in networks}

    def of(
        self,
        settings: Settings,
        device: torch.device,
        *,
        fitting: bool = False,
        kept: bool = True,
        fitted: Identities | None = None,
    ) -> list[Backbone]:
        """The backbones, in the precision of fitting or of scoring.

        Parameters
        ----------
        kept : those that are there go on as they were read; else it is looked whether a file is another
            by now
        fitted : of a fitted model, which is to have no others

        Raises
        ------
        BackboneError
            They cannot be had, or their weights are other ones.
        """
        if settings.backbone_dtype is not None:
            dtype = getattr(torch, settings.backbone_dtype)
        else:  # as measured: float16 costs nothing in scoring, but fitting chooses other centroids
            half = device.type == "cuda" and not fitting
            dtype = torch.float16 if half else torch.float32
        found = []
        for name, weights in settings.networks:
            key = (
                name, settings.layers, weights, dtype, settings.compile, device,
                settings.levels_of_maps,
            )  # fmt: skip
            network = self._made.get(key) if kept else None
            if network is None:
                network = shared_backbone(*key)
                self._made = {**self._made, key: network}  # another thread may walk the old
            found.append(network)
        for network, known in zip(found, fitted or (), strict=fitted is not None):
            problem = _difference(network, known)
            if problem:
                raise BackboneError(f"NPad: the model {problem}")
        return found

    def of_file(
        self,
        path: str | Path,
        settings: Settings,
        device: torch.device,
        fitted: Identities,
        *,
        searched: bool,
    ) -> tuple[list[Backbone], Settings]:
        """The backbones that a model file was fitted on, and the settings with where their weights are.

        Parameters
        ----------
        searched : whether their weights may be elsewhere than the settings say

        Raises
        ------
        BackboneError
            No place has weights.
        ModelFileError
            They are other ones, or those of another number of backbones.
        """
        if len(fitted) != len(settings.networks):
            raise ModelFileError(path, f"names {len(fitted)} backbones; fit and save it again")
        networks, found = [], []
        for (name, given), known in zip(settings.networks, fitted, strict=True):
            where = places(given, Path(path)) if searched else [given]
            one = replace(settings, backbone=name, weights=None)
            network, place = self._one_of_file(path, one, device, known, where)
            networks.append(network)
            found.append(place)
        weights = tuple(found) if len(found) > 1 else found[0]
        if searched and weights != settings.weights and any(found):
            settings = replace(settings, weights=weights)
        return networks, settings

    def _one_of_file(
        self,
        path: str | Path,
        settings: Settings,
        device: torch.device,
        fitted: Mapping[str, Any],
        where: Sequence[str | None],
    ) -> tuple[Backbone, str | None]:
        """As `of_file`, of one backbone; and the place of its weights."""
        problem: Exception | None = None
        for place in where:
            try:
                (network,) = self.of(replace(settings, weights=place), device)
            except BackboneError as error:
                problem = BackboneError(f"{path}: its backbone cannot be made: {error}")
                continue
            other = _difference(network, fitted)
            if other is None:
                return network, place
            problem = ModelFileError(path, other)
        assert problem is not None
        raise problem


def _difference(network: Backbone, fitted: Mapping[str, Any]) -> str | None:
    """What is wrong with a backbone for a model that was fitted on one; None where it is the same."""
    name, digest = fitted["name"], fitted["weights_hash"]
    if (network.name, network.weights_hash) == (name, digest):
        return None
    return (
        f"was fitted on {name} with weights {digest[:12]}, but the weights given are "
        f"{network.name} {network.weights_hash[:12]}; give the same file with weights="
    )


def grid_of(member: Member, network: Backbone, tiling: Tiling) -> tuple[int, int]:
    """(h, w) of the embeddings of a member."""
    return tiling.grid(network, member.levels[0] if member.own_grid else None)


def check_embeddings(
    path: str | Path, networks: Sequence[Backbone], members: Sequence[LearnedMember], tiling: Tiling
) -> None:
    """Raise a ModelFileError if the backbones do not make the embeddings of the members of a file."""
    for learned in members:
        mismatch = _other_embedding(networks, learned, tiling)
        if mismatch:
            raise ModelFileError(path, f"{mismatch}; fit and save the model again")


def _other_embedding(
    networks: Sequence[Backbone], learned: LearnedMember, tiling: Tiling
) -> str | None:
    """What is wrong with a member of a file for its backbone; None where they fit."""
    member = learned.member
    if not 0 <= member.network < len(networks):
        return f"has a member of backbone {member.network} of {len(networks)}"
    network = networks[member.network]
    levels = member.levels_of(network)
    if not levels or not {*levels} <= network.level_channels.keys():
        return f"has a member of levels {member.levels}, which its backbone does not give"
    *parts, channels = accumulate(network.level_channels[level] for level in levels)
    grid = grid_of(member, network, tiling)
    known = learned.channels if levels == member.levels else member.prefix
    if (grid, channels) != (learned.grid, known):
        return (
            f"has grid {learned.grid} with {learned.channels} channels, which its backbone does not "
            f"make of images of {tiling.extent}"
        )
    if member.gaussian and member.prefix not in (None, *parts):
        return f"has a prefix of {member.prefix} channels, at which no level of {levels} ends"
    return None
