"""Hugging Face folders in and out: `config.json` and safetensors, never pickle, never remote code.

The modules carry Hugging Face's attribute names, so a tensor's name is its path; only the L layers,
one array here and L tensors there, are stacked and unstacked on the way. The value head, which no
Hugging Face class knows, has a file of its own, `value_head.safetensors`.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from ppo_jax.models.config import Qwen2Config
from ppo_jax.models.gguf import GGUFFile
from ppo_jax.models.heads import PolicyValueNetwork, RewardModel
from qwen_env.errors import UsageError
from qwen_env.hub import resolve
from qwen_env.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]

Network = TypeVar("Network", PolicyValueNetwork, RewardModel)


class TensorSource(Protocol):
    """Tensors by Hugging Face name, wherever they come from."""

    where: str

    @property
    def config(self) -> dict[str, Any]: ...

    def __contains__(self, name: str, /) -> bool: ...

    def __getitem__(self, name: str, /) -> np.ndarray: ...


def load_pretrained(
    folder_or_hub_id_or_gguf: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> PolicyValueNetwork:
    """Read a Qwen2 (or bias-free Llama) language model as a policy with a value head.

    Args:
        folder_or_hub_id_or_gguf: a folder in Hugging Face layout, a hub id such as
            `Qwen/Qwen2.5-0.5B`, or a `.gguf` file.
        dtype: the compute type.
        param_dtype: the type the parameters are kept in.

    Returns:
        The network. Its value head is the one in `value_head.safetensors` where the folder has
        such a file, else zero.

    Raises:
        UsageError: no such folder, hub unreachable, no safetensors, another architecture, or a
            tensor missing or of another shape than `config.json` says.
    """
    source: TensorSource
    if str(folder_or_hub_id_or_gguf).endswith(".gguf"):
        source = GGUFFile(folder_or_hub_id_or_gguf)
        value_head = None
    else:
        folder = resolve(str(folder_or_hub_id_or_gguf), allow_patterns=HUB_PATTERNS)
        source = SafetensorsFolder(folder)
        value_head = folder / VALUE_HEAD
    network = _load(PolicyValueNetwork, source, dtype, param_dtype)
    if value_head is not None and value_head.exists():
        _load_value_head(network, value_head)
    return network


def load_reward_model(
    folder_or_hub_id: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> RewardModel:
    """Read a `Qwen2ForSequenceClassification` with one label. Errors as in `load_pretrained`."""
    folder = resolve(str(folder_or_hub_id), allow_patterns=HUB_PATTERNS)
    return _load(RewardModel, SafetensorsFolder(folder), dtype, param_dtype)


def save_pretrained(
    network: PolicyValueNetwork, folder: str | Path, tokenizer: Tokenizer | None = None
) -> None:
    """Write a folder that `load_pretrained` and `transformers.AutoModelForCausalLM` both load.

    An existing folder is replaced only once the new one is complete.
    """
    with _replacing(Path(folder)) as partial:
        _save_model(network, "Qwen2ForCausalLM", partial, tokenizer)
        head = nnx.to_flat_state(nnx.state(network.value_head))
        _save(
            {str(name): np.asarray(param.get_value()) for (name,), param in head},
            partial / VALUE_HEAD,
        )


def save_reward_model(
    model: RewardModel, folder: str | Path, tokenizer: Tokenizer | None = None
) -> None:
    """Write a folder that `load_reward_model` and `AutoModelForSequenceClassification` load."""
    with _replacing(Path(folder)) as partial:
        _save_model(model, "Qwen2ForSequenceClassification", partial, tokenizer)


class SafetensorsFolder:
    """The weights of a folder, one file or many with an index; each tensor is read when asked."""

    def __init__(self, folder: Path):
        self.where = str(folder)
        self.config = _read_json(folder / "config.json")
        if (folder / WEIGHTS_INDEX).exists():
            weight_map = _read_json(folder / WEIGHTS_INDEX)["weight_map"]
            self._files = {name: folder / file for name, file in weight_map.items()}
        elif (folder / WEIGHTS).exists():
            with _open(folder / WEIGHTS) as file:
                self._files = dict.fromkeys(file.keys(), folder / WEIGHTS)
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            raise UsageError(
                f"{folder} has no {WEIGHTS}"
                + (f", only {pickled[0]}, and pickled weights are never loaded" if pickled else "")
                + "; save the model with safe_serialization=True."
            )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> np.ndarray:
        with _open(self._files[name]) as file:
            return file.get_tensor(name)


def _load(
    kind: type[Network], source: TensorSource, dtype: DTypeLike, param_dtype: DTypeLike
) -> Network:
    config = Qwen2Config.from_huggingface(source.config, f"{source.where}: config.json")
    # A checkpoint may say "tied" and still hold an lm_head; the config decides, as in transformers.
    network = nnx.eval_shape(
        lambda: kind(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
    )
    graphdef, state = nnx.split(network)
    arrays = {
        path: _read_parameter(source, config, path, variable)
        for path, variable in nnx.to_flat_state(state)
    }
    filled = [(path, variable.replace(arrays[path])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _load_value_head(network: PolicyValueNetwork, path: Path) -> None:
    tensors = load_file(path)
    state = nnx.state(network.value_head)
    for (name,), param in nnx.to_flat_state(state):
        shape = param.get_value().shape
        if name not in tensors or tensors[name].shape != shape:
            raise UsageError(
                f"{path}: {name} should have shape {shape}; remove the file to start from a zero "
                "value head."
            )
        param.set_value(jnp.asarray(tensors[name], jnp.float32))
    nnx.update(network.value_head, state)


def _read_parameter(
    source: TensorSource, config: Qwen2Config, path: tuple[Any, ...], variable: nnx.Variable[Any]
) -> jnp.ndarray:
    shape, dtype = variable.get_value().shape, variable.get_value().dtype
    if path[0] == "value_head":
        return jnp.zeros(shape, dtype)
    names = _tensor_names(path, config)
    stacked = len(names) > 1 or "layers" in path
    out = np.empty(shape, dtype)
    for i, name in enumerate(names):
        part = out[i] if stacked else out
        if name in source:
            tensor = source[name]
            if tensor.shape != part.shape:
                raise UsageError(
                    f"{source.where}: tensor {name} has shape {tensor.shape}, but config.json "
                    f"makes it {part.shape}; the weights and the config are of different models."
                )
            part[...] = tensor.astype(dtype)
        elif path[-1] == "bias" and source.config["model_type"] == "llama":
            part[...] = 0
        else:
            raise UsageError(f"{source.where}: tensor {name} is missing from the weights.")
    return jnp.asarray(out)


def _tensor_names(path: tuple[Any, ...], config: Qwen2Config) -> list[str]:
    """Hugging Face's names of one parameter: L of them for a parameter of the stacked layers."""
    match path:
        case ("backbone", "lm_head"):
            return ["lm_head.weight"]
        case ("backbone", "embed_tokens"):
            return ["model.embed_tokens.weight"]
        case ("backbone", "layers", *rest):
            suffix = ".".join(map(str, rest))
            return [f"model.layers.{i}.{suffix}" for i in range(config.num_hidden_layers)]
        case ("backbone", *rest):
            return ["model." + ".".join(map(str, rest))]
        case _:
            return [".".join(map(str, path))]


