"""A reward server: any process that answers one JSON request.

The client sends `POST` with

    {"prompts": [...], "completions": [...], "rows": [{...}, ...], "finish_reasons": [...]}

(lists of equal length; rows are the dataset's, finish reasons those of the environment). Where
there are several turns, there is also `"messages"`, each row's whole conversation. The
server answers with status 200 and

    {"rewards": [...], "components": {"name": [...], ...}}

where `"components"`, reported beside the reward, may be left out. What JSON lacks, NaN in a row for
instance, is sent as null.
"""

import base64
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urljoin

import numpy as np
import urllib3

from qwen_env.arguments import finite, integer
from qwen_env.errors import RewardError, UsageError, reason
from qwen_env.printing import printable
from qwen_env.rewards.addresses import Address, parse_address, redacted
from qwen_env.rewards.base import RewardBatch, describe, row_name
from qwen_env.rewards.http_post import Answer, post
from qwen_env.rewards.progress import with_progress

_WORTH_RETRYING = (408, 425, 429, 500, 502, 503, 504)
_MOST_REDIRECTS = 5
_LONGEST_PAUSE = 60.0  # seconds, whatever the server asks for
_LARGEST_ANSWER = 64 * 2**20  # bytes
_SHOWN = 200  # characters of what a server says


class HTTPReward:
    """Asks the reward server at `url`.

    Args:
        url: `http://HOST:PORT/PATH`, or `https://...`. A user and a password
            (`http://USER:PASSWORD@HOST/...`) are sent, and shown nowhere.
        batch_size: rows per request.
        timeout: seconds to wait for a whole answer.
        retries: further attempts after a connection that failed or broke, a timeout, or an answer
            that says "later" (429, 5xx); every other answer is final.
        backoff: seconds before the first further attempt; doubled before each next one, and longer
            where the server asks for it (Retry-After). No pause is longer than a minute.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 64,
        timeout: float = 30.0,
        retries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        self._address = parse_address(url)
        self.url = self._address.url
        self.batch_size = integer("batch_size", batch_size, at_least=1)
        self.timeout = finite("timeout", timeout)
        self.retries = integer("retries", retries, at_least=0)
        self.backoff = finite("backoff", backoff)
        if self.timeout <= 0 or self.backoff < 0:
            raise UsageError(
                f"timeout is {timeout} and backoff {backoff}; they are seconds, the first above 0, "
                "the second at least 0."
            )

    def __call__(self, batch: RewardBatch) -> tuple[list[Any], dict[str, list[Any]]]:
        """The N rewards, and the components that the server names; `score` checks the values.

        Raises:
            RewardError: the server cannot be reached, or its answer is not of the form above.
        """
        starts = range(0, len(batch), self.batch_size)
        answers = [self._ask(batch, start) for start in with_progress(starts, "reward server")]
        rewards = [reward for answer in answers for reward in answer["rewards"]]
        names = answers[0]["components"] if answers else {}
        if any(answer["components"].keys() != names.keys() for answer in answers):
            raise RewardError(
                f"The reward server {self.url} answered with components that differ from batch to "
                "batch; it must name the same ones in every answer."
            )
        return rewards, {
            name: [value for answer in answers for value in answer["components"][name]]
            for name in names
        }

    def _ask(self, batch: RewardBatch, start: int) -> dict[str, Any]:
        part = range(start, min(start + self.batch_size, len(batch)))
        answer = self._parsed(self._post(_request(batch, part)))
        rewards, components = None, None
        if isinstance(answer, dict):
            rewards, components = answer.get("rewards"), answer.get("components") or {}

        def is_column(values: Any) -> bool:
            return isinstance(values, list) and len(values) == len(part)

        if not (
            is_column(rewards)
            and isinstance(components, dict)
            and all(map(is_column, components.values()))
        ):
            raise RewardError(
                f"The reward server {self.url} must answer with an object whose 'rewards' are a "
                f"list of {len(part)} numbers, as is each of its 'components', if it has any; it "
                f"answered {_shown(answer)}."
            )
        return {"rewards": rewards, "components": components}

    def _parsed(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RewardError(
                f"The reward server {self.url} answered with something that is not JSON: "
                f"{_shown(error)}."
            ) from error

    def _post(self, body: bytes) -> bytes:
        """The body of the server's answer with status 200, asked for until it comes."""
        pause = 0.0
        for attempt in range(self.retries + 1):
            time.sleep(pause)
            pause = min(self.backoff * 2**attempt, _LONGEST_PAUSE)
            try:
                answer = self._follow(body)
            except (urllib3.exceptions.HTTPError, TimeoutError) as error:
                problem = f"gives no answer ({_shown(reason(_root(error)))})"
                continue
            except OverflowError as error:
                raise RewardError(f"The reward server {self.url}: {error}.") from error
            if answer.status == 200:
                return answer.body
            said = answer.body.decode(errors="replace").strip()
            problem = f"answered {answer.status} {_shown(answer.reason)}: {_shown(said)}"
            if answer.status not in _WORTH_RETRYING:
                raise RewardError(f"The reward server {self.url} {problem}")
            pause = min(max(pause, _asked_for(answer)), _LONGEST_PAUSE)
        times = f"{self.retries + 1} times" if self.retries else "once"
        raise RewardError(
            f"The reward server {self.url} {problem}, {times}; start it, or raise timeout or "
            "retries."
        )

    def _follow(self, body: bytes) -> Answer:
        """The answer, from wherever the server has it repeat the request."""
        address, deadline = self._address, time.monotonic() + self.timeout
        for _ in range(_MOST_REDIRECTS + 1):
            headers = {"Content-Type": "application/json"}
            # A password is for the server that it was given for.
            if self._address.credentials and address.origin == self._address.origin:
                headers["Authorization"] = _basic(*self._address.credentials)
            seconds = max(deadline - time.monotonic(), 1e-3)
            answer = post(address.url, body, headers, seconds=seconds, largest=_LARGEST_ANSWER)
            location = answer.headers.get("Location")
            if not (300 <= answer.status < 400 and location):
                return answer
            address = self._moved(address, answer.status, location)
        raise RewardError(
            f"The reward server {self.url} redirects more than {_MOST_REDIRECTS} times, at last to "
            f"{_shown(address.url)}; name the address that answers."
        )

    def _moved(self, address: Address, status: int, location: str) -> Address:
        """The next address. What is not 307 or 308 would have a POST become a GET."""
        moved = urljoin(address.url, location)
        if status in (307, 308):
            try:
                return parse_address(moved)
            except UsageError:
                pass
        raise RewardError(
            f"The reward server {self.url} answered {status}: it has moved to "
            f"{_shown(redacted(moved))}; name that address, if it is the reward server's."
        )


