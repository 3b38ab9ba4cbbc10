"""The ops as PyTorch knows them: schemas, shapes for tracing, the reference as the last resort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from npad.ops import _outputs, reference

_SCHEMAS = {
    "embed": "(Tensor[] levels, int[2] grid) -> Tensor",
    "neighborhood_moments": "(Tensor x, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) scatter) -> ()",
    "window_covariance": "(Tensor count, Tensor mean, Tensor scatter, int[2] grid, int window, "
    "int start, int stop) -> (Tensor, Tensor)",
    "pack_factor": "(Tensor factor, ScalarType dtype) -> Tensor",
    "inverse_cholesky": "(Tensor covariance, ScalarType dtype) -> (Tensor, Tensor)",
    "mahalanobis": "(Tensor x, Tensor mean, Tensor factor, int[2] grid, int window, "
    "int? prefix=None) -> Tensor",
    "centroid_index": "(Tensor centroids) -> Tensor",
    "nearest_centroid": "(Tensor x, Tensor centroids, Tensor? index=None) -> (Tensor, Tensor)",
    "farthest_first": "(Tensor points, int n_centroids, int first) -> (Tensor, Tensor)",
    "anomaly_map": "(Tensor? mahalanobis, Tensor? euclidean, bool product, float[3] coefficients, "
    "int[2] size, float sigma) -> (Tensor, Tensor)",
    "resize_maps": "(Tensor maps, int[] heights, int[] widths) -> Tensor",
}
OPS = tuple(_SCHEMAS)
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"npad::{_name}", _schema)
    torch.library.impl(f"npad::{_name}", "CompositeExplicitAutograd", getattr(reference, _name))
    torch.library.register_fake(f"npad::{_name}", getattr(_outputs, _name))


def register(device: str, *kernels: Callable[..., Any]) -> None:
    """Have ops run these kernels, which are named like them, on tensors of a device."""
    for kernel in kernels:
        torch.library.impl(f"npad::{kernel.__name__}", device, kernel)
