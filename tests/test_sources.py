"""What a source may be, and what is said of an image as a whole."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import tifffile
import torch
from image_files import encode, save_image, smooth_pixels
from PIL import Image
from torch.utils.data import DataLoader
from written_files import RGB, png

from npad.images import ImageError, ImageSource, Reading

PIXELS = [smooth_pixels(20, 24, seed=i) for i in range(3)]


def collect(source: object, **options: object) -> tuple[torch.Tensor, list[str]]:
    batches = list(ImageSource(source, image_size=(16, 16), **options).batches())  # type: ignore[arg-type]
    return torch.cat([b.images for b in batches]), [name for b in batches for name in b.names]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [save_image(tmp_path / f"{i}.png", x) for i, x in enumerate(PIXELS)]


SOURCES = {
    "array of paths": np.array,
    "array of texts": lambda paths: np.array([str(p) for p in paths]),
    "tuple of paths": tuple,
    "generator of paths": iter,
    "paths and labels": lambda paths: [(str(p), 0) for p in paths],
    "images of Pillow": lambda paths: [Image.open(p) for p in paths],
    "images of Pillow, one by one": lambda paths: (Image.open(p) for p in paths),
    "images of Pillow and labels": lambda paths: [(Image.open(p), 1) for p in paths],
    "bytes": lambda paths: [p.read_bytes() for p in paths],
    "bytes, one by one": lambda paths: (p.read_bytes() for p in paths),
    "bytearrays": lambda paths: [bytearray(p.read_bytes()) for p in paths],
    "views": lambda paths: [memoryview(p.read_bytes()) for p in paths],
    "BytesIO": lambda paths: [io.BytesIO(p.read_bytes()) for p in paths],
    "mappings": lambda paths: [{"image": Image.open(p)} for p in paths],
    "a path, a file, pixels": lambda paths: [paths[0], paths[1].read_bytes(), PIXELS[2]],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_whose_meaning_is_plain(kind: str, paths: list[Path]) -> None:
    expected, names = collect(paths)
    assert names == [str(p) for p in paths]
    found, names = collect(SOURCES[kind](paths))
    assert torch.equal(found, expected)
    nameless = [f"image[{i}]" for i in range(3)]
    assert all(name in (str(p), other) for name, p, other in zip(names, paths, nameless))  # noqa: B905


SINGLE = {
    "Pillow": Image.open,
    "bytes": lambda path: path.read_bytes(),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "open file": lambda path: path.open("rb"),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_one_image(kind: str, paths: list[Path]) -> None:
    one = SINGLE[kind](paths[0])
    source = ImageSource(one, image_size=(16, 16))
    assert (source.n_images, source.reiterable, source.random_access) == (1, True, True)
    for _ in range(2):
        (batch,) = source.batches([0])
        assert torch.equal(batch.images, collect(paths[:1])[0])
        assert batch.names == ["image[0]"]
    if isinstance(one, io.BufferedReader):
        one.close()


def test_what_pillow_has_opened_is_read_from_its_file(tmp_path: Path) -> None:
    """Pillow itself keeps 8 of 16 bits, takes white for black, and mixes up planes."""
    deep = smooth_pixels(20, 24).astype(np.uint16) * 16
    (tmp_path / "a.png").write_bytes(png(deep, 16, RGB))
    tifffile.imwrite(tmp_path / "b.tif", deep.transpose(2, 0, 1), photometric="rgb", planarconfig=2)
    tifffile.imwrite(tmp_path / "c.tif", 4095 - deep[..., 0], photometric="miniswhite")
    options = {"reading": Reading(12)}
    expected, _ = collect(deep, **options)
    grey, _ = collect(deep[..., 0], **options)
    for name, right in (("a.png", expected), ("b.tif", expected), ("c.tif", grey)):
        with Image.open(tmp_path / name) as image:
            for source in (image, [image], [image]):
                found, _ = collect(source, **options)
                assert torch.allclose(found, right, atol=1e-6)
            twice, _ = collect([image] * 20, **options)
            assert torch.equal(twice, found.expand(20, -1, -1, -1))
            if name != "b.tif":  # of which Pillow has lost the rest
                image.load()
                collect(image)
    pages = [Image.fromarray(x) for x in PIXELS]
    pages[0].save(tmp_path / "d.tif", save_all=True, append_images=pages[1:])
    with Image.open(tmp_path / "d.tif") as image:
        image.seek(1)
        assert torch.equal(collect(image)[0], collect(PIXELS[1])[0])


def test_a_file_written_in_memory_need_not_be_rewound() -> None:
    file = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(file, "PNG")
    assert torch.equal(collect(file)[0], collect(PIXELS[0])[0])


@pytest.mark.parametrize(
    "make", [tempfile.TemporaryFile, tempfile.NamedTemporaryFile, tempfile.SpooledTemporaryFile]
)
def test_files_that_were_just_written(make: Callable[[], IO[bytes]]) -> None:
    with make() as file:
        file.write(encode(PIXELS[0], "PNG"))
        for source in (file, [file], [(file, "label")], iter([file])):
            assert torch.equal(collect(source)[0], collect(PIXELS[0])[0])


def test_a_file_open_as_text(paths: list[Path]) -> None:
    with paths[0].open() as file, pytest.raises(TypeError, match='open it with mode "rb"'):
        collect(file)


def test_damaged_bytes_are_named_by_their_position() -> None:
    good = encode(PIXELS[0], "PNG")
    with pytest.raises(ImageError, match=r"^image\[1\]: .*cut short"):
        collect([good, good[:-400]])
    with pytest.raises(ImageError, match=r"^image\[0\]: "):
        collect(b"no image")


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        (np.array([1, 2, "x"], dtype=object), TypeError, "pass a list of images"),
        (
            [[Image.new("L", (8, 8)), Image.new("L", (8, 8))]],
            ValueError,
            "a batch must be one array",
        ),
        ([["a.png", "b.png"]], ValueError, "a batch must be one array"),
        (3, TypeError, "a data set goes through a DataLoader"),
    ],
)
def test_sources_that_are_refused(source: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        collect(source)


# --- arrays that may be read in two ways


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_three_axes_that_begin_with_3_or_4_are_ambiguous(n: int, kind: object) -> None:
    stack = kind(smooth_pixels(20, 24, n).transpose(2, 0, 1).copy())  # type: ignore[operator]
    readings = (
        rf"\({n}, 20, 24\) is one colour image .* or {n} grey .*\(1, {n}, 20, 24\) .*images\[None\]"
    )
    with pytest.raises(ValueError, match=readings):
        collect(stack)
    assert len(collect(stack[None])[0]) == 1
    assert len(collect(stack[:, None])[0]) == n
    assert len(collect([stack])[0]) == 1  # in a list, every item is an image


@pytest.mark.parametrize("n", [3, 4])
def test_grey_batches_of_a_loader_are_no_colour_image(n: int) -> None:
    """Another size of its batches gives the images one by one, or as grey ones."""
    grey = [torch.from_numpy(smooth_pixels(20, 24, 1, seed=i)[..., 0]) for i in range(n)]
    expected = collect(torch.stack(grey)[:, None])[0]
    with pytest.raises(ValueError, match=rf"item 0: shape \({n}, 20, 24\) is one colour image"):
        collect(DataLoader(grey, batch_size=n))  # type: ignore[arg-type]
    for size in (None, 1, 2):
        found, _ = collect(DataLoader(grey, batch_size=size))  # type: ignore[arg-type]
        assert torch.equal(found, expected)
    colour = [torch.from_numpy(x).permute(2, 0, 1) for x in PIXELS]
    found, _ = collect(DataLoader(colour, batch_size=1, collate_fn=lambda items: items[0]))  # type: ignore[arg-type]
    assert torch.equal(found, collect(PIXELS)[0])


@pytest.mark.parametrize("channels", [2, 5, 15])
def test_many_channels_are_no_narrow_images(channels: int) -> None:
    image = np.zeros((40, 50, channels), np.uint8)
    with pytest.raises(
        ValueError, match=rf"one image of {channels} channels.*images\[\.\.\., None\]"
    ):
        collect(image)
    assert ImageSource(image[..., None], image_size=(16, 16)).n_images == 40


@pytest.mark.parametrize("shape", [(2, 20, 24), (5, 20, 24), (1, 20, 24), (9, 8, 8)])
def test_other_grey_stacks_are_plain(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    assert torch.equal(collect(images)[0], collect(images[:, None])[0])


# --- what is said of an image


BLANK = np.full((8, 8), 7, np.uint8)


@pytest.mark.parametrize(
    "blank", [BLANK, BLANK.astype(np.uint16), BLANK / 255, np.stack([BLANK, BLANK + 1, BLANK], 2)]
)
def test_a_constant_image_is_named_once(blank: np.ndarray) -> None:
    source = ImageSource([PIXELS[0], blank, PIXELS[1]], image_size=(16, 16))
    with pytest.warns(UserWarning, match=r"^image\[1\]: every pixel is equal") as told:
        assert len(list(source.batches()) + list(source.batches())) == 2
    assert len(told) == 1


def test_an_image_that_is_nearly_constant_is_not_named() -> None:
    almost = BLANK.copy()
    almost[-1, -1] += 1
    collect([almost, almost.T])


def test_a_dead_camera_does_not_fill_the_terminal() -> None:
    with pytest.warns(UserWarning, match="pixel") as told:
        collect(np.zeros((100, 8, 8, 1), np.uint8))
    assert len(told) == 11
    assert "there are more images whose pixels are all equal" in str(told[-1].message)


def test_pages_are_told_of_once(tmp_path: Path) -> None:
    pages = [Image.fromarray(x) for x in PIXELS]
    for name in ("a.tif", "b.tif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match=r"a\.tif has 3 pages: the first is read") as told:
        images, _ = collect(tmp_path)
    assert len(told) == 1
    assert torch.equal(images[1:], collect(PIXELS[0])[0])


def test_ordinary_images_are_passed_in_silence(paths: list[Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(paths)
