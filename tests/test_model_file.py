"""Model files: what is written is read back, and nothing else is ever taken for a model."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from npad import model_file
from npad.model_file import (
    FORMAT_VERSION,
    STATISTICS_VERSION,
    ModelFileError,
    check_tensors,
    read_model,
    write_model,
)

HEADER = {
    "window": 3,
    "eps": 0.001,
    "layers": [2, 3],
    "backbone": {"name": "résnet18", "hash": "ab"},
}
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
]


def make_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "mean": torch.randn(6, 5, generator=generator),
        "factor": torch.randn(6, 15, generator=generator).to(torch.bfloat16),
        "count": torch.arange(6),
    }


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """Bytes of a model file."""
    path = tmp_path_factory.mktemp("model") / "bottle.npad"
    write_model(path, HEADER, make_tensors())
    return path.read_bytes()


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "bottle.npad"
    path.write_bytes(content)
    return path


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True)


def split(content):
    """Table and data of a model file's bytes."""
    n_table = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + n_table]), content[8 + n_table :]


def join(table, data):
    encoded = json.dumps(table, separators=(",", ":")).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def sign(content):
    """The same file with the checksum made right, as someone would who forges a model."""
    blank = content[: model_file._DIGEST.start] + b"0" * 64 + content[model_file._DIGEST.stop :]
    digest = model_file.hashlib.sha256(blank).hexdigest().encode()
    return blank.replace(b"0" * 64, digest, 1)


# Round trip


def test_round_trip(path):
    header, tensors = read_model(path)
    assert header == HEADER
    assert_same(tensors, make_tensors())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (1,), (31, 129), (2, 3, 4, 5)], ids=str)
def test_round_trip_of_dtypes_and_shapes(tmp_path, dtype, shape):
    expected = {"x": (torch.randn(shape) * 50).abs().to(dtype)}
    write_model(tmp_path / "a.npad", {}, expected)
    header, tensors = read_model(str(tmp_path / "a.npad"))
    assert header == {}
    assert_same(tensors, expected)
    assert tensors["x"].is_contiguous()


def test_round_trip_of_strides_gradients_and_special_values(tmp_path):
    expected = {
        "strided": torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1)[::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "gradient": torch.ones(3, requires_grad=True),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "one.byte": torch.tensor([7], dtype=torch.uint8),
    }
    write_model(tmp_path / "a.npad", {}, expected)
    _, tensors = read_model(tmp_path / "a.npad")
    assert_same(tensors, {name: tensor.detach() for name, tensor in expected.items()})
    assert torch.signbit(tensors["special"][2])


def test_no_tensors(tmp_path):
    write_model(tmp_path / "a.npad", HEADER, {})
    assert read_model(tmp_path / "a.npad") == (HEADER, {})


def test_tensors_larger_than_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "_BLOCK", 1000)
    expected = {"x": torch.randn(4001), "y": torch.randn(250)}
    write_model(tmp_path / "a.npad", {}, expected)
    monkeypatch.setattr(model_file, "_BLOCK", 777)
    assert_same(read_model(tmp_path / "a.npad")[1], expected)


def test_same_model_gives_the_same_bytes(tmp_path, path):
    reordered = dict(reversed(make_tensors().items()))
    write_model(tmp_path / "again.npad", HEADER, reordered)
    assert (tmp_path / "again.npad").read_bytes() == path.read_bytes()


def test_is_a_safetensors_file(path):
    assert_same(load_file(path), make_tensors())
    with safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == ["npad"]
        content = json.loads(file.metadata()["npad"])
    assert content["format_version"] == FORMAT_VERSION
    assert content["header"] == HEADER
    table, _ = split(path.read_bytes())
    for name, entry in table.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % make_tensors()[name].element_size() == 0


