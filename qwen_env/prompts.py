"""Where prompts come from: a jsonl file, a list, or a dataset, tokenised and checked once."""

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np

from qwen_env.arguments import integer, one_of
from qwen_env.errors import UsageError, reason
from qwen_env.files import DuplicateKey, expand, json_error, kind_of, unique_keys
from qwen_env.tokenizer import Tokenizer
from qwen_env.tokenizer.chat import ARGUMENTS_OF_OUR_OWN, Message

Overflow = Literal["error", "drop", "truncate_left"]

_CHAT_COLUMNS = ("messages", "tools", "chat_template_kwargs")
_OPEN_FILES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


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

    Text is encoded as `tokenizer(text)` of transformers encodes it, with the beginning-of-sequence
    token where the model expects one, and chats as its `apply_chat_template` does.

    `chat_template` decides how: `None` renders chats with the tokenizer's template and takes text
    as it is; `True`, or a template, or the name of one of the tokenizer's, also wraps text as a
    user's message; `False` takes no chats. `chat_template_kwargs` are arguments of
    `apply_chat_template`: `documents`, `continue_final_message`, variables for the template; a row
    may have some of its own under that name, and its tools under `"tools"`. `system_prompt` goes
    before every chat that has no system message of its own. `overflow` says what to do with a
    prompt of more than `max_prompt_length` tokens: refuse it, drop it, or cut off its left end, up
    to the next whole character.

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
            _check_arguments(self.chat_template_kwargs, "chat_template_kwargs")

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
        text, prefix = self._text(row, place)
        try:
            ids, are_all = self.tokenizer.encode_end(text, max(self.max_prompt_length, 1) + 1)
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from error
        if not ids:
            raise UsageError(f"{place} holds an empty prompt; a prompt needs at least one token.")
        if are_all and tuple(ids[: len(prefix)]) == prefix:
            ids = ids[len(prefix) :]  # the text has it already
        length = len(prefix) + len(ids)
        if length > self.max_prompt_length:
            if self.overflow == "drop":
                return None
            if self.overflow == "error":
                raise UsageError(
                    f"{place} holds a prompt of {'' if are_all else 'at least '}{length} tokens, "
                    f"over the limit of {self.max_prompt_length}; raise max_prompt_length, or set "
                    "prompt_overflow to 'drop' or 'truncate_left'."
                )
            text, ids = self._right_end(text, ids, self.max_prompt_length - len(prefix), place)
        return Prompt(text, np.array([*prefix, *ids], np.int32), dict(row), index)

    def _right_end(
        self, text: str, ids: list[int], length: int, place: str
    ) -> tuple[str, list[int]]:
        """The last `length` of `ids` and their text, from the first whole character on."""
        ids = ids[max(len(ids) - length, 0) :] if length > 0 else []
        end = self.tokenizer.decode(ids, skip_special_tokens=False)
        while ids and end.startswith("\ufffd") and not text.endswith(end):
            ids = ids[1:]  # bytes of a character whose first ones are cut off
            end = self.tokenizer.decode(ids, skip_special_tokens=False)
        if not ids:
            raise UsageError(
                f"{place} holds a prompt whose last character alone is over the limit of "
                f"{self.max_prompt_length}; raise max_prompt_length."
            )
        return end, ids

    def _text(self, row: Mapping[str, Any], place: str) -> tuple[str, tuple[int, ...]]:
        """The text to encode, and the ids that go before it."""
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
                        f"There is a system_prompt, but {place} is plain text and not a chat; make "
                        "it a user's message (chat_template=True, or --chat), or leave "
                        "system_prompt out."
                    )
                return prompt, self.tokenizer.prefix_ids
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
        _check_arguments(row.get("chat_template_kwargs") or {}, f"chat_template_kwargs of {place}")
        try:
            chat = self.render(row, messages)
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from error
        return chat, ()  # a template writes its own beginning of sequence

    def chat_of(self, row: Mapping[str, Any]) -> list[Message] | None:
        """The messages of a row that `encode` takes as a chat; None where it takes it as text."""
        if row.get("messages") is None and not self.chat_template:
            return None
        messages = [*(row.get("messages") or [{"role": "user", "content": row["prompt"]}])]
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def messages_of(self, prompt: Prompt) -> list[Message]:
        """What a prompt says: a chat, or its text as a user's message."""
        return self.chat_of(prompt.row) or [{"role": "user", "content": prompt.text}]

    def render(self, row: Mapping[str, Any], messages: Sequence[Message], **arguments: Any) -> str:
        """The text of a chat, with the tools and the other arguments that `row` has.

        Args:
            arguments: of `apply_chat_template`, before those of the row.

        Raises:
            UsageError: the template refuses the messages.
        """
        of_the_row = row.get("chat_template_kwargs") or {}
        return self.tokenizer.apply_chat_template(
            messages,
            system_prompt=self.system_prompt,
            chat_template=self.chat_template if isinstance(self.chat_template, str) else None,
            **{**(self.chat_template_kwargs or {}), **_tools(row), **of_the_row, **arguments},
        )


