"""Who answers the policy between its turns: a user, a tool, a game; and the one place where answers
are checked.

An interaction is an object with the method `reply`, or a plain function like it:

    def echo(batch: TurnBatch) -> list[Reply]:
        return [Reply(text=turn.completion) for turn in batch]

It is asked once about all the turns that have just ended, the last turns of episodes included. It
is pure: what it wants to remember of an episode goes into `Reply.state`, which the episode's next
turn brings back, and what it draws comes from the episode's seed. So a step that fails was not
taken, and episodes can be played again.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from gymnasium.error import DependencyNotInstalled

from qwen_env.arguments import finite, integer
from qwen_env.concurrency import call_each
from qwen_env.errors import InteractionError, UsageError
from qwen_env.importing import import_attribute
from qwen_env.rewards.base import describe, innermost_first, is_ctrl_c, place, reward_name
from qwen_env.tokenizer.chat import Message


@dataclass(frozen=True)
class Turn:
    """A turn that has just ended; `TurnBatch` says what the fields are."""

    completion: str
    completion_ids: np.ndarray
    messages: Sequence[Message]
    row: Mapping[str, Any]
    number: int
    state: Any
    seed: int


@dataclass(frozen=True)
class TurnBatch:
    """N turns that have just ended, each of another episode. Every field has length N.

    `completion_ids` are the tokens of the turn as they were chosen, the end-of-sequence id
    included, and `completions` their text without special tokens. `messages` is the conversation so
    far, this turn at its end; `rows` are the prompts' dataset rows; `turns` is each turn's number,
    from 1. `states` is what the episode's last `Reply.state` was, None at first. `seeds` has a
    number of each episode below 2**32, the same at all its turns.
    """

    completions: Sequence[str]
    completion_ids: Sequence[np.ndarray]
    messages: Sequence[Sequence[Message]]
    rows: Sequence[Mapping[str, Any]]
    turns: Sequence[int]
    states: Sequence[Any]
    seeds: Sequence[int]

    def __len__(self) -> int:
        return len(self.completions)

    def __getitem__(self, index: int) -> Turn:
        return Turn(
            completion=self.completions[index],
            completion_ids=self.completion_ids[index],
            messages=self.messages[index],
            row=self.rows[index],
            number=self.turns[index],
            state=self.states[index],
            seed=self.seeds[index],
        )

    def __iter__(self) -> Iterator[Turn]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True)
class Reply:
    """The answer to a turn: `text` (in a chat, a user's message), `messages`, or token `ids`.

    With none of the three, or with `done`, the episode ends, and nothing is appended. `reward` is
    for the turn, and arrives at its last token. `state` is what the next turn brings back; nobody
    else looks at it. `info` goes into the step's info, as `reply_info`.
    """

    text: str | None = None
    messages: Sequence[Message] | None = None
    ids: Sequence[int] | np.ndarray | None = None
    reward: float = 0.0
    done: bool = False
    state: Any = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def goes_on(self) -> bool:
        """Whether there is something to append."""
        return not self.done and not (
            self.text is None and self.messages is None and self.ids is None
        )


class Interaction(Protocol):
    """What answers turns; see the top of this file."""

    def reply(self, batch: TurnBatch, /) -> Sequence[Reply]:
        """A reply to each turn, in order."""
        ...


ReplyFn = Callable[[TurnBatch], Sequence[Reply]]


def load_interaction(spec: Any) -> Interaction | ReplyFn:
    """The interaction that `spec` names or is.

    Args:
        spec: an object with a method `reply`; a function of a `TurnBatch`; or the name of one of
            the two, or of a class that takes no arguments, as "package.module:name".

    Raises:
        UsageError: it is something else, or there is none of that name.
    """
    found, name = spec, reprlib.repr(spec)
    if isinstance(spec, str):
        module, _, attribute = spec.strip().partition(":")
        if not (module and attribute):
            raise UsageError(f"interaction is {spec!r}; name it as 'package.module:name'.")
        found, name = import_attribute("interaction", module, attribute), spec
    if isinstance(found, type):
        try:
            found = found()
        except BaseException as error:
            if is_ctrl_c(error):
                raise
            raise UsageError(
                f"interaction {name}: making one without arguments raised {describe(error)}"
                f"{place(error)}; name an instance of it instead."
            ) from error
    if not callable(getattr(found, "reply", found)):
        raise UsageError(
            f"interaction is {name}; give an object with a method reply(batch), a function of a "
            "TurnBatch, or the name of one of these as 'package.module:name'."
        )
    answering: Interaction | ReplyFn = found
    return answering


def ask(interaction: Interaction | ReplyFn, batch: TurnBatch) -> list[Reply]:
    """Call `interaction` once, and check that each turn got a reply, of the right types.

    Whether the replies can be appended is for those to say who append them.

    Raises:
        InteractionError: it raised, or returned another count or something else than replies; the
            message names the interaction, and the row where that is known.
        gymnasium.error.DependencyNotInstalled: it needs an extra that is not installed.
    """
    name = interaction_name(interaction)
    try:
        reply: Any = getattr(interaction, "reply", interaction)
        replies = list(reply(batch))
    except (InteractionError, DependencyNotInstalled):
        raise
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        raise InteractionError(
            f"The interaction {name} raised {describe(error)}{place(error)}, for "
            f"{_turns_at_hand(error, batch)}."
        ) from error
    if len(replies) != len(batch):
        raise InteractionError(
            f"The interaction {name} returned {len(replies)} replies to {len(batch)} turns; it "
            "must return one to each, in order."
        )
    for answer, turn in zip(replies, batch, strict=True):
        if problem := _problem(answer):
            raise InteractionError(f"The interaction {name} {problem}, to {turn_name(turn)}.")
    return replies


class EachTurn:
    """An interaction that asks a slow function about one turn at a time, several side by side.

    Args:
        function: of a `Turn`, which returns a `Reply`: a coroutine function (`async def`), or any
            other, which runs in threads.
        at_once: the most calls that are under way.
        timeout: seconds that a call may take.
    """

    def __init__(
        self, function: Callable[[Turn], Any], *, at_once: int = 16, timeout: float = 60.0
    ) -> None:
        self.function = function
        self.at_once = integer("at_once", at_once, at_least=1)
        self.timeout = finite("timeout", timeout)
        self.__qualname__ = interaction_name(function)  # the name in messages

    def reply(self, batch: TurnBatch) -> list[Reply]:
        """The function's reply to each turn.

        Raises:
            InteractionError: it raised, or took too long; names the turn.
        """
        replies = call_each(self.function, list(batch), at_once=self.at_once, timeout=self.timeout)
        for reply, turn in zip(replies, batch, strict=True):
            if isinstance(reply, BaseException):
                raise InteractionError(
                    f"The interaction {self.__qualname__} raised {describe(reply)}{place(reply)}, "
                    f"for {turn_name(turn)}."
                ) from reply
        return replies


def interaction_name(interaction: Any) -> str:
    """The name in messages."""
    return reward_name(interaction)  # what any callable is called


def turn_name(turn: Turn) -> str:
    """The name in messages: the turn, and the dataset row that the episode began with."""
    return (
        f"turn {turn.number} ({reprlib.repr(turn.completion)}) of the row "
        f"{reprlib.repr(dict(turn.row))}"
    )


def _turns_at_hand(error: BaseException, batch: TurnBatch) -> str:
    """Which turns an interaction failed on: where the code that failed had one turn alone in its
    variables, that is the one to look at."""
    if len(batch) == 1:
        return turn_name(batch[0])
    held = [
        value
        for frame, _ in innermost_first(error)
        for value in frame.f_locals.values()
        if isinstance(value, Turn)
    ]
    one = held and all(turn is held[0] for turn in held)
    return f"a batch of {len(batch)} turns" + (f", it seems at {turn_name(held[0])}" if one else "")


_LARGEST_REWARD = float(np.finfo(np.float32).max)


def _problem(reply: Any) -> str | None:
    """What is wrong with a reply, for a message."""
    if not isinstance(reply, Reply):
        return f"returned {reprlib.repr(reply)}, which is no Reply"
    given = [name for name in ("text", "messages", "ids") if getattr(reply, name) is not None]
    if len(given) > 1:
        return f"replied with both {given[0]} and {given[1]}, of which a reply has one"
    try:
        is_finite = np.ndim(reply.reward) == 0 and abs(float(reply.reward)) <= _LARGEST_REWARD
    except (TypeError, ValueError, OverflowError):
        is_finite = False
    if isinstance(reply.reward, str) or not is_finite:
        return f"gave the reward {reply.reward!r}, which is no finite number (float32)"
    if not isinstance(reply.info, Mapping):
        return f"gave the info {reprlib.repr(reply.info)}, which is no mapping"
    return None
