"""NPad on a GPU: graphs, threads, shared backbones, and what happens when the GPU gives up."""

from __future__ import annotations

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from npad import NPad, detector

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda:0")
SMALL = {"image_size": 64, "n_centroids": 100, "progress": False}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def model(images: np.ndarray) -> NPad:
    return NPad("filterbank", **SMALL, device="cuda").fit(images)


def test_auto_and_to(model: NPad, images: np.ndarray) -> None:
    expected = model.predict(images)
    twin = copy.deepcopy(model).to("cpu")
    devices = {x.device.type for member in twin.members_ for x in member.tensors().values()}
    assert devices == {"cpu"}
    np.testing.assert_allclose(twin.predict(images).scores, expected.scores, rtol=1e-3)
    twin.to("auto")
    assert twin.device == DEVICE
    assert np.array_equal(twin.predict(images).scores, expected.scores)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_graph_gives_what_its_function_gives(model: NPad, batch: int) -> None:
    scorer = model.scorer()
    for _ in range(4):
        x = torch.rand(batch, 3, 64, 64, device=DEVICE)
        for a, b in zip(model.score(x), scorer(x), strict=True):
            assert torch.equal(a, b)


def test_more_batch_sizes_than_are_kept(model: NPad) -> None:
    x = torch.rand(9, 3, 64, 64, device=DEVICE)
    expected, _ = model.score(x)
    for n in (*range(1, 10), *range(1, 10)):
        scores, _ = model.score(x[:n])
        torch.testing.assert_close(scores, expected[:n], rtol=1e-4, atol=0)


def test_threads_and_streams(model: NPad, images: np.ndarray) -> None:
    expected = model.predict(images)

    def predict(_: int) -> np.ndarray:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            return model.predict(images).scores

    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(predict, range(12)):
            assert np.array_equal(scores, expected.scores)


def test_models_share_a_backbone(model: NPad, images: np.ndarray) -> None:
    before = torch.cuda.memory_allocated()
    others = [NPad("filterbank", **SMALL, device="cuda").fit(images) for _ in range(4)]
    assert all(other.scorer().networks[0] is model.scorer().networks[0] for other in others)
    grown = torch.cuda.memory_allocated() - before
    assert grown < 1.1 * sum(other.nbytes for other in others) + (1 << 20)


def test_a_changed_setting_is_not_replayed(model: NPad, images: np.ndarray) -> None:
    before = model.predict(images).scores
    model.fusion_weight = 0.9
    assert not np.array_equal(model.predict(images).scores, before)


def test_memory_is_flat(model: NPad) -> None:
    x = torch.rand(4, 3, 64, 64, device=DEVICE)
    model.score(x)
    before = torch.cuda.memory_allocated()
    for _ in range(2500):
        model.score(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_no_memory_left(model: NPad, images: np.ndarray) -> None:
    """Halved once, then told; afterwards the model is as good as before."""
    expected = model.predict(images).scores
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(DEVICE) / total)
    try:
        model.batch_size = 20
        with (
            pytest.warns(RuntimeWarning, match="too short for batch_size=20; going on with 10"),
            pytest.raises(MemoryError, match=r"was asked for on cuda:0, .* free; lower batch_size"),
        ):
            model.predict(images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    model.batch_size = 8
    assert np.array_equal(model.predict(images).scores, expected)


def test_a_lost_gpu(model: NPad, images: np.ndarray, tmp_path: Path) -> None:
    """In a process of its own, which cannot use the GPU afterwards."""
    model.save(tmp_path / "model.npad")
    content = (tmp_path / "model.npad").read_bytes()
    np.save(tmp_path / "images.npy", images)
    code = f"""
import numpy as np, torch
from npad import NPad, detector
model = NPad.load({str(tmp_path / "model.npad")!r}, device="cuda")
images = np.load({str(tmp_path / "images.npy")!r})
model.predict(images)
torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]  # an assertion on the device
try:
    model.predict(images)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("NPad.predict: cuda:0 has failed (")
    assert "start it again" in done.stdout
    assert (tmp_path / "model.npad").read_bytes() == content


@pytest.mark.filterwarnings("ignore:NPad.fit. at :UserWarning")
@pytest.mark.parametrize("own", [False, True])
def test_a_region_of_interest(own: bool, images: np.ndarray) -> None:
    """Learned and scored as on the CPU, and nothing outside changes a bit; graphs are replayed."""
    mask = np.zeros((64, 64), bool)
    mask[9:50, 12:60] = True
    rois = [np.roll(mask, i % 4, 1) for i in range(len(images))] if own else None
    known = {**SMALL, "roi": None if own else mask, "window": 1, "eps": 0.01}
    on_gpu, on_cpu = (
        NPad("filterbank", **known, device=device).fit(images, rois=rois)
        for device in ("cuda", "cpu")
    )
    for a, b in zip(on_gpu.members_, on_cpu.members_, strict=True):
        assert a.borrowed == b.borrowed
    other = images.copy()
    shown = np.stack(rois) if rois else np.stack([mask] * len(images))
    other[~shown] = 255
    first = on_gpu.predict(images, rois=rois)
    for source in (images, other, other):
        again = on_gpu.predict(source, rois=rois)
        np.testing.assert_array_equal(again.scores, first.scores)
        np.testing.assert_array_equal(again.maps, first.maps)
    twin = copy.deepcopy(on_gpu).to("cpu").predict(images, rois=rois)
    np.testing.assert_allclose(twin.scores, first.scores, rtol=1e-3)
    assert all((np.isnan(one) == ~of).all() for one, of in zip(first.maps, shown, strict=True))


@pytest.mark.parametrize("n_strips", [1, 2])
def test_tiles_and_strips(n_strips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU, where all statistics are there at once."""
    images = np.random.default_rng(1).integers(0, 255, (12, 192, 320, 3), dtype=np.uint8)
    known = SMALL | {"image_size": (192, 320), "tile": 160, "factor_dtype": "float32"}
    on_cpu = NPad("filterbank", **known).fit(images[:9], statistics=False)
    planned = detector.planned
    monkeypatch.setattr(
        detector,
        "planned",
        lambda *args, **more: replace(planned(*args, **more), n_strips=n_strips),
    )
    model = NPad("filterbank", **known, device="cuda").fit(images[:9], statistics=False)
    found, wanted = model.predict(images), on_cpu.predict(images)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-3)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(DEVICE) / 255
    for _ in range(3):  # recorded, and replayed
        np.testing.assert_allclose(model.score(x)[0].cpu(), found.scores, rtol=1e-5)
