"""Replies as tokens that follow what the policy wrote, of which nothing is ever tokenised again.

The tokens of a conversation are the state of the MDP. To render the conversation anew and tokenise
it would give other tokens than those that were sampled; and what two renderings differ by is not
what stands between them (Qwen2.5's template writes a newline behind a message that one of them has
and the other has not). So a chat is rendered once, with a mark in the place of all that the policy
said. What the template writes behind the mark, and behind the end of sequence that the policy wrote
itself, is tokenised on its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from qwen_env.arguments import integer
from qwen_env.errors import UsageError
from qwen_env.interaction import Reply
from qwen_env.mdp import Rules
from qwen_env.prompts import Prompt, PromptEncoder
from qwen_env.tokenizer.chat import Message

_MARK = "said-1c9f5e"  # stands for what the policy said; templates may change case or strip it


def _mark_beside(*texts: Any) -> str:
    """One that occurs in none of `texts`, whoever wrote them."""
    known = repr(texts)
    return next(mark for i in count() if (mark := f"{_MARK}{i or ''}") not in known)


@dataclass(frozen=True)
class ReplyEncoder:
    """Turns replies into messages and tokens.

    Args:
        prompt_encoder: what rendered and tokenised the prompts.
        rules: of the MDP.
    """

    prompt_encoder: PromptEncoder
    rules: Rules

    def encode(
        self, prompt: Prompt, reply: Reply, *, ended_by_eos: bool
    ) -> tuple[list[Message], list[int]]:
        """The messages of a reply that goes on, and the tokens that follow the turn; at least one.

        Args:
            ended_by_eos: the turn ends with an end-of-sequence id, and not with a stop string.

        Raises:
            UsageError: there is nothing in it, an id is outside the vocabulary, or the chat
                template cannot be continued.
        """
        tokenizer = self.prompt_encoder.tokenizer
        if reply.ids is not None:
            ids = self._checked(reply.ids)
            return [{"role": "user", "content": tokenizer.decode(ids)}], ids
        messages = reply.messages
        if messages is None:
            messages = [{"role": "user", "content": reply.text}]
        messages = _checked_messages(messages)
        before = self.prompt_encoder.chat_of(prompt.row)
        if before is None:  # the prompt is plain text, and so is what follows
            ids = tokenizer.encode("".join(message["content"] for message in messages))
        else:
            tail, eos = self._behind(prompt.row, before, messages)
            ids = tokenizer.encode(eos + tail)
            if ended_by_eos:  # the policy wrote it
                ids = ids[ids.index(tokenizer.encode(eos)[-1]) + 1 :]
        if not ids:
            raise UsageError("it holds no tokens; end the episode with done=True instead")
        return messages, ids

    def _behind(
        self, row: Mapping[str, Any], before: Sequence[Message], new: Sequence[Message]
    ) -> tuple[str, str]:
        """What the template writes behind a turn's end of sequence, and that end of sequence."""
        chat, before, said = before, list(before), (mark := _mark_beside(row, before, new))
        if before[-1]["role"] == "assistant":  # a prompt that the policy went on with
            said = f"{before.pop()['content']}{mark}"
        text = self.prompt_encoder.render(
            row,
            [*before, {"role": "assistant", "content": said}, *new],
            add_generation_prompt=True,
            continue_final_message=False,
        )
        if text.count(mark) != 1:
            raise UsageError(
                "the chat template does not write what the assistant said once, so that it cannot "
                "be continued; use another"
            )
        head, _, tail = text.partition(mark)
        live = self.prompt_encoder.render(row, chat)
        if head.startswith(live) and head != live:
            raise UsageError(
                f"the chat template writes {head[len(live) :][:20]!r} before what the assistant "
                "says, which the prompt leaves to the policy, so that it cannot be continued; use "
                "another"
            )
        backend = self.prompt_encoder.tokenizer.backend
        names = filter(None, map(backend.id_to_token, self.rules.eos_token_ids))
        found = [name for name in names if tail.lstrip().startswith(name)]
        if not found:
            raise UsageError(
                f"the chat template ends what the assistant said with {tail.strip()[:20]!r}, which "
                "is none of the end-of-sequence tokens, so that it cannot be continued; use "
                "another, or name its id in eos_token_ids"
            )
        eos = max(found, key=len)
        tail = tail.lstrip()[len(eos) :]
        for message in new:
            if message["content"].strip() not in tail:
                raise UsageError(
                    f"the chat template leaves out what the role {message['role']!r} says, or "
                    "changes it, so that it cannot be continued; use another"
                )
        return tail, eos

    def _checked(self, ids: Any) -> list[int]:
        try:
            is_plain = all(type(i) is int for i in ids)
            checked = list(ids) if is_plain else [integer("an id", i) for i in ids]
        except TypeError:
            raise UsageError(f"its ids are a {type(ids).__name__}; they must be a list") from None
        if not checked:
            raise UsageError("it holds no tokens; end the episode with done=True instead")
        wrong = [i for i in checked if not 0 <= i < self.rules.vocab_size]
        if wrong:
            raise UsageError(
                f"it holds the id {wrong[0]}, which is outside the vocabulary (0 to "
                f"{self.rules.vocab_size - 1})"
            )
        return checked


def _checked_messages(messages: Any) -> list[Message]:
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    if not is_list or not all(isinstance(message, Mapping) for message in messages):
        raise UsageError(f"its messages are {messages!r}; they must be a list of messages")
    for message in messages:
        if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise UsageError(f"it holds {message!r}; a message has 'role' and 'content', both text")
    return [dict(message) for message in messages]
