"""How the actor cuts prompts into batches. On two devices: see test_data_parallel.py."""

import jax
import numpy as np
from flax import nnx

from ppo_jax.actor import Actor
from ppo_jax.sampling import Sampling


def test_no_two_batches_draw_alike(make_network, make_test_task):
    network, task = make_network(sharpness=3.0), make_test_task(eos_token_ids=(0,))
    actor = Actor(network, task, Sampling())
    episodes, _ = actor.respond_to_all(
        nnx.state(network), [task.prompts[0]] * 8, jax.random.key(0), batch_size=4
    )
    first, second = (
        [episode.completion_ids.tolist() for episode in some]
        for some in (episodes[:4], episodes[4:])
    )
    assert all(one != other for one in first for other in second)
    assert np.mean([len(ids) for ids in first + second]) > 3


def test_to_no_prompts_there_is_no_response(make_network, make_test_task):
    network = make_network()
    actor = Actor(network, make_test_task(), Sampling())
    nothing = actor.respond_to_all(nnx.state(network), [], jax.random.key(0), batch_size=4)
    assert nothing == ([], [])
