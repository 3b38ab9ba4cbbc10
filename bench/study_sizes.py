"""Time from an image to its features, by network and size, on which the default sizes rest.

    python bench/study_sizes.py wide_resnet50_2:256 vit_small_patch16_224:224,384 --threads 1

Random weights, the default layers. Of one thread it is CPU time, which other work on the machine
changes little; of more, wall time. Median of five runs, after one that finds its memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from npad.features import timm_models
from npad.features.defaults import default_layers

RUNS = 5


def network(name: str) -> nn.Module:
    outline = timm_models.outline(name)
    layers = default_layers(outline.reductions)
    net: nn.Module = timm_models.features(name, outline.config, layers, pretrained=False)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return net.eval().to(memory_format=torch.channels_last)


def milliseconds(net: nn.Module, image: torch.Tensor, clock: Callable[[], float]) -> float:
    times = []
    for _ in range(RUNS + 1):
        start = clock()
        net(image)
        times.append(1e3 * (clock() - start))
    return statistics.median(times[1:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+", metavar="NAME:SIZE,...")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    print("| network | size | grid | ms |\n|---|---|---|---|")
    for argument in args.networks:
        name, _, sizes = argument.partition(":")
        net = network(name)
        for side in map(int, sizes.split(",")):
            image = torch.randn(1, 3, side, side).to(memory_format=torch.channels_last)
            height, width = net(image)[0].shape[2:]
            taken = milliseconds(net, image, clock)
            print(f"| {name} | {side} | {height} x {width} | {taken:.0f} |", flush=True)


if __name__ == "__main__":
    main()
