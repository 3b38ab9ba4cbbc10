"""Every format but TIFF: the same ramp comes out of every kind of file, or it is refused by name."""

import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import tifffile
from image_files import encode
from PIL import Image, ImageFile
from written_files import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGB_ALPHA,
    adobe,
    as_stored,
    bmp,
    bmp_rows,
    chunk,
    exif,
    jpeg,
    png,
    pnm,
    segment,
    xmp,
)

from npad.images import ImageError, Reading, read_image
from npad.images.decoding import load

SHAPE = (16, 24)
RAMP = np.arange(384).reshape(SHAPE) / 383  # 0 to 1
# Red, green and blue that are told apart, and alpha that would show.
COLOUR = np.stack([RAMP, 1 - RAMP, RAMP / 2], axis=2)
ALPHA = (np.indices(SHAPE).sum(0) % 3 / 2)[..., None]
IMAGES = {
    GREY: RAMP,
    RGB: COLOUR,
    GREY_ALPHA: np.concatenate([RAMP[..., None], ALPHA], axis=2),
    RGB_ALPHA: np.concatenate([COLOUR, ALPHA], axis=2),
}


def of_depth(values, bits):
    return np.round(values * (2**bits - 1)).astype(np.int64)


def read(data, **reading):
    """RGB as fractions of white, from the bytes of a file."""
    image = read_image(data, Reading(**reading))
    assert image.shape[2] == 3
    return image / 255 if image.dtype == np.uint8 else image.astype(float)


def as_rgb(values):
    return np.stack([values] * 3, axis=2) if values.ndim == 2 else values[..., :3]


def loaded(data, **reading):
    return load(data, "file", (8, 8), Reading(**reading))


# --- PNG

