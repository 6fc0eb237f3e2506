"""From what a person writes to a reward function."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl

from qwen_env.errors import UsageError
from qwen_env.importing import import_attribute
from qwen_env.rewards.addresses import redacted, shown
from qwen_env.rewards.base import RewardFn, describe, is_ctrl_c, may_be_named, place
from qwen_env.rewards.weighted_sum import WeightedSum, weight_and_reward

FORMS = (
    "'package.module:callable', 'hf:FOLDER_OR_HUB_ID', 'http://HOST:PORT/PATH', or a weighted sum "
    "such as '1.0 * a.b:c + 0.2 * d.e:f'"
)

_HUGGINGFACE_OPTIONS: dict[str, Callable[[str], Any]] = {
    "label": str,
    "device": str,
    "dtype": str,
    "batch_size": int,
    "max_length": int,
}

_WEIGHTED = re.compile(r"\s*(?P<weight>[^:/*]*?)\s*\*(?P<spec>.*)")


Schemes = Mapping[str, Callable[[str], RewardFn]]


def load_reward(spec: Any, schemes: Schemes = MappingProxyType({})) -> RewardFn:
    """The reward function that `spec` names or is.

    Args:
        spec: a reward function; or a string:

            - `"package.module:callable"`: a function, an instance, or a class that takes no
              arguments; the current directory is importable;
            - `"hf:FOLDER_OR_HUB_ID"`: a sequence-classification model, run by `transformers`;
              options may follow: `"hf:FOLDER?device=cuda&dtype=bfloat16&batch_size=64"`;
            - `"http://HOST:PORT/PATH"`: a reward server, see `qwen_env.rewards.http`;
            - `"1.0 * SPEC + 0.2 * SPEC"`: a weighted sum;

            or a mapping `{name: (weight, spec)}`: a weighted sum with named components.
        schemes: further forms of strings: the word before the colon, and what makes a reward
            function from the rest.

    Raises:
        UsageError: no such module, callable or form.
    """
    if isinstance(spec, str):
        if " + " in spec or _WEIGHTED.match(spec):
            return _load_sum(spec, schemes)
        scheme, _, rest = spec.strip().partition(":")
        if scheme in schemes:
            return schemes[scheme](rest)
        if scheme == "flax":
            raise UsageError(
                f"reward {spec!r}: 'flax:' rewards belong to the training entry points; the "
                "environment takes the same folder as 'hf:FOLDER'."
            )
        if scheme == "hf":
            return _load_huggingface(rest)
        if scheme.lower() in ("http", "https"):
            from qwen_env.rewards.http import HTTPReward

            return HTTPReward(spec.strip())
        if scheme and rest and "@" not in rest:  # a mistyped scheme, before a password
            return _load_callable(scheme, rest)
    elif isinstance(spec, Mapping):
        return WeightedSum({name: _load_term(name, term, schemes) for name, term in spec.items()})
    elif callable(spec):
        reward: RewardFn = _instance(spec, spec)
        return reward
    raise UsageError(f"reward is {shown(spec)!r}; give a callable, or a string: {FORMS}.")


def _load_term(name: str, term: Any, schemes: Schemes) -> tuple[float, RewardFn]:
    weight, spec = weight_and_reward(name, term)
    return weight, load_reward(spec, schemes)


def _load_sum(text: str, schemes: Schemes) -> WeightedSum:
    """Components are named after the last part of their spec; after all of it if that is taken."""
    specs: dict[str, tuple[float, str]] = {}  # by how they are shown
    for term in re.split(r"\s\+\s", text):
        match = _WEIGHTED.fullmatch(term)
        factor, spec = match.groups() if match else ("1", term)
        if not (spec := spec.strip()):
            raise UsageError(f"reward {shown(text)!r} has an empty term; write it as {FORMS}.")
        if (whole := redacted(spec)) in specs:
            raise UsageError(f"reward {shown(text)!r} names {whole!r} twice; add up its weights.")
        try:
            specs[whole] = float(factor), spec
        except ValueError:
            raise UsageError(
                f"reward {shown(text)!r}: {factor!r} is not a weight; write it as {FORMS}."
            ) from None
    names = [re.split(r"[:/@]", whole.rstrip("/"))[-1] for whole in specs]
    terms = {}
    for (whole, (weight, spec)), name in zip(specs.items(), names, strict=True):
        is_free = names.count(name) == 1 and may_be_named(name)
        terms[name if is_free else whole] = (weight, load_reward(spec, schemes))
    return WeightedSum(terms)


def _load_huggingface(rest: str) -> RewardFn:
    from qwen_env.rewards.huggingface import HuggingFaceReward

    model, _, query = rest.partition("?")
    if not model:
        raise UsageError(f"reward 'hf:{rest}' names no model; write 'hf:FOLDER_OR_HUB_ID'.")
    options = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        try:
            if not text:
                raise ValueError
            options[name] = _HUGGINGFACE_OPTIONS[name](text)
        except (KeyError, ValueError):
            raise UsageError(
                f"reward 'hf:{rest}': the option {name}={text} is not valid; the options are "
                f"{', '.join(_HUGGINGFACE_OPTIONS)} (the last two are integers)."
            ) from None
    return HuggingFaceReward(model, **options)


def _load_callable(module_name: str, attribute: str) -> RewardFn:
    named = import_attribute("reward", module_name, attribute)
    reward: RewardFn = _instance(named, f"{module_name}:{attribute}")
    if not callable(reward):
        raise UsageError(
            f"reward {module_name}:{attribute}: {module_name} has no callable {attribute!r}."
        )
    return reward


def _instance(reward: Any, name: Any) -> Any:
    """An instance, if `reward` is a class; anything else as it is."""
    if not isinstance(reward, type):
        return reward
    try:
        instance = reward()
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        raise UsageError(
            f"reward {name}: making one without arguments raised {describe(error)}{place(error)}; "
            "name an instance of it instead."
        ) from error
    if not callable(instance):
        raise UsageError(f"reward {name}: an instance of it cannot be called with a batch.")
    return instance
