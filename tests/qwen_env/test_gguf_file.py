"""Our reader of GGUF against the `gguf` package's, and against damaged files."""

import itertools
import os
import struct
import time

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_env import gguf_file
from qwen_env.errors import UsageError
from qwen_env.gguf_file import open_gguf

TYPES = gguf.GGUFValueType
NUMBERS = itertools.count()


def write(path, *, split=None, alignment=None):
    """A file with metadata of every type, and tensors of several."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        writer.add_key_value(name, 100, TYPES[name.upper()])
    for name in ("float32", "float64"):
        writer.add_key_value(name, 0.25, TYPES[name.upper()])
    writer.add_bool("bool", True)
    writer.add_string("string", "naïve 世界\n")
    writer.add_array("strings", ["a", "", "ü"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [1.5, -2.0])
    writer.add_array("bools", [True, False])
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
    for i, kind in enumerate(("F32", "F16", "Q8_0", "Q4_0", "BF16")):
        rows = rng.normal(size=(3, 2, 64)).astype(np.float32)
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"tensor{i}", gguf.quantize(rows, kind), raw_dtype=kind)
    writer.add_tensor("odd", np.arange(7, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "sound.gguf").read_bytes()


@pytest.mark.parametrize("alignment", [None, 64])
def test_it_reads_what_the_gguf_package_reads(tmp_path, alignment):
    path = write(tmp_path / "m.gguf", alignment=alignment)
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    expected = {key: f.contents() for key, f in theirs.fields.items() if "GGUF." not in key}
    assert {key: field.contents() for key, field in ours.fields.items()} == expected
    for our, their in zip(ours.tensors, theirs.tensors, strict=True):
        assert (our.name, our.tensor_type) == (their.name, their.tensor_type)
        assert our.shape.tolist() == their.shape.tolist()
        assert our.data.dtype == their.data.dtype
        np.testing.assert_array_equal(our.data, their.data)


def test_the_header_is_read_once_a_file(tmp_path, monkeypatch):
    parsed = []
    parse = gguf_file._parse
    monkeypatch.setattr(gguf_file, "_parse", lambda mapped: parsed.append(1) or parse(mapped))
    path = write(tmp_path / "m.gguf")
    first = open_gguf(path)
    assert open_gguf(str(path)) is first
    assert len(parsed) == 1
    write(path, alignment=64)
    assert open_gguf(path) is not first


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_a_model_is_refused(tmp_path, part):
    path = write(tmp_path / "m.gguf", split=(part, 2))
    with pytest.raises(UsageError, match=rf"m.gguf is part {part + 1} of .* 2 files; join them"):
        open_gguf(path)
    assert open_gguf(write(tmp_path / "whole.gguf", split=(0, 1))).tensors


def field(name, kind, value):
    """An entry of the metadata, by hand."""
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def header(*fields, tensors=b"", num_tensors=0, version=3):
    return (
        b"GGUF"
        + struct.pack("<IQQ", version, num_tensors, len(fields))
        + b"".join(fields)
        + tensors
    )


def tensor(name=b"t", dims=(32,), kind=0, offset=0):
    return (
        struct.pack("<Q", len(name)) + name
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)
    )  # fmt: skip


ENDLESS = 2**60
NESTED = struct.pack("<IQ", 9, 1) * 2000 + struct.pack("<IQ", 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot mmap an empty file"),
        (b"not a model at all", "does not begin with the letters GGUF"),
        (b"GGUF", "ends in the middle of its header, at byte 4"),
        (header(version=1), "version 1 of the format cannot be read"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648 of the format"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, ENDLESS), "ends in the middle"),
        (b"GGUF" + struct.pack("<IQQ", 3, ENDLESS, 0), "ends in the middle"),
        (header(field(b"a", 9, struct.pack("<IQ", 0, ENDLESS))), "ends in the middle"),
        (header(field(b"a", 9, struct.pack("<IQ", 8, ENDLESS))), "ends in the middle"),
        (header(field(b"a", 9, struct.pack("<IQ", 12, 2**64 - 1))), "ends in the middle"),
        (header(field(b"a", 8, struct.pack("<Q", ENDLESS))), "ends in the middle"),
        (header(field(b"a", 9, NESTED)), "an array of arrays"),
        (header(field(b"a", 77, b"")), "metadata of the unknown type 77"),
        (header(field(b"a", 9, struct.pack("<IQ", 77, 1))), "metadata of the unknown type 77"),
        (header(field(b"a", 7, b"\1"), field(b"a", 7, b"\1")), "holds a twice"),
        (header(field(b"\xff", 7, b"\1")), "can't decode byte 0xff"),
        (header(field(b"general.alignment", 4, struct.pack("<I", 24))), "24, which is no power"),
        (header(field(b"general.alignment", 4, struct.pack("<I", 0))), "0, which is no power"),
        (header(field(b"general.alignment", 8, struct.pack("<Q", 0))), "'', which is no power"),
        (header(field(b"split.count", 8, struct.pack("<Q", 0))), "split.count is ''"),
        (header(tensors=tensor(), num_tensors=1), "ends before tensor t does"),
        (header(tensors=tensor(dims=(ENDLESS, ENDLESS)), num_tensors=1), "ends before tensor t"),
        (header(tensors=tensor(dims=(1,) * 9), num_tensors=1), "tensor t has 9 dimensions"),
        (header(tensors=tensor(dims=()), num_tensors=1), "tensor t has 0 dimensions"),
        (header(tensors=tensor(kind=999), num_tensors=1), "tensor t is of type 999"),
        (header(tensors=tensor(dims=(33,), kind=8), num_tensors=1), "rows of 33, not of whole 32s"),
        (header(tensors=tensor(offset=32), num_tensors=1), "begins at 32 instead of 0"),
        (
            header(tensors=tensor(dims=(0,)) * 2, num_tensors=2) + bytes(999),
            "holds tensor t twice",
        ),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(UsageError, match=rf"m.gguf is not a GGUF file: .*{message}"):
        open_gguf(path)
    assert time.monotonic() - start < 2


@settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_damage(sound, tmp_path, data):
    """A sentence, or what the package reads of the same file."""
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 1200))
        content[at] = data.draw(st.sampled_from([0, 1, 2, 9, 127, 255]) | st.integers(0, 255))
    del content[data.draw(st.just(len(content)) | st.integers(0, len(content))) :]
    path = tmp_path / f"{next(NUMBERS)}.gguf"
    path.write_bytes(content)
    try:
        ours = open_gguf(path)
    except UsageError as error:
        assert str(path) in str(error)
        return
    theirs = gguf.GGUFReader(path)
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    for key, entry in ours.fields.items():
        np.testing.assert_array_equal(entry.contents(), theirs.fields[key].contents())


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UsageError, match="is a pipe; it must be a file"):
        open_gguf(tmp_path / "pipe.gguf")
    with pytest.raises(UsageError, match=r"none.gguf: no such file"):
        open_gguf(tmp_path / "none.gguf")
