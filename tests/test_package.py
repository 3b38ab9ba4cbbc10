"""The package itself: what `import npad` gives, when, and that the kernels come with the ops."""

import subprocess
import sys

import pytest

import npad


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_imports_no_library():
    assert run("import sys, npad; print(npad.__version__, 'torch' in sys.modules)") == [
        npad.__version__,
        "False",
    ]


@pytest.mark.parametrize("name", [name for name in npad.__all__ if name != "__version__"])
def test_names_are_found_either_way(name):
    as_attribute = run(f"import npad; print(npad.{name}.__name__, npad.{name} is npad.{name})")
    imported = run(f"from npad import {name}; print({name}.__name__, True)")
    assert as_attribute == imported
    assert imported[0].removeprefix("npad.") == name


def test_dir_and_star_show_every_public_name():
    assert set(npad.__all__) <= set(run("import npad; print(*dir(npad))"))
    assert set(npad.__all__) <= set(run("from npad import *; print(*dir())"))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'npad' has no attribute 'Npad'"):
        npad.Npad  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Npad'"):
        from npad import Npad  # noqa: F401


@pytest.mark.parametrize(
    "import_",
    [
        "import npad; npad.ops",
        "import npad; npad.NPad",
        "from npad import ops",
        "import npad.ops",
        "import npad._native",
        "from npad._native import core",
        "from npad.gaussian import NeighborhoodGaussian",
        "from npad.nominal_set import NominalSet",
    ],
)
def test_whoever_imports_the_ops_gets_the_kernels(import_):
    has_kernel = "torch._C._dispatch_has_kernel_for_dispatch_key('npad::{}', 'CPU')"
    ops = ("neighborhood_moments", "mahalanobis", "farthest_first")
    checks = ", ".join(has_kernel.format(op) for op in ops)
    assert run(f"{import_}; import torch; print({checks})") == ["True"] * 3
