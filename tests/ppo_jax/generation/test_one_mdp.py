"""One MDP, two drivers: compiled rollouts, replayed token by token through the environments.

What an environment must say at every step is computed here from the rollout's last state alone:
the tokens so far, and padding behind.
"""

import functools

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import qwen_env  # noqa: F401  (registers QwenText-v0)
from ppo_jax.generation.rollout import rollout
from qwen_env import mdp
from qwen_env.episodes import episodes_of
from qwen_env.rewards import RewardBatch
from qwen_env.task import make_task

ROWS = 4
# Examples are whole rollouts, so that looking for a smaller one would take minutes.
FEW = {"deadline": None, "derandomize": True, "phases": [Phase.generate]}


def letters_e_and_ending(batch: RewardBatch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    counts = np.array([text.count("e") for text in batch.completions], np.float32)
    ended = np.array([reason != "length" for reason in batch.finish_reasons], np.float32)
    return counts + ended / 2, {"ended": ended}


@functools.cache
def compiled_rollout(graphdef):
    @functools.partial(jax.jit, static_argnames="rules")
    def run(params, prompt_ids, prompt_length, key, rules):
        network = nnx.merge(graphdef, params)
        return rollout(network, prompt_ids, prompt_length, key, rules=rules).state

    return run


def roll_out(network, task, prompts, seed) -> mdp.State:
    """The compiled rollout's last state, as NumPy arrays."""
    graphdef, params = nnx.split(network)
    first = task.initial_state(prompts)
    state = compiled_rollout(graphdef)(
        params,
        jnp.asarray(first.tokens[:, : task.rules.max_prompt_length]),
        jnp.asarray(first.prompt_length),
        jax.random.key(seed),
        rules=task.rules,
    )
    return jax.device_get(state)


def observation_after(state: mdp.State, row: int, written: int) -> dict[str, np.ndarray]:
    length = state.prompt_length[row] + written
    is_real = np.arange(state.tokens.shape[1]) < length
    return {
        "input_ids": np.where(is_real, state.tokens[row], 0).astype(np.int32),
        "attention_mask": is_real.astype(np.int8),
        "length": np.array([length], np.int32),
        "prompt_length": np.array([state.prompt_length[row]], np.int32),
    }


def length_of(state: mdp.State, row: int) -> int:
    return int(state.length[row] - state.prompt_length[row])


def action_of(state: mdp.State, row: int, step: int) -> int:
    return int(state.tokens[row, state.prompt_length[row] + step])


def replay_one_by_one(env, state, indices, outcomes) -> None:
    """Through `gymnasium.make`."""
    for row, index in enumerate(indices):
        said, _ = env.reset(options={"prompt_index": index})
        assert data_equivalence(said, observation_after(state, row, 0), exact=True)
        last = length_of(state, row)
        for step in range(last):
            assert env.unwrapped.action_mask()[action_of(state, row, step)] == 1
            said, reward, *flags, info = env.step(action_of(state, row, step))
            assert data_equivalence(said, observation_after(state, row, step + 1), exact=True)
            if step < last - 1:
                assert (reward, flags, info) == (0.0, [False, False], {})
        assert flags == [state.terminated[row], state.truncated[row]]
        assert reward == outcomes[row].reward
        assert reward == info["completion"].count("e") + flags[0] / 2
        assert info == outcomes[row].info


def replay_together(envs, state, indices, outcomes) -> None:
    """Through `gymnasium.make_vec`, where rows that have ended go on with other prompts."""
    rows = range(len(indices))
    envs.reset()
    for row, index in enumerate(indices):
        mask = np.arange(len(indices)) == row
        said, _ = envs.reset(options={"prompt_index": index, "reset_mask": mask})
    lengths = np.array([length_of(state, row) for row in rows])
    for step in range(lengths.max() + 1):
        for row in rows:
            if step <= lengths[row]:  # afterwards it has a new prompt
                now = {name: np.asarray(array[row]) for name, array in said.items()}
                assert data_equivalence(now, observation_after(state, row, step), exact=True)
        if step == lengths.max():
            break
        anything = envs.unwrapped.action_mask().argmax(axis=-1)
        actions = np.array(
            [action_of(state, r, step) if step < lengths[r] else anything[r] for r in rows]
        )
        said, rewards, terminated, truncated, infos = envs.step(actions)
        is_last = lengths == step + 1
        running = lengths >= step + 1
        np.testing.assert_array_equal(terminated[running], (is_last & state.terminated)[running])
        np.testing.assert_array_equal(truncated[running], (is_last & state.truncated)[running])
        assert not rewards[running & ~is_last].any()
        for row in np.flatnonzero(is_last):
            assert rewards[row] == outcomes[row].reward
            assert infos["_completion"][row]
            for name in ("completion", "completion_length", "finish_reason"):
                assert infos[name][row] == outcomes[row].info[name]
            components = {
                name: infos["reward_components"][name][row] for name in ("score", "ended")
            }
            assert components == outcomes[row].info["reward_components"]


def assert_environments_replay(network, arguments, indices, seeds) -> None:
    task = make_task(**arguments)
    prompts = [task.prompts[index] for index in indices]
    env = gym.make("QwenText-v0", **arguments)
    envs = gym.make_vec("QwenText-v0", num_envs=len(indices), **arguments)
    for seed in seeds:
        state = roll_out(network, task, prompts, seed)
        assert mdp.has_ended(state).all()
        outcomes = task.evaluate(episodes_of(prompts, state))
        replay_one_by_one(env, state, indices, outcomes)
        replay_together(envs, state, indices, outcomes)
    env.close()
    envs.close()


indices_and_seeds = {
    "indices": st.lists(st.integers(0, 4), min_size=ROWS, max_size=ROWS),
    "seeds": st.lists(st.integers(0, 2**31), min_size=1, max_size=2),
}


@pytest.mark.slow
@settings(max_examples=8, **FEW)
@given(texts=st.lists(st.text(min_size=1, max_size=9), min_size=5, max_size=5), **indices_and_seeds)
def test_whatever_the_prompts(make_network, tokenizer, texts, indices, seeds):
    """One program: prompts of all kinds, cut to the limit, and any seed."""
    arguments = {
        "tokenizer": tokenizer,
        "prompts": texts,
        "prompt_overflow": "truncate_left",
        "reward": letters_e_and_ending,
        "max_prompt_length": 6,
        "max_new_tokens": 8,
        "eos_token_ids": (0, *range(260, 420)),
    }
    assert_environments_replay(make_network(), arguments, indices, seeds)


@st.composite
def rules(draw):
    """Arguments of the environment that make its rules; each new set compiles."""
    ids = st.integers(0, 713)
    response_limit = draw(st.integers(1, 7))
    # Narrow sets are hardly ever hit, wide ones end most episodes at once: both kinds.
    first, width = draw(st.integers(0, 500)), draw(st.sampled_from([1, 60, 200]))
    return {
        "max_prompt_length": draw(st.integers(1, 8)),
        "max_new_tokens": response_limit,
        "min_new_tokens": draw(st.integers(0, response_limit)),
        "stop": draw(st.sampled_from([(), "e", ["a", " t"]])),
        "eos_token_ids": range(first, first + width),
        "forbidden_token_ids": draw(st.lists(ids, max_size=200)),
        "vocab_size": draw(st.sampled_from([714, 768])),  # the second is padded
    }


@pytest.mark.slow
@settings(max_examples=6, **FEW)
@given(rules=rules(), **indices_and_seeds)
def test_whatever_the_rules(make_network, tokenizer, rules, indices, seeds):
    arguments = rules | {
        "tokenizer": tokenizer,
        "prompts": ["The plot", "It was", "All in all, the songs", "A", "My friend and I"],
        "prompt_overflow": "truncate_left",
        "reward": letters_e_and_ending,
    }
    network = make_network(vocab_size=rules["vocab_size"], num_hidden_layers=1)
    assert_environments_replay(network, arguments, indices, seeds)
