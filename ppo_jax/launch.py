"""How a command begins: Ctrl-C ends it in silence while Python imports what it needs.

That takes seconds, in which Python would answer with a traceback, and some libraries with errors of
their own. So each command starts here, where nothing is imported yet, and leaves Ctrl-C to the
system until its `main` can answer with a sentence.
"""

import signal
from importlib import import_module


def train() -> None:
    """`ppo-train`"""
    _start("ppo_jax.train")


def evaluate() -> None:
    """`ppo-evaluate`"""
    _start("ppo_jax.evaluate")


def generate() -> None:
    """`ppo-generate`"""
    _start("ppo_jax.generate")


def sweep() -> None:
    """`ppo-sweep`"""
    _start("ppo_jax.sweep")


def inspect() -> None:
    """`ppo-inspect`"""
    _start("ppo_jax.inspect")


def frontier() -> None:
    """`ppo-frontier`"""
    _start("ppo_jax.frontier")


def sft() -> None:
    """`ppo-sft`"""
    _start("ppo_jax.sft")


def reward_model() -> None:
    """`ppo-reward-model`"""
    _start("ppo_jax.reward_model")


def _start(module: str) -> None:
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # otherwise it is ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = import_module(module).main
    signal.signal(signal.SIGINT, before)
    main()
