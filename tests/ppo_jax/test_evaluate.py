import io
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from ppo_jax import evaluate
from ppo_jax.assembly import Assembly, assemble
from ppo_jax.evaluate import main
from ppo_jax.generation.intervals import mean_interval, share_interval, wilson_interval
from ppo_jax.runs import progress


@pytest.fixture
def argv(inputs: Path, rewards: ModuleType) -> list[str]:
    words: list[Any] = ["--model", inputs / "model", "--prompts", inputs / "prompts.jsonl"]
    words += ["--reward", "rewards_of_tests:scripted", "--max-new-tokens", "8"]
    words += ["--batch-size", 4]
    return [str(word) for word in words]


def whole_json(
    argv: list[str], capfd: pytest.CaptureFixture[str], expected_err: str = ""
) -> dict[str, Any]:
    capfd.readouterr()
    main([*argv, "--json"])
    out, err = capfd.readouterr()
    said = [line for line in err.splitlines() if " ETA " not in line]  # told on slow machines alone
    assert said == expected_err.splitlines()
    [line] = out.splitlines()
    return cast(dict[str, Any], json.loads(line))


def as_json(argv: list[str], capfd: pytest.CaptureFixture[str]) -> dict[str, dict[str, float]]:
    """The means alone."""
    content = whole_json(argv, capfd)
    return {decoding: content[decoding] for decoding in ("greedy", "sampled")}


