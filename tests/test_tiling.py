"""Images seen tile by tile: the model is that of whole images, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_line import fail, succeed
from hypothesis import given
from hypothesis import strategies as st
from image_files import save_image
from safetensors.torch import save_file

from npad import NPad, devices
from npad.features.backbone import Backbone
from npad.features.tiling import Tiling, least_overlap, tiling_of
from npad.plan import alternatives
from npad.settings import Settings

SIZE = (190, 268)  # no whole number of any stride
SMALL: dict[str, Any] = {"image_size": SIZE, "n_centroids": 60, "batch_size": 4, "progress": False}
TILED: dict[str, Any] = {"tile": 160}  # of which 128 overlap with the filter bank


def textures(n: int, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """(n, H, W, 3) uint8: each position has its own brightness, colour and noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    wave = 40 * np.sin(rows / 9)[..., None] + 30 * np.cos(columns / [7, 11, 13][0])[..., None]
    noise = rng.normal(0, 8, (n, *size, 3)) * (1 + columns / size[1])[..., None]
    return (120 + wave + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return textures(14)


@pytest.fixture(scope="module")
def new_images() -> np.ndarray:
    found = textures(3, seed=1)
    found[1, 90:98, 120:130] = 250
    return found


def fitted(images: np.ndarray, **arguments: Any) -> NPad:
    return NPad("filterbank", **SMALL | arguments).fit(images)


# --------------------------------------------------------------------------------------------------
# Geometry.


@given(
    cell=st.sampled_from([1, 4, 16]),
    tile=st.integers(1, 12),
    overlap=st.integers(0, 5),
    length=st.integers(0, 60),
)
def test_cores_cover_an_image_once(cell: int, tile: int, overlap: int, length: int) -> None:
    tile, overlap = max(tile, 2 * overlap + 1) * cell, 2 * overlap * cell
    extent = tile + length * cell
    (row,) = Tiling((tile, extent), (tile, tile), overlap, cell).cores
    ends = [0]
    for core in row:
        (top, start), (_, first), (bottom, last) = core.start, core.first, core.last
        assert (top, bottom) == (0, tile)
        assert first == ends[-1] < last
        assert all(place % cell == 0 for place in (start, first, last))
        assert 0 <= start <= start + tile <= extent
        assert first == 0 or first - start >= overlap // 2
        assert last == extent or start + tile - last >= overlap // 2
        ends.append(last)
    assert ends[-1] == extent


@pytest.mark.parametrize("size", [(160, 160), (160, 320), (240, 176), (272, 464)])
def test_stitched_embeddings_are_those_of_whole_images(size: tuple[int, int]) -> None:
    bank = Backbone("filterbank")
    overlap = least_overlap([bank], (160, 160))
    settings = Settings("filterbank", image_size=size, tile=160, overlap=overlap)
    x = torch.rand(2, 3, *size)
    levels = bank.level_channels

    def embed(images: torch.Tensor) -> list[torch.Tensor]:
        found = bank.levels(images)
        return [bank.combined(found, [level], own_grid=True) for level in levels] + [
            bank.combined(found, bank.layers)
        ]

    for part, whole in zip(tiling_of([bank], settings).stitched(x, embed), embed(x), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "filterbank"])
