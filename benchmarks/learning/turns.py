"""What is learnt over several turns: a game, a tool, and a trap; by models that are tiny.

Every run begins with a model that imitates a player who knows the form and no more: one who guesses
any number, whatever was answered; or who knows how to call the calculator, but hardly ever does,
and makes an answer up instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from learning.tiny import make_tokenizer
from learning.trainer import Bench, Lesson
from learning.turns_settings import HIGH, LOW, TURNS, Setting
from qwen_env.conversation import Conversation
from qwen_env.episodes import Episode, Outcome
from qwen_env.interaction import Reply, TurnBatch
from qwen_env.prompts import Prompt, load_prompts
from qwen_env.task import TextTask, make_task
from qwen_env.tasks import NamedTask, load_named_task
from qwen_env.tasks.guess_the_number import GuessTheNumber

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "', '"}}\n</tool_call>'


class Blaming:
    """The game, in which a turn that does not guess the number costs something."""

    def __init__(self, game: GuessTheNumber, cost: float):
        self._game, self._cost = game, cost

    def reply(self, batch: TurnBatch) -> list[Reply]:
        """The game's, and the cost."""
        replies = self._game.reply(batch)
        return [r if r.done else replace(r, reward=r.reward - self._cost) for r in replies]


def guesser(conversation: Conversation, rng: np.random.Generator) -> str:
    """Any number, whatever was answered."""
    return str(rng.integers(LOW, HIGH + 1))


def pupil(conversation: Conversation, rng: np.random.Generator, *, share_of_calls: float) -> str:
    """Calls the calculator, and then says its result; or makes a number up."""
    last = conversation.messages[-1]
    if last["role"] == "tool":
        return str(last["content"])
    question = str(last["content"]).removeprefix("What is ").removesuffix("?")
    if rng.random() < share_of_calls:
        return question.join(CALL)
    return str(int(rng.normal(0, 10.0 ** rng.integers(1, 3))))


def make_bench(setting: Setting) -> Bench:
    """The task of a setting, and what is known of it before."""
    named = load_named_task(setting.task)
    if not isinstance(game := named.interaction, GuessTheNumber):
        phrases = (
            "<|im_start|>user\nWhat is ",
            "\n<|im_start|>tool\n",
            "\n<|im_start|>assistant\n",
        )
        tokenizer = make_tokenizer((*phrases, " + ", " - ", " * ", *CALL))
        task = make_task(tokenizer=tokenizer, task=named, max_new_tokens=24)
        calls, hardly = partial(pupil, share_of_calls=1.0), partial(pupil, share_of_calls=0.2)
        lessons = Lesson(calls, 4096, 10, 3e-3), Lesson(hardly, 1024, 4, 1e-3)
        return Bench(task, _held_out(named, task), 48, lessons)
    if setting.cost:
        named = replace(named, interaction=Blaming(game, setting.cost))
    wish = f"Write one number from {LOW} to {HIGH}."
    tokenizer = make_tokenizer((named.prompts[0]["prompt"], "higher", "lower", wish), "0123456789")
    task = make_task(
        tokenizer=tokenizer,
        task=named,
        max_new_tokens=3 * TURNS,
        missing_eos_penalty=setting.missing_eos_penalty,
    )
    return Bench(task, _held_out(named, task) * 8, 32, [Lesson(guesser, 2048, 4, 3e-3)])


def _held_out(named: NamedTask, task: TextTask) -> list[Prompt]:
    return list(load_prompts(named.held_out, task.prompt_encoder, named.name))


def means(episodes: Sequence[Episode], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Over a batch of episodes."""
    columns: dict[str, Callable[[Episode, Outcome], float]] = {
        "score": lambda e, o: o.reward,
        "accuracy": lambda e, o: o.info["reward_components"]["accuracy"],
        "used_tool": lambda e, o: o.info["reward_components"].get("used_tool", 0.0),
        "turns": lambda e, o: len(e.turn_rewards),  # that were ended
        "cut_off": lambda e, o: e.finish_reason in ("length", "overflow"),
    }
    pairs = list(zip(episodes, outcomes, strict=True))
    return {name: float(np.mean([of(*pair) for pair in pairs])) for name, of in columns.items()}
