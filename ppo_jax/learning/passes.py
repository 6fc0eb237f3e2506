"""Passes of the networks over written rows, and the gradients of a minibatch.

Rows are cut over devices, micro-batches and packed rows (`ppo_jax.learning.parts`).

Shapes: B batch, M minibatch, T response limit.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from ppo_jax import algorithm
from ppo_jax.config import PPOConfig
from ppo_jax.learning.batch import Batch
from ppo_jax.learning.frozen import NOTHING, join
from ppo_jax.learning.loss import MinibatchSums, ppo_loss, values_loss
from ppo_jax.learning.optimizer import Params
from ppo_jax.learning.packing import Layout
from ppo_jax.learning.parts import ADD, Totals, in_parts
from ppo_jax.learning.response_outputs import ResponseOutputs, response_outputs, response_values
from ppo_jax.mesh import gather
from qwen_env import mdp


class Gradients(NamedTuple):
    """What a minibatch says of its loss."""

    by_params: Params
    sums: MinibatchSums
    ratio_max_error: Float[Array, ""]  # the largest |ratio - 1|


@dataclass(frozen=True)
class Passes:
    """What passes need beside parameters and rows."""

    graphdef: Any  # the network without its arrays
    rules: mdp.Rules
    config: PPOConfig
    remat: bool = field(default=False, kw_only=True)
    mesh: Mesh | None = field(default=None, kw_only=True)  # that rows and parameters are cut over

    def response_outputs(
        self,
        params: Params,
        *written: Any,
        layout: Layout | None = None,
        with_values: bool | None = None,
    ) -> ResponseOutputs:
        """What `learning.response_outputs` says of rows, with this learner's settings."""
        return response_outputs(
            nnx.merge(self.graphdef, gather(params)),
            *written,
            rules=self.rules,
            sampling=self.config.sampling,
            with_values=self.config.has_value_function if with_values is None else with_values,
            stop_value_gradient=self.config.critic == "stopped",
            remat=self.remat,
            layout=layout,
        )

    def gradients(self, params: Params, minibatch: Batch, frozen: Params = NOTHING) -> Gradients:
        """Of the loss of a minibatch by `params`."""
        weights = algorithm.token_weights(minibatch.mask, self.config.loss_aggregation)

        def of_part(
            parts: tuple[Params, Params], rows: tuple[Batch, Array], layout: Layout | None
        ) -> Totals:
            params, frozen = parts
            batch, weights = rows

            def loss(params: Params) -> tuple[Array, tuple[MinibatchSums, Array]]:
                new = self.response_outputs(
                    join(params, frozen),
                    batch.tokens,
                    batch.prompt_length,
                    batch.length,
                    batch.sampling_mask,
                    self._own(batch.mask),
                    layout=layout,
                )
                return ppo_loss(new, batch, weights, self.config)

            # Inside of the part: a gradient through its `switch` keeps residuals of all branches.
            gradients, (sums, ratio_max_error) = jax.grad(loss, has_aux=True)(params)
            return Totals((gradients, sums), ratio_max_error)

        (gradients, sums), ratio_max_error = self._in_parts(
            of_part,
            (params, frozen),
            (minibatch, weights),
            length=minibatch.length,
            reduction=ADD,
            num_microbatches=self.config.num_microbatches,
        )
        return Gradients(gradients, sums, ratio_max_error)

    def critic_gradients(
        self, critic: Params, policy: Params, minibatch: Batch, frozen: Params = NOTHING
    ) -> Params:
        """Of the value loss of a minibatch, by the critic's parameters alone."""
        weights = algorithm.token_weights(minibatch.mask, self.config.loss_aggregation)

        def of_part(
            parts: tuple[Params, Params], rows: tuple[Batch, Array], layout: Layout | None
        ) -> Totals:
            critic, others = parts
            batch, weights = rows

            def loss(critic: Params) -> Array:
                network = nnx.merge(self.graphdef, gather(join(critic, others)))
                values = response_values(
                    network,
                    *(batch.tokens, batch.prompt_length, batch.length),
                    num_steps=self.rules.max_new_tokens,
                    remat=self.remat,
                    layout=layout,
                )
                return self.config.value_coef * values_loss(values, batch, weights, self.config)

            return Totals(jax.grad(loss)(critic), ())

        gradients: Params = self._in_parts(
            of_part,
            (critic, join(policy, frozen)),
            (minibatch, weights),
            length=minibatch.length,
            reduction=ADD,
            num_microbatches=self.config.num_microbatches,
        ).sums
        return gradients

    def _whitened(self, minibatch: Batch) -> Batch:
        if self.config.whitening != "minibatch":
            return minibatch
        advantages = algorithm.masked_whiten(minibatch.advantages, minibatch.mask)
        return minibatch._replace(advantages=advantages)

    def _own(self, mask: Bool[Array, "B T"]) -> Bool[Array, "B T"] | None:
        """The tokens that are the policy's; None, for all, where nobody else wrote any."""
        return mask if self.rules.max_turns > 1 else None

    def _in_parts(self, *arguments: Any, **settings: Any) -> Any:
        return in_parts(
            *arguments,
            **settings,
            mesh=self.mesh,
            num_packed_sizes=self.config.num_packed_sizes,
            width=self.rules.max_length,
        )
