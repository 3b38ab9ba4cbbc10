"""Images of many pixels: in pieces, at a reduced size, one at a time, in little memory."""

import io
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from image_files import encode, smooth_pixels
from PIL import Image
from written_files import GREY, as_stored, exif, png, segment

from npad.images import ImageError, ImageSource, Reading, decoding, scaling, source
from npad.images.decoding import load, read_samples
from npad.images.samples import AS_IT_SAYS


@pytest.fixture
def pieces(monkeypatch):
    """Everything is large, and a piece is a few rows."""
    monkeypatch.setattr(scaling, "ORDINARY", 0)
    monkeypatch.setattr(scaling, "BAND", 400)


def kinds(pixels):
    """The same image in every form that a reader hands out."""
    grey = np.ascontiguousarray(pixels[..., 0])
    yield from (pixels, grey, Image.fromarray(pixels), Image.fromarray(grey))
    yield from (pixels.astype(np.uint16) * 257, Image.fromarray(grey.astype(np.uint16) * 257))
    yield from (pixels.astype(">u2") * 257, (pixels / 255).astype(np.float32), grey[::-1] / 255)


@pytest.mark.parametrize("kind", range(9))
@pytest.mark.parametrize("shape", [(131, 40), (40, 131), (64, 64)])
@pytest.mark.parametrize("size", [(16, 16), (7, 50), (64, 64), (200, 90), (131, 11)])
def test_pieces_make_the_whole(shape, size, kind, monkeypatch):
    values = list(kinds(smooth_pixels(*shape)))[kind]
    white = 255 if kind < 4 else 65535 if kind < 7 else 1
    expected = scaling.resized(values, white, size)
    pixels = scaling.as_pixels(values, white)
    monkeypatch.setattr(scaling, "ORDINARY", 0)
    for band in (1, 400, 2000):
        monkeypatch.setattr(scaling, "BAND", band)
        small = scaling.resized(values, white, size)
        assert small.shape == expected.shape
        np.testing.assert_allclose(small, expected, atol=0 if kind < 4 else 2e-6)
        again = scaling.as_pixels(values, white)
        assert again.dtype == pixels.dtype
        assert np.array_equal(again, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["grey", "colour"])
def test_large_jpegs_are_decoded_at_a_reduced_size(mode, orientation, monkeypatch):
    upright = smooth_pixels(250, 330, 3 if mode == "colour" else 1).squeeze()
    data = encode(np.ascontiguousarray(as_stored(upright, orientation)), "JPEG", quality=95)
    data = data[:2] + segment(0xE1, b"Exif\0\0" + exif(orientation)) + data[2:]
    expected = load(data, "a", (20, 20))
    monkeypatch.setattr(decoding, "LARGE", 1000)
    reduced = read_samples(data, "a", AS_IT_SAYS, least=(20, 20))
    assert (reduced.values.height, reduced.values.width) == (62, 82)  # a quarter
    loaded = load(data, "a", (20, 20))
    assert loaded.size == expected.size == (250, 330)
    assert (loaded.tensor - expected.tensor).abs().max() < 0.02
    kept = load(data, "a", (20, 20), keep_pixels=True)
    assert kept.pixels.shape == (250, 330, 3)
    assert np.array_equal(kept.tensor, expected.tensor)


