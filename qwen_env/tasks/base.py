"""What a named task is."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qwen_env.interaction import Interaction, ReplyFn
from qwen_env.rewards.base import RewardFn


@dataclass(frozen=True)
class NamedTask:
    """Prompts that belong to a reward.

    Attributes:
        name: what messages call it.
        prompts: to train on: whatever the environment takes as `prompts`, most often rows with
            `"prompt"` (text) and the columns that the reward reads.
        held_out: the same, to be evaluated on; it shares no question with `prompts`. None leaves it
            to the trainer to set some of the prompts aside.
        reward: scores a `RewardBatch`, and reports the component `"accuracy"`: 1 for a right
            answer, 0 for any other.
        answer_of: the answer that a completion gives, in a normal form, so that completions can be
            counted by it; None where it gives none.
        interaction: what replies between the turns, of which there are at most `max_turns`.
    """

    name: str
    prompts: Any
    held_out: Any
    reward: RewardFn
    answer_of: Callable[[str], str | None] | None = None
    interaction: Interaction | ReplyFn | None = None
    max_turns: int = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "NamedTask":
        return self  # immutable, and it can be large


def perhaps(name: str, names: Iterable[str]) -> str:
    """ "perhaps you meant 'NEAR'; " for a message, where any of `names` is near."""
    near = difflib.get_close_matches(name, list(names), n=2)
    return f"perhaps you meant {' or '.join(map(repr, near))}; " if near else ""
