"""The commands of the README and of docs/ are ones that the entry points understand."""

import re
import shlex
from pathlib import Path

import pytest

from ppo_jax import evaluate, generate, inspect, reward_model, sft, train

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRY_POINTS = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "inspect": inspect,
    "sft": sft,
    "reward_model": reward_model,
}
NAME = re.compile(
    r"(?:ppo-|python -m ppo_jax\.)(train|evaluate|generate|inspect|sft|reward[-_]model) "
)


def commands(page: Path) -> list[str]:
    """The lines of shell blocks, and the code inside of sentences, that start an entry point."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return [line for line in lines if NAME.match(line)]


COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_understood(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = NAME.match(command)
    assert name is not None
    # The runs are not there; --help ends the program.
    for entry_point in (evaluate, generate):
        monkeypatch.setattr(entry_point, "named_run", lambda argv: None)
    words = shlex.split(command[name.end() :], comments=True)
    argv = [word for word in words if word not in ("--resume", "--help")]
    ENTRY_POINTS[name[1].replace("-", "_")].parse_arguments(argv)


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) >= 15
