"""What a fit leaves: the one list of a model's learned values.

A model file, a model's size, its move to another device, the scorer and the checks of shapes go through
the fields of `Learned`. ``NPad`` has each as an attribute with a trailing ``_``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Final

import torch
from torch import Tensor

from npad.settings import Settings, uses_gaussians, uses_nominal_set

__all__ = ["MEANINGS", "TENSORS", "Learned", "LearnedTensor", "Standardization"]


@dataclass(frozen=True)
class Standardization:
    """Mean and standard deviation of both maps on nominal images held out from the fit."""

    mahalanobis_mean: float
    mahalanobis_std: float
    euclidean_mean: float
    euclidean_std: float

    @classmethod
    def of(cls, mahalanobis: Tensor, euclidean: Tensor) -> Standardization:
        """Measure both maps (any shape, two values or more)."""
        moments = torch.mean, torch.std
        return cls(*(float(f(x.double())) for x in (mahalanobis, euclidean) for f in moments))


@dataclass(frozen=True)
class LearnedTensor:
    """What is known about a learned tensor before there is one.

    Attributes
    ----------
    name : of the field of `Learned`, and of the tensor in a model file
    shape : of symbols, see `Learned.expected`
    dtype : its name, or the name of the setting that holds it
    meaning : a line for the docs
    when : whether a model of these settings has it
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    meaning: str
    when: Callable[[Settings], bool]

    def torch_dtype(self, settings: Settings) -> torch.dtype:
        """The dtype in a model of these settings."""
        dtype = getattr(torch, getattr(settings, self.dtype, self.dtype))
        assert isinstance(dtype, torch.dtype)
        return dtype


def _tensor(
    shape: str, dtype: str, meaning: str, when: Callable[[Settings], bool] = lambda _: True
) -> Any:
    known = {"shape": tuple(shape.split(", ")), "dtype": dtype, "meaning": meaning, "when": when}
    return field(default=None, metadata={"tensor": known})


def _grid(value: Any, settings: Settings) -> tuple[int, int]:
    height, width = (int(side) for side in value)
    return height, width


def _n_images(value: Any, settings: Settings) -> int:
    return int(value)


def _eps(value: Any, settings: Settings) -> float | None:
    if isinstance(value, (int, float)) and value >= 0:
        return float(value)
    if value is None and not uses_gaussians(settings.fusion):
        return None
    raise ValueError(f"eps is {value!r}")


def _standardization(value: Any, settings: Settings) -> Standardization | None:
    return Standardization(**value) if value else None


def _darkest(value: Any, settings: Settings) -> float:
    return float(value)


def _n_bits(value: Any, settings: Settings) -> int | None:
    return None if value is None else int(value)


def _value(meaning: str, read: Callable[[Any, Settings], Any], default: Any = MISSING) -> Any:
    """`read` makes it of what JSON gives back; the default is that of models which have none."""
    return field(default=default, metadata={"meaning": meaning, "read": read})


@dataclass(frozen=True, eq=False)
class Learned:
    """What a fit has found; tensors are None where a model's settings do without them."""

    grid: tuple[int, int] = _value("(H, W) of the embeddings", _grid)
    n_images: int = _value("images fitted", _n_images)
    eps: float | None = _value("the eps in use; None where no Gaussian is", _eps)
    standardization: Standardization | None = _value(
        'mean and standard deviation of both maps, for the fusion "sum"', _standardization
    )
    darkest: float = _value(
        "the largest value, 0 to 1, that every image fitted reaches", _darkest, default=0.0
    )
    n_bits: int | None = _value(
        "bits that the images fitted use, where they are fewer than the 16 that they are read as",
        _n_bits,
        default=None,
    )
    projection: Tensor | None = _tensor(
        "D, C",
        "float32",
        "axes to which the backbone's D channels are reduced, with n_features",
        lambda settings: settings.n_features is not None,
    )
    mean: Tensor | None = _tensor(
        "P, C",
        "float32",
        "means of the Gaussians",
        lambda settings: uses_gaussians(settings.fusion),
    )
    factor: Tensor | None = _tensor(
        "P, packed",
        "factor_dtype",
        "inverse Cholesky factors of their covariances, packed lower triangles",
        lambda settings: uses_gaussians(settings.fusion),
    )
    centroids: Tensor | None = _tensor(
        "K, C",
        "float32",
        "the nominal set",
        lambda settings: uses_nominal_set(settings.fusion),
    )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        found = {tensor.name: getattr(self, tensor.name) for tensor in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device) -> Learned:
        """The same on a device."""
        return self.having({name: x.to(device) for name, x in self.tensors().items()})

    def having(self, tensors: Mapping[str, Any]) -> Learned:
        """The same with these tensors."""
        return replace(self, **tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def n_centroids(self) -> int | None:
        """Size of the nominal set, or None without one."""
        return None if self.centroids is None else len(self.centroids)

    def lacks(self, settings: Settings) -> list[str]:
        """What a model of these settings needs and has not got, by name."""
        needed = [t.name for t in TENSORS if t.when(settings)]
        needed += ["standardization"] if settings.fusion == "sum" else []
        return [name for name in needed if getattr(self, name) is None]

    def to_json(self) -> dict[str, Any]:
        """All but the tensors, as JSON types."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if "read" in f.metadata}
        values["grid"] = list(self.grid)
        values["standardization"] = asdict(self.standardization) if self.standardization else None
        return {**values, "n_centroids": self.n_centroids}

    @classmethod
    def of(cls, values: Mapping[str, Any], settings: Settings) -> Learned:
        """All but the tensors, from what `to_json` gave.

        Raises
        ------
        KeyError
            A value is missing.
        TypeError
            A value cannot be what it is said to be.
        ValueError
            As TypeError.
        """
        read = [f for f in fields(cls) if "read" in f.metadata]
        return cls(
            **{
                f.name: f.metadata["read"](values[f.name], settings)
                for f in read
                if f.name in values or f.default is MISSING
            }
        )

    @staticmethod
    def expected(
        settings: Settings, sizes: Mapping[str, int]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of a model.

        Parameters
        ----------
        settings : of the model
        sizes : of the symbols: P positions of the grid, D channels of the backbone, C of an embedding,
            ``packed`` elements of a packed triangle of C rows, K centroids
        """
        return {
            t.name: (t.torch_dtype(settings), tuple(sizes[symbol] for symbol in t.shape))
            for t in TENSORS
            if t.when(settings)
        }


TENSORS: Final = tuple(
    LearnedTensor(f.name, **f.metadata["tensor"]) for f in fields(Learned) if "tensor" in f.metadata
)
# Of every field, in a line.
MEANINGS: Final = {f.name: f.metadata.get("tensor", f.metadata)["meaning"] for f in fields(Learned)}
