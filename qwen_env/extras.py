"""Optional packages, imported where they are needed."""

from importlib import import_module
from types import ModuleType

from gymnasium.error import DependencyNotInstalled


def import_extra(module: str, package: str) -> ModuleType:
    """Import `module`, which `package` installs.

    Raises:
        DependencyNotInstalled: it is not installed; the message has the pip command.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DependencyNotInstalled(
            f"{module} is not installed; run: pip install {package}"
        ) from error
