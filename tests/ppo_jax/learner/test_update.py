"""The update against a PyTorch transcription, and what it does with what cannot be learnt from."""

import copy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file

from ppo_jax.algorithm import RATIO_EDGES, clipped_policy_loss, masked_histogram
from ppo_jax.models import save_pretrained
from ppo_jax.sampling import pack_bits, unpack_bits

B, P, T = 4, 5, 6

# Every setting of the loss that changes what is computed; clips so narrow that all of them act.
EVERYTHING = {
    "num_minibatches": 2,
    "num_microbatches": 2,
    "num_epochs": 2,
    "temperature": 0.8,
    "top_p": 0.95,
    "loss_aggregation": "sequence",
    "clip_range": 0.1,
    "clip_range_high": 0.3,
    "dual_clip": 1.4,
    "value_clip_range": 0.2,
    "advantage_whitening": "minibatch",
    "critic": "separate",
}

# Nothing of the episodes is near the dual clip, but for what a test does to them.
ONE_EPOCH = {"num_minibatches": 2, "num_epochs": 1, "dual_clip": 3.0}


@pytest.fixture(scope="module")
def moved(batch, rules):
    """The batch, as if the policy and its values had moved since; drawn from parts of the ids."""
    rng = np.random.default_rng(2)
    noise, more = rng.normal(0, 0.4, (2, B, T)).astype(np.float32) * np.asarray(batch.mask)
    support = rng.random((B, T, rules.vocab_size)) < 0.3
    support[..., list(rules.forbidden_token_ids)] = False
    index = np.minimum(np.asarray(batch.prompt_length)[:, None] + np.arange(T), P + T - 1)
    tokens = np.take_along_axis(np.asarray(batch.tokens), index, axis=1)
    np.put_along_axis(support, tokens[..., None], True, axis=-1)
    return batch._replace(
        # At temperature 0.8 and over a third of the ids, a token is about e times as probable.
        logprobs=jnp.where(batch.mask, batch.logprobs + 1 + noise, 0),
        values=batch.values + more,
        advantages=3 * batch.advantages + 1,
        support=pack_bits(jnp.asarray(support)),
    )


