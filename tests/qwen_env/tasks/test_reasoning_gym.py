"""Tasks of the package: their questions, their options, and the verdict on an answer."""

from enum import Enum
from typing import Literal

import gymnasium as gym
import numpy as np
import pytest
import reasoning_gym as package
from reasoning_gym.utils import extract_answer as their_extract_answer

from qwen_env import watchdog
from qwen_env.errors import RewardError, UsageError
from qwen_env.rewards import RewardBatch, score
from qwen_env.tasks import load_named_task
from qwen_env.tasks.reasoning_gym import extract_answer, parsed, reasoning_gym

SPEC = "reasoning_gym:chain_sum?min_terms=3&max_terms=4&size=40&held_out_size=20"


def batch(completions, rows):
    ids = [np.array([1], np.int32)] * len(rows)
    return RewardBatch([""] * len(rows), completions, ids, ids, rows, ["eos"] * len(rows))


@pytest.fixture(scope="module")
def task():
    return load_named_task(SPEC)


def test_the_questions_are_the_package_s(task):
    theirs = package.create_dataset("chain_sum", min_terms=3, max_terms=4, size=40, seed=0)
    assert [row["question"] for row in task.prompts] == [entry["question"] for entry in theirs]
    for row in (*task.prompts, *task.held_out):
        terms = row["metadata"]["expression"].split()[::2]
        assert len(terms) in (3, 4)
        assert row["answer"] == str(eval(row["metadata"]["expression"]))
        assert row["prompt"] == (
            f"{row['question']}\nGive your final answer between <answer> and </answer>."
        )


def test_other_instructions():
    for option, ending in (("Only+the number.", "\nOnly the number."), ("", "")):
        task = load_named_task(f"{SPEC}&instruction={option}")
        assert task.prompts[0]["prompt"] == task.prompts[0]["question"] + ending


def test_the_seed_decides(task):
    def asked(seed):
        return [row["question"] for row in load_named_task(f"{SPEC}&seed={seed}").prompts]

    assert asked(0) == [row["question"] for row in task.prompts]
    assert not set(asked(0)) & set(asked(1000))
    assert asked(2**32 - 1), "the held-out seed goes round"


@pytest.mark.parametrize("seed", range(3))
def test_no_question_twice(seed):
    """Where there are 100 in all, nearly as many are found, and those to be held out come first."""
    spec = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&max_digits=1&size=150&held_out_size=40"
    task = load_named_task(f"{spec}&seed={seed}")
    questions = [row["question"] for row in (*task.prompts, *task.held_out)]
    assert len(questions) == len(set(questions)) == 190
    again = load_named_task(f"{spec}&seed={seed}")
    assert (again.prompts, again.held_out) == (task.prompts, task.held_out)


def test_too_few_questions():
    with pytest.raises(UsageError, match=r"too few .* size is 500 .*, but 10 were found"):
        load_named_task("reasoning_gym:chain_sum?min_terms=1&max_terms=1&max_digits=1")


def test_verdicts(task):
    row = next(row for row in task.prompts if int(row["answer"]) > 1000)
    right = row["answer"]
    completions = {
        right: 1,
        f" {right}\n": 1,
        f"{right}.0": 1,
        f"{int(right):,}": 1,
        f"I add them: <answer>{right}</answer>": 1,
        f"<answer>5</answer> No: <answer>\n{right}\n</answer>": 1,
        f"<answer> I think <answer>{right}</answer>": 1,
        f"<answer>{right}</answer> or 5": 1,
        f"The answer is {right}": len(right) / len(f"The answer is {right}"),
        f"{right} <answer></answer>": 0,
        f"{right} <answer>5</answer>": 0,
        str(int(right) + 1): 0,
        "nan": 0,
        "": 0,
    }
    scores = score(task.reward, batch(list(completions), [row] * len(completions)))
    np.testing.assert_allclose(scores.values, [*completions.values()], rtol=1e-6)
    assert scores.components["accuracy"].tolist() == [x == 1 for x in completions.values()]
    votes = {task.answer_of(text) for text, worth in completions.items() if worth == 1}
    assert votes == {right}
    assert task.answer_of("nothing") is task.answer_of("") is task.answer_of("5 or 6") is None
    assert task.answer_of("<answer>42.</answer>") == task.answer_of("42.0") == "42"


