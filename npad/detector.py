"""NPad: fit on defect-free images, score new ones."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npad import devices, model_file
from npad._version import __version__
from npad.checkpoint import Checkpoint
from npad.cross_calibration import CrossCalibration, check_folds
from npad.features.backbone import Backbone
from npad.features.tiling import tiling_of
from npad.fitting import Fit, fit_images, tell_of_borrowed
from npad.images import ImageSource
from npad.images.alignment import Aligner, load_opencv, tell_of_unaligned
from npad.images.depth import Range
from npad.images.roi import RegionsOfInterest
from npad.kept_statistics import (
    expected_in_file,
    in_file,
    of_model_file,
    required,
    tell_of_calibrations,
    tell_of_repeats,
    to_merge,
)
from npad.learned import MEANINGS, Learned, LearnedMember, Standardization
from npad.members import members_of
from npad.model_file import ModelFileError
from npad.networks import Networks, check_embeddings
from npad.nominal_methods import METHODS
from npad.nominal_scores import NominalScores
from npad.old_models import upgraded
from npad.ops import _cuda
from npad.plan import Plan, hollow_networks, planned, refuse
from npad.preparation import (
    check_features,
    embed_members,
    native,
    open_images,
    regions_to_fit,
    sized,
    tell_of_depth,
    tell_of_sizes,
    tell_of_tiles,
)
from npad.roi import blanked
from npad.scoring.cuda_graphs import Graphs
from npad.scoring.decisions import Decider, Groups, NotCalibratedError, Thresholds, decide_by
from npad.scoring.nominal import score_nominal
from npad.scoring.pipeline import (
    MapSize,
    Run,
    embedder,
    predictions,
    score_in_parts,
)
from npad.scoring.prediction import Prediction
from npad.scoring.scorer import Scorer, reduce
from npad.settings import ARGUMENTS, CHECKPOINT_EVERY, NATIVE, Settings, uses_nominal_set
from npad.strip_fit import fit_in_strips

__all__ = ["NPad", "Prediction"]

_lock = threading.Lock()  # of the graphs that models make at first use


class NPad:
    """N-pad anomaly detector.

    As in scikit-learn, arguments are stored as they are given and checked when they are used: by
    ``fit``, ``load`` and whatever scores.

    Parameters
    ----------
    {arguments}

    Attributes
    ----------
    settings_ : Settings, with which the model was fitted
    backbones_ : name, layers and weights_hash (SHA-256) of each backbone it was fitted on
    {learned}
    threshold_, map_threshold_ : of scores and of maps, once the model is calibrated
    skipped_ : (name, reason) of files skipped by ``fit(..., skip_bad=True)``
    unaligned_ : (name, reason) of images that a fit with ``align`` could not register to the template
        and fitted as they came

    Notes
    -----
    Jang, Hwang, Park, *N-Pad: Neighboring Pixel-Based Industrial Anomaly Detection*, CVPR Workshops
    2023. The same input, seed and thread count give bitwise equal models. Defaults: docs/method.md.
    """

    settings_: Settings
    backbones_: list[dict[str, Any]]
    n_images_: int
    members_: tuple[LearnedMember, ...]
    darkest_: float
    n_bits_: int | None
    fingerprints_: tuple[str, ...]
    n_template_: int | None
    template_: Tensor | None
    standardization_: dict[str, Standardization] | None
    calibration_: NominalScores | None
    roi_color_: tuple[float, float, float] | None
    roi_: Tensor | None
    skipped_: list[tuple[str, str]]
    unaligned_: list[tuple[str, str]]
    _networks: Networks
    _scoring: tuple[tuple[object, ...], Scorer] | None
    _graphs: tuple[Scorer, Graphs] | None
    _in_force: tuple[list[int], object, Settings] | None  # ids, whose they are, what they make
    _statistics: Fit | None

    def __init__(
        self,
        backbone: str | Sequence[str] = "wide_resnet50_2",
        *,
        layers: Sequence[int] | None = None,
        map_layers: Sequence[int] | None = None,
        gaussians: str = "per_layer",
        image_size: int | tuple[int, int] | str | None = None,
        tile: int | tuple[int, int] | None = None,
        overlap: int | None = None,
        roi: Any = None,
        rois: str | None = None,
        align: str | None = None,
        bit_depth: int | None = None,
        max_pixels: int = 178_956_970,
        weights: str | Path | Sequence[str | Path | None] | None = None,
        window: int | str = "auto",
        score_window: int = 1,
        eps: float | str = "auto",
        nominal_set: str | None = "kcenter",
        n_centroids: float = 8192,
        fusion: str | None = None,
        fusion_weight: float = 0.4,
        map_weight: float = 0.3,
        smoothing: float | None = None,
        factor_dtype: str = "int8",
        n_features: int | str | None = "auto",
        reduction: str = "pca",
        holdout: float = 0.1,
        false_alarm_rate: float = 0.01,
        confidence: float | None = None,
        calibration_folds: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        backbone_dtype: str | None = None,
        compile: bool = False,  # noqa: A002
        batch_size: int = 8,
        progress: bool | None = None,
    ) -> None:
        self.backbone = backbone
        self.layers = layers
        self.map_layers = map_layers
        self.gaussians = gaussians
        self.image_size = image_size
        self.tile = tile
        self.overlap = overlap
        self.roi = roi
        self.rois = rois
        self.align = align
        self.bit_depth = bit_depth
        self.max_pixels = max_pixels
        self.weights = weights
        self.window = window
        self.score_window = score_window
        self.eps = eps
        self.nominal_set = nominal_set
        self.n_centroids = n_centroids
        self.fusion = fusion
        self.fusion_weight = fusion_weight
        self.map_weight = map_weight
        self.smoothing = smoothing
        self.factor_dtype = factor_dtype
        self.n_features = n_features
        self.reduction = reduction
        self.holdout = holdout
        self.false_alarm_rate = false_alarm_rate
        self.confidence = confidence
        self.calibration_folds = calibration_folds
        self.seed = seed
        self.device = device
        self.backbone_dtype = backbone_dtype
        self.compile = compile
        self.batch_size = batch_size
        self.progress = progress
        self._forget()
        Settings(
            **self.get_params()
        )  # and again when it is used: an attribute may be set meanwhile

    # ----------------------------------------------------------------------------------------------
    # Arguments.

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """All arguments, as they were given; ``deep`` is scikit-learn's and changes nothing."""
        return {argument.name: getattr(self, argument.name) for argument in ARGUMENTS}

    def set_params(self, **params: Any) -> NPad:
        """Set arguments by name.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            No argument has this name.
        """
        for name, value in params.items():
            if name not in self.get_params():
                known = ", ".join(self.get_params())
                raise ValueError(f"NPad: there is no argument {name!r}; there are {known}")
            setattr(self, name, value)
        return self

    def settings(self) -> dict[str, Any]:
        """The arguments that a model file keeps, checked, as JSON types.

        All but ``device``, ``max_pixels`` and ``progress``, which belong to the machine and not to the
        model, and ``roi``, of which it keeps the mask. For a fitted model, the ones that it was fitted
        with, where a change has no effect before the next fit.

        Raises
        ------
        ValueError
            A value that an argument may not have.
        """
        return self._settings().to_json()

    def input_size(self, source: Any = None, *, skip_bad: bool = False) -> tuple[int, int]:
        """(height, width) to which images are resized: ``image_size``, else the backbone's own.

        Parameters
        ----------
        source, skip_bad : as for ``fit``: the size is that of a model that is fitted to these with the
            arguments as they are now. None: that of this model, which ``image_size="native"`` gives
            none before the fit

        Raises
        ------
        BackboneError
            The backbone, which is made for this, cannot be had.
        ValueError
            There is no image whose size could be taken.
        """
        settings = self._settings() if source is None else Settings(**self.get_params())
        settings = native(
            settings, source, "NPad.input_size", skip_bad=skip_bad, masks=settings.rois
        )
        if settings.image_size is None:
            device = devices.resolve(settings.device)
            settings = sized(settings, self._backbones(settings, device, fitting=True))
        return settings.size

    def _settings(self) -> Settings:
        """The arguments in force; made again when one of them is another object."""
        fitted = self.settings_ if self._is_fitted else None
        given = self.get_params()
        key = [*map(id, given.values()), id(fitted)]
        kept = self._in_force  # another thread may replace it at any time, as all that is kept
        if kept is None or kept[0] != key:
            now = Settings(**given)
            settings = now if fitted is None else fitted.changed_by(given)
            if not all(isinstance(value, Hashable) for value in given.values()):
                return settings  # a list may change and remain the same object
            kept = self._in_force = key, (given, fitted), settings
        return kept[2]

    @property
    def _is_fitted(self) -> bool:
        return "settings_" in vars(self)

    def _check_fitted(self) -> None:
        if not self._is_fitted:
            raise RuntimeError("NPad: the model is not fitted; call fit or NPad.load first")

    # ----------------------------------------------------------------------------------------------
    # Fit.

    def fit(
        self,
        source: Any,
        *,
        skip_bad: bool = False,
        rois: Sequence[Any] | None = None,
        statistics: bool = True,
        checkpoint: str | Path | None = None,
        every: int = CHECKPOINT_EVERY,
    ) -> NPad:
        """Fit on defect-free images.

        They are gone over once; several times where the Gaussians of large images (`tile`) fit into
        memory only a strip at a time, which needs images that can be read again, ``statistics=False``,
        no region of interest and no checkpoint.

        Parameters
        ----------
        source : folder, list of paths, (N, H, W, C) or (N, C, H, W) array or tensor, DataLoader, or
            any iterable of batches
        skip_bad : go on after a file that cannot be read and list it in ``skipped_``
        rois : the region of interest of each image, in place of the argument ``rois``: the path of a
            mask, an (H, W) array of bool or uint8, or None for the whole image
        statistics : keep what ``partial_fit``, ``merge`` and ``save(statistics=True)`` need, several
            times the bytes of the model; False lets go of it
        checkpoint : a file into which the fit is written on its way. If it is there, the fit goes on
            from it, to the same model, bit for bit with the same number of threads. It needs images in
            files, and stays: remove it once the model is saved
        every : images from one time that it is written to the next

        Returns
        -------
        self

        Raises
        ------
        ValueError
            An argument that may not be, or does not fit the data; too few images; images that cannot
            be read (ImageError); a checkpoint that cannot be written, is damaged, or is that of another
            fit (ModelFileError).
        ImportError
            The method of the nominal set, or ``align``, needs a package that is not installed.
        MemoryError
            What `plan` says is not free, before an image is decoded: what is needed, what is free, and
            which arguments fit. Or memory runs short later: a batch that does not fit is halved first,
            once, with a warning.
        RuntimeError
            The GPU has failed.

        Warns
        -----
        UserWarning
            Most images use the lower of 16 bits only, and neither they nor ``bit_depth`` say so; every
            pixel of an image is equal; positions of a grid have too few images for their own window;
            images could not be registered to the template; with ``image_size="native"`` images of
            another size than the first; most of the time goes into what tiles share.
        """
        settings = Settings(**self.get_params())
        of_images, asked = settings.image_size == NATIVE, settings.tile
        masks = settings.rois if rois is None else None
        settings = native(settings, source, "NPad.fit", skip_bad=skip_bad, masks=masks)
        file = None if checkpoint is None else Checkpoint(checkpoint, every)
        device = devices.resolve(settings.device)
        if uses_nominal_set(settings.fusion):
            METHODS[str(settings.nominal_set)].load()  # a missing package is told before a download
        if settings.align is not None:
            load_opencv(settings.align)
        with devices.explained("NPad.fit", device), devices.plain(device):
            networks = self._networks.of(settings, device, fitting=True, kept=False)
            settings = sized(settings, networks)
            tiling = tiling_of(networks, settings)
            if tiling.is_whole:
                for network in networks:
                    network.grid(tiling.extent, before=settings.size)  # told before the work
            check_features(settings, networks)
            members = members_of(settings, networks)
            regions = regions_to_fit(settings, members, networks, tiling, rois)
            images = open_images(source, settings, device, skip_bad, regions=regions)
            # A stream may end at any image: what its first ones need is what is certain.
            plan = planned(
                settings,
                networks,
                device,
                n_images=images.n_images or settings.batch_size,
                source_size=images.size_of_first(),
                statistics=statistics,
                held=sum(network.nbytes for network in networks),
                strips=images.random_access and file is None and regions is None,
            )
            refuse(plan)
            tell_of_tiles(tiling, asked, settings)  # before the work that it is about
            where = () if regions is None else (regions.roi, regions.extent)
            fit, start, write = Fit(settings, members, *where), 0, None
            if file is not None:
                fit, start = file.begin(fit, images, [network.identity for network in networks])
                write = file.write
            embed_of = partial(embed_members, networks, tiling, device)
            embed = embed_of(members)
            if plan.n_strips > 1:
                fit_in_strips(fit, embed_of, images, tiling, plan.n_strips)
                learned = fit.finalize(last=True)
            elif settings.calibration_folds is None:
                fit_images(fit, embed, images, start, write)
                learned = fit.finalize(last=not statistics)
            else:
                check_folds(settings, images, file)
                with CrossCalibration(fit, networks) as folds:
                    fit_images(fit, embed, images, also=folds.update)
                    learned = fit.finalize(last=not statistics)
                    learned = replace(learned, calibration=folds.finish(learned))
        tell_of_borrowed(learned, "NPad.fit")
        if of_images:
            tell_of_sizes("NPad.fit", images, learned.n_images)
        tell_of_depth(images, settings)
        self._adopt(settings, learned, networks, fit if statistics else None)
        self.skipped_ = list(dict.fromkeys(images.skipped))  # once, if two passes met it
        self.unaligned_ = list(dict.fromkeys(images.unaligned))
        tell_of_unaligned("NPad.fit", "fitted", self.unaligned_, learned.n_images)
        return self

    def partial_fit(
        self, source: Any, *, skip_bad: bool = False, rois: Sequence[Any] | None = None
    ) -> NPad:
        """Fit on more defect-free images: those before are neither forgotten nor read again.

        The Gaussians are those of one fit of all images, bit for bit where these came in the same order
        and batches, and so are ``eps`` and ``window``. The nominal set is composed: chosen from its
        centroids so far and those of the new images; no embedding is farther from it than the
        ``radius`` of its member. A number of ``n_features`` keeps the axes of the first images, and a
        region of interest the colour outside.

        Parameters
        ----------
        source, skip_bad : as for ``fit``
        rois : as for ``predict``

        Returns
        -------
        self : a model that is not fitted yet is, as by ``fit``; a calibration is dropped

        Raises
        ------
        ValueError
            As for ``fit``; the model has no statistics. The model is then what it was.
        MemoryError
            As for ``fit``; the statistics, which are copied, do not fit twice.
        RuntimeError
            As for ``fit``.

        Warns
        -----
        UserWarning
            As for ``fit``; an image had been fitted before; the model was calibrated.
        """
        if not self._is_fitted:
            return self.fit(source, skip_bad=skip_bad, rois=rois)
        before = required(self._statistics, "NPad.partial_fit")
        settings = self._settings()
        if settings.align is not None:
            load_opencv(settings.align)
        device = devices.resolve(settings.device)
        with devices.explained("NPad.partial_fit", device), devices.plain(device):
            networks = self._backbones(settings, device, fitting=True)
            regions = self._rois_of(settings, device, rois)
            images = open_images(source, settings, device, skip_bad, regions=regions)
            fit = before.copied(device, progress=settings.progress)
            tiling = tiling_of(networks, settings)
            members = [one.member for one in fit.members]
            fit_images(fit, embed_members(networks, tiling, device, members), images)
            learned = fit.finalize()
        n_new = learned.n_images - before.n_images
        if self.image_size == NATIVE:
            tell_of_sizes("NPad.partial_fit", images, n_new)
        tell_of_depth(images, settings)
        tell_of_borrowed(learned, "NPad.partial_fit")
        tell_of_repeats(fit, before.n_images, "NPad.partial_fit")
        tell_of_calibrations("NPad.partial_fit", [self.calibration_])
        self._adopt(self.settings_, learned, networks, fit)
        self.skipped_ = list(dict.fromkeys([*self.skipped_, *images.skipped]))
        unaligned = list(dict.fromkeys(images.unaligned))
        self.unaligned_ = [*self.unaligned_, *unaligned]
        tell_of_unaligned("NPad.partial_fit", "fitted", unaligned, n_new)
        return self

    def merge(self, other: NPad | Iterable[NPad]) -> NPad:
        """Add the images of other models, as if they had been fitted here.

        The Gaussians are those of one fit of all images up to the rounding of float32, whatever the
        order; with ``eps="auto"`` and ``window="auto"`` both are chosen anew, on images held out of all
        models. The nominal sets are composed: the centroids are chosen from those of all models; no
        embedding is farther from them than the ``radius`` of their member.

        Parameters
        ----------
        other : a model, which stays what it is, or several, of which one after the other is taken, so
            that what loads them as they are asked for has one in memory at a time

        Returns
        -------
        self, whose calibration is dropped

        Raises
        ------
        TypeError
            Something else than models.
        ValueError
            A model has no statistics, or is this one; its backbone, image size or another setting of a
            fit differs, and is named; another region of interest, or another colour outside it. The
            model is then what it was.
        RuntimeError
            A model is not fitted.
        MemoryError
            The statistics, which are copied, do not fit twice.

        Warns
        -----
        UserWarning
            An image was fitted by several of the models; one of them was calibrated; positions as for
            ``fit``.
        """
        self._check_fitted()
        own = required(self._statistics, "NPad.merge")
        settings = self._settings()
        device = devices.resolve(settings.device)
        fit, skipped, unaligned = None, self.skipped_, self.unaligned_
        calibrations = [self.calibration_]
        with devices.explained("NPad.merge", device), devices.plain(device):
            networks = self._backbones(settings, device)
            several = isinstance(other, Iterable) and not isinstance(other, NPad)
            models: Any = other if several else [other]
            for model in models:
                if not isinstance(model, NPad):
                    raise TypeError(
                        f"NPad.merge: other must be an NPad or several, got {type(model).__name__}"
                    )
                model._check_fitted()
                theirs = to_merge(own, self.backbones_, model._statistics, model.backbones_)
                if fit is None:
                    fit = own.copied(device, progress=settings.progress)
                n_before = fit.n_images
                fit.merge(theirs.to(device))
                tell_of_repeats(fit, n_before, "NPad.merge")
                skipped = list(dict.fromkeys([*skipped, *model.skipped_]))
                unaligned = list(dict.fromkeys([*unaligned, *model.unaligned_]))
                calibrations.append(model.calibration_)
                del model, theirs  # before the next is made
            if fit is None:
                raise ValueError("NPad.merge: other holds no model; give one or more")
            learned = fit.finalize()
        tell_of_borrowed(learned, "NPad.merge")
        tell_of_calibrations("NPad.merge", calibrations)
        self._adopt(self.settings_, learned, networks, fit)
        self.skipped_, self.unaligned_ = skipped, unaligned
        return self

    def shrink(self, factor_dtype: str | None = None) -> NPad:
        """Let go of the statistics, and store the factors of the Gaussians in fewer bytes.

        Parameters
        ----------
        factor_dtype : as for ``NPad``; None leaves it. Where there are statistics, the factors are made
            of them, as by a fit with this dtype; else they are rounded, which is refused if it does not
            make them smaller. Another dtype drops a calibration

        Returns
        -------
        self, which can no longer be merged or fitted further

        Raises
        ------
        ValueError
            A dtype that is none of these, does not hold the factors, or would not make them smaller.
            The model is then what it was.
        RuntimeError
            The model is not fitted.
        """
        self._check_fitted()
        if factor_dtype is None or factor_dtype == self.settings_.factor_dtype:
            self._statistics = None
            return self
        settings = replace(self.settings_, factor_dtype=factor_dtype)
        device = devices.resolve(self.device)
        with devices.explained("NPad.shrink", device), devices.plain(device):
            networks = self._backbones(self._settings(), device)
            if self._statistics is not None:
                now = replace(self._statistics.settings, factor_dtype=factor_dtype)
                learned = Fit.from_state(*self._statistics.state(), **vars(now)).finalize()
            else:
                learned = self._learned(device).stored_as(getattr(torch, settings.factor_dtype))
        self._adopt(settings, learned, networks, None)
        self.factor_dtype = factor_dtype
        return self

    def _adopt(
        self,
        settings: Settings,
        learned: Learned,
        networks: Sequence[Backbone],
        statistics: Fit | None,
    ) -> None:
        """Become the model of these; until here it is what it was.

        Statistics are never changed once they are here: whoever goes on from them copies them first.
        """
        self._statistics = statistics
        found = {f"{name}_": value for name, value in vars(learned).items()}
        identities = [network.identity for network in networks]
        vars(self).update(found, settings_=settings, backbones_=identities)
        self._networks.keep(networks)
        self._scoring = self._graphs = None

    def plan(
        self,
        n_images: int | None = None,
        *,
        source_size: tuple[int, int] | None = None,
        statistics: bool = True,
    ) -> Plan:
        """Count what a fit with these arguments, and its model, take of the device's memory.

        Needs neither images nor weights. What is counted, and how near it comes: docs/memory.md.

        Parameters
        ----------
        n_images : images to fit; None: as many as fill all that is bounded, so that more take no more
        source_size : (height, width) of the images in their files; None: that to which they are resized
        statistics : as for ``fit``

        Returns
        -------
        Plan : bytes by what they are, ``fit_peak``, ``predict_peak``, ``model``; a table by ``str()``

        Raises
        ------
        BackboneError
            An unknown backbone.
        ValueError
            An argument that may not be.
        """
        settings = Settings(**self.get_params())
        if settings.image_size == NATIVE:
            if source_size is None:
                raise ValueError(
                    "NPad.plan: image_size='native' is the size of the images: give source_size, or a "
                    "number"
                )
            settings = replace(settings, image_size=source_size)
        device = devices.resolve(settings.device)
        networks = hollow_networks(settings)
        settings = sized(settings, networks)
        check_features(settings, networks)
        return planned(
            settings,
            networks,
            device,
            n_images=n_images,
            source_size=source_size,
            statistics=statistics,
        )

    def embed(self, source: Any, *, skip_bad: bool = False) -> Tensor:
        """Embeddings of images, as the nominal set knows them.

        Parameters
        ----------
        source, skip_bad : as for ``fit``

        Returns
        -------
        (N, h, w, C) float32, on the device: ``layers`` of each backbone, one after another on the
        grid of the first. A fitted model fills what is outside its region of interest, as it does to
        score, and reduces them to the axes of its nominal sets, where these have axes; otherwise all
        channels are kept, whatever ``n_features``.

        Raises
        ------
        ValueError
            As for ``fit``.
        MemoryError
            As for ``fit``.
        RuntimeError
            The GPU has failed.
        """
        parts = list(self.embed_batches(source, skip_bad=skip_bad))
        if not parts:
            raise ValueError("NPad.embed: none of the images could be read; look at the files")
        return torch.cat(parts)

    def embed_batches(self, source: Any, *, skip_bad: bool = False) -> Iterator[Tensor]:
        """Embeddings batch by batch, in memory that does not grow with the number of images.

        Takes, yields and raises what ``embed`` does; a source of bad images alone yields nothing.
        """
        settings = native(self._settings(), source, "NPad.embed", skip_bad=skip_bad)
        device = devices.resolve(settings.device)
        learned = self._learned(device) if self._is_fitted else None
        members = learned.members if learned else ()
        axes = {m.member.network: m.projection for m in members if m.centroids is not None}
        networks = self._backbones(settings, device, fitting=True)
        settings = sized(settings, networks)
        tiling = tiling_of(networks, settings, learned)
        grid = networks[0].grid(tiling.tile)

        def combine(levels: list[list[Tensor]]) -> tuple[Tensor]:
            parts = [
                reduce(network.combined(features, network.layers, grid=grid), axes.get(i))
                for i, (network, features) in enumerate(zip(networks, levels, strict=True))
            ]
            return (torch.cat(parts, dim=3) if len(parts) > 1 else parts[0],)

        embed = embedder(networks, tiling, combine, device, "NPad.embed")
        regions = self._rois_of(settings, device, None) if self._is_fitted else None
        aligner = self._aligner(settings)
        images = open_images(
            source, settings, device, skip_bad, fitted=Range(), regions=regions, aligner=aligner
        )

        def batches() -> Iterator[Tensor]:
            n_images = 0
            with closing(images.batches()) as opened:
                for batch in opened:
                    with devices.explained("NPad.embed", device):
                        (x,) = embed(self._looked_at(batch.images))
                    n_images += len(x)
                    yield x
            tell_of_unaligned("NPad.embed", "embedded", images.unaligned, n_images)

        return batches()

    # ----------------------------------------------------------------------------------------------
    # Predict.

    def predict(
        self,
        source: Any,
        *,
        skip_bad: bool = False,
        map_size: MapSize = "image",
        keep_images: bool = False,
        groups: Groups | None = None,
        rois: Sequence[Any] | None = None,
    ) -> Prediction:
        """Score images; see ``fit`` for the sources and ``predict_batches`` for endless ones.

        Parameters
        ----------
        source, skip_bad : as for ``fit``
        map_size : "image" gives each map at its image's own size, "model" as it is at ``image_size``,
            (height, width) at that size
        keep_images : also return the images as they were decoded
        groups : of a model that was calibrated in groups, that of the images: one of all of them, or a
            list of one for each
        rois : as for ``fit``; the model must have been fitted with a region of interest

        Raises
        ------
        ValueError
            As for ``predict_batches``.
        MemoryError
            As for ``fit``.
        RuntimeError
            As for ``predict_batches``.
        """
        parts = self.predict_batches(
            source,
            skip_bad=skip_bad,
            map_size=map_size,
            keep_images=keep_images,
            groups=groups,
            rois=rois,
        )
        return Prediction.joined(list(parts))

    def predict_batches(
        self,
        source: Any,
        *,
        skip_bad: bool = False,
        map_size: MapSize = "image",
        keep_images: bool = False,
        groups: Groups | None = None,
        rois: Sequence[Any] | None = None,
    ) -> Iterator[Prediction]:
        """Score images batch by batch, in memory that does not grow with their number.

        On a GPU the next batch is under way while one is fetched, unless the source is a stream of
        unknown length, whose every image is answered at once. May run in several threads.

        Parameters
        ----------
        source, skip_bad, map_size, keep_images, groups, rois : as for ``predict``

        Raises
        ------
        RuntimeError
            The model is not fitted; the GPU has failed; a score is not finite, which would pass below
            any threshold: features larger than the backbone's precision holds. The model was
            calibrated with other settings, of which scores depend (NotCalibratedError).
        ValueError
            An argument that may not be; images that cannot be read (ImageError); too few images in the
            calibration for ``false_alarm_rate``; a group that was not calibrated.
        MemoryError
            As for ``fit``.
        """
        self._check_fitted()
        settings = self._settings()
        device = devices.resolve(settings.device)
        images = self._to_score(source, settings, device, skip_bad, keep_images, rois)
        decide = decide_by(self.calibration_, settings, groups, images.n_images)
        run = self._run(settings, device, map_size)
        return predictions(run, images, settings.progress, decide)

    def _run(self, settings: Settings, device: torch.device, map_size: MapSize) -> Run:
        in_part = self.roi_ is not None
        return Run(self._on_device(settings, device), device, map_size, in_part=in_part)

    def _to_score(
        self,
        source: Any,
        settings: Settings,
        device: torch.device,
        skip_bad: bool,
        keep_images: bool = False,
        rois: Sequence[Any] | None = None,
    ) -> ImageSource:
        return open_images(
            source,
            settings,
            device,
            skip_bad,
            fitted=Range(self.darkest_, self.n_bits_),
            keep_pixels=keep_images,
            regions=self._rois_of(settings, device, rois),
            aligner=self._aligner(settings),
        )

    def _rois_of(
        self, settings: Settings, device: torch.device, rois: Sequence[Any] | None
    ) -> RegionsOfInterest | None:
        """Those of the images to be scored, where they have such."""
        own = settings.rois if rois is None else rois
        if own is None:
            return None
        if self.roi_ is None:
            raise ValueError(
                "NPad: rois must be left out of a model that was fitted without a region of interest; "
                "fit with roi or rois, with roi=(0, 0, 1, 1) where all of it matters"
            )
        networks = self._backbones(settings, device)
        extent = tiling_of(networks, settings, self._learned()).extent
        grids = [member.grid for member in self.members_]
        return RegionsOfInterest(
            self.roi_.cpu(), own, grids=grids, extent=extent, max_pixels=settings.max_pixels
        )

    def _looked_at(self, images: Tensor) -> Tensor:
        """Images on the CPU as the backbone of this model sees them."""
        if not self._is_fitted or self.roi_ is None or self.roi_color_ is None:
            return images
        images, _ = blanked(images, self.roi_.cpu(), torch.tensor(self.roi_color_, device="cpu"))
        return images

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score images that are on the device and of the model's size already; nothing waits.

        Nor are they registered, in a model with ``align``: give them as `npad.images.alignment.Aligner`
        makes them.

        Parameters
        ----------
        images : (B, 3, H, W) float32 in [0, 1] on ``device``, (H, W) = ``image_size``; for a model with
            a region of interest also (B, 4, H, W), the fourth channel 1 inside the image's own region
            and 0 outside

        Returns
        -------
        scores : (B,) float32
        maps : (B, H, W) float32, at the model's size, NaN outside; both on the device

        Raises
        ------
        TypeError
            The dtype of the images.
        ValueError
            Their shape or device.
        MemoryError
            As for ``fit``.
        RuntimeError
            The model is not fitted, or the GPU has failed.
        """
        self._check_fitted()
        settings = self._settings()
        device = devices.resolve(settings.device)
        height, width = settings.size
        if images.dtype != torch.float32:
            raise TypeError(f"NPad.score: images must be float32 in [0, 1], got {images.dtype}")
        channels = (3,) if self.roi_ is None else (3, 4)
        if images.ndim != 4 or tuple(images.shape[1:]) not in [
            (c, height, width) for c in channels
        ]:
            raise ValueError(
                f"NPad.score: images must have shape (B, 3, H, W) = (B, 3, {height}, {width}), "
                f"got {tuple(images.shape)}"
            )
        if images.device != device:
            raise ValueError(
                f"NPad.score: images are on {images.device} but the model is on {device}; "
                "move one with .to(device)"
            )
        with devices.explained("NPad.score", device):
            run = devices.Halving(self._on_device(settings, device), "NPad.score")
            scores, maps = run(images)
        return scores, maps

    # ----------------------------------------------------------------------------------------------
    # Calibrate.

    def calibrate(
        self,
        source: Any,
        *,
        groups: Groups | None = None,
        skip_bad: bool = False,
        rois: Sequence[Any] | None = None,
    ) -> NPad:
        """Choose thresholds by nominal images that the model was not fitted on.

        From then on predictions have p-values, labels, masks and regions: of nominal images to come, at
        most ``false_alarm_rate`` are labelled anomalous, whatever the backbone, if they are like these.
        What is kept are the scores, so that ``false_alarm_rate`` and ``confidence`` can change later.
        Calibrating again replaces them, and another fit drops them.

        Parameters
        ----------
        source, skip_bad, rois : as for ``fit``
        groups : lots, cameras or shifts, each with thresholds of its own: a text or int for all of the
            images, or a list of one for each; predictions are then told the group, too

        Returns
        -------
        self

        Raises
        ------
        ValueError
            Too few images, of all or of a group, for ``false_alarm_rate``, with the number that it
            takes; as for ``predict_batches``.
        MemoryError
            As for ``fit``.
        RuntimeError
            As for ``predict_batches``.

        Warns
        -----
        UserWarning
            Images that were fitted: they score lower than others, and so would be the thresholds.
            Images that could not be registered to the template.

        Notes
        -----
        Split conformal prediction, in groups Mondrian; see `npad.calibration`.
        """
        self._check_fitted()
        settings = self._settings()
        device = devices.resolve(settings.device)
        images = self._to_score(source, settings, device, skip_bad, rois=rois)
        run = self._run(settings, device, "model")
        fitted = frozenset(self.fingerprints_)
        self.calibration_ = score_nominal(run, images, settings, groups, fitted)
        n_images = len(self.calibration_.scores)
        tell_of_unaligned("NPad.calibrate", "scored", images.unaligned, n_images)
        return self

    @property
    def threshold_(self) -> Thresholds:
        """Above it a score is an alarm; of each group, a dict, where groups were calibrated.

        Raises
        ------
        NotCalibratedError
            The model is not calibrated, or was with other settings.
        ValueError
            Too few images in the calibration for ``false_alarm_rate``.
        """
        return self._decider().threshold

    @property
    def map_threshold_(self) -> Thresholds:
        """Above it a pixel of a map is marked; as ``threshold_``, and raises what that does."""
        return self._decider().map_threshold

    def _decider(self) -> Decider:
        calibration = vars(self).get("calibration_")
        if calibration is None:
            raise NotCalibratedError(
                "NPad: the model is not calibrated; once it is fitted, call calibrate with nominal "
                "images that were not"
            )
        return Decider(calibration, self._settings())

    def scorer(self) -> Scorer:
        """The model as a module of PyTorch, from images to scores and maps.

        Returns
        -------
        Scorer, for ``torch.export``, ``state_dict`` and the like: a new one, which shares the model's
        tensors until it is moved or loads others.

        Raises
        ------
        RuntimeError
            The model is not fitted.
        """
        self._check_fitted()
        settings = self._settings()
        device = devices.resolve(settings.device)
        networks = self._backbones(settings, device)
        return Scorer(networks, self._learned_for(settings, device), settings)

    def to(self, device: str | torch.device) -> NPad:
        """Move the model to a torch device, or to a GPU if there is one ("auto").

        Returns
        -------
        self

        Raises
        ------
        ValueError
            The device cannot be used.
        """
        found = devices.resolve(device)
        if self._is_fitted:
            self._learned(found)
        self.device = found
        return self

    # ----------------------------------------------------------------------------------------------
    # Model files.

    def save(self, path: str | Path, *, statistics: bool = False) -> None:
        """Write the fitted model: one safetensors file with a JSON header, whole or not at all.

        Parameters
        ----------
        path : of the file
        statistics : with what ``partial_fit`` and ``merge`` need, several times the bytes of the model

        Raises
        ------
        ModelFileError
            The file cannot be written; what was there before is whole.
        ValueError
            A fusion that was set after the fit needs what the fit did not find; the model has no
            statistics.
        """
        self._check_fitted()
        settings = self._settings()
        learned = self._learned_for(settings).used_by(settings)
        header = {
            "npad_version": __version__,
            "settings": settings.to_json(),
            "backbones": self.backbones_,
            **learned.to_json(),
        }
        tensors, version = learned.tensors(), model_file.FORMAT_VERSION
        if statistics:
            values, more = in_file(required(self._statistics, "NPad.save"))
            header, tensors = header | values, tensors | more
            version = model_file.STATISTICS_VERSION
        model_file.write_model(path, header, tensors, version=version, progress=settings.progress)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        weights: str | Path | Sequence[str | Path | None] | None = None,
        progress: bool | None = None,
    ) -> NPad:
        """Read a model that ``save`` wrote. No code from the file runs.

        Parameters
        ----------
        path : the model file
        device : torch device, or "auto": a GPU if there is one
        weights : where the backbone's weights are, if neither where they were when the model was
            fitted nor beside the model file; as for ``NPad``
        progress : as for ``NPad``

        Raises
        ------
        ModelFileError
            The file is damaged, of a newer format, or was fitted on another backbone.
        BackboneError
            The backbone's weights cannot be had.
        ValueError
            The device cannot be used; weights that are not one file for each backbone.
        """
        found = devices.resolve(device)
        header, tensors = model_file.read_model(path, progress=progress)
        if "checkpoint" in header:
            problem = "is the checkpoint of a fit that has not ended; fit with checkpoint= to go on"
            raise ModelFileError(path, problem)
        try:
            header, tensors = upgraded(header, tensors)
            given = header["settings"] | {"device": device, "progress": progress}
            settings = Settings(**given)
            learned = Learned.of(header)
            fitted = [
                {key: str(one[key]) for key in ("name", "weights_hash")}
                for one in header["backbones"]
            ]
            expected = learned.expected(settings, header["members"])
            expected |= expected_in_file(header)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            problem = (
                f"has a header that this npad cannot use ({reason}); fit and save the model again"
            )
            raise ModelFileError(path, problem) from error
        model_file.check_tensors(path, tensors, expected)
        statistics = of_model_file(path, header, tensors, progress=progress)
        if weights is not None:
            given["weights"] = weights
        if "roi" in tensors:
            given["roi"] = tensors["roi"].numpy().copy()  # for another fit
        model, settings = cls(**given), Settings(**given)
        networks, settings = model._networks.of_file(
            path, settings, found, fitted, searched=weights is None
        )
        if settings.weights != Settings(**given).weights:
            model.weights = settings.weights  # where they were found
        check_embeddings(path, networks, learned.members, tiling_of(networks, settings, learned))
        model._adopt(settings, learned.having(tensors).to(found), networks, statistics)
        model.skipped_, model.unaligned_ = [], []
        return model

    # ----------------------------------------------------------------------------------------------
    # Copies. What can be made again is not copied: a pickle finds its backbone as ``load`` does, and
    # copies in one process share it.

    def __getstate__(self) -> dict[str, Any]:
        """All but the backbones, the scorer and its CUDA graphs, and the statistics, as ``save``."""
        return {name: value for name, value in vars(self).items() if name not in _CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __copy__(self) -> NPad:
        return self._twin(self.__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> NPad:
        return self._twin(copy.deepcopy(self.__getstate__(), memo))

    def _twin(self, state: dict[str, Any]) -> NPad:
        twin = type(self).__new__(type(self))
        twin.__setstate__(state)
        twin._networks = self._networks.copy()
        twin._statistics = self._statistics
        return twin

    def _forget(self) -> None:
        """Start without what is made at first use, and without statistics."""
        self._networks = Networks()
        self._statistics = None
        self._scoring = self._graphs = self._in_force = None

    # ----------------------------------------------------------------------------------------------
    # Parts.

    def _backbones(
        self, settings: Settings, device: torch.device, *, fitting: bool = False
    ) -> list[Backbone]:
        """The backbones; of a fitted model, only those that it was fitted on will do."""
        fitted = self.backbones_ if self._is_fitted else None
        return self._networks.of(settings, device, fitting=fitting, fitted=fitted)

    def _learned(self, device: torch.device | None = None) -> Learned:
        """What the fit left, moved to the device first if it is elsewhere."""
        learned = Learned(**{f.name: getattr(self, f"{f.name}_") for f in fields(Learned)})
        tensors = learned.tensors().values()
        if device is not None and any(tensor.device != device for tensor in tensors):
            learned = learned.to(device)
            vars(self).update({f"{name}_": value for name, value in vars(learned).items()})
            self._scoring = self._graphs = None
        return learned

    def _learned_for(self, settings: Settings, device: torch.device | None = None) -> Learned:
        """As `_learned`, with all that the settings need: the fusion may be another since the fit."""
        learned = self._learned(device)
        lacks = learned.lacks(settings)
        if lacks:
            raise ValueError(
                f"NPad: fusion={settings.fusion!r} needs {' and '.join(lacks)}, which a fit with "
                f"fusion={self.settings_.fusion!r} does not find; fit again, or set that fusion"
            )
        return learned

    def _scorer(self, settings: Settings, device: torch.device) -> Scorer:
        """Made when it is first used, and again when something that it depends on is another."""
        learned = self._learned_for(settings, device)
        networks = self._backbones(settings, device)
        parts = [*networks, *learned.tensors().values()]  # kept: no others get their ids
        key = *map(id, parts), settings.size, settings.batch_size, *settings.scoring.values()
        kept = self._scoring
        if kept is None or kept[0] != key:
            kept = self._scoring = key, Scorer(networks, learned, settings)
        return kept[1]

    def _on_device(
        self, settings: Settings, device: torch.device
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """From images to scores and maps; on a GPU as CUDA graphs, which are kept."""
        scorer = self._scorer(settings, device)
        run = partial(score_in_parts, scorer)
        # The reference, where it runs on a GPU, waits for it, which no graph records.
        if device.type != "cuda" or not _cuda.run_on(device):
            return run
        with _lock:
            kept = self._graphs
            if kept is None or kept[0] is not scorer:
                kept = self._graphs = scorer, Graphs(run)
            return kept[1]

    def _aligner(self, settings: Settings) -> Aligner | None:
        """What registers images to the template, if the model has one."""
        if settings.align is None or not self._is_fitted:
            return None
        assert self.template_ is not None
        return Aligner(self.template_, settings.align, self.n_template_ or 1)

    @property
    def has_statistics(self) -> bool:
        """Whether the model can be merged and fitted further."""
        return self._statistics is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the fitted model, without its backbone."""
        self._check_fitted()
        return self._learned().nbytes


_CACHES = ("_networks", "_scoring", "_graphs", "_in_force", "_statistics")


def _list(rows: Iterable[tuple[str, str]]) -> str:
    """Entries of a docstring's section."""
    return "\n    ".join(f"{name} : {meaning}" for name, meaning in rows)


if NPad.__doc__:  # not where Python runs without docstrings
    NPad.__doc__ = NPad.__doc__.format(
        arguments=_list(
            (a.name, a.help + (f" None: {a.unset}." if a.unset else "")) for a in ARGUMENTS
        ),
        learned=_list((f"{name}_", meaning) for name, meaning in MEANINGS.items()),
    )