def test_loaded_tensors_do_not_follow_the_file(path):
    _, tensors = read_model(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(tensors, make_tensors())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@given(
    header=st.dictionaries(st.text(), json_values, max_size=4),
    tensors=st.dictionaries(
        st.text().filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)),
        max_size=4,
    ),
)
@reuse_folder
def test_any_header_and_any_tensors(tmp_path, header, tensors):
    expected = {name: torch.full(shape, 3).to(dtype) for name, (dtype, shape) in tensors.items()}
    write_model(tmp_path / "a.npad", header, expected)
    got_header, got = read_model(tmp_path / "a.npad")
    assert got_header == header
    assert_same(got, expected)


# What cannot be written


@pytest.mark.parametrize("header", [{"eps": float("nan")}, {"eps": float("inf")}])
def test_header_with_nan_is_refused(path, header):
    with pytest.raises(ValueError, match="JSON"):
        write_model(path, header, {})
    assert read_model(path)[0] == HEADER


def test_header_that_is_not_json_is_refused(path):
    with pytest.raises(TypeError, match="JSON"):
        write_model(path, {"a": object()}, {})
    assert read_model(path)[0] == HEADER


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool])
def test_unsupported_dtype_is_refused(path, dtype):
    with pytest.raises(TypeError, match=rf"tensor 'x' must be one of .*, got {dtype}"):
        write_model(path, HEADER, {"x": torch.zeros(1, dtype=dtype)})
    assert_same(read_model(path)[1], make_tensors())


def test_reserved_name_is_refused(path):
    with pytest.raises(ValueError, match="__metadata__"):
        write_model(path, HEADER, {"__metadata__": torch.zeros(1)})
    assert_same(read_model(path)[1], make_tensors())


def test_full_disk_is_named_and_the_old_model_stays(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            ModelFileError, match=r"bottle\.npad: cannot be written: File too large"
        ):
            write_model(path, {}, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(read_model(path)[1], make_tensors())
    assert os.listdir(path.parent) == ["bottle.npad"]  # noqa: PTH208


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"missing/a\.npad: .*make the folder first"):
        write_model(tmp_path / "missing" / "a.npad", {}, {})
    with pytest.raises(ModelFileError, match=r"not a file and is not replaced.*path of a file"):
        write_model(tmp_path, {}, {})
    with pytest.raises(ModelFileError, match="cannot be written: File name too long"):
        write_model(tmp_path / ("a" * 300), {}, {})


KILLED_AT_RANDOM = """
import os, random, signal, sys, time
import torch
from npad.model_file import read_model, write_model

torch.set_num_threads(1)
path = sys.argv[1]
models = [({"model": value}, {"x": torch.full((200_000,), float(value))}) for value in (1, 2)]
write_model(path, *models[0])
begin = time.perf_counter()
write_model(path, *models[0])
duration = time.perf_counter() - begin
chance = random.Random(0)
seen, leftovers = set(), 0
rounds = 0
while rounds < 40 or (rounds < 400 and (len(seen) < 2 or not leftovers)):
    rounds += 1
    child = os.fork()
    if child == 0:
        turn = 0
        while True:
            turn += 1
            write_model(path, *models[turn % 2])
    time.sleep(chance.uniform(0, 4 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    header, tensors = read_model(path)
    assert (tensors["x"] == header["model"]).all()
    seen.add(header["model"])
    leftovers += len(os.listdir(os.path.dirname(path))) - 1
write_model(path, *models[0])
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print(sorted(seen), leftovers)
"""


def test_kill_at_any_moment_leaves_a_whole_model(tmp_path):
    path = tmp_path / "a.npad"
    command = [sys.executable, "-W", "ignore", "-c", KILLED_AT_RANDOM, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    seen, leftovers = run.stdout.rsplit(maxsplit=1)
    assert seen == "[1, 2]"  # some kills came after a rename
    assert int(leftovers) > 0  # and some in the middle of a write


def test_interrupt_while_writing_keeps_the_old_model(path, monkeypatch):
    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_model(path, {}, {})
    assert_same(read_model(path)[1], make_tensors())
    assert os.listdir(path.parent) == ["bottle.npad"]  # noqa: PTH208


# What is not a model


def expect_error(path, content, match=None):
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=match) as caught:
        read_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.path == path


