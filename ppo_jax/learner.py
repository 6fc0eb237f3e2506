"""The PPO step: from finished episodes and their scores to new parameters, in compiled functions.

    prepare   old and reference log-probabilities, values -> rewards -> advantages, returns
    update    epochs x minibatches of clipped PPO, with the KL early stop inside

Both are pure: state in, state out. Losses are sums over valid tokens divided by the count in the
whole minibatch, so they do not depend on how it is cut into micro-batches.

Shapes: B batch, M minibatch, T response limit, S = P + T.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppo_jax import algorithm
from ppo_jax.config import OptimizerConfig, PPOConfig
from ppo_jax.models.response import ResponseOutputs, response_outputs
from ppo_jax.rollout import Rollout
from qwen_env import mdp

Params = nnx.State
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """All that changes from one iteration to the next, and all that a resumed run needs."""

    params: Params
    opt_state: optax.OptState
    root_key: Array  # uint32, jax.random.key_data of the root key; never changes
    iteration: Int[Array, ""]
    nonfinite_in_a_row: Int[Array, ""]


class Batch(NamedTuple):
    """B episodes, ready to be learnt from; response-aligned arrays are 0 beyond the response."""

    tokens: Int[Array, "B S"]
    prompt_length: Int[Array, "B"]
    length: Int[Array, "B"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]  # of the policy that wrote the responses
    values: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]


@dataclass(frozen=True)
class Learner:
    """The constants of learning; hashable, so each method compiles once for each learner."""

    graphdef: Any  # the network without its arrays
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule  # of the iteration
    rules: mdp.Rules
    config: PPOConfig
    remat: bool = False

    def init(self, params: Params, seed: int) -> TrainState:
        return TrainState(
            params=params,
            opt_state=self.optimizer.init(params),
            root_key=jax.random.key_data(jax.random.key(seed)),
            iteration=jnp.zeros((), jnp.int32),
            nonfinite_in_a_row=jnp.zeros((), jnp.int32),
        )

    def prepare(
        self, params: Params, ref_params: Params, rollout: Rollout, score: Float[Array, "B"]
    ) -> tuple[Batch, Metrics]:
        """Score every token: rewards, advantages and returns, and what to watch of them."""
        state, config = rollout.state, self.config
        written = mdp.response_length(state)
        mask = jnp.arange(self.rules.max_new_tokens) < written[:, None]
        is_last = jnp.arange(self.rules.max_new_tokens) == written[:, None] - 1

        def outputs(params: Params) -> ResponseOutputs:
            episodes = (state.tokens, state.prompt_length, state.length)
            return _in_pieces(
                lambda piece: self._response_outputs(params, *piece),
                episodes,
                config.num_minibatches * config.num_microbatches,
            )

        old, ref = outputs(params), outputs(ref_params)
        logprobs, ref_logprobs, values = (
            jnp.where(mask, x, 0.0) for x in (old.logprobs, ref.logprobs, old.values)
        )
        rewards = algorithm.token_rewards(
            score, logprobs, ref_logprobs, mask, kl_coef=config.kl_coef, estimator=config.kl_penalty
        )
        advantages, returns = algorithm.generalized_advantage_estimation(
            rewards,
            values,
            is_last,  # the length limit ends an episode as an end of sequence does
            jnp.zeros_like(score),
            mask=mask,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
        )
        unexplained = algorithm.masked_var(returns - values, mask)
        gap = jnp.abs(rollout.logprobs - logprobs)
        metrics = {
            "objective/score": score.mean(),
            "objective/score_std": score.std(),
            "objective/kl": jnp.where(mask, logprobs - ref_logprobs, 0.0).sum(-1).mean(),
            "objective/reward": rewards.sum(-1).mean(),
            "policy/entropy": algorithm.masked_mean(old.entropy, mask),
            "value/mean": algorithm.masked_mean(values, mask),
            "value/explained_variance": 1
            - unexplained / jnp.maximum(algorithm.masked_var(returns, mask), 1e-8),
            "rollout/length_mean": written.mean(),
            "rollout/eos_rate": state.terminated.mean(),
            "rollout/logprob_gap_max": jnp.where(mask, gap, 0.0).max(),
        }
        if config.whiten_advantages:
            advantages = algorithm.masked_whiten(advantages, mask)
        batch = Batch(
            tokens=state.tokens,
            prompt_length=state.prompt_length,
            length=state.length,
            mask=mask,
            logprobs=logprobs,
            values=values,
            advantages=advantages,
            returns=returns,
        )
        return batch, metrics

    def update(
        self, state: TrainState, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, Metrics]:
        """Epochs x minibatches, each epoch in an order of its own, until done or KL early stop.

        A minibatch whose KL(old ‖ new) exceeds the target ends the iteration without a step; one
        whose loss or gradient is not finite is skipped.
        """
        config = self.config
        batch_size = batch.tokens.shape[0]
        num_minibatches = config.num_minibatches
        learning_rate = jnp.asarray(self.learning_rate(state.iteration), jnp.float32)

        def is_running(carry: _UpdateCarry) -> Array:
            return (carry.num_seen < config.num_epochs * num_minibatches) & ~carry.stopped

        def one_minibatch(carry: _UpdateCarry) -> _UpdateCarry:
            epoch, part = carry.num_seen // num_minibatches, carry.num_seen % num_minibatches
            order = jax.random.permutation(jax.random.fold_in(key, epoch), batch_size)
            rows = order.reshape(num_minibatches, -1)[part]
            minibatch = jax.tree.map(lambda x: x[rows], batch)
            gradients, metrics = self._gradients(carry.params, minibatch)
            metrics["policy/grad_norm"] = optax.tree.norm(gradients)
            stopped = jnp.zeros((), bool)
            if config.target_kl is not None:
                stopped = metrics["policy/stop_kl"] > config.target_kl
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["policy/grad_norm"])
            applied = finite & ~stopped
            updates, opt_state = self.optimizer.update(gradients, carry.opt_state, carry.params)
            updates = jax.tree.map(lambda update: learning_rate * update, updates)
            params = optax.apply_updates(carry.params, updates)
            ratio_error = metrics.pop("policy/ratio_max_error")
            return _UpdateCarry(
                num_seen=carry.num_seen + 1,
                stopped=stopped,
                params=_select(applied, params, carry.params),
                opt_state=_select(applied, opt_state, carry.opt_state),
                nonfinite_in_a_row=jnp.where(finite, 0, carry.nonfinite_in_a_row + 1),
                num_nonfinite=carry.num_nonfinite + ~finite,
                num_applied=carry.num_applied + applied,
                first_ratio_max_error=jnp.where(
                    carry.num_seen == 0, ratio_error, carry.first_ratio_max_error
                ),
                sums={k: v + jnp.where(finite, metrics[k], 0.0) for k, v in carry.sums.items()},
            )

        start = _UpdateCarry(
            num_seen=jnp.zeros((), jnp.int32),
            stopped=jnp.zeros((), bool),
            params=state.params,
            opt_state=state.opt_state,
            nonfinite_in_a_row=state.nonfinite_in_a_row,
            num_nonfinite=jnp.zeros((), jnp.int32),
            num_applied=jnp.zeros((), jnp.int32),
            first_ratio_max_error=jnp.zeros((), jnp.float32),
            sums=dict.fromkeys(_AVERAGED, jnp.zeros((), jnp.float32)),
        )
        end = jax.lax.while_loop(is_running, one_minibatch, start)
        count = jnp.maximum(end.num_seen - end.num_nonfinite, 1)
        metrics = {name: total / count for name, total in end.sums.items()} | {
            "policy/first_ratio_max_error": end.first_ratio_max_error,
            "policy/learning_rate": learning_rate,
            "update/epochs": end.num_applied / num_minibatches,
            "update/early_stopped": end.stopped.astype(jnp.int32),
            "update/nonfinite": end.num_nonfinite,
        }
        next_state = TrainState(
            params=end.params,
            opt_state=end.opt_state,
            root_key=state.root_key,
            iteration=state.iteration + 1,
            nonfinite_in_a_row=end.nonfinite_in_a_row,
        )
        return next_state, metrics

    def _gradients(self, params: Params, minibatch: Batch) -> tuple[Params, Metrics]:
        """Gradients and metrics of a minibatch, summed over its micro-batches."""
        count = minibatch.mask.sum()
        differentiate = jax.grad(self._loss, has_aux=True)
        pieces = self.config.num_microbatches
        if pieces == 1:
            return differentiate(params, minibatch, count)

        def add(total: Any, piece: Batch) -> tuple[Any, None]:
            gradients, metrics = differentiate(params, piece, count)
            summed = jax.tree.map(jnp.add, total, (gradients, metrics))
            worst = jnp.maximum(
                total[1]["policy/ratio_max_error"], metrics["policy/ratio_max_error"]
            )
            return (summed[0], summed[1] | {"policy/ratio_max_error": worst}), None

        cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), minibatch)
        shapes = jax.eval_shape(differentiate, params, jax.tree.map(lambda x: x[0], cut), count)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, cut)[0]

    def _loss(self, params: Params, batch: Batch, count: Array) -> tuple[Array, Metrics]:
        """The total loss of a micro-batch: its share of the minibatch's, with `count` tokens."""
        config, mask = self.config, batch.mask
        new = self._response_outputs(params, batch.tokens, batch.prompt_length, batch.length)
        policy = algorithm.clipped_policy_loss(
            new.logprobs,
            batch.logprobs,
            batch.advantages,
            mask,
            clip_range=config.clip_range,
            denominator=count,
        )
        value_loss = algorithm.value_loss(
            new.values,
            batch.returns,
            mask,
            old_values=None if config.value_clip_range is None else batch.values,
            clip_range=config.value_clip_range,
            denominator=count,
        )
        entropy = algorithm.masked_mean(new.entropy, mask, denominator=count)
        loss = algorithm.total_loss(
            policy.loss,
            value_loss,
            entropy,
            value_coef=config.value_coef,
            entropy_coef=config.entropy_coef,
        )

        def kl(estimator: algorithm.KlEstimator) -> Array:
            return algorithm.approx_kl(
                batch.logprobs, new.logprobs, mask, estimator, denominator=count
            )

        ratio = jnp.exp(jnp.where(mask, new.logprobs - batch.logprobs, 0.0))
        return loss, {
            "loss": loss,
            "policy/loss": policy.loss,
            "policy/clip_fraction": policy.clip_fraction,
            "policy/approx_kl": kl("k3"),
            "policy/stop_kl": kl(config.target_kl_estimator),
            "policy/ratio_max_error": jnp.abs(ratio - 1).max(),
            "value/loss": value_loss,
        }

    def _response_outputs(
        self, params: Params, tokens: Array, prompt_length: Array, length: Array
    ) -> ResponseOutputs:
        return response_outputs(
            nnx.merge(self.graphdef, params),
            tokens,
            prompt_length,
            length,
            rules=self.rules,
            temperature=self.config.temperature,
            remat=self.remat,
        )


