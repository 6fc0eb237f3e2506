"""What a run leaves in its folder, and how it goes wrong."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from matplotlib.image import imread

from ppo_jax.agent import PPOAgent
from ppo_jax.config import from_json
from ppo_jax.models import PolicyValueNetwork, save_pretrained
from ppo_jax.runs.ppo import PPOTrainer
from ppo_jax.train import main
from qwen_env import mdp
from qwen_env.prompts import PromptDataset
from qwen_env.tokenizer import Tokenizer

METRICS = {
    "iteration",
    "objective/score",
    "objective/kl",
    "objective/reward",
    "policy/loss",
    "policy/approx_kl",
    "policy/clip_fraction",
    "policy/entropy",
    "policy/first_ratio_max_error",
    "value/loss",
    "value/explained_variance",
    "rollout/length_mean",
    "rollout/eos_rate",
    "rollout/logprob_gap_max",
    "update/epochs",
    "update/early_stopped",
    "update/nonfinite",
    "time/rollout_s",
    "time/score_s",
    "time/update_s",
    "time/iteration_s",
    "throughput/tokens_per_s",
    "memory/state_bytes_per_device",
    "reward/gold",
    "reward/gold_std",
    "text/distinct_1",
    "text/repeated_4",
}
DISTRIBUTIONS = {"ratio", "advantage", "length", "kl_by_position", "entropy_by_position"}


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().split("\n")[:-1]]


def test_the_run_folder_holds_what_it_should(finished_run: Path) -> None:
    assert sorted(path.name for path in finished_run.iterdir()) == [
        "best",
        "checkpoints",
        "config.json",
        "curves.png",
        "distributions.jsonl",
        "final",
        "metrics.jsonl",
        "samples.jsonl",
        "tensorboard",
        "tokens.jsonl",
    ]
    assert sorted(path.name for path in (finished_run / "checkpoints").iterdir()) == ["3", "6"]
    config = from_json(json.loads((finished_run / "config.json").read_text()))
    assert config.ppo.batch_size == 4
    assert imread(finished_run / "curves.png").std() > 0.05


def test_metrics(finished_run: Path) -> None:
    lines = records(finished_run, "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line.keys() >= METRICS
        assert all(math.isfinite(value) for value in line.values())
        assert line["policy/first_ratio_max_error"] < 1e-5
        assert line["update/epochs"] == 4
        assert 0 < line["time/rollout_s"] < line["time/iteration_s"]
    evaluated = [any(name.startswith("eval/") for name in line) for line in lines]
    assert evaluated == [False, True, False, True, False, True]
    baselines = [any(name.startswith("baseline/") for name in line) for line in lines]
    assert baselines == [True, False, False, False, False, False]
    names = {name.removeprefix("eval/") for name in lines[1] if name.startswith("eval/")}
    assert names == {
        f"{decoding}/{name}"
        for decoding in ("greedy", "sampled")
        for name in ("score", "gold", "length_mean", "eos_rate")
    } | {"num_prompts"}
    assert lines[1]["eval/num_prompts"] == 4
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-5), "it is its own reference"


def test_distributions_agree_with_the_metrics(finished_run: Path) -> None:
    """Four episodes of at most eight tokens, four epochs."""
    lines = records(finished_run, "distributions.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, metrics in zip(lines, records(finished_run, "metrics.jsonl"), strict=True):
        assert line.keys() == DISTRIBUTIONS | {"iteration"}
        lengths = np.array(line["length"])
        assert len(lengths) == 8
        assert lengths.sum() == 4
        num_tokens = int(lengths @ np.arange(1, 9))
        assert num_tokens == pytest.approx(4 * metrics["rollout/length_mean"])
        assert sum(line["advantage"]) == num_tokens
        assert sum(line["ratio"]) == 4 * num_tokens
        # The means by position, weighted with the responses that get there, are the plain means.
        reached = lengths[::-1].cumsum()[::-1]
        kl, entropy = (np.array(line[f"{x}_by_position"], float) for x in ("kl", "entropy"))
        np.testing.assert_array_equal(np.isnan(kl), reached == 0)
        np.testing.assert_array_equal(np.isnan(entropy), reached == 0)
        total = np.nansum(kl * reached)
        assert total / 4 == pytest.approx(metrics["objective/kl"], rel=1e-3, abs=1e-5)
        total = np.nansum(entropy * reached)
        assert total / num_tokens == pytest.approx(metrics["policy/entropy"], rel=1e-3)
    assert records(finished_run, "metrics.jsonl")[0]["reward/gold_std"] > 0


def test_the_page_of_metrics_has_them_all(finished_run: Path) -> None:
    """And no others, but for the name that stands for any component, the accuracy, and what is told
    of several completions to a prompt."""
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `([\w/]+)` \|", text, re.MULTILINE))
    lines = records(finished_run, "metrics.jsonl") + records(finished_run, "distributions.jsonl")
    recorded = {name.replace("baseline/", "eval/") for line in lines for name in line}
    of_verified = {"reward/accuracy", "eval/sampled/accuracy", "eval/greedy/accuracy"}
    of_groups = {"objective/equal_groups_fraction"}
    assert documented == recorded | of_verified | of_groups | {"reward/NAME"}


def test_samples_are_the_evaluations(finished_run: Path) -> None:
    samples = records(finished_run, "samples.jsonl")
    keys = [(sample["iteration"], sample["decoding"]) for sample in samples]
    assert keys == [(i, d) for i in (0, 2, 4, 6) for d in ("greedy", "sampled") for _ in range(4)]
    assert [sample["prompt"] for sample in samples[:4]] == [
        "The acting",
        "I liked",
        "All in all",
        "So",
    ]
    lines = records(finished_run, "metrics.jsonl")
    for line, iteration, kind in ((lines[0], 0, "baseline"), (lines[3], 4, "eval")):
        for decoding in ("greedy", "sampled"):
            scores = [s["score"] for s in samples if keys_of(s) == (iteration, decoding)]
            assert line[f"{kind}/{decoding}/score"] == pytest.approx(np.mean(scores))
    for sample in samples:
        assert sample["score"] == sample["completion"].count("e") / 4
        assert sample["finish_reason"] in ("eos", "length")


def keys_of(sample: dict[str, Any]) -> tuple[int, str]:
    return sample["iteration"], sample["decoding"]


def test_tensorboard_holds_the_metrics(finished_run: Path) -> None:
    [events] = (finished_run / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in METRICS - {"iteration"} | {f"distribution/{name}" for name in DISTRIBUTIONS}:
        assert name.encode() in content


@pytest.mark.parametrize("which", ["best", "final"])
def test_transformers_loads_and_continues_the_model(finished_run: Path, which: str) -> None:
    """Its greedy continuation is the one in samples.jsonl."""
    folder = finished_run / which
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    samples = records(finished_run, "samples.jsonl")
    lines = [
        line for line in records(finished_run, "metrics.jsonl") if "eval/sampled/score" in line
    ]
    best = max(lines, key=lambda line: line["eval/sampled/score"])["iteration"]
    [sample, *_] = [s for s in samples if keys_of(s) == (best if which == "best" else 6, "greedy")]
    prompt = tokenizer(sample["prompt"], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    completion = written[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(completion, skip_special_tokens=True) == sample["completion"]


def test_a_first_start_that_fails_does_not_block_the_next(
    flags: list[str], rewards: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The evaluation of the untrained model and the first rollout: nothing is learnt yet."""
    run = tmp_path / "run"
    for call in (1, 3):
        rewards.calls = 0
        rewards.on_call = {call: lambda batch: np.zeros(len(batch) + 1)}
        with pytest.raises(SystemExit) as exit:
            main([*flags, "--output-dir", str(run)])
        assert exit.value.code == 2
        said = capfd.readouterr().err
        assert "rewards_of_tests.scripted returned shape (5,) for a batch of 4" in said
        assert "saved" not in said
        assert not run.exists()


