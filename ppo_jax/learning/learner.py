"""The PPO step: from finished episodes and their scores to new parameters, in compiled functions.

    prepare   old and reference log-probabilities, values -> rewards -> advantages, returns
    update    epochs x minibatches of clipped PPO, with the KL early stop inside

Both are pure: state in, state out. Gradients of a minibatch are in `ppo_jax.learning.gradients`.

Shapes: B batch, T response limit.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppo_jax import algorithm
from ppo_jax.config import OptimizerConfig
from ppo_jax.generation.rollout import Rollout
from ppo_jax.learning.batch import Batch, Controls, Distributions, Metrics, Prepared, make_batch
from ppo_jax.learning.gradients import Passes
from ppo_jax.learning.optimizer import (
    Params,
    adamw_step,
    global_norm,
    init_adam,
    learning_rate_schedule,
    trainable_share,
)


class TrainState(NamedTuple):
    """All that changes from one iteration to the next, and all that a resumed run needs."""

    params: Params
    opt_state: optax.ScaleByAdamState
    controls: Controls
    reference: Params | None  # a moving reference model's backbone, in float32
    root_key: Array  # uint32, jax.random.key_data of the root key; never changes
    iteration: Int[Array, ""]
    nonfinite_in_a_row: Int[Array, ""]


@dataclass(frozen=True)
class Learner:
    """The constants of learning."""

    passes: Passes
    optimizer_config: OptimizerConfig
    num_iterations: int  # over which the learning rate is scheduled

    def init(self, params: Params, seed: int) -> TrainState:
        """The state before the first iteration; `params` become its own, to be donated."""
        config = self.passes.config
        reference = None
        if config.ref_ema_decay is not None:
            reference = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params["backbone"])
        return TrainState(
            params=params,
            opt_state=init_adam(params),
            controls=Controls(jnp.float32(config.kl_coef), algorithm.no_moments()),
            reference=reference,
            root_key=jax.random.key_data(jax.random.key(seed)),
            iteration=jnp.zeros((), jnp.int32),
            nonfinite_in_a_row=jnp.zeros((), jnp.int32),
        )

    def prepare(
        self,
        params: Params,
        reference: Params,
        controls: Controls,
        rollout: Rollout,
        score: Float[Array, "B"],
    ) -> Prepared:
        """Score every token: rewards, advantages and returns, and what to watch of them.

        Args:
            params: of the policy that wrote the responses.
            reference: the backbone of the reference model.
        """
        reference_params = nnx.State({**params, "backbone": reference})
        return make_batch(
            rollout,
            score,
            self.passes.outputs(params, rollout),
            # The log-probabilities alone, so that no values are computed.
            self.passes.outputs(reference_params, rollout, lambda outputs: outputs.logprobs),
            controls,
            self.passes.config,
        )

    def update(
        self, state: TrainState, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, Metrics, Distributions]:
        """Epochs x minibatches, each epoch in an order of its own, until done or KL early stop.

        At the grain of minibatches, one whose KL(old ‖ new) exceeds the target ends the iteration
        without a step; at the grain of epochs, an epoch whose mean does is the last. A minibatch
        whose loss or gradient is not finite is skipped.
        """
        config = self.passes.config
        batch_size = batch.tokens.shape[0]
        num_minibatches = config.num_minibatches
        num_steps = config.num_epochs * num_minibatches
        schedule = learning_rate_schedule(self.optimizer_config, self.num_iterations)
        learning_rate = jnp.asarray(schedule(state.iteration), jnp.float32)
        share = trainable_share(state.params, self.optimizer_config, state.iteration)

        def is_running(carry: _UpdateCarry) -> Array:
            return (carry.num_seen < num_steps) & ~carry.stopped

        def one_minibatch(carry: _UpdateCarry) -> _UpdateCarry:
            epoch, part = carry.num_seen // num_minibatches, carry.num_seen % num_minibatches
            order = jax.random.permutation(jax.random.fold_in(key, epoch), batch_size)
            rows = order.reshape(num_minibatches, -1)[part]
            minibatch = _take(batch, rows)
            if config.advantage_whitening == "minibatch":
                advantages = algorithm.masked_whiten(minibatch.advantages, minibatch.mask)
                minibatch = minibatch._replace(advantages=advantages)
            gradients, stats = self.passes.gradients(carry.params, minibatch)
            gradients = jax.tree.map(jnp.multiply, gradients, share)
            norm = global_norm(gradients)
            metrics = stats.metrics | {"policy/grad_norm": norm}
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
            epoch_kl = jnp.where(part == 0, 0.0, carry.epoch_kl)
            epoch_kl += jnp.where(finite, stats.stop_kl, 0.0)
            stopped, is_refused = self._stops(stats.stop_kl, epoch_kl, part)
            applied = finite & ~is_refused
            params, opt_state = adamw_step(
                carry.params,
                carry.opt_state,
                gradients,
                norm,
                self.optimizer_config,
                learning_rate=learning_rate,
                share=share,
                applied=applied,
            )
            return _UpdateCarry(
                num_seen=carry.num_seen + 1,
                stopped=stopped,
                epoch_kl=epoch_kl,
                params=params,
                opt_state=opt_state,
                nonfinite_in_a_row=jnp.where(finite, 0, carry.nonfinite_in_a_row + 1),
                num_nonfinite=carry.num_nonfinite + ~finite,
                num_applied=carry.num_applied + applied,
                first_ratio_max_error=jnp.where(
                    carry.num_seen == 0, stats.ratio_max_error, carry.first_ratio_max_error
                ),
                ratios=carry.ratios + stats.ratios,
                sums={k: v + jnp.where(finite, metrics[k], 0.0) for k, v in carry.sums.items()},
            )

        opt_state = state.opt_state
        if warmup := self.optimizer_config.critic_warmup_iterations:
            # Adam's bias correction counts steps: without a fresh start, the policy's first ones
            # after the critic's warm-up would be several times too long. There is one count, so the
            # critic's moments start afresh as well.
            starts_anew = state.iteration == warmup
            opt_state = _select(starts_anew, init_adam(state.params), opt_state)
        start = _UpdateCarry(
            num_seen=jnp.zeros((), jnp.int32),
            stopped=jnp.zeros((), bool),
            epoch_kl=jnp.zeros((), jnp.float32),
            params=state.params,
            opt_state=opt_state,
            nonfinite_in_a_row=state.nonfinite_in_a_row,
            num_nonfinite=jnp.zeros((), jnp.int32),
            num_applied=jnp.zeros((), jnp.int32),
            first_ratio_max_error=jnp.zeros((), jnp.float32),
            ratios=jnp.zeros(len(algorithm.RATIO_EDGES) - 1, jnp.int32),
            sums=dict.fromkeys(_AVERAGED, jnp.zeros((), jnp.float32)),
        )
        end = jax.lax.while_loop(is_running, one_minibatch, start)
        count = jnp.maximum(end.num_seen - end.num_nonfinite, 1)
        stopped_early = end.stopped
        if config.target_kl_grain == "epoch":  # after the last one there was nothing to stop
            stopped_early &= end.num_seen < num_steps
        metrics = {name: total / count for name, total in end.sums.items()} | {
            "policy/first_ratio_max_error": end.first_ratio_max_error,
            "policy/learning_rate": learning_rate,
            "update/epochs": end.num_applied / num_minibatches,
            "update/early_stopped": stopped_early.astype(jnp.int32),
            "update/nonfinite": end.num_nonfinite,
        }
        reference = state.reference
        if (decay := config.ref_ema_decay) is not None:
            reference = jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new.astype(old.dtype),
                reference,
                end.params["backbone"],
            )
        next_state = TrainState(
            params=end.params,
            opt_state=end.opt_state,
            controls=state.controls,
            reference=reference,
            root_key=state.root_key,
            iteration=state.iteration + 1,
            nonfinite_in_a_row=end.nonfinite_in_a_row,
        )
        return next_state, metrics, {"ratio": end.ratios}

    def _stops(self, kl: Array, epoch_kl: Array, part: Array) -> tuple[Array, Array]:
        """Whether this minibatch is the last, and whether its step is refused as well.

        Args:
            kl: of the minibatch.
            epoch_kl: summed over the epoch's minibatches up to this one, which is number `part`.
        """
        config, never = self.passes.config, jnp.zeros((), bool)
        if config.target_kl is None:
            return never, never
        if config.target_kl_grain == "minibatch":
            return kl > config.target_kl, kl > config.target_kl
        ends_epoch = part == config.num_minibatches - 1
        return ends_epoch & (epoch_kl / config.num_minibatches > config.target_kl), never


class _UpdateCarry(NamedTuple):
    num_seen: Int[Array, ""]  # minibatches
    stopped: Bool[Array, ""]
    epoch_kl: Float[Array, ""]  # summed over the minibatches of the epoch under way
    params: Params
    opt_state: optax.ScaleByAdamState
    nonfinite_in_a_row: Int[Array, ""]
    num_nonfinite: Int[Array, ""]
    num_applied: Int[Array, ""]
    first_ratio_max_error: Float[Array, ""]
    ratios: Int[Array, "bins"]
    sums: Metrics


_AVERAGED = (
    "policy/loss",
    "policy/clip_fraction",
    "policy/approx_kl",
    "policy/grad_norm",
    "value/loss",
)
"""Metrics that are averaged over the minibatches of an iteration."""


def _select(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _take(tree: Any, rows: Int[Array, "rows"]) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)
