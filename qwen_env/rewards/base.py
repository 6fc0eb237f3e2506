"""What a reward function is, and the one place where its answer is checked.

A reward function is any callable that takes a `RewardBatch` and returns one number per row:

    def shorter_is_better(batch: RewardBatch) -> np.ndarray:
        return np.array([-len(ids) for ids in batch.completion_ids], np.float32)

It may return `(scores, components)` instead, where `components` maps names to arrays of the same
length; they are reported, not trained on. And in the place of a number, each row may have an array
with a number for each of its `completion_ids`: a learner gives each token its own, the environment
pays their sum at the end.
"""

import copy
import reprlib
import signal
import sysconfig
import threading
import traceback
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, SupportsFloat

import numpy as np
from gymnasium.error import DependencyNotInstalled

from qwen_env.errors import RewardError


@dataclass(frozen=True)
class RewardBatch:
    """N finished episodes. Every field has length N.

    `completion_ids` are the tokens as they were chosen, the end-of-sequence id included;
    `completions` is their text without special tokens. `rows` are the prompts' dataset rows, with
    all their columns. `finish_reasons` are `"eos"`, `"stop"`, `"length"` and, where there is an
    interaction, `"done"` and `"overflow"`. `messages` is the whole conversation.

    With several turns, `completion_ids` are those of all turns, and `completions` have a line break
    between them; `response_ids` are all the tokens behind the prompt, replies included.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    prompt_ids: Sequence[np.ndarray]
    completion_ids: Sequence[np.ndarray]
    rows: Sequence[Mapping[str, Any]]
    finish_reasons: Sequence[str]
    messages: Sequence[Sequence[Mapping[str, Any]]] = ()
    response_ids: Sequence[np.ndarray] = ()

    def __post_init__(self) -> None:
        if not len(self.response_ids):  # there was one turn
            object.__setattr__(self, "response_ids", self.completion_ids)

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def has_turns(self) -> bool:
        """Whether there were replies, or might have been: then `messages` says more than prompts
        and completions."""
        return self.response_ids is not self.completion_ids

    def copy(self) -> "RewardBatch":
        """The same with lists, arrays and rows of its own, down to the last value in them.

        Raises:
            RewardError: a row holds something that cannot be copied.
        """
        return RewardBatch(
            prompts=list(self.prompts),
            completions=list(self.completions),
            prompt_ids=[np.array(ids) for ids in self.prompt_ids],
            completion_ids=[np.array(ids) for ids in self.completion_ids],
            rows=[self._copied_row(index) for index in range(len(self))],
            finish_reasons=list(self.finish_reasons),
            messages=[[*map(_copied_message, messages)] for messages in self.messages],
            response_ids=[np.array(ids) for ids in self.response_ids] if self.has_turns else (),
        )

    def _copied_row(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        try:
            return copy.deepcopy(dict(row))
        except Exception as error:  # of whatever type it is that the row holds
            raise RewardError(
                f"{row_name(self, index)} holds something that Python cannot copy, and a reward "
                f"function gets copies: {describe(error)}."
            ) from error


def _copied_message(message: Mapping[str, Any]) -> dict[str, Any]:
    is_flat = len(message) == 2 and type(message.get("content")) is str  # beside its role
    return dict(message) if is_flat else copy.deepcopy(dict(message))


Numbers = np.ndarray | Sequence[float]  # N of them
Rewards = Numbers | Sequence[Numbers]  # each of these as many as the row has `completion_ids`


class RewardFn(Protocol):
    """A callable that scores finished episodes; `score` checks what it returns."""

    def __call__(
        self, batch: RewardBatch, /
    ) -> Rewards | tuple[Rewards, Mapping[str, Numbers]]: ...


@dataclass(frozen=True)
class Scores:
    """Checked rewards: `values` float32 [N], and named `components`, float32 [N] each.

    `tokens` has an array of float32 for each row, whose sum its value is; None where the reward
    function gave numbers.
    """

    values: np.ndarray
    components: Mapping[str, np.ndarray]
    tokens: Sequence[np.ndarray] | None = None

    @property
    def rewards(self) -> np.ndarray | Sequence[np.ndarray]:
        """As the reward function gave them."""
        return self.values if self.tokens is None else self.tokens


RESERVED_COMPONENTS = ("score", "missing_eos_penalty")
"""Components that the environment reports itself."""

NAMES_ALLOWED = (
    "names must be printable text, and none of "
    f"{', '.join(map(repr, (*RESERVED_COMPONENTS, '_...')))}, which are taken"
)


def may_be_named(name: Any) -> bool:
    """Whether a component can have this name: Gymnasium keeps the underscore for its masks."""
    is_text = isinstance(name, str) and name.isprintable()
    return is_text and name not in RESERVED_COMPONENTS and not name.startswith("_")


def score(reward: RewardFn, batch: RewardBatch) -> Scores:
    """Call `reward` once and check what it returns.

    It gets a copy of the batch, to do with as it likes. Whatever it raises becomes a `RewardError`,
    the time-outs of graders that are no `Exception` included; only a real Ctrl-C stays one.

    Raises:
        RewardError: it raised, returned another count, a type that is not a number, or a value
            that is missing or not finite; the message names the function, and the row where that
            is known.
        gymnasium.error.DependencyNotInstalled: it needs an extra that is not installed.
    """
    name, given = reward_name(reward), batch.copy()
    try:
        answer = reward(given)
    except (RewardError, DependencyNotInstalled):
        raise
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        raise RewardError(
            f"The reward function {name} raised {describe(error)}{place(error)}, for "
            f"{_rows_at_hand(error, given, batch)}."
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
    who = f"The reward function {name}"
    tokens = _by_token(values, batch, who)
    if tokens is not None:
        values = np.array([row.sum() for row in tokens], np.float32)
    return Scores(
        _checked(values, batch, who),
        {
            key: _checked(value, batch, f"Component {key!r} of the reward function {name}")
            for key, value in components.items()
        },
        tokens,
    )


def reward_name(reward: RewardFn) -> str:
    """The name in messages: `module.function`, `module.Class`, or the `__qualname__` of an instance
    that sets one itself."""
    own_name: str | None = getattr(reward, "__dict__", {}).get("__qualname__")
    if own_name:
        return own_name
    kind = type(reward)
    module = getattr(reward, "__module__", kind.__module__)
    return f"{module}.{getattr(reward, '__qualname__', kind.__qualname__)}"


def row_name(batch: RewardBatch, row: int) -> str:
    """The name in messages."""
    return f"row {row} (prompt {reprlib.repr(batch.prompts[row])})"


_LONGEST_TEXT = 500  # characters of an exception's own message

_NOT_THE_USERS = (
    str(Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
)


def place(error: BaseException) -> str:
    """Where the user's own code raised `error`, in brackets for a message; or nothing."""
    for frame, line in innermost_first(error):
        filename = frame.f_code.co_filename
        is_file = Path(filename).is_file()  # a notebook cell is not one
        if is_file and not filename.startswith(_NOT_THE_USERS):
            return f" ({filename}, line {line})"
    return ""


