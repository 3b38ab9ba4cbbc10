"""The scorer as a module of PyTorch: state, moving, export with a dynamic batch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from npad import NPad, ops

SMALL = {"image_size": 32, "n_centroids": 50, "progress": False}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(images: np.ndarray) -> NPad:
    return NPad("filterbank", **SMALL, n_features=20).fit(images)


@pytest.fixture
def batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def test_what_it_holds(model: NPad) -> None:
    scorer = model.scorer()
    assert isinstance(scorer, nn.Module)
    buffers = dict(scorer.named_buffers())
    tensors = {
        f"members.{i}.{name}": tensor
        for i, member in enumerate(model.members_)
        for name, tensor in member.tensors().items()
    }
    assert all(buffers[name] is tensor for name, tensor in tensors.items())
    state = scorer.state_dict()  # without the index, which is made from the centroids
    assert {name for name in state if not name.startswith("networks.")} == tensors.keys()


def test_a_state_dict_brings_another_fit(model: NPad, batch: torch.Tensor) -> None:
    other = NPad(**model.get_params()).fit(batch.flip(0) ** 2)
    expected = other.scorer()(batch)
    before, own = model.score(batch), model.scorer()(batch)
    twin = model.scorer()
    assert not torch.equal(twin(batch)[0], expected[0])
    twin.load_state_dict(other.scorer().state_dict())
    torch.testing.assert_close(twin(batch), expected, rtol=1e-6, atol=0)
    assert torch.equal(model.score(batch)[0], before[0])
    assert torch.equal(model.scorer()(batch)[0], own[0])


def test_centroids_of_a_state_dict_are_found_again(model: NPad) -> None:
    """The index is no part of it: that of the centroids before would give other distances."""
    twin = model.scorer()
    state = twin.state_dict()
    centroids = state["members.3.centroids"] = state["members.3.centroids"].flip(1) + 5
    projection = state["members.3.projection"] = torch.eye(51, 20)
    twin.load_state_dict(state)
    x = torch.rand(2, *model.members_[3].grid, len(projection)) + 5
    found = twin.members[3](x)["euclidean"]
    expected, _ = ops.nearest_centroid(x.flatten(0, 2)[:, :20].contiguous(), centroids)
    assert torch.equal(found.flatten(), expected)


def test_moving_it_leaves_the_model_and_others_of_its_backbone(
    model: NPad, batch: torch.Tensor
) -> None:
    expected = model.score(batch)
    scorer = model.scorer().to("meta")
    assert {x.device.type for x in scorer.state_dict().values()} == {"meta"}
    again = model.score(batch)
    assert torch.equal(again[0], expected[0])


def test_moving_it_makes_the_index_that_the_device_uses(model: NPad) -> None:
    """A device that is not there stands for one that is."""
    member = model.scorer().members[3]
    assert (member.index.device.type, member.index.dtype) == ("cpu", torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        member.to("cuda:0")
    assert (member.index.device.type, member.index.dtype) == ("cuda", torch.uint8)


@pytest.mark.parametrize("fusion", ["product", "sum", "mahalanobis", "euclidean"])
def test_export_with_a_dynamic_batch(fusion: str, images: np.ndarray, batch: torch.Tensor) -> None:
    model = NPad("filterbank", **SMALL, fusion=fusion, score_window=3, holdout=0.3)
    scorer = model.fit(images).scorer()
    exported = torch.export.export(
        scorer, (batch[:3],), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}
    )
    for n in (1, 2, 10):
        for a, b in zip(exported.module()(batch[:n]), scorer(batch[:n]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_an_exported_resnet_that_is_saved_and_loaded(
    weights: Path, images: np.ndarray, batch: torch.Tensor
) -> None:
    file = weights / "resnet18_layers123.safetensors"
    model = NPad("resnet18", weights=file, **SMALL).fit(images)
    scorer = model.scorer()
    exported = torch.export.export(
        scorer, (batch[:2],), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}
    )
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for n in (1, 7):
        for a, b in zip(loaded(batch[:n]), scorer(batch[:n]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.score(batch)[0], scorer(batch)[0])