def test_a_network_looks_as_far_as_it_says(name: str, tmp_path: Path) -> None:
    """What is cut off so far away, and no nearer, changes nothing."""
    weights = None if name == "filterbank" else tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    if weights is not None:
        state = timm.create_model(name).state_dict()
        scales = {
            k: torch.ones_like(x) for k, x in state.items() if k.endswith("weight") and x.ndim == 1
        }
        save_file(state | scales, weights)  # else a block adds nothing to what passes it
    network = Backbone(name, weights=weights, map_layers=None)
    side, cut = 640, 256
    reach = network.reach((side, side))
    assert reach is not None
    assert reach == Backbone(name, hollow=True, map_layers=None).reach((side, side))
    x = torch.rand(1, 3, 64, side)
    differs = []
    for part in ([*network.layers], *([level] for level in network.level_channels)):
        whole, of_part = (network.combined(network.levels(y), part) for y in (x, x[..., cut:]))
        stride = side // whole.shape[2]
        error = (whole[0, :, cut // stride :] - of_part[0]).abs().amax((0, 2))
        differs += [
            stride * (i + 1) for i in (error > 1e-4 * whole.abs().max()).nonzero()[:, 0].tolist()
        ]
    assert reach - 2 * network.cell < max(differs) <= reach


def test_a_network_that_sees_everything_has_no_reach() -> None:
    for name in ("test_vit", "efficientnet_b0"):  # attention; squeeze and excitation
        network = Backbone(name, hollow=True)
        assert network.reach((96, 96)) is None
        assert least_overlap([network], (256, 256)) == 64  # a quarter


def test_windows_that_are_counted_from_a_border_have_no_reach() -> None:
    """Attention in windows: from the same pixels, tiles that begin elsewhere make others."""
    swin = Backbone("swin_tiny_patch4_window7_224", layers=(1,), map_layers=(), hollow=True)
    assert swin.reach((224, 224)) is None


def test_windows_that_must_fill_an_image_see_one_of_the_size_given() -> None:
    network = Backbone("test_maxvit", layers=(2,), map_layers=(), hollow=True)
    with pytest.raises(ValueError, match="image_size"):
        network.grid((1024, 1024))
    assert network.reach((160, 160)) is None


# --------------------------------------------------------------------------------------------------
# The model is that of whole images.


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"score_window": 3},
        {
            "gaussians": "joint",
            "map_layers": (1, 2, 3),
            "layers": (2, 3),
            "factor_dtype": "float32",
        },
        {"fusion": "sum", "factor_dtype": "float32"},
        {"roi": (0.2, 0.1, 0.7, 0.75)},
        {"tile": (190, 160)},
        {"tile": (160, 268)},
    ],
    ids=str,
)
def test_a_model_of_tiles_is_that_of_whole_images(
    images: np.ndarray, new_images: np.ndarray, arguments: dict[str, Any]
) -> None:
    tiled = fitted(images, **TILED | arguments)
    whole = fitted(images, **{k: v for k, v in arguments.items() if k != "tile"})
    assert tiled.settings_.overlap == 128
    for a, b in zip(tiled.members_, whole.members_, strict=True):
        assert (a.grid, a.window, a.n_features) == (b.grid, b.window, b.n_features)
        assert a.eps == (b.eps and pytest.approx(b.eps, rel=1e-4))
    found, wanted = tiled.predict(new_images), whole.predict(new_images)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
    for a, b in zip(found.maps, wanted.maps, strict=True):
        assert a.shape == SIZE
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.nanmax(b))


def test_all_ways_to_an_image_see_tiles(
    images: np.ndarray, new_images: np.ndarray, tmp_path: Path
) -> None:
    """A file, `score`, `scorer`, `embed`, a program of torch.export, more images, folds."""
    model, whole = fitted(images[:10], **TILED), fitted(images[:10])
    model.save(tmp_path / "model.npad")
    again = NPad.load(tmp_path / "model.npad")
    assert (again.settings_.tile, again.settings_.overlap) == ((160, 160), 128)
    wanted = model.predict(new_images).scores
    np.testing.assert_array_equal(again.predict(new_images).scores, wanted)
    x = torch.from_numpy(new_images).permute(0, 3, 1, 2).float() / 255
    np.testing.assert_allclose(model.score(x)[0].numpy(), wanted, rtol=1e-5)
    np.testing.assert_allclose(model.scorer()(x)[0].numpy(), wanted, rtol=1e-5)
    program = torch.export.export(model.scorer(), (x[:2],)).module()
    np.testing.assert_allclose(program(x[1:])[0].numpy(), wanted[1:], rtol=1e-5)
    torch.testing.assert_close(
        model.embed(new_images), whole.embed(new_images), rtol=1e-5, atol=1e-5
    )
    model.partial_fit(images[10:])
    whole.partial_fit(images[10:])
    np.testing.assert_allclose(
        model.predict(new_images).scores, whole.predict(new_images).scores, rtol=1e-4
    )
    known = {"calibration_folds": 5, "false_alarm_rate": 0.1}
    a, b = (fitted(images, **known, **tiles).calibration_ for tiles in (TILED, {}))
    assert a is not None
    assert b is not None
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-3)


