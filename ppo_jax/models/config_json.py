"""`config.json`, read and written.

What this port computes with is read below. A key by which transformers, or another library that
loads such folders, would compute something else must have its neutral value. All other keys pass:
transformers makes of a key that it does not know an attribute that nothing reads, and the folders
of fine-tuned models are full of them (`unsloth_version`, `_name_or_path`). Those that it knows and
that change nothing (`use_cache`, `initializer_range`, ...) are listed, with reasons, in the tests,
which hold each to be harmless.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from ppo_jax.models.config import (
    MODEL_TYPES,
    ROPE_SCALINGS,
    DecoderConfig,
    RopeScaling,
    check_flag,
    check_number,
    check_size,
)
from qwen_env.errors import UsageError

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_chunk_size": (),
    "per_layer_config": ({},),
    "quantization_config": (),
    "compression_config": (),
    "kv_sharing_modes": (),
    # transformers has these for other architectures, vLLM or a fork for this one.
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "use_qk_norm": (False,),
}
"""Keys that may change the computation, and their values that do not; null never does."""

_FULL_ATTENTION = ("full_attention", "attention")  # in `layer_types`, new spelling and old


def config_from_json(content: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """The architecture that the contents of a `config.json` describe.

    Args:
        where: how messages call what was read.

    Raises:
        UsageError: another architecture, a key missing, of a wrong type or out of range, or a
            variant this port does not compute (sliding-window attention, quantised weights, ...).
    """
    model_type = content.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UsageError(
            f"{where} describes a model of type {reprlib.repr(model_type)}; this port reads "
            f"{', '.join(MODEL_TYPES[:-1])} and {MODEL_TYPES[-1]} models (Qwen2.5-0.5B and its "
            "relatives)."
        )
    try:
        return _read(content)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _read(content: Mapping[str, Any]) -> DecoderConfig:
    model_type = content["model_type"]
    for key, neutral in NEUTRAL_VALUES.items():
        # Qwen2 has biases on q, k and v whatever that key says.
        if not (key == "attention_bias" and model_type == "qwen2"):
            _check_neutral(key, content.get(key), neutral)

    def required(name: str) -> int:
        if content.get(name) is None:
            raise UsageError(f"there is no {name}, which every model needs.")
        check_size(name, content[name])
        size: int = content[name]
        return size

    hidden_size, heads = required("hidden_size"), required("num_attention_heads")
    layers = required("num_hidden_layers")
    _check_full_attention(content, layers)
    default_positions = 2048 if model_type == "llama" else 32768
    positions = _get(content, "max_position_embeddings", default_positions)
    return DecoderConfig(
        vocab_size=required("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=required("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_get(content, "num_key_value_heads", heads),
        head_dim=_get(content, "head_dim", 128 if model_type == "qwen3" else hidden_size // heads),
        rms_norm_eps=_number("rms_norm_eps", _get(content, "rms_norm_eps", 1e-6)),
        tie_word_embeddings=_get(content, "tie_word_embeddings", False),
        max_position_embeddings=positions,
        model_type=model_type,
        **_rope(content, positions),
    )


def _get(content: Mapping[str, Any], name: str, default: Any) -> Any:
    """A value, or `default` where there is none or null."""
    return default if content.get(name) is None else content[name]


def _number(name: str, value: Any) -> float:
    check_number(name, value)
    return float(value)


def _check_neutral(key: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if value is not None and value not in neutral:
        only = repr(neutral[0]) if neutral else "models without it"
        raise UsageError(f"{key} is {reprlib.repr(value)}; this port computes only {only}.")


def _check_full_attention(content: Mapping[str, Any], layers: int) -> None:
    """Refuse windows; which layers have one is decided as in transformers' config classes."""
    types = content.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise UsageError(f"layer_types is {reprlib.repr(types)}; it must list {layers} layers.")
        for kind in types:
            _check_neutral("layer_types", kind, _FULL_ATTENTION)
        return
    if content["model_type"] == "llama":
        window, first = content.get("sliding_window"), 0
    else:
        is_used = _get(content, "use_sliding_window", False)
        check_flag("use_sliding_window", is_used)
        window = content.get("sliding_window", 4096) if is_used else None
        first = _get(content, "max_window_layers", 28)
    if window is not None and not (isinstance(first, int) and first >= layers):
        raise UsageError(
            f"sliding_window is {reprlib.repr(window)}; this port computes only full attention."
        )


