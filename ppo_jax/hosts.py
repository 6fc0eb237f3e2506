"""Several processes, on one host or many, that run the same program on devices of their own.

JAX's runtime (`jax.distributed`) brings them together: a computation on arrays of all devices is
started by every process. What they have to say to each other beside arrays, such as scores, errors
and whether to stop, passes through its key-value store, as JSON.

What only some processes meet would leave the others waiting in a computation. So whatever may fail
on one of them goes through `together` or `on_first`, which raise on all; what fails elsewhere, and
a process that dies, is noticed by a thread that every process has, which ends it with a sentence.

Alone, a process says nothing to itself: everything here then changes nothing.
"""

import ctypes
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import jax
from flax import nnx
from jax._src import distributed
from jax.experimental import multihost_utils

from qwen_env.errors import (
    InteractionError,
    RewardError,
    RunError,
    UsageError,
    UserFacingError,
    reason,
)

Tree = TypeVar("Tree")
Network = TypeVar("Network", bound=nnx.Module)
Item = TypeVar("Item")

JOIN_WITHIN = 180  # seconds that processes may start apart
_DEAD_AFTER = 60.0  # seconds without a sign of life
_PERIOD = 1.0  # seconds between signs of life
_GRACE = 5.0  # seconds in which a process may end by itself once another has failed

_KEYS = "ppo_jax"
_numbers = itertools.count()
_agreed: list[BaseException] = []  # errors that every process raises
_leaving = threading.Event()  # this process ends by itself
_handlers: list[Any] = []  # of SIGABRT; C knows them, and Python must not forget them
_AGAIN = "Start all of them again with --resume."


def asked_for() -> bool:
    """Whether the environment says that this process is one of several."""
    sizes = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
    return (
        any(os.environ.get(name, "1") not in ("", "0", "1") for name in sizes)
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or "JAX_COORDINATOR_ADDRESS" in os.environ
    )


@contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Within the block, this process is one of several, if it is told so or the environment says.

    Before JAX has started. What the arguments leave out, the environment says (SLURM, Open MPI,
    Cloud TPU, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID).

    Raises:
        UsageError: the arguments do not fit together, or the others cannot be reached.
    """
    given = {"num_processes": num_processes, "process_id": process_id}
    if coordinator is None and not asked_for():
        for name, value in given.items():
            if value is not None:
                raise UsageError(
                    f"{name} is {value}, but nothing says where the other processes meet; add "
                    "--coordinator HOST:PORT, of process 0."
                )
        yield
        return
    _join(coordinator, num_processes, process_id)
    threading.Thread(target=_watch, daemon=True).start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit) and not is_everywhere(error):
            with suppress(Exception):
                _runtime().client.key_value_set(f"{_KEYS}/failed/{_own()}", _sentence(error))
            _say_and_leave(error)
        raise
    finally:
        _leaving.set()
        with suppress(Exception):
            jax.distributed.shutdown()


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None and (text := os.environ.get("JAX_NUM_PROCESSES")):
        num_processes = int(text)
    if process_id is None and (text := os.environ.get("JAX_PROCESS_ID")):
        process_id = int(text)
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise UsageError(f"coordinator is {coordinator!r}; it must be HOST:PORT, of process 0.")
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise UsageError(
            f"process_id is {process_id}, but there are {num_processes} processes, numbered from 0."
        )
    others = f"{num_processes} processes" if num_processes else "other processes"
    alone = (
        f"Process {process_id} found no {others} at {coordinator} within {JOIN_WITHIN} s; check "
        "that process 0 runs there, that the port is open, and that every process has a number of "
        "its own."
    )
    _say_at_abort(alone)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=JOIN_WITHIN,
            shutdown_timeout_seconds=30,
        )
    except ValueError as error:
        raise UsageError(
            f"The environment does not say how to find the other processes ({reason(error)}); name "
            "them with --coordinator HOST:PORT --num-processes N --process-id I."
        ) from error
    except RuntimeError as error:
        raise UsageError(alone) from error
    _say_at_abort(
        "JAX has ended this process, and says why above: most often another process is gone. "
        f"{_AGAIN}"
    )


def _say_at_abort(sentence: str) -> None:
    """Let a sentence be the last that a process says which JAX's runtime aborts, and 2 its status.

    It does that when process 0 is gone or was never there, from a thread of its own, in which no
    handler of Python's `signal` would run.
    """
    if os.name == "nt":
        return

    def leave(_: int) -> None:
        _leave(sentence)

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(leave))
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _handlers[-1])


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return _own() == 0


def together(function: Callable[[], Any]) -> list[Any]:
    """What `function` returns on each process, in their order; an error on one is one on all.

    Args:
        function: its result can be written as JSON.

    Raises:
        UserFacingError: another process has failed; the sentence names it.
    """
    if _count() == 1:
        return [function()]
    error: BaseException | None = None
    try:
        message = {"result": function()}
    except BaseException as raised:
        error, message = raised, {"error": _sentence(raised), "kind": _kind(raised)}
    answers = _exchange(message)
    if error is None:
        failed = [(i, answer) for i, answer in enumerate(answers) if "error" in answer]
        if not failed:
            return [answer["result"] for answer in answers]
        number, answer = failed[0]
        error = _KINDS[answer["kind"]](f"Process {number}: {answer['error']}")
    _agreed.append(error)
    raise error


def on_first(function: Callable[[], Any]) -> Any:
    """What `function` returns on the first process, on all; only there it is called.

    Raises:
        UserFacingError: as in `together`.
    """
    return together(lambda: function() if is_first() else None)[0]


def any_of(value: bool) -> bool:
    """Whether it is true on one of the processes."""
    return any(together(lambda: bool(value)))


def own_part(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part of what all have: the parts are as large as each other, or nearly."""
    count, index = _count(), _own()
    return items[index * len(items) // count : (index + 1) * len(items) // count]


def check_alike(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Check that all processes say the same.

    Args:
        facts: by what messages call them; JSON.

    Raises:
        UsageError: they do not; on all processes. Or as in `together`.
    """
    first, *others = together(lambda: dict(facts()))
    for number, other in enumerate(others, 1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                error = UsageError(
                    f"Process {number} has {name} {other.get(name)!r}, but process 0 has "
                    f"{first.get(name)!r}; start all of them with the same."
                )
                _agreed.append(error)
                raise error


def fetch(tree: Tree) -> Tree:
    """Arrays of all devices as NumPy arrays, on every process."""
    if _count() == 1:
        fetched: Tree = jax.device_get(tree)
        return fetched
    gathered: Tree = multihost_utils.process_allgather(tree, tiled=True)
    return gathered


def whole(network: Network) -> Network:
    """A network whose arrays every process has all of, so that the first one can write it."""
    if _count() == 1:
        return network
    graphdef, arrays = nnx.split(network)
    # One at a time, since some devices may not hold them all.
    merged: Network = nnx.merge(graphdef, jax.tree.map(fetch, arrays))
    return merged


def is_everywhere(error: BaseException) -> bool:
    """Whether all processes raise this error, or what it came from, so that all can go on alike."""
    chain: BaseException | None = error
    while chain is not None:
        if _count() == 1 or any(chain is other for other in _agreed):
            return True
        chain = chain.__cause__
    return False


_KINDS: dict[str, type[UserFacingError]] = {
    kind.__name__: kind for kind in (UsageError, RewardError, InteractionError, RunError)
}


def _kind(error: BaseException) -> str:
    kinds = [name for name, kind in _KINDS.items() if isinstance(error, kind)]
    return kinds[0] if kinds else RunError.__name__


def _sentence(error: BaseException) -> str:
    if isinstance(error, UserFacingError):
        return str(error)
    return f"{type(error).__name__}: {reason(error)}"


def _runtime() -> Any:
    """What `jax.distributed.initialize` has made; JAX has no public name for it.

    It starts no devices, as `jax.process_count` would.
    """
    return distributed.global_state


def _count() -> int:
    return int(_runtime().num_processes)


def _own() -> int:
    return int(_runtime().process_id)


def _exchange(message: Any) -> list[Any]:
    """The messages of all processes. It may wait for long: `_watch` ends it if one is gone."""
    client, number = _runtime().client, next(_numbers)
    own = f"{_own()}"
    client.key_value_set_bytes(f"{_KEYS}/{number}/{own}", json.dumps(message).encode())
    answers = []
    for process in range(_count()):
        while True:
            try:
                key = f"{_KEYS}/{number}/{process}"
                answers.append(json.loads(client.blocking_key_value_get_bytes(key, 10_000)))
                break
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
    if number > 1:  # all have read it: they have sent the one after it
        client.key_value_delete(f"{_KEYS}/{number - 2}/{own}")
    return answers


def _watch() -> None:
    """Give signs of life, and end this process when another gives none, or says that it failed."""
    client, own = _runtime().client, _own()
    seen = {f"{i}": ("", time.monotonic()) for i in range(_count())}
    for number in itertools.count():
        if _leaving.wait(_PERIOD):
            return
        try:
            client.key_value_set(f"{_KEYS}/alive/{own}", str(number), allow_overwrite=True)
            failed = client.key_value_dir_get(f"{_KEYS}/failed/")
            signs = client.key_value_dir_get(f"{_KEYS}/alive/")
        except jax.errors.JaxRuntimeError as error:
            if not _leaving.wait(_GRACE):
                _leave(f"Process 0 is gone ({reason(error)}). {_AGAIN}")
            return
        now = time.monotonic()
        for key, sentence in failed:
            name = key.rpartition("/")[2]
            if name != str(own):
                if not _leaving.wait(_GRACE):
                    _leave(f"Process {name} has failed: {sentence.rstrip('.')}. {_AGAIN}")
                return
        signs_of = {key.rpartition("/")[2]: sign for key, sign in signs}
        for name, (sign, since) in seen.items():
            if signs_of.get(name, "") != sign:
                seen[name] = signs_of[name], now
            elif now - since > _DEAD_AFTER:
                _leave(
                    f"Process {name} has given no sign of life for {_DEAD_AFTER:.0f} s. {_AGAIN}"
                )


def _say_and_leave(error: BaseException) -> None:
    """End a process that has failed alone, once the others had time to hear of it."""
    import traceback

    if not isinstance(error, UserFacingError | SystemExit | KeyboardInterrupt):
        traceback.print_exception(error)
    _leaving.set()
    if is_first():  # where the others hear it from
        print(f"error: {_sentence(error)}", file=sys.stderr, flush=True)
        time.sleep(_GRACE + 2 * _PERIOD)
        os._exit(2)
    _leave(_sentence(error))


def _leave(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(2)
