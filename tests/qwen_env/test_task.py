"""Every argument of the environment, wrong."""

import subprocess
import sys

import gymnasium as gym
import pytest
from gymnasium.error import DependencyNotInstalled

import qwen_env  # noqa: F401
from qwen_env.errors import UsageError
from qwen_env.extras import import_extra
from qwen_env.task import make_task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "./none"}, "./none: no such folder"),
        ({"tokenizer": 3}, "tokenizer is a int"),
        ({"prompts": "none.jsonl"}, "none.jsonl: no such file"),
        ({"prompts": []}, "prompts holds no prompts"),
        ({"prompts": ["the " * 50]}, r"prompts\[0\] holds a prompt of .* over the limit of 32"),
        ({"prompts": [{"text": "a"}]}, "has neither 'prompt'"),
        ({"prompt_overflow": "wrap"}, "prompt_overflow is 'wrap'"),
        ({"system_prompt": "be brief"}, "takes no system_prompt"),
        ({"chat_template": True}, "no chat template"),
        ({"reward": 3}, "reward is 3"),
        ({"reward": "none"}, "reward is 'none'"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"vocab_size": 100}, "vocab_size is 100, but the tokenizer has"),
        ({"eos_token_ids": ()}, "eos_token_ids is empty"),
        ({"eos_token_ids": 10**6}, "eos_token_ids holds 1000000"),
        ({"sampling": "best"}, "sampling is 'best'; it must be one of 'uniform'"),
        ({"min_new_tokens": 33}, "min_new_tokens is 33"),
        ({"forbidden_token_ids": [-1]}, "forbidden_token_ids holds -1"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0"),
        ({"render_mode": "rgb_array"}, "render_mode is 'rgb_array'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*render_mode='rgb_array'.*")
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        gym.make("QwenText-v0", **arguments)


def test_everything_forbidden(backend):
    ids = range(backend.get_vocab_size())
    with pytest.raises(UsageError, match="every token is forbidden"):
        make_task(tokenizer=backend, prompts=["a"], eos_token_ids=2, forbidden_token_ids=ids)


def test_an_unknown_argument():
    with pytest.raises(TypeError, match="max_tokens"):
        gym.make("QwenText-v0", max_tokens=3)


def test_a_tokenizer_without_eos(backend):
    with pytest.raises(UsageError, match=r"eos_token_ids is empty.*name at least one"):
        make_task(tokenizer=backend, prompts=["a"])


def test_a_missing_extra_says_what_to_install():
    with pytest.raises(DependencyNotInstalled, match=r"pip install 'qwen-ppo-jax\[gguf\]'"):
        import_extra("no_such_package", extra="gguf")


def test_the_environment_needs_no_deep_learning_library():
    code = (
        "import sys, gymnasium, qwen_env; env = gymnasium.make('QwenText-v0'); env.reset(seed=0);"
        "env.step(env.action_space.sample()); gymnasium.make_vec('QwenText-v0', num_envs=2);"
        "print(sorted({'jax', 'flax', 'torch', 'transformers', 'ppo_jax'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
