"""Adapters in folders as `peft` has them: read as the model that they make, and written.

adapter_config.json         the base model, by name or path, and how the adapter is added to it
adapter_model.safetensors   A and B of each linear layer that has an adapter, and whole tensors
base_model.json             only here: a digest of the base model's weights
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ppo_jax.files import write_json
from ppo_jax.models.heads import PolicyValueNetwork, RewardModel
from ppo_jax.models.lora import linear_layers
from ppo_jax.models.safetensors_folder import SafetensorsFiles, read_json, write_tensors
from ppo_jax.models.tensor_source import TensorSource
from qwen_env.errors import UsageError
from qwen_env.files import expand

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."  # of every name, before the base model's own
_BASE = "base_model.json"
_MERGE = "merge it into its model with peft (merge_and_unload) and save that"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (folder / ADAPTER_CONFIG).exists()


def base_of(folder: Path) -> str:
    """The name or path of the model that an adapter belongs to.

    Raises:
        UsageError: the adapter's config cannot be read, or names none.
    """
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UsageError(
            f"{folder / ADAPTER_CONFIG} names no base model; set base_model_name_or_path to the "
            "model that it was trained on."
        )
    return base


class AdaptedTensors:
    """The tensors of a base model with an adapter merged into them, one at a time.

    Raises:
        UsageError: the adapter is of another base model or of a kind that is not computed here, or
            its files are missing or damaged.
    """

    def __init__(self, folder: Path, base: TensorSource):
        path = folder / ADAPTER_WEIGHTS
        if not path.exists():
            raise UsageError(f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter again.")
        self.where, self.config_where, self.config = str(folder), base.config_where, base.config
        self._base, self._settings = base, _read_settings(folder)
        self._files = SafetensorsFiles()
        self._files.add(path)
        self._adapted: dict[str, tuple[str, str]] = {}  # of the base's tensors, names of A and B
        self._whole: dict[str, str] = {}  # of tensors in the base's place, names in the file
        for name in self._files.shapes:
            module, is_a, _ = name.removeprefix(_PREFIX).partition(".lora_A.weight")
            if is_a:
                other = name.removesuffix("lora_A.weight") + "lora_B.weight"
                self._adapted[f"{module}.weight"] = name, other
            elif not name.endswith(".lora_B.weight"):
                self._whole[name.removeprefix(_PREFIX).replace(".base_layer.", ".")] = name
        for name, (a, b) in self._adapted.items():
            self._check(name, a, b)
        own = {name: self._files.shapes[stored] for name, stored in self._whole.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {**base.shapes, **own}
        if (folder / _BASE).exists() and read_json(folder / _BASE) != self._base_digest():
            raise UsageError(
                f"{folder} is an adapter of another model than {base.where}: the weights are not "
                f"those that it was trained on; set base_model_name_or_path in {ADAPTER_CONFIG} to "
                "that model."
            )

    def read(self, name: str, out: np.ndarray) -> None:
        """Fill `out`, a contiguous array of the tensor's shape, in its own type."""
        if name not in self._adapted:
            self._read_unadapted(name, out)
            return
        weight = np.empty(out.shape, np.float32)
        self._read_unadapted(name, weight)
        a, b = map(self._read_own, self._adapted[name])
        out[...] = weight + self._scale(name, len(a)) * (b @ a)

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors are alike, to the last bit; those that are changed are not."""
        changed = self._adapted.keys() | self._whole.keys()
        return not {first, second} & changed and self._base.are_equal(first, second)

    def _read_unadapted(self, name: str, out: np.ndarray) -> None:
        if name in self._whole:
            self._files.read(self._whole[name], out)
        else:
            self._base.read(name, out)

    def _check(self, name: str, a: str, b: str) -> None:
        shapes, wanted = self._files.shapes, self._base.shapes.get(name)
        found = shapes.get(b, ())[:1] + shapes[a][1:]
        if wanted is None or found != wanted:
            has = "has none of that name" if wanted is None else f"has shape {wanted} there"
            raise UsageError(
                f"{self.where} is an adapter of another model than {self._base.where}: it changes "
                f"{name!a} of shape {found}, but that model {has}; set base_model_name_or_path in "
                f"{ADAPTER_CONFIG} to the model that it was trained on."
            )

    def _read_own(self, stored: str) -> np.ndarray:
        out = np.empty(self._files.shapes[stored], np.float32)
        self._files.read(stored, out)
        return out

    def _scale(self, name: str, rank: int) -> float:
        module, alpha = name.removesuffix(".weight"), self._settings["lora_alpha"]
        for pattern, other in (self._settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = other
                break
        return float(alpha / (rank**0.5 if self._settings.get("use_rslora") else rank))

    def _base_digest(self) -> dict[str, str]:
        name = min(self._adapted)
        weight = np.empty(self._base.shapes[name], np.float32)
        self._base.read(name, weight)
        return _digest(name, weight)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    settings = read_json(path)
    start = settings.get("init_lora_weights")
    changes_base = isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq"))
    others = [name for name in _NOT_COMPUTED if settings.get(name)]
    if settings.get("peft_type") != "LORA":
        others.insert(0, "peft_type")
    if settings.get("bias", "none") != "none":
        others.insert(0, "bias")
    if changes_base:
        others.insert(0, "init_lora_weights")
    if others:
        raise UsageError(
            f"{path} has {others[0]} = {settings.get(others[0])!r}, which is not computed here; "
            f"{_MERGE}."
        )
    if not isinstance(settings.get("lora_alpha"), int | float):
        raise UsageError(f"{path} has no lora_alpha; save the adapter again.")
    return settings


_NOT_COMPUTED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "target_parameters",
    "trainable_token_indices",
)


def _digest(name: str, weight: np.ndarray) -> dict[str, str]:
    """Of a matrix as bfloat16 has it, in which models are stored: alike in whatever type it is."""
    rounded = np.ascontiguousarray(weight.astype(jnp.bfloat16))
    return {name: hashlib.blake2b(rounded.tobytes(), digest_size=16).hexdigest()}


def save_adapter(
    network: PolicyValueNetwork | RewardModel, folder: Path, base_model: str | None
) -> None:
    """Write the adapters of a backbone, as `peft` loads them on the base model; with them goes a
    reward model's head, but not a policy's value head.

    Args:
        base_model: the name or path of the model that has the network's own weights.
    """
    if base_model is not None and (path := expand(base_model)).exists():
        base_model = str(path.absolute())
    adapted = [(n, x, x.adapter) for n, x in linear_layers(network.backbone) if x.adapter]
    _, linear, adapter = adapted[0]
    count, num_layers = len(linear.weight), network.config.num_hidden_layers
    first = num_layers - count  # those below are frozen, and have none
    tensors: dict[str, np.ndarray] = {}
    weights: dict[str, np.ndarray] = {}
    for name, linear, adapter in adapted:
        arrays = [np.asarray(x[...]) for x in (linear.weight, adapter.lora_A, adapter.lora_B)]
        for i, (weight, a, b) in enumerate(zip(*arrays, strict=True), first):
            module = f"model.layers.{i}.{name}"
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
            weights[f"{module}.weight"] = weight
    if is_scorer := isinstance(network, RewardModel):
        tensors[f"{_PREFIX}score.weight"] = np.asarray(network.score.weight[...])
    write_tensors(tensors, folder / ADAPTER_WEIGHTS)
    write_json(folder / _BASE, _digest(min(weights), weights[min(weights)]))
    rank = adapter.lora_A.shape[-2]
    write_json(
        folder / ADAPTER_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS" if is_scorer else "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": rank,
            "lora_alpha": adapter.scale * rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name, *_ in adapted}),
            "layers_to_transform": list(range(first, num_layers)) if first else None,
            "modules_to_save": ["score"] if is_scorer else None,
            "inference_mode": True,
        },
    )
