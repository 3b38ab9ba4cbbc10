"""Images from files, arrays and streams."""

from npad.images.decoding import ImageError, list_images, read_image
from npad.images.source import Batch, ImageSource

__all__ = ["Batch", "ImageError", "ImageSource", "list_images", "read_image"]
