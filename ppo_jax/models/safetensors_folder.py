"""The tensors of a folder in Hugging Face layout, read one at a time."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qwen_env.errors import UsageError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"
CRITIC = "critic.safetensors"
OWN_FILES = {"value_head.": VALUE_HEAD, "critic.": CRITIC}
"""Where tensors are that no Hugging Face class knows, by what their names here begin with."""


class SafetensorsFolder:
    """The weights of a folder, one file or many with an index; each tensor is read when asked.

    Those of `value_head.safetensors` and `critic.safetensors` have that name before their own.
    """

    def __init__(self, folder: Path):
        self.where = str(folder)
        self.config_where = str(folder / "config.json")
        self.config = _read_json(folder / "config.json")
        self._places: dict[str, tuple[Path, str]] = {}
        if (folder / WEIGHTS).exists():
            self._add(folder / WEIGHTS)
        elif (folder / WEIGHTS_INDEX).exists():
            weight_map = _read_json(folder / WEIGHTS_INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UsageError(f"{folder / WEIGHTS_INDEX} has no weight_map; download it again.")
            for file in sorted(set(weight_map.values())):
                self._add(folder / file)
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            raise UsageError(
                f"{folder} has no {WEIGHTS}"
                + (f", only {pickled[0]}, and pickled weights are never loaded" if pickled else "")
                + "; save the model with transformers' save_pretrained to make one."
            )
        for prefix, file in OWN_FILES.items():
            if (folder / file).exists():
                self._add(folder / file, prefix)

    @property
    def names(self) -> Collection[str]:
        return self._places.keys()

    def __getitem__(self, name: str) -> np.ndarray:
        path, stored_name = self._places[name]
        with _opened(path) as file:
            return file.get_tensor(stored_name)

    def _add(self, path: Path, prefix: str = "") -> None:
        with _opened(path) as file:
            self._places |= {prefix + name: (path, name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a readable safetensors file: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path.parent} has no {path.name}; a model is a folder in Hugging Face layout "
            "(config.json and model.safetensors)."
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}; it must hold an object.")
    return content
