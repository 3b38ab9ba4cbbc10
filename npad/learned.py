"""What a fit leaves: the one list of a model's learned values.

A model file, a model's size, its move to another device, the scorer and the checks of shapes go through
the fields of `Learned`. ``NPad`` has each as an attribute with a trailing ``_``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from npad.members import Member
from npad.nominal_scores import NominalScores
from npad.ops.packed import is_finite, restore, store, stored_size
from npad.settings import Settings, uses_gaussians, uses_nominal_set

__all__ = [
    "MEANINGS",
    "MEMBER_MEANINGS",
    "Expected",
    "Learned",
    "LearnedMember",
    "LearnedTensor",
    "Standardization",
    "tensors_of",
]

Expected: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of tensors, by their names


@dataclass(frozen=True)
class Standardization:
    """Mean and standard deviation of distances on nominal images held out from the fit."""

    mean: float
    std: float

    @classmethod
    def of(cls, distances: Tensor) -> Standardization:
        """Measure distances (any shape, two values or more)."""
        x = distances.double()
        return cls(float(x.mean()), float(x.std()))

    @staticmethod
    def to_json(known: Mapping[str, Standardization] | None) -> dict[str, Any] | None:
        """Those of several kinds, as JSON types."""
        return {kind: asdict(one) for kind, one in known.items()} if known else None

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> dict[str, Standardization] | None:
        """What `to_json` was given."""
        return {kind: cls(**one) for kind, one in dict(values).items()} if values else None


@dataclass(frozen=True)
class LearnedTensor:
    """What is known about a learned tensor before there is one.

    Attributes
    ----------
    name : of the field of `LearnedMember` or `Learned`
    shape : of symbols, see `expected` of these
    dtype : its name, or the name of the setting that holds it
    meaning : a line for the docs
    when : whether a member, or what was learned of all images, has it
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    meaning: str
    when: Callable[[Any], bool]

    def torch_dtype(self, settings: Settings) -> torch.dtype:
        """The dtype in a model of these settings."""
        dtype = getattr(torch, getattr(settings, self.dtype, self.dtype))
        assert isinstance(dtype, torch.dtype)
        return dtype


def tensors_of(cls: type) -> tuple[LearnedTensor, ...]:
    """The tensors of `LearnedMember` or of `Learned`."""
    return tuple(
        LearnedTensor(f.name, **f.metadata["tensor"]) for f in fields(cls) if "tensor" in f.metadata
    )


def _present(learned: LearnedMember | Learned) -> dict[str, Tensor]:
    """The tensors that there are, by name."""
    found = {tensor.name: getattr(learned, tensor.name) for tensor in tensors_of(type(learned))}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _expected(
    learned: LearnedMember | Learned, settings: Settings, sizes: Mapping[str, int]
) -> Expected:
    """Dtype and shape of each tensor, by the sizes of the symbols."""
    return {
        t.name: (t.torch_dtype(settings), tuple(sizes[symbol] for symbol in t.shape))
        for t in tensors_of(type(learned))
        if t.when(learned)
    }


def _tensor(shape: str, dtype: str, meaning: str, when: Callable[[Any], bool]) -> Any:
    known = {"shape": tuple(shape.split(", ")), "dtype": dtype, "meaning": meaning, "when": when}
    return field(default=None, metadata={"tensor": known})


def _value(meaning: str, read: Callable[[Any], Any], default: Any = MISSING) -> Any:
    """`read` makes it of what JSON gives back; the default is that of models which have none."""
    return field(default=default, metadata={"meaning": meaning, "read": read})


def _grid(value: Any) -> tuple[int, int]:
    height, width = (int(side) for side in value)
    return height, width


def _at_least_0_or_none(name: str) -> Callable[[Any], float | None]:
    def read(value: Any) -> float | None:
        if value is None or (isinstance(value, (int, float)) and value >= 0):
            return None if value is None else float(value)
        raise ValueError(f"{name} is {value!r}")

    return read


