"""Tasks of the package `reasoning-gym`: generated questions whose answers it verifies.

The answer of a completion is what its last `<answer>...</answer>` holds, or else all of it; with
the option `answer=last_number`, it is the last number. The reward is the package's own score of
that, in [0, 1]: many of its tasks give a share of 1 for an answer that is partly right, or that
comes with other words. `accuracy` is 1 where the score is exactly 1: of a bare number, "42" and
"42.0" are right, and "The answer is 42" only as a last number. A last number earns nothing for
being partly right: the package would pay for the 7 in 17.
"""

import dataclasses
import re
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from itertools import count, islice
from typing import Any, Literal, get_args

import numpy as np

from qwen_env.arguments import integer, one_of
from qwen_env.errors import RewardError, UsageError, reason
from qwen_env.extras import import_extra
from qwen_env.rewards.base import RewardBatch, row_name
from qwen_env.tasks.base import NamedTask, perhaps
from qwen_env.tasks.numbers import numbers_in
from qwen_env.tasks.options import parsed
from qwen_env.watchdog import TooMuch, watched

INSTRUCTION = "Give your final answer between <answer> and </answer>."
"""Fits answers of all kinds, also those of several lines, and lets a model think first; the stop
string "</answer>" then ends a response. Where only a few tokens are allowed, an instruction such
as "Reply with the final number only." fits better."""

AnswerForm = Literal["tagged", "last_number"]

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_SEEDS = 2**32
_HELD_OUT = 2**31  # between the seed of the questions to train on and that of the held-out ones
_OWN_OPTIONS = ("size", "held_out_size", "seed", "question", "instruction", "answer")


class Verify:
    """The reward of a task of `reasoning-gym`; rows hold an entry of its data set.

    An answer that the package fails on, as some of its tasks do on text that is none, scores 0, and
    so does one that it takes too long or too much memory over.
    """

    def __init__(self, name: str, dataset: Any, answer: AnswerForm):
        self.__qualname__ = f"reasoning_gym:{name}"  # the name in messages
        self._dataset = dataset
        self._extract = _EXTRACT[answer]
        self._pays_parts = answer != "last_number"

    def __call__(self, batch: RewardBatch) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        """The scores, float32 [N], and their `accuracy`.

        Raises:
            RewardError: a row holds no entry of the task.
        """
        scores = np.zeros(len(batch))
        for index, (completion, row) in enumerate(zip(batch.completions, batch.rows, strict=True)):
            if not {"question", "answer", "metadata"} <= row.keys():
                raise RewardError(
                    f"{row_name(batch, index)} is no question of {self.__qualname__}, so its "
                    "answer cannot be verified."
                )
            scores[index] = self._score(self._extract(completion), dict(row))
        right = (scores == 1).astype(np.float32)
        return scores.astype(np.float32) if self._pays_parts else right, {"accuracy": right}

    def _score(self, answer: str, entry: dict[str, Any]) -> float:
        try:
            # NumPy warns about text that is no array.
            with watched(), warnings.catch_warnings(action="ignore"):
                return float(self._dataset.score_answer(answer, entry))
        except (Exception, TooMuch):  # of whatever kind its parsers raise
            return 0.0


def reasoning_gym(
    name: str,
    *,
    size: int = 500,
    held_out_size: int = 256,
    seed: int = 0,
    question: str | None = None,
    instruction: str = INSTRUCTION,
    answer: AnswerForm = "tagged",
    **config: Any,
) -> NamedTask:
    """A task of `reasoning-gym` with questions to train on and others that are held out.

    No question is asked twice: one that was generated before gives way to the next. Rows hold the
    prompt and the package's entry (`question`, `answer`, `metadata`).

    Args:
        name: the task's name in `reasoning-gym`, such as `chain_sum`.
        size: the number of questions to train on.
        held_out_size: the number of questions that are held out.
        seed: decides which questions.
        question: how a question is asked, such as `"{expression} ="`: a format of the entry's
            question and metadata; None asks as the package does.
        instruction: follows each question, on a line of its own; none where it is empty.
        answer: which part of a completion is its answer: what is `"tagged"` as one, or the
            `"last_number"`, for questions whose answers are numbers.
        config: the task's own options.

    Raises:
        UsageError: no such task, an option that it does not take (near names are named), or fewer
            different questions than are asked for.
        gymnasium.error.DependencyNotInstalled: `reasoning-gym` is missing.
    """
    _check_options(name, config)
    one_of("answer", answer, get_args(AnswerForm))
    size = integer("size", size, at_least=1)
    held_out_size = integer("held_out_size", held_out_size, at_least=1)
    if not 0 <= integer("seed", seed) < _SEEDS:
        raise UsageError(f"seed is {seed}; it must be at least 0 and below 2**32.")
    held_out = list(islice(_entries(name, held_out_size, seed + _HELD_OUT, config), held_out_size))
    asked = {entry["question"] for entry in held_out}
    fresh = (e for e in _entries(name, size, seed, config) if e["question"] not in asked)
    train = list(islice(fresh, size))
    if len(train) < size or len(held_out) < held_out_size:
        raise UsageError(
            f"reasoning_gym:{name} with these options has too few different questions: size is "
            f"{size} and held_out_size {held_out_size}, but {len(train) + len(held_out)} were "
            "found; lower them, or widen its options."
        )
    are_numbers = all(_number(entry["answer"] or "") is not None for entry in train)
    if answer == "last_number" and not are_numbers:
        raise UsageError(
            f"answer is 'last_number', but answers to questions of reasoning_gym:{name} are no "
            f"numbers, such as {train[0]['answer']!r}; leave it out."
        )
    ending = f"\n{instruction}" if instruction else ""
    rows, held_out_rows = (
        [{**entry, "prompt": _ask(entry, question) + ending} for entry in entries]
        for entries in (train, held_out)
    )
    return NamedTask(
        f"reasoning_gym:{name}",
        rows,
        held_out_rows,
        Verify(name, _create(name, {**config, "size": size, "seed": seed}), answer),
        partial(_number_of if are_numbers else _text_of, _EXTRACT[answer]),
    )