PNGS = [(bits, colour) for bits in (1, 2, 4, 8) for colour in (GREY, PALETTE)]
PNGS += [(bits, colour) for bits in (8, 16) for colour in (RGB, GREY_ALPHA, RGB_ALPHA)] + [
    (16, GREY)
]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("bits", "colour"), [k for k in PNGS if k[1] != PALETTE])
def test_png(bits, colour, interlaced):
    values = of_depth(IMAGES[colour], bits)
    expected = values[..., :-1].squeeze() if colour in (GREY_ALPHA, RGB_ALPHA) else values
    image = read(png(values, bits, colour, interlaced=interlaced))
    np.testing.assert_allclose(image, as_rgb(expected / (2**bits - 1)), atol=1e-7)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("transparent", [None, b"\0\x80\xff"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_png_palette(bits, transparent, interlaced):
    n = min(2**bits, 200)
    indices = np.arange(384).reshape(SHAPE) % n
    colours = np.random.default_rng(0).integers(0, 256, (n, 3), np.uint8)
    before = [chunk(b"PLTE", colours.tobytes())]
    before += [] if transparent is None else [chunk(b"tRNS", transparent[:n])]
    data = png(indices, bits, PALETTE, interlaced=interlaced, before=before)
    assert np.array_equal(read_image(data), colours[indices])
    short = png(indices, bits, PALETTE, before=[chunk(b"PLTE", colours[:-1].tobytes())])
    with pytest.raises(ImageError, match="not in the palette"):
        read_image(short)


@pytest.mark.parametrize("colour", IMAGES)
@pytest.mark.parametrize("bits", [10, 12, 14, 15])
def test_what_sbit_says_is_white(bits, colour):
    """Of values as cameras leave them, and as PNG wants them: shifted up, and repeated below."""
    values = of_depth(IMAGES[colour], bits)
    channels = values.shape[2] if values.ndim == 3 else 1
    sbit = [chunk(b"sBIT", bytes([bits] * channels))]
    expected = IMAGES[colour]
    expected = as_rgb(expected[..., 0] if colour == GREY_ALPHA else expected)
    shifted = values << (16 - bits)
    for stored in (values, shifted, shifted | values >> (2 * bits - 16)):
        data = png(stored, 16, colour, before=sbit)
        for bit_depth in (None, 9):  # the file comes first
            np.testing.assert_allclose(read(data, bit_depth=bit_depth), expected, atol=2e-3)
        assert loaded(data).undeclared is None
    dark = shifted // 40 & ~(2 ** (16 - bits) - 1)
    assert read(png(dark, 16, colour, before=sbit)).max() < 1 / 30  # the lower bits tell
    scaled = np.rint(values // 40 * (65535 / (2**bits - 1))).astype(int)
    assert read(png(scaled, 16, colour, before=sbit)).max() < 1 / 30
    high = values.copy()
    high.flat[0] = 2**bits + 1  # more than 2**bits - 1: not as cameras leave them
    assert read(png(high, 16, colour, before=sbit)).max() < 0.6


def test_sbit_of_all_bits_says_nothing():
    data = png(of_depth(RAMP, 12), 16, GREY, before=[chunk(b"sBIT", b"\x10")])
    assert loaded(data).undeclared == 4095
    np.testing.assert_allclose(read(data, bit_depth=12), as_rgb(RAMP), atol=2e-4)


def test_sbit_of_8_bits():
    values = of_depth(RAMP, 6)
    sbit = [chunk(b"sBIT", b"\x06")]
    np.testing.assert_allclose(
        read(png(values, 8, GREY, before=sbit)), as_rgb(values / 63), atol=1e-6
    )
    spread = values << 2 | values >> 4
    assert np.array_equal(read_image(png(spread, 8, GREY, before=sbit)), as_rgb(spread))
    for nonsense in (b"\0", b"\x63"):
        data = png(spread, 8, GREY, before=[chunk(b"sBIT", nonsense)])
        assert np.array_equal(read_image(data), as_rgb(spread))
    with pytest.raises(ImageError, match="channels have different bit depths"):
        read_image(png(of_depth(COLOUR, 10), 16, RGB, before=[chunk(b"sBIT", b"\x09\x0a\x09")]))


def test_png_colour_is_left_as_it_is():
    profile = b"icc\0\0" + zlib.compress(b"no profile")
    before = [
        chunk(b"gAMA", struct.pack(">I", 100000)),
        chunk(b"iCCP", profile),
        chunk(b"tEXt", b"a\0b"),
    ]
    values = of_depth(COLOUR, 8)
    assert np.array_equal(read_image(png(values, 8, RGB, before=before)), values)


def test_png_texts_may_be_damaged():
    texts = [
        b"",
        b"a",
        b"zTXt\0\0no zlib",
        b"XML:com.adobe.xmp\0\1",
        b"Raw profile type exif\0\nexif\n 9\nabc",
    ]
    before = [chunk(kind, text) for text in texts for kind in (b"tEXt", b"zTXt", b"iTXt")]
    values = of_depth(RAMP, 8)
    assert np.array_equal(read_image(png(values, 8, GREY, before=before)), as_rgb(values))


def test_png_header_is_checked():
    data = png(of_depth(RAMP, 8), 8, GREY)
    with pytest.raises(ImageError, match="wrong check sum of IHDR"):
        read_image(data[:19] + b"\1" + data[20:])
    with pytest.raises(ImageError, match="damaged or cut short"):
        read_image(png(of_depth(RAMP, 8), 8, 1))  # a type of colour that does not exist


def test_damaged_pixels_of_a_png_are_noticed():
    data = bytearray(png(of_depth(RAMP, 8), 8, GREY, level=0))
    data[data.index(b"IDAT") + 100] ^= 1
    with pytest.raises(ImageError, match="damaged or cut short"):
        read_image(bytes(data))


@pytest.mark.parametrize("first_is_a_frame", [True, False])
def test_animated_png(first_is_a_frame):
    values = of_depth(RAMP, 8)
    control = [chunk(b"acTL", struct.pack(">II", 3, 0))]
    frame = struct.pack(">IIIIIHHBB", 0, 24, 16, 0, 0, 1, 10, 0, 0)
    before = [*control, chunk(b"fcTL", frame)] if first_is_a_frame else control
    after = [chunk(b"fcTL", frame), chunk(b"fdAT", b"\0\0\0\1" + zlib.compress(bytes(25 * 16)))]
    data = png(values, 8, GREY, before=before, after=after)
    assert np.array_equal(read_image(data), as_rgb(values))
    assert loaded(data).n_pages == (3 if first_is_a_frame else 4)


# --- JPEG

BLOCKS = np.round(255 * np.stack([np.arange(6) / 5, 1 - np.arange(6) / 5, np.arange(6) / 10], 1))
BLOCKS = BLOCKS.reshape(2, 3, 3)


def enlarged(blocks):
    return blocks.repeat(8, 0).repeat(8, 1)


def to_ycc(rgb):
    y = rgb @ [0.299, 0.587, 0.114]
    return np.stack([y, (rgb[..., 2] - y) / 1.772 + 128, (rgb[..., 0] - y) / 1.402 + 128], axis=2)


BLACK = np.full((2, 3, 1), 51.0)  # a fifth of the light is lost
INK = np.concatenate([255 - BLOCKS, BLACK], axis=2)
INKED = BLOCKS * 204 / 255
YCCK = np.concatenate([to_ycc(255 - BLOCKS), 255 - BLACK], axis=2)  # inverted, as Adobe has it
JPEGS = {
    "grey": (jpeg(BLOCKS[..., :1]), BLOCKS[..., [0, 0, 0]]),
    "ycc": (jpeg(to_ycc(BLOCKS)), BLOCKS),
    "ycc, adobe": (jpeg(to_ycc(BLOCKS), extra=adobe(1)), BLOCKS),
    "rgb, adobe": (jpeg(BLOCKS, extra=adobe(0)), BLOCKS),
    "rgb, by name": (jpeg(BLOCKS, identifiers=b"RGB"), BLOCKS),
    "cmyk": (jpeg(INK), INKED),
    "cmyk, adobe": (jpeg(255 - INK, extra=adobe(0)), INKED),
    "ycck, adobe": (jpeg(YCCK, extra=adobe(2)), INKED),
    "extended": (jpeg(to_ycc(BLOCKS), frame=0xC1), BLOCKS),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg(kind):
    data, expected = JPEGS[kind]
    assert np.abs(read_image(data) - enlarged(expected)).max() <= 2.5


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"optimize": True}])
def test_jpeg_by_another_encoder(options):
    ramp = np.uint8(as_rgb(of_depth(RAMP, 8)))
    assert (
        np.abs(read_image(encode(ramp, "JPEG", quality=97, **options)).astype(int) - ramp).max() < 9
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 12, "frame": 0xC1}, "a JPEG of 12 bits: not read; save it as 16-bit PNG or TIFF"),
        ({"frame": 0xC3}, "a lossless JPEG image: not read"),
        ({"frame": 0xC5}, "a hierarchical JPEG image: not read"),
        ({"frame": 0xF7}, "a JPEG-LS image: not read"),
    ],
)
def test_jpegs_that_are_not_read(options, reason):
    with pytest.raises(ImageError, match=reason):
        read_image(jpeg(BLOCKS, **options))