def describe(error: BaseException) -> str:
    """The type of `error` and what it says, shortened, for a message."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # of an exception that cannot say what it is
        text = ""
    if len(text) > _LONGEST_TEXT:
        text = f"{text[:_LONGEST_TEXT]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_ctrl_c(error: BaseException) -> bool:
    """Whether `error` is a user's Ctrl-C, and no `KeyboardInterrupt` that a library raised.

    It is one if what handles SIGINT in this process raised it: Python's own handler, unless
    somebody put another in its place. The handler of a training run raises nothing.
    """
    in_main = threading.current_thread() is threading.main_thread()  # others are not interrupted
    if not (in_main and isinstance(error, KeyboardInterrupt)):
        return False
    handler = signal.getsignal(signal.SIGINT)
    code = getattr(handler, "__code__", None)
    raised_it = any(frame.f_code is code for frame, _ in innermost_first(error))
    return handler is signal.default_int_handler or raised_it


def innermost_first(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames, with their lines, between the call of the user's code and `error`."""
    inside_the_call = error.__traceback__ and error.__traceback__.tb_next
    return reversed(list(traceback.walk_tb(inside_the_call)))


def _checked(values: Any, batch: RewardBatch, who: str) -> np.ndarray:
    must = "it must return one number per row"
    if isinstance(values, Coroutine):
        values.close()  # or Python warns that nobody awaited it
        raise RewardError(f"{who} is asynchronous; {must}, with asyncio.run for instance.")
    try:
        given = np.asarray(values)
        # Text, times, complex numbers and records: NumPy would convert them.
        is_wrong = given.dtype.kind in "USmMc" or given.dtype.names
        if is_wrong or (given.dtype.kind == "O" and _first_non_number(given, batch)):
            raise TypeError(f"of type {given.dtype}")
        with np.errstate(all="ignore"):  # an infinity, which is refused below
            array = np.asarray(given, dtype=np.float32)
    except Exception as error:  # of whatever type it is that `values` has
        what = _first_non_number(values, batch) or f"a {type(values).__name__} ({error})"
        raise RewardError(f"{who} returned {what}; {must}.") from error
    if values is None:
        raise RewardError(f"{who} returned None; {must}.")
    if array.shape != (len(batch),):
        raise RewardError(
            f"{who} returned shape {array.shape} for a batch of {len(batch)}; {must}, shape "
            f"({len(batch)},)."
        )
    is_masked = np.broadcast_to(np.ma.getmask(values), array.shape)
    if (wrong := np.flatnonzero(is_masked | ~np.isfinite(array))).size:
        row = int(wrong[0])
        what = "a masked value" if is_masked[row] else given[row]
        raise RewardError(
            f"{who} returned {what} for {row_name(batch, row)}; rewards must be finite (float32)."
        )
    return array


