"""Without an accelerator at hand: that all an iteration computes can be lowered for one."""

import jax
import jax.numpy as jnp
import pytest

from ppo_jax.agent import PPOAgent
from ppo_jax.config import PPOConfig, RunConfig, TrainConfig
from ppo_jax.models import load_pretrained, save_pretrained


@pytest.mark.parametrize(
    ("num_devices", "dtype"), [(1, "bfloat16"), (2, "bfloat16"), (1, "float32")]
)
def test_an_iteration_lowers(num_devices, dtype, make_network, make_test_task, tmp_path):
    """Packed, in micro-batches, over a truncated distribution; float32 products as such."""
    task = make_test_task()
    save_pretrained(make_network(), tmp_path / "model")
    network = load_pretrained(tmp_path / "model", dtype=dtype)
    ppo = PPOConfig(batch_size=4, num_microbatches=2, num_packed_sizes=2, top_k=5)
    config = TrainConfig(ppo=ppo, run=RunConfig(num_devices=num_devices))
    agent = PPOAgent(network, task, config, num_iterations=2)
    state, key = agent.state, jax.random.key(0)

    def result(function, *arguments, **options):
        """Its shapes; the programs for GPU and TPU are made on the way."""
        traced = function.trace(*arguments, **options)
        for platform in ("cuda", "tpu"):
            lowered = traced.lower(lowering_platforms=(platform,))
            lines = lowered.as_text().splitlines()
            assert any("while" in line for line in lines)
            wide = [line for line in lines if "dot_general" in line and "xbf16>" not in line]
            assert len(wide) > 6 or dtype == "bfloat16"
            assert all("precision = [HIGHEST, HIGHEST]" in line for line in wide)
        return lowered.out_info

    first = task.initial_state(task.prompts[:4])
    ids = jnp.asarray(first.tokens[:, : task.rules.max_prompt_length])
    how = {"completions_per_prompt": 1, "greedy": False}
    numbers = first.prompt_length, jnp.int32(0)
    rollout = result(agent.actor._begin, state.params, ids, *numbers, key, **how).rollout
    score = jnp.zeros(4)
    after, *_ = result(agent._learn, state, agent.initial_backbone, rollout, score, None, key)
    jax.tree.map(lambda x, y: None if x.shape == y.shape else pytest.fail(), state, after)