def _count_or_none(value: Any) -> int | None:
    return None if value is None else int(value)


def _read(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a class that are no tensors, from JSON."""
    known = [f for f in fields(cls) if "read" in f.metadata]
    return {
        f.name: f.metadata["read"](values[f.name])
        for f in known
        if f.name in values or f.default is MISSING
    }


@dataclass(frozen=True, eq=False)
class LearnedMember:
    """What a fit has found for a member; tensors are None where it does without them."""

    member: Member = _value("which embedding it is of, and what is done with it", Member.of)
    channels: int = _value("of the embedding, as its levels give them", int)
    grid: tuple[int, int] = _value("(H, W) of the embeddings", _grid)
    eps: float | None = _value(
        "the eps in use; None where no Gaussian is", _at_least_0_or_none("eps")
    )
    window: int | None = _value("the training window in use; as eps", _count_or_none)
    n_features: int | None = _value(
        "dimensions to which the embedding is reduced; None where all are kept", _count_or_none
    )
    radius: float | None = _value(
        "no embedding fitted is farther from the nominal set; None without one, and for k-means",
        _at_least_0_or_none("radius"),
        default=None,
    )
    borrowed: int = _value(
        "positions with too few images of their own, whose training window is a wider one",
        int,
        default=0,
    )
    projection: Tensor | None = _tensor(
        "D, C",
        "float32",
        "axes to which D channels are reduced",
        lambda learned: learned.n_features is not None,
    )
    mean: Tensor | None = _tensor(
        "P, C", "float32", "means of the Gaussians", lambda learned: learned.member.gaussian
    )
    factor: Tensor | None = _tensor(
        "P, stored",
        "factor_dtype",
        "inverse Cholesky factors of their covariances, packed lower triangles; of int8, with scales",
        lambda learned: learned.member.gaussian,
    )
    centroids: Tensor | None = _tensor(
        "K, E", "float32", "the nominal set", lambda learned: learned.member.nominal_set
    )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        return _present(self)

    @property
    def n_centroids(self) -> int | None:
        """Size of the nominal set, or None without one."""
        return None if self.centroids is None else len(self.centroids)

    def __str__(self) -> str:
        """A line for people."""
        of = "layer" if len(self.member.levels) == 1 else "layers"
        found = []
        if self.member.gaussian:
            height, width = self.grid
            found.append(f"{height} x {width} Gaussians, window {self.window}, eps {self.eps:.3g}")
            if self.borrowed:
                found.append(f"{self.borrowed} of a wider window for want of images")
        if self.centroids is not None:
            within = "" if self.radius is None else f" within {self.radius:.3g} of all"
            found.append(f"{self.n_centroids} centroids{within}")
        levels = ", ".join(map(str, self.member.levels))
        kept = "" if self.n_features is None else f" in {self.n_features} dimensions"
        return f"{of} {levels}, {self.channels} channels{kept}: {', '.join(found)}"

    def stored_as(self, dtype: torch.dtype) -> LearnedMember:
        """The same with factors of another dtype, rounded from those that there are.

        Raises
        ------
        ValueError
            They would not become smaller, or the dtype cannot hold them.
        """
        if self.factor is None:
            return self
        if dtype.itemsize >= self.factor.dtype.itemsize:
            before, after = (str(x).removeprefix("torch.") for x in (self.factor.dtype, dtype))
            raise ValueError(
                f"NPad.shrink: factors of {before} become neither smaller nor better as {after}; fit "
                f"again with factor_dtype={after!r}, or shrink a model saved with statistics=True"
            )
        channels = self.n_features or self.channels
        factor = torch.cat(
            [
                store(restore(part, channels, torch.float32), channels, dtype)
                for part in self.factor.split(64)
            ]
        )
        if not is_finite(factor, channels):
            raise ValueError(
                f"NPad.shrink: the factors need values larger than {str(dtype).removeprefix('torch.')} "
                "holds; use factor_dtype='bfloat16' or 'int8'"
            )
        return replace(self, factor=factor)

    def used_by(self, settings: Settings) -> LearnedMember | None:
        """What a model of these settings needs of it, if anything."""
        part = self.member.used_by(settings.fusion)
        if part is None:
            return None
        used = replace(self, member=part)
        unused: dict[str, Any] = {
            t.name: None for t in tensors_of(LearnedMember) if not t.when(used)
        }
        return replace(
            used,
            radius=self.radius if part.nominal_set else None,
            borrowed=self.borrowed if part.gaussian else 0,
            **unused,
        )

    def to_json(self) -> dict[str, Any]:
        """All but the tensors, as JSON types."""
        return {
            "member": self.member.to_json(),
            "channels": self.channels,
            "grid": list(self.grid),
            "eps": self.eps,
            "window": self.window,
            "n_features": self.n_features,
            "radius": self.radius,
            "borrowed": self.borrowed,
            "n_centroids": self.n_centroids,
        }

    def expected(self, settings: Settings, n_centroids: int) -> Expected:
        """Dtype and shape of each tensor."""
        reduced = self.n_features or self.channels
        sizes = {
            "P": self.grid[0] * self.grid[1],
            "D": self.channels,
            "C": reduced,
            "E": self.member.prefix or reduced,
            "stored": stored_size(reduced, getattr(torch, settings.factor_dtype)),
            "K": n_centroids,
        }
        return _expected(self, settings, sizes)


def _n_images(value: Any) -> int:
    if isinstance(value, int) and value > 0:
        return value
    raise ValueError(f"n_images is {value!r}")


def _fingerprints(values: Any) -> tuple[str, ...]:
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return tuple(values)
    raise ValueError("fingerprints is no list of texts")


def _members(values: Any) -> tuple[LearnedMember, ...]:
    members = tuple(LearnedMember(**_read(LearnedMember, value)) for value in values)
    for learned in members:
        if learned.member.gaussian and learned.eps is None:
            raise ValueError("eps is None")
    return members


def _color(value: Any) -> tuple[float, float, float] | None:
    if value is None:
        return None
    red, green, blue = (float(channel) for channel in value)
    if not all(0 <= channel <= 1 for channel in (red, green, blue)):
        raise ValueError(f"roi_color is {value!r}")
    return red, green, blue


@dataclass(frozen=True, eq=False)
class Learned:
    """What a fit has found."""

    n_images: int = _value("images fitted", _n_images)
    members: tuple[LearnedMember, ...] = _value("what was learned of each embedding", _members)
    darkest: float = _value(
        "the largest value, 0 to 1, that every image fitted reaches", float, default=0.0
    )
    n_bits: int | None = _value(
        "bits that the images fitted use, where they are fewer than the 16 that they are read as",
        _count_or_none,
        default=None,
    )
    filled: bool = _value(
        "whether images are filled up to whole strides of the backbones; before this was written, they "
        "were not",
        bool,
        default=False,
    )
    fingerprints: tuple[str, ...] = _value(
        "of each image fitted, the SHA-256 of what the backbone was given, cut to 64 bits",
        _fingerprints,
        default=(),
    )
    n_template: int | None = _value(
        "images of which the template is the median; None without `align`",
        _count_or_none,
        default=None,
    )
    template: Tensor | None = _tensor(
        "RGB, H, W",
        "float32",
        "to which `align` registers images: the median of registered nominal images, 0 to 1",
        lambda learned: learned.n_template is not None,
    )
    standardization: dict[str, Standardization] | None = _value(
        'mean and standard deviation of the distances that are fused, for the fusion "sum"',
        Standardization.from_json,
        default=None,
    )
    calibration: NominalScores | None = _value(
        "what nominal images that were not fitted scored, on which decisions rest; none before "
        "`NPad.calibrate`",
        NominalScores.from_json,
        default=None,
    )
    roi_color: tuple[float, float, float] | None = _value(
        "what the backbone sees in the place of pixels outside the region of interest: the mean R, G, "
        "B of those inside, from 0 to 1; None where the fit had no region",
        _color,
        default=None,
    )
    roi: Tensor | None = _tensor(
        "H, W",
        "uint8",
        "the region of interest: 1 for a pixel that is looked at, else 0",
        lambda learned: learned.roi_color is not None,
    )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, under the names that they have in a model file."""
        of_members = {
            f"{i}.{name}": tensor
            for i, member in enumerate(self.members)
            for name, tensor in member.tensors().items()
        }
        return _present(self) | of_members

    def having(self, tensors: Mapping[str, Tensor]) -> Learned:
        """The same with these tensors, named as `tensors` does."""
        members = []
        for i, member in enumerate(self.members):
            found: dict[str, Any] = {
                t.name: tensors.get(f"{i}.{t.name}") for t in tensors_of(LearnedMember)
            }
            members.append(replace(member, **found))
        own: dict[str, Any] = {t.name: tensors.get(t.name) for t in tensors_of(type(self))}
        return replace(self, members=tuple(members), **own)

    def expected(self, settings: Settings, members: Sequence[Mapping[str, Any]]) -> Expected:
        """Dtype and shape of each tensor, named as `tensors` does.

        Parameters
        ----------
        members : what `to_json` said of each

        Raises
        ------
        ValueError
            A template that the settings do not use, or none where they do.
        """
        if (settings.align is None) != (self.n_template is None):
            raise ValueError(f"align is {settings.align}, but n_template is {self.n_template}")
        height, width = settings.size
        found = _expected(self, settings, {"RGB": 3, "H": height, "W": width})
        for i, (member, values) in enumerate(zip(self.members, members, strict=True)):
            of_member = member.expected(settings, int(values["n_centroids"] or 0))
            found |= {f"{i}.{name}": what for name, what in of_member.items()}
        return found

    def to(self, device: torch.device) -> Learned:
        """The same on a device."""
        return self.having({name: x.to(device) for name, x in self.tensors().items()})

    def stored_as(self, dtype: torch.dtype) -> Learned:
        """As `LearnedMember.stored_as`, of all members; a calibration is dropped, as scores change."""
        members = tuple(member.stored_as(dtype) for member in self.members)
        return replace(self, members=members, calibration=None)

    def used_by(self, settings: Settings) -> Learned:
        """What a model of these settings needs of it."""
        parts = (member.used_by(settings) for member in self.members)
        return replace(self, members=tuple(part for part in parts if part is not None))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def lacks(self, settings: Settings) -> list[str]:
        """What a model of these settings needs and has not got, in words."""
        needed = {
            "Gaussians": uses_gaussians(settings.fusion) and not self._has("factor"),
            "a nominal set": uses_nominal_set(settings.fusion) and not self._has("centroids"),
            "a standardization": settings.fusion == "sum" and not self.standardization,
        }
        return [what for what, is_missing in needed.items() if is_missing]

    def _has(self, name: str) -> bool:
        return any(getattr(member, name) is not None for member in self.members)

    def to_json(self) -> dict[str, Any]:
        """All but the tensors, as JSON types."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if "read" in f.metadata}
        return values | {
            "members": [member.to_json() for member in self.members],
            "fingerprints": list(self.fingerprints),
            "standardization": Standardization.to_json(self.standardization),
            "calibration": self.calibration and self.calibration.to_json(),
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Learned:
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
        return cls(**_read(cls, values))


def _meanings(cls: type) -> dict[str, str]:
    return {f.name: f.metadata.get("tensor", f.metadata)["meaning"] for f in fields(cls)}


# Of every field, in a line.
MEANINGS: Final = _meanings(Learned)
MEMBER_MEANINGS: Final = _meanings(LearnedMember)
