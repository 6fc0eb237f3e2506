"""From scored episodes to a batch to learn from: rewards, advantages, returns.

Shapes: B batch, T response limit, S = P + T, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from ppo_jax import algorithm
from ppo_jax.config import PPOConfig
from ppo_jax.generation.rollout import Rollout
from ppo_jax.learning.metrics import Distributions, Metrics, Quotient
from ppo_jax.learning.response_outputs import ResponseOutputs
from qwen_env import mdp


class Controls(NamedTuple):
    """What PPO adjusts from batch to batch beside the parameters."""

    kl_coef: Float[Array, ""]
    score_moments: algorithm.RunningMoments


class Batch(NamedTuple):
    """B episodes, ready to be learnt from; response-aligned arrays are 0 beyond the response."""

    tokens: Int[Array, "B S"]
    prompt_length: Int[Array, "B"]
    length: Int[Array, "B"]
    mask: Bool[Array, "B T"]
    sampling_mask: UInt8[Array, "B T V/8"] | None  # what each token was drawn from, if truncated
    logprobs: Float[Array, "B T"]  # of the policy that wrote the responses
    values: Float[Array, "B T"] | None  # None, as the returns, without a value function
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"] | None


class TokenNumbers(NamedTuple):
    """What is known of each token of a response before the update; 0 beyond it."""

    logprobs: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    values: Float[Array, "B T"] | None
    rewards: Float[Array, "B T"]
    advantages: Float[Array, "B T"]


class Prepared(NamedTuple):
    """What `make_batch` makes of a rollout."""

    batch: Batch
    controls: Controls  # for the next batch
    metrics: Metrics
    distributions: Distributions
    tokens: TokenNumbers  # to look at, not to learn from


def make_batch(
    rollout: Rollout,
    score: Float[Array, "B"],
    old: ResponseOutputs,
    ref_logprobs: Float[Array, "B T"],
    controls: Controls,
    config: PPOConfig,
    rewards: Float[Array, "B T"] | None = None,
) -> Prepared:
    """Score every token, and say what to watch.

        score -> scaled by the deviation of all scores so far, clipped to ± score_clip
              -> given at the last token, less the KL penalty of every token
              -> whitened -> GAE, or another estimate -> advantages whitened over the batch

    Args:
        score: the reward function's answer for each episode.
        old: of the policy that wrote the responses, normalised over what it drew them from.
        ref_logprobs: of the reference model, normalised over all ids that the rules allow.
        controls: as the batches before this one left them.
        rewards: what each token earned, where not only the last one earned the score.
    """
    state = rollout.state
    mask = mdp.response_mask(state, rollout.logprobs.shape[1], jnp)  # the policy's own tokens
    is_last = jnp.arange(mask.shape[1]) == mdp.response_length(state)[:, None] - 1
    of_rollout, of_learner, ref_logprobs = (
        jnp.where(mask, x, 0.0) for x in (rollout.logprobs, old.logprobs, ref_logprobs)
    )
    logprobs = of_rollout if config.old_logprobs == "rollout" else of_learner
    moments = algorithm.updated_moments(controls.score_moments, score)

    def scaled(x: Array) -> Array:
        x = x / moments.std if config.scale_scores else x
        return (
            x if config.score_clip is None else jnp.clip(x, -config.score_clip, config.score_clip)
        )

    terminal_reward = scaled(score)
    if rewards is not None:
        terminal_reward = scaled(jnp.where(is_last, rewards, 0.0).sum(-1))
    # The value of the state in which it was cut off stands for what it earned there.
    bootstraps = mdp.was_cut_off(state) & (config.length_limit == "bootstrap")
    if config.length_limit == "bootstrap":
        terminal_reward = jnp.where(bootstraps, 0.0, terminal_reward)
    paid = algorithm.token_rewards(
        terminal_reward,
        logprobs,
        ref_logprobs,
        mask,
        kl_coef=controls.kl_coef,
        estimator=config.kl_penalty,
        level=config.kl_level,
    )
    if rewards is not None:
        paid += scaled(jnp.where(is_last, 0.0, rewards))
    reward_sum = paid.sum(-1).mean()
    if config.whiten_rewards:
        paid = algorithm.masked_whiten(paid, mask, shift_mean=False)
    values, advantages, returns = _advantages(
        paid, old, mask, is_last & ~bootstraps[:, None], config
    )
    learnt = mask
    if config.completions_per_prompt > 1:
        is_equal = algorithm.is_in_equal_group(score, config.completions_per_prompt)
        if config.drop_equal_groups:
            learnt &= ~is_equal[:, None]
    whitened = algorithm.masked_whiten(advantages, learnt)
    if config.whitening == "batch":
        advantages = whitened
    if config.importance_cap is not None:
        weight = jnp.minimum(jnp.exp(of_learner - of_rollout), config.importance_cap)
        advantages *= weight
    kl = jnp.where(mask, logprobs - ref_logprobs, 0.0)
    mean_kl = kl.sum(-1).mean()
    clamped = algorithm.is_clamped(logprobs, ref_logprobs, config.kl_penalty)
    metrics: Metrics = {
        "objective/score": score.mean(),
        "objective/score_std": score.std(),
        "objective/kl": mean_kl,
        "objective/kl_coef": controls.kl_coef,
        "objective/kl_clamped_fraction": algorithm.masked_mean(clamped, mask),
        "objective/reward": reward_sum,
        "policy/entropy": algorithm.masked_mean(old.entropy, mask),
        "rollout/length_mean": mask.sum(-1).mean(),
        "rollout/eos_rate": state.terminated.mean(),
        "rollout/logprob_gap_max": jnp.abs(of_rollout - of_learner).max(),
        "rollout/kl": algorithm.approx_kl(of_rollout, of_learner, mask, "k3"),
    }
    if values is not None and returns is not None:
        metrics["value/mean"] = algorithm.masked_mean(values, mask)
        metrics["value/explained_variance"] = explained_variance(values, returns, mask)
        if config.bins is not None:
            is_beyond = (returns < config.bins.low) | (returns > config.bins.high)
            metrics["value/out_of_range_fraction"] = algorithm.masked_mean(is_beyond, mask)
    if config.completions_per_prompt > 1:
        metrics["objective/equal_groups_fraction"] = is_equal.mean()
    if state.num_turns is not None:
        metrics["rollout/turns_mean"] = state.num_turns.mean()
        metrics["rollout/overflow_rate"] = (state.truncated & ~mdp.was_cut_off(state)).mean()
    distributions: Distributions = {
        "advantage": algorithm.masked_histogram(whitened, learnt, algorithm.ADVANTAGE_EDGES),
        "kl_by_position": _mean_by_position(kl, mask),
        "entropy_by_position": _mean_by_position(old.entropy, mask),
    }
    batch = Batch(
        tokens=state.tokens,
        prompt_length=state.prompt_length,
        length=state.length,
        mask=learnt,
        sampling_mask=rollout.sampling_mask,
        logprobs=logprobs,
        values=values,
        advantages=advantages,
        returns=returns,
    )
    kl_coef = controls.kl_coef
    if config.kl_target is not None:
        assert config.kl_horizon is not None, "see PPOConfig.for_run"
        kl_coef = algorithm.adapted_kl_coef(
            kl_coef,
            mean_kl,
            target=config.kl_target,
            num_episodes=score.shape[0],
            horizon=config.kl_horizon,
        )
    tokens = TokenNumbers(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        entropy=jnp.where(mask, old.entropy, 0.0),
        values=values,
        rewards=paid,
        advantages=advantages,
    )
    return Prepared(batch, Controls(kl_coef, moments), metrics, distributions, tokens)


def _advantages(
    rewards: Float[Array, "B T"],
    old: ResponseOutputs,
    mask: Bool[Array, "B T"],
    terminated: Bool[Array, "B T"],
    config: PPOConfig,
) -> tuple[Float[Array, "B T"] | None, Float[Array, "B T"], Float[Array, "B T"] | None]:
    """Values, advantages and returns, as `config.advantage` says."""
    estimate = partial(
        algorithm.generalized_advantage_estimation,
        rewards,
        terminated=terminated,
        mask=mask,
        gamma=config.gamma,
    )
    if old.values is None or old.last_value is None:
        if not config.compares_answers:  # the sum of the rewards to come
            advantages, _ = estimate(
                jnp.zeros_like(rewards), last_value=jnp.zeros(len(mask)), gae_lambda=1.0
            )
            return None, advantages, None
        of_episodes = {
            "group": algorithm.group_advantages,
            "leave_one_out": algorithm.leave_one_out_advantages,
        }[config.advantage](rewards.sum(-1), config.completions_per_prompt)
        return None, jnp.where(mask, of_episodes[:, None], 0.0), None
    values = jnp.where(mask, old.values, 0.0)
    gae_lambda: float | Array = config.gae_lambda
    if config.gae_lambda_alpha is not None:
        gae_lambda = algorithm.length_adaptive_lambda(mask.sum(-1), config.gae_lambda_alpha)
    advantages, returns = estimate(values, last_value=old.last_value, gae_lambda=gae_lambda)
    if config.critic_gae_lambda is not None:
        _, returns = estimate(
            values, last_value=old.last_value, gae_lambda=config.critic_gae_lambda
        )
    return values, advantages, returns


def explained_variance(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Quotient:
    """1 - Var(G - V) / Var(G); undefined where the returns differ by no more than rounding."""
    variance = algorithm.masked_var(returns, mask)
    rounded = algorithm.masked_mean(jnp.square(returns) + jnp.square(values), mask)  # G is A + V
    is_constant = variance <= 1e-12 * rounded
    explained = variance - algorithm.masked_var(returns - values, mask)
    return Quotient(explained, jnp.where(is_constant, 0.0, variance))


def _mean_by_position(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Quotient:
    """Mean over the rows that have a token there [T]; undefined where none has."""
    return Quotient(jnp.where(mask, x, 0.0).sum(0), mask.sum(0))
