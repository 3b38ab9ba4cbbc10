"""What a model is made of, and that its scores and maps are what the definitions say."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor

from npad import NPad
from npad.features.backbone import Backbone, BackboneError
from npad.fitting import Fit
from npad.members import Member, members_of
from npad.model_file import ModelFileError, read_model, write_model
from npad.ops import reference
from npad.scoring.fusion import scores_and_maps
from npad.scoring.scorer import distances
from npad.settings import FUSIONS, Settings, uses_gaussians, uses_nominal_set

SMALL: dict[str, Any] = {"image_size": 64, "n_centroids": 40, "progress": False}


class Network:
    layers = (2, 3)

    def __init__(self, *map_layers: int) -> None:
        self.level_channels = {1: 8, 2: 16, 3: 32}
        self.map_layers = map_layers or self.layers


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (14, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a transformer, whose grid is coarser."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


def test_the_members_of_a_model() -> None:
    per_layer = members_of(Settings(), [Network(1, 2, 3)])
    assert [(m.levels, m.gaussian, m.nominal_set) for m in per_layer] == [
        ((1,), True, False),
        ((2,), True, False),
        ((3,), True, False),
        ((2, 3), False, True),
    ]
    assert [m.in_score for m in per_layer[:3]] == [False, True, True]
    assert all(m.in_map for m in per_layer[:3])
    (joint,) = members_of(Settings(gaussians="joint"), [Network(1, 2, 3)])
    assert (joint.levels, joint.prefix) == ((2, 3, 1), 48)
    assert members_of(Settings(gaussians="joint"), [Network()]) == (Member(0, (2, 3)),)
    two = members_of(Settings(fusion="euclidean"), [Network(), Network(1)])
    assert [(m.network, m.levels) for m in two] == [(0, (2, 3)), (1, (2, 3))]
    alone = members_of(Settings(nominal_set=None), [Network(3)])
    assert [(m.levels, m.in_score, m.in_map) for m in alone] == [
        ((2,), True, False),
        ((3,), True, True),
    ]


@pytest.mark.parametrize("gaussians", ["per_layer", "joint"])
@pytest.mark.parametrize(
    ("fusion", "nominal_set"), [*((f, "kcenter") for f in FUSIONS), ("mahalanobis", None)]
)
def test_every_fusion_has_the_members_that_it_needs(
    fusion: str, nominal_set: str | None, gaussians: str
) -> None:
    """Of each network the same ones, in the order of the networks."""
    settings = Settings(fusion=fusion, gaussians=gaussians, nominal_set=nominal_set)
    found = members_of(settings, [Network(1, 2, 3), Network(1, 2, 3)])
    first, second = ([m for m in found if m.network == i] for i in (0, 1))
    assert list(found) == [*first, *second]
    assert [replace(m, network=0) for m in second] == first
    gaussian = [m.levels for m in first if m.gaussian]
    nominal = [m.levels for m in first if m.nominal_set]
    if gaussians == "joint":
        assert gaussian == [(2, 3, 1)] * uses_gaussians(fusion)
        assert nominal == [(2, 3, 1)] * uses_nominal_set(fusion)
        assert all(m.prefix == 16 + 32 and not m.own_grid for m in first)
    else:
        assert gaussian == [(1,), (2,), (3,)] * uses_gaussians(fusion)
        assert nominal == [(2, 3)] * uses_nominal_set(fusion)
        assert all(m.own_grid == m.gaussian for m in first)
    assert all(Member.of(json.loads(json.dumps(m.to_json()))) == m for m in found)


@pytest.mark.parametrize("map_layers", [(1,), (1, 3), (4,)])
def test_the_map_may_know_none_of_the_layers(map_layers: tuple[int, ...]) -> None:
    found = members_of(Settings(), [Network(*map_layers)])
    assert {m.levels for m in found if m.in_score and m.gaussian} == {(2,), (3,)}
    assert {m.levels for m in found if m.in_map and m.gaussian} == {(i,) for i in map_layers}
    with pytest.raises(ValueError, match="lacks"):
        members_of(Settings(gaussians="joint"), [Network(*map_layers)])


def test_what_is_no_prefix() -> None:
    message = r"map_layers=\(1, 3\) lacks \[2\] of layers=\(2, 3\).* use gaussians='per_layer'"
    with pytest.raises(ValueError, match=message):
        members_of(Settings(gaussians="joint"), [Network(1, 3)])


def by_hand(model: NPad, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Scores and maps in float64, from the definitions alone."""
    network = Backbone("filterbank", layers=(2, 3), map_layers=(1, 2, 3))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    level = dict(zip((1, 2, 3), network.levels(pixels), strict=True))
    sides = {1: 8, 2: 8, 3: 4}  # the second is the first of layers
    known = {m.member.levels: m for m in model.members_}

    def up(x: Tensor) -> Tensor:
        return F.interpolate(x[:, None], size=(8, 8), mode="bilinear")[:, 0]

    distance = {}
    for i, side in sides.items():
        member = known[(i,)]
        x = reference.embed([level[i]], (side, side)).double()
        factor = member.factor.double()
        distance[i] = up(reference.mahalanobis(x, member.mean.double(), factor, (side, side)))
    x = reference.embed([level[2], level[3]], (8, 8)).double()
    centroids = known[(2, 3)].centroids.double()
    euclidean = torch.cdist(x.flatten(0, 2), centroids).min(1).values.view(-1, 8, 8)

    def smooth(fused: Tensor) -> Tensor:
        large = F.interpolate(fused[:, None], size=(64, 64), mode="bilinear")[:, 0]
        matrix = reference.gaussian_matrix(64, 1.0)
        return matrix @ large @ matrix.T

    score = (distance[2] * distance[3]) ** (0.6 / 2) * euclidean**0.4
    shown = (distance[1] * distance[2] * distance[3]) ** (0.2 / 3) * euclidean**0.8
    return smooth(score).amax((1, 2)), smooth(shown)


