"""TIFF: the same ramp in every way of writing it comes out, or is refused by name."""

import io
import itertools
import struct
import time
import tracemalloc

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiff_files import (
    COMPRESS,
    DEFLATE,
    LZW,
    NONE,
    PACKBITS,
    REVERSED,
    ZSTD,
    page,
    pages,
    ramp,
    sensor,
    tiff,
)

from npad.images import ImageError, Reading
from npad.images.decoding import read_samples
from npad.images.tiff import read_tiff

JPEG, GROUP4 = 7, 4
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LINEAR_RAW = 0, 1, 2, 3, 5, 6, 34892
ORDERS = list(itertools.product("<>", [False, True]))  # of bytes; and whether it is a BigTIFF
PIECES = {
    "one strip": {},
    "strips": {"rows_per_strip": 5},
    "single rows": {"rows_per_strip": 1},
    "tiles": {"tile": (16, 32)},
    "planes": {"planar": True},
    "strips of planes": {"rows_per_strip": 5, "planar": True},
    "tiles of planes": {"tile": (16, 16), "planar": True},
}


def read(data, **reading):
    return read_samples(data, "a.tif", Reading(**reading))


def check(samples, expected, white=None):
    assert samples.values.dtype == expected.dtype
    np.testing.assert_array_equal(samples.values, expected)
    assert samples.white == white


def has_zstandard():
    """Whether Pillow can compress what it should decompress."""
    try:
        Image.new("L", (8, 8)).save(io.BytesIO(), "TIFF", compression="zstd")
    except (OSError, ValueError):
        return False
    return True


