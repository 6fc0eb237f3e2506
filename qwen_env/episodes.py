"""Finished episodes: how they ended, what the reward function is told of them, and what they
earned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_env import mdp
from qwen_env.conversation import Conversation
from qwen_env.prompts import Prompt, PromptEncoder
from qwen_env.rewards import RewardBatch
from qwen_env.rewards.base import Scores
from qwen_env.tokenizer import Tokenizer
from qwen_env.tokenizer.chat import Message


@dataclass(frozen=True)
class Episode:
    """A finished episode: the tokens behind the prompt, and how it ended.

    `finish_reason` is "eos" (by an end-of-sequence id), "stop" (by a stop string), "length" (cut
    off at the limit), "done" (by the interaction's word) or "overflow" (a reply had no room). `own`
    says which tokens the policy chose; None means all.
    """

    prompt: Prompt
    response_ids: np.ndarray
    finish_reason: str
    own: np.ndarray | None = None
    conversation: Conversation | None = None

    @property
    def completion_ids(self) -> np.ndarray:
        """The tokens as they were chosen."""
        return self.response_ids if self.own is None else self.response_ids[self.own]

    @property
    def turn_rewards(self) -> Sequence[tuple[int, float]]:
        """As `Conversation` has them."""
        return () if self.conversation is None else self.conversation.turn_rewards

    @property
    def turns(self) -> list[tuple[int, int]]:
        """Where each turn begins and ends in `response_ids`."""
        if self.own is None:
            return [(0, len(self.response_ids))]
        edges = np.flatnonzero(np.diff(self.own, prepend=False, append=False)).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class Outcome:
    """What an episode earned at its end, and what its turns earned. `info` is that of its last
    step, `messages` the whole conversation where there was an interaction."""

    last_reward: float
    info: dict[str, Any]
    turn_rewards: Sequence[tuple[int, float]] = ()  # as `Conversation` has them
    token_rewards: Sequence[float] | None = (
        None  # of the policy's tokens, if `last_reward` is theirs
    )
    messages: Sequence[Message] | None = None

    @property
    def reward(self) -> float:
        """In all."""
        return self.last_reward + sum(reward for _, reward in self.turn_rewards)


def episodes_of(
    prompts: Sequence[Prompt],
    state: mdp.State,
    conversations: Sequence[Conversation | None] | None = None,
) -> list[Episode]:
    """The episodes that ended in `state`, a batch of N."""
    talks = conversations or [None] * len(prompts)
    turn_ended = [False] * len(prompts) if state.turn_ended is None else state.turn_ended.tolist()
    rows = zip(
        state.prompt_length.tolist(),
        state.length.tolist(),
        state.truncated.tolist(),
        mdp.was_stopped(state).tolist(),
        turn_ended,
        strict=True,
    )
    episodes = []
    for i, (start, end, truncated, stopped, ended) in enumerate(rows):
        if truncated:
            reason = "overflow" if ended else "length"
        elif ended or ((talk := talks[i]) is not None and talk.was_ended):
            reason = "done"
        else:
            reason = "stop" if stopped else "eos"
        own = None if state.own is None else state.own[i, start:end]
        episodes.append(Episode(prompts[i], state.tokens[i, start:end], reason, own, talks[i]))
    return episodes


def reward_batch(episodes: Sequence[Episode], encoder: PromptEncoder) -> RewardBatch:
    """What a reward function is told of `episodes`, whose prompts `encoder` has tokenised."""
    turns = [_turn_texts(episode, encoder.tokenizer) for episode in episodes]
    several = any(episode.own is not None for episode in episodes)
    return RewardBatch(
        prompts=[episode.prompt.text for episode in episodes],
        completions=["\n".join(texts) for texts in turns],
        prompt_ids=[episode.prompt.ids for episode in episodes],
        completion_ids=[episode.completion_ids for episode in episodes],
        rows=[episode.prompt.row for episode in episodes],
        finish_reasons=[episode.finish_reason for episode in episodes],
        messages=[_messages(*pair, encoder) for pair in zip(episodes, turns, strict=True)],
        response_ids=[episode.response_ids for episode in episodes] if several else (),
    )


def outcomes_of(
    episodes: Sequence[Episode], batch: RewardBatch, scores: Scores, missing_eos_penalty: float
) -> list[Outcome]:
    """What `episodes` earned, by the scores of their `batch`."""
    rewards, by_token = scores.values, scores.tokens
    components = {"score": rewards, **scores.components}
    if missing_eos_penalty:
        was_cut = np.isin(batch.finish_reasons, ("length", "overflow"))
        penalties = np.where(was_cut, -missing_eos_penalty, 0.0)
        components["missing_eos_penalty"] = penalties
        rewards = rewards + penalties
        for row, penalty in zip(by_token or (), penalties, strict=by_token is not None):
            row[-1] += penalty
    if any(episode.conversation is not None for episode in episodes):
        of_turns = [sum(reward for _, reward in e.turn_rewards) for e in episodes]
        components["turn_rewards"] = np.array(of_turns)
    columns = {name: values.tolist() for name, values in components.items()}
    return [
        Outcome(
            reward,
            {
                "completion": batch.completions[i],
                "completion_length": len(episodes[i].completion_ids),
                "finish_reason": batch.finish_reasons[i],
                "reward_components": {name: column[i] for name, column in columns.items()},
            },
            episodes[i].turn_rewards,
            None if by_token is None else by_token[i].tolist(),
            None if episodes[i].conversation is None else batch.messages[i],
        )
        for i, reward in enumerate(rewards.tolist())
    ]


def _turn_texts(episode: Episode, tokenizer: Tokenizer) -> list[str]:
    ids, first = episode.response_ids, episode.prompt.ids
    if episode.own is None and episode.conversation is None:
        return [tokenizer.decode_after(first, ids)]
    told = () if episode.conversation is None else episode.conversation.completions
    return [
        *told,
        *(
            tokenizer.decode_after(
                np.concatenate([first, ids[:start]]) if start else first, ids[start:end]
            )
            for start, end in episode.turns[len(told) :]
        ),
    ]


def _messages(episode: Episode, turns: Sequence[str], encoder: PromptEncoder) -> list[Message]:
    """The whole conversation, with a turn at its end that was cut off."""
    if episode.conversation is not None:
        said = list(episode.conversation.messages)
        num_ended = len(episode.conversation.turn_rewards)
    else:
        said, num_ended = encoder.messages_of(episode.prompt), 0
    return said + [{"role": "assistant", "content": text} for text in turns[num_ended:]]
