"""Formats, told by the first bytes of a file: those that are read, and the names of others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import BinaryIO, TypeAlias, TypeVar

from npad.images.bmp import read_bmp
from npad.images.errors import ImageError
from npad.images.jpeg import read_jpeg
from npad.images.png import read_png
from npad.images.pnm import read_pnm
from npad.images.samples import Reading
from npad.images.stored import Stored
from npad.images.tiff import read_tiff
from npad.images.webp import read_webp

__all__ = ["find_reader"]

# The file at its begin, how errors call it, and what it may not say of itself.
Reader: TypeAlias = Callable[[BinaryIO, str, Reading], Stored]

READERS: dict[bytes, Reader] = {
    rb"\x89PNG\r\n\x1a\n": read_png,
    rb"\xff\xd8\xff": read_jpeg,
    rb"BM.{12}[\x0c\x10-\x7c]\0\0\0": read_bmp,
    rb"II[*+]\0|MM\0[*+]": read_tiff,
    rb"RIFF.{4}WEBPVP8[ LX]": read_webp,
    rb"P[1-6][\s#]": read_pnm,
}
IMAGES = {
    rb"GIF8": "a GIF image",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "a JPEG 2000 image",
    rb"\0\0\0\x0cJXL |\xff\x0a": "a JPEG XL image",
    rb"II\xbc": "a JPEG XR image",
    rb"....ftyp(?:avi|.{8,40}avif)": "an AVIF image",
    rb"....ftyp(?:hei|hev|mif1|msf1)": "a HEIC image",
    rb"8BPS": "a Photoshop file",
    rb"gimp xcf": "a GIMP file",
    rb".{128}DICM": "a DICOM file",
    rb"v/1\x01": "an OpenEXR image",
    rb"#\?R": "a Radiance HDR image",
    rb"P[7fF][\s#]": "a PAM or PFM image",
    rb"....ftypcrx|IIU\0|IIR[OS]|FUJIFILMCCD-RAW|FOVb|\0MR[IM]": "a raw image of a camera",
    rb"SIMPLE  =": "a FITS image",
    rb"\0\0[\x01\x02]\0[^\0]\0": "an icon of Windows",
    rb"\x0a[\x00-\x05]\x01[\x01\x02\x04\x08]": "a PCX image",
    rb"\x8aMNG|\x8bJNG": "an MNG image",
    rb"qoif": "a QOI image",
    rb"DDS ": "a DDS image",
    rb"BPG\xfb": "a BPG image",
    rb"\x01\xda[\x00\x01][\x01\x02]": "an SGI image",
    rb"\x59\xa6\x6a\x95": "a Sun raster image",
    rb"AT&TFORM": "a DjVu file",
    rb"%PDF": "a PDF file",
    rb"%!PS|\xc5\xd0\xd3\xc6": "a PostScript file",
    rb"\s*<(?:svg|\?xml.*<svg)": "an SVG drawing",
}
OTHERS = {
    rb"....(?:ftyp|moov|mdat)|RIFF.{4}AVI |\x1aE\xdf\xa3|FLV\x01|\0\0\x01[\xba\xb3]|OggS": "a video",
    rb"RIFF.{4}WAVE|ID3|fLaC": "a sound",
    rb"\x93NUMPY": "an array of NumPy (pass np.load of it)",
    rb"\x89HDF|CDF\x01": "an HDF5 or NetCDF file",
    rb"MATLAB 5": "a MATLAB file",
    rb"PK(?:\x03\x04|\x05\x06)": "a ZIP archive (of which Office and model files are made, too)",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|.{257}ustar": "an archive",
    rb"\xd0\xcf\x11\xe0": "an Office file",
    rb"SQLite format 3": "a database",
    rb"MZ|\x7fELF|\xcf\xfa\xed\xfe": "a program",
    rb"version https://git-lfs": "a pointer of Git LFS, not the file itself (run: git lfs pull)",
    rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body)": "an HTML page",
    rb"\0{16}": "a file that begins with zeros, as after a copy that failed,",
    rb"(?:\xef\xbb\xbf)?[\t\n\r\x20-\x7e\x80-\xff]+\Z": "text",
}
HEAD = 512  # bytes that tell
T = TypeVar("T")


def find_reader(file: BinaryIO, name: str) -> Reader:
    """The function that reads the file, which is at its begin again.

    Raises
    ------
    ImageError
        The format is not read.
    """
    head = file.read(HEAD)
    file.seek(0)
    reader = _find(READERS, head)
    if reader is not None:
        return reader
    if not head:
        raise ImageError(name, "the file is empty; remove or replace it")
    if image := _find(IMAGES, head):
        raise ImageError(name, f"{image}: not read; save it as PNG or TIFF")
    if other := _find(OTHERS, head):
        raise ImageError(name, f"{other} is not an image; remove or replace it")
    raise ImageError(
        name,
        "not a PNG, JPEG, BMP, TIFF, WebP or PNM image, or its first bytes are lost; remove or "
        "replace it",
    )


def _find(table: dict[bytes, T], head: bytes) -> T | None:
    return next((value for begin, value in table.items() if re.match(begin, head, re.DOTALL)), None)