def test_score_and_map_are_the_weighted_geometric_means(images: np.ndarray) -> None:
    arguments = {"fusion_weight": 0.6, "map_weight": 0.2, "factor_dtype": "float32"}
    model = NPad("filterbank", layers=(2, 3), map_layers=(1, 2, 3), **SMALL, **arguments)
    found = model.fit(images[:10]).predict(images[10:])
    scores, maps = by_hand(model, images[10:])
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4)
    np.testing.assert_allclose(np.stack(found.maps), maps, rtol=1e-3, atol=1e-5)
    assert abs(found.scores - np.stack(found.maps).max((1, 2))).min() > 1e-3


def test_the_prefix_of_a_joint_gaussian_is_that_of_its_layers(images: np.ndarray) -> None:
    known = {**SMALL, "gaussians": "joint", "factor_dtype": "float32", "eps": 0.01, "window": 3}
    with_map = NPad("filterbank", layers=(2, 3), map_layers=(1, 2, 3), **known).fit(images[:10])
    without = NPad("filterbank", layers=(2, 3), map_layers=(), **known).fit(images[:10])
    assert with_map.members_[0].member.prefix == 34
    a, b = with_map.predict(images[10:]), without.predict(images[10:])
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)
    assert torch.equal(with_map.members_[0].centroids, without.members_[0].centroids)
    whole = NPad("filterbank", layers=(1, 2, 3), fusion="mahalanobis", **known)
    alone = NPad(
        "filterbank", layers=(2, 3), map_layers=(1, 2, 3), fusion="mahalanobis", **known
    ).fit(images[:10])
    assert alone.nbytes < whole.fit(images[:10]).nbytes  # on a coarser grid
    assert not np.allclose(np.stack(a.maps), np.stack(b.maps), rtol=1e-2)


def test_the_map_of_a_joint_gaussian_is_that_of_all_its_levels(images: np.ndarray) -> None:
    """As if there were no score and no prefix: one embedding of levels 2, 3 and 1."""
    known = {**SMALL, "gaussians": "joint", "eps": 0.01, "window": 3, "fusion": "mahalanobis"}
    known |= {"factor_dtype": "float32"}
    model = NPad("filterbank", layers=(2, 3), map_layers=(1, 2, 3), **known).fit(images[:10])
    network = Backbone("filterbank", layers=(2, 3), map_layers=(1, 2, 3))
    x = torch.cat(
        [
            network.combined(network.levels(pixels), (2, 3, 1))
            for pixels in torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).split(8)
        ]
    )
    member = Member(0, (2, 3, 1), nominal_set=False)
    alone = Fit(model.settings_, [member]).update(embeddings=[x[:10]]).finalize()
    (own,), (expected,) = model.members_, alone.members
    torch.testing.assert_close(own.mean, expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own.factor, expected.factor, rtol=1e-3, atol=1e-2)
    found = [(member, distances(x[10:], own.mean, own.factor, None, 1))]
    scores, maps = scores_and_maps(found, model.settings_)
    actual = model.predict(images[10:])
    np.testing.assert_allclose(np.stack(actual.maps), maps, rtol=1e-5)
    assert abs(actual.scores / scores.numpy() - 1).min() > 1e-3  # that of the prefix


