"""NPad: fit on defect-free images, score new ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npad import arguments, devices, fitting, model_file, ops, progress
from npad._version import __version__
from npad.features.backbone import Backbone, shared_backbone
from npad.images.source import ImageSource
from npad.model_file import ModelFileError
from npad.ops import _cuda
from npad.scoring import cuda_graphs
from npad.scoring.cuda_graphs import Graphs
from npad.scoring.fusion import FUSIONS, Standardization, uses_gaussians, uses_nominal_set
from npad.scoring.pipeline import Run, Scorer, embed, started_ahead

TENSORS = ("projection", "mean", "factor", "centroids")  # each with a trailing _ as attributes
LESS_MEMORY = (
    "lower batch_size, image_size, n_features or n_centroids, or use another device (device='cpu')"
)

_lock = threading.Lock()  # of what models make at first use; not an attribute, so that they copy


@dataclass
class Prediction:
    """Scores and anomaly maps of images, in their order; higher is more anomalous.

    Attributes
    ----------
    scores : (N,) float64, the maximum of each image's smoothed map at the model's resolution
    maps : N arrays (H, W) float32, each at its image's own size
    paths : N names: the path, or ``image[i]`` for arrays
    skipped : (name, reason) of files that could not be read, with ``skip_bad=True``
    """

    scores: NDArray[np.float64]
    maps: list[NDArray[np.float32]]
    paths: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)


class NPad:
    """N-pad anomaly detector.

    Parameters
    ----------
    backbone : any timm name with ``features_only``, or "filterbank", which needs no weights
    layers : timm ``out_indices`` of the feature levels; None takes the two of stride 8 and 16
    image_size : int or (height, width): images are resized to it, without a crop
    weights : path of the backbone's weights (safetensors, or a torch file, read with
        ``weights_only=True``); None downloads timm's
    window : odd side of the training window of the Gaussians
    score_window : odd side of the evaluation window
    eps : added to the diagonal of every covariance, in squared units of the features; "auto" takes the
        one that makes held-out nominal embeddings most likely
    nominal_set : "kcenter", "kmeans" or None
    n_centroids : size of the nominal set; a fraction below 1 is of all nominal embeddings
    fusion : "product" of both distances (default), "sum" of both standardised on held-out nominal
        images, "mahalanobis" or "euclidean" alone; None is "product", or "mahalanobis" without a
        nominal set
    fusion_weight : share of the Mahalanobis distance in "product" and "sum", from 0 to 1; the
        Euclidean one has the rest. Nothing that is fitted depends on it
    factor_dtype : "float32", "float16" or "bfloat16", storage of the Gaussians' factors
    n_features : dimensions to which embeddings are reduced; None keeps all
    reduction : "pca" of a sample of nominal embeddings, or a seeded "random" orthogonal projection
    holdout : fraction of the images (at most 64 images) kept from the fit while eps and
        standardisation are chosen; they are fitted afterwards
    seed : of every random choice
    device : torch device, or "auto": a GPU if there is one
    backbone_dtype : "float32", "float16" or "bfloat16", in which the backbone computes; None fits in
        float32 and scores in float16 on a GPU, in float32 elsewhere
    compile : run the backbone through ``torch.compile``
    batch_size : images that go through the backbone together
    progress : True, False, or None: bars for what takes over two seconds, on a terminal only

    Attributes
    ----------
    grid_ : (H, W) of the embeddings
    n_images_ : images fitted
    eps_ : the eps in use; None where "auto" had nothing to choose for
    mean_, factor_ : (P, C) float32 and (P, packed): the Gaussians, or None where the fusion does not
        use them
    centroids_ : (K, C) float32, the nominal set, or None
    projection_ : (channels of the backbone, n_features) float32, or None
    standardization_ : Standardization of the "sum", or None
    skipped_ : (name, reason) of files skipped by ``fit(..., skip_bad=True)``

    Notes
    -----
    Jang, Hwang, Park, *N-Pad: Neighboring Pixel-Based Industrial Anomaly Detection*, CVPR Workshops
    2023. The same input, seed and thread count give bitwise equal models. Defaults: docs/method.md.
    """

    grid_: tuple[int, int]
    n_images_: int
    eps_: float | None
    mean_: Tensor | None
    factor_: Tensor | None
    centroids_: Tensor | None
    projection_: Tensor | None
    standardization_: Standardization | None
    skipped_: list[tuple[str, str]]

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        *,
        layers: Sequence[int] | None = None,
        image_size: int | tuple[int, int] = 256,
        weights: str | Path | None = None,
        window: int = 3,
        score_window: int = 1,
        eps: float | str = "auto",
        nominal_set: str | None = "kcenter",
        n_centroids: float = 8192,
        fusion: str | None = None,
        fusion_weight: float = 0.4,
        factor_dtype: str = "float16",
        n_features: int | None = None,
        reduction: str = "pca",
        holdout: float = 0.1,
        seed: int = 0,
        device: str | torch.device = "cpu",
        backbone_dtype: str | None = None,
        compile: bool = False,  # noqa: A002
        batch_size: int = 8,
        progress: bool | None = None,
    ) -> None:
        dtypes = tuple(arguments.DTYPES)
        self.backbone = backbone
        self.layers = tuple(layers) if layers is not None else None
        self.image_size = arguments.height_width(image_size)
        self.weights = weights
        self.window = arguments.odd("window", window)
        self.score_window = arguments.odd("score_window", score_window)
        self.eps = arguments.eps(eps)
        self.nominal_set = arguments.choice("nominal_set", nominal_set, ("kcenter", "kmeans", None))
        self.n_centroids = n_centroids
        if fusion is None:
            fusion = "product" if nominal_set else "mahalanobis"
        self.fusion = arguments.choice("fusion", fusion, FUSIONS)
        self.fusion_weight = arguments.at_most("fusion_weight", fusion_weight, 1)
        self.factor_dtype = arguments.choice("factor_dtype", factor_dtype, dtypes)
        self.n_features = n_features
        self.reduction = arguments.choice("reduction", reduction, ("pca", "random"))
        self.holdout = arguments.at_most("holdout", holdout, 0.5)
        self.seed = seed
        self.device = devices.resolve(device)
        self.backbone_dtype = arguments.choice("backbone_dtype", backbone_dtype, (*dtypes, None))
        self.compile = compile
        self.batch_size = batch_size
        self.progress = progress
        self._backbones: dict[torch.dtype, Backbone] = {}
        self._graphs: tuple[object, Graphs] | None = None
        self._index: tuple[Tensor, Tensor] | None = None
        if uses_nominal_set(self.fusion) and nominal_set is None:
            raise ValueError(
                f"NPad: fusion={self.fusion!r} needs a nominal set; "
                "give nominal_set, or fusion='mahalanobis'"
            )
        if holdout == 0 and (
            (uses_gaussians(self.fusion) and eps == "auto") or self.fusion == "sum"
        ):
            raise ValueError(
                "NPad: eps='auto' and fusion='sum' need held-out images; "
                "use holdout > 0, or a number for eps and another fusion"
            )
        for name, value in (("n_features", n_features), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"NPad: {name} must be at least 1, got {value}")

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which records CUDA graphs of its own."""
        return vars(self) | {"_graphs": None}

    # ----------------------------------------------------------------------------------------------
    # Fit.

    def fit(self, source: Any, *, skip_bad: bool = False) -> NPad:
        """Fit on defect-free images.

        Parameters
        ----------
        source : folder, list of paths, (N, H, W, C) or (N, C, H, W) array or tensor, DataLoader, or
            any iterable of batches
        skip_bad : go on after a file that cannot be read and list it in ``skipped_``

        Returns
        -------
        self

        Raises
        ------
        ValueError : too few images, images that cannot be read (ImageError), an argument that does
            not fit the data.
        MemoryError : what is needed, what is free, and what lowers it. A batch that does not fit is
            halved first, once, with a warning.
        RuntimeError : the GPU has failed.
        """
        with devices.explained("NPad.fit", self.device, LESS_MEMORY):
            images = self._open(source, skip_bad)
            learned = fitting.fit(self, self._network(fitting=True), self._embed, images)
        found = {f"{name}_": value for name, value in vars(learned).items()}
        found["skipped_"] = list(dict.fromkeys(images.skipped))  # once, if two passes met it
        vars(self).update(found)  # in one step: until here the model is as it was
        return self

    # ----------------------------------------------------------------------------------------------
    # Predict.

    def predict(self, source: Any, *, skip_bad: bool = False) -> Prediction:
        """Score images; see ``fit`` for the sources and ``predict_batches`` for endless ones."""
        parts = list(self.predict_batches(source, skip_bad=skip_bad))
        return Prediction(
            np.concatenate([part.scores for part in parts] or [np.empty(0)]),
            [map_ for part in parts for map_ in part.maps],
            [path for part in parts for path in part.paths],
            [item for part in parts for item in part.skipped],
        )

    def predict_batches(self, source: Any, *, skip_bad: bool = False) -> Iterator[Prediction]:
        """Score images batch by batch, in memory that does not grow with their number.

        On a GPU the next batch is under way while one is fetched, unless the source is a stream of
        unknown length, whose every image is answered at once. May run in several threads.

        Raises
        ------
        ValueError : images that cannot be read (ImageError).
        MemoryError : as ``fit``.
        RuntimeError : the GPU has failed; or a score that is not finite, which would pass below any
            threshold: features larger than the backbone's precision holds.
        """
        self._check_fitted()
        images = self._open(source, skip_bad)
        run = Run(self._on_device(), self.device)
        depth = 2 if self.device.type == "cuda" and images.n_images is not None else 1
        told = 0
        with (
            closing(images.batches()) as batches,
            progress.task("predict", images.n_images, self.progress, "images") as advance,
            devices.explained("NPad.predict", self.device, LESS_MEMORY),
        ):
            for flight in started_ahead(batches, run.start, depth):
                scores, maps = flight.finish()
                skipped, told = images.skipped[told:], len(images.skipped)
                yield Prediction(scores, maps, flight.batch.names, skipped)
                advance(len(scores))
        if images.skipped[told:]:
            yield Prediction(np.empty(0), [], [], images.skipped[told:])

    @torch.no_grad()
    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score images that are on the device and of the model's size already; nothing waits.

        Parameters
        ----------
        images : (B, 3, H, W) float32 in [0, 1] on ``device``, (H, W) = ``image_size``

        Returns
        -------
        scores : (B,) float32
        maps : (B, H, W) float32, at the model's size; both on the device

        Raises
        ------
        TypeError : dtype.
        ValueError : shape or device.
        MemoryError, RuntimeError : as ``fit``.
        """
        self._check_fitted()
        if images.dtype != torch.float32:
            raise TypeError(f"NPad.score: images must be float32 in [0, 1], got {images.dtype}")
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"NPad.score: images must have shape (B, 3, H, W) = (B, 3, {self.image_size[0]}, "
                f"{self.image_size[1]}), got {tuple(images.shape)}"
            )
        if images.device != self.device:
            raise ValueError(
                f"NPad.score: images are on {images.device} but the model is on {self.device}; "
                "move one with .to(device)"
            )
        with devices.explained("NPad.score", self.device, LESS_MEMORY):
            scores, maps = devices.Halving(self._on_device(), "NPad.score")(images)
        return scores, maps

    def _on_device(self) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """From images to scores and maps; on a GPU as CUDA graphs, which are kept."""
        scorer = self._scorer()
        # The reference, where it runs on a GPU, waits for it, which no graph records.
        if self.device.type != "cuda" or not (_cuda.registered and cuda_graphs.SAFE):
            return scorer
        with _lock:
            if self._graphs is None or self._graphs[0] != scorer.key:
                self._graphs = scorer.key, Graphs(scorer)
            return self._graphs[1]

    def _scorer(self) -> Scorer:
        centroids = self.centroids_
        return Scorer(
            network=self._network(),
            projection=self.projection_,
            mean=self.mean_,
            factor=self.factor_,
            centroids=centroids,
            index=self._index_of(centroids) if centroids is not None else None,
            image_size=self.image_size,
            score_window=self.score_window,
            fusion=self.fusion,
            fusion_weight=self.fusion_weight,
            standardization=self.standardization_,
        )

    def to(self, device: str | torch.device) -> NPad:
        """Move the model to a torch device, or to a GPU if there is one ("auto"); returns the model.

        Raises
        ------
        ValueError : the device cannot be used.
        """
        self.device = devices.resolve(device)
        self._backbones = {}
        self._graphs = self._index = None
        for name in TENSORS:
            tensor = getattr(self, f"{name}_", None)
            if tensor is not None:
                setattr(self, f"{name}_", tensor.to(self.device))
        return self

    # ----------------------------------------------------------------------------------------------
    # Model files.

    def settings(self) -> dict[str, Any]:
        """Every argument, as JSON types."""
        return {
            "backbone": self.backbone,
            "layers": list(self.layers) if self.layers is not None else None,
            "image_size": list(self.image_size),
            "weights": str(self.weights) if self.weights is not None else None,
            "window": self.window,
            "score_window": self.score_window,
            "eps": self.eps,
            "nominal_set": self.nominal_set,
            "n_centroids": self.n_centroids,
            "fusion": self.fusion,
            "fusion_weight": self.fusion_weight,
            "factor_dtype": self.factor_dtype,
            "n_features": self.n_features,
            "reduction": self.reduction,
            "holdout": self.holdout,
            "seed": self.seed,
            "backbone_dtype": self.backbone_dtype,
            "compile": self.compile,
            "batch_size": self.batch_size,
        }

    def save(self, path: str | Path) -> None:
        """Write the fitted model: one safetensors file with a JSON header, whole or not at all.

        Raises
        ------
        ModelFileError : the file cannot be written; what was there before is whole.
        """
        self._check_fitted()
        network = self._network()
        header = {
            "npad_version": __version__,
            "settings": self.settings(),
            "backbone": {
                "name": network.name,
                "layers": list(network.layers),
                "weights_hash": network.weights_hash,
            },
            "channels": network.channels,
            "grid": list(self.grid_),
            "n_images": self.n_images_,
            "n_centroids": len(self.centroids_) if self.centroids_ is not None else None,
            "eps": self.eps_,
            "standardization": asdict(self.standardization_) if self.standardization_ else None,
        }
        tensors = {name: getattr(self, f"{name}_") for name in TENSORS}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        model_file.write_model(path, header, present, progress=self.progress)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        weights: str | Path | None = None,
        progress: bool | None = None,
    ) -> NPad:
        """Read a model that ``save`` wrote. No code from the file runs.

        Parameters
        ----------
        path : the model file
        device : torch device, or "auto": a GPU if there is one
        weights : where the backbone's weights are, if not where they were when the model was fitted
        progress : as for ``NPad``

        Raises
        ------
        ModelFileError : the file is damaged, of a newer format, or was fitted on another backbone.
        BackboneError : the backbone's weights cannot be had.
        ValueError : the device cannot be used.
        """
        device = devices.resolve(device)
        header, tensors = model_file.read_model(path, progress=progress)
        try:
            settings = header["settings"]
            if weights is not None:
                settings = settings | {"weights": str(weights)}
            model = cls(**settings, device=device, progress=progress)
            model.grid_ = arguments.height_width(tuple(header["grid"]))
            model.n_images_ = int(header["n_images"])
            model.eps_ = model._saved_eps(header["eps"])
            saved = header["standardization"]
            model.standardization_ = Standardization(**saved) if saved else None
            model.skipped_ = []
            expected = model._expected_tensors(int(header["channels"]), header["n_centroids"])
            backbone = header["backbone"]["name"], header["backbone"]["weights_hash"]
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            problem = (
                f"has a header that this npad cannot use ({reason}); fit and save the model again"
            )
            raise ModelFileError(path, problem) from error
        model_file.check_tensors(path, tensors, expected)
        network = model._network()
        if (network.name, network.weights_hash) != backbone:
            raise ModelFileError(
                path,
                f"was fitted on {backbone[0]} with weights {backbone[1][:12]}, but the weights given "
                f"are {network.name} {network.weights_hash[:12]}; give the same file with weights=",
            )
        if network.grid(model.image_size) != model.grid_:
            raise ModelFileError(
                path,
                f"has grid {model.grid_}, which its backbone does not make of images of "
                f"{model.image_size}; fit and save the model again",
            )
        for name in TENSORS:
            tensor = tensors.get(name)
            setattr(model, f"{name}_", tensor.to(device) if tensor is not None else None)
        return model

    def _saved_eps(self, value: object) -> float | None:
        if isinstance(value, (int, float)) and value >= 0:
            return float(value)
        if value is None and not uses_gaussians(self.fusion):
            return None
        raise ValueError(f"eps is {value!r}")

    def _expected_tensors(
        self, channels: int, n_centroids: int | None
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        positions = self.grid_[0] * self.grid_[1]
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.n_features is not None:
            expected["projection"] = torch.float32, (channels, self.n_features)
            channels = self.n_features
        if uses_gaussians(self.fusion):
            packed = ops.packed_size(channels)
            expected["mean"] = torch.float32, (positions, channels)
            expected["factor"] = arguments.DTYPES[self.factor_dtype], (positions, packed)
        if uses_nominal_set(self.fusion):
            expected["centroids"] = torch.float32, (int(n_centroids or 0), channels)
        return expected

    # ----------------------------------------------------------------------------------------------
    # Parts.

    def _open(self, source: Any, skip_bad: bool) -> ImageSource:
        return ImageSource(
            source,
            image_size=self.image_size,
            batch_size=self.batch_size,
            skip_bad=skip_bad,
            page_locked=self.device.type == "cuda",
        )

    def _network(self, *, fitting: bool = False) -> Backbone:
        """The backbone, in the precision of fitting or of scoring."""
        if self.backbone_dtype is not None:
            dtype = arguments.DTYPES[self.backbone_dtype]
        else:  # as measured: float16 costs nothing in scoring, but fitting chooses other centroids
            half = self.device.type == "cuda" and not fitting
            dtype = torch.float16 if half else torch.float32
        with _lock:
            if dtype not in self._backbones:
                self._backbones[dtype] = shared_backbone(
                    self.backbone, self.layers, self.weights, dtype, self.compile, self.device
                )
            return self._backbones[dtype]

    def _embed(self, images: Tensor, projection: Tensor | None = None) -> Tensor:
        """Embeddings to fit."""
        images = images.to(self.device, non_blocking=True)
        return embed(self._network(fitting=True), projection, images)

    def _index_of(self, centroids: Tensor) -> Tensor:
        """What speeds up the search among these centroids; kept until there are others."""
        if self._index is None or self._index[0] is not centroids:
            self._index = centroids, ops.centroid_index(centroids)
        return self._index[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the fitted model, without its backbone."""
        self._check_fitted()
        tensors = (getattr(self, f"{name}_") for name in TENSORS)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _check_fitted(self) -> None:
        if not hasattr(self, "n_images_"):
            raise RuntimeError("NPad: the model is not fitted; call fit or NPad.load first")
