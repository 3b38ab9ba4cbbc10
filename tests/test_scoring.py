"""The run of a prediction: batches in flight, several threads and models, faults of the source."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from npad import NPad, networks
from npad.images import Batch, ImageError
from npad.ops import _cuda, trust
from npad.scoring import pipeline
from npad.scoring.cuda_graphs import Graphs
from npad.scoring.pipeline import Run, started_ahead
from npad.settings import Settings

SMALL = {"image_size": 32, "n_centroids": 50, "progress": False}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(images: np.ndarray) -> NPad:
    return NPad("filterbank", **SMALL).fit(images)


@pytest.mark.parametrize(("depth", "order"), [(1, "aAbBcC"), (2, "abAcBC"), (9, "abcABC")])
def test_items_are_started_ahead(depth: int, order: str) -> None:
    seen = []

    def start(item: str) -> str:
        seen.append(item)
        return item.upper()

    for result in started_ahead("abc", start, depth):
        seen.append(result)
    assert "".join(seen) == order


def test_what_was_started_comes_before_a_bad_image() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2, 3)
        raise ImageError("x.png", "cut short")

    results = started_ahead(items(), lambda item: item, 3)
    assert list(itertools.islice(results, 3)) == [1, 2, 3]
    with pytest.raises(ImageError, match=r"x\.png"):
        next(results)


def test_a_stream_is_answered_image_by_image(model: NPad, images: np.ndarray) -> None:
    """A camera that waits for the answer before it takes the next image must get it."""
    answered = 0

    def camera() -> Iterator[np.ndarray]:
        for i, image in enumerate(images):
            assert answered == i
            yield image

    for prediction in model.predict_batches(camera()):
        answered += len(prediction.scores)
    assert answered == len(images)


def test_features_that_overflow_are_an_error(
    model: NPad, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    (network,) = model.scorer().networks
    levels = network.levels

    def overflow(batch: torch.Tensor) -> list[torch.Tensor]:
        x = levels(batch)
        x[0][2, 0, 3, 3] = torch.inf
        return x

    monkeypatch.setattr(network, "levels", overflow)
    message = r"score of image\[2\] is not finite.*use backbone_dtype='float32'"
    with pytest.raises(RuntimeError, match=message):
        model.predict(images[:5])


@pytest.mark.parametrize(
    ("device", "given", "fitted", "scored"),
    [
        ("cpu", None, torch.float32, torch.float32),
        ("cuda:0", None, torch.float32, torch.float16),
        ("cuda:0", "bfloat16", torch.bfloat16, torch.bfloat16),
        ("cpu", "float16", torch.float16, torch.float16),
    ],
)
def test_the_precision_of_the_backbone(
    device: str,
    given: str | None,
    fitted: torch.dtype,
    scored: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networks, "shared_backbone", lambda *arguments: arguments[3])
    model = NPad("filterbank", backbone_dtype=given)
    of = Settings(**model.get_params()), torch.device(device)
    assert model._networks.of(*of, fitting=True) == [fitted]
    assert model._networks.of(*of) == [scored]


def test_many_threads_and_models_at_once(model: NPad, images: np.ndarray) -> None:
    other = NPad("filterbank", **SMALL, fusion="mahalanobis").fit(images)
    assert other.scorer().networks[0] is model.scorer().networks[0]
    expected = {m: m.predict(images) for m in (model, other)}
    with ThreadPoolExecutor(6) as pool:
        results = [(m, pool.submit(m.predict, images)) for m in (model, other) * 6]
        for m, result in results:
            assert np.array_equal(result.result().scores, expected[m].scores)
            assert np.array_equal(result.result().maps, expected[m].maps)


def test_a_batch_on_the_device(model: NPad, images: np.ndarray) -> None:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    scores, maps = model.score(x)
    expected = model.predict(images)
    np.testing.assert_allclose(scores.numpy(), expected.scores, rtol=1e-5)
    np.testing.assert_allclose(maps.numpy(), np.stack(expected.maps), rtol=1e-4)
    assert not scores.requires_grad
    with pytest.raises(TypeError, match="images must be float32"):
        model.score(x.half())
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\), got \(10, 3, 31, 32\)"):
        model.score(x[:, :, 1:])
    with pytest.raises(ValueError, match="images are on meta but the model is on cpu"):
        model.score(x.to("meta"))


@pytest.mark.parametrize("n_features", [None, 20])
def test_autocast_of_the_program_changes_nothing(
    n_features: int | None, images: np.ndarray
) -> None:
    model = NPad("filterbank", **SMALL, n_features=n_features).fit(images)
    expected = model.predict(images).scores
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(model.predict(images).scores, expected)


def test_an_empty_batch_on_the_device(model: NPad) -> None:
    scores, maps = model.score(torch.empty(0, 3, 32, 32))
    assert scores.shape == (0,)
    assert maps.shape == (0, 32, 32)


def test_models_can_be_copied_and_moved(model: NPad, images: np.ndarray) -> None:
    twin = copy.deepcopy(model).to("cpu")
    assert np.array_equal(twin.predict(images).scores, model.predict(images).scores)
    with pytest.raises(ValueError, match="device='cuda:77' cannot be used here"):
        twin.to("cuda:77")
    assert np.array_equal(twin.predict(images).scores, model.predict(images).scores)


def test_a_copy_records_graphs_of_its_own(model: NPad, images: np.ndarray) -> None:
    """A CUDA graph cannot be copied; a lock stands in for it."""
    before = copy.copy(model)
    before._graphs = model.scorer(), threading.Lock()  # type: ignore[assignment]
    twin = copy.deepcopy(before)
    assert twin._graphs is None
    assert np.array_equal(twin.predict(images).scores, model.predict(images).scores)


@pytest.mark.parametrize(
    ("registered", "failed", "recorded"),
    [(True, [], True), (False, [], False), (True, ["embed"], False)],
)
def test_only_kernels_are_recorded(
    registered: bool,
    failed: list[str],
    recorded: bool,
    model: NPad,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twin, scorer = copy.copy(model), model.scorer()
    monkeypatch.setattr(twin, "_scorer", lambda settings, device: scorer)
    monkeypatch.setattr(_cuda, "registered", registered)
    monkeypatch.setitem(trust._failed, 0, frozenset(failed))
    run = twin._on_device(twin._settings(), torch.device("cuda:0"))
    assert isinstance(run, Graphs) is recorded


def test_on_a_gpu_that_is_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event must follow the copies, on the stream of the model's own GPU."""
    device, recorded = torch.device("cuda:1"), []
    event = SimpleNamespace(record=lambda stream=None: recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: "copies")
    monkeypatch.setattr(pipeline, "_to_host", lambda x: x)
    run = Run(lambda x: (torch.zeros(len(x)), torch.zeros(len(x), 4, 4)), device)
    monkeypatch.setattr(run, "_take", lambda images: images)
    run.start(Batch(torch.zeros(2, 3, 4, 4), [(4, 4), (5, 6)], ["a", "b"], [0, 1]))
    assert recorded == [device]