def test_every_cut_is_noticed(path, content):
    for n in range(len(content)):
        expect_error(path, content[:n], "cut short" if n >= 8 else None)
    expect_error(path, content + b"\0", "damaged")


def test_every_flipped_byte_is_noticed(path, content):
    for n in range(len(content)):
        for flip in (0x01, 0xFF):
            expect_error(path, content[:n] + bytes([content[n] ^ flip]) + content[n + 1 :])


def test_flipped_data_is_called_damaged(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    expect_error(path, content, "is damaged or was edited; copy it again")


def test_newer_format_is_refused_by_name(path):
    table, data = split(path.read_bytes())
    content = json.loads(table["__metadata__"]["npad"])
    content = {
        "sha256": content["sha256"],
        "format_version": FORMAT_VERSION + 6,
        "anything": "else",
    }
    table["__metadata__"]["npad"] = json.dumps(content)
    table["packed"] = "in a way of the future"
    message = (
        rf"written by a newer npad, format {FORMAT_VERSION + 6}; "
        rf"this one reads up to {STATISTICS_VERSION}; upgrade npad"
    )
    expect_error(path, join(table, data), message)


@pytest.mark.parametrize("version", [0, -1, "1", None, 1.5, [1]])
def test_impossible_format_is_refused(path, version):
    table, data = split(path.read_bytes())
    content = json.loads(table["__metadata__"]["npad"]) | {"format_version": version}
    table["__metadata__"]["npad"] = json.dumps(content, separators=(",", ":"))
    expect_error(path, sign(join(table, data)), "damaged")


def test_weights_are_not_a_model(tmp_path):
    path = tmp_path / "resnet18.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"conv1.weight": torch.zeros(3)}, path, metadata=metadata)
        with pytest.raises(ModelFileError, match=r"holds no npad model; .* give it with weights="):
            read_model(path)


class Malicious:
    def __reduce__(self):
        return os._exit, (3,)


def torch_file(path):
    torch.save({"model": Malicious()}, path)


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model", "x")


OTHER_FILES = {
    "pickle": lambda path: path.write_bytes(pickle.dumps(Malicious())),
    "torch": torch_file,
    "zip": archive,
    "text": lambda path: path.write_text("this is not a model\n"),
    "json": lambda path: path.write_text(json.dumps(HEADER)),
    "numpy": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "short": lambda path: path.write_bytes(b"\x01"),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "ones": lambda path: path.write_bytes(b"\xff" * 4096),
    "not json": lambda path: path.write_bytes((64).to_bytes(8, "little") + b"x" * 100),
    "not utf-8": lambda path: path.write_bytes((64).to_bytes(8, "little") + b"\xc3" * 100),
    "a list": lambda path: path.write_bytes(join([], b"")),
    "deep": lambda path: path.write_bytes((9000).to_bytes(8, "little") + b"[" * 9000),
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_not_models(tmp_path, kind):
    path = tmp_path / "a.npad"
    OTHER_FILES[kind](path)
    with pytest.raises(ModelFileError, match="is not an npad model file"):
        read_model(path)


def test_empty_file_missing_file_and_folder(tmp_path):
    expect_error(tmp_path / "empty.npad", b"", "is empty")
    with pytest.raises(ModelFileError, match=r"missing\.npad: there is no such file"):
        read_model(tmp_path / "missing.npad")
    with pytest.raises(ModelFileError, match="is not a file"):
        read_model(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="is not a file"):
        read_model(tmp_path / "pipe")


def test_error_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(ModelFileError("a.npad", "is empty")))
    assert str(error) == "a.npad: is empty"
    assert isinstance(error, ValueError)


# Forged files: the checksum is right and the rest is not


def entry(dtype="F32", shape=(6, 5), begin=0, end=120):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


FORGED = {
    "overlap": {"a": entry(), "b": entry()},
    "gap": {"a": entry(begin=4, end=124)},
    "negative": {"a": entry(shape=(-6, -5))},
    "wrong size": {"a": entry(shape=(6, 4))},
    "unknown dtype": {"a": entry(dtype="F8_E4M3")},
    "fractional": {"a": entry(shape=(6.0, 5))},
    "boolean": {"a": entry(shape=(True,), end=4)},
    "huge": {"a": entry(shape=(0, 1 << 62, 1 << 62), end=0)},
    "astronomic": {"a": entry(shape=(1 << 80,), end=1 << 82)},
    "beyond the end": {"a": entry(shape=(1 << 40,), end=1 << 42)},
    "many dimensions": {"a": entry(shape=(1,) * 5000, end=4)},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 120]}},
    "no entry": {"a": None},
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_layout_is_refused(path, kind):
    table, _ = split(path.read_bytes())
    forged = {"__metadata__": table["__metadata__"]} | FORGED[kind]
    expect_error(path, sign(join(forged, bytes(240))), "tensor 'a'|tensor 'b'|cut short")