def test_jpeg_of_two_channels_is_refused():
    with pytest.raises(ImageError, match="a JPEG of 2 channels: not read"):
        read_image(jpeg(BLOCKS[..., :2]))


@pytest.mark.parametrize("order", "<>")
def test_first_picture_of_several(order):
    entry = struct.pack(order + "HHII", 0xB001, 4, 1, 2)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, 1)
    first = jpeg(BLOCKS[..., :1], extra=segment(0xE2, b"MPF\0" + head + entry + bytes(4)))
    data = first + jpeg(255 - BLOCKS[..., :1])
    assert np.abs(read_image(data) - enlarged(BLOCKS[..., [0, 0, 0]])).max() <= 1
    assert loaded(data).n_pages == 2


# --- BMP

PALETTE_256 = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
INDICES = np.arange(384).reshape(SHAPE) * 7 % 256


def bgrx(colours, size=4):
    out = np.zeros((len(colours), size), np.uint8)
    out[:, :3] = colours[:, ::-1]
    return out.tobytes()


def packed(colour, *bits):
    """Red, green and blue side by side in a number, blue lowest; and their masks."""
    values, masks, shift = 0, [], 0
    for c, n in reversed(list(enumerate(bits))):
        values = values | of_depth(colour[..., c], n) << shift
        masks.insert(0, (2**n - 1) << shift)
        shift += n
    return values, struct.pack("<4I", *masks, 0)


@pytest.mark.parametrize(
    ("header", "top_down"),
    [(12, False), *((n, t) for n in (16, 40, 64, 108, 124) for t in (False, True))],
)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bmp_palette(bits, header, top_down):
    indices, colours = INDICES[:, :23] % 2**bits, PALETTE_256[: 2**bits]
    palette = bgrx(colours, 3 if header == 12 else 4)
    rows = bmp_rows(indices, bits, top_down=top_down)
    data = bmp(rows, 23, -16 if top_down else 16, bits, palette=palette, header=header)
    assert np.array_equal(read_image(data), colours[indices])