def test_a_batch_size_is_one_of_tiles(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network sees more pixels at a time, whatever the size of the images."""
    seen: list[tuple[int, ...]] = []
    levels = Backbone.levels

    def spy(network: Backbone, x: torch.Tensor) -> list[torch.Tensor]:
        seen.append(tuple(x.shape))
        return levels(network, x)

    model = fitted(images, tile=64, overlap=32)
    monkeypatch.setattr(Backbone, "levels", spy)
    for n in (1, 3):
        seen.clear()
        model.batch_size = n
        scores = model.predict(images[:3]).scores
        assert {shape[2:] for shape in seen} == {(64, 64)}
        assert max(shape[0] for shape in seen) == n
        assert sum(shape[0] for shape in seen) == 3 * 5 * 8
    model.batch_size = 4
    np.testing.assert_allclose(model.predict(images[:3]).scores, scores, rtol=1e-5)


def test_models_of_other_tiles_do_not_merge(images: np.ndarray) -> None:
    a, b = (fitted(part, tile=64, overlap=32 * i) for i, part in enumerate(np.split(images, 2)))
    with pytest.raises(ValueError, match="overlap is 0 in one and 32 in the other"):
        a.merge(b)


def test_a_network_of_one_size_sees_larger_images(tmp_path: Path) -> None:
    name, path = "cait_xxs24_224", tmp_path / "weights.safetensors"
    torch.manual_seed(1)
    save_file(timm.create_model(name).state_dict(), path)
    known = {"layers": (1,), "weights": path, "n_centroids": 50, "progress": False, "eps": 0.01}
    images = textures(3, (230, 420))
    model = NPad(name, image_size=(230, 420), tile=224, **known).fit(images)
    assert model.members_[0].grid == (15, 27)  # of 16 pixels, filled up
    assert model.predict(images[:1]).maps[0].shape == (230, 420)
    with pytest.raises(ValueError, match=r"^tile \(208, 208\) does not work with backbone 'cait"):
        NPad(name, image_size=(230, 420), tile=208, **known).fit(images)
    with pytest.raises(ValueError, match=r"^image_size \(230, 420\) does not work"):
        NPad(name, image_size=(230, 420), **known).fit(images)


def test_a_small_defect_of_a_large_image_is_found() -> None:
    """Four pixels of 640 x 960, which nothing shows once the image is 128 x 192."""
    size = (640, 960)
    images, new = textures(8, size), textures(8, size, seed=3)
    new[4:, 400:404, 700:704] = 235
    of_all = {**SMALL, "n_centroids": 500, "layers": (1, 2)}
    scores = {}
    for name, more in {
        "tiles": {"image_size": size, "tile": 256, "overlap": 64},
        "small": {"image_size": (128, 192)},
    }.items():
        found = NPad("filterbank", **of_all | more).fit(images).predict(new)
        scores[name] = found.scores
        if name == "tiles":
            for map_ in found.maps[4:]:
                y, x = np.unravel_index(map_.argmax(), size)
                assert abs(y - 401.5) < 4
                assert abs(x - 701.5) < 4
    assert scores["tiles"][4:].min() > 1.2 * scores["tiles"][:4].max()
    assert scores["small"][4:].min() < scores["small"][:4].max()


# --------------------------------------------------------------------------------------------------
# What cannot be.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 0}, r"NPad: tile must be a positive int or \(height, width\), got 0"),
        ({"tile": "large"}, "NPad: tile must be"),
        ({"tile": 128, "overlap": -1}, "NPad: overlap must be an int of at least 0, got -1"),
        ({"tile": 128, "overlap": 0.5}, "NPad: overlap must be an int of at least 0, got 0.5"),
        ({"tile": 128, "overlap": 128}, "NPad: overlap must be less than the sides of a tile"),
        ({"overlap": 32}, "NPad: overlap=32 is that of tiles; give tile, or leave it out"),
        (
            {"tile": (200, 128)},
            r"NPad: tile=\(200, 128\) is larger than the images, of which image_size=\(190, 268\)",
        ),
    ],
)
def test_arguments_that_may_not_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        NPad("filterbank", **SMALL | arguments)


def test_a_tile_larger_than_the_default_images() -> None:
    with pytest.raises(ValueError, match=r"tile=\(512, 512\) is larger than the images"):
        NPad("filterbank", tile=512).fit(textures(3))


def test_an_overlap_that_fills_a_tile(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"overlap=65 leaves nothing of tile=.* it is 96; give"):
        NPad("filterbank", **SMALL, tile=96, overlap=65).fit(images)


def test_a_tile_that_is_too_small_becomes_larger(
    images: np.ndarray, new_images: np.ndarray
) -> None:
    """Rather than inexact: of 96 pixels all would be what two tiles share."""
    known = SMALL | {"image_size": (380, 268), "factor_dtype": "float32"}
    with pytest.warns(
        UserWarning, match=r"tiles of \(96, 96\) .* they are \(256, 256\) and overlap"
    ):
        model = NPad("filterbank", **known, tile=96).fit(images)
    assert (model.settings_.tile, model.settings_.overlap) == ((256, 256), 128)
    wanted = NPad("filterbank", **known).fit(images).predict(new_images).scores
    np.testing.assert_allclose(model.predict(new_images).scores, wanted, rtol=1e-4)


@pytest.mark.parametrize("tile", [(190, 160), (64, 160)])
def test_a_side_that_is_not_cut_needs_no_overlap(images: np.ndarray, tile: tuple[int, int]) -> None:
    """A line scan that is lower than the overlap."""
    lines = images[:, : tile[0]]
    known = SMALL | {"image_size": lines.shape[1:3], "factor_dtype": "float32"}
    model = NPad("filterbank", **known, tile=tile).fit(lines)
    assert (model.settings_.tile, model.settings_.overlap) == (tile, 128)
    wanted = NPad("filterbank", **known).fit(lines).predict(lines).scores
    np.testing.assert_allclose(model.predict(lines).scores, wanted, rtol=1e-4)
    NPad("filterbank", **known, tile=tile, overlap=100).fit(lines)


def test_tiles_that_cost_much_are_told(images: np.ndarray) -> None:
    with pytest.warns(UserWarning, match=r"overlap by 128 pixels go over a pixel 14 times"):
        NPad("filterbank", **SMALL, tile=144).fit(images)


# --------------------------------------------------------------------------------------------------
# The command line.


def test_the_command_line(images: np.ndarray, tmp_path: Path) -> None:
    for i, pixels in enumerate(images):
        save_image(tmp_path / "good" / f"{i}.png", pixels)
    known = ["--backbone", "filterbank", "--image-size", "190x268", "--n-centroids", "50"]
    succeed(
        "fit",
        tmp_path / "good",
        "-o",
        tmp_path / "a.npad",
        *known,
        "--tile",
        "64",
        "--overlap",
        "32",
    )
    said = succeed("info", tmp_path / "a.npad").out
    assert "tile" in said
    scores = []
    for i, smoothing in enumerate([[], ["--smoothing", "1"]]):
        out = tmp_path / str(i)
        succeed("predict", tmp_path / "a.npad", tmp_path / "good", "-o", out, *smoothing)
        scores.append((out / "scores.csv").read_text())
    assert scores[0] != scores[1]
    rate = ["--smoothing", "1", "--false-alarm-rate", "0.1"]
    for i, pixels in enumerate(textures(10, seed=5)):
        save_image(tmp_path / "more" / f"{i}.png", pixels)
    succeed("calibrate", tmp_path / "a.npad", tmp_path / "more", *rate)
    assert NPad.load(tmp_path / "a.npad").smoothing == 1
    larger = ["-o", tmp_path / "b.npad", *known, "--tile", "256"]
    fail(2, "fit", tmp_path / "good", *larger, says=["--tile 256x256 is larger than the images"])


# --------------------------------------------------------------------------------------------------
# The plan.


def test_a_plan_that_does_not_fit_is_told_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network holds of large images is what is too much; the model stays what it is."""
    known: dict[str, Any] = {"image_size": 2048, "n_features": 8, "n_centroids": 100}
    model = NPad("resnet18", **known, batch_size=1)
    whole = model.plan(3, statistics=False)
    tiled = NPad("resnet18", **known, batch_size=1, tile=512).plan(3, statistics=False)
    assert tiled.model == whole.model
    assert tiled.predict_peak < 0.6 * whole.predict_peak
    monkeypatch.setattr(devices, "free_bytes", lambda _: (tiled.fit_peak + whole.fit_peak) // 2)
    advice = [one.changes for one in alternatives(model.plan(3, statistics=False))]
    assert {"tile"} in [{*changes} for changes in advice]
