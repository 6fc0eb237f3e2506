"""The benchmark of an iteration: its floor in closed form, and a work so small that it is tried."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import ppo
import pytest

from ppo_jax.models import DecoderConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ppo.py"


def test_the_floor_in_closed_form() -> None:
    """A layer of widths 2 and 3, two heads of 6 with one KV head, a vocabulary of 11."""
    config = DecoderConfig(
        vocab_size=11,
        hidden_size=2,
        intermediate_size=3,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
    )
    work = ppo.Work("random:tiny", epochs=2)
    # Of a token: q and o are 2 x 12, k and v 2 x 6, the three of the MLP 2 x 3.
    body, projection = 2 * 24 + 2 * 12 + 3 * 6, 2 * 11
    # Row by row: a prompt of 3, a response of 4; half of 7 x 7 pairs, in two products of 12.
    adds = 7 * body + 4 * projection + 2 * 12 * 49 / 2
    # Four steps read all weights; keys and values, 6 each, of 5 tokens on average.
    read = 4 * (4 * (body + projection) + 4 * 5 * (6 + 6))
    floor = ppo.floor_seconds(config, work, [(3, 4)], flops=1.0, bandwidth=1.0)
    assert floor == {
        "rollout": 2 * adds + read,
        "update": 8 * 2 * adds,  # two passes forward, then thrice the work of one in each epoch
        "iteration": 9 * 2 * adds + read,
    }
    # Another, of 1 and 2: half of 3 x 3 pairs. The weights are read once for both.
    adds += 3 * body + 2 * projection + 2 * 12 * 9 / 2
    read += 4 * 2 * 2 * (6 + 6)
    faster = ppo.floor_seconds(config, work, [(3, 4), (1, 2)], flops=2.0, bandwidth=4.0)
    assert faster["rollout"] == adds + read / 4
    assert faster["update"] == 8 * adds


def test_the_floor_of_adapters_in_closed_form() -> None:
    """Of rank 4, in two layers of widths 5 and 3, of which the lower one may be frozen."""
    config = DecoderConfig(
        vocab_size=11,
        hidden_size=5,
        intermediate_size=3,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    # Multiply-adds of a token in each matrix [out, in], and in its adapter [out, 4] [4, in].
    matrices = [(24, 5), (12, 5), (12, 5), (5, 24), (3, 5), (3, 5), (5, 3)]
    body = sum(out * into for out, into in matrices)
    adapter = sum(out * 4 + 4 * into for out, into in matrices)
    # A prompt of 3, a response of 4: half of 7 x 7 pairs, in two products of 24.
    layer, attended, logits = 7 * body, 2 * 24 * 49 / 2, 4 * 11 * 5
    reference = 2 * (layer + attended) + logits
    for frozen, learning in ((0, 2), (1, 1)):
        work = ppo.Work("random:tiny", epochs=3, lora_rank=4, num_frozen_layers=frozen)
        floor = ppo.floor_seconds(config, work, [(3, 4)], flops=2.0, bandwidth=np.inf)
        forward = reference + learning * 7 * adapter
        # Of what a matrix is given; of both operands in attention and in both parts of an adapter.
        backward = learning * (layer + 2 * attended + 2 * 7 * adapter) + logits
        assert floor["update"] == reference + forward + 3 * (forward + backward)
        assert floor["rollout"] == reference
        whole = ppo.floor_seconds(
            config, ppo.Work("random:tiny", epochs=3), [(3, 4)], flops=2.0, bandwidth=np.inf
        )
        assert whole["update"] == 2 * reference + 3 * 3 * reference


def test_responses_end_by_chance_where_a_mean_length_is_asked_for() -> None:
    """Of a thousand lengths that are drawn token by token, cut off at the limit."""
    work = ppo.Work("random:tiny", mean_response_length=8, packed_sizes=2)
    endings = len(ppo.task_of(work, vocab_size=512).rules.eos_token_ids)
    drawn = np.random.default_rng(0).random((1000, work.response_length)) < endings / 512
    drawn[:, -1] = True
    assert (drawn.argmax(axis=1) + 1).mean() == pytest.approx(8, abs=0.5)
    assert ppo.task_of(work, vocab_size=512).rules.min_new_tokens == 0
    assert ppo.config_of(work).ppo.num_packed_sizes == 2
    to_the_limit = ppo.task_of(ppo.Work("random:tiny"), vocab_size=512).rules
    assert to_the_limit.min_new_tokens == to_the_limit.max_new_tokens == 32


@pytest.mark.slow
def test_a_tiny_work_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "read_speed", partial(ppo.read_speed, 2**20))
    report = ppo.measure(ppo.Work("random:tiny", iterations=1, decode_batches=(4,)))
    seconds, floor, times = (
        report[name] for name in ("seconds", "floor_seconds", "times_its_floor")
    )
    assert seconds.keys() == floor.keys() == times.keys() == {"rollout", "update", "iteration"}
    assert seconds["iteration"] >= seconds["rollout"] + seconds["update"]
    for name, x in times.items():
        assert x == pytest.approx(seconds[name] / floor[name])
    # Eight rows of 24 + 32.
    assert report["tokens_per_s"] == pytest.approx(8 * 56 / seconds["iteration"])
    assert report["generated_tokens_per_s"] == pytest.approx(8 * 32 / seconds["rollout"])
    assert report["compile_s"] > 0 and report["peak_memory_gib"] > 0.1
    [decoding] = report["decode"]
    assert decoding["batch_size"] == 4 and decoding["generated_tokens_per_s"] > 0


@pytest.mark.slow
def test_as_a_program_it_prints_one_json_object() -> None:
    command = [sys.executable, str(SCRIPT), "--json", "--model", "random:tiny", "--iterations", "0"]
    quick = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        command, env=quick, stdout=subprocess.PIPE, text=True, check=True, timeout=600
    )
    report = json.loads(done.stdout)
    assert report["work"]["model"] == "random:tiny"
    assert report["start_to_end_of_first_iteration_s"] > report["first_iteration_s"] > 0
    assert "seconds" not in report, "nothing was timed"
