"""What a reward function is, and the one place where its answer is checked.

A reward function is any callable that takes a `RewardBatch` and returns one number per row:

    def shorter_is_better(batch: RewardBatch) -> np.ndarray:
        return np.array([-len(ids) for ids in batch.completion_ids], np.float32)

It may return `(scores, components)` instead, where `components` maps names to arrays of the same
length; they are reported, not trained on.
"""

import reprlib
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

import numpy as np
from gymnasium.error import DependencyNotInstalled

from qwen_env.errors import RewardError


@dataclass(frozen=True)
class RewardBatch:
    """N finished episodes. Every field has length N.

    `completion_ids` are the tokens as they were chosen, the end-of-sequence id included;
    `completions` is their text without special tokens. `rows` are the prompts' dataset rows, with
    all their columns. `finish_reasons` are `"eos"` or `"length"`.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    prompt_ids: Sequence[np.ndarray]
    completion_ids: Sequence[np.ndarray]
    rows: Sequence[Mapping[str, Any]]
    finish_reasons: Sequence[str]

    def __len__(self) -> int:
        return len(self.completions)

    def row(self, index: int) -> "RewardBatch":
        """The batch of one row."""
        return RewardBatch(*([getattr(self, field.name)[index]] for field in fields(self)))

    def copy(self) -> "RewardBatch":
        """The same with lists, arrays and rows of its own, which may be changed."""
        return RewardBatch(
            prompts=list(self.prompts),
            completions=list(self.completions),
            prompt_ids=[np.array(ids) for ids in self.prompt_ids],
            completion_ids=[np.array(ids) for ids in self.completion_ids],
            rows=[dict(row) for row in self.rows],
            finish_reasons=list(self.finish_reasons),
        )


Numbers = np.ndarray | Sequence[float]  # N of them


class RewardFn(Protocol):
    """A callable that scores finished episodes; `score` checks what it returns."""

    def __call__(
        self, batch: RewardBatch, /
    ) -> Numbers | tuple[Numbers, Mapping[str, Numbers]]: ...


@dataclass(frozen=True)
class Scores:
    """Checked rewards: `values` float32 [N], and named `components`, float32 [N] each."""

    values: np.ndarray
    components: Mapping[str, np.ndarray]


RESERVED_COMPONENTS = ("score", "missing_eos_penalty")
"""Components that the environment reports itself."""

NAMES_ALLOWED = (
    "names must be text, and none of "
    f"{', '.join(map(repr, (*RESERVED_COMPONENTS, '_...')))}, which are taken"
)


def may_be_named(name: Any) -> bool:
    """Whether a component can have this name: Gymnasium keeps the underscore for its masks."""
    return isinstance(name, str) and name not in RESERVED_COMPONENTS and not name.startswith("_")


def score(reward: RewardFn, batch: RewardBatch) -> Scores:
    """Call `reward` and check what it returns.

    It gets a copy of the batch, to do with as it likes. When it raises, it is called once more for
    each row, to find the one to blame.

    Raises:
        RewardError: it raised, returned another count, a type that is not a number, or a value
            that is not finite; the message names the function and the row.
        gymnasium.error.DependencyNotInstalled: it needs an extra that is not installed.
    """
    name = reward_name(reward)
    try:
        answer = reward(batch.copy())
    except (RewardError, DependencyNotInstalled):
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"The reward function {name} raised {type(error).__name__}: {error}{place(error)}, for "
            f"{_culprit(reward, batch, error)}."
        ) from error
    values, components = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
    if isinstance(values, tuple) or not isinstance(components, Mapping):
        raise RewardError(
            f"The reward function {name} returned a tuple of "
            f"{', '.join(type(part).__name__ for part in answer)}; it must return an array, or "
            "(array, {component: array})."
        )
    for key in components:
        if not may_be_named(key):
            raise RewardError(
                f"The reward function {name} names a component {key!r}; {NAMES_ALLOWED}."
            )
    return Scores(
        _checked(values, batch, f"The reward function {name}"),
        {
            key: _checked(value, batch, f"Component {key!r} of the reward function {name}")
            for key, value in components.items()
        },
    )


def reward_name(reward: RewardFn) -> str:
    """The name in messages: `module.function`, `module.Class`, or the `__qualname__` of an instance
    that sets one itself."""
    if own_name := getattr(reward, "__dict__", {}).get("__qualname__"):
        return own_name
    kind = type(reward)
    module = getattr(reward, "__module__", kind.__module__)
    return f"{module}.{getattr(reward, '__qualname__', kind.__qualname__)}"


def row_name(batch: RewardBatch, row: int) -> str:
    """The name in messages."""
    return f"row {row} (prompt {reprlib.repr(batch.prompts[row])})"


_NOT_THE_USERS = (
    str(Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
)


def place(error: BaseException) -> str:
    """Where the user's own code raised `error`, in brackets for a message; or nothing."""
    inside_the_call = error.__traceback__ and error.__traceback__.tb_next
    for frame in reversed(traceback.extract_tb(inside_the_call)):
        is_file = Path(frame.filename).is_file()  # a notebook cell is not one
        if is_file and not frame.filename.startswith(_NOT_THE_USERS):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def _checked(values: Any, batch: RewardBatch, who: str) -> np.ndarray:
    try:
        given = np.asarray(values)
        # Text, times and complex numbers: NumPy would convert them.
        is_wrong = given.dtype.kind in "USmMc"
        if is_wrong or (given.dtype.kind == "O" and _first_non_number(given, batch)):
            raise TypeError(f"of type {given.dtype}")
        with np.errstate(over="ignore"):  # an infinity, which is refused below
            array = np.asarray(given, dtype=np.float32)
    except Exception as error:  # of whatever type it is that `values` has
        what = _first_non_number(values, batch) or f"a {type(values).__name__} ({error})"
        raise RewardError(f"{who} returned {what}; it must return one number per row.") from error
    if array.shape != (len(batch),):
        raise RewardError(
            f"{who} returned shape {array.shape} for a batch of {len(batch)}; it must return "
            f"one number per row, shape ({len(batch)},)."
        )
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array))[0])
        raise RewardError(
            f"{who} returned {given[row]} for {row_name(batch, row)}; rewards must be finite "
            "(float32)."
        )
    return array


def _first_non_number(values: Any, batch: RewardBatch) -> str | None:
    """The first value that is not a number, and its row, for a message."""
    for row in range(len(batch)):
        try:
            value = values[row]
        except (TypeError, LookupError):
            return None
        if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
            return f"{reprlib.repr(value)} for {row_name(batch, row)}"
    return None


def _culprit(reward: RewardFn, batch: RewardBatch, raised: BaseException) -> str:
    """Which row makes `reward` raise, if one does on its own."""
    if len(batch) == 1:
        return row_name(batch, 0)
    if isinstance(raised, OSError | MemoryError):  # no row's fault, and each call may be slow
        return f"a batch of {len(batch)}"
    for row in range(len(batch)):
        try:
            reward(batch.row(row).copy())
        except type(raised):
            return row_name(batch, row)
        except (Exception, SystemExit):
            continue
    return f"a batch of {len(batch)}, of which no row fails on its own"
