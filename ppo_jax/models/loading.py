"""Models from files: folders in Hugging Face layout and GGUF; never pickle, never remote code.

Every tensor of a file is used, or known to say nothing, or the file is refused.
"""

import dataclasses
import functools
import mmap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from ppo_jax.algorithm import Bins
from ppo_jax.mesh import from_host
from ppo_jax.models.adapter_folder import ADAPTER_CONFIG, AdaptedTensors, base_of, is_adapter
from ppo_jax.models.config import DecoderConfig
from ppo_jax.models.gguf import GGUFTensors
from ppo_jax.models.heads import PolicyValueNetwork, RewardModel, ValueFunction
from ppo_jax.models.safetensors_folder import SafetensorsFolder, read_config
from ppo_jax.models.tensor_names import HEAD, TABLE, tensor_names
from ppo_jax.models.tensor_source import TensorSource
from qwen_env.errors import UsageError
from qwen_env.files import expand
from qwen_env.hub import resolve

RUN_MODELS = "final", "best"
"""The folders of models in that of a run."""

_VALUE_RANGE = "value_head.range"  # of a head that says a histogram
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]

Network = TypeVar("Network", PolicyValueNetwork, RewardModel, ValueFunction)


def load_pretrained(
    folder_or_hub_id_or_gguf: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> PolicyValueNetwork:
    """Read a language model (Qwen2, Qwen3 or Llama) as a policy with a value head.

    Args:
        folder_or_hub_id_or_gguf: a folder in Hugging Face layout, a hub id such as
            `Qwen/Qwen2.5-0.5B`, or a `.gguf` file; or an adapter as `peft` writes it, which is
            merged into its base model.
        dtype: the compute type.
        param_dtype: the type the parameters are kept in.
        mesh: that they are cut over as they are read, so that no device ever has all of them.

    Returns:
        The network. Its value head and its separate critic are those in the folder's `critic/`,
        where it has such files; else the value head is zero and there is no separate critic.

    Raises:
        UsageError: no such folder, hub unreachable, no safetensors, another architecture, or a
            tensor missing, left over, not finite, or of another shape than `config.json` says.
        gymnasium.error.DependencyNotInstalled: a `.gguf` file without the `gguf` package.
    """

    def load(source: TensorSource) -> PolicyValueNetwork:
        has_critic = any(name.startswith("critic.") for name in source.shapes)
        make = functools.partial(
            PolicyValueNetwork, separate_critic=has_critic, bins=_bins_of(source)
        )
        return _load(make, _settle_tying(source), dtype, param_dtype, mesh)

    return _load_source(folder_or_hub_id_or_gguf, load)


def load_reward_model(
    folder_or_hub_id: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> RewardModel:
    """Read a sequence classifier with one label, such as a `Qwen2ForSequenceClassification`.

    Errors as in `load_pretrained`.
    """

    def load(source: TensorSource) -> RewardModel:
        # Made from a language model, the file may still hold what that wrote tokens with.
        return _load(RewardModel, _Plan(source, source.config, spare=(HEAD,)), dtype, param_dtype)

    return _load_source(folder_or_hub_id, load)


def load_critic(
    folder_or_hub_id: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> ValueFunction:
    """Read a value function: a reward model, or the critic of a saved policy.

    Of a reward model, the score is the value. Of a policy with a separate critic, the policy is not
    read; one whose critic shares its backbone gives that backbone.

    Errors as in `load_pretrained`, and a UsageError where there is neither.
    """

    def load(source: TensorSource) -> ValueFunction:
        names = source.shapes.keys()
        if "score.weight" in names:
            plan = _Plan(source, source.config, (HEAD,), {"value_head.weight": "score.weight"})
        elif not any(name.startswith("value_head.") for name in names):
            raise UsageError(
                f"{source.where} is a language model without a value head, so neither a reward "
                "model nor a saved critic; name a folder of ppo-reward-model, or of a run of "
                "ppo-train."
            )
        elif own := {n.removeprefix("critic."): n for n in names if n.startswith("critic.")}:
            policys = [n for n in names if not n.startswith(("critic.", "value_head."))]
            plan = _Plan(source, source.config, policys, own)
        else:
            plan = _Plan(source, source.config, (HEAD,))
        make = functools.partial(ValueFunction, bins=_bins_of(source))
        return _load(make, plan, dtype, param_dtype, mesh)

    return _load_source(folder_or_hub_id, load)


def base_model_of(folder_or_hub_id_or_gguf: str | Path) -> str | None:
    """The name or path of an adapter's base model; None for a model.

    Errors as in `load_pretrained`.
    """
    if str(folder_or_hub_id_or_gguf).endswith(".gguf"):
        return None
    folder = resolve(folder_or_hub_id_or_gguf, allow_patterns=[ADAPTER_CONFIG])
    return base_of(folder) if is_adapter(folder) else None


def refuse_adapter(base_model: str | Path) -> None:
    """Check that new adapters can be added to a model.

    Raises:
        UsageError: it has an adapter already; or as in `load_pretrained`.
    """
    if (base := base_model_of(base_model)) is not None:
        raise UsageError(
            f"{base_model} is an adapter of {base}, and an adapter of an adapter could not be "
            "loaded elsewhere; merge it into its model first, or leave lora_rank out."
        )


def tokenizer_place(folder_or_hub_id_or_gguf: str | Path) -> str | Path:
    """What holds a model's tokenizer: itself or, for an adapter without one, its base model.

    Errors as in `load_pretrained`.
    """
    base = base_model_of(folder_or_hub_id_or_gguf)
    has_own = (expand(folder_or_hub_id_or_gguf) / "tokenizer.json").exists()
    return folder_or_hub_id_or_gguf if base is None or has_own else base


def model_in(name: str) -> str:
    """The last model of a run, of whatever kind, where `name` is its folder; anything else as it
    is.

    Raises:
        UsageError: the run has saved no model yet.
    """
    folder = Path(name).expanduser()
    if not is_run(folder):
        return name
    for model in RUN_MODELS:
        if (folder / model).is_dir():
            return str(folder / model)
    raise UsageError(f"The run in {folder} has saved no model yet; let it go on, or --resume it.")


def is_run(folder: Path) -> bool:
    """Whether a folder is one that a training command has written."""
    return (folder / "metrics.jsonl").exists() and (folder / "config.json").exists()


def read_max_length(folder_or_hub_id_or_gguf: str | Path) -> int:
    """The longest sequence that a model is made for, from its config, without its weights.

    Errors as in `load_pretrained`.
    """
    name = base_model_of(folder_or_hub_id_or_gguf) or folder_or_hub_id_or_gguf
    if str(name).endswith(".gguf"):
        return GGUFTensors(name).config.max_length
    return read_config(resolve(name, allow_patterns=["config.json"])).max_length


class _Plan(NamedTuple):
    """What a network is made of."""

    source: TensorSource
    config: DecoderConfig
    spare: Collection[str] = ()
    """Tensors that say nothing."""
    aliases: Mapping[str, str] = MappingProxyType({})
    """The names under which some tensors are stored."""


def _bins_of(source: TensorSource) -> Bins | None:
    """Those of a value head that says a histogram; None for one number, or where there is none."""
    if source.shapes.get(_VALUE_RANGE) != (2,):
        return None
    limits = np.zeros(2)
    source.read(_VALUE_RANGE, limits)
    low, high = map(float, limits)
    if not (np.isfinite(limits).all() and low < high):
        raise UsageError(f"{source.where}: tensor {_VALUE_RANGE} is no range; take another model.")
    return Bins(low, high, *source.shapes.get("value_head.bias", (1,)))


def _settle_tying(source: TensorSource) -> _Plan:
    """Whether the output projection is the table of embeddings, decided as in transformers 5.

    Where a config ties the two, and both are stored and differ (one was changed since, or each was
    quantised in its own way), they are not tied. Where one is stored, it is both.
    """
    config = source.config
    if not config.tie_word_embeddings or HEAD not in source.shapes:
        return _Plan(source, config)
    if TABLE not in source.shapes:
        return _Plan(source, config, aliases={TABLE: HEAD})
    if source.are_equal(TABLE, HEAD):
        return _Plan(source, config, spare=(HEAD,))
    return _Plan(source, dataclasses.replace(config, tie_word_embeddings=False))


def _load_source(name: str | Path, load: Callable[[TensorSource], Network]) -> Network:
    """What `load` makes of a model: of one version of it, for a run may replace it meanwhile."""
    if str(name).endswith(".gguf"):
        return load(GGUFTensors(name))
    folder = resolve(name, allow_patterns=HUB_PATTERNS)
    if is_adapter(folder):
        return load(AdaptedTensors(folder, _base_tensors(folder)))
    while True:
        version = _version(folder)
        try:
            network = load(SafetensorsFolder(folder))
        except UsageError:
            if _version(folder) == version:
                raise
        else:
            if _version(folder) == version:
                return network


def _base_tensors(adapter: Path) -> TensorSource:
    base = base_of(adapter)
    if base.endswith(".gguf"):
        return GGUFTensors(base)
    try:
        folder = resolve(base, allow_patterns=HUB_PATTERNS)
    except UsageError as error:
        raise UsageError(
            f"The base model of the adapter {adapter} cannot be read: {error} Or set "
            f"base_model_name_or_path in {adapter / ADAPTER_CONFIG} to where it is."
        ) from error
    if is_adapter(folder):
        raise UsageError(
            f"The base model of the adapter {adapter}, {base}, is an adapter as well; merge that "
            "into its model first (merge_and_unload of the peft package)."
        )
    return SafetensorsFolder(folder)


def _version(folder: Path) -> tuple[int, ...]:
    """Differs from one version of a model's folder to the next."""
    try:
        folder_status, status = folder.stat(), (folder / "config.json").stat()
    except OSError:
        return ()
    return folder_status.st_ino, status.st_ino, status.st_mtime_ns


def _load(
    make: Callable[..., Network],
    plan: _Plan,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    mesh: Mesh | None = None,
) -> Network:
    source, config = plan.source, plan.config
    if config.num_hidden_layers > len(source.shapes):  # before as many names are made
        raise UsageError(
            f"{source.where} holds {len(source.shapes)} tensors, too few for the "
            f"{config.num_hidden_layers} layers of {source.config_where}."
        )
    network = nnx.eval_shape(
        lambda: make(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
    )
    graphdef, state = nnx.split(network)
    parameters = [
        (path, variable, tensor_names(path, config.num_hidden_layers))
        for path, variable in nnx.to_flat_state(state)
    ]
    _check_tensors(
        plan,
        {
            name: variable.get_value().shape[1 if "layers" in path else 0 :]
            for path, variable, names in parameters
            for name in names
        },
    )
    # The largest first: each is for a while there twice, which costs least while there is little.
    parameters.sort(key=lambda parameter: -parameter[1].get_value().size)
    filled = [
        (path, variable.replace(_read_parameter(plan, path, names, variable.get_value(), mesh)))
        for path, variable, names in parameters
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _check_tensors(plan: _Plan, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Before any is read: what is wanted is there, and what is there is wanted."""
    source = plan.source
    for name, shape in wanted.items():
        found = source.shapes.get(plan.aliases.get(name, name))
        if found is None and not _stands_for_zeros(name, source):
            raise UsageError(f"{source.where}: tensor {name} is missing from the weights.")
        if found is not None and found != shape:
            raise UsageError(
                f"{source.where}: tensor {name} has shape {found}, but by {source.config_where} it "
                f"is {shape}; the two are of different models."
            )
    used = {plan.aliases.get(name, name) for name in wanted}.union(plan.spare, (_VALUE_RANGE,))
    # Angles that old versions of transformers saved, and new ones pass over.
    extra = [n for n in source.shapes if n not in used and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        others = f" (as for {len(extra) - 1} others)" if len(extra) > 1 else ""
        raise UsageError(
            f"{source.where}: there is no place for tensor {extra[0]!a}{others} in the model "
            f"that {source.config_where} describes; the two are of different models."
        )


def _stands_for_zeros(name: str, source: TensorSource) -> bool:
    """Whether a tensor may be absent: a value head may, as a whole."""
    prefix = "value_head."
    return name.startswith(prefix) and not any(n.startswith(prefix) for n in source.shapes)


def _read_parameter(
    plan: _Plan,
    path: tuple[Any, ...],
    names: list[str],
    like: jax.ShapeDtypeStruct,
    mesh: Mesh | None,
) -> jax.Array:
    # Memory that begins with a page: of other arrays, JAX makes a copy more on its way.
    memory = mmap.mmap(-1, like.size * like.dtype.itemsize)
    out = np.frombuffer(memory, like.dtype).reshape(like.shape)
    parts = out if "layers" in path else [out]
    for name, part in zip(names, parts, strict=True):
        stored = plan.aliases.get(name, name)
        if stored not in plan.source.shapes:
            part[...] = 0
            continue
        plan.source.read(stored, part)
        if not np.isfinite(part).all():
            raise UsageError(
                f"{plan.source.where}: tensor {name} holds numbers that are not finite; it is "
                "damaged, or of a model that has diverged: take another."
            )
    return from_host(path, out, mesh)
