"""Tasks by name, each imported when it is asked for."""

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from gymnasium.error import DependencyNotInstalled

from qwen_env.errors import UsageError, UserFacingError
from qwen_env.importing import import_attribute
from qwen_env.rewards.base import describe, is_ctrl_c, place
from qwen_env.tasks.base import NamedTask, perhaps

FORMS = (
    "'gsm8k', 'gsm8k:FOLDER_OR_FILE', 'reasoning_gym:NAME', with options as in "
    "'reasoning_gym:chain_sum?min_terms=3&size=2000', 'textarena:GAME', 'guess_the_number', "
    "'calculator', or 'package.module:callable'"
)


def load_named_task(spec: Any) -> NamedTask:
    """The task that `spec` names or is.

    Args:
        spec: a `NamedTask`; or a string:

            - `"gsm8k"`: see `qwen_env.tasks.gsm8k`; `"gsm8k:FOLDER"` and `"gsm8k:FILE.jsonl"` read
              a local copy;
            - `"reasoning_gym:NAME"`: see `qwen_env.tasks.reasoning_gym`; options may follow:
              `"reasoning_gym:chain_sum?min_terms=3&max_terms=4&size=2000"`, written as in an
              address (an & within a value is %26, a + is %2B);
            - `"textarena:GAME"`, with options likewise: see `qwen_env.tasks.textarena`;
            - `"guess_the_number"`, with options as in `"guess_the_number?low=1&high=7"`: see
              `qwen_env.tasks.guess_the_number`;
            - `"calculator"` or `"calculator?digits=3"`: see `qwen_env.tasks.calculator`;
            - `"package.module:callable"`: a function without arguments that returns a `NamedTask`,
              or a `NamedTask`; the current directory is importable.

    Raises:
        UsageError: no such task, or an option that it does not take (near names are named); or its
            data cannot be read.
        gymnasium.error.DependencyNotInstalled: an optional package is missing.
    """
    if isinstance(spec, NamedTask):
        return spec
    if not isinstance(spec, str):
        raise UsageError(f"task is {spec!r}; give a NamedTask, or a string: {FORMS}.")
    name, colon, rest = spec.strip().partition(":")
    if name.partition("?")[0] not in _TASKS:
        if colon and rest and name:
            return _import(name, rest)
        raise UsageError(
            f"There is no task {spec!r}; {perhaps(name.partition('?')[0], _TASKS)}name one as "
            f"{FORMS}."
        )
    path, _, query = spec.strip().partition("?")
    name, _, part = path.partition(":")
    return _TASKS[name](part, _options(spec, query))


def has_one_turn(spec: str) -> bool:
    """Whether the task that `spec` names is known, unread, to bring no interaction."""
    return spec.strip().partition("?")[0].partition(":")[0] in _OF_ONE_TURN


def _options(spec: str, query: str) -> dict[str, str]:
    """The options behind the question mark, unquoted as in an address.

    Raises:
        UsageError: one has no value, or stands there twice.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise UsageError(
            f"task {spec!r}: its options cannot be read; write them as name=value&name=value."
        ) from None
    options = dict(pairs)
    if len(options) < len(pairs):
        twice = next(name for name in options if [key for key, _ in pairs].count(name) > 1)
        raise UsageError(f"task {spec!r} sets {twice} twice; leave one out.")
    return options


def _gsm8k(part: str, options: Mapping[str, str]) -> NamedTask:
    from qwen_env.tasks.gsm8k import gsm8k

    if options:
        raise UsageError(f"gsm8k has no option {next(iter(options))!r}; it takes none.")
    return gsm8k(part)


def _reasoning_gym(part: str, options: Mapping[str, str]) -> NamedTask:
    from qwen_env.tasks.reasoning_gym import reasoning_gym_from_text

    return reasoning_gym_from_text(part, options)


def _textarena(part: str, options: Mapping[str, str]) -> NamedTask:
    from qwen_env.tasks.textarena import textarena_from_text

    return textarena_from_text(part, options)


def _guess_the_number(part: str, options: Mapping[str, str]) -> NamedTask:
    from qwen_env.tasks.guess_the_number import guess_the_number_from_text

    return guess_the_number_from_text(part, options)


def _calculator(part: str, options: Mapping[str, str]) -> NamedTask:
    from qwen_env.tasks.calculator import calculator_from_text

    return calculator_from_text(part, options)


_TASKS: dict[str, Callable[[str, Mapping[str, str]], NamedTask]] = {
    "gsm8k": _gsm8k,
    "reasoning_gym": _reasoning_gym,
    "textarena": _textarena,
    "guess_the_number": _guess_the_number,
    "calculator": _calculator,
}
_OF_ONE_TURN = ("gsm8k", "reasoning_gym")


def _import(module: str, attribute: str) -> NamedTask:
    name = f"task {module}:{attribute}"
    try:
        made = import_attribute("task", module, attribute, hint=perhaps(module, _TASKS))
        if callable(made):
            made = made()
    except (UserFacingError, DependencyNotInstalled):
        raise
    except BaseException as error:  # whatever the user's module may raise
        if is_ctrl_c(error):
            raise
        raise UsageError(f"{name} cannot be made: {describe(error)}{place(error)}.") from error
    if not isinstance(made, NamedTask):
        raise UsageError(
            f"{name} gives a {type(made).__name__}; it must be a qwen_env.tasks.NamedTask, or a "
            "function without arguments that returns one."
        )
    return made
