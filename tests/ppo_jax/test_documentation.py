"""The commands of the README and of docs/ are ones that the entry points understand."""

import re
import shlex
from pathlib import Path

import pytest

from ppo_jax import cli, evaluate, generate
from ppo_jax.train import parse_arguments

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """The lines of shell blocks, and the code inside of sentences, that start an entry point."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return [line for line in lines if line.startswith("python -m ppo_jax.")]


COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_understood(page: str, command: str) -> None:
    _, _, module, *argv = shlex.split(command, comments=True)
    # A resumed run must be there; --help ends the program.
    argv = [word for word in argv if word not in ("--resume", "--help")]
    if module == "ppo_jax.train":
        parse_arguments(argv)
    else:
        entry_point = {"ppo_jax.evaluate": evaluate, "ppo_jax.generate": generate}[module]
        cli.parse(entry_point.Arguments, argv, prog=entry_point.PROG)


def test_the_commands_are_found() -> None:
    """As many as pages mention, bare names of modules aside."""
    mentions = sum(len(re.findall(r"python -m ppo_jax\.", page.read_text())) for page in PAGES)
    assert len(COMMANDS) == mentions >= 15
