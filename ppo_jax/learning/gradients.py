"""Passes of the network over a batch: what it says of a rollout, and gradients of a minibatch.

The rows are cut over devices (`data_parallel`), there into micro-batches, and those are laid into
as few rows as they fill (`packing`). Losses are weighted sums over valid tokens, whose weights add
up to 1 over the whole minibatch, so they do not depend on any of this.

Shapes: B batch, M minibatch or a part of it, T response limit, S = P + T.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ppo_jax import algorithm
from ppo_jax.config import PPOConfig
from ppo_jax.generation.rollout import Rollout
from ppo_jax.learning.batch import Batch, Metrics
from ppo_jax.learning.optimizer import Params
from ppo_jax.learning.packing import Layout, in_fewest_rows
from ppo_jax.learning.response_outputs import ResponseOutputs, response_outputs
from ppo_jax.mesh import on_own_rows, pmax, psum
from qwen_env import mdp


class Stats(NamedTuple):
    """What a minibatch, or its share in a part of it, comes to.

    All but `ratio_max_error`, a maximum, are sums over tokens (weighted, but for `ratios`), so
    those of the parts add up to those of the minibatch.
    """

    metrics: Metrics
    stop_kl: Float[Array, ""]
    ratio_max_error: Float[Array, ""]
    ratios: Int[Array, "bins"]


@dataclass(frozen=True)
class Passes:
    """The constants of every pass; pure functions of parameters and data."""

    graphdef: Any  # the network without its arrays
    rules: mdp.Rules
    config: PPOConfig
    remat: bool = False
    mesh: Mesh | None = None  # that the rows of a batch are cut over

    def outputs(
        self,
        params: Params,
        rollout: Rollout,
        select: Callable[[ResponseOutputs], Any] | None = None,
    ) -> Any:
        """What is said of a whole rollout, a micro-batch at a time: all, or what `select` takes."""
        state = rollout.state
        pieces = self.config.num_minibatches * self.config.num_microbatches

        def of_own_rows(params: Params, rows: Any) -> Any:
            def outputs(rows: Any) -> Any:
                def at_layout(layout: Layout | None) -> Any:
                    result = self._response_outputs(params, *rows, layout=layout)
                    return result if select is None else select(result)

                _, _, length, _ = rows
                return self._in_fewest_rows(at_layout, length)

            if pieces == 1:
                return outputs(rows)
            results = jax.lax.map(outputs, _cut(rows, pieces))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

        rows = (state.tokens, state.prompt_length, state.length, rollout.sampling_mask)
        return on_own_rows(of_own_rows, self.mesh)(params, rows)

    def gradients(self, params: Params, minibatch: Batch) -> tuple[Params, Stats]:
        """Gradients and metrics of a minibatch, summed over its micro-batches and devices."""
        weights = algorithm.token_weights(minibatch.mask, self.config.loss_aggregation)

        def of_own_rows(params: Params, rows: tuple[Batch, Array]) -> tuple[Params, Stats]:
            gradients, stats = self._gradients_of_rows(params, rows)
            if self.mesh is not None:
                gradients = _widened(gradients)
            worst = pmax(stats.ratio_max_error, self.mesh)
            gradients, stats = psum((gradients, stats), self.mesh)
            return gradients, stats._replace(ratio_max_error=worst)

        of_all_rows = on_own_rows(of_own_rows, self.mesh, gives_rows=False)
        return of_all_rows(params, (minibatch, weights))

    def _gradients_of_rows(
        self, params: Params, rows: tuple[Batch, Float[Array, "M T"]]
    ) -> tuple[Params, Stats]:
        """Summed over their micro-batches, by the weights of their tokens."""
        pieces = self.config.num_microbatches

        def differentiate(rows: tuple[Batch, Array]) -> tuple[Params, Stats]:
            # Inside of the branch: a gradient through `switch` keeps residuals of all branches.
            def at_layout(layout: Layout | None) -> tuple[Params, Stats]:
                return jax.grad(self._loss, has_aux=True)(params, *rows, layout)

            return self._in_fewest_rows(at_layout, rows[0].length)

        if pieces == 1:
            return differentiate(rows)

        def add(total: Any, piece: Any) -> tuple[Any, None]:
            gradients, stats = differentiate(piece)
            added = jax.tree.map(jnp.add, total, (gradients, stats))
            worst = jnp.maximum(total[1].ratio_max_error, stats.ratio_max_error)
            return (added[0], added[1]._replace(ratio_max_error=worst)), None

        cut = _cut(rows, pieces)
        _, stats = jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], cut))
        no_gradients = _widened(jax.tree.map(jnp.zeros_like, params))
        no_stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stats)
        return jax.lax.scan(add, (no_gradients, no_stats), cut)[0]

    def _loss(
        self, params: Params, batch: Batch, weights: Float[Array, "M T"], layout: Layout | None
    ) -> tuple[Array, Stats]:
        """The total loss of a micro-batch: its share of the minibatch's, by its tokens' weights."""
        config, mask = self.config, batch.mask
        new = self._response_outputs(
            params,
            batch.tokens,
            batch.prompt_length,
            batch.length,
            batch.sampling_mask,
            layout=layout,
        )
        policy = algorithm.clipped_policy_loss(
            new.logprobs,
            batch.logprobs,
            batch.advantages,
            mask,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
            weights=weights,
        )
        value_loss = algorithm.value_loss(
            new.values,
            batch.returns,
            mask,
            old_values=None if config.value_clip_range is None else batch.values,
            clip_range=config.value_clip_range,
            weights=weights,
        )
        entropy = algorithm.masked_mean(new.entropy, mask, weights=weights)
        loss = algorithm.total_loss(
            policy.loss,
            value_loss,
            entropy,
            value_coef=config.value_coef,
            entropy_coef=config.entropy_coef,
        )

        def kl(estimator: algorithm.KlEstimator) -> Array:
            return algorithm.approx_kl(
                batch.logprobs, new.logprobs, mask, estimator, weights=weights
            )

        ratio = jnp.exp(jnp.where(mask, new.logprobs - batch.logprobs, 0.0))
        return loss, Stats(
            metrics={
                "loss": loss,
                "policy/loss": policy.loss,
                "policy/clip_fraction": policy.clip_fraction,
                "policy/approx_kl": kl("k3"),
                "value/loss": value_loss,
            },
            stop_kl=kl(config.target_kl_estimator),
            ratio_max_error=jnp.abs(ratio - 1).max(),
            ratios=algorithm.masked_histogram(ratio, mask, algorithm.RATIO_EDGES),
        )

    def _in_fewest_rows(
        self, function: Callable[[Layout | None], Any], length: Int[Array, "M"]
    ) -> Any:
        return in_fewest_rows(function, length, self.rules.max_length, self.config.num_packed_sizes)

    def _response_outputs(
        self,
        params: Params,
        tokens: Array,
        prompt_length: Array,
        length: Array,
        sampling_mask: Array | None,
        *,
        layout: Layout | None,
    ) -> ResponseOutputs:
        return response_outputs(
            nnx.merge(self.graphdef, params),
            tokens,
            prompt_length,
            length,
            sampling_mask,
            rules=self.rules,
            sampling=self.config.sampling,
            stop_value_gradient=self.config.critic == "stopped",
            remat=self.remat,
            layout=layout,
        )


def _widened(gradients: Params) -> Params:
    """To float32, whatever the parameters are: a sum in bfloat16 loses its small parts."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), gradients)


def _cut(rows: Any, pieces: int) -> Any:
    """With a new first axis, of micro-batches."""
    return jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), rows)