class Killed(torch.utils.data.Dataset):
    """Its worker process is killed at the fourth image."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.from_numpy(self.images[index]).permute(2, 0, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork in a process with threads
def test_a_killed_worker_of_a_loader_is_an_error(model: NPad, images: np.ndarray) -> None:
    loader = torch.utils.data.DataLoader(Killed(images), batch_size=2, num_workers=1)
    before = model.members_
    with pytest.raises(RuntimeError, match=r"worker.* is killed|exited unexpectedly"):
        model.fit(loader)
    assert model.members_ is before


def test_ctrl_c_leaves_no_process(images: np.ndarray, tmp_path: Path) -> None:
    """While loader processes and decoding threads run."""
    np.save(tmp_path / "images.npy", images)
    code = f"""
import sys, time, numpy as np, torch
from npad import NPad
images = torch.from_numpy(np.load({str(tmp_path / "images.npy")!r})).permute(0, 3, 1, 2)
class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            time.sleep(0.01)
            yield images[0]
if __name__ == "__main__":
    model = NPad("filterbank", image_size=32, n_centroids=50, progress=False).fit(images)
    loader = torch.utils.data.DataLoader(Endless(), batch_size=2, num_workers=2)
    for prediction in model.predict_batches(loader):
        print("scored", flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "scored\n"
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, errors = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


def test_memory_stays_flat_over_ten_thousand_images(
    model: NPad, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the network, which would take most of the time."""
    (network,) = model.scorer().networks
    x = network.levels(torch.from_numpy(images[:8]).permute(0, 3, 1, 2).float() / 255)
    monkeypatch.setattr(network, "levels", lambda images: [f[: len(images)].clone() for f in x])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def endless() -> Iterator[np.ndarray]:
        for _ in range(1250):
            yield images[:8]

    sizes, total = [], 0
    for prediction in model.predict_batches(endless()):
        if total % 1000 == 0:
            sizes.append(resident())
        total += len(prediction.scores)
    assert total == 10_000
    assert sizes[-1] - sizes[2] < 8 << 20


def test_threads_end_with_the_run(model: NPad, images: np.ndarray) -> None:
    before = threading.active_count()
    batches = model.predict_batches(images)
    next(batches)
    batches.close()
    assert threading.active_count() == before