def test_bmp_of_grey_palettes():
    for colours in (np.arange(256), np.arange(256)[::-1]):
        palette = bgrx(np.uint8(np.stack([colours] * 3, 1)))
        data = bmp(bmp_rows(INDICES, 8), 24, 16, 8, palette=palette)
        assert np.array_equal(read_image(data), as_rgb(colours[INDICES]))
    with pytest.raises(ImageError, match="damaged"):
        read_image(bmp(bmp_rows(INDICES, 8), 24, 16, 8, palette=bgrx(PALETTE_256[:100])))


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize(
    ("bits", "channels", "header", "compression"),
    [
        (16, (5, 5, 5), 40, 0),
        (16, (5, 5, 5), 40, 3),
        (16, (5, 6, 5), 40, 3),
        (16, (5, 6, 5), 56, 3),
        (24, (8, 8, 8), 40, 0),
        (24, (8, 8, 8), 108, 0),
        (32, (8, 8, 8), 40, 0),
        (32, (8, 8, 8), 40, 3),
        (32, (8, 8, 8), 124, 3),
    ],
)
def test_bmp_colour(bits, channels, header, compression, top_down):
    values, masks = packed(COLOUR[:, :23], *channels)
    if bits == 32 and max(channels) == 8:
        values = values | 0x7F000000  # alpha
    rows = bmp_rows(values, bits, top_down=top_down)
    masks = masks[: 12 if header == 40 else 16] if compression else b""
    height = -16 if top_down else 16
    data = bmp(rows, 23, height, bits, compression=compression, masks=masks, header=header)
    expected = [of_depth(COLOUR[:, :23, c], n) / (2**n - 1) for c, n in enumerate(channels)]
    tolerance = 1e-6 if max(channels) >= 8 else 1 / 255
    np.testing.assert_allclose(read(data), np.stack(expected, 2), atol=tolerance)


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 2), (3, 2, 1), (1, 2, 3)])
def test_bmp_with_other_orders_of_channels(order):
    """The bytes of a pixel that hold red, green and blue."""
    values = of_depth(COLOUR, 8)
    stored = sum(values[..., c] << 8 * byte for c, byte in enumerate(order))
    masks = struct.pack("<4I", *(0xFF << 8 * byte for byte in order), 0xFF << 8 * (6 - sum(order)))
    data = bmp(bmp_rows(stored, 32), 24, 16, 32, compression=3, masks=masks, header=124)
    assert np.array_equal(read_image(data), values)


@pytest.mark.parametrize(("bits", "channels"), [(16, (4, 4, 4)), (32, (10, 10, 10))])
def test_bmps_of_unusual_channels_are_refused(bits, channels):
    values, masks = packed(COLOUR, *channels)
    data = bmp(bmp_rows(values, bits), 24, 16, bits, compression=3, masks=masks, header=124)
    with pytest.raises(ImageError, match=f"a BMP of {bits} bits and unusual channels: not read"):
        read_image(data)


