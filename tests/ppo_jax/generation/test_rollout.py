"""The compiled rollout against teacher forcing, `transformers`, and the Gymnasium environments."""

import chex
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from scipy import stats

import ppo_jax.generation.slots as slots_module
import qwen_env  # noqa: F401  (registers QwenText-v0)
from ppo_jax.generation.decoding import choose_token
from ppo_jax.generation.rollout import Rollout, rollout
from ppo_jax.learning.response_outputs import response_outputs
from ppo_jax.models import load_pretrained, save_pretrained
from ppo_jax.sampling import Sampling
from qwen_env import mdp
from qwen_env.episodes import episodes_of


def compile_rollout(network, task, *, prompts=None, **options):
    """A function from a seed to the rollout of `prompts` (the task's own by default)."""
    first = task.initial_state(task.prompts if prompts is None else prompts)
    graphdef, params = nnx.split(network)

    @jax.jit
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


def run(network, task, **options) -> Rollout:
    return compile_rollout(network, task, **options)()


def test_tokens_are_those_of_jax_random_categorical(make_network, make_test_task):
    network, rules = make_network(), make_test_task().rules
    hidden = np.random.default_rng(0).normal(0, 3, (50, 16)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 50)
    token, logprob, _ = choose_token(
        network, hidden, jnp.zeros(50, int), keys, rules=rules, sampling=Sampling(0.7), greedy=False
    )
    allowed = mdp.action_mask(jnp.zeros(50, int), rules, jnp)
    logits = jnp.where(allowed, network.logits(hidden) / 0.7, -jnp.inf)
    expected = jax.vmap(jax.random.categorical)(keys, logits)
    np.testing.assert_array_equal(token, expected)
    assert len(set(token.tolist())) > 10
    log_p = jax.nn.log_softmax(logits)[jnp.arange(50), expected]
    np.testing.assert_allclose(logprob, log_p, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_decoding_through_the_cache_equals_the_full_forward_pass(
    make_network, make_test_task, temperature
):
    network, task = make_network(), make_test_task(min_new_tokens=2)
    sample = compile_rollout(network, task, sampling=Sampling(temperature))
    graphdef, params = nnx.split(network)

    @jax.jit
    def teacher_forced(params, state):
        return response_outputs(
            nnx.merge(graphdef, params),
            state.tokens,
            state.prompt_length,
            state.length,
            rules=task.rules,
            sampling=Sampling(temperature),
        )

    lengths = set()
    for seed in range(4):
        result = sample(seed)
        outputs = teacher_forced(params, result.state)
        written = mdp.response_length(result.state)
        mask = np.arange(task.rules.max_new_tokens) < written[:, None]
        np.testing.assert_allclose(
            result.logprobs[mask], np.asarray(outputs.logprobs)[mask], atol=1e-5
        )
        assert not result.logprobs[~mask].any()
        lengths |= set(written.tolist())
    assert len(lengths) > 3, "the batches must be ragged for this to test anything"


def test_greedy_equals_transformers_generate(make_network, make_test_task, tmp_path):
    network, task = make_network(), make_test_task()
    save_pretrained(network, tmp_path / "model", task.tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ours = run(network, task, greedy=True).state
    for row, prompt in enumerate(task.prompts):
        out = theirs.generate(
            torch.tensor(prompt.ids)[None].long(),
            attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
            max_new_tokens=task.rules.max_new_tokens,
            do_sample=False,
            eos_token_id=list(task.rules.eos_token_ids),
            pad_token_id=0,
        )
        assert ours.tokens[row, : ours.length[row]].tolist() == out[0].tolist()


def test_draws_follow_the_sampling_distribution(make_network, make_test_task):
    forbidden = tuple(range(20, 600))
    task = make_test_task(
        max_new_tokens=1, eos_token_ids=(0,), forbidden_token_ids=forbidden, min_new_tokens=1
    )
    network = make_network(sharpness=8.0)
    draws = 4000
    result = run(network, task, prompts=[task.prompts[2]] * draws, sampling=Sampling(1.3))
    length = result.state.prompt_length[0]
    prompt = jnp.asarray(result.state.tokens[:1, :length])
    logits = jax.jit(network)(prompt, jnp.ones((1, length), bool))[0][0, -1]
    logits = np.asarray(logits, np.float64) / 1.3
    allowed = np.ones(task.rules.vocab_size, bool)
    allowed[[0, *forbidden]] = False
    p = np.where(allowed, np.exp(logits - logits[allowed].max()), 0)
    p /= p.sum()
    counts = np.bincount(result.state.tokens[:, length], minlength=len(p))
    assert not counts[~allowed].any()
    assert stats.chisquare(counts[allowed], draws * p[allowed]).pvalue > 1e-3
    drawn = result.state.tokens[:, length]
    np.testing.assert_allclose(result.logprobs[:, 0], np.log(p[drawn]), atol=1e-5)


def test_a_stop_string_ends_the_response_that_contains_it(make_network, make_test_task):
    """As soon as it does, which decoding tells."""
    strings = ["e", "th"]
    task = make_test_task(stop=strings, max_new_tokens=20, eos_token_ids=range(500, 520))
    prompts = list(task.prompts) * 2
    sample = compile_rollout(make_network(), task, prompts=prompts)
    reasons = []
    for seed in range(3):
        state = sample(seed).state
        for episode, is_cut_off in zip(episodes_of(prompts, state), state.truncated, strict=True):
            ids = episode.completion_ids
            holds_one = [
                any(string in task.tokenizer.decode(ids[:count]) for string in strings)
                for count in range(1, len(ids) + 1)
            ]
            assert not any(holds_one[:-1])
            assert holds_one[-1] == (episode.finish_reason == "stop")
            assert is_cut_off == (episode.finish_reason == "length")
            reasons.append(episode.finish_reason)
    assert reasons.count("stop") > 5
    assert reasons.count("eos") > 1


def test_rules_are_obeyed(make_network, make_test_task):
    task = make_test_task(min_new_tokens=4, forbidden_token_ids=tuple(range(3, 250)))
    sample = compile_rollout(make_network(), task)
    for seed in range(5):
        state = sample(seed).state
        written = mdp.response_length(state)
        assert (written >= 4).all() and (written <= task.rules.max_new_tokens).all()
        np.testing.assert_array_equal(state.terminated ^ state.truncated, True)
        for row in range(len(written)):
            response = state.tokens[row, state.prompt_length[row] : state.length[row]]
            is_eos = np.isin(response, task.rules.eos_token_ids)
            assert not np.isin(response, task.rules.forbidden_token_ids).any()
            assert not is_eos[:-1].any()
            assert is_eos[-1] == state.terminated[row]
            assert not state.tokens[row, state.length[row] :].any()


def test_an_end_of_sequence_id_inside_a_prompt_ends_nothing(make_network, make_test_task):
    task = make_test_task(prompts=["<|endoftext|>The plot"], eos_token_ids=(0,), min_new_tokens=3)
    state = run(make_network(), task).state
    assert state.tokens[0, 0] == 0
    assert state.length[0] - state.prompt_length[0] >= 3


def test_rows_do_not_depend_on_each_other_or_on_padding(make_network, make_test_task):
    network, task = make_network(), make_test_task()
    a, b, c = task.prompts[0], task.prompts[1], task.prompts[2]
    one = run(network, task, prompts=[a, b])
    for others in ([a, c], [a], [a, c, b]):
        other = run(network, task, prompts=others)
        np.testing.assert_array_equal(one.state.tokens[0], other.state.tokens[0])
    wider = make_test_task(max_prompt_length=13)
    padded = run(network, wider, prompts=[a, b]).state
    for row in range(2):
        np.testing.assert_array_equal(
            padded.tokens[row, : padded.length[row]],
            one.state.tokens[row, : one.state.length[row]],
        )


def test_what_a_row_writes_depends_on_its_number_and_not_on_its_place(make_network, make_test_task):
    network, task = make_network(sharpness=3.0), make_test_task()
    whole = run(network, task, completions_per_prompt=2).state
    order = np.array([3, 0, 4])
    some = run(
        network,
        task,
        prompts=[task.prompts[i] for i in order],
        prompt_number=order,
        completions_per_prompt=2,
    ).state
    rows = (2 * order[:, None] + np.arange(2)).reshape(-1)
    chex.assert_trees_all_equal(some, jax.tree.map(lambda x: x[rows], whole))
    again = run(network, task, prompts=[task.prompts[0]] * 5, completions_per_prompt=2).state
    assert len(np.unique(again.tokens, axis=0)) == 10, "no two numbers draw alike"


@pytest.fixture
def rows_decoded(monkeypatch):
    """How many rows each decode step had, once all effects are there."""
    counts = []
    decode = slots_module.decode

    def counted(network, layers, state, *others):
        rows = len(state.length)
        jax.debug.callback(lambda: counts.append(rows))
        return decode(network, layers, state, *others)

    monkeypatch.setattr(slots_module, "decode", counted)
    return counts


def test_decoding_stops_when_every_row_has_ended(make_network, make_test_task, rows_decoded):
    task = make_test_task(eos_token_ids=range(100, 700))
    result = run(make_network(), task)
    jax.effects_barrier()
    longest = mdp.response_length(result.state).max()
    assert longest < task.rules.max_new_tokens, "the batch must end early to test anything"
    assert rows_decoded == [5] * (longest - 1)  # the first token comes from the prefill


def test_decoding_goes_on_in_fewer_rows(make_network, make_test_task, rows_decoded):
    task = make_test_task(eos_token_ids=range(330))
    prompts = [*task.prompts, *task.prompts[:3]]
    result = run(make_network(), task, prompts=prompts, compacts_rows=True)
    jax.effects_barrier()
    lengths = mdp.response_length(result.state)
    running = [(lengths > step).sum() for step in range(1, max(lengths))]
    assert rows_decoded == [min(n for n in (1, 2, 3, 4, 6, 8) if n >= some) for some in running]
    assert len(set(rows_decoded)) > 2, "or it is not ragged"


def test_no_step_casts_a_weight(make_network, make_test_task, tmp_path):
    """XLA moves casts out of the loop on a CPU, but not on a GPU."""
    save_pretrained(make_network(), tmp_path / "model")
    network = load_pretrained(tmp_path / "model", dtype="bfloat16")
    task = make_test_task()
    prompts = jnp.asarray(task.initial_state(task.prompts).tokens[:, :8])

    def roll(network):
        lengths, key = jnp.ones(len(prompts), jnp.int32), jax.random.key(0)
        return rollout(network, prompts, lengths, key, rules=task.rules).logprobs

    def casts(jaxpr, in_loop=False):
        """(operand's shape, is it in a while loop?) of each cast to bfloat16."""
        for equation in jaxpr.eqns:
            is_cast = equation.primitive.name == "convert_element_type"
            if is_cast and equation.outvars[0].aval.dtype == jnp.bfloat16:
                yield equation.invars[0].aval.shape, in_loop
            for parameter in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
            ):
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    yield from casts(inner, in_loop or equation.primitive.name == "while")

    found = list(casts(jax.make_jaxpr(roll)(network).jaxpr))
    weights = {x.shape for x in jax.tree.leaves(nnx.state(network.backbone))}
    weights |= {shape[1:] for shape in weights} | {shape[:0:-1] for shape in weights}
    assert network.backbone.embed_tokens.shape in {shape for shape, _ in found}
    assert not [shape for shape, inside in found if inside and shape in weights]


def test_in_fewer_rows_it_writes_what_it_would_have_written(make_network, make_test_task):
    network, task = make_network(), make_test_task()
    options = {"prompts": [*task.prompts, *task.prompts[:3]], "sampling": Sampling(top_k=200)}
    fewer = compile_rollout(network, task, **options, compacts_rows=True)
    whole = compile_rollout(network, task, **options)
    for seed in range(3):
        a, b = fewer(seed), whole(seed)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
        chex.assert_trees_all_equal((a.state, a.sampling_mask), (b.state, b.sampling_mask))
        assert len(set(mdp.response_length(b.state).tolist())) > 3, "or it is not ragged"


def test_the_environment_replays_a_compiled_rollout(make_network, make_test_task):
    arguments = {"max_new_tokens": 10, "eos_token_ids": (0, *range(260, 420)), "min_new_tokens": 2}
    task = make_test_task(**arguments, reward="qwen_env.rewards.sentiment:pocket_sentiment")
    state = run(make_network(), task).state
    prompts = [prompt.text for prompt in task.prompts]
    env = gym.make("QwenText-v0", prompts=prompts, max_prompt_length=8, **arguments)
    for row in range(len(prompts)):
        env.reset(options={"prompt_index": row})
        response = state.tokens[row, state.prompt_length[row] : state.length[row]]
        for step, action in enumerate(response):
            observation, reward, terminated, truncated, info = env.step(int(action))
            is_last = step == len(response) - 1
            assert (terminated or truncated) == is_last
            assert is_last or reward == 0
        np.testing.assert_array_equal(observation["input_ids"], state.tokens[row])
        assert observation["length"] == state.length[row]
        assert (terminated, truncated) == (state.terminated[row], state.truncated[row])
        assert info["completion"] == task.tokenizer.decode(response)
    env.close()
