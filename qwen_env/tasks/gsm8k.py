"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): word problems of grade school, answered by a number.

A prompt is the question and verl's request to end with the answer after `####`. A completion is
checked in two ways:

    strict     a number comes first behind the last "####", and is the only one on its line; units,
               a currency, Markdown and LaTeX around it do not matter
    flexible   the strict answer, or where there is none the last number of the completion

The reward is 1 where the strict answer is right and 0 elsewhere, reported as `accuracy`;
`flexible_accuracy` is reported beside it. Numbers are compared exactly, as fractions: "$1,234.50"
is 1234.5, and 18.0 is 18.
"""

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from qwen_env.errors import RewardError, UsageError, reason
from qwen_env.extras import import_extra
from qwen_env.files import expand, kind_of
from qwen_env.prompts import read_jsonl
from qwen_env.rewards.base import RewardBatch, row_name
from qwen_env.tasks.base import NamedTask
from qwen_env.tasks.numbers import numbers_in, plain

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'

_HUB_ID = "openai/gsm8k"
_LOCAL = (
    "gsm8k:FOLDER, with train.jsonl and test.jsonl or the hub's parquet files, or gsm8k:FILE.jsonl"
)
_AROUND = re.compile(r"(?:[\s*_`$(\[{]|\\(?:boxed|text|textbf|mathbf|[(\[]))*")

Rows = list[dict[str, Any]]


def gsm8k(source: str = "") -> NamedTask:
    """The task on the hub's data set `openai/gsm8k`, or on a local copy of it or its like.

    Args:
        source: a folder with `train.jsonl` and `test.jsonl`, or with the hub's parquet files, or
            one .jsonl file whose last tenth is held out; the hub's data set where it is empty. A
            row has a `question` and an `answer`: a number, or a solution with `#### NUMBER` at its
            end.

    Raises:
        UsageError: no such file, a row without question or answer, an answer that is no number, or
            a hub that cannot be reached.
        gymnasium.error.DependencyNotInstalled: the hub's data set without the `datasets` package.
    """
    name = f"gsm8k:{source}" if source else "gsm8k"
    if not source:
        train, test = _from_hub()
    elif (kind := kind_of(path := expand(source))) == "nothing":
        raise UsageError(f"{path}: no such file; the task is {_LOCAL}.")
    elif kind == "a folder":
        train, test = _from_folder(path)
    else:
        rows = list({row["prompt"]: row for row in _from_file(path)}.values())
        if len(rows) < 2:
            raise UsageError(f"{path} holds one question, so none can be held out; add others.")
        num_held_out = max(len(rows) // 10, 1)
        train, test = rows[:-num_held_out], rows[-num_held_out:]
    asked = {row["prompt"] for row in test}
    train = [row for row in train if row["prompt"] not in asked]
    return NamedTask(name, train, test, verify, _normal_form)


def verify(batch: RewardBatch) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """1 for a right answer after `####`, else 0, float32 [N]; rows hold the right one in `answer`.

    Raises:
        RewardError: a row does not.
    """
    strict, flexible = np.zeros((2, len(batch)), np.float32)
    for index, (completion, row) in enumerate(zip(batch.completions, batch.rows, strict=True)):
        right = right_answer(row.get("answer"))
        if right is None:
            raise RewardError(
                f"{row_name(batch, index)} has no number under 'answer' to compare with; gsm8k "
                "needs one in every row."
            )
        strict[index] = strict_answer(completion) == right
        flexible[index] = flexible_answer(completion) == right
    return strict, {"accuracy": strict, "flexible_accuracy": flexible}


def strict_answer(text: str) -> Fraction | None:
    """The number behind the last `####`: first on its line, and alone there."""
    _, mark, behind = plain(text).rstrip("# \t\r\n").rpartition("####")
    return _only_number(behind.partition("\n")[0]) if mark else None


def flexible_answer(text: str) -> Fraction | None:
    """The strict answer, or where there is none the last number."""
    strict = strict_answer(text)
    if strict is not None:
        return strict
    found = numbers_in(plain(text))
    return found[-1].value if found else None


def right_answer(given: Any) -> Fraction | None:
    """The number that a data set gives as answer: alone, or behind `####` as in GSM8K's own."""
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        return None
    text = str(given).strip()
    return strict_answer(text) if "####" in text else _only_number(plain(text))


def _only_number(line: str) -> Fraction | None:
    found = numbers_in(line)
    is_first = len(found) == 1 and _AROUND.fullmatch(line[: found[0].start]) is not None
    return found[0].value if is_first else None


def _normal_form(completion: str) -> str | None:
    answer = strict_answer(completion)
    return None if answer is None else str(answer)


def _rows(examples: Iterable[tuple[str, Any]]) -> Rows:
    """Prompts of examples, each after its name in messages."""
    rows: Rows = []
    for place, example in examples:
        if not isinstance(example, Mapping):
            raise UsageError(
                f"{place} is a {type(example).__name__}; it must be an object with 'question' and "
                "'answer'."
            )
        for column in ("question", "answer"):
            if column not in example:
                raise UsageError(
                    f"{place} has no column {column!r}; its columns are "
                    f"{', '.join(map(repr, example)) or 'none'}."
                )
        question, solution = example["question"], example["answer"]
        if not isinstance(question, str) or not question.strip():
            raise UsageError(f"{place} has a question that is {question!r}; it must be text.")
        answer = right_answer(solution)
        if answer is None:
            end = solution.strip()[-40:] if isinstance(solution, str) else solution
            raise UsageError(
                f"{place} has an answer that is no number, and has none behind '####' at its end: "
                f"{end!r}."
            )
        prompt = f"{question} {INSTRUCTION}"
        rows.append({"prompt": prompt, "answer": str(answer), "solution": solution})
    return rows


def _from_file(path: Path) -> Rows:
    rows = _rows(read_jsonl(path))
    if not rows:
        raise UsageError(f"{path} holds no questions.")
    return rows


def _from_folder(folder: Path) -> tuple[Rows, Rows]:
    if all((folder / f"{split}.jsonl").exists() for split in ("train", "test")):
        train, test = (_from_file(folder / f"{split}.jsonl") for split in ("train", "test"))
        return train, test
    inner = folder / "main" if (folder / "main").is_dir() else folder  # the hub's configuration
    files = {
        split: sorted(map(str, inner.glob(f"{split}*.parquet"))) for split in ("train", "test")
    }
    if not all(files.values()):
        raise UsageError(
            f"{folder} has no questions to train on and to hold out; put train.jsonl and "
            "test.jsonl there, or the hub's parquet files, or name one .jsonl file."
        )
    return _from_splits(str(folder), "parquet", data_files=files)


def _from_hub() -> tuple[Rows, Rows]:
    return _from_splits(_HUB_ID, _HUB_ID, "main")


def _from_splits(name: str, *arguments: Any, **options: Any) -> tuple[Rows, Rows]:
    datasets: Any = import_extra("datasets", package="datasets")
    try:
        splits = datasets.load_dataset(*arguments, **options)
    except Exception as error:  # of connections, of files, of the packages below: many kinds
        way_out = f"without the hub, name a local copy: {_LOCAL}" if name == _HUB_ID else "check it"
        raise UsageError(
            f"{name} cannot be loaded ({type(error).__name__}: {reason(error)}); {way_out}."
        ) from error
    train, test = (
        _rows((f"row {i} of {name} ({split})", row) for i, row in enumerate(splits[split]))
        for split in ("train", "test")
    )
    return train, test
