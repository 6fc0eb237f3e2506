import pytest

from qwen_env.env import QwenTextEnv
from qwen_env.errors import UsageError
from qwen_env.rewards.reasoning_gym import ReasoningGym


@pytest.fixture(scope="module")
def task():
    return ReasoningGym("chain_sum", size=5, seed=0)


def test_the_right_answer_is_worth_one(task, backend):
    env = QwenTextEnv(
        tokenizer=backend, eos_token_ids=2, prompts=task.prompts, reward=task,
        max_prompt_length=400, max_new_tokens=60,
    )  # fmt: skip
    for index, row in enumerate(task.prompts):
        right = row["entry"]["answer"]
        for text, expected in [
            (right, 1.0),
            (f"I add them: <answer>{right}</answer>", 1.0),
            ("who knows", 0.0),
        ]:
            _, info = env.reset(options={"prompt_index": index})
            assert info["prompt"] == row["prompt"]
            for token in (*backend.encode(text).ids, 2):
                _, reward, *_ = env.step(token)
            assert reward == expected


def test_the_seed_decides_the_questions(task):
    assert task.prompts == ReasoningGym("chain_sum", size=5, seed=0).prompts
    assert task.prompts != ReasoningGym("chain_sum", size=5, seed=1).prompts


def test_wrong_arguments():
    with pytest.raises(UsageError, match="'no_such_task'"):
        ReasoningGym("no_such_task")
    with pytest.raises(UsageError, match="colour"):
        ReasoningGym("chain_sum", colour="red")
