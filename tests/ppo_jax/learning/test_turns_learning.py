"""Over turns, PPO learns what pays: to read a reply; and, where turns cost and being cut off does
not, never to end one."""

import numpy as np
import pytest

from ppo_jax.agent import PPOAgent
from ppo_jax.config import OptimizerConfig, PPOConfig, TrainConfig
from qwen_env.interaction import Reply

A, B, GO_ON = 300, 301, 302  # the first two end a turn


def says_one_of_two(batch):
    """Then pays for the same word."""
    words = [(A, B)[seed % 2] for seed in batch.seeds]
    return [
        Reply(ids=[word])
        if turn.number == 1
        else Reply(reward=float(turn.completion_ids[-1] == word))
        for word, turn in zip(words, batch, strict=True)
    ]


def blames(batch):
    return [Reply(ids=[A], reward=-1.0) for _ in batch]


def nothing(batch):
    return np.zeros(len(batch), np.float32)


@pytest.fixture
def make_agent(make_network, make_test_task, tokenizer):
    def make(interaction, words, num_iterations, max_new_tokens, **changes):
        task = make_test_task(
            prompts=["The plot"],
            reward=nothing,
            interaction=interaction,
            max_turns=2,
            max_prompt_length=2,
            max_new_tokens=max_new_tokens,
            eos_token_ids=[A, B],
            forbidden_token_ids=[i for i in range(tokenizer.vocab_size) if i not in words],
            **changes,
        )
        config = TrainConfig(
            ppo=PPOConfig(batch_size=64, kl_coef=0.0, num_epochs=1),
            optimizer=OptimizerConfig(learning_rate=2e-2, schedule="constant"),
        )
        return PPOAgent(
            make_network(sharpness=1.0, num_hidden_layers=1), task, config, num_iterations
        )

    return make


def test_what_a_reply_says_is_read(make_agent):
    agent = make_agent(says_one_of_two, (A, B), num_iterations=25, max_new_tokens=3)
    paid = [metrics["objective/score"] for _, metrics in agent.learn()]
    assert abs(paid[0] - 0.5) < 0.25
    assert np.mean(paid[-3:]) > 0.95


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A turn earned less than 0")
def test_a_policy_that_is_blamed_learns_not_to_end_its_turns(make_agent):
    agent = make_agent(blames, (A, GO_ON), num_iterations=15, max_new_tokens=6)
    turns = [metrics["rollout/turns_mean"] for _, metrics in agent.learn()]
    assert turns[0] > 0.8
    assert turns[-1] < 0.1


@pytest.mark.slow
def test_unless_being_cut_off_costs_more(make_agent):
    agent = make_agent(
        blames, (A, GO_ON), num_iterations=15, max_new_tokens=6, missing_eos_penalty=3.0
    )
    turns = [metrics["rollout/turns_mean"] for _, metrics in agent.learn()]
    assert turns[-1] > 1.9