def _request(batch: RewardBatch, part: range) -> bytes:
    """The rows of `part` as JSON."""
    columns: dict[str, Sequence[Any]] = {
        "prompts": [batch.prompts[row] for row in part],
        "completions": [batch.completions[row] for row in part],
        "rows": [_plain(batch.rows[row]) for row in part],
        "finish_reasons": [batch.finish_reasons[row] for row in part],
    }
    if batch.has_turns:
        columns["messages"] = [_plain(batch.messages[row]) for row in part]
    try:
        return json.dumps(columns, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        for index, row in enumerate(part):
            try:
                json.dumps([column[index] for column in columns.values()])
            except (TypeError, ValueError, RecursionError):
                raise RewardError(
                    f"{row_name(batch, row)} cannot be sent to a reward server: {describe(error)}."
                ) from error
        raise


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays become lists; NaN and infinities null."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(of_place) for of_place in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(text: object) -> str:
    """What a server says, as a message may show it."""
    return printable(" ".join(str(text).split())[:_SHOWN])


def _root(error: BaseException) -> BaseException:
    """What lies at the bottom of an error of urllib3, which wraps it in others."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _asked_for(answer: Answer) -> float:
    """The pause in seconds that the server asks for, 0 where it asks for none that makes sense."""
    try:
        wish = answer.headers.get("Retry-After")
        return 0.0 if wish is None else urllib3.Retry().parse_retry_after(wish)
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return 0.0


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