def _by_token(values: Any, batch: RewardBatch, who: str) -> list[np.ndarray] | None:
    """The arrays of rows, float32, where `values` holds an array of numbers for each."""
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype != object:
        return None  # the plain case, in which nothing need be looked at one by one
    is_column = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str | bytes)
    if not is_column or not len(batch) or len(values) != len(batch):
        return None
    if not all(isinstance(row, Sequence | np.ndarray) and np.ndim(row) == 1 for row in values):
        return None
    lengths, written = [len(row) for row in values], [len(ids) for ids in batch.completion_ids]
    if lengths != written:
        if len(set(lengths)) == 1:  # a matrix, which is no number for each row either
            return None
        row = next(i for i in range(len(batch)) if lengths[i] != written[i])
        raise RewardError(
            f"{who} returned {lengths[row]} numbers for {row_name(batch, row)}, whose completion "
            f"has {written[row]} tokens; it must return one number per row, or one per token of it."
        )
    tokens = []
    for i, row in enumerate(values):
        numbers = np.asarray(row)
        is_finite = numbers.dtype.kind in "biuf" and not np.ma.is_masked(row)
        with np.errstate(all="ignore"):
            numbers = numbers.astype(np.float32) if is_finite else numbers
        if not is_finite or not np.isfinite(numbers).all():
            raise RewardError(
                f"{who} returned {reprlib.repr(row)} for {row_name(batch, i)}; rewards must be "
                "finite numbers (float32)."
            )
        tokens.append(numbers)
    return tokens


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


def _rows_at_hand(error: BaseException, given: RewardBatch, batch: RewardBatch) -> str:
    """Which rows `reward` failed on, without calling it again, which may take long or cost money.

    Where the code that failed held one row alone in its variables, that is the one to look at.
    """
    if len(batch) == 1:
        return row_name(batch, 0)
    owners: dict[int, set[int]] = {}
    for column in (given.rows, given.completions, given.completion_ids, given.prompt_ids):
        for row, value in enumerate(column):
            owners.setdefault(id(value), set()).add(row)
    held = [
        owners[id(value)]
        for frame, _ in innermost_first(error)
        for value in frame.f_locals.values()
        if id(value) in owners
    ]
    rows = set.intersection(*held) if held else set()
    hint = f", it seems at {row_name(batch, *rows)}" if len(rows) == 1 else ""
    return f"a batch of {len(batch)}{hint}"
