from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from ppo_jax.learning import inspection
from ppo_jax.learning.inspection import look
from ppo_jax.models import PolicyValueNetwork
from ppo_jax.sampling import Sampling
from qwen_env.mdp import Rules, State

PROMPT_LENGTH, LENGTH = np.array([3, 5, 1]), np.array([9, 6, 7])


@pytest.mark.parametrize("at_once", [2**25, 1000])
def test_it_is_what_the_logits_say(
    make_network: Callable[..., PolicyValueNetwork], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against NumPy on the logits of a plain forward pass, for any number of positions at once."""
    monkeypatch.setattr(inspection, "LOGITS_AT_ONCE", at_once)
    network = make_network(vocab_size=300)
    rules = Rules(5, 6, 300, (7,), forbidden_token_ids=(1, 2), min_new_tokens=2)
    tokens = np.random.default_rng(0).integers(10, 300, (3, 11)).astype(np.int32)
    ended = np.array([True, False, True])
    state = State(tokens, PROMPT_LENGTH, LENGTH, ended, ~ended)
    graphdef, params = nnx.split(network)
    run = partial(look, partial(nnx.merge, graphdef), rules=rules, sampling=Sampling(0.7))
    found = jax.jit(run)(params, np.array([2, 0, 1]), state, None)
    mask = np.arange(11) < LENGTH[:, None]
    logits = np.array(network(tokens, mask)[0]) / 0.7
    logits[..., [1, 2]] = -np.inf
    for place, row in enumerate([2, 0, 1]):
        start, end = PROMPT_LENGTH[row], LENGTH[row]
        for step in range(end - start):
            allowed = logits[row, start + step - 1].copy()
            if step < 2:
                allowed[7] = -np.inf
            expected = log_softmax(allowed)
            chosen = expected[tokens[row, start + step]]
            np.testing.assert_allclose(found.logprobs[place, step], chosen, rtol=1e-4, atol=1e-5)
            best = np.argsort(-expected)[:5]
            assert found.alternatives[place, step].tolist() == best.tolist()
            likely = found.alternative_logprobs[place, step]
            np.testing.assert_allclose(likely, expected[best], rtol=1e-4, atol=1e-5)


def test_numbers_begin_anew_in_each_turn(make_network: Callable[..., PolicyValueNetwork]) -> None:
    """The end-of-sequence id 7 cannot be chosen first, in the second turn as little as before."""
    network = make_network(vocab_size=300)
    rules = Rules(5, 6, 300, (7,), min_new_tokens=1, max_turns=2)
    tokens = np.full((1, 11), 20, np.int32)
    own = np.zeros((1, 11), bool)
    own[0, [3, 4, 7, 8]] = True  # behind a prompt of 3 tokens; a reply lies between
    one = np.array([1])
    state = State(
        tokens=tokens,
        prompt_length=np.array([3]),
        length=np.array([9]),
        terminated=one > 0,
        truncated=one < 0,
        own=own,
        turn_start=np.array([7]),
        num_turns=one,
        turn_ended=one < 0,
    )
    graphdef, params = nnx.split(network)
    run = partial(look, partial(nnx.merge, graphdef), rules=rules, sampling=Sampling())
    found = jax.jit(run)(params, np.array([0]), state, None)
    logits = np.array(network(tokens, np.arange(11)[None] < 9)[0])[0]
    for step, number in ((0, 0), (1, 1), (4, 0), (5, 1)):
        allowed = logits[3 + step - 1].copy()
        if number == 0:
            allowed[7] = -np.inf
        chosen = log_softmax(allowed)[20]
        np.testing.assert_allclose(found.logprobs[0, step], chosen, rtol=1e-4, atol=1e-5)