@pytest.mark.slow
def test_nonfinite_updates_are_skipped_counted_and_end_the_run(
    flags: list[str], rewards: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Scores of 3e38 are finite; their squares are not. Eight updates an iteration.

    Nor is what they are scaled by, the deviation of all scores, if it counts them.
    """
    run = tmp_path / "run"
    best: list[int] = []

    def huge(batch: Any, scores: list[float]) -> np.ndarray:
        best.append((run / "best").stat().st_ino)
        return np.array(scores, np.float32)

    for call, scores in ((6, [3e38] * 4), (9, [1e20, -1e20] * 2), (12, [-3e38] * 4)):
        rewards.on_call[call] = partial(huge, scores=scores)
    # Evaluations come after each iteration; those after the second would be the best there are.
    rewards.on_call |= dict.fromkeys((7, 8, 10, 11), lambda batch: np.full(len(batch), 9.0))
    changes = ["--max-nonfinite-updates", "20", "--save-every", "1", "--eval-every", "1"]
    with pytest.raises(SystemExit) as exit:
        main([*flags, "--output-dir", str(run), *changes])
    assert exit.value.code == 2
    [error] = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "not finite in 24 updates in a row, up to iteration 4" in error
    assert f"after iteration 1, in {run}/checkpoints" in error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]
    assert f"lower learning_rate. It can begin with --model {run}/best." in error
    assert {*best, (run / "best").stat().st_ino} == {best[0]}, "it is not replaced"
    lines = records(run, "metrics.jsonl")
    assert [line["update/nonfinite"] for line in lines] == [0, 8, 8, 8]
    assert [line["update/epochs"] for line in lines] == [4, 0, 0, 0]
    # What is saved came before, so mending the reward is enough.
    rewards.on_call = {}
    main(["--output-dir", str(run), "--resume"])
    assert [line["update/nonfinite"] for line in records(run, "metrics.jsonl")] == [0] * 6


CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}I"


def test_flags_reach_the_task_the_network_and_the_evaluation(
    make_network: Callable[..., PolicyValueNetwork],
    tokenizer: Tokenizer,
    inputs: Path,
    rewards: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has another value than by default. Nothing is run."""
    built: list[tuple[PPOAgent, PromptDataset]] = []

    class NoRun:
        def __init__(self, trainer: PPOTrainer, folder: Any):
            built.append((trainer.agent, trainer.eval_prompts))

        def go(self, *, resume: bool) -> None:
            assert not resume

    monkeypatch.setattr("ppo_jax.train.Run", NoRun)
    config = tokenizer.config | {"chat_template": CHAT_TEMPLATE}
    chatty = Tokenizer(tokenizer.backend, eos_token_ids=(0, 300), config=config)
    save_pretrained(make_network(num_hidden_layers=1), tmp_path / "model", chatty)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The plot was not bad at all"}\n')
    settings = {
        "model": tmp_path / "model",
        "prompts": tmp_path / "prompts.jsonl",
        "eval-prompts": inputs / "held_out.jsonl",
        "reward": "rewards_of_tests:scripted",
        "max-prompt-length": 6,
        "prompt-overflow": "truncate_left",
        "system-prompt": "The",
        "max-new-tokens": 9,
        "min-new-tokens": 2,
        "missing-eos-penalty": 0.5,
        "batch-size": 4,
        "dtype": "bfloat16",
        "num-iterations": 7,
        "eval-size": 3,
        "output-dir": tmp_path / "run",
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    main([*words, "--chat", "--remat"])
    [(agent, held_out)] = built
    task = agent.task
    assert task.rules == mdp.Rules(6, 9, tokenizer.vocab_size, (0, 300), (), 2)
    assert task.missing_eos_penalty == 0.5
    assert [prompt.text for prompt in held_out] == [
        f"The {text} I" for text in ("The acting", "I liked", "All in all")
    ]
    [prompt] = task.prompts
    whole = tokenizer.encode("The The plot was not bad at all I")
    assert prompt.ids.tolist() == whole[-6:] != whole
    assert agent.network.backbone.dtype == "bfloat16"
    assert agent.network.backbone.norm.weight[...].dtype == "float32"
    assert agent.learner.remat
    assert agent.num_iterations == 7
