"""The CUDA kernels on a GPU; tests/test_simt_*.py run the same kernels everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from fitted import gaussians
from torch import Tensor

from npad import NPad, ops, reference
from npad._native_cuda import cuda
from npad.synthetic import make_dataset

pytestmark = pytest.mark.cuda
GRID = (4, 3)
Arguments = tuple[object, ...]


@pytest.fixture(autouse=True)
def gpu() -> None:
    missing = "no GPU" if not torch.cuda.is_available() else "" if cuda else "no CUDA kernels"
    if missing and os.environ.get("NPAD_REQUIRE_CUDA") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


def statistics(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    state = (
        torch.zeros(12, dtype=torch.int64),
        torch.zeros(12, channels),
        torch.zeros(12, ops.packed_size(channels)),
    )
    reference.neighborhood_moments(torch.randn(9, *GRID, channels), *state)
    return state


def moments(x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
    count, mean, scatter = (s.clone() for s in state)
    ops.neighborhood_moments(x, count, mean, scatter)
    return mean, scatter


def reference_moments(x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
    count, mean, scatter = (s.clone() for s in state)
    reference.neighborhood_moments(x, count, mean, scatter)
    return mean, scatter


def spread(channels: int) -> Tensor:
    x = torch.randn(5, channels + 9, channels)
    return x.mT @ x / (channels + 9) + 0.1 * torch.eye(channels)


def scoring(channels: int) -> Arguments:
    mean, factor = gaussians(GRID, channels)
    return torch.randn(3, *GRID, channels), mean, reference.pack(factor), GRID, 3


def levels(channels: int) -> Arguments:
    """One of the grid's size, one smaller, one larger; channels side by side, apart, and neither."""
    same = torch.randn(3, channels, 5, 6).to(memory_format=torch.channels_last)
    return [same, torch.randn(3, 4, 3, 2), torch.randn(3, 5, 9, 14)[:, ::2, :, ::2]], (5, 6)


# name: op, reference, arguments for a number of channels
OPS: dict[str, tuple[Callable[..., object], Callable[..., object], Callable[[int], Arguments]]] = {
    "embed": (ops.embed, reference.embed, levels),
    "neighborhood_moments": (
        moments,
        reference_moments,
        lambda c: (torch.randn(5, *GRID, c) + 1, *statistics(c)),
    ),
    "window_covariance": (
        ops.window_covariance,
        reference.window_covariance,
        lambda c: (*statistics(c), GRID, 3, 1, 12),
    ),
    "pack_factor": (
        ops.pack_factor,
        reference.pack_factor,
        lambda c: (torch.randn(3, c, c), torch.float32),
    ),
    "inverse_cholesky": (
        lambda *args: ops.inverse_cholesky(*args)[0],
        lambda covariance, dtype: reference.inverse_cholesky(covariance, dtype)[0],
        lambda c: (spread(c), torch.float32),
    ),
    "mahalanobis": (ops.mahalanobis, reference.mahalanobis, scoring),
    "nearest_centroid": (
        ops.nearest_centroid,
        reference.nearest_centroid,
        lambda c: (torch.randn(203, c), torch.randn(77, c)),
    ),
    "farthest_first": (
        ops.farthest_first,
        reference.farthest_first,
        lambda c: ((4 * torch.randn(301, c)).round(), 40, 7),
    ),
}


def on(device: str, arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    def move(a: object) -> object:
        if isinstance(a, list):
            return [move(b) for b in a]
        if not isinstance(a, Tensor):
            return torch.float64 if dtype is not None and a is torch.float32 else a
        a = a.to(device)
        return a.to(dtype) if dtype is not None and a.is_floating_point() else a

    return tuple(map(move, arguments))


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


@pytest.mark.parametrize("channels", [1, 7, 8, 31, 129, 384])
@pytest.mark.parametrize("name", OPS)
def test_against_reference(name: str, channels: int) -> None:
    op, expected, make = OPS[name]
    arguments = make(channels)
    actual = tensors(op(*on("cuda", arguments)))
    working = tensors(expected(*on("cpu", arguments)))
    oracle = tensors(expected(*on("cpu", arguments, torch.float64)))
    for a, w, o in zip(actual, working, oracle, strict=True):
        if a.is_floating_point():
            assert_accurate(a.cpu(), w, o)
        else:
            assert torch.equal(a.cpu(), o)


@pytest.mark.parametrize("name", OPS)
def test_rerun_is_bitwise_equal_on_any_stream(name: str) -> None:
    op, _, make = OPS[name]
    arguments = on("cuda", make(100))
    first = tensors(op(*arguments))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        again = tensors(op(*arguments))
    stream.synchronize()
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", [n for n in OPS if n not in ("inverse_cholesky", "farthest_first")]
)
def test_graph_capture(name: str) -> None:
    op, _, make = OPS[name]
    arguments = on("cuda", make(33))
    expected = tensors(op(*arguments))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors(op(*arguments))
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    for a, b in zip(expected, captured, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPS)
def test_a_device_that_is_not_current(name: str) -> None:
    op, _, make = OPS[name]
    arguments = make(31)
    here, there = op(*on("cuda:0", arguments)), op(*on("cuda:1", arguments))
    for a, b in zip(tensors(here), tensors(there), strict=True):
        assert b.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_mixed_devices() -> None:
    x, mean, factor, grid, window = scoring(8)
    with pytest.raises(ValueError, match="mean is on cpu but x is on cuda:0"):
        ops.mahalanobis(x.cuda(), mean, factor, grid, window)  # type: ignore[attr-defined,arg-type]


def test_scores_agree_with_those_of_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_dataset(tmp_path_factory.mktemp("data") / "woven", seed=0)
    path = folder.parent / "model.npad"
    NPad("filterbank", n_centroids=512).fit(folder / "train" / "good").save(path)
    images = sorted((folder / "test").rglob("*.png"))
    cpu, gpu = (NPad.load(path, device=device).predict(images) for device in ("cpu", "cuda"))
    torch.testing.assert_close(
        torch.from_numpy(gpu.scores), torch.from_numpy(cpu.scores), rtol=1e-3, atol=0
    )
