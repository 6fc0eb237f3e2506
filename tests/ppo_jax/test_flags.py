"""Flags from dataclasses."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from ppo_jax import evaluate, flags, generate, train
from ppo_jax.config import preset
from qwen_env.errors import UsageError


@dataclass(frozen=True)
class Size:
    """How large it is."""

    width: int = 3
    """How wide, in %."""
    height: float | None = None
    """How high; None for any height."""


@dataclass(frozen=True)
class LargerSize(Size):
    """How large it is, in three dimensions."""

    depth: int = 1
    """How deep."""


@dataclass(frozen=True)
class Flags:
    """Does a thing.

    Not part of the help.
    """

    texts: tuple[str, ...] = flags.positional("TEXT")
    """What to do it to."""
    folder: Path = Path("here")
    """Where."""
    kind: Literal["a", "b"] = "a"
    """Which one."""
    max_loops: int = 2
    """How often."""
    sizes: tuple[int, ...] = ()
    """How many of each."""
    ends: tuple[float, float] | None = (0.0, 1.0)
    """Where it begins and ends."""
    loud: bool = False
    """Say it aloud."""
    secret: str = flags.hidden("x")
    size: LargerSize = field(default_factory=LargerSize)


def parse(*argv: str) -> Flags:
    return flags.parse(Flags(), argv, prog="thing")


def test_flags_over_defaults() -> None:
    assert parse() == Flags()
    default = Flags(kind="b", secret="y", size=LargerSize(depth=7))
    assert flags.parse(default, ["--width", "4"], prog="thing") == Flags(
        kind="b", secret="y", size=LargerSize(width=4, depth=7)
    )


def test_values_have_the_types_of_their_fields() -> None:
    given = parse("one", "two", "--folder", "there", "--loud", "--height=2", "--max_loops", "-3")
    size = LargerSize(height=2.0)
    assert given == Flags(("one", "two"), Path("there"), "a", -3, loud=True, size=size)
    assert parse("--ends", "0.5", "2").ends == (0.5, 2.0)
    assert parse("--ends", "None").ends is None
    assert parse("--sizes", "3", "4").sizes == (3, 4)
    assert parse("--height", "None", "--no-loud") == Flags()
    assert parse("--folder", "a_b", "--", "--c_d").texts == ("--c_d",)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--widht", "4"], "Unrecognized arguments: --widht; perhaps you meant --width; see"),
        (["--loops", "4"], "Unrecognized arguments: --loops; perhaps you meant --max-loops; see"),
        (["--lr", "4"], "Unrecognized arguments: --lr; perhaps you meant --learning-rate; see"),
        (["--secret", "4"], "Unrecognized arguments: --secret; see"),
        (["--width", "four"], "Argument --width: invalid int value: 'four'; see"),
        (["--width"], "Argument --width: expected one argument; see"),
        (["--kind", "c"], "Argument --kind: invalid choice: 'c' (choose from"),
        (["--wid", "4"], "Unrecognized arguments: --wid;"),  # no flag by its beginning
    ],
)
def test_wrong_flags_are_one_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(*argv)
    message = str(error.value)
    assert message.startswith(sentence)
    assert message.endswith("; see thing --help.")
    assert "\n" not in message


def test_help_has_every_flag_under_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert exit.value.code in (0, None)
    words = " ".join(capsys.readouterr().out.split())
    assert "Does a thing." in words
    assert "Not part of the help" not in words
    group = words[words.index("How large it is, in three dimensions:") :]
    for text in (
        "How wide, in %. (default: 3)",
        "How high; None for any",
        "How deep. (default: 1)",
    ):
        assert text in group
    assert "Where it begins and ends. (default: 0.0 1.0)" in words
    assert "secret" not in words


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", "--learning-rate"),
        ("steps", "--num-iterations"),
        ("epochs", "--num-epochs"),
        ("wandb", "--log-to wandb"),
        ("seeds", "--seed"),
        ("iterations", "--num-iterations"),
    ],
)
def test_flags_of_other_programs_deserve_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"perhaps you meant .*{meant}"):
        train.parse_arguments([f"--{name}", "3"])


def test_what_is_suggested_exists() -> None:
    config = preset("pocket")
    known = {
        f"--{part.name.replace('_', '-')}"
        for group in (config.task, config.ppo, config.optimizer, config.run)
        for part in fields(group)
    } | {"--output-dir"}
    for meant in flags._OTHER_NAMES.values():
        named = {word for word in meant.split() if word.startswith("--")}
        assert named and named <= known


@pytest.mark.parametrize("entry_point", [train, evaluate, generate])
def test_every_flag_of_a_command_is_explained(
    entry_point: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a sentence that begins with a capital letter and ends with a full stop."""
    with pytest.raises(SystemExit):
        entry_point.parse_arguments(["--help"])  # type: ignore[attr-defined]
    capsys.readouterr()
    groups = [entry_point.Arguments]  # type: ignore[attr-defined]
    while groups:
        kind = groups.pop()
        docs = flags.field_docs(kind)
        for part in fields(kind):
            if hasattr(part.type, "__dataclass_fields__"):
                groups.append(part.type)
            elif not part.metadata.get("hidden"):
                assert docs[part.name][0].isupper() or docs[part.name][0] in "λβ", part.name
                assert docs[part.name].endswith("."), part.name