@pytest.mark.parametrize("n_colours", [2, 3, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_bmp_of_few_greys(bits, n_colours):
    """The number of colours does not say how many bits a pixel has."""
    greys = np.uint8(np.linspace(255, 0, n_colours).round())
    for colours in (greys, greys[::-1]):
        indices = INDICES % n_colours
        palette = bgrx(np.stack([colours] * 3, 1))
        data = bmp(bmp_rows(indices, bits), 24, 16, bits, palette=palette)
        assert np.array_equal(read_image(data), as_rgb(colours[indices]))


def run_lengths(indices, nibbles):
    """Runs, pixels as they are, and a step over pixels that are 0; from the last row upwards."""
    out = b""
    for y, row in enumerate(indices[::-1].tolist()):
        first, rest = row[:9], row[9:]
        if not nibbles:
            out += bytes([0, 9, *first, 0])
        else:
            pairs = zip(first[::2], [*first[1::2], 0], strict=True)
            out += bytes([0, 9, *(a << 4 | b for a, b in pairs), 0])
        if y == 3:
            out += bytes([0, 2, len(rest), 0])
        else:
            for value in rest:
                out += bytes([1, value << 4 | 3 if nibbles else value])
        out += b"\0\0"
    return out


@pytest.mark.parametrize(("bits", "compression"), [(8, 1), (4, 2)])
def test_bmp_run_lengths(bits, compression):
    indices = INDICES % 2**bits
    indices[-4, 9:] = 0
    colours = PALETTE_256[: 2**bits]
    stream = run_lengths(indices, nibbles=bits == 4)
    for end in (b"\0\1", b""):  # nothing is missing without the mark of the end
        data = bmp(stream[:-2] + end, 24, 16, bits, compression=compression, palette=bgrx(colours))
        assert np.array_equal(read_image(data), colours[indices])
    with pytest.raises(ImageError, match="cut short"):
        read_image(data[:-20])
    long_run = bmp(b"\xff\x11\0\1", 24, 16, bits, compression=compression, palette=bgrx(colours))
    value = 17 if bits == 8 else 1
    assert np.array_equal(read_image(long_run)[-1], colours[[value] * 24])
    assert np.array_equal(read_image(long_run)[0], colours[[0] * 24])


@pytest.mark.parametrize(
    ("bits", "compression", "header"), [(1, 3, 64), (24, 4, 64), (0, 4, 40), (0, 5, 40)]
)
def test_bmps_that_are_not_read(bits, compression, header):
    with pytest.raises(
        ImageError, match=f"a BMP of {bits} bits and compression {compression}: not read"
    ):
        read_image(bmp(bytes(2000), 24, 16, bits, compression=compression, header=header))


# --- PNM


@pytest.mark.parametrize("comment", ["", "# 8 8\n", "#a\n\n  # b\n"])
@pytest.mark.parametrize("maxval", [1, 100, 255, 256, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize("kind", [2, 3, 5, 6])
def test_pnm(kind, maxval, comment):
    values = np.round(maxval * (COLOUR if kind in (3, 6) else RAMP)).astype(int)
    data = pnm(kind, values, maxval, comment)
    np.testing.assert_allclose(read(data, bit_depth=16), as_rgb(values / maxval), atol=1e-6)
    assert loaded(data).undeclared == (65535 if maxval == 65535 else None)


@pytest.mark.parametrize("kind", [1, 4])
def test_bitmap(kind):
    ink = (INDICES[:, :23] % 3 == 0).astype(int)
    data = pnm(kind, ink)
    assert np.array_equal(read_image(data), as_rgb(255 * (1 - ink)))
    if kind == 1:
        close = b"P1 23 16\n" + "".join(map(str, ink.ravel())).encode()
        assert np.array_equal(read_image(close), read_image(data))


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\t"])
@pytest.mark.parametrize("maxval", [255, 4095])
def test_ends_of_lines_are_no_pixels(maxval, end):
    """Windows writes two bytes. Where one is a pixel, one is missing at the end."""
    values = np.arange(10, 10 + 12).reshape(3, 4)
    header, pixels = pnm(5, values, maxval).split(str(maxval).encode() + b"\n")
    data = header.replace(b"\n", end.encode()) + str(maxval).encode() + end.encode() + pixels
    np.testing.assert_allclose(read(data), as_rgb(values / maxval), atol=1e-6)
    if maxval == 255:
        with pytest.raises(ImageError, match="cut short"):
            read(header + b"255\r" + pixels)


def test_maxval_of_65535_says_nothing():
    data = pnm(5, of_depth(RAMP, 12), 65535)
    np.testing.assert_allclose(read(data, bit_depth=12), as_rgb(RAMP), atol=1e-3)
    assert loaded(data).undeclared == 4095


@pytest.mark.parametrize("kind", [2, 5])
def test_values_above_maxval_are_refused(kind):
    values = of_depth(RAMP, 11)
    with pytest.raises(ImageError, match="a value is 2047, but the file says that white is 1023"):
        read_image(pnm(kind, values, 1023), Reading(bit_depth=11))
    if kind == 2:
        with pytest.raises(
            ImageError, match="a value is 2047, but the file says that white is 255"
        ):
            read_image(pnm(kind, values, 255))


def test_several_images_in_a_pnm():
    data = b"".join(pnm(5, of_depth(image, 8), 255) for image in (RAMP, 1 - RAMP, RAMP))
    assert np.array_equal(read_image(data), as_rgb(of_depth(RAMP, 8)))
    assert loaded(data).n_pages == 3


@pytest.mark.parametrize(
    "data",
    [
        b"P5 0 5 255\n",
        b"P5 5 5 0\n",
        b"P5 5 5 65536\n" + bytes(50),
        b"P5 5\n",
        b"P2 2 1 255\n1 x",
        b"P1 2 1\n12",
    ],
)
def test_damaged_pnm(data):
    with pytest.raises(ImageError, match=r"damaged or cut short|pixels"):
        read_image(data)


# --- WebP


def webp(values, **options):
    return encode(np.uint8(values), "WEBP", **options)


def test_webp():
    colour, rgba = of_depth(COLOUR, 8), of_depth(IMAGES[RGB_ALPHA], 8)
    assert np.array_equal(read_image(webp(colour, lossless=True)), colour)
    assert np.array_equal(read_image(webp(rgba, lossless=True, exact=True)), rgba[..., :3])
    ramp = as_rgb(of_depth(RAMP, 8))
    assert np.abs(read_image(webp(ramp, quality=95)) - ramp).max() < 20
    frames = [Image.fromarray(np.uint8(of_depth(image, 8))) for image in (COLOUR, 1 - COLOUR)]
    stream = io.BytesIO()
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(read_image(stream.getvalue()), colour)
    assert loaded(stream.getvalue()).n_pages == 2


# --- orientation


def riff(*chunks):
    body = b"".join(k + struct.pack("<I", len(d)) + d + bytes(len(d) % 2) for k, d in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_with(image, kind, metadata):
    """An extended WebP around a simple one."""
    flags = {b"EXIF": 8, b"XMP ": 4}[kind] | (16 if image.shape[2] == 4 else 0)
    data = webp(image, lossless=True, exact=True)
    at = data.index(b"VP8L")
    (size,) = struct.unpack_from("<I", data, at + 4)
    height, width = image.shape[:2]
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    extended = bytes([flags, 0, 0, 0]) + sizes
    return riff((b"VP8X", extended), (b"VP8L", data[at + 8 : at + 8 + size]), (kind, metadata))


def png_text(kind, keyword, text):
    flags = b"\0\0\0\0" if kind == b"iTXt" else b""
    return chunk(kind, keyword + b"\0" + flags + text)


def as_profile(data):
    digits = data.hex()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    return f"\nexif\n{len(data):8}\n{lines}\n".encode()


METADATA = {
    "exif": lambda o: {"before": [chunk(b"eXIf", exif(o))]},
    "exif, big-endian": lambda o: {"before": [chunk(b"eXIf", exif(o, ">"))]},
    "exif, behind the pixels": lambda o: {"after": [chunk(b"eXIf", exif(o))]},
    "exif, damaged": lambda o: {"before": [chunk(b"eXIf", exif(o, damaged=True))]},
    "exif, as text": lambda o: {
        "before": [chunk(b"tEXt", b"Raw profile type exif\0" + as_profile(b"Exif\0\0" + exif(o)))]
    },
    "exif, as compressed text": lambda o: {
        "after": [chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(as_profile(exif(o))))]
    },
    "xmp": lambda o: {"before": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(o))]},
    "xmp, compressed": lambda o: {
        "before": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(o)))]
    },
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("metadata", METADATA)
def test_orientation_in_a_png(metadata, orientation):
    stored = as_stored(of_depth(RAMP, 8), orientation)
    image = read_image(png(stored, 8, GREY, **METADATA[metadata](orientation)))
    assert np.array_equal(image, as_rgb(of_depth(RAMP, 8)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("bits", "colour"), PNGS)
def test_orientation_of_every_kind_of_png(bits, colour, orientation):
    before = [chunk(b"eXIf", exif(orientation))]
    if colour == PALETTE:
        grey = np.round(np.arange(2**bits) * (255 / (2**bits - 1))).astype(np.uint8)
        before.append(chunk(b"PLTE", np.stack([grey] * 3, 1).tobytes()))
    values = of_depth(IMAGES[GREY if colour == PALETTE else colour], bits)
    image = read(png(as_stored(values, orientation), bits, colour, before=before))
    expected = values[..., 0] if colour == GREY_ALPHA else values
    np.testing.assert_allclose(image, as_rgb(expected / (2**bits - 1)), atol=1e-7)
    (height, width) = loaded(png(as_stored(values, orientation), bits, colour, before=before)).size
    assert (height, width) == SHAPE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("metadata", ["exif", "exif, big-endian", "exif, damaged", "xmp"])
@pytest.mark.parametrize("kind", ["grey", "ycc", "rgb", "cmyk", "ycck"])
def test_orientation_in_a_jpeg(kind, metadata, orientation):
    extra = {
        "exif": segment(0xE1, b"Exif\0\0" + exif(orientation)),
        "exif, big-endian": segment(0xE1, b"Exif\0\0" + exif(orientation, ">")),
        "exif, damaged": segment(0xE1, b"Exif\0\0" + exif(orientation, damaged=True)),
        "xmp": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation)),
    }[metadata]
    transform = {"rgb": 0, "ycck": 2}.get(kind)
    extra += b"" if transform is None else adobe(transform)
    stored = {
        "grey": BLOCKS[..., :1],
        "ycc": to_ycc(BLOCKS),
        "rgb": BLOCKS,
        "cmyk": INK,
        "ycck": YCCK,
    }[kind]
    expected = {"grey": BLOCKS[..., [0, 0, 0]], "cmyk": INKED, "ycck": INKED}.get(kind, BLOCKS)
    image = read_image(jpeg(as_stored(stored, orientation), extra=extra))
    assert np.abs(image - enlarged(expected)).max() <= 2.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [b"EXIF", b"XMP "])
