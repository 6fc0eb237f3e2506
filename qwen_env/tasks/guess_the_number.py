"""Guess the number: a game of several turns, that bisection plays best.

The number is drawn from the episode's seed, so that every episode is another game. After each guess
the policy hears whether the number is higher or lower. It has as many turns as bisection needs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qwen_env.arguments import integer
from qwen_env.errors import UsageError
from qwen_env.interaction import Reply, Turn, TurnBatch
from qwen_env.rewards.base import RewardBatch
from qwen_env.tasks.base import NamedTask, perhaps

_GUESS = re.compile(r"\s*(-?\d{1,9})\s*\.?\s*")
_ROWS = 64  # of prompts, which are all alike; a batch takes as many as it needs


@dataclass(frozen=True)
class GuessTheNumber:
    """The interaction. A right guess ends the episode.

    With `rewards_turns`, each turn earns the share of the numbers' bits that it found out: a guess
    after which the number is one of k, and was one of n before, earns log2(n / k) / log2(all).
    """

    low: int
    high: int
    rewards_turns: bool = False

    def number(self, seed: int) -> int:
        """That of an episode."""
        return int(np.random.default_rng(seed).integers(self.low, self.high + 1))

    def reply(self, batch: TurnBatch) -> list[Reply]:
        """ "higher", "lower", or what a guess is."""
        return [self._reply(turn) for turn in batch]

    def _reply(self, turn: Turn) -> Reply:
        low, high = turn.state or (self.low, self.high)  # between which the number is known to be
        match = _GUESS.fullmatch(turn.completion)
        if match is None:
            wish = f"Write one number from {self.low} to {self.high}."
            return Reply(text=wish, state=(low, high))
        guess, number = int(match[1]), self.number(turn.seed)
        text: str | None = None
        if guess == number:
            after = number, number
        elif guess < number:
            after, text = (max(low, min(guess + 1, high)), high), "higher"
        else:
            after, text = (low, min(high, max(guess - 1, low))), "lower"
        reward = 0.0
        if self.rewards_turns:
            before, left, everything = (
                b - a + 1 for a, b in ((low, high), after, (self.low, self.high))
            )
            reward = float(np.log2(before / left) / np.log2(everything))
        return Reply(text=text, reward=reward, done=text is None, state=after)


def solved(batch: RewardBatch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """1 where the number was guessed, or else 0."""
    right = np.array([reason == "done" for reason in batch.finish_reasons], np.float32)
    turns = [sum(m["role"] == "assistant" for m in messages) for messages in batch.messages]
    return right, {"accuracy": right, "turns": np.array(turns, np.float32)}


def guess_the_number(
    low: int = 1, high: int = 100, turns: int | None = None, rewards: str = "end"
) -> NamedTask:
    """The task.

    Args:
        low: the least number that may have to be guessed.
        high: the greatest.
        turns: how many guesses there are; None gives as many as bisection needs.
        rewards: "end" pays 1 for a right guess; "turns" pays for what each turn found out as well.

    Raises:
        UsageError: there is nothing to guess.
    """
    low, high = integer("low", low), integer("high", high)
    if not low < high:
        raise UsageError(f"low is {low} and high is {high}; high must be above low.")
    if rewards not in ("end", "turns"):
        raise UsageError(f"rewards is {rewards!r}; it must be 'end' or 'turns'.")
    turns = (high - low + 1).bit_length() if turns is None else integer("turns", turns, at_least=1)
    text = (
        f"I am thinking of a number from {low} to {high}. Guess it: write one number and nothing "
        'else. I answer "higher" or "lower".'
    )
    rows = [{"prompt": text}] * _ROWS
    return NamedTask(
        name="guess_the_number",
        prompts=rows,
        held_out=rows,  # the numbers are others in every episode
        reward=solved,
        interaction=GuessTheNumber(low, high, rewards == "turns"),
        max_turns=turns,
    )


def guess_the_number_from_text(part: str, options: Mapping[str, str]) -> NamedTask:
    """From the options in a task's name."""
    known = ("low", "high", "turns", "rewards")
    if part:
        raise UsageError(f"guess_the_number:{part}: it has no variants; leave ':{part}' out.")
    for name in options:
        if name not in known:
            raise UsageError(
                f"guess_the_number has no option {name!r}; {perhaps(name, known)}it takes "
                f"{', '.join(known)}."
            )
    given: dict[str, int | str] = dict(options)
    for name in ("low", "high", "turns"):
        if name in given:
            try:
                given[name] = int(given[name])
            except ValueError:
                raise UsageError(f"{name} is {given[name]!r}; it must be an integer.") from None
    return guess_the_number(**given)  # type: ignore[arg-type]
