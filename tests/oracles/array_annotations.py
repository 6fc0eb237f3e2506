"""The type checker that pytest gives to jaxtyping's import hook (`addopts` in `pyproject.toml`).

While tests run, every array that goes into or comes out of a function of the packages has the
shape and type that the function's annotation says, and one letter is one number throughout a call.
As everywhere in JAX, NumPy's arrays pass for JAX's. Other annotations are mypy's to check: tests
hand over what they forbid, to see it refused. A test that hands over an array of a wrong shape, for
the same reason, calls `inspect.unwrap(function)`.
"""

from collections.abc import Callable
from typing import Any, Union, get_args

import jax
import numpy as np
from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which refuses arguments and results that its array annotations do not allow."""
    function.__annotations__ = {
        name: hint if name == "return" else _with_numpy(hint)
        for name, hint in function.__annotations__.items()
        if _is_of_arrays(hint)
    }
    return beartype(function)


def _is_of_arrays(hint: Any) -> bool:
    return _is_array(hint) or any(_is_of_arrays(part) for part in get_args(hint))


def _with_numpy(hint: Any) -> Any:
    """`Float[Array, "B T"] | None`, say, with `Float[np.ndarray, "B T"]` as well."""
    parts = [part for part in (hint, *get_args(hint)) if _is_array(part)]
    numpys = [
        part.dtype[np.ndarray, part.dim_str] for part in parts if part.array_type is jax.Array
    ]
    return Union[(hint, *numpys)]


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)