def test_json(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    content = whole_json(argv, capfd)
    assert content.keys() == {"greedy", "sampled", "intervals", "num_prompts", "samples"}
    assert (content["num_prompts"], content["samples"]) == (6, 1)
    passes = as_json(argv, capfd)
    for decoding, means in passes.items():
        assert means.keys() == {"score", "gold", "length_mean", "eos_rate"}
        assert 1 <= means["length_mean"] <= 8
        intervals = content["intervals"][decoding]
        assert intervals.keys() == means.keys()
        for name, (low, high) in intervals.items():
            assert low <= means[name] <= high
        assert intervals["eos_rate"] == list(wilson_interval(means["eos_rate"], 6))
    assert as_json(argv, capfd) == passes
    other = as_json([*argv, "--seed", "1"], capfd)
    assert other["greedy"] == passes["greedy"]
    assert other["sampled"] != passes["sampled"]


def test_every_prompt_counts_once(
    argv: list[str], rewards: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    """Six prompts in batches of four at most: two of three. What fills a last batch up is not
    counted either: see generation/test_actor.py."""
    batches: list[list[str]] = []

    def score(batch: Any) -> np.ndarray:
        batches.append(list(batch.prompts))
        return np.array([len(prompt) for prompt in batch.prompts], np.float32)

    rewards.on_call = dict.fromkeys(range(1, 5), score)
    passes = as_json(argv, capfd)
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    prompts = batches[0] + batches[1]
    assert len(set(prompts)) == 6
    assert passes["greedy"]["score"] == pytest.approx(np.mean([len(p) for p in prompts]))


def test_slots_change_nothing(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert as_json([*argv, "--rollout-slots", "2"], capfd) == as_json(argv, capfd)


def test_sampling_among_one_token_is_greedy(
    argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    for flags in (["--top-k", "1"], ["--top-p", "1e-6"]):
        passes = as_json([*argv, *flags], capfd)
        assert passes["sampled"] == passes["greedy"]


def test_length_limits_are_those_of_the_run(
    argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    plain = as_json(argv, capfd)
    penalised = as_json([*argv, "--missing-eos-penalty", "0.5"], capfd)
    assert 0 < plain["sampled"]["eos_rate"] < 1
    for decoding, means in plain.items():
        penalty = penalised[decoding]["missing_eos_penalty"]
        assert penalty == pytest.approx(-0.5 * (1 - means["eos_rate"]))
        assert penalised[decoding]["score"] == pytest.approx(means["score"] + penalty)
    for means in as_json([*argv, "--min-new-tokens", "8"], capfd).values():
        # The one token that may end the response is the last.
        assert means["length_mean"] == 8


def test_the_system_prompt_and_arguments_of_the_template_are_in_every_chat(
    argv: list[str], chat_model: Path, rewards: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts: list[str] = []

    def score(batch: Any) -> np.ndarray:
        prompts.extend(batch.prompts)
        return np.zeros(len(batch), np.float32)

    rewards.on_call = dict.fromkeys(range(1, 5), score)
    flags = ["--model", str(chat_model), "--chat", "--system-prompt", "I liked it. "]
    as_json([*argv, *flags, "--chat-template-kwargs", 'adverb=" really"'], capfd)
    assert prompts[0] == "I liked it. The plot was It was really"
    assert all(prompt.startswith("I liked it. ") for prompt in prompts)


def test_a_finished_run_scores_as_its_last_evaluation_says(
    finished_run: Path, inputs: Path, argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    last = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    final = str(finished_run / "final")
    held_out = str(inputs / "held_out.jsonl")
    passes = as_json([*argv, "--model", final, "--prompts", held_out], capfd)
    for name, mean in passes["greedy"].items():
        assert mean == pytest.approx(last[f"eval/greedy/{name}"])


def test_prompts_that_are_dropped_are_counted(
    argv: list[str], inputs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main([*argv, "--max-prompt-length", "2", "--prompt-overflow", "drop"])
    assert capfd.readouterr().err == (
        f"Dropped 3 of 6 prompts of {inputs}/prompts.jsonl: more than 2 tokens.\n"
    )


def test_progress_is_shown_on_a_terminal_alone(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other tests see none of it, piped."""
    shown = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=100)
    monkeypatch.setattr(progress, "stderr_console", lambda: shown)
    passes = as_json(argv, capfd)
    assert passes.keys() == {"greedy", "sampled"}
    written = cast(io.StringIO, shown.file).getvalue()
    for words in ("greedy", "sampled", "6/6"):
        assert words in written


class Recorded:
    """What the reward was asked, a list for each call."""

    def __init__(self, rewards: ModuleType, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[list[tuple[str, str, float]]] = []  # prompt, completion, accuracy
        verified = rewards.verified

        def record(batch: Any) -> Any:
            scores, components = verified(batch)
            accuracy = components["accuracy"].tolist()
            self.calls.append(list(zip(batch.prompts, batch.completions, accuracy, strict=True)))
            return scores, components

        monkeypatch.setattr(rewards, "verified", record)


def test_samples_of_a_verified_task(
    argv: list[str],
    rewards: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Four answers to each of six prompts, of which 16 responses fit at a time."""
    recorded = Recorded(rewards, monkeypatch)

    def with_answers(*args: Any, **kwargs: Any) -> Assembly:
        made = assemble(*args, **kwargs)
        return made._replace(task=replace(made.task, answer_of=lambda text: text[:2] or None))

    monkeypatch.setattr(evaluate, "assemble", with_answers)
    argv = [*argv, "--reward", "rewards_of_tests:verified", "--samples", "4", "--batch-size", "16"]
    content = whole_json(argv, capfd)
    greedy, sampled = recorded.calls[0], [row for call in recorded.calls[1:] for row in call][:24]
    assert len(greedy) == 6
    assert [prompt for prompt, _, _ in sampled] == [p for p, _, _ in greedy for _ in range(4)]
    right = np.array([accuracy for _, _, accuracy in sampled]).reshape(6, 4)
    assert 0 < right.mean() < 1
    means, intervals = content["sampled"], content["intervals"]["sampled"]
    assert means["mean@4"] == pytest.approx(means["accuracy"]) == pytest.approx(right.mean())
    assert means["pass@4"] == pytest.approx((right.sum(axis=1) > 0).mean())
    wrong = 4 - right.sum(axis=1)
    at_2 = 1 - wrong * (wrong - 1) / 12  # both of two drawn from four are wrong
    assert means["pass@2"] == pytest.approx(at_2.mean())
    assert intervals["pass@2"] == pytest.approx(share_interval(at_2, 4))
    assert intervals["accuracy"] == pytest.approx(share_interval(right.mean(axis=1), 4))
    assert 0 <= means["maj@4"] <= means["pass@4"]
    assert not {"mean@4", "pass@4", "maj@4"} & content["greedy"].keys()
    share = np.mean([accuracy for *_, accuracy in greedy])
    assert content["intervals"]["greedy"]["accuracy"] == pytest.approx(wilson_interval(share, 6))
    scores = np.array([text.count("e") / 4 for _, text, _ in sampled]).reshape(6, 4)
    assert intervals["score"] == pytest.approx(mean_interval(scores.mean(axis=1)))
    # What a prompt is answered depends on its number and the seed, not on what it is batched with.
    assert whole_json([*argv, "--batch-size", "8"], capfd)["sampled"] == pytest.approx(means)
    capfd.readouterr()
    main(argv)
    out = capfd.readouterr().out
    assert "6 prompts, 4 samples of each" in out
    low, high = intervals["mean@4"]
    assert f"{means['mean@4']:.3f} [{low:.3f}, {high:.3f}]" in out


def test_samples_where_no_answer_is_right_or_wrong(
    argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    said = (
        "There is no pass@k and no maj@k: the reward does not report an accuracy of 0 or 1 for "
        "each answer.\n"
    )
    content = whole_json([*argv, "--samples", "3"], capfd, expected_err=said)
    assert content["sampled"].keys() == {"score", "gold", "length_mean", "eos_rate"}
    assert content["samples"] == 3
    main([*argv, "--samples", "2", "--reward", "rewards_of_tests:verified"])
    out, err = capfd.readouterr()
    assert "pass@2" in out
    assert "maj@2" not in out
    assert err == "There is no maj@k: the task does not say which answer a completion gives.\n"


def test_a_table_for_people(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    main(argv)
    out, err = capfd.readouterr()
    assert err == ""
    for word in ("greedy", "sampled", "score", "gold", "length_mean", "eos_rate"):
        assert word in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (["--prompts", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--reward", "nowhere:f"], ["nowhere:f"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--batch-size", "0"], ["batch_size is 0"]),
        (["--rollout-slots", "0"], ["rollout_slots is 0"]),
        (["--rollout-slots", "5"], ["rollout_slots is 5", "a batch has only 4 responses"]),
        (["--samples", "0"], ["samples is 0", "at least 1"]),
        (["--seed", str(2**32)], ["seed is 4294967296", "below 2**32"]),
        (["--temperature", "0"], ["temperature is 0.0"]),
        (["--min-new-tokens", "9"], ["min_new_tokens (9)", "max_new_tokens (8)"]),
        (["--missing-eos-penalty", "-1"], ["missing_eos_penalty is -1.0", "at least 0"]),
        (["--max-prompt-length", "1"], ["line 1 of", "over the limit of 1"]),
        (["--max-new-tokens", "64"], ["64 positions"]),
        (["--model", "./nothing"], ["./nothing"]),
    ],
)
def test_wrong_input_is_one_sentence(
    added: list[str], words: list[str], argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*argv, *added])
    out, err = capfd.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
