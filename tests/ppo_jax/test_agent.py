"""The agent: it learns, it compiles once, and its random choices follow the seed alone."""

import dataclasses

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen_env  # noqa: F401  (registers QwenText-v0)
from ppo_jax import agent as agent_module
from ppo_jax.agent import PPOAgent
from ppo_jax.config import OptimizerConfig, PPOConfig, RunConfig, TrainConfig
from ppo_jax.learning.nonfinite import TooManyNonfiniteUpdates
from ppo_jax.models import with_separate_critic
from ppo_jax.sampling import sampling_logits, truncation
from qwen_env import mdp
from qwen_env.errors import UsageError

CONFIG = TrainConfig(
    ppo=PPOConfig(batch_size=16, num_epochs=2, num_minibatches=2, kl_coef=0.01),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    run=RunConfig(seed=3),
)


@pytest.fixture
def make_agent(make_network, make_test_task):
    def make(config: TrainConfig = CONFIG, num_iterations: int = 25, **changes) -> PPOAgent:
        return PPOAgent(make_network(), make_test_task(**changes), config, num_iterations)

    return make


@pytest.mark.parametrize("num_devices", [1, 2])
def test_no_two_arrays_of_a_state_share_a_buffer(make_agent, num_devices):
    """Nor with the reference: an update takes the state's over. What is frozen may share."""
    ppo = dataclasses.replace(CONFIG.ppo, critic="separate", ref_ema_decay=0.9)
    config = dataclasses.replace(CONFIG, ppo=ppo, run=RunConfig(num_devices=num_devices))
    agent = make_agent(config)
    assert agent.network.critic is not None
    arrays = jax.tree.leaves((agent.state, agent._initial_backbone))
    pointers = [
        shard.data.unsafe_buffer_pointer() for x in arrays for shard in x.addressable_shards
    ]
    assert len(set(pointers)) == len(pointers)


def test_it_learns_and_compiles_nothing_after_the_second_iteration(
    make_agent, compilations, monkeypatch
):
    """Ragged episodes, so the shapes inside differ; the programs must not.

    Nor does an iteration wait for the device more than twice, for its episodes and its metrics, and
    once more where tokens are kept.
    """
    fetches = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetches.append(1) or device_get(x))
    packed = dataclasses.replace(CONFIG.ppo, num_packed_sizes=2)
    scores, lengths = [], set()
    for episodes, metrics in make_agent(dataclasses.replace(CONFIG, ppo=packed)).learn():
        scores.append(metrics["objective/score"])
        lengths.add(metrics["rollout/length_mean"])
        if metrics["iteration"] == 2:
            assert compilations, "the listener must hear of compilations"
            compilations.clear()
        assert metrics["policy/first_ratio_max_error"] < 1e-5
        assert metrics["rollout/logprob_gap_max"] < 1e-4
        mean = episodes.scores.mean()
        np.testing.assert_allclose(metrics["objective/score"], mean, rtol=1e-6)
        num_tokens = metrics["throughput/tokens_per_s"] * metrics["time/iteration_s"]
        assert num_tokens == pytest.approx(np.asarray(episodes.rollout.state.length).sum())
    assert not compilations
    kept = 4  # those of which tokens are kept: 1, 10, 20 and the last
    assert len(fetches) == 2 * len(scores) + kept
    assert len(lengths) > 5
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 3 * np.std(scores[:5])


