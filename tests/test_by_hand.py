"""A model of several members, fitted and scored again in NumPy's float64 from the definitions alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray

from npad import NPad
from npad.features.backbone import Backbone
from npad.ops import reference
from npad.statistics.holdout import Reservoir

Array = NDArray[np.float64]

LAYERS, MAP_LAYERS = (2, 3), (1, 2, 3)
SIZE = (64, 48)
# Level 1 has 16 x 12 positions, but no member has a finer grid than the first of the layers.
GRIDS = {1: (8, 6), 2: (8, 6), 3: (4, 3)}
N_FITTED, HOLDOUT, EPS, WINDOW = 16, 0.3, 0.01, 3
WEIGHT, MAP_WEIGHT = 0.6, 0.2


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 255, (20, *SIZE, 3), dtype=np.uint8)


def levels(images: NDArray[np.uint8]) -> dict[int, torch.Tensor]:
    network = Backbone("filterbank", layers=LAYERS, map_layers=MAP_LAYERS)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return {i: x.double() for i, x in zip(MAP_LAYERS, network.levels(pixels), strict=True)}


def resized(maps: Array, size: tuple[int, int]) -> Array:
    return F.interpolate(torch.from_numpy(maps)[:, None], size, mode="bilinear")[:, 0].numpy()


def mahalanobis(nominal: Array, x: Array) -> Array:
    """Distances (N, h, w) of x to the Gaussian of each position's window in `nominal`."""
    height, width = nominal.shape[1:3]
    found = np.empty(x.shape[:3])
    reach = WINDOW // 2
    for i in range(height):
        for j in range(width):
            rows = slice(max(0, i - reach), i + reach + 1)
            columns = slice(max(0, j - reach), j + reach + 1)
            samples = nominal[:, rows, columns].reshape(-1, nominal.shape[3])
            covariance = np.cov(samples.T) + EPS * np.eye(nominal.shape[3])
            z = x[:, i, j] - samples.mean(0)
            found[:, i, j] = np.sqrt(np.einsum("ni,ij,nj->n", z, np.linalg.inv(covariance), z))
    return found


def euclidean(nominal: Array, x: Array) -> Array:
    """To the nearest of all nominal embeddings."""
    every = nominal.reshape(-1, nominal.shape[3])
    differences = x[..., None, :] - every
    return np.sqrt((differences**2).sum(-1).min(-1))


def distances(nominal: NDArray[np.uint8], images: NDArray[np.uint8]) -> dict[str, Array]:
    """Of each kind: the geometric mean over its members."""
    fitted, scored = levels(nominal), levels(images)
    per_level = {}
    for i, grid in GRIDS.items():
        pair = (reference.embed([level[i]], grid).numpy() for level in (fitted, scored))
        per_level[i] = resized(mahalanobis(*pair), GRIDS[LAYERS[0]])
    pair = (
        reference.embed([level[i] for i in LAYERS], GRIDS[LAYERS[0]]).numpy()
        for level in (fitted, scored)
    )
    return {
        "mahalanobis_score": np.prod([per_level[i] for i in LAYERS], axis=0) ** (1 / 2),
        "mahalanobis_map": np.prod([per_level[i] for i in MAP_LAYERS], axis=0) ** (1 / 3),
        "euclidean": euclidean(*pair),
    }


def smoothed(fused: Array) -> Array:
    sigma = 4 * min(SIZE) / 256
    rows, columns = (reference.gaussian_matrix(side, sigma).double().numpy() for side in SIZE)
    return rows @ resized(fused, SIZE) @ columns.T


def fused(
    found: dict[str, Array], kind: str, fusion: str, weight: float, moments: dict[str, Any]
) -> Array:
    m, e = found[kind], found["euclidean"]
    if fusion == "sum":
        m, e = (
            (x - moments[name][0]) / moments[name][1] for name, x in ((kind, m), ("euclidean", e))
        )
        return weight * m + (1 - weight) * e
    alone = {"mahalanobis": m, "euclidean": e}
    return alone[fusion] if fusion in alone else m**weight * e ** (1 - weight)


@pytest.mark.parametrize("fusion", ["product", "sum", "mahalanobis", "euclidean"])
def test_a_model_of_several_members(fusion: str, images: NDArray[np.uint8]) -> None:
    nominal, new = images[:N_FITTED], images[N_FITTED:]
    model = NPad(
        "filterbank", layers=LAYERS, map_layers=MAP_LAYERS, image_size=SIZE, fusion=fusion,
        eps=EPS, window=WINDOW, holdout=HOLDOUT, n_centroids=10**6, factor_dtype="float32",
        fusion_weight=WEIGHT, map_weight=MAP_WEIGHT, progress=False,
    ).fit(nominal)  # fmt: skip
    assert {m.member.levels: m.grid for m in model.members_ if m.member.gaussian} == (
        {} if fusion == "euclidean" else {(i,): grid for i, grid in GRIDS.items()}
    )

    moments = {}
    if fusion == "sum":
        reservoir = Reservoir(HOLDOUT, model.seed)
        reservoir.take(torch.arange(N_FITTED).reshape(-1, 1, 1, 1))
        held_out = torch.stack(reservoir.kept).flatten().numpy()
        assert 2 <= len(held_out) <= N_FITTED / 2
        before = distances(np.delete(nominal, held_out, axis=0), nominal[held_out])
        moments = {name: (x.mean(), x.std(ddof=1)) for name, x in before.items()}
        assert model.standardization_.keys() == moments.keys()
        for name, one in model.standardization_.items():
            np.testing.assert_allclose((one.mean, one.std), moments[name], rtol=1e-4)
    else:
        assert model.standardization_ is None

    found = distances(nominal, new)
    terms = (("mahalanobis_score", WEIGHT), ("mahalanobis_map", MAP_WEIGHT))
    of_score, of_map = (
        smoothed(fused(found, kind, fusion, weight, moments)) for kind, weight in terms
    )
    actual = model.predict(new)
    np.testing.assert_allclose(np.stack(actual.maps), of_map, rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(actual.scores, of_score.max((1, 2)), rtol=2e-4)
    if fusion != "euclidean":  # the score is not merely the maximum of the map
        assert abs(actual.scores / of_map.max((1, 2)) - 1).min() > 1e-3
