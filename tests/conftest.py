"""Fixtures of the whole suite: devices, instruction sets, thread counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from npad.ops._extension import core, cuda

# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# These tests are the check: what is wrong on this GPU must fail, not be replaced by the reference.
os.environ["NPAD_CHECK"] = "0"

# Processes beside each other share the cores, and so do those that their tests start.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

# A kernel that fails to load must fail the suite, not pass on the reference.
# Those ending in _vnni have a kernel of their own for nearest_centroid only.
ISAS = [name for name in core.isas() if not name.endswith("_vnni")]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with each instruction set that this processor has."""
    before = core.isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave the thread count and the random state as they were."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run outside the checkout: a child's ``python -c`` would import the source folder there."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def untrained_resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = timm.create_model("resnet18").state_dict()
    path = tmp_path_factory.mktemp("weights") / "r18.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> None:
    """Skip what is marked cuda where there is no GPU, or fail where one is required."""
    if request.node.get_closest_marker("cuda") is None:
        return
    missing = "no GPU" if not torch.cuda.is_available() else "" if cuda else "no CUDA kernels"
    if missing and os.environ.get("NPAD_REQUIRE_CUDA") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


def _path(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


@pytest.fixture
def data() -> Path:
    """Folder of real data sets, from NPAD_DATA."""
    return _path("NPAD_DATA")


@pytest.fixture
def weights() -> Path:
    """Folder of pre-trained weights, from NPAD_WEIGHTS."""
    return _path("NPAD_WEIGHTS")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))
