"""Hugging Face folders in and out: `config.json` and safetensors, never pickle, never remote code.

The modules carry Hugging Face's attribute names, so a tensor's name is its path; only the L layers,
one array here and L tensors there, are stacked and unstacked on the way. The value head, which no
Hugging Face class knows, has a file of its own, `value_head.safetensors`; so has the backbone of a
separate critic, `critic.safetensors`.
"""

import functools
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike
from safetensors.numpy import save_file

from ppo_jax.files import disk_errors, write_json
from ppo_jax.models.config import Qwen2Config
from ppo_jax.models.gguf import GGUFTensors
from ppo_jax.models.heads import PolicyValueNetwork, RewardModel
from ppo_jax.models.safetensors_folder import OWN_FILES, WEIGHTS, SafetensorsFolder
from qwen_env.errors import UsageError
from qwen_env.hub import resolve
from qwen_env.tokenizer import Tokenizer

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]

Network = TypeVar("Network", PolicyValueNetwork, RewardModel)


class TensorSource(Protocol):
    """Tensors by Hugging Face name, wherever they come from."""

    @property
    def where(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]:
        """What a `config.json` would hold."""

    @property
    def config_where(self) -> str: ...

    @property
    def names(self) -> Collection[str]: ...

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
        such a file, else zero; it has a separate critic where there is a `critic.safetensors`.

    Raises:
        UsageError: no such folder, hub unreachable, no safetensors, another architecture, or a
            tensor missing, not finite, or of another shape than `config.json` says.
        gymnasium.error.DependencyNotInstalled: a `.gguf` file without the `gguf` package.
    """
    source: TensorSource
    if str(folder_or_hub_id_or_gguf).endswith(".gguf"):
        source = GGUFTensors(folder_or_hub_id_or_gguf)
    else:
        source = SafetensorsFolder(resolve(folder_or_hub_id_or_gguf, allow_patterns=HUB_PATTERNS))
    has_critic = any(name.startswith("critic.") for name in source.names)
    make = functools.partial(PolicyValueNetwork, separate_critic=has_critic)
    return _load(make, source, dtype, param_dtype)


def load_reward_model(
    folder_or_hub_id: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> RewardModel:
    """Read a `Qwen2ForSequenceClassification` with one label. Errors as in `load_pretrained`."""
    folder = resolve(folder_or_hub_id, allow_patterns=HUB_PATTERNS)
    return _load(RewardModel, SafetensorsFolder(folder), dtype, param_dtype)


def save_pretrained(
    network: PolicyValueNetwork, folder: str | Path, tokenizer: Tokenizer | None = None
) -> None:
    """Write a folder that `load_pretrained` and `transformers.AutoModelForCausalLM` both load.

    An existing model folder is replaced, and only once the new one is complete.

    Raises:
        UsageError: `folder` is a file, holds something that is not a model, or cannot be written.
    """
    with _replacing(Path(folder)) as partial:
        _save_model(network, "Qwen2ForCausalLM", partial, tokenizer)


def save_reward_model(
    model: RewardModel, folder: str | Path, tokenizer: Tokenizer | None = None
) -> None:
    """Write a folder that `load_reward_model` and `AutoModelForSequenceClassification` load.

    Folders are replaced as in `save_pretrained`.
    """
    with _replacing(Path(folder)) as partial:
        _save_model(model, "Qwen2ForSequenceClassification", partial, tokenizer)


def _load(
    make: Callable[..., Network], source: TensorSource, dtype: DTypeLike, param_dtype: DTypeLike
) -> Network:
    config = Qwen2Config.from_huggingface(source.config, source.config_where)
    # A checkpoint may say "tied" and still hold an lm_head; the config decides, as in transformers.
    network = nnx.eval_shape(
        lambda: make(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
    )
    graphdef, state = nnx.split(network)
    filled = [
        (path, variable.replace(_read_parameter(source, config, path, variable.get_value())))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _read_parameter(
    source: TensorSource, config: Qwen2Config, path: tuple[Any, ...], like: jax.ShapeDtypeStruct
) -> jax.Array:
    out = np.empty(like.shape, like.dtype)
    parts = out if "layers" in path else [out]
    for name, part in zip(_tensor_names(path, config), parts, strict=True):
        if name in source.names:
            tensor = source[name]
            if tensor.shape != part.shape:
                raise UsageError(
                    f"{source.where}: tensor {name} has shape {tensor.shape}, but by "
                    f"{source.config_where} it is {part.shape}; the two are of different models."
                )
            part[...] = tensor
            if not np.isfinite(part).all():
                raise UsageError(
                    f"{source.where}: tensor {name} holds numbers that are not finite; it is "
                    "damaged, or of a model that has diverged: take another."
                )
        elif _may_be_absent(name, source):
            part[...] = 0
        else:
            raise UsageError(f"{source.where}: tensor {name} is missing from the weights.")
    return jnp.asarray(out)


def _may_be_absent(name: str, source: TensorSource) -> bool:
    """Whether a tensor that is not there stands for zeros."""
    if name.startswith("value_head."):
        return not any(other.startswith("value_head.") for other in source.names)
    return name.endswith(".bias") and source.config["model_type"] == "llama"


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
        case ("critic", *rest):
            return ["critic." + name for name in _tensor_names(("backbone", *rest), config)]
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
    if isinstance(network, RewardModel):
        config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    if tokenizer is not None:
        special: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
        if tokenizer.eos_token_ids:
            special["eos_token_id"] = list(tokenizer.eos_token_ids)
            config["eos_token_id"] = tokenizer.eos_token_ids[0]
        config["pad_token_id"] = tokenizer.pad_token_id
        write_json(folder / "generation_config.json", special)
        tokenizer.save(folder)
    tensors: dict[str, dict[str, np.ndarray]] = {}  # by file
    for path, variable in nnx.to_flat_state(nnx.state(network, nnx.Param)):
        array = np.asarray(variable.get_value())
        parts = array if "layers" in path else [array]
        for name, part in zip(_tensor_names(path, network.config), parts, strict=True):
            prefix = next((prefix for prefix in OWN_FILES if name.startswith(prefix)), "")
            own = tensors.setdefault(OWN_FILES.get(prefix, WEIGHTS), {})
            own[name.removeprefix(prefix)] = np.ascontiguousarray(part)
    config["dtype"] = str(tensors[WEIGHTS]["model.norm.weight"].dtype)
    write_json(folder / "config.json", config)
    for file, content in tensors.items():
        _save(content, folder / file)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for the owner alone


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends without an error."""
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder to save the model in.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UsageError(
            f"{folder} holds something that is not a model and would be replaced; name another "
            "folder to save the model in."
        )
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        with disk_errors(folder):
            new.mkdir()
            yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
