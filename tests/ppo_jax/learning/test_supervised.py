"""The supervised step: losses and gradients of whole models against PyTorch, however it is cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch_supervised
from flax import nnx
from safetensors.numpy import load_file

from ppo_jax.config import AdamWConfig
from ppo_jax.learning.frozen import NOTHING
from ppo_jax.learning.objectives import CompletionObjective, PreferenceObjective, Texts
from ppo_jax.learning.supervised import SupervisedLearner
from ppo_jax.mesh import make_mesh, place
from ppo_jax.models import (
    PolicyValueNetwork,
    RewardModel,
    as_reward_model,
    save_pretrained,
    save_reward_model,
)

WIDTH, COUNT = 12, 8


@pytest.fixture(scope="module")
def texts() -> Texts:
    """Ragged; the tokens behind their ends are noise."""
    rng = np.random.default_rng(0)
    length = np.array([3, 12, 2, 5, 7, 4, 12, 2], np.int32)
    is_learnt = rng.random((COUNT, WIDTH)) < 0.6
    is_learnt &= np.arange(WIDTH) < length[:, None]
    is_learnt[:, 1] = True
    tokens = rng.integers(1, 600, size=(COUNT, WIDTH)).astype(np.int32)
    margin = np.repeat(rng.random(COUNT // 2), 2).astype(np.float32)
    return Texts(tokens, length, is_learnt, margin)


@pytest.fixture(scope="module")
def policy(make_network: Callable[..., PolicyValueNetwork]) -> PolicyValueNetwork:
    return make_network(sharpness=5.0)


@pytest.fixture(scope="module")
def reward_model(policy: PolicyValueNetwork) -> RewardModel:
    return as_reward_model(policy, seed=0)


def learner(network: Any, **changes: Any) -> SupervisedLearner:
    if isinstance(network, RewardModel):
        objective: Any = PreferenceObjective(centring_coef=0.3)
    else:
        objective = CompletionObjective(WIDTH, network.config.vocab_size)
    config = AdamWConfig(learning_rate=1e-2)
    return SupervisedLearner(nnx.graphdef(network), objective, WIDTH, config, 10, **changes)


def gradients(network: Any, texts: Texts, **changes: Any) -> tuple[Any, dict[str, float]]:
    one = learner(network, **changes)
    params = place(nnx.state(network), one.mesh)
    found, sums = jax.jit(one.gradients)(params, texts)
    return found, {name: float(x) for name, x in sums.items()}


def assert_alike(found: Any, expected: Any, atol: float = 2e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), found, expected)


def test_fine_tuning_is_pytorchs(policy: PolicyValueNetwork, texts: Texts, tmp_path: Path) -> None:
    save_pretrained(policy, tmp_path / "model")
    rows = [
        (tokens[:length].tolist(), learnt[:length].tolist())
        for tokens, length, learnt in zip(texts.tokens, texts.length, texts.is_learnt, strict=True)
    ]
    expected = torch_supervised.fine_tuning(tmp_path / "model", rows)
    found, sums = gradients(policy, texts)
    assert sums["train/loss"] == pytest.approx(expected.loss, rel=1e-5)
    # Gradients have the shapes of parameters, and so a file's names.
    save_pretrained(nnx.merge(nnx.graphdef(policy), found), tmp_path / "gradients")
    ours = load_file(tmp_path / "gradients" / "model.safetensors")
    assert ours.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(ours[name], gradient, atol=3e-6, err_msg=name)


def test_preferences_are_pytorchs(reward_model: RewardModel, texts: Texts, tmp_path: Path) -> None:
    save_reward_model(reward_model, tmp_path / "model")
    rows = [tokens[:n].tolist() for tokens, n in zip(texts.tokens, texts.length, strict=True)]
    pairs = list(zip(rows[::2], rows[1::2], texts.margin[::2].tolist(), strict=True))
    expected = torch_supervised.preferences(tmp_path / "model", pairs, centring_coef=0.3)
    found, sums = gradients(reward_model, texts)
    assert sums["train/loss"] == pytest.approx(expected.loss, rel=1e-5)
    save_reward_model(nnx.merge(nnx.graphdef(reward_model), found), tmp_path / "gradients")
    ours = load_file(tmp_path / "gradients" / "model.safetensors")
    assert ours.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(ours[name], gradient, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["policy", "reward_model"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"num_packed_sizes": 4}, id="packed"),
        pytest.param({"num_microbatches": 2}, id="two parts"),
        pytest.param({"num_devices": 2, "num_packed_sizes": 2}, id="two devices, packed"),
        pytest.param({"num_devices": 4, "num_shards": 2}, id="four devices, two shards"),
    ],
)
def test_no_cut_changes_the_gradient(
    kind: str, changes: dict[str, int], texts: Texts, request: pytest.FixtureRequest
) -> None:
    network = request.getfixturevalue(kind)
    expected, sums = gradients(network, texts)
    changes = dict(changes)
    devices = changes.pop("num_devices", 1), changes.pop("num_shards", 1)
    found, of_parts = gradients(network, texts, **changes, mesh=make_mesh(*devices))
    assert of_parts == pytest.approx(sums, rel=1e-5)
    assert_alike(found, expected)


def test_padding_says_nothing(policy: PolicyValueNetwork, texts: Texts) -> None:
    expected, sums = gradients(policy, texts)
    is_real = np.arange(WIDTH) < np.asarray(texts.length)[:, None]
    other = texts._replace(tokens=np.where(is_real, texts.tokens, 7).astype(np.int32))
    found, same = gradients(policy, other)
    assert same == sums
    assert_alike(found, expected, atol=0)


def test_a_loss_that_is_not_finite_is_skipped(policy: PolicyValueNetwork, texts: Texts) -> None:
    one = learner(policy)
    params = nnx.state(policy)
    params["backbone"]["norm"]["weight"] = params["backbone"]["norm"]["weight"].replace(
        np.full(policy.config.hidden_size, np.nan, np.float32)
    )
    state = one.init(params)
    after, metrics = jax.jit(one.update)(state, texts, NOTHING)
    assert float(metrics["update/nonfinite"]) == 1 and int(after.nonfinite_in_a_row) == 1
    assert int(after.iteration) == 1 and int(after.opt_state.count) == 0
    assert_alike(after.params, state.params, atol=0)