def test_forging_helper_makes_files_that_are_read(path):
    table, _ = split(path.read_bytes())
    path.write_bytes(sign(join({"__metadata__": table["__metadata__"], "a": entry()}, bytes(120))))
    assert_same(read_model(path)[1], {"a": torch.zeros(6, 5)})


@pytest.mark.parametrize("header", [None, [], "x", 3])
def test_header_must_be_an_object(path, header):
    table, data = split(path.read_bytes())
    content = json.loads(table["__metadata__"]["npad"]) | {"header": header}
    table["__metadata__"]["npad"] = json.dumps(content, separators=(",", ":"))
    expect_error(path, sign(join(table, data)), "damaged")


# Fuzzing: an error that names the file, or the model that was written


def read_or_refuse(path, content):
    path.write_bytes(content)
    try:
        return read_model(path)
    except ModelFileError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017
        return None


@given(content=st.binary(max_size=500), length=st.none() | st.integers(0, 600))
@reuse_folder
def test_random_bytes_are_refused(tmp_path, content, length):
    if length is not None:
        content = length.to_bytes(8, "little") + content
    assert read_or_refuse(tmp_path / "a.npad", content) is None


@given(data=st.data())
@settings(reuse_folder, max_examples=300)
def test_edited_bytes_are_refused(path, content, data):
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, min(begin + 20, len(content))))
    edited = content[:begin] + data.draw(st.binary(max_size=20)) + content[end:]
    assert (read_or_refuse(path, edited) is None) == (edited != content)


@given(data=st.data())
@settings(reuse_folder, max_examples=300)
def test_forged_tables_are_refused_or_read(path, content, data):
    """Any JSON in place of any part of the table, under a checksum that is right."""
    table, raw = split(content)
    name = data.draw(st.sampled_from([*table, "new"]))
    field = data.draw(st.sampled_from([None, "dtype", "shape", "data_offsets", "npad"]))
    value = data.draw(json_values | st.lists(st.integers(-1, 1 << 65), max_size=4))
    if field is None or name not in table:
        table[name] = value
    else:
        table[name][field] = value
    result = read_or_refuse(path, sign(join(table, raw)))
    if result is not None:
        header, tensors = result
        assert header == HEADER
        assert sum(tensor.nbytes for tensor in tensors.values()) == len(raw)


# Shapes and dtypes that the header calls for


def test_check_tensors():
    tensors = make_tensors()
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    check_tensors("a.npad", tensors, expected)
    with pytest.raises(ModelFileError, match=r"^a\.npad: tensor 'mean' is missing"):
        check_tensors("a.npad", {k: v for k, v in tensors.items() if k != "mean"}, expected)
    with pytest.raises(ModelFileError, match=r"^a\.npad: tensor 'extra' is no part of the model"):
        check_tensors("a.npad", tensors | {"extra": torch.zeros(1)}, expected)
    with pytest.raises(ModelFileError, match=r"must be .*32 of shape \(6, 4\), got .* \(6, 5\)"):
        check_tensors("a.npad", tensors, expected | {"mean": (torch.float32, (6, 4))})
    with pytest.raises(ModelFileError, match=r"'count' must be torch.int32 .* got torch.int64"):
        check_tensors("a.npad", tensors, expected | {"count": (torch.int32, (6,))})
