"""What mistakes that PPO implementations made would do to the embedded pocket task, in numbers.

    python benchmarks/mistakes.py          a table, in about a minute on two CPU cores

Each is made here beside what this project does, on the same 64 responses of the untrained policy.
docs/mistakes.md says who made it, and which test would have told.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import PPOAgent, preset
from ppo_jax.algorithm import generalized_advantage_estimation
from ppo_jax.generation.actor import Experience
from ppo_jax.generation.rollout import Rollout
from ppo_jax.learning.optimizer import adamw
from ppo_jax.learning.response_outputs import response_outputs
from ppo_jax.sampling import Sampling
from qwen_env import mdp


class Mistake(NamedTuple):
    """What is measured, with the mistake and without."""

    name: str
    measure: str
    wrong: float
    right: float


def agent_with(**ppo: float) -> PPOAgent:
    """The pocket preset with some settings changed."""
    config = preset("pocket")
    return PPOAgent.from_config(
        dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, **ppo))
    )


def logprobs_of(agent: PPOAgent, rollout: Rollout, sampling: Sampling, masked: bool) -> np.ndarray:
    """Of the tokens of a rollout, 0 beyond the responses, normalised as `sampling` says.

    Args:
        masked: over the ids that each token was drawn from, or over all.
    """
    state = rollout.state
    rows = state.tokens, state.prompt_length, state.length
    outputs = jax.jit(partial(response_outputs, rules=agent.task.rules, sampling=sampling))(
        agent.network, *rows, rollout.sampling_mask if masked else None
    )
    return np.where(mask_of(rollout), outputs.logprobs, 0)


def mask_of(rollout: Rollout) -> np.ndarray:
    state = jax.device_get(rollout.state)
    mask: np.ndarray = mdp.response_mask(state, rollout.logprobs.shape[1], np)
    return mask


def of_rewards(experience: Experience, gamma: float) -> Iterator[Mistake]:
    scores = experience.scores
    shares = 1 / (1 + np.exp(-scores))  # a reward between 0 and 1, as many are
    stored = np.zeros(len(scores), np.int32)
    stored[:] = shares
    yield Mistake(
        "rewards in an array of integers",
        "standard deviation of scores between 0 and 1",
        float(stored.std()),
        float(shares.std()),
    )
    mask = mask_of(experience.rollout)
    length = mask.sum(1)
    paid = []
    for place in (length, length - 1):
        rewards = np.zeros((len(scores), mask.shape[1] + 1), np.float32)
        rewards[np.arange(len(scores)), place] = scores
        wide = np.pad(mask, [(0, 0), (0, 1)])
        nothing = np.zeros_like(rewards)
        _, returns = generalized_advantage_estimation(
            rewards, nothing, nothing, np.zeros(len(scores)), mask=wide, gamma=gamma, gae_lambda=1.0
        )
        paid.append(float(np.abs(returns[:, 0]).mean()))
    yield Mistake("the score at the first padding token", "mean size of a return", *paid)


def of_masks(experience: Experience, agent: PPOAgent) -> Iterator[Mistake]:
    eos = agent.task.rules.eos_token_ids[0]
    state = jax.device_get(experience.rollout.state)
    mask = mask_of(experience.rollout)
    responses = np.stack(
        [
            row[start : start + mask.shape[1]]
            for row, start in zip(
                np.pad(state.tokens, [(0, 0), (0, mask.shape[1])], constant_values=eos),
                state.prompt_length,
                strict=True,
            )
        ]
    )
    guessed = mask & (responses != eos)  # ids != pad, where padding is end-of-sequence
    ended = state.terminated
    last = mdp.response_length(state) - 1
    rows = np.arange(len(ended))
    yield Mistake(
        "padding told by its id, which is end-of-sequence",
        "share of ended responses whose last token is learnt",
        float(guessed[rows, last][ended].mean()),
        float(mask[rows, last][ended].mean()),
    )
    asked = state.tokens.copy()
    asked[:, 0] = eos  # such as a chat template's, behind an earlier turn
    first = (asked == eos).argmax(1)
    yield Mistake(
        "an end of sequence in the prompt taken for the response's",
        "mean tokens of a response",
        float(np.maximum(first - state.prompt_length, 0).mean()),
        float(mask.sum(1).mean()),
    )


def of_temperatures() -> Iterator[Mistake]:
    agent = agent_with(temperature=0.9)
    experience = agent.collect()
    own, other = (
        logprobs_of(agent, experience.rollout, Sampling(t), masked=True) for t in (0.9, 1.0)
    )
    yield Mistake(
        "one temperature (0.9) for the policy, another for the reference",
        "KL of the untrained policy from itself, nats a response",
        float((own - other).sum() / len(own)),
        agent.update(experience)["objective/kl"],
    )


def of_truncation() -> Iterator[Mistake]:
    agent = agent_with(top_p=0.9)
    experience = agent.collect()
    rollout, mask = experience.rollout, mask_of(experience.rollout)
    kept = logprobs_of(agent, rollout, Sampling(), masked=True)
    full = logprobs_of(agent, rollout, Sampling(), masked=False)
    drawn = np.asarray(rollout.logprobs)
    yield Mistake(
        "top-p 0.9 for the sampler, all ids for the learner",
        "mean ratio before any step",
        float(np.exp(full - drawn)[mask].mean()),
        float(np.exp(kept - drawn)[mask].mean()),
    )
    yield Mistake(
        "the sampler's ids for the reference as well",
        "KL that top-p 0.9 puts between the untrained policy and itself, nats a response",
        float((drawn - kept).sum() / len(mask)),
        agent.update(experience)["objective/kl"],
    )


def of_resuming(agent: PPOAgent) -> Iterator[Mistake]:
    for _ in range(5):
        agent.update(agent.collect())
    experience, saved = agent.collect(), jax.tree.map(jnp.copy, agent.state)
    steps = []
    for opt_state in (adamw(agent.config.optimizer).init(saved.params), saved.opt_state):
        agent.state = jax.tree.map(jnp.copy, saved._replace(opt_state=opt_state))
        agent.update(experience)
        moved = jax.tree.map(lambda a, b: jnp.square(a - b).sum(), agent.state.params, saved.params)
        steps.append(float(np.sqrt(sum(jax.tree.leaves(moved)))))
    yield Mistake(
        "an optimizer that starts afresh when a run is resumed",
        "how far iteration 6 moves the parameters",
        *steps,
    )


def mistakes() -> Iterator[Mistake]:
    """All of them."""
    agent = agent_with()
    experience = agent.collect()
    yield from of_rewards(experience, agent.config.ppo.gamma)
    yield from of_masks(experience, agent)
    yield from of_temperatures()
    yield from of_truncation()
    yield from of_resuming(agent)


if __name__ == "__main__":
    print("| Mistake | Measure | with it | without |\n|---|---|---:|---:|")
    for mistake in mistakes():
        print(f"| {mistake.name} | {mistake.measure} | {mistake.wrong:.3g} | {mistake.right:.3g} |")
