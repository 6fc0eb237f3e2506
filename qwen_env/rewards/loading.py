"""From what a person writes to a reward function."""

import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any
from urllib.parse import parse_qsl

from qwen_env.errors import UsageError
from qwen_env.rewards.base import RewardFn
from qwen_env.rewards.weighted_sum import WeightedSum

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

_WEIGHTED = re.compile(r"(?:(?P<weight>[-+\d.eE]+)\s*\*\s*)?(?P<spec>\S.*)")


def load_reward(spec: Any) -> RewardFn:
    """The reward function that `spec` names or is.

    Args:
        spec: a reward function; or a string:

            - `"package.module:callable"`: a function, an instance, or a class that is made
              without arguments; the current directory is importable;
            - `"hf:FOLDER_OR_HUB_ID"`: a sequence-classification model, run by `transformers`;
              options may follow: `"hf:FOLDER?device=cuda&dtype=bfloat16&batch_size=64"`;
            - `"http://HOST:PORT/PATH"`: a reward server, see `qwen_env.rewards.http`;
            - `"1.0 * SPEC + 0.2 * SPEC"`: a weighted sum;

            or a mapping `{name: (weight, spec)}`: a weighted sum with named components.

    Raises:
        UsageError: no such module, callable or form.
    """
    if isinstance(spec, str):
        if " + " in spec or " * " in spec:
            return _load_sum(spec)
        scheme, _, rest = spec.partition(":")
        if scheme == "hf":
            return _load_huggingface(rest)
        if scheme in ("http", "https"):
            from qwen_env.rewards.http import HTTPReward

            return HTTPReward(spec)
        if scheme and rest:
            return _load_callable(scheme, rest)
    elif isinstance(spec, Mapping):
        return WeightedSum({name: _load_term(name, term) for name, term in spec.items()})
    elif callable(spec):
        return spec
    raise UsageError(f"reward is {spec!r}; give a callable, or a string: {FORMS}.")


def _load_term(name: str, term: Any) -> tuple[float, RewardFn]:
    try:
        weight, spec = term
        return float(weight), load_reward(spec)
    except (TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"the term {name!r} of a weighted sum is {term!r}; it must be (weight, reward)."
        ) from None


def _load_sum(spec: str) -> WeightedSum:
    """Components are named after the last part of their spec."""
    terms: dict[str, tuple[float, RewardFn]] = {}
    for term in spec.split(" + "):
        match = _WEIGHTED.fullmatch(term.strip())
        if match is None:
            raise UsageError(f"reward {spec!r} has an empty term; write it as {FORMS}.")
        name = re.split(r"[:/]", match["spec"].rstrip("/"))[-1]
        if name in terms:
            raise UsageError(f"reward {spec!r} names {name!r} twice; add up its weights.")
        try:
            weight = float(match["weight"] or 1)
        except ValueError:
            raise UsageError(f"reward {spec!r}: {match['weight']!r} is not a weight.") from None
        terms[name] = (weight, load_reward(match["spec"]))
    return WeightedSum(terms)


def _load_huggingface(rest: str) -> RewardFn:
    from qwen_env.rewards.huggingface import HuggingFaceReward

    model, _, query = rest.partition("?")
    options = {}
    for name, text in parse_qsl(query):
        try:
            options[name] = _HUGGINGFACE_OPTIONS[name](text)
        except (KeyError, ValueError):
            raise UsageError(
                f"reward 'hf:{rest}': the option {name}={text} is not known; there are "
                f"{', '.join(_HUGGINGFACE_OPTIONS)} (the last two are integers)."
            ) from None
    return HuggingFaceReward(model, **options)


def _load_callable(module_name: str, attribute: str) -> RewardFn:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise UsageError(
            f"reward {module_name}:{attribute}: there is no module {module_name!r}; it is looked "
            "for among the installed packages and in the current directory."
        ) from error
    reward = getattr(module, attribute, None)
    if isinstance(reward, type):
        reward = reward()
    if not callable(reward):
        raise UsageError(
            f"reward {module_name}:{attribute}: {module_name} has no callable {attribute!r}."
        )
    return reward
