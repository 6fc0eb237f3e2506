"""What PPO has to beat: to draw several responses and keep the best, and to learn from those."""

from contextlib import suppress

import jax
import numpy as np
import optax
from jaxtyping import Float

from learning.best_of_n import best_of_n_kl, best_of_n_weights
from learning.imitation import in_random_order, maximise_likelihood
from learning.runs import Bench, Record, grammatical
from learning.settings import SETTINGS
from ppo_jax.agent import PPOAgent
from ppo_jax.generation.optimum import optimum, optimum_at
from qwen_env import mdp

BEST_OF = (1, 2, 4, 8, 16, 32, 64)
SFT_EPOCHS = 16
SFT_BATCH = 64
ROWS = 256  # responses that are drawn at one time
SAMPLES = 512  # to each held-out prompt, for the best policies
KLS = np.arange(1, 61) / 10  # nats a response, as far as they can be told from so many samples
BEST_OF_N_KEY, SFT_KEY, FRONTIER_KEY = 1_000_002, 1_000_003, 1_000_004  # see `runs.EVALUATE`


def best_of_n(bench: Bench, seed: int) -> Record:
    """The untrained model's best of n by the proxy, for each n of `BEST_OF`.

    The mean over all n-subsets of the largest n's samples: no sample is wasted.
    """
    count = max(BEST_OF)
    drawn = _untrained_responses(bench, count, seed, BEST_OF_N_KEY)
    order = np.argsort(drawn["score"], axis=1, kind="stable")
    means = {name: np.take_along_axis(x, order, axis=1).mean(0) for name, x in drawn.items()}
    return {
        "best_of": [
            {"n": n, "kl": best_of_n_kl(n)}
            | {name: float(best_of_n_weights(n, count) @ mean) for name, mean in means.items()}
            for n in BEST_OF
        ]
    }


def best_policies(bench: Bench, seed: int) -> Record:
    """What the best policy of each KL earns on the held-out prompts."""
    drawn = _untrained_responses(bench, SAMPLES, seed, FRONTIER_KEY)
    rewards, gold = drawn["score"], {"gold": drawn["gold"]}
    best = [optimum(rewards, np.inf, gold)]
    with suppress(ValueError):  # so many nats cannot be told from the samples
        best.extend(optimum_at(kl, rewards, gold) for kl in KLS)  # as far as it comes
    return {"frontier": [{"kl": p.kl, "score": p.reward, "gold": p.others["gold"]} for p in best]}


def _untrained_responses(
    bench: Bench, count: int, seed: int, use: int
) -> dict[str, Float[np.ndarray, "prompts count"]]:
    """Measures of the untrained model's responses to each held-out prompt."""
    agent = _untrained(bench, seed)
    key = jax.random.fold_in(jax.random.key(seed), use)
    per_call = max(ROWS // count, 1)
    columns: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(bench.held_out), per_call):
        done = agent.actor.respond(
            agent.state.params,
            bench.held_out[start : start + per_call],
            jax.random.fold_in(key, start),
            completions_per_prompt=count,
        )
        outcomes = done.outcomes
        for name, values in {
            "score": done.scores,
            "gold": np.array([o.info["reward_components"]["gold"] for o in outcomes]),
            "length_mean": np.array([o.info["completion_length"] for o in outcomes]),
            "grammatical": grammatical(done.episodes, outcomes),
        }.items():
            columns.setdefault(name, []).append(values.reshape(-1, count))
    return {name: np.concatenate(rows) for name, rows in columns.items()}


def sft(bench: Bench, n: int, seed: int) -> Record:
    """Maximise the likelihood of the best of n responses to each training prompt.

    With PPO's optimizer, learning rate and batch size; the learning rate falls linearly to zero.
    """
    agent = _untrained(bench, seed)
    chosen, num_tokens = _best_responses(bench, agent, n, seed)
    batches = in_random_order(
        len(chosen.length),
        num_epochs=SFT_EPOCHS,
        batch_size=SFT_BATCH,
        rng=np.random.default_rng([seed, SFT_KEY]),
    )
    config = agent.config.optimizer
    learning_rate = optax.linear_schedule(config.learning_rate, 0.0, len(batches))
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adam(learning_rate, config.adam_b1, config.adam_b2, config.adam_eps),
    )
    params = maximise_likelihood(
        agent.learner.graphdef,
        agent.state.params,
        chosen,
        batches,
        rules=bench.task.rules,
        sampling=agent.config.ppo.sampling,
        optimizer=optimizer,
    )
    agent.state = agent.state._replace(params=params)
    return {"curve": [{"tokens": num_tokens, **bench.measure(agent)}]}


def _best_responses(bench: Bench, agent: PPOAgent, n: int, seed: int) -> tuple[mdp.State, int]:
    """The best of n responses to each training prompt, and how many tokens all of them had."""
    key = jax.random.fold_in(jax.random.key(seed), SFT_KEY)
    per_call, num_tokens = ROWS // n, 0
    chosen: list[mdp.State] = []
    for start in range(0, len(bench.prompts), per_call):
        prompts = bench.prompts[start : start + per_call]
        key_here = jax.random.fold_in(key, start)
        done = agent.actor.respond(agent.state.params, prompts, key_here, completions_per_prompt=n)
        best = done.scores.reshape(-1, n).argmax(axis=1) + n * np.arange(len(prompts))
        chosen.append(mdp.at(jax.device_get(done.rollout.state), best))
        num_tokens += done.num_tokens
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chosen), num_tokens


def _untrained(bench: Bench, seed: int) -> PPOAgent:
    return bench.agent(SETTINGS[0].config(1, seed))
