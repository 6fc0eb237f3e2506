"""Command-line flags from dataclasses.

A field is a flag of its own name, the text below the field its help, a field that holds a dataclass
a group of flags. `argparse` reads them; the dataclasses check what they are given.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from ppo_jax.config.fields import without_none
from qwen_env.errors import UsageError

Arguments = TypeVar("Arguments")

_OTHER_NAMES = {
    "bs": "--batch-size",
    "beta": "--kl-coef",
    "data": "--prompts",
    "dataset": "--prompts",
    "epochs": "--num-epochs (over a batch) or --num-prompt-epochs (over the prompts)",
    "lr": "--learning-rate",
    "max-length": "--max-prompt-length or --max-new-tokens",
    "name": "--output-dir",
    "output": "--output-dir",
    "steps": "--num-iterations",
    "tensorboard": "nothing: tensorboard/ in --output-dir is always written",
    "report-to": "--log-to",
    "wandb": "--log-to wandb",
}
"""What other programs call a flag, and what it is here."""


def positional(metavar: str) -> Any:
    """A field of texts that follow without a flag."""
    return dataclasses.field(default=(), metadata={"positional": metavar})


def hidden(default: Any) -> Any:
    """A field without a flag."""
    return dataclasses.field(default=default, metadata={"hidden": True})


def parse(
    default: Arguments, argv: Sequence[str], *, prog: str, about: str | None = None
) -> Arguments:
    """`default`, an instance of a dataclass, with what the flags in `argv` say instead.

    A dataclass may say in `replaces` which of its other fields a flag that changes something makes
    None, where these are not given as well.

    Args:
        about: what the program does, for `--help`; None takes it from the dataclass's docstring.

    Raises:
        UsageError: an unknown flag, a flag without its value, or a value that cannot be.
        SystemExit: after `--help`, which prints the flags and their defaults.
    """
    description = about or inspect.getdoc(type(default)) or ""
    parser = _Parser(
        prog=prog,
        description=description.split("\n\n")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given is not there
    )
    _add_flags(parser, default)
    # --output_dir and --output-dir are one flag; what follows -- is none.
    end = argv.index("--") if "--" in argv else len(argv)
    flags = [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), w) for w in argv[:end]]
    given: Arguments = _with_values(default, vars(parser.parse_args([*flags, *argv[end:]])))
    return given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """What `argparse` would print after its usage, as one sentence."""
        flag = re.match(r"unrecognized arguments: --([\w-]+)", message)
        meant = self._meant(flag[1]) if flag else ""
        raise UsageError(f"{message[0].upper()}{message[1:]}{meant}; see {self.prog} --help.")

    def _meant(self, name: str) -> str:
        flags = [flag for flag in self._option_string_actions if not flag.startswith("--no-")]
        part_of = [flag for flag in flags if name in flag.removeprefix("--").split("-")]
        near = difflib.get_close_matches(f"--{name}", flags, n=2, cutoff=0.75)
        meant = _OTHER_NAMES.get(name, " or ".join(near or part_of[:2]))
        return f"; perhaps you meant {meant}" if meant else ""


def _add_flags(group: Any, settings: Any) -> None:
    """Add the flags of a dataclass, and a titled group for each that it holds."""
    docs, hints = field_docs(type(settings)), get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata.get("hidden"):
            continue
        if dataclasses.is_dataclass(value):
            title = (inspect.getdoc(type(value)) or "").split("\n")[0].rstrip(".")
            _add_flags(group.add_argument_group(title), value)
            continue
        text = " ".join(docs.get(field.name, "").split()).replace("%", "%%")
        flag = f"--{field.name.replace('_', '-')}"
        kind, is_optional = without_none(hints[field.name])
        if metavar := field.metadata.get("positional"):
            group.add_argument(field.name, nargs="*", metavar=metavar, help=text)
        elif kind is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, help=_with_default(text, value))
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]  # all are of one type
            names = get_args(item) if get_origin(item) is Literal else None
            shown = _with_default(
                text, None if value is None else " ".join(map(str, value)) or "none"
            )
            group.add_argument(
                flag,
                nargs="*",
                type=_converter(str if names else item, is_optional),
                choices=names,
                metavar="NAME" if names else item.__name__.upper(),
                help=shown,
            )
        else:
            choices = get_args(kind) if get_origin(kind) is Literal else None
            group.add_argument(
                flag,
                type=_converter(str if choices else kind, is_optional),
                choices=choices and (*choices, None) if is_optional else choices,
                metavar=None if choices else kind.__name__.upper(),
                help=_with_default(text, value),
            )


def _with_default(text: str, value: Any) -> str:
    shown = str(value).replace("%", "%%")
    return f"{text} (default: {shown})"


def _converter(kind: Any, is_optional: bool) -> Any:
    def convert(text: str) -> Any:
        return None if is_optional and text == "None" else kind(text)

    convert.__name__ = kind.__name__  # in argparse's messages
    return convert


def _with_values(settings: Any, values: dict[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _with_values(value, values)
        elif field.name in values:
            given = values[field.name]
            if isinstance(given, list):
                given = None if given == [None] else tuple(given)
            changes[field.name] = given
    for name, others in getattr(settings, "replaces", {}).items():
        if name in changes and changes[name] != getattr(settings, name):
            changes |= {other: None for other in others if other not in values}
    return dataclasses.replace(settings, **changes)


def field_docs(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, inherited ones included."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in pairwise(definition.body):
            match statement, following:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(doc))),
                ):
                    docs[name] = inspect.cleandoc(doc)
    return docs
