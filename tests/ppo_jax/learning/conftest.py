"""A learner for each set of settings, compiled once, and four finished episodes to learn from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo_jax.config import OptimizerConfig, PPOConfig
from ppo_jax.generation.rollout import Rollout
from ppo_jax.learning.batch import Batch, Prepared
from ppo_jax.learning.frozen import partition
from ppo_jax.learning.learner import Learner, TrainState
from ppo_jax.mesh import make_mesh, place
from ppo_jax.models import (
    DecoderConfig,
    PolicyValueNetwork,
    with_separate_critic,
    with_value_bins,
)
from qwen_env import mdp

B, P, T = 4, 5, 6
RESPONSE_LENGTHS = np.array([6, 1, 4, 3])
SCORE = np.array([1.0, -0.5, 2.0, 0.25], np.float32)
PPO = PPOConfig(
    batch_size=B,
    kl_coef=0.1,
    gamma=0.97,
    gae_lambda=0.9,
    value_coef=0.5,
    entropy_coef=0.01,
    num_epochs=3,
)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3, schedule="constant", weight_decay=0.1, max_grad_norm=0.5
)


class CompiledLearner:
    """A learner at its start; `prepare` and `update` are compiled when they are first called.

    `update` computes the first minibatch's gradients as it does those of the others.

    Args:
        changes: fields of `PPO` and `OPTIMIZER` that are others here.
        num_devices: that the rows are cut over.
        num_shards: that the parameters are cut over.
        remat: recompute activations in the backward pass.
        optimized: compile as training does. The tests that ask what a setting does go without
            LLVM's optimizer, which takes half of the time.
    """

    def __init__(
        self,
        network: PolicyValueNetwork,
        rules: mdp.Rules,
        *,
        optimized: bool = False,
        num_devices: int = 1,
        num_shards: int = 1,
        remat: bool = False,
        **changes: Any,
    ):
        own = {field.name for field in dataclasses.fields(PPOConfig)}
        ppo = {name: value for name, value in changes.items() if name in own}
        optimizer = {name: value for name, value in changes.items() if name not in own}
        self.ppo = dataclasses.replace(PPO, **ppo)
        self.optimizer = dataclasses.replace(OPTIMIZER, **optimizer)
        if self.ppo.critic == "separate":
            network = with_separate_critic(network)
        network = with_value_bins(network, self.ppo.bins)
        self.network = network
        mesh = make_mesh(num_devices, num_shards)
        graphdef, params, frozen = partition(network, self.optimizer)
        reference = other_backbone(nnx.merge(graphdef, params, frozen))
        self.learner = Learner(
            graphdef, rules, self.ppo, self.optimizer, num_iterations=10, remat=remat, mesh=mesh
        )
        self.start: TrainState = place(self.learner.init(params, seed=0), mesh)
        self.frozen, self.reference = place(frozen, mesh), place(reference, mesh)
        options = None if optimized else {"xla_backend_optimization_level": 0}
        self.compile = functools.partial(jax.jit, compiler_options=options)
        self._prepare = self.compile(self.learner.prepare)
        self._update = self.compile(self.learner.update)

    def prepare(self, rollout: Rollout, score: np.ndarray = SCORE) -> Prepared:
        """Of episodes that the policy at its start wrote; the reference is another network."""
        start, frozen = self.start, self.frozen
        prepared, _ = self._prepare(
            start.params, self.reference, start.controls, rollout, score, frozen=frozen
        )
        return prepared

    def learn(self, rollout: Rollout, score: np.ndarray = SCORE) -> Any:
        """(state, metrics, distributions, tokens) after an iteration, in one program."""
        key, start = jax.random.key(0), self.start
        learn = functools.partial(self.compile(self.learner.learn), frozen=self.frozen)
        return learn(start, self.reference, rollout, score, None, key)

    def update(self, batch: Batch, *, state: TrainState | None = None, seed: int = 0) -> Any:
        """(state, metrics, distributions) after an iteration from `state`, or from the start."""
        state = self.start if state is None else state
        return self._update(state, batch, jax.random.key(seed), self.frozen)


def other_backbone(network: PolicyValueNetwork) -> nnx.State:
    """The backbone of a reference model that differs from the policy."""
    noise = np.random.default_rng(5)
    return jax.tree.map(
        lambda x: x + jnp.asarray(noise.normal(0, 0.02, x.shape), x.dtype),
        nnx.state(network.backbone),
    )


@pytest.fixture(scope="session")
def rules(tokenizer) -> mdp.Rules:
    return mdp.Rules(P, T, tokenizer.vocab_size, (0,), forbidden_token_ids=(7, 8, 9))


@pytest.fixture(scope="session")
def network(make_network) -> PolicyValueNetwork:
    return make_network()


@pytest.fixture(scope="session")
def compiled(network, rules) -> Callable[..., CompiledLearner]:
    """From changes of the settings to a learner: one for each set of them."""
    return functools.cache(functools.partial(CompiledLearner, network, rules))


@pytest.fixture(scope="session")
def learner_of() -> type[CompiledLearner]:
    """For the tests that have a network and rules of their own."""
    return CompiledLearner


@pytest.fixture(scope="session")
def finished(rules) -> Rollout:
    """Ragged episodes of random tokens: rows 1 and 3 end with an end-of-sequence id."""
    rng = np.random.default_rng(0)
    prompt_length = np.array([5, 2, 3, 4])
    length = prompt_length + RESPONSE_LENGTHS
    tokens = rng.integers(10, rules.vocab_size, (B, P + T))
    tokens[np.arange(P + T) >= length[:, None]] = 0
    terminated = np.array([False, True, False, True])
    tokens[terminated, length[terminated] - 1] = 0
    state = mdp.State(
        *(jnp.asarray(x, jnp.int32) for x in (tokens, prompt_length, length)),
        jnp.asarray(terminated),
        jnp.asarray(~terminated),
    )
    return Rollout(state, jnp.zeros((B, T)))


@pytest.fixture(scope="session")
def batch(compiled, finished) -> Batch:
    """What the learner with the plain settings makes of them."""
    return compiled().prepare(finished).batch


def _minibatches(key: jax.Array, ppo: PPOConfig) -> list[np.ndarray]:
    rows = []
    for epoch in range(ppo.num_epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), ppo.batch_size)
        rows += np.split(np.asarray(order), ppo.num_minibatches)
    return rows


@pytest.fixture(scope="session")
def minibatches() -> Callable[[jax.Array, PPOConfig], list[np.ndarray]]:
    """The rows of each minibatch of each epoch, in the order that the key makes."""
    return _minibatches


@pytest.fixture(scope="session")
def make_tiny_network() -> Callable[..., PolicyValueNetwork]:
    """A network of seven ids whose probabilities differ, and whose values do too."""
    config = DecoderConfig(
        vocab_size=7,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )

    def make(seed: int = 0) -> PolicyValueNetwork:
        network = PolicyValueNetwork(config, rngs=nnx.Rngs(seed))
        network.backbone.embed_tokens[...] = network.backbone.embed_tokens[...] * 12
        network.value_head.weight[...] = jnp.linspace(-1, 1, 8)[None]
        return network

    return make
