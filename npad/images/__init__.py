"""Images from files, arrays and streams."""

from npad.images.decoding import read_image
from npad.images.errors import ImageError
from npad.images.folders import list_images
from npad.images.samples import Reading
from npad.images.source import Batch, ImageSource

__all__ = ["Batch", "ImageError", "ImageSource", "Reading", "list_images", "read_image"]