@pytest.mark.parametrize("gaussians", ["per_layer", "joint"])
@pytest.mark.parametrize("map_layers", [None, (), (1, 2, 3)])
@pytest.mark.parametrize("fusion", ["mahalanobis", "euclidean"])
def test_a_fusion_that_needs_less_than_was_fitted(
    fusion: str,
    map_layers: tuple[int, ...] | None,
    gaussians: str,
    images: np.ndarray,
    tmp_path: Path,
) -> None:
    """It scores as if it had been fitted so, also from its file."""
    known = {**SMALL, "layers": (2, 3), "map_layers": map_layers, "gaussians": gaussians}
    model = NPad("filterbank", **known).fit(images[:10])
    model.fusion = fusion
    found = model.predict(images[10:])
    expected = NPad("filterbank", **known, fusion=fusion).fit(images[:10]).predict(images[10:])
    assert np.array_equal(found.scores, expected.scores)
    assert np.array_equal(found.maps, expected.maps)
    model.save(tmp_path / "m.npad")
    again = NPad.load(tmp_path / "m.npad").predict(images[10:])
    assert np.array_equal(again.scores, expected.scores)
    assert np.array_equal(again.maps, expected.maps)


def test_the_fused_distances_are_geometric_means_over_backbones_of_two_grids(
    images: np.ndarray, tokens: Path
) -> None:
    """Of those of each backbone's own model, on the finer grid, in float64."""
    known = {**SMALL, "layers": (2, 3), "map_layers": ()}
    arguments = {"filterbank": None, "test_vit": tokens}
    both = NPad([*arguments], weights=[*arguments.values()], **known).fit(images[:10])
    alone = [NPad(name, weights=w, **known).fit(images[:10]) for name, w in arguments.items()]
    assert [m.grid for m in both.members_] == [(8, 8), (4, 4), (8, 8), (4, 4), (4, 4), (4, 4)]

    pixels = torch.from_numpy(images[10:]).permute(0, 3, 1, 2).float() / 255
    kinds: dict[str, list[Tensor]] = {"mahalanobis": [], "euclidean": []}
    members = iter(both.members_)
    for model in alone:
        scorer = model.scorer()
        embedded = scorer.embeddings(scorer.levels(pixels))
        for own, member, x in zip(model.members_, scorer.members, embedded, strict=True):
            tensors = next(members).tensors()
            assert all(torch.equal(tensors[name], y) for name, y in own.tensors().items())
            for kind, distance in member(x).items():
                up = F.interpolate(distance[:, None].double(), size=(8, 8), mode="bilinear")
                kinds[kind].append(up[:, 0])
    m, e = (torch.stack(maps).log().mean(0).exp() for maps in kinds.values())
    found = both.predict(images[10:])
    for weight, actual in ((0.4, found.scores), (0.3, np.stack(found.maps))):
        large = F.interpolate((m**weight * e ** (1 - weight))[:, None], size=64, mode="bilinear")
        matrix = reference.gaussian_matrix(64, 1.0)
        expected = matrix @ large[:, 0] @ matrix.T
        np.testing.assert_allclose(
            actual, expected if actual.ndim == 3 else expected.amax((1, 2)), rtol=1e-4
        )


def test_two_backbones_are_fused_and_their_order_is_not_felt(
    images: np.ndarray, untrained_resnet18: Path, tmp_path: Path
) -> None:
    both = NPad(
        ["filterbank", "resnet18"], layers=(2, 3), weights=[None, untrained_resnet18], **SMALL
    )
    both.fit(images[:10])
    other = NPad(
        ["resnet18", "filterbank"], layers=(2, 3), weights=[untrained_resnet18, None], **SMALL
    )
    a, b = (model.predict(images[10:]) for model in (both, other.fit(images[:10])))
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)
    np.testing.assert_allclose(np.stack(a.maps), np.stack(b.maps), rtol=1e-5)
    assert [one["name"] for one in both.backbones_] == ["filterbank", "resnet18"]
    both.save(tmp_path / "both.npad")
    for again in (NPad.load(tmp_path / "both.npad"), pickle.loads(pickle.dumps(both))):
        assert np.array_equal(again.predict(images[10:]).scores, a.scores)
    assert both.embed(images[:2]).shape == (2, 8, 8, 34 + 384)


