"""A game of another package in the compiled rollout, and the same game through the environment."""

import gymnasium as gym
import jax
import numpy as np
import pytest
from flax import nnx

import qwen_env  # noqa: F401  (registers QwenText-v0)
from ppo_jax.generation.actor import Actor
from ppo_jax.sampling import Sampling
from qwen_env.tasks import load_named_task

SPEC = "textarena:GuessTheNumber-v0?min_number=0&max_number=9&size=8&held_out_size=1"


@pytest.mark.slow
def test_a_game_is_played_and_played_again(make_network, tokenizer):
    """By a policy that can write digits, each of which ends its turn."""
    digits = {tokenizer.encode(str(digit))[-1] for digit in range(10)}
    arguments = {
        "task": load_named_task(SPEC),
        "max_new_tokens": 200,
        "forbidden_token_ids": sorted(set(range(tokenizer.vocab_size)) - digits - {0}),
        "eos_token_ids": 0,
        "stop": list("0123456789"),
        "min_new_tokens": 1,
    }
    env = gym.make("QwenText-v0", **arguments).unwrapped
    task, network = env.task, make_network(sharpness=1.0)
    done = Actor(network, task, Sampling()).respond(
        nnx.state(network), list(task.prompts), jax.random.key(0), completions_per_prompt=2
    )
    state = jax.device_get(done.rollout.state)
    for row, (episode, outcome) in enumerate(zip(done.episodes, done.outcomes, strict=True)):
        env.reset(options={"prompt_index": episode.prompt.index})
        for action in episode.completion_ids.tolist():
            observation, reward, *flags, info = env.step(action)
        np.testing.assert_array_equal(observation["input_ids"], state.tokens[row])
        assert flags == [state.terminated[row], state.truncated[row]]
        assert {name: info[name] for name in outcome.info} == outcome.info
        assert reward == outcome.reward
    components = [outcome.info["reward_components"] for outcome in done.outcomes]
    assert sum(each["accuracy"] for each in components) > 2, "some of the 16 are won"
    assert max(each["turns"] for each in components) > 2
    assert not any(each["game_error"] for each in components)
