"""For which GPUs a build compiles the CUDA kernels: cmake/architectures.cmake with a made-up nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLD = [50, 60, 70, 75, 80, 86, 87, 89, 90]  # what nvcc 12.0 knows
NEW = [75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121]  # nvcc 13.0


def chosen(
    folder: Path, known: list[int], gpus: str | None, cudaarchs: str = "", **defined: str
) -> list[str]:
    """What is compiled for, on a machine whose nvidia-smi prints ``gpus``, or that has none."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    tools = folder / "tools"
    tools.mkdir()

    def script(name: str, output: str) -> None:
        (tools / name).write_text(f"#!/bin/sh\nprintf '{output}'\n")
        (tools / name).chmod(0o755)

    script("nvcc", "".join(f"compute_{number}\\n" for number in known))
    if gpus is not None:
        script("nvidia-smi", gpus)
    run = folder / "run.cmake"
    run.write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        f'include("{ROOT}/cmake/architectures.cmake")\n'
        f'npad_choose_architectures("{tools}/nvcc" architectures)\n'
        'message(STATUS "${architectures}")\n'
    )
    done = subprocess.run(
        [cmake, *(f"-D{name}={value}" for name, value in defined.items()), "-P", run],
        env={**os.environ, "PATH": str(tools), "CUDAARCHS": cudaarchs},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.removeprefix("--").strip().split(";")


@pytest.mark.parametrize(
    ("gpus", "known", "expected"),
    [
        pytest.param(None, NEW, [""], id="no driver"),
        pytest.param("", NEW, [""], id="no GPU"),
        pytest.param("NVIDIA-SMI has failed: no driver 9\\n", NEW, [""], id="driver fails"),
        pytest.param("9.0\\n", NEW, ["90-real"], id="one"),
        pytest.param("8.9\\n12.0\\n8.9\\n", NEW, ["89-real", "120-real"], id="several"),
        pytest.param("7.0\\n", OLD, [""], id="older than the kernels"),
        pytest.param("7.0\\n", NEW, [""], id="older than nvcc"),
        pytest.param("12.0\\n", OLD, ["90-virtual"], id="newer than nvcc"),
        pytest.param("12.1\\n", NEW, ["121-real"], id="the newest that nvcc knows"),
    ],
)
def test_by_itself_it_compiles_for_the_gpu_that_is_here(
    gpus: str | None, known: list[int], expected: list[str], tmp_path: Path
) -> None:
    assert chosen(tmp_path, known, gpus, NPAD_CUDA="AUTO") == expected


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (NEW, ["75-real", "80-real", "86-real", "89-real", "90", "100", "120"]),
        (OLD, ["75-real", "80-real", "86-real", "89-real", "90"]),
    ],
)
def test_a_release_is_for_all_that_nvcc_knows(
    known: list[int], expected: list[str], tmp_path: Path
) -> None:
    """PTX, without -real, of the newest at least."""
    assert chosen(tmp_path, known, "9.0\\n", NPAD_CUDA="ON") == expected


@pytest.mark.parametrize("npad_cuda", ["AUTO", "ON"])
def test_who_names_some_gets_these(npad_cuda: str, tmp_path: Path) -> None:
    assert chosen(tmp_path, NEW, "9.0\\n", "80;86", NPAD_CUDA=npad_cuda) == ["80", "86"]


def test_what_cmake_is_told_goes_before_the_environment(tmp_path: Path) -> None:
    found = chosen(tmp_path, NEW, None, "80", NPAD_CUDA="AUTO", CMAKE_CUDA_ARCHITECTURES="89")
    assert found == ["89"]