def test_same_seed_same_run_other_seed_other_run(make_agent):
    def tokens() -> list[np.ndarray]:
        agent = make_agent(num_iterations=2)
        first = np.asarray(agent.collect().rollout.state.tokens)
        return [first, *(np.asarray(e.rollout.state.tokens) for e, _ in agent.learn())]

    one, same = tokens(), tokens()
    np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(one[0], one[1])  # collecting twice changes nothing
    assert not np.array_equal(one[1], one[2])
    other = dataclasses.replace(CONFIG, run=RunConfig(seed=4))
    assert not np.array_equal(one[0], make_agent(other).collect().rollout.state.tokens)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_what_is_frozen_is_there_once(make_agent, decay):
    """And after updates that donate the state, the policy is whole, with what was frozen in it."""
    optimizer = dataclasses.replace(CONFIG.optimizer, num_frozen_layers=1, freeze_embeddings=True)
    ppo = PPOConfig(batch_size=8, num_epochs=1, ref_ema_decay=decay)
    agent = make_agent(TrainConfig(ppo=ppo, optimizer=optimizer), num_iterations=2)
    before = jax.device_get(nnx.state(agent.network))["backbone"]
    assert len(list(agent.learn())) == 2
    after = nnx.state(agent.network)["backbone"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    np.testing.assert_array_equal(after["embed_tokens"][...], before["embed_tokens"][...])
    for old, new in zip(*map(jax.tree.leaves, (before["layers"], after["layers"])), strict=True):
        np.testing.assert_array_equal(new[0], old[0])
        assert (new[1] != old[1]).any()
    for part in "embed_tokens", "lower_layers":
        arrays = (tree["backbone"][part] for tree in (agent.params, agent.frozen))
        for own, shared, of_reference in zip(
            *map(jax.tree.leaves, (*arrays, agent.reference[part])), strict=True
        ):
            assert own is shared is of_reference
    assert not {"embed_tokens", "lower_layers"} & set(agent.state.opt_state.mu["backbone"])


def test_no_two_uses_nor_iterations_share_a_key(make_agent):
    agent = make_agent()
    uses = agent_module._ROLLOUT, agent_module._SHUFFLE, agent_module._EVALUATE, agent_module._ACT
    keys = []
    for iteration in (0, 1):
        agent.state = agent.state._replace(iteration=jnp.int32(iteration))
        keys += [jax.random.key_data(agent._key(use)) for use in uses]
    assert len(np.unique(keys, axis=0)) == 8


def test_choose_action_agrees_with_the_network_and_drives_the_environments(make_agent):
    agent = make_agent()
    rules = agent.task.rules
    arguments = {
        "max_prompt_length": rules.max_prompt_length,
        "max_new_tokens": rules.max_new_tokens,
        "eos_token_ids": rules.eos_token_ids,
        "prompts": ["The plot", "It was"],
    }
    network = jax.jit(agent.network)
    env = gym.make("QwenText-v0", **arguments)
    observation, _ = env.reset(seed=0)
    ended = False
    while not ended:
        choice = agent.choose_action(observation, greedy=True)
        logits, values = network(
            observation["input_ids"][None], observation["attention_mask"][None].astype(bool)
        )
        last = observation["length"].item() - 1
        assert choice.action == np.argmax(logits[0, last])
        log_p = jax.nn.log_softmax(logits[0, last])
        np.testing.assert_allclose(choice.logprob, log_p[choice.action], atol=1e-5)
        np.testing.assert_allclose(choice.value, values[0, last], atol=1e-5)
        observation, _, terminated, truncated, _ = env.step(choice.action)
        ended = terminated or truncated
    env.close()
    envs = gym.make_vec("QwenText-v0", num_envs=3, **arguments)
    observations, _ = envs.reset(seed=0)
    choices = agent.choose_action(observations)
    assert choices.action.shape == choices.value.shape == (3,)
    assert envs.action_space.contains(choices.action.astype(np.int64))
    again = agent.choose_action(observations)
    assert not np.array_equal(choices.action, again.action), "each choice is a new draw"
    envs.close()


@pytest.mark.parametrize("greedy", [True, False])
def test_choose_action_says_the_separate_critics_value(make_agent, greedy):
    """And the log-probability over what top-k and top-p leave."""
    ppo = PPOConfig(batch_size=8, critic="separate", temperature=0.9, top_k=80, top_p=0.95)
    agent = make_agent(TrainConfig(ppo=ppo))
    params = agent.state.params
    moved = jax.tree.map(lambda x: x + 0.1, params["critic"])
    agent.state = agent.state._replace(params=nnx.State({**params, "critic": moved}))
    task, sampling = agent.task, ppo.sampling
    first = task.initial_state(task.prompts)
    observation = {
        "input_ids": first.tokens,
        "prompt_length": first.prompt_length[:, None],
        "length": first.length[:, None],
    }
    choice = agent.choose_action(observation, greedy=greedy)
    mask = np.arange(task.rules.max_length) < first.length[:, None]
    rows = np.arange(len(task.prompts))
    logits, values = (
        np.asarray(x)[rows, first.length - 1] for x in jax.jit(agent.network)(first.tokens, mask)
    )
    np.testing.assert_allclose(choice.value, values, atol=1e-5)
    logits = sampling_logits(logits, mdp.action_mask(0 * rows, task.rules, np), 0.9)
    kept = np.asarray(truncation(logits, sampling))
    assert kept[rows, choice.action].all()
    log_p = jax.nn.log_softmax(np.where(kept, logits, -np.inf))
    np.testing.assert_allclose(choice.logprob, log_p[rows, choice.action], atol=1e-5)


def test_choose_action_ends_no_response_before_min_new_tokens(make_network, make_test_task):
    """Of most ids, any ends a response: once it may, it does. The environment refuses it before."""
    rules = {"eos_token_ids": range(100, 700), "min_new_tokens": 3, "max_new_tokens": 6}
    agent = PPOAgent(make_network(), make_test_task(**rules), CONFIG, num_iterations=1)
    prompts = ["The plot", "It was", "A", "My friend and I"]
    env = gym.make("QwenText-v0", prompts=prompts, max_prompt_length=8, **rules)
    lengths = []
    for index in range(len(prompts)):
        observation, _ = env.reset(options={"prompt_index": index})
        ended = False
        while not ended:
            action = agent.choose_action(observation).action
            observation, _, terminated, truncated, info = env.step(action)
            ended = terminated or truncated
        lengths.append(info["completion_length"])
    env.close()
    assert min(lengths) == 4, "three tokens, and the one that ends it"
    assert np.mean(lengths) < 5


def test_updates_that_are_never_finite_stop_the_run(make_agent):
    """Four an iteration: the second one's last meets the limit."""

    def infinite(batch):
        return np.full(len(batch), 3e38, np.float32)

    optimizer = dataclasses.replace(CONFIG.optimizer, max_nonfinite_updates=8)
    agent = make_agent(dataclasses.replace(CONFIG, optimizer=optimizer), reward=infinite)
    with pytest.raises(TooManyNonfiniteUpdates, match="8 updates in a row, up to iteration 2;"):
        list(agent.learn())


@pytest.mark.parametrize(
    ("network", "task", "words"),
    [
        ({"vocab_size": 704}, {}, "vocabulary has 704 ids"),
        ({"max_position_embeddings": 12}, {}, "has 12 positions"),
    ],
)
def test_a_network_that_does_not_fit_the_task_is_refused(
    make_network, make_test_task, network, task, words
):
    with pytest.raises(UsageError, match=words):
        PPOAgent(make_network(**network), make_test_task(**task), CONFIG, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": OptimizerConfig(num_frozen_layers=3)}, "num_frozen_layers is 3.*only 2"),
        ({"ppo": PPOConfig(critic="shared")}, "critic is 'shared'.*separate critic"),
    ],
)
def test_settings_that_do_not_fit_the_network_are_refused(
    make_network, make_test_task, changes, words
):
    network = make_network() if "optimizer" in changes else with_separate_critic(make_network())
    with pytest.raises(UsageError, match=words):
        PPOAgent(network, make_test_task(), dataclasses.replace(CONFIG, **changes), 1)


def test_several_completions_a_prompt(make_agent):
    ppo = dataclasses.replace(CONFIG.ppo, completions_per_prompt=4)
    agent = make_agent(dataclasses.replace(CONFIG, ppo=ppo))
    episodes = agent.collect()
    prompts = [episode.prompt.text for episode in episodes.episodes]
    assert len(prompts) == CONFIG.ppo.batch_size
    assert prompts == [text for text in prompts[::4] for _ in range(4)]
    assert len(set(prompts)) == 4
    tokens = np.asarray(episodes.rollout.state.tokens)
    assert len(np.unique(tokens, axis=0)) > 12, "each completion is a draw of its own"
    for row, episode in enumerate(episodes.episodes):
        width = len(episode.prompt.ids)
        np.testing.assert_array_equal(tokens[row, :width], episode.prompt.ids)