def _rope(content: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """The base of the rotary angles and their scaling, as fields of a `DecoderConfig`."""
    settings = _rope_settings(content)
    _check_neutral("partial_rotary_factor", settings.pop("partial_rotary_factor", None), (1.0,))
    theta = _number("rope_theta", settings.pop("rope_theta", 10_000.0))
    kind = settings.pop("rope_type", "default")
    scaling = None
    if kind != "default":
        settings.setdefault("original_max_position_embeddings", max_position_embeddings)
        scaling = _rope_scaling(kind, settings)
    for name, value in settings.items():
        _check_neutral(f"{reprlib.repr(name)} of {reprlib.repr(kind)} RoPE", value, ())
    return {"rope_theta": theta, "rope_scaling": scaling}


def _rope_scaling(kind: Any, settings: dict[str, Any]) -> RopeScaling:
    """The scaling of that `rope_type`, of settings that are taken out of `settings`."""
    names = [name for name in ROPE_SCALINGS if name == kind]
    if not names:
        known = ", ".join(map(repr, ROPE_SCALINGS))
        raise UsageError(
            f"rope_type is {reprlib.repr(kind)}; this port computes only 'default', {known}."
        )
    scaling = ROPE_SCALINGS[names[0]]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(scaling):
        if field.name in settings:
            value = settings.pop(field.name)
            is_exact = field.type in (int, bool)
            values[field.name] = value if is_exact else _number(field.name, value)
        elif field.default is dataclasses.MISSING:
            raise UsageError(f"there is no {field.name}, which RoPE of type {kind!r} needs.")
    return scaling(**values)


def _rope_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """All that is said of RoPE, by transformers 5's names.

    It groups these settings. Before, there was a group for scaling alone, whose `rope_type` was
    first called `type`, and the rest stood at the top level.
    """
    group: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        found = _get(content, name, {})
        if not isinstance(found, dict):
            raise UsageError(f"{name} is {reprlib.repr(found)}; it must be an object.")
        if found and group and found != group:
            raise UsageError(
                "rope_parameters and rope_scaling differ; leave one of them, with all that is said "
                "of RoPE."
            )
        group = group or found
    settings = {key: value for key, value in group.items() if value is not None}

    def settle(name: str, other: Any) -> None:
        """Take a setting from elsewhere too, where it must be the same."""
        if other is not None and settings.setdefault(name, other) != other:
            raise UsageError(
                f"{name} is {reprlib.repr(other)} and, with the other settings of RoPE, "
                f"{reprlib.repr(settings[name])}; leave one of them."
            )

    settle("rope_type", settings.pop("type", None))
    settle("rope_theta", content.get("rope_theta"))
    settle("partial_rotary_factor", content.get("partial_rotary_factor"))
    if settings.get("rope_type", "default") != "default":
        settle("original_max_position_embeddings", content.get("original_max_position_embeddings"))
    return settings


def config_to_json(config: DecoderConfig, head: str = "ForCausalLM") -> dict[str, Any]:
    """The contents of a `config.json` that transformers loads as what the config describes.

    Args:
        head: the end of the name of transformers' class.
    """
    family = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[config.model_type]
    sizes = dataclasses.asdict(config)
    del sizes["rope_scaling"]
    return {
        "architectures": [family + head],
        **sizes,
        **_rope_scaling_to_json(config.rope_scaling),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **({} if config.model_type == "llama" else {"use_sliding_window": False}),
    }


def _rope_scaling_to_json(scaling: RopeScaling | None) -> dict[str, Any]:
    """In the spelling that transformers 4, transformers 5 and vLLM read."""
    if scaling is None:
        return {}
    [kind] = [name for name, known in ROPE_SCALINGS.items() if isinstance(scaling, known)]
    settings = {
        field.name: getattr(scaling, field.name)
        for field in dataclasses.fields(scaling)
        if getattr(scaling, field.name) != field.default
    }
    return {"rope_scaling": {"rope_type": kind, **settings}}
