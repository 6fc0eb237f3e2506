"""What a run keeps of single tokens: a record of `tokens.jsonl` for the first iteration, and for
each that is evaluated.

    iteration
    batch       score, length, kl of all B episodes, each a list [B]
    episodes    a few of them, from the lowest score to the highest, each with
        prompt, prompt_ids              texts and ids of its tokens
        text, ids                       of the response's, n of them
        own                             [n] 1 where the policy chose the token, 0 where a reply is;
                                        only where there are replies
        logprob entropy kl ratio value advantage reward     numbers [n]
        alternatives                    [n] lists of [text, log-probability]
        finish_reason, score, components

Log-probability, entropy, value and alternatives are those of the policy that wrote the responses;
kl is log π - log π_ref; ratio is the probability after the update over the one before it. A
character of several tokens is the text of the last of them.
"""

import codecs
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from qwen_env.episodes import Episode, Outcome
from qwen_env.errors import UsageError
from qwen_env.tokenizer import Tokenizer
from qwen_env.tokenizer.token_bytes import special_tokens, token_bytes

NUMBERS = ("logprob", "entropy", "kl", "ratio", "value", "advantage", "reward")
_DIGITS = 4  # significant ones


def rows_to_keep(scores: np.ndarray, count: int) -> np.ndarray:
    """int [count or fewer]: rows at even steps from the lowest score [B] to the highest."""
    order = np.argsort(scores, kind="stable")
    ranks = np.linspace(0, len(order) - 1, min(count, len(order)))
    rows: np.ndarray = order[ranks.round().astype(int)]
    return rows


def tokens_record(
    iteration: int,
    tokenizer: Tokenizer,
    rows: np.ndarray,
    episodes: Sequence[Episode],
    outcomes: Sequence[Outcome],
    numbers: tuple[Any, Any, Any],
) -> dict[str, Any]:
    """The record of an iteration.

    Args:
        rows: of the K episodes that are kept, of the B there are.
        numbers: `learning.batch.TokenNumbers` of all B, and of the K a `learning.inspection.Look`
            before and one after the update.
    """
    tokens, before, after = numbers
    kl = tokens.logprobs - tokens.ref_logprobs

    def kept(row: int, place: int) -> dict[str, Any]:
        episode, outcome = episodes[row], outcomes[row]
        prompt_ids, ids = episode.prompt.ids.tolist(), episode.response_ids.tolist()
        texts = pieces(tokenizer, [*prompt_ids, *ids])
        steps = slice(len(ids))
        own = np.ones(len(ids), bool) if episode.own is None else episode.own
        # Elsewhere a token may be one that the policy cannot choose.
        new, old = (np.where(own, x.logprobs[place, steps], 0.0) for x in (after, before))
        columns = {
            "logprob": tokens.logprobs[row],
            "entropy": tokens.entropy[row],
            "kl": kl[row],
            "ratio": np.exp(new - old),
            **({} if tokens.values is None else {"value": tokens.values[row]}),
            "advantage": tokens.advantages[row],
            "reward": tokens.rewards[row],
        }
        likely = zip(
            before.alternatives[place, steps].tolist(),
            before.alternative_logprobs[place, steps].tolist(),
            strict=True,
        )
        return {
            "prompt": texts[: len(prompt_ids)],
            "prompt_ids": prompt_ids,
            "text": texts[len(prompt_ids) :],
            "ids": ids,
            **({} if episode.own is None else {"own": episode.own.astype(int).tolist()}),
            **{name: _rounded(column[steps]) for name, column in columns.items()},
            "alternatives": [
                [
                    [pieces(tokenizer, [i])[0], _round(x)]
                    for i, x in zip(alternatives, logprobs, strict=True)
                    if np.isfinite(x)
                ]
                for alternatives, logprobs in likely
            ],
            "finish_reason": episode.finish_reason,
            "score": outcome.reward,
            "components": outcome.info["reward_components"],
        }

    return {
        "iteration": iteration,
        "batch": {
            "score": _rounded([outcome.reward for outcome in outcomes]),
            "length": [len(episode.completion_ids) for episode in episodes],
            "kl": _rounded(kl.sum(axis=1)),
        },
        "episodes": [kept(row, place) for place, row in enumerate(rows.tolist())],
    }


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token; of a character that several tokens make, the last one's."""
    bytes_of, special = _texts(tokenizer)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [special.get(i) or decoder.decode(bytes_of(i)) for i in ids]
    if texts and (rest := decoder.decode(b"", final=True)):
        texts[-1] += rest
    return texts


@lru_cache(maxsize=2)
def _texts(tokenizer: Tokenizer) -> tuple[Callable[[int], bytes], Mapping[int, str]]:
    """What gives a token's bytes, and the names of special ones."""
    special = special_tokens(tokenizer.backend)
    try:
        table = token_bytes(tokenizer.backend)
    except UsageError:  # of a kind whose tokens have other text beside other tokens
        return (lambda i: tokenizer.decode([i]).encode()), special
    return (lambda i: table.get(i, b"")), special


def _rounded(numbers: Any) -> list[float | None]:
    return [_round(x) for x in np.asarray(numbers).tolist()]


def _round(x: float) -> float | None:
    """None for what JSON does not have."""
    return float(f"{x:.{_DIGITS}g}") if math.isfinite(x) else None
