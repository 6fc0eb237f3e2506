"""A reward server: any process that answers one JSON request.

The client sends `POST` with

    {"prompts": [...], "completions": [...], "rows": [{...}, ...], "finish_reasons": [...]}

(lists of equal length; rows are the dataset's, finish reasons "eos", "stop" or "length"), and the
server answers with status 200 and

    {"rewards": [...], "components": {"name": [...], ...}}

where `"components"`, reported beside the reward, may be left out.
"""

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from qwen_env.arguments import finite, integer
from qwen_env.errors import RewardError, UsageError
from qwen_env.rewards.base import RewardBatch
from qwen_env.rewards.progress import with_progress

_WORTH_RETRYING = (408, 425, 429, 500, 502, 503, 504)


class HTTPReward:
    """Asks the reward server at `url`.

    Args:
        batch_size: rows per request.
        timeout: seconds to wait for an answer.
        retries: further attempts after a connection that failed, a timeout, or an answer that
            says "later" (429, 5xx); every other answer is final.
        backoff: seconds before the first further attempt; doubled before each next one.
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
        _check_url(url)
        self.url = url
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
        part = slice(start, start + self.batch_size)
        columns: dict[str, Sequence[Any]] = {
            "prompts": batch.prompts[part],
            "completions": batch.completions[part],
            "rows": batch.rows[part],
            "finish_reasons": batch.finish_reasons[part],
        }
        answer = self._post(json.dumps(columns).encode())
        rewards, components = None, None
        if isinstance(answer, dict):
            rewards, components = answer.get("rewards"), answer.get("components") or {}
        count = len(batch.prompts[part])

        def is_column(values: Any) -> bool:
            return isinstance(values, list) and len(values) == count

        if not (
            is_column(rewards)
            and isinstance(components, dict)
            and all(map(is_column, components.values()))
        ):
            raise RewardError(
                f"The reward server {self.url} must answer with an object whose 'rewards' are a "
                f"list of {count} numbers, as is each of its 'components', if it has any; it "
                f"answered {str(answer)[:200]}."
            )
        return {"rewards": rewards, "components": components}

    def _post(self, body: bytes) -> Any:
        request = urllib.request.Request(
            self.url, data=body, headers={"Content-Type": "application/json"}
        )
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                text = error.read(200).decode(errors="replace").strip()
                problem = f"answered {error.code} {error.reason}: {text}"
                if error.code not in _WORTH_RETRYING:
                    raise RewardError(f"The reward server {self.url} {problem}") from error
            except (OSError, http.client.HTTPException) as error:  # no connection, or a broken one
                problem = f"cannot be reached ({getattr(error, 'reason', error)})"
            except ValueError as error:
                raise RewardError(
                    f"The reward server {self.url} answered with something that is not JSON: "
                    f"{error}."
                ) from error
        raise RewardError(
            f"The reward server {self.url} {problem}, {self.retries + 1} times; "
            "start it, or raise timeout or retries."
        )


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_right = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and not re.search("[^!-~]", url)  # a space, or beyond ASCII
        )
    except (ValueError, AttributeError):  # no such port, no text
        is_right = False
    if not is_right:
        raise UsageError(
            f"the reward server is {url!r}; write it as 'http://HOST:PORT/PATH', percent-encoded."
        )
