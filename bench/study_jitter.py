"""What misalignment costs: images moved at random, neighbourhoods of several sizes, and the peers.

    python bench/study_jitter.py DIR synthetic --backbone resnet18 --weights FILE --out DIR

DIR is an MVTec AD category, with masks or without; "synthetic" is aligned woven texture. A jitter of J
shifts every image, to fit and to score, by up to J pixels along each axis and turns it by as much as
moves the middle of an edge by J pixels, of 256. What comes in at a border is the image's own
reflection, in good images as in bad ones, and masks move with their images. An image keeps its
direction: a larger jitter only moves it farther. A seed draws the moves and the images in use, and is
the fit's. Prints a table for each metric, those of docs/method.md, and writes all figures to
study_jitter_<name>.json jitter by jitter; eps is the one chosen, marked_images the number of images
to score in which a part of the mask is still to be seen. The peers need anomalib and ResNet-18.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

import numpy as np
import torch
from embedded import METRICS, EmbeddedCategory
from markdown_table import markdown_table
from numpy.typing import NDArray
from peer_methods import Anomalib, Clock
from PIL import Image
from provenance import provenance
from study_defaults import fit, measured
from torch import Tensor

from npad.environment import versions
from npad.evaluation.datasets import Category, Sample, find_categories
from npad.evaluation.synthetic import make_dataset
from npad.features.backbone import Backbone
from npad.images.masks import read_mask
from npad.learned import LearnedMember
from npad.members import Member
from npad.scoring.fusion import scores_and_maps
from npad.settings import Settings

WINDOWS = (1, 3, 5)
SCORE_WINDOWS = (1, 3)
# One Gaussian over both layers, and the same map for the score.
JOINT: dict[str, Any] = {"gaussians": "joint", "map_layers": (), "map_weight": 0.4}
PEERS = {"PaDiM": "padim", "PatchCore": "patchcore"}

Figures = dict[str, float]
T = TypeVar("T")


# ------------------------------------------------------------------------------- images that move


def drawn(category: Category, counts: Sequence[int], seed: int) -> Category:
    """At most so many images to fit, good ones to score and defective ones, at random."""
    rng = np.random.default_rng(seed)

    def some(items: Sequence[T], count: int) -> list[T]:
        kept = rng.permutation(len(items))[:count]
        return [items[i] for i in sorted(kept)]

    good = [sample for sample in category.test if not sample.is_anomalous]
    bad = [sample for sample in category.test if sample.is_anomalous]
    n_train, n_good, n_bad = counts
    test = some(good, n_good) + some(bad, n_bad)
    return Category(category.name, some(category.train, n_train), test)


def jittered(category: Category, jitter: float, seed: int, folder: Path) -> Category:
    """The category with all its images moved, as PNG files of the folder."""
    if not jitter:
        return category

    def write(image: Image.Image, name: str, move: NDArray[np.float64]) -> Path:
        moved(image, move).save(folder / name, compress_level=1)
        return folder / name

    train, test = [], []
    for i, path in enumerate(category.train):
        move = jitter * unit_move(seed, 0, i)
        train.append(write(Image.open(path).convert("RGB"), f"train_{i:04}.png", move))
    for i, sample in enumerate(category.test):
        move, mask = jitter * unit_move(seed, 1, i), None
        if sample.mask_path is not None:
            marked = Image.fromarray(read_mask(sample.mask_path).astype(np.uint8) * 255)
            mask = write(marked, f"mask_{i:04}.png", move)
        image = write(Image.open(sample.path).convert("RGB"), f"test_{i:04}.png", move)
        test.append(Sample(image, sample.defect_type, mask))
    return Category(category.name, train, test)


def unit_move(seed: int, split: int, i: int) -> NDArray[np.float64]:
    """Right, down and around, each at most 1."""
    return np.random.default_rng([seed, split, i]).uniform(-1, 1, 3)


def moved(image: Image.Image, move: NDArray[np.float64]) -> Image.Image:
    """An image moved by (right, down, around) 256ths of its size; a mask ("L") by nearest neighbour."""
    width, height = image.size
    right, down, angle = move[0] * width / 256, move[1] * height / 256, move[2] / 128
    margin = math.ceil(3 * np.abs(move).max() * max(image.size) / 256) + 2
    around = ((margin, margin), (margin, margin), (0, 0))
    pixels = np.asarray(image)
    wide = Image.fromarray(np.pad(pixels, around[: pixels.ndim], mode="reflect"))
    # From a pixel of the result to where it comes from, around the centre.
    cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
    from_x = (cos, sin, x + margin - cos * (x + right) - sin * (y + down))
    from_y = (-sin, cos, y + margin + sin * (x + right) - cos * (y + down))
    is_mask = image.mode == "L"
    resample = Image.Resampling.NEAREST if is_mask else Image.Resampling.BICUBIC
    return wide.transform(image.size, Image.Transform.AFFINE, (*from_x, *from_y), resample=resample)


# ---------------------------------------------------------------------------------- what is measured


def npad_rows(
    category: EmbeddedCategory, common: dict[str, Any], seed: int
) -> Iterable[tuple[str, Figures]]:
    """Each distance alone and their product, over all windows; the nominal set is the same for all."""
    settings = Settings(**common, **JOINT, seed=seed)
    both = Member(0, category.layers)
    train, test = category.train(both), category.test(both)

    def distances(member: Member, **more: int) -> tuple[LearnedMember, dict[str, Tensor]]:
        chosen = replace(settings, **more)
        learned, _ = fit(chosen, member, train)
        return learned, measured(learned, chosen, test)

    def figures(fusion: str, *found: dict[str, Tensor]) -> Figures:
        members = [(both, one) for one in found]
        return category.measure(*scores_and_maps(members, replace(settings, fusion=fusion)))

    _, euclidean = distances(replace(both, gaussian=False))
    yield "Euclidean alone", figures("euclidean", euclidean)
    for window in WINDOWS:
        for score_window in SCORE_WINDOWS:
            learned, mahalanobis = distances(
                replace(both, nominal_set=False), window=window, score_window=score_window
            )
            name = f"window {window}, evaluation {score_window}"
            found = figures("mahalanobis", mahalanobis)
            yield f"Gaussians alone, {name}", found | {"eps": learned.eps or 0.0}
            yield f"product, {name}", figures("product", mahalanobis, euclidean)


def peer_figures(
    method: str, category: Category, truth: EmbeddedCategory, weights: Path, seed: int, folder: Path
) -> Figures:
    """One of anomalib's methods on the same images; its own score, and its maps."""
    peer = Anomalib(method, weights, seed, folder)
    peer.fit(category.train, Clock())
    peer.model.eval()
    scores, maps = peer.predict([sample.path for sample in category.test])
    return truth.measure(torch.from_numpy(scores), torch.from_numpy(np.stack(maps)))


