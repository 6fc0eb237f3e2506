"""Slow calls side by side, each with a time limit."""

import asyncio
import inspect
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any


def call_each(
    function: Callable[[Any], Any], items: Sequence[Any], *, at_once: int, timeout: float
) -> list[Any]:
    """`function(item)` of every item, or the exception that it raised, in order.

    A coroutine function runs in an event loop, any other in threads. What takes longer than
    `timeout` seconds becomes a `TimeoutError`. A coroutine is then cancelled; a thread cannot be:
    it goes on in vain, and another takes its place.

    Args:
        at_once: the most calls that are under way.
    """
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  (of an instance)
    ):
        return _in_a_thread(
            lambda: asyncio.run(_call_each_async(function, items, at_once, timeout))
        )
    slots = threading.Semaphore(at_once)
    results: list[Any] = [None] * len(items)

    def call(i: int, item: Any) -> None:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=lambda: answers.put(_outcome(function, item)), daemon=True).start()
        try:
            results[i] = answers.get(timeout=timeout)
        except queue.Empty:
            results[i] = TimeoutError(f"it took more than {timeout:g} s")
        finally:
            slots.release()

    waiting = []
    for i, item in enumerate(items):
        slots.acquire()
        waiting.append(threading.Thread(target=call, args=(i, item), daemon=True))
        waiting[-1].start()
    for thread in waiting:
        thread.join()
    return results


def _outcome(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except BaseException as error:
        return error


async def _call_each_async(
    function: Callable[[Any], Any], items: Sequence[Any], at_once: int, timeout: float
) -> list[Any]:
    slots = asyncio.Semaphore(at_once)

    async def call(item: Any) -> Any:
        async with slots:
            try:
                return await asyncio.wait_for(function(item), timeout)
            except TimeoutError:
                return TimeoutError(f"it took more than {timeout:g} s")

    return await asyncio.gather(*map(call, items), return_exceptions=True)


def _in_a_thread(function: Callable[[], list[Any]]) -> list[Any]:
    """In a thread of its own, since a notebook's has an event loop already."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(
        target=lambda: answers.put(_outcome(lambda _: function(), None)), daemon=True
    ).start()
    result = answers.get()
    if isinstance(result, BaseException):
        raise result
    results: list[Any] = result
    return results
