"""Conversations under way: what was said, and how the interaction is asked about ended turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qwen_env import mdp
from qwen_env.errors import InteractionError, UsageError
from qwen_env.interaction import (
    Interaction,
    Reply,
    ReplyFn,
    TurnBatch,
    ask,
    interaction_name,
    turn_name,
)
from qwen_env.prompts import Prompt
from qwen_env.replies import ReplyEncoder
from qwen_env.tokenizer.chat import Message


@dataclass(frozen=True)
class Conversation:
    """What an episode with an interaction has come to. Immutable: a step that fails is not taken.

    `messages` is what was said, from the prompt on; of the policy, the turns that it has ended.
    `completions` are these turns' texts. `last_reply` is to the last of them. `turn_rewards` has
    each turn's reward, beside the number of its last token behind the prompt, from 0.
    """

    prompt: Prompt
    seed: int
    messages: tuple[Message, ...]
    completions: tuple[str, ...] = ()
    last_reply: Reply | None = None
    turn_rewards: tuple[tuple[int, float], ...] = ()

    @property
    def was_ended(self) -> bool:
        """Whether the interaction has ended it, be it at the last turn that there could be."""
        return self.last_reply is not None and self.last_reply.done

    def info(self) -> dict[str, Any]:
        """What the environments say of the step that ended the last turn."""
        assert self.last_reply is not None
        info: dict[str, Any] = {"turn": len(self.turn_rewards), "reply": _text(self.last_reply)}
        if self.last_reply.info:
            info["reply_info"] = dict(self.last_reply.info)
        return info


class Answers(NamedTuple):
    """To N turns, as `mdp.reply` takes them."""

    ids: np.ndarray  # int32 [N, T]
    length: np.ndarray  # int32 [N]
    done: np.ndarray  # bool [N]


@dataclass(frozen=True)
class Partner:
    """Whom the policy talks with: an interaction, and how its replies become tokens."""

    interaction: Interaction | ReplyFn
    encoder: ReplyEncoder

    def start(self, prompt: Prompt, seed: int) -> Conversation:
        """A conversation in which only the prompt has been said."""
        return Conversation(prompt, seed, tuple(self.encoder.prompt_encoder.messages_of(prompt)))

    def answer(
        self, conversations: Sequence[Conversation], state: mdp.State
    ) -> tuple[list[Conversation], Answers]:
        """Ask once about N turns that have just ended in `state` [N].

        Raises:
            InteractionError: the interaction failed, or a reply cannot be appended.
        """
        tokenizer, rules = self.encoder.prompt_encoder.tokenizer, self.encoder.rules
        starts, ends = mdp.turn_start(state).tolist(), state.length.tolist()
        bounds = list(zip(state.tokens, starts, ends, strict=True))
        turns = [tokens[start:end] for tokens, start, end in bounds]
        texts = [
            tokenizer.decode_after(tokens[max(start - _CONTEXT, 0) : start], tokens[start:end])
            for tokens, start, end in bounds
        ]
        said = [
            (*conversation.messages, {"role": "assistant", "content": text})
            for conversation, text in zip(conversations, texts, strict=True)
        ]
        before = [conversation.last_reply for conversation in conversations]
        batch = TurnBatch(
            completions=texts,
            completion_ids=turns,
            messages=said,
            rows=[conversation.prompt.row for conversation in conversations],
            turns=[len(conversation.turn_rewards) + 1 for conversation in conversations],
            states=[None if reply is None else reply.state for reply in before],
            seeds=[conversation.seed for conversation in conversations],
        )
        replies = ask(self.interaction, batch)
        answers = Answers(
            ids=np.zeros((len(turns), rules.max_new_tokens), np.int32),
            length=np.zeros(len(turns), np.int32),
            done=np.array([not reply.goes_on for reply in replies]),
        )
        new: list[list[Message]] = [[] for _ in turns]
        for i in np.flatnonzero(mdp.waits(state) & ~answers.done).tolist():
            by_eos = int(turns[i][-1]) in rules.eos_token_ids
            try:
                new[i], ids = self.encoder.encode(
                    conversations[i].prompt, replies[i], ended_by_eos=by_eos
                )
            except UsageError as error:
                raise InteractionError(
                    f"The interaction {interaction_name(self.interaction)} gave a reply to "
                    f"{turn_name(batch[i])} that cannot be appended: {error}."
                ) from error
            answers.length[i] = len(ids)
            answers.ids[i, : len(ids)] = ids[: rules.max_new_tokens]
        fits = mdp.has_room(state, answers.length, rules).tolist()
        last = (mdp.response_length(state) - 1).tolist()
        after = [
            Conversation(
                prompt=conversation.prompt,
                seed=conversation.seed,
                messages=(*said[i], *new[i]) if fits[i] else said[i],
                completions=(*conversation.completions, texts[i]),
                last_reply=replies[i],
                turn_rewards=(*conversation.turn_rewards, (last[i], float(replies[i].reward))),
            )
            for i, conversation in enumerate(conversations)
        ]
        return after, answers


_CONTEXT = 16  # tokens before a turn that may have a say in its text


def _text(reply: Reply) -> str:
    """What a reply says, as far as it is text."""
    if reply.messages is not None:
        return "\n".join(str(message["content"]) for message in reply.messages)
    return reply.text or ""