def _save_model(
    network: PolicyValueNetwork | RewardModel,
    architecture: str,
    folder: Path,
    tokenizer: Tokenizer | None,
) -> None:
    config = network.config.to_huggingface(architecture)
    if architecture.endswith("SequenceClassification"):
        config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    if tokenizer is not None:
        special = {
            "eos_token_id": list(tokenizer.eos_token_ids),
            "pad_token_id": tokenizer.pad_token_id,
        }
        _write_json(folder / "generation_config.json", special)
        config |= special | {"eos_token_id": tokenizer.eos_token_ids[0]}
        tokenizer.save(folder)
    tensors: dict[str, np.ndarray] = {}
    for path, variable in nnx.to_flat_state(nnx.state(network, nnx.Param)):
        if path[0] == "value_head":
            continue
        array = np.asarray(variable.get_value())
        names = _tensor_names(path, network.config)
        parts = array if "layers" in path else [array]
        tensors.update(
            (name, np.ascontiguousarray(part)) for name, part in zip(names, parts, strict=True)
        )
    config["dtype"] = str(tensors["model.norm.weight"].dtype)
    _write_json(folder / "config.json", config)
    _save(tensors, folder / WEIGHTS)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for the owner alone


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if folder.exists():
            old = partial.with_name(partial.name + "-old")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a readable safetensors file: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{path.parent} has no {path.name}; a model is a folder in Hugging Face layout "
            "(config.json and model.safetensors)."
        ) from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not valid JSON: {error}.") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