def _check_arguments(arguments: Any, name: str) -> None:
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise UsageError(
            f"{name} is {reprlib.repr(arguments)}; it must be an object with names as keys."
        )
    for taken in (*ARGUMENTS_OF_OUR_OWN, "template"):
        if taken in arguments:
            raise UsageError(f"{name} holds {taken!r}, which is set elsewhere; leave it out.")


def _tools(row: Mapping[str, Any]) -> dict[str, Any]:
    """The tools that a row with a chat offers the policy, as TRL and OpenAI's files have them."""
    tools = row.get("tools")
    is_list = isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    return {"tools": tools} if tools and is_list else {}


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


def load_prompts(source: Any, encoder: PromptEncoder, name: str = "prompts") -> PromptDataset:
    """Read, tokenise and check all the prompts of `source`.

    Args:
        source: the path of a `.jsonl` file, or an iterable (a list, a `datasets.Dataset`) of
            texts or of rows; a row has `"prompt"` (text) or `"messages"` (a chat), and its other
            columns reach the reward function. A `PromptDataset` is taken as it is.
        name: what messages call a source that is no file.

    Raises:
        UsageError: a row is wrong (named by file and line, or by index), or there are no prompts.
    """
    if isinstance(source, PromptDataset):
        longest = max((len(prompt.ids) for prompt in source), default=0)
        if longest > encoder.max_prompt_length:
            raise UsageError(
                f"{name} holds a prompt of {longest} tokens, over the limit of "
                f"{encoder.max_prompt_length}; raise max_prompt_length."
            )
        return source
    if isinstance(source, str | Path):
        name, rows = str(source), read_jsonl(expand(source))
    elif isinstance(source, Set):
        raise UsageError(f"{name} is a set, whose order no seed can reproduce; sort it.")
    elif type(source).__name__ == "DataFrame":  # whose items are its columns
        raise UsageError(f"{name} is a DataFrame; give its rows, as df.to_dict('records') does.")
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        if type(source).__module__.startswith("datasets."):
            source = _rows_of_dataset(source)
        rows = ((f"{name}[{i}]", row) for i, row in enumerate(source))
    else:
        raise UsageError(
            f"{name} is a {type(source).__name__}; give the path of a .jsonl file, a list of "
            "texts or rows, or a datasets.Dataset."
        )
    encoded = [encoder.encode(row, index, place) for index, (place, row) in enumerate(rows)]
    kept = [prompt for prompt in encoded if prompt is not None]
    dataset = PromptDataset(kept, num_dropped=len(encoded) - len(kept))
    if not dataset:
        limit = f" of at most {encoder.max_prompt_length} tokens"
        raise UsageError(f"{name} holds no prompts{limit if encoder.overflow == 'drop' else ''}.")
    return dataset


def _rows_of_dataset(dataset: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows as they were put in: `datasets` gives all the objects of a column the same keys,
    with None for what one does not have, which a chat template would print."""
    for row in dataset:
        yield {key: _without_nones(row[key]) if key in _CHAT_COLUMNS else row[key] for key in row}


def _without_nones(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nones(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nones(item) for item in value]
    return value


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a .jsonl file, after its name in messages. Blank lines are skipped.

    Raises:
        UsageError: no such file, it cannot be read, or a line is not JSON in UTF-8.
    """
    kind = kind_of(path)
    if kind == "nothing":
        raise UsageError(
            f"{path}: no such file; a string names a .jsonl file of prompts, a list holds texts."
        )
    # A shell's <(command) is a pipe under /dev/fd; any other could be one that nobody writes to.
    if kind != "a file" and not (kind == "a pipe" and str(path).startswith(_OPEN_FILES)):
        raise UsageError(f"{path} is {kind}; name a .jsonl file of prompts.")
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}.") from error
    with file:
        for number, line in enumerate(file, start=1):
            place = f"line {number} of {path}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield place, json.loads(text, object_pairs_hook=unique_keys)
            except UnicodeDecodeError as error:
                raise UsageError(f"{place} is not UTF-8 text: {error}.") from error
            except DuplicateKey as error:
                key = reprlib.repr(error.key)
                raise UsageError(f"{place} holds {key} twice; leave one out.") from error
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{place} is not JSON: {json_error(error)}.") from error
