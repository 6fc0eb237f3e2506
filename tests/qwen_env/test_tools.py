import json
import time

import pytest

from qwen_env.concurrency import call_each
from qwen_env.errors import UsageError
from qwen_env.interaction import TurnBatch, ask
from qwen_env.tools import Tools, calculator, python_tool


def turns(*completions):
    count = len(completions)
    return TurnBatch(completions, [[1]] * count, [[]] * count, [{}] * count, *[[1] * count] * 3)


def call(name, **arguments):
    text = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{text}\n</tool_call>"


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    print("this goes nowhere")
    return a + b


def broken(how: str) -> object:
    """Fail.

    Args:
        how: in which way.
    """
    if how == "slow":
        time.sleep(2)
    if how == "no JSON":
        return {1, 2}
    if how == "nothing":
        return ""
    if how == "long":
        return "x" * 5000
    raise ValueError(f"I am {how}")


def answers(tools, completion):
    (reply,) = ask(tools, turns(completion))
    assert not reply.goes_on or {m["role"] for m in reply.messages} == {"tool"}
    return [m["content"] for m in reply.messages] if reply.goes_on else None


def test_what_is_called_is_answered(capsys):
    tools = Tools(add, calculator)
    assert answers(tools, f"Let me see. {call('add', a=2, b=3)}") == ["5"]
    assert answers(tools, call("add", a=1, b=1) + call("calculator", expression="7 * 6")) == [
        "2",
        "42",
    ]
    assert answers(tools, "It is 5.") is None, "an answer ends the episode"
    replies = ask(tools, turns(call("add", a=1, b=1), "2", call("add", a=2, b=2)))
    assert [reply.goes_on for reply in replies] == [True, False, True]
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<tool_call>{}", "Error: the call has no </tool_call> at its end."),
        ("<tool_call>add(1)</tool_call>", "Error: the call is not JSON: Expecting value"),
        ("<tool_call>[1]</tool_call>", "Error: a call is an object"),
        ('<tool_call>{"name": "add"}</tool_call>', "Error: a call is an object"),
        (call("sub", a=1), "Error: there is no tool 'sub'; there is 'add', 'broken'."),
        (call("add", a=1), "Error: add: missing a required argument: 'b'."),
        (call("add", a=1, b=2, c=3), "Error: add: got an unexpected keyword argument 'c'."),
        (call("add", a=1, b="x"), "Error: TypeError: unsupported operand"),
        (call("broken", how="ill"), "Error: ValueError: I am ill"),
        (call("broken", how="no JSON"), "Error: the tool's result is no JSON: "),
        (call("broken", how="nothing"), "(nothing)"),
        (call("broken", how="slow"), "Error: TimeoutError: it took more than 0.5 s"),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(completion, answer):
    (said,) = answers(Tools(add, broken, timeout=0.5), completion)
    assert said.startswith(answer)


def test_long_results_are_cut():
    assert answers(Tools(broken, longest_result=9), call("broken", how="long")) == ["x" * 9]


def test_what_the_policy_is_told_of_a_tool():
    (schema,) = Tools(add).schemas
    assert schema["function"]["name"] == "add"
    assert schema["function"]["parameters"]["properties"]["a"]["type"] == "integer"
    with pytest.raises(UsageError, match=r"the tool .* cannot be described"):
        _ = Tools(call).schemas


def test_names_differ():
    with pytest.raises(UsageError, match="has no name of its own"):
        Tools(add, add)
    with pytest.raises(UsageError, match="has no name of its own"):
        Tools(3)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1+2)*3", 9),
        ("-7 // 2", -4),
        ("2**10", 1024),
        ("7 / 2", 3.5),
        (" 5%3 ", 2),
    ],
)
def test_arithmetic(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "a",
        "[1][0]",
        "(lambda: 1)()",
        "1 if 1 else 2",
        "'a' * 9",
        "True + 1",
        "1j",
        "9**9**9",
        "2**9999",
        "(-1)**0.5",
        "1;2",
        "",
        "(" * 150 + ")" * 49,
        "1 + " * 100 + "1",
        "1 < 2",
        "1 << 100",
        "f'{1}'",
    ],
)
def test_nothing_but_arithmetic(expression):
    with pytest.raises(ValueError, match=r"\w"):
        calculator(expression)


class TestPython:
    def test_it_needs_a_word(self):
        with pytest.raises(UsageError, match=r"allow_code_execution=True"):
            python_tool()

    def test_it_runs_programs_within_limits(self):
        python = python_tool(allow_code_execution=True, seconds=2, megabytes=256)
        assert python("print(6 * 7)") == "42"
        assert "ZeroDivisionError" in python("1 / 0")
        assert "MemoryError" in python("x = bytearray(10**9)")
        assert python("import os; print(sorted(set(os.environ) - {'LC_CTYPE'}))") == "[]"
        assert len(python("while True: print('x' * 1000)")) <= 2**20
        with pytest.raises(TimeoutError, match="more than 2 s"):
            python("import time; time.sleep(60)")

    def test_a_busy_loop_ends(self):
        python = python_tool(allow_code_execution=True, seconds=1)
        with pytest.raises(TimeoutError, match="more than 1 s"):
            python("while True: pass")


class TestSideBySide:
    def test_threads_and_coroutines_keep_the_order(self):
        import asyncio

        async def later(x):
            await asyncio.sleep(0.2)
            return -x

        def slow(x):
            time.sleep(0.2)
            return -x

        for function in (slow, later):
            start = time.perf_counter()
            assert call_each(function, range(20), at_once=20, timeout=5) == [-x for x in range(20)]
            assert time.perf_counter() - start < 2

    def test_failures_stay_with_their_item(self):
        import asyncio

        async def coroutine(x):
            await asyncio.sleep(9 if x == 2 else 0)
            return 1 / x

        def thread(x):
            time.sleep(1 if x == 2 else 0)
            return 1 / x

        for function in (coroutine, thread):
            zero, one, late = call_each(function, [0, 1, 2], at_once=2, timeout=0.3)
            assert isinstance(zero, ZeroDivisionError) and one == 1
            assert isinstance(late, TimeoutError) and "0.3 s" in str(late)
