"""The front door: what is public, and that importing it changes nothing for others."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from types import ModuleType

import pytest

import ppo_jax
import qwen_env

LOOK = """
import json, os, sys
before = dict(os.environ)
import ppo_jax, qwen_env
loaded = sorted({"jax", "flax", "transformers", "torch"} & set(sys.modules))
for name in ppo_jax.__all__:
    getattr(ppo_jax, name)
import jax
precision = jax.config.values["jax_default_matmul_precision"]
print(json.dumps([os.environ == before, loaded, precision]))
"""


def test_importing_changes_nothing_for_others() -> None:
    """No flag of XLA, no setting of JAX; and JAX is loaded only when a name needs it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    printed = subprocess.check_output([sys.executable, "-c", LOOK], env=environment, text=True)
    assert json.loads(printed) == [True, [], None]


@pytest.mark.parametrize("package", [ppo_jax, qwen_env])
def test_what_is_public(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert package.__version__ == version("qwen-ppo-jax")


def test_nothing_else_is_public() -> None:
    assert dir(ppo_jax) == sorted(ppo_jax.__all__)
    homes = {getattr(ppo_jax, name).__module__ for name in ppo_jax._HOMES}
    assert all(home.startswith("ppo_jax.") for home in homes)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'ppo_jax' has no attribute 'Agent'"):
        ppo_jax.Agent  # noqa: B018
