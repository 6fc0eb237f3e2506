"""Every argument of the environment, wrong."""

import inspect
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled

import qwen_env  # noqa: F401
from qwen_env.env import QwenTextEnv
from qwen_env.errors import UsageError
from qwen_env.extras import import_extra
from qwen_env.task import make_task

WRONG_ARGUMENTS = [
    ({"tokenizer": "./none"}, "./none: no such folder"),
    ({"tokenizer": "none.gguf"}, "none.gguf: no such file"),
    ({"tokenizer": 3}, "tokenizer is a int; give a folder, a hub id, a .gguf file"),
    ({"prompts": "none.jsonl"}, "none.jsonl: no such file; .* a list holds texts"),
    ({"prompts": []}, "prompts holds no prompts"),
    ({"prompts": ["the " * 50]}, r"prompts\[0\] holds a prompt of .* over the limit of 32; raise"),
    ({"prompts": [{"text": "a"}]}, "has neither 'prompt'"),
    ({"prompts": [""]}, r"prompts\[0\] holds an empty prompt"),
    ({"prompts": 3}, "prompts is a int; give the path"),
    ({"prompts": b"a"}, "prompts is a bytes; give the path"),
    ({"prompt_overflow": "wrap"}, "prompt_overflow is 'wrap'; it must be one of 'error'"),
    ({"prompt_overflow": None}, "prompt_overflow is None"),
    ({"system_prompt": "be brief"}, r"There is a system_prompt, but .* is plain text .*--chat"),
    ({"system_prompt": 3}, "system_prompt is 3; it must be text"),
    (
        {"chat_template": True},
        "no chat template; pass one as chat_template, or give plain text and leave chat_template",
    ),
    ({"chat_template": ""}, "chat_template is ''; it must be None, True, False, or a template"),
    ({"chat_template": 3}, "chat_template is 3"),
    ({"chat_template": "{% for %}"}, "line 1 of .*: the chat template fails"),
    (
        {"chat_template": "{{ 1 / 0 }}"},
        "the chat template fails .*: division by zero",
    ),
    ({"chat_template_kwargs": 3}, "chat_template_kwargs is 3; it must be an object"),
    ({"chat_template_kwargs": {1: 2}}, "chat_template_kwargs is {1: 2}; it must be an object"),
    ({"chat_template_kwargs": {"messages": []}}, "holds 'messages', .* leave it out"),
    ({"reward": 3}, "reward is 3; give a callable, or a string"),
    ({"reward": None}, "reward is None; give a callable"),
    ({"reward": "none"}, "reward is 'none'; give a callable"),
    ({"task": 3}, "task is 3; give a NamedTask, or a string"),
    ({"task": "gsm9k"}, "no task 'gsm9k'; perhaps you meant 'gsm8k'"),
    ({"max_prompt_length": 0}, "max_prompt_length is 0; it must be at least 1"),
    ({"max_prompt_length": "8"}, "max_prompt_length is '8'; it must be an integer"),
    (
        {"max_prompt_length": 2**31},
        "max_prompt_length . max_new_tokens is .* at most 2147483647",
    ),
    ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
    ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be an integer"),
    ({"max_new_tokens": None}, "max_new_tokens is None; it must be an integer"),
    ({"vocab_size": 100}, "vocab_size is 100, but the tokenizer has .* or leave it out"),
    ({"vocab_size": 1e6}, "vocab_size is 1000000.0; it must be an integer"),
    ({"vocab_size": 2**33}, "vocab_size is 8589934592; it must be at most 2147483647"),
    ({"eos_token_ids": ()}, "eos_token_ids is empty, .*; name at least one"),
    ({"eos_token_ids": 10**6}, "eos_token_ids holds 1000000, .* outside the vocabulary .0 to"),
    ({"eos_token_ids": "<|endoftext|>"}, "it must be a list of token ids"),
    ({"eos_token_ids": 720, "vocab_size": 768}, "eos_token_ids holds 720, which has no text"),
    ({"stop": ""}, "stop is ''; it must be text or a list of texts, none of them empty"),
    ({"stop": ["a", ""]}, "stop is .'a', ''.; it must be text"),
    ({"stop": 3}, "stop is 3; it must be text or a list of texts"),
    ({"stop": b"a"}, "stop is b'a'; it must be text"),
    ({"stop": None}, "stop is None; it must be text"),
    ({"stop": [["a"]]}, r"stop is \[\['a'\]\]; it must be text"),
    ({"stop": "half a pair: \ud800"}, r"stop holds 'half .*\\ud800', which is not valid Unicode"),
    ({"stop": "\ufffd"}, r"stop holds '\\ufffd', .* leave it out"),
    ({"stop": "a<|endoftext|>"}, "leave out the special token '<|endoftext|>'; name its id in eos"),
    (
        {"stop": ["ab" * 100, "ac" * 100], "max_new_tokens": 200},
        "stop holds strings of 398 bytes in all, .* at most 255",
    ),
    (
        {"stop": "\n" * 33},
        "stop holds .*, which no response of 32 tokens can contain; leave it out",
    ),
    ({"prompt_order": "best"}, "prompt_order is 'best'; it must be one of 'uniform'"),
    ({"prompt_order": ["uniform"]}, "prompt_order is .'uniform'.; it must be one of"),
    ({"interaction": 3}, "interaction is 3; give an object with a method reply"),
    ({"max_turns": 2}, "max_turns is 2, but there is no interaction"),
    ({"min_new_tokens": 33}, "min_new_tokens is 33; .* max_new_tokens .32."),
    ({"min_new_tokens": -1}, "min_new_tokens is -1"),
    ({"min_new_tokens": 0.5}, "min_new_tokens is 0.5; it must be an integer"),
    ({"forbidden_token_ids": [-1]}, "forbidden_token_ids holds -1, .* outside"),
    ({"forbidden_token_ids": None}, "forbidden_token_ids is None; it must be a list"),
    ({"forbidden_token_ids": ["the"]}, "forbidden_token_ids is .'the'.; it must be a list"),
    ({"forbidden_token_ids": range(714)}, "every token is forbidden; leave at least one"),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0; .* must not be negative"),
    ({"missing_eos_penalty": "1"}, "missing_eos_penalty is '1'; it must be a finite number"),
    ({"missing_eos_penalty": float("nan")}, "missing_eos_penalty is nan; it must be a finite"),
    ({"render_mode": "depth"}, "render_mode is 'depth'; it must be one of"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS)
@pytest.mark.filterwarnings("ignore:.*render_mode='depth'.*")
@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_wrong_arguments(make, arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        make("QwenText-v0", **arguments)
    assert str(caught.value).endswith(".")


def test_no_argument_is_left_out_above():
    names = {name for arguments, _ in WRONG_ARGUMENTS for name in arguments}
    assert names == set(inspect.signature(QwenTextEnv).parameters)


def test_numpy_s_numbers_are_welcome():
    env = gym.make(
        "QwenText-v0",
        max_new_tokens=np.int64(3),
        vocab_size=np.int32(768),
        eos_token_ids=np.array([0, 5]),
        forbidden_token_ids=np.array([7]),
        missing_eos_penalty=np.float32(0.5),
    )
    env.reset(seed=0)
    assert env.unwrapped.task.rules.eos_token_ids == (0, 5)
    assert not env.unwrapped.action_mask()[[7, 714, 767]].any()


def test_small_numpy_integers_do_not_wrap_round():
    env = gym.make(
        "QwenText-v0", max_prompt_length=np.uint8(200), max_new_tokens=np.uint8(100),
        prompts=["The film is " * 20],
    )  # fmt: skip
    observation, _ = env.reset(seed=0)
    assert observation["input_ids"].shape == (300,)


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
    with pytest.raises(DependencyNotInstalled, match=r"pip install gguf"):
        import_extra("no_such_package", package="gguf")


def test_the_environment_needs_no_deep_learning_library():
    code = (
        "import sys, gymnasium, qwen_env; env = gymnasium.make('QwenText-v0'); env.reset(seed=0);"
        "env.step(env.action_space.sample()); gymnasium.make_vec('QwenText-v0', num_envs=2);"
        "print(sorted({'jax', 'flax', 'torch', 'transformers', 'ppo_jax'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
