"""Sums and products too large to do in one's head, and a calculator to do them with."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_env.errors import UsageError
from qwen_env.rewards.base import RewardBatch
from qwen_env.tasks.base import NamedTask, perhaps
from qwen_env.tasks.numbers import numbers_in, plain
from qwen_env.tools import Tools, calculator

_TURNS = 4
_NUM_TRAIN, _NUM_HELD_OUT = 2000, 200


def right_and_calculated(batch: RewardBatch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """1 where the last number of the last turn is right, or else 0; and whether a tool was used."""
    accuracy, used_tool = np.zeros(len(batch), np.float32), np.zeros(len(batch), np.float32)
    for i, (messages, row) in enumerate(zip(batch.messages, batch.rows, strict=True)):
        used_tool[i] = any(
            message["role"] == "tool" and not message["content"].startswith("Error")
            for message in messages
        )
        is_answer = messages[-1]["role"] == "assistant"
        accuracy[i] = is_answer and answer_of(messages[-1]["content"]) == row["answer"]
    return accuracy, {"accuracy": accuracy, "used_tool": used_tool}


def answer_of(completion: str) -> str | None:
    """The last number of the last line, as digits."""
    found = numbers_in(plain(completion))
    return None if not found or found[-1].value is None else str(found[-1].value)


def calculator_task(digits: int = 4) -> NamedTask:
    """The task: expressions of three numbers of up to `digits` digits.

    Raises:
        UsageError: `digits` is not from 1 to 9.
    """
    if not 1 <= digits <= 9:
        raise UsageError(f"digits is {digits}; it must be from 1 to 9.")
    tools = Tools(calculator)
    rng = np.random.default_rng(0)
    questions: dict[str, None] = {}
    for _ in range(10 * (_NUM_TRAIN + _NUM_HELD_OUT)):
        a, b, c = rng.integers(1, 10**digits, 3).tolist()
        first, second = rng.choice(["+", "-", "*"], 2).tolist()
        questions[f"{a} {first} {b} {second} {c}"] = None
        if len(questions) == _NUM_TRAIN + _NUM_HELD_OUT:
            break
    schemas = tools.schemas
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": f"What is {question}?"}],
            "tools": schemas,
            "answer": str(calculator(question)),
        }
        for question in questions
    ]
    held_out = len(rows) // 11
    return NamedTask(
        name="calculator",
        prompts=rows[:-held_out],
        held_out=rows[-held_out:],
        reward=right_and_calculated,
        answer_of=answer_of,
        interaction=tools,
        max_turns=_TURNS,
    )


def calculator_from_text(part: str, options: Mapping[str, str]) -> NamedTask:
    """From the options in a task's name."""
    if part:
        raise UsageError(f"calculator:{part}: it has no variants; leave ':{part}' out.")
    for name in options:
        if name != "digits":
            raise UsageError(
                f"calculator has no option {name!r}; {perhaps(name, ['digits'])}it takes digits."
            )
    try:
        return calculator_task(**{name: int(text) for name, text in options.items()})
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"digits is {options['digits']!r}; it must be an integer.") from None
