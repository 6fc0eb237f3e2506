"""PPOAgent: a policy, its optimizer, and the loop that trains one with the other.

    prompts -> rollout (compiled) -> scores (reward function) -> prepare, update (compiled)

It touches no files: entry points save what it yields.
"""

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppo_jax.assembly import assemble, with_critic_model
from ppo_jax.compilation import jit
from ppo_jax.config import TrainConfig
from ppo_jax.generation.actor import Actor, Experience
from ppo_jax.generation.decoding import choose_token
from ppo_jax.generation.episode_metrics import component_means, repetition
from ppo_jax.generation.rollout import Rollout
from ppo_jax.inspector.tokens import rows_to_keep, tokens_record
from ppo_jax.learning.frozen import initial_state, join, network_of, partition
from ppo_jax.learning.inspection import look
from ppo_jax.learning.learner import Learner, TrainState
from ppo_jax.learning.metrics import fetch
from ppo_jax.learning.nonfinite import check_finite
from ppo_jax.learning.optimizer import Params
from ppo_jax.mesh import make_mesh, place, replicate, replicated, shardings
from ppo_jax.models import PolicyValueNetwork, with_separate_critic, with_value_bins
from ppo_jax.models.decoder import last_hidden
from ppo_jax.sampling import Sampling
from qwen_env import mdp
from qwen_env.episodes import Episode, Outcome
from qwen_env.errors import UsageError
from qwen_env.prompt_order import prompt_indices
from qwen_env.prompts import Prompt
from qwen_env.task import TextTask

# What a key is used for is folded into it, so that no two uses share a stream.
_ROLLOUT, _SHUFFLE, _EVALUATE, _ACT = range(4)


class Choice(NamedTuple):
    """An action, its log-probability, and the value of the state it was chosen in."""

    action: np.ndarray  # int32 [...]
    logprob: np.ndarray  # float32 [...]
    value: np.ndarray  # float32 [...]


