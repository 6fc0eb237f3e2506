"""Tools: Python functions that the policy calls in Qwen's format.

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "6 * 7"}}
    </tool_call>

What a function returns is answered as a `tool` message, and so is what was wrong with a call. A
turn without a call is the policy's answer, and ends the episode.
"""

import ast
import contextlib
import inspect
import io
import json
import operator
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwen_env.arguments import finite, integer
from qwen_env.concurrency import call_each
from qwen_env.errors import UsageError
from qwen_env.interaction import Reply, Turn, TurnBatch

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: Mapping[str, Any]


class Tools:
    """An interaction that runs the calls of `functions`.

    Args:
        functions: with types, and docstrings in Google's style that describe their arguments: both
            are what the policy is told. Their results are JSON; they should change nothing.
        timeout: seconds that a call may take; the policy is told if it takes longer.
        at_once: the most calls that run side by side.
        longest_result: characters of a result that the policy is told.

    Raises:
        UsageError: a function has no name, or two have one.
    """

    def __init__(
        self,
        *functions: Callable[..., Any],
        timeout: float = 10.0,
        at_once: int = 16,
        longest_result: int = 2000,
    ):
        self.timeout = finite("timeout", timeout)
        self.at_once = integer("at_once", at_once, at_least=1)
        self.longest_result = integer("longest_result", longest_result, at_least=1)
        self.functions: dict[str, Callable[..., Any]] = {}
        for function in functions:
            name = getattr(function, "__name__", None)
            if not callable(function) or not name or name in self.functions:
                raise UsageError(
                    f"the tool {function!r} has no name of its own; give functions with names that "
                    "differ."
                )
            self.functions[name] = function

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What a chat template is told, as a row's `"tools"`.

        Raises:
            UsageError: a function has no types, or a docstring that does not describe them.
        """
        from transformers.utils.chat_template_utils import get_json_schema

        schemas = []
        for name, function in self.functions.items():
            try:
                schemas.append(get_json_schema(function))
            except Exception as error:  # of several types, some without a common one
                raise UsageError(f"the tool {name} cannot be described: {error}") from error
        return schemas

    def reply(self, batch: TurnBatch) -> list[Reply]:
        """The results of all the calls in each turn, in order."""
        answers = [self._parsed(turn) for turn in batch]
        calls = [part for parts in answers for part in parts if isinstance(part, _Call)]
        results = iter(call_each(_run, calls, at_once=self.at_once, timeout=self.timeout))
        replies = []
        for parts in answers:
            texts = [self._text(next(results)) if isinstance(p, _Call) else p for p in parts]
            messages = [{"role": "tool", "content": text} for text in texts]
            replies.append(Reply(messages=messages) if messages else Reply(done=True))
        return replies

    def _parsed(self, turn: Turn) -> list[str | _Call]:
        """The calls in a turn, or in the place of one what is wrong with it."""
        return [self._parsed_call(*match.groups()) for match in _CALL.finditer(turn.completion)]

    def _parsed_call(self, text: str, end: str) -> str | _Call:
        if not end:
            return "Error: the call has no </tool_call> at its end."
        try:
            call = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"Error: the call is not JSON: {error}."
        if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
            return 'Error: a call is an object {"name": ..., "arguments": {...}}.'
        function = self.functions.get(str(call.get("name")))
        if function is None:
            return (
                f"Error: there is no tool {call.get('name')!r}; there is {_listed(self.functions)}."
            )
        try:
            inspect.signature(function).bind(**call["arguments"])
        except TypeError as error:
            return f"Error: {call['name']}: {error}."
        return _Call(function, call["arguments"])

    def _text(self, result: Any) -> str:
        if isinstance(result, BaseException):
            text = f"Error: {type(result).__name__}: {result}"
        elif isinstance(result, str):
            text = result
        else:
            try:
                text = json.dumps(result)
            except (TypeError, ValueError, RecursionError) as error:
                text = f"Error: the tool's result is no JSON: {error}"
        text = text[: self.longest_result]
        return text if text.strip() else "(nothing)"


def _run(call: _Call) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # what it prints is nobody's
        return call.function(**call.arguments)


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names)) or "none"


_OPERATORS: dict[type[ast.operator | ast.unaryop], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_LONGEST_EXPRESSION = 200  # characters
_MOST_BITS = 2048  # of a power


def calculator(expression: str) -> int | float:
    """Compute an arithmetic expression.

    Args:
        expression: numbers, + - * / // % ** and parentheses, for example "(12 + 7) * 3".
    """
    if not isinstance(expression, str) or len(expression) > _LONGEST_EXPRESSION:
        raise ValueError(f"an expression is text of at most {_LONGEST_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    return _value(tree.body)


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        number: int | float = node.value  # type: ignore[assignment]
        return number
    if isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) in _OPERATORS:
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        values = [_value(part) for part in parts]
        if isinstance(node.op, ast.Pow):
            base, exponent = values
            if abs(exponent) * max(int(abs(base)).bit_length(), 1) > _MOST_BITS:
                raise ValueError("the power is too large")
        result = _OPERATORS[type(node.op)](*values)
        if isinstance(result, complex):
            raise ValueError("the power is no real number")
        return result  # type: ignore[no-any-return]
    raise ValueError("only numbers, + - * / // % ** and parentheses are computed")


_LIMITED = """
import resource, sys
seconds, memory, size = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
exec(compile(sys.stdin.read(), "<code>", "exec"), {"__name__": "__main__"})
"""


def python_tool(
    *, allow_code_execution: bool = False, seconds: int = 5, megabytes: int = 512
) -> Callable[[str], str]:
    """A tool that runs Python programs of the policy's, each in a process of its own.

    The process has limits of time, memory and the size of files, an empty folder of its own, and
    none of this process's environment. It is no sandbox: it may read this machine's files and use
    its network. Only run it where a program that you have not read may do so.

    Raises:
        UsageError: `allow_code_execution` is not True.
    """
    if allow_code_execution is not True:
        raise UsageError(
            "python_tool runs programs that a model wrote; pass allow_code_execution=True where "
            "these may do whatever they like."
        )
    seconds = integer("seconds", seconds, at_least=1)
    limits = (seconds, integer("megabytes", megabytes, at_least=1) * 2**20, 2**20)

    def python(code: str) -> str:
        """Run a Python program.

        Args:
            code: the program; what it prints is the result.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "output")
            with output.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _LIMITED, *map(str, limits)],
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env={},
                    start_new_session=True,
                )
                try:
                    process.communicate(code.encode(errors="replace"), timeout=seconds + 1)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
            if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
                raise TimeoutError(f"it took more than {seconds} s")
            return output.read_text(errors="replace").strip()

    return python
