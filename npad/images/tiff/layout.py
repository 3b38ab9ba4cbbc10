"""What the tags of a TIFF page say of its samples: what is read, and all else refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from npad.images.errors import ImageError
from npad.images.samples import Array, Reading, check_size
from npad.images.tiff.directory import Directory, Tag

__all__ = [
    "ALPHA",
    "CMYK",
    "DECOMPRESS",
    "FAX",
    "FLOAT",
    "JPEG",
    "OPTIONAL",
    "PALETTE",
    "PREMULTIPLIED",
    "RGB",
    "STORED",
    "WHITE_IS_ZERO",
    "YCBCR",
    "Layout",
    "read_layout",
]

Depths: TypeAlias = "dict[int, Sequence[int]]"  # of a sample format, the bits

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LINEAR_RAW = 0, 1, 2, 3, 5, 6, 34892
UNSIGNED, FLOAT = 1, 3

# Read are these kinds of colour, of so many samples, which have so many bits.
ANY_DEPTH: Depths = {UNSIGNED: range(1, 17), FLOAT: (16, 32, 64)}
COLOURS: dict[int, tuple[str, tuple[int, ...], Depths]] = {
    WHITE_IS_ZERO: ("grey of which 0 is white", (1,), {UNSIGNED: range(1, 17)}),
    BLACK_IS_ZERO: ("grey", (1,), ANY_DEPTH),
    RGB: ("RGB", (3,), ANY_DEPTH),
    PALETTE: ("a palette", (1,), {UNSIGNED: range(1, 9)}),
    CMYK: ("CMYK", (4,), {UNSIGNED: (8, 16)}),
    YCBCR: ("YCbCr", (3,), {UNSIGNED: (8,)}),
    LINEAR_RAW: ("linear raw", (1, 3), ANY_DEPTH),
}
OTHER_COLOURS = {
    4: "a transparency mask: give the image that it belongs to",
    8: "L*a*b* colours: save it as RGB",
    9: "L*a*b* colours (ICC): save it as RGB",
    10: "L*a*b* colours (ITU): save it as RGB",
    32803: "the raw mosaic of a colour camera (CFA): develop it first",
    32844: "logarithmic grey (LogL): save it as float32 in [0, 1]",
    32845: "logarithmic colours (LogLuv): save it as float32 in [0, 1]",
    51177: "a depth map: give the image that it belongs to",
    52527: "a semantic mask: give the image that it belongs to",
}
FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}

# Compressions that are read. To JPEG an image is samples of 8 bits, to the codes of fax machines it
# is black and white, and to the others it is bytes, whatever they mean.
STORED, JPEG, PACKBITS, LZMA, ZSTANDARD = 1, 7, 32773, 34925, 50000
FAX = (2, 3, 4)
PREDICTING = (5, 8, 32946, LZMA, ZSTANDARD)  # of bytes or of the differences of neighbours
READ = (STORED, PACKBITS, JPEG, *FAX, *PREDICTING)
OPTIONAL = {LZMA: "LZMA", ZSTANDARD: "Zstandard"}  # a Pillow may lack them
OTHER_COMPRESSIONS = {6: "old-style JPEG", 9: "JBIG", 10: "JBIG", 22610: "JPEG XR"}
OTHER_COMPRESSIONS |= {32766: "NeXT", 32771: "padded CCITT", 32809: "ThunderScan", 34661: "JBIG"}
OTHER_COMPRESSIONS |= dict.fromkeys((33003, 33004, 33005, 34712), "JPEG 2000")
OTHER_COMPRESSIONS |= {34676: "LogL", 34677: "LogLuv", 34887: "LERC", 34892: "lossy raw"}
OTHER_COMPRESSIONS |= {34933: "PNG", 34934: "JPEG XR", 50001: "WebP"}
OTHER_COMPRESSIONS |= {50002: "JPEG XL", 52546: "JPEG XL"}

PREDICTORS = {2: (8, 16, 32, 64), 3: (16, 32, 64)}
UNSPECIFIED, PREMULTIPLIED, ALPHA = 0, 1, 2  # kinds of a sample that is no colour
JPEG_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue in the Y of YCbCr
JPEG_RANGE = (0, 255, 128, 255, 128, 255)
SAVE = "save it as 8- or 16-bit unsigned grey or RGB, or as float32 in [0, 1]"
DECOMPRESS = "save it without compression, or with LZW or deflate"


@dataclass(frozen=True)
class Layout:
    """Where the samples of an image are and how they are written.

    Attributes
    ----------
    width, height : of the image
    photometric, format, compression, predictor : as TIFF numbers them
    n_colours : samples of a pixel that are colour
    n_samples : all samples of a pixel
    extra : kind of the sample behind the colours; None where there is none
    bits : of a sample
    stored_bits : that a sample takes in the file
    planar : each sample has its own strips or tiles
    tiled : there are tiles, not strips
    piece_width, piece_height : of a strip or tile
    """

    width: int
    height: int
    photometric: int
    format: int
    compression: int
    predictor: int
    n_colours: int
    n_samples: int
    extra: int | None
    bits: int
    stored_bits: int
    planar: bool
    tiled: bool
    piece_width: int
    piece_height: int

    @property
    def n_together(self) -> int:
        """Samples of a pixel that are stored side by side."""
        return 1 if self.planar else self.n_samples

    @property
    def n_planes(self) -> int:
        """Planes that are stored apart."""
        return self.n_samples // self.n_together

    @property
    def row_bytes(self) -> int:
        """Of a row of a strip or tile that is not compressed."""
        return (self.piece_width * self.n_together * self.stored_bits + 7) // 8

    @property
    def across(self) -> int:
        """Strips or tiles side by side."""
        return -(-self.width // self.piece_width)

    @property
    def down(self) -> int:
        """Strips or tiles one below the other."""
        return -(-self.height // self.piece_height)

    def rows(self) -> Array:
        """Of each strip or tile of a plane, the rows that are in the image."""
        below = np.arange(1, self.down + 1) * self.piece_height - self.height
        return np.repeat(self.piece_height - np.maximum(0, below), self.across)


def read_layout(page: Directory, name: str, reading: Reading) -> Layout:
    """What the tags of a page say of its samples.

    Raises
    ------
    ImageError
        The image is too large or of a kind that is not read, and how to save it instead.
    ValueError
        The tags contradict one another.
    """
    photometric = page.value(Tag.PHOTOMETRIC, -1)
    compression = page.value(Tag.COMPRESSION, STORED)
    if photometric in OTHER_COLOURS:
        raise ImageError(name, f"the image is {OTHER_COLOURS[photometric]}")
    if compression not in READ:
        title = OTHER_COMPRESSIONS.get(compression, f"number {compression}")
        raise ImageError(name, f"its compression ({title}) is not read: {DECOMPRESS}")
    if photometric not in COLOURS:
        what = "are not named" if photometric < 0 else f"(number {photometric}) are not read"
        raise ImageError(name, f"its colours {what} (PhotometricInterpretation): {SAVE}")
    width, height = page.value(Tag.WIDTH, 0), page.value(Tag.HEIGHT, 0)
    if min(width, height) < 1:
        raise ValueError("it has no size")
    check_size(width, height, name, reading)

    n_samples = page.value(Tag.SAMPLES, max(1, page.count(Tag.BITS)))
    bits = _of_all(page, Tag.BITS, n_samples, "BitsPerSample", name)
    format_ = _of_all(page, Tag.SAMPLE_FORMAT, n_samples, "SampleFormat", name)
    colour, numbers, depths = COLOURS[photometric]
    if bits not in depths.get(format_, ()):
        kind = FORMATS.get(format_, "undefined")
        raise ImageError(name, f"{colour} of {bits}-bit {kind} samples is not read: {SAVE}")
    n_colours = max((n for n in numbers if n <= n_samples), default=numbers[0])
    extra = _extra(page, photometric, n_samples, n_colours, name)
    _check_colours(page, photometric, name)

    tiled = Tag.TILE_WIDTH in page
    piece_width = page.value(Tag.TILE_WIDTH, width)
    if tiled:
        piece_height = page.value(Tag.TILE_HEIGHT, 0)
    else:
        piece_height = min(height, page.value(Tag.ROWS_PER_STRIP, height))
    if min(piece_width, piece_height) < 1:
        raise ValueError("its strips or tiles have no size")
    check_size(piece_width, piece_height, name, reading)
    layout = Layout(
        width=width,
        height=height,
        photometric=photometric,
        format=format_,
        compression=compression,
        predictor=page.value(Tag.PREDICTOR, 1),
        n_colours=n_colours,
        n_samples=n_samples,
        extra=extra,
        bits=bits,
        stored_bits=bits,
        planar=page.value(Tag.PLANAR, 1) == 2 and n_samples > 1,
        tiled=tiled,
        piece_width=piece_width,
        piece_height=piece_height,
    )
    _check_compression(page, layout, name)
    return _in_words(page, layout)


def _of_all(page: Directory, tag: Tag, n_samples: int, title: str, name: str) -> int:
    """The one value that a tag has for all samples; 1 where it has none, by the standard."""
    values = np.unique(page.values(tag, (1,), limit=max(1, n_samples))).tolist()
    if len(values) != 1:
        raise ImageError(name, f"its samples differ from one another ({title} {values}): {SAVE}")
    return int(values[0])


def _extra(
    page: Directory, photometric: int, n_samples: int, n_colours: int, name: str
) -> int | None:
    """The kind of the one sample that a pixel may have beside its colour; it is dropped."""
    n_extra = n_samples - n_colours
    kinds = page.values(Tag.EXTRA_SAMPLES, limit=2).tolist()
    if n_extra == 0 and not kinds:
        return None
    kind = int(kinds[0]) if kinds else UNSPECIFIED
    colour = COLOURS[photometric][0]
    if n_extra < 0 or n_extra > 1 or len(kinds) > 1 or n_extra < len(kinds):
        raise ImageError(
            name,
            f"a pixel has {n_samples} samples, where {colour} has {n_colours} and maybe alpha: {SAVE}",
        )
    # Beside grey it may as well be another picture, and beside raw colours a fourth colour.
    if kind not in (ALPHA, PREMULTIPLIED) and photometric not in (RGB, CMYK, YCBCR):
        raise ImageError(
            name,
            f"beside {colour} it has samples of which it does not say what they are: "
            "save one of the two alone, or mark the second as alpha (ExtraSamples = 2)",
        )
    return kind


def _check_colours(page: Directory, photometric: int, name: str) -> None:
    """Refuse what is said of colours by rare tags, and would change them."""
    if photometric == CMYK and page.value(Tag.INK_SET, 1) != 1:
        raise ImageError(name, "its inks are others than cyan, magenta, yellow and black: " + SAVE)
    if page.value(Tag.INDEXED, 0):
        raise ImageError(name, "its palette is of another kind (Indexed): " + SAVE)
    if page.value(Tag.DEPTH, 1) > 1:
        raise ImageError(name, "it is a volume (ImageDepth): save one slice of it")
    if Tag.LINEARIZATION_TABLE in page:
        raise ImageError(name, "its samples are coded (LinearizationTable): develop it first")
    if photometric == YCBCR:
        weights = page.values(Tag.YCBCR_COEFFICIENTS, JPEG_WEIGHTS)
        extent = page.values(Tag.REFERENCE_BLACK_WHITE, JPEG_RANGE)
        if not (_close(weights, JPEG_WEIGHTS, 0.001) and _close(extent, JPEG_RANGE, 1)):
            raise ImageError(name, "its YCbCr is not that of JPEG (weights or range): " + SAVE)


def _close(values: Array, expected: tuple[float, ...], by: float) -> bool:
    return values.shape == (len(expected),) and bool((np.abs(values - expected) <= by).all())


def _check_compression(page: Directory, layout: Layout, name: str) -> None:
    """Refuse what a compression cannot hold, or holds in a way that is not undone here."""
    compression, photometric = layout.compression, layout.photometric
    bits, n = layout.bits, layout.n_together
    fits = bits == 8 and n in (1, 3, 4) if compression == JPEG else bits == n == 1
    if compression in (JPEG, *FAX) and not fits:
        title = "JPEG" if compression == JPEG else "CCITT"
        raise ImageError(
            name, f"{n} x {bits} bits with {title} compression are not read: {DECOMPRESS}"
        )
    if photometric == YCBCR:
        if compression == JPEG:
            plain = layout.n_samples == 3 and not layout.planar
        else:
            plain = page.values(Tag.YCBCR_SUBSAMPLING, (2, 2)).tolist() == [1, 1]
        if not plain:
            raise ImageError(name, "its YCbCr is reduced in colour, or has alpha: " + SAVE)
    if compression == JPEG and n > 1 and not _agrees(page, photometric):
        raise ImageError(name, f"its tags and its JPEG data name different colours: {SAVE}")
    predictor = layout.predictor
    if predictor != 1 and not (
        compression in PREDICTING
        and layout.bits in PREDICTORS.get(predictor, ())
        and (predictor == 2 or layout.format == FLOAT)
    ):
        raise ImageError(
            name, f"predictor {predictor} of {layout.bits}-bit samples is not read: {DECOMPRESS}"
        )


def _agrees(page: Directory, photometric: int) -> bool:
    """Whether JPEG data that name their colours name those of the tags, by which they are read."""
    head = page.values(Tag.JPEG_TABLES).astype(np.uint8).tobytes()
    page.file.seek(page.value(Tag.TILE_OFFSETS, page.value(Tag.STRIP_OFFSETS, 0)))
    head += page.file.read(4096)
    adobe = head.find(b"\xff\xee\0\x0eAdobe")
    if adobe >= 0:  # its last byte: 1 is YCbCr. CMYK may be inverted, and nothing says whether.
        return photometric != CMYK and (head[adobe + 15] == 1) == (photometric == YCBCR)
    return photometric != RGB or b"JFIF\0" not in head


def _in_words(page: Directory, layout: Layout) -> Layout:
    """Some cameras write 9 to 15 bits in words of 16: the strips are then as large as of 16 bits."""
    if layout.compression != STORED or not 8 < layout.bits < 16:
        return layout
    words = replace(layout, stored_bits=16)
    sizes = Tag.TILE_BYTE_COUNTS if layout.tiled else Tag.STRIP_BYTE_COUNTS
    if page.count(sizes) != layout.n_planes * layout.across * layout.down:
        return layout
    rows = np.array([layout.piece_height]) if layout.tiled else layout.rows()
    counts = page.values(sizes).reshape(layout.n_planes, -1)
    return words if (counts == rows * words.row_bytes).all() else layout