class PPOAgent:
    """PPO (arXiv:1707.06347) on a text task.

    Args:
        network: the policy to train; as it is now it is also the reference model.
        task: prompts, rules and reward; its vocabulary is the network's.
        config: the settings.
        num_iterations: iterations of the whole run, over which the learning rate is scheduled;
            None makes it what the settings and the number of prompts come to.

    Raises:
        UsageError: the network does not fit the task or the settings, or the settings do not fit
            this machine.
    """

    def __init__(
        self,
        network: PolicyValueNetwork,
        task: TextTask,
        config: TrainConfig,
        num_iterations: int | None = None,
    ):
        if num_iterations is None:
            num_iterations = config.total_iterations(len(task.prompts))
        if config.ppo.critic == "separate":
            network = with_separate_critic(network)
        elif network.critic is not None:
            raise UsageError(
                f"critic is {config.ppo.critic!r}, but the model has a separate critic "
                "(critic/model.safetensors); set critic to 'separate', or remove that file."
            )
        if config.ppo.has_value_function:
            network = with_value_bins(network, config.ppo.bins)
        mesh = make_mesh(config.run.num_devices, config.run.num_shards)
        graphdef, params, frozen = partition(network, config.optimizer, config.run.seed)
        self.task = task
        self.config = config
        self.num_iterations = num_iterations
        self.actor = Actor(
            nnx.merge(graphdef, params, frozen),
            task,
            config.ppo.sampling,
            compacts_rows=config.ppo.num_packed_sizes > 1,
            num_slots=config.run.rollout_slots,
            mesh=mesh,
        )
        self.learner = Learner(
            graphdef,
            task.rules,
            config.ppo.for_run(num_iterations),
            config.optimizer,
            num_iterations,
            remat=config.run.remat,
            mesh=mesh,
        )
        params = place(params, mesh)
        self.frozen: Params = place(frozen, mesh)
        self._initial_backbone = params["backbone"]

        init = functools.partial(self.learner.init, seed=config.run.seed)
        self.state: TrainState = initial_state(init, params, mesh)
        self._mesh, whole = mesh, replicated(mesh)
        self._learn = jit(
            self.learner.learn,
            donate_argnums=0,
            out_shardings=(shardings(self.state, mesh), whole, whole, whole),
        )
        self._act = jit(
            functools.partial(_act, graphdef, rules=task.rules, sampling=config.ppo.sampling),
            static_argnames="greedy",
            out_shardings=whole,
        )
        self._look = jit(
            functools.partial(
                look,
                functools.partial(nnx.merge, graphdef),
                rules=task.rules,
                sampling=config.ppo.sampling,
            ),
            out_shardings=whole,
        )
        self.tokens: dict[str, Any] | None = None
        """Of the last update, where it is one that `RunConfig.inspect_size` keeps episodes of: see
        `ppo_jax.inspector.tokens`."""
        self._num_choices = 0
        self.distributions: dict[
            str, np.ndarray
        ] = {}  # of the last update, see `ppo_jax.learning.batch`

    @classmethod
    def from_config(cls, config: TrainConfig, *, prompts: Any = None, reward: Any = None) -> Self:
        """An agent on what the settings name, or on other prompts or another reward.

            agent = PPOAgent.from_config(preset("pocket"), prompts=["The plot"], reward=my_reward)

        Args:
            prompts: texts, rows or the path of a .jsonl file, as the environment takes them.
            reward: a function of a `RewardBatch`, or the name of one.

        Raises:
            UsageError: a setting, or a file that it names, is wrong.
            gymnasium.error.DependencyNotInstalled: an optional package is missing.
        """
        if config.task.keep_solvable is not None:
            raise UsageError(
                "keep_solvable is measured in a run's folder, by ppo-train; leave it out, and give "
                "the prompts to train on."
            )
        run = config.run
        mesh = make_mesh(run.num_devices, run.num_shards)
        network, task, _ = assemble(
            config.task,
            prompts=prompts,
            reward=reward,
            dtype=run.dtype,
            param_dtype=run.param_dtype,
            mesh=mesh,
        )
        network = with_critic_model(network, config, task.tokenizer, mesh)
        return cls(network, task, config)

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return int(self.state.iteration)

    @property
    def params(self) -> Params:
        """All parameters of the policy as it is now: those of the state, and what is frozen."""
        return join(self.state.params, self.frozen)

    @property
    def initial_backbone(self) -> Params:
        """The backbone that training began with."""
        return self._whole_backbone(self._initial_backbone)

    @property
    def reference(self) -> Params:
        """The backbone of the reference model: the policy's first, unless it moves."""
        moving = self.state.reference
        return self.initial_backbone if moving is None else self._whole_backbone(moving)

    @property
    def state_bytes_per_device(self) -> int:
        """Of parameters, moments and reference; all devices keep the same number."""
        kept = jax.tree.leaves((self.state, self.frozen, self._initial_backbone))
        # Where they are frozen, a critic's arrays are the policy's.
        arrays = {id(x): x for x in kept}.values()
        shapes = ((x.sharding.shard_shape(x.shape), x.dtype) for x in arrays)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)

    @property
    def network(self) -> PolicyValueNetwork:
        """The policy as it is now, on the state's own arrays: the next update consumes them.

        Where some of the layers are frozen, the layers are a copy; not where there are adapters.
        """
        graphdef = self.learner.graphdef
        network: PolicyValueNetwork = network_of(graphdef, self.state.params, self.frozen)
        return network

    def choose_action(self, observation: dict[str, np.ndarray], *, greedy: bool = False) -> Choice:
        """Choose a token for an observation of `QwenText-v0`, or for a batch of them."""
        key = jax.random.fold_in(self._key(_ACT), self._num_choices)
        self._num_choices += 1
        is_single = np.ndim(observation["input_ids"]) == 1
        rows = (
            np.atleast_2d(observation["input_ids"]),
            _turn_start(observation),
            np.ravel(observation["length"]),
        )
        tokens, turn_start, length = (replicate(x, self._mesh) for x in rows)
        chosen = self._act(self.params, tokens, turn_start, length, key, greedy=greedy)
        return Choice(*(np.asarray(x[0] if is_single else x) for x in chosen))

    def evaluate(
        self,
        prompts: Sequence[Prompt],
        *,
        greedy: bool,
        on_batch: Callable[[int], object] = lambda done: None,
    ) -> tuple[list[Episode], list[Outcome]]:
        """Respond to any number of prompts and score the responses; nothing is learnt.

        `on_batch` is told how many prompts are done, again and again.
        """
        return self.actor.respond_to_all(
            self.params,
            prompts,
            self._key(_EVALUATE),
            batch_size=self.config.ppo.batch_size,
            greedy=greedy,
            on_batch=on_batch,
        )

    def collect(self) -> Experience:
        """This iteration's episodes: its share of the prompts, answered by the present policy."""
        num_prompts = self.config.ppo.prompts_per_batch
        indices = prompt_indices(
            self.config.run.seed, self.iteration, num_prompts, len(self.task.prompts)
        )
        prompts = [self.task.prompts[i] for i in indices]
        experience = self.actor.respond(
            self.params,
            prompts,
            self._key(_ROLLOUT),
            completions_per_prompt=self.config.ppo.completions_per_prompt,
        )
        self._warn_of_endless_turns(experience)
        return experience

    def update(self, experience: Experience) -> dict[str, float]:
        """Learn from `experience`, which the present policy wrote; returns the metrics.

        `distributions` then holds what single numbers would hide of this update.
        """
        rows = self._rows_to_keep(experience)
        before = None if rows is None else self._look_at(experience.rollout, rows)
        start = time.perf_counter()
        rewards = experience.rewards
        self.state, metrics, distributions, tokens = self._learn(
            self.state,
            self._initial_backbone,
            experience.rollout,
            replicate(experience.scores, self._mesh),
            None if rewards is None else replicate(rewards, self._mesh),
            self._key(_SHUFFLE),
            self.frozen,
        )
        metrics, self.distributions = fetch(metrics, distributions)
        seconds = time.perf_counter() - start
        self.tokens = None
        if rows is not None:
            after = self._look_at(experience.rollout, rows)
            self.tokens = tokens_record(
                self.iteration,
                self.task.tokenizer,
                rows,
                experience.episodes,
                experience.outcomes,
                jax.device_get((tokens, before, after)),
            )
        return metrics | {"time/update_s": seconds}

    def learn(self) -> Iterator[tuple[Experience, dict[str, float]]]:
        """Iterate until `num_iterations` are done in all; yields each one's experience and metrics.

        Raises:
            TooManyNonfiniteUpdates: see `OptimizerConfig.max_nonfinite_updates`.
            RewardError: the reward function failed; the state is that of the last iteration.
        """
        limit = self.config.optimizer.max_nonfinite_updates
        while self.iteration < self.num_iterations:
            start = time.perf_counter()
            experience = self.collect()
            metrics = self.update(experience)
            seconds = time.perf_counter() - start
            components = component_means(experience.outcomes)
            metrics = {
                "iteration": self.iteration,
                **metrics,
                **{f"reward/{name}": mean for name, mean in components.items()},
                **repetition([episode.completion_ids for episode in experience.episodes]),
                "time/rollout_s": experience.rollout_s,
                "time/score_s": experience.score_s,
                "time/iteration_s": seconds,
                "throughput/tokens_per_s": experience.num_tokens / seconds,
                "memory/state_bytes_per_device": self.state_bytes_per_device,
            }
            yield experience, metrics
            check_finite(self.state, limit, "rewards")

    def _warn_of_endless_turns(self, experience: Experience) -> None:
        costs = any(reward < 0 for o in experience.outcomes for _, reward in o.turn_rewards)
        is_paid = self.task.missing_eos_penalty or self.config.ppo.length_limit == "bootstrap"
        if costs and not is_paid:
            warnings.warn(
                "A turn earned less than 0, and a turn that never ends costs nothing, so the "
                "policy may learn not to end its turns; set missing_eos_penalty, or length_limit "
                "to 'bootstrap'.",
                stacklevel=3,
            )

    def _rows_to_keep(self, experience: Experience) -> np.ndarray | None:
        """Of the episodes whose tokens are kept; None where this iteration's are not."""
        run, number = self.config.run, self.iteration + 1
        # The first one's as well, so that nothing is compiled later on.
        is_due = number % run.eval_every == 0 or number in (1, self.num_iterations)
        if not run.inspect_size or not is_due:
            return None
        return rows_to_keep(experience.scores, run.inspect_size)

    def _look_at(self, rollout: Rollout, kept: np.ndarray) -> Any:
        rows = replicate(kept, self._mesh)
        return self._look(self.params, rows, rollout.state, rollout.sampling_mask)

    def _whole_backbone(self, learning: Params) -> Params:
        whole: Params = join(nnx.State({"backbone": learning}), self.frozen)["backbone"]
        return whole

    def _key(self, use: int) -> jax.Array:
        root = jax.random.wrap_key_data(self.state.root_key)
        return jax.random.fold_in(jax.random.fold_in(root, self.state.iteration), use)


