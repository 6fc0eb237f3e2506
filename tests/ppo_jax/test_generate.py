import json
from pathlib import Path

import pytest

from ppo_jax.generate import main

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} It was{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    for path in (inputs / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


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


def test_text_is_prompt_and_completion(
    inputs: Path, chat_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ("The plot was", "--greedy")
    [record] = map(json.loads, generate(capfd, inputs / "model", *argv, "--json"))
    text = "\n".join(generate(capfd, inputs / "model", *argv))
    assert text == "\n".join(("The plot was" + record["completion"]).splitlines())


def test_chat_renders_the_template_and_prints_the_answer_alone(
    inputs: Path, chat_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    [answer] = map(
        json.loads, generate(capfd, chat_model, "The plot.", "--chat", "--greedy", "--json")
    )
    [rendered] = map(
        json.loads, generate(capfd, inputs / "model", "The plot. It was", "--greedy", "--json")
    )
    assert answer["completion"] == rendered["completion"]
    assert answer["prompt"] == "The plot."
    text = "\n".join(generate(capfd, chat_model, "The plot.", "--chat", "--greedy"))
    assert text == "\n".join(answer["completion"].splitlines())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no prompt", "--model"]),
        ([""], ["prompts[0]", "empty prompt"]),
        (["a", "--temperature", "0"], ["temperature is 0.0", "above 0"]),
        (["a", "--temperature", "nan"], ["temperature is nan"]),
        (["a", "--greedy", "--temperature", "1"], ["greedy and temperature"]),
        (["a", "--greedy", "--top-k", "3"], ["greedy and top_k"]),
        (["a", "--top-k", "0"], ["top_k is 0"]),
        (["a", "--top-p", "1.5"], ["top_p is 1.5"]),
        (["a", "--max-new-tokens", "0"], ["max_new_tokens is 0"]),
        (["a", "--seed", str(2**32)], ["seed is 4294967296", "below 2**32"]),
        (["a " * 30, "--max-new-tokens", "60"], ["max_new_tokens (60)", "64 positions"]),
        (["a", "--chat"], ["chat template"]),
        (["a", "--model", "./nothing"], ["./nothing", "no such folder"]),
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
