"""Top-k and top-p in the rollout, and several completions of one prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

import ppo_jax.generation.rollout as rollout_module
from ppo_jax.generation.rollout import rollout
from ppo_jax.learning.response_outputs import response_outputs
from ppo_jax.sampling import Sampling, unpack_bits
from qwen_env import mdp

TRUNCATED = Sampling(temperature=0.8, top_k=60, top_p=0.9)
# Without LLVM's optimizer, as these are many programs for few runs.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def compile_rollout(network, task, *, prompts=None, **options):
    """A function from a seed to the rollout of `prompts` (the task's own by default)."""
    first = task.initial_state(task.prompts if prompts is None else prompts)
    graphdef, params = nnx.split(network)

    @quick_jit
    def compiled(params, key):
        return rollout(
            nnx.merge(graphdef, params),
            jnp.asarray(first.tokens[:, : task.rules.max_prompt_length]),
            jnp.asarray(first.prompt_length),
            key,
            rules=task.rules,
            **options,
        )

    return lambda seed=0: jax.device_get(compiled(params, jax.random.key(seed)))


def compile_teacher_forcing(network, task, sampling):
    """From a rollout to what `response_outputs` says of it."""
    graphdef, params = nnx.split(network)

    @quick_jit
    def compiled(params, state, sampling_mask):
        return response_outputs(
            nnx.merge(graphdef, params),
            state.tokens,
            state.prompt_length,
            state.length,
            sampling_mask,
            rules=task.rules,
            sampling=sampling,
        )

    return lambda result: jax.device_get(compiled(params, result.state, result.sampling_mask))


def written(result, task):
    """bool [B, T]: where there is a response token."""
    return np.arange(task.rules.max_new_tokens) < mdp.response_length(result.state)[:, None]


def response(result, task):
    """The response's tokens [B, T], and whatever stands behind them."""
    index = result.state.prompt_length[:, None] + np.arange(task.rules.max_new_tokens)
    inside = np.minimum(index, task.rules.max_length - 1)
    return np.take_along_axis(result.state.tokens, inside, axis=1)


@pytest.fixture(scope="module")
def network(make_network):
    return make_network()


@pytest.fixture(scope="module")
def task(make_test_task):
    return make_test_task(min_new_tokens=2, forbidden_token_ids=(5, 6, 7))


@pytest.fixture(scope="module")
def truncated(network, task):
    return compile_rollout(network, task, sampling=TRUNCATED)


def test_draws_and_logprobs_belong_to_the_recorded_sampling_mask(network, task, truncated):
    teacher_forced = compile_teacher_forcing(network, task, TRUNCATED)
    sizes, lengths = set(), set()
    for seed in range(4):
        result = truncated(seed)
        mask = written(result, task)
        sampling_mask = np.asarray(unpack_bits(result.sampling_mask, task.rules.vocab_size))
        drawn = np.take_along_axis(sampling_mask, response(result, task)[..., None], axis=-1)[
            ..., 0
        ]
        assert drawn[mask].all()
        assert sampling_mask[~mask].all(), "nothing is left out where nothing is drawn"
        kept = sampling_mask[mask]
        assert kept.sum(-1).max() <= 60
        assert not kept[:, list(task.rules.forbidden_token_ids)].any()
        early = (mask & (np.arange(mask.shape[1]) < 2))[..., None] & sampling_mask
        assert not early[..., list(task.rules.eos_token_ids)].any()
        again = teacher_forced(result)
        np.testing.assert_allclose(result.logprobs[mask], again.logprobs[mask], atol=1e-5)
        assert (again.entropy[mask] <= np.log(kept.sum(-1)) + 1e-5).all()
        assert not result.logprobs[~mask].any()
        sizes |= set(kept.sum(-1).tolist())
        lengths |= set(mask.sum(-1).tolist())
    assert len(sizes) > 5 and len(lengths) > 2, "ragged, or this tests little"


def test_truncated_draws_follow_the_renormalised_distribution(network, make_test_task):
    task = make_test_task(max_new_tokens=1, min_new_tokens=1, prompts=["All in all, the songs"])
    draws = 4000
    sampling = Sampling(temperature=1.5, top_k=12, top_p=0.7)
    result = compile_rollout(network, task, sampling=sampling, completions_per_prompt=draws)()
    length = result.state.prompt_length[0]
    prompt = jnp.asarray(result.state.tokens[:1, :length])
    logits = jax.jit(network)(prompt, jnp.ones((1, length), bool))[0][0, -1]
    logits = np.asarray(logits, np.float64) / 1.5
    logits[list(task.rules.eos_token_ids)] = -np.inf
    order = np.argsort(-logits)[:12]
    p = np.exp(logits[order] - logits[order[0]])
    p /= p.sum()
    count = int(np.searchsorted(np.cumsum(p), 0.7)) + 1
    assert 3 < count < 12, "both limits must act"
    kept, p = order[:count], p[:count] / p[:count].sum()
    counts = np.bincount(result.state.tokens[:, length], minlength=task.rules.vocab_size)
    assert counts.sum() == counts[kept].sum() == draws
    assert stats.chisquare(counts[kept], draws * p).pvalue > 1e-3
    expected = np.log(p)[np.argsort(kept)][
        np.searchsorted(np.sort(kept), result.state.tokens[:, length])
    ]
    np.testing.assert_allclose(result.logprobs[:, 0], expected, atol=1e-5)


def test_top_k_of_one_is_greedy_and_certain(network, task):
    one = compile_rollout(network, task, sampling=Sampling(top_k=1))(seed=3)
    greedy = compile_rollout(network, task, greedy=True)()
    np.testing.assert_array_equal(one.state.tokens, greedy.state.tokens)
    np.testing.assert_array_equal(one.logprobs, 0)
    assert greedy.sampling_mask is None


def test_limits_that_leave_nothing_out_change_nothing(network, task):
    plain = compile_rollout(network, task, sampling=Sampling(0.8))(seed=1)
    wide = compile_rollout(network, task, sampling=Sampling(0.8, top_k=10**6, top_p=1.0))(seed=1)
    np.testing.assert_array_equal(plain.state.tokens, wide.state.tokens)
    np.testing.assert_allclose(plain.logprobs, wide.logprobs, atol=1e-6)


class TestSeveralCompletions:
    COUNT = 3

    def test_equal_a_rollout_of_repeated_prompts(self, network, task, monkeypatch):
        read = []
        prefill = rollout_module.prefill

        def watched(network, prompts, rules):
            read.append(prompts.length.shape[0])
            return prefill(network, prompts, rules)

        monkeypatch.setattr(rollout_module, "prefill", watched)
        repeated = [prompt for prompt in task.prompts for _ in range(self.COUNT)]
        for options in ({"greedy": True}, {"sampling": TRUNCATED}):
            one = compile_rollout(network, task, prompts=repeated, **options)(seed=2)
            shared = compile_rollout(network, task, completions_per_prompt=self.COUNT, **options)(
                seed=2
            )
            for name, x, y in zip(mdp.State._fields, one.state, shared.state, strict=True):
                np.testing.assert_array_equal(x, y, err_msg=name)
            np.testing.assert_allclose(one.logprobs, shared.logprobs, atol=1e-5)
            assert read == [len(repeated), len(task.prompts)], "each prompt is read once"
            read.clear()

    def test_each_is_a_draw_of_its_own_with_its_own_logprob(self, network, task):
        sample = compile_rollout(network, task, completions_per_prompt=self.COUNT)
        result = sample()
        rows = result.state.tokens.reshape(len(task.prompts), self.COUNT, -1)
        prompts = [tuple(prompt.ids.tolist()) for prompt in task.prompts]
        for prompt, same in zip(prompts, rows, strict=True):
            assert (same[:, : len(prompt)] == prompt).all()
            assert len(np.unique(same, axis=0)) == self.COUNT
        again = compile_teacher_forcing(network, task, Sampling())(result)
        mask = written(result, task)
        np.testing.assert_allclose(result.logprobs[mask], again.logprobs[mask], atol=1e-5)
        assert not np.array_equal(sample(seed=1).state.tokens, result.state.tokens)
