"""What pages say of the code is there: names that they write out, files, shapes of arrays."""

import importlib
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from jaxtyping import AbstractArray

from ppo_jax.generation.rollout import Rollout
from ppo_jax.learning.batch import Batch, Controls
from ppo_jax.learning.response_outputs import ResponseOutputs
from qwen_env.mdp import State

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "notebooks" / "README.md",
]
PAGES.remove(ROOT / "CHANGELOG.md")  # it names what was removed as well
of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_in(page: Path) -> list[str]:
    """What stands between backticks in sentences and tables."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`]+)`", prose)


def resolve(name: str) -> Any:
    """What a dotted name is of: a module, what a module holds, or a field or method of a class."""
    first, *rest = name.split(".")
    found: Any = importlib.import_module(first)
    for part in rest:
        if hasattr(found, part):
            found = getattr(found, part)
        elif isinstance(found, type):
            found = get_type_hints(found)[part]
        else:
            found = importlib.import_module(f"{found.__name__}.{part}")
    return found


@of_pages
def test_every_dotted_name_is_there(page):
    names = {code.split("(")[0] for code in code_in(page)} | set(
        re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
    )
    for name in names:
        if re.fullmatch(r"(ppo_jax|qwen_env)(\.\w+)*", name):
            resolve(name)


@of_pages
def test_every_file_is_there(page):
    for path in code_in(page):
        if re.fullmatch(r"(ppo_jax|qwen_env|tests|docs|notebooks|tools|benchmarks)/[\w./]*", path):
            assert (ROOT / path).exists(), path


def test_the_table_of_arrays_is_as_the_code_says():
    """Names and order of the axes, and the type, of every array in the picture of an iteration."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| ([^|]*) \| (\w+) \|", page, re.MULTILINE)
    classes = {c.__name__: c for c in (State, Rollout, ResponseOutputs, Batch, Controls)}
    for owner, name, shape, dtype in rows:
        hint = get_type_hints(classes[owner])[name]
        arrays = [part for part in (hint, *get_args(hint)) if is_array(part)]
        if owner == "State":  # whose functions are written for NumPy as well
            assert name in State._fields
            continue
        (array,) = arrays
        assert array.dim_str == shape.strip(), f"{owner}.{name}"
        assert dtype in array.dtype.dtypes, f"{owner}.{name}"
    assert {f"{owner}.{name}" for owner, name, *_ in rows} >= {
        *(f"State.{name}" for name in State._fields),
        *(f"ResponseOutputs.{name}" for name in ResponseOutputs._fields),
    }


def is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


@of_pages
def test_every_test_that_is_named_is_there(page):
    names = set(re.findall(r"\btest_\w+(?!\w*\.py)", " ".join(code_in(page))))
    names -= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert names <= set(re.findall(r"def (test_\w+)", tests))