def test_an_answer_that_the_package_fails_on_is_wrong():
    """prime_factorization reads numbers out of whatever it is given."""
    task = load_named_task("reasoning_gym:prime_factorization?size=3&held_out_size=1")
    with pytest.raises(ValueError):
        package.create_dataset("prime_factorization").score_answer("[", task.prompts[0])
    scores = score(task.reward, batch(["[", task.prompts[0]["answer"]], task.prompts[:1] * 2))
    assert scores.values.tolist() == [0, 1]
    assert task.answer_of("2 \u00d7\n3") == "2 \u00d7 3", (
        "answers that are no numbers stay as they are"
    )


def test_an_answer_that_the_package_does_not_come_to_an_end_with_is_wrong(task, monkeypatch):
    def endless(answer, entry):
        while answer == "endless":
            pass
        return 1.0

    monkeypatch.setattr(watchdog, "SECONDS", 0.2)
    monkeypatch.setattr(task.reward._dataset, "score_answer", endless)
    scores = score(task.reward, batch(["endless", "other"], task.prompts[:1] * 2))
    assert scores.values.tolist() == [0, 1]


def test_a_row_of_another_task(task):
    with pytest.raises(RewardError, match="no question of reasoning_gym:chain_sum"):
        score(task.reward, batch(["5"], [{"prompt": "5?", "answer": "5"}]))


@pytest.mark.parametrize(
    "text", ["5", " 5 ", "<answer>5</answer>", "a <answer> 5\n</answer> b", "<answer>5",
             "<answer>4</answer><answer>5</answer>", "<answer>a\nb</answer>"],
)  # fmt: skip
def test_answers_are_extracted_as_the_package_does(text):
    theirs = their_extract_answer(text)
    assert extract_answer(text) == (text.strip() if theirs is None else theirs)


def test_every_task_of_the_package_has_options_of_types_that_are_known():
    """Defaults are read back from how they are written, but for two of another type than theirs."""
    unwritten = []
    for name, (_, config_class) in package.factory.DATASETS.items():
        for option, hint in config_class.__annotations__.items():
            default = getattr(config_class, option, None)
            if not isinstance(default, int | float | str):
                continue
            try:
                value = parsed(option, getattr(default, "name", str(default)), hint)
            except UsageError:
                unwritten.append(f"{name}.{option}")
            else:
                assert value == default
    assert unwritten == ["intermediate_integration.symbols", "rearc.diff_ub"]


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("text", "hint", "expected"),
    [
        ("3", int, 3),
        ("None", int | None, None),
        ("3", int | None, 3),
        ("0.5", float, 0.5),
        ("true", bool, True),
        ("False", bool, False),
        ("0", bool, False),
        ("a, b", list[str], ["a", "b"]),
        ("0.5,1", list[float], [0.5, 1.0]),
        ("a,b", tuple[str, ...], ("a", "b")),
        ("", list[str], []),
        ("one", Literal["one", "two"], "one"),
        ("RED", Colour, Colour.RED),
    ],
)
def test_values_of_options(text, hint, expected):
    assert parsed("it", text, hint) == expected