# --- every way to write it


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("compression", COMPRESS)
def test_integers(compression, pieces):
    """Grey and RGB of each depth, both orders of bytes and bits, with and without differences."""
    if compression == ZSTD and not has_zstandard():
        with pytest.raises(ImageError, match=r"Pillow lacks Zstandard.*save it without"):
            read(tiff(ramp(8), compression=ZSTD))
        return
    n_channels = [3] if PIECES[pieces].get("planar") else [1, 3]
    for bits, n, fill_order in itertools.product([1, 2, 4, 8, 10, 12, 14, 16], n_channels, [1, 2]):
        values = ramp(bits, n)
        expected = values if n > 1 else values[..., 0]
        if bits < 8:
            expected = expected * np.uint8(255 // (2**bits - 1))
        predictors = [1] if bits % 8 or compression in (NONE, PACKBITS) else [1, 2]
        for i, predictor in enumerate(predictors):
            order, big = ORDERS[(bits + n + fill_order + i) % 4]
            options = {"compression": compression, "fill_order": fill_order, "bits": bits}
            options |= {"predictor": predictor, "photometric": RGB if n == 3 else BLACK_IS_ZERO}
            data = tiff(values, order=order, big=big, **options, **PIECES[pieces])
            check(read(data), expected, 2**bits - 1 if 8 < bits < 16 else None)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("predictor", [1, 2, 3])
def test_floats(dtype, predictor):
    for (order, big), pieces, n in itertools.product(ORDERS, PIECES.values(), [1, 3]):
        if n == 1 and pieces.get("planar"):
            continue
        values = ramp(0, n, dtype=dtype)
        options = {"predictor": predictor, "compression": NONE if predictor == 1 else DEFLATE}
        photometric = RGB if n == 3 else BLACK_IS_ZERO
        data = tiff(values, photometric, order=order, big=big, **options, **pieces)
        check(read(data), np.float32(values if n > 1 else values[..., 0]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [NONE, LZW, DEFLATE, PACKBITS])
def test_orientations(compression, orientation):
    for pieces, (bits, n) in itertools.product(PIECES.values(), [(8, 1), (16, 1), (8, 3), (16, 3)]):
        if n == 1 and pieces.get("planar"):
            continue
        upright = ramp(bits, n)
        data = tiff(
            sensor(upright, orientation),
            RGB if n == 3 else BLACK_IS_ZERO,
            compression=compression,
            tags={274: orientation},
            **pieces,
        )
        check(read(data), upright if n > 1 else upright[..., 0])


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    check(read(tiff(ramp(8), tags={274: orientation})), ramp(8)[..., 0])


@pytest.mark.parametrize("tag", [None, 1])
def test_an_orientation_in_xmp(tag):
    """Counts where there is no tag."""
    data = tiff(GREY8, tags={274: tag, 700: b'<x tiff:Orientation="3"/>'})
    check(read(data), GREY8[..., 0] if tag else sensor(GREY8, 3)[..., 0])


@pytest.mark.parametrize("dtype", ["u1", "u2", "f2", "f4", "f8"])
@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("compression", [None, "deflate", "lzma"])
def test_what_tifffile_writes(tmp_path, dtype, byteorder, compression):
    bits = 8 * np.dtype(dtype).itemsize
    grey = ramp(0, 1, dtype=dtype) if dtype[0] == "f" else ramp(bits)
    rgb = ramp(0, 3, dtype=dtype) if dtype[0] == "f" else ramp(bits, 3)
    result = "f4" if dtype[0] == "f" else dtype
    for more in ({}, {"rowsperstrip": 4}, {"tile": (16, 16)}, {"bigtiff": True}):
        options = more | {"byteorder": byteorder, "compression": compression}
        tifffile.imwrite(tmp_path / "a.tif", grey[..., 0], **options)
        check(read((tmp_path / "a.tif").read_bytes()), grey[..., 0].astype(result))
        tifffile.imwrite(tmp_path / "b.tif", rgb, photometric="rgb", **options)
        check(read((tmp_path / "b.tif").read_bytes()), rgb.astype(result))
        planar = np.moveaxis(rgb, 2, 0)
        options |= {"photometric": "rgb", "planarconfig": "separate"}
        tifffile.imwrite(tmp_path / "c.tif", planar, **options)
        check(read((tmp_path / "c.tif").read_bytes()), rgb.astype(result))


def jpeg(mode, shape, **options):
    """Compresses rows of bytes, as the file of a picture of their own."""

    def compress(data):
        image = Image.frombytes(mode, (shape[1], len(data) // shape[1] // len(mode)), data)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=100, subsampling=0, **options)
        return stream.getvalue()

    return compress


@pytest.mark.parametrize("pieces", ["one strip", "strips", "tiles"])
def test_jpeg(pieces):
    """Smooth, so that JPEG hardly changes it."""
    y, x = np.mgrid[:48, :64]
    rgb = np.stack([4 * x, 5 * y, 2 * (x + y)], axis=2).astype(np.uint8)
    options = PIECES[pieces] | {"compression": JPEG}
    options |= {"rows_per_strip": 16} if pieces == "strips" else {}
    shape = (48, 32 if pieces == "tiles" else 64)
    for mode, photometric in [("L", BLACK_IS_ZERO), ("L", WHITE_IS_ZERO), ("RGB", YCBCR)]:
        values = rgb if mode == "RGB" else rgb[..., :1]
        data = tiff(values, photometric, compress=jpeg(mode, shape), tags={530: [1, 1]}, **options)
        got = read(data).values
        expected = values if mode == "RGB" else values[..., 0]
        expected = 255 - expected if photometric == WHITE_IS_ZERO else expected
        assert np.abs(got.astype(int) - expected).max() <= 3
        turned = tiff(
            sensor(values, 3), photometric, compress=jpeg(mode, shape), tags={274: 3}, **options
        )
        assert np.abs(read(turned).values.astype(int) - expected).max() <= 3


def test_jpeg_whose_colours_are_others_than_the_tags_say():
    pixels = ramp(8, 3, (16, 16))
    named_rgb = jpeg("RGB", (16, 16), keep_rgb=True)
    for compress, photometric in [(jpeg("RGB", (16, 16)), RGB), (named_rgb, YCBCR)]:
        data = tiff(pixels, photometric, compression=JPEG, compress=compress)
        with pytest.raises(ImageError, match="its tags and its JPEG data name different colours"):
            read(data)
    data = tiff(pixels, RGB, compression=JPEG, compress=named_rgb)
    assert np.abs(read(data).values.astype(int) - pixels).max() <= 3


@pytest.mark.parametrize("compression", ["tiff_ccitt", "group3", "group4"])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
@pytest.mark.parametrize("fill_order", [1, 2])
def test_fax_codes(compression, photometric, fill_order):
    """Strips of Pillow's in a file of our own."""
    bits = (ramp(8, 1, (40, 60))[..., 0] % 7 < 3).astype(np.uint8)
    strips = []
    for y in range(0, 40, 8):
        stream = io.BytesIO()
        image = Image.fromarray(bits[y : y + 8] * np.uint8(255)).convert("1")
        image.save(stream, "TIFF", compression=compression)
        with tifffile.TiffFile(io.BytesIO(stream.getvalue())) as file:
            first = file.pages[0]
            tags = {tag: first.tags[tag].value for tag in (292, 293) if tag in first.tags}
            code = first.tags[259].value
            inverted = first.tags[262].value == WHITE_IS_ZERO
            strip = stream.getvalue()[first.dataoffsets[0] :][: first.databytecounts[0]]
        strips.append(strip.translate(REVERSED) if fill_order == 2 else strip)
    tags = {256: 60, 257: 40, 258: 1, 259: code, 262: photometric, 278: 8, **tags}
    samples = read(pages([page(tags | {266: fill_order}, strips)]))
    stored = 1 - bits if inverted else bits
    check(samples, 255 * (1 - stored if photometric == WHITE_IS_ZERO else stored))


# --- what samples mean


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 16])
def test_white_is_zero(bits):
    values, white = ramp(bits), 2**bits - 1
    expected = (white - values[..., 0]).astype(values.dtype)
    if bits < 8:
        expected = expected * np.uint8(255 // white)
    check(read(tiff(values, WHITE_IS_ZERO, bits)), expected, white if 8 < bits < 16 else None)


def test_16_bits_are_inverted_about_the_white_of_the_camera():
    data = tiff(ramp(12), WHITE_IS_ZERO, tags={281: 4095})
    check(read(data), 4095 - ramp(12)[..., 0], 4095)
    check(read(tiff(ramp(12), WHITE_IS_ZERO), bit_depth=12), 4095 - ramp(12)[..., 0])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("times", [1, 256, 257])
def test_palettes(bits, times):
    """Of 16 bits by the standard; some write 8, and some multiply by 256."""
    colours = np.random.default_rng(bits).integers(0, 256, (3, 2**bits))
    index = ramp(bits)
    data = tiff(index, PALETTE, bits, tags={320: (colours * times).ravel()})
    check(read(data), colours.T.astype(np.uint8)[index[..., 0]])


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", [False, True])
def test_cmyk(bits, planar):
    top = 2**bits - 1
    cyan = ramp(bits)
    ink = np.concatenate([cyan, cyan * 0, cyan * 0 + top, cyan * 0], axis=2)
    expected = np.concatenate([top - cyan, cyan * 0 + top, cyan * 0], axis=2)
    check(read(tiff(ink, CMYK, planar=planar)), expected, 65535 if bits == 16 else None)
    ink[..., 3] = top  # black ink over all
    check(read(tiff(ink, CMYK, planar=planar)), expected * 0, 65535 if bits == 16 else None)


def test_ycbcr_without_jpeg():
    rgb = np.uint8([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]])
    stored = np.uint8(
        [[[0, 128, 128], [255, 128, 128], [76, 85, 255], [150, 44, 21], [29, 255, 107]]]
    )
    got = read(tiff(stored, YCBCR, tags={530: [1, 1]})).values
    assert np.abs(got.astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(("kind", "n"), [(2, 1), (1, 1), (0, 3), (1, 3), (2, 3), (None, 3)])
def test_alpha_is_dropped(bits, planar, kind, n):
    alpha = ramp(bits)[::-1]
    if kind == 1:
        alpha = np.full_like(alpha, 2**bits - 1)
    values = np.concatenate([ramp(bits, n), alpha], axis=2)
    photometric = RGB if n == 3 else BLACK_IS_ZERO
    data = tiff(values, photometric, planar=planar, tags={338: kind})
    check(read(data), values[..., :3] if n == 3 else values[..., 0])


@pytest.mark.parametrize("extra", [0, 2])
def test_cmyk_with_alpha(extra):
    values = np.concatenate([ramp(8, 4), ramp(8)], axis=2)
    expected = read(tiff(ramp(8, 4), CMYK)).values
    check(read(tiff(values, CMYK, tags={338: extra})), expected)


# --- what white is


@pytest.mark.parametrize("bits", range(1, 17))
def test_bits_per_sample(bits):
    samples = read(tiff(ramp(bits), bits=bits))
    white = 255 if samples.values.dtype == np.uint8 else samples.white or 65535
    np.testing.assert_allclose(
        samples.values / white, ramp(bits)[..., 0] / (2**bits - 1), rtol=1e-12
    )


@pytest.mark.parametrize("bits", range(9, 16))
@pytest.mark.parametrize("pieces", ["one strip", "strips", "tiles"])
@pytest.mark.parametrize("order", "<>")
def test_few_bits_in_words_of_16(bits, pieces, order):
    """As some cameras write them: the strips are as large as of 16 bits."""
    data = tiff(ramp(bits), order=order, tags={258: bits}, **PIECES[pieces])
    check(read(data), ramp(bits)[..., 0], 2**bits - 1)


@pytest.mark.parametrize("tag", [281, 341])
@pytest.mark.parametrize(
    ("value", "white"),
    [
        (1023, 1023),
        (4095, 4095),
        (16383, 16383),
        (65535, None),  # the default
        (4000, None),
        (0, None),
        (1, None),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_max_sample_value(tag, value, white, n):
    """All ones speak of the camera; any other is the largest value of this picture."""
    values = ramp(10, n).astype(np.uint16)
    data = tiff(values, RGB if n == 3 else BLACK_IS_ZERO, tags={tag: [value] * n})
    check(read(data), values if n == 3 else values[..., 0], white)


def test_what_is_no_more_than_the_default_hides_nothing():
    values = ramp(12)
    data = tiff(values, tags={281: 4095, 341: 65535})
    check(read(data), values[..., 0], 4095)


def test_max_sample_value_says_nothing_of_8_bits():
    check(read(tiff(ramp(8), tags={281: 127})), ramp(8)[..., 0])


@pytest.mark.parametrize("photometric", [BLACK_IS_ZERO, LINEAR_RAW])
def test_white_level(photometric):
    grey = ramp(12)
    check(read(tiff(grey, photometric, tags={50717: 3900})), grey[..., 0], 3900)
    check(read(tiff(ramp(8), photometric, tags={50717: 255})), ramp(8)[..., 0])
    check(
        read(tiff(ramp(8), photometric, tags={50717: 200})), ramp(8)[..., 0].astype(np.uint16), 200
    )


def test_linear_raw_colour():
    values = ramp(14, 3)
    data = tiff(values, LINEAR_RAW, tags={50717: [16000, 16100, 15900], 50714: [0, 0, 0]})
    check(read(data), values, 16100)


def test_black_level():
    values = ramp(12)
    data = tiff(values, LINEAR_RAW, tags={50717: 4000, 50714: 256})
    check(read(data), np.maximum(values[..., 0], 256) - np.uint16(256), 3744)
    check(
        read(tiff(ramp(8), LINEAR_RAW, tags={50714: 5})),
        np.maximum(ramp(8)[..., 0], 5).astype(np.uint16) - np.uint16(5),
        250,
    )


# --- what is refused

GREY8 = ramp(8)
REFUSED = {
    "signed": (tiff(ramp(16), tags={339: 2}), "grey of 16-bit signed samples.*save it as 8- or"),
    "signed bytes": (tiff(GREY8, tags={339: 2}), "grey of 8-bit signed samples"),
    "undefined": (tiff(GREY8, tags={339: 4}), "grey of 8-bit undefined samples"),
    "32 bits": (tiff(GREY8.astype("u4")), "grey of 32-bit unsigned samples"),
    "64 bits": (tiff(GREY8.astype("u8")), "grey of 64-bit unsigned samples"),
    "complex": (tiff(GREY8.astype("u8"), tags={339: 6}), "grey of 64-bit complex samples"),
    "float24": (tiff(GREY8, 1, 24, tags={339: 3, 279: 1}), "grey of 24-bit floating-point samples"),
    "inverted float": (
        tiff(np.float32(GREY8), WHITE_IS_ZERO),
        "grey of which 0 is white of 32-bit floating-point samples",
    ),
    "float CMYK": (tiff(np.float32(ramp(8, 4)), CMYK), "CMYK of 32-bit floating-point samples"),
    "5, 6, 5 bits": (tiff(ramp(8, 3), RGB, tags={258: [5, 6, 5]}), r"BitsPerSample \[5, 6\]"),
    "two formats": (tiff(ramp(8, 3), RGB, tags={339: [1, 1, 3]}), r"SampleFormat \[1, 3\]"),
    "L*a*b*": (tiff(ramp(8, 3), 8), r"L\*a\*b\* colours: save it as RGB"),
    "LogLuv": (tiff(ramp(8, 3), 32845), "LogLuv.*float32"),
    "CFA": (tiff(ramp(16), 32803), "raw mosaic of a colour camera.*develop it first"),
    "mask": (tiff(ramp(1), 4, 1), "a transparency mask"),
    "no photometric": (tiff(GREY8, None), "its colours are not named"),
    "unknown photometric": (tiff(GREY8, 77), r"its colours \(number 77\) are not read"),
    "multispectral": (
        tiff(ramp(8, 5), tags={338: [0] * 4}),
        "a pixel has 5 samples, where grey has 1",
    ),
    "seven with RGB": (tiff(ramp(8, 7), RGB), "a pixel has 7 samples, where RGB has 3"),
    "two bands": (tiff(ramp(8, 2), tags={338: 0}), "does not say what they are.*ExtraSamples = 2"),
    "RGB of one": (tiff(GREY8, RGB), "a pixel has 1 samples, where RGB has 3"),
    "premultiplied": (tiff(ramp(8, 4), RGB, tags={338: 1}), "multiplied by an alpha"),
    "premultiplied floats": (
        tiff(ramp(0, 2, dtype="f4"), tags={338: 1}),
        "multiplied by an alpha",
    ),
    "other inks": (tiff(ramp(8, 4), CMYK, tags={332: 2}), "its inks are others"),
    "volume": (tiff(GREY8, tags={32997: 4}), "it is a volume"),
    "indexed": (tiff(GREY8, tags={346: 1}), "palette is of another kind"),
    "coded raw": (tiff(GREY8, LINEAR_RAW, tags={50712: [0, 1]}), "LinearizationTable.*develop"),
    "black levels": (tiff(ramp(8, 3), LINEAR_RAW, tags={50714: [1, 2, 1]}), "BlackLevel"),
    "subsampled": (tiff(ramp(8, 3), YCBCR), "YCbCr is reduced in colour"),
    "video range": (
        tiff(ramp(8, 3), YCBCR, tags={530: [1, 1], 532: [16, 235, 128, 240, 128, 240]}),
        "YCbCr is not that of JPEG",
    ),
    "JPEG of 16 bits": (tiff(ramp(16), compression=JPEG, compress=bytes), "1 x 16 bits with JPEG"),
    "fax of 8 bits": (tiff(GREY8, compression=GROUP4, compress=bytes), "1 x 8 bits with CCITT"),
    "old JPEG": (tiff(GREY8, compression=6, compress=bytes), r"\(old-style JPEG\) is not read"),
    "JPEG 2000": (tiff(GREY8, compression=34712, compress=bytes), r"\(JPEG 2000\) is not read"),
    "unknown codec": (tiff(GREY8, compression=4711, compress=bytes), r"\(number 4711\)"),
    "stored differences": (tiff(GREY8, predictor=2), "predictor 2 of 8-bit samples is not read"),
    "unknown predictor": (
        tiff(GREY8, compression=LZW, tags={317: 34892}),
        "predictor 34892 of 8-bit",
    ),
    "packed differences": (
        tiff(ramp(12), bits=12, compression=LZW, tags={317: 2}),
        "predictor 2 of 12-bit",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what):
    data, message = REFUSED[what]
    with pytest.raises(ImageError, match=rf"a\.tif: .*{message}") as refused:
        read(data)
    assert "cut short" not in str(refused.value)
    assert ": " in refused.value.reason  # what is wrong, and what to do


def test_too_many_pixels():
    for options in ({}, {"tile": (16, 16)}):
        with pytest.raises(ImageError, match="37 x 21 pixels are more than 700"):
            read(tiff(GREY8, **options), max_pixels=700)
    with pytest.raises(ImageError, match="65520 x 65520 pixels are more than"):
        read(tiff(GREY8, tile=(16, 16), tags={322: 65520, 323: 65520}))


def test_the_limit_of_the_process_says_nothing(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    check(read(tiff(GREY8, compression=LZW)), GREY8[..., 0])


# --- pages


def grey_page(values, **tags):
    height, width = values.shape[:2]
    given = {256: width, 257: height, 258: 8, 262: 1}
    return page(given | {int(tag[1:]): value for tag, value in tags.items()}, [values.tobytes()])


OTHER = ramp(8, 1, (5, 6))


@pytest.mark.parametrize("mark", [{"_254": 1}, {"_254": 4}, {"_254": 5}, {"_255": 2}])
@pytest.mark.parametrize("big", [False, True])
def test_the_first_full_page_is_read(mark, big):
    """Thumbnails and masks are left out, of the reading and of the count."""
    multi_page = grey_page(GREY8, _254=2)
    data = pages([grey_page(OTHER, **mark), multi_page, grey_page(OTHER)], big=big)
    samples = read(data)
    check(samples, GREY8[..., 0])
    assert samples.n_pages == 2


def test_the_only_page_is_read_whatever_it_is_marked_as():
    check(read(pages([grey_page(GREY8, _254=1)])), GREY8[..., 0])
    with pytest.raises(ImageError, match="each of its pages is marked as a thumbnail or a mask"):
        read(pages([grey_page(GREY8, _254=1)] * 2))


def raw_file(main, orientation=1):
    """A raw file as cameras write it: a thumbnail, and the picture in a directory below it."""
    data = bytearray(pages([grey_page(OTHER, _254=1, _274=orientation, _330=(4, [0])), main]))
    first = struct.unpack_from("<I", data, 4)[0]
    n = struct.unpack_from("<H", data, first)[0]
    following = struct.unpack_from("<I", data, first + 2 + 12 * n)[0]
    for at in range(first + 2, first + 2 + 12 * n, 12):
        if struct.unpack_from("<H", data, at)[0] == 330:
            struct.pack_into("<I", data, at + 8, following)
    struct.pack_into("<I", data, first + 2 + 12 * n, 0)
    return bytes(data)


def test_raw_files():
    main = grey_page(sensor(GREY8, 6), _262=LINEAR_RAW, _254=0)
    samples = read(raw_file(main, orientation=6))
    check(samples, GREY8[..., 0])
    assert samples.n_pages == 1
    with pytest.raises(ImageError, match=r"raw mosaic.*\(CFA\): develop"):
        read(raw_file(grey_page(GREY8, _262=32803, _254=0)))


def test_damage_behind_the_first_page_does_not_spoil_it():
    data = pages([grey_page(GREY8), grey_page(OTHER)])
    second = data.rindex(struct.pack("<HHIHH", 256, 3, 1, 6, 0)) - 2
    for end in range(second, len(data) - 4, 5):
        check(read(data[:end]), GREY8[..., 0])
    for offset in (second, 8, len(data), 2**32 - 1):  # a circle, nonsense, the end, beyond
        looped = data[:-4] + struct.pack("<I", offset)
        samples = read(looped)
        check(samples, GREY8[..., 0])
        assert samples.n_pages == 2


def test_overlapping_directories_end():
    """Each of thousands of pages takes the same bytes for thousands of tags."""
    n = 4095
    starts = range(8, 8 + 12 * n, 4)
    data = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", n) * (1 + 6 * n)
    data += b"".join(struct.pack("<I", start + 4) for start in starts)
    start = time.perf_counter()
    with pytest.raises(ImageError, match="its colours are not named"):
        read(data)
    assert time.perf_counter() - start < 2


# --- damaged files


@pytest.mark.parametrize("compression", [NONE, LZW, DEFLATE, PACKBITS])
@pytest.mark.parametrize("pieces", ["one strip", "strips", "tiles"])
def test_cut_short(compression, pieces):
    """Where the tags are at the end nothing is found; where they stand before, strips are missing."""
    values = ramp(16)
    data = tiff(values, compression=compression, **PIECES[pieces])
    directory = struct.unpack_from("<I", data, 4)[0]
    for end in (0, 3, 7, 20, directory, directory + 30):
        with pytest.raises(Exception):  # noqa: B017, PT011
            read(data[:end])
    with pytest.raises((ValueError, OSError)):
        read(tiff(values, compression=compression, compress=lambda data: b"\0" * 7))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({256: 60000, 257: 2900}, "strips or tiles do not fit into the file"),
        ({256: 0}, "no size"),
        ({278: 0}, "no size"),
        ({278: 2}, "lists 1 strips or tiles and needs 11"),
        ({273: 2**32 - 1}, "do not fit into the file"),
        ({273: 0}, "a strip or tile is missing"),
        ({273: None}, "lists 0 strips or tiles"),
        ({258: (9, [])}, None),
        ({256: (99, [])}, None),
    ],
)
def test_tags_that_lie(tags, message):
    with pytest.raises(ValueError, match=message):
        read(tiff(GREY8, tags=tags))


def test_strips_may_be_where_they_are_without_their_sizes():
    check(read(tiff(GREY8, rows_per_strip=4, tags={279: None})), GREY8[..., 0])
    check(read(tiff(GREY8, compression=DEFLATE, tags={279: None})), GREY8[..., 0])
    with pytest.raises(ValueError, match="does not say how large"):
        read(tiff(GREY8, rows_per_strip=4, compression=DEFLATE, tags={279: None}))


SEEDS = [
    tiff(GREY8, tile=(16, 16), compression=LZW),
    tiff(ramp(16, 3), RGB, compression=DEFLATE, predictor=2, planar=True, big=True),
    tiff(ramp(12), bits=12, order=">", rows_per_strip=3),
    pages([grey_page(OTHER, _254=1), grey_page(GREY8)]),
]


@settings(max_examples=300, deadline=2000)
@given(st.sampled_from(SEEDS), st.data())
def test_any_damage_is_an_error_or_an_image(data, draw):
    damaged = bytearray(data)
    tags_at = struct.unpack_from("<I", data, 4)[0] if data[:4] == b"II*\0" else len(data) - 400
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 1) | st.integers(tags_at, len(data) - 1))
        damaged[at] = draw.draw(st.integers(0, 255))
    try:
        samples = read(bytes(damaged))
    except Exception:
        return
    assert samples.values.size > 0


# --- large files


@pytest.mark.parametrize(("bits", "n"), [(8, 1), (16, 1), (8, 3)])
@pytest.mark.parametrize("pieces", ["one strip", "strips"])
def test_large_images_are_in_memory_once(tmp_path, bits, n, pieces):
    values = np.zeros((4000, 4000, n), f"u{bits // 8}")
    options = {"photometric": "rgb" if n == 3 else "minisblack"}
    if pieces == "strips":
        options["rowsperstrip"] = 16
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    tracemalloc.start()
    with (tmp_path / "a.tif").open("rb") as file:
        read_tiff(file, "a.tif", Reading()).decode()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * values.nbytes + 16e6
