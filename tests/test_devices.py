"""Devices: names, free memory, and what becomes of a lack of it and of a lost GPU."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from npad import NPad, devices
from npad.scoring import pipeline

SMALL = {"image_size": 32, "n_centroids": 50, "progress": False}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def model(images: np.ndarray) -> NPad:
    return NPad("filterbank", **SMALL).fit(images)


def short(asked: str = "12.00 GiB") -> torch.cuda.OutOfMemoryError:
    return torch.cuda.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {asked}. GPU 0 has a total capacity of 79.10 GiB"
    )


class Short:
    """Stands in for a function of a batch: memory is short for more than `most` images."""

    def __init__(self, function: Any, most: int, error: Exception | None = None) -> None:
        self.function, self.most, self.error = function, most, error or short()
        self.batches: list[int] = []

    def __call__(self, x: Tensor, *more: Any) -> Any:
        self.batches.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.function(x, *more)


def shortened(model: NPad, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Short:
    """Memory is short in the model's network."""
    (network,) = model.scorer().networks
    levels = Short(network.levels, **more)
    monkeypatch.setattr(network, "levels", levels)
    return levels


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def empty(_: int, device: torch.device) -> Tensor:
        asked.append(device)
        return torch.zeros(0)

    monkeypatch.setattr(torch, "empty", empty)
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        devices.resolve("auto")
    assert asked == [torch.device("cuda"), CPU]


def test_free_memory_is_what_the_system_says() -> None:
    free = devices.free_bytes(CPU)
    assert free is not None
    assert 10**7 < free < 10**14
    assert devices.free_bytes(torch.device("meta")) is None


def test_the_cpu_is_short_of_memory(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own words, from an allocation that cannot succeed."""
    model = NPad("filterbank", **SMALL)
    monkeypatch.setattr(pipeline, "levels_in_parts", lambda network, images: torch.empty(10**14))
    with (
        pytest.warns(RuntimeWarning, match="too short for batch_size=8; going on with 4 at a time"),
        pytest.raises(
            MemoryError,
            match=r"^NPad\.fit: 400000\.0 GB more was asked for on cpu, [\d.]+ GB are free; lower b",
        ),
    ):
        model.fit(images)


@pytest.mark.parametrize("call", ["fit", "predict", "score"])
def test_a_batch_that_does_not_fit_is_halved_once(
    call: str, model: NPad, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.predict(images)
    network = shortened(model, monkeypatch, most=4)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)[:8].float() / 255
    warning = rf"^NPad\.{call}: the memory of cpu is too short for batch_size=8; going on with 4"
    calls = {"fit": lambda: model.fit(images), "predict": lambda: model.predict(images)}
    with pytest.warns(RuntimeWarning, match=warning) as caught:
        result = calls.get(call, lambda: model.score(x))()
    if call == "predict":
        np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-5)
        assert len(result.maps) == 10
    elif call == "score":
        scores, maps = result
        np.testing.assert_allclose(scores.numpy(), expected.scores[:8], rtol=1e-5)
        assert maps.shape == (8, 32, 32)
    assert len(caught) == 1
    assert network.batches[:3] == [8, 4, 4]
    assert network.batches.count(8) == 1  # it is not tried again


def test_the_sample_of_principal_axes_is_halved_too(
    model: NPad, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = shortened(model, monkeypatch, most=4)
    with pytest.warns(RuntimeWarning, match="going on with 4") as caught:
        NPad("filterbank", **SMALL, n_features=9).fit(images)
    assert len(caught) == 1
    assert network.batches.count(8) == 1


def test_a_second_shortage_is_an_error_and_keeps_the_model(
    model: NPad, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model.members_
    shortened(model, monkeypatch, most=0)
    message = r"12\.9 GB more was asked for on cpu, .* are free; lower batch_size, image_size, n_fe"
    for call in (model.fit, model.predict):
        with (
            pytest.warns(RuntimeWarning, match="going on with 4"),
            pytest.raises(MemoryError, match=message) as caught,
        ):
            call(images)
        assert isinstance(caught.value.__cause__, torch.cuda.OutOfMemoryError)
    assert model.members_ is before


@pytest.mark.parametrize("nominal_set", ["kcenter", None])
def test_a_backbone_that_overflows_names_the_remedy(
    nominal_set: str | None, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NPad("filterbank", **SMALL, nominal_set=nominal_set)
    monkeypatch.setattr(
        pipeline,
        "levels_in_parts",
        lambda network, x: [torch.full((len(x), 17, n, n), torch.inf) for n in (8, 4, 2)],
    )
    with pytest.raises(ValueError, match="backbone_dtype='bfloat16' or 'float32'"):
        model.fit(images)


def test_one_image_cannot_be_halved(
    model: NPad, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortened(model, monkeypatch, most=0)
    with pytest.raises(MemoryError, match="lower batch_size"):  # a warning would be an error
        model.predict(images[:1])


def test_other_errors_pass_unchanged(
    model: NPad, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("a bug")
    shortened(model, monkeypatch, most=0, error=error)
    with pytest.raises(RuntimeError) as caught:
        model.predict(images)
    assert caught.value is error


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "npad.embed: cudaErrorMemoryAllocation: out of memory",
    ],
)
def test_a_shortage_is_not_a_lost_gpu(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_bytes", lambda device: 2 * 10**6)
    message = r"^NPad\.fit: more memory was asked for on cuda:0, 2 MB are free; less"
    with (
        pytest.raises(MemoryError, match=message),
        devices.explained("NPad.fit", torch.device("cuda:0"), "less"),
    ):
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: operation not permitted when stream is capturing",
        "npad.resize_maps: cudaErrorInvalidConfiguration: invalid configuration argument",
    ],
)
def test_what_leaves_the_gpu_usable_passes_unchanged(text: str) -> None:
    error = RuntimeError(text)
    with (
        pytest.raises(RuntimeError) as caught,
        devices.explained("NPad.fit", torch.device("cuda:0"), "less"),
    ):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA`",
        "npad.mahalanobis: cudaErrorIllegalAddress: an illegal memory access was encountered",
    ],
)
def test_a_lost_gpu_is_one_clear_error(text: str) -> None:
    first_line = re.escape(text.splitlines()[0])
    message = rf"^NPad\.predict: cuda:0 has failed \({first_line}\) .*start it again"
    with (
        pytest.raises(RuntimeError, match=message),
        devices.explained("NPad.predict", torch.device("cuda:0"), ""),
    ):
        raise RuntimeError(text)


def test_products_are_exact_for_as_long_as_anybody_asks() -> None:
    """Threads do not wait for each other, and the program's setting comes back once, after the last."""
    owner: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9")
    before = owner.fp32_precision
    try:
        for inherited, setting in ((owner, "bf16"), (torch.backends.mkldnn, "bf16")):
            owner.fp32_precision = "none"
            inherited.fp32_precision = setting
            with devices.exact_products:
                with devices.exact_products:
                    assert owner.fp32_precision == "ieee"
                assert owner.fp32_precision == "ieee"
            assert inherited.fp32_precision == owner.fp32_precision == setting
            inherited.fp32_precision = "none"
            assert owner.fp32_precision != setting  # it still inherits
    finally:
        owner.fp32_precision = before