def reasoning_gym_from_text(name: str, options: Mapping[str, str]) -> NamedTask:
    """The same with options as text, each of the type that the task's own field has.

    Raises:
        UsageError: one cannot be of that type; else as `reasoning_gym`.
    """
    hints = {**_hints(name), "size": int, "held_out_size": int, "seed": int}
    hints |= {"question": str, "instruction": str, "answer": AnswerForm}
    _check_options(name, options)
    values = {
        option: parsed(f"{option} of reasoning_gym:{name}", text, hints[option])
        for option, text in options.items()
    }
    return reasoning_gym(name, **values)


def extract_answer(completion: str) -> str:
    """What the last `<answer>...</answer>` holds, or else the whole completion, stripped."""
    found = _ANSWER.findall(completion)
    return (found[-1] if found else completion).strip()


def last_number(completion: str) -> str:
    """The last number in the completion, as it is written there; empty where there is none."""
    found = numbers_in(completion)
    return completion[found[-1].start : found[-1].end] if found else ""


def _ask(entry: Mapping[str, Any], question: str | None) -> str:
    if question is None:
        return str(entry["question"])
    fields = {**entry["metadata"], "question": entry["question"]}
    try:
        return question.format(**fields)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(
            f"question is {question!r}, which cannot be filled in ({type(error).__name__}: "
            f"{error}); in braces it may name {', '.join(fields)}."
        ) from error


_EXTRACT: Mapping[AnswerForm, Callable[[str], str]] = {
    "tagged": extract_answer,
    "last_number": last_number,
}


def _entries(name: str, size: int, seed: int, config: Mapping[str, Any]) -> Iterator[Any]:
    """Entries with different questions, from `seed` on, until `size` in a row bring no new one."""
    asked: set[str] = set()
    for start in count(seed, size):  # most tasks make question i of the seed plus i
        num_asked = len(asked)
        for entry in _create(name, {**config, "size": size, "seed": start % _SEEDS}):
            if entry["question"] not in asked:
                asked.add(entry["question"])
                yield entry
        if len(asked) == num_asked:
            return


def _create(name: str, config: Mapping[str, Any]) -> Any:
    package = import_extra("reasoning_gym", package="reasoning-gym")
    try:
        return package.create_dataset(name, **config)
    except (ValueError, TypeError, AssertionError) as error:
        raise UsageError(f"reasoning_gym:{name}: {reason(error)}.") from error


def _hints(name: str) -> dict[str, Any]:
    """The types of the options that the package's task `name` takes.

    Raises:
        UsageError: it has no such task.
    """
    tasks = import_extra("reasoning_gym", package="reasoning-gym").factory.DATASETS
    if name not in tasks:
        near = perhaps(name, tasks) or f"it has {', '.join(sorted(tasks))}; "
        raise UsageError(
            f"reasoning-gym has no task {name!r}; {near}name one as in 'reasoning_gym:chain_sum'."
        )
    _, config_class = tasks[name]
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    known = sorted({*_hints(name), *_OWN_OPTIONS})
    for option in options:
        if option not in known:
            raise UsageError(
                f"reasoning_gym:{name} has no option {option!r}; {perhaps(option, known)}it has "
                f"{', '.join(known)}."
            )


def _number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else."""
    found = numbers_in(text)
    is_all = len(found) == 1 and (found[0].start, found[0].end) == (0, len(text))
    return found[0].value if is_all else None


def _number_of(extract: Callable[[str], str], completion: str) -> str | None:
    number = _number(extract(completion).removesuffix("."))
    return None if number is None else str(number)


def _text_of(extract: Callable[[str], str], completion: str) -> str | None:
    return " ".join(extract(completion).split()) or None
