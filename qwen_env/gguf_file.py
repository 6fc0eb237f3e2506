"""GGUF files, opened: the metadata, and where the tensors lie.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf`
package takes seconds for a vocabulary of 150,000 tokens, and believes whatever a damaged file says
about lengths. This one takes a fraction of a second, and reads nothing that is not in the file.
"""

import math
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen_env.errors import UsageError, reason
from qwen_env.extras import import_extra
from qwen_env.files import expand, is_file

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Types of metadata, as `struct` calls them."""

_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


class Field(NamedTuple):
    """One entry of the metadata."""

    value: Any

    def contents(self) -> Any:
        """The value: a number, a bool, text, or a list of one of these."""
        return self.value.tolist() if isinstance(self.value, np.ndarray) else self.value


class Tensor(NamedTuple):
    """A tensor as it is stored, quantised or not.

    `shape` uint64 [up to 4] is the format's, whose first axis is the contiguous one; `data` has the
    axes in NumPy's order, and bytes along the last one if `tensor_type` is a quantised one.
    """

    name: str
    tensor_type: Any
    shape: np.ndarray
    data: np.ndarray


class GGUFFile(NamedTuple):
    """What a GGUF file holds: metadata by name, and tensors."""

    fields: dict[str, Field]
    tensors: list[Tensor]


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file. The last one stays open: model and tokenizer are in the same file.

    Raises:
        UsageError: no such file, not a GGUF file, a damaged one, or one part of several.
        gymnasium.error.DependencyNotInstalled: the `gguf` package is missing.
    """
    import_extra("gguf", package="gguf")
    path = expand(path)
    if not is_file(path):
        raise UsageError(f"{path}: no such file.")
    status = path.stat()
    version = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return _open(path.resolve(), str(path), version)


@lru_cache(maxsize=1)
def _open(path: Path, name: str, version: tuple[int, ...]) -> GGUFFile:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise UsageError(f"{name} is not a GGUF file: {reason(error)}.") from error
    try:
        return _parse(mapped)
    except _PartOfSeveral as error:
        raise UsageError(
            f"{name} is part {error.args[0]} of a model that is split into {error.args[1]} files; "
            "join them with llama.cpp's llama-gguf-split --merge."
        ) from None
    except ValueError as error:
        raise UsageError(f"{name} is not a GGUF file: {reason(error)}.") from error


class _PartOfSeveral(Exception):
    pass


class _Cursor:
    """Reads a file's header from start to end."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.mapped = mapped
        self.position = 0

    def numbers(self, format: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{format}"
        return struct.unpack_from(layout, self.mapped, self._take(struct.calcsize(layout)))

    def number(self, format: str) -> Any:
        return self.numbers(format)[0]

    def text(self) -> str:
        length = self.number("Q")
        start = self._take(length)
        return self.mapped[start : start + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        return self.number(_format(kind))

    def array(self) -> list[str] | np.ndarray:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            self._take(8 * count, move=False)  # the least that they could take
            return [self.text() for _ in range(count)]
        dtype = np.dtype(_format(kind)).newbyteorder("<")
        start = self._take(count * dtype.itemsize)
        return np.frombuffer(self.mapped, dtype, count, start)

    def _take(self, size: int, *, move: bool = True) -> int:
        """The position of the next `size` bytes."""
        start = self.position
        if size > len(self.mapped) - start:
            raise ValueError(f"it ends in the middle of its header, at byte {start}")
        self.position += size * move
        return start


def _format(kind: int) -> str:
    if kind == _ARRAY:
        raise ValueError("it holds an array of arrays, which no model needs")
    if kind not in _SCALARS:
        raise ValueError(f"it holds metadata of the unknown type {kind}")
    return _SCALARS[kind]


def _parse(mapped: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(mapped)
    if mapped[:4] != b"GGUF":
        raise ValueError("it does not begin with the letters GGUF")
    cursor.position = 4
    version = cursor.number("I")
    if version not in (2, 3):
        # A big-endian file has its version's bytes the other way round.
        raise ValueError(f"version {version} of the format cannot be read, only 2 and 3 can")
    num_tensors, num_fields = cursor.numbers("Q", 2)
    fields: dict[str, Field] = {}
    for _ in range(num_fields):
        name = cursor.text()
        if name in fields:
            raise ValueError(f"it holds {name} twice")
        fields[name] = Field(cursor.value(cursor.number("I")))
    _refuse_parts(fields)
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    return GGUFFile(fields, list(_tensors(mapped, cursor.position, infos, _alignment(fields))))


def _refuse_parts(fields: Mapping[str, Field]) -> None:
    number, count = (fields.get(f"split.{name}", Field(0)).value for name in ("no", "count"))
    if not isinstance(number, int) or not isinstance(count, int):
        raise ValueError(f"split.no is {number!r} and split.count is {count!r}, not numbers")
    if count > 1:
        raise _PartOfSeveral(number + 1, count)


def _alignment(fields: Mapping[str, Field]) -> int:
    alignment = fields.get("general.alignment", Field(_DEFAULT_ALIGNMENT)).value
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, which is no power of two")
    return alignment


class _TensorInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _tensor_info(cursor: _Cursor) -> _TensorInfo:
    name, num_dimensions = cursor.text(), cursor.number("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {num_dimensions} dimensions")
    shape = cursor.numbers("Q", num_dimensions)
    return _TensorInfo(name, shape, cursor.number("I"), cursor.number("Q"))


def _tensors(
    mapped: mmap.mmap, header_end: int, infos: Iterable[_TensorInfo], alignment: int
) -> Iterator[Tensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    dtypes = {
        GGMLQuantizationType.F16: np.float16,
        GGMLQuantizationType.F32: np.float32,
        GGMLQuantizationType.F64: np.float64,
        GGMLQuantizationType.I8: np.int8,
        GGMLQuantizationType.I16: np.int16,
        GGMLQuantizationType.I32: np.int32,
        GGMLQuantizationType.I64: np.int64,
    }
    start = _round_up(header_end, alignment)
    offset, names = 0, set()
    for name, shape, kind, declared_offset in infos:
        if name in names:
            raise ValueError(f"it holds tensor {name} twice")
        names.add(name)
        if declared_offset != offset:
            raise ValueError(f"tensor {name} begins at {declared_offset} instead of {offset}")
        try:
            tensor_type = GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"tensor {name} is of type {kind}, which is unknown") from None
        block, block_bytes = GGML_QUANT_SIZES[tensor_type]
        if shape[0] % block:
            raise ValueError(f"tensor {name} has rows of {shape[0]}, not of whole {block}s")
        size = math.prod(shape) // block * block_bytes
        if start + offset + size > len(mapped):
            raise ValueError(f"it ends before tensor {name} does; it is not whole")
        data = np.frombuffer(mapped, np.uint8, size, start + offset)
        if tensor_type in dtypes:
            data = data.view(dtypes[tensor_type]).reshape(shape[::-1])
        else:
            data = data.reshape(*shape[:0:-1], shape[0] // block * block_bytes)
        yield Tensor(name, tensor_type, np.array(shape, np.uint64), data)
        offset += _round_up(size, alignment)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
