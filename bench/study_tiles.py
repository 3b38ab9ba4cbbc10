"""What tiles are worth: a small defect in a large image, and what an overlap that is too small costs.

    python bench/study_tiles.py DIR --backbone resnet18 --weights FILE --out DIR

DIR is an MVTec AD category, with masks or without. A large image is a mosaic of its real ones, 4x4 of
256 pixels or what --mosaic and --piece say; a defective one has exactly one defective piece, of those
whose masks mark least, but for specks, at a random place. Pieces lie at the same places in every
mosaic, so that a position means what it means within a piece, and which image is pasted where is drawn.
Mosaics are seen resized to --small x --small, or to as many pixels of their own shape, and tile by tile
as they are, with the same other settings, and with the default smoothing of the map and shares of it.
Pixels are measured at a half of the mosaic's size, where there are masks; "pointed at" is the share of
defective mosaics whose map is highest within the defective piece. Prints a table and writes all figures
to study_tiles_<name>_<mosaic>.json.

With --overlaps, each overlap is compared with mosaics that are seen whole instead, by how far maps and
scores lie apart, of maps over the largest value of all: where a model that was fitted on whole mosaics
scores tiles, and where one was fitted on tiles, too, which may have chosen other centroids. The time is
that of scoring. These figures go to study_tiles_<name>_<mosaic>_overlaps.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from markdown_table import markdown_table
from mosaics import Layout, Mosaics, drawn_mosaics
from numpy.typing import NDArray
from provenance import provenance
from study_jitter import numbers
from torch import Tensor

from npad import NPad, ops
from npad.evaluation.datasets import find_categories
from npad.evaluation.metrics import image_metrics, pixel_metrics
from npad.features.backbone import levels_in_parts
from npad.images import ImageSource
from npad.images.masks import resample_mask
from npad.scoring.scorer import Scorer

METRICS = ("auroc", "pixel_ap", "aupro", "pointed")
ERRORS = ("largest", "mean", "score")
STEP = 16  # pixels, of which the sides of resized mosaics are multiples

Figures = dict[str, Any]
Size = tuple[int, int]  # (height, width)


# --------------------------------------------------------------------------------- resized and tiled


def views(layout: Layout, small: int, tile: int) -> dict[str, dict[str, Any]]:
    """The ways to see a mosaic, with the arguments of each."""
    height, width = layout.size
    by = (height * width) ** 0.5 / small
    own_shape = tuple(max(1, round(side / by / STEP)) * STEP for side in layout.size)
    found: dict[str, dict[str, Any]] = {"resized": {"image_size": small}}
    if own_shape != (small, small):
        found["resized, own shape"] = {"image_size": own_shape}
    tiles = min(height, tile), min(width, tile)
    return found | {"tiles": {"image_size": layout.size, "tile": tiles}}


def figures(
    scorer: Scorer, mosaics: Mosaics, shares: Sequence[float]
) -> Iterable[tuple[float, Figures]]:
    """With each share of the default smoothing, its pixels and what is measured."""
    height, width = mosaics.layout.size
    size = height // 2, width // 2
    default = scorer.settings.sigma
    settings = [replace(scorer.settings, smoothing=share * default) for share in shares]
    scores: list[list[float]] = [[] for _ in settings]
    maps: list[list[NDArray[np.float32]]] = [[] for _ in settings]
    seconds = []
    source = ImageSource(
        [mosaic.path for mosaic in mosaics.test],
        image_size=scorer.settings.size,
        batch_size=1,
    )
    for batch in source.batches():
        start = time.perf_counter()
        found = scorer.distances(scorer.filled(batch.images), levels_in_parts)
        seconds.append(time.perf_counter() - start)
        for i, smoothed in enumerate(settings):
            scorer.settings = smoothed
            score, map_ = scorer.fused(found)
            scores[i].append(score.item())
            maps[i].append(ops.resize_maps(map_, [size]).view(size).numpy())
    for i, smoothed in enumerate(settings):
        measured = measure(mosaics, np.array(scores[i]), maps[i], size)
        yield smoothed.sigma, measured | {"milliseconds": 1e3 * median(seconds)}


def measure(
    mosaics: Mosaics, scores: NDArray[np.float64], maps: list[NDArray[np.float32]], size: Size
) -> Figures:
    """`METRICS`, as far as there are masks."""
    layout, test = mosaics.layout, mosaics.test
    found = image_metrics([mosaic.defective is not None for mosaic in test], scores)
    if mosaics.has_masks:
        found |= pixel_metrics([resample_mask(m.mask(layout), size) for m in test], maps)
    by = np.divide(layout.size, size)
    hits = []
    for mosaic, map_ in zip(test, maps, strict=True):
        if mosaic.defective is not None:
            at = by * np.unravel_index(int(map_.argmax()), size)
            place = layout.place(mosaic.defective)
            hits.append(all(s.start <= x < s.stop for s, x in zip(place, at, strict=True)))
    found["pointed"] = float(np.mean(hits))
    return {name: found[name] for name in METRICS if name in found}


def rows_of_views(mosaics: Mosaics, common: dict[str, Any], args: argparse.Namespace) -> Figures:
    """View by view, then smoothing by smoothing."""
    rows: Figures = {}
    for name, arguments in views(mosaics.layout, args.small, args.tile).items():
        model = NPad(**common | arguments).fit(mosaics.train, statistics=False)
        rows[name] = {
            "arguments": arguments,
            "model_bytes": model.nbytes,
            "smoothings": {
                f"{sigma:g}": found
                for sigma, found in figures(model.scorer(), mosaics, args.smoothings)
            },
        }
    return rows


def table_of_views(name: str, rows: Figures) -> str:
    lines = []
    for view, row in rows.items():
        for sigma, found in row["smoothings"].items():
            known = [f"{found[metric]:.3f}" if metric in found else "" for metric in METRICS]
            cells = [f"{row['model_bytes'] / 1e6:.1f}", f"{found['milliseconds']:.0f}"]
            lines.append([view, sigma, *known, *cells])
    heads = ["smoothing", "image AUROC", "pixel AP", "AUPRO", "pointed at", "model MB", "ms"]
    return markdown_table([name, *heads], lines)


# ------------------------------------------------------------------------------------------ overlaps


def rows_of_overlaps(mosaics: Mosaics, common: dict[str, Any], args: argparse.Namespace) -> Figures:
    """The mosaics whole, then with every overlap; scored in turn, mosaic by mosaic."""
    size = mosaics.layout.size
    tile = views(mosaics.layout, args.small, args.tile)["tiles"]["tile"]
    ways: dict[str, dict[str, Any]] = {"whole": {}}
    ways |= {str(overlap): {"tile": tile, "overlap": overlap} for overlap in args.overlaps}
    ways["default"] = {"tile": tile}
    models = {
        name: NPad(**common | arguments, image_size=size).fit(mosaics.train, statistics=False)
        for name, arguments in ways.items()
    }
    scorers = {name: model.scorer() for name, model in models.items()}
    of_whole = {name: models["whole"].scorer() for name in ways}
    for name, scorer in of_whole.items():
        scorer.tiling = scorers[name].tiling
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    apart: dict[str, dict[str, list[Tensor]]] = {
        name: {"scored": [], "fitted": []} for name in ways
    }
    highest = 0.0
    paths = [mosaic.path for mosaic in mosaics.test]
    for batch in ImageSource(paths, image_size=size, batch_size=1).batches():
        wanted = scored(scorers["whole"], batch.images)
        for name in ways:
            start = time.perf_counter()
            found = scored(of_whole[name], batch.images)
            seconds[name].append(time.perf_counter() - start)
            apart[name]["scored"].append(difference(found, wanted))
            apart[name]["fitted"].append(difference(scored(scorers[name], batch.images), wanted))
        highest = max(highest, wanted[1].max().item())
    rows: Figures = {}
    for name in ways:
        rows[name] = {
            "overlap": models[name].settings_.overlap,
            "cost": scorers[name].tiling.cost,
            "time": median(seconds[name]) / median(seconds["whole"]),
        }
        for what, errors in apart[name].items():
            largest, mean, of_score = torch.stack(errors).unbind(1)
            rows[name][what] = {
                "largest": largest.max().item() / highest,
                "mean": mean.mean().item() / highest,
                "score": of_score.max().item(),
            }
    return rows


def scored(scorer: Scorer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Score and map of an image, as `NPad.predict` has them."""
    return scorer.fused(scorer.distances(scorer.filled(images), levels_in_parts))