class TorchLearner:
    """PPO as a PyTorch user would write it, of the same network and settings."""

    def __init__(self, learner, rules, folder):
        self.ppo, self.optimizer_config = learner.ppo, learner.optimizer
        network = learner.network
        save_pretrained(network, folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self.critic = copy.deepcopy(self.model.model) if network.critic else self.model.model
        self.head = torch.nn.Linear(network.config.hidden_size, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(np.asarray(network.value_head.weight[...])))
            self.head.bias.copy_(torch.tensor(np.asarray(network.value_head.bias[...])))
        self.modules = [self.model, self.head, *([self.critic] if network.critic else [])]
        self.allowed = torch.ones(rules.vocab_size, dtype=torch.bool)
        self.allowed[list(rules.forbidden_token_ids)] = False
        named = [pair for module in self.modules for pair in module.named_parameters()]
        plain = [p for name, p in named if "norm" in name or "bias" in name]
        decayed = [p for name, p in named if not ("norm" in name or "bias" in name)]
        self.parameters = [*decayed, *plain]
        self.adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.optimizer_config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.optimizer_config.learning_rate,
            betas=(self.optimizer_config.adam_b1, self.optimizer_config.adam_b2),
            eps=self.optimizer_config.adam_eps,
        )

    def update(self, batch, orders, vocab_size):
        """One step a minibatch, whose rows `orders` lists; what each said."""
        t = {k: torch.tensor(np.asarray(x)) for k, x in batch._asdict().items() if x is not None}
        if batch.support is not None:
            t["support"] = torch.tensor(np.asarray(unpack_bits(batch.support, vocab_size)))
        said = {"policy": [], "clipped": [], "value": [], "norm": [], "kl": []}
        for rows in orders:
            self._step({name: x[torch.tensor(rows)] for name, x in t.items()}, said)
        return said

    def _step(self, t, said):
        ppo, mask = self.ppo, t["mask"]
        rows = torch.arange(len(mask))[:, None]
        index = t["prompt_length"].long()[:, None] + torch.arange(T)
        tokens = t["tokens"].long()
        attention = (torch.arange(P + T) < t["length"][:, None]).long()
        before = index - 1
        hidden = self.model.model(tokens, attention_mask=attention).last_hidden_state[rows, before]
        valued = self.critic(tokens, attention_mask=attention).last_hidden_state[rows, before]
        values = self.head(valued)[..., 0]
        allowed = self.allowed if "support" not in t else self.allowed & t["support"]
        logits = self.model.lm_head(hidden) / ppo.temperature
        log_p = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        new = log_p.gather(-1, tokens[rows, index.clamp(max=P + T - 1)][..., None])[..., 0]
        entropy = -(log_p.exp() * log_p.masked_fill(~allowed, 0.0)).sum(-1)
        if ppo.loss_aggregation == "token":
            weights = mask / mask.sum()
        else:
            weights = mask / mask.sum(1, keepdim=True) / len(mask)

        def mean(x):
            return (weights[mask] * x[mask]).sum()

        advantages = t["advantages"]
        if ppo.advantage_whitening == "minibatch":
            real = advantages[mask]
            advantages = (advantages - real.mean()) / (real.var(correction=0) + 1e-8).sqrt()
        log_ratio = torch.where(mask, new - t["logprobs"], 0.0)
        ratio = log_ratio.exp()
        high = ppo.clip_range if ppo.clip_range_high is None else ppo.clip_range_high
        clipped = ratio.clamp(1 - ppo.clip_range, 1 + high)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)
        if ppo.dual_clip is not None:
            bounded = torch.maximum(surrogate, ppo.dual_clip * advantages)
            surrogate = torch.where(advantages < 0, bounded, surrogate)
        policy = -mean(surrogate)
        error = (values - t["returns"]).square()
        if ppo.value_clip_range is not None:
            change = (values - t["values"]).clamp(-ppo.value_clip_range, ppo.value_clip_range)
            error = torch.maximum(error, (t["values"] + change - t["returns"]).square())
        value = mean(error)
        loss = policy + ppo.value_coef * value - ppo.entropy_coef * mean(entropy)
        self.adam.zero_grad()
        loss.backward()
        largest = self.optimizer_config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, largest)
        self.adam.step()
        said["policy"].append(policy.item())
        said["clipped"].append(mean((ratio != clipped).float()).item())
        said["value"].append(value.item())
        said["norm"].append(norm.item())
        said["kl"].append(mean(ratio - 1 - log_ratio).item())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param(EVERYTHING, id="everything", marks=pytest.mark.slow),
    ],
)
def test_updates_equal_a_pytorch_transcription(rules, compiled, batch, moved, changes, tmp_path):
    """Several optimizer steps: clipped loss, value loss, entropy, gradient clip and AdamW."""
    learner = compiled(**changes, optimized=not changes)
    batch = moved if changes else batch
    state, metrics, _ = learner.update(batch)
    ppo = learner.ppo
    theirs = TorchLearner(learner, rules, tmp_path / "before")
    orders = []
    for epoch in range(ppo.num_epochs):
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), epoch), B)
        orders += np.split(np.asarray(order), ppo.num_minibatches)
    said = theirs.update(batch, orders, rules.vocab_size)
    np.testing.assert_allclose(metrics["policy/loss"], np.mean(said["policy"]), atol=1e-6)
    np.testing.assert_allclose(metrics["policy/clip_fraction"], np.mean(said["clipped"]), atol=1e-6)
    np.testing.assert_allclose(metrics["value/loss"], np.mean(said["value"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/grad_norm"], np.mean(said["norm"]), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["policy/approx_kl"], np.mean(said["kl"]), rtol=1e-5, atol=1e-7
    )
    assert metrics["policy/grad_norm"] > learner.optimizer.max_grad_norm, "the clip must act"
    save_pretrained(nnx.merge(learner.learner.passes.graphdef, state.params), tmp_path / "after")
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    distance = 0.0
    for ours, expected, start in zip(
        after.parameters(), theirs.model.parameters(), before.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)
        distance = max(distance, (expected - start).abs().max().item())
    assert distance > 1e-3
    head = state.params["value_head"]["weight"].get_value()
    torch.testing.assert_close(
        torch.tensor(np.asarray(head)), theirs.head.weight.data, rtol=1e-5, atol=2e-6
    )
    if ppo.critic == "separate":
        ours = load_file(tmp_path / "after" / "critic.safetensors")
        for name, expected in theirs.critic.named_parameters():
            torch.testing.assert_close(ours["model." + name], expected, rtol=1e-5, atol=2e-6)


def test_everything_acts_in_that_batch(compiled, moved):
    """Or the comparison above would show little."""
    mask = np.asarray(moved.mask)
    learner = compiled(**EVERYTHING)
    start = learner.start
    new = learner.compile(learner.learner.passes._response_outputs, static_argnames="layout")(
        start.params, moved.tokens, moved.prompt_length, moved.length, moved.support, layout=None
    )
    ratio = np.exp(new.logprobs - moved.logprobs)[mask]
    falls = np.asarray(moved.advantages < moved.advantages[moved.mask].mean())[mask]
    assert (ratio < 0.9).any() and (ratio > 1.3).any() and ((ratio > 0.9) & (ratio < 1.3)).any()
    assert (falls & (ratio > 1.4)).any(), "the dual clip"
    assert (np.abs(new.values - moved.values)[mask] > 0.2).any(), "the value clip"


def test_ratios_are_counted_over_all_minibatches(compiled, batch, moved):
    learner = compiled(**ONE_EPOCH)
    _, _, distributions = learner.update(batch)
    counts = np.asarray(distributions["ratio"])
    assert counts.sum() == batch.mask.sum()
    one = np.argmin(np.abs(RATIO_EDGES - 1))  # rounding puts a ratio of 1 on either side of 1
    assert counts[one - 1 : one + 1].sum() == batch.mask.sum()
    far = batch._replace(logprobs=moved.logprobs)
    _, _, distributions = learner.update(far)
    ratio = np.exp(batch.logprobs - far.logprobs)  # but for the step between the minibatches
    expected = masked_histogram(ratio, batch.mask, RATIO_EDGES)
    assert np.abs(np.asarray(distributions["ratio"]) - expected).sum() <= 4
    assert np.count_nonzero(distributions["ratio"]) > 4


def test_a_nonfinite_update_is_skipped_and_counted(compiled, batch):
    learner = compiled(**ONE_EPOCH)
    poisoned = batch._replace(advantages=batch.advantages.at[0, 0].set(jnp.nan))
    state, metrics, _ = learner.update(poisoned)
    assert metrics["update/nonfinite"] == 1
    assert metrics["update/epochs"] == 0.5
    assert all(np.isfinite(float(x)) for x in metrics.values())
    chex.assert_tree_all_finite(state.params)
    # What is averaged is the other minibatch alone.
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), 0), B)
    [good] = [rows for rows in np.split(np.asarray(order), 2) if 0 not in rows]
    error = np.asarray(batch.values - batch.returns)[good][np.asarray(batch.mask)[good]]
    assert metrics["value/loss"] == pytest.approx(np.square(error).mean(), rel=1e-4)
    all_poisoned, two = batch._replace(advantages=batch.advantages * jnp.nan), jnp.int32(2)
    state, metrics, _ = learner.update(all_poisoned)
    assert metrics["update/nonfinite"] == state.nonfinite_in_a_row == 2
    chex.assert_trees_all_equal(state.params, learner.start.params)
    chex.assert_trees_all_equal(state.opt_state, learner.start.opt_state)
    assert state.iteration == 1
    again, _, _ = learner.update(all_poisoned, state=learner.start._replace(nonfinite_in_a_row=two))
    assert again.nonfinite_in_a_row == 4, "the row goes on from one iteration to the next"
    again, _, _ = learner.update(batch, state=learner.start._replace(nonfinite_in_a_row=two))
    assert again.nonfinite_in_a_row == 0, "a finite one ends it"


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped_as_well(compiled, batch):
    """Of an infinite ratio, of which the dual clip makes a finite loss: 0 times infinity is NaN.

    Each row has one, so both minibatches do.
    """
    odd = batch._replace(
        logprobs=batch.logprobs.at[:, 0].add(-99), advantages=batch.advantages.at[:, 0].set(-1)
    )
    of_policy = batch.logprobs, odd.logprobs, odd.advantages, odd.mask
    assert np.isfinite(clipped_policy_loss(*of_policy, dual_clip=3.0).loss)
    learner = compiled(**ONE_EPOCH)
    state, metrics, _ = learner.update(odd)
    assert metrics["update/nonfinite"] == 2
    chex.assert_trees_all_equal(state.params, learner.start.params)
    chex.assert_trees_all_equal(state.opt_state, learner.start.opt_state)


def test_minibatches_are_drawn_in_an_order_that_the_key_decides(compiled, batch):
    learner = compiled(**ONE_EPOCH)
    one, same = learner.update(batch, seed=0), learner.update(batch, seed=0)
    chex.assert_trees_all_equal(one[0].params, same[0].params)
    losses = {float(learner.update(batch, seed=seed)[1]["value/loss"]) for seed in range(8)}
    assert len(losses) > 1


def test_the_state_carries_on(compiled, batch):
    """What a next iteration needs is all there, and nothing else has changed."""
    learner = compiled(**ONE_EPOCH)
    state, _, _ = learner.update(batch)
    assert state.iteration == 1
    assert state.opt_state.count == 2
    assert state.reference is None
    chex.assert_trees_all_equal(state.controls, learner.start.controls)
    chex.assert_trees_all_equal(state.root_key, learner.start.root_key)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, learner.start)
