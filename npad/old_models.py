"""Model files of earlier formats, as if they were of today's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from npad.members import Member
from npad.settings import MOST_SIGMA, sigma_by_size, uses_gaussians, uses_nominal_set

__all__ = ["upgraded"]


def upgraded(
    header: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a model file, in today's form.

    Raises
    ------
    KeyError
        The header is not that of a model.
    TypeError
        As KeyError.
    """
    if "members" not in header:
        header = _from_version_1(header)
        tensors = {f"0.{name}": tensor for name, tensor in tensors.items()}
    if any("n_features" not in member for member in header["members"]):
        header = _with_features(header)
    if "smoothing" not in header["settings"]:
        header = _with_smoothing(header)
    return header, tensors


def _with_smoothing(header: Mapping[str, Any]) -> dict[str, Any]:
    """That of images of more than 1024 pixels, which once grew without a limit."""
    sigma = sigma_by_size(header["settings"]["image_size"])
    changed = {"smoothing": sigma if sigma > MOST_SIGMA else None}
    found = {**header, "settings": header["settings"] | changed}
    if header.get("calibration"):
        calibration = header["calibration"]
        found["calibration"] = calibration | {"scoring": calibration["scoring"] | changed}
    return found


def _with_features(header: Mapping[str, Any]) -> dict[str, Any]:
    """To how many dimensions the embedding of each member is reduced: once a matter of settings."""
    n = header["settings"]["n_features"]
    members = [m | {"n_features": n and min(n, m["channels"])} for m in header["members"]]
    return {**header, "members": members}


def _from_version_1(header: Mapping[str, Any]) -> dict[str, Any]:
    """One backbone with one embedding, whose score was the maximum of its map."""
    settings = header["settings"]
    fusion = settings["fusion"]
    member = Member(
        0,
        tuple(header["backbone"]["layers"]),
        gaussian=uses_gaussians(fusion),
        nominal_set=uses_nominal_set(fusion),
    )
    learned = {
        "member": member.to_json(),
        "window": settings["window"] if member.gaussian else None,
        **{name: header[name] for name in ("channels", "grid", "eps", "n_centroids")},
    }
    moments = header["standardization"]
    kinds = {
        "mahalanobis_score": "mahalanobis",
        "mahalanobis_map": "mahalanobis",
        "euclidean": "euclidean",
    }
    new = {"gaussians": "joint", "map_layers": [], "map_weight": settings.get("fusion_weight", 0.4)}
    kept = {name: header[name] for name in ("n_images", "darkest", "n_bits") if name in header}
    return {
        "npad_version": header["npad_version"],
        "settings": settings | new,
        "backbones": [header["backbone"]],
        "members": [learned],
        "standardization": moments
        and {
            name: {field: moments[f"{kind}_{field}"] for field in ("mean", "std")}
            for name, kind in kinds.items()
        },
        **kept,
    }
