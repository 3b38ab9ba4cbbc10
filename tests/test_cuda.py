"""The CUDA kernels on a GPU; tests/test_simt_*.py run the same kernels everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from fitted import SINGULAR, singular
from op_cases import EMPTY, OPS, SEVERAL, moved, off_by_one, strided

from npad import ops
from npad.check.cases import GRID, Arguments, on, tensors
from npad.statistics.gaussian import NeighborhoodGaussian

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("channels", [1, 7, 8, 31, 129, 384])
@pytest.mark.parametrize("name", OPS)
def test_against_reference(name: str, channels: int) -> None:
    op, expected, make = OPS[name]
    arguments = make(channels)
    actual = tensors(op(*on("cuda", arguments)))
    working = tensors(expected(*on("cpu", arguments)))
    oracle = tensors(expected(*on("cpu", arguments, torch.float64)))
    for a, w, o in zip(actual, working, oracle, strict=True):
        assert_accurate(a.cpu(), w, o)


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


@pytest.mark.parametrize("name", [n for n in OPS if n != "farthest_first"])
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


@pytest.mark.parametrize("channels", [31, 32])
@pytest.mark.parametrize("views", [strided, off_by_one])
@pytest.mark.parametrize("name", OPS)
def test_views(name: str, views: Callable[[Arguments], Arguments], channels: int) -> None:
    op, _, make = OPS[name]
    arguments = on("cuda", make(channels))
    expected = tensors(op(*arguments))
    actual = tensors(op(*views(arguments)))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_do(name: str) -> None:
    op, _, _ = OPS[name]
    arguments, shapes = EMPTY[name]
    actual = tensors(op(*on("cuda", arguments)))
    assert [tuple(a.shape) for a in actual] == shapes
    assert all(a.is_cuda for a in actual)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
@pytest.mark.parametrize("name", OPS)
def test_a_device_that_is_not_current(name: str) -> None:
    op, _, make = OPS[name]
    arguments = make(31)
    here, there = op(*on("cuda:0", arguments)), op(*on("cuda:1", arguments))
    for a, b in zip(tensors(here), tensors(there), strict=True):
        assert b.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.parametrize("elsewhere", ["cpu", pytest.param("cuda:1", marks=two_gpus)])
@pytest.mark.parametrize(("name", "position"), SEVERAL)
def test_mixed_devices(name: str, position: int, elsewhere: str) -> None:
    op, _, make = OPS[name]
    arguments = moved(on("cuda:0", make(8)), position, elsewhere)
    with pytest.raises(ValueError, match=r"is on (\S+) but \S+ is on (?!\1)\S+; move one"):
        op(*arguments)


@pytest.mark.parametrize("case", SINGULAR)
def test_singular_covariances(case: str) -> None:
    """As on the CPU: scores that are finite and the same, or the same documented error."""
    x = singular(case, (12, *GRID, 10))

    def scores(device: str, eps: float) -> torch.Tensor | str:
        gaussian = NeighborhoodGaussian(GRID, 10, device=device).update(x.to(device))
        try:
            mean, factor = gaussian.finalize(eps)
        except ValueError as error:
            return str(error).split(";")[0].split(" with eps")[0]
        return ops.mahalanobis(x.to(device), mean, factor, GRID).cpu()

    _, eps = NeighborhoodGaussian(GRID, 10).update(x).choose(x[:3] * 1.01, [3])
    cpu, gpu = (scores(device, eps) for device in ("cpu", "cuda"))
    assert isinstance(gpu, torch.Tensor)
    assert gpu.isfinite().all()
    torch.testing.assert_close(gpu, cpu, rtol=1e-2, atol=1e-2)
    singular_scores = scores("cuda", 0.0)
    if isinstance(singular_scores, str):
        assert "is not positive definite" in singular_scores
    else:  # as rounding has it
        assert case in ("duplicates", "large")
        assert singular_scores.isfinite().all()


def test_scores_agree_with_those_of_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("scipy")
    from npad import NPad
    from npad.evaluation.synthetic import make_dataset

    folder = make_dataset(tmp_path_factory.mktemp("data") / "woven", seed=0)
    path = folder.parent / "model.npad"
    NPad("filterbank", n_centroids=512).fit(folder / "train" / "good").save(path)
    images = sorted((folder / "test").rglob("*.png"))
    cpu, gpu = (NPad.load(path, device=device).predict(images) for device in ("cpu", "cuda"))
    torch.testing.assert_close(
        torch.from_numpy(gpu.scores), torch.from_numpy(cpu.scores), rtol=1e-3, atol=0
    )
