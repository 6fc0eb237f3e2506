"""The PPO step: from finished episodes and their scores to new parameters, in compiled functions.

    prepare   old and reference log-probabilities, values -> rewards -> advantages, returns
    update    epochs x minibatches of clipped PPO, with the KL early stop inside
    learn     one after the other

All are pure: state in, state out.

Shapes: B batch, M minibatch, T response limit.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppo_jax import algorithm
from ppo_jax.config import OptimizerConfig
from ppo_jax.generation.rollout import Rollout
from ppo_jax.learning.batch import (
    Batch,
    Controls,
    Prepared,
    TokenNumbers,
    explained_variance,
    make_batch,
)
from ppo_jax.learning.critic_epochs import critic_epochs
from ppo_jax.learning.critic_warmup import CriticWarmup, begin_warmup, go_on
from ppo_jax.learning.frozen import NOTHING, join
from ppo_jax.learning.loss import averaged, ppo_loss
from ppo_jax.learning.metrics import Distributions, Metrics
from ppo_jax.learning.optimizer import (
    AdamState,
    Learns,
    Params,
    adamw,
    global_norm,
    learning_rate_schedule,
    mean_step,
)
from ppo_jax.learning.packing import Layout, in_fewest_rows
from ppo_jax.learning.parts import CONCATENATE
from ppo_jax.learning.passes import Gradients, Passes
from ppo_jax.learning.response_outputs import ResponseOutputs
from qwen_env import mdp


class TrainState(NamedTuple):
    """All that changes from one iteration to the next, and all that a resumed run needs."""

    params: Params  # those that learn, see `ppo_jax.learning.frozen`
    opt_state: AdamState
    controls: Controls
    warmup: CriticWarmup | None  # of a critic whose warm-up ends by itself
    reference: Params | None  # of a moving reference model's backbone what learns, in float32
    root_key: Array  # uint32, jax.random.key_data of the root key; never changes
    iteration: Int[Array, ""]
    nonfinite_in_a_row: Int[Array, ""]


@dataclass(frozen=True)
class Learner(Passes):
    """The constants of learning."""

    optimizer_config: OptimizerConfig
    num_iterations: int  # over which the learning rate is scheduled

    def init(self, params: Params, seed: int) -> TrainState:
        """The state before the first iteration; `params`, which learn, become its own."""
        reference = None
        if self.config.ref_ema_decay is not None:
            reference = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params["backbone"])
        return TrainState(
            params=params,
            opt_state=adamw(self.optimizer_config).init(params),
            controls=Controls(jnp.float32(self.config.kl_coef), algorithm.no_moments()),
            warmup=None
            if self.optimizer_config.critic_warmup_patience is None
            else begin_warmup(self.optimizer_config),
            reference=reference,
            root_key=jax.random.key_data(jax.random.key(seed)),
            iteration=jnp.zeros((), jnp.int32),
            nonfinite_in_a_row=jnp.zeros((), jnp.int32),
        )

    def learn(
        self,
        state: TrainState,
        initial_backbone: Params,
        rollout: Rollout,
        score: Float[Array, "B"],
        rewards: Float[Array, "B T"] | None,
        key: PRNGKeyArray,
        frozen: Params = NOTHING,
    ) -> tuple[TrainState, Metrics, Distributions, TokenNumbers]:
        """`prepare`, then `update`.

        Args:
            initial_backbone: of the policy, what learns of it: the reference, unless that moves.
        """
        learning = initial_backbone if state.reference is None else state.reference
        reference = join(nnx.State({"backbone": learning}), frozen)["backbone"]
        prepared, first = self.prepare(
            state.params, reference, state.controls, rollout, score, rewards, frozen
        )
        state = state._replace(controls=prepared.controls)
        state, metrics, distributions = self.update(state, prepared.batch, key, frozen, first)
        return (
            state,
            prepared.metrics | metrics,
            prepared.distributions | distributions,
            prepared.tokens,
        )

    def prepare(
        self,
        params: Params,
        reference: Params,
        controls: Controls,
        rollout: Rollout,
        score: Float[Array, "B"],
        rewards: Float[Array, "B T"] | None = None,
        frozen: Params = NOTHING,
    ) -> tuple[Prepared, Gradients | None]:
        """Score every token: rewards, advantages and returns, and what to watch of them.

        Where one pass takes the whole batch, the pass that gives the old log-probabilities and
        values is the first epoch's as well, and its gradients come with them.

        Args:
            params: of the policy that wrote the responses, those that learn.
            reference: all of the backbone of the reference model.
            rewards: what each token earned, where not only the last one earned the score.
            frozen: the policy's parameters that never learn.
        """
        config, state = self.config, rollout.state
        own = self._own(mdp.response_mask(state, self.rules.max_new_tokens, jnp))
        written = state.tokens, state.prompt_length, state.length
        whole = join(params, frozen)
        num_parts = config.num_minibatches * config.num_microbatches
        of_all_rows = partial(
            self._in_parts,
            length=state.length,
            reduction=CONCATENATE,
            num_microbatches=num_parts,
        )

        def ref_outputs(params: Params, rows: Any, layout: Layout | None) -> Array:
            """Over all ids that the rules allow."""
            return self.response_outputs(params, *rows, layout=layout, with_values=False).logprobs

        def outputs(params: Params, rows: Any, layout: Layout | None) -> ResponseOutputs:
            return self.response_outputs(params, *rows, layout=layout)

        def to_prepare(params: Params, rows: Any, layout: Layout | None) -> ResponseOutputs:
            return outputs(params, rows, layout)._replace(value_logits=None)  # for learning alone

        of_reference = nnx.State({**whole, "backbone": reference})
        ref_logprobs = of_all_rows(ref_outputs, of_reference, (*written, None, own))

        def batch_of(old: ResponseOutputs) -> Prepared:
            return make_batch(rollout, score, old, ref_logprobs, controls, config, rewards)

        rows = *written, rollout.sampling_mask, own
        if num_parts > 1 or self.mesh is not None:
            return batch_of(of_all_rows(to_prepare, whole, rows)), None

        def at_once(layout: Layout | None) -> tuple[Prepared, Gradients]:
            old, pulled_back = jax.vjp(lambda x: outputs(join(x, frozen), rows, layout), params)
            prepared = batch_of(old)
            minibatch = self._whitened(prepared.batch)
            weights = algorithm.token_weights(minibatch.mask, config.loss_aggregation)
            gradients, (sums, ratio_max_error) = jax.grad(ppo_loss, has_aux=True)(
                old, minibatch, weights, config
            )
            (by_params,) = pulled_back(gradients)
            return prepared, Gradients(by_params, sums, ratio_max_error)

        return in_fewest_rows(at_once, state.length, self.rules.max_length, config.num_packed_sizes)

    def update(
        self,
        state: TrainState,
        batch: Batch,
        key: PRNGKeyArray,
        frozen: Params = NOTHING,
        first: Gradients | None = None,
    ) -> tuple[TrainState, Metrics, Distributions]:
        """Epochs x minibatches, each epoch in an order of its own, until done or KL early stop.

        At the grain of minibatches, one whose KL(old ‖ new) exceeds the target ends the iteration
        without a step; at the grain of epochs, an epoch whose mean does is the last. A minibatch
        whose loss or gradient is not finite is skipped. What is left then of the critic's own
        epochs follows, without the policy.

        Args:
            frozen: the policy's parameters that are not in the state, since they never learn.
            first: of the first minibatch, where `prepare` has them.
        """
        config = self.config
        num_minibatches = config.num_minibatches
        num_steps = config.num_epochs * num_minibatches
        optimizer = adamw(self.optimizer_config)
        warmup = self._warmup(state, batch)
        longest_warmup = self.optimizer_config.critic_warmup_iterations
        policy_start = jnp.asarray(longest_warmup if warmup is None else warmup.policy_start)
        schedule = learning_rate_schedule(self.optimizer_config, self.num_iterations, policy_start)
        learning_rate = schedule(state.iteration)
        num_critic_steps = (config.critic_epochs or config.num_epochs) * num_minibatches

        def is_running(carry: _UpdateCarry) -> Array:
            return (carry.num_seen < num_steps) & ~carry.stopped

        def one_minibatch(carry: _UpdateCarry) -> _UpdateCarry:
            minibatch = self._whitened(_minibatch(batch, key, num_minibatches, carry.num_seen))
            return one_step(carry, self.gradients(carry.params, minibatch, frozen))

        def one_step(carry: _UpdateCarry, of_minibatch: Gradients) -> _UpdateCarry:
            part = carry.num_seen % num_minibatches
            gradients, sums, ratio_max_error = of_minibatch
            learns = Learns(
                state.iteration >= policy_start if longest_warmup else True,
                carry.num_seen < num_critic_steps if num_critic_steps < num_steps else True,
            )
            gradients = learns.masked(gradients)
            norm = global_norm(gradients, self.mesh)
            metrics = sums.metrics | {"policy/grad_norm": norm}
            finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
            epoch_kl = jnp.where(part == 0, 0.0, carry.epoch_kl)
            epoch_kl += jnp.where(finite, sums.stop_kl, 0.0)
            is_last, is_refused = self._early_stop(sums.stop_kl, epoch_kl, part)
            applied = finite & ~is_refused
            updates, opt_state = optimizer.update(
                gradients,
                carry.opt_state,
                carry.params,
                norm=norm,
                learning_rate=learning_rate,
                learns=Learns(*(applied & x for x in learns)),
            )
            return _UpdateCarry(
                num_seen=carry.num_seen + 1,
                stopped=is_last,
                epoch_kl=epoch_kl,
                params=optax.apply_updates(carry.params, updates),
                opt_state=opt_state,
                nonfinite_in_a_row=jnp.where(finite, 0, carry.nonfinite_in_a_row + 1),
                num_nonfinite=carry.num_nonfinite + ~finite,
                num_applied=carry.num_applied + applied,
                first_ratio_max_error=jnp.where(
                    carry.num_seen == 0, ratio_max_error, carry.first_ratio_max_error
                ),
                ratios=carry.ratios + sums.ratios,
                sums={k: v + jnp.where(finite, metrics[k], 0.0) for k, v in carry.sums.items()},
            )

        start = _UpdateCarry(
            num_seen=jnp.zeros((), jnp.int32),
            stopped=jnp.zeros((), bool),
            epoch_kl=jnp.zeros((), jnp.float32),
            params=state.params,
            opt_state=state.opt_state,
            nonfinite_in_a_row=state.nonfinite_in_a_row,
            num_nonfinite=jnp.zeros((), jnp.int32),
            num_applied=jnp.zeros((), jnp.int32),
            first_ratio_max_error=jnp.zeros((), jnp.float32),
            ratios=jnp.zeros(len(algorithm.RATIO_EDGES) - 1, jnp.int32),
            sums=dict.fromkeys((*averaged(config), "policy/grad_norm"), jnp.zeros((), jnp.float32)),
        )
        if first is not None:
            start = one_step(start, first)
        end = start
        if first is None or num_steps > 1:
            end = jax.lax.while_loop(is_running, one_minibatch, start)
        count = jnp.maximum(end.num_seen - end.num_nonfinite, 1)
        stopped_early = end.stopped
        if config.target_kl_grain == "epoch":  # after the last one there was nothing to stop
            stopped_early &= end.num_seen < num_steps
        metrics: Metrics = {
            **{name: total / count for name, total in end.sums.items()},
            "policy/first_ratio_max_error": end.first_ratio_max_error,
            "policy/learning_rate": learning_rate,
            "policy/step_per_learning_rate": mean_step(
                end.opt_state, self.optimizer_config, self.mesh
            ),
            "update/epochs": end.num_applied / num_minibatches,
            "update/early_stopped": stopped_early.astype(jnp.int32),
            "update/nonfinite": end.num_nonfinite,
        }
        params, opt_state = end.params, end.opt_state
        if config.critic_epochs is not None and (
            num_critic_steps > num_steps or config.target_kl is not None
        ):
            params, opt_state = critic_epochs(
                params,
                opt_state,
                partial(_minibatch, batch, key, num_minibatches),
                numbers=(end.num_seen, num_critic_steps),
                gradients=partial(self.critic_gradients, frozen=frozen),
                update=partial(optimizer.update, learning_rate=learning_rate),
                mesh=self.mesh,
            )
        reference = state.reference
        if (decay := config.ref_ema_decay) is not None:
            reference = jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new.astype(old.dtype),
                reference,
                params["backbone"],
            )
        next_state = state._replace(
            params=params,
            opt_state=opt_state,
            warmup=warmup,
            reference=reference,
            iteration=state.iteration + 1,
            nonfinite_in_a_row=end.nonfinite_in_a_row,
        )
        return next_state, metrics, {"ratio": end.ratios}

    def _warmup(self, state: TrainState, batch: Batch) -> CriticWarmup | None:
        """Whether the critic's warm-up goes on, by what it explains of this batch."""
        patience = self.optimizer_config.critic_warmup_patience
        if state.warmup is None or patience is None or batch.values is None:
            return state.warmup
        assert batch.returns is not None
        explained = explained_variance(batch.values, batch.returns, batch.mask)
        return go_on(state.warmup, state.iteration, explained, patience)

    def _early_stop(self, kl: Array, epoch_kl: Array, part: Array) -> tuple[Array, Array]:
        """Whether this minibatch is the last, and whether its step is refused as well.

        Args:
            kl: of the minibatch.
            epoch_kl: summed over the epoch's minibatches up to this one, which is number `part`.
        """
        config, never = self.config, jnp.zeros((), bool)
        if config.target_kl is None:
            return never, never
        if config.target_kl_grain == "minibatch":
            return kl > config.target_kl, kl > config.target_kl
        ends_epoch = part == config.num_minibatches - 1
        return ends_epoch & (epoch_kl / config.num_minibatches > config.target_kl), never


def _minibatch(
    batch: Batch, key: PRNGKeyArray, num_minibatches: int, number: Int[Array, ""]
) -> Batch:
    """Of an iteration's minibatches the one of that number; each epoch has an order of its own."""
    epoch, part = number // num_minibatches, number % num_minibatches
    order = jax.random.permutation(jax.random.fold_in(key, epoch), len(batch.length))
    rows = order.reshape(num_minibatches, -1)[part]
    minibatch: Batch = jax.tree.map(lambda x: x[rows], batch)
    return minibatch


class _UpdateCarry(NamedTuple):
    num_seen: Int[Array, ""]  # minibatches
    stopped: Bool[Array, ""]
    epoch_kl: Float[Array, ""]  # summed over the minibatches of the epoch under way
    params: Params
    opt_state: AdamState
    nonfinite_in_a_row: Int[Array, ""]
    num_nonfinite: Int[Array, ""]
    num_applied: Int[Array, ""]
    first_ratio_max_error: Float[Array, ""]
    ratios: Int[Array, "bins"]
    sums: dict[str, Array]  # of the metrics, over the minibatches that were finite
