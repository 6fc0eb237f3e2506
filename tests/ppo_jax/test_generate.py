import json
from pathlib import Path

import pytest

from ppo_jax.generate import main


def generate(capfd: pytest.CaptureFixture[str], model: Path, *argv: str) -> list[str]:
    capfd.readouterr()
    main(["--model", str(model), "--max-new-tokens", "6", *argv])
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()


def test_json_lines(inputs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = generate(capfd, inputs / "model", "The plot", "A", "--json")
    records = [json.loads(line) for line in lines]
    assert [record["prompt"] for record in records] == ["The plot", "A"]
    for record in records:
        assert record.keys() == {"prompt", "completion", "finish_reason"}
        assert record["finish_reason"] in ("eos", "length")


def test_greedy_is_deterministic_and_a_seed_is_reproducible(
    inputs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def outputs(*argv: str) -> list[str]:
        return generate(capfd, inputs / "model", "The plot was", "I liked", "--json", *argv)

    greedy = outputs("--greedy", "--seed", "1")
    assert outputs("--greedy", "--seed", "2") == greedy
    sampled = outputs("--seed", "1")
    assert outputs("--seed", "1") == sampled
    assert outputs("--seed", "2") != sampled
    assert outputs("--top-k", "1", "--seed", "5") == greedy
    assert outputs("--top-p", "1e-6", "--seed", "5") == greedy


def test_a_slot_after_another_writes_the_same(
    inputs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["The plot was", "I liked", "A", "It", "--json", "--seed", "3"]
    together = generate(capfd, inputs / "model", *argv)
    assert generate(capfd, inputs / "model", *argv, "--rollout-slots", "2") == together


def test_no_end_before_so_many_tokens(inputs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def finish_reasons(*argv: str) -> set[str]:
        lines = generate(capfd, inputs / "model", *["The plot"] * 8, "--json", *argv)
        return {json.loads(line)["finish_reason"] for line in lines}

    assert finish_reasons() == {"eos", "length"}
    assert finish_reasons("--min-new-tokens", "6") == {"length"}


def test_text_is_prompt_and_completion(inputs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ("The plot was", "--greedy")
    [record] = map(json.loads, generate(capfd, inputs / "model", *argv, "--json"))
    text = "\n".join(generate(capfd, inputs / "model", *argv))
    assert text == "\n".join(("The plot was" + record["completion"]).splitlines())


def test_chat_renders_the_template_and_prints_the_answer_alone(
    inputs: Path, chat_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def record(model: Path, *argv: str) -> dict[str, str]:
        [line] = generate(capfd, model, *argv, "--greedy", "--json")
        return json.loads(line)

    answer = record(chat_model, "The plot.", "--chat")
    rendered = record(inputs / "model", "The plot. It was")
    assert answer["completion"] == rendered["completion"]
    assert answer["prompt"] == "The plot."
    text = "\n".join(generate(capfd, chat_model, "The plot.", "--chat", "--greedy"))
    assert text == "\n".join(answer["completion"].splitlines())

    answer = record(chat_model, "The plot.", "--chat", "--system-prompt", "I liked it. ")
    rendered = record(inputs / "model", "I liked it. The plot. It was")
    assert answer["completion"] == rendered["completion"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no prompt", "ppo-generate"]),
        ([""], ["prompts[0]", "empty prompt"]),
        (["a", "--temperature", "0"], ["temperature is 0.0", "above 0"]),
        (["a", "--temperature", "nan"], ["temperature is nan"]),
        (["a", "--greedy", "--temperature", "0.7"], ["greedy and temperature"]),
        (["a", "--greedy", "--top-k", "3"], ["greedy and top_k"]),
        (["a", "--top-k", "0"], ["top_k is 0"]),
        (["a", "--top-p", "1.5"], ["top_p is 1.5"]),
        (["a", "--max-new-tokens", "0"], ["max_new_tokens is 0"]),
        (["a", "--seed", str(2**32)], ["seed is 4294967296", "below 2**32"]),
        (["a " * 30, "--max-new-tokens", "60"], ["max_new_tokens", "64 positions"]),
        (["a", "--min-new-tokens", "9", "--max-new-tokens", "8"], ["min_new_tokens (9)", "(8)"]),
        (["a", "--min-new-tokens", "-1"], ["min_new_tokens is -1", "at least 0"]),
        (["a", "--chat"], ["chat template"]),
        (["a", "--system-prompt", "b"], ["system_prompt", "--chat"]),
        (["a", "--chat-template-kwargs", "think=true"], ["chat_template_kwargs is", "--chat"]),
        (["a", "--chat", "--chat-template-kwargs", "think=no"], ["has 'think=no'", "JSON value"]),
        (["a", "--chat", "--chat-template-kwargs", "think"], ["has 'think'", "such as"]),
        (["a", "--model", "./nothing"], ["./nothing", "no such folder"]),
        (["a", "--rollout-slots", "2"], ["rollout_slots is 2", "a batch has only 1 response;"]),
        (["a", "--modle", "x"], ["--modle"]),
    ],
)
def test_wrong_input_is_one_sentence(
    argv: list[str], words: list[str], inputs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--model", str(inputs / "model"), *argv])
    out, err = capfd.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
