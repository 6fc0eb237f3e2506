"""Where prompts come from: a jsonl file, a list, or a dataset, tokenised and checked once."""

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np

from qwen_env.arguments import integer, one_of
from qwen_env.errors import UsageError
from qwen_env.tokenizer import Tokenizer

Overflow = Literal["error", "drop", "truncate_left"]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    `text` is what was tokenised (a chat is already rendered), `ids` int32 [length] its tokens,
    `row` the source's row with all its columns, `index` its number in the source, or -1 if it came
    with the options of a reset.
    """

    text: str
    ids: np.ndarray
    row: Mapping[str, Any]
    index: int

    def info(self) -> dict[str, Any]:
        """What the environments say about it at reset."""
        return {"prompt": self.text, "prompt_index": self.index}


@dataclass(frozen=True)
class PromptEncoder:
    """Turns a row with `"prompt"` (text) or `"messages"` (a chat) into a `Prompt`.

    `chat_template` decides how: `None` renders chats with the tokenizer's template and takes text
    as it is; `True`, or a template, also wraps text as a user's message; `False` takes no chats.
    `chat_template_kwargs` are variables for the template; a row may have some of its own under
    that name. `system_prompt` goes before every chat that has no system message of its own.
    `overflow` says what to do with a prompt of more than `max_prompt_length` tokens: refuse it,
    drop it, or cut off its left end.

    Raises:
        UsageError: a field is wrong.
    """

    tokenizer: Tokenizer
    max_prompt_length: int
    overflow: Overflow = "error"
    chat_template: bool | str | None = None
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        limit = integer("max_prompt_length", self.max_prompt_length, at_least=1)
        object.__setattr__(self, "max_prompt_length", limit)  # small NumPy integers overflow
        one_of("prompt_overflow", self.overflow, get_args(Overflow))
        template = self.chat_template
        if not (template is None or isinstance(template, bool | str)) or template == "":
            raise UsageError(
                f"chat_template is {reprlib.repr(template)}; it must be None, True, False, or a "
                "template."
            )
        if not isinstance(self.system_prompt, str | None):
            raise UsageError(
                f"system_prompt is {reprlib.repr(self.system_prompt)}; it must be text, or None."
            )
        if self.chat_template_kwargs is not None:
            _check_variables(self.chat_template_kwargs, "chat_template_kwargs")

    def encode(self, row: Mapping[str, Any] | str, index: int, place: str) -> Prompt | None:
        """The prompt of `row`, or None where `overflow` drops it.

        Args:
            place: the row's name in messages ("line 3 of prompts.jsonl").

        Raises:
            UsageError: the row has no prompt, an empty one, or one over the limit.
        """
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, Mapping):
            raise UsageError(
                f"{place} is a {type(row).__name__}; it must be text, or an object with "
                "'prompt' or 'messages'."
            )
        text = self._text(row, place)
        try:
            ids = np.array(self.tokenizer.encode(text), np.int32)
        except TypeError as error:  # what the Rust library says of half a surrogate pair
            raise UsageError(f"{place} holds a prompt that is not valid Unicode text.") from error
        if not len(ids):
            raise UsageError(f"{place} holds an empty prompt; a prompt needs at least one token.")
        excess = len(ids) - self.max_prompt_length
        if excess > 0:
            if self.overflow == "drop":
                return None
            if self.overflow == "error":
                raise UsageError(
                    f"{place} holds a prompt of {len(ids)} tokens, over the limit of "
                    f"{self.max_prompt_length}; raise max_prompt_length, or set prompt_overflow "
                    "to 'drop' or 'truncate_left'."
                )
            ids = ids[excess:]
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return Prompt(text, ids, dict(row), index)

    def _text(self, row: Mapping[str, Any], place: str) -> str:
        if row.get("messages") is not None:
            messages = row["messages"]
            if self.chat_template is False:
                raise UsageError(
                    f"{place} holds chat messages, but chat_template is False; leave it out to "
                    "use the tokenizer's template."
                )
        elif isinstance(prompt := row.get("prompt"), str):
            if not self.chat_template:
                if self.system_prompt is not None:
                    raise UsageError(
                        f"{place} is plain text, which takes no system_prompt; set chat_template "
                        "to True to make it a user's message."
                    )
                return prompt
            messages = [{"role": "user", "content": prompt}]
        elif "prompt" in row:
            raise UsageError(
                f"{place} has a 'prompt' that is {reprlib.repr(prompt)}; it must be text (a chat "
                "goes under 'messages')."
            )
        else:
            raise UsageError(
                f"{place} has neither 'prompt' (text) nor 'messages' (a list); its keys are "
                f"{', '.join(map(repr, row)) or 'none'}."
            )
        of_the_row = row.get("chat_template_kwargs") or {}
        _check_variables(of_the_row, f"chat_template_kwargs of {place}")
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                system_prompt=self.system_prompt,
                chat_template=self.chat_template if isinstance(self.chat_template, str) else None,
                **{**(self.chat_template_kwargs or {}), **of_the_row},
            )
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from error


def _check_variables(variables: Any, name: str) -> None:
    if not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
        raise UsageError(
            f"{name} is {reprlib.repr(variables)}; it must be an object with names as keys."
        )
    for taken in ("messages", "system_prompt", "chat_template", "template", "self"):
        if taken in variables:
            raise UsageError(f"{name} holds {taken!r}, which is set elsewhere; leave it out.")


class PromptDataset(Sequence[Prompt]):
    """Prompts, ready to be sampled; `num_dropped` others were too long. Immutable."""

    def __init__(self, prompts: Iterable[Prompt], num_dropped: int = 0) -> None:
        self._prompts = tuple(prompts)
        self.num_dropped = num_dropped

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "PromptDataset": ...
    def __getitem__(self, index: int | slice) -> "Prompt | PromptDataset":
        if isinstance(index, slice):
            return PromptDataset(self._prompts[index])
        return self._prompts[index]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptDataset":
        return self  # immutable, and it can be large

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)


def load_prompts(source: Any, encoder: PromptEncoder) -> PromptDataset:
    """Read, tokenise and check all the prompts of `source`.

    Args:
        source: the path of a `.jsonl` file, or an iterable (a list, a `datasets.Dataset`) of
            texts or of rows; a row has `"prompt"` (text) or `"messages"` (a chat), and its other
            columns reach the reward function. A `PromptDataset` is taken as it is.

    Raises:
        UsageError: a row is wrong (named by file and line, or by index), or there are no prompts.
    """
    if isinstance(source, PromptDataset):
        longest = max((len(prompt.ids) for prompt in source), default=0)
        if longest > encoder.max_prompt_length:
            raise UsageError(
                f"prompts holds a prompt of {longest} tokens, over the limit of "
                f"{encoder.max_prompt_length}; raise max_prompt_length."
            )
        return source
    if isinstance(source, str | Path):
        name, rows = str(source), _read_jsonl(Path(source).expanduser())
    elif isinstance(source, Set):
        raise UsageError("prompts is a set, whose order no seed can reproduce; sort it.")
    elif type(source).__name__ == "DataFrame":  # whose items are its columns
        raise UsageError("prompts is a DataFrame; give its rows, as df.to_dict('records') does.")
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        name, rows = "prompts", ((f"prompts[{i}]", row) for i, row in enumerate(source))
    else:
        raise UsageError(
            f"prompts is a {type(source).__name__}; give the path of a .jsonl file, a list of "
            "texts or rows, or a datasets.Dataset."
        )
    encoded = [encoder.encode(row, index, place) for index, (place, row) in enumerate(rows)]
    kept = [prompt for prompt in encoded if prompt is not None]
    dataset = PromptDataset(kept, num_dropped=len(encoded) - len(kept))
    if not dataset:
        limit = f" of at most {encoder.max_prompt_length} tokens"
        raise UsageError(f"{name} holds no prompts{limit if encoder.overflow == 'drop' else ''}.")
    return dataset


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row, after its name in messages. Blank lines are skipped."""
    if not path.exists():
        raise UsageError(
            f"{path}: no such file; a string names a .jsonl file of prompts, a list holds texts."
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a .jsonl file of prompts.")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"line {number} of {path}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield place, json.loads(text)
            except UnicodeDecodeError as error:
                raise UsageError(f"{place} is not UTF-8 text: {error}.") from error
            except ValueError as error:
                raise UsageError(f"{place} is not JSON: {error}.") from error
