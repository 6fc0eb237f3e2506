"""Texts to learn from, as tokens: answers to prompts, and pairs of answers of which one was chosen.

A prompt is tokenised as the environment does it, and what the assistant says on its own, as a
policy would write it, up to its end-of-sequence token. So what is learnt is what PPO goes on with.
"""

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from qwen_env.errors import UsageError
from qwen_env.files import expand
from qwen_env.prompts import PromptEncoder, read_jsonl
from qwen_env.tokenizer.chat import Message


class Example(NamedTuple):
    """A text whose tokens are to be predicted, or only some of them."""

    prompt: str
    completion: str
    ids: np.ndarray  # int32 [length], prompt and completion
    is_learnt: np.ndarray  # bool [length]
    is_cut: bool = False


class Pair(NamedTuple):
    """Two answers to one prompt, of which people chose the first."""

    chosen: Example
    rejected: Example
    margin: float


Kind = TypeVar("Kind", Example, Pair)


@dataclass(frozen=True)
class ExampleEncoder:
    """Turns rows into examples and pairs.

    Args:
        prompts: tokenises prompts, and renders chats.
        max_length: longest text, in tokens; None sets no limit.
    """

    prompts: PromptEncoder
    max_length: int | None = None

    def example(self, row: Any, place: str) -> Example:
        """The text of a row with `"prompt"` and `"completion"`, or with `"messages"`.

        Args:
            place: the row's name in messages ("line 3 of data.jsonl").

        Raises:
            UsageError: the row is malformed, or nothing of it is left to learn.
        """
        _check_object(row, place, "'prompt' and 'completion', or 'messages'")
        if row.get("messages") is not None:
            example = self._chat(row, (), row["messages"], place, by_template=True)
        else:
            prompt, completion = _get(row, "prompt", place), _get(row, "completion", place)
            example = self._answered(row, prompt, completion, place, by_template=True)
        cut = self._cut(example, slice(self.max_length))
        if not cut.is_learnt[1:].any():  # nothing predicts the first token
            raise UsageError(
                f"{place}: nothing that is to be learnt lies within max_length "
                f"({self.max_length}); raise it, or leave that row out."
                if example.is_learnt[1:].any()
                else f"{place} holds no token that is to be learnt; leave that row out."
            )
        return cut

    def pair(self, row: Any, place: str, *, ends: Callable[[], bool] = lambda: True) -> Pair:
        """The texts of a row with `"chosen"` and `"rejected"` and, but for whole texts, `"prompt"`.

        Args:
            ends: whether an end-of-sequence token follows a plain text; asked for each.
            place: the row's name in messages.

        Raises:
            UsageError: the row is malformed, or there is no difference in it.
        """
        _check_object(row, place, "'prompt', 'chosen' and 'rejected'")
        prompt = row.get("messages") or row.get("prompt") or ""
        chosen, rejected = (
            self._cut(
                self._answered(row, prompt, _get(row, name, place), place, ends=ends),
                slice(None if self.max_length is None else -self.max_length, None),
            )
            for name in ("chosen", "rejected")
        )
        margin = row.get("margin") or 0.0
        is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
        if not (is_number and 0 <= margin < math.inf):
            raise UsageError(
                f"{place} has a 'margin' of {margin!r}; it must be a number of at least 0."
            )
        if _content(row["chosen"]) == _content(row["rejected"]):
            raise UsageError(
                f"{place}: 'chosen' and 'rejected' are the same, so nobody chose between them; "
                "leave that row out."
            )
        if np.array_equal(chosen.ids, rejected.ids):
            raise UsageError(
                f"{place}: 'chosen' and 'rejected' differ only beyond max_length "
                f"({self.max_length}); raise it, or leave that row out."
            )
        return Pair(chosen, rejected, float(margin))

    def _answered(
        self,
        row: Mapping[str, Any],
        prompt: Any,
        answer: Any,
        place: str,
        *,
        ends: Callable[[], bool] = lambda: True,
        by_template: bool = False,
    ) -> Example:
        if self.prompts.chat_template or isinstance(prompt, list) or isinstance(answer, list):
            before = [_said("user", prompt)] if isinstance(prompt, str) and prompt else prompt or ()
            after = [_said("assistant", answer)] if isinstance(answer, str) else answer
            return self._chat(row, before, after, place, by_template=by_template)
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise UsageError(
                f"{place} holds {reprlib.repr(prompt)} and {reprlib.repr(answer)}; both must be "
                "text, or lists of messages."
            )
        if not answer.strip():
            raise UsageError(f"{place} holds an empty answer; leave that row out.")
        tokenizer, eos_ids = self.prompts.tokenizer, self.prompts.tokenizer.eos_token_ids
        try:
            ids = tokenizer.encode(answer)
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from error
        if eos_ids and ends() and ids[-1] not in eos_ids:
            ids = [*ids, eos_ids[0]]
        before_ids = (
            self.prompts.encode({"prompt": prompt}, 0, place).ids.tolist()  # type: ignore[union-attr]
            if prompt
            else list(tokenizer.prefix_ids)
        )
        return _example(prompt, answer, [(before_ids, False), (ids, True)])

    def _chat(
        self,
        row: Mapping[str, Any],
        before: Any,
        after: Any,
        place: str,
        *,
        by_template: bool,
    ) -> Example:
        """A chat, of which the assistant's turns in `after` are learnt."""
        for part in (before, after):
            if not isinstance(part, Sequence) or not all(isinstance(x, Mapping) for x in part):
                raise UsageError(
                    f"{place} holds {reprlib.repr(part)}; a chat is a list of messages with 'role' "
                    "and 'content'."
                )
        messages = [*before, *after]
        turns = [
            i
            for i in range(max(len(before), 1), len(messages))
            if messages[i].get("role") == "assistant"
        ]
        if not turns:
            raise UsageError(
                f"{place}: the assistant answers nothing in this chat, so there is nothing to "
                "learn; leave that row out."
            )
        for i in turns:
            if not (str(messages[i].get("content") or "").strip() or messages[i].get("tool_calls")):
                raise UsageError(
                    f"{place}: message {i}, the assistant's, is empty; leave that row out."
                )
        try:
            marks = self._by_template(row, messages) if by_template and not before else None
            segments = self._by_rendering(row, messages, turns) if marks is None else marks
            encode = self.prompts.tokenizer.encode
            parts = [(encode(text), is_learnt) for text, is_learnt in segments]
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from error
        prompt = "".join(text for text, _ in segments[:-1])
        return _example(prompt, segments[-1][0], parts)

    def _by_template(
        self, row: Mapping[str, Any], messages: Sequence[Message]
    ) -> list[tuple[str, bool]] | None:
        """The text in segments, and which the template marks as generated; None without marks."""
        own = self.prompts.chat_template
        template = own if isinstance(own, str) else self.prompts.tokenizer.chat_template
        if template is None or not (marked := _with_marks(template)):
            return None
        renderer = replace(self.prompts, chat_template=marked)
        text = renderer.render(row, messages, add_generation_prompt=False)
        segments: list[tuple[str, bool]] = []
        for part in text.split(_OPEN):
            generated, is_closed, rest = part.partition(_CLOSE)
            pieces = ((generated, True), (rest, False)) if is_closed else ((generated, False),)
            segments += [(piece, is_learnt) for piece, is_learnt in pieces if piece]
        while segments and not segments[-1][1]:  # nothing is learnt from there on
            segments.pop()
        if not segments:
            raise UsageError("the chat template marks nothing of this chat as generated")
        return segments

    def _by_rendering(
        self, row: Mapping[str, Any], messages: Sequence[Message], turns: Sequence[int]
    ) -> list[tuple[str, bool]]:
        """The text in segments: what stands before each turn, as the environment would render it,
        and what the assistant says, up to the end of sequence."""
        segments: list[tuple[str, bool]] = []
        for i in turns:
            head = self.prompts.render(row, messages[:i], add_generation_prompt=True)
            whole = self.prompts.render(row, messages[: i + 1], add_generation_prompt=False)
            if not whole.startswith(head):
                raise UsageError(
                    f"the chat template writes message {i} otherwise than behind its prompt, so "
                    "nobody can tell what the assistant is to write; use another"
                )
            said = self._up_to_end(whole[len(head) :])
            known = "".join(text for text, _ in segments)
            if head.startswith(known):
                segments += [(head[len(known) :], False), (said, True)]
            else:  # the template writes earlier turns otherwise now: they are only read
                segments = [(head, False), (said, True)]
        return segments

    def _up_to_end(self, text: str) -> str:
        """What the assistant writes itself; behind its end of sequence, the template goes on."""
        tokenizer = self.prompts.tokenizer
        names = [tokenizer.backend.id_to_token(i) for i in tokenizer.eos_token_ids]
        ends = [text.rfind(name) + len(name) for name in names if name and name in text]
        if ends:
            return text[: max(ends)]
        return text.rstrip("\n") + (names[0] or "" if names else "")

    def _cut(self, example: Example, kept: slice) -> Example:
        ids = example.ids[kept]
        is_cut = len(ids) < len(example.ids)
        return example._replace(ids=ids, is_learnt=example.is_learnt[kept], is_cut=is_cut)