class _UpdateCarry(NamedTuple):
    num_seen: Int[Array, ""]  # minibatches
    stopped: Bool[Array, ""]
    params: Params
    opt_state: optax.OptState
    nonfinite_in_a_row: Int[Array, ""]
    num_nonfinite: Int[Array, ""]
    num_applied: Int[Array, ""]
    first_ratio_max_error: Float[Array, ""]
    sums: Metrics


_AVERAGED = (
    "policy/loss",
    "policy/clip_fraction",
    "policy/approx_kl",
    "policy/grad_norm",
    "value/loss",
)
"""Metrics that are averaged over the minibatches of an iteration."""


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) at learning rate 1, behind a gradient-norm clip.

    The learner scales its updates by `learning_rate`, which depends on the iteration: a KL early
    stop takes fewer optimizer steps and must not stretch the schedule.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=_is_decayed),
        optax.scale(-1.0),
    )


def learning_rate_schedule(config: OptimizerConfig, num_iterations: int) -> optax.Schedule:
    """The learning rate of each iteration: a linear warm-up, then the schedule down to zero."""
    peak, warmup = config.learning_rate, config.warmup_iterations
    rest = max(num_iterations - warmup, 1)
    falling = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not warmup:
        return falling
    # The first iteration is the first step of the ramp, not a step of length zero.
    rising = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rising, falling], [warmup])


def _is_decayed(params: Params) -> Any:
    """True for matrices, False for norms and biases (which are stacked, so rank does not tell)."""

    def is_matrix(path: tuple[Any, ...], _: Array) -> bool:
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _select(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _in_pieces(function: Callable[[Any], Any], rows: Any, pieces: int) -> Any:
    """`function` of `rows`, computed one piece after another to bound memory."""
    if pieces == 1:
        return function(rows)
    cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), rows)
    outputs = jax.lax.map(function, cut)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