def study(data: str, args: argparse.Namespace) -> None:
    """One category at every jitter with every seed; its tables are printed and its file written."""
    name = Path(data).resolve().name
    report: dict[str, Any] = {
        "provenance": provenance(),
        "settings": {
            "data": name,
            "backbone": args.backbone,
            "image_size": args.image_size,
            "at_most": dict(zip(("train", "good", "defective"), args.images, strict=True)),
            "seeds": args.seeds,
        },
        "marked_images": {},
        "rows": {},
    }
    if args.peers:
        report["provenance"]["packages"] |= versions("anomalib", "torchvision")
    common: dict[str, Any] = {
        "backbone": args.backbone,
        "weights": args.weights,
        "image_size": args.image_size,
        "progress": False,
    }
    network = Backbone(args.backbone, weights=args.weights)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            root = make_dataset(folder / "woven", seed=seed) if data == "synthetic" else Path(data)
            (category,) = find_categories(root)
            category = drawn(category, args.images, seed)
            for jitter in args.jitters:
                place = folder / f"{jitter:g}"
                place.mkdir()
                there = jittered(category, jitter, seed, place)
                size = Settings(**common).size
                embedded = EmbeddedCategory(there, [network], size, place)
                found = dict(npad_rows(embedded, common, seed))
                for peer, method in PEERS.items() if seed in args.seeds[: args.peers] else ():
                    found[peer] = peer_figures(method, there, embedded, args.weights, seed, place)
                marked = sum(bool(mask.any()) for mask in embedded.masks)
                report["marked_images"].setdefault(f"{jitter:g}", []).append(marked)
                for row, figures in found.items():
                    runs = report["rows"].setdefault(row, {}).setdefault(f"{jitter:g}", [])
                    runs.append(figures)
                (args.out / f"study_jitter_{name}.json").write_text(
                    json.dumps(report, indent=1) + "\n"
                )
    print("\n\n".join(tables(name, report["rows"])), flush=True)


def tables(name: str, rows: dict[str, dict[str, list[Figures]]]) -> Iterable[str]:
    """For each metric: mean over the seeds, and their standard deviation if there are several."""
    jitters = list(next(iter(rows.values())))
    for metric in METRICS:
        if metric not in next(iter(rows.values()))[jitters[0]][0]:
            continue  # there are no masks
        lines = []
        for row, at in rows.items():
            values = [[run[metric] for run in at[jitter]] for jitter in jitters]
            lines.append([row, str(len(values[0])), *map(cell, values)])
        yield markdown_table([f"{name}: {metric}", "seeds", *jitters], lines)


def cell(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def numbers(kind: type[T]) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]  # type: ignore[call-arg]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="+", help="MVTec AD categories, or 'synthetic'")
    add("--backbone", default="filterbank")
    add("--weights", type=Path)
    add("--image-size", type=int, default=256)
    add("--jitters", type=numbers(float), default=[0.0, 1.0, 2.0, 4.0, 8.0])
    add("--seeds", type=numbers(int), default=[0])
    add("--images", type=numbers(int), default=[100, 50, 50], help="to fit, good, defective")
    add(
        "--peers",
        type=int,
        default=0,
        metavar="N",
        help="PaDiM and PatchCore with the first N seeds",
    )
    add("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for data in args.data:
        study(data, args)


if __name__ == "__main__":
    main()