@pytest.mark.parametrize("colour", [RGB, RGB_ALPHA])
def test_orientation_in_a_webp(colour, kind, orientation):
    stored = np.ascontiguousarray(as_stored(of_depth(IMAGES[colour], 8), orientation))
    metadata = xmp(orientation) if kind == b"XMP " else exif(orientation)
    image = read_image(webp_with(stored, kind, metadata))
    assert np.array_equal(image, of_depth(COLOUR, 8))


@pytest.mark.parametrize("orientation", [0, 9, 6000])
def test_orientations_that_do_not_exist(orientation):
    values = of_depth(RAMP, 8)
    image = read_image(png(values, 8, GREY, before=[chunk(b"eXIf", exif(orientation))]))
    assert np.array_equal(image, as_rgb(values))


# --- images in memory


GREY_8, COLOUR_8 = np.uint8(of_depth(RAMP, 8)), np.uint8(of_depth(COLOUR, 8))
IN_MEMORY = {
    "1": (Image.fromarray(RAMP > 0.5), as_rgb(RAMP > 0.5)),
    "L": (Image.fromarray(GREY_8), as_rgb(GREY_8 / 255)),
    "LA": (Image.fromarray(np.uint8(of_depth(IMAGES[GREY_ALPHA], 8))), as_rgb(GREY_8 / 255)),
    "P": (Image.fromarray(GREY_8).convert("P"), as_rgb(GREY_8 / 255)),
    "RGB": (Image.fromarray(COLOUR_8), COLOUR_8 / 255),
    "RGBA": (Image.fromarray(np.uint8(of_depth(IMAGES[RGB_ALPHA], 8))), COLOUR_8 / 255),
    "CMYK": (Image.fromarray(COLOUR_8).convert("CMYK"), COLOUR_8 / 255),
    "I;16": (Image.fromarray(np.uint16(of_depth(RAMP, 16))), as_rgb(RAMP)),
    "F": (Image.fromarray(np.float32(RAMP)), as_rgb(RAMP)),
}


