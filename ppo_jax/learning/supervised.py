"""The supervised step: from a batch of texts to new parameters, in compiled functions.

Both are pure: state in, state out. An iteration is one optimizer step on one batch.

Shapes: M rows, S width.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ppo_jax.config import AdamWConfig, OptimizerConfig
from ppo_jax.learning.frozen import NOTHING, join
from ppo_jax.learning.metrics import Metrics
from ppo_jax.learning.objectives import Objective, Texts
from ppo_jax.learning.optimizer import (
    AdamState,
    Learns,
    Params,
    adamw,
    global_norm,
    learning_rate_schedule,
)
from ppo_jax.learning.packing import Layout
from ppo_jax.learning.parts import ADD, CONCATENATE, Totals, in_parts
from ppo_jax.mesh import gather


class SupervisedState(NamedTuple):
    """All that changes from one iteration to the next. Which texts come next, the seed and the
    number of the iteration say."""

    params: Params  # those that learn, see `ppo_jax.learning.frozen`
    opt_state: AdamState
    iteration: Int[Array, ""]
    nonfinite_in_a_row: Int[Array, ""]


@dataclass(frozen=True)
class SupervisedLearner:
    """The constants of learning."""

    graphdef: Any  # the network without its arrays
    objective: Objective
    width: int
    optimizer_config: AdamWConfig
    num_iterations: int  # over which the learning rate is scheduled
    num_microbatches: int = 1
    num_packed_sizes: int = 1
    mesh: Mesh | None = None  # that rows and parameters are cut over

    def init(self, params: Params) -> SupervisedState:
        """The state before the first iteration; `params`, which learn, become its own."""
        return SupervisedState(
            params,
            adamw(self._config).init(params),
            iteration=jnp.zeros((), jnp.int32),
            nonfinite_in_a_row=jnp.zeros((), jnp.int32),
        )

    def update(
        self, state: SupervisedState, batch: Texts, frozen: Params = NOTHING
    ) -> tuple[SupervisedState, Metrics]:
        """One step; a loss or a gradient that is not finite is skipped.

        Args:
            frozen: the network's parameters that are not in the state, since they never learn.
        """
        gradients, sums = self.gradients(state.params, batch, frozen)
        norm = global_norm(gradients, self.mesh)
        finite = jnp.isfinite(sums["train/loss"]) & jnp.isfinite(norm)
        schedule = learning_rate_schedule(self._config, self.num_iterations)
        learning_rate = schedule(state.iteration)
        updates, opt_state = adamw(self._config).update(
            gradients,
            state.opt_state,
            state.params,
            norm=norm,
            learning_rate=learning_rate,
            learns=Learns(finite, finite),
        )
        metrics: Metrics = {
            **sums,
            "train/grad_norm": norm,
            "train/learning_rate": learning_rate,
            "train/tokens": batch.length.sum(),
            "update/nonfinite": (~finite).astype(jnp.int32),
        }
        next_state = SupervisedState(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            iteration=state.iteration + 1,
            nonfinite_in_a_row=jnp.where(finite, 0, state.nonfinite_in_a_row + 1),
        )
        return next_state, metrics

    def gradients(
        self, params: Params, batch: Texts, frozen: Params = NOTHING
    ) -> tuple[Params, dict[str, Array]]:
        """Of the loss of a batch by `params`; and what to watch of it."""

        def of_part(parts: tuple[Params, Params], rows: Any, layout: Layout | None) -> Totals:
            params, frozen = parts
            texts, weights = rows

            def loss(params: Params) -> tuple[Array, dict[str, Array]]:
                outputs = self._outputs(join(params, frozen), texts, layout)
                return self.objective.loss(outputs, texts, weights)

            # Inside of the part: a gradient through its `switch` keeps residuals of all branches.
            return Totals(jax.grad(loss, has_aux=True)(params), ())

        totals = self._in_parts(
            of_part,
            (params, frozen),
            (batch, self.objective.weights(batch)),
            length=batch.length,
            reduction=ADD,
        )
        gradients, sums = totals.sums
        return gradients, sums

    def outputs(self, params: Params, batch: Texts, frozen: Params = NOTHING) -> Any:
        """What the network says of each row."""

        def of_part(params: Params, texts: Texts, layout: Layout | None) -> Any:
            return self._outputs(params, texts, layout)

        return self._in_parts(
            of_part, join(params, frozen), batch, length=batch.length, reduction=CONCATENATE
        )

    def _outputs(self, params: Params, texts: Texts, layout: Layout | None) -> Any:
        network = nnx.merge(self.graphdef, gather(params))
        return self.objective.outputs(network, texts, layout)

    def _in_parts(self, *arguments: Any, **settings: Any) -> Any:
        return in_parts(
            *arguments,
            **settings,
            mesh=self.mesh,
            num_microbatches=self.num_microbatches,
            num_packed_sizes=self.num_packed_sizes,
            width=self.width,
        )

    @property
    def _config(self) -> OptimizerConfig:
        """As of a policy without a critic."""
        return OptimizerConfig(**asdict(self.optimizer_config))