def _turn_start(observation: dict[str, np.ndarray]) -> np.ndarray:
    """int32 [B]: where the turn under way began in each row of an observation."""
    if "response_mask" not in observation:
        return np.ravel(observation["prompt_length"])
    own = np.atleast_2d(observation["response_mask"]) == 1
    behind = np.arange(1, own.shape[1] + 1)
    others = np.where(own | (behind > np.reshape(observation["length"], (-1, 1))), 0, behind)
    start: np.ndarray = others.max(axis=1).astype(np.int32)
    return start


def _act(
    graphdef: nnx.GraphDef[PolicyValueNetwork],
    params: Params,
    tokens: jax.Array,
    turn_start: jax.Array,
    length: jax.Array,
    key: jax.Array,
    *,
    rules: mdp.Rules,
    sampling: Sampling,
    greedy: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Action, log-probability and value [B] for each row's next token."""
    network = nnx.merge(graphdef, params)
    mask = jnp.arange(tokens.shape[1]) < length[:, None]

    hidden = last_hidden(network.backbone(tokens, mask)[0], length)
    action, logprob, _ = choose_token(
        network,
        hidden,
        length - turn_start,
        jax.random.split(key, len(length)),
        rules=rules,
        sampling=sampling,
        greedy=greedy,
    )
    value_hidden = (
        hidden if network.critic is None else last_hidden(network.critic(tokens, mask)[0], length)
    )
    return action, logprob, network.value_head(value_hidden)
