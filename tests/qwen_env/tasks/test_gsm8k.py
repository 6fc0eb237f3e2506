"""GSM8K: the cases that graders get wrong, and where its questions come from."""

import json
import re
import types

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_env.errors import RewardError, UsageError
from qwen_env.rewards import RewardBatch, score
from qwen_env.tasks import load_named_task
from qwen_env.tasks.gsm8k import INSTRUCTION, flexible_answer, strict_answer, verify

# From the data set, whose solutions hold calculator annotations, commas and dollars.
EXAMPLES = [
    {"question": "How many clips?", "answer": "She sold 48/2 = <<48/2=24>>24.\n#### 24"},
    {"question": "What profit?", "answer": "It is 200,000-130,000=$70,000\n#### 70,000"},
    {"question": "How warm is it?", "answer": "2 - 5 = <<2-5=-3>>-3\n#### -3"},
]


def batch(completions, rows):
    ids = [np.array([1], np.int32)] * len(rows)
    return RewardBatch([""] * len(rows), completions, ids, ids, rows, ["eos"] * len(rows))


def write(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


# The comments name the graders that are known to get it wrong: verl's gsm8k.py, lm-eval's
# strict-match and flexible-extract, OpenAI's grade-school-math, HELM's final number.
RIGHT = [
    ("#### 18", 18),
    ("9 * 2 = 18\n#### 18", 18),
    ("####18", 18),  # verl, OpenAI: need the space
    ("####-5", -5),
    ("#### -5", -5),
    ("#### \u22125", -5),  # a typographic minus: all of them
    ("#### 18.", 18),  # verl, OpenAI: '18.' is not '18'
    ("#### 18.0", 18),  # verl, lm-eval, OpenAI
    ("#### 18.0.", 18),
    ("#### $18", 18),  # verl, OpenAI: find no number
    ("#### $18.00", 18),
    ("#### -$18", -18),
    ("#### $-18", -18),
    ("#### \\$18", 18),
    ("#### 1,000", 1000),
    ("#### 1000", 1000),
    ("#### 1,000.00", 1000),
    ("#### 18,", 18),  # verl's flexible, HELM: the comma
    ("#### 18%", 18),
    ("#### 18 dollars", 18),
    ("#### 18 dollars, in total, altogether.", 18),
    ("#### 18 m^2", 18),
    ("#### **18**", 18),  # verl, lm-eval, OpenAI
    ("#### \\boxed{18}", 18),
    ("#### $\\boxed{1{,}800}$", 1800),
    ("#### (18)", 18),
    ("#### 18 ####", 18),
    ("#### 18\n####\n", 18),
    ("#### 5\nNo, wait.\n#### 18", 18),  # OpenAI, early verl: the first one
    ("#### Step 1: halve 36\n#### 18", 18),
    ("#### 18\n" + "and so we are sure of it. " * 30, 18),  # verl: only the last 300 characters
    ("#### 18\r\nDone with all 3.", 18),
]
NONE = [
    "18",  # no mark
    "\\boxed{18}",
    "####",
    "#### eighteen",
    "#### The answer is 18",
    "####\n18",
    "#### 5 + 13 = 18",  # verl, OpenAI: 5
    "#### 18-20",  # verl, OpenAI: 18
    "#### 18 or 20",
    "#### 1 1/2",  # verl, OpenAI: 1
    "#### 10:30",  # verl, OpenAI: 10
    "#### 1.2.3",
    "#### 1,00",
    "#### .",  # verl's strict takes the full stop for an answer
    "#### ,",
    "#### -",
    "#### 1/0",
    "",
]


@pytest.mark.parametrize(("text", "expected"), RIGHT)
def test_strict_answers(text, expected):
    assert strict_answer(text) == expected
    assert flexible_answer(text) == expected


@pytest.mark.parametrize("text", NONE)
def test_no_strict_answer(text):
    assert strict_answer(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 18.", 18),
        ("she pays $29.00.", 29),  # lm-eval: '$29.00.' is not '29'
        ("The total is 72 clips, altogether.", 72),  # HELM, omlx: the comma is the last number
        ("sold 1,000 of them", 1000),  # verl: '1,000' is not '1000'
        ("2 - 5 = -3", -3),
        ("from 5-3", 3),  # verl, lm-eval: -3
        ("\\boxed{-12}", -12),
        ("18...", 18),  # verl: '18...' is not '18'
        ("#### The answer is 18", 18),
        ("it opens at 10:30", None),  # verl: '30'
        ("on 9/12/2024", None),
        ("none", None),
        ("", None),
    ],
)
def test_flexible_answers(text, expected):
    assert flexible_answer(text) == expected


@given(st.text(alphabet="#18 ,.-$\n/e\u2212", max_size=40))
def test_flexible_finds_what_strict_finds(text):
    strict = strict_answer(text)
    assert strict is None or flexible_answer(text) == strict


@given(st.integers(-(10**9), 10**9), st.text(max_size=20).filter(lambda text: "#" not in text))
def test_agreement_with_the_plain_pattern_of_the_other_graders(number, before):
    """Where the answer is written as the data set writes it, all agree."""
    text = f"{before}\n#### {number:,}"
    [theirs] = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    assert strict_answer(text) == int(theirs.replace(",", "")) == number


