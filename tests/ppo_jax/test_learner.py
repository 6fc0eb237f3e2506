"""The PPO step against a PyTorch transcription, and the properties that it promises."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from ppo_jax.config import OptimizerConfig, PPOConfig
from ppo_jax.learner import Batch, Learner, learning_rate_schedule, make_optimizer
from ppo_jax.models import save_pretrained
from ppo_jax.rollout import Rollout
from qwen_env import mdp

B, P, T = 4, 5, 6
RESPONSE_LENGTHS = np.array([6, 1, 4, 3])
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


@pytest.fixture(scope="module")
def rules(tokenizer) -> mdp.Rules:
    return mdp.Rules(P, T, tokenizer.vocab_size, (0,), forbidden_token_ids=(7, 8, 9))


@pytest.fixture(scope="module")
def network(make_network):
    return make_network()


@pytest.fixture(scope="module")
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


SCORE = np.array([1.0, -0.5, 2.0, 0.25], np.float32)


@pytest.fixture(scope="module")
def compiled(network, rules):
    """From changes of `PPO` to a learner, its compiled `prepare` and its compiled `update`."""

    @functools.cache
    def make(**changes) -> tuple[Learner, Callable, Callable]:
        learner = Learner(
            graphdef=nnx.graphdef(network),
            optimizer=make_optimizer(OPTIMIZER),
            learning_rate=learning_rate_schedule(OPTIMIZER, num_iterations=10),
            rules=rules,
            config=dataclasses.replace(PPO, **changes),
        )
        start = learner.init(nnx.state(network), seed=0)
        prepare, update = jax.jit(learner.prepare), jax.jit(learner.update)
        return (
            learner,
            lambda finished: prepare(start.params, other_params(network), finished, SCORE),
            lambda batch, seed=0: update(start, batch, jax.random.key(seed)),
        )

    return make


@pytest.fixture(scope="module")
def batch(compiled, finished) -> Batch:
    _, prepare, _ = compiled()
    return prepare(finished)[0]


def other_params(network):
    """A reference model that differs from the policy."""
    noise = np.random.default_rng(5)
    return jax.tree.map(
        lambda x: x + jnp.asarray(noise.normal(0, 0.02, x.shape), x.dtype), nnx.state(network)
    )


def assert_trees_close(one, other, **tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)


def full_logprobs(network, finished, rules, params=None):
    """log π of each response token, from the full logits in float64."""
    if params is not None:
        network = nnx.merge(nnx.graphdef(network), params)
    state = finished.state
    mask = jnp.arange(P + T) < state.length[:, None]
    logits, values = jax.jit(network)(state.tokens, mask)
    logits = np.asarray(logits, np.float64)
    logits[..., list(rules.forbidden_token_ids)] = -np.inf
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    index = np.asarray(state.prompt_length)[:, None] + np.arange(T)
    rows = np.arange(B)[:, None]
    return log_p[rows, index - 1, np.asarray(state.tokens)[rows, index]], np.asarray(values)[
        rows, index - 1
    ]


def test_prepare_equals_a_numpy_loop(network, rules, compiled, finished):
    _, prepare, _ = compiled(whiten_advantages=False)
    batch, metrics = prepare(finished)
    logprobs, values = full_logprobs(network, finished, rules)
    ref_logprobs, _ = full_logprobs(network, finished, rules, other_params(network))
    for row, steps in enumerate(RESPONSE_LENGTHS):
        rewards = -PPO.kl_coef * (logprobs - ref_logprobs)[row, :steps]
        rewards[-1] += SCORE[row]
        next_value = advantage = 0.0
        for t in reversed(range(steps)):
            delta = rewards[t] + PPO.gamma * next_value - values[row, t]
            advantage = delta + PPO.gamma * PPO.gae_lambda * advantage
            next_value = values[row, t]
            np.testing.assert_allclose(batch.advantages[row, t], advantage, atol=2e-5)
            np.testing.assert_allclose(batch.returns[row, t], advantage + next_value, atol=2e-5)
    mask = np.arange(T) < RESPONSE_LENGTHS[:, None]
    np.testing.assert_array_equal(batch.mask, mask)
    kl = np.where(mask, logprobs - ref_logprobs, 0).sum(1).mean()
    np.testing.assert_allclose(metrics["objective/kl"], kl, atol=1e-5)
    np.testing.assert_allclose(
        metrics["objective/reward"], SCORE.mean() - PPO.kl_coef * kl, atol=1e-5
    )


def test_a_policy_that_is_its_own_reference_has_no_kl(network, compiled, finished):
    learner, _, _ = compiled(temperature=0.5)
    params = nnx.state(network)
    _, metrics = jax.jit(learner.prepare)(params, params, finished, SCORE)
    assert metrics["objective/kl"] == 0
    assert metrics["objective/reward"] == metrics["objective/score"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_minibatches": 2, "num_microbatches": 2, "num_epochs": 1, "temperature": 0.5}],
)
def test_the_first_ratio_is_one(compiled, finished, changes):
    _, prepare, update = compiled(**changes)
    _, metrics = update(prepare(finished)[0])
    assert metrics["policy/first_ratio_max_error"] < 1e-5


def test_the_update_does_not_depend_on_micro_batches(compiled, batch):
    one, metrics = compiled()[2](batch)
    other, other_metrics = compiled(num_microbatches=4)[2](batch)
    # Adam divides by the gradient's own size, so rounding of a vanishing gradient is no error of
    # the sum: what is compared closely is the first moment, and the metrics.
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(one.opt_state[1].mu))
    assert_trees_close(one.opt_state[1].mu, other.opt_state[1].mu, atol=1e-6 * scale)
    assert_trees_close(one.params, other.params, rtol=1e-6, atol=2e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-4, atol=1e-6)


def test_updates_equal_a_pytorch_transcription(network, rules, compiled, batch, tmp_path):
    """Three optimizer steps: clipped loss, value loss, entropy, gradient clip and AdamW."""
    learner, _, update = compiled()
    state, metrics = update(batch)
    save_pretrained(network, tmp_path / "before")
    save_pretrained(nnx.merge(learner.graphdef, state.params), tmp_path / "after")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    head = torch.nn.Linear(network.config.hidden_size, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(np.asarray(network.value_head.weight[...])))
        head.bias.copy_(torch.tensor(np.asarray(network.value_head.bias[...])))
    losses = _torch_updates(model, head, batch, rules)
    np.testing.assert_allclose(metrics["policy/loss"], np.mean(losses["policy"]), atol=1e-6)
    np.testing.assert_allclose(metrics["value/loss"], np.mean(losses["value"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/grad_norm"], np.mean(losses["norm"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/approx_kl"], np.mean(losses["kl"]), atol=1e-7)
    assert metrics["policy/grad_norm"] > OPTIMIZER.max_grad_norm, "the clip must act"
    moved = 0.0
    for ours, theirs, start in zip(
        after.parameters(),
        model.parameters(),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "before").parameters(),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
        moved = max(moved, (theirs - start).abs().max().item())
    assert moved > 1e-3
    torch.testing.assert_close(
        torch.tensor(np.asarray(nnx.merge(learner.graphdef, state.params).value_head.weight[...])),
        head.weight.data,
        rtol=1e-5,
        atol=2e-6,
    )


def _torch_updates(model, head, batch: Batch, rules) -> dict[str, list[float]]:
    t = {name: torch.tensor(np.asarray(x)) for name, x in batch._asdict().items()}
    attention = (torch.arange(P + T) < t["length"][:, None]).long()
    index = t["prompt_length"].long()[:, None] + torch.arange(T)
    rows = torch.arange(B)[:, None]
    inside = index.clamp(max=P + T - 1)
    mask = t["mask"]
    allowed = torch.ones(rules.vocab_size, dtype=torch.bool)
    allowed[list(rules.forbidden_token_ids)] = False
    column = allowed.cumsum(0) - 1  # of an allowed id among the allowed ones
    decayed = [p for n, p in model.named_parameters() if "norm" not in n and "bias" not in n]
    plain = [p for n, p in model.named_parameters() if "norm" in n or "bias" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": [*decayed, head.weight], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [*plain, head.bias], "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.adam_b1, OPTIMIZER.adam_b2),
        eps=OPTIMIZER.adam_eps,
    )
    said: dict[str, list[float]] = {"policy": [], "value": [], "norm": [], "kl": []}
    for _ in range(PPO.num_epochs):
        out = model.model(t["tokens"].long(), attention_mask=attention)
        hidden = out.last_hidden_state[rows, index - 1]
        # Only the allowed columns: what is forbidden has no part in the distribution.
        distribution = torch.distributions.Categorical(logits=model.lm_head(hidden)[..., allowed])
        new = distribution.log_prob(column[t["tokens"].long()[rows, inside]])
        entropy = distribution.entropy()
        log_ratio = new - t["logprobs"]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - PPO.clip_range, 1 + PPO.clip_range)
        surrogate = torch.minimum(ratio * t["advantages"], clipped * t["advantages"])
        policy = -surrogate[mask].mean()
        value = (head(hidden)[..., 0] - t["returns"])[mask].square().mean()
        loss = policy + PPO.value_coef * value - PPO.entropy_coef * entropy[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        parameters = [*model.parameters(), *head.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.max_grad_norm)
        optimizer.step()
        said["policy"].append(policy.item())
        said["value"].append(value.item())
        said["norm"].append(norm.item())
        said["kl"].append((ratio - 1 - log_ratio)[mask].mean().item())
    return said


def test_kl_early_stop_takes_no_step_beyond_the_target(compiled, batch):
    one_epoch, _ = compiled(num_epochs=1)[2](batch)
    stopped, metrics = compiled(num_epochs=6, target_kl=1e-9)[2](batch)
    assert metrics["update/early_stopped"] == 1
    assert metrics["update/epochs"] == 1
    assert_trees_close(stopped.params, one_epoch.params, rtol=1e-6, atol=1e-7)
    assert stopped.opt_state[1].count == one_epoch.opt_state[1].count == 1
    _, metrics = compiled()[2](batch)
    assert metrics["update/early_stopped"] == 0
    assert metrics["update/epochs"] == PPO.num_epochs


def test_a_nonfinite_update_is_skipped_and_counted(compiled, batch, network):
    learner, _, update = compiled(num_minibatches=2, num_epochs=1)
    start = learner.init(nnx.state(network), seed=0)
    poisoned = batch._replace(advantages=batch.advantages.at[0, 0].set(jnp.nan))
    state, metrics = update(poisoned)
    assert metrics["update/nonfinite"] == 1
    assert metrics["update/epochs"] == 0.5
    assert all(np.isfinite(float(x)) for x in metrics.values())
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params))
    all_poisoned = batch._replace(advantages=batch.advantages * jnp.nan)
    state, metrics = update(all_poisoned)
    assert metrics["update/nonfinite"] == state.nonfinite_in_a_row == 2
    assert_trees_close(state.params, start.params, rtol=0, atol=0)
    assert_trees_close(state.opt_state, start.opt_state, rtol=0, atol=0)
    assert state.iteration == 1


def test_minibatches_are_drawn_in_an_order_that_the_key_decides(compiled, batch):
    _, _, update = compiled(num_minibatches=2, num_epochs=1)
    one, same = update(batch, seed=0), update(batch, seed=0)
    assert_trees_close(one[0].params, same[0].params, rtol=0, atol=0)
    losses = {float(update(batch, seed=seed)[1]["value/loss"]) for seed in range(8)}
    assert len(losses) > 1


def test_norms_and_biases_do_not_decay(network):
    optimizer = make_optimizer(dataclasses.replace(OPTIMIZER, weight_decay=1.0))
    params = nnx.state(network)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    for (path, update), (_, param) in zip(
        nnx.to_flat_state(updates), nnx.to_flat_state(params), strict=True
    ):
        decays = "bias" not in path and not any("norm" in str(part) for part in path)
        expected = -param.get_value() if decays else jnp.zeros_like(param.get_value())
        np.testing.assert_allclose(update.get_value(), expected, err_msg=str(path))


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 9: 1.0}),
        ("linear", 0, {0: 1.0, 5: 0.5, 9: 0.1}),
        ("cosine", 0, {0: 1.0, 5: 0.5}),
        ("linear", 2, {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 9: 0.125}),
        ("constant", 1, {0: 1.0, 1: 1.0}),
    ],
)
def test_learning_rate_by_iteration(schedule, warmup, expected):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_iterations=warmup)
    rate = learning_rate_schedule(config, num_iterations=10)
    for iteration, value in expected.items():
        np.testing.assert_allclose(rate(iteration), value, atol=1e-6)
