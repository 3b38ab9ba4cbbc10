"""Where the time of one batch goes: a torch profiler's summary, and its trace on request.

    python bench/timeline.py --device cuda --batch 32
    python bench/timeline.py --backbone resnet18 --weights FILE --data DIR --batch 16

Prints the time of each part of a prediction, from a tensor of the model's size to scores and maps, then
the kernels (operators, on the CPU) that take most. Weights and images are random where none are given.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_detector import SIZE, random_images, random_weights
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from npad import NPad, devices
from npad.cli.program import parsed
from npad.features.backbone import levels_in_parts
from npad.images.source import ImageSource
from npad.scoring import fusion
from npad.scoring.pipeline import score_in_parts

ROUNDS = 20
ROWS = 12


def fitted(args: argparse.Namespace, folder: Path) -> NPad:
    weights = args.weights or random_weights(folder)
    model = NPad(
        args.backbone, weights=weights, n_features=args.n_features, device=args.device,
        progress=False,
    )  # fmt: skip
    return model.fit(args.data if args.data else random_images(64))


def a_batch(args: argparse.Namespace, device: torch.device) -> Tensor:
    source = sorted(args.data.iterdir())[: args.batch] if args.data else random_images(args.batch)
    images = ImageSource(source, image_size=(SIZE, SIZE), batch_size=args.batch)
    return next(images.batches()).images.to(device)


def parts(model: NPad, images: Tensor) -> dict[str, Callable[[], object]]:
    """The parts of `Scorer.forward`, each on what the one before it gives."""
    scorer = model.scorer()

    def embed() -> list[Tensor]:
        return scorer.embeddings([levels_in_parts(n, images) for n in scorer.networks])

    embeddings = embed()
    distances = []
    found: dict[str, Callable[[], object]] = {"embedding (backbone, embed)": embed}
    for member, x in zip(scorer.members, embeddings, strict=True):
        kinds = " and ".join(member(x))
        name = f"{kinds}, layers {', '.join(map(str, member.member.levels))}"
        found[name] = lambda member=member, x=x: member(x)
        distances.append((member.member, member(x)))
    found["fusion, anomaly_map"] = lambda: fusion.scores_and_maps(distances, scorer.settings)
    found["all"] = lambda: score_in_parts(scorer, images)
    found["score()"] = lambda: model.score(images)
    return found


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return 1e3 * statistics.median(once() for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--backbone", default="wide_resnet50_2")
    parser.add_argument("--weights", type=Path, help="of the backbone; random where not given")
    parser.add_argument("--data", type=Path, help="a folder of images; random where not given")
    parser.add_argument("--n-features", type=parsed("n_features"), default="auto")
    parser.add_argument("--trace", type=Path, help="file for the profiler's trace")
    args = parser.parse_args()
    if args.weights is None and args.backbone != "wide_resnet50_2":
        parser.error("--backbone needs --weights")

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        device = devices.resolve(args.device)
        model = fitted(args, Path(folder))
        images = a_batch(args, device)
        for name, function in parts(model, images).items():
            print(f"{name:<42} {milliseconds(function, device):9.3f} ms")
        cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as profiler:
            model.score(images)
            if cuda:
                torch.cuda.synchronize()
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=60))
        if args.trace:
            profiler.export_chrome_trace(str(args.trace))


if __name__ == "__main__":
    main()