@pytest.mark.parametrize(
    ("text", "hint", "message"),
    [
        ("3.5", int, "it is '3.5'; it must be an integer"),
        ("much", float, "it is 'much'; it must be a number"),
        ("yes", bool, "it is 'yes'; it must be true or false"),
        ("1,x", list[int], "item 1 of it is 'x'; it must be an integer"),
        ("three", Literal["one", "two"], "it is 'three'; it must be one of 'one', 'two'"),
        ("BLUE", Colour, "it must be one of 'RED'"),
        ("1", object, "it cannot be written as text; make the task in Python"),
    ],
)
def test_values_that_cannot_be(text, hint, message):
    with pytest.raises(UsageError, match=message):
        parsed("it", text, hint)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chainsum", "no task 'chainsum'; perhaps you meant 'chain_sum'"),
        ("xyzzy", "no task 'xyzzy'; it has ab, acre, "),
        ("", "no task ''"),
        ("chain_sum?min_term=3", "no option 'min_term'; perhaps you meant 'min_terms' .* it has "
         "allow_negation, answer, held_out_size, instruction, max_digits, "),
        ("chain_sum?min_terms=x", "min_terms of reasoning_gym:chain_sum is 'x'; it must be an int"),
        ("chain_sum?min_terms=9", "reasoning_gym:chain_sum: max_terms must be >= min_terms"),
        ("chain_sum?size=0", "size is 0; it must be at least 1"),
        ("chain_sum?held_out_size=0", "held_out_size is 0; it must be at least 1"),
        ("chain_sum?seed=-1", "seed is -1; it must be at least 0 and below"),
        ("chain_sum?size=1&size=2", "sets size twice"),
        ("chain_sum?size", "cannot be read; write them as name=value"),
        ("time_intervals?min_time=5", "min_time .* cannot be written as text"),
    ],
)  # fmt: skip
def test_specifications_that_cannot_be(spec, message):
    with pytest.raises(UsageError, match=message):
        load_named_task(f"reasoning_gym:{spec}")


def test_in_python():
    task = reasoning_gym("chain_sum", size=5, held_out_size=2, min_terms=2, instruction="")
    assert (len(task.prompts), len(task.held_out)) == (5, 2)
    with pytest.raises(UsageError, match="size is 'many'; it must be an integer"):
        reasoning_gym("chain_sum", size="many")


def test_in_the_environment(backend):
    env = gym.make("QwenText-v0", tokenizer=backend, eos_token_ids=2, task=SPEC, max_new_tokens=60)
    for index, prompt in enumerate(env.unwrapped.task.prompts[:3]):
        _, info = env.reset(options={"prompt_index": index})
        assert info["prompt"] == prompt.row["prompt"]
        for token in (*backend.encode(f"<answer>{prompt.row['answer']}</answer>").ids, 2):
            _, reward, *_, info = env.step(token)
        assert reward == info["reward_components"]["accuracy"] == 1


def test_the_last_number_is_the_answer():
    """What stands before it does not count, nor does how the package would read all of it."""
    task = load_named_task(f"{SPEC}&answer=last_number")
    row = {**task.prompts[0], "answer": "-12"}
    right = ["0 - 4 - 8 = -12", "-12", "-4 - 8\n= -12.", "It is \\(-12\\)", "12 or 3, no: -12"]
    wrong = ["0 - 4 - 8 = 12", "-12 = 0 - 4 - 8", "-1", "", "minus twelve", "-12 of 100"]
    scores = score(task.reward, batch([*right, *wrong], [row] * (len(right) + len(wrong))))
    expected = [1.0] * len(right) + [0.0] * len(wrong)
    assert scores.values.tolist() == scores.components["accuracy"].tolist() == expected
    assert [task.answer_of(text) for text in right] == ["-12"] * len(right)
    assert task.answer_of("minus twelve") is None


def test_questions_asked_otherwise():
    task = load_named_task(f"{SPEC}&question=Compute+{{expression}}.&instruction=")
    for row in task.prompts:
        assert row["prompt"] == f"Compute {row['metadata']['expression']}."
    assert load_named_task(f"{SPEC}&question={{question}}").prompts == load_named_task(SPEC).prompts
    for wrong in ("{colour}", "{", "{0}", "{expression.size}", "{expression:9d}"):
        with pytest.raises(UsageError, match=r"in braces it may name .*expression.*, question"):
            load_named_task(f"{SPEC}&question={wrong}")


def test_a_last_number_is_for_answers_that_are_numbers():
    with pytest.raises(UsageError, match="are no numbers, such as"):
        load_named_task("reasoning_gym:spell_backward?answer=last_number&size=5&held_out_size=5")
    with pytest.raises(UsageError, match="must be one of 'tagged', 'last_number'"):
        load_named_task(f"{SPEC}&answer=first")
