"""Which drivers the CUDA kernels are registered with; no GPU is needed, since the module is a fake."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_cases import OPS

from npad.check.cases import tensors
from npad.ops import _cuda


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are registered from now on, in place of registering them."""
    names: list[str] = []

    def impl(name: str, device: str, kernel: Any) -> None:
        assert (name, device) == (f"npad::{kernel.__name__}", "CUDA")
        names.append(kernel.__name__)

    monkeypatch.setattr(torch.library, "impl", impl)
    return names


def use(monkeypatch: pytest.MonkeyPatch, driver: int, runtime: int = 13000) -> None:
    module = SimpleNamespace(driver_version=lambda: driver, runtime_version=lambda: runtime)
    monkeypatch.setattr(_cuda, "cuda", module)


@pytest.mark.parametrize("driver", [11080, 12090])
def test_a_driver_older_than_the_runtime_is_named(
    driver: int, registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, driver)
    major, minor = divmod(driver // 10, 100)
    with pytest.warns(RuntimeWarning, match="need a driver for CUDA 13.0") as caught:
        _cuda.register()
    assert f"this one is for {major}.{minor}" in str(caught[0].message)
    assert registered == []


@pytest.mark.parametrize("driver", [0, 12090])
@pytest.mark.parametrize("name", OPS)
def test_the_cpu_goes_on(
    name: str, driver: int, registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, driver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        _cuda.register()
    op, _, make = OPS[name]
    assert all(a.isfinite().all() for a in tensors(op(*make(7))))


def test_no_driver_is_no_news(registered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 0)
    _cuda.register()
    assert registered == []


def test_no_cuda_kernels_is_no_news(registered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "cuda", None)
    _cuda.register()
    assert registered == []


@pytest.mark.parametrize(("driver", "runtime"), [(13000, 13000), (13000, 13020), (14010, 13000)])
def test_a_driver_of_the_same_major_version_or_newer_will_do(
    driver: int, runtime: int, registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, driver, runtime)
    _cuda.register()
    assert sorted(registered) == sorted(OPS)
