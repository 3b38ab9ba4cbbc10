"""TIFF: npad says what the tags mean, and Pillow's libtiff decompresses."""

from npad.images.tiff.pixels import read_tiff

__all__ = ["read_tiff"]
