"""A network small enough to compile in a second, a task with its vocabulary, and whole runs."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from ppo_jax.models import DecoderConfig, PolicyValueNetwork, save_pretrained
from qwen_env import pocket
from qwen_env.rewards import RewardBatch
from qwen_env.task import TextTask, make_task
from qwen_env.tokenizer import Tokenizer, load_tokenizer

# Eight devices, for the tests of meshes; all others use the first.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(pocket.POLICY_FOLDER)


@pytest.fixture(scope="session")
def make_network(tokenizer: Tokenizer) -> Callable[..., PolicyValueNetwork]:
    """A random network; `sharpness` scales its embeddings, so that it is far from uniform."""

    def make(seed: int = 0, sharpness: float = 15.0, **changes: Any) -> PolicyValueNetwork:
        sizes = {
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        network = PolicyValueNetwork(DecoderConfig(**(sizes | changes)), rngs=nnx.Rngs(seed))
        table = network.backbone.embed_tokens
        table[...] = table[...] * sharpness
        head = network.value_head.weight
        head[...] = np.random.default_rng(seed).normal(0, 0.3, head[...].shape).astype(np.float32)
        return network

    return make


@pytest.fixture(scope="session")
def make_test_task(tokenizer: Tokenizer) -> Callable[..., TextTask]:
    """A task on the pocket tokenizer; the reward counts the letter e."""

    def make(**changes: Any) -> TextTask:
        arguments: dict[str, Any] = {
            "tokenizer": tokenizer,
            "prompts": ["The plot", "It was", "All in all, the songs", "A", "My friend and I"],
            "reward": count_e,
            "max_prompt_length": 8,
            "max_new_tokens": 10,
            # Enough end-of-sequence ids for episodes to end at many lengths.
            "eos_token_ids": (0, *range(260, 420)),
        }
        return make_task(**(arguments | changes))

    return make


def count_e(batch: RewardBatch) -> np.ndarray:
    return np.array([text.count("e") for text in batch.completions], np.float32)


@pytest.fixture
def compilations() -> Iterator[list[float]]:
    """Grows by the seconds of every compilation from now on."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.clear_event_listeners()


# What follows is for the tests of the entry points, which train from files.


@contextmanager
def _untouched(folder: Path) -> Iterator[None]:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = files()
    yield
    assert files() == before


@pytest.fixture(scope="session")
def untouched() -> Callable[[Path], AbstractContextManager[None]]:
    """Within the block, a folder's files stay as they are, to the last byte."""
    return _untouched


REWARD_MODULE = '''
"""Rewards that do on a given call what a test wants."""

import os
import time

import numpy as np

on_call = {}  # number of the call (from 1) -> a function of the batch, called instead
calls = 0


def count_e(batch):
    time.sleep(float(os.environ.get("SECONDS_A_REWARD", 0)))
    scores = np.array([text.count("e") for text in batch.completions], np.float32)
    return scores / 4, {"gold": scores - np.array([len(text) / 20 for text in batch.completions])}


def verified(batch):
    """Right is whatever has an odd number of letters e; the score is something else."""
    scores, _ = count_e(batch)
    return scores, {"accuracy": np.array([text.count("e") % 2 for text in batch.completions])}


def scripted(batch):
    global calls
    calls += 1
    return on_call.get(calls, count_e)(batch)
'''


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Programs that tests have in common are compiled once, and kept away from the home folder.

    The workers of a session have one cache. Not one session and the next: what was killed while it
    wrote to it would be read again, and warned of, for good.
    """
    of_worker = tmp_path_factory.getbasetemp()
    folder = (of_worker.parent if "PYTEST_XDIST_WORKER" in os.environ else of_worker) / "xla"
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_compilation_cache_max_size": 2**31,  # with a limit, a lock guards the cache
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))  # for subprocesses
            jax.config.update(name, value)
        yield folder


@pytest.fixture(scope="session")
def inputs(
    tmp_path_factory: pytest.TempPathFactory,
    make_network: Callable[..., PolicyValueNetwork],
    tokenizer: Tokenizer,
) -> Path:
    """A folder with a model (model/), prompts.jsonl, held_out.jsonl and a module of rewards."""
    folder = tmp_path_factory.mktemp("inputs")
    many_endings = Tokenizer(
        tokenizer.backend, eos_token_ids=(0, *range(300, 360)), config=tokenizer.config
    )
    network = make_network(sharpness=4.0, num_hidden_layers=1, max_position_embeddings=64)
    save_pretrained(network, folder / "model", many_endings)
    prompts = ["The plot was", "The songs", "For a drama, I", "It was", "A", "My friend and I"]
    for name, some in (
        ("prompts", prompts),
        ("held_out", ["The acting", "I liked", "All in all", "So"]),
    ):
        lines = (json.dumps({"prompt": text}) + "\n" for text in some)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "rewards_of_tests.py").write_text(REWARD_MODULE)
    return folder


@pytest.fixture(scope="session")
def chat_model(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `inputs`, with a chat template: messages in a row, " It was", an adverb."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(inputs / "model", folder)
    path = folder / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} It was{{ adverb }}{% endif %}"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


@pytest.fixture
def rewards(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of rewards, importable; `on_call` tells `scripted` what to do."""
    monkeypatch.syspath_prepend(str(inputs))
    module = import_module("rewards_of_tests")
    monkeypatch.setattr(module, "on_call", {})
    monkeypatch.setattr(module, "calls", 0)
    return module


@pytest.fixture(scope="session")
def flags(inputs: Path) -> list[str]:
    """Flags of a run of six iterations, an evaluation every two and a checkpoint every three.

    The reward is called in this order: evaluation (1, 2); iterations 1 (3) and 2 (4), evaluation
    (5, 6); iterations 3 (7) and 4 (8), evaluation (9, 10); 5 (11) and 6 (12), evaluation (13, 14).
    """
    settings = {
        "model": inputs / "model",
        "prompts": inputs / "prompts.jsonl",
        "eval-prompts": inputs / "held_out.jsonl",
        "reward": "rewards_of_tests:scripted",
        "gold-reward": "None",
        "max-prompt-length": 8,
        "max-new-tokens": 8,
        "batch-size": 4,
        "num-minibatches": 2,
        "learning-rate": 0.01,
        # Whatever a run adapts as it goes on must be there again after a resumption.
        "kl-target": 0.5,
        "kl-horizon": 5,
        "ref-ema-decay": 0.9,
        "scale-scores": True,
        "num-iterations": 6,
        "eval-every": 2,
        "save-every": 3,
    }
    words = (
        (f"--{name}",) if value is True else (f"--{name}", value)
        for name, value in settings.items()
    )
    return [str(word) for flag in words for word in flag]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, inputs: Path, flags: list[str]) -> Path:
    """The folder of a run that nothing interrupted."""
    from ppo_jax.train import main

    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(inputs))
        main([*flags, "--output-dir", str(folder)])
        sys.modules.pop("rewards_of_tests")
    return folder
