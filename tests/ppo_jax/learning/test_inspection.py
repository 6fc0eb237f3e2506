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
from qwen_env.mdp import Rules

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
    graphdef, params = nnx.split(network)
    run = partial(look, partial(nnx.merge, graphdef), rules=rules, sampling=Sampling(0.7))
    found = jax.jit(run)(params, np.array([2, 0, 1]), tokens, PROMPT_LENGTH, LENGTH, None)
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
