"""Chats as text: transformers renders the chat template of a tokenizer, within bounds.

A template is a program that came with a model, written by somebody else. transformers runs it in
jinja2's sandbox, which keeps it from the machine but not from going on for ever.
"""

import logging
import reprlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from qwen_env.errors import UsageError, reason
from qwen_env.watchdog import TooMuch, watched

Message = Mapping[str, Any]

ARGUMENTS_OF_OUR_OWN = {
    "conversation",
    "messages",
    "chat_template",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
    "system_prompt",
    "self",
}
"""Names that are no variables for a template: they are arguments of `apply_chat_template`, set by
us, or say what happens after the rendering."""

_REASONING = ("reasoning_content", "reasoning", "thinking")


def import_transformers() -> ModuleType:
    """The package, without its remark that PyTorch is not installed: tokenizers do without it."""

    def is_no_advice(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(is_no_advice)
    try:
        import transformers
    finally:
        logger.removeFilter(is_no_advice)
    return transformers


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    **arguments: Any,
) -> str:
    """Render `messages` (mappings with `role`, and `content` or `tool_calls`).

    Args:
        tokenizer: the tokenizer of transformers whose `apply_chat_template` renders.
        system_prompt: put first as a system message, unless the messages begin with one.
        chat_template: used instead of the tokenizer's own: a template, or the name of one of its
            several.
        add_generation_prompt: end with what opens the assistant's turn. Default: yes, unless the
            final message is continued.
        continue_final_message: leave the last message open, for the policy to go on with it.
        arguments: `tools`, `documents`, and whatever variables the template uses.

    Raises:
        UsageError: the messages are malformed, there is no template, it refuses the messages, or
            it takes too long or too much memory.
    """
    _check_messages(messages)
    _check_template(tokenizer, chat_template)
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    try:
        with watched():
            text: str = tokenizer.apply_chat_template(
                list(messages),
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **arguments,
            )
            return text
    except TooMuch as error:
        raise UsageError(
            f"the chat template does not come to an end on these messages: {error}."
        ) from None
    except Exception as error:  # a template is a program: it can fail in any way
        raise UsageError(f"the chat template fails on these messages: {reason(error)}.") from error


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise UsageError(f"messages is a {type(messages).__name__}; it must be a list of messages.")
    if not messages:
        raise UsageError("messages is empty; a chat needs at least one message.")
    for index, message in enumerate(messages):
        says_something = isinstance(message, Mapping) and (
            message.get("content") is not None
            or message.get("tool_calls")
            or any(message.get(name) for name in _REASONING)
        )
        if not says_something or "role" not in message:
            raise UsageError(
                f"message {index} is {reprlib.repr(message)}; a message is an object with 'role' "
                "and 'content' (which may be left out beside 'tool_calls')."
            )


def _check_template(tokenizer: Any, chat_template: str | None) -> None:
    own = tokenizer.chat_template
    if chat_template is None:
        if not own:
            raise UsageError(
                "the tokenizer has no chat template; pass one as chat_template, "
                "or give plain text and leave chat_template out."
            )
        return
    # transformers takes a name that it does not know for a template, which renders to that name.
    names = list(own) if isinstance(own, Mapping) else []
    if "{" not in chat_template and chat_template not in names:
        raise UsageError(
            f"chat_template is {reprlib.repr(chat_template)}, which is neither a template nor the "
            f"name of one; the tokenizer has {', '.join(map(repr, names)) or 'none with a name'}."
        )