def difference(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Tensor:
    """(3,): of the maps the largest and the mean, of the scores as a share."""
    error = (found[1] - wanted[1]).abs()
    return torch.stack([error.max(), error.mean(), (found[0] / wanted[0] - 1).abs()[0]])


def table_of_overlaps(name: str, rows: Figures) -> str:
    lines = []
    for way, row in rows.items():
        title = f"{way}, {row['overlap']}" if way == "default" else way
        errors = [f"{row[of][what]:.3%}" for of in ("scored", "fitted") for what in ERRORS]
        lines.append([title, *errors, f"{row['cost']:.2f}", f"{row['time']:.2f}"])
    heads = [
        "largest",
        "mean",
        "score",
        "fitted, too: largest",
        "mean",
        "score",
        "pixels seen",
        "time",
    ]
    return markdown_table([f"{name}: overlap", *heads], lines)


# --------------------------------------------------------------------------------------------- study


def study(data: Path, args: argparse.Namespace) -> None:
    """One category; its tables are printed and its file written."""
    title = f"{data.resolve().name}, {args.mosaic}"
    layout = Layout(*map(int, args.mosaic.split("x")), args.piece)
    common: dict[str, Any] = {
        "backbone": args.backbone,
        "weights": args.weights,
        "n_features": args.n_features,
        "n_centroids": args.n_centroids,
        "seed": args.seed,
        "progress": False,
    }
    report: dict[str, Any] = {
        "provenance": provenance(),
        "settings": {
            "data": data.resolve().name,
            "mosaic": args.mosaic,
            "piece": args.piece,
            **{
                name: value for name, value in common.items() if name not in ("weights", "progress")
            },
            "tile": args.tile,
            "at_most": dict(zip(("train", "good", "defective"), args.images, strict=True)),
        },
    }
    (category,) = find_categories(data)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        mosaics = drawn_mosaics(category, layout, args.images, args.seed, Path(scratch))
        if mosaics.has_masks:
            shares = [float(m.mask(layout).mean()) for m in mosaics.test if m.marked is not None]
            report["marked"] = {"median": median(shares), "largest": max(shares)}
        if args.overlaps is None:
            report["views"] = rows_of_views(mosaics, common, args)
            table = table_of_views(title, report["views"])
        else:
            report["overlaps"] = rows_of_overlaps(mosaics, common, args)
            table = table_of_overlaps(title, report["overlaps"])
    print(table, end="\n\n", flush=True)
    what = "" if args.overlaps is None else "_overlaps"
    file = args.out / f"study_tiles_{data.resolve().name}_{args.mosaic}{what}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", type=Path, help="MVTec AD categories")
    add("--backbone", default="filterbank")
    add("--weights", type=Path)
    add("--mosaic", default="4x4", metavar="RxC", help="rows and columns of pieces")
    add("--piece", type=int, default=256, help="pixels of a piece's side")
    add("--small", type=int, default=256, help="image_size of resized mosaics")
    add("--tile", type=int, default=672, help="pixels of a tile's side")
    add("--smoothings", type=numbers(float), default=[1, 0.5, 0.25, 0.125], help="of the default")
    add("--overlaps", type=numbers(int), help="compared with whole images, beside the default")
    add("--n-features", type=int, default=32)
    add("--n-centroids", type=int, default=2048)
    add("--images", type=numbers(int), default=[40, 30, 30], help="to fit, good, defective")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for data in args.data:
        study(data, args)


if __name__ == "__main__":
    main()
