"""A run of PPO with some setting, measured on the held-out prompts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from learning.settings import Setting
from ppo_jax.agent import PPOAgent
from ppo_jax.algorithm import masked_mean
from ppo_jax.assembly import assemble
from ppo_jax.config import TrainConfig, preset
from ppo_jax.generation.episode_metrics import evaluation_means
from ppo_jax.sampling import Sampling, truncation
from qwen_env import mdp
from qwen_env.episodes import Episode, Outcome
from qwen_env.pocket import grammar

Record = dict[str, Any]

EVAL_COMPLETIONS = 2  # sampled for every held-out prompt
EVALUATE = 1_000_001  # folded into a seed's key; PPO folds in the iteration, which stays below
REMEMBERED = (
    "value/explained_variance",
    "policy/clip_fraction",
    "policy/approx_kl",
    "policy/grad_norm",
    "update/epochs",
    "rollout/eos_rate",
    "time/iteration_s",
)
"""Training metrics whose mean over the last third of the iterations is kept."""


class Bench:
    """What all runs share: model, task, prompts, reward; and the programs of one setting.

    Seeds of one setting that follow each other compile once: only the agent's state starts anew.
    """

    def __init__(self) -> None:
        self.network, self.task, held_out = assemble(preset("pocket").task)
        assert held_out is not None
        self.prompts, self.held_out = self.task.prompts, held_out
        self._last: tuple[TrainConfig, PPOAgent, nnx.State] | None = None

    def agent(self, config: TrainConfig) -> PPOAgent:
        """A fresh agent: the last one with a new state, if no more than the seed is different."""
        seedless = replace(config, run=replace(config.run, seed=0))
        if self._last is None or self._last[0] != seedless:
            assert config.run.num_iterations is not None
            agent = PPOAgent(self.network, self.task, config, config.run.num_iterations)
            self._last = seedless, agent, copy_of(agent.state.params)
        _, agent, params = self._last
        agent.config = config
        agent.state = agent.learner.init(copy_of(params), config.run.seed)
        return agent

    def train(
        self, setting: Setting, iterations: int, seed: int, tick: Callable[[], None]
    ) -> Record:
        """Train with `setting`; `tick` is called after every iteration.

        Returns:
            the curve of held-out measures, and means of training metrics over the last third.
        """
        agent = self.agent(setting.config(iterations, seed))
        num_tokens, metrics, curve = 0, [], []
        if setting.eval_every:
            curve.append({"iteration": 0, "tokens": 0} | self.measure(agent))
        for episodes, seen in agent.learn():
            num_tokens += episodes.num_tokens
            metrics.append(seen)
            every = setting.eval_every or agent.num_iterations
            if agent.iteration % every == 0 or agent.iteration == agent.num_iterations:
                point = {"iteration": agent.iteration, "tokens": num_tokens}
                curve.append(point | self.measure(agent))
            tick()
        last = metrics[-max(len(metrics) // 3, 1) :]
        means = {name: float(np.mean([seen[name] for seen in last])) for name in REMEMBERED}
        return {"curve": curve, "last_third": means}

    def measure(self, agent: PPOAgent) -> dict[str, float]:
        """Held-out means of sampled and of greedy responses; KL and entropy of the sampled ones.

        With one seed, all policies are measured with the same random numbers.
        """
        means: dict[str, float] = {}
        params, sampling = agent.state.params, agent.config.ppo.sampling
        key = jax.random.fold_in(jax.random.key(agent.config.run.seed), EVALUATE)
        for decoding, completions in (("sampled", EVAL_COMPLETIONS), ("greedy", 1)):
            done = agent.actor.respond(
                params,
                self.held_out,
                key,
                completions_per_prompt=completions,
                greedy=decoding == "greedy",
            )
            scored = evaluation_means(done.outcomes)
            scored["grammatical"] = float(grammatical(done.episodes, done.outcomes).mean())
            means |= {f"{decoding}/{name}": mean for name, mean in scored.items()}
            if decoding == "sampled":
                policy = nnx.State({k: v for k, v in params.items() if k != "critic"})
                graphdef, reference = nnx.split(self.network)
                divergence = kl_and_entropy(
                    graphdef, policy, reference, done.rollout.state, sampling
                )
                means |= {name: float(x) for name, x in divergence.items()}
        return means


@partial(jax.jit, static_argnums=(0, 4))
def kl_and_entropy(
    graphdef: Any, policy: nnx.State, reference: nnx.State, state: mdp.State, sampling: Sampling
) -> dict[str, Float[Array, ""]]:
    """KL(policy ‖ reference) a response and entropy a token of the policy, in nats.

    At every state of responses that the policy drew, both sum over the whole vocabulary: the same
    expectation as that of the sampled tokens' log-ratios, less their noise. The policy is as it is
    sampled from, the reference whole.

    Args:
        state: finished episodes, drawn from the policy.
    """
    positions = jnp.arange(state.tokens.shape[1])
    attended = positions < state.length[:, None]
    written = (attended & (positions >= state.prompt_length[:, None]))[:, 1:]

    def logits(params: nnx.State) -> Float[Array, "B S V"]:
        return nnx.merge(graphdef, params)(state.tokens, attended)[0][:, :-1]

    tempered = logits(policy) / sampling.temperature
    if sampling.is_truncated:
        rows = tempered.reshape(-1, tempered.shape[-1])
        kept = truncation(rows, sampling).reshape(tempered.shape)
        tempered = jnp.where(kept, tempered, -jnp.inf)
    log_p, log_q = jax.nn.log_softmax(tempered), jax.nn.log_softmax(logits(reference))
    p = jnp.exp(log_p)
    kl = jnp.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    entropy = -jnp.where(p > 0, p * log_p, 0.0).sum(-1)
    return {
        "kl": jnp.where(written, kl, 0.0).sum(-1).mean(),
        "entropy": masked_mean(entropy, written),
    }


def grammatical(episodes: list[Episode], outcomes: list[Outcome]) -> np.ndarray:
    """bool [N]: whether the whole review is one that the grammar can write."""
    reviews = (
        episode.prompt.text + outcome.info["completion"]
        for episode, outcome in zip(episodes, outcomes, strict=True)
    )
    return np.array([grammar.is_grammatical(review) for review in reviews])


def copy_of(params: nnx.State) -> nnx.State:
    """Arrays of its own, which an update may consume."""
    return jax.tree.map(jnp.copy, params)
