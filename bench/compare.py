"""A change before and after, in one run: two checkouts in turn, on the same images.

    NPAD_DATA=DIR NPAD_WEIGHTS=DIR python bench/compare.py BEFORE AFTER --threads 2

BEFORE and AFTER are checkouts with the kernels built in place (npad/_core*.so), of any version whose
NPad has fit, score, predict, save and load. Each round runs both, each in a process of its own that
imports npad from its checkout: ResNet-18 with the defaults, magnetic tiles. Prints medians over the
rounds, the ratio after / before, its least and largest value in a round, and the ratio of CPU seconds,
which other work on the machine moves less; below them, how far scores moved.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a child imports npad from its checkout, the parent none
    from torch import Tensor

    from npad import NPad

SIZE = 256
N_SCORED = {1: 8, 16: 32}  # images, for each batch size
REPEATS = 3  # of all but the fit


class Clock:
    """Medians of the wall and CPU seconds that named calls take."""

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[[], Any], repeats: int = REPEATS) -> Any:
        wall, cpu = [], []
        for _ in range(repeats):
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            result = function()
            wall.append(time.perf_counter() - wall_start)
            cpu.append(time.process_time() - cpu_start)
        self.wall_s[name], self.cpu_s[name] = median(wall), median(cpu)
        return result


def measure(checkout: Path, threads: int, n_fitted: int) -> dict[str, Any]:
    """Seconds of every call, and the scores; for a process that this checkout has to itself."""
    import torch
    from provenance import provenance

    import npad

    if not Path(npad.__file__).is_relative_to(checkout):
        sys.exit(f"compare: npad comes from {npad.__file__}, not from {checkout}")
    torch.set_num_threads(threads)
    machine = provenance(checkout)
    weights = Path(os.environ["NPAD_WEIGHTS"]) / "resnet18_layers123.safetensors"
    train = some_images("train", n_fitted)
    new = partial(npad.NPad, "resnet18", weights=weights, image_size=SIZE, progress=False)
    clock = Clock()
    new().fit(train[:4])  # what is made at the first use
    model = clock("fit", lambda: new().fit(train), repeats=1)
    scores = {}
    for batch, n_scored in N_SCORED.items():
        model.batch_size = batch
        paths = some_images("test", n_scored)
        batches = tensors(paths).split(batch)
        model.predict(paths[:batch])
        results = clock(f"score, batch {batch}", partial(score_all, model, batches))
        scores[f"score, batch {batch}"] = torch.cat([one for one, _ in results]).tolist()
        result = clock(f"predict files, batch {batch}", partial(model.predict, paths))
        scores[f"predict files, batch {batch}"] = result.scores.tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.npad"
        clock("save", lambda: model.save(path))
        clock("load", lambda: npad.NPad.load(path, weights=weights))
    return {"machine": machine, **vars(clock), "scores": scores}


def score_all(model: NPad, batches: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [model.score(images) for images in batches]


def some_images(part: str, n: int) -> list[Path]:
    """Evenly spaced images of the magnetic tiles."""
    found = sorted((Path(os.environ["NPAD_DATA"]) / "mtd" / part).rglob("*.jpg"))
    return found[:: len(found) // n][:n]


def tensors(paths: list[Path]) -> Tensor:
    """(N, 3, SIZE, SIZE) float32 in [0, 1]."""
    import numpy as np
    import torch
    from PIL import Image

    images = [np.asarray(Image.open(p).convert("RGB").resize((SIZE, SIZE))) for p in paths]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous() / 255


def run(checkout: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a child process."""
    paths = os.pathsep.join([str(checkout), str(Path(__file__).parent)])
    environment = os.environ | {
        "PYTHONPATH": paths,
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(args.threads),
    }
    command = [sys.executable, __file__, "--child", str(checkout)]
    command += ["--threads", str(args.threads), "--images", str(args.images)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"compare: {checkout} failed with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """Medians, ratios and moves of scores, for the rounds of two checkouts."""
    lines = [
        f"{name}: {machine['commit']}{' and changes' if machine['dirty'] else ''}, "
        f"torch {machine['torch']}, {machine['threads']} thread(s), {machine['processor']}"
        for name, machine in (("before", before[0]["machine"]), ("after", after[0]["machine"]))
    ]
    head = "", "before, ms", "after, ms", "after / before", "of rounds", "CPU seconds"
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in before[0]["wall_s"]:
        wall, cpu = (
            [[found[kind][name] for found in rounds] for rounds in (before, after)]
            for kind in ("wall_s", "cpu_s")
        )
        old, new = map(median, wall)
        of_rounds = [b / a for a, b in zip(*wall, strict=True)]
        cells = [name, f"{1e3 * old:.1f}", f"{1e3 * new:.1f}", f"{new / old:.3f}"]
        cells.append(f"{min(of_rounds):.2f} to {max(of_rounds):.2f}")
        cells.append(f"{median(cpu[1]) / median(cpu[0]):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, old_scores in before[0]["scores"].items():
        pairs = zip(old_scores, after[0]["scores"][name], strict=True)
        moved = max(abs(new / old - 1) for old, new in pairs)
        lines.append(f"{name}: scores move by at most {moved:.1e}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("before", nargs="?", type=Path)
    add("after", nargs="?", type=Path)
    add("--threads", type=int, required=True)
    add("--rounds", type=int, default=5)
    add("--images", type=int, default=64, help="to fit")
    add("--out", type=Path, help="JSON file of all rounds, for a result that is kept")
    add("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.threads, args.images)))
        return
    if args.after is None or not {"NPAD_DATA", "NPAD_WEIGHTS"} <= os.environ.keys():
        parser.error("give two checkouts, and set NPAD_DATA and NPAD_WEIGHTS")
    rounds: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    for _ in range(args.rounds):
        for name, results in rounds.items():
            results.append(run(getattr(args, name).resolve(), args))
    print(table(**rounds))
    if args.out:
        args.out.write_text(json.dumps(rounds, indent=1) + "\n")


if __name__ == "__main__":
    main()
