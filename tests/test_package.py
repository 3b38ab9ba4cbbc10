"""The package itself: what `import npad` gives, when, and that the kernels come with the ops."""

import os
import shutil
import subprocess
import sys

import pytest

import npad
from npad.ops._extension import core


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
        "import npad.ops._cpu",
        "import npad.ops._cuda",
        "from npad.ops._extension import core",
        "from npad.ops.axes import random_axes",
        "from npad.statistics.gaussian import NeighborhoodGaussian",
        "from npad.statistics.nominal_set import NominalSet",
    ],
)
def test_whoever_imports_the_ops_gets_the_kernels(import_):
    has_kernel = "torch._C._dispatch_has_kernel_for_dispatch_key('npad::{}', 'CPU')"
    ops = ("neighborhood_moments", "mahalanobis", "farthest_first")
    checks = ", ".join(has_kernel.format(op) for op in ops)
    assert run(f"{import_}; import torch; print({checks})") == ["True"] * 3


OPENMP = """
import os, re
import torch

def threads():
    return len(os.listdir("/proc/self/task"))

def libraries():
    return set(re.findall(r"\\S*/lib[gi]?omp\\S*", open("/proc/self/maps").read()))

of_torch = libraries()
import npad.ops

torch.set_num_threads(3)
points, before = torch.rand(512, 64), threads()
npad.ops.nearest_centroid(points, points)
kernel = threads() - before
torch.rand(1 << 22).exp_()
print(*map(os.path.basename, libraries() ^ of_torch), kernel, threads() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_kernels_share_the_threads_of_torch():
    """An OpenMP of their own would be threads of their own, which torch's fight for the cores."""
    assert run(OPENMP) == ["2", "2"]  # besides the one that calls


DRIVER = """
#include <stdio.h>
#include <string.h>
int cuDriverGetVersion(int* version) { *version = 99000; return 0; }
int cuInit(unsigned flags) { puts("initialised"); return 100; }
static int nothing(void) { return 100; }
int cuGetProcAddress_v2(const char* name, void** function) {
    *function = !strcmp(name, "cuInit") ? (void*)cuInit
                : !strcmp(name, "cuDriverGetVersion") ? (void*)cuDriverGetVersion : (void*)nothing;
    return 0;
}
"""


@pytest.mark.skipif(not hasattr(core, "cuda"), reason="built without CUDA kernels")
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_import_does_not_initialise_the_driver(tmp_path):
    """Or else CUDA_VISIBLE_DEVICES would not be read later, and forked processes had no GPU."""
    (tmp_path / "driver.c").write_text(DRIVER)
    library = ["-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"]
    subprocess.run(["cc", *library], check=True)
    code = "from npad.ops._extension import cuda; print(cuda.driver_version())"
    path = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["99000"], done.stderr