@pytest.mark.parametrize(
    ("size", "factor"),
    [((16, 16), 8), ((32, 32), 4), ((33, 16), 2), ((64, 64), 2), ((65, 9), 1), ((300, 300), 1)],
)
def test_a_reduced_size_is_twice_what_is_needed(size, factor):
    data = encode(smooth_pixels(256, 256), "JPEG")
    samples = read_samples(data, "a", AS_IT_SAYS, least=size)
    assert samples.values.size == (256 // factor, 256 // factor)
    assert samples.size == (256, 256)


def test_ordinary_images_are_not_reduced():
    data = encode(smooth_pixels(256, 256), "JPEG")
    whole = Image.open(io.BytesIO(data)).resize((16, 16), Image.Resampling.BILINEAR)
    expected = np.asarray(whole, np.float32) / 255
    assert np.array_equal(load(data, "a", (16, 16)).tensor.permute(1, 2, 0), expected)


@pytest.mark.parametrize("kind", range(9))
def test_the_limit_of_the_program_changes_nothing(kind, pieces, monkeypatch):
    values = list(kinds(smooth_pixels(131, 40)))[kind]
    white = 255 if kind < 4 else 65535 if kind < 7 else 1
    expected = scaling.resized(values, white, (16, 16)), scaling.as_pixels(values, white)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert np.array_equal(scaling.resized(values, white, (16, 16)), expected[0])
    assert np.array_equal(scaling.as_pixels(values, white), expected[1])


def test_pixels_of_large_images_do_not_pile_up(monkeypatch):
    """They are loaded one by one, when it is their turn, and come in small batches."""
    small, large = (png(smooth_pixels(n, n, 1)[..., 0], 8, GREY) for n in (20, 40))
    order = [small, small, large, small, large, large, small]
    monkeypatch.setattr(source, "LARGE", 1000)
    monkeypatch.setattr(decoding, "LARGE", 1000)
    images = ImageSource(order, image_size=(8, 8), batch_size=3, workers=2, keep_pixels=True)
    loaded = []
    load = source.load
    monkeypatch.setattr(source, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    n_large = 0
    sizes = []
    for batch in images.batches():
        sizes += [[len(pixels) for pixels in batch.pixels]]
        n_large += sizes[-1].count(40)
        assert sum(image.size == (40, 40) for image in loaded) == n_large
    assert sizes == [[20, 20, 40], [20, 40], [40], [20]]
    images = ImageSource([large], image_size=(8, 8), keep_pixels=True, reading=Reading(None, 1599))
    with pytest.raises(ImageError, match="max_pixels=1600"):
        next(images.batches())


@pytest.mark.parametrize("shape", [(600, 300), (40, 500)])
def test_thumbnails(shape):
    values = smooth_pixels(*shape, 1)[..., 0].astype(np.uint16) * 16
    data = png(values, 16, GREY)
    thumbnail = decoding.read_thumbnail(data, 100, Reading(12))
    assert thumbnail.dtype == np.uint8
    assert max(thumbnail.shape) == 100
    expected = Image.fromarray((values / 4095).astype(np.float32)).resize(
        thumbnail.shape[1::-1], Image.Resampling.BILINEAR
    )
    np.testing.assert_allclose(
        thumbnail, 255 * np.asarray(expected)[..., None].repeat(3, 2), atol=0.51
    )
    jpeg = encode(smooth_pixels(*shape), "JPEG")
    assert decoding.read_thumbnail(jpeg, 100).shape == thumbnail.shape


def test_limit_of_pixels(monkeypatch):
    data = png(np.zeros((30, 40), int), 8, GREY)
    for large in (100, 5000):
        monkeypatch.setattr(decoding, "LARGE", large)
        assert load(data, "a", (8, 8), Reading(max_pixels=1200)).size == (30, 40)
        with pytest.raises(
            ImageError, match=r"40 x 30 pixels are more than 1199 .* max_pixels=1200"
        ):
            load(data, "a", (8, 8), Reading(max_pixels=1199))


def test_one_large_image_at_a_time(monkeypatch):
    monkeypatch.setattr(decoding, "LARGE", 1000)
    resized, now, most = decoding.resized, [], []

    def slow(values, white, size):
        now.append(size)
        most.append(len(now))
        time.sleep(0.01)
        now.pop()
        return resized(values, white, size)

    monkeypatch.setattr(decoding, "resized", slow)

    def most_at_once(data):
        most.clear()
        threads = [threading.Thread(target=load, args=(data, "a", (8, 8))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(most) == 8
        return max(most)

    assert most_at_once(png(np.zeros((40, 40), int), 8, GREY)) == 1
    assert most_at_once(png(np.zeros((20, 20), int), 8, GREY)) > 1
    with pytest.raises(ImageError):
        load(png(np.zeros((40, 40), int), 8, GREY)[:60], "a", (8, 8))
    assert not decoding._one_large.locked()


FILES = {
    # Bytes for each pixel, of which Pillow needs four for a colour, and a BMP is there as a file, too.
    "grey.png": 1,
    "colour.png": 4,
    "deep.png": 2,
    "deep.pgm": 2,
    "grey.bmp": 2,
    "colour.bmp": 7,
    "grey.jpg": 0,
    "colour.jpg": 0,
}


def write_large(path, side):
    """Something that is compressed fast."""
    ramp = np.arange(side, dtype=np.uint16) // 32 % 256
    grey = np.broadcast_to(np.uint8(ramp), (side, side))
    if path.name == "deep.pgm":
        deep = np.broadcast_to(ramp * 16, (side, side)).astype(">u2")
        path.write_bytes(b"P5 %d %d 4095\n" % (side, side) + deep.tobytes())
    elif path.name == "deep.png":
        Image.fromarray(np.ascontiguousarray(np.broadcast_to(ramp * 257, (side, side)))).save(
            path, compress_level=1
        )
    else:
        pixels = grey if "grey" in path.name else np.broadcast_to(grey[..., None], (side, side, 3))
        options = {"compress_level": 1} if path.suffix == ".png" else {}
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process, set back")
def test_memory_of_large_images(tmp_path):
    side = 6400  # 41 megapixels
    for name in FILES:
        write_large(tmp_path / name, side)
    script = """
        import re, sys
        from pathlib import Path
        from npad.images.decoding import load

        def megabytes(which):
            status = Path("/proc/self/status").read_text()
            return int(re.search(which + r":\\s*(\\d+)", status)[1]) / 1024

        for path in sys.argv[1:]:
            Path("/proc/self/clear_refs").write_text("5")
            before = megabytes("VmRSS")
            assert load(path, "a", (256, 256)).size == (6400, 6400)
            print(megabytes("VmHWM") - before)
    """
    paths = [str(tmp_path / name) for name in FILES]
    command = [sys.executable, "-c", textwrap.dedent(script), *paths]
    # Else what glibc keeps of one image counts for the next, or does not, from run to run.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    peaks = dict(zip(FILES, map(float, run.stdout.split()), strict=True))
    most = {name: size * side**2 / 2**20 + 50 for name, size in FILES.items()}
    assert {name: peak for name, peak in peaks.items() if peak > most[name]} == {}
