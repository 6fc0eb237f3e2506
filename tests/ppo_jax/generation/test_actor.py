"""The actor cuts prompts into batches, draws anew for each, and times it.

On several devices: see test_mesh.py.
"""

from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx

from ppo_jax.generation import actor as actor_module
from ppo_jax.generation.actor import Actor
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


def test_several_completions_follow_each_other_whatever_the_batch(make_network, make_test_task):
    """Those of one prompt differ, and depend on its number and not on its neighbours."""
    network, task = make_network(sharpness=3.0), make_test_task(eos_token_ids=(0,))
    actor = Actor(network, task, Sampling())
    done: list[int] = []

    def written(batch_size: int) -> list[list[int]]:
        episodes, outcomes = actor.respond_to_all(
            nnx.state(network),
            task.prompts,
            jax.random.key(0),
            batch_size=batch_size,
            completions_per_prompt=3,
            on_batch=done.append,
        )
        assert [episode.prompt for episode in episodes] == [p for p in task.prompts for _ in "123"]
        assert len(outcomes) == len(episodes)
        return [episode.completion_ids.tolist() for episode in episodes]

    whole = written(5)
    assert written(2) == whole
    assert done == [5, 2, 4, 5], "prompts, without what fills up the last batch"
    assert len({tuple(ids) for ids in whole}) == 15


def test_to_no_prompts_there_is_no_response(make_network, make_test_task):
    network = make_network()
    actor = Actor(network, make_test_task(), Sampling())
    nothing = actor.respond_to_all(nnx.state(network), [], jax.random.key(0), batch_size=4)
    assert nothing == ([], [])


def test_under_top_k_only_learning_gets_what_tokens_were_drawn_from(make_network, make_test_task):
    """A bit for every id of the vocabulary and token is not made for an evaluation, which draws the
    same tokens."""
    network, task = make_network(), make_test_task()
    actor = Actor(network, task, Sampling(1.0, 3, None))
    learnt, evaluated = (
        actor.respond(nnx.state(network), task.prompts, jax.random.key(0), keeps_masks=kept)
        for kept in (True, False)
    )
    assert learnt.rollout.sampling_mask is not None
    assert evaluated.rollout.sampling_mask is None
    for ours, theirs in zip(learnt.episodes, evaluated.episodes, strict=True):
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
    masks: list[object] = []
    respond = actor.respond

    def watched(*args, **kwargs):
        done = respond(*args, **kwargs)
        masks.append(done.rollout.sampling_mask)
        return done

    actor.respond = watched
    actor.respond_to_all(nnx.state(network), task.prompts, jax.random.key(0), batch_size=5)
    assert masks == [None]


def test_tokens_and_seconds_of_a_batch(make_network, make_test_task, monkeypatch):
    """On a clock that shows 0 at the start, 2 behind the rollout and 5 behind the scores."""
    network, task = make_network(), make_test_task()
    actor = Actor(network, task, Sampling())
    clock = SimpleNamespace(perf_counter=iter([0.0, 2.0, 5.0]).__next__)
    monkeypatch.setattr(actor_module, "time", clock)
    done = actor.respond(nnx.state(network), task.prompts, jax.random.key(0))
    assert (done.rollout_s, done.score_s) == (2.0, 3.0)
    assert done.num_tokens == np.asarray(done.rollout.state.length).sum()
