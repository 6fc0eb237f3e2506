"""Models to folders in Hugging Face layout, which transformers and vLLM load as they are.

The value head and the backbone of a separate critic, which no class of theirs knows, are in a
subfolder, `critic/`. A network with adapters is written as the model that they make, and they
alone, for `peft`, to another, `adapter/`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ppo_jax.files import replacing_folder, write_json
from ppo_jax.models.adapter_folder import save_adapter
from ppo_jax.models.config_json import config_to_json
from ppo_jax.models.heads import HistogramHead, PolicyValueNetwork, RewardModel
from ppo_jax.models.lora import has_adapters, merged
from ppo_jax.models.safetensors_folder import OWN_FILES, WEIGHTS, write_tensors
from ppo_jax.models.tensor_names import tensor_names
from qwen_env.errors import UsageError
from qwen_env.tokenizer import Tokenizer


class Generation(NamedTuple):
    """How the policy draws tokens, for those who load it elsewhere; as in `ppo_jax.sampling`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None


def save_pretrained(
    network: PolicyValueNetwork,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    generation: Generation | None = None,
    base_model: str | None = None,
) -> None:
    """Write a folder that `load_pretrained` and `transformers.AutoModelForCausalLM` both load.

    An existing model folder is replaced, and only once the new one is complete and on the disk: a
    reader finds the old one or the new one.

    Args:
        tokenizer: written beside the model, its end-of-sequence and padding ids into the model's
            configs.
        generation: what transformers and vLLM shall use unless told otherwise, written to
            `generation_config.json`.
        base_model: the name or path of the model that the adapters were trained on, if there are
            any.

    Raises:
        UsageError: `folder` is a file, or holds something that is not a model.
        RunError: it cannot be written.
    """
    with _replacing(Path(folder)) as new:
        _save_model(network, "ForCausalLM", new, tokenizer, generation, base_model)


def save_reward_model(
    model: RewardModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    base_model: str | None = None,
) -> None:
    """Write a folder that `load_reward_model` and `AutoModelForSequenceClassification` load.

    Folders are replaced, and adapters written, as in `save_pretrained`.
    """
    with _replacing(Path(folder)) as new:
        _save_model(model, "ForSequenceClassification", new, tokenizer, base_model=base_model)


def _save_model(
    network: PolicyValueNetwork | RewardModel,
    head: str,
    folder: Path,
    tokenizer: Tokenizer | None,
    generation: Generation | None = None,
    base_model: str | None = None,
) -> None:
    if has_adapters(network):
        save_adapter(network, folder / "adapter", base_model)
        network = merged(network)
    config = config_to_json(network.config, head)
    if isinstance(network, RewardModel):
        config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    defaults = {} if generation is None else _sampling_defaults(generation)
    if tokenizer is not None:
        config["pad_token_id"] = defaults["pad_token_id"] = tokenizer.pad_token_id
        if tokenizer.eos_token_ids:
            config["eos_token_id"] = tokenizer.eos_token_ids[0]
            defaults["eos_token_id"] = list(tokenizer.eos_token_ids)
        tokenizer.save(folder)
    if defaults:
        write_json(folder / "generation_config.json", defaults)
    tensors: dict[str, dict[str, np.ndarray]] = {}  # by file
    for path, variable in nnx.to_flat_state(nnx.state(network, nnx.Param)):
        array = np.asarray(variable.get_value())
        parts = array if "layers" in path else [array]
        names = tensor_names(path, network.config.num_hidden_layers)
        for name, part in zip(names, parts, strict=True):
            prefix = next((prefix for prefix in OWN_FILES if name.startswith(prefix)), "")
            own = tensors.setdefault(OWN_FILES.get(prefix, WEIGHTS), {})
            own[name.removeprefix(prefix)] = np.ascontiguousarray(part)
    value_head = getattr(network, "value_head", None)
    if isinstance(value_head, HistogramHead):
        limits = np.array([value_head.low, value_head.high])
        tensors[OWN_FILES["value_head."]]["range"] = limits
    config["dtype"] = str(tensors[WEIGHTS]["model.norm.weight"].dtype)
    write_json(folder / "config.json", config)
    for file, content in tensors.items():
        write_tensors(content, folder / file)


def _sampling_defaults(generation: Generation) -> dict[str, Any]:
    """What transformers and vLLM call it. Their own defaults differ: what is not used is said."""
    limit = generation.max_new_tokens
    return {
        "do_sample": True,
        "temperature": generation.temperature,
        "top_k": generation.top_k or 0,
        "top_p": 1.0 if generation.top_p is None else generation.top_p,
        **({} if limit is None else {"max_new_tokens": limit}),
    }


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder`, unless that holds something else."""
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder to save the model in.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UsageError(
            f"{folder} holds something that is not a model and would be replaced; name another "
            "folder to save the model in."
        )
    with replacing_folder(folder) as new:
        yield new
