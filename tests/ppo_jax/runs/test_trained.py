"""Which model of a run is meant, and what the commands take from the run that they are given."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ppo_jax import evaluate, generate
from ppo_jax.config import SamplingConfig
from ppo_jax.models.loading import model_in
from ppo_jax.runs.config_file import read_config
from ppo_jax.runs.trained import named_run
from ppo_jax.train import parse_arguments
from qwen_env.errors import UsageError


@pytest.fixture
def finished_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_a_run_is_named_by_either_flag(finished_run: Path) -> None:
    config = read_config(finished_run)
    for flag in ("--run", "--model"):
        found = named_run([flag, str(finished_run), "--seed", "3"])
        assert found == (finished_run, config, "final")
        found = named_run([f"{flag}={finished_run}", "--which", "best"])
        assert found is not None and found.model == str(finished_run / "best")
    assert named_run(["--model", str(finished_run / "final")]) is None
    assert named_run(["--model", "Qwen/Qwen2.5-0.5B"]) is None


def test_an_unfinished_run_has_its_best_model(finished_run: Path) -> None:
    (finished_run / "final").rename(finished_run / "elsewhere")
    found = named_run(["--run", str(finished_run)])
    assert found is not None and found.model == str(finished_run / "best")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--run", "{run}", "--model", "x"], r"run .* and model \(x\) both name"),
        (["--run", "{run}/final"], "holds no run"),
        (["--run", "nowhere"], "nowhere holds no run"),
        (["--run", "{run}", "--which", "worst"], "which is 'worst', but .* has final, best, "),
        (["--which", "best"], "no run is named"),
        (["--model", "{run}/final", "--which", "best"], "no run is named"),
    ],
)
def test_what_is_no_run(argv: list[str], words: str, finished_run: Path) -> None:
    with pytest.raises(UsageError, match=words):
        named_run([word.format(run=finished_run) for word in argv])


def test_a_run_that_has_saved_no_model(finished_run: Path) -> None:
    for name in ("final", "best", "checkpoints"):
        (finished_run / name).rename(finished_run / f"not_{name}")
    with pytest.raises(UsageError, match=r"has saved no model yet; .*--resume"):
        named_run(["--run", str(finished_run)])


def test_a_run_of_another_version(finished_run: Path) -> None:
    path = finished_run / "config.json"
    content = json.loads(path.read_text())
    content["ppo"]["knob_of_the_past"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"config.json is not the config .*knob_of_the_past"):
        evaluate.parse_arguments(["--run", str(finished_run)])


def edit(run: Path, group: str, **fields: Any) -> None:
    path = run / "config.json"
    content = json.loads(path.read_text())
    content[group] |= fields
    path.write_text(json.dumps(content))


def test_no_flag_of_the_run_has_to_be_repeated(finished_run: Path) -> None:
    edit(finished_run, "task", chat=True, system_prompt="Be brief.", missing_eos_penalty=0.5)
    edit(finished_run, "ppo", temperature=0.7, top_k=20)
    config = read_config(finished_run)
    arguments, run = evaluate.parse_arguments(["--run", str(finished_run), "--seed", "4"])
    assert run is not None and arguments.seed == 4
    expected = dataclasses.asdict(config.task) | {
        "model": str(finished_run / "final"),
        "prompts": None,  # those that the run held out
        "max_prompt_length": None,
    }
    assert dataclasses.asdict(arguments.task) == expected
    assert arguments.sampling == SamplingConfig(temperature=0.7, top_k=20)

    given, _ = generate.parse_arguments(["--model", str(finished_run), "The plot"])
    assert given.sampling == arguments.sampling
    for name, value in dataclasses.asdict(given.response).items():
        assert value == expected[name]
    # Talking to a model is no measurement: every flag may differ.
    given, _ = generate.parse_arguments(
        ["--run", str(finished_run), "--max-new-tokens", "99", "--temperature", "0.1", "The plot"]
    )
    assert (given.response.max_new_tokens, given.sampling.temperature) == (99, 0.1)
    given, _ = generate.parse_arguments(["--run", str(finished_run), "--greedy", "The plot"])
    assert given.greedy


def test_other_prompts_and_rewards_may_be_named(finished_run: Path) -> None:
    flags = ["--prompts", "mine.jsonl", "--reward", "mine:f", "--gold-reward", "None"]
    arguments, _ = evaluate.parse_arguments(["--run", str(finished_run), *flags])
    assert (arguments.task.prompts, arguments.task.reward) == ("mine.jsonl", "mine:f")
    assert arguments.task.gold_reward is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--temperature", "0.5"], r"temperature is 0\.5, but the run was trained with 1\.0; .*"),
        (["--max-new-tokens", "99"], r"max_new_tokens is 99, but the run was trained with 8"),
        (["--chat"], r"chat is True, but the run was trained with False"),
        (["--missing-eos-penalty", "1"], r"missing_eos_penalty is 1\.0, but"),
    ],
)
def test_flags_that_contradict_the_run(given: list[str], words: str, finished_run: Path) -> None:
    with pytest.raises(UsageError, match=words) as error:
        evaluate.parse_arguments(["--run", str(finished_run), *given])
    assert f"--model {finished_run}/final." in str(error.value)
    agreeing = ["--temperature", "1.0", "--max-new-tokens", "8", "--no-chat"]
    evaluate.parse_arguments(["--run", str(finished_run), *agreeing])


def test_training_can_start_from_a_run(finished_run: Path) -> None:
    assert model_in(str(finished_run)) == str(finished_run / "final")
    assert model_in("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    _, config = parse_arguments(["--model", str(finished_run)])
    assert config.task.model == str(finished_run / "final")


def test_a_run_scores_as_its_last_evaluation_says(
    finished_run: Path, rewards: object, capfd: pytest.CaptureFixture[str]
) -> None:
    last = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    capfd.readouterr()
    evaluate.main(["--run", str(finished_run), "--json"])
    means = json.loads(capfd.readouterr().out)
    for name, mean in means["greedy"].items():
        assert mean == pytest.approx(last[f"eval/greedy/{name}"])


def test_a_checkpoint_is_a_model_of_the_run(
    finished_run: Path, rewards: object, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last one is the final model."""
    last = max(int(path.name) for path in (finished_run / "checkpoints").iterdir())

    def completions(which: str) -> list[str]:
        capfd.readouterr()
        generate.main(["--run", str(finished_run), "--which", which, "The plot", "A", "--json"])
        return capfd.readouterr().out.splitlines()

    assert completions(str(last)) == completions("final")