def test_the_reward():
    rows = [{"prompt": "", "answer": "18"}] * 4
    completions = ["#### 18.0", "so 18", "#### 17", "I cannot say"]
    scores = score(verify, batch(completions, rows))
    assert scores.values.tolist() == scores.components["accuracy"].tolist() == [1, 0, 0, 0]
    assert scores.components["flexible_accuracy"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("given", [18, 18.0, "18", "$18.00", "9 * 2\n#### 18"])
def test_right_answers_in_rows_of_ones_own(given):
    assert score(verify, batch(["#### 18"], [{"answer": given}])).values == 1


@pytest.mark.parametrize("row", [{}, {"answer": "many"}, {"answer": None}, {"answer": True}])
def test_a_row_without_the_right_answer(row):
    with pytest.raises(RewardError, match="no number under 'answer'"):
        score(verify, batch(["#### 18"], [row]))


def test_a_folder(tmp_path):
    write(tmp_path / "train.jsonl", [*EXAMPLES, EXAMPLES[0]])
    write(tmp_path / "test.jsonl", [EXAMPLES[0]])
    task = load_named_task(f"gsm8k:{tmp_path}")
    assert [row["answer"] for row in task.prompts] == ["70000", "-3"], "none that is held out"
    assert [row["answer"] for row in task.held_out] == ["24"]
    prompt = 'How many clips? Let\'s think step by step and output the final answer after "####".'
    assert task.held_out[0]["prompt"] == prompt
    assert task.held_out[0]["solution"] == EXAMPLES[0]["answer"]
    assert task.answer_of is not None
    assert task.answer_of("#### 1,000.50") == task.answer_of("#### $1000.5") == "2001/2"
    assert task.answer_of("no") is None


def test_a_file_is_split(tmp_path):
    examples = [{"question": f"{i} + {i}?", "answer": 2 * i} for i in range(20)]
    path = write(tmp_path / "mine.jsonl", [*examples, examples[0]])
    task = load_named_task(f"gsm8k:{path}")
    assert (len(task.prompts), len(task.held_out)) == (18, 2), "each question once"
    assert not {row["prompt"] for row in task.prompts} & {row["prompt"] for row in task.held_out}
    assert task.prompts[3]["answer"] == "6"


def hub(monkeypatch, splits):
    """`datasets` as it would answer, were there a hub."""

    def load_dataset(*arguments):
        if isinstance(splits, Exception):
            raise splits
        assert arguments == ("openai/gsm8k", "main")
        return splits

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)


def test_the_hub(monkeypatch):
    hub(monkeypatch, {"train": EXAMPLES[:2], "test": EXAMPLES[2:]})
    task = load_named_task("gsm8k")
    assert task.name == "gsm8k"
    assert [row["answer"] for row in task.prompts] == ["24", "70000"]
    assert [row["answer"] for row in task.held_out] == ["-3"]


def test_files_of_the_hub(tmp_path):
    """As `huggingface-cli download` leaves them, read by `datasets`."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "main").mkdir()
    for split, examples in (("train", EXAMPLES[:2]), ("test", EXAMPLES[2:])):
        file = str(tmp_path / "main" / f"{split}-00000-of-00001.parquet")
        datasets.Dataset.from_list(examples).to_parquet(file)
    task = load_named_task(f"gsm8k:{tmp_path}")
    assert [row["answer"] for row in (*task.prompts, *task.held_out)] == ["24", "70000", "-3"]


def test_no_hub(monkeypatch):
    hub(monkeypatch, ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub"))
    with pytest.raises(UsageError, match=r"Couldn't reach .*; without the hub, .*gsm8k:FOLDER"):
        load_named_task("gsm8k")


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"problem": "a", "solution": "1"}], "line 2 of .* has no column 'question'; its columns "
         "are 'problem', 'solution'"),
        ([{"question": "a", "solution": "1"}], "line 2 of .* has no column 'answer'"),
        ([{"question": "a", "answer": "#### many"}], "line 2 of .* answer that is no number"),
        ([{"question": "a", "answer": "I see."}], "line 2 of .* 'I see.'"),
        ([{"question": "a", "answer": None}], "line 2 of .* no number, .*None"),
        ([{"question": 5, "answer": "1"}], "line 2 of .* question that is 5; it must be text"),
        ([{"question": " ", "answer": "1"}], "line 2 of .* question that is ' '"),
        (["text"], "line 2 of .* is a str"),
        ([], "holds one question"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be(tmp_path, examples, message):
    path = write(tmp_path / "mine.jsonl", [EXAMPLES[0], *examples])
    with pytest.raises(UsageError, match=message):
        load_named_task(f"gsm8k:{path}")


def test_places_that_cannot_be(tmp_path):
    with pytest.raises(UsageError, match=r"no such file; the task is gsm8k:FOLDER"):
        load_named_task(f"gsm8k:{tmp_path / 'nowhere'}")
    with pytest.raises(UsageError, match=r"put train.jsonl and test.jsonl there"):
        load_named_task(f"gsm8k:{tmp_path}")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UsageError, match="holds no questions"):
        load_named_task(f"gsm8k:{tmp_path / 'empty.jsonl'}")
    (tmp_path / "bad.jsonl").write_text("{'question'}\n")
    with pytest.raises(UsageError, match=r"line 1 of .*bad.jsonl is not JSON"):
        load_named_task(f"gsm8k:{tmp_path / 'bad.jsonl'}")


def test_in_the_environment(tmp_path):
    """A grader of the field's own kind: the completion of each token, and what it earns."""
    path = write(tmp_path / "mine.jsonl", EXAMPLES * 4)
    env = gym.make("QwenText-v0", task=f"gsm8k:{path}", max_new_tokens=40)
    task = env.unwrapped.task
    assert task.rules.max_prompt_length == max(len(prompt.ids) for prompt in task.prompts)
    _, info = env.reset(options={"prompt_index": 0})
    assert info["prompt"].endswith(INSTRUCTION)
    for token in task.tokenizer.encode("#### 24.0"):
        *_, ended, _, info = env.step(token)
    if not ended:
        _, reward, *_, info = env.step(task.rules.eos_token_ids[0])
    assert reward == info["reward_components"]["accuracy"] == 1
