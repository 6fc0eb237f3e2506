"""What a user's `package.module:attribute` names, imported."""

import os
import sys
from importlib import import_module
from typing import Any

from qwen_env.errors import UsageError


def import_attribute(kind: str, module_name: str, attribute: str, hint: str = "") -> Any:
    """The attribute of a module; the current directory is importable.

    Args:
        kind: what it is to be, for messages ("reward").
        hint: goes before the last words where there is no such module.

    Raises:
        UsageError: no such module, or it has no such attribute.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    name = f"{kind} {module_name}:{attribute}"
    if module_name.startswith("."):
        raise UsageError(f"{name}: name the module in full, without leading dots.")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise UsageError(
            f"{name}: there is no module {module_name!r}; {hint}it is looked for among the "
            "installed packages and in the current directory."
        ) from error
    if not hasattr(module, attribute):
        raise UsageError(f"{name}: {module_name} has no callable {attribute!r}.")
    return getattr(module, attribute)