@pytest.mark.parametrize("mode", IN_MEMORY)
def test_images_of_pillow(mode):
    image, expected = IN_MEMORY[mode]
    assert image.mode == mode
    before = image.tobytes()
    np.testing.assert_allclose(read(image), expected, atol=1e-5)
    assert image.tobytes() == before


METHODS = Image.Transpose
# What a sensor that is turned does to an image, by the orientation that it writes.
STORED_AS = {
    2: METHODS.FLIP_LEFT_RIGHT,
    3: METHODS.ROTATE_180,
    4: METHODS.FLIP_TOP_BOTTOM,
    5: METHODS.TRANSPOSE,
    6: METHODS.ROTATE_90,
    7: METHODS.TRANSVERSE,
    8: METHODS.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", IN_MEMORY)
def test_exif_of_an_image_in_memory(mode, orientation):
    image, expected = IN_MEMORY[mode]
    stored = image.transpose(STORED_AS[orientation]) if orientation > 1 else image.copy()
    stored.getexif()[0x0112] = orientation
    np.testing.assert_allclose(read(stored), expected, atol=1e-5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_that_is_opened_and_not_loaded(tmp_path, dtype, orientation):
    """Pillow maps it into memory with its sides swapped, unless it is kept from it."""
    values = of_depth(RAMP, 8 * dtype().itemsize).astype(dtype)
    stored = np.ascontiguousarray(as_stored(values, orientation))
    tag = (274, 3, 1, orientation, True)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", extratags=[tag])
    with Image.open(tmp_path / "a.tif") as image:
        np.testing.assert_allclose(read(image), as_rgb(RAMP), atol=1e-2)
        assert image.filename == str(tmp_path / "a.tif")


def test_pages_of_an_image_in_memory(tmp_path):
    values = np.uint8(of_depth(RAMP, 8))
    pages = np.stack([values, values // 2])
    tifffile.imwrite(tmp_path / "b.tif", pages, photometric="minisblack")
    with Image.open(tmp_path / "b.tif") as image:
        assert loaded(image).n_pages == 2
        image.seek(1)
        assert loaded(image).n_pages == 1
        np.testing.assert_allclose(read(image), as_rgb(RAMP / 2), atol=1e-2)


def test_other_modes_of_pillow_are_refused():
    for mode in ("I", "LAB", "HSV"):
        with pytest.raises(ImageError, match=f"image: an image of mode {mode}: pass one of mode"):
            read_image(Image.new(mode, (4, 4)))


def test_bytes_path_and_pillow_agree(tmp_path):
    data = png(of_depth(COLOUR, 8), 8, RGB, before=[chunk(b"eXIf", exif(6))])
    (tmp_path / "a.png").write_bytes(data)
    expected = read_image(tmp_path / "a.png")
    assert np.array_equal(read_image(data), expected)
    assert np.array_equal(read_image(Image.open(io.BytesIO(data))), expected)
    with pytest.raises(ImageError, match=r"^camera 2: "):
        load(data[:99], "camera 2", (8, 8))


# --- 16 bits, and what is said of the image as a whole


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_bit_depth(bits):
    values = of_depth(COLOUR, bits)
    data, array = png(values, 16, RGB), np.uint16(values)
    for image in (data, array):
        np.testing.assert_allclose(read(image, bit_depth=bits), values / (2**bits - 1), atol=1e-6)
        np.testing.assert_allclose(read(image), values / 65535, atol=1e-6)
        assert loaded(image, bit_depth=bits).undeclared == 2**bits - 1
        assert loaded(image).undeclared == 2**bits - 1
        if bits > 8:
            reason = (
                f"a value is {values.max()}, but white is 511 at bit_depth=9; give bit_depth={bits}"
            )
            with pytest.raises(ImageError, match=reason):
                read(image, bit_depth=9)


def test_8_bits_do_not_heed_bit_depth():
    data = png(of_depth(RAMP, 8), 8, GREY)
    assert np.array_equal(read(data, bit_depth=12), read(data))
    assert loaded(data).undeclared is None


@pytest.mark.parametrize("colour", IMAGES)
@pytest.mark.parametrize("bits", [8, 16])
def test_constant_images(bits, colour):
    values = np.zeros_like(of_depth(IMAGES[colour], bits)) + of_depth(0.3, bits)
    assert loaded(png(values, bits, colour)).constant
    values[3, 4] += 1
    assert not loaded(png(values, bits, colour)).constant
    assert not loaded(png(of_depth(IMAGES[colour], bits), bits, colour)).constant
    assert loaded(np.full((5, 7, 3), 0.25)).constant
    assert not loaded(np.eye(7)[..., None]).constant


# --- what is not read

OTHER_FILES = {
    "a GIF image": b"GIF89a\x10\0",
    "a JPEG 2000 image": b"\0\0\0\x0cjP  \r\n\x87\n",
    "a JPEG XL image": b"\xff\x0a\x10",
    "a HEIC image": b"\0\0\0\x18ftypheic\0\0\0\0",
    "an AVIF image": b"\0\0\0\x18ftypavif\0\0\0\0",
    "an AVIF image: not read": b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf",
    "a Photoshop file": b"8BPS\0\1",
    "a DICOM file": bytes(128) + b"DICM",
    "a PDF file": b"%PDF-1.7",
    "an OpenEXR image": b"v/1\1\2\0\0\0",
    "a raw image of a camera": b"FUJIFILMCCD-RAW 0201",
    "a PAM or PFM image": b"P7\nWIDTH 4\n",
    "an SVG drawing": b"<svg xmlns='...'>",
    "a video": b"\0\0\0\x18ftypmp42",
    "an HTML page": b"\n<!DOCTYPE html>\n<html>",
    "a ZIP archive": b"PK\3\4\x14\0",
    "text": "größer\n".encode(),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid",
    "a file that begins with zeros": bytes(5000),
    "the file is empty": b"",
    "not a PNG, JPEG, BMP, TIFF, WebP or PNM image": b"\7\7\7",
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_named(name):
    with pytest.raises(ImageError, match=name) as caught:
        read_image(OTHER_FILES[name])
    assert "cut short" not in str(caught.value)


def test_words_that_begin_like_an_image():
    for text in (b"BMW, 3 series, painted", b"P5: the fifth part", b"II*", b"Portrait"):
        with pytest.raises(ImageError, match="text is not an image"):
            read_image(text)


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="a pipe, a device or a socket"):
        read_image(tmp_path / "a.png")


# --- files that are cut short

WHOLE = {
    "grey png": png(of_depth(RAMP, 8), 8, GREY),
    "16-bit png": png(of_depth(COLOUR, 16), 16, RGB),
    "interlaced png": png(of_depth(RAMP, 16), 16, GREY, interlaced=True),
    "jpeg": jpeg(to_ycc(BLOCKS)),
    "progressive jpeg": encode(np.uint8(enlarged(BLOCKS)), "JPEG", progressive=True),
    "bmp": bmp(bmp_rows(packed(COLOUR, 8, 8, 8)[0], 24), 24, 16, 24),
    "run lengths": bmp(
        run_lengths(INDICES, nibbles=False), 24, 16, 8, compression=1, palette=bgrx(PALETTE_256)
    ),
    "pgm": pnm(5, of_depth(RAMP, 12), 4095),
    "ascii": pnm(2, of_depth(RAMP, 8) // 100 + 1, 255),
    "bitmap": pnm(4, INDICES % 2),
    "lossless webp": webp(COLOUR_8, lossless=True),
    "webp": webp(COLOUR_8),
}


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("kind", WHOLE)
def test_a_cut_file_is_never_grey(kind, truncated, monkeypatch):
    """Also where the program has told Pillow to make up what is missing."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", truncated)
    data = WHOLE[kind]
    expected = read_image(data)
    missing = np.linspace(1, len(data), 80).astype(int)
    n_refused = 0
    for n in {*missing, *range(1, 12)}:
        try:
            image = read_image(data[:-n])
        except ImageError:
            n_refused += 1
        else:
            assert np.array_equal(image, expected)  # what was cut off are no pixels
    assert n_refused > 50
    with pytest.raises(ImageError, match=r"cut short"):
        read_image(data[: len(data) * 2 // 3])


def test_threads_read_any_number_of_files():
    expected = {kind: read_image(data) for kind, data in WHOLE.items()}
    wrong = []

    def work():
        wrong.extend(
            k for k, data in WHOLE.items() if not np.array_equal(read_image(data), expected[k])
        )

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