def load_examples(
    source: str | Path | Sequence[Any], encode: Callable[[Any, str], Kind]
) -> list[Kind]:
    """All rows of a .jsonl file, or of a list, encoded.

    Raises:
        UsageError: a row is wrong (named by file and line, or by index), or there are none.
    """
    rows: Iterator[tuple[str, Any]]
    if isinstance(source, str | Path):
        name, rows = str(source), read_jsonl(expand(source))
    else:
        name, rows = "data", ((f"data[{i}]", row) for i, row in enumerate(source))
    examples = [encode(row, place) for place, row in rows]
    if not examples:
        raise UsageError(f"{name} holds no rows.")
    return examples


def set_apart(examples: list[Kind], name: str) -> tuple[list[Kind], list[Kind]]:
    """All but the last tenth, and that tenth.

    Raises:
        UsageError: there is only one.
    """
    if len(examples) < 2:
        raise UsageError(
            f"{name} holds one row, so none can be held out; add rows, or name others with "
            "--eval-data."
        )
    count = max(len(examples) // 10, 1)
    return examples[:-count], examples[-count:]


_OPEN, _CLOSE = "\ue000generated-1c9f5e\ue001", "\ue001generated-1c9f5e\ue000"


def _with_marks(template: str) -> str | None:
    """A chat template that writes marks where it says that generation begins and ends.

    Each tag becomes two block tags with a mark between them, so that white space around it is kept
    or trimmed as before. None where there are no such tags.
    """
    for tag, mark in (("generation", _OPEN), ("endgeneration", _CLOSE)):
        pattern = re.compile(rf"\{{%([-+]?)\s*{tag}\s*([-+]?)%\}}")
        if not pattern.search(template):
            return None
        template = pattern.sub(rf"{{%\1 if true %}}{{{{ '{mark}' }}}}{{% endif \2%}}", template)
    return template


def _example(prompt: str, completion: str, parts: Sequence[tuple[list[int], bool]]) -> Example:
    ids = np.concatenate([np.asarray(part, np.int32) for part, _ in parts])
    is_learnt = np.concatenate([np.full(len(part), learnt) for part, learnt in parts])
    return Example(prompt, completion, ids, is_learnt)


def _check_object(row: Any, place: str, keys: str) -> None:
    if not isinstance(row, Mapping):
        raise UsageError(f"{place} is a {type(row).__name__}; it must be an object with {keys}.")


def _get(row: Mapping[str, Any], name: str, place: str) -> Any:
    if row.get(name) is None:
        raise UsageError(
            f"{place} has no {name!r}; its keys are {', '.join(map(repr, row)) or 'none'}."
        )
    return row[name]


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _content(answer: Any) -> Any:
    return answer.strip() if isinstance(answer, str) else answer
