"""The tensors of a folder in Hugging Face layout, read one at a time; and files of tensors."""

import json
import reprlib
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ppo_jax.models.config import DecoderConfig
from ppo_jax.models.config_json import config_from_json
from qwen_env.errors import UsageError, reason
from qwen_env.files import is_file, json_error, read_text, unique_keys

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

OWN_FILES = {"value_head.": "critic/value_head.safetensors", "critic.": f"critic/{WEIGHTS}"}
"""Where tensors are that no Hugging Face class knows, by what their names here begin with: in a
folder of their own, since some loaders take every `*.safetensors` beside the weights."""

_FORMER_FILES = {"value_head.": "value_head.safetensors", "critic.": "critic.safetensors"}

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": jnp.dtype(jnp.bfloat16),
}
_CHUNK = 2**22  # numbers, or bytes, that are read together


class _Stored(NamedTuple):
    """Where a tensor is."""

    path: Path
    name: str
    dtype: str  # as the format calls it
    shape: tuple[int, ...]
    start: int  # its first byte in the file
    size: int  # in bytes


class SafetensorsFiles:
    """Tensors of some files, read one at a time.

    Raises:
        UsageError: a file is missing or damaged, or two hold the same tensor.
    """

    def __init__(self) -> None:
        self._stored: dict[str, _Stored] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, path: Path, prefix: str = "") -> None:
        """All tensors of a file, with `prefix` before their names."""
        for tensor in _read_header(path):
            name = prefix + tensor.name
            if name in self._stored:
                raise UsageError(
                    f"tensor {name!a} is in {self._stored[name].path} and in {path}; remove "
                    "the file that is not of this model."
                )
            self._stored[name], self.shapes[name] = tensor, tensor.shape

    def read(self, name: str, out: np.ndarray) -> None:
        """Fill `out`, a contiguous array of the tensor's shape, in its own type."""
        tensor = self._stored[name]
        if tensor.dtype not in _DTYPES:
            raise UsageError(
                f"{tensor.path}: tensor {name} is stored as {tensor.dtype}; weights must be of "
                f"{', '.join(_DTYPES)}."
            )
        flat, dtype = out.reshape(-1), _DTYPES[tensor.dtype]
        # A float64 beyond float32 becomes infinite, which is noticed as any other infinity.
        with tensor.path.open("rb") as file, np.errstate(over="ignore"):
            file.seek(tensor.start)
            for start in range(0, flat.size, _CHUNK):
                piece = flat[start : start + _CHUNK]
                piece[...] = np.frombuffer(file.read(piece.size * dtype.itemsize), dtype)

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors are stored alike, to the last bit."""
        a, b = self._stored[first], self._stored[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with a.path.open("rb") as file_a, b.path.open("rb") as file_b:
            file_a.seek(a.start)
            file_b.seek(b.start)
            sizes = [min(_CHUNK, a.size - start) for start in range(0, a.size, _CHUNK)]
            return all(file_a.read(size) == file_b.read(size) for size in sizes)


class SafetensorsFolder(SafetensorsFiles):
    """The weights of a model's folder, one file or many with an index.

    Those of the value head and of a separate critic have `value_head.` and `critic.` before their
    own name.

    Raises:
        UsageError: as above, or a file is outside the folder, or the config is not of a model that
            this port computes.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.where = str(folder)
        self.config_where = str(folder / "config.json")
        self.config = read_config(folder)
        for path in _weight_files(folder):
            self.add(path)
        for files in (OWN_FILES, _FORMER_FILES):
            for prefix, file in files.items():
                if (folder / file).exists():
                    self.add(folder / file, prefix)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.exists():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        raise UsageError(
            f"{folder} has no {WEIGHTS}"
            + (f", only {pickled[0]}, and pickled weights are never loaded" if pickled else "")
            + "; save the model with transformers' save_pretrained to make one."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} has no weight_map; download it again.")
    for file in weight_map.values():
        if not isinstance(file, str) or not file.isprintable() or Path(file).name != file:
            raise UsageError(
                f"{index} names {reprlib.repr(file)}, which is no file of its folder; download it "
                "again."
            )
    return [folder / file for file in sorted(set(weight_map.values()))]


def _read_header(path: Path) -> list[_Stored]:
    if not is_file(path):
        raise UsageError(f"{path}: no such file; download the model again.")
    try:
        with safe_open(path, "np"):  # which checks sizes, places and types
            pass
        with path.open("rb") as file:
            [size] = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        quoted = ascii(reason(error))[1:-1]  # it may hold a piece of the file
        raise UsageError(f"{path} is not a readable safetensors file: {quoted}.") from error
    header.pop("__metadata__", None)
    stored = []
    for name, tensor in header.items():
        start, end = tensor["data_offsets"]
        shape = tuple(tensor["shape"])
        stored.append(_Stored(path, name, tensor["dtype"], shape, 8 + size + start, end - start))
    return stored


def write_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file, in a folder that is made if it is not there."""
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for the owner alone


def read_config(folder: Path) -> DecoderConfig:
    """The architecture of the model in a folder.

    Raises:
        UsageError: there is no config; or as `config_from_json`.
    """
    path = folder / "config.json"
    return config_from_json(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in one of the JSON files of a model.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    if not is_file(path):
        raise UsageError(
            f"{path.parent} has no {path.name}; a model is a folder in Hugging Face layout "
            f"(config.json and {WEIGHTS})."
        )
    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {json_error(error)}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}; it must hold an object.")
    return content