def test_a_backbone_of_two_that_is_wrong_is_named(
    images: np.ndarray, untrained_resnet18: Path, tmp_path: Path
) -> None:
    names = ["filterbank", "resnet18"]
    with pytest.raises(
        ValueError, match="weights must be one file for each of filterbank, resnet18"
    ):
        NPad(names, weights=untrained_resnet18)
    with pytest.raises(ValueError, match=r"layers .*backbone 'filterbank' has levels 1 .*, 4"):
        NPad(names, layers=(0, 2), weights=[None, untrained_resnet18], **SMALL).fit(images)
    tiny = {**SMALL, "image_size": 20}
    with pytest.raises(ValueError, match="does not work with backbone 'resnet18'"):
        NPad(
            ["resnet18", "filterbank"], layers=(4,), weights=[untrained_resnet18, None], **tiny
        ).fit(images)
    sizes = r"images of different sizes \(filterbank 256 x 256, vit_tiny_patch16_224 512 x 512\)"
    token = tmp_path / "token.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), token)
    with pytest.raises(ValueError, match=sizes):
        NPad(["filterbank", "vit_tiny_patch16_224"], weights=[None, token]).fit(images)
    with pytest.raises(BackboneError, match="there is no such file of weights"):
        NPad(names, weights=[None, tmp_path / "none"], **SMALL).fit(images)


def test_a_size_is_refused_by_whichever_backbone_does_not_take_it(
    images: np.ndarray, tokens: Path
) -> None:
    for names, files in (
        (["filterbank", "test_vit"], [None, tokens]),
        (["test_vit", "filterbank"], [tokens, None]),
    ):
        model = NPad(names, weights=files, **{**SMALL, "image_size": 40}, layers=(1, 2))
        message = r"image_size \(40, 40\) does not work with backbone 'test_vit': .* divisible"
        with pytest.raises(ValueError, match=message):
            model.fit(images)


def test_weights_of_two_backbones_are_found_again(
    images: np.ndarray, untrained_resnet18: Path, tmp_path: Path
) -> None:
    """Where they were, beside the model file, or where they are said to be; in their order."""
    file = tmp_path / "r18.safetensors"
    file.write_bytes(untrained_resnet18.read_bytes())
    model = NPad(["filterbank", "resnet18"], layers=(2, 3), weights=[None, file], **SMALL)
    expected = model.fit(images[:10]).predict(images[10:]).scores
    path = tmp_path / "both.npad"
    model.save(path)
    assert NPad.load(path).settings() == model.settings()

    (tmp_path / "line").mkdir()
    moved = [p.rename(tmp_path / "line" / p.name) for p in (path, file)]
    beside = NPad.load(moved[0])
    assert beside.settings()["weights"] == [None, str(moved[1])]
    assert np.array_equal(beside.predict(images[10:]).scores, expected)

    elsewhere = moved[1].rename(tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"r18\.safetensors: there is no such file of w"):
        NPad.load(moved[0])
    said = NPad.load(moved[0], weights=[None, elsewhere])
    assert np.array_equal(said.predict(images[10:]).scores, expected)
    again = pickle.loads(pickle.dumps(said))
    assert np.array_equal(again.predict(images[10:]).scores, expected)
    for wrong in (elsewhere, [None, elsewhere, elsewhere]):
        message = r"^NPad: weights must be one file for each of filterbank, resnet18, in this order"
        with pytest.raises(ValueError, match=message):
            NPad.load(moved[0], weights=wrong)


def test_a_file_that_names_another_number_of_backbones(images: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "m.npad"
    NPad("filterbank", **SMALL).fit(images).save(path)
    header, tensors = read_model(path)
    write_model(path, header | {"backbones": header["backbones"] * 2}, tensors)
    with pytest.raises(ModelFileError, match="names 2 backbones"):
        NPad.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": 1}, "has a member of backbone 1 of 1"),
        ({"network": -1}, "has a member of backbone -1 of 1"),
        ({"levels": [4]}, r"has a member of levels \(4,\), which its backbone does not give"),
        ({"levels": []}, r"has a member of levels \(\)"),
        ({"levels": [1, 2]}, r"has grid \(16, 16\) with 17 channels, which its backbone does not"),
        ({"unknown": 1}, "cannot use"),
    ],
)
def test_a_file_whose_members_are_not_those_of_its_backbone(
    change: dict[str, object], message: str, images: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "m.npad"
    NPad("filterbank", **SMALL, nominal_set=None).fit(images).save(path)
    header, tensors = read_model(path)
    header["members"][0]["member"].update(change)
    write_model(path, header, tensors)
    with pytest.raises(ModelFileError, match=message):
        NPad.load(path)


def test_the_sum_is_standardised_on_the_images_held_out(images: np.ndarray) -> None:
    model = NPad("filterbank", **SMALL, fusion="sum", eps=0.01, window=3).fit(images[:10])
    moments = model.standardization_
    assert set(moments) == {"mahalanobis_score", "mahalanobis_map", "euclidean"}
    assert all(one.std > 0 for one in moments.values())
    assert moments["mahalanobis_score"] == moments["mahalanobis_map"]  # no finer level
